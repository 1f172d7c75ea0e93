"""The loops of the proximal step in a diagonal metric: solve strips of blocks side by side, and write each at once.

The elements of a strip of blocks are dealt into planes, the first elements of all blocks, the second ones, and so on,
so that every step of the iteration works on vectors of blocks (`secular`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import types

from npscope.backends.numba_cpu import planes, secular, vector_search, vector_shrinkage
from npscope.backends.numba_cpu.codecs import Function
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, kernel, make_small, standalone
from npscope.backends.numba_cpu.kernels import Numbers, load_numbers
from npscope.backends.numba_cpu.nests import NEST, place
from npscope.backends.numba_cpu.operands import Layout
from npscope.backends.numba_cpu.scalars import greatest, least
from npscope.backends.numba_cpu.secular import PAIRS, RATE, WIDTH
from npscope.backends.numba_cpu.vectors import LANES, Format, copy_numbers

# --- looking at the metric ----------------------------------------------------------


@kernel
def ends_of(words: Any, i0: int, i1: int) -> tuple[int, int]:
    """The least and the largest of entries [i0, i1)."""
    make_small()
    ends: tuple[int, int] = vector_search.ends_of(words, i0, i1 - i0)
    return ends


# --- dealing ------------------------------------------------------------------------

PLANES = 1 << 15
"""Numbers in the planes of one operand at most, 128 KiB or twice that; larger blocks are dealt again for every step."""

STRIP_NUMBERS = 2048
"""Numbers in the planes where that gives a strip of a few vectors of blocks: 16 or 32 KiB for both operands."""


def strip_pitch(elements: int) -> int:
    """How far rows of planes lie apart, for blocks of that many elements: for a multiple of `LANES` blocks, and more.

    Behind the blocks is room for `LANES` numbers that mean nothing.
    """
    return min(WIDTH, max(LANES, STRIP_NUMBERS // elements // LANES * LANES)) + LANES


def plane_numbers(elements: int) -> int:
    """Numbers in the planes of one operand, of blocks of that many elements."""
    return min(elements * strip_pitch(elements), PLANES)


def in_parts(elements: int) -> bool:
    """Whether such blocks are too large for planes, and dealt in parts."""
    return plane_numbers(elements) < elements * strip_pitch(elements)


@cache
def _dealer(read: Function, layout: Layout | None) -> Any:
    """``deal(leaf, i, stop, e0, e1, row, out, pitch)``: elements [e0, e1) of blocks into planes from `row` on.

    A leaf has all of these elements; with a layout they are all that it has. `LANES` more places than blocks are
    written.
    """
    if layout is not None and layout.form.bits <= 32 and (layout.run in (1, 2, 4, 8) or layout.run % LANES == 0):
        return _run_dealer(layout.form, layout.run)
    return _element_dealer(read)


@cache
def _element_dealer(read: Function) -> Any:
    """The `_dealer` of any blocks."""

    @standalone
    def deal(leaf: Any, i: int, stop: int, e0: int, e1: int, row: int, out: Any, pitch: int) -> None:
        buffer, origin, grid, elements, _ = leaf
        size, step = elements[0, -1], elements[1, -1]
        width, stride = grid[0, -1], grid[1, -1]
        start = i
        while i < stop:
            after = least(stop, i + width - i % width)
            at = origin + place(i, grid)
            for j in range(after - i):
                e = e0
                while e < e1:
                    run_stop = least(e1, e + size - e % size)
                    source = at + j * stride + place(e, elements) - e * step
                    target = (row - e0) * pitch + i - start + j
                    for k in range(e, run_stop):
                        out[np.uintp(target + k * pitch)] = read(buffer, source + k * step)
                    e = run_stop
            i = after

    return deal


@cache
def _run_dealer(form: Format, run: int) -> Any:
    """The `_dealer` of blocks that lie line by line, in runs of so many elements."""
    deal_strip = planes.deal_strip(form, run)

    @standalone
    def deal(leaf: Any, i: int, stop: int, e0: int, e1: int, row: int, out: Any, pitch: int) -> None:
        make_small()
        buffer, origin, grid, elements, _ = leaf
        deal_strip(buffer, origin, grid, 0, grid.shape[1], elements, 0, elements.shape[1], i, stop, row, out, 0, pitch)

    return deal


Reading = tuple[Any, Layout | None]
"""How the elements of a leaf are read."""


def chained(leaves: Sequence[Any]) -> Any:
    """A single leaf, or a pair of the first one and the others, chained likewise: what code takes that spans leaves."""
    return leaves[0] if len(leaves) == 1 else (leaves[0], chained(leaves[1:]))


def type_of_chain(readings: Sequence[Reading]) -> Any:
    """The Numba type of leaves that are `chained`."""
    unit = array_of(readings[0][0].unit)
    leaf = types.Tuple([unit, types.int64, NEST, NEST, types.int64])
    return leaf if len(readings) == 1 else types.Tuple([leaf, type_of_chain(readings[1:])])


@cache
def _chain_dealer(readings: tuple[Reading, ...]) -> Any:
    """``deal(leaves, ...)``: as a `_dealer`, of blocks that span leaves, which have all of these elements together."""
    codec, layout = readings[0]
    deal_first = _dealer(codec.value, layout)
    if len(readings) == 1:
        return deal_first
    deal_others = _chain_dealer(readings[1:])

    @standalone
    def deal(leaves: Any, i: int, stop: int, e0: int, e1: int, row: int, out: Any, pitch: int) -> None:
        make_small()
        leaf, others = leaves
        size = leaf[-1]
        last, first = least(e1, size), greatest(e0 - size, 0)
        if e0 < last:
            deal_first(leaf, i, stop, e0, last, row, out, pitch)
            row += last - e0
        if first < e1 - size:
            deal_others(others, i, stop, first, e1 - size, row, out, pitch)

    return deal


_call_dealer = caller(8)


@cache
def dealer_address(readings: tuple[Reading, ...], elements: int, plane: np.dtype) -> int:
    """Where the code is that deals blocks of so many elements, which are read like this, into planes of this dtype."""
    leaves = type_of_chain(readings)
    if in_parts(elements):
        readings = tuple((codec, None) for codec, _ in readings)
    return address_of(_chain_dealer(readings), leaves, *[types.int64] * 5, array_of(plane), types.int64)


# --- writing ------------------------------------------------------------------------


@cache
def _weigher(reading: Reading, metric: Reading, paired: bool) -> Any:
    """``weigh(leaf, weights, i, stop, s)``: multiply every element of a strip of blocks by ``h / (h + mu)``.

    With mu from RATE, or where both lie in equal runs of 32 bits or less, and if `paired`, from PAIRS.
    """
    (x_codec, x_layout), (h_codec, h_layout) = reading, metric
    if x_layout is not None and h_layout is not None and x_layout.run == h_layout.run:
        narrow = x_layout.form.bits <= 32 and h_layout.form.bits <= 32
        return _line_weigher(x_layout.form, h_layout.form, x_layout.run, paired and narrow)
    scale, weight = x_codec.scale, h_codec.value

    @standalone
    def weigh(leaf: Any, weights: Any, i: int, stop: int, s: Any) -> None:
        (x, x_origin, x_grid, x_elements, size), (h, h_origin, h_grid, h_elements, _) = leaf, weights
        x_run, h_run, x_step, h_step = x_elements[0, -1], h_elements[0, -1], x_elements[1, -1], h_elements[1, -1]
        for b in range(i, stop):
            x_at, h_at, mu = x_origin + place(b, x_grid), h_origin + place(b, h_grid), s[RATE + b - i]
            e = 0
            while e < size:
                after = least(size, e + least(x_run - e % x_run, h_run - e % h_run))
                x_first, h_first = x_at + place(e, x_elements), h_at + place(e, h_elements)
                for k in range(after - e):
                    c = weight(h, h_first + k * h_step)
                    scale(x, x_first + k * x_step, c / (c + mu))
                e = after

    return weigh


@cache
def _line_weigher(form: Format, metric_form: Format, run: int, paired: bool) -> Any:
    """The `_weigher` of blocks that lie line by line in memory, in runs of so many adjacent elements."""
    weigh_strip, mus = vector_shrinkage.weigh_strip(form, metric_form, run, paired), PAIRS if paired else RATE

    @standalone
    def weigh(leaf: Any, weights: Any, i: int, stop: int, s: Any) -> None:
        make_small()
        (x, x_origin, x_grid, x_elements, size), (h, h_origin, h_grid, h_elements, _) = leaf, weights
        weigh_strip(
            x, x_origin, x_grid, 0, x_grid.shape[1], x_elements, 0, x_elements.shape[1],
            h, h_origin, h_grid, 0, h_grid.shape[1], h_elements, 0, h_elements.shape[1], i, stop, size, s, mus,
        )  # fmt: skip

    return weigh


@cache
def _chain_weigher(readings: tuple[Reading, ...], metric: tuple[Reading, ...], paired: bool) -> Any:
    """``weigh(leaves, weights, ...)``: as a `_weigher`, of blocks that span leaves."""
    weigh_first = _weigher(readings[0], metric[0], paired)
    if len(readings) == 1:
        return weigh_first
    weigh_others = _chain_weigher(readings[1:], metric[1:], paired)

    @standalone
    def weigh(leaves: Any, weights: Any, i: int, stop: int, s: Any) -> None:
        make_small()
        weigh_first(leaves[0], weights[0], i, stop, s)
        weigh_others(leaves[1], weights[1], i, stop, s)

    return weigh


call_weigher = caller(5)


@cache
def weigher_address(readings: tuple[Reading, ...], metric: tuple[Reading, ...], paired: bool) -> int:
    """Where the code is that writes strips of blocks which are read like this, with mu in PAIRS if `paired`."""
    chains = [type_of_chain(leaves) for leaves in (readings, metric)]
    weigh = _chain_weigher(readings, metric, paired)
    return address_of(weigh, *chains, types.int64, types.int64, array_of(np.float64))


# --- solving ------------------------------------------------------------------------

BENDING = 2
"""Steps by Halley's method, whose error is the cube of Newton's start; with ordinary metrics none follow."""


SHORT = 1.0 - 2.0**-40
"""Squares of norms below this are not 1 but for rounding, be they sums of thousands."""


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


@standalone
def _deal_both(
    deal_v: int, deal_h: int, leaves: Any, weights: Any, i: int, stop: int, e0: int, e1: int, v: Any, h: Any, pitch: int
) -> None:
    """Elements [e0, e1) of blocks [i, stop) and of their metric into planes."""
    _call_dealer(deal_v, leaves, i, stop, e0, e1, 0, v, pitch)
    _call_dealer(deal_h, weights, i, stop, e0, e1, 0, h, pitch)


@cache
def solve_kernel(exact: bool, narrow: bool, single: bool, quick: bool) -> Any:
    """The kernel that solves the blocks [i0, i1) strip by strip, and multiplies their elements by ``h / (h + mu)``.

    Zero blocks get an infinite mu, unchanged ones 0. Norms are `exact`, `narrow` ones float32, and planes if they are
    `single`; all that comes before sums in float64 is done in float32 if blocks are `quick`: `single` ones of up to
    `QUICK_ELEMENTS`, in an ordinary metric. These are never dealt again, and what they do not need is not compiled.
    `deal_v`, `deal_h` and `weigh` are the `dealer_address` of the leaves and of the `weights` in the metric, and the
    `weigher_address` of both, or 0 for `mus` to be written instead. Returns whether all iterations ended.
    """
    measure, classify, begin_quickly = secular.measure(), secular.classify(narrow), secular.begin_quickly()
    look, turns, decide = secular.look(single), secular.looks(single), secular.decide(exact, narrow, single)
    sum_secular, advance, approach = secular.sum_secular(single), secular.advance(single), secular.approach()
    begin, finish = secular.begin(single), secular.finish(single)

    @kernel
    def solve(
        deal_v: int, deal_h: int, weigh: int, leaves: Any, weights: Any, i0: int, i1: int, t: Numbers, total: int,
        pitch: int, max_iter: int, near: float, near_halley: float, mus: Any, v: Any, h: Any, s: Any, limits: Any,
    ) -> bool:  # fmt: skip
        make_small()
        chunk = least(total, v.size // pitch)
        for i in range(i0, i1, pitch - LANES):
            stop = least(i1, i + pitch - LANES)
            count = stop - i
            load_numbers(*t, i, stop, limits)
            for e0 in range(0, total, chunk):
                e1 = least(total, e0 + chunk)
                _deal_both(deal_v, deal_h, leaves, weights, i, stop, e0, e1, v, h, pitch)
                if not quick:
                    measure(v, 0, h, 0, s, 0, count, e0, e1, pitch)
            if quick:
                counts = begin_quickly(v, 0, h, 0, s, 0, limits, 0, count, total, pitch)
                careful, left = divmod(counts, secular.MANY)  # blocks that need a closer look, and that are sought
            else:
                careful, left = classify(s, 0, limits, 0, count), 0
            if careful:
                for turn in range(turns):
                    for e0 in range(0, total, chunk):
                        e1 = least(total, e0 + chunk)
                        if not quick and chunk < total:
                            _deal_both(deal_v, deal_h, leaves, weights, i, stop, e0, e1, v, h, pitch)
                        look(v, 0, h, 0, s, 0, count, e0, e1, pitch, turn)
                decide(s, 0, limits, 0, count)
            if careful or not quick:
                left = begin(s, 0, limits, 0, count)
            if single and not quick and left and chunk == total:
                approach(v, 0, h, 0, s, 0, count, total, pitch)
            steps = 0
            while left:
                if steps == max_iter:
                    return False
                bends = steps < BENDING
                close, short = near_halley if bends else near, 1.0 if steps <= BENDING else SHORT
                for e0 in range(0, total, chunk):
                    e1 = least(total, e0 + chunk)
                    if not quick and chunk < total:
                        _deal_both(deal_v, deal_h, leaves, weights, i, stop, e0, e1, v, h, pitch)
                    sum_secular(v, 0, h, 0, s, 0, count, e0, e1, pitch)
                left = advance(s, 0, count, close, 1.0 - near, short, bends)
                steps += 1
            finish(s, 0, count)
            if weigh:
                call_weigher(weigh, leaves, weights, i, stop, s)
            else:
                copy_numbers(s, RATE, count, mus, i)
        return True

    return solve


@kernel
def weigh_blocks(weigh: int, leaves: Any, weights: Any, i0: int, i1: int, mus: Any, s: Any) -> None:
    """Multiply the elements of blocks [i0, i1) by ``h / (h + mu)``, with the mu of each block."""
    for i in range(i0, i1, WIDTH):
        stop = least(i1, i + WIDTH)
        copy_numbers(mus, i, stop - i, s, RATE)
        call_weigher(weigh, leaves, weights, i, stop, s)
