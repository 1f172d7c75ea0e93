"""The loops of the proximal step in a diagonal metric: solve blocks side by side, then write them.

The elements of a strip of blocks are dealt into planes, the first elements of all blocks, the second ones, and so on,
so that every step of the iteration works on vectors of blocks (`secular`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import typeof, types

from npscope.backends.numba_cpu import planes, secular, vector_shrinkage
from npscope.backends.numba_cpu.arithmetic import round_root, two_sum
from npscope.backends.numba_cpu.codecs import Codec, Function
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, inner, kernel, make_small, merged, standalone
from npscope.backends.numba_cpu.kernels import Numbers, load_numbers
from npscope.backends.numba_cpu.nests import place
from npscope.backends.numba_cpu.operands import Layout
from npscope.backends.numba_cpu.scalars import greatest, least
from npscope.backends.numba_cpu.secular import (
    ACTIVE,
    MEAN,
    NORM,
    RATE,
    SPREAD,
    UNIT,
    WIDTH,
)
from npscope.backends.numba_cpu.vectors import LANES, Format, copy_numbers, spread

STRIP = 2048
"""Elements whose factors are at hand at a time, where they lie line by line."""


# --- dealing ------------------------------------------------------------------------

PLANES = 1 << 15
"""Numbers in the planes of one operand at most, 128 KiB or twice that; larger blocks are dealt again for every step."""

STRIP_NUMBERS = 1024
"""Numbers in the planes where that gives a strip of a few vectors of blocks: 8 or 16 KiB for both operands."""


def strip_pitch(elements: int) -> int:
    """How far rows of planes lie apart, for blocks of that many elements: for a multiple of `LANES` blocks, and more.

    Behind the blocks is room for `LANES` numbers that mean nothing.
    """
    return min(WIDTH, max(LANES, STRIP_NUMBERS // elements // LANES * LANES)) + LANES


def plane_numbers(elements: int) -> int:
    """Numbers in the planes of one operand, of blocks of that many elements."""
    return min(elements * strip_pitch(elements), PLANES)


def _in_parts(elements: int) -> bool:
    """Whether such blocks are too large for planes, and dealt in parts."""
    return plane_numbers(elements) < elements * strip_pitch(elements)


@cache
def _dealer(read: Function, layout: Layout | None) -> Any:
    """``deal(..., i, stop, e0, e1, out, row, pitch)``: elements [e0, e1) of blocks into planes from `row` on.

    All elements of a block, where a layout says that they are adjacent. `LANES` more places than blocks are written.
    """
    run, rows = (layout.run, layout.rows) if layout else (1, 0)
    part = min(run, LANES)
    vectors = layout is not None and layout.form.bits <= 32 and part in (1, 2, 4, 8, LANES) and run % part == 0
    deal_whole: Any = planes.deal_runs(layout.form, part, False) if layout and vectors else None
    deal_rest: Any = planes.deal_runs(layout.form, part, True) if layout and vectors else None
    distance, inner = run if run > LANES else LANES, -1 if run == 1 else -2

    @standalone
    def deal(
        buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, e0: int, e1: int,
        out: Any, row: int, pitch: int,
    ) -> None:  # fmt: skip
        make_small()
        size, step = elements[0, -1], elements[1, -1]
        columns, stride = grid[0, -1], grid[1, -1]
        turns, between = (elements[0, inner], elements[1, inner]) if rows > 1 else (1, 0)
        start, length = i, stop - i
        while i < stop:
            rest = columns - i % columns
            after, here = least(stop, i + rest), place(i, grid)
            at, b, count = origin + here, i - start, after - i
            if vectors:
                ahead = 2 * length * stride if 3 * length <= rest else place(i + length, grid) - here
                done, first, turn = count - count % LANES, at, 0
                for r in range(rows):
                    if turn == turns:
                        first, turn = at + place(r * run, elements), 0
                    for c in range(0, run, part):
                        source, target = first + c, (row + r * run + c) * pitch + b
                        for j in range(0, done, LANES):
                            deal_whole(buffer, source + j * run, out, target + j, distance, pitch, ahead, LANES)
                        if done < count:
                            deal_rest(buffer, source + done * run, out, target + done, distance, pitch, 0, count - done)
                    first, turn = first + between, turn + 1
            else:
                for j in range(count):
                    e = e0
                    while e < e1:
                        run_stop = least(e1, e + size - e % size)
                        source = at + j * stride + place(e, elements) - e * step
                        target = (row - e0) * pitch + b + j
                        for k in range(e, run_stop):
                            out[np.uintp(target + k * pitch)] = read(buffer, source + k * step)
                        e = run_stop
            i = after

    return deal


Pair = tuple[Any, Layout | None, Any, Layout | None]
"""How the elements of a leaf and of its metric are read."""


@cache
def _pairs_dealer(pairs: tuple[Pair, ...]) -> Any:
    """``deal(leaves, i, stop, e0, e1, v, h, pitch)``: elements [e0, e1) of blocks that span these leaves."""
    x_codec, x_layout, h_codec, h_layout = pairs[0]
    deal_v, deal_h = _dealer(x_codec.value, x_layout), _dealer(h_codec.value, h_layout)
    deal_rest = _pairs_dealer(pairs[1:]) if len(pairs) > 1 else None

    @standalone
    def deal(leaves: Any, i: int, stop: int, e0: int, e1: int, row: int, v: Any, h: Any, pitch: int) -> None:
        make_small()
        x, x_origin, x_grid, x_elements, hh, h_origin, h_grid, h_elements, size = leaves[0]
        first, last = greatest(e0, 0), least(e1, size)
        if first < last:
            deal_v(x, x_origin, x_grid, x_elements, i, stop, first, last, v, row, pitch)
            deal_h(hh, h_origin, h_grid, h_elements, i, stop, first, last, h, row, pitch)
            row += last - first
        if deal_rest is not None:
            deal_rest(leaves[1:], i, stop, e0 - size, e1 - size, row, v, h, pitch)

    return deal


_call_dealer = caller(9)


def dealer_address(pairs: tuple[Pair, ...], leaves: Any, plane: np.dtype) -> int:
    """Where the code is that deals the elements of leaves which are read like this, into planes of this dtype."""
    if _in_parts(sum([leaf[-1] for leaf in leaves])):
        pairs = tuple((x_codec, None, h_codec, None) for x_codec, _, h_codec, _ in pairs)
    numbers, rows = [types.int64] * 5, array_of(plane)
    return address_of(_pairs_dealer(pairs), typeof(leaves), *numbers, rows, rows, types.int64)


# --- solving ------------------------------------------------------------------------

SAFE_TOP, SAFE_UNIT = 2.0**450, 2.0**600
"""Numbers within [1 / SAFE_TOP, SAFE_TOP] may be squared and summed; SAFE_UNIT brings any other there."""

BEYOND = (2.0**128 - 2.0**103) ** 2
"""Squares of norms from here on round to infinity in float32; exact in float64."""


@inner
def _safe_unit(top: float) -> float:
    """A power of two that brings `top` where it may be squared; 1 where it already is."""
    if top > SAFE_TOP:
        return 1.0 / SAFE_UNIT
    return SAFE_UNIT if 0.0 < top < 1.0 / SAFE_TOP else 1.0


BENDING = 2
"""Steps by Halley's method, whose error is the cube of Newton's start; with ordinary metrics none follow."""


def near_enough(rtol: float, single: bool) -> tuple[float, float]:
    """The relative size of the last step, by Newton or by Halley, for a relative accuracy of `rtol` after it.

    A step from RATE by at most its e-th part changes no ``h * RATE + LIMIT`` by more, so that the derivatives
    of the norm are known up to powers of 1 + e: a Newton step ends within 2 e ** 2 of the root, one of
    Halley within 8 e ** 3, for e <= 0.01. Nothing is to be gained below the rounding of float64, or if blocks are
    `single` below 2 ** -11 of that of float32; the step itself then is right to 2 ** -20.
    """
    accuracy = max(rtol, 2.0**-36 if single else 2.0**-53) / 2
    most = min(0.01, accuracy * 2.0**20) if single else 0.01
    return min(math.sqrt(accuracy / 2), most), min(math.cbrt(accuracy / 8), most)


DONE, TOO_MANY_STEPS, LOOK_CLOSER, OUTSIDE = range(4)
"""How the work of a `solve_kernel` ends."""

_call_looker = caller(11, types.int64)


@cache
def _looker(exact: bool, narrow: bool) -> Any:
    """``look(deal, leaves, i, stop, total, chunk, limits, v, h, pitch, s)``: decide on the blocks that need it.

    On those of a strip, by sums that neither overflow nor round amiss. Returns how many blocks are active then.
    """
    begin = secular.begin()

    @standalone
    def look_at(
        deal: int, leaves: Any, i: int, stop: int, b: int, total: int, chunk: int, limit: float, v: Any, h: Any,
        pitch: int, s: Any,
    ) -> None:  # fmt: skip
        make_small()
        top, widest, unit, scale = 0.0, 0.0, 1.0, 1.0
        hi, low, size, size_low, squares, cubes = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for turn in range(3):
            for e0 in range(0, total, chunk):
                e1 = least(total, e0 + chunk)
                if chunk < total:
                    _call_dealer(deal, leaves, i, stop, e0, e1, 0, v, h, pitch)
                for k in range(b, (e1 - e0) * pitch, pitch):
                    x, c = v[k] * unit, np.float64(h[k])
                    if turn == 0:
                        top = max(top, abs(x))
                    elif turn == 1:
                        widest = max(widest, c * abs(x))
                        size, error = two_sum(size, x * x)
                        size_low += error
                    else:
                        w = c * x * scale
                        hi, error = two_sum(hi, w * w)
                        low += error
                        share = (c * x / widest) ** 2  # of numbers near 1, or the third power leaves the range
                        squares += share
                        cubes += share * c
            if turn == 0:
                unit = _safe_unit(top)
                if top == 0.0 or np.isinf(top):
                    break
            elif turn == 1:
                scale = _safe_unit(widest)
        if narrow:
            infinite = np.isinf(top) or (unit == 1.0 and (size - BEYOND) + size_low >= 0.0)
        else:
            infinite = np.isinf(top) or np.isinf(math.sqrt(size + size_low) / unit)
        s[ACTIVE + b] = 0.0
        if infinite:
            s[RATE + b] = 0.0 if np.isinf(limit) else 1.0
            return
        norm = math.sqrt(hi + low) / scale
        rounded = np.float64(round_root(hi, low)) if exact and scale == 1.0 else norm
        if narrow:
            rounded = np.float64(np.float32(rounded))
        if rounded > limit * unit:
            s[ACTIVE + b] = 1.0
            s[UNIT + b], s[NORM + b] = unit, norm
            s[MEAN + b], s[SPREAD + b] = cubes / squares, math.sqrt(size + size_low) / norm

    @standalone
    def look(
        deal: int, leaves: Any, i: int, stop: int, total: int, chunk: int, limits: Any, v: Any, h: Any,
        pitch: int, s: Any,
    ) -> int:  # fmt: skip
        make_small()
        left, count = 0, stop - i
        for b in range(count):
            if s[ACTIVE + b] < 0.0:
                look_at(deal, leaves, i, stop, b, total, chunk, np.float64(limits[b]), v, h, pitch, s)
        for b in range(0, count, LANES):
            left += begin(s, b, limits, b)
        return left

    return look


def looker_address(exact: bool, narrow: bool, leaves: Any, limit: np.dtype, plane: np.dtype) -> int:
    """Where the code of a `_looker` is. Few problems need it, and it takes a third of a second to compile."""
    limits, rows = array_of(limit), array_of(plane)
    where = *[types.int64] * 4, limits, rows, rows, types.int64, array_of(np.float64)
    return address_of(_looker(exact, narrow), types.int64, typeof(leaves), *where, result=types.int64)


@cache
def solve_kernel(narrow: bool, single: bool) -> Any:
    """The kernel that solves the blocks [i0, i1): an element becomes ``h / (h + mu)`` of itself.

    Zero blocks get an infinite mu, unchanged ones 0. `narrow`: norms are float32; `single`: planes are. `deal` is
    the `dealer_address` of the leaves, `look` their `looker_address` or 0. Returns `DONE`, `TOO_MANY_STEPS` where an
    iteration does not end, `LOOK_CLOSER` where a block needs a closer look and `look` is 0, or `OUTSIDE` where the
    metric leaves its range.
    """
    measure, classify = secular.measure(), secular.classify(narrow)
    sum_secular, advance, approach = secular.sum_secular(single), secular.advance(single), secular.approach()
    finish = secular.finish()

    @kernel
    def solve(
        deal: int, look: int, leaves: Any, i0: int, i1: int, t: Numbers, total: int,
        pitch: int, max_iter: int, near: float, near_halley: float, v: Any, h: Any, s: Any, limits: Any, mus: Any,
    ) -> int:  # fmt: skip
        make_small()
        chunk = least(total, v.size // pitch)
        for i in range(i0, i1, pitch - LANES):
            stop = least(i1, i + pitch - LANES)
            count = stop - i
            load_numbers(*t, i, stop, limits)
            outside = 0
            for e0 in range(0, total, chunk):
                e1 = least(total, e0 + chunk)
                _call_dealer(deal, leaves, i, stop, e0, e1, 0, v, h, pitch)
                for b in range(0, count, LANES):
                    outside += measure(v, b, h, b, s, b, e0, e1, pitch, count - b)
            if outside:
                return OUTSIDE
            left, closer = 0, False
            for b in range(0, count, LANES):
                found = classify(s, b, limits, b, count - b)
                left += found
                closer |= found < 0
            if closer:
                if look == 0:
                    return LOOK_CLOSER
                left = _call_looker(look, deal, leaves, i, stop, total, chunk, limits, v, h, pitch, s)
            if single and left and chunk == total:
                for b in range(0, count, LANES):
                    approach(v, b, h, b, s, b, total, pitch)
            steps = 0
            while left:
                if steps == max_iter:
                    return TOO_MANY_STEPS
                bends = steps < BENDING
                close, floor = near_halley if bends else near, 1.0 - near if steps <= BENDING else 0.0
                for e0 in range(0, total, chunk):
                    e1 = least(total, e0 + chunk)
                    if chunk < total:
                        _call_dealer(deal, leaves, i, stop, e0, e1, 0, v, h, pitch)
                    for b in range(0, count, LANES):
                        sum_secular(v, b, h, b, s, b, e0, e1, pitch)
                left = 0
                for b in range(0, count, LANES):
                    left += advance(s, b, close, floor, bends)
                steps += 1
            for b in range(0, count, LANES):
                finish(s, b)
            copy_numbers(s, RATE, count, mus, i)
        return DONE

    return solve


# --- writing ------------------------------------------------------------------------


@cache
def weigh_kernel(data: Codec, metric: Codec, run: int, form: Format | None, metric_form: Format | None) -> Any:
    """The kernel that multiplies every element by ``h / (h + mu)``, for blocks [i0, i1).

    `run` is the adjacent elements of a block where the blocks of array and metric lie line by line, in these formats,
    else 0.
    """
    scale, weight = data.scale, metric.value

    if form is not None and metric_form is not None and form.bits >= 32:
        weigh_line = vector_shrinkage.weigh(form, metric_form, False)
        weigh_rest = vector_shrinkage.weigh(form, metric_form, True)

        @merged
        def weigh_elements(x: Any, x_at: int, h: Any, h_at: int, mu: Any, count: int) -> None:
            make_small()
            whole = count - count % LANES
            for k in range(0, whole, LANES):
                weigh_line(x, x_at + k, h, h_at + k, mu, k, LANES)
            if whole < count:
                weigh_rest(x, x_at + whole, h, h_at + whole, mu, whole, count - whole)
    else:

        @merged
        def weigh_elements(x: Any, x_at: int, h: Any, h_at: int, mu: Any, count: int) -> None:
            for k in range(count):
                c = weight(h, h_at + k)
                scale(x, x_at + k, c / (c + mu[np.uintp(k)]))

    @kernel
    def weigh_lines(
        x: Any, x_origin: int, x_grid: Any, x_elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, total: int, mus: Any, mu: Any,
    ) -> None:  # fmt: skip
        x_width, h_width, size = x_grid[0, -1], h_grid[0, -1], STRIP
        i = i0
        while i < i1:
            stop = least(
                least(i1, i + greatest(1, size // run)), least(i + x_width - i % x_width, i + h_width - i % h_width)
            )
            x_at, h_at, length = x_origin + place(i, x_grid), h_origin + place(i, h_grid), (stop - i) * run
            for b in range(stop - i):
                spread(mus, i + b, mu, b * run, least(run, size))
            for e in range(0, total, run):
                x_first, h_first = x_at + place(e, x_elements), h_at + place(e, h_elements)
                for c in range(0, length, size):
                    weigh_elements(x, x_first + c, h, h_first + c, mu, least(size, length - c))
            i = stop

    @kernel
    def weigh_blocks(
        x: Any, x_origin: int, x_grid: Any, x_elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, total: int, mus: Any, mu: Any,
    ) -> None:  # fmt: skip
        for i in range(i0, i1):
            x_at, h_at = x_origin + place(i, x_grid), h_origin + place(i, h_grid)
            for e in range(total):
                c = weight(h, h_at + place(e, h_elements))
                scale(x, x_at + place(e, x_elements), c / (c + mus[i]))

    return weigh_lines if run else weigh_blocks
