"""The steps of shrinkage inside a vector: of single elements, and of conditioned blocks."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llvmlite import ir

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
    on_floats,
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
def weigh(form: Format, metric: Format, run: int, partial: bool, paired: bool) -> Any:
    """``weigh(array, i, h, j, mus, k, left)``: `LANES` elements, floats of 16 bits and more, times ``h / (h + mu)``.

    Each `run` of them have one mu, of those from `mus` on; a power of two of these is read, up to `LANES`. +0.0 where
    mu is infinite; where it is 0 elements stay. Only the `left` first of them if `partial`. A mu is a float64, or if
    `paired` two float32, for floats of at most 32 bits: products are right to 2 ** -44 before they are rounded, in two
    thirds of the time, where h is within a factor of 2 ** 40 of 1, h + mu of 2 ** 100, and h / (h + mu) of 2 ** 90.
    """
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
        total = b.fadd(c, high)
        moved = b.fsub(total, c)
        low = b.fadd(low, b.fadd(b.fsub(c, b.fsub(total, moved)), b.fsub(high, moved)))
        inverse = b.fdiv(splat(single, 1.0), total)
        factor = b.fmul(c, inverse)
        minus = b.fneg(factor)
        rest = b.fmul(fma(b, minus, low, fma(b, minus, total, c)), inverse)
        product = on_floats(b, "copysign", fma(b, v, factor, b.fmul(v, rest)), v)
        gone, stays = (b.fcmp_ordered("==", high, splat(single, edge)) for edge in (math.inf, 0.0))
        return rounded_to(b, product, form), gone, stays

    def emit(b: Builder, array: Value, h: Value, mus: Value, left: Value) -> None:
        if partial:
            mask = first_lanes(b, left, LANES)
            x, weights = load_masked(b, array, bits, mask), load_masked(b, h, metric_bits, mask)
        else:
            prefetch(b, array, LANES * form.bits // 8)
            prefetch(b, h, LANES * metric.bits // 8)
            x, weights = load(b, array, bits), load(b, h, metric_bits)
        find = weighed_in_pairs if paired else weighed
        found, gone, stays = find(b, x, weights, b.load(b.bitcast(mus, owned.as_pointer()), align=8))
        found = b.select(stays, x, b.select(gone, splat(bits, 0), found))
        if partial:
            store_masked(b, found, array, mask)
        else:
            store(b, found, array)

    return step(emit, 7)
