"""Norms of strips of blocks, written for LLVM: sums and maxima of runs kept in vectors, and their rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.doubts import (
    DOUBTS,
    LEAST,
    SQUARED_LEAST,
    Least,
    Roots,
    Span,
    doubt_of,
    note_doubts,
    note_zeros,
    settle,
)
from npscope.backends.numba_cpu.rows import Ahead, Grid, Rows, Runs, Strip, over_elements, over_rows, shape_of, smallest
from npscope.backends.numba_cpu.scalars import SAFE_LEAST
from npscope.backends.numba_cpu.totals import (
    INF,
    ONE,
    PARTIAL,
    TWO,
    Total,
    folded_totals,
    joined,
    kept_totals,
    lanes_folded,
    numbers_of,
    only_if,
    parts_of,
    read_numbers,
    takes_many,
)
from npscope.backends.numba_cpu.vectors import (
    CHUNK,
    INT32,
    LANES,
    Builder,
    Format,
    Value,
    call,
    copy_rows,
    first_lanes,
    load,
    planes_of,
    prefetch,
    shuffle,
    side_by_side,
    splat,
    step,
    store,
    vector_of,
)

STRIP_BLOCKS, PART_BLOCKS = 1 << 11, 1 << 8
"""Blocks that are measured at once, at most, and where they have partial sums: what is not summed side by side."""

FLAT_RUN = 1 << 11
"""Elements that are summed before their norms are settled where a block is one run: they fit the nearest cache."""

PARTS = DOUBTS + STRIP_BLOCKS // LANES
"""Where partial sums stand in work arrays, behind the doubts of a strip."""

POWERS = (8, 4, 2, 1)
"""Lengths of runs that fill vectors, and of which others are made."""


MOST_FLAT = LANES
"""Elements of a block in one row, at most, that are summed and folded without keeping sums.

In cache that takes half to three quarters of the time for 16 elements. Blocks of 32 gained little, and of larger ones
too much would be unrolled.
"""


def _rows_taker(form: Format, runs: Runs, code: int) -> Callable[[Builder, Rows, Value, Value, Value, Value], Value]:
    """``take(b, rows, sums, norms, making, doubt)``: take in rows of adjacent blocks, the first one that of `sums`.

    Sums in float64, or maxima as bits (NaN the largest), are overwritten by the rows from number 0 on. Where
    `takes_many` of them they are in `sums` and `norms`, a number for each block, sums of float64 with what was lost in
    `norms`; else in `making`, `parts_of(form)` for each, but nowhere if they are folded at once. There, too, are the
    `LANES` least magnitudes of float32 that are summed.

    After the last rows `norms` are float32, or float64 if the elements are that, and `sums` the same in float64,
    except for maxima. Returns 0, or words joined by or that stand in `making` from `DOUBTS` on, for `LANES` blocks
    each: a bit for each of them whose rounding is in `doubt`, or whose squares may have left the range of float64. Bits
    of blocks beyond the last mean nothing.
    """
    run, long, many = runs.length, runs.long, takes_many(runs)
    flat = runs.flat and run <= MOST_FLAT  # folded without keeping sums
    together = many or flat  # `LANES` blocks are measured at a time
    lanes = lanes_folded(form, run, code)
    length = max(run, lanes)  # elements of one block, or of several that are folded together
    # Numbers of float64 are as wide as sums, so that to deal out four takes less than to fold them.
    folds = flat and lanes > 0 and (form.bits < 64 or run > 4)
    word = ir.IntType(64)

    def emit(b: Builder, here: Rows, sums: Value, norms: Value, making: Value, doubt: Value) -> Value:
        source, _, count, size, rows, step, _, row, last = here
        go_on = b.icmp_signed("!=", row, ir.Constant(row.type, 0))
        doubts, found = b.gep(making, [word(DOUBTS)]), cgutils.alloca_once_value(b, word(0))
        totals = b.gep(making, [INT32(PARTS)]) if not many else norms if code == INF else sums
        kept = b.gep(making, [INT32(LEAST)])
        span = Span(b, kept, go_on) if code == ONE and form.bits <= 32 else None
        least = Least(b, kept, go_on, 64) if code == TWO and form.bits == 64 else span
        roots = Roots(b, doubt) if code == TWO and form.bits <= 32 else None

        def number(n: int) -> Value:
            return ir.Constant(size.type, n)

        ahead = Ahead(b, form.bits, here, flat=runs.flat)

        def read(at: Value, length: int) -> list[Value]:
            ahead.fetch(length)
            found = [read_numbers(b, at, e, LANES, form, code) for e in range(0, length - LANES + 1, LANES)]
            # What does not fill a vector: to be summed, it may as well fill half of one.
            lanes = LANES if many or code == INF else PARTIAL
            for e in range(LANES * len(found), length, lanes):
                count = min(lanes, length - e)
                bits = read_numbers(b, at, e, count, form, code)
                if not many and count < lanes:
                    bits = shuffle(b, bits, [min(i, count) for i in range(lanes)], splat(bits.type, 0))
                found.append(bits)
            return found

        def take(totals: Sequence[Total], vectors: Sequence[Value]) -> None:
            for i, bits in enumerate(vectors):
                totals[i % len(totals)].take(bits)
            take_least(vectors)

        def take_least(vectors: Sequence[Value]) -> None:
            if least is not None:
                for bits in vectors:
                    least.take(bits)

        def places_of(total: Total, block: Value) -> list[Value]:
            entry = block if many else b.mul(block, number(parts_of(form)))
            words = b.bitcast(totals, total.type.element.as_pointer() if many else ir.DoubleType().as_pointer())
            words = [b.gep(words, [entry])]
            if total.compensates:
                lost = b.bitcast(norms, ir.DoubleType().as_pointer())
                words.append(b.gep(lost, [entry]) if many else b.gep(words[0], [number(PARTIAL)]))
            return [b.bitcast(word, total.type.as_pointer()) for word in words]

        def joined_with(values: list[Value], places: Sequence[Value]) -> list[Value]:
            """With what earlier rows left, if there are any."""
            kept = [cgutils.alloca_once_value(b, value) for value in values]
            with b.if_then(go_on):
                for value, place in zip(
                    joined(b, code, values, [b.load(place, align=4) for place in places]), kept, strict=True
                ):
                    b.store(value, place)
            return [b.load(place) for place in kept]

        def whole_vectors(at: Value, block: Value) -> tuple[Value, Value]:
            """Where `LANES` blocks are, and how far their rows lie apart."""
            place, distance = cgutils.alloca_once_value(b, at), cgutils.alloca_once_value(b, step)
            left = b.sub(count, block)
            with b.if_then(b.icmp_signed("<", left, number(LANES)), likely=False):
                # Blocks that do not fill a vector take a detour over memory that is zero behind them.
                spare = b.bitcast(b.gep(making, [INT32(PARTS)]), at.type)
                copy_rows(b, at, step, spare, number(LANES * run), rows, b.mul(left, number(run)), LANES * run)
                b.store(spare, place)
                b.store(number(LANES * run), distance)
            return b.load(place), b.load(distance)

        def planes(at: Value) -> list[Value]:
            """The numbers of `LANES` blocks: the first of each, the second ones, ..."""
            if run in POWERS:
                return planes_of(b, read(at, LANES * run))
            ahead.fetch(LANES * run)
            found: list[Value] = []
            for width in (power for power in POWERS if run & power):
                starts = range(len(found), LANES * run, run)
                pieces = [load(b, b.gep(at, [INT32(e)]), vector_of(form.bits, width)) for e in starts]
                while pieces[0].type.count < LANES:
                    both = range(2 * pieces[0].type.count)
                    pieces = [shuffle(b, x, both, y) for x, y in zip(pieces[::2], pieces[1::2], strict=True)]
                found += planes_of(b, [numbers_of(b, bits, form, code) for bits in pieces])
            return found

        def add_many(at: Value, block: Value) -> None:
            # Rows are added as they lie, and only their sums are dealt out to the blocks, where there is more than one
            # row and they fill vectors. Else the numbers are, which are half as wide as sums.
            place, distance = whole_vectors(at, block)
            deals = flat or run not in POWERS
            parts = [Total(b, form, code, LANES) for _ in range(1 if deals else run)]
            if flat:
                take(parts, planes(place))
                close(block, parts[0].values)
                return
            with cgutils.for_range(b, rows) as loop:
                here = b.gep(place, [b.mul(loop.index, distance)])
                take(parts, planes(here) if deals else read(here, LANES * run))
            places = places_of(parts[0], block)
            values = joined_with(dealt_out([part.values for part in parts]), places)
            if code == INF:
                put(values, places)
                return
            with b.if_else(last) as (then, otherwise):
                with then:  # while the next rows are read, for roots take as long
                    close(block, values)
                with otherwise:
                    put(values, places)

        def dealt_out(parts: Sequence[list[Value]]) -> list[Value]:
            """The totals of `LANES` blocks, a lane for each, from those of their elements as they lie."""
            join = partial(joined, b, code)
            whole = [list(values) for values in zip(*parts, strict=True)]
            if not lanes or len(parts) == 1:
                return reduce(join, map(list, zip(*(planes_of(b, values) for values in whole), strict=True)))
            rows = [side_by_side(b, values) for values in whole]

            def total_of(i: int) -> list[Value]:
                starts = range(i * length, (i + 1) * length, lanes)
                return reduce(join, ([shuffle(b, row, range(e, e + lanes)) for row in rows] for e in starts))

            return folded_totals(b, form, code, total_of, lanes, length // run)

        def add_flat(at: Value, block: Value) -> None:
            place, _ = whole_vectors(at, block)
            narrow = form.bits < 32  # as float32, vectors are made of whole vectors in half of the instructions
            vectors = []
            if narrow or least is not None:
                vectors = read(place, LANES * run)
                take_least(vectors)
            else:
                ahead.fetch(LANES * run)

            def total_of(i: int) -> list[Value]:
                total = Total(b, form, code, 0 if code == INF else lanes)
                for e in range(0, length, lanes):
                    again = max(0, e + lanes - length)  # elements that were taken before
                    start = i * length + e - again
                    if narrow:
                        bits = shuffle(b, vectors[start // LANES], [start % LANES + k for k in range(lanes)])
                    else:
                        bits = read_numbers(b, place, start, lanes, form, code)
                    if again:
                        bits = b.and_(bits, ir.Constant(bits.type, [-(k >= again) for k in range(lanes)]))
                    total.take(bits)
                return total.values

            close(block, folded_totals(b, form, code, total_of, PARTIAL if code == INF else lanes, length // run))

        def add_one(at: Value, block: Value) -> None:
            total = Total(b, form, code, 0)
            places = places_of(total, block)
            total.values = [only_if(b, go_on, b.load(place, align=4)) for place in places]
            others = [Total(b, form, code, 0) for _ in range(CHUNK // LANES if long else 0)]

            def take_long(here: Value) -> None:
                chunks, vectors = b.udiv(size, number(CHUNK)), b.udiv(size, number(LANES))
                with cgutils.for_range(b, chunks) as loop:
                    take(others, read(b.gep(here, [b.mul(loop.index, number(CHUNK))]), CHUNK))
                with cgutils.for_range_slice(b, b.mul(chunks, number(CHUNK // LANES)), vectors, number(1)) as (v, _):
                    take([total], read(b.gep(here, [b.mul(v, number(LANES))]), LANES))
                take([total], read(b.gep(here, [b.mul(vectors, number(LANES))]), run) if run else [])

            with cgutils.for_range(b, rows) as loop:
                here = b.gep(at, [b.mul(loop.index, step)])
                take_long(here) if long else take([total], read(here, run))
            for other in others:
                total.join(other.values)
            put(total.values, places)

        def put(values: Sequence[Value], places: Sequence[Value]) -> None:
            for value, place in zip(values, places, strict=True):
                b.store(value, place, align=4)

        def close(block: Value, totals: Sequence[Value]) -> None:
            """From the totals of `LANES` blocks to norms."""
            here, place = b.gep(sums, [block]), b.gep(norms, [block])
            if code == INF:
                store(b, totals[0], place)
                return
            wide, lost = _wide(b, form, code, totals)
            if not together:
                # Blocks beyond are zero where they are measured together; parts are what was there before.
                wide = b.select(first_lanes(b, b.sub(count, block), LANES), wide, splat(wide.type, 0.0))
            store(b, wide, here)
            if form.bits == 64:
                store(b, wide, place)
            else:
                rounded = b.fptrunc(wide, ir.VectorType(ir.FloatType(), LANES))
                store(b, rounded, place)
                if span is not None:
                    span.take_rounded(rounded)
                if roots is not None:
                    roots.take(wide)
                return
            bits = b.zext(b.bitcast(lost, ir.IntType(LANES)), word)
            b.store(bits, b.gep(doubts, [b.udiv(block, number(LANES))]))
            b.store(b.or_(b.load(found), bits), found)

        add = add_flat if folds else add_many if many else add_one
        with cgutils.for_range_slice(b, number(0), count, number(LANES if together else 1)) as (block, _):
            at = b.gep(source, [b.mul(block, size)])
            add(at, block)
        if least is not None:
            least.leave()
        if together and code == INF:
            return word(0)
        with b.if_then(last):
            if not together:
                with cgutils.for_range_slice(b, number(0), count, number(LANES)) as (block, _):
                    parts = b.add(b.mul(block, number(parts_of(form))), number(PARTS))
                    close(block, folded_totals(b, form, code, kept_totals(b, form, code, b.gep(making, [parts]))))
            groups = b.udiv(b.add(count, number(LANES - 1)), number(LANES))
            if span is not None:
                exact, most = span.ends()
                with b.if_then(b.not_(b.fcmp_ordered("<=", most, exact)), likely=False):
                    b.store(note_doubts(b, groups, sums, doubts, exact, doubt), found)
            elif roots is not None:
                with b.if_then(roots.are_unsure(), likely=False):
                    b.store(note_doubts(b, groups, sums, doubts, None, doubt), found)
            elif least is not None:
                bits = least.bits()
                tiny = b.icmp_unsigned("<", b.sub(bits, word(1)), word(SQUARED_LEAST - 1))
                with b.if_then(tiny, likely=False):
                    b.store(b.or_(b.load(found), note_zeros(b, groups, sums, doubts)), found)
        return b.load(found)

    return emit


def _wide(b: Builder, form: Format, code: int, totals: Sequence[Value]) -> tuple[Value, Value]:
    """Norms of `LANES` blocks in float64, and flags of those whose squares may have left its range."""
    double = ir.VectorType(ir.DoubleType(), LANES)
    wide, lost = totals[0], ir.Constant(vector_of(1, LANES), [0] * LANES)
    if form.bits == 64:
        # What was lost of an infinite sum is NaN.
        finite = b.fcmp_ordered("<", wide, splat(double, math.inf))
        if code == TWO:
            # Zero is what blocks have that were dropped before: it is in doubt only where something is tiny.
            small = b.fcmp_ordered("<", wide, splat(double, SAFE_LEAST))
            small = b.and_(small, b.fcmp_ordered("!=", wide, splat(double, 0.0)))
            lost = small
        wide = b.select(finite, b.fadd(wide, totals[1]), wide)
        if code == TWO:  # what was lost of a sum may make it infinite, too
            lost = b.or_(lost, b.fcmp_ordered("==", wide, splat(double, math.inf)))
    return call(b, f"llvm.sqrt.v{LANES}f64", double, [wide]) if code == TWO else wide, lost


def _keys(b: Builder, norms: Value, count: Value, keys: Value) -> None:
    width = keys.type.pointee.width
    scalar = ir.DoubleType() if width == 64 else ir.FloatType()
    vector, numbers = vector_of(width, LANES), ir.VectorType(norms.type.pointee, LANES)
    infinite = splat(vector, 0x7FF << 52 if width == 64 else 0xFF << 23)
    with cgutils.for_range_slice(b, count.type(0), count, count.type(LANES)) as (i, _):
        found = b.load(b.bitcast(b.gep(norms, [i]), numbers.as_pointer()), align=4)
        if norms.type.pointee != scalar:
            found = b.fpext(found, ir.VectorType(scalar, LANES))
        bits = b.and_(b.bitcast(found, vector), splat(vector, (1 << (width - 1)) - 1))
        store(b, b.select(b.icmp_unsigned(">", bits, infinite), splat(vector, -1), bits), b.gep(keys, [i]))


keys_of_norms = step(_keys, 5)
"""``keys_of_norms(norms, i, count, keys, j)``: norms as ordered integers of the width of `keys`; NaN the largest.

Up to `LANES` more are read and written than asked for.
"""


@cache
def measure_strip(form: Format, runs: Runs, code: int) -> Any:
    """``(source, origin, grid, 0, loops, elements, 0, turns, i, stop, sums, 0, norms, 0, making, 0)``: norms.

    Those of blocks [i, stop) of a `source` whose first one is at `origin`. The `grid` and the `elements` of a block are
    tables of so many loops. In float64 they are left in `sums`, unless they are maxima.
    """
    word, many = ir.IntType(64), takes_many(runs)
    take_in, most_blocks = _rows_taker(form, runs, code), STRIP_BLOCKS if many else PART_BLOCKS

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, elements: Value, turns: Value, i: Value, stop: Value,
        sums: Value, norms: Value, making: Value,
    ) -> None:  # fmt: skip
        strip = Strip(Grid(source, grid, loops), elements, turns, i, stop)
        shape, noted = shape_of(b, strip, runs), cgutils.alloca_once(b, word)
        doubt, fitting = doubt_of(b, shape, runs, code), b.sdiv(word(FLAT_RUN), shape.size)
        fitting = b.select(b.icmp_signed(">", fitting, word(LANES)), fitting, word(LANES))
        one_row = b.icmp_signed("==", shape.rows, word(1))
        most = b.select(one_row, smallest(b, word(most_blocks), fitting), word(most_blocks))

        def take(rows: Rows) -> None:
            here, there = b.gep(sums, [rows.block]), b.gep(norms, [rows.block])
            b.store(take_in(b, rows, here, there, making, doubt), noted)

        def finish(i: Value, block: Value, count: Value) -> None:
            with b.if_then(b.icmp_unsigned("!=", b.load(noted), word(0)), likely=False):
                room = b.gep(making, [INT32(PARTS)])
                settle(b, strip, shape, form, code, i, count, b.gep(sums, [block]), b.gep(norms, [block]), making, room)

        doubtful = code == TWO or (code == ONE and form.bits < 64)
        over_rows(b, strip, runs, shape, take, most, finish if doubtful else None)

    return step(emit, 16)


@cache
def add_squares(form: Format) -> Any:
    """``(source, o, grid, 0, loops, elements, 0, turns, i, stop, size)``: the sum of the squares of all elements.

    Of blocks as for `count_magnitudes_above`, in float64.
    """
    double = ir.DoubleType()

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, elements: Value, turns: Value, i: Value, stop: Value,
        size: Value,
    ) -> Value:  # fmt: skip
        total = Total(b, form, TWO, LANES)

        def take(here: Value, lanes: int) -> None:
            if lanes > 1:
                prefetch(b, here, LANES * form.bits // 8)
            bits = read_numbers(b, here, 0, lanes, form, TWO)
            if lanes < LANES:
                bits = shuffle(b, bits, [min(lane, lanes) for lane in range(LANES)], splat(bits.type, 0))
            total.take(bits)

        over_elements(b, Strip(Grid(source, grid, loops), elements, turns, i, stop), size, LANES, take)
        found, *lost = (
            call(b, f"llvm.vector.reduce.fadd.v{LANES}f64", double, [double(0.0), lanes]) for lanes in total.values
        )
        # What was lost of an infinite sum is NaN.
        finite = b.fcmp_ordered("<", found, double(math.inf))
        return b.select(finite, b.fadd(found, lost[0]), found) if lost else found

    return step(emit, 11, types.float64)
