"""The steps of shrinkage inside a vector: of single elements, and of conditioned blocks."""

from __future__ import annotations

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
    load,
    load_masked,
    prefetch,
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
def weigh(form: Format, metric: Format, partial: bool) -> Any:
    """``weigh(array, i, h, j, mus, k, left)``: `LANES` elements, float32 or float64, become ``h / (h + mu)`` of them.

    +0.0 where mu is infinite; where it is 0 they stay. Only the `left` first of them if `partial`.
    """
    bits, metric_bits = vector_of(form.bits, LANES), vector_of(metric.bits, LANES)
    number = ir.VectorType(ir.FloatType() if form.bits == 32 else ir.DoubleType(), LANES)
    double = ir.VectorType(ir.DoubleType(), LANES)

    def emit(b: Builder, array: Value, h: Value, mus: Value, left: Value) -> None:
        if partial:
            mask = first_lanes(b, left, LANES)
            x, weights = load_masked(b, array, bits, mask), load_masked(b, h, metric_bits, mask)
        else:
            prefetch(b, array, LANES * form.bits // 8)
            prefetch(b, h, LANES * metric.bits // 8)
            x, weights = load(b, array, bits), load(b, h, metric_bits)
        if metric.bits == 64:
            c = b.bitcast(weights, double)
        else:
            c = b.fpext(single_of(b, weights, metric, "keep"), double)
        mu = b.load(b.bitcast(mus, double.as_pointer()), align=8)
        factor = b.fdiv(c, b.fadd(c, mu))
        wide = b.bitcast(x, number) if form.bits == 64 else b.fpext(b.bitcast(x, number), double)
        product = b.fmul(wide, factor)
        product = b.bitcast(product if form.bits == 64 else b.fptrunc(product, number), bits)
        product = b.select(b.fcmp_ordered("==", factor, splat(double, 0.0)), splat(bits, 0), product)
        product = b.select(b.fcmp_ordered("==", factor, splat(double, 1.0)), x, product)
        if partial:
            store_masked(b, product, array, mask)
        else:
            store(b, product, array)

    return step(emit, 7)
