"""Whether norms of float32 are rounded as their exact sums demand, and those of which that is not sure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu import exact
from npscope.backends.numba_cpu.nests import length_in, place_in
from npscope.backends.numba_cpu.rows import Runs, Shape, Strip, smallest
from npscope.backends.numba_cpu.totals import INF, PARTIAL, TWO, larger, only_if, read_numbers, takes_many, two_sum
from npscope.backends.numba_cpu.vectors import (
    CHUNK,
    INT32,
    LANES,
    Builder,
    Format,
    Value,
    broadcast,
    call,
    has_only_avx2,
    shuffle,
    splat,
    vector_of,
)

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

JOINS = 16
"""Additions in sequence that join lanes and what was summed side by side, at most."""

LEAST = -(-exact.EXACT_WORDS // 8) * 8
DOUBTS = LEAST + LANES
"""Where least magnitudes and doubts stand in work arrays, on lines of their own, behind an exact sum."""


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


def settle(
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
        bits = b.extract_element(read_numbers(b, at, 0, 1, form, INF), INT32(0))
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
            total, error = two_sum(b, b.load(high), b.fmul(share, share))
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
