"""Vector code for elements dealt into planes: the first elements of a strip of blocks, the second ones, and so on.

Sums over the elements of `LANES` blocks then are sums of vectors, which stay in registers from the
first plane to the last: half the time of the loops that LLVM makes vectors of, and a third of their compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu.vectors import (
    LANES,
    Builder,
    Format,
    Value,
    fma,
    planes_of,
    prefetch,
    read_single,
    splat,
    step,
)


@cache
def deal_runs(form: Format, run: int) -> Any:
    """``(source, i, planes, j, distance, width, ahead)``: `run` elements of `LANES` blocks as `run` rows of float64.

    The rows lie `width` apart in `planes`. `run` is a power of two up to `LANES`, and the memory is read
    as `run` vectors that lie `distance` apart. Numbers keep their sign or lose it, whatever is cheaper.
    """
    read, double = read_single(form, True), ir.VectorType(ir.DoubleType(), LANES)

    def emit(b: Builder, source: Value, planes: Value, distance: Value, width: Value, ahead: Value) -> None:
        vectors = []
        for _ in range(run):
            prefetch(b, source, LANES * form.bits // 8, ahead)
            vectors.append(read(b, source, 0, LANES))
            source = b.gep(source, [distance])
        for plane in planes_of(b, vectors):
            b.store(b.fpext(plane, double), b.bitcast(planes, double.as_pointer()), align=8)
            planes = b.gep(planes, [width])

    return step(emit, 7)


def _sum_planes(
    b: Builder, planes: Sequence[Value], rows: Value, width: Value, terms: Callable[..., Any]
) -> list[Value]:
    """Three sums of ``terms(sums so far, number of each plane)`` over rows of `LANES` numbers, kept in registers."""
    double = ir.VectorType(ir.DoubleType(), LANES)
    sums = [cgutils.alloca_once_value(b, splat(double, 0.0)) for _ in range(3)]
    with cgutils.for_range(b, rows) as loop:
        offset = b.mul(loop.index, width)
        numbers = [b.load(b.bitcast(b.gep(p, [offset]), double.as_pointer()), align=8) for p in planes]
        for place, value in zip(sums, terms([b.load(x) for x in sums], *numbers), strict=True):
            b.store(value, place)
    return [b.load(x) for x in sums]


def _rows_of(b: Builder, start: Value, distance: Value, count: int) -> list[Value]:
    """Addresses of `count` vectors of float64 that lie `distance` apart."""
    double = ir.VectorType(ir.DoubleType(), LANES)
    places = [start]
    for _ in range(count - 1):
        places.append(b.gep(places[-1], [distance]))
    return [b.bitcast(place, double.as_pointer()) for place in places]


@cache
def measure_planes() -> Any:
    """``(v, i, h, j, sums, k, rows, width, distance)``: add (h v) ** 2, v ** 2 and (h v) ** 2 h to three rows of sums.

    Of `LANES` blocks, over `rows` rows of planes that lie `width` apart. The sums lie `distance` apart.
    """

    def emit(b: Builder, v: Value, h: Value, sums: Value, rows: Value, width: Value, distance: Value) -> None:
        def terms(so_far: list[Value], x: Value, c: Value) -> list[Value]:
            p = b.fmul(c, x)
            p = b.fmul(p, p)
            return [b.fadd(so_far[0], p), fma(b, x, x, so_far[1]), fma(b, p, c, so_far[2])]

        for place, value in zip(
            _rows_of(b, sums, distance, 3), _sum_planes(b, (v, h), rows, width, terms), strict=True
        ):
            b.store(b.fadd(b.load(place, align=8), value), place, align=8)

    return step(emit, 9)


@cache
def secular_sums() -> Any:
    """``(v, i, h, j, given, k, sums, l, rows, width, distance)``: add q ** 2, q ** 2 p, q ** 2 p ** 2 to rows of sums.

    As `measure_planes`; `given` are rows of unit, limit and rate: d = h * rate + limit, q = h * v * unit / d,
    p = h * rate / d.
    """

    def emit(
        b: Builder, v: Value, h: Value, given: Value, sums: Value, rows: Value, width: Value, distance: Value
    ) -> None:
        unit, limit, rate = (b.load(place, align=8) for place in _rows_of(b, given, distance, 3))

        def terms(so_far: list[Value], x: Value, c: Value) -> list[Value]:
            moved = b.fmul(c, rate)
            r = b.fdiv(splat(moved.type, 1.0), b.fadd(moved, limit))
            q = b.fmul(b.fmul(c, b.fmul(x, unit)), r)
            q, p = b.fmul(q, q), b.fmul(moved, r)
            slope = b.fmul(q, p)
            return [b.fadd(so_far[0], q), b.fadd(so_far[1], slope), fma(b, slope, p, so_far[2])]

        for place, value in zip(
            _rows_of(b, sums, distance, 3), _sum_planes(b, (v, h), rows, width, terms), strict=True
        ):
            b.store(b.fadd(b.load(place, align=8), value), place, align=8)

    return step(emit, 11)
