"""Selection in scopes larger than a piece: brackets from samples, narrowed by passes that count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from npscope.backends import threads
from npscope.backends.numba_cpu import scope_passes, strips
from npscope.backends.numba_cpu.brackets import MARGIN, Look, Nth, Sample, Survey, narrow, partitioned, sample_of
from npscope.backends.numba_cpu.norms import put, workspace_of
from npscope.backends.numba_cpu.pieces import PIECE_ELEMENTS, STRIPS_ELEMENTS, ranges, workers_for
from npscope.backends.numba_cpu.ranking import KeyWork, Ranking, dense, surveyor_of
from npscope.backends.numba_cpu.strips import STRIP_ELEMENTS, Scratch
from npscope.backends.numba_cpu.vector_search import SLACK

FOUND_BYTES = 6 << 20
"""Work array of a thread for the keys between two limits; 3 % of a scope lies there as a rule."""

SAMPLE, MOST_SAMPLED = 1 << 15, 1 << 18
"""Keys that are sampled, and at most, where more would lie between the limits than can be kept.

The bracket of so many holds 3 % of a scope. To look up one key among these 3 % of 64 Mi takes half a millisecond more
than among 2 %.
"""

SAMPLE_RUN, SAMPLE_PLACES = 32, 512
"""Adjacent keys that are sampled at a place, where to go takes as long as to read them; fewer if places were fewer."""

FEW_KEYS = 1 << 15
"""Keys that NumPy partitions to find one by its rank; of a million that takes 8 ms."""

PIECE_GROWTH, PIECES_EACH = 2, 16
"""A piece is so many times larger than elsewhere if each thread still has so many of them, or bundles of smaller ones.

What Python does for a piece takes some 30 us, as all that it needs has left the caches meanwhile: to keep half of all
4x4 blocks took 2 to 4 % less so. With four bundles for a thread, one thread often had five and the other three.
"""

LOOK_ELEMENTS = 1 << 14
"""Keys that are looked at at once: of 4096, a look of 64 Mi float32 takes 0.9 ms longer, for what it has found last is
not yet in the cache when it is made keys.
"""

MOST_READ_AGAIN, MOST_READ_IN_PLACE = 8, 16
"""Elements of a block whose norm is formed again in every pass; and of float32 where these are what is written, if any.

To keep keys takes longer, half of it for new memory. Of 64 Mi float32 in rows of 1024, half kept in place beside
other calls, 1x16, 2x8 and 4x4 take a tenth less if they are measured again, 16x1 3 %, 3x3 5 % more, 1x32 4 % more. What
is narrower is made float32 first: 1x16 bfloat16 takes 10 % more. Where something else is written, the last pass would
read the array besides: 4x4 takes 15 % more.
"""


class _Piece(NamedTuple):
    """Blocks [b0, b1) of a scope of part `part`."""

    part: int
    b0: int
    b1: int


class LargeScopes:
    """Selection in scopes larger than a piece, by passes over all their blocks.

    A sample gives two keys that probably enclose the k-th. One pass counts the keys above them and
    collects those between, among which the k-th is then looked up. Where the sample misled, or too many
    lie between, the counts give a narrower bracket for another pass. Keys of 1-element blocks are read
    from the array in every pass, and norms of small ones formed; those of larger blocks are kept, and of what no
    kernel measures by itself, which is O(blocks).
    All counts are integers, and nothing depends on which thread took which piece.
    """

    def __init__(self, ranking: Ranking, *, apart: bool = False) -> None:
        """`apart`: what will be written is other memory than what is ranked."""
        self.ranking = ranking
        self.workers = workers_for(ranking.scopes * ranking.elements)
        self.lasting = [p for p in range(len(ranking.parts)) if not _is_read_again(ranking, p, apart=apart)]
        self.norm_keys = np.empty(ranking.scopes * ranking.blocks if self.lasting else 0, dtype=ranking.key)
        each = ranking.elements // (self.workers * PIECES_EACH)
        piece = min(max(STRIPS_ELEMENTS, each), PIECE_GROWTH * STRIPS_ELEMENTS)
        lengths = [max(1, piece // part.elements) for part in ranking.parts]
        self.pieces = [
            _Piece(p, b0, min(part.blocks, b0 + length))
            for p, (part, length) in enumerate(zip(ranking.parts, lengths, strict=True))
            for b0 in range(0, part.blocks, length)
        ]
        # Where the keys of a part are: kept in `norm_keys`, or in the array.
        self.places = [
            dense(self.norm_keys, columns.start) if p in self.lasting or source is None else source.where
            for p, (source, columns) in enumerate(zip(ranking.sources, ranking.columns, strict=True))
        ]
        room = min(ranking.blocks + 2 * LOOK_ELEMENTS, FOUND_BYTES // ranking.key.itemsize)
        self.found = [np.empty(room, dtype=ranking.key) for _ in range(self.workers)]
        # By part: blocks that are read at a time. Those of several elements are measured each time.
        self.strips = [
            STRIP_ELEMENTS if p in self.lasting or source is None else min(STRIP_ELEMENTS, source.strip)
            for p, source in enumerate(ranking.sources)
        ]
        again = [p for p, part in enumerate(ranking.parts) if p not in self.lasting and part.elements > 1]
        measured = max((self.strips[p] for p in again), default=0)
        # And that are looked at: more where no work array takes their keys.
        alone = [p in self.lasting or ranking.adjacent_form(p) is not None for p in range(len(ranking.parts))]
        self.looks = [LOOK_ELEMENTS if one else strip for one, strip in zip(alone, self.strips, strict=True)]
        self.works = [Scratch(STRIP_ELEMENTS, 0, ranking.key, measured).all for _ in range(self.workers)]
        # So many that the bracket, 2 * MARGIN standard deviations of a share, holds two thirds of what can be kept: of
        # all of it, every other one would hold more, and take another pass.
        sampled = round((1.5 * MARGIN * ranking.blocks / (room * self.workers)) ** 2)
        self.sampled = max(1, min(max(sampled, SAMPLE), MOST_SAMPLED, ranking.blocks // 512))
        # Keys of magnitudes are magnitudes: what looks at the elements of a single part looks at them as well.
        self.looks_alike = len(ranking.parts) == 1 and ranking.ord is not None and ranking.adjacent_form(0) is not None
        # Pieces are surveyed several at a time: to look at one whose keys are in cache takes as long as to call for it.
        several = max(1, len(self.pieces) // (self.workers * PIECES_EACH))
        counts = [-(-part.blocks // length) for part, length in zip(ranking.parts, lengths, strict=True)]
        self.bundles = [
            (start, min(stop, start + several))
            for first, stop in pairwise(accumulate(counts, initial=0))
            for start in range(first, stop, several)
        ]
        self.bounds = np.asarray([[piece.b0 for piece in self.pieces], [piece.b1 for piece in self.pieces]])
        # What was looked at last, and by piece: keys above it, inside, those inside that were stored, and its crowd.
        self.look = Look(0, 0, 0)
        self.counts = np.zeros((4, len(self.pieces)), dtype=np.int64)
        # By bundle: the work array where keys were stored, and from where on.
        self.stores = [(0, 0)] * len(self.bundles)
        self._keep_norms(piece)

    def each(self, pieces: int, use: Callable[[int, int], None], *, shielded: bool = False) -> None:
        """``use(slot, piece)`` for so many, on the pool."""
        threads.run(pieces, use, self.workers, shielded=shielded)

    def _looks_at(self, p: int, look: Look) -> tuple[int, int]:
        """How a kernel looks at the keys of part p, and the reader that this takes or 0."""
        if p in self.lasting:
            return strips.dense_surveyor(self.ranking.key, crowded=look.is_crowded), 0
        return surveyor_of(self.ranking, p, crowded=look.is_crowded)

    def first_of(self, p: int, scope: int) -> int:
        """The number of the first block of a scope, for the reader of part p."""
        return scope * (self.ranking.blocks if p in self.lasting else self.ranking.parts[p].blocks)

    def reader_of(self, p: int) -> int:
        """How a kernel reads the keys of part p, where `places` says they are."""
        source = self.ranking.sources[p]
        return strips.dense_reader(self.ranking.key) if p in self.lasting or source is None else source.read

    def _keep_norms(self, elements: int) -> None:
        """The keys of all blocks whose norms take more than a look, in pieces of so many elements."""
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

            piece = PIECE_ELEMENTS if ranking.sources[p] is None else elements
            workspace = workspace_of(part.elements, part.exact)
            ranges(part.total, part.elements, make_work, workspace=workspace, piece=piece)()

    def _sample(self, scope: int, low: int, high: int, share: float) -> Sample:
        """Some keys of a scope in [low, high], which are such a share of all."""
        look, end = Look(low, high, low), 0
        most = max(1, min(SAMPLE_RUN, self.sampled // SAMPLE_PLACES))
        walks = []
        for part in self.ranking.parts:
            places = max(1, int(self.sampled / share * part.blocks) // (self.ranking.blocks * most))
            step = max(1, part.blocks // places)
            walks.append((part.blocks, step, min(step, most)))
        # Of a part of the keys, twice as many as are expected: where they stand is random enough.
        seen = sum(-(-blocks // step) * run for blocks, step, run in walks)
        keys = np.empty((seen if share == 1 else min(seen, 2 * self.sampled)) + SLACK, dtype=self.ranking.key)
        for p, (blocks, step, run) in enumerate(walks):
            end = scope_passes.survey(
                *self._looks_at(p, look), self.places[p], self.first_of(p, scope), *_one_piece(blocks), step, run,
                *look.limits, keys, end, _counts_of_one(), self.works[0],
            )  # fmt: skip
        return Sample(keys[:end], most)

    def _survey(self, scope: int, look: Look) -> Survey:
        """Count the keys of every piece above, inside and beside a look, and collect those inside."""
        ends, self.look = [0] * self.workers, look
        looks = [self._looks_at(p, look) for p in range(len(self.ranking.parts))]

        def use(slot: int, i: int) -> None:
            p0, p1 = self.bundles[i]
            p, self.stores[i] = self.pieces[p0].part, (slot, ends[slot])
            ends[slot] = scope_passes.survey(
                *looks[p], self.places[p], self.first_of(p, scope), self.bounds, p0, p1, self.looks[p], self.looks[p],
                *look.limits, self.found[slot], ends[slot], self.counts, self.works[slot],
            )  # fmt: skip

        self.each(len(self.bundles), use)
        above, inside, _, equal = self.counts.sum(axis=1).tolist()
        return Survey(above, inside, equal, [keys[:end] for keys, end in zip(self.found, ends, strict=True)])

    def _survey_keys(
        self, look: Look, keys: np.ndarray, bounds: np.ndarray, pieces: tuple[int, int], counts: np.ndarray,
        found: np.ndarray, slot: int,
    ) -> int:  # fmt: skip
        """As `scope_passes.survey`, of some `pieces` of keys that were collected, between rows of `bounds`."""
        if self.looks_alike:
            address, _ = self._looks_at(0, look)
        else:
            address = strips.dense_surveyor(self.ranking.key, crowded=look.is_crowded)
        end: int = scope_passes.survey(
            address, 0, dense(keys), 0, bounds, *pieces, LOOK_ELEMENTS, LOOK_ELEMENTS, *look.limits, found,
            0, counts, self.works[slot],
        )  # fmt: skip
        return end

    def nth(self, scope: int, k: int) -> Nth:
        """The k-th largest key of a scope."""
        blocks, width = self.ranking.blocks, self.ranking.width
        return narrow(k, blocks, width, partial(self._sample, scope), partial(self._survey, scope), self._nth_of)

    def equal_by_piece(self, key: int) -> np.ndarray:
        """How many keys of each piece equal the k-th, after `nth`."""
        _above, inside, stored, crowd = self.counts
        if not self.look.low <= key <= self.look.high or not stored.any():
            return inside if key == self.look.low else crowd  # it was looked at alone, or as a crowd
        bounds, counts = np.zeros((2, len(self.pieces)), dtype=np.int64), np.zeros_like(self.counts)
        for (p0, p1), (_, start) in zip(self.bundles, self.stores, strict=True):
            bounds[1, p0:p1] = start + np.cumsum(stored[p0:p1])
            bounds[0, p0:p1] = bounds[1, p0:p1] - stored[p0:p1]

        def use(slot: int, i: int) -> None:
            keys = self.found[self.stores[i][0]]
            nowhere = np.empty(SLACK, dtype=keys.dtype)  # a look writes there, also if it stores nothing
            self._survey_keys(Look(key, key, key), keys, bounds, self.bundles[i], counts, nowhere, slot)

        self.each(len(self.bundles), use)
        _above, inside, _stored, _crowd = counts
        return inside

    def _nth_of(self, pieces: list[np.ndarray], k: int) -> Nth:
        """`nth` among some keys, by passes over them while they are many."""
        count = sum([keys.size for keys in pieces])
        if count <= FEW_KEYS:
            keys = partitioned(np.concatenate(pieces), [count - k])
            limit = keys[count - k]
            return Nth(int(limit), k - int(np.count_nonzero(keys > limit)), int(np.count_nonzero(keys == limit)))
        # There is room for a quarter of what was found. A look stores only where all that it looks at would fit.
        rooms = [min(keys.size, keys.size // 4 + LOOK_ELEMENTS) + SLACK for keys in pieces]
        narrower = [np.empty(room, dtype=self.ranking.key) for room in rooms]
        bounds = np.asarray([[0] * len(pieces), [keys.size for keys in pieces]])

        def survey(look: Look) -> Survey:
            ends, counts = [0] * len(pieces), np.zeros((4, len(pieces)), dtype=np.int64)

            def use(slot: int, i: int) -> None:
                ends[i] = self._survey_keys(look, pieces[i], bounds, (i, i + 1), counts, narrower[i], slot)

            self.each(len(pieces), use)
            above, inside, _, equal = counts.sum(axis=1).tolist()
            found = [keys[:end] for keys, end in zip(narrower, ends, strict=True)]
            return Survey(above, inside, equal, found if inside <= count // 4 else [])  # else too many to go on with

        return narrow(k, count, self.ranking.width, partial(sample_of, pieces, FEW_KEYS // 4), survey, self._nth_of)

    def limit_of(self, scope: int, k: int) -> Nth:
        """`nth`, for any k; 0 blocks are above the largest key, and all above key 0 or equal to it."""
        if 0 < k < self.ranking.blocks:
            return self.nth(scope, k)
        return Nth(0, self.ranking.blocks, self.ranking.blocks) if k > 0 else Nth((1 << self.ranking.width) - 1, 0, 0)


def _is_read_again(ranking: Ranking, p: int, *, apart: bool) -> bool:
    """Whether kernels read the keys of part p from its elements in every pass."""
    layout = ranking.parts[p].leaves[0].layout
    wide = layout is not None and layout.form.bits == 32
    most = MOST_READ_IN_PLACE if wide and not apart else MOST_READ_AGAIN
    return ranking.sources[p] is not None and ranking.parts[p].elements <= most


def _one_piece(blocks: int) -> tuple[np.ndarray, int, int]:
    """The bounds of a single piece, and that it is number 0."""
    return np.asarray([[0], [blocks]]), 0, 1


def _counts_of_one() -> np.ndarray:
    return np.zeros((4, 1), dtype=np.int64)
