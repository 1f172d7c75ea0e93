"""Vector code that deals elements into planes: the first elements of a strip of blocks, the second ones, and so on.

Sums over the elements of `LANES` blocks then are sums of vectors, which stay in registers from the
first plane to the last.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu.nests import length_in, place_in
from npscope.backends.numba_cpu.rows import Grid, over_ranges
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
def deal_strip(form: Format, run: int) -> Any:
    """``(source, o, grid, 0, loops, elements, 0, turns, i, stop, row, planes, 0, pitch)``: elements into planes.

    Those of blocks [i, stop) of a `source` whose first one is at `o`, in runs of `run` adjacent elements, go into rows
    of float32 or float64 that lie `pitch` apart, from number `row` on. `LANES` more places than blocks are written.
    Tables are of so many loops. `run` is a power of two, or a multiple of `LANES`.
    """
    word, bits, part = ir.IntType(64), vector_of(form.bits, LANES), min(run, LANES)
    distance = run if run > LANES else LANES  # between vectors that are read for `LANES` blocks

    def deal(b: Builder, source: Value, planes: Value, pitch: Value, ahead: Value, left: Value | None) -> None:
        """`part` elements of `LANES` blocks, or of those that are left, with zeros for the others, as rows."""
        vectors = []
        for i in range(part):
            here = b.gep(source, [word(i * distance)])
            if left is None:
                prefetch(b, here, LANES * form.bits // 8, ahead)
                read = load(b, here, bits)
            else:
                count = b.sub(b.mul(left, word(part)), word(i * LANES))
                read = load_masked(b, here, bits, first_lanes(b, count, LANES))
            vectors.append(single_of(b, read, form, "keep"))
        row = ir.VectorType(planes.type.pointee, LANES)
        for plane in planes_of(b, vectors):
            b.store(plane if row == plane.type else b.fpext(plane, row), b.bitcast(planes, row.as_pointer()), align=4)
            planes = b.gep(planes, [pitch])

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, elements: Value, turns: Value, i: Value, stop: Value,
        row: Value, planes: Value, pitch: Value,
    ) -> None:  # fmt: skip
        length, size = b.sub(stop, i), length_in(b, elements, turns)
        last = b.sub(loops, word(1))
        width, stride = (b.load(b.gep(grid, [at])) for at in (last, b.add(loops, last)))
        with over_ranges(b, [Grid(source, grid, loops)], i, stop) as (first, after, (at,)):
            count = b.sub(after, first)
            # What is asked for are the blocks after the next strip, or where lines end those of the next one.
            rest = b.sub(width, b.srem(first, width))
            near = b.sub(place_in(b, grid, loops, b.add(first, length)), at)
            far = b.mul(b.add(length, length), stride)
            ahead = b.select(b.icmp_signed("<=", b.mul(length, word(3)), rest), far, near)
            whole = b.and_(count, word(-LANES))
            left = b.sub(count, whole)
            with cgutils.for_range_slice(b, word(0), size, word(part)) as (e, _):
                here = b.gep(source, [b.add(at, place_in(b, elements, turns, e))])
                there = b.gep(planes, [b.add(b.mul(b.add(row, e), pitch), b.sub(first, i))])
                with cgutils.for_range_slice(b, word(0), whole, word(LANES)) as (j, _):
                    deal(b, b.gep(here, [b.mul(j, word(run))]), b.gep(there, [j]), pitch, ahead, None)
                with b.if_then(b.icmp_signed(">", left, word(0))):
                    deal(b, b.gep(here, [b.mul(whole, word(run))]), b.gep(there, [whole]), pitch, ahead, left)

    return step(emit, 14)
