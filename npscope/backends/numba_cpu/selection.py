"""The first-ranked blocks of every scope: strip by strip where a scope fits in cache, else by bracketing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from npscope.backends import threads
from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu import lines, strips
from npscope.backends.numba_cpu.codecs import Function
from npscope.backends.numba_cpu.norms import code_of, norms_of, put
from npscope.backends.numba_cpu.operands import (
    ACROSS,
    BLOCK_WORKSPACE,
    PIECE_ELEMENTS,
    SCOPE_BLOCKS,
    SCOPE_ELEMENTS,
    STRIPS_ELEMENTS,
    Competitors,
    Operand,
    competitors,
    piece_length,
    ranges,
    workers_for,
)
from npscope.backends.numba_cpu.search import group_of
from npscope.backends.numba_cpu.strips import STRIP_ELEMENTS, Scratch, Where
from npscope.backends.numba_cpu.writing import DropSink
from npscope.dtypes import kind_of
from npscope.tiling import Leaf, Parts

FOUND_BYTES = 6 << 20
"""Work array of a thread for the keys between two limits; 1 % of a scope lies there as a rule."""

ACROSS_ELEMENTS, ACROSS_KEYS = 1 << 14, 1 << 20
"""Elements of a strip of scopes that lie side by side, and most of them where a line of each takes more."""

SAMPLE_RUNS, SAMPLE_RUN = 1 << 13, 16
"""Places of a scope that are sampled, and keys read at each: as many as a cache line of float32 holds."""

SAMPLE_SHARES = 8
"""Pieces in which a part is sampled, whatever the number of threads."""

MARGIN = 6.0
"""Standard deviations between the wanted rank and the ends of a bracket: a miss costs another pass."""

MAX_GUESSES = 8
"""Brackets taken from samples before the range of keys is halved instead, which ends: a key has so many bits."""


@dataclass(frozen=True)
class Source:
    """How kernels read the keys of a part: `read`, its leading arguments, and the blocks of a strip."""

    read: Function
    where: Where
    strip: int


def source_of(
    part: Competitors,
    ord: float | None,
    width: int,
    exact_integers: bool,
    *,
    across: bool = False,
    planes: bool = False,
) -> Source | None:
    """How a kernel reads the keys of a part by itself; None where norms are computed pass by pass.

    `across`: whole scopes are read, which may lie side by side; their keys then come in `planes`.
    """
    leaf = part.leaves[0]
    if part.spans_leaves or leaf.codec is None:
        return None
    if ord is None or (part.elements == 1 and (exact_integers or not part.wide_integers)):
        keys = {32: leaf.codec.key32, 64: leaf.codec.key64}
        key = leaf.codec.signed_key if ord is None else keys.get(width) or leaf.codec.narrow_key
        if across and leaf.across is not None:
            return Source(strips.across_reader(key, planes), (leaf.buffer, leaf.origin, *leaf.across), ACROSS_ELEMENTS)
        return Source(strips.element_reader(key), leaf.where, STRIP_ELEMENTS)
    code = code_of(ord, part.elements)
    if leaf.layout is not None and lines.can_sum(leaf.layout, code):
        read = strips.norm_reader(leaf.layout, code, width == 64)
        return Source(read, leaf.where, lines.strip_blocks(leaf.layout))
    return None


class Ranking:
    """The blocks of all parts as ordered integers, and the choice of the first-ranked of every scope."""

    def __init__(self, parts: Parts, ord: float | None, *, values: bool = False) -> None:
        """`values`: the keys will be turned into numbers again, so they are not narrowed."""
        self.parts = competitors(parts)
        self.ord = ord
        self.exact_integers = all(part.wide_integers and part.elements == 1 for part in self.parts)
        if ord is None:
            codec_ = self.parts[0].leaves[0].codec
            width = 64 if codec_ is None else codec_.signed_width
        else:
            width = 8 * max(part.norm.itemsize for part in self.parts)
            first = self.parts[0]
            narrow = first.leaves[0].codec is not None and first.leaves[0].codec.narrow_key is not None
            if narrow and len(self.parts) == 1 and first.elements == 1 and not values:
                width = 8 * parts[0][0].array.dtype.itemsize
        self.width = width
        kind = parts[0][0].array.dtype
        self.signed = ord is None and not kind_of(kind).is_integer
        self.key = np.dtype(f"u{width // 8}")
        self.scopes = self.parts[0].cut.scopes
        self.blocks = sum(part.blocks for part in self.parts)
        self.elements = sum(part.blocks * part.elements for part in self.parts)
        # Where each part's blocks stand among the blocks of a scope.
        starts = itertools.accumulate((part.blocks for part in self.parts), initial=0)
        self.columns = [slice(a, b) for a, b in itertools.pairwise(starts)]
        few = all(leaf.few for part in self.parts for leaf in part.leaves)
        self.group = 0 if few else group_of(self.blocks)
        self.fits_a_piece = self.blocks <= SCOPE_BLOCKS and self.elements <= SCOPE_ELEMENTS
        across = self.fits_a_piece and len(self.parts) == 1
        self.sources = [source_of(part, ord, width, self.exact_integers, across=across) for part in self.parts]
        # Small scopes that lie side by side are best ranked as they lie, if what is written lies so too.
        self.planes_source = None
        if across and self.group and self.parts[0].leaves[0].across is not None:
            self.planes_source = source_of(self.parts[0], ord, width, self.exact_integers, across=True, planes=True)

    def scopes_of_a_strip(self, strip: int) -> int:
        """Whole scopes that make a strip of about `strip` blocks."""
        across = self.parts[0].leaves[0].across is not None
        return max(1, strip // self.blocks, min(ACROSS, ACROSS_KEYS // self.blocks) if across else 1)


class KeyWork:
    """Work arrays to compute the keys of up to `length` blocks of a part that no kernel reads by itself."""

    def __init__(self, ranking: Ranking, p: int, length: int) -> None:
        part, source = ranking.parts[p], ranking.sources[p]
        self.source = source
        self.norms = None if source is not None else norms_of(part, float(ranking.ord or 2))[0](length)
        if source is not None:
            self.strip = source.strip
            if ranking.fits_a_piece:  # whole scopes, which may lie side by side
                self.strip = ranking.scopes_of_a_strip(source.strip) * part.blocks
            self.kernel = strips.read_kernel(source.read)
            self.scratch = Scratch(self.strip, 0, ranking.key).all

    def fill(self, i0: int, i1: int, keys: np.ndarray) -> None:
        """The keys of blocks [i0, i1)."""
        if self.norms is not None:
            nk.keys_of_norms(self.norms.fill(i0, i1)[0], keys)
        elif self.source is not None:
            self.kernel(self.source.where, i0, i1, self.strip, keys, self.scratch)


class Sink(Protocol):
    """Where masks of the blocks of a part go; `write` and `where` let a kernel do it by itself."""

    write: Function | None
    where: Where
    operand: Operand | None
    """The array of elements that is zeroed, if that is what `write` does."""

    def put(self, i0: int, i1: int, mask: np.ndarray) -> None:
        """Take the mask of blocks [i0, i1)."""


_FLAT = np.asarray([[1], [0]], dtype=np.int64)


_LINE = np.asarray([[1 << 62], [1]], dtype=np.int64)


def _dense(array: np.ndarray, origin: int = 0) -> Where:
    """A flat array whose entry 0 is block `-origin`, as kernels take an operand."""
    return array, origin, _LINE, _FLAT


class TableSink(Sink):
    """A sink that keeps the masks, in the columns of a table."""

    def __init__(self, columns: np.ndarray) -> None:
        self.columns = columns
        contiguous = columns.flags.c_contiguous
        self.write = strips.store_mask if contiguous else None
        self.where = _dense(columns.reshape(-1) if contiguous else np.empty(0, dtype=np.bool_))
        self.operand: Operand | None = None

    def put(self, i0: int, i1: int, mask: np.ndarray) -> None:
        """Keep the mask of blocks [i0, i1)."""
        put(self.columns, i0, i1, mask)


class ScopeWork:
    """Work arrays of one thread for up to `length` whole scopes of parts side by side."""

    def __init__(self, ranking: Ranking, counts: Operand, length: int) -> None:
        self.ranking = ranking
        self.counts = counts.buffer, counts.origin, counts.grid
        self.works = [KeyWork(ranking, p, length * part.blocks) for p, part in enumerate(ranking.parts)]
        longest = max(part.blocks for part in ranking.parts) * length
        self.table = np.empty((length, ranking.blocks), dtype=ranking.key)
        self.keys = np.empty(longest, dtype=ranking.key)
        self.mask = np.empty((length, ranking.blocks), dtype=np.bool_)
        self.columns = np.empty(longest, dtype=np.bool_)
        self.rows = ranking.scopes_of_a_strip(STRIP_ELEMENTS)
        self.scratch = Scratch(self.rows * ranking.blocks, self.rows, ranking.key).all
        self.select = strips.scopes_kernel(strips.dense_reader(), strips.store_mask, ranking.group, ranking.width)

    def load(self, s0: int, s1: int) -> Where:
        """The keys of scopes [s0, s1), as a kernel reads them by scope number."""
        rows = s1 - s0
        for work, columns in zip(self.works, self.ranking.columns, strict=True):
            keys = self.keys[: rows * (columns.stop - columns.start)]
            width = columns.stop - columns.start
            work.fill(s0 * width, s1 * width, keys)
            self.table[:rows, columns] = keys.reshape(rows, width)
        return _dense(self.table.reshape(-1), -s0 * self.ranking.blocks)

    def decide(self, s0: int, s1: int, sinks: Sequence[Sink]) -> None:
        """Hand each sink the mask of its kept blocks of scopes [s0, s1)."""
        rows, n = s1 - s0, self.ranking.blocks
        target = _dense(self.mask.reshape(-1), -s0 * n)
        self.select(self.load(s0, s1), target, self.counts, s0, s1, n, self.rows, self.scratch)
        for sink, columns in zip(sinks, self.ranking.columns, strict=True):
            width = columns.stop - columns.start
            mask = self.columns[: rows * width]
            mask.reshape(rows, width)[:] = self.mask[:rows, columns]
            sink.put(s0 * width, s1 * width, mask)


def select_blocks(
    ranking: Ranking,
    keep: Leaf,
    sinks: Sequence[Sink],
    ready: Callable[[], None] = lambda: None,
    *,
    shielded: bool = False,
) -> None:
    """Hand each part's sink the mask of its blocks among the `keep` first-ranked of every scope, piece by piece.

    `ready` is called once, when everything is allocated and before the first mask; `shielded` says
    that a piece of this must not be interrupted.
    """
    if ranking.scopes * ranking.blocks == 0:
        return
    counts = Operand(keep)
    if not ranking.fits_a_piece:
        keeps = np.empty(ranking.scopes, dtype=np.int64)
        nk.gather(counts.buffer, counts.origin, counts.grid, 1, 0, ranking.scopes, keeps)
        cut = LargeScopes(ranking).cut_job(keeps.tolist(), sinks, shielded=shielded)
        ready()
        cut()
        return
    source, sink = ranking.sources[0], sinks[0]
    if len(sinks) == 1 and source is not None and sink.write is not None:
        job = _strips_job(ranking, counts, source, sink.write, sink)
    else:

        def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
            works = [ScopeWork(ranking, counts, length) for _ in range(slots)]
            return lambda slot, s0, s1: works[slot].decide(s0, s1, sinks)

        workspace = BLOCK_WORKSPACE * ranking.blocks
        job = ranges(ranking.scopes, ranking.elements, make_work, workspace=workspace, shielded=shielded)
    ready()
    job()


def cutter_of(ranking: Ranking, p: int, sink: Sink) -> Function | None:
    """How adjacent elements are zeroed by their own keys, where keys and sink belong to elements that lie alike."""
    read, written = ranking.parts[p].leaves[0].layout, None if sink.operand is None else sink.operand.layout
    if read is None or written is None or ranking.parts[p].elements > 1 or ranking.ord is None:
        return None
    same = read.form == written.form and ranking.width == read.form.bits
    return strips.cutter(read.form, read.codec) if same else None


def _strips_job(ranking: Ranking, counts: Operand, source: Source, write: Function, sink: Sink) -> Callable[[], None]:
    """The job in which one kernel reads, decides and writes."""
    cut = None if ranking.group else cutter_of(ranking, 0, sink)
    where, written = sink.where, sink.operand
    planes = False
    if written is not None and written.codec is not None and written.across is not None:
        planes = ranking.planes_source is not None
        source = ranking.planes_source or source
        write, where = strips.across_dropper(written.codec, planes), (written.buffer, written.origin, *written.across)
    kernel = strips.scopes_kernel(source.read, write, ranking.group, ranking.width, cut, planes=planes)
    rows = ranking.scopes_of_a_strip(source.strip)
    limits = counts.buffer, counts.origin, counts.grid

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [Scratch(rows * ranking.blocks, rows, ranking.key).all for _ in range(slots)]

        def work(slot: int, s0: int, s1: int) -> None:
            kernel(source.where, where, limits, s0, s1, ranking.blocks, rows, works[slot])

        return work

    return ranges(ranking.scopes, ranking.elements, make_work, workspace=0, piece=STRIPS_ELEMENTS)


def strips_of_thresholds(
    measured: Competitors, written: Competitors, thresholds: Leaf, ord: float
) -> Callable[[], None] | None:
    """The job in which one kernel measures, compares and writes; None where no kernel can."""
    source = source_of(measured, ord, 8 * measured.norm.itemsize, exact_integers=False)
    sink = DropSink(written)
    if source is None or sink.write is None:
        return None
    kernel = strips.threshold_kernel(source.read, sink.write, measured.norm.itemsize == 8)
    read = Operand(thresholds)
    limits, repeat = (read.buffer, read.origin, read.grid), measured.blocks if thresholds.cut.blocks == 1 else 1
    write, key = sink.where, np.dtype(f"u{measured.norm.itemsize}")

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [
            (np.empty(source.strip, dtype=thresholds.array.dtype), Scratch(source.strip, 0, key).all)
            for _ in range(slots)
        ]

        def work(slot: int, i0: int, i1: int) -> None:
            kernel(source.where, write, limits, repeat, i0, i1, source.strip, *works[slot])

        return work

    return ranges(measured.total, measured.elements, make_work, workspace=0, piece=STRIPS_ELEMENTS)


# --- large scopes --------------------------------------------------------------------------------


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
            strips.dense_reader() if p in self.lasting or source is None else source.read
            for p, source in enumerate(ranking.sources)
        ]
        self.wheres = [
            _dense(self.norm_keys, columns.start) if p in self.lasting or source is None else source.where
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
            kernel = strips.sample_kernel(self.reads[p])
            kernel(self.wheres[p], first, first + blocks, min(SAMPLE_RUN, blocks), seed, share, self.works[slot])

        self._each(len(self.samples), use)
        return np.sort(np.concatenate([share for _, _, share in self.samples]))

    def _survey(self, scope: int, low: int, high: int) -> None:
        """Count the keys of every piece above and inside [low, high], and collect the latter."""
        limits = np.uint64(low), np.uint64(high)
        ends = [0] * self.workers

        def use(slot: int, i: int) -> None:
            piece, start = self.pieces[i], ends[slot]
            first = self._first(piece.part, scope)
            kernel = strips.survey_kernel(self.reads[piece.part], self.ranking.width)
            self.above[i], self.inside[i], self.stored[i] = kernel(
                self.wheres[piece.part], first + piece.b0, first + piece.b1, *limits,
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
        cuts = [None if cut is None else strips.cutter_kernel(cut) for cut in cutters]
        kernels = [
            strips.cut_kernel(read, strips.store_mask if sink.write is None else sink.write)
            for read, sink in zip(self.reads, sinks, strict=True)
        ]
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
            cut = cuts[p]
            if cut is not None and (spare[scope, place] >= 0 or left == 0) and (left > 0 or limit < largest):
                # Equal keys stay or go together, so elements can be cut by a limit alone.
                cut(self.wheres[p], sink.where, first + start, first + stop, np.uint64(limit + (left == 0)))
                return
            for b0 in range(start, stop, steps[p]):
                b1 = min(stop, b0 + steps[p])
                target = _dense(masks[slot], -first - b0) if sink.write is None else sink.where
                left = kernels[p](
                    self.wheres[p], read_first + b0, target, first + b0, first + b1, STRIP_ELEMENTS,
                    limits[scope], left, self.works[slot],
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


# --- operations ----------------------------------------------------------------------------------


def mask(parts: Parts, keep: Leaf, ord: float | None) -> np.ndarray:
    """True for the `keep` first-ranked blocks of every scope: ``(S, n)`` bool."""
    ranking = Ranking(parts, ord)
    result = np.empty((ranking.scopes, ranking.blocks), dtype=np.bool_)
    select_blocks(ranking, keep, [TableSink(result[:, c]) for c in ranking.columns])
    return result


def kth(parts: Parts, k: Leaf, ord: float | None) -> np.ndarray:
    """The k-th largest rank value of every scope: ``(S,)``."""
    ranking = Ranking(parts, ord, values=True)
    found = np.empty(ranking.scopes, dtype=ranking.key)
    if ranking.scopes and ranking.fits_a_piece:
        _kth_job(ranking, Operand(k), found)()
    elif ranking.scopes:
        selection = LargeScopes(ranking)
        keeps = k.array.reshape(-1)
        for scope in range(ranking.scopes):
            found[scope] = selection.nth(scope, int(keeps[scope]))[0]
    return _values_of_keys(found, parts, ord, ranking.exact_integers)


def _kth_job(ranking: Ranking, counts: Operand, found: np.ndarray) -> Callable[[], None]:
    source, limits = ranking.sources[0], (counts.buffer, counts.origin, counts.grid)
    if len(ranking.parts) == 1 and source is not None:
        kernel, rows = strips.kth_kernel(source.read), ranking.scopes_of_a_strip(source.strip)

        def make_strips(slots: int, length: int) -> Callable[[int, int, int], None]:
            works = [Scratch(rows * ranking.blocks, rows, ranking.key).all for _ in range(slots)]

            def work(slot: int, s0: int, s1: int) -> None:
                kernel(source.where, limits, s0, s1, ranking.blocks, rows, ranking.signed, found, works[slot])

            return work

        return ranges(ranking.scopes, ranking.elements, make_strips, workspace=0, piece=STRIPS_ELEMENTS)

    dense = strips.kth_kernel(strips.dense_reader())

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [ScopeWork(ranking, counts, length) for _ in range(slots)]

        def work(slot: int, s0: int, s1: int) -> None:
            keys = works[slot].load(s0, s1)
            dense(keys, limits, s0, s1, ranking.blocks, works[slot].rows, ranking.signed, found, works[slot].scratch)

        return work

    return ranges(ranking.scopes, ranking.elements, make_work, workspace=BLOCK_WORKSPACE * ranking.blocks)


def _values_of_keys(keys: np.ndarray, parts: Parts, ord: float | None, exact_integers: bool) -> np.ndarray:
    """The numbers that keys stand for: norms, or signed values in the dtype of their array."""
    unsigned, floating = keys.dtype, np.dtype(f"f{keys.itemsize}")
    sign = unsigned.type(1 << (8 * keys.itemsize - 1))
    if ord is not None:
        if exact_integers:
            return keys.astype(np.float64)
        values = keys.view(floating).copy()
        values[keys == unsigned.type(-1 & ((1 << 8 * keys.itemsize) - 1))] = np.nan
        return values
    dtype = parts[0][0].array.dtype.newbyteorder("=")
    kind = kind_of(dtype)
    if kind.is_integer:
        return (keys ^ sign).view(np.int64).astype(dtype) if kind.family == "int" else keys.astype(dtype)
    values = np.where(keys >= sign, keys ^ sign, ~keys).view(floating)
    values[keys == ~unsigned.type(0)] = np.nan
    return values.astype(dtype)
