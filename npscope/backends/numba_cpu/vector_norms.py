"""Norms of strips of blocks, written for LLVM: sums and maxima of runs kept in vectors, and their rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu import exact
from npscope.backends.numba_cpu.nests import length_in, place_in
from npscope.backends.numba_cpu.rows import (
    Ahead,
    Grid,
    Rows,
    Runs,
    Shape,
    Strip,
    over_elements,
    over_rows,
    shape_of,
    smallest,
)
from npscope.backends.numba_cpu.scalars import SAFE_LEAST
from npscope.backends.numba_cpu.vectors import (
    CHUNK,
    INT32,
    LANES,
    Builder,
    Format,
    Value,
    broadcast,
    call,
    copy_rows,
    first_lanes,
    fma,
    has_only_avx2,
    load,
    planes_of,
    prefetch,
    shuffle,
    side_by_side,
    single_of,
    splat,
    step,
    store,
    vector_of,
)

PARTIAL = 8
"""Lanes in which float64 sums of long runs are formed."""

ROUNDING_BORDER, ROUNDING_MASK = 1 << 28, (1 << 29) - 1
"""A float64 lies halfway between two normal float32 where its low 29 bits are the first number."""

MOST_DOUBT = 1 << 16
"""Units in the last place of float64 by which a norm may be off at most; larger blocks are summed in another way."""

MARGIN = MOST_DOUBT * 2.0**-53
"""What a norm may be off, relative to it."""


EXACT_SPAN = 2.0**29
"""A float64 sum of float32 magnitudes is exact if it is at most this times the least of them that is not zero.

That one is 2**e or more, so that all are multiples of 2 ** (e - 23), and the sum is below 2 ** (e + 30):
53 bits hold it and every sum on the way.
"""

SQUARED_LEAST = (1023 - 500) << 52
"""The bits of a float64 from which on squares are not zero, with room to spare."""

STRIP_BLOCKS, PART_BLOCKS = 1 << 11, 1 << 8
"""Blocks that are measured at once, at most, and where they have partial sums: what is not summed side by side."""

JOINS = 16
"""Additions in sequence that join lanes and what was summed side by side, at most."""

FLAT_RUN = 1 << 11
"""Elements that are summed before their norms are settled where a block is one run: they fit the nearest cache."""

LEAST = -(-exact.EXACT_WORDS // 8) * 8
DOUBTS = LEAST + LANES
PARTS = DOUBTS + STRIP_BLOCKS // LANES
"""Where least magnitudes, doubts and partial sums stand in work arrays, on lines of their own, behind an exact sum."""

POWERS = (8, 4, 2, 1)
"""Lengths of runs that fill vectors, and of which others are made."""

INF, ONE, TWO = 0, 1, 2
"""What is made of magnitudes: the largest, their sum, the sum of their squares."""


def takes_many(runs: Runs) -> bool:
    """Whether blocks are summed side by side, a lane for each."""
    return runs.length < LANES and not runs.long


MOST_FLAT = LANES
"""Elements of a block in one row, at most, that are summed and folded without keeping sums.

In cache that takes half to three quarters of the time for 16 elements. Blocks of 32 gained little, and of larger ones
too much would be unrolled.
"""


def _larger(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def _read(b: Builder, source: Value, e: int, count: int, form: Format, code: int) -> Value:
    """`count` elements at `e` as float32 or float64, in integers; magnitudes, or what has the same squares."""
    return _numbers_of(b, load(b, b.gep(source, [INT32(e)]), vector_of(form.bits, count)), form, code)


def _numbers_of(b: Builder, bits: Value, form: Format, code: int) -> Value:
    if form.bits == 64:
        return b.and_(bits, splat(bits.type, (1 << 63) - 1))
    return b.bitcast(single_of(b, bits, form, "any" if code == TWO else "drop"), vector_of(32, bits.type.count))


def _if(b: Builder, condition: Value, numbers: Value) -> Value:
    """Numbers, or zeros where the condition is false. By bits: of a choice LLVM would make two loops."""
    word = ir.IntType(64 if isinstance(numbers.type.element, ir.DoubleType) else numbers.type.element.width)
    mask = broadcast(b, b.sext(condition, word), numbers.type.count)
    return b.bitcast(b.and_(b.bitcast(numbers, mask.type), mask), numbers.type)


def _two_sum(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """(s, e) with s the rounded sum and s + e exact (Knuth 1969)."""
    s = b.fadd(x, y)
    t = b.fsub(s, x)
    return s, b.fadd(b.fsub(x, b.fsub(s, t)), b.fsub(y, t))


class _Total:
    """The lanes of a sum or a maximum while vectors are taken in.

    Magnitudes of float32 are summed in float64; those of float64 with what is lost, in a second number.
    """

    def __init__(self, b: Builder, form: Format, code: int, lanes: int) -> None:
        """Of so many lanes, or of as many as fit where that is 0."""
        self.b, self.code, self.compensates = b, code, form.bits == 64 and code != INF
        if code == INF:
            start = splat(vector_of(max(32, form.bits), lanes or LANES), 0)
        else:
            start = splat(ir.VectorType(ir.DoubleType(), lanes or PARTIAL), 0.0)
        self.type: Any = start.type
        self.places = [cgutils.alloca_once_value(b, start) for _ in range(2 if self.compensates else 1)]

    @property
    def values(self) -> list[Value]:
        return [self.b.load(place) for place in self.places]

    @values.setter
    def values(self, values: Sequence[Value]) -> None:
        for value, place in zip(values, self.places, strict=True):
            self.b.store(value, place)

    def take(self, bits: Value) -> None:
        """Take in numbers, as `_read` gives them: as many as there are lanes, or twice as many."""
        b = self.b
        if self.code == INF:
            self.values = [_larger(b, self.values[0], bits)]
            return
        scalar = ir.FloatType() if bits.type.element.width == 32 else ir.DoubleType()
        numbers = b.bitcast(bits, ir.VectorType(scalar, bits.type.count))
        for start in range(0, bits.type.count, self.type.count):
            whole = bits.type.count == self.type.count
            part = numbers if whole else shuffle(b, numbers, range(start, start + self.type.count))
            wide = b.fpext(part, self.type) if bits.type.element.width == 32 else part
            if self.compensates:
                self.join([b.fmul(wide, wide) if self.code == TWO else wide])
            elif self.code == TWO:
                # A product of two float32 is exact in float64, so that this rounds once, as the sum would.
                self.values = [fma(b, wide, wide, self.values[0])]
            else:
                self.join([wide])

    def join(self, other: Sequence[Value]) -> None:
        """Take in the lanes of another total, or numbers that nothing was lost of."""
        self.values = _joined(self.b, self.code, self.values, other)


def _joined(b: Builder, code: int, x: Sequence[Value], y: Sequence[Value]) -> list[Value]:
    """Two totals as one."""
    if code == INF:
        return [_larger(b, x[0], y[0])]
    if len(x) == 1:
        return [b.fadd(x[0], y[0])]
    total, lost = _two_sum(b, x[0], y[0])
    for more in (x[1], *y[1:]):
        lost = b.fadd(lost, more)
    return [total, lost]


class _Least:
    """The least magnitude of a strip that is not zero."""

    def __init__(self, b: Builder, place: Value, go_on: Value, width: int) -> None:
        """Of numbers of so many bits. At `place`, `LANES` of them stay from row to row."""
        self.b, self.type = b, vector_of(width, LANES)
        self.place = b.bitcast(place, self.type.as_pointer())
        # As the largest of their negated bits.
        self.least = cgutils.alloca_once_value(b, _if(b, go_on, b.load(self.place, align=4)))

    def take(self, bits: Value) -> None:
        if bits.type.count < LANES:
            bits = shuffle(self.b, bits, [min(i, bits.type.count) for i in range(LANES)], splat(bits.type, 0))
        self.b.store(_larger(self.b, self.b.load(self.least), self.b.neg(bits)), self.least)

    def leave(self) -> None:
        self.b.store(self.b.load(self.least), self.place, align=4)

    def largest_of(self, place: Value) -> Value:
        name = f"llvm.vector.reduce.umax.v{LANES}i{self.type.element.width}"
        return call(self.b, name, self.type.element, [self.b.load(place)])

    def bits(self) -> Value:
        """Its bits, 0 if there is none."""
        return self.b.neg(self.largest_of(self.least))


class _Span(_Least):
    """Whether all float64 sums of a strip of float32 magnitudes are exact, by the least of these and the largest sum.

    Then nothing is to be asked about roundings: measured, that was a quarter of the time of blocks of four.
    """

    def __init__(self, b: Builder, place: Value, go_on: Value) -> None:
        super().__init__(b, place, go_on, 32)
        self.largest = cgutils.alloca_once_value(b, splat(self.type, 0))

    def take_rounded(self, sums: Value) -> None:
        """Take in rounded sums."""
        bits = self.b.bitcast(sums, vector_of(32, LANES))
        self.b.store(_larger(self.b, self.b.load(self.largest), bits), self.largest)

    def ends(self) -> tuple[Value, Value]:
        """(the largest sum that is exact for sure, a number above all sums, or NaN)."""
        b = self.b
        both = self.bits(), self.largest_of(self.largest)
        exact, most = (b.fpext(b.bitcast(bits, ir.FloatType()), ir.DoubleType()) for bits in both)
        return b.fmul(exact, exact.type(EXACT_SPAN)), b.fmul(most, most.type(1 + 2.0**-23))


class _Roots:
    """Whether any norm of a strip may be rounded wrong to float32: by the one nearest to where rounding turns.

    Which one it is can be found out afterwards, and hardly ever has to. Flags of all norms took a fifth of the time of
    blocks of four.
    """

    def __init__(self, b: Builder, doubt: Value) -> None:
        # Offsets are few, so that AVX2 keeps them in registers: in memory they took as long as what they save.
        self.b, self.doubt = b, doubt
        self.type = vector_of(32, LANES // 2 if has_only_avx2() else LANES)
        self.offset = cgutils.alloca_once_value(b, splat(self.type, -1))

    def take(self, wide: Value) -> None:
        """Take in norms of `LANES` blocks in float64."""
        b, lanes = self.b, self.type.count
        # The low words of 16 lanes, in the order that takes AVX2 least: it does not matter.
        order = [2 * half + e for half in (0, LANES // 2) for e in (0, 2, 8, 10, 4, 6, 12, 14)]
        offsets = _offsets(b, shuffle(b, b.bitcast(wide, vector_of(32, 2 * LANES)), order), self.doubt)
        for start in range(0, LANES, lanes):
            some, kept = shuffle(b, offsets, range(start, start + lanes)), b.load(self.offset)
            b.store(b.select(b.icmp_unsigned("<", some, kept), some, kept), self.offset)

    def are_unsure(self) -> Value:
        """Whether one of them has to be asked about."""
        b, flags = self.b, ir.IntType(self.type.count)
        return b.icmp_unsigned("!=", b.bitcast(_are_near(b, b.load(self.offset), self.doubt), flags), flags(0))


def _offsets(b: Builder, low: Value, doubt: Value) -> Value:
    """How far beyond the start of doubt float64 numbers are, in their units, by their low words; modulo 2 ** 29.

    There is no doubt elsewhere. Zero, infinity and NaN are far from halfway, and where float32 ends is halfway to the
    first number beyond. Subnormal float32 are rounded in another place, but sums of those are exact. Sums of their
    squares are, too: integers below 2 ** 46, in units of the smallest square. That of k and a half is no integer, so
    that roots are 2 ** -26 off halfway at least, where half a unit of float64 is 2 ** -30.
    """
    start = broadcast(b, b.sub(b.trunc(doubt, INT32), INT32(ROUNDING_BORDER)), low.type.count)
    return b.and_(b.add(low, start), splat(low.type, ROUNDING_MASK))


def _are_near(b: Builder, offsets: Value, doubt: Value) -> Value:
    """Flags of the `offsets` with which a rounding is in doubt."""
    return b.icmp_unsigned("<", offsets, broadcast(b, b.shl(b.trunc(doubt, INT32), INT32(1)), offsets.type.count))


def parts_of(form: Format) -> int:
    """Places of 8 bytes for the total of one block in many lanes."""
    return PARTIAL * max(1, form.bits // 32)


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
    lanes = _lanes_folded(form, run, code)
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
        span = _Span(b, kept, go_on) if code == ONE and form.bits <= 32 else None
        least = _Least(b, kept, go_on, 64) if code == TWO and form.bits == 64 else span
        roots = _Roots(b, doubt) if code == TWO and form.bits <= 32 else None

        def number(n: int) -> Value:
            return ir.Constant(size.type, n)

        ahead = Ahead(b, form.bits, here, flat=runs.flat)

        def read(at: Value, length: int) -> list[Value]:
            ahead.fetch(length)
            found = [_read(b, at, e, LANES, form, code) for e in range(0, length - LANES + 1, LANES)]
            # What does not fill a vector: to be summed, it may as well fill half of one.
            lanes = LANES if many or code == INF else PARTIAL
            for e in range(LANES * len(found), length, lanes):
                count = min(lanes, length - e)
                bits = _read(b, at, e, count, form, code)
                if not many and count < lanes:
                    bits = shuffle(b, bits, [min(i, count) for i in range(lanes)], splat(bits.type, 0))
                found.append(bits)
            return found

        def take(totals: Sequence[_Total], vectors: Sequence[Value]) -> None:
            for i, bits in enumerate(vectors):
                totals[i % len(totals)].take(bits)
            take_least(vectors)

        def take_least(vectors: Sequence[Value]) -> None:
            if least is not None:
                for bits in vectors:
                    least.take(bits)

        def places_of(total: _Total, block: Value) -> list[Value]:
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
                    _joined(b, code, values, [b.load(place, align=4) for place in places]), kept, strict=True
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
                found += planes_of(b, [_numbers_of(b, bits, form, code) for bits in pieces])
            return found

        def add_many(at: Value, block: Value) -> None:
            # Rows are added as they lie, and only their sums are dealt out to the blocks, where there is more than one
            # row and they fill vectors. Else the numbers are, which are half as wide as sums.
            place, distance = whole_vectors(at, block)
            deals = flat or run not in POWERS
            parts = [_Total(b, form, code, LANES) for _ in range(1 if deals else run)]
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
            join = partial(_joined, b, code)
            whole = [list(values) for values in zip(*parts, strict=True)]
            if not lanes or len(parts) == 1:
                return reduce(join, map(list, zip(*(planes_of(b, values) for values in whole), strict=True)))
            rows = [side_by_side(b, values) for values in whole]

            def total_of(i: int) -> list[Value]:
                starts = range(i * length, (i + 1) * length, lanes)
                return reduce(join, ([shuffle(b, row, range(e, e + lanes)) for row in rows] for e in starts))

            return _folded(b, form, code, total_of, lanes, length // run)

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
                total = _Total(b, form, code, 0 if code == INF else lanes)
                for e in range(0, length, lanes):
                    again = max(0, e + lanes - length)  # elements that were taken before
                    start = i * length + e - again
                    if narrow:
                        bits = shuffle(b, vectors[start // LANES], [start % LANES + k for k in range(lanes)])
                    else:
                        bits = _read(b, place, start, lanes, form, code)
                    if again:
                        bits = b.and_(bits, ir.Constant(bits.type, [-(k >= again) for k in range(lanes)]))
                    total.take(bits)
                return total.values

            close(block, _folded(b, form, code, total_of, PARTIAL if code == INF else lanes, length // run))

        def add_one(at: Value, block: Value) -> None:
            total = _Total(b, form, code, 0)
            places = places_of(total, block)
            total.values = [_if(b, go_on, b.load(place, align=4)) for place in places]
            others = [_Total(b, form, code, 0) for _ in range(CHUNK // LANES if long else 0)]

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
                    close(block, _folded(b, form, code, _kept_totals(b, form, code, b.gep(making, [parts]))))
            groups = b.udiv(b.add(count, number(LANES - 1)), number(LANES))
            if span is not None:
                exact, most = span.ends()
                with b.if_then(b.not_(b.fcmp_ordered("<=", most, exact)), likely=False):
                    b.store(_doubts_of(b, groups, sums, doubts, exact, doubt), found)
            elif roots is not None:
                with b.if_then(roots.are_unsure(), likely=False):
                    b.store(_doubts_of(b, groups, sums, doubts, None, doubt), found)
            elif least is not None:
                bits = least.bits()
                tiny = b.icmp_unsigned("<", b.sub(bits, word(1)), word(SQUARED_LEAST - 1))
                with b.if_then(tiny, likely=False):
                    b.store(b.or_(b.load(found), _doubts_of_zeros(b, groups, sums, doubts)), found)
        return b.load(found)

    return emit


def _lanes_folded(form: Format, run: int, code: int) -> int:
    """Lanes of the sums that are folded where runs are short; 0 where numbers are dealt out to their blocks before.

    Folding takes half of the shuffles for 1x8, and with AVX2 a quarter less time for 1x4: those take turns with roots.
    Maxima are as narrow as numbers, which it does not help.
    """
    if code == INF:
        return LANES if run == LANES else 0
    lanes = 4 if has_only_avx2() else PARTIAL
    whole = run == 4 or run % lanes == 0
    # To read elements again, to fill lanes, pays for float32; but with AVX-512 not for a few that are left.
    fits = whole or (form.bits == 32 and (lanes == 4 or run % 4 == 0))
    return lanes if run >= 4 and fits else 0


def _kept_totals(b: Builder, form: Format, code: int, source: Value) -> Callable[[int], list[Value]]:
    """The totals of `LANES` blocks that were kept, from an address on."""
    total = _Total(b, form, code, 0)
    words = b.bitcast(source, ir.DoubleType().as_pointer())

    def total_of(i: int) -> list[Value]:
        places = [b.gep(words, [INT32(i * parts_of(form) + k * PARTIAL)]) for k in range(len(total.places))]
        return [b.load(b.bitcast(place, total.type.as_pointer()), align=4) for place in places]

    return total_of


def _folded(
    b: Builder, form: Format, code: int, total_of: Callable[[int], list[Value]], lanes: int = PARTIAL, several: int = 1
) -> list[Value]:
    """The totals of `LANES` blocks, a lane for each, by a tree of cheap shuffles.

    From those that ``total_of(i)`` has in so many lanes, one of a block, or `several` side by side.
    """
    # Inside the parts of 16 bytes of which vectors are made, then whole parts: the order of single blocks comes out
    # right.
    if code == INF and form.bits <= 32:
        orders = [[0, 2, 8, 10, 4, 6, 12, 14]] * 2 + [[0, 1, 2, 3, 8, 9, 10, 11]]
        strides = [1, 1, 4]
    else:
        orders = [[i + side for i in range(0, lanes, 2) for side in (0, lanes)]]
        orders += [[i + side for i in range(0, 2 * lanes, 4) for side in (0, 1)]] * (
            (lanes // several).bit_length() - 2
        )
        strides = [1, 2, 2]
    together = 1 << len(orders)  # of what `total_of` has, in one vector in the end
    blocks = [[i * several + lane * several // lanes for lane in range(lanes)] for i in range(together)]
    for order in orders:
        pairs = zip(blocks[::2], blocks[1::2], strict=True)
        blocks = [[[*x, *y][place] for place in order] for x, y in pairs]
    in_order = sorted(range(lanes), key=blocks[0].__getitem__)

    def folded(first: int, level: int) -> list[Value]:
        """Of 2 ** level of them: joined as soon as they are there, so that few are kept in registers."""
        if level == 0:
            total = total_of(first)
            if code == INF:
                low, high = range(PARTIAL), range(PARTIAL, 2 * PARTIAL)
                total = [_larger(b, shuffle(b, total[0], low), shuffle(b, total[0], high))]
            return total
        order, stride = orders[level - 1], strides[level - 1]
        x, y = folded(first, level - 1), folded(first + (1 << (level - 1)), level - 1)
        near, far = (
            [shuffle(b, p, [i + distance for i in order], q) for p, q in zip(x, y, strict=True)]
            for distance in (0, stride)
        )
        return _joined(b, code, near, far)

    parts = [folded(first, len(orders)) for first in range(0, LANES // several, together)]
    return [side_by_side(b, [shuffle(b, part, in_order) for part in values]) for values in zip(*parts, strict=True)]


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
            lost = b.or_(small, b.fcmp_ordered("==", wide, splat(double, math.inf)))
        wide = b.select(finite, b.fadd(wide, totals[1]), wide)
    return call(b, f"llvm.sqrt.v{LANES}f64", double, [wide]) if code == TWO else wide, lost


def _doubts_of(b: Builder, groups: Value, sums: Value, doubts: Value, exact: Value | None, doubt: Value) -> Value:
    """Note the doubts about norms, but for those up to a number which are `exact`; all of them in one word."""
    word, double = ir.IntType(64), ir.VectorType(ir.DoubleType(), LANES)
    found = cgutils.alloca_once_value(b, word(0))
    with cgutils.for_range(b, groups) as loop:
        here = b.gep(sums, [b.mul(loop.index, word(LANES))])
        wide = b.load(b.bitcast(here, double.as_pointer()), align=8)
        low = b.trunc(b.bitcast(wide, vector_of(64, LANES)), vector_of(32, LANES))
        flags = _are_near(b, _offsets(b, low, doubt), doubt)
        if exact is not None:
            flags = b.and_(flags, b.not_(b.fcmp_ordered("<=", wide, broadcast(b, exact, LANES))))
        bits = b.zext(b.bitcast(flags, ir.IntType(LANES)), word)
        b.store(bits, b.gep(doubts, [loop.index]))
        b.store(b.or_(b.load(found), bits), found)
    return b.load(found)


def _doubts_of_zeros(b: Builder, groups: Value, sums: Value, doubts: Value) -> Value:
    """Note that norms which are zero may be of numbers whose squares are; all of these notes in one word."""
    word, double = ir.IntType(64), ir.VectorType(ir.DoubleType(), LANES)
    found = cgutils.alloca_once_value(b, word(0))
    with cgutils.for_range(b, groups) as loop:
        here = b.gep(sums, [b.mul(loop.index, word(LANES))])
        norms = b.load(b.bitcast(here, double.as_pointer()), align=8)
        flags = b.fcmp_ordered("==", norms, splat(double, 0.0))
        bits, place = b.zext(b.bitcast(flags, ir.IntType(LANES)), word), b.gep(doubts, [loop.index])
        b.store(b.or_(b.load(place), bits), place)
        b.store(b.or_(b.load(found), bits), found)
    return b.load(found)


def _settle(
    b: Builder,
    strip: Strip,
    form: Format,
    code: int,
    block: Value,
    count: Value,
    sums: Value,
    norms: Value,
    making: Value,
) -> None:
    """The norms that a `_rows_taker` has noted, of those of `count` blocks from number `block` on, from first to last.

    To float32 as their exact sums demand, from what it left in `sums`; to float64 from squares of |x| / max |x|.
    Written for LLVM like `exact`: the same as a function took Numba a tenth longer to compile.
    """
    word = ir.IntType(64)
    left, doubts = cgutils.alloca_once(b, word), b.gep(making, [word(DOUBTS)])
    with cgutils.for_range(b, b.udiv(b.add(count, word(LANES - 1)), word(LANES))) as group:
        noted = b.load(b.gep(doubts, [group.index]))
        b.store(noted, left)
        with cgutils.for_range(b, call(b, "llvm.ctpop.i64", word, [noted])):
            flags = b.load(left)
            lane = b.add(b.mul(group.index, word(LANES)), call(b, "llvm.cttz.i64", word, [flags, ir.IntType(1)(0)]))
            b.store(b.and_(flags, b.sub(flags, word(1))), left)
            with b.if_then(b.icmp_unsigned("<", lane, count)):
                at = b.gep(strip.grid.start, [strip.grid.place(b, b.add(block, lane))])
                wide = b.gep(sums, [lane])
                if form.bits == 64:
                    found = _rescaled(b, at, form, strip)
                    b.store(found, wide)
                else:
                    found = _settled(b, at, form, code, strip, b.load(wide), making)
                b.store(found, b.gep(norms, [lane]))


@contextmanager
def _each_magnitude(b: Builder, source: Value, form: Format, strip: Strip) -> Iterator[Value]:
    """A loop over the elements of one block, which lie from an address on: their magnitudes."""
    with cgutils.for_range(b, length_in(b, strip.elements, strip.turns)) as loop:
        at = b.gep(source, [place_in(b, strip.elements, strip.turns, loop.index)])
        bits = b.extract_element(_read(b, at, 0, 1, form, INF), INT32(0))
        yield b.bitcast(bits, ir.DoubleType() if form.bits == 64 else ir.FloatType())


def _rescaled(b: Builder, source: Value, form: Format, strip: Strip) -> Value:
    """The norm of one block of float64, whose squares left its range."""
    double = ir.DoubleType()
    largest, high, low = (cgutils.alloca_once_value(b, double(0.0)) for _ in range(3))
    with _each_magnitude(b, source, form, strip) as x:
        most = b.load(largest)
        b.store(b.select(b.fcmp_ordered(">", x, most), x, most), largest)
    scale = b.load(largest)
    finite = b.and_(b.fcmp_ordered("!=", scale, double(0.0)), b.fcmp_ordered("<", scale, double(math.inf)))
    with b.if_then(finite):
        with _each_magnitude(b, source, form, strip) as x:
            share = b.fdiv(x, scale)
            total, error = _two_sum(b, b.load(high), b.fmul(share, share))
            b.store(total, high)
            b.store(b.fadd(b.load(low), error), low)
        root = call(b, "llvm.sqrt.f64", double, [b.fadd(b.load(high), b.load(low))])
        b.store(b.fmul(scale, root), largest)
    return b.load(largest)


def _settled(b: Builder, source: Value, form: Format, code: int, strip: Strip, wide: Value, making: Value) -> Value:
    """The norm of one block, whose elements lie from an address on, by the float64 near it."""
    square, word, single = ir.IntType(1)(code == TWO), ir.IntType(64), ir.FloatType()
    below, above = (b.fptrunc(b.fmul(wide, ir.DoubleType()(1 + side * MARGIN)), single) for side in (-1, 1))
    settled = cgutils.alloca_once_value(b, b.fptrunc(wide, single))
    finite = b.fcmp_ordered("<", wide, ir.DoubleType()(math.inf))
    with b.if_then(b.and_(finite, b.fcmp_ordered("!=", below, above))):
        for i in range(exact.EXACT_WORDS):
            b.store(word(0), b.gep(making, [word(i)]))
        with _each_magnitude(b, source, form, strip) as x:
            exact.add(b, making, x, square)
        b.store(exact.nearest(b, making, below, square), settled)
    return b.load(settled)


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


# --- strips --------------------------------------------------------------------------------------


@cache
def measure_strip(form: Format, runs: Runs, code: int) -> Any:
    """``(source, origin, grid, 0, loops, elements, 0, turns, i, stop, sums, 0, norms, 0, making, 0)``: norms.

    Those of blocks [i, stop) of a `source` whose first one is at `origin`. The `grid` and the `elements` of a block are
    tables of so many loops. In float64 they are left in `sums`, unless they are maxima.
    """
    word, many = ir.IntType(64), takes_many(runs)
    take_in, most_blocks = _rows_taker(form, runs, code), STRIP_BLOCKS if many else PART_BLOCKS

    def doubt_of(b: Builder, shape: Shape) -> Value:
        # A sum of n additions in sequence is off by n - 1 times 2 ** -53 of it at most, and its root by half of that
        # and half a unit: so many units in the last place, and no more, for of sorted numbers every fourth block of
        # four is 4 to 8 units from where rounding turns. Counted here are all vectors of a row, though those of long
        # runs are summed four side by side: that covers the joins of a row, and `JOINS` those behind the last.
        vectors = b.sdiv(b.add(shape.size, word(LANES - 1)), word(LANES))
        each = word(runs.length) if many else b.mul(vectors, word(LANES // PARTIAL))
        additions = b.add(b.mul(shape.rows, each), word(0 if many else JOINS))
        half = b.add(b.sdiv(b.add(additions, word(1)), word(2)), word(1))
        return smallest(b, word(MOST_DOUBT), half if code == TWO else additions)

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, elements: Value, turns: Value, i: Value, stop: Value,
        sums: Value, norms: Value, making: Value,
    ) -> None:  # fmt: skip
        strip = Strip(Grid(source, grid, loops), elements, turns, i, stop)
        shape, noted = shape_of(b, strip, runs), cgutils.alloca_once(b, word)
        doubt, fitting = doubt_of(b, shape), b.sdiv(word(FLAT_RUN), shape.size)
        fitting = b.select(b.icmp_signed(">", fitting, word(LANES)), fitting, word(LANES))
        one_row = b.icmp_signed("==", shape.rows, word(1))
        most = b.select(one_row, smallest(b, word(most_blocks), fitting), word(most_blocks))

        def take(rows: Rows) -> None:
            here, there = b.gep(sums, [rows.block]), b.gep(norms, [rows.block])
            b.store(take_in(b, rows, here, there, making, doubt), noted)

        def finish(i: Value, block: Value, count: Value) -> None:
            with b.if_then(b.icmp_unsigned("!=", b.load(noted), word(0)), likely=False):
                _settle(b, strip, form, code, i, count, b.gep(sums, [block]), b.gep(norms, [block]), making)

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
        total = _Total(b, form, TWO, LANES)

        def take(here: Value, lanes: int) -> None:
            if lanes > 1:
                prefetch(b, here, LANES * form.bits // 8)
            bits = _read(b, here, 0, lanes, form, TWO)
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
