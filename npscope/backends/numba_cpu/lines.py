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

from npscope.backends.numba_cpu import lanes
from npscope.backends.numba_cpu.arithmetic import LIMBS, limbs_add, limbs_sign, midpoint_above
from npscope.backends.numba_cpu.jit import inner, kernel
from npscope.backends.numba_cpu.kernels import INF, ONE, TWO, place
from npscope.backends.numba_cpu.lanes import LANES, Format
from npscope.backends.numba_cpu.operands import Layout

STRIP_ELEMENTS, STRIP_BLOCKS = 4096, 1024
"""Elements and blocks of a strip: 16 KiB of float32, and of work arrays."""

MAX_STEPS = 1500
"""Additions in sequence that `lanes.DOUBT` allows for, with some to spare."""


class NormBuffers:
    """Work arrays of one thread for the norms of a strip."""

    def __init__(self) -> None:
        self.sums = np.zeros(STRIP_BLOCKS + LANES)
        self.norms = np.zeros(STRIP_BLOCKS + LANES, dtype=np.float32)
        self.limbs = np.empty((1, LIMBS), dtype=np.int64)

    @property
    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arguments of a kernel."""
        return self.sums, self.norms, self.limbs


def can_sum(layout: Layout | None, code: int) -> bool:
    """Whether `norm_kernel` serves these blocks and this norm."""
    return layout is not None and layout.form.bits <= 32 and code in (INF, ONE, TWO) and layout.steps <= MAX_STEPS


def strip_blocks(layout: Layout, multiple: int = 1) -> int:
    """Blocks of a strip: whole scopes of `multiple` blocks."""
    count = max(LANES, min(STRIP_BLOCKS, STRIP_ELEMENTS // (layout.run * layout.rows)))
    return max(1, count // multiple) * multiple


# --- strips --------------------------------------------------------------------------------------


@cache
def _adder(form: Format, run: int, code: int, first: bool) -> Any:
    """``add(buffer, at, count, sums)``: a run of each of `count` adjacent blocks into their sums or maxima."""
    chunk = min(run, lanes.CHUNK)
    chunks, rest = divmod(run, chunk)
    together = lanes.blocks_per_step(run)

    def step(length: int, blocks: int, overwrites: bool) -> Any:
        if code == INF:
            return lanes.add_largest(form, length, blocks, overwrites)
        return lanes.add_terms(form, length, blocks, code == TWO, overwrites)

    one, many = step(chunk, 1, first), step(chunk, together, first)
    further, last = step(chunk, 1, False), step(rest or 1, 1, False)

    @inner
    def add(buffer: Any, at: int, count: int, sums: Any, j: int, ahead: int) -> None:
        stop = j + count
        while together > 1 and j + together <= stop:
            many(buffer, at, sums, j, ahead)
            at += together * run
            j += together
        while j < stop:
            one(buffer, at, sums, j, ahead)
            for c in range(1, chunks):
                further(buffer, at + c * chunk, sums, j, ahead)
            if rest:
                last(buffer, at + chunks * chunk, sums, j, ahead)
            at += run
            j += 1

    return add


@cache
def _measure(layout: Layout, code: int) -> Any:
    """``measure(buffer, origin, grid, elements, i, stop, sums, norms, limbs)``: norms of the blocks of a strip."""
    run, rows, magnitude = layout.run, layout.rows, layout.codec.magnitude
    code = INF if run * rows == 1 else code  # the norm of one element is its magnitude, whatever the order
    add_first, add = (_adder(layout.form, run, code, first) for first in (True, False))
    square, together = code == TWO, lanes.blocks_per_step(run) > 1 and code != INF
    round_norms = lanes.round_norms(square)
    round_last = lanes.round_terms(layout.form, run if together else 1, square, rows == 1)
    last = rows - 1 if together else rows

    @inner
    def sums_of(buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, sums: Any, norms: Any) -> bool:
        width = grid[0, -1]
        start, length = i, stop - i
        doubt = False
        while i < stop:
            after = min(stop, i + width - i % width)
            at = origin + place(i, grid)
            ahead = origin + place(i + length, grid) - at
            if last:
                add_first(buffer, at, after - i, sums, i - start, ahead)
            for row in range(1, last):
                add(buffer, at + place(row * run, elements), after - i, sums, i - start, ahead)
            j, end = i - start, after - start
            if together:
                at += place(last * run, elements)
                while j + LANES <= end:
                    doubt |= round_last(buffer, at, sums, j, norms, j, ahead)
                    at += LANES * run
                    j += LANES
                if j < end:
                    if last:
                        add(buffer, at, end - j, sums, j, ahead)
                    else:
                        add_first(buffer, at, end - j, sums, j, ahead)
            while code != INF and j < end:
                doubt |= round_norms(sums, j, norms, j)
                j += LANES
            i = after
        return doubt

    if code == INF:

        @inner
        def measure_largest(
            buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, sums: Any, norms: Any, limbs: Any
        ) -> None:
            sums_of(buffer, origin, grid, elements, i, stop, norms, sums)
            for j in range(stop - i):
                sums[j] = norms[j]

        return measure_largest

    @inner
    def settle(buffer: Any, at: int, elements: Any, wide: float, limbs: Any) -> Any:
        """A norm in doubt, from its exact sum."""
        if not np.isfinite(wide):
            return np.float32(wide)
        below = np.float32(wide * (1 - 2.0**-41))
        if below == np.float32(wide * (1 + 2.0**-41)):
            return below
        for limb in range(LIMBS):
            limbs[0, limb] = 0
        for e in range(run * rows):
            limbs_add(limbs, 0, magnitude(buffer, at + place(e, elements)), square, 1)
        limbs_add(limbs, 0, midpoint_above(below), square, -1)
        side = limbs_sign(limbs, 0)
        bits = below.view(np.uint32)
        if side > 0 or (side == 0 and bits & np.uint32(1)):
            return np.uint32(bits + np.uint32(1)).view(np.float32)
        return below

    @inner
    def measure(
        buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, sums: Any, norms: Any, limbs: Any
    ) -> None:
        if sums_of(buffer, origin, grid, elements, i, stop, sums, norms):
            for j in range(stop - i):
                norms[j] = settle(buffer, origin + place(i + j, grid), elements, sums[j], limbs)

    return measure


@cache
def _drop(layout: Layout) -> Any:
    """``drop(buffer, origin, grid, elements, i, stop, mask)``: zero the blocks of a strip whose mask is False."""
    form, run, rows, clear = layout.form, layout.run, layout.rows, layout.codec.clear
    together = lanes.runs_per_line(form, run)
    vectors = run <= 32
    many, one = lanes.drop_runs(form, run if vectors else 1, together), lanes.drop_runs(form, run if vectors else 1, 1)

    @inner
    def drop_run(buffer: Any, at: int, count: int, mask: Any, j: int) -> None:
        stop = j + count
        while vectors and together > 1 and j + together <= stop:
            many(buffer, at, mask, j)
            at += together * run
            j += together
        while j < stop:
            if vectors:
                one(buffer, at, mask, j)
            elif not mask[j]:
                for e in range(run):
                    clear(buffer, at + e)
            at += run
            j += 1

    @inner
    def drop(buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, mask: Any) -> None:
        width = grid[0, -1]
        start = i
        while i < stop:
            after = min(stop, i + width - i % width)
            at = origin + place(i, grid)
            for row in range(rows):
                drop_run(buffer, at + place(row * run, elements), after - i, mask, i - start)
            i = after

    return drop


@cache
def _scale(layout: Layout) -> Any:
    """``scale(buffer, origin, grid, elements, i, stop, factors)``: multiply the blocks of a strip by their factors."""
    form, run, rows, scale_one = layout.form, layout.run, layout.rows, layout.codec.scale
    vectors = form.name == "float32" and run <= lanes.CHUNK
    together = lanes.runs_per_line(form, run) if vectors else 1
    many, one = (lanes.scale_runs(form, run if vectors else 1, blocks) for blocks in (together, 1))

    @inner
    def scale_run(buffer: Any, at: int, count: int, factors: Any, j: int) -> None:
        stop = j + count
        while vectors and together > 1 and j + together <= stop:
            many(buffer, at, factors, j)
            at += together * run
            j += together
        while j < stop:
            if vectors:
                one(buffer, at, factors, j)
            elif factors[j] != 1.0:
                for e in range(run):
                    scale_one(buffer, at + e, factors[j])
            at += run
            j += 1

    @inner
    def scale(buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, factors: Any) -> None:
        width = grid[0, -1]
        start = i
        while i < stop:
            after = min(stop, i + width - i % width)
            at = origin + place(i, grid)
            for row in range(rows):
                scale_run(buffer, at + place(row * run, elements), after - i, factors, i - start)
            i = after

    return scale


@cache
def scale_kernel(layout: Layout) -> Any:
    """The kernel that multiplies the blocks [i0, i1) by their factors; 0 writes +0.0, 1 keeps the bits."""
    scale = _scale(layout)

    @kernel
    def scale_blocks(buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, factors: Any) -> None:
        scale(buffer, origin, grid, elements, i0, i1, factors)

    return scale_blocks


@cache
def norm_kernel(layout: Layout, code: int) -> Any:
    """The kernel that writes the norms of blocks [i0, i1), dense; and in float64 if `wide` is not empty."""
    measure = _measure(layout, code)
    strip = strip_blocks(layout)

    @kernel
    def norms_of_blocks(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, out: Any, wide: Any,
        sums: Any, norms: Any, limbs: Any,
    ) -> None:  # fmt: skip
        for i in range(i0, i1, strip):
            stop = min(i1, i + strip)
            measure(buffer, origin, grid, elements, i, stop, sums, norms, limbs)
            for j in range(stop - i):
                out[i - i0 + j] = norms[j]
            if wide.size:
                for j in range(stop - i):
                    wide[i - i0 + j] = sums[j]

    return norms_of_blocks


@cache
def drop_kernel(layout: Layout) -> Any:
    """The kernel that zeroes the blocks [i0, i1) whose mask is False."""
    drop = _drop(layout)

    @kernel
    def drop_blocks(buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, mask: Any) -> None:
        drop(buffer, origin, grid, elements, i0, i1, mask)

    return drop_blocks


# --- selection among single elements ---------------------------------------------------------------


@cache
def prune_groups_kernel(form: Format, n: int) -> Any:
    """The kernel that keeps the k first-ranked of every n adjacent elements, of elements [i0, i1)."""
    step, size = lanes.prune_groups(form, n), lanes.group_lanes(form, n)

    @kernel
    def prune_groups(
        source: Any, origin: int, grid: Any, target: Any, origin2: int, grid2: Any, i0: int, i1: int, k: int,
        spare: Any,
    ) -> None:  # fmt: skip
        width, width2 = grid[0, -1], grid2[0, -1]
        i = i0
        while i < i1:
            after = min(i1, i + width - i % width, i + width2 - i % width2)
            at, at2 = origin + place(i, grid), origin2 + place(i, grid2)
            count = after - i
            whole = count - count % size
            for e in range(0, whole, size):
                step(source, at + e, target, at2 + e, k)
            if whole < count:  # groups that do not fill a vector take a detour over one
                for e in range(whole, count):
                    spare[e - whole] = source[at + e]
                step(spare, 0, spare, 0, k)
                for e in range(whole, count):
                    target[at2 + e] = spare[e - whole]
            i = after

    return prune_groups
