"""The steps of shrinkage inside a vector: of single elements, and of conditioned blocks."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu.nests import place_in
from npscope.backends.numba_cpu.rows import Grid, over_ranges, smallest
from npscope.backends.numba_cpu.vectors import (
    LANES,
    LINE,
    Builder,
    Format,
    Value,
    first_lanes,
    fma,
    load,
    load_masked,
    prefetch,
    rounded_to,
    shuffle,
    single_of,
    splat,
    step,
    store,
    store_masked,
    vector_of,
)


@cache
def soften(form: Format) -> Any:
    """``soften(array, index, limits, j)``: a line of float32 or float64 towards zero, each by its limit.

    +0.0 where the magnitude is at most the limit; NaN stays. A limit of -0.0 lets everything stay, one of +0.0
    clears the sign of zeros.
    """
    bits = vector_of(form.bits, form.lanes)
    number = ir.VectorType(ir.FloatType() if form.bits == 32 else ir.DoubleType(), form.lanes)
    sign, one, inf = splat(bits, 1 << (form.bits - 1)), splat(bits, 1), splat(bits, form.inf)

    def emit(b: Builder, array: Value, limits: Value) -> None:
        x, limit = load(b, array, bits), load(b, limits, bits)
        prefetch(b, array, LINE)
        side = b.and_(x, sign)
        size = b.xor(x, side)
        shift = b.bitcast(b.or_(side, limit), number)
        moved = b.bitcast(b.fsub(b.bitcast(x, number), shift), bits)
        # Zeros, too: one minus a zero of its own sign is +0.0.
        stays = b.icmp_unsigned(">=", b.sub(size, one), inf)
        gone = b.icmp_signed("<=", size, limit)
        store(b, b.select(gone, splat(bits, 0), b.select(stays, x, moved)), array)

    return step(emit, 4)


@cache
def weigh_strip(form: Format, metric: Format, run: int, paired: bool) -> Any:
    """``(array, o, grid, 0, loops, elements, 0, turns, h, .., turns2, i, stop, size, mus, k)``: blocks in a metric.

    The elements of blocks [i, stop), floats of 16 bits and more, times ``h / (h + mu)``. Arrays start at `o`, grids and
    elements are tables of so many loops, and each run of `run` adjacent elements, of `size` in all, has the mu of its
    block; a power of two of these is read, up to `LANES`. +0.0 where mu is infinite; where it is 0 elements stay. A mu
    is a float64, or if `paired` two float32, for floats of at most 32 bits: products are right to 2 ** -44 before they
    are rounded, in two thirds of the time, where h is within a factor of 2 ** 40 of 1, h + mu of 2 ** 100, and
    h / (h + mu) of 2 ** 90.
    """
    word, together = ir.IntType(64), max(1, LANES // run)  # blocks to a vector
    bits, metric_bits = vector_of(form.bits, LANES), vector_of(metric.bits, LANES)
    single, double = (ir.VectorType(element, LANES) for element in (ir.FloatType(), ir.DoubleType()))
    owners = [i // run for i in range(LANES)]
    count = 1 << owners[-1].bit_length()
    owned = ir.VectorType(ir.FloatType(), 2 * count) if paired else ir.VectorType(ir.DoubleType(), count)

    def wide(b: Builder, number: Value, form: Format) -> Value:
        return b.bitcast(number, double) if form.bits == 64 else b.fpext(single_of(b, number, form, "keep"), double)

    def weighed(b: Builder, x: Value, weights: Value, mus: Value) -> tuple[Value, Value, Value]:
        """The product, and where it is +0.0 and where the element itself instead."""
        c, mu = wide(b, weights, metric), shuffle(b, mus, owners)
        factor = b.fdiv(c, b.fadd(c, mu))
        product = b.fmul(wide(b, x, form), factor)
        found = b.bitcast(product, bits) if form.bits == 64 else rounded_to(b, b.fptrunc(product, single), form)
        gone, stays = (b.fcmp_ordered("==", factor, splat(double, edge)) for edge in (0.0, 1.0))
        return found, gone, stays

    def weighed_in_pairs(b: Builder, x: Value, weights: Value, mus: Value) -> tuple[Value, Value, Value]:
        v, c = (single_of(b, number, form, "keep") for number, form in ((x, form), (weights, metric)))
        high, low = (shuffle(b, mus, [2 * owner + half for owner in owners]) for half in (0, 1))
        total, larger = b.fadd(c, high), b.fcmp_ordered(">", c, high)
        most, least = b.select(larger, c, high), b.select(larger, high, c)
        low = b.fadd(low, b.fsub(least, b.fsub(total, most)))  # with what the sum lost (Dekker 1971)
        inverse = b.fdiv(splat(single, 1.0), total)
        factor = b.fmul(c, inverse)
        minus = b.fneg(factor)
        rest = b.fmul(fma(b, minus, low, fma(b, minus, total, c)), inverse)
        product = fma(b, v, factor, b.fmul(v, rest))
        gone, stays = (b.fcmp_ordered("==", high, splat(single, edge)) for edge in (math.inf, 0.0))
        stays = b.or_(stays, b.fcmp_ordered("==", v, splat(single, 0.0)))  # the sum of its products is +0.0
        return rounded_to(b, product, form), gone, stays

    def weigh(b: Builder, array: Value, h: Value, mus: Value, left: Value | None) -> None:
        """`LANES` elements, or the first of them that are left."""
        if left is None:
            # Read before memory is asked for, as in `cut_strip`: writing by a mask was a third of all this.
            x, weights, mask = load(b, array, bits), load(b, h, metric_bits), None
            prefetch(b, array, LANES * form.bits // 8)
            prefetch(b, h, LANES * metric.bits // 8)
        else:
            mask = first_lanes(b, left, LANES)
            x, weights = load_masked(b, array, bits, mask), load_masked(b, h, metric_bits, mask)
        find = weighed_in_pairs if paired else weighed
        found, gone, stays = find(b, x, weights, b.load(b.bitcast(mus, owned.as_pointer()), align=8))
        found = b.select(gone, splat(bits, 0), b.select(stays, x, found))
        if mask is None:
            store(b, found, array)
        else:
            store_masked(b, found, array, mask)

    def emit(
        b: Builder, array: Value, grid: Value, loops: Value, elements: Value, turns: Value, h: Value, grid2: Value,
        loops2: Value, elements2: Value, turns2: Value, i: Value, stop: Value, size: Value, mus: Value,
    ) -> None:  # fmt: skip
        grids = [Grid(array, grid, loops), Grid(h, grid2, loops2)]
        with over_ranges(b, grids, i, stop) as (first, after, (at, at2)):
            count, own = b.sub(after, first), b.gep(mus, [b.sub(first, i)])
            with cgutils.for_range_slice(b, word(0), size, word(run)) as (e, _):
                here = b.gep(array, [b.add(at, place_in(b, elements, turns, e))])
                metric_here = b.gep(h, [b.add(at2, place_in(b, elements2, turns2, e))])

                def weigh_at(start: Value, block: Value, left: Value | None) -> None:
                    weigh(b, b.gep(here, [start]), b.gep(metric_here, [start]), b.gep(own, [block]), left)

                if run > LANES:
                    with cgutils.for_range(b, count) as loop:
                        start = b.mul(loop.index, word(run))
                        with cgutils.for_range_slice(b, word(0), word(run - run % LANES), word(LANES)) as (c, _):
                            weigh_at(b.add(start, c), loop.index, None)
                        if run % LANES:
                            weigh_at(b.add(start, word(run - run % LANES)), loop.index, word(run % LANES))
                else:
                    whole = b.sub(count, b.urem(count, word(together))) if together * run == LANES else word(0)
                    with cgutils.for_range_slice(b, word(0), whole, word(together)) as (j, _):
                        weigh_at(b.mul(j, word(run)), j, None)
                    with cgutils.for_range_slice(b, whole, count, word(together)) as (j, _):
                        left = smallest(b, word(together * run), b.mul(b.sub(count, j), word(run)))
                        weigh_at(b.mul(j, word(run)), j, left)

    return step(emit, 21)
