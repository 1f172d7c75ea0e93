"""Blocks: the atomic units. `BlockSpec` cuts one view, `BlockCoupling` lets a block span several arrays.

A spec is a coupling of one part, so every verb stands once, on `SparseBlock`; the final
classes hold fields only. Where they differ is which leaves a block has, and in which order
each leaf's grid axes stand.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

from npscope import operands as op
from npscope.axes import array_namespace, paired, regroup, reshaped, separated
from npscope.backends import Array, Backend, threads
from npscope.dtypes import common_norm, kind_of
from npscope.errors import CouplingError, KindError, SpecError, about
from npscope.namespace import backend_for
from npscope.tiling import MAX_NDIM, Cut, Leaf, Part, Tiling, array_cut, as_orders, cut, permuted
from npscope.view import View, with_settable_data

Values = Any
"""Scores by leaf: None, a bare array where there is one leaf, or a mapping by leaf spec or leaf name."""


class SparseBlock(ABC):
    """What `BlockSpec` and `BlockCoupling` have in common: a grid of blocks, and all that is done to blocks."""

    name: str | None
    _cuts: tuple[Cut, ...]
    _grid: tuple[int, ...]

    def _derive(self) -> None:
        """All that follows from the fields: the grid, and how each leaf is cut when all blocks share one scope."""
        leaves, orders = self.specs(), self._orders()
        grid = permuted(leaves[0].tiling.grid, orders[0])
        whole, axes = Tiling.scopes(grid, ()), tuple(range(len(grid)))
        object.__setattr__(self, "_grid", grid)
        cuts = tuple(cut(leaf.tiling, whole, order, axes) for leaf, order in zip(leaves, orders, strict=True))
        object.__setattr__(self, "_cuts", cuts)

    @abstractmethod
    def _orders(self) -> tuple[tuple[int, ...], ...]:
        """For each leaf, the order in which its grid axes stand in the common grid."""

    @abstractmethod
    def specs(self) -> tuple[BlockSpec, ...]:
        """The leaf specs, in the order of their elements in a block."""

    @abstractmethod
    def _by_leaf(self, results: dict[BlockSpec, Any]) -> Any:
        """Results by leaf in the form that callers get: a spec its own, a coupling the mapping."""

    @abstractmethod
    def _common_tiling(self) -> Tiling:
        """The tiling that all elements of a block share; SpecError if there is none."""

    @property
    def _label(self) -> str:
        return type(self).__name__ + (f" {self.name!r}" if self.name else "")

    # geometry

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Blocks along each axis of the (aligned) grid."""
        return self._grid

    @property
    def grid_ndim(self) -> int:
        """Number of axes of the grid."""
        return len(self.grid_shape)

    def numblk(self) -> int:
        """Number of blocks."""
        return math.prod(self.grid_shape)

    def numel(self) -> int:
        """Number of elements of all leaves."""
        return sum(spec.view.numel() for spec in self.specs())

    def numel_per_block(self) -> int:
        """Number of elements of one block, over all leaves."""
        return sum(math.prod(spec.tiling.tile) for spec in self.specs())

    def nnz(self, eps: float = 0.0) -> int:
        """Number of *elements* that do not satisfy ``|x| <= eps``; NaN counts.

        SpecError for a negative or NaN `eps`.

        >>> import numpy
        >>> BlockSpec(numpy.asarray([[1.0, 0.0], [-2.0, 3.0]]), (1, 2)).nnz()
        3
        """
        return count_nonzero(self, self._label, eps)

    def parameters(self) -> tuple[View, ...]:
        """The views of the leaves."""
        return tuple(spec.view for spec in self.specs())

    def blocks(self) -> tuple[SparseBlock, ...]:
        """The direct children: the specs of a coupling, a spec itself."""
        return self.specs()

    # values

    @property
    def data(self) -> Any:
        """The live window of a spec; of a coupling a mapping from each spec to its window. May be assigned."""
        return self._by_leaf({spec: spec.view.data for spec in self.specs()})

    def set_data(self, a: Values) -> None:
        """Write `a` into the windows: an array where there is one leaf, or a mapping by spec or name.

        SpecError or KindError when something does not fit; nothing is written then.
        """
        with about(self._label):
            arrays = resolve(self.specs(), a, "data")
            writable_windows(self.specs(), shrinks=False)
            require_unwritten(self.specs(), arrays, "data")
            for spec, array in zip(self.specs(), arrays, strict=True):
                op.require_castable(array, spec.view.data, f"data of {spec._label}")
        for spec, array in zip(self.specs(), arrays, strict=True):
            spec.view.set_data(array)

    def block_view(self, values: Values = None, reorder: bool = True, merge: bool = False) -> Array:
        """The elements by block: ``(*grid, *tile)``, or ``(*grid, numel_per_block)`` merged.

        Parameters
        ----------
        values
            Arrays to cut like the data, which are taken otherwise.
        reorder
            False leaves the axes interleaved: ``(g1, t1, g2, t2, ..)``.
        merge
            True joins the element axes into one. Of a spec this is a copy where it must be; a coupling,
            whose leaves have no common tile, needs it and gives a fresh array.

        Raises
        ------
        SpecError
            (a ValueError) a coupling without `merge`, or `values` that do not fit.

        Notes
        -----
        Without `merge`, the view of a spec's own data writes through.

        >>> import numpy
        >>> BlockSpec(numpy.arange(8).reshape(2, 4), (2, 2)).block_view(merge=True)
        array([[[0, 1, 4, 5],
                [2, 3, 6, 7]]])
        """
        with about(self._label):
            arrays = resolve(self.specs(), values, "values")
            if merge:
                tables = [self._merged(spec, order, a) for spec, order, a in self._ordered(arrays)]
                if len(tables) == 1:
                    return tables[0]
                xp = array_namespace(tables[0])
                return xp.concat(tables, axis=-1)
            tiling, ndim = self._common_tiling(), self.grid_ndim
            if 2 * ndim > MAX_NDIM:
                raise SpecError(f"a block view of {ndim} axes needs {2 * ndim}, arrays have {MAX_NDIM}; use merge=True")
            split = paired(tiling.grid, tiling.tile)
            order = separated(ndim) if reorder else tuple(range(2 * ndim))
            return regroup(arrays[0], split, order, tuple(split[axis] for axis in order))

    def _ordered(self, arrays: Sequence[Array]) -> list[tuple[BlockSpec, tuple[int, ...], Array]]:
        return list(zip(self.specs(), self._orders(), arrays, strict=True))

    def _merged(self, spec: BlockSpec, order: tuple[int, ...], array: Array) -> Array:
        split = paired(spec.tiling.grid, spec.tiling.tile)
        axes = (*(2 * a for a in order), *range(1, len(split), 2))
        return regroup(array, split, axes, (*self.grid_shape, math.prod(spec.tiling.tile)))

    def reduce(self, values: Values, op: Callable[..., Array]) -> Array:
        """`op` over the elements of every block: ``op(array, axis=-1)``, an array over the block grid.

        `values` as everywhere (None is the data). The elements of a block are gathered first, which
        is a copy unless they already lie side by side.

        >>> import numpy
        >>> BlockSpec(numpy.arange(8).reshape(2, 4), (2, 2)).reduce(None, numpy.sum)
        array([[10, 18]])
        """
        return op(self.block_view(values, merge=True), axis=-1)

    def norms(self, values: Values = None, *, ord: float = 2) -> Array:
        """Norm of every block, over the grid; joint over the leaves of a coupling.

        Dtype and accuracy as `npscope.block_norms`; float64 as soon as one leaf needs it.
        SpecError or KindError for `values` or an `ord` that cannot work.

        >>> import numpy
        >>> BlockSpec(numpy.asarray([[3.0, 4.0, 0.0, 1.0]]), (1, 2)).norms()
        array([[5., 1.]])
        """
        with about(self._label):
            arrays = resolve(self.specs(), values, "values")
            table = backend_of(arrays).norms((self._part(arrays),), op.as_ord(ord))
            return reshaped(table, self.grid_shape)

    def min(self, values: Values = None) -> Array:
        """Smallest value in every block, over the grid; NaN if the block has one. Complex: KindError."""
        return self._extreme(values, "min")

    def max(self, values: Values = None) -> Array:
        """Largest value in every block, over the grid; NaN if the block has one. Complex: KindError."""
        return self._extreme(values, "max")

    def _extreme(self, values: Values, name: str) -> Array:
        with about(self._label):
            arrays = resolve(self.specs(), values, "values")
            for array in arrays:
                if kind_of(array.dtype).is_complex:
                    raise KindError(f"{array.dtype} has no order; reduce its magnitudes instead")
            xp = array_namespace(arrays[0])
            results = []
            for spec, order, array in self._ordered(arrays):
                grid, tile = spec.tiling.grid, spec.tiling.tile
                split = [n for n in paired(grid, tile) if n != 1]
                kept = [i for i, n in enumerate(paired(grid, tile)) if n != 1]
                inner = tuple(i for i, axis in enumerate(kept) if axis % 2)
                table = getattr(xp, name)(xp.reshape(array, tuple(split)), axis=inner) if inner else array
                results.append(regroup(table, grid, order, self.grid_shape))
            best = results[0]
            for other in results[1:]:
                best = (xp.minimum if name == "min" else xp.maximum)(best, other)
            return best

    # writing

    def apply_mask(self, mask: Array) -> None:
        """Set the blocks whose `mask` (bool over the grid) is False to +0.0, in place.

        SpecError for another shape or a read-only array, KindError for no bool array.

        >>> import numpy
        >>> a = numpy.ones((1, 4))
        >>> BlockSpec(a, (1, 2)).apply_mask(numpy.asarray([[True, False]]))
        >>> a
        array([[1., 1., 0., 0.]])
        """
        with about(self._label):
            target = self._target()
            grid = op.as_block_mask(mask, target[0].array, self.grid_shape, "mask")
            for leaf in target:
                op.require_no_overlap(leaf.array, mask, "the array", "mask", unless_same=False)
            store_all(target, backend_of_part(target).apply_mask((target,), op.block_leaf(grid)))

    def apply_multiplier(self, m: float | Array) -> None:
        """Multiply every block by its number, in place; 0 writes +0.0 (also over inf), 1 keeps the bits.

        `m` is a number or an array broadcastable to the grid. KindError for integers and float8,
        SpecError for NaN.

        >>> import numpy
        >>> a = numpy.ones((1, 4))
        >>> BlockSpec(a, (1, 2)).apply_multiplier(numpy.asarray([[2.0, 0.0]]))
        >>> a
        array([[2., 2., 0., 0.]])
        """
        with about(self._label):
            target = self._target(shrinks=True)
            grid = self._numbers(m, target, "float64", "m")
            store_all(target, backend_of_part(target).scale((target,), op.block_leaf(grid)))

    def hard_threshold(self, thresholds: float | Array, values: Values = None, *, ord: float = 2) -> None:
        """Set the blocks with ``norm < threshold`` to +0.0, in place; NaN stays.

        Parameters
        ----------
        thresholds
            Number, or array broadcastable to the grid.
        values
            Arrays whose norms decide, instead of the data.
        ord
            As `npscope.block_norms`.

        Raises
        ------
        SpecError, KindError
            As `npscope.hard_threshold`. Nothing is written then.

        >>> import numpy
        >>> a = numpy.asarray([[3.0, 4.0, 1.0, 1.0]])
        >>> BlockSpec(a, (1, 2)).hard_threshold(5)
        >>> a
        array([[3., 4., 0., 0.]])
        """
        with about(self._label):
            target = self._target()
            arrays = resolve(self.specs(), values, "values")
            require_unwritten(self.specs(), arrays, "values")
            dtype = common_norm(kind_of(a.dtype) for a in arrays)
            grid = self._numbers(thresholds, target, dtype, "thresholds")
            backend, source = backend_of_part(target), self._part(arrays)
            store_all(target, backend.threshold((target,), (source,), op.block_leaf(grid), op.as_ord(ord)))

    def soft_threshold(
        self,
        thresholds: float | Array,
        conditioners: Values = None,
        *,
        max_iter: int = 20,
        rtol: float = 1e-12,
    ) -> None:
        """Shrink every block towards zero by its threshold, in place; see `npscope.soft_threshold`.

        Parameters
        ----------
        thresholds
            Number >= 0, or array broadcastable to the grid.
        conditioners
            Diagonal metrics by leaf, through the same door as `values`.
        max_iter, rtol
            Limits of the iteration of the conditioned step.

        Raises
        ------
        SpecError, KindError, ConvergenceError
            As `npscope.soft_threshold`. Nothing is written then.

        >>> import numpy
        >>> a = numpy.asarray([[3.0, 4.0]])
        >>> BlockSpec(a, (1, 2)).soft_threshold(1)
        >>> a
        array([[2.4, 3.2]])
        """
        with about(self._label):
            target = self._target(shrinks=True)
            dtype = common_norm(kind_of(leaf.array.dtype) for leaf in target)
            grid = self._numbers(thresholds, target, dtype, "thresholds", signed=False)
            steps, tolerance = op.as_iteration(max_iter, rtol)
            metric = None
            if conditioners is not None:
                arrays = resolve(self.specs(), conditioners, "conditioners", op.as_conditioner)
                require_unwritten(self.specs(), arrays, "conditioners")
                metric = (self._part(arrays),)
            backend = backend_of_part(target)
            store_all(target, backend.shrink((target,), [op.block_leaf(grid)], metric, steps, tolerance))

    # masks

    def get_masks(self, block_mask: Array) -> dict[BlockSpec, Array]:
        """Bool element masks (True = kept) by leaf, from a bool array over the grid.

        >>> import numpy
        >>> spec = BlockSpec(numpy.zeros((1, 4)), (1, 2))
        >>> spec.get_masks(numpy.asarray([[True, False]]))[spec]
        array([[ True,  True, False, False]])
        """
        with about(self._label):
            grid = op.as_block_mask(block_mask, self.specs()[0].view.data, self.grid_shape, "block_mask")
            return self._elements(grid)

    def broadcast_block_to_element(self, v: Array) -> Any:
        """Each block's entry of `v` (over the grid) at all its elements: an array in the layout of the view.

        Of a coupling: a mapping from each leaf spec to its array. SpecError for another shape.

        >>> import numpy
        >>> BlockSpec(numpy.zeros((1, 4)), (1, 2)).broadcast_block_to_element(numpy.asarray([[7, 8]]))
        array([[7, 7, 8, 8]])
        """
        with about(self._label):
            op.require_array_of_any_dtype(v, "v")
            if tuple(v.shape) != self.grid_shape:
                raise SpecError(f"v has shape {tuple(v.shape)}, the grid is {self.grid_shape}")
            return self._by_leaf(self._elements(v))

    def _elements(self, grid: Array) -> dict[BlockSpec, Array]:
        xp = array_namespace(grid)
        result = {}
        for spec, order in zip(self.specs(), self._orders(), strict=True):
            own = xp.permute_dims(grid, tuple(order.index(a) for a in range(len(order))))
            for axis, tile in enumerate(spec.tiling.tile):
                if tile > 1:
                    own = xp.repeat(own, tile, axis=axis)
            result[spec] = own if any(t > 1 for t in spec.tiling.tile) else xp.asarray(own, copy=True)
        return result

    # operands

    def _part(self, arrays: Sequence[Array]) -> Part:
        """The arrays as a part in which all blocks share one scope."""
        return tuple([Leaf(array, cut_) for array, cut_ in zip(arrays, self._cuts, strict=True)])

    def _numbers(self, value: float | Array, target: Part, dtype: str, what: str, *, signed: bool = True) -> Array:
        """Numbers over the grid, as they are before the target is written."""
        windows = [leaf.array for leaf in target]
        return op.as_grid(value, windows[0], self.grid_shape, dtype, what, signed=signed, written=windows)

    def _target(self, *, shrinks: bool = False) -> Part:
        """The windows as a part to write, after checking that they can be."""
        return self._part(writable_windows(self.specs(), shrinks=shrinks))


@with_settable_data
@dataclass(frozen=True, init=False, repr=False)
class BlockSpec(SparseBlock):
    """A view cut into equal blocks.

    Parameters
    ----------
    view
        A `View`, or an array, strided or not.
    shape
        Block sizes, one for each axis; -1 is a whole axis, ``()`` single elements. They must divide.
    name
        For messages, and as a key of `values`. No part of equality.

    Raises
    ------
    SpecError
        (a ValueError) a size does not divide its axis.
    KindError
        (a TypeError) no array, an unsupported dtype, sizes that are no integers.

    Examples
    --------
    >>> import numpy
    >>> spec = BlockSpec(numpy.ones((4, 8)), (2, -1), name="W")
    >>> spec.grid_shape, spec.numel_per_block()
    ((2, 1), 16)
    """

    view: View
    shape: tuple[int, ...]
    name: str | None = field(compare=False)
    tiling: Tiling = field(init=False, compare=False)

    def __init__(self, view: View | Array, shape: Any, name: str | None = None) -> None:
        object.__setattr__(self, "name", name)
        with about(self._label):
            window = View.of(view)
            tiling = Tiling.blocks(window.shape, shape)
        for key, value in (("view", window), ("shape", tiling.tile), ("tiling", tiling)):
            object.__setattr__(self, key, value)
        self._derive()

    def _orders(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(len(self.shape))),)

    def _by_leaf(self, results: dict[BlockSpec, Any]) -> Any:
        return results[self]

    def _common_tiling(self) -> Tiling:
        return self.tiling

    def specs(self) -> tuple[BlockSpec, ...]:
        """The spec itself."""
        return (self,)

    def __repr__(self) -> str:
        return f"BlockSpec({self.view.dtype} {self.view.shape}, block={self.shape}{named(self.name)})"


@with_settable_data
@dataclass(frozen=True, init=False, repr=False)
class BlockCoupling(SparseBlock):
    """Blocks that span several arrays: block i consists of block i of every spec, and its norm is joint.

    Parameters
    ----------
    specs
        The parts: `BlockSpec` objects whose grids agree after `orders`, on windows that share no element.
    orders
        For each part the order in which its grid axes stand in the common grid, as for a transpose;
        ``()`` is "as they stand".
    name
        For messages. No part of equality.

    Raises
    ------
    CouplingError
        (a ValueError) no parts, grids that differ, windows that share an element; names both.
    KindError
        (a TypeError) parts that are no BlockSpec, or that live in different libraries or on different devices.

    Examples
    --------
    A neuron of an MLP: row i of the up projection and column i of the down projection.

    >>> import numpy
    >>> up, down = numpy.ones((3, 4)), numpy.ones((4, 3))
    >>> neurons = BlockCoupling([BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))], orders=[(0, 1), (1, 0)])
    >>> neurons.grid_shape, neurons.numel_per_block()
    ((3, 1), 8)
    """

    _specs: tuple[BlockSpec, ...]
    orders: tuple[tuple[int, ...], ...]
    name: str | None = field(compare=False)

    def __init__(self, specs: Sequence[BlockSpec], orders: Any = (), name: str | None = None) -> None:
        object.__setattr__(self, "name", name)
        with about(self._label):
            parts = as_parts(specs, BlockSpec)
            axes = as_orders(orders, [spec.grid_ndim for spec in parts])
            require_equal_grids(parts, [permuted(s.tiling.grid, o) for s, o in zip(parts, axes, strict=True)], "grid")
            require_separate(parts)
        object.__setattr__(self, "_specs", parts)
        object.__setattr__(self, "orders", axes)
        self._derive()

    def _orders(self) -> tuple[tuple[int, ...], ...]:
        return self.orders

    def _by_leaf(self, results: dict[BlockSpec, Any]) -> Any:
        return results

    def _common_tiling(self) -> Tiling:
        raise SpecError("the blocks of a coupling have no common tile; use merge=True")

    def specs(self) -> tuple[BlockSpec, ...]:
        """The parts, in listed order."""
        return self._specs

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The block shape of every part."""
        return tuple(spec.shape for spec in self._specs)

    def __repr__(self) -> str:
        return f"BlockCoupling(grid={self.grid_shape}, blocks={self.shapes}{named(self.name)})"


def named(name: str | None) -> str:
    """The end of a repr that shows a name, if there is one."""
    return f", name={name!r}" if name else ""


# --- what blocks and scopes share ----------------------------------------------------------------


def as_parts(given: Any, kind: type[Any]) -> tuple[Any, ...]:
    """The parts of a coupling: at least one, all of one class."""
    if not hasattr(given, "__iter__"):
        raise KindError(f"the parts must be a sequence of {kind.__name__}, not {type(given).__name__}")
    parts = tuple(given)
    if not parts:
        raise CouplingError(f"a coupling needs at least one {kind.__name__}")
    for i, part in enumerate(parts):
        if not isinstance(part, kind):
            raise KindError(f"part {i} must be a {kind.__name__}, not {type(part).__name__}")
    return parts


def require_equal_grids(parts: Sequence[Any], grids: Sequence[tuple[int, ...]], what: str) -> None:
    """CouplingError naming two parts whose aligned grids differ."""
    for part, grid in zip(parts[1:], grids[1:], strict=True):
        if grid != grids[0]:
            raise CouplingError(
                f"{part._label} has {what} {grid}, {parts[0]._label} has {grids[0]}; use orders to align"
            )


def require_separate(specs: Sequence[BlockSpec]) -> None:
    """CouplingError naming two leaves that share an element; KindError for two libraries or devices."""
    windows = [spec.view.data for spec in specs]
    for i, spec in enumerate(specs[1:], start=1):
        op.require_alike(windows[0], windows[i], f"part 0 ({specs[0]._label})", f"part {i} ({spec._label})")
    for i, j in op.overlaps(windows, windows):
        if i < j:
            raise CouplingError(
                f"part {i} ({specs[i]!r}) and part {j} ({specs[j]!r}) share an element; parts must be disjoint windows"
            )


def resolve(
    specs: Sequence[BlockSpec], values: Values, what: str, check: Callable[..., Array] = op.as_scores
) -> list[Array]:
    """One array for each leaf, in its view's layout: `values` through their one door, or the data itself."""
    if values is None:
        return [spec.view.data for spec in specs]
    if isinstance(values, Mapping):
        named = Counter(spec.name for spec in specs)
        found = [(_by_spec_or_name(spec, values, named, what), spec) for spec in specs]
    elif len(specs) == 1:
        found = [(values, specs[0])]
    else:
        raise SpecError(f"{what} must be a mapping by leaf spec or name: there are {len(specs)} leaves")
    return [check(a, spec.view.data, spec.view.shape, f"{what} of {spec._label}") for a, spec in found]


def _by_spec_or_name(spec: BlockSpec, values: Mapping[Any, Array], named: Mapping[Any, int], what: str) -> Array:
    if spec in values:
        return values[spec]
    if spec.name is not None and named[spec.name] == 1 and spec.name in values:
        return values[spec.name]
    raise SpecError(f"{what} has no entry for {spec!r}; its keys must be leaf specs, or leaf names where unique")


def writable_windows(specs: Sequence[BlockSpec], *, shrinks: bool) -> list[Array]:
    """The windows of the leaves, after checking that each can be written (and scaled)."""
    for spec in specs:
        op.require_writable(spec.view.data, f"the array of {spec._label}")
        if shrinks:
            op.require_shrinkable(spec.view.data, f"the array of {spec._label}")
    return [spec.view.data for spec in specs]


def require_unwritten(specs: Sequence[BlockSpec], arrays: Sequence[Array], what: str) -> None:
    """SpecError if an array that is read for a leaf shares memory with a written one, other than by being its own."""
    windows = [spec.view.data for spec in specs]
    if all(map(is_, arrays, windows)):
        return
    for i, j in op.overlaps(windows, arrays):
        written, read = f"the array of {specs[i]._label}", f"{what} of {specs[j]._label}"
        op.require_no_overlap(windows[i], arrays[j], written, read, unless_same=i == j)


def backend_of(arrays: Sequence[Array]) -> Backend:
    """The backend that serves these arrays."""
    return backend_for(arrays[0])


def backend_of_part(part: Part) -> Backend:
    """The backend that serves the arrays of a part."""
    return backend_for(part[0].array)


def store_all(leaves: Sequence[Leaf], results: Sequence[Array]) -> None:
    """Write the results of a backend into the arrays of the leaves, where it has not done so."""
    pending = [(leaf.array, result) for leaf, result in zip(leaves, results, strict=True) if result is not leaf.array]

    def write(slot: int, piece: int) -> None:
        for array, result in pending:
            op.store(array, result)

    if pending:  # the leaves of a block are written together, whatever signal arrives
        threads.run(1, write, 1, shielded=len(pending) > 1)


def sum_squares(array: Array) -> float:
    """The sum of ``|x| ** 2`` of all elements of an array, in float64: about 1e-12 off, and it may overflow."""
    return backend_for(array).sum_squares(((Leaf(array, array_cut(tuple(array.shape), ())[0]),),))


def count_nonzero(owner: Any, label: str, eps: float) -> int:
    """Elements of all leaves of `owner` that do not satisfy ``|x| <= eps``."""
    with about(label):
        limit = op.as_number(eps, "eps")
        if not limit >= 0:
            raise SpecError(f"eps = {limit} must be at least 0")
        windows = [spec.view.data for spec in owner.specs()]
        parts = tuple((Leaf(window, array_cut(tuple(window.shape), ())[0]),) for window in windows)
        return backend_of(windows).count_nonzero(parts, limit)
