"""The step that shrinks single elements inside a vector."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir

from npscope.backends.numba_cpu.vectors import (
    LINE,
    Builder,
    Format,
    Value,
    load,
    prefetch,
    splat,
    step,
    store,
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
