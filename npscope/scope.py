"""Scopes: the units of decision. `ScopeSpec` cuts a grid of blocks, `ScopeCoupling` lets parts compete.

As with blocks, a spec is a coupling of one part: every verb stands once, on `SparseScope`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

from npscope import operands as op
from npscope.axes import array_namespace, interleaved, paired, regroup, reshaped
from npscope.backends import Array
from npscope.block import (
    BlockSpec,
    SparseBlock,
    Values,
    as_parts,
    backend_of,
    count_nonzero,
    named,
    require_equal_grids,
    require_separate,
    require_unwritten,
    resolve,
    store_all,
    writable_windows,
)
from npscope.counts import as_counts, nnz_from_sparsity
from npscope.dtypes import common_norm, kind_of
from npscope.errors import KindError, SpecError, about
from npscope.namespace import as_weight
from npscope.tiling import MAX_NDIM, Cut, Leaf, Parts, Tiling, as_orders, axis_cut, cut, permuted
from npscope.view import View


class SparseScope(ABC):
    """What `ScopeSpec` and `ScopeCoupling` have in common: a grid of scopes, and all that is decided in them."""

    name: str | None
    _leaves: tuple[BlockSpec, ...]
    _cuts: tuple[tuple[Cut, ...], ...]
    _grid: tuple[int, ...]
    _blocks_per_scope: int

    def _derive(self) -> None:
        """All that follows from the fields: the leaves, how each is cut (part by part), and the counts."""
        parts = self._ordered()
        cuts = tuple(
            tuple(
                cut(leaf.tiling, part.tiling, block_order, order)
                for leaf, block_order in zip(part.block.specs(), part.block._orders(), strict=True)
            )
            for part, order in parts
        )
        for key, value in (
            ("_leaves", tuple(leaf for part, _ in parts for leaf in part.block.specs())),
            ("_cuts", cuts),
            ("_grid", permuted(parts[0][0].tiling.grid, parts[0][1])),
            ("_blocks_per_scope", sum(math.prod(part.tiling.tile) for part, _ in parts)),
        ):
            object.__setattr__(self, key, value)

    @abstractmethod
    def _orders(self) -> tuple[tuple[int, ...], ...]:
        """For each part, the order in which its scope axes stand in the common grid."""

    @abstractmethod
    def _parts(self) -> tuple[ScopeSpec, ...]:
        """The parts whose blocks compete, in listed order."""

    @abstractmethod
    def _by_part(self, results: dict[ScopeSpec, Any]) -> Any:
        """Results by part in the form that callers get: a spec its own, a coupling the mapping."""

    @abstractmethod
    def _arrays_by_part(self, b: Any) -> list[Array]:
        """The array of every part from what callers give: an array to a spec, a mapping to a coupling."""

    @property
    def _label(self) -> str:
        return type(self).__name__ + (f" {self.name!r}" if self.name else "")

    # geometry

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Scopes along each axis of the (aligned) grid."""
        return self._grid

    def numscp(self) -> int:
        """Number of scopes."""
        return math.prod(self.grid_shape)

    def numblk(self) -> int:
        """Number of blocks in all scopes."""
        return self.numscp() * self.numblk_per_scope()

    def numblk_per_scope(self) -> int:
        """Number of blocks that compete in one scope, over all parts."""
        return self._blocks_per_scope

    def numel_per_scope(self) -> int:
        """Number of *elements* in one scope, over all parts."""
        return sum(math.prod(part.tiling.tile) * part.block.numel_per_block() for part in self._parts())

    def nnz(self, eps: float = 0.0) -> int:
        """Number of *elements* that do not satisfy ``|x| <= eps``; NaN counts."""
        return count_nonzero(self, self._label, eps)

    def blocks(self) -> tuple[SparseBlock, ...]:
        """The direct children: the block of every part."""
        return tuple(part.block for part in self._parts())

    def specs(self) -> tuple[BlockSpec, ...]:
        """The leaf specs of all parts."""
        return self._leaves

    @property
    def params(self) -> tuple[View, ...]:
        """The views of all leaves."""
        return tuple(spec.view for spec in self.specs())

    def sparsity_to_nnz(self, s: float | str | Decimal | Fraction) -> int:
        """Blocks to keep in each scope so that ``floor(s * blocks per scope)`` are pruned; see `nnz_from_sparsity`.

        >>> import numpy
        >>> ScopeSpec(BlockSpec(numpy.zeros((1, 100)), (1, 1)), ()).sparsity_to_nnz(0.29)
        71
        """
        with about(self._label):
            return nnz_from_sparsity(s, self.numblk_per_scope())

    # between block grids and scopes

    def block_to_scope(self, b: Any, reorder: bool = True, merge: bool = False) -> Any:
        """An array over the block grid, cut by scope.

        Parameters
        ----------
        b
            Array of shape ``(*block_grid, *t)``, trailing axes t ride along; of a coupling a mapping
            from each part (`ScopeSpec`) to its array.
        reorder
            False leaves the axes interleaved: ``(G1, g1, G2, g2, .., *t)``.
        merge
            True joins the block axes into one, ``(*grid_shape, n, *t)``, of a coupling over all parts.

        Returns
        -------
        Array of shape ``(*grid_shape, *blocks per axis, *t)``, or merged. Of a coupling without
        `merge` a mapping by part.

        Raises
        ------
        SpecError
            (a ValueError) shapes do not fit, or a part is missing.

        >>> import numpy
        >>> scope = ScopeSpec(BlockSpec(numpy.zeros((2, 4)), (1, 1)), (1, 2))
        >>> scope.block_to_scope(numpy.arange(8).reshape(2, 4), merge=True)
        array([[[0, 1],
                [2, 3]],
        <BLANKLINE>
               [[4, 5],
                [6, 7]]])
        """
        with about(self._label):
            arrays = self._arrays_by_part(b)
            results = {
                part: part._cut_grid(array, order, reorder, merge)
                for (part, order), array in zip(self._ordered(), arrays, strict=True)
            }
            if not merge:
                return self._by_part(results)
            tables = list(results.values())
            if len(tables) == 1:
                return tables[0]
            return array_namespace(tables[0]).concat(tables, axis=len(self.grid_shape))

    def scope_to_block(self, v: Array) -> Any:
        """An array by scope over the block grid: the inverse of ``block_to_scope(merge=True)``, or a broadcast.

        Parameters
        ----------
        v
            ``(*grid_shape, n, *t)``: an entry for each block of a scope, n = `numblk_per_scope`; or n = 1,
            or bare ``(*grid_shape,)``: one entry that all blocks of the scope get.

        Returns
        -------
        Array of shape ``(*block_grid, *t)``. Of a coupling a mapping from each part (`ScopeSpec`) to it.

        Raises
        ------
        SpecError
            (a ValueError) the shape does not fit.

        >>> import numpy
        >>> scope = ScopeSpec(BlockSpec(numpy.zeros((2, 4)), (1, 1)), (1, 2))
        >>> scope.scope_to_block(numpy.arange(4).reshape(2, 2))
        array([[0, 0, 1, 1],
               [2, 2, 3, 3]])
        """
        with about(self._label):
            op.require_array_of_any_dtype(v, "v")
            xp, shape = array_namespace(v), tuple(v.shape)
            ndim, n = len(self.grid_shape), self.numblk_per_scope()
            if shape == self.grid_shape:
                v, shape = xp.reshape(v, (*shape, 1)), (*shape, 1)
            if shape[:ndim] != self.grid_shape or len(shape) <= ndim or shape[ndim] not in (1, n):
                raise SpecError(f"v has shape {shape}, expected {self.grid_shape} or {(*self.grid_shape, n)} first")
            riding = shape[ndim + 1 :]
            table = xp.reshape(v, (self.numscp(), shape[ndim], *riding))
            grids = self._grids_of_table(xp.broadcast_to(table, (self.numscp(), n, *riding)))
            return self._by_part(grids)

    def _grids_of_table(self, table: Array) -> dict[ScopeSpec, Array]:
        """An ``(S, n, *t)`` table over the block grid of every part."""
        grids, start = {}, 0
        for part, order in self._ordered():
            stop = start + part.numblk_per_scope()
            grids[part] = part._join_grid(table[:, start:stop], order)
            start = stop
        return grids

    def _ordered(self) -> list[tuple[ScopeSpec, tuple[int, ...]]]:
        return list(zip(self._parts(), self._orders(), strict=True))

    # ranking

    def block_norms(self, values: Values = None, *, ord: float = 2) -> Array:
        """Norm of every block by scope: ``(*grid_shape, numblk_per_scope)``, parts in listed order.

        `values` rank instead of the data: None, an array in view layout where there is one leaf, or a
        mapping by leaf spec or name. Dtype and accuracy as `npscope.block_norms`.

        >>> import numpy
        >>> ScopeSpec(BlockSpec(numpy.asarray([[3.0, 4.0, 0.0, 1.0]]), (1, 2)), ()).block_norms()
        array([[[5., 1.]]])
        """
        with about(self._label):
            arrays = resolve(self.specs(), values, "values")
            table = backend_of(arrays).norms(self._operands(arrays), op.as_ord(ord))
            return reshaped(table, (*self.grid_shape, self.numblk_per_scope()))

    def kth_largest(self, values: Values = None, *, nnz: int | Array, ord: float = 2) -> Array:
        """The norm of the `nnz`-th largest block of every scope, over the scope grid.

        `nnz` is an integer or an integer array broadcastable to the scope grid, ``1 <= nnz <= n``.
        SpecError outside, KindError for floats and bools.

        >>> import numpy
        >>> ScopeSpec(BlockSpec(numpy.asarray([[3.0, 4.0, 0.0, 1.0]]), (1, 1)), ()).kth_largest(nnz=2)
        array([[3.]])
        """
        with about(self._label):
            counts = as_counts(nnz, self.grid_shape, low=1, high=self.numblk_per_scope(), what="nnz")
            arrays = resolve(self.specs(), values, "values")
            found = backend_of(arrays).kth(self._operands(arrays), op.scope_leaf(counts), op.as_ord(ord))
            return reshaped(found, self.grid_shape)

    def kth_mid(self, values: Values = None, *, nnz: int | Array, k_weight: float = 1.0, ord: float = 2) -> Array:
        """The point ``(v_k + w * v_(k+1)) / (1 + w)`` between the norms of rank `nnz` and `nnz` + 1.

        ``1 <= nnz < n``; the weight w = `k_weight` needs ``1 + w > 0``. SpecError outside.

        >>> import numpy
        >>> ScopeSpec(BlockSpec(numpy.asarray([[3.0, 4.0, 0.0, 1.0]]), (1, 1)), ()).kth_mid(nnz=2)
        array([[2.]])
        """
        with about(self._label):
            high = self.numblk_per_scope() - 1
            counts = as_counts(nnz, self.grid_shape, low=1, high=high, what="nnz")
            arrays, weight = resolve(self.specs(), values, "values"), as_weight(k_weight)
            backend, p = backend_of(arrays), op.as_ord(ord)
            found = backend.midpoint(self._operands(arrays), op.scope_leaf(counts), weight, p)
            return reshaped(found, self.grid_shape)

    def get_masks(
        self,
        nnz: int | Array | None = None,
        values: Values = None,
        block_scores: Array | None = None,
        block_mask: Array | None = None,
        *,
        ord: float = 2,
    ) -> dict[BlockSpec, Array]:
        """Bool element masks (True = kept) by leaf, in the layout of each view. Nothing is written.

        Parameters
        ----------
        nnz
            Blocks to keep in each scope, ranked by norm of `values` (or the data), or by `block_scores`.
        values
            As for `block_norms`.
        block_scores
            Signed numbers ``(*grid_shape, numblk_per_scope)`` to rank by: the largest are kept.
        block_mask
            The decision itself, bool of that shape, instead of `nnz`.
        ord
            As `npscope.block_norms`.

        Raises
        ------
        SpecError
            (a ValueError) not exactly one of `nnz` and `block_mask`, or shapes that do not fit.

        >>> import numpy
        >>> leaf = BlockSpec(numpy.asarray([[1.0, -4.0, 3.0, 2.0]]), (1, 1))
        >>> ScopeSpec(leaf, (1, 4)).get_masks(2)[leaf]
        array([[False,  True,  True, False]])
        """
        with about(self._label):
            if (nnz is None) == (block_mask is None):
                raise SpecError("give exactly one of nnz and block_mask")
            if block_mask is None and block_scores is None:
                arrays, counts = resolve(self.specs(), values, "values"), self._counts(nnz)
                masks = backend_of(arrays).element_masks(self._operands(arrays), counts, op.as_ord(ord))
                return dict(zip(self.specs(), masks, strict=True))
            if values is not None:
                raise SpecError("give one of values, block_scores and block_mask")
            table = self._decided(nnz, block_scores, block_mask)
            grids = self._grids_of_table(reshaped(table, (self.numscp(), self.numblk_per_scope())))
        return {spec: mask for part, grid in grids.items() for spec, mask in part.block.get_masks(grid).items()}

    def _decided(self, nnz: Any, block_scores: Array | None, block_mask: Array | None) -> Array:
        """The decision by block that scores make, or that was made already."""
        shape, data = (*self.grid_shape, self.numblk_per_scope()), self.specs()[0].view.data
        if block_mask is not None:
            if block_scores is not None:
                raise SpecError("block_mask is the decision itself; give no block_scores with it")
            return op.as_block_mask(block_mask, data, shape, "block_mask")
        counts, scores = self._counts(nnz), op.as_scores(block_scores, data, shape, "block_scores")
        if kind_of(scores.dtype).is_complex:
            raise KindError(f"block_scores has dtype {scores.dtype}: complex numbers have no order")
        geometry = axis_cut(shape, len(shape) - 1)
        return backend_of([scores]).mask(Leaf(scores, geometry), counts, None, op.mask_like(scores, shape, geometry))

    def _counts(self, nnz: Any) -> Leaf:
        """Blocks to keep in each scope, checked."""
        return op.scope_leaf(as_counts(nnz, self.grid_shape, low=0, high=self.numblk_per_scope(), what="nnz"))

    # writing

    def hard_threshold(
        self,
        thresholds: float | Array | None = None,
        nnz: int | Array | None = None,
        values: Values = None,
        *,
        ord: float = 2,
    ) -> None:
        """Set blocks to +0.0 in place: all but the `nnz` largest of each scope, or those below a threshold.

        Parameters
        ----------
        thresholds
            Number, or array broadcastable to the scope grid: blocks with ``norm < threshold`` are dropped.
        nnz
            Blocks to keep in each scope: integer, or integer array broadcastable to the scope grid.
        values
            As for `block_norms`; the same values rank and decide.
        ord
            As `npscope.block_norms`.

        Raises
        ------
        SpecError
            (a ValueError) not exactly one of the two, or an argument out of range. Nothing is written then.
        KindError
            (a TypeError) an immutable array, or an argument of the wrong type.

        >>> import numpy
        >>> a = numpy.asarray([[1.0, -4.0, 3.0, 2.0]])
        >>> ScopeSpec(BlockSpec(a, (1, 1)), (1, 4)).hard_threshold(nnz=2)
        >>> a
        array([[ 0., -4.,  3.,  0.]])
        """
        with about(self._label):
            if (thresholds is None) == (nnz is None):
                raise SpecError("give exactly one of thresholds and nnz")
            windows = writable_windows(self.specs(), shrinks=False)
            target = self._operands(windows)
            arrays = resolve(self.specs(), values, "values")
            require_unwritten(self.specs(), arrays, "values")
            backend, source, p = backend_of(arrays), self._operands(arrays), op.as_ord(ord)
            if nnz is not None:
                results = backend.prune(target, source, self._counts(nnz), p)
            else:
                dtype = common_norm(kind_of(a.dtype) for a in arrays)
                grid = op.as_grid(thresholds, arrays[0], self.grid_shape, dtype, "thresholds", written=windows)
                results = backend.threshold(target, source, op.scope_leaf(grid), p)
            store_all([leaf for part in target for leaf in part], results)

    def soft_threshold(
        self,
        thresholds: float | Array,
        conditioners: Values = None,
        scale: bool = False,
        *,
        max_iter: int = 20,
        rtol: float = 1e-12,
    ) -> None:
        """Shrink every block towards zero by the threshold of its scope, in place.

        Parameters
        ----------
        thresholds
            Number >= 0, or array broadcastable to the scope grid.
        conditioners
            Diagonal metrics by leaf, through the same door as `values`; see `npscope.soft_threshold`.
        scale
            True multiplies each threshold by sqrt(elements per block), the group lasso's weight
            (Yuan and Lin 2006), part by part.
        max_iter, rtol
            Limits of the iteration of the conditioned step.

        Raises
        ------
        SpecError, KindError, ConvergenceError
            As `npscope.soft_threshold`. Nothing is written then.

        >>> import numpy
        >>> a = numpy.asarray([[3.0, 4.0]])
        >>> ScopeSpec(BlockSpec(a, (1, 2)), ()).soft_threshold(1)
        >>> a
        array([[2.4, 3.2]])
        """
        with about(self._label):
            if not isinstance(scale, bool):
                raise KindError(f"scale must be True or False, not {type(scale).__name__} {scale!r}")
            windows = writable_windows(self.specs(), shrinks=True)
            target = self._operands(windows)
            limits = [self._scaled_thresholds(part, thresholds, scale, windows) for part in self._parts()]
            steps, tolerance = op.as_iteration(max_iter, rtol)
            metric: Parts | None = None
            if conditioners is not None:
                arrays = resolve(self.specs(), conditioners, "conditioners", op.as_conditioner)
                require_unwritten(self.specs(), arrays, "conditioners")
                metric = self._operands(arrays)
            results = backend_of(windows).shrink(target, limits, metric, steps, tolerance)
            store_all([leaf for part in target for leaf in part], results)

    def _scaled_thresholds(
        self, part: ScopeSpec, thresholds: float | Array, scale: bool, written: Sequence[Array]
    ) -> Leaf:
        windows, what = [spec.view.data for spec in part.specs()], "thresholds"
        dtype = common_norm(kind_of(w.dtype) for w in windows)
        if scale:
            wide = op.as_grid(thresholds, windows[0], self.grid_shape, "float64", what, signed=False)
            thresholds = array_namespace(wide).astype(wide, "float64") * math.sqrt(part.block.numel_per_block())
        grid = op.as_grid(thresholds, windows[0], self.grid_shape, dtype, what, signed=False, written=written)
        return op.scope_leaf(grid)

    def _operands(self, arrays: Sequence[Array]) -> Parts:
        """The arrays of all leaves as the parts that compete."""
        remaining = iter(arrays)
        return tuple([tuple([Leaf(next(remaining), cut_) for cut_ in cuts]) for cuts in self._cuts])


@dataclass(frozen=True, init=False, repr=False)
class ScopeSpec(SparseScope):
    """A grid of blocks cut into equal scopes, in each of which the blocks compete.

    Parameters
    ----------
    block
        A `BlockSpec` or a `BlockCoupling`.
    shape
        Scope sizes in blocks; -1 is a whole axis, and so is a missing trailing axis. They must divide.
    name
        For messages. No part of equality.

    Raises
    ------
    SpecError
        (a ValueError) a size does not divide its axis.
    KindError
        (a TypeError) `block` is no block, sizes are no integers.

    Examples
    --------
    2:4 sparsity of a matrix:

    >>> import numpy
    >>> scope = ScopeSpec(BlockSpec(numpy.ones((2, 8)), (1, 1)), (1, 4))
    >>> scope.grid_shape, scope.numblk_per_scope()
    ((2, 2), 4)
    """

    block: SparseBlock
    shape: tuple[int, ...]
    name: str | None = field(compare=False)
    tiling: Tiling = field(init=False, compare=False)

    def __init__(self, block: SparseBlock, shape: Any, name: str | None = None) -> None:
        object.__setattr__(self, "name", name)
        with about(self._label):
            if not isinstance(block, SparseBlock):
                raise KindError(f"block must be a BlockSpec or a BlockCoupling, not {type(block).__name__}")
            tiling = Tiling.scopes(block.grid_shape, shape)
        for key, value in (("block", block), ("shape", tiling.tile), ("tiling", tiling)):
            object.__setattr__(self, key, value)
        self._derive()

    def _parts(self) -> tuple[ScopeSpec, ...]:
        return (self,)

    def _by_part(self, results: dict[ScopeSpec, Any]) -> Any:
        return results[self]

    def _arrays_by_part(self, b: Any) -> list[Array]:
        op.require_array_of_any_dtype(b, "b")
        return [b]

    def _orders(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(len(self.shape))),)

    def _cut_grid(self, b: Array, order: tuple[int, ...], reorder: bool, merge: bool) -> Array:
        """`b` over the block grid as ``(G.., g.., t..)``, merged or interleaved, scopes in `order`."""
        ndim, shape = len(self.tiling.shape), tuple(b.shape)
        if shape[:ndim] != self.tiling.shape:
            raise SpecError(f"b has shape {shape}, expected the block grid {self.tiling.shape} and trailing axes")
        riding = shape[ndim:]
        if not merge and 2 * ndim + len(riding) > MAX_NDIM:
            raise SpecError(f"{ndim} axes cut in two are more than arrays have ({MAX_NDIM}); use merge=True")
        split = (*paired(self.tiling.grid, self.tiling.tile), *riding)
        trailing = tuple(range(2 * ndim, len(split)))
        axes = (*(2 * a for a in order), *range(1, 2 * ndim, 2), *trailing)
        if merge:
            return regroup(b, split, axes, (*permuted(self.tiling.grid, order), self.numblk_per_scope(), *riding))
        if not reorder:
            axes = tuple(range(len(split)))
        return regroup(b, split, axes, tuple(split[a] for a in axes))

    def _join_grid(self, table: Array, order: tuple[int, ...]) -> Array:
        """The inverse of the merged `_cut_grid`, from an ``(S, n, *t)`` table."""
        ndim = len(self.tiling.shape)
        riding = tuple(table.shape)[2:]
        split = (*permuted(self.tiling.grid, order), *self.tiling.tile, *riding)
        back = (*(order.index(a) for a in range(ndim)), *range(ndim, 2 * ndim))
        axes = (*(back[i] for i in interleaved(ndim)), *range(2 * ndim, len(split)))
        return regroup(table, split, axes, (*self.tiling.shape, *riding))

    def __repr__(self) -> str:
        return f"ScopeSpec({self.block!r}, scope={self.shape}, grid={self.grid_shape}{named(self.name)})"


@dataclass(frozen=True, init=False, repr=False)
class ScopeCoupling(SparseScope):
    """Scopes in which the blocks of several parts compete for one budget.

    Parameters
    ----------
    scopes
        The parts: `ScopeSpec` objects whose scope grids agree after `orders`, on windows that share no element.
    orders
        For each part the order in which its scope axes stand in the common grid, as for a transpose;
        ``()`` is "as they stand". Blocks keep their part's own order.
    name
        For messages. No part of equality.

    Raises
    ------
    CouplingError
        (a ValueError) no parts, grids that differ, windows that share an element; names both.
    KindError
        (a TypeError) parts that are no ScopeSpec, or that live in different libraries or on different devices.

    Examples
    --------
    The rows of two matrices compete together:

    >>> import numpy
    >>> a, b = numpy.asarray([[1.0], [4.0]]), numpy.asarray([[3.0], [2.0]])
    >>> both = ScopeCoupling([ScopeSpec(BlockSpec(m, (1, -1)), ()) for m in (a, b)])
    >>> both.hard_threshold(nnz=2)
    >>> a.ravel(), b.ravel()
    (array([0., 4.]), array([3., 0.]))
    """

    scopes: tuple[ScopeSpec, ...]
    orders: tuple[tuple[int, ...], ...]
    name: str | None = field(compare=False)

    def __init__(self, scopes: Sequence[ScopeSpec], orders: Any = (), name: str | None = None) -> None:
        object.__setattr__(self, "name", name)
        with about(self._label):
            parts = as_parts(scopes, ScopeSpec)
            axes = as_orders(orders, [len(part.grid_shape) for part in parts])
            grids = [permuted(part.tiling.grid, order) for part, order in zip(parts, axes, strict=True)]
            require_equal_grids(parts, grids, "scope grid")
            require_separate([spec for part in parts for spec in part.block.specs()])
        object.__setattr__(self, "scopes", parts)
        object.__setattr__(self, "orders", axes)
        self._derive()

    def _orders(self) -> tuple[tuple[int, ...], ...]:
        return self.orders

    def _parts(self) -> tuple[ScopeSpec, ...]:
        return self.scopes

    def _by_part(self, results: dict[ScopeSpec, Any]) -> Any:
        return results

    def _arrays_by_part(self, b: Any) -> list[Array]:
        if not isinstance(b, Mapping):
            raise KindError(f"b must be a mapping from each part (ScopeSpec) to its array, not {type(b).__name__}")
        missing = [part for part in self.scopes if part not in b]
        if missing:
            raise SpecError(f"b has no entry for {missing[0]!r}; its keys must be the parts")
        for part in self.scopes:
            op.require_array_of_any_dtype(b[part], f"b of {part._label}")
        return [b[part] for part in self.scopes]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The scope shape of every part."""
        return tuple(part.shape for part in self.scopes)

    def __repr__(self) -> str:
        return (
            f"ScopeCoupling({len(self.scopes)} parts, grid={self.grid_shape}, {self.numblk_per_scope()} blocks a scope)"
        )
