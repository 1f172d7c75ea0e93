"""Operations on memory that can be taken line by line, in one compiled loop a call.

That is where the blocks that follow each other lie next to each other: along the contiguous axis
of an array, each block is a run of adjacent elements (maybe one), repeated over rows. All other
layouts and dtypes are served by the element-wise kernels, to the same results.

The loops work in strips that stay in the nearest cache between reading, deciding and writing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from npscope.backends.numba_cpu import vector_norms, vector_selection, vector_writing
from npscope.backends.numba_cpu.codecs import Function
from npscope.backends.numba_cpu.doubts import EXACT_PARTS, MOST_DOUBT, additions_of
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, kernel, make_small, standalone
from npscope.backends.numba_cpu.nests import NEST, length_of, place
from npscope.backends.numba_cpu.operands import Layout
from npscope.backends.numba_cpu.rows import TOGETHER, Runs
from npscope.backends.numba_cpu.scalars import least
from npscope.backends.numba_cpu.totals import INF, ONE, PARTIAL, TWO, takes_many
from npscope.backends.numba_cpu.vector_norms import PART_BLOCKS, PARTS
from npscope.backends.numba_cpu.vector_norms import STRIP_BLOCKS as STRIP_BLOCKS
from npscope.backends.numba_cpu.vectors import LANES, LINE, Format, copy_numbers

MOST_DROPPED = 32
"""Elements of a run up to which blocks are dropped in vectors of several."""

STRIP_RUN, SHORT_RUN, STRIP_ELEMENTS = 1 << 12, 1 << 10, 1 << 17
"""Adjacent elements of a row of a strip, those if it has many rows, and elements of a strip at most.

So a strip of 4x4 blocks is 16 KiB, which the nearest cache holds until it is written: measured, a tenth faster than
64 KiB. Tall blocks are read in pieces of 4 KiB; with 1 KiB reading takes twice as long.
"""


def _whole_lines(length: int) -> int:
    return -(-length // LINE) * LINE


# Behind what is fixed, the parts of blocks with long runs, or rows of others with runs shorter than a vector; and then
# exact sums.
_MAKING_WORDS = PARTS + max(2 * PARTIAL * (PART_BLOCKS + LANES), TOGETHER * LANES * LANES + LINE, EXACT_PARTS * LANES)


class NormBuffers:
    """Work arrays of one thread for the norms, floats of so many bytes, of a strip of up to `blocks` blocks."""

    def __init__(self, blocks: int, norm_bytes: int) -> None:
        size = _whole_lines(8 * (blocks + LANES))
        raw = np.empty(2 * size + 8 * _MAKING_WORDS + LINE, dtype=np.uint8)
        self.nbytes = raw.nbytes
        # Each starts where a line starts: vectors that straddle two cost twice.
        start = -raw.__array_interface__["data"][0] % LINE
        self.sums = np.ndarray(size // 8, np.float64, raw, start)
        self.norms = np.ndarray(size // norm_bytes, f"f{norm_bytes}", raw, start + size)
        self.making = np.ndarray(_MAKING_WORDS, np.int64, raw, start + 2 * size)
        self.all = self.sums, self.norms, self.making  # the arguments of a kernel


def can_sum(layout: Layout | None, code: int, *, wide: bool = False) -> bool:
    """Whether a `measurer` serves these blocks and this norm; `wide`: float64 too, which needs buffers of its own."""
    if layout is None or layout.form.bits > (64 if wide else 32) or code not in (INF, ONE, TWO):
        return False
    if layout.form.is_integer and layout.form.bits > 16:  # float32 does not hold them
        return False
    return code == INF or layout.form.bits == 64 or additions_of(layout.run, layout.rows) <= MOST_DOUBT


def strip_blocks(layout: Layout) -> int:
    """Blocks of a strip."""
    most = STRIP_BLOCKS if takes_many(layout.runs) else PART_BLOCKS
    columns = max(SHORT_RUN, STRIP_RUN // layout.rows)
    return max(1, min(most, columns // layout.run, STRIP_ELEMENTS // (layout.run * layout.rows)))


# --- norms of a strip ----------------------------------------------------------------------------


def measurer(layout: Layout, code: int) -> Any:
    """``measure(buffer, origin, grid, elements, i, stop, sums, norms, making)``: norms of the blocks of a strip.

    In float64 they are left in `sums`, unless they are maxima. Sums in the making stand in `making`.
    """
    # The norm of one element is its magnitude, whatever the order.
    return _measurer(layout.form, layout.runs, INF if layout.run * layout.rows == 1 else code)


@cache
def _measurer(form: Format, runs: Runs, code: int) -> Any:
    measure_strip = vector_norms.measure_strip(form, runs, code)

    @standalone
    def measure(
        buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, sums: Any, norms: Any, making: Any
    ) -> None:
        make_small()
        measure_strip(
            buffer,
            origin,
            grid,
            0,
            grid.shape[1],
            elements,
            0,
            elements.shape[1],
            i,
            stop,
            sums,
            0,
            norms,
            0,
            making,
            0,
        )

    return measure


# --- strips --------------------------------------------------------------------------------------


def dropper(layout: Layout) -> Any:
    """``drop(target, i, stop, mask)``: zero the blocks of a strip whose mask is False."""
    if layout.run > MOST_DROPPED:
        return element_writer(layout.codec.keep, layout.codec.drop, True)
    return _row_writer(vector_writing.drop_strip(layout.form, layout.runs))


def scaler(layout: Layout, shrinks: bool) -> Any:
    """``scale(target, i, stop, factors)``: multiply the blocks of a strip by factors; `shrinks` as in `scale_strip`."""
    if layout.form.name not in ("float32", "float64") or layout.is_long:
        return element_writer(layout.codec.scale, layout.codec.scale, 1.0)
    return _row_writer(vector_writing.scale_strip(layout.form, layout.runs, shrinks))


@cache
def _row_writer(write_strip: Any) -> Any:
    """``write(target, i, stop, numbers)``: change the blocks of a strip by a number each."""

    @standalone
    def write(target: Any, i: int, stop: int, numbers: Any) -> None:
        make_small()
        buffer, origin, grid, elements = target
        write_strip(buffer, origin, grid, 0, grid.shape[1], elements, 0, elements.shape[1], i, stop, numbers, 0)

    return write


@cache
def element_writer(write_one: Function, change_one: Function, same: float) -> Any:
    """``write(target, i, stop, numbers)``: change blocks by a number each, element by element; `same` leaves them.

    Elements in short runs are written side by side, and all of them: a branch for each block is as often mistaken as
    not. Of long ones those that stay are not even read, and the others written by `change_one`.
    """

    @standalone
    def write(target: Any, i: int, stop: int, numbers: Any) -> None:
        buffer, origin, grid, elements = target
        width, stride = grid[0, -1], grid[1, -1]
        run, step = elements[0, -1], elements[1, -1]
        total = length_of(elements)
        start = i
        while i < stop:
            after = least(stop, i + width - i % width)
            at = origin + place(i, grid)
            for e in range(0, total, run):
                first = at + place(e, elements)
                if run <= MOST_DROPPED:
                    for r in range(run):
                        for j in range(after - i):
                            write_one(buffer, first + r * step + j * stride, numbers[np.uintp(i - start + j)])
                else:
                    for j in range(after - i):
                        number = numbers[np.uintp(i - start + j)]
                        if number != same:
                            for r in range(run):
                                change_one(buffer, first + j * stride + r * step, number)
            i = after

    return write


def where_type(unit: np.dtype) -> Any:
    """The Numba type of an operand as `strips.Where` names it, with a buffer of this dtype."""
    return types.Tuple((array_of(unit), types.int64, NEST, NEST))


_RANGE = (types.int64, types.int64)
call_measurer, call_scaler = caller(9), caller(4)


@cache
def measurer_address(layout: Layout, code: int, unit: np.dtype, norm: np.dtype) -> int:
    """Where the code of a `measurer` is, for buffers and norms of these dtypes."""
    sums, making = array_of(np.float64), array_of(np.int64)
    return address_of(
        measurer(layout, code), array_of(unit), types.int64, NEST, NEST, *_RANGE, sums, array_of(norm), making
    )


@cache
def scaler_address(scale: Function, unit: np.dtype) -> int:
    """Where the code of what multiplies blocks by factors is, for buffers of this dtype."""
    return address_of(scale, where_type(unit), *_RANGE, array_of(np.float64))


@kernel
def scale_blocks(
    scale: int, buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, factors: Any
) -> None:
    """Multiply the blocks [i0, i1) by their factors; 0 writes +0.0, 1 keeps the bits."""
    call_scaler(scale, (buffer, origin, grid, elements), i0, i1, factors)


@kernel
def norms_of_blocks(
    measure: int, buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, strip: int,
    out: Any, wide: Any, sums: Any, norms: Any, making: Any,
) -> None:  # fmt: skip
    """Write the norms of blocks [i0, i1), dense, and if `wide` is not empty in float64 those that are no maxima.

    `strip` is `strip_blocks` of the blocks.
    """
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        if stop + LANES <= i1:  # what is written behind the blocks of a strip, the next one overwrites
            call_measurer(measure, buffer, origin, grid, elements, i, stop, sums, out[i - i0 :], making)
        else:
            call_measurer(measure, buffer, origin, grid, elements, i, stop, sums, norms, making)
            copy_numbers(norms, 0, stop - i, out, i - i0)
        if wide.size:
            copy_numbers(sums, 0, stop - i, wide, i - i0)


# --- selection among single elements ---------------------------------------------------------------


@cache
def groups_kernel(form: Format, n: int, marks: bool) -> Any:
    """The kernel that keeps, or `marks`, the k first-ranked of every n adjacent elements, of elements [i0, i1)."""
    keep = vector_selection.keep_groups(form, n, marks)

    @kernel
    def keep_groups(
        source: Any, origin: int, grid: Any, target: Any, origin2: int, grid2: Any, i0: int, i1: int, k: int
    ) -> None:
        keep(source, origin, grid, 0, grid.shape[1], target, origin2, grid2, 0, grid2.shape[1], i0, i1, k)

    return keep_groups


@cache
def columns_kernel(form: Format, n: int, marks: bool) -> Any:
    """The kernel that keeps, or `marks`, the k first-ranked of n elements that lie apart, of scopes side by side.

    The array with the larger elements, which is written if both have the same, starts `past` a line of a cache.
    """
    keep_line, keep_rest = (vector_selection.keep_columns(form, n, marks, partial) for partial in (False, True))
    lanes = form.lanes

    @kernel
    def keep_columns(
        source: Any, origin: int, scopes: Any, apart: Any, target: Any, origin2: int, scopes2: Any, apart2: Any,
        past: int, s0: int, s1: int, k: int,
    ) -> None:  # fmt: skip
        make_small()
        # Vectors that straddle lines take twice as long where elements are a power of two apart, and share few lines.
        width, width2 = scopes[0, -1], scopes2[0, -1]
        s = s0
        while s < s1:
            after = least(s1, least(s + width - s % width, s + width2 - s % width2))
            at, at2, count = origin + place(s, scopes), origin2 + place(s, scopes2), after - s
            e, some = 0, least(count, -(past + (at - origin if marks else at2 - origin2)) % lanes)
            while e < count:
                if some == lanes:
                    keep_line(source, at + e, apart, 0, target, at2 + e, apart2, 0, k, lanes)
                elif some:
                    keep_rest(source, at + e, apart, 0, target, at2 + e, apart2, 0, k, some)
                e += some
                some = least(count - e, lanes)
            s = after

    return keep_columns
