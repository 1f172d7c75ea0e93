"""`View`: a strided window of an array that writes through."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import numpy as np

from npscope import operands as op
from npscope.errors import KindError, SpecError, about
from npscope.tiling import MAX_NDIM, MAX_SIZE, as_int, as_ints

Array = Any


def with_settable_data(cls: type) -> type:
    """Class decorator: a frozen dataclass whose `data` may be assigned, which writes into its memory.

    The object stays what it was, only the elements it shows change; a frozen dataclass
    would refuse the assignment before its property setter is reached.
    """

    def assign(self: Any, name: str, value: Any) -> None:
        if name != "data":
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        self.set_data(value)

    cls.__setattr__ = assign  # type: ignore[method-assign, assignment]
    return cls


@with_settable_data
@dataclass(frozen=True, eq=False, repr=False, init=False)
class View:
    """A strided window of `array`, which reads and writes that array's memory.

    Parameters
    ----------
    array
        C- or F-dense NumPy or CuPy array that owns the window's elements.
    shape
        Shape of the window.
    stride
        Distance between neighbours along each axis, in elements (not bytes); may be negative.
    offset
        Position of the window's first element, in elements from the first element of `array`.

    Raises
    ------
    SpecError
        (a ValueError) the window leaves `array`, `array` is not dense, lengths differ, a size is negative.
    KindError
        (a TypeError) `array` is no array of a supported dtype, or sizes are no integers.

    Notes
    -----
    A window may meet itself (two indices, one element); it can then be read, not written. Views are
    equal when they show the same elements of the same array object in the same geometry.

    Examples
    --------
    The even columns of a matrix, reversed:

    >>> import numpy
    >>> a = numpy.arange(8.0).reshape(2, 4)
    >>> v = View(a, (2, 2), (4, -2), offset=2)
    >>> v.data
    array([[2., 0.],
           [6., 4.]])
    >>> v.data = numpy.zeros((2, 2))
    >>> a
    array([[0., 1., 0., 3.],
           [0., 5., 0., 7.]])
    """

    array: Array
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    _window: Array = field(init=False)

    def __init__(self, array: Array, shape: Any, stride: Any, offset: Any = 0) -> None:
        with about("View"):
            op.require_array(array, "array")
            if not op.is_strided(array):
                raise KindError(
                    f"strided windows need a NumPy or CuPy array, not {type(array).__name__}; "
                    "pass the array itself as the view"
                )
            sizes, steps = as_ints(shape, "shape"), as_ints(stride, "stride")
            start = as_int(offset, "offset")
            if not (array.flags.c_contiguous or array.flags.f_contiguous):
                raise SpecError("array must be C- or F-dense; pass the strided array itself, or its base")
            _require_inside(array.size, sizes, steps, start)
            flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
            # Along an axis of length 1 a stride is never taken, and may be any number.
            strides = tuple(s * array.itemsize if n > 1 else 0 for n, s in zip(sizes, steps, strict=True))
            window = _window(flat[start:], sizes, strides)
        self._set(array, sizes, steps, start, window)

    def _set(self, array: Array, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, window: Array) -> None:
        for name, value in (
            ("array", array),
            ("shape", shape),
            ("stride", stride),
            ("offset", offset),
            ("_window", window),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, array_or_view: Array | View) -> View:
        """The view itself, or the whole of an array as it is strided.

        KindError for what is no array or has an unsupported dtype.

        >>> import numpy
        >>> View.of(numpy.zeros((4, 6))[::2]).shape
        (2, 6)
        """
        if isinstance(array_or_view, View):
            return array_or_view
        with about("View"):
            op.require_array(array_or_view, "array")
        array, view = array_or_view, object.__new__(cls)
        shape = tuple(array.shape)
        if op.is_strided(array):
            with about("View"):
                _require_whole_strides(array)
            stride = tuple(s // array.itemsize for s in array.strides)
        else:
            stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        view._set(array, shape, stride, 0, array)
        return view

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, View):
            return NotImplemented
        return self.array is other.array and self._geometry() == other._geometry()

    def __hash__(self) -> int:
        return hash((id(self.array), self._geometry()))

    def _geometry(self) -> tuple[Any, ...]:
        return self.shape, self.stride, self.offset

    def __repr__(self) -> str:
        return f"View({self._window.dtype} {self.shape}, stride={self.stride}, offset={self.offset})"

    def __getstate__(self) -> tuple[Any, ...]:
        return self.array, *self._geometry(), self._window is self.array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        array, shape, stride, offset, whole = state
        if whole:
            whole_view = View.of(array)  # a copy need not be strided as the original was
            self._set(array, whole_view.shape, whole_view.stride, 0, array)
        else:
            View.__init__(self, array, shape, stride, offset)

    @property
    def data(self) -> Array:
        """The live window: an array of shape `shape` whose memory is that of `array`; assigning writes into it."""
        return self._window

    def set_data(self, a: Array) -> None:
        """Write `a`, of the shape of the window (or broadcastable to it), into the window.

        KindError for an immutable array, SpecError for a read-only one or one that meets itself.
        """
        with about("View"):
            op.require_writable(self._window, "array")
            op.require_array(a, "data")
            op.require_castable(a, self._window, "data")
            shape = tuple(a.shape)
            try:
                fits = np.broadcast_shapes(shape, self.shape) == self.shape
            except ValueError:
                fits = False
            if not fits:
                raise SpecError(f"data of shape {shape} does not fit the window {self.shape}")
        self._window[...] = a

    @property
    def dtype(self) -> Any:
        """The dtype of the elements."""
        return self._window.dtype

    @property
    def ndim(self) -> int:
        """Number of axes of the window."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements of the window."""
        return math.prod(self.shape)

    @property
    def cosize(self) -> int:
        """Elements of memory that the window spans, gaps included; 0 when it is empty.

        >>> import numpy
        >>> View(numpy.zeros(10), (2, 3), (4, 1)).cosize
        7
        """
        if self.numel() == 0:
            return 0
        return 1 + sum(abs(d) * (n - 1) for n, d in zip(self.shape, self.stride, strict=True))

    def linear_offset(self, idx: Any) -> int:
        """Position in `array`, in elements from its first one, of the element at index `idx`.

        SpecError for an index outside the window, KindError for what is no tuple of integers.

        >>> import numpy
        >>> View(numpy.zeros(10), (2, 3), (4, 1), offset=1).linear_offset((1, 2))
        7
        """
        with about("View"):
            index = as_ints(idx, "idx")
            if len(index) != self.ndim or any(not -n <= i < n for i, n in zip(index, self.shape, strict=True)):
                raise SpecError(f"index {index} is outside the window {self.shape}")
        return self.offset + sum((i % n) * d for i, n, d in zip(index, self.shape, self.stride, strict=True))

    def like(self, a: Array) -> View:
        """The same window on another array of the shape of `array`.

        SpecError when the shape differs, KindError for what is no array.

        >>> import numpy
        >>> window = View(numpy.zeros((2, 4)), (2, 2), (4, 2))
        >>> window.like(numpy.ones((2, 4))).data.sum()
        np.float64(4.0)
        """
        with about("View"):
            op.require_array(a, "a")
            if tuple(a.shape) != tuple(self.array.shape):
                raise SpecError(f"a has shape {tuple(a.shape)}, the array of this view {tuple(self.array.shape)}")
            if self._window is not self.array and a.strides != self.array.strides:
                raise SpecError("a lies in another memory order than the array of this view; copy it into that order")
        if self._window is self.array:
            return View.of(a)
        return View(a, self.shape, self.stride, self.offset)


def _window(flat: Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    if op.is_numpy(flat):
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=flat.flags.writeable)
    return type(flat)(shape, flat.dtype, flat.data, strides)  # CuPy's constructor, without importing it


def _require_whole_strides(array: np.ndarray) -> None:
    if any(s % array.itemsize for n, s in zip(array.shape, array.strides, strict=True) if n > 1):
        raise SpecError(f"strides {array.strides} are no multiples of {array.itemsize} bytes; copy it")


def _require_inside(size: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> None:
    """SpecError unless every element of the window is one of `size` elements."""
    if len(shape) != len(stride):
        raise SpecError(f"shape {shape} has {len(shape)} axes, stride {stride} has {len(stride)}")
    if len(shape) > MAX_NDIM:
        raise SpecError(f"{len(shape)} axes, at most {MAX_NDIM} are supported")
    if any(n > MAX_SIZE for n in shape):
        raise SpecError(f"shape {shape} is larger than any array")
    if any(n < 0 for n in shape):
        raise SpecError(f"shape {shape} has a negative size")
    if not 0 <= offset <= size:
        raise SpecError(f"offset {offset} is outside the {size} elements of array")
    if 0 in shape:
        return
    first = offset + sum(d * (n - 1) for n, d in zip(shape, stride, strict=True) if d < 0)
    last = offset + sum(d * (n - 1) for n, d in zip(shape, stride, strict=True) if d > 0)
    if first < 0 or last >= size:
        raise SpecError(f"the window spans elements {first} to {last}, array has elements 0 to {size - 1}")
