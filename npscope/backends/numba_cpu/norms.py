"""Norms of the blocks of a part, piece by piece, into work arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu import lines
from npscope.backends.numba_cpu.arithmetic import LIMBS
from npscope.backends.numba_cpu.lanes import INF, ONE, TWO
from npscope.backends.numba_cpu.operands import BLOCK_WORKSPACE, PIECE_ELEMENTS, Competitors, competitors, ranges
from npscope.tiling import Parts

UNSURE_ROWS = 2048
"""Undecided norms that are summed exactly at a time."""

_CODES = {1.0: ONE, 2.0: TWO, math.inf: INF}


class NormWork:
    """Work arrays for the norms of up to `length` blocks of a part, and the passes that fill them."""

    def __init__(self, part: Competitors, ord: float, length: int) -> None:
        self.part = part
        self.p = ord
        self.precise = ord < 1 and part.norm.itemsize == 8
        # The norm of one element is its magnitude, whatever the order.
        self.code = INF if part.elements == 1 else _CODES.get(ord, nk.POWER)
        self.lines: lines.NormBuffers | None = None
        layout = part.leaves[0].layout if part.exact and not part.spans_leaves else None
        if lines.can_sum(layout, self.code):
            self.lines = lines.NormBuffers()
            self.kernel = lines.norm_kernel(layout, self.code)
        self.chunk = nk.EXACT_CHUNK if part.exact else nk.WIDE_CHUNK
        self.hi, self.lo = np.empty(length), np.empty(length)
        self.norm = np.empty(length, dtype=part.norm)
        rescales = self.code == TWO and not part.exact
        self.top = np.empty(length if self.code == nk.POWER or rescales else 0)
        self.again = np.empty(length if rescales else 0, dtype=part.norm)
        self.wide = np.empty(length if rescales else 0)
        self.unsure = np.empty(length if self.code in (ONE, TWO) else 0, dtype=np.int64)
        rows = min(length, UNSURE_ROWS) if part.exact else 0
        self.limbs = np.empty((rows, LIMBS), dtype=np.int64)

    def fill(self, i0: int, i1: int) -> tuple[np.ndarray, np.ndarray]:
        """(norms, the same in float64) of blocks [i0, i1); views that the next call overwrites."""
        count = i1 - i0
        hi, lo, norm = self.hi[:count], self.lo[:count], self.norm[:count]
        if self.lines is not None:
            self.kernel(*self.part.leaves[0].where, i0, i1, norm, hi, *self.lines.all)
            return norm, hi
        if self.code == nk.POWER:
            self._scaled(i0, i1, hi, lo, self.top[:count], norm)
            return norm, hi
        self._sums(self.code, i0, i1, hi, lo)
        if self.code == INF:
            nk.finish_largest(hi, norm)
        elif self.part.exact:
            unsure = nk.finish_exact(hi, lo, self.code == TWO, norm, self.unsure)
            for start in range(0, unsure, UNSURE_ROWS):
                self._decide(i0, self.unsure[start : min(unsure, start + UNSURE_ROWS)], norm)
        else:
            risky = nk.finish_wide(hi, lo, self.code == TWO, norm, self.unsure)
            if risky:
                again, top, wide = self.again[:count], self.top[:count], self.wide[:count]
                self._scaled(i0, i1, wide, lo, top, again)
                nk.take(self.unsure, risky, again, wide, norm, hi)
        return norm, hi

    def _sums(self, code: int, i0: int, i1: int, hi: np.ndarray, lo: np.ndarray) -> None:
        hi[:], lo[:] = 0.0, 0.0
        for leaf in self.part.leaves:
            accumulate = nk.kernels(leaf.codec).accumulate
            for e0 in range(0, leaf.size, PIECE_ELEMENTS):  # so that Ctrl-C is noticed inside a huge block
                e1 = min(leaf.size, e0 + PIECE_ELEMENTS)
                accumulate(*leaf.where, i0, i1, e0, e1, code, self.chunk, hi, lo)

    def _scaled(self, i0: int, i1: int, hi: np.ndarray, lo: np.ndarray, top: np.ndarray, norm: np.ndarray) -> None:
        """Norms by sums of powers of |x| / max |x|, which neither over- nor underflow."""
        self._sums(INF, i0, i1, top, lo)
        hi[:], lo[:] = 0.0, 0.0
        for leaf in self.part.leaves:
            add = nk.kernels(leaf.codec).accumulate_scaled
            add(*leaf.where, i0, i1, 0, leaf.size, top, self.p, self.precise, hi, lo)
        nk.finish_scaled(hi, lo, top, self.p, norm)

    def _decide(self, i0: int, chosen: np.ndarray, norm: np.ndarray) -> None:
        """The norms of the `chosen` blocks, rounded by their exact sums."""
        self.limbs[: chosen.size] = 0
        square = self.code == TWO
        for leaf in self.part.leaves:
            nk.kernels(leaf.codec).accumulate_limbs(*leaf.where, i0, chosen, chosen.size, leaf.size, square, self.limbs)
        nk.finish_unsure(self.limbs, chosen, chosen.size, square, norm)


def workspace_of(part: Competitors, ord: float) -> int:
    """Bytes of work arrays for the norm of a block, and what a caller adds to decide on it."""
    return BLOCK_WORKSPACE if part.elements == 1 or part.exact else 2 * BLOCK_WORKSPACE


def norm_ranges(
    part: Competitors,
    ord: float,
    make_use: Callable[[int, int], Callable[[int, int, int, np.ndarray, np.ndarray], None]],
    *,
    shielded: bool = False,
) -> Callable[[], None]:
    """A job that hands ``use(slot, i0, i1, norm, wide)`` the norms of all blocks of a part, piece by piece."""

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [NormWork(part, ord, length) for _ in range(slots)]
        use = make_use(slots, length)
        return lambda slot, i0, i1: use(slot, i0, i1, *works[slot].fill(i0, i1))

    return ranges(part.total, part.elements, make_work, workspace=workspace_of(part, ord), shielded=shielded)


def norms(parts: Parts, ord: float | None) -> np.ndarray:
    """Norm of every block: ``(S, n)`` in the norm's dtype."""
    measured = competitors(parts)
    scopes, n = measured[0].cut.scopes, sum(part.blocks for part in measured)
    result = np.empty((scopes, n), dtype=max(part.norm for part in measured))
    start = 0
    for part in measured:
        norms_into(part, float(ord or 2), result[:, start : start + part.blocks])
        start += part.blocks
    return result


def norms_into(part: Competitors, ord: float, columns: np.ndarray) -> None:
    """The norms of a part into its columns of a table."""

    def make_use(slots: int, length: int) -> Callable[..., None]:
        def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
            put(columns, i0, i1, norm)

        return use

    norm_ranges(part, ord, make_use)()


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
