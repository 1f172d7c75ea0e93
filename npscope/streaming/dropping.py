"""How the losers of a planned tensor are found, and zeroed slab by slab, whatever the size of its scopes.

A scope that fits in a slab is decided there. For a larger one a search goes first: its limits
tell of every block whether it survives, so that no slab need know of another.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from npscope.block import BlockSpec
from npscope.errors import SpecError
from npscope.namespace import hard_threshold, keep_largest
from npscope.recipes.coupled import Kept, drop
from npscope.recipes.plans import Budget, Coupled, Plan
from npscope.streaming.limits import Keys, Limit, Member, Search
from npscope.streaming.ranked import Slab
from npscope.streaming.slabs import SLAB_BYTES, Array, Box, boxes, elements_in, extents, smallest_slab, tiles, whole

SCOPE_BYTES = 8 << 20
"""A scope is decided at once when a slab of at most this size holds it."""


class Dropper(Protocol):
    """Zeroes the losers of one tensor, slab by slab."""

    @property
    def plan(self) -> Plan | Coupled:
        """What is done with the tensor."""

    @property
    def kept(self) -> int:
        """How many blocks survive."""

    @property
    def period(self) -> tuple[int, ...]:
        """Elements along every stored axis that a slab should not cut."""

    def drop(self, slab: Slab) -> None:
        """Zero the blocks of a slab that do not survive."""


def slabs_for(dropper: Dropper) -> Iterator[Box]:
    """Slabs that cover the tensor, contiguous and in the order of its bytes."""
    usual, most = (elements_in(nbytes, dropper.plan.itemsize) for nbytes in (SLAB_BYTES, SCOPE_BYTES))
    return boxes(dropper.plan.shape, dropper.period, usual, most)


@dataclass(frozen=True)
class ByScope:
    """Every slab holds whole scopes."""

    plan: Plan
    kept: int

    @property
    def period(self) -> tuple[int, ...]:
        """A scope."""
        return self.plan.stored(self.plan.scope_size)

    def drop(self, slab: Slab) -> None:
        """Rank and drop in one call."""
        plan = self.plan
        keep_largest(slab.view, plan.keep, plan.block, plan.scope, scores=slab.scores, ord=plan.ord, out=slab.view)


@dataclass(frozen=True)
class ByLimit:
    """Every scope has a limit; slabs hold whole blocks."""

    plan: Plan
    keys: Keys
    limits: Array
    """The keys of the limits, over the grid of scopes."""

    lasts: Array
    """The last positions of the limits, over the grid of scopes."""

    kept: int

    @classmethod
    def single(cls, plan: Plan, keys: Keys, limit: Limit) -> ByLimit:
        """The whole tensor has one limit."""
        grid = (1,) * len(plan.block)
        return cls(plan, keys, np.full(grid, limit.key), np.full(grid, limit.last), limit.kept)

    @property
    def period(self) -> tuple[int, ...]:
        """A block."""
        return self.plan.stored(self.plan.block)

    def drop(self, slab: Slab) -> None:
        """Compare with the limits of the scopes that reach into the slab."""
        plan, keys = self.plan, self.keys
        sides = [np.arange(*_blocks(slab.box[axis], size)) for axis, size in zip(plan.order, plan.block, strict=True)]
        tile = [blocks // scopes for blocks, scopes in zip(plan.grid, self.limits.shape, strict=True)]
        inside = [side % count for side, count in zip(sides, tile, strict=True)]
        steps = [math.prod(tile[axis + 1 :]) for axis in range(len(tile))]
        first, last = (
            sum(int(end(along)) * step for along, step in zip(inside, steps, strict=True)) for end in (np.min, np.max)
        )
        scopes = np.ix_(
            *(
                side // count if scopes > 1 else side[:1] // count
                for side, count, scopes in zip(sides, tile, self.limits.shape, strict=True)
            )
        )
        limits, lasts = self.limits[scopes], self.lasts[scopes]
        # Without a tie that is cut in this slab a threshold does it in one pass, if it can be said in the dtype
        # of these norms: those of other tensors may be wider.
        smallest = limits + (first > lasts)
        whole_ties = np.all((last <= lasts) | (first > lasts))
        if whole_ties and keys.are_wide == plan.has_wide_norms and smallest.max() <= keys.infinity:
            norms = keys.norms(smallest)
            hard_threshold(slab.view, norms, plan.block, scores=slab.scores, ord=plan.ord, out=slab.view)
            return
        places = np.zeros((), np.int64)
        for along, count in zip(inside, tile, strict=True):
            places = places[..., None] * count + along
        found = keys.of(plan, slab.ranked)
        BlockSpec(slab.view, plan.block).apply_mask((found > limits) | ((found == limits) & (places <= lasts)))


@dataclass(frozen=True)
class ByMask:
    """It is known of every block; slabs may cut blocks."""

    plan: Plan
    mask: Array
    """True where a block survives, over the canonical grid."""

    kept: int

    @property
    def period(self) -> tuple[int, ...]:
        """A block."""
        return self.plan.stored(self.plan.block)

    def drop(self, slab: Slab) -> None:
        """Apply the part of the mask."""
        steps, at = [], []
        for axis, size in zip(self.plan.order, self.plan.block, strict=True):
            side = slab.box[axis]
            step = 1 if side.start % size or side.stop % size else size
            steps.append(step)
            at.append(np.arange(side.start, side.stop, step) // size)
        BlockSpec(slab.view, tuple(steps)).apply_mask(self.mask[np.ix_(*at)])


@dataclass(frozen=True)
class ByWindows:
    """It is known of the blocks of windows into the tensor; slabs may cut them."""

    plan: Coupled
    windows: Sequence[Kept]

    @property
    def kept(self) -> int:
        """How many blocks of the coupling survive."""
        return self.plan.scopes * self.plan.keep

    @property
    def period(self) -> tuple[int, ...]:
        """An element."""
        return (1,) * len(self.plan.shape)

    def drop(self, slab: Slab) -> None:
        """Apply what reaches into the slab."""
        sizes = itertools.accumulate(reversed(self.plan.shape[1:]), operator.mul, initial=1)
        start = sum(side.start * size for side, size in zip(reversed(slab.box), sizes, strict=True))
        drop(self.windows, start, slab.values.reshape(-1))


def dropper_of(plan: Plan, search: Search) -> Dropper:
    """The dropper of a tensor that is decided alone; it may read the tensor."""
    if _fits(plan, plan.scope_size, SCOPE_BYTES):
        return ByScope(plan, plan.scopes * plan.keep)
    keys = Keys([plan])
    if plan.keep in (0, plan.blocks):
        elements = replace(plan, block=(1,) * len(plan.block))  # blocks do not matter, and slabs may cut them
        return ByLimit.single(elements, keys, keys.all_or_none(plan.scopes * plan.keep))
    kept = plan.scopes * plan.keep
    if _holds_blocks(plan) and (plan.has_exact_norms or plan.scopes == 1):
        limits, lasts = np.empty(plan.scope_grid, np.int64), np.empty(plan.scope_grid, np.int64)
        for strip in _strips(plan, keys, search):
            at = _on_grid(plan, strip.box, plan.scope_size)
            limits[at], lasts[at] = strip.limits, strip.lasts
        return ByLimit(plan, keys, limits, lasts, kept)
    mask = np.empty(plan.grid, np.bool_)
    for strip in _strips(plan, keys, search):
        _mark(mask, plan, strip, keys, search)
    return ByMask(plan, mask, kept)


def droppers_of(budget: Budget, search: Search) -> list[Dropper]:
    """The droppers of the tensors that share a budget; SpecError when no choice is within its bounds.

    The first choice within bounds has one limit for the tensors where they do not bind. A tensor that
    a common limit takes beyond a bound is at that bound, if what lacks on this side of the bounds
    outweighs what is too much on the other, or the reverse (Bitran and Hax 1981, "Disaggregation and
    resource allocation using convex knapsack problems with bounded variables").
    """
    plans, keys = budget.plans, Keys(budget.plans)
    least, most = ([bound[side] for bound in budget.bounds] for side in (0, 1))
    if not sum(least) <= budget.keep <= sum(most):
        raise SpecError(
            f"budget {budget.name!r:.80}: {budget.keep} blocks are to survive; its bounds allow "
            f"{sum(least)} to {sum(most)}"
        )
    bound: dict[int, int] = {}
    while True:
        free = [i for i in range(len(plans)) if i not in bound]
        members = [Member.all_of(plans[i]) for i in free]
        found = dict(zip(free, search.limits(members, budget.keep - sum(bound.values()), keys), strict=True))
        lacks = {i: least[i] - limit.kept for i, limit in found.items() if limit.kept < least[i]}
        exceeds = {i: limit.kept - most[i] for i, limit in found.items() if limit.kept > most[i]}
        if not lacks and not exceeds:
            break
        lacking, exceeding = sum(lacks.values()), sum(exceeds.values())
        bound |= {i: least[i] for i in lacks if lacking >= exceeding}
        bound |= {i: most[i] for i in exceeds if exceeding >= lacking}
    for i, keep in bound.items():
        found[i] = search.limits([Member.all_of(plans[i])], keep, keys)[0]
    return [_by_limit(plan, keys, found[i], search) for i, plan in enumerate(plans)]


def _by_limit(shared: Plan, keys: Keys, limit: Limit, search: Search) -> Dropper:
    plan = replace(shared, keep=limit.kept)
    if _holds_blocks(plan):
        return ByLimit.single(plan, keys, limit)
    mask, grid = np.empty(plan.grid, np.bool_), (1,) * len(plan.block)
    _mark(mask, plan, _Strip(whole(plan.shape), np.full(grid, limit.key), np.full(grid, limit.last)), keys, search)
    return ByMask(plan, mask, limit.kept)


def _fits(plan: Plan, period: Sequence[int], nbytes: int) -> bool:
    """Whether a slab of `nbytes` holds whole canonical periods."""
    return smallest_slab(plan.shape, plan.stored(period)) <= elements_in(nbytes, plan.itemsize)


def _holds_blocks(plan: Plan) -> bool:
    """Whether slabs hold whole blocks, and where norms depend on it, are those that a search reads."""
    return _fits(plan, plan.block, SCOPE_BYTES if plan.has_exact_norms else SLAB_BYTES)


def _blocks(side: slice, size: int) -> tuple[int, int]:
    return side.start // size, side.stop // size


def _on_grid(plan: Plan, box: Box, sizes: Sequence[int]) -> Box:
    """A box as a box of the canonical grid of things of `sizes` elements."""
    return tuple(slice(*_blocks(box[axis], size)) for axis, size in zip(plan.order, sizes, strict=True))


class _Strip(NamedTuple):
    """Scopes that lie in a box, over their grid the limits, and the keys of their blocks if they were few."""

    box: Box
    limits: Array
    lasts: Array
    table: Array | None = None
    """Keys over the grid of scopes and then by position."""


def _strips(plan: Plan, keys: Keys, search: Search) -> Iterator[_Strip]:
    """The limits of all scopes, which 0 < keep < blocks survive of, as many at once as fit in a slab."""
    grid = (1,) * len(plan.block)
    most = elements_in(SCOPE_BYTES, plan.itemsize)
    for box in tiles(whole(plan.shape), plan.stored(plan.scope_size), most):
        if math.prod(extents(box)) > most:
            limit = search.limits([Member(plan, box)], plan.keep, keys)[0]
            yield _Strip(box, np.full(grid, limit.key), np.full(grid, limit.last))
            continue
        table = by_scope(keys.of(plan, search.slab(plan, box).ranked), plan.scope)
        place = table.shape[-1] - plan.keep
        limits = np.partition(table, place, axis=-1)[..., place, None].copy()
        ties = (table == limits).cumsum(-1, dtype=np.int32)
        left = plan.keep - np.count_nonzero(table > limits, axis=-1)
        yield _Strip(box, limits[..., 0], (ties >= left[..., None]).argmax(-1), table)


def _mark(mask: Array, plan: Plan, strip: _Strip, keys: Keys, search: Search) -> None:
    """Say of every block of a strip whether it survives."""
    if strip.table is not None:
        places, table = np.arange(strip.table.shape[-1]), strip.table
        limits, lasts = strip.limits[..., None], strip.lasts[..., None]
        survives = (table > limits) | ((table == limits) & (places <= lasts))
        mask[_on_grid(plan, strip.box, plan.block)] = by_block(survives, plan.scope)
        return
    member, limit, last = Member(plan, strip.box), strip.limits.item(), strip.lasts.item()
    for _, slab in search.slabs([member]):
        found = keys.of(plan, slab.ranked)
        survives, ties = found > limit, found == limit
        survives[ties] = member.positions(slab.box, ties) <= last
        mask[_on_grid(plan, slab.box, plan.block)] = survives


def by_scope(table: Array, scope: Sequence[int]) -> Array:
    """A table over a grid of blocks as one over the grid of scopes and then by position.

    >>> by_scope(np.arange(8).reshape(2, 4), (2, 2))
    array([[[0, 1, 4, 5],
            [2, 3, 6, 7]]])
    """
    split = [size for length, count in zip(table.shape, scope, strict=True) for size in (length // count, count)]
    axes = (*range(0, len(split), 2), *range(1, len(split), 2))
    return table.reshape(split).transpose(axes).reshape(*split[::2], -1)


def by_block(table: Array, scope: Sequence[int]) -> Array:
    """The reverse of `by_scope`."""
    ndim = len(scope)
    axes = [axis for pair in zip(range(ndim), range(ndim, 2 * ndim), strict=True) for axis in pair]
    shape = [length * count for length, count in zip(table.shape[:-1], scope, strict=True)]
    return table.reshape(*table.shape[:-1], *scope).transpose(axes).reshape(shape)
