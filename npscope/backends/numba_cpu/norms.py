"""Norms of the blocks of a part, piece by piece, into work arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from npscope.backends import threads
from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu import lines
from npscope.backends.numba_cpu.exact import EXACT_WORDS
from npscope.backends.numba_cpu.loans import Loan
from npscope.backends.numba_cpu.operands import Competitors, Operand, Placement, kept_for_one, measure_of, place_of
from npscope.backends.numba_cpu.orders import table_cut
from npscope.backends.numba_cpu.pieces import (
    BLOCK_WORKSPACE,
    PIECE_ELEMENTS,
    STRIPS_ELEMENTS,
    is_one_piece,
    ranges,
    workers_for,
)
from npscope.tiling import Cut, Leaf, Part, Parts

UNSURE_BLOCKS = 1 << 12
"""Undecided norms that are summed exactly at a time: a third of a MiB of sums."""

_NONE: np.ndarray = np.empty(0)
"""In the place of norms where none are asked for."""

_CODES = {1.0: nk.ONE, 2.0: nk.TWO, math.inf: nk.INF}


def code_of(ord: float, elements: int) -> int:
    """How a norm is accumulated: that of one element is its magnitude, whatever the order."""
    return nk.INF if elements == 1 else _CODES.get(ord, nk.POWER)


def _measure_all(measure: int, strip: int, norm_bytes: int, leaf: Operand, total: int, norm: np.ndarray) -> None:
    """The norms of all blocks of a leaf, as `LineNorms` writes them: to make such takes a twentieth of a small call."""
    loan = Loan(lines.NormBuffers, lines.STRIP_BLOCKS, norm_bytes)
    lines.norms_of_blocks(measure, *leaf.raw, 0, total, strip, norm, _NONE, *loan.work.all)


class LineNorms:
    """The norms of up to `length` blocks of a part that one kernel measures line by line, at the address `measure`.

    In strips of so many blocks; `largest`: they are maxima.
    """

    __slots__ = ("buffers", "largest", "loan", "norm", "source", "strip", "wide")

    def __init__(
        self, measure: int, strip: int, largest: bool, norm: np.dtype, leaves: Sequence[Operand], length: int
    ) -> None:
        self.source, self.strip, self.largest = (measure, *leaves[0].raw), strip, largest
        self.loan = Loan(lines.NormBuffers, lines.STRIP_BLOCKS, norm.itemsize)
        self.buffers = self.loan.work.all
        self.norm = np.empty(length, dtype=norm) if length else _NONE
        self.wide = np.empty(length) if length else _NONE

    def fill(self, i0: int, i1: int) -> tuple[np.ndarray, np.ndarray]:
        """(norms, the same in float64) of blocks [i0, i1); views that the next call overwrites."""
        norm, wide = self.norm[: i1 - i0], self.wide[: i1 - i0]
        sums = _NONE if self.largest else wide
        lines.norms_of_blocks(*self.source, i0, i1, self.strip, norm, sums, *self.buffers)
        if self.largest:
            wide[:] = norm
        return norm, wide

    def fill_into(self, i0: int, i1: int, norm: np.ndarray) -> None:
        """The norms of blocks [i0, i1) into a dense array, which may be any."""
        lines.norms_of_blocks(*self.source, i0, i1, self.strip, norm, _NONE, *self.buffers)


class PassNorms:
    """As `LineNorms`, for any layout, dtype and order: by passes over elements that leave sums for all blocks."""

    def __init__(
        self, ord: float, code: int, norm: np.dtype, exact: bool, leaves: Sequence[Operand], length: int
    ) -> None:
        self.leaves, self.exact = leaves, exact
        self.p, self.code = ord, code
        self.precise = ord < 1 and norm.itemsize == 8
        self.chunk = nk.EXACT_CHUNK if exact else nk.WIDE_CHUNK
        self.hi, self.lo = np.empty(length), np.empty(length)
        self.norm = np.empty(length, dtype=norm)
        rescales = self.code == nk.TWO and not exact
        self.top = np.empty(length if self.code == nk.POWER or rescales else 0)
        self.again = np.empty(length if rescales else 0, dtype=norm)
        self.wide = np.empty(length if rescales else 0)
        self.unsure = np.empty(length if self.code in (nk.ONE, nk.TWO) else 0, dtype=np.int64)
        pieces = max(-(-leaf.size // PIECE_ELEMENTS) for leaf in leaves)
        self.parts = np.empty((pieces if pieces > 1 else 0, 2, length))
        self.sums = np.empty(min(length, UNSURE_BLOCKS) * EXACT_WORDS if exact else 0, dtype=np.int64)

    def fill(self, i0: int, i1: int) -> tuple[np.ndarray, np.ndarray]:
        """(norms, the same in float64) of blocks [i0, i1); views that the next call overwrites."""
        count = i1 - i0
        hi, lo, norm = self.hi[:count], self.lo[:count], self.norm[:count]
        if self.code == nk.POWER:
            self._scaled(i0, i1, hi, lo, self.top[:count], norm)
            return norm, hi
        self._sums(self.code, i0, i1, hi, lo)
        if self.code == nk.INF:
            nk.finish_largest(hi, norm)
        elif self.exact:
            unsure = nk.finish_exact(hi, lo, self.code == nk.TWO, norm, self.unsure)
            for start in range(0, unsure, UNSURE_BLOCKS):
                self._decide(i0, self.unsure[start : min(unsure, start + UNSURE_BLOCKS)], norm)
        else:
            risky = nk.finish_wide(hi, lo, self.code == nk.TWO, norm, self.unsure)
            if risky:
                again, top, wide = self.again[:count], self.top[:count], self.wide[:count]
                self._scaled(i0, i1, wide, lo, top, again)
                nk.take(self.unsure, risky, again, wide, norm, hi)
        return norm, hi

    def fill_into(self, i0: int, i1: int, norm: np.ndarray) -> None:
        """The norms of blocks [i0, i1) into a dense array."""
        norm[:] = self.fill(i0, i1)[0]

    def _sums(self, code: int, i0: int, i1: int, hi: np.ndarray, lo: np.ndarray) -> None:
        hi[:], lo[:] = 0.0, 0.0
        for leaf in self.leaves:
            add = nk.kernels(leaf.codec).accumulate
            self._add(add, leaf, i0, i1, (code, self.chunk), hi, lo, largest=code == nk.INF)

    def _scaled(self, i0: int, i1: int, hi: np.ndarray, lo: np.ndarray, top: np.ndarray, norm: np.ndarray) -> None:
        """Norms by sums of powers of |x| / max |x|, which neither over- nor underflow."""
        self._sums(nk.INF, i0, i1, top, lo)
        hi[:], lo[:] = 0.0, 0.0
        for leaf in self.leaves:
            add = nk.kernels(leaf.codec).accumulate_scaled
            self._add(add, leaf, i0, i1, (top, self.p, self.precise), hi, lo, largest=False)
        nk.finish_scaled(hi, lo, top, self.p, norm)

    def _add(
        self, add: Callable[..., None], leaf: Operand, i0: int, i1: int, how: tuple[Any, ...], hi: np.ndarray,
        lo: np.ndarray, *, largest: bool,
    ) -> None:  # fmt: skip
        """Add the elements of blocks [i0, i1) to their sums; of blocks larger than a piece, piece by piece on the pool.

        Pieces end at the same elements, and are joined in order, whatever the number of threads.
        """
        pieces = -(-leaf.size // PIECE_ELEMENTS)
        if pieces <= 1:
            add(*leaf.where, i0, i1, 0, leaf.size, *how, hi, lo)
            return
        sums = self.parts[:pieces, :, : i1 - i0]
        sums[:] = 0.0

        def use(slot: int, piece: int) -> None:
            e0 = piece * PIECE_ELEMENTS
            add(*leaf.where, i0, i1, e0, min(leaf.size, e0 + PIECE_ELEMENTS), *how, *sums[piece])

        threads.run(pieces, use, workers_for(leaf.size * (i1 - i0)))
        for more in sums:
            nk.join(*more, largest, hi, lo)

    def _decide(self, i0: int, chosen: np.ndarray, norm: np.ndarray) -> None:
        """The norms of the `chosen` blocks, rounded by their exact sums."""
        self.sums[: chosen.size * EXACT_WORDS] = 0
        square = self.code == nk.TWO
        for leaf in self.leaves:
            nk.kernels(leaf.codec).accumulate_exactly(
                *leaf.where, i0, chosen, chosen.size, leaf.size, square, self.sums
            )
        nk.finish_unsure(self.sums, chosen, chosen.size, square, norm)


def workspace_of(elements: int, exact: bool) -> int:
    """Bytes of work arrays for the norm of a block of so many elements, and what a caller adds to decide on it."""
    return BLOCK_WORKSPACE if elements == 1 or exact else 2 * BLOCK_WORKSPACE


class Measuring(NamedTuple):
    """How blocks of a part are measured, whatever its memory."""

    make: Callable[[Sequence[Operand], int], LineNorms | PassNorms]
    """What measures up to so many blocks of these leaves at a time."""
    workspace: int
    """Bytes of work arrays that a block takes then."""
    piece: int
    """Elements of a piece that suit it."""
    at_once: Callable[[Operand, int, np.ndarray], None] | None
    """What writes the norms of all so many blocks of a leaf; None if that, or `fill_into`, needs arrays of its own."""


@kept_for_one
def measuring_of(places: tuple[Placement, ...], ord: float) -> Measuring:
    """How blocks are measured whose leaves are placed so."""
    elements, (norm, exact, _) = sum(place.cut.elements for place in places), measure_of(places)
    code, layout, workspace = code_of(ord, elements), places[0].layout, workspace_of(elements, exact)
    if len(places) > 1 or layout is None or not lines.can_sum(layout, code, wide=True):
        return Measuring(partial(PassNorms, ord, code, norm, exact), workspace, PIECE_ELEMENTS, None)
    measure, strip = lines.measurer_address(layout, code, places[0].unit, norm), lines.strip_blocks(layout)
    make = partial(LineNorms, measure, strip, code == nk.INF, norm)
    return Measuring(make, workspace, STRIPS_ELEMENTS, partial(_measure_all, measure, strip, norm.itemsize))


def norm_ranges(
    part: Competitors,
    ord: float,
    make_use: Callable[[int, int], Callable[[int, int, int, np.ndarray, np.ndarray], None]],
    *,
    shielded: bool = False,
) -> Callable[[], None]:
    """A job that hands ``use(slot, i0, i1, norm, wide)`` the norms of all blocks of a part, piece by piece."""
    measuring = measuring_of(part.places, ord)

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [measuring.make(part.leaves, length) for _ in range(slots)]
        use = make_use(slots, length)
        return lambda slot, i0, i1: use(slot, i0, i1, *works[slot].fill(i0, i1))

    return ranges(part.total, part.elements, make_work, workspace=measuring.workspace, shielded=shielded)


class _Walk(NamedTuple):
    """How the blocks of a part are walked when their norms are written into a table, whatever its memory."""

    places: tuple[Placement, ...]
    """Its leaves, as they are read."""
    measuring: Measuring
    scopes: int
    blocks: int
    elements: int
    """Scopes, blocks of each, and elements of these."""
    norm: np.dtype
    table: Cut
    """Where the norms belong."""
    in_order: bool
    """Whether that is one after another."""


@kept_for_one
def _walk(places: tuple[Placement, ...], ord: float | None) -> _Walk:
    """How blocks are walked whose leaves are placed so: those of a single array in the order of memory.

    To find out takes longer than a small call.
    """
    cut, over, p = places[0].cut, table_cut(places[0].cut), float(ord or 2)
    loops, entries = (*cut.scope, *cut.block), (*over.scope, *over.block)
    order, blocks, elements = list(range(len(loops))), cut.blocks, sum(place.cut.elements for place in places)
    if len(places) == 1:
        strides = places[0].strides
        order.sort(key=lambda i: -abs(loops[i].step * strides[loops[i].axis]))
        if order != sorted(order):
            places = (places[0].with_cut(Cut.of([loops[i] for i in order], (), cut.element)),)
    if p == 2 or elements == 1:  # as everywhere, by `in_reals`: a number has one norm
        places, p = tuple([place.in_reals() or place for place in places]), 2.0
    table = Cut.of([entries[i] for i in order], (), ())
    measuring = measuring_of(places, p)
    return _Walk(places, measuring, cut.scopes, blocks, elements, measure_of(places)[0], table, order == sorted(order))


def _walk_of(part: Part, ord: float | None) -> _Walk:
    """How the blocks of a part are walked."""
    return _walk((place_of(part[0]),) if len(part) == 1 else tuple(map(place_of, part)), ord)


def norms(parts: Parts, ord: float | None, out: np.ndarray | None = None) -> np.ndarray:
    """Norm of every block: ``(S, n)`` in the norm's dtype, in `out` if given."""
    if len(parts) == 1:  # what is needed for more parts takes a tenth of the time of a small call
        walk = _walk_of(parts[0], ord)
        result = np.empty((walk.scopes, walk.blocks), walk.norm) if out is None else out
        norms_into(parts[0], walk, result)
        return result
    walks = [_walk_of(part, ord) for part in parts]
    blocks = [walk.blocks for walk in walks]
    result = np.empty((walks[0].scopes, sum(blocks)), max([walk.norm for walk in walks])) if out is None else out
    for part, walk, place in zip(parts, walks, columns_of(result, blocks), strict=True):
        norms_into(part, walk, place)
    return result


def columns_of(table: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """So many columns of a table for each part."""
    return [table[:, end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]


def norms_into(part: Part, walk: _Walk, columns: np.ndarray) -> None:
    """The norms of a part into its columns of a table."""
    total = walk.scopes * walk.blocks
    # Parts may have norms of another precision than the table.
    in_order = walk.in_order and columns.flags.c_contiguous and columns.dtype == walk.norm
    make, workspace, piece, at_once = walk.measuring
    if at_once is not None and in_order and is_one_piece(total, walk.elements, piece):
        at_once(Operand(part[0].array, walk.places[0]), total, columns.reshape(-1))
        return
    leaves = [Operand(leaf.array, place) for leaf, place in zip(part, walk.places, strict=True)]

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [make(leaves, 0 if in_order and at_once else length) for _ in range(slots)]
        if in_order:
            dense = columns.reshape(-1)
            return lambda slot, i0, i1: works[slot].fill_into(i0, i1, dense[i0:i1])
        table = Operand.of(Leaf(columns, walk.table))

        def work(slot: int, i0: int, i1: int) -> None:
            norm = works[slot].norm[: i1 - i0]
            works[slot].fill_into(i0, i1, norm)
            nk.scatter(norm, i0, i1, table.buffer, table.origin, table.grid)

        return work

    ranges(total, walk.elements, make_work, workspace=workspace, piece=piece)()


def put(columns: np.ndarray, i0: int, i1: int, values: np.ndarray) -> None:
    """`values` into entries [i0, i1), counted row by row, of a table whose rows may lie apart."""
    if columns.flags.c_contiguous:
        columns.reshape(-1)[i0:i1] = values
        return
    n = columns.shape[1]
    i = i0
    while i < i1:
        row, column = divmod(i, n)
        count = min(i1 - i, n - column)
        if column == 0 and i1 - i >= n:
            rows = (i1 - i) // n
            columns[row : row + rows] = values[i - i0 : i - i0 + rows * n].reshape(rows, n)
            i += rows * n
        else:
            columns[row, column : column + count] = values[i - i0 : i - i0 + count]
            i += count
