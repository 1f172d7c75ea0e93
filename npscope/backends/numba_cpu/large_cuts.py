"""What is written of scopes larger than a piece: which of the blocks stay that equal the k-th, and how all are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from npscope.backends.numba_cpu import scope_passes, strips
from npscope.backends.numba_cpu.brackets import Nth
from npscope.backends.numba_cpu.large_scopes import LargeScopes
from npscope.backends.numba_cpu.orders import Positions
from npscope.backends.numba_cpu.pieces import BLOCK_WORKSPACE, STRIPS_ELEMENTS, piece_length
from npscope.backends.numba_cpu.ranking import cutter_of, dense
from npscope.backends.numba_cpu.writing import Written, writer_of

MOST_TIES, LOOK_KEYS = 1 << 12, 1 << 16
"""Equal blocks that are looked for one by one, at most, and keys that are looked at together."""

MOST_TURNS, MOST_LATE = 1 << 17, 1 << 17
"""Turns of a loop by which more equal elements are counted, a MiB of counters for a thread; and those of the last turn
that are written one by one: a MiB of their numbers.
"""

LEAST_CYCLE = 16
"""Blocks after which the first turn comes again, at least: to write shorter ones takes longer than in the order of
positions.
"""


class _Turn(NamedTuple):
    """Where those of equal blocks end that stay: in a part, in a turn of its positions."""

    part: int
    loop: tuple[int, int]
    """Blocks of a turn, and turns until the first comes again."""
    number: int
    """-1 where none of that part stays."""


class _Ties(NamedTuple):
    """Which of the blocks of a scope that equal the k-th stay."""

    quotas: np.ndarray
    """So many of each piece, the first ones, or more where all stay."""
    split: np.ndarray
    """Pieces where some stay and others do not."""
    turn: _Turn | None
    late: dict[int, np.ndarray]
    """By piece, the blocks of those that do not stay although they would."""


def _last_turn(
    large: LargeScopes, scope: int, nth: Nth, positions: Sequence[Positions]
) -> tuple[_Turn, dict[int, np.ndarray]] | None:
    """The turn with the last of the equal elements that stay, and by piece the blocks of those in it that do not.

    None if turns are too many to count by them, or those blocks, or turns too short.
    """
    counts, parts = large.equal_by_piece(nth.key), np.asarray([piece.part for piece in large.pieces])
    of_parts = np.bincount(parts, counts, len(positions)).astype(np.int64)
    p = int(np.searchsorted(np.cumsum(of_parts), nth.ties, side="right"))
    ties, inner, turns = nth.ties - int(of_parts[:p].sum()), positions[p].inner, positions[p].turns
    if turns > MOST_TURNS or inner * turns < LEAST_CYCLE:
        return None
    found = np.zeros((large.workers, turns), dtype=np.int64)
    read, where, first, limit = large.reader_of(p), large.places[p], large.first_of(p, scope), np.uint64(nth.key)
    places = np.flatnonzero((parts == p) & (counts > 0)).tolist()

    def count(slot: int, i: int) -> None:
        _, start, stop = large.pieces[places[i]]
        scope_passes.count_ties(
            read, where, first, first + start, first + stop, limit, inner, turns, found[slot], large.works[slot]
        )

    large.each(len(places), count)
    before = np.concatenate([[0], found.sum(axis=0).cumsum()])  # the turns
    turn = int(np.searchsorted(before, ties)) - 1
    last = _Turn(p, (inner, turns), turn)
    if before[turn + 1] == ties:
        return last, {}
    each, staying = int(before[turn + 1] - before[turn]), ties - int(before[turn])
    if each > MOST_LATE:
        return None
    blocks = np.empty(each, dtype=np.int64)
    whole = large.ranking.parts[p].blocks
    scope_passes.find_ties(read, where, first, whole, limit, inner, turns, turn, blocks, large.works[0])
    late = np.sort(blocks[np.argsort(positions[p].of(blocks))[staying:]])
    first_piece, starts = int(np.flatnonzero(parts == p)[0]), [piece.b0 for piece in large.pieces if piece.part == p]
    return last, {
        first_piece + i: late[start:stop]
        for i, (start, stop) in enumerate(pairwise([*np.searchsorted(late, starts).tolist(), late.size]))
        if start < stop
    }


def _late_ties(
    large: LargeScopes, scope: int, nth: Nth, positions: Sequence[Positions]
) -> dict[int, np.ndarray] | None:
    """By piece, the blocks equal to the k-th that are not among the k first, after `nth`; None if many are equal.

    First is what has the smaller of `positions`, which are not the numbers of blocks.
    """
    if nth.equal > MOST_TIES:
        return None
    found: list[tuple[int, int, int, int]] = []
    keys = np.empty(LOOK_KEYS, dtype=large.ranking.key)
    for place in np.flatnonzero(large.equal_by_piece(nth.key)).tolist():
        p, start, stop = large.pieces[place]
        read, first = large.reader_of(p), large.first_of(p, scope)
        for b0 in range(start, stop, LOOK_KEYS):
            b1 = min(stop, b0 + LOOK_KEYS)
            here = keys[: b1 - b0]
            strips.read_blocks(read, large.places[p], first + b0, first + b1, large.strips[p], here, large.works[0])
            blocks = b0 + np.flatnonzero(here == here.dtype.type(nth.key))
            at = positions[p].of(blocks)
            found += [(p, *pair, place) for pair in zip(at.tolist(), blocks.tolist(), strict=True)]
    late: dict[int, list[int]] = {}
    for _, _, block, place in sorted(found)[nth.ties :]:
        late.setdefault(place, []).append(block)
    return {place: np.asarray(blocks) for place, blocks in late.items()}


def _ties_of(
    large: LargeScopes, scope: int, nth: Nth, positions: Sequence[Positions] | None, *, by_turns: bool
) -> _Ties | None:
    """Which blocks stay that equal the k-th, after `nth`; None where too many are to be told apart by `positions`.

    `by_turns`: more of them can be than `MOST_TIES`.
    """
    pieces = len(large.pieces)
    nowhere = np.zeros(pieces, dtype=np.bool_)
    if nth.ties == nth.equal:
        return _Ties(np.full(pieces, nth.equal), nowhere, None, {})
    if positions is None:
        # Ties go to the earlier blocks: each piece may keep what the pieces before it left.
        counts = large.equal_by_piece(nth.key)
        quotas = np.maximum(nth.ties - np.cumsum(counts) + counts, 0)
        return _Ties(quotas, (quotas > 0) & (quotas < counts), None, {})
    quotas, late = np.full(pieces, nth.equal), _late_ties(large, scope, nth, positions)
    if late is not None:
        return _Ties(quotas, nowhere, None, late)
    found = _last_turn(large, scope, nth, positions) if by_turns else None
    if found is None:
        return None
    turn, late = found
    quotas[[piece.part > turn.part for piece in large.pieces]] = 0
    return _Ties(quotas, nowhere, turn, late)


class _Cut:
    """How all scopes are cut at their `limits`, piece by piece, with everything that it takes.

    `cuts` says by part how its elements are cut by their own keys, where they can be; of others keys are compared.
    `late` says by number of a piece, counted over all scopes, which of its blocks are dropped although their keys stay.
    """

    def __init__(
        self, large: LargeScopes, targets: Sequence[Written], cuts: Sequence[int | None], limits: np.ndarray,
        ties: Sequence[_Ties], late: dict[int, np.ndarray],
    ) -> None:  # fmt: skip
        self.large, self.targets, self.cuts = large, targets, cuts
        self.limits, self.ties, self.late = limits, ties, late
        # Keys are read to be compared one by one, but where all elements of a piece can be cut by their limit.
        compared = {p for p, cut in enumerate(cuts) if cut is None}
        compared |= {large.pieces[place].part for shared in ties for place in np.flatnonzero(shared.split).tolist()}
        self.reads = [large.reader_of(p) if p in compared else 0 for p in range(len(targets))]
        self.writes = [
            0 if cut is not None else strips.marker() if target.only is None else writer_of(target.only)
            for cut, target in zip(cuts, targets, strict=True)
        ]
        # What a kernel cannot write by itself goes through a mask, as much of it as other work arrays take.
        self.steps = [
            STRIPS_ELEMENTS if target.only else piece_length(part.blocks, part.elements, 1, BLOCK_WORKSPACE)
            for part, target in zip(large.ranking.parts, targets, strict=True)
        ]
        length = max((step for step, target in zip(self.steps, targets, strict=True) if not target.only), default=0)
        self.masks = np.empty((large.workers, length), dtype=np.bool_)
        self.pieces = large.ranking.scopes * len(large.pieces)

    def work(self, slot: int, i: int) -> None:
        """Write a piece. The last comes first, of which a cache still has what was read last."""
        i = self.pieces - 1 - i
        scope, place = divmod(i, len(self.large.pieces))
        p = self.large.pieces[place].part
        cut = self.cuts[p]
        if cut is None:
            self._compare(slot, scope, place)
        else:
            self._cut(cut, slot, scope, place)
        if i in self.late:
            self.targets[p].drop_each(self.late[i])

    def _cut(self, cut: int, slot: int, scope: int, place: int) -> None:
        large = self.large
        p, start, stop = large.pieces[place]
        here, there, read_first = large.places[p], self.targets[p].leaves[0].raw, large.first_of(p, scope)
        first, limit = scope * large.ranking.parts[p].blocks, self.limits[scope]
        quotas, split, turn, _ = self.ties[scope]
        if turn is not None and p == turn.part:
            scope_passes.cut_by_turns(
                cut, here, there, first, first + start, first + stop, limit, *turn.loop, turn.number
            )
            return
        left = quotas[place]
        border = stop if left > 0 else start
        if split[place]:
            at = read_first + start, read_first + stop
            border = scope_passes.tie_border_in(self.reads[p], here, *at, limit, left, large.works[slot]) - read_first
        scope_passes.cut_elements(cut, here, there, first + start, first + border, first + stop, limit)

    def _compare(self, slot: int, scope: int, place: int) -> None:
        large = self.large
        p, start, stop = large.pieces[place]
        written, first, read_first = self.targets[p], scope * large.ranking.parts[p].blocks, large.first_of(p, scope)
        left, step, mask = int(self.ties[scope].quotas[place]), self.steps[p], self.masks[slot]
        for b0 in range(start, stop, step):
            b1 = min(stop, b0 + step)
            target = written.only.raw if written.only else dense(mask, -first - b0)
            left = scope_passes.keep_above(
                self.reads[p], self.writes[p], large.places[p], read_first + b0, target, first + b0, first + b1,
                large.strips[p], self.limits[scope], left, large.works[slot],
            )  # fmt: skip
            if not written.only:
                written.put(first + b0, first + b1, mask[: b1 - b0])


def cut_job(
    large: LargeScopes, keeps: Sequence[int], targets: Sequence[Written], *, shielded: bool,
    positions: Sequence[Positions] | None = None,
) -> Callable[[], None] | None:  # fmt: skip
    """The job that writes to the target of each part which of its blocks are kept, decided and allocated now.

    Of equal blocks the first are kept: by their numbers, or where blocks are numbered in another order by their
    `positions`. None if too many would have to be told apart by these.
    """
    ranking, pieces = large.ranking, len(large.pieces)
    cuts = [cutter_of(ranking, p, target.only) for p, target in enumerate(targets)]
    limits = np.empty(ranking.scopes, dtype=np.uint64)
    ties: list[_Ties] = []
    late: dict[int, np.ndarray] = {}
    for scope, k in enumerate(keeps):
        nth = large.limit_of(scope, k)
        limits[scope] = nth.key
        shared = _ties_of(large, scope, nth, positions, by_turns=None not in cuts)
        if shared is None:
            return None
        ties.append(shared)
        for place, blocks in shared.late.items():
            p = large.pieces[place].part
            targets[p].drop_each(blocks[:0])  # so that it is compiled
            late[scope * pieces + place] = scope * ranking.parts[p].blocks + blocks
    cut = _Cut(large, targets, cuts, limits, ties, late)
    return lambda: large.each(cut.pieces, cut.work, shielded=shielded)
