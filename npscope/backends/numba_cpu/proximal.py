"""The loops of the proximal steps: measure, decide and rescale while the blocks are in the nearest cache.

A kernel takes a few thousand elements at a time, and reads the threshold of each block itself: one
number for all of them, one a block, or one for the `repeat` blocks of a scope.

Conditioned blocks are solved side by side: the elements of a strip of blocks are dealt into planes,
the first elements of all blocks, the second ones, and so on, so that every step of the iteration is
a loop over blocks, of which LLVM makes vectors.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import typeof, types

from npscope.backends.numba_cpu import planes, vector_shrinkage
from npscope.backends.numba_cpu.arithmetic import round_root, two_sum
from npscope.backends.numba_cpu.codecs import Codec, Function
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, inner, kernel, make_small, standalone
from npscope.backends.numba_cpu.kernels import FILLED, Numbers, load_numbers
from npscope.backends.numba_cpu.lines import call_measurer, call_scaler
from npscope.backends.numba_cpu.nests import place
from npscope.backends.numba_cpu.operands import Layout
from npscope.backends.numba_cpu.scalars import greatest, least
from npscope.backends.numba_cpu.vectors import LANES, Format, clear

STRIP = 2048
"""Elements whose thresholds are read at a time where a block is one element."""


@inner
def read_limits(t: Numbers, i: int, stop: int, limits: Any) -> None:
    """The thresholds of elements [i, stop), dense; -0.0 for zero, which is how `vector_shrinkage.soften` knows it.

    Of zeros that are `FILLED` in, too, which stay zeros.
    """
    load_numbers(*t, i, stop, limits)
    for j in range(np.uintp(stop - i)):
        limit = limits[j]
        limits[j] = -limits.dtype.type(0) if limit == 0 else limit


@cache
def soften_kernel(codec: Codec, form: Format | None, metric: Codec | None) -> Any:
    """The kernel that takes the proximal step of 1-element blocks [i0, i1), without a metric or in one.

    `form` is that of elements which are adjacent, with those of the metric.
    """
    soften, weight = codec.soften, None if metric is None else metric.value
    adjacent, by_lines, lanes = form is not None, False, 1
    soften_line: Any = None
    if form is not None and form.bits >= 32 and metric is None:
        soften_line, by_lines, lanes = vector_shrinkage.soften(form), True, form.lanes

    @kernel
    def soften_elements(
        x: Any, origin: int, grid: Any, elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, t: Numbers, limits: Any,
    ) -> None:  # fmt: skip
        width, h_width = grid[0, -1], h_grid[0, -1]
        step, h_step = (1, 1) if adjacent else (grid[1, -1], h_grid[1, -1])
        alike = t[0] == FILLED
        if alike:
            read_limits(t, i0, least(i1, i0 + limits.size), limits)
        i = i0
        while i < i1:
            stop = least(least(i1, i + limits.size), least(i + width - i % width, i + h_width - i % h_width))
            if not alike:
                read_limits(t, i, stop, limits)
            at, h_at = origin + place(i, grid), h_origin + place(i, h_grid)
            whole = 0
            if by_lines:
                whole = (stop - i) - (stop - i) % lanes
                for j in range(0, whole, lanes):
                    soften_line(x, at + j, limits, j)
            for j in range(whole, stop - i):
                c = limits.dtype.type(1) if weight is None else weight(h, h_at + j * h_step)
                soften(x, at + j * step, limits[np.uintp(j)], c)
            i = stop

    return soften_elements


@standalone
def form_factors(norms: Any, wide: Any, t: Any, count: int) -> None:
    """From norms (rounded, and in float64) to what blocks are multiplied by, in place of the latter.

    1 - t / norm, 0 where the rounded norm is <= t, 1 where nothing changes.
    """
    for k in range(count):
        j = np.uintp(k)
        norm, size, limit = norms[j], wide[j], t[j]
        factor = (size - limit) / size  # always, for a branch would keep LLVM from making vectors
        factor = 0.0 if norm <= limit else factor
        same = (norm != norm) | (limit == 0.0) | ((norm == np.inf) & (limit != np.inf))
        wide[j] = 1.0 if same else factor


@kernel
def shrink_factors(norms: Any, wide: Any, t: Any) -> None:
    """`form_factors` of all blocks whose norms are given."""
    form_factors(norms, wide, t, norms.size)


@kernel
def shrink_blocks(
    measure: int, scale: int, x: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, strip: int,
    t: Numbers, limits: Any, sums: Any, norms: Any, making: Any,
) -> None:  # fmt: skip
    """Shrink the blocks [i0, i1) by their norm."""
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        call_measurer(measure, x, origin, grid, elements, i, stop, sums, norms, making)
        load_numbers(*t, i, stop, limits)
        form_factors(norms, sums, limits, stop - i)
        call_scaler(scale, (x, origin, grid, elements), i, stop, sums)


# --- conditioned: dealing ------------------------------------------------------------------------

PLANES = 1 << 15
"""Numbers in the planes of one operand at most, 256 KiB; larger blocks are dealt again for every step."""

WIDTH = 128
"""Most blocks of a strip: a multiple of `LANES`."""

STRIP_NUMBERS = 2048
"""Numbers in the planes where that gives a strip of a few vectors of blocks: 32 KiB for both operands."""


def strip_width(elements: int) -> int:
    """Blocks of a strip, for blocks of that many elements: a multiple of `LANES`."""
    return min(WIDTH, max(LANES, STRIP_NUMBERS // elements // LANES * LANES))


@cache
def _dealer(read: Function, layout: Layout | None) -> Any:
    """``deal(..., i, stop, e0, e1, whole, out, row, width)``: elements [e0, e1) of blocks into planes from `row` on.

    Numbers may lose their sign.
    """
    run, rows = (layout.run, layout.rows) if layout else (0, 0)
    part = min(run, LANES)
    vectors = layout is not None and layout.form.bits <= 32 and part in (1, 2, 4, 8, LANES) and run % part == 0
    deal_runs: Any = planes.deal_runs(layout.form, part) if layout and vectors else None
    distance = run if run > LANES else LANES

    @standalone
    def deal(
        buffer: Any, origin: int, grid: Any, elements: Any, i: int, stop: int, e0: int, e1: int, whole: bool,
        out: Any, row: int, width: int,
    ) -> None:  # fmt: skip
        if vectors:
            make_small()
        size, step = elements[0, -1], elements[1, -1]
        columns, stride = grid[0, -1], grid[1, -1]
        start, length = i, stop - i
        while i < stop:
            after = least(stop, i + columns - i % columns)
            ahead = place(i + length, grid) - place(i, grid)
            at, b, count = origin + place(i, grid), i - start, after - i
            done = 0
            if vectors and whole:
                done = count - count % LANES
                for r in range(rows):
                    source = at + place(r * run, elements)
                    for c in range(0, run, part):
                        target = (row + r * run + c) * width + b
                        for j in range(0, done, LANES):
                            deal_runs(buffer, source + j * run + c, out, target + j, distance, width, ahead)
            for j in range(done, count):
                e = e0
                while e < e1:
                    run_stop = least(e1, e + size - e % size)
                    first = at + j * stride + place(e, elements) - e * step
                    target = (row - e0) * width + b + j
                    for k in range(e, run_stop):
                        out[np.uintp(target + k * width)] = read(buffer, first + k * step)
                    e = run_stop
            i = after

    return deal


Pair = tuple[Any, Layout | None, Any, Layout | None]
"""How the elements of a leaf and of its metric are read."""


@cache
def _pairs_dealer(pairs: tuple[Pair, ...]) -> Any:
    """``deal(leaves, i, stop, e0, e1, v, h, width)``: elements [e0, e1) of blocks that span these leaves."""
    x_codec, x_layout, h_codec, h_layout = pairs[0]
    deal_v, deal_h = _dealer(x_codec.value, x_layout), _dealer(h_codec.value, h_layout)
    deal_rest = _pairs_dealer(pairs[1:]) if len(pairs) > 1 else None

    @standalone
    def deal(leaves: Any, i: int, stop: int, e0: int, e1: int, row: int, v: Any, h: Any, width: int) -> None:
        x, x_origin, x_grid, x_elements, hh, h_origin, h_grid, h_elements, size = leaves[0]
        first, last = greatest(e0, 0), least(e1, size)
        if first < last:
            whole = first == 0 and last == size
            deal_v(x, x_origin, x_grid, x_elements, i, stop, first, last, whole, v, row, width)
            deal_h(hh, h_origin, h_grid, h_elements, i, stop, first, last, whole, h, row, width)
            row += last - first
        if deal_rest is not None:
            deal_rest(leaves[1:], i, stop, e0 - size, e1 - size, row, v, h, width)

    return deal


_call_dealer = caller(9)


def dealer_address(pairs: tuple[Pair, ...], leaves: Any) -> int:
    """Where the code is that deals the elements of leaves which are read like this."""
    numbers, plane = [types.int64] * 5, array_of(np.float64)
    return address_of(_pairs_dealer(pairs), typeof(leaves), *numbers, plane, plane, types.int64)


# --- conditioned: solving ------------------------------------------------------------------------

SAFE_TOP, SAFE_UNIT = 2.0**450, 2.0**600
"""Numbers within [1 / SAFE_TOP, SAFE_TOP] may be squared and summed; SAFE_UNIT brings any other there."""

BEYOND = (2.0**128 - 2.0**103) ** 2
"""Squares of norms from here on round to infinity in float32; exact in float64."""

NEAR = 2.0**-20
"""Norms so near their threshold, relatively, are compared by sums that are good for it."""

ROWS, DISTANCE = 12, WIDTH + 8
(UNIT, LIMIT, RATE, SQUARES, SLOPES, BENDS, NORM, MEAN, SPREAD, LOW, HIGH, ACTIVE) = (
    row * DISTANCE for row in range(ROWS)
)
"""Where the numbers of a strip of blocks lie in one work array.

One array at fixed distances, because LLVM gives up on a loop that it would have to check for more
than a few arrays that may overlap. A block is v * UNIT, by a power of two, and LIMIT its threshold;
NORM = ||h v||, MEAN the mean of h weighted by (h v) ** 2, SPREAD = ||v|| / ||h v||. The root RATE of
``|| h v / (h * RATE + LIMIT) || = 1`` is in [LOW, HIGH].
"""


@inner
def _safe_unit(top: float) -> float:
    """A power of two that brings `top` where it may be squared; 1 where it already is."""
    if top > SAFE_TOP:
        return 1.0 / SAFE_UNIT
    return SAFE_UNIT if 0.0 < top < 1.0 / SAFE_TOP else 1.0


BENDING = 2
"""Steps by Halley's method, whose error is the cube of Newton's start; with ordinary metrics none follow."""


def near_enough(rtol: float) -> tuple[float, float]:
    """The relative size of the last step, by Newton or by Halley, for a relative accuracy of `rtol` after it.

    A step from RATE by at most its e-th part changes no ``h * RATE + LIMIT`` by more, so that the derivatives
    of the norm are known up to powers of 1 + e: a Newton step ends within 2 e ** 2 of the root, one of
    Halley within 8 e ** 3, for e <= 0.01. Below the rounding of float64 nothing is to be gained.
    """
    accuracy = max(rtol, 2.0**-53)
    return min(math.sqrt(accuracy / 2), 0.01), min(math.cbrt(accuracy / 8), 0.01)


@standalone
def _classify(t: Any, largest: float, narrow: bool, count: int, s: Any) -> int:
    """Norms and means from plain sums, and what ACTIVE becomes; how many blocks need a closer look.

    ACTIVE: 1 to be solved, 0 for the zero block (LIMIT = 1, RATE = 0) or the unchanged one (LIMIT = 0,
    RATE = 1), -1 for a closer look. Blocks from `count` on, which are not there, are unchanged. Pruned arrays have many
    blocks of zeros: if `narrow`, float32, no other has squares that sum to zero in float64.
    """
    careful = 0
    for b in range(WIDTH):
        j = np.uintp(b)
        squares, plain, limit = s[SQUARES + j], s[SLOPES + j], np.float64(t[j])
        norm = math.sqrt(squares)
        inverse = 1.0 / norm
        ordinary = (
            (squares > 1e-100) & (squares < 1e100) & (plain > 1e-100) & (plain < largest) & (limit < np.inf)
            & (abs(norm - limit) > norm * NEAR)
        )  # fmt: skip
        same = (plain != plain) | (limit == 0.0) | (b >= count)
        state = (1.0 if norm > limit else 0.0) if ordinary else -1.0
        state = 0.0 if same | (narrow & (plain == 0.0)) else state
        careful += 1 if state < 0.0 else 0
        s[ACTIVE + j] = state
        s[LIMIT + j] = 0.0 if same else 1.0
        s[RATE + j] = 1.0 if same else 0.0
        s[UNIT + j] = 1.0
        s[NORM + j] = norm
        s[MEAN + j] = s[BENDS + j] * inverse * inverse
        s[SPREAD + j] = math.sqrt(plain) * inverse
    return careful


@standalone
def _open(t: Any, s: Any) -> int:
    """The bracket of every active block, and where its iteration starts; how many there are.

    The reciprocal norm, times RATE + LIMIT, is a concave function y of RATE / NORM, between
    MEAN * RATE / NORM + tau, its tangent at 0, and RATE / NORM / SPREAD + tau, with tau = LIMIT / NORM. The start
    is exact for z - (1 - 1 / (MEAN * SPREAD)) * (z - tau) ** 2 / z, where z is the tangent: the same slope at
    infinity.
    """
    opened = 0
    for b in range(WIDTH):
        j = np.uintp(b)
        active = s[ACTIVE + j] > 0.0
        norm, spread, reciprocal = s[NORM + j], s[SPREAD + j], 1.0 / s[MEAN + j]
        limit = np.float64(t[j]) * s[UNIT + j]
        inverse, gap = 1.0 / norm, norm - limit
        tau = limit * inverse
        root = math.sqrt(max(0.0, 1.0 - 4.0 * (1.0 - reciprocal / spread) * tau * (gap * inverse)))
        small = (1.0 - 2.0 * tau + root) * 0.5 * spread * norm
        large = 2.0 * tau * gap / (root + 2.0 * tau - 1.0) * reciprocal
        low, high = gap * reciprocal, gap * spread
        start = small if tau < 0.5 else large
        start = start if start < high else high
        start = start if start > low else low
        s[LOW + j], s[HIGH + j] = low, high
        s[LIMIT + j] = limit if active else s[LIMIT + j]
        s[RATE + j] = start if active else s[RATE + j]
        opened += 1 if active else 0
    return opened


@standalone
def _step(bends: bool, falls: bool, near: float, s: Any) -> int:
    """One safeguarded step to the root for every active block, by Halley if it `bends`; how many stay active.

    Newton steps rise to the root of a concave function from its left, so that one which does not has
    reached the rounding of the norm, unless it comes from a start or a Halley step: it still `falls`.
    """
    left, stuck = 0, 0
    floor = 1.0 - near if falls else 0.0
    for b in range(WIDTH):
        j = np.uintp(b)
        active = s[ACTIVE + j] > 0.0
        at, squares, inverse = s[RATE + j], s[SQUARES + j], 1.0 / s[SLOPES + j]
        norm = math.sqrt(squares)
        low = at if norm >= 1.0 else s[LOW + j]
        high = at if norm <= 1.0 else s[HIGH + j]
        newton = (norm - 1.0) * squares * inverse
        bend = 1.5 * (norm - 1.0) * (s[BENDS + j] * inverse * (squares * inverse) - 1.0) if bends else 0.0
        bend = bend if bend < 0.5 else 0.5
        following = at + at * (newton / (1.0 - bend))
        finite = abs(following) < np.inf
        following = following if following > low else low
        following = following if following < high else high
        moves = active & (((following > at * (1.0 + near)) | (following < at * floor)) | (not finite))
        stuck += 1 if active & (not finite) else 0
        s[LOW + j], s[HIGH + j] = low, high
        s[RATE + j] = following if active else at
        s[ACTIVE + j] = 1.0 if moves else 0.0
        left += 1 if moves else 0
    if stuck:  # the norm overflows: the bracket is halved instead
        for b in range(WIDTH):
            if s[ACTIVE + b] > 0.0 and not s[SQUARES + b] < np.inf:
                s[RATE + b] = math.sqrt(s[LOW + b]) * math.sqrt(s[HIGH + b])
    return left


DONE, TOO_MANY_STEPS, LOOK_CLOSER = range(3)
"""How the work of a `solve_kernel` ends."""

_call_looker = caller(12)


@cache
def _looker(exact: bool, narrow: bool) -> Any:
    """``look(deal, leaves, i, stop, b, total, chunk, limit, v, h, width, s)``: decide on block b of a strip.

    By sums that neither overflow nor round amiss.
    """

    @standalone
    def look(
        deal: int, leaves: Any, i: int, stop: int, b: int, total: int, chunk: int, limit: float, v: Any, h: Any,
        width: int, s: Any,
    ) -> None:  # fmt: skip
        make_small()
        top, widest, unit, scale = 0.0, 0.0, 1.0, 1.0
        hi, low, size, size_low, cubes = 0.0, 0.0, 0.0, 0.0, 0.0
        for turn in range(3):
            for e0 in range(0, total, chunk):
                e1 = least(total, e0 + chunk)
                if chunk < total:
                    _call_dealer(deal, leaves, i, stop, e0, e1, 0, v, h, width)
                for k in range(b, (e1 - e0) * width, width):
                    x, c = v[k] * unit, h[k]
                    if turn == 0:
                        top = max(top, abs(x))
                    elif turn == 1:
                        widest = max(widest, c * abs(x))
                        size, error = two_sum(size, x * x)
                        size_low += error
                    else:
                        w = c * x * scale
                        w *= w
                        hi, error = two_sum(hi, w)
                        low += error
                        cubes += w * c
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
            s[LIMIT + b], s[RATE + b] = (1.0, 0.0) if np.isinf(limit) else (0.0, 1.0)
            return
        norm = math.sqrt(hi + low) / scale
        rounded = np.float64(round_root(hi, low)) if exact and scale == 1.0 else norm
        if narrow:
            rounded = np.float64(np.float32(rounded))
        if rounded > limit * unit:
            s[ACTIVE + b] = 1.0
            s[UNIT + b], s[NORM + b] = unit, norm
            s[MEAN + b], s[SPREAD + b] = cubes / (hi + low), math.sqrt(size + size_low) / norm

    return look


def looker_address(exact: bool, narrow: bool, leaves: Any) -> int:
    """Where the code of a `_looker` is. Few problems need it, and it takes a third of a second to compile."""
    numbers, plane = [types.int64] * 5, array_of(np.float64)
    where = types.int64, typeof(leaves), *numbers, types.float64, plane, plane, types.int64, plane
    return address_of(_looker(exact, narrow), *where)


@cache
def solve_kernel(narrow: bool) -> Any:
    """The kernel that solves the blocks [i0, i1): an element becomes ``h / (h + mu)`` of itself.

    Zero blocks get an infinite mu, unchanged ones 0. `deal` is the `dealer_address` of the leaves, `look` their
    `looker_address` or 0. Returns `DONE`, `TOO_MANY_STEPS` where an iteration does not end, or `LOOK_CLOSER` where a
    block needs a closer look and `look` is 0.
    """
    measure_planes, secular_sums = planes.measure_planes(), planes.secular_sums()
    largest = 1e76 if narrow else 1e100

    @kernel
    def solve(
        deal: int, look: int, leaves: Any, i0: int, i1: int, t: Numbers, total: int,
        width: int, max_iter: int, near: float, near_halley: float, v: Any, h: Any, s: Any, limits: Any, mus: Any,
    ) -> int:  # fmt: skip
        make_small()
        chunk = least(total, v.size // width)
        for i in range(i0, i1, width):
            stop = least(i1, i + width)
            count = stop - i
            load_numbers(*t, i, stop, limits)
            clear(s, SQUARES, NORM - SQUARES)
            for e0 in range(0, total, chunk):
                e1 = least(total, e0 + chunk)
                _call_dealer(deal, leaves, i, stop, e0, e1, 0, v, h, width)
                for b in range(0, count, LANES):
                    measure_planes(v, b, h, b, s, SQUARES + b, e1 - e0, width, DISTANCE)
            if _classify(limits, largest, narrow, count, s):
                if look == 0:
                    return LOOK_CLOSER
                for b in range(count):
                    if s[ACTIVE + b] < 0.0:
                        limit = np.float64(limits[b])
                        _call_looker(look, deal, leaves, i, stop, b, total, chunk, limit, v, h, width, s)
            left = _open(limits, s)
            steps = 0
            while left:
                if steps == max_iter:
                    return TOO_MANY_STEPS
                clear(s, SQUARES, NORM - SQUARES)
                for e0 in range(0, total, chunk):
                    e1 = least(total, e0 + chunk)
                    if chunk < total:
                        _call_dealer(deal, leaves, i, stop, e0, e1, 0, v, h, width)
                    for b in range(0, count, LANES):
                        secular_sums(v, b, h, b, s, UNIT + b, s, SQUARES + b, e1 - e0, width, DISTANCE)
                bends = steps < BENDING
                left = _step(bends, steps <= BENDING, near_halley if bends else near, s)
                steps += 1
            for b in range(count):
                mus[np.uintp(i + b)] = s[LIMIT + np.uintp(b)] / s[RATE + np.uintp(b)]
        return DONE

    return solve


# --- conditioned: writing ------------------------------------------------------------------------


@cache
def weigh_kernel(data: Codec, metric: Codec, run: int) -> Any:
    """The kernel that multiplies every element by ``h / (h + mu)``, for blocks [i0, i1).

    `run` is the adjacent elements of a block where the blocks of array and metric lie line by line, else 0.
    """
    scale, weight = data.scale, metric.value

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
                for k in range(least(run, size)):
                    mu[np.uintp(b * run + k)] = mus[i + b]
            for e in range(0, total, run):
                for c in range(0, length, size):
                    x_first, h_first = x_at + place(e, x_elements) + c, h_at + place(e, h_elements) + c
                    for k in range(least(size, length - c)):
                        c = weight(h, h_first + k)
                        scale(x, x_first + k, c / (c + mu[np.uintp(k)]))
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
