"""The first-ranked blocks of every scope: strip by strip where a scope fits in cache, else by bracketing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu import scope_strips, strips
from npscope.backends.numba_cpu.large_cuts import cut_job
from npscope.backends.numba_cpu.large_scopes import LargeScopes
from npscope.backends.numba_cpu.loans import Loan
from npscope.backends.numba_cpu.operands import Competitors, Operand
from npscope.backends.numba_cpu.orders import Positions, blocks_in_memory_order, scopes_in_memory_order
from npscope.backends.numba_cpu.pieces import STRIPS_ELEMENTS, ranges
from npscope.backends.numba_cpu.ranking import (
    KeyWork,
    Planes,
    Ranking,
    Source,
    columns_cutter_of,
    cutter_of,
    dense,
    plane_selector_of,
    ranked_in_reals,
    search_of,
    selector_of,
    source_of,
    whole_lanes,
)
from npscope.backends.numba_cpu.search import IN_LANES
from npscope.backends.numba_cpu.strips import STRIP_ELEMENTS, Scratch, Where
from npscope.backends.numba_cpu.vector_search import SLACK
from npscope.backends.numba_cpu.writing import Written, writer_of
from npscope.dtypes import kind_of
from npscope.tiling import Leaf, Parts


def _scratch(
    ranking: Ranking, rows: int, counts: nk.Numbers, *, measured: int = 0, one_by_one: bool = False
) -> Loan[Scratch]:
    """Work arrays of one thread for strips of so many scopes, of which `counts` says how many blocks are kept.

    For the keys and masks of all of them, unless they are searched `one_by_one`: then of one. `measured` as for
    `Scratch`.
    """
    blocks = ranking.blocks if one_by_one else ranking.blocks * rows
    scratch = Loan(Scratch, blocks, rows, ranking.key, measured)
    nk.fill_in(scratch.work.keep, counts)
    return scratch


def _measured(ranking: Ranking, rows: int) -> int:
    """Blocks of strips of so many scopes of the only part that are measured at a time."""
    return 0 if ranking.parts[0].elements == 1 else rows * ranking.blocks


class _Columns:
    """The keys of strips of so many scopes, side by side, of n elements: work arrays of one thread.

    Keys that are a power of two apart would share a few lines of a cache: tiles took three times as long to turn. Apart
    by some lines and a part of one they take a third less than by whole lines.
    """

    def __init__(self, rows: int, n: int, key: np.dtype) -> None:
        self.pitch = -(-n // 64) * 64 + 24
        self.keys = np.empty(rows * self.pitch + SLACK, dtype=key)
        self.nbytes = self.keys.nbytes


class ScopeWork:
    """Work arrays of one thread for up to `length` whole scopes of parts side by side."""

    def __init__(self, ranking: Ranking, counts: Operand, length: int) -> None:
        self.ranking = ranking
        self.counts = nk.numbers_over(counts, 1, np.dtype(np.int64))
        self.works = [KeyWork(ranking, p, length * part.blocks) for p, part in enumerate(ranking.parts)]
        longest = max(part.blocks for part in ranking.parts) * length
        self.table = np.empty((length, ranking.blocks), dtype=ranking.key)
        self.keys = np.empty(longest, dtype=ranking.key)
        self.mask = np.empty((length, ranking.blocks), dtype=np.bool_)
        self.columns = np.empty(longest, dtype=np.bool_)
        self.rows = whole_lanes(max(1, STRIP_ELEMENTS // ranking.blocks))
        self.scratch = _scratch(ranking, self.rows, self.counts)
        self.steps = (
            strips.dense_reader(ranking.key),
            selector_of(ranking),
            strips.marker(),
        )

    def load(self, s0: int, s1: int) -> Where:
        """The keys of scopes [s0, s1), as a kernel reads them by scope number."""
        rows = s1 - s0
        for work, columns in zip(self.works, self.ranking.columns, strict=True):
            keys = self.keys[: rows * (columns.stop - columns.start)]
            width = columns.stop - columns.start
            work.fill(s0 * width, s1 * width, keys)
            self.table[:rows, columns] = keys.reshape(rows, width)
        return dense(self.table.reshape(-1), -s0 * self.ranking.blocks)

    def decide(self, s0: int, s1: int, targets: Sequence[Written]) -> None:
        """Write to the target of each part which of its blocks of scopes [s0, s1) are kept."""
        rows, n = s1 - s0, self.ranking.blocks
        decided = dense(self.mask.reshape(-1), -s0 * n)
        keys, scratch = self.load(s0, s1), self.scratch.work.all
        scope_strips.keep_in_scopes(*self.steps, keys, decided, self.counts, s0, s1, n, self.rows, scratch)
        for target, columns in zip(targets, self.ranking.columns, strict=True):
            width = columns.stop - columns.start
            mask = self.columns[: rows * width]
            mask.reshape(rows, width)[:] = self.mask[:rows, columns]
            target.put(s0 * width, s1 * width, mask)


def select_blocks(
    ranking: Ranking,
    keep: Leaf,
    targets: Sequence[Written],
    ready: Callable[[], None] = lambda: None,
    *,
    shielded: bool = False,
    positions: Sequence[Positions] | None = None,
) -> bool:
    """Write to the target of each part which blocks are among the `keep` first-ranked of their scope, piece by piece.

    `ready` is called once, when everything is allocated and before the first write; `shielded` says
    that a piece of this must not be interrupted. Blocks of large scopes may be numbered in another order than that of
    their `positions`: nothing is done then, and False returned, if too many are equal to the last that is kept.
    """
    if ranking.scopes * ranking.blocks == 0:
        return True
    counts = Operand.of(keep)
    written = targets[0].only if len(targets) == 1 else None
    one_by_one = positions is None and written is not None and ranking.is_searched_one_by_one
    if not ranking.fits_a_piece and not one_by_one:
        apart = not all(map(_is_ranked_itself, targets, ranking.parts))
        large = LargeScopes(ranking, apart=apart)
        cut = cut_job(large, _numbers_of(counts), targets, shielded=shielded, positions=positions)
        if cut is None:
            return False
        ready()
        cut()
        return True
    job = None if written is None else _direct_job(ranking, counts, written)
    if job is None:

        def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
            works = [ScopeWork(ranking, counts, length) for _ in range(slots)]
            return lambda slot, s0, s1: works[slot].decide(s0, s1, targets)

        job = ranges(ranking.scopes, ranking.elements, make_work, workspace=ranking.workspace, shielded=shielded)
    ready()
    job()
    return True


def _is_ranked_itself(target: Written, part: Competitors) -> bool:
    """Whether what is written is what is ranked, or may be."""
    return np.may_share_memory(target.leaves[0].array, part.leaves[0].array)


def _numbers_of(counts: Operand) -> list[int]:
    """The numbers over scopes, in the order of these."""
    if counts.place.is_one_number:
        return [int(counts.buffer[counts.origin])] * counts.cut.scopes
    places = np.asarray([counts.origin])
    for size, step in counts.grid.T:
        places = np.add.outer(places, step * np.arange(size)).reshape(-1)
    numbers: list[int] = counts.buffer[places].tolist()
    return numbers


def _direct_job(ranking: Ranking, counts: Operand, written: Operand) -> Callable[[], None] | None:
    """The job in which one kernel reads one part, decides and writes; None if there is no such kernel."""
    source, planes = ranking.sources[0], ranking.planes[0]
    if planes is not None:
        return _planes_job(ranking, counts, planes, written)
    if source is None:
        return None
    cut = None if source.turner is None else columns_cutter_of(ranking, source.turner, written)
    if source.turner is not None and cut is not None:
        return _columns_job(ranking, counts, source, source.turner.make(), written, cut)
    return _strips_job(ranking, counts, source, written)


def _by_strips(ranking: Ranking, make_kernel: Callable[[], Callable[[int, int], None]]) -> Callable[[], None]:
    """The job of a kernel that works off ranges of scopes, made for each thread."""

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        kernels = [make_kernel() for _ in range(slots)]
        return lambda slot, s0, s1: kernels[slot](s0, s1)

    return ranges(ranking.scopes, ranking.elements, make_work, workspace=0, piece=STRIPS_ELEMENTS)


def _strips_job(ranking: Ranking, counts: Operand, source: Source, written: Operand) -> Callable[[], None]:
    """The job in which one kernel reads, decides and writes."""
    cut = None if ranking.group else cutter_of(ranking, 0, written)
    kernel: Any
    steps: tuple[int, ...]
    if cut is not None:
        kernel, steps, where = scope_strips.cut_in_scopes, (*search_of(ranking), source.read, cut), written.raw
    else:
        select = selector_of(ranking)
        across = written.place.across
        kernel, steps = scope_strips.keep_in_scopes, (source.read, select, writer_of(written, across=across))
        where = written.raw_across if across else written.raw
    rows, limits = ranking.scopes_of_a_strip(source.strip), nk.numbers_over(counts, 1, np.dtype(np.int64))
    measured = _measured(ranking, rows)

    def make_kernel() -> Callable[[int, int], None]:
        loan = _scratch(ranking, rows, limits, measured=measured, one_by_one=cut is not None)

        def run(s0: int, s1: int) -> None:
            work = loan.work
            ends = [] if cut is None else [work.ends]
            kernel(*steps, source.where, where, limits, s0, s1, ranking.blocks, rows, *ends, work.all)

        return run

    return _by_strips(ranking, make_kernel)


class _Turned:
    """Work arrays of one thread for keys in rows, and for the masks of a plane."""

    def __init__(self, rows: int, n: int, within: int, key: np.dtype) -> None:
        self.keys, self.plane = np.empty(rows * n + SLACK, dtype=key), np.empty(rows * within + SLACK, dtype=np.bool_)
        self.nbytes = self.keys.nbytes + self.plane.nbytes


def _planes_job(ranking: Ranking, counts: Operand, planes: Planes, written: Operand) -> Callable[[], None]:
    """The job in which one kernel reads scopes that lie side by side block by block, and writes them so if they do."""
    rows, limits = ranking.rows_of_planes(0, planes), nk.numbers_over(counts, 1, np.dtype(np.int64))
    (source, order, within), place = planes, written.place
    in_planes = (place.side_by_side or place.in_tiles) and place.inner == ranking.parts[0].leaves[0].place.inner
    target = Operand(written.array, place.block_by_block) if in_planes else written
    as_they_lie = ranking.group != 0 and in_planes and within == 1
    measured = 0 if ranking.parts[0].elements == 1 else rows * within
    select = plane_selector_of(ranking) if as_they_lie else selector_of(ranking)
    steps = source.read, select, writer_of(target)

    def make_kernel() -> Callable[[int, int], None]:
        loan = _scratch(ranking, rows, limits, measured=measured)
        turned = Loan(_Turned, 0 if as_they_lie else rows, ranking.blocks, within, ranking.key)

        def run(s0: int, s1: int) -> None:
            scope_strips.keep_in_planes(
                *steps, source.where, target.raw, in_planes, as_they_lie, limits, s0, s1, order, within,
                ranking.scopes, rows, turned.work.keys, turned.work.plane, loan.work.all,
            )  # fmt: skip

        return run

    return _by_strips(ranking, make_kernel)


def _columns_job(
    ranking: Ranking, counts: Operand, source: Source, turn: int, written: Operand, cut: int
) -> Callable[[], None]:
    """The job in which one kernel cuts elements of scopes that lie side by side."""
    rows, limits = ranking.scopes_of_a_strip(source.strip), nk.numbers_over(counts, 1, np.dtype(np.int64))
    steps = (
        (scope_strips.limiter_address(ranking.key, ranking.signed), 0, 0, 0) if ranking.group == IN_LANES
        else (0, *search_of(ranking), strips.dense_reader(ranking.key))
    )  # fmt: skip
    target = written.raw_across
    line = ranking.parts[0].leaves[0].line

    def make_kernel() -> Callable[[int, int], None]:
        loan = _scratch(ranking, rows, limits, one_by_one=True)
        columns = Loan(_Columns, rows, ranking.blocks, ranking.key)
        keys = dense(columns.work.keys)

        def run(s0: int, s1: int) -> None:
            scope_strips.cut_in_columns(
                turn, source.where, *line, *steps, columns.work.keys, keys, columns.work.pitch, cut, target, limits, s0,
                s1, ranking.blocks, rows, loan.work.ends, loan.work.all,
            )  # fmt: skip

        return run

    return _by_strips(ranking, make_kernel)


def strips_of_thresholds(
    measured: Competitors, written: Competitors, thresholds: Leaf, ord: float
) -> Callable[[], None] | None:
    """The job in which one kernel measures, compares and writes; None where no kernel can."""
    source = source_of(measured, ord, 8 * measured.norm.itemsize, exact_integers=False)
    if source is None or written.spans_leaves:
        return None
    numbers = Operand.of(thresholds)
    limits = nk.numbers_over(numbers, measured.blocks if thresholds.cut.blocks == 1 else 1, thresholds.array.dtype)
    target = written.leaves[0]
    read, write, key = source.read, writer_of(target), np.dtype(f"u{measured.norm.itemsize}")

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [
            (
                nk.room_for(limits, source.strip + SLACK, thresholds.array.dtype),
                Scratch(source.strip, 0, key, source.strip).all,
            )
            for _ in range(slots)
        ]

        def work(slot: int, i0: int, i1: int) -> None:
            strips.keep_not_below(read, write, source.where, target.raw, limits, i0, i1, source.strip, *works[slot])

        return work

    return ranges(measured.total, measured.elements, make_work, workspace=0, piece=STRIPS_ELEMENTS)


# --- operations ----------------------------------------------------------------------------------


def kth(parts: Parts, k: Leaf, ord: float | None) -> np.ndarray:
    """The k-th largest rank value of every scope: ``(S,)``."""
    parts, k, as_before = scopes_in_memory_order(parts, k)
    ranking = Ranking(*ranked_in_reals(parts, ord), values=True)
    by_pieces = ranking.fits_a_piece or ranking.is_searched_one_by_one
    if not by_pieces:
        parts = tuple(tuple(map(blocks_in_memory_order(part[0], scopes=False), part)) for part in parts)
        ranking = Ranking(*ranked_in_reals(parts, ord), values=True)
    found = np.empty(ranking.scopes, dtype=ranking.key)
    if ranking.scopes and by_pieces:
        _kth_job(ranking, Operand.of(k), found)()
    elif ranking.scopes:
        selection = LargeScopes(ranking)
        for scope, nth in enumerate(_numbers_of(Operand.of(k))):
            found[scope] = selection.nth(scope, nth).key
    return _values_of_keys(as_before(found), parts, ord, ranking.parts[0].norm if ranking.exact_integers else None)


def _kth_job(ranking: Ranking, counts: Operand, found: np.ndarray) -> Callable[[], None]:
    """The job that finds the k-th largest key of every scope."""
    source = ranking.sources[0] if ranking.reads_by_itself else None
    limits = nk.numbers_over(counts, 1, np.dtype(np.int64))
    if source is not None and ranking.group != IN_LANES:
        if source.turner is not None:
            return _kth_in_columns_job(ranking, source, source.turner.make(), limits, found)
        if ranking.parts[0].leaves[0].place.across:  # a line of each would be read for every scope by itself
            source = None
    find = _kth_finder(ranking, limits, found, source)
    if source is None:

        def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
            works = [ScopeWork(ranking, counts, length) for _ in range(slots)]
            read = strips.dense_reader(ranking.key)

            def work(slot: int, s0: int, s1: int) -> None:
                own = works[slot]
                find(read, own.load(s0, s1), s0, s1, own.rows, own.scratch.work)

            return work

        return ranges(ranking.scopes, ranking.elements, make_work, workspace=ranking.workspace)

    rows, read, where = ranking.scopes_of_a_strip(source.strip), source.read, source.where

    def make_kernel() -> Callable[[int, int], None]:
        one_by_one = ranking.group != IN_LANES
        loan = _scratch(ranking, rows, limits, measured=_measured(ranking, rows), one_by_one=one_by_one)
        return lambda s0, s1: find(read, where, s0, s1, rows, loan.work)

    return _by_strips(ranking, make_kernel)


def _kth_finder(
    ranking: Ranking, limits: nk.Numbers, found: np.ndarray, source: Source | None
) -> Callable[[int, Where, int, int, int, Scratch], None]:
    """``find(read, where, s0, s1, rows, scratch)``: the k-th largest keys of scopes [s0, s1), in strips of `rows`."""
    n = ranking.blocks
    if ranking.group == IN_LANES:
        lanes = scope_strips.finder_address(ranking.key, ranking.signed)

        def find_in_lanes(read: int, where: Where, s0: int, s1: int, rows: int, scratch: Scratch) -> None:
            scope_strips.kth_in_lanes(read, lanes, where, limits, s0, s1, n, rows, found, scratch.all)

        return find_in_lanes
    seek = search_of(ranking, kept=source is None)

    def find(read: int, where: Where, s0: int, s1: int, rows: int, scratch: Scratch) -> None:
        scope_strips.kth_of_scopes(
            0, where, 0, 1, *seek, read, found, where, n, limits, s0, s1, n, rows, found, scratch.ends, scratch.all
        )

    return find


def _kth_in_columns_job(
    ranking: Ranking, source: Source, turn: int, limits: nk.Numbers, found: np.ndarray
) -> Callable[[], None]:
    """`_kth_job` of elements of scopes that lie side by side, and are turned when they are read."""
    seek = search_of(ranking)
    rows = ranking.scopes_of_a_strip(source.strip)
    line, read = ranking.parts[0].leaves[0].line, strips.dense_reader(ranking.key)

    def make_kernel() -> Callable[[int, int], None]:
        loan = _scratch(ranking, rows, limits, one_by_one=True)
        columns = Loan(_Columns, rows, ranking.blocks, ranking.key)

        def run(s0: int, s1: int) -> None:
            keys, pitch = columns.work.keys, columns.work.pitch
            scope_strips.kth_of_scopes(
                turn, source.where, *line, *seek, read, keys, dense(keys), pitch, limits, s0, s1, ranking.blocks, rows,
                found, loan.work.ends, loan.work.all,
            )  # fmt: skip

        return run

    return _by_strips(ranking, make_kernel)


def _values_of_keys(keys: np.ndarray, parts: Parts, ord: float | None, integers: np.dtype | None) -> np.ndarray:
    """The numbers that keys stand for: norms, or signed values in the dtype of their array.

    Where keys are magnitudes of `integers`, this is the dtype of their norms.
    """
    unsigned = keys.dtype
    sign = unsigned.type(1 << (8 * keys.itemsize - 1))
    if ord is not None:
        if integers is not None:
            return keys.astype(integers)
        values = keys.view(f"f{keys.itemsize}").copy()
        values[keys == unsigned.type(-1 & ((1 << 8 * keys.itemsize) - 1))] = np.nan
        return values
    dtype = parts[0][0].array.dtype.newbyteorder("=")
    kind = kind_of(dtype)
    if kind.is_integer:
        return (keys ^ sign if kind.family == "int" else keys).view(dtype)
    values = np.where(keys >= sign, keys ^ sign, ~keys).view(dtype)
    values[keys == ~unsigned.type(0)] = np.nan
    return values
