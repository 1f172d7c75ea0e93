"""Whether norms of float32 are rounded as their exact sums demand, and those of which that is not sure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu.nests import place_in, short_loop
from npscope.backends.numba_cpu.rows import Runs, Shape, Strip, smallest, up_to
from npscope.backends.numba_cpu.totals import (
    INF,
    PARTIAL,
    TWO,
    Total,
    larger,
    numbers_of,
    only_if,
    takes_many,
    two_sum,
)
from npscope.backends.numba_cpu.vectors import (
    CHUNK,
    INT32,
    LANES,
    Builder,
    Format,
    Value,
    any_of,
    broadcast,
    call,
    has_only_avx2,
    on_floats,
    shuffle,
    spare_room,
    splat,
    vector_of,
)

_WORD = ir.IntType(64)

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

SQUARED_UNIT = 2.0**600
"""Numbers of float64 whose squares are too small, times it, or too large, by it, have squares that are not."""

EXACT_PARTS = 20
"""Float64 that hold a sum of up to 2 ** 21 squares of float32, and one number with a bit more, exactly.

Such a sum has 577 bits, from 2 ** 277 down to 2 ** -300. A part is at most 2 ** (21 - 53) times what the one before can
be, so that 32 bits of each are new: 18 parts would do.
"""

JOINS = 16
"""Additions in sequence that join lanes and what was summed side by side, at most."""

LEAST, DOUBTS = 0, LANES
"""Where least magnitudes and doubts stand in work arrays, on lines of their own."""


class Least:
    """The least magnitude of a strip that is not zero."""

    def __init__(self, b: Builder, place: Value, go_on: Value, width: int) -> None:
        """Of numbers of so many bits. At `place`, `LANES` of them stay from row to row."""
        self.b, self.type = b, vector_of(width, LANES)
        self.place = b.bitcast(place, self.type.as_pointer())
        # As the largest of their negated bits.
        self.least = cgutils.alloca_once_value(b, only_if(b, go_on, b.load(self.place, align=4)))

    def take(self, bits: Value) -> None:
        """Take in magnitudes, up to `LANES`."""
        if bits.type.count < LANES:
            bits = shuffle(self.b, bits, [min(i, bits.type.count) for i in range(LANES)], splat(bits.type, 0))
        self.b.store(larger(self.b, self.b.load(self.least), self.b.neg(bits)), self.least)

    def leave(self) -> None:
        """Keep what was found for the next row."""
        self.b.store(self.b.load(self.least), self.place, align=4)

    def largest_of(self, place: Value) -> Value:
        """Of the lanes that stand there."""
        name = f"llvm.vector.reduce.umax.v{LANES}i{self.type.element.width}"
        return call(self.b, name, self.type.element, [self.b.load(place)])

    def bits(self) -> Value:
        """Its bits, 0 if there is none."""
        return self.b.neg(self.largest_of(self.least))


class Span(Least):
    """Whether all float64 sums of a strip of float32 magnitudes are exact, by the least of these and the largest sum.

    Then nothing is to be asked about roundings: measured, that was a quarter of the time of blocks of four.
    """

    def __init__(self, b: Builder, place: Value, go_on: Value) -> None:
        super().__init__(b, place, go_on, 32)
        self.largest = cgutils.alloca_once_value(b, splat(self.type, 0))

    def take_rounded(self, sums: Value) -> None:
        """Take in rounded sums."""
        bits = self.b.bitcast(sums, vector_of(32, LANES))
        self.b.store(larger(self.b, self.b.load(self.largest), bits), self.largest)

    def ends(self) -> tuple[Value, Value]:
        """(the largest sum that is exact for sure, a number above all sums, or NaN)."""
        b = self.b
        both = self.bits(), self.largest_of(self.largest)
        exact, most = (b.fpext(b.bitcast(bits, ir.FloatType()), ir.DoubleType()) for bits in both)
        return b.fmul(exact, exact.type(EXACT_SPAN)), b.fmul(most, most.type(1 + 2.0**-23))


class Roots:
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


def note_doubts(b: Builder, groups: Value, sums: Value, doubts: Value, exact: Value | None, doubt: Value) -> Value:
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


def note_zeros(b: Builder, groups: Value, sums: Value, doubts: Value) -> Value:
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


class _Lanes(NamedTuple):
    """`LANES` blocks of a strip: where the first one is, and how far from it each of them."""

    strip: Strip
    shape: Shape
    form: Format
    start: Value
    offsets: Value

    def each_element(self, b: Builder, take: Callable[[Value], None]) -> None:
        """``take(address)`` for the elements of the first block."""
        strip, size = self.strip, self.shape.size

        def take_row(row: Value) -> None:
            at = b.gep(self.start, [place_in(b, strip.elements, strip.turns, b.mul(row, size))])
            short_loop(b, size, lambda e: take(b.gep(at, [e])))

        short_loop(b, self.shape.rows, take_row)

    def magnitudes(self, b: Builder, at: Value) -> Value:
        """Those of the elements, one of each block, of which the first block has its own at an address."""
        number = ir.IntType(self.form.bits)
        bits = ir.Constant(ir.VectorType(number, LANES), ir.Undefined)
        for lane in map(INT32, range(LANES)):
            place = b.gep(at, [b.load(b.gep(self.offsets, [lane]))])
            bits = b.insert_element(bits, b.load(b.bitcast(place, number.as_pointer())), lane)
        bits = numbers_of(b, bits, self.form, INF)
        scalar = ir.DoubleType() if self.form.bits == 64 else ir.FloatType()
        return b.bitcast(bits, ir.VectorType(scalar, LANES))


class _Sums:
    """A sum of float64 in each of `LANES` lanes, what was lost of it, and of that, and so on: exact in the end."""

    def __init__(self, b: Builder, start: Value, room: Value) -> None:
        """Of up to `EXACT_PARTS`, for which there is room.

        Only one is kept in registers: of a few numbers that are all equal, or have few bits, nothing is lost.
        """
        self.b, self.type = b, start.type
        self.first = cgutils.alloca_once_value(b, start)
        self.place = b.bitcast(room, start.type.as_pointer())
        self.depth = cgutils.alloca_once_value(b, _WORD(1))

    def part(self, k: Value) -> Value:
        """Where a part is, but the first one while numbers are added."""
        return self.b.gep(self.place, [k])

    def add(self, x: Value) -> None:
        """Add numbers: what is lost of a part to the next one, until nothing is."""
        b, zero = self.b, splat(self.type, 0.0)
        total, rest = two_sum(b, b.load(self.first), x)
        b.store(total, self.first)
        lost = cgutils.alloca_once_value(b, rest)
        with (
            b.if_then(any_of(b, b.fcmp_ordered("!=", rest, zero))),
            up_to(b, _WORD(1), _WORD(EXACT_PARTS)) as (k, go_on_from),
        ):
            following, depth = b.add(k, _WORD(1)), b.load(self.depth)
            deeper = b.icmp_unsigned("==", k, depth)
            total, rest = two_sum(b, b.select(deeper, zero, b.load(self.part(k), align=8)), b.load(lost))
            b.store(total, self.part(k), align=8)
            b.store(rest, lost)
            b.store(b.select(deeper, following, depth), self.depth)
            go_on_from(b.select(any_of(b, b.fcmp_ordered("!=", rest, zero)), following, _WORD(EXACT_PARTS)))

    def leading(self) -> Value:
        """The exact sums as float64, of their sign.

        Parts, which overlap, are added from the last to the first, and what is lost is left in their places: until the
        first one outweighs all others.
        """
        b, zero = self.b, splat(self.type, 0.0)
        b.store(b.load(self.first), self.place, align=8)
        inner = b.sub(b.load(self.depth), _WORD(1))
        total, rest = (cgutils.alloca_once_value(b, zero) for _ in range(2))
        with up_to(b, _WORD(0), _WORD(EXACT_PARTS)) as (turn, go_on_from):
            b.store(b.load(self.part(inner), align=8), total)
            b.store(zero, rest)

            def join(k: Value) -> None:
                at = b.sub(inner, k)
                higher, lost = two_sum(b, b.load(self.part(b.sub(at, _WORD(1))), align=8), b.load(total))
                b.store(lost, self.part(at), align=8)
                b.store(higher, total)
                b.store(b.fadd(b.load(rest), on_floats(b, "fabs", lost)), rest)

            short_loop(b, inner, join)
            b.store(b.load(total), self.place, align=8)
            lost, size = b.load(rest), on_floats(b, "fabs", b.load(total))
            open_ = b.fcmp_ordered("<=", size, b.fmul(lost, splat(self.type, 2.0)))
            open_ = b.and_(open_, b.fcmp_ordered(">", lost, zero))
            go_on_from(b.select(any_of(b, open_), b.add(turn, _WORD(1)), _WORD(EXACT_PARTS)))
        return b.load(total)


def settle(
    b: Builder,
    strip: Strip,
    shape: Shape,
    form: Format,
    code: int,
    i: Value,
    count: Value,
    sums: Value,
    norms: Value,
    making: Value,
    room: Value,
) -> None:
    """The norms that a `_rows_taker` has noted, of those of `count` adjacent blocks from number `i` on.

    Their elements are summed again, those of `LANES` blocks at a time: for float32 exactly, to round as that demands,
    and of float64 in a unit in which squares stay in range. There is `room` for these sums.
    """
    start, doubts = b.gep(strip.grid.start, [strip.grid.place(b, i)]), b.gep(making, [_WORD(DOUBTS)])
    offsets = spare_room(b, LANES, doubts)
    with cgutils.for_range(b, b.udiv(b.add(count, _WORD(LANES - 1)), _WORD(LANES))) as group:
        first = b.mul(group.index, _WORD(LANES))
        left = b.sub(count, first)
        # Bits of blocks beyond the last mean nothing: with them, a few normal blocks took ten times as long.
        within = b.sub(b.shl(_WORD(1), smallest(b, left, _WORD(LANES))), _WORD(1))
        noted = b.and_(b.load(b.gep(doubts, [group.index])), within)
        with b.if_then(b.icmp_unsigned("!=", noted, _WORD(0))):
            here = b.gep(start, [b.mul(first, shape.size)])

            def put_offset(lane: Value, left: Value = left) -> None:  # beyond the last block, its own
                column = b.mul(smallest(b, lane, b.sub(left, _WORD(1))), shape.size)
                b.store(column, b.gep(offsets, [lane]))

            short_loop(b, _WORD(LANES), put_offset)
            lanes = _Lanes(strip, shape, form, here, offsets)
            chosen = b.bitcast(b.trunc(noted, ir.IntType(LANES)), vector_of(1, LANES))
            places = [
                b.bitcast(b.gep(place, [first]), ir.VectorType(place.type.pointee, LANES).as_pointer())
                for place in (sums, norms)
            ]
            wide = b.load(places[0], align=4)
            again = _rescaled(b, lanes, wide) if form.bits == 64 else _rounded(b, lanes, code, wide, room)
            for place in places if form.bits == 64 else places[1:]:
                b.store(b.select(chosen, again, b.load(place, align=4)), place, align=4)


def _rescaled(b: Builder, lanes: _Lanes, wide: Value) -> Value:
    """Norms of float64 whose squares left the range of their sums, which are infinite or small."""
    infinite = splat(wide.type, math.inf)
    large = b.fcmp_ordered("==", wide, infinite)
    unit, back = (
        b.select(large, splat(wide.type, x), splat(wide.type, 1 / x)) for x in (1 / SQUARED_UNIT, SQUARED_UNIT)
    )
    total = Total(b, lanes.form, TWO, LANES)

    def take(at: Value) -> None:
        x = b.fmul(lanes.magnitudes(b, at), unit)
        total.join([b.fmul(x, x)])

    lanes.each_element(b, take)
    high, low = total.values
    finite = b.fcmp_ordered("<", high, infinite)  # what was lost of an infinite sum is NaN
    return b.select(finite, b.fmul(on_floats(b, "sqrt", b.fadd(high, low)), back), high)


def _rounded(b: Builder, lanes: _Lanes, code: int, wide: Value, room: Value) -> Value:
    """The float32 nearest to norms that are near to `wide`."""
    single = ir.VectorType(ir.FloatType(), LANES)
    below, above = (b.fptrunc(b.fmul(wide, splat(wide.type, 1 + side * MARGIN)), single) for side in (-1, 1))
    open_ = b.and_(b.fcmp_ordered("<", wide, splat(wide.type, math.inf)), b.fcmp_ordered("!=", below, above))
    # Halfway to the next one, also to infinity; no subnormal is in doubt (`_offsets`). Its square is exact, too.
    words = b.bitcast(b.fpext(below, wide.type), vector_of(64, LANES))
    middle = b.bitcast(b.add(words, splat(words.type, ROUNDING_BORDER)), wide.type)
    sums = _Sums(b, b.fneg(b.fmul(middle, middle) if code == TWO else middle), room)

    def take(at: Value) -> None:
        x = b.fpext(lanes.magnitudes(b, at), wide.type)
        sums.add(b.fmul(x, x) if code == TWO else x)

    lanes.each_element(b, take)
    beyond, zero = sums.leading(), splat(wide.type, 0.0)
    bits = b.bitcast(below, vector_of(32, LANES))
    odd = b.trunc(bits, vector_of(1, LANES))
    up = b.or_(b.fcmp_ordered(">", beyond, zero), b.and_(b.fcmp_ordered("==", beyond, zero), odd))
    nearest = b.bitcast(b.add(bits, b.zext(up, bits.type)), single)
    return b.select(open_, nearest, b.fptrunc(wide, single))


# --- how much a norm may be off -----------------------------------------------------------------


def additions_of(run: int, rows: int) -> int:
    """Additions in sequence for blocks of so many adjacent numbers in so many rows."""
    if run < LANES:
        return run * rows
    several = -(-run // LANES) if run <= CHUNK else -(-run // CHUNK) + CHUNK // LANES
    return LANES // PARTIAL * several * rows + JOINS


def doubt_of(b: Builder, shape: Shape, runs: Runs, code: int) -> Value:
    """Units in the last place of float64 by which norms of blocks of this shape may be off at most.

    A sum of n additions in sequence is off by n - 1 times 2 ** -53 of it at most, and its root by half of that and half
    a unit: so many units in the last place, and no more, for of sorted numbers every fourth block of four is 4 to 8
    units from where rounding turns. Counted here are all vectors of a row, though those of long runs are summed four
    side by side, as `additions_of` says: that covers the joins of a row, and `JOINS` those behind the last.
    """
    word = ir.IntType(64)
    vectors = b.sdiv(b.add(shape.size, word(LANES - 1)), word(LANES))
    many = takes_many(runs)
    each = word(runs.length) if many else b.mul(vectors, word(LANES // PARTIAL))
    additions = b.add(b.mul(shape.rows, each), word(0 if many else JOINS))
    half = b.add(b.sdiv(b.add(additions, word(1)), word(2)), word(1))
    return smallest(b, word(MOST_DOUBT), half if code == TWO else additions)
