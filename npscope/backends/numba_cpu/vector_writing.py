"""Strips of blocks that are written, for LLVM: blocks in rows are dropped, or multiplied by a factor each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu.rows import TOGETHER, Ahead, Grid, Rows, Runs, Strip, over_rows, shape_of
from npscope.backends.numba_cpu.vectors import (
    INT32,
    Builder,
    Format,
    Value,
    copy_rows,
    fma,
    load,
    shuffle,
    spare_room,
    splat,
    step,
    store,
    vector_of,
)

Taking = Callable[[Builder, Value], Callable[[Value], None]]
"""``taking(b, address of the numbers of some blocks)(address of their elements in one row)``."""


def _write_strip(form: Format, runs: Runs, together: int, taking: Taking) -> Any:
    """``(target, origin, grid, 0, loops, elements, 0, turns, i, stop, numbers, 0)``: write the rows of a strip.

    Of blocks [i, stop) of a `target` whose first one is at `origin`, with a number for each, `together` at a time. The
    `grid` and the `elements` of a block are tables of so many loops.
    """

    def emit(
        b: Builder, target: Value, grid: Value, loops: Value, elements: Value, turns: Value, i: Value, stop: Value,
        numbers: Value,
    ) -> None:  # fmt: skip
        strip = Strip(Grid(target, grid, loops), elements, turns, i, stop)

        def take(rows: Rows) -> None:
            own = b.gep(numbers, [rows.block])
            _take_rows(b, rows, runs, together, own, Ahead(b, form.bits, rows, flat=runs.flat), partial(taking, b))

        over_rows(b, strip, runs, shape_of(b, strip, runs), take)

    return step(emit, 12)


def _take_rows(
    b: Builder, here: Rows, runs: Runs, together: int, numbers: Value, ahead: Ahead,
    taking: Callable[[Value], Callable[[Value], None]],
) -> None:  # fmt: skip
    """``taking(address of their numbers)(address of their elements)`` for all rows of blocks, `together` at a time.

    Blocks that are fewer take a detour over memory of which nothing is kept behind them. `together` is 1, or blocks of
    whole lines.
    """
    source, _, count, _, rows, step, *_ = here
    run = runs.length
    word, length = count.type, together * run
    several = together > 1
    spare_elements, spare_numbers = (
        spare_room(b, size, place) if several else place
        for place, size in ((source, TOGETHER * length), (numbers, together))
    )
    with cgutils.for_range_slice(b, word(0), count, word(together)) as (block, _):
        first, own = b.gep(source, [b.mul(block, word(run))]), b.gep(numbers, [block])
        left = b.sub(count, block)
        are_few, elements_left = b.icmp_signed("<", left, word(together)), b.mul(left, word(run))
        elements, distance = cgutils.alloca_once_value(b, first), cgutils.alloca_once_value(b, step)
        if several:
            with b.if_then(are_few, likely=False):
                copy_rows(b, own, word(0), spare_numbers, word(0), word(1), left, together)
                copy_rows(b, first, step, spare_elements, word(length), rows, elements_left, length)
                b.store(spare_elements, elements)
                b.store(word(length), distance)
            own = b.select(are_few, spare_numbers, own)
        take = taking(own)
        if runs.flat:
            ahead.fetch(length)
            take(b.load(elements))
        else:
            with cgutils.for_range(b, rows) as loop:
                ahead.fetch(length)
                take(b.gep(b.load(elements), [b.mul(loop.index, b.load(distance))]))
        if several:
            with b.if_then(are_few, likely=False):
                copy_rows(b, spare_elements, word(length), first, step, rows, elements_left, length, back=True)


LINES, FLAT_LINES = 2, 4
"""Lines that are written in one step, of short blocks, and of those that are single rows.

Four take a fifth less than two, for 1x4 in cache. Of others rows of eight blocks took up to twice the time.
"""


def _in_a_step(form: Format, flat: bool) -> int:
    """Elements that are written in one step."""
    return (FLAT_LINES if flat else LINES) * form.lanes


@cache
def drop_strip(form: Format, runs: Runs) -> Any:
    """`_write_strip` that zeroes the blocks whose mask is False, of runs that fit a few vectors."""
    run = runs.length
    together = form.lanes // math.gcd(form.lanes, run)  # whole lines
    together *= max(1, _in_a_step(form, runs.flat) // (together * run))

    def dropping(b: Builder, place: Value) -> Callable[[Value], None]:
        flags = load(b, place, vector_of(8, together))
        wide = b.sext(b.icmp_unsigned("!=", flags, splat(flags.type, 0)), vector_of(form.bits, together))
        length = run * together
        lines = [range(start, min(start + form.lanes, length)) for start in range(0, length, form.lanes)]
        kept = [shuffle(b, wide, [i // run for i in line]) for line in lines]

        def drop(at: Value) -> None:
            for line, stays in zip(lines, kept, strict=True):
                here = b.gep(at, [INT32(line.start)])
                store(b, b.and_(load(b, here, stays.type), stays), here)

        return drop

    return _write_strip(form, runs, together, dropping)


@cache
def scale_strip(form: Format, runs: Runs, shrinks: bool) -> Any:
    """`_write_strip` that multiplies float32 or float64 by a float64 for each block.

    0 writes +0.0, 1 keeps the bits; else float32 is within 1 ulp of the product, of which 1 in 2 ** 20 is not the
    nearest number, and more below 2 ** -100 if it `shrinks`: a factor then is 0 or from 2 ** -60 to 1.
    """
    run = runs.length
    together = _in_a_step(form, runs.flat) // run if form.lanes % run == 0 else 1
    length = run * together
    few, single = ir.VectorType(ir.DoubleType(), together), ir.VectorType(ir.FloatType(), together)
    words, lanes = vector_of(form.bits, length), [i // run for i in range(length)]

    def without_strange(b: Builder, factor: Value, replaced: Value, high: Value, low: Value) -> tuple[Value, Value]:
        """What is replaced must not look unusual when it is multiplied, and strange factors must."""
        size = b.and_(b.bitcast(factor, vector_of(64, together)), splat(vector_of(64, together), (1 << 63) - 1))
        least, range_ = (splat(size.type, (1023 + 64 * side << 52) - 1) for side in (-1, 1))
        strange = b.icmp_unsigned(">=", b.sub(size, least), b.sub(range_, least))
        high = b.select(replaced, splat(single, 1.0), b.select(strange, splat(single, math.nan), high))
        return high, b.select(replaced, splat(single, 0.0), low)

    def settled(b: Builder, product: Value, x: Value, factor: Value) -> Value:
        """The product, but for zeros, which have a sign to keep, and what is lost of small or infinite numbers."""
        bits = b.bitcast(product, words)
        place = cgutils.alloca_once_value(b, product)
        size = b.and_(bits, splat(words, (1 << 31) - 1))
        least, range_ = (splat(words, 127 + 100 * side << 23) for side in (-1, 1))
        unusual = b.icmp_unsigned(">=", b.sub(size, least), b.sub(range_, least))
        flags = ir.IntType(length)
        with b.if_then(b.icmp_unsigned("!=", b.bitcast(unusual, flags), flags(0)), likely=False):
            wide = b.fmul(b.fpext(x, ir.VectorType(ir.DoubleType(), length)), shuffle(b, factor, lanes))
            b.store(b.fptrunc(wide, product.type), place)
        return b.load(place)

    def scaling(b: Builder, place: Value) -> Callable[[Value], None]:
        factor = b.load(b.bitcast(place, few.as_pointer()), align=8)
        same, zero = (b.fcmp_ordered("==", factor, splat(few, number)) for number in (1.0, 0.0))
        replaced = b.or_(same, zero)
        # Masks as wide as elements: of flags, AVX2 makes such masks again in each row.
        wide = vector_of(form.bits, together)
        stays, changes = (shuffle(b, b.sext(flags, wide), lanes) for flags in (same, b.not_(replaced)))

        def replace(at: Value, bits: Value, product: Value) -> None:
            store(b, b.or_(b.and_(bits, stays), b.and_(b.bitcast(product, words), changes)), at)

        if form.bits == 64:
            factor = shuffle(b, factor, lanes)

            def multiply(at: Value) -> None:
                bits = load(b, at, words)
                replace(at, bits, b.fmul(b.bitcast(bits, factor.type), factor))

            return multiply

        # As two float32: products are right to 2 ** -46 before they are rounded, at a third of the cost.
        # The first is cut off, not rounded: none is negative if the factor is not, so that zeros keep their sign.
        # Those of others are `settled`.
        digits = b.bitcast(factor, vector_of(64, together))
        first = b.bitcast(b.and_(digits, splat(digits.type, -1 << 29)), few)
        high, low = (b.fptrunc(part, single) for part in (first, b.fsub(factor, first)))
        if not shrinks:
            high, low = without_strange(b, factor, replaced, high, low)
        high, low = (shuffle(b, v, lanes) for v in (high, low))

        def scale(at: Value) -> None:
            bits = load(b, at, words)
            x = b.bitcast(bits, high.type)
            product = fma(b, x, high, b.fmul(x, low))
            replace(at, bits, product if shrinks else settled(b, product, x, factor))

        return scale

    return _write_strip(form, runs, together, scaling)
