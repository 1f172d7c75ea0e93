"""Vector code that deals elements into planes: the first elements of a strip of blocks, the second ones, and so on.

Sums over the elements of `LANES` blocks then are sums of vectors, which stay in registers from the
first plane to the last.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir

from npscope.backends.numba_cpu.vectors import (
    LANES,
    Builder,
    Format,
    Value,
    first_lanes,
    load,
    load_masked,
    planes_of,
    prefetch,
    single_of,
    step,
    vector_of,
)


@cache
def deal_runs(form: Format, run: int, partial: bool) -> Any:
    """``(source, i, planes, j, distance, pitch, ahead, left)``: `run` elements of `LANES` blocks as `run` rows.

    Of the first `left` of them if `partial`, and zeros for the others. The rows, of float32 or float64, lie `pitch`
    apart. `run` is a power of two up to `LANES`, and the memory is read as `run` vectors that lie `distance` apart.
    """
    bits = vector_of(form.bits, LANES)

    def emit(
        b: Builder, source: Value, planes: Value, distance: Value, pitch: Value, ahead: Value, left: Value
    ) -> None:
        vectors = []
        for i in range(run):
            if partial:
                count = b.sub(b.mul(left, left.type(run)), left.type(i * LANES))
                read = load_masked(b, source, bits, first_lanes(b, count, LANES))
            else:
                prefetch(b, source, LANES * form.bits // 8, ahead)
                read = load(b, source, bits)
            vectors.append(single_of(b, read, form, "keep"))
            source = b.gep(source, [distance])
        row = ir.VectorType(planes.type.pointee, LANES)
        for plane in planes_of(b, vectors):
            b.store(plane if row == plane.type else b.fpext(plane, row), b.bitcast(planes, row.as_pointer()), align=4)
            planes = b.gep(planes, [pitch])

    return step(emit, 8)
