"""From what a caller passed to what a backend takes: every check that needs no geometry of its own.

Facts known on the host are always checked, before anything is written. NumPy arrays are
recognised here; other array libraries are only looked at when one of their arrays arrives.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from npscope.axes import array_namespace
from npscope.dtypes import dtype_name, kind_of
from npscope.errors import KindError, SpecError, about
from npscope.memory import meets_itself, neighbours, same_window, share_an_element
from npscope.options import checks_devices
from npscope.tiling import Cut, Leaf, as_int, block_grid_cut, scope_grid_cut

Array = Any


def is_numpy(array: Any) -> bool:
    """Whether `array` is a NumPy array that is nothing more than an array (or a memory map)."""
    return type(array) is np.ndarray or (
        isinstance(array, np.ndarray) and not isinstance(array, np.matrix | np.ma.MaskedArray)
    )


def is_cupy(array: Any) -> bool:
    """Whether `array` is a CuPy array; CuPy is not imported to find out."""
    kind = type(array)
    return kind in _CUPY or (kind is not np.ndarray and _is_of_cupy(kind))


def _is_of_cupy(kind: type) -> bool:
    found = kind.__name__ == "ndarray" and kind.__module__.partition(".")[0] == "cupy"
    if found:
        _CUPY.add(kind)
    return found


_CUPY: set[type] = set()
"""CuPy's type, once seen: reading its module takes longer than all else about a small call's array."""


def is_strided(array: Any) -> bool:
    """Whether `array` is memory with strides, that may be windowed and written: of NumPy or CuPy."""
    return type(array) is np.ndarray or is_numpy(array) or is_cupy(array)  # what most are, without a call


def geometry(array: Any) -> np.ndarray:
    """A NumPy array with the place, shape and strides of a strided array, for questions about memory.

    That of a CuPy array stands for device memory: its elements must never be looked at.
    """
    if is_numpy(array):
        numpy_array: np.ndarray = array
        return numpy_array
    return np.asarray(_Place(array))


class _Place:
    """The array interface of device memory, which only answers where it is."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "data": (array.data.ptr or array.dtype.itemsize, False),
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.dtype.itemsize}",
            "version": 3,
        }


def require_array(array: Any, what: str) -> None:
    """KindError with the way out unless `array` is an array with a supported dtype."""
    if is_strided(array):
        kind_of(array.dtype)
        return
    if not _is_foreign(array):
        hint = "use numpy.asarray to make a plain array of it"
        if isinstance(array, np.ma.MaskedArray):
            hint = "npscope does not see its mask; pass .filled(0) or .data"
        raise KindError(f"{what} must be an array, not {type(array).__name__}; {hint}")
    kind_of(array.dtype)
    _require_float64(array)


def _require_float64(array: Any) -> None:
    """KindError where the library or device of a foreign array has no float64: exact norms need it."""
    import array_api_compat

    xp, device = array_namespace(array), array_api_compat.device(array)
    if "float64" not in xp.__array_namespace_info__().dtypes(device=device, kind="real floating"):
        raise KindError(f"there is no float64 on {device}, which exact norms need; with JAX set jax_enable_x64=True")


def require_array_of_any_dtype(array: Any, what: str) -> None:
    """KindError unless `array` is an array; its dtype does not matter where numbers are only moved."""
    if not is_numpy(array) and not _is_foreign(array):
        raise KindError(f"{what} must be an array, not {type(array).__name__}; use numpy.asarray")


def require_castable(array: Any, window: Any, what: str) -> None:
    """KindError where writing `array` into `window` would lose its kind: complex into real, floats into integers."""
    if is_strided(array) and not np.can_cast(array.dtype, window.dtype, "same_kind"):
        raise KindError(f"{what} has dtype {array.dtype}, which {window.dtype} cannot hold; convert it first")


def _is_foreign(array: Any) -> bool:
    if isinstance(array, np.ndarray | np.generic | list | tuple | str | bytes | numbers.Number) or not hasattr(
        array, "dtype"
    ):
        return False
    import array_api_compat

    return bool(array_api_compat.is_array_api_obj(array)) and not array_api_compat.is_dask_array(array)


def require_alike(array: Any, other: Any, what: str, other_what: str) -> None:
    """KindError naming both unless the two arrays belong to one library and one device."""
    if is_numpy(array) and is_numpy(other):
        return
    if is_cupy(array) and is_cupy(other) and array.data.device_id == other.data.device_id:
        return
    places = [_place(a) for a in (array, other)]
    same_library = not is_numpy(array) and not is_numpy(other) and array_namespace(array) is array_namespace(other)
    if not same_library or places[0][1] != places[1][1]:
        here, there = (f"{name} on {device}" if device else name for name, device in places)
        raise KindError(f"{what} is {here} but {other_what} is {there}; move one of them to the other first")


def _place(array: Any) -> tuple[str, Any]:
    if is_numpy(array):
        return "a NumPy array", None
    import array_api_compat

    return f"a {type(array).__module__}.{type(array).__name__}", array_api_compat.device(array)


def require_writable(array: Any, what: str) -> None:
    """KindError for immutable arrays; SpecError for read-only ones and windows that meet themselves."""
    if is_numpy(array):
        flags = array.flags
        if not flags.writeable:
            raise SpecError(f"{what} is read-only; pass a copy, or use the functions, which return new arrays")
        if flags.c_contiguous:  # as most are, which takes less to see
            return
    elif not is_cupy(array):
        import array_api_compat

        if not array_api_compat.is_writeable_array(array):
            raise KindError(f"{what} is immutable ({type(array).__name__}); use the functions, which return new arrays")
        return
    if meets_itself(array.shape, array.strides, array.itemsize):
        raise SpecError(f"{what} is a window that meets itself: it can be read, but not written; pass a copy")


def overlaps(written: Sequence[Any], read: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Indices (i, j) of all ``written[i]`` and ``read[j]`` that share an element, or are one object."""
    if all(is_strided(a) for a in (*written, *read)):
        here, there = [geometry(a) for a in written], [geometry(a) for a in read]
        yield from ((i, j) for i, j in neighbours(here, there) if share_an_element(here[i], there[j]))
    else:
        yield from ((i, j) for i, a in enumerate(written) for j, b in enumerate(read) if a is b)


def require_no_overlap(written: Any, read: Any, what: str, read_what: str, *, unless_same: bool = True) -> None:
    """SpecError if `written` shares memory with `read`; being the same window is allowed if `unless_same`."""
    if read is written and unless_same:
        return
    if type(written) is type(read) is np.ndarray or (is_numpy(written) and is_numpy(read)):
        here, there = written, read
    elif not (is_strided(written) and is_strided(read)) or (is_cupy(read) and _lie_apart(written, read)):
        return
    else:
        here, there = geometry(written), geometry(read)
    if share_an_element(here, there):
        if unless_same and written.dtype == read.dtype and same_window(here, there):
            return
        raise SpecError(f"{what} overlaps {read_what}, which is read; pass a copy of one of them")


def _lie_apart(a: Any, b: Any) -> bool:
    """Whether two CuPy arrays without gaps are certainly not the same memory: what most are, found fast."""
    if not all(x.flags.c_contiguous or x.flags.f_contiguous for x in (a, b)):
        return False
    start, other = a.data.ptr, b.data.ptr
    return bool(start + a.nbytes <= other or other + b.nbytes <= start)


def as_destination(out: Any, x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """`out` checked as the place for a result read from `x`."""
    if out is not x and not (type(out) is type(x) is np.ndarray and out.dtype == dtype):  # what most are, seen at once
        require_array(out, "out")
        require_alike(x, out, "x", "out")
    if tuple(out.shape) != shape:
        raise SpecError(f"out has shape {tuple(out.shape)}, the result {shape}")
    if out.dtype != dtype:
        raise KindError(f"out has dtype {out.dtype}, the result {dtype}")
    require_writable(out, "out")
    require_no_overlap(out, x, "out", "x")
    return out


def store(array: Any, result: Any) -> Any:
    """`result` written into `array`, which a backend may already have done."""
    if result is not array:
        array[...] = result
    return array


def mask_like(x: Any, shape: tuple[int, ...], cut: Cut) -> Leaf | None:
    """A place for a mask of this shape, which lies in memory in the order of `x`, if that is of NumPy."""
    return Leaf(np.empty_like(x, np.bool_, subok=False, shape=shape), cut) if is_numpy(x) else None


def axes_in_memory(x: Any) -> tuple[int, ...] | None:
    """The axes of a NumPy array, longest strides first; None if that is their order, and for other arrays."""
    if not is_numpy(x) or x.flags.c_contiguous:
        return None
    axes = tuple(sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])))
    return None if axes == tuple(range(x.ndim)) else axes


def as_table(place: Any) -> Any:
    """The memory of a place for a result, as one row of blocks; None where it is not contiguous memory."""
    if is_numpy(place):
        flags = place.flags
        fits = flags.c_contiguous and flags.aligned and place.dtype.isnative
    else:
        fits = is_cupy(place) and place.flags.c_contiguous
    return place.reshape(1, -1) if fits else None


_NORMS = {norm: np.dtype(norm) for norm in ("float32", "float64")}
"""NumPy's dtypes by name: to make one of a name takes a hundredth of a small call."""


def norm_dtype(x: Any) -> Any:
    """The dtype of the norms of an array, in its own library."""
    norm = kind_of(x.dtype).norm
    return _NORMS[norm] if is_numpy(x) else getattr(array_namespace(x), norm)


_PLAIN_NUMBERS = (float, int)
"""The types that need no look at what they derive from, which takes a microsecond."""


def as_number(value: Any, what: str) -> float:
    """A real number of the host as a float; KindError for bool, complex and text, SpecError beyond float64."""
    if type(value) not in _PLAIN_NUMBERS and (
        isinstance(value, bool | np.bool_ | np.timedelta64) or not isinstance(value, numbers.Real)
    ):
        raise KindError(f"{what} must be a real number, not {type(value).__name__} {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise SpecError(f"{what} is beyond the range of float64") from None


def as_ord(ord: Any) -> float:
    """The order of a norm: 1, 2, inf or any p > 0."""
    p = as_number(ord, "ord")
    if not p > 0:
        raise SpecError(f"ord = {ord} must be 1, 2, inf or another positive number")
    return p


def as_iteration(max_iter: Any, rtol: Any) -> tuple[int, float]:
    """The limits of the conditioned shrink: at least one step, a positive finite tolerance."""
    steps = as_int(max_iter, "max_iter")
    if steps < 1:
        raise SpecError(f"max_iter = {steps} must be at least 1")
    tolerance = as_number(rtol, "rtol")
    if not 0 < tolerance < math.inf:
        raise SpecError(f"rtol = {rtol} must be positive and finite")
    return steps, tolerance


def as_grid(
    value: Any,
    like: Array,
    shape: tuple[int, ...],
    dtype: str,
    what: str,
    *,
    signed: bool = True,
    written: Sequence[Array] = (),
) -> Array:
    """Real numbers broadcast to the grid `shape`, converted to `dtype` once, on the device of `like`.

    NaN is SpecError, and so is a negative number unless `signed`. `value` is a number or an array, and may lie
    in one of the arrays that will be `written`: the numbers are those of now. Numbers in device memory are
    neither read, unless `config` asks for it, nor converted.
    """
    if type(value) is float or isinstance(value, numbers.Real | np.bool_):
        return _everywhere(as_number(value, what), shape, dtype, what, signed)
    if isinstance(value, np.generic) and value.dtype.kind == "V":  # a scalar of ml_dtypes
        value = np.asarray(value)
    if not is_numpy(value) and not _is_foreign(value):
        raise KindError(f"{what} must be a number or an array, not {type(value).__name__}")
    with about(what):
        kind = kind_of(value.dtype)
    if kind.is_complex:
        raise KindError(f"{what} must be real numbers, not {value.dtype}")
    if not is_numpy(value):
        require_alike(like, value, "x", what)
    return _as_grid(value, shape, dtype, what, signed, written)


@lru_cache(maxsize=1024)
def _everywhere(number: float, shape: tuple[int, ...], dtype: str, what: str, signed: bool) -> Array:
    """One number for the whole grid: one entry, whatever the shape."""
    if math.isnan(number):
        raise SpecError(f"{what} contains NaN")
    if not signed and number < 0:
        raise SpecError(f"{what} contains a negative number; a shrinkage needs at least 0")
    with np.errstate(all="ignore"):
        entry = np.asarray(number).astype(dtype)
    entry.flags.writeable = False  # it is kept, and the sign of a zero, which may be that of another, does not matter
    return np.ndarray(shape, entry.dtype, entry, strides=(0,) * len(shape))


def _any(flags: Any) -> bool:
    return bool(flags) if flags.ndim == 0 else bool(array_namespace(flags).any(flags))


def _as_grid(
    value: Any, shape: tuple[int, ...], dtype: str, what: str, signed: bool, written: Sequence[Array]
) -> Array:
    xp, readable = array_namespace(value), not is_cupy(value) or checks_devices()
    with np.errstate(all="ignore"):
        # CuPy's conversions flush subnormal numbers to zero: its backend converts them itself.
        converted = _as_of_now(value, written) if is_cupy(value) else xp.astype(value, getattr(xp, dtype))
        negative = readable and not signed and _any(value < 0)
    if readable and _any(xp.isnan(converted)):
        raise SpecError(f"{what} contains NaN")
    if negative:
        raise SpecError(f"{what} contains a negative number; a shrinkage needs at least 0")
    try:
        return xp.broadcast_to(converted, shape)
    except (ValueError, RuntimeError, TypeError):
        raise SpecError(
            f"{what} of shape {tuple(value.shape)} does not broadcast to the grid {shape} (one number a block or scope)"
        ) from None


def _as_of_now(value: Array, written: Sequence[Array]) -> Array:
    """Device numbers that no write will change: themselves, or a copy where they lie in what is written."""
    near = [array for array in written if not _lie_apart(array, value)]
    return value.copy() if any(True for _ in overlaps(near, [value])) else value


def as_block_mask(mask: Any, like: Array, shape: tuple[int, ...], what: str) -> Array:
    """A bool array broadcast to the grid `shape`."""
    if isinstance(mask, bool | np.bool_):
        mask = np.asarray(mask)
    if not is_numpy(mask) and not _is_foreign(mask):
        raise KindError(f"{what} must be a bool array, not {type(mask).__name__}")
    if dtype_name(mask.dtype) not in ("bool", "bool_"):
        raise KindError(f"{what} must be a bool array (True = kept), not {mask.dtype}")
    if is_numpy(like) or not is_numpy(mask):
        require_alike(like, mask, "x", what)
    if tuple(mask.shape) != shape:
        raise SpecError(f"{what} has shape {tuple(mask.shape)}, the grid is {shape}")
    return mask


def as_scores(scores: Any, like: Array, shape: tuple[int, ...], what: str) -> Array:
    """Numbers to rank by instead of `like`: an array of the same shape, library and device."""
    require_array(scores, what)
    require_alike(like, scores, "x", what)
    if tuple(scores.shape) != shape:
        raise SpecError(f"{what} has shape {tuple(scores.shape)}, expected {shape}")
    return scores


def as_conditioner(h: Any, like: Array, shape: tuple[int, ...], what: str) -> Array:
    """A diagonal metric: real, of the shape of the data. Backends check its entries, on the way to them."""
    h = as_scores(h, like, shape, what)
    if kind_of(h.dtype).is_complex:
        raise KindError(f"{what} must be real, not {h.dtype}")
    return h


def require_shrinkable(array: Array, what: str) -> None:
    """KindError unless scaled values of this dtype are meaningful: floats of 16 bits and more, complex."""
    if not kind_of(array.dtype).shrinkable:
        raise KindError(f"{what} has dtype {array.dtype}; soft thresholds need floats of 16 bits or more, or complex")


def scope_leaf(grid: Array) -> Leaf:
    """Numbers over a scope grid, one for each scope."""
    return Leaf(grid, scope_grid_cut(tuple(grid.shape)))


def block_leaf(grid: Array) -> Leaf:
    """Numbers over a block grid, one for each block of the one scope that spans it."""
    return Leaf(grid, block_grid_cut(tuple(grid.shape)))
