"""Selection in scopes larger than a piece: brackets from samples, narrowed by passes that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from npscope.backends import threads
from npscope.backends.numba_cpu import strips
from npscope.backends.numba_cpu.norms import put
from npscope.backends.numba_cpu.operands import (
    BLOCK_WORKSPACE,
    PIECE_ELEMENTS,
    STRIPS_ELEMENTS,
    piece_length,
    ranges,
    workers_for,
)
from npscope.backends.numba_cpu.ranking import KeyWork, Ranking, Sink, cutter_of, dense
from npscope.backends.numba_cpu.strips import STRIP_ELEMENTS, Scratch

FOUND_BYTES = 6 << 20
"""Work array of a thread for the keys between two limits; 1 % of a scope lies there as a rule."""

SAMPLE_RUNS, SAMPLE_RUN = 1 << 13, 16
"""Places of a scope that are sampled, and keys read at each: as many as a cache line of float32 holds."""

SAMPLE_SHARES = 8
"""Pieces in which a part is sampled, whatever the number of threads."""

MARGIN = 6.0
"""Standard deviations between the wanted rank and the ends of a bracket: a miss costs another pass."""

MAX_GUESSES = 8
"""Brackets taken from samples before the range of keys is halved instead, which ends: a key has so many bits."""


class _Piece(NamedTuple):
    """Blocks [b0, b1) of a scope of part `part`."""

    part: int
    b0: int
    b1: int


@dataclass
class _Bracket:
    """The wanted key lies in [low, high]: `above` keys of the scope lie above, `inside` within."""

    low: int
    high: int
    above: int
    inside: int


class LargeScopes:
    """Selection in scopes larger than a piece, by passes over all their blocks.

    A sample gives two keys that probably enclose the k-th. One pass counts the keys above them and
    collects those between, among which the k-th is then looked up. Where the sample misled, or too many
    lie between, the counts give a narrower bracket for another pass. Keys of 1-element blocks are read
    from the array in every pass; norms of larger blocks are computed once and kept, which is O(blocks).
    All counts are integers, and nothing depends on which thread took which piece.
    """

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self.workers = workers_for(ranking.elements)
        read_blocks = [
            source is not None and part.elements == 1
            for source, part in zip(ranking.sources, ranking.parts, strict=True)
        ]
        self.lasting = [i for i, direct in enumerate(read_blocks) if not direct]
        self.norm_keys = np.empty(ranking.scopes * ranking.blocks if self.lasting else 0, dtype=ranking.key)
        self.pieces = [
            _Piece(p, b0, min(part.blocks, b0 + length))
            for p, part in enumerate(ranking.parts)
            for length in [max(STRIP_ELEMENTS, STRIPS_ELEMENTS // part.elements)]
            for b0 in range(0, part.blocks, length)
        ]
        # The keys of a part: those kept in `norm_keys`, or as a kernel reads them from the array.
        self.reads = [
            strips.dense_reader(ranking.key) if p in self.lasting or source is None else source.read
            for p, source in enumerate(ranking.sources)
        ]
        self.places = [
            dense(self.norm_keys, columns.start) if p in self.lasting or source is None else source.where
            for p, (source, columns) in enumerate(zip(ranking.sources, ranking.columns, strict=True))
        ]
        room = min(ranking.blocks + 2 * STRIP_ELEMENTS, FOUND_BYTES // ranking.key.itemsize)
        self.found = [np.empty(room, dtype=ranking.key) for _ in range(self.workers)]
        self.works = [Scratch(STRIP_ELEMENTS, 0, ranking.key).all for _ in range(self.workers)]
        runs = max(1, min(SAMPLE_RUNS, ranking.blocks // 256 // SAMPLE_RUN))
        self.samples = [
            (
                p,
                seed,
                np.empty(
                    max(1, runs * part.blocks // ranking.blocks // SAMPLE_SHARES) * min(SAMPLE_RUN, part.blocks),
                    dtype=ranking.key,
                ),
            )
            for p, part in enumerate(ranking.parts)
            for seed in range(SAMPLE_SHARES)
        ]
        # By piece: keys above the bracket and inside it, and where those inside were stored.
        self.above, self.inside, self.stored, self.slot, self.start, self.equal = np.zeros(
            (6, len(self.pieces)), dtype=np.int64
        )
        self._keep_norms()

    def _each(self, pieces: int, use: Callable[[int, int], None], *, shielded: bool = False) -> None:
        threads.run(pieces, use, self.workers, shielded=shielded)

    def _first(self, p: int, scope: int) -> int:
        """The number of the first block of a scope, for the reader of part p."""
        return scope * (self.ranking.blocks if p in self.lasting else self.ranking.parts[p].blocks)

    def _keep_norms(self) -> None:
        """The keys of all blocks whose norms take more than a look."""
        ranking = self.ranking
        for p in self.lasting:
            part, columns = ranking.parts[p], ranking.columns[p]
            table = self.norm_keys.reshape(ranking.scopes, ranking.blocks)[:, columns]

            dense = table.flags.c_contiguous

            def make_work(
                slots: int, length: int, p: int = p, table: np.ndarray = table, dense: bool = dense
            ) -> Callable[[int, int, int], None]:
                works = [KeyWork(ranking, p, length) for _ in range(slots)]
                keys = np.empty((slots, 0 if dense else length), dtype=ranking.key)

                def work(slot: int, i0: int, i1: int) -> None:
                    here = table.reshape(-1)[i0:i1] if dense else keys[slot, : i1 - i0]
                    works[slot].fill(i0, i1, here)
                    if not dense:
                        put(table, i0, i1, here)

                return work

            piece = PIECE_ELEMENTS if ranking.sources[p] is None else STRIPS_ELEMENTS
            ranges(part.total, part.elements, make_work, piece=piece)()

    def _sample(self, scope: int) -> np.ndarray:
        """Some keys of a scope, sorted."""

        def use(slot: int, i: int) -> None:
            p, seed, share = self.samples[i]
            first, blocks = self._first(p, scope), self.ranking.parts[p].blocks
            run, work = min(SAMPLE_RUN, blocks), self.works[slot]
            strips.sample(self.reads[p], self.places[p], first, first + blocks, run, seed, share, work)

        self._each(len(self.samples), use)
        return np.sort(np.concatenate([share for _, _, share in self.samples]))

    def _survey(self, scope: int, low: int, high: int) -> None:
        """Count the keys of every piece above and inside [low, high], and collect the latter."""
        limits, survey = (np.uint64(low), np.uint64(high)), strips.survey_kernel(self.ranking.width)
        ends = [0] * self.workers

        def use(slot: int, i: int) -> None:
            piece, start = self.pieces[i], ends[slot]
            first = self._first(piece.part, scope)
            self.above[i], self.inside[i], self.stored[i] = survey(
                self.reads[piece.part], self.places[piece.part], first + piece.b0, first + piece.b1, *limits,
                self.found[slot], start, self.works[slot],
            )  # fmt: skip
            self.slot[i], self.start[i] = slot, start
            ends[slot] = start + int(self.stored[i])

        self._each(len(self.pieces), use)

    def _collected(self, i: int) -> np.ndarray:
        """The keys of piece i that the last survey collected."""
        start = self.start[i]
        keys: np.ndarray = self.found[self.slot[i]][start : start + self.stored[i]]
        return keys

    def nth(self, scope: int, k: int) -> tuple[int, int]:
        """(k-th largest key of a scope, how many keys equal to it are among the k largest).

        Leaves in `equal` how many keys of each piece equal it.
        """
        sample = self._sample(scope)
        bracket = _Bracket(0, (1 << self.ranking.width) - 1, 0, self.ranking.blocks)
        crowded = False
        for guesses in range(MAX_GUESSES + 2 * self.ranking.width):
            low, high = _ends(sample, bracket, k, crowded, halve=guesses >= MAX_GUESSES)
            self._survey(scope, low, high)
            above, inside = int(self.above.sum()), int(self.inside.sum())
            crowded = False
            if k <= above:
                bracket = _Bracket(high + 1, bracket.high, bracket.above, above - bracket.above)
            elif k > above + inside:
                bracket = _Bracket(
                    bracket.low, low - 1, above + inside, bracket.above + bracket.inside - above - inside
                )
            elif low == high:
                self.equal[:] = self.inside
                return low, k - above
            elif int(self.stored.sum()) == inside:
                return self._look_up(k - above)
            else:
                bracket, crowded = _Bracket(low, high, above, inside), True
                sample = np.sort(np.concatenate([self._collected(i) for i in range(len(self.pieces))])[: sample.size])
        raise AssertionError("a bracket narrows with every pass")

    def _look_up(self, k: int) -> tuple[int, int]:
        """`nth` among the keys that the last survey collected."""
        pieces = [self._collected(i) for i in range(len(self.pieces))]
        keys = np.concatenate(pieces)
        keys.partition(keys.size - k)
        limit = keys[keys.size - k]
        for i, found in enumerate(pieces):
            self.equal[i] = np.count_nonzero(found == limit)
        return int(limit), k - int(np.count_nonzero(keys[keys.size - k :] > limit))

    def _limit(self, scope: int, k: int) -> tuple[int, int]:
        """`nth`, for any k; 0 blocks are above the largest key, and all above key 0 or equal to it."""
        if 0 < k < self.ranking.blocks:
            return self.nth(scope, k)
        self.equal[:] = 0
        return (0, self.ranking.blocks) if k > 0 else ((1 << self.ranking.width) - 1, 0)

    def cut_job(self, keeps: Sequence[int], sinks: Sequence[Sink], *, shielded: bool) -> Callable[[], None]:
        """The job that hands each part's sink the mask of its kept blocks; all is decided and allocated now."""
        pieces, ranking = len(self.pieces), self.ranking
        limits = np.empty(ranking.scopes, dtype=np.uint64)
        quotas, spare = np.empty((2, ranking.scopes, pieces), dtype=np.int64)
        for scope, k in enumerate(keeps):
            limits[scope], ties = self._limit(scope, k)
            # Ties go to the earlier blocks: each piece may keep what the pieces before it left.
            quotas[scope] = np.maximum(ties - np.cumsum(self.equal) + self.equal, 0)
            spare[scope] = quotas[scope] - self.equal
        largest = (1 << ranking.width) - 1
        cutters = [cutter_of(ranking, p, sink) for p, sink in enumerate(sinks)]
        writes = [strips.mask_writer() if sink.write is None else sink.write for sink in sinks]
        # What a kernel cannot write by itself goes through a mask, as much of it as other work arrays take.
        steps = [
            STRIPS_ELEMENTS if sink.write is not None else piece_length(part.blocks, part.elements, 1, BLOCK_WORKSPACE)
            for part, sink in zip(ranking.parts, sinks, strict=True)
        ]
        length = max((step for step, sink in zip(steps, sinks, strict=True) if sink.write is None), default=0)
        masks = np.empty((self.workers, length), dtype=np.bool_)

        def use(slot: int, i: int) -> None:
            scope, place = divmod(i, pieces)
            p, start, stop = self.pieces[place]
            sink, first, read_first = sinks[p], scope * ranking.parts[p].blocks, self._first(p, scope)
            left, limit = int(quotas[scope, place]), int(limits[scope])
            cut = cutters[p]
            if cut is not None and (spare[scope, place] >= 0 or left == 0) and (left > 0 or limit < largest):
                # Equal keys stay or go together, so elements can be cut by a limit alone.
                bound = np.uint64(limit + (left == 0))
                strips.cut_elements(cut, self.places[p], sink.where, first + start, first + stop, bound)
                return
            for b0 in range(start, stop, steps[p]):
                b1 = min(stop, b0 + steps[p])
                target = dense(masks[slot], -first - b0) if sink.write is None else sink.where
                left = strips.keep_above(
                    self.reads[p], writes[p], self.places[p], read_first + b0, target, first + b0, first + b1,
                    STRIP_ELEMENTS, limits[scope], left, self.works[slot],
                )  # fmt: skip
                if sink.write is None:
                    sink.put(first + b0, first + b1, masks[slot, : b1 - b0])

        return lambda: self._each(ranking.scopes * pieces, use, shielded=shielded)


def _ends(sample: np.ndarray, bracket: _Bracket, k: int, crowded: bool, *, halve: bool) -> tuple[int, int]:
    """Two keys of the bracket that should enclose the k-th, from sorted keys; one twice where many are equal."""
    inside = sample[
        np.searchsorted(sample, bracket.low, side="left") : np.searchsorted(sample, bracket.high, side="right")
    ]
    if halve or not inside.size:
        middle = bracket.low + (bracket.high - bracket.low) // 2
        return middle, middle if crowded else bracket.high
    share = (k - bracket.above) / bracket.inside
    place = (1 - share) * inside.size
    margin = MARGIN * (inside.size * share * (1 - share)) ** 0.5 + 2
    low, high = int(place - margin), int(place + margin) + 1
    key = int(inside[min(int(place), inside.size - 1)])
    first, last = np.searchsorted(inside, key, side="left"), np.searchsorted(inside, key, side="right")
    if crowded or last - first > margin:
        return key, key
    return (
        int(inside[low]) if low >= 0 else bracket.low,
        int(inside[high]) if high < inside.size else bracket.high,
    )
