"""The functions: block norms, selection and shrinkage of one array, served by the backend its type names.

Each function infers the backend, validates, and makes one backend call. The functions
of this module dispatch by argument type; `namespace` gives the same functions bound to
one backend.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import numpy as np

from npscope import operands as op
from npscope.axes import array_namespace, interleaved, regroup, reshaped
from npscope.backends import Array, Backend
from npscope.counts import as_counts, nnz_from_sparsity
from npscope.dtypes import kind_of
from npscope.errors import KindError, SpecError, about
from npscope.options import BACKENDS, chosen_backend, use_backend
from npscope.tiling import Cut, Leaf, Parts, Tiling, array_cut, as_int, as_ints, axis_cut, permuted

_MODULES = {"reference": "reference", "numba": "numba_cpu", "cupy": "cupy_gpu"}

Block = tuple[int, ...]


# --- dispatch ------------------------------------------------------------------------------------


@cache
def load_backend(name: str) -> Backend:
    """The backend module `name`; KindError when this installation does not have it."""
    try:
        module: Any = importlib.import_module(f"npscope.backends.{_MODULES[name]}")
    except ImportError as error:
        raise KindError(f"the backend {name!r} is not available here: {error}") from error
    backend: Backend = module
    return backend


@cache
def _numpy_backend() -> Backend:
    """Numba, or with one warning the reference where Numba is missing or broken."""
    try:
        return load_backend("numba")
    except Exception as error:  # a broken Numba may raise anything at import
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None  # Python 3.11 makes a RuntimeError of one that comes in a class body
        warnings.warn(f"npscope runs on its slow reference backend: {error}", RuntimeWarning, stacklevel=4)
        return load_backend("reference")


def backend_for(array: Any) -> Backend:
    """The backend that serves `array`: the one chosen by `use_backend`, else by its type."""
    chosen = chosen_backend()
    if op.is_numpy(array):
        if chosen == "cupy":
            raise KindError("the backend 'cupy' does not serve NumPy arrays; move it with cupy.asarray")
        return _numpy_backend() if chosen is None else load_backend(chosen)
    if op.is_cupy(array) and chosen in (None, "cupy"):
        return load_backend("cupy")
    if chosen not in (None, "reference"):
        raise KindError(f"the backend {chosen!r} does not serve {type(array).__module__}.{type(array).__name__} arrays")
    return load_backend("reference")


def begin(x: Any) -> Backend:
    """The backend of `x`, after checking that it is an array of a supported dtype."""
    op.require_array(x, "x")
    return backend_for(x)


# --- shared steps --------------------------------------------------------------------------------


def _cuts(x: Array, block: Block, scope: Block = ()) -> tuple[Cut, Tiling, Tiling]:
    return array_cut(tuple(x.shape), as_ints(block, "block shape"), as_ints(scope, "scope shape"))


def _one(leaf: Leaf) -> Parts:
    return ((leaf,),)


def _as_block_grid(table: Array, scopes: Tiling) -> Array:
    """An ``(S, n)`` table as the block grid that `scopes` tiles."""
    return regroup(table, (*scopes.grid, *scopes.tile), interleaved(len(scopes.grid)), scopes.shape)


def _destination(x: Array, out: Array | None) -> Array:
    """Where a writer puts its result: `out`, or a new array like `x`."""
    if out is x:  # whose shape and dtype fit, and which is read where it is written
        op.require_writable(x, "out")
        return x
    if out is not None:
        return op.as_destination(out, x, tuple(x.shape), x.dtype)
    if op.is_cupy(x):
        return array_namespace(x).empty_like(x)
    return np.empty_like(x, subok=False) if op.is_numpy(x) else x


def _target(x: Array, destination: Array, geometry: Cut) -> Leaf:
    return Leaf(destination, geometry, None if destination is x else x)


def _require_unread(target: Leaf, read: Array, what: str) -> None:
    """SpecError if writing `target` changes `read`, unless that is the very array worked on in place."""
    if read is not target.origin:
        op.require_no_overlap(target.array, read, "out", what, unless_same=target.origin is None)


def _stored(x: Array, out: Array | None, target: Leaf, result: Array) -> Array:
    """The result of a writer in its place; arrays of other libraries without `out` come back as they are."""
    return result if out is None and not op.is_strided(x) else op.store(target.array, result)


# --- functions -----------------------------------------------------------------------------------


def block_norms(x: Array, block: Block, *, ord: float = 2, out: Array | None = None) -> Array:
    """Norm of every block of `x`, over the block grid.

    Parameters
    ----------
    x
        Array of any supported dtype and any strides, shape ``(N1, N2, ..)``.
    block
        Block sizes, one for each axis; -1 is a whole axis, ``()`` single elements. They must divide.
    ord
        1, 2, inf, or any p > 0: ``(sum |x|**p) ** (1/p)``.
    out
        Place for the result, of its shape and dtype.

    Returns
    -------
    Array of shape ``(N1 / b1, N2 / b2, ..)``, which for NumPy lies in memory as `x` does: float32 for
    floats of up to 32 bits, 8- and 16-bit integers and complex64, else float64. Below float64, for real
    data and ord 1, 2, inf, the correctly rounded exact norm; otherwise within 4 ulp, without overflow on
    the way. A block with a NaN has norm NaN.

    Raises
    ------
    SpecError
        (a ValueError) a block does not divide, `ord` is not positive, `out` does not fit.
    KindError
        (a TypeError) `x` is no array or has an unsupported dtype.

    Examples
    --------
    >>> import numpy
    >>> block_norms(numpy.asarray([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 5.0, 12.0]]), (1, 2))
    array([[ 5.,  0.],
           [ 0., 13.]])
    """
    with about("block_norms"):
        backend = begin(x)
        geometry, blocks, _ = _cuts(x, block)
        p = op.as_ord(ord)
        if out is not None:
            op.as_destination(out, x, blocks.grid, op.norm_dtype(x))
        # Blocks are measured in any order, so in that of memory: to turn the norms of a view takes as long as they do.
        axes, place = op.axes_in_memory(x), out
        if axes is not None:
            x, place = x.transpose(axes), None if out is None else out.transpose(axes)
            geometry, blocks, _ = array_cut(tuple(x.shape), permuted(blocks.tile, axes))
        table = None if place is None else op.as_table(place)
        result = backend.norms(_one(Leaf(x, geometry)), p, table)
        if out is not None and result is table:
            return out
        grid = reshaped(result, blocks.grid)
        if place is not None:
            op.store(place, grid)
            return out
        return grid if axes is None else grid.transpose([axes.index(axis) for axis in range(len(axes))])


def kth_largest(a: Array, k: int | Array, axis: int | None = -1) -> Array:
    """The k-th largest value along `axis`, counted from 1, by signed value.

    Parameters
    ----------
    a
        Real array.
    k
        Integer, or integer array broadcastable to the shape of the result; ``1 <= k <= n``.
    axis
        The axis along which to rank; None ranks all entries together.

    Returns
    -------
    Array of the shape of `a` without `axis`, in the dtype of `a`. NaN counts as largest;
    zeros come out as +0.0.

    Raises
    ------
    SpecError
        (a ValueError) `k` or `axis` is out of range.
    KindError
        (a TypeError) `a` is complex or no array, `k` no integer.

    Examples
    --------
    >>> import numpy
    >>> kth_largest(numpy.asarray([[1, 5, 3], [9, 7, 8]]), 2)
    array([3, 8])
    """
    with about("kth_largest"):
        backend, geometry, shape = _along(a, axis)
        counts = as_counts(k, shape, low=1, high=geometry.blocks, what="k")
        found = backend.kth(_one(Leaf(a, geometry)), op.scope_leaf(counts), None)
        return _in_byte_order(reshaped(found, shape), a)


def _in_byte_order(found: Array, a: Array) -> Array:
    """Values of the dtype of `a`, if they are, in its byte order."""
    same = op.is_numpy(a) and found.dtype.kind == a.dtype.kind
    return found.astype(a.dtype, copy=False) if same else found


def _along(a: Array, axis: int | None) -> tuple[Backend, Cut, tuple[int, ...]]:
    """(backend, cut of `a` along `axis`, shape without `axis`) after validation."""
    op.require_array(a, "a")
    if kind_of(a.dtype).is_complex:
        raise KindError(f"a has dtype {a.dtype}: complex numbers have no order; rank their magnitudes with block_norms")
    shape = tuple(a.shape)
    if axis is None:
        return backend_for(a), axis_cut(shape, None), ()
    position = as_int(axis, "axis")
    if not -len(shape) <= position < len(shape):
        raise SpecError(f"axis {position} is out of range for an array of {len(shape)} axes")
    position %= len(shape)
    return backend_for(a), axis_cut(shape, position), shape[:position] + shape[position + 1 :]


def mid_kth_largest(a: Array, k: int | Array, axis: int | None = -1, *, k_weight: float = 1.0) -> Array:
    """The point ``(v_k + w * v_(k+1)) / (1 + w)`` between the k-th and the next largest value.

    A threshold there keeps exactly k entries when the two differ.

    Parameters
    ----------
    a, axis
        As for `kth_largest`.
    k
        Integer or integer array, ``1 <= k < n``.
    k_weight
        The weight w of ``v_(k+1)``, with ``1 + w > 0``; 1 is the midpoint, 0 is ``v_k``.

    Returns
    -------
    Array of the shape of `a` without `axis`, in the dtype of `a`, or of its norms for integers.

    Raises
    ------
    SpecError, KindError
        As `kth_largest`, and for a weight that is not finite or has ``1 + w <= 0``.

    Examples
    --------
    >>> import numpy
    >>> mid_kth_largest(numpy.asarray([4.0, 1.0, 2.0]), 1)
    array(3.)
    """
    with about("mid_kth_largest"):
        backend, geometry, shape = _along(a, axis)
        counts = as_counts(k, shape, low=1, high=geometry.blocks - 1, what="k")
        found = backend.midpoint(_one(Leaf(a, geometry)), op.scope_leaf(counts), as_weight(k_weight), None)
        return _in_byte_order(reshaped(found, shape), a)


def as_weight(k_weight: float) -> float:
    """A weight w with 1 + w > 0."""
    weight = op.as_number(k_weight, "k_weight")
    if not (1 + weight > 0 and weight < np.inf):
        raise SpecError(f"k_weight = {weight} must be finite with 1 + k_weight > 0")
    return weight


def topk_mask(a: Array, k: int | Array, axis: int | None = -1) -> Array:
    """True for exactly the k largest entries along `axis`, by signed value; ties go to the lower index.

    Parameters
    ----------
    a
        Real array.
    k
        Integer, or integer array broadcastable to the shape of `a` without `axis`; ``0 <= k <= n``.
    axis
        The axis along which to rank; None ranks all entries together.

    Returns
    -------
    Bool array of the shape of `a`, and for NumPy of its order in memory. NaN counts as largest.

    Raises
    ------
    SpecError
        (a ValueError) `k` or `axis` is out of range.
    KindError
        (a TypeError) `a` is complex or no array, `k` no integer.

    Examples
    --------
    >>> import numpy
    >>> topk_mask(numpy.asarray([2, 5, 5, 5]), 2)
    array([False,  True,  True, False])
    """
    with about("topk_mask"):
        backend, geometry, shape = _along(a, axis)
        counts = as_counts(k, shape, low=0, high=geometry.blocks, what="k")
        place = op.mask_like(a, tuple(a.shape), geometry)
        table = backend.mask(Leaf(a, geometry), op.scope_leaf(counts), None, place)
        if place is not None:
            return table
        if axis is None:
            return reshaped(table, tuple(a.shape))
        last, position = reshaped(table, (*shape, geometry.blocks)), as_int(axis, "axis") % len(a.shape)
        return last if position == len(shape) else array_namespace(last).moveaxis(last, -1, position)


def block_mask(
    x: Array, nnz: int | Array, block: Block, scope: Block, *, scores: Array | None = None, ord: float = 2
) -> Array:
    """True for exactly the `nnz` blocks of largest norm in every scope, over the block grid.

    Parameters
    ----------
    x
        Array of shape ``(N1, N2, ..)``.
    nnz
        Blocks to keep in each scope: integer, or integer array broadcastable to the scope grid;
        ``0 <= nnz <= blocks per scope``.
    block
        Block sizes in elements; -1 is a whole axis, ``()`` single elements.
    scope
        Scope sizes in blocks; -1 is a whole axis, and so is a missing trailing axis.
    scores
        Numbers of the shape of `x` whose block norms rank the blocks instead of those of `x`.
    ord
        As for `block_norms`.

    Returns
    -------
    Bool array over the block grid, which for NumPy lies in memory as what is ranked does. Ties go to the
    earlier block, row-major inside the scope; NaN ranks above +inf.

    Raises
    ------
    SpecError
        (a ValueError) sizes do not divide, `nnz` is out of range, `scores` has another shape.
    KindError
        (a TypeError) not an array, an unsupported dtype, or arrays of different libraries.

    Examples
    --------
    >>> import numpy
    >>> block_mask(numpy.asarray([[1.0, -4.0, 3.0, 2.0]]), 2, (1, 1), (1, 4))
    array([[False,  True,  True, False]])
    """
    with about("block_mask"):
        backend = begin(x)
        geometry, _, scopes = _cuts(x, block, scope)
        counts = as_counts(nnz, scopes.grid, low=0, high=geometry.blocks, what="nnz")
        ranked = x if scores is None else op.as_scores(scores, x, tuple(x.shape), "scores")
        place = op.mask_like(ranked, scopes.shape, array_cut(scopes.shape, (), scopes.tile)[0])
        table = backend.mask(Leaf(ranked, geometry), op.scope_leaf(counts), op.as_ord(ord), place)
        return _as_block_grid(table, scopes) if place is None else table


def keep_largest(
    x: Array,
    nnz: int | Array,
    block: Block,
    scope: Block,
    *,
    scores: Array | None = None,
    ord: float = 2,
    out: Array | None = None,
) -> Array:
    """`x` with exactly the `nnz` blocks of largest norm kept in every scope, and +0.0 elsewhere.

    Parameters
    ----------
    x, nnz, block, scope, scores, ord
        As for `block_mask`.
    out
        Place for the result, of the shape and dtype of `x`; ``out=x`` prunes in place.

    Returns
    -------
    Array like `x` (dtype and byte order too); kept elements keep their bits.

    Raises
    ------
    SpecError, KindError
        As `block_mask`, and for an `out` that does not fit. Nothing is written then.

    Examples
    --------
    >>> import numpy
    >>> keep_largest(numpy.asarray([[1.0, -4.0, 3.0, 2.0]]), 2, (1, 1), (1, 4))
    array([[ 0., -4.,  3.,  0.]])
    """
    with about("keep_largest"):
        backend = begin(x)
        geometry, _, scopes = _cuts(x, block, scope)
        counts = as_counts(nnz, scopes.grid, low=0, high=geometry.blocks, what="nnz")
        ranked = x if scores is None else op.as_scores(scores, x, tuple(x.shape), "scores")
        p = op.as_ord(ord)
        target = _target(x, _destination(x, out), geometry)
        if scores is not None:
            _require_unread(target, ranked, "scores")
        result = backend.prune(_one(target), _one(Leaf(ranked, geometry)), op.scope_leaf(counts), p)
        return _stored(x, out, target, result[0])


def hard_threshold(
    x: Array,
    thresholds: float | Array,
    block: Block,
    *,
    scores: Array | None = None,
    ord: float = 2,
    out: Array | None = None,
) -> Array:
    """`x` with every block whose norm is below its threshold set to +0.0.

    Parameters
    ----------
    x, block, scores, ord, out
        As for `keep_largest`.
    thresholds
        Number, or array broadcastable to the block grid; converted to the norm's dtype, then compared.

    Returns
    -------
    Array like `x`. A block is dropped if and only if ``norm < threshold``: NaN stays.

    Raises
    ------
    SpecError
        (a ValueError) a threshold is NaN, or shapes do not fit.
    KindError
        (a TypeError) as `keep_largest`.

    Examples
    --------
    >>> import numpy
    >>> hard_threshold(numpy.asarray([[3.0, 4.0, 1.0, 1.0]]), 5.0, (1, 2))
    array([[3., 4., 0., 0.]])
    """
    with about("hard_threshold"):
        backend = begin(x)
        geometry, blocks, _ = _cuts(x, block)
        ranked = x if scores is None else op.as_scores(scores, x, tuple(x.shape), "scores")
        p = op.as_ord(ord)
        target = _target(x, _destination(x, out), geometry)
        dtype = kind_of(ranked.dtype).norm
        t = op.as_grid(thresholds, x, blocks.grid, dtype, "thresholds", written=[target.array])
        if scores is not None:
            _require_unread(target, ranked, "scores")
        result = backend.threshold(_one(target), _one(Leaf(ranked, geometry)), op.block_leaf(t), p)
        return _stored(x, out, target, result[0])


def soft_threshold(
    x: Array,
    thresholds: float | Array,
    block: Block,
    *,
    conditioner: Array | None = None,
    max_iter: int = 20,
    rtol: float = 1e-12,
    out: Array | None = None,
) -> Array:
    """`x` with every block shrunk towards zero by its threshold: the proximal step of the group lasso.

    Without a conditioner a block v becomes ``max(0, 1 - t / ||v||) * v``. With one, H = diag(h), it
    becomes the minimiser of ``1/2 (x - v)' H (x - v) + t ||x||`` (Deleu and Bengio 2021, "Structured
    sparsity inducing adaptive optimizers"): 0 if ``||H v|| <= t``, else ``h / (h + mu) * v`` with mu
    from a safeguarded Newton iteration.

    Parameters
    ----------
    x
        Floats of 16 bits or more, or complex.
    thresholds
        Number >= 0, or array broadcastable to the block grid. 0 keeps a block bit for bit.
    block
        Block sizes in elements, as for `block_norms`.
    conditioner
        The diagonal h, of the shape of `x`: real, each entry in [1e-150, 1e150].
    max_iter, rtol
        Limits of the iteration for mu: steps at most, and relative accuracy, which below float64 is 1.5e-11 at best.
    out
        Place for the result, of the shape and dtype of `x`; ``out=x`` works in place.

    Returns
    -------
    Array like `x`. A block with a NaN stays as it is; a block of infinite norm is unchanged for a
    finite threshold and zero for an infinite one.

    Raises
    ------
    SpecError
        (a ValueError) a threshold is NaN or negative, the conditioner is out of range, shapes do not fit.
    KindError
        (a TypeError) integers, float8, or what is no array.
    ConvergenceError
        (a ValueError) `max_iter` steps did not reach `rtol`. Nothing is written then.

    Examples
    --------
    >>> import numpy
    >>> soft_threshold(numpy.asarray([[3.0, 4.0, 0.3, 0.4]]), 1.0, (1, 2))
    array([[2.4, 3.2, 0. , 0. ]])
    """
    with about("soft_threshold"):
        backend = begin(x)
        op.require_shrinkable(x, "x")
        geometry, blocks, _ = _cuts(x, block)
        steps, tolerance = op.as_iteration(max_iter, rtol)
        target = _target(x, _destination(x, out), geometry)
        dtype = kind_of(x.dtype).norm
        t = op.as_grid(thresholds, x, blocks.grid, dtype, "thresholds", signed=False, written=[target.array])
        metric: Parts | None = None
        if conditioner is not None:
            h = op.as_conditioner(conditioner, x, tuple(x.shape), "conditioner")
            _require_unread(target, h, "conditioner")
            metric = _one(Leaf(h, geometry))
        result = backend.shrink(_one(target), [op.block_leaf(t)], metric, steps, tolerance)
        return _stored(x, out, target, result[0])


# --- namespaces ----------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        block_mask,
        block_norms,
        hard_threshold,
        keep_largest,
        kth_largest,
        mid_kth_largest,
        nnz_from_sparsity,
        soft_threshold,
        topk_mask,
    )
}


@dataclass(frozen=True)
class Namespace:
    """The functions of npscope, bound to one backend: ``namespace("numba").block_norms(x, (4, 4))``."""

    name: str

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = FUNCTIONS.get(name)
        if function is None or name.startswith("_"):
            if name == "name" or name.startswith("_"):  # asked of an object that is still being unpickled
                raise AttributeError(name)
            raise AttributeError(f"namespace {self.name!r} has no function {name!r}; it has {', '.join(FUNCTIONS)}")

        @wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            with use_backend(self.name):
                return function(*args, **kwargs)

        return bound

    def __dir__(self) -> list[str]:
        return [*FUNCTIONS, "name"]


def namespace(x_or_name: Any) -> Namespace:
    """The namespace that serves an array, or the one of a backend: "reference", "numba" or "cupy".

    Its members are the functions of this module (``dir(namespace(x))`` lists them).
    SpecError for an unknown name, KindError for what is no array or a backend not installed here.

    >>> import numpy
    >>> namespace(numpy.zeros(3)).name
    'numba'
    """
    if isinstance(x_or_name, str):
        if x_or_name not in BACKENDS:
            raise SpecError(f"backend {x_or_name!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
        return Namespace(load_backend(x_or_name).NAME)
    return Namespace(begin(x_or_name).NAME)
