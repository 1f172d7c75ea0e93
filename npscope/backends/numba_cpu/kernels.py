"""The loops: serial, GIL-free kernels on a range of blocks, and the arithmetic they share.

A range [i0, i1) counts blocks in row-major order of the grid (scopes outside, blocks of a
scope inside). `grid` and `elements` are int64 tables of (sizes, strides), outermost loop
first; results are dense, entry 0 for block i0. Block i lies at ``origin + place(i, grid)``.

Kernels that touch array memory are made for a codec (`kernels`);
those that only see dense work arrays are plain functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import types

from npscope.backends.numba_cpu import vector_norms, vector_selection
from npscope.backends.numba_cpu.arithmetic import (
    dd_add,
    dd_divide,
    dd_exp,
    dd_log,
    dd_multiply,
    two_sum,
)
from npscope.backends.numba_cpu.codecs import Codec, key_of_float32, key_of_float64
from npscope.backends.numba_cpu.exact import EXACT_WORDS, add_exactly, round_exactly
from npscope.backends.numba_cpu.jit import (
    address_of,
    array_of,
    caller,
    inner,
    inner_any_order,
    kernel,
    make_small,
    standalone,
)
from npscope.backends.numba_cpu.nests import NEST, place
from npscope.backends.numba_cpu.operands import Operand
from npscope.backends.numba_cpu.scalars import SAFE_LEAST, least
from npscope.backends.numba_cpu.totals import INF as INF
from npscope.backends.numba_cpu.totals import ONE as ONE
from npscope.backends.numba_cpu.totals import TWO as TWO
from npscope.backends.numba_cpu.vectors import Format

POWER = 3
"""The fourth code of what a norm is made of: powers of magnitudes."""

EXACT_CHUNK = 1024
"""Terms of float32 magnitudes summed in plain float64 between two compensated additions."""

WIDE_CHUNK = 8
"""The same for float64 terms: 7 roundings, which keeps the norm within 4 ulp."""


# --- from sums to norms --------------------------------------------------------------------------


@kernel
def finish_exact(hi: Any, lo: Any, square: bool, norm: Any, unsure: Any) -> int:
    """Sums to norms: `norm` (float32) and `hi` (the same in float64); counts the blocks it cannot decide.

    The sum is right to 2**-42, so its rounding is certain unless that interval holds a
    midpoint of two floats; such blocks get the lower of the two and are listed in `unsure`.
    """
    count = 0
    for i in range(norm.size):
        total = hi[i] + lo[i]
        if not np.isfinite(hi[i]):
            norm[i] = hi[i]
            continue
        wide = math.sqrt(total) if square else total
        hi[i] = wide
        below = np.float32(wide * (1 - 2.0**-42))
        norm[i] = below
        if below != np.float32(wide * (1 + 2.0**-42)):
            unsure[count] = i
            count += 1
    return count


@kernel
def join(more: Any, more_lo: Any, largest: bool, hi: Any, lo: Any) -> None:
    """Add sums more + more_lo of other elements to those of hi + lo, or take the `largest` of two maxima."""
    for i in range(hi.size):
        if largest:
            if more[i] > hi[i] or np.isnan(more[i]):
                hi[i] = more[i]
        else:
            hi[i], error = two_sum(hi[i], more[i])
            lo[i] += error + more_lo[i]


@kernel
def finish_unsure(sums: Any, unsure: Any, count: int, square: bool, norm: Any) -> None:
    """Round the listed norms by their exact sums."""
    for row in range(count):
        i = unsure[row]
        norm[i] = round_exactly(sums, row * EXACT_WORDS, norm[i], square)


@kernel
def finish_wide(hi: Any, lo: Any, square: bool, norm: Any, unsure: Any) -> int:
    """Sums to norms in float64; lists the blocks whose squares over- or underflowed."""
    count = 0
    for i in range(norm.size):
        total = hi[i] + lo[i] if np.isfinite(hi[i]) else hi[i]
        risky = square and not (hi[i] > SAFE_LEAST and total < np.inf) and not np.isnan(hi[i])
        wide = math.sqrt(total) if square else total
        hi[i] = wide
        norm[i] = wide
        if risky:
            unsure[count] = i
            count += 1
    return count


@kernel
def finish_scaled(hi: Any, lo: Any, top: Any, p: float, norm: Any) -> None:
    """Sums of (|x| / top) ** p to norms; `hi` becomes the norm in float64."""
    precise = norm.itemsize == 8 and p < 1.0
    for i in range(norm.size):
        if top[i] == 0.0 or not np.isfinite(top[i]):
            hi[i] = top[i]
        elif precise:
            h, low = two_sum(hi[i], lo[i])
            if h == 1.0 and low == 0.0:
                hi[i] = norm[i] = top[i]
                continue
            h, low = dd_log(h, low)
            h, low = dd_divide(h, low, p)
            th, tl = dd_log(top[i], 0.0)
            h, low = dd_add(h, low, th, tl)
            if not (h < 710.0):  # NaN where the quotient itself overflows
                hi[i] = np.inf
            else:
                h, low, k = dd_exp(h, low)
                hi[i] = math.ldexp(h + low, k)
        else:
            total = hi[i] + lo[i]
            hi[i] = top[i] * (math.sqrt(total) if p == 2.0 else total ** (1.0 / p))
        norm[i] = hi[i]


@inner
def precise_power(x: float, log_top: float, log_top_low: float, p: float) -> tuple[float, float]:
    """(x / top) ** p as a double-double, 0 < x <= top or x = 0."""
    if x == 0.0:
        return 0.0, 0.0
    h, low = dd_log(x, 0.0)
    h, low = dd_add(h, low, -log_top, -log_top_low)
    h, low = dd_multiply(h, low, p, 0.0)
    h, low, k = dd_exp(h, low)
    return math.ldexp(h, k), math.ldexp(low, k)


@kernel
def finish_largest(top: Any, norm: Any) -> None:
    """Maxima, or magnitudes of single elements, to norms."""
    for i in range(norm.size):
        norm[i] = top[i]


@kernel
def take(chosen: Any, count: int, again: Any, again_wide: Any, norm: Any, wide: Any) -> None:
    """Replace the norms of the `chosen` blocks by those computed again."""
    for row in range(count):
        i = chosen[row]
        norm[i] = again[i]
        wide[i] = again_wide[i]


@kernel
def keys_of_norms(norm: Any, keys: Any) -> None:
    """Ordered integers of norms, in the width of `keys`."""
    for i in range(norm.size):
        if keys.itemsize == 4:
            keys[i] = key_of_float32(norm[i])
        else:
            keys[i] = key_of_float64(np.float64(norm[i]))


# --- numbers over blocks ---------------------------------------------------------------------------


@kernel
def not_below(norm: Any, thresholds: Any, mask: Any) -> None:
    """Mask of the blocks that a hard threshold keeps: not norm < threshold."""
    for i in range(norm.size):
        mask[i] = not (norm[i] < thresholds[i])


@standalone
def read_numbers(buffer: Any, origin: int, grid: Any, repeat: int, i: int, stop: int, out: Any) -> None:
    """The numbers of blocks [i, stop), dense."""
    width, step = grid[0, -1], grid[1, -1]
    start = i
    while i < stop:
        entry = i // repeat
        at = origin + place(entry, grid)
        if repeat > 1 or step == 0:  # one number for several blocks
            after = least(stop, (entry + 1) * repeat if repeat > 1 else i + width - i % width)
            value = buffer[at]
            for j in range(after - i):
                out[np.uintp(i - start + j)] = value
        else:
            after = least(stop, i + width - i % width)
            for j in range(after - i):
                out[np.uintp(i - start + j)] = buffer[at + j * step]
        i = after


Numbers = tuple[int, np.ndarray, int, np.ndarray, int]
"""Numbers over blocks: what reads them, their buffer, origin and grid, and how many blocks in a row each serves.

What reads them is `FILLED` where all blocks have one number: NumPy has filled the work array with it (`fill_in`), once
for many calls, so that no kernel may put another number there.
"""

FILLED = 0

load_numbers = caller(7, optional=True)
"""``load_numbers(*numbers, i, stop, out)`` for compiled functions: those of blocks [i, stop), if not `FILLED` in."""


def numbers_over(leaf: Operand, repeat: int, dtype: np.dtype) -> Numbers:
    """Numbers over blocks, to be read into work arrays of `dtype`."""
    buffer = leaf.buffer
    read = FILLED if leaf.place.is_one_number else _numbers_reader(buffer.dtype, dtype)
    return read, buffer, leaf.origin, leaf.grid, repeat


def fill_in(out: np.ndarray, numbers: Numbers) -> None:
    """Make a work array ready to have the numbers read into it."""
    read, buffer, origin, _, _ = numbers
    if read == FILLED:
        out.fill(buffer[origin])


def room_for(numbers: Numbers, length: int, dtype: np.dtype) -> np.ndarray:
    """A work array for so many of the numbers, ready."""
    out = np.empty(length, dtype=dtype)
    fill_in(out, numbers)
    return out


@cache
def _numbers_reader(unit: np.dtype, dtype: np.dtype) -> int:
    return address_of(read_numbers, array_of(unit), types.int64, NEST, *[types.int64] * 3, array_of(dtype))


@kernel
def gather(buffer: Any, origin: int, grid: Any, repeat: int, i0: int, i1: int, out: Any) -> None:
    """The numbers of blocks [i0, i1), of a grid in which each serves `repeat` blocks in a row, dense."""
    read_numbers(buffer, origin, grid, repeat, i0, i1, out)


@kernel
def scatter(numbers: Any, i0: int, i1: int, buffer: Any, origin: int, grid: Any) -> None:
    """Dense numbers to entries [i0, i1) of a strided grid; where its rows are columns in memory, column by column."""
    run, step = grid[0, -1], np.uintp(grid[1, -1])
    turned = grid.shape[1] > 1 and abs(grid[1, -2]) < abs(grid[1, -1])
    across = np.uintp(grid[1, -2] if turned else 0)
    i = i0
    while i < i1:
        count, rows = least(i1 - i, run - i % run), 1
        if turned and count == run:
            rows = least((i1 - i) // run, grid[0, -2] - i // run % grid[0, -2])
        at, first = np.uintp(origin + place(i, grid)), np.uintp(i - i0)
        for j in range(np.uintp(count)):
            for r in range(np.uintp(rows)):
                buffer[at + j * step + r * across] = numbers[first + j + r * np.uintp(run)]
        i += count * rows


# --- kernels on array memory ---------------------------------------------------------------------


@cache
def kernels(codec: Codec) -> SimpleNamespace:
    """The kernels that read one array, for its codec."""
    magnitude = codec.magnitude

    @inner_any_order
    def run_sum(buffer: Any, at: int, step: int, count: int, square: bool) -> float:
        total = 0.0
        if square:
            for e in range(count):
                x = magnitude(buffer, at + e * step)
                total += x * x
        else:
            for e in range(count):
                total += magnitude(buffer, at + e * step)
        return total

    @inner
    def run_max(buffer: Any, at: int, step: int, count: int, top: float) -> float:
        for e in range(count):
            x = magnitude(buffer, at + e * step)
            if x > top or np.isnan(x):
                top = x
        return top

    @kernel
    def accumulate(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, e0: int, e1: int,
        code: int, chunk: int, hi: Any, lo: Any,
    ) -> None:  # fmt: skip
        """Add elements [e0, e1) of every block to its sum hi + lo, or their maximum to hi (code INF)."""
        run, step = elements[0, -1], elements[1, -1]
        width, stride = grid[0, -1], grid[1, -1]
        e = e0
        while e < e1:
            count = least(least(e1 - e, run - e % run), chunk)
            start = origin + place(e, elements)
            i = i0
            while i < i1:
                stop = least(i1, i + width - i % width)
                at = start + place(i, grid)
                for j in range(stop - i):
                    block, here = np.uintp(i - i0 + j), at + j * stride
                    if code != INF:
                        hi[block], error = two_sum(hi[block], run_sum(buffer, here, step, count, code == TWO))
                        lo[block] += error
                    elif not np.isnan(hi[block]):
                        hi[block] = run_max(buffer, here, step, count, hi[block])
                i = stop
            e += count

    @kernel
    def accumulate_scaled(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, e0: int, e1: int,
        top: Any, p: float, precise: bool, hi: Any, lo: Any,
    ) -> None:  # fmt: skip
        """Add (|x| / top) ** p of elements [e0, e1) of every block to its sum hi + lo.

        `precise` takes the powers in double-double: the root will multiply their error by 1 / p.
        """
        run, step = elements[0, -1], elements[1, -1]
        for i in range(i0, i1):
            largest = top[i - i0]
            if largest == 0.0 or not np.isfinite(largest):
                continue
            at = origin + place(i, grid)
            a, b = hi[i - i0], lo[i - i0]
            th, tl = dd_log(largest, 0.0) if precise else (0.0, 0.0)
            e = e0
            while e < e1:
                count = least(e1 - e, run - e % run)
                first = at + place(e, elements)
                for j in range(count):
                    x = magnitude(buffer, first + j * step)
                    if precise:
                        h, low = precise_power(x, th, tl, p)
                    else:
                        x /= largest
                        h, low = (x * x if p == 2.0 else x**p), 0.0
                    a, error = two_sum(a, h)
                    b += error + low
                e += count
            hi[i - i0], lo[i - i0] = a, b

    @kernel
    def accumulate_exactly(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, chosen: Any, count: int, total: int,
        square: bool, sums: Any,
    ) -> None:  # fmt: skip
        """Add all elements of the `chosen` blocks (counted from i0) to their exact sums."""
        for row in range(count):
            at = origin + place(i0 + chosen[row], grid)
            for e in range(total):
                x = np.float32(magnitude(buffer, at + place(e, elements)))
                add_exactly(sums, row * EXACT_WORDS, x, square)

    return SimpleNamespace(
        accumulate=accumulate,
        accumulate_scaled=accumulate_scaled,
        accumulate_exactly=accumulate_exactly,
    )


@cache
def _counter(codec: Codec, form: Format | None) -> Any:
    """``count(buffer, origin, grid, elements, i0, i1, total, most)``: elements whose magnitude is not `most` or less.

    Of adjacent ones, of a `form`, the bits of magnitudes are compared, and `most` is an integer.
    """
    if form is not None:
        count_magnitudes = vector_selection.count_magnitudes_above(form)

        @kernel
        def count(buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, total: int, most: int) -> int:
            make_small()
            found: int = count_magnitudes(
                buffer, origin, grid, 0, grid.shape[1], elements, 0, elements.shape[1], i0, i1, total, most
            )
            return found

        return count

    magnitude = codec.magnitude

    @inner
    def above(buffer: Any, at: int, run: int, step: int, most: float) -> int:
        found = 0
        for r in range(run):
            found += 0 if magnitude(buffer, at + r * step) <= most else 1
        return found

    @kernel
    def count_apart(
        buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, total: int, most: float
    ) -> int:
        found = 0
        width, step = grid[0, -1], grid[1, -1]
        for e in range(total):
            start = origin + place(e, elements)
            i = i0
            while i < i1:
                run = least(i1 - i, width - i % width)
                found += above(buffer, start + place(i, grid), run, step, most)
                i += run
        return found

    return count_apart


def count_above(leaf: Operand, eps: float) -> Callable[[int, int], int]:
    """What counts the elements of blocks [i0, i1) of which |x| is not `eps` or less."""
    form = _form_of_lines(leaf)
    count = _counter(leaf.codec, form)
    most = eps if form is None else _bits_up_to(eps, leaf.array.dtype, form)
    return lambda i0, i1: int(count(*leaf.where, i0, i1, leaf.size, most))


def _bits_up_to(eps: float, dtype: np.dtype, form: Format) -> int:
    """The bits of the largest number of a dtype that is not above `eps`."""
    with np.errstate(over="ignore"):
        near = np.asarray([eps]).astype(dtype)
    return min(int(near.view(f"u{dtype.itemsize}")[0]), form.inf) - (float(near[0]) > eps)


def _form_of_lines(leaf: Operand) -> Format | None:
    """The format of floats whose blocks' elements are adjacent to those of the next block."""
    layout = leaf.float_layout
    return layout.form if layout is not None and layout.run == 1 else None


def sum_of_squares(leaf: Operand, i0: int, i1: int) -> float:
    """The sum of |x| ** 2 of the elements of blocks [i0, i1), in any order."""
    found: float = _adder_of_squares(leaf.codec, _form_of_lines(leaf))(*leaf.where, i0, i1, leaf.size)
    return found


@cache
def _adder_of_squares(codec: Codec, form: Format | None) -> Any:
    """``add(buffer, origin, grid, elements, i0, i1, total)``: the sum of |x| ** 2, in any order."""
    if form is not None:
        add_squares = vector_norms.add_squares(form)

        @kernel
        def add(buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, total: int) -> float:
            make_small()
            found: float = add_squares(
                buffer, origin, grid, 0, grid.shape[1], elements, 0, elements.shape[1], i0, i1, total
            )
            return found

        return add

    magnitude = codec.magnitude

    @inner_any_order
    def add_run(buffer: Any, at: int, run: int, step: int) -> float:
        found = 0.0
        for r in range(run):
            size = magnitude(buffer, at + r * step)
            found += size * size
        return found

    @kernel
    def add_apart(buffer: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, total: int) -> float:
        found = 0.0
        width, step = grid[0, -1], grid[1, -1]
        for e in range(total):
            start = origin + place(e, elements)
            i = i0
            while i < i1:
                run = least(i1 - i, width - i % width)
                at = start + place(i, grid)
                found += add_run(buffer, at, run, 1) if step == 1 else add_run(buffer, at, run, step)
                i += run
        return found

    return add_apart
