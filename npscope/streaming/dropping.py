"""How the losers of a planned tensor are found, and zeroed slab by slab, whatever the size of its scopes.

A scope that fits in a slab is decided there. For a larger one a search goes first: its limits
tell of every block whether it survives, so that no slab need know of another. Where there would be
too many limits, or a slab cannot tell what the norms of its blocks are, the survivors are marked
window by window, when the first slab of a window comes, and are kept on disk where others come back to it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from npscope.block import BlockSpec
from npscope.errors import SpecError
from npscope.namespace import block_mask, hard_threshold, keep_largest
from npscope.recipes.coupled import Kept, drop
from npscope.recipes.plans import Budget, Coupled, Plan
from npscope.streaming.limits import Keys, Limit, Member, Search
from npscope.streaming.marks import Marks, MarksFile
from npscope.streaming.ranked import Slab
from npscope.streaming.slabs import (
    SLAB_BYTES,
    Array,
    Box,
    boxes,
    cells,
    common,
    elements_in,
    smallest_slab,
    tile_sizes,
    tiles,
    whole,
)

SCOPE_BYTES = 8 << 20
"""A scope is decided at once when a slab of at most this size holds it."""

LIMITS = 1 << 18
"""Limits that are held of one tensor at most: they take 16 bytes each."""

MARK_BYTES = 8 << 20
"""About the bytes of the marks of one window."""


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
    usual, most = (elements_in(nbytes, dropper.plan.width) for nbytes in (SLAB_BYTES, SCOPE_BYTES))
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


class ByMarks:
    """Survivors are marked in one window after another; slabs may cut blocks, and windows.

    `mark` finds the marks of a window, a box of the stored tensor, over the stored axes: it reads
    the window. Slabs come back to windows that are parts of rows, whose marks go into `file`.
    """

    def __init__(
        self, plan: Plan, kept: int, windows: tuple[int, ...], mark: Callable[[Box], Marks], file: MarksFile
    ) -> None:
        self.plan, self.kept = plan, kept
        self._windows, self._mark, self._file = windows, mark, file
        self._come_again = smallest_slab(plan.shape, windows) > math.prod(windows)
        self._marks: dict[tuple[int, ...], Callable[[], Marks]] = {}

    @property
    def period(self) -> tuple[int, ...]:
        """A block."""
        return self.plan.stored(self.plan.block)

    def drop(self, slab: Slab) -> None:
        """Apply the marks of the windows that reach into the slab."""
        around = tuple(slice(side.start // n * n, side.stop) for side, n in zip(slab.box, self._windows, strict=True))
        for part in cells(around, self._windows):
            marks = self._marks_of(tuple(side.start for side in part))
            # The first part of an axis may start before the slab does, and the last one ends with it.
            box = tuple(slice(max(p.start, s.start), p.stop) for p, s in zip(part, slab.box, strict=True))
            inside = tuple(slice(b.start - s.start, b.stop - s.start) for b, s in zip(box, slab.box, strict=True))
            self._drop(slab.values[inside], box, marks)

    def _drop(self, values: Array, box: Box, marks: Marks) -> None:
        sizes = self.plan.stored(self.plan.block)
        steps, places = [], []
        for side, size in zip(box, sizes, strict=True):
            step = 1 if side.start % size or side.stop % size else size
            steps.append(step)
            places.append(np.arange(side.start, side.stop, step) // size - side.start // size)
        BlockSpec(values, tuple(steps)).apply_mask(marks.get(_on_grid(box, sizes))[np.ix_(*places)])

    def _marks_of(self, corner: tuple[int, ...]) -> Marks:
        """The marks of the window that starts there."""
        if corner not in self._marks:
            while not self._come_again and len(self._marks) > 1:  # a slab may reach from one window into the next
                del self._marks[next(iter(self._marks))]
            sides = zip(corner, self._windows, self.plan.shape, strict=True)
            marks = self._mark(tuple(slice(at, min(at + size, length)) for at, size, length in sides))
            self._marks[corner] = self._file.keep(marks) if self._come_again else lambda: marks
        return self._marks[corner]()


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


def dropper_of(plan: Plan, search: Search, file: MarksFile) -> Dropper:
    """The dropper of a tensor that is decided alone; it may read the tensor, now and when it drops.

    `file` is for marks that it comes back to.
    """
    kept = plan.scopes * plan.keep
    if _fits(plan, plan.scope_size, SCOPE_BYTES):
        return ByScope(plan, kept)
    keys = Keys([plan])
    if plan.keep in (0, plan.blocks):
        elements = plan._replace(block=(1,) * len(plan.block))  # blocks do not matter, and slabs may cut them
        return ByLimit.single(elements, keys, keys.all_or_none(kept))
    by_limit = plan.scopes <= LIMITS and _holds_blocks(plan) and (plan.has_exact_norms or plan.scopes == 1)
    if not by_limit and math.prod(plan.scope_size) <= elements_in(SCOPE_BYTES, plan.width):
        scope = plan.stored(plan.scope_size)
        return ByMarks(plan, kept, _windows(plan, scope), partial(_marks_by_scope, plan, search), file)
    limits, lasts = _limits(plan, keys, search)
    if by_limit:
        return ByLimit(plan, keys, limits, lasts, kept)
    return _by_marks(plan, keys, limits, lasts, kept, search, file)


def droppers_of(budget: Budget, search: Search, file: MarksFile) -> list[Dropper]:
    """The droppers of the tensors that share a budget; SpecError when no choice is within its bounds."""
    plans, keys = budget.plans, Keys(budget.plans)
    least, most = (sum(bound[side] for bound in budget.bounds) for side in (0, 1))
    if not least <= budget.keep <= most:
        raise SpecError(
            f"budget {budget.name!r:.80}: {budget.keep} blocks are to survive; its bounds allow {least} to {most}"
        )
    members = [Member.all_of(plan) for plan in plans]
    free = all(bound == (0, member.blocks) for bound, member in zip(budget.bounds, members, strict=True))
    found = search.limits(members, budget.keep, keys, None if free else budget.bounds)
    return [_by_limit(plan, keys, limit, search, file) for plan, limit in zip(plans, found, strict=True)]


def _by_limit(shared: Plan, keys: Keys, limit: Limit, search: Search, file: MarksFile) -> Dropper:
    plan = shared._replace(keep=limit.kept)
    found = ByLimit.single(plan, keys, limit)
    if _holds_blocks(plan):
        return found
    return _by_marks(plan, keys, found.limits, found.lasts, limit.kept, search, file)


def _by_marks(
    plan: Plan, keys: Keys, limits: Array, lasts: Array, kept: int, search: Search, file: MarksFile
) -> ByMarks:
    """The dropper that compares with the limits of large scopes what a search reads."""
    scope = plan.stored(plan.scope_size)
    # Windows hold whole boxes of the search, so that norms come out as they did there.
    boxes = tile_sizes(scope, plan.stored(plan.block), elements_in(SLAB_BYTES, plan.width))
    sides = zip(boxes, scope, plan.shape, strict=True)
    unit = tuple(box if size % box == 0 or size == length else size for box, size, length in sides)
    return ByMarks(plan, kept, _windows(plan, unit), partial(_marks_by_limit, plan, keys, limits, lasts, search), file)


def _fits(plan: Plan, period: Sequence[int], nbytes: int) -> bool:
    """Whether a slab of `nbytes` holds whole canonical periods."""
    return smallest_slab(plan.shape, plan.stored(period)) <= elements_in(nbytes, plan.width)


def _holds_blocks(plan: Plan) -> bool:
    """Whether slabs hold whole blocks, and where norms depend on it, are those that a search reads."""
    return _fits(plan, plan.block, SCOPE_BYTES if plan.has_exact_norms else SLAB_BYTES)


def _windows(plan: Plan, unit: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of windows of whole units that take about `MARK_BYTES` of marks; contiguous, if units allow."""
    block = plan.stored(plan.block)
    bits = MARK_BYTES * min(8, plan.shape[-1] // block[-1])
    return tile_sizes(plan.shape, unit, bits * math.prod(block))


def _blocks(side: slice, size: int) -> tuple[int, int]:
    return side.start // size, side.stop // size


def _on_grid(box: Box, sizes: Sequence[int]) -> Box:
    """The things of `sizes` elements that reach into a box, as a box of their grid."""
    return tuple(slice(side.start // size, -(-side.stop // size)) for side, size in zip(box, sizes, strict=True))


def _limits(plan: Plan, keys: Keys, search: Search) -> tuple[Array, Array]:
    """Keys and last positions of the limits of all scopes, which 0 < keep < blocks survive of, over their grid."""
    limits, lasts = np.empty(plan.scope_grid, np.int64), np.empty(plan.scope_grid, np.int64)
    scope = plan.stored(plan.scope_size)
    most = elements_in(SCOPE_BYTES, plan.width)
    strips = tiles(whole(plan.shape), scope, most)
    if math.prod(scope) > most:
        for strip in strips:
            limit = search.limits([Member(plan, strip)], plan.keep, keys)[0]
            at = _canonical(plan, _on_grid(strip, scope))
            limits[at], lasts[at] = limit.key, limit.last
        return limits, lasts
    for slab in search.slabs(plan, strips):
        table = by_scope(keys.of(plan, slab.ranked), plan.scope)
        place = table.shape[-1] - plan.keep
        found = np.partition(table, place, axis=-1)[..., place, None].copy()
        ties = (table == found).cumsum(-1, dtype=np.int32)
        left = plan.keep - np.count_nonzero(table > found, axis=-1)
        at = _canonical(plan, _on_grid(slab.box, scope))
        limits[at], lasts[at] = found[..., 0], (ties >= left[..., None]).argmax(-1)
    return limits, lasts


def _canonical(plan: Plan, box: Box) -> Box:
    """A box of stored axes as one of canonical axes."""
    return tuple(box[axis] for axis in plan.order)


def _marks_by_scope(plan: Plan, search: Search, window: Box) -> Marks:
    """The survivors in a window of whole scopes, as many of which are decided at once as fit in a slab."""
    block = plan.stored(plan.block)
    marks = Marks(_on_grid(window, block))
    strips = tiles(window, plan.stored(plan.scope_size), elements_in(SCOPE_BYTES, plan.width))
    for slab in search.slabs(plan, strips):
        survives = block_mask(slab.view, plan.keep, plan.block, plan.scope, scores=slab.scores, ord=plan.ord)
        marks.put(_on_grid(slab.box, block), _to_stored(plan, survives))
    return marks


def _marks_by_limit(plan: Plan, keys: Keys, limits: Array, lasts: Array, search: Search, window: Box) -> Marks:
    """The survivors in a window of whole boxes of the search that found these limits."""
    block, scope = plan.stored(plan.block), plan.stored(plan.scope_size)
    marks = Marks(_on_grid(window, block))
    for region in cells(whole(plan.shape), scope):
        if common(region, window) is None:
            continue
        at = _canonical(plan, _on_grid(region, scope))
        limit, last, member = limits[at].item(), lasts[at].item(), Member(plan, region)
        inside = (box for box in member.boxes(SLAB_BYTES) if common(box, window) is not None)
        for slab in search.slabs(plan, inside):
            found = keys.of(plan, slab.ranked)
            survives, ties = found > limit, found == limit
            survives[ties] = member.positions(slab.box, ties) <= last
            marks.put(_on_grid(slab.box, block), _to_stored(plan, survives))
    return marks


def _to_stored(plan: Plan, table: Array) -> Array:
    """A table over the canonical grid as one over the stored axes."""
    return table.transpose(np.argsort(plan.order))


def by_scope(table: Array, scope: Sequence[int]) -> Array:
    """A table over a grid of blocks as one over the grid of scopes and then by position.

    >>> by_scope(np.arange(8).reshape(2, 4), (2, 2))
    array([[[0, 1, 4, 5],
            [2, 3, 6, 7]]])
    """
    split = [size for length, count in zip(table.shape, scope, strict=True) for size in (length // count, count)]
    axes = (*range(0, len(split), 2), *range(1, len(split), 2))
    return table.reshape(split).transpose(axes).reshape(*split[::2], -1)
