"""What norms are made of, in vectors: sums and maxima of magnitudes, kept in lanes, and folded to one of each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu.rows import Runs
from npscope.backends.numba_cpu.vectors import (
    INT32,
    LANES,
    Builder,
    Format,
    Value,
    broadcast,
    fma,
    has_only_avx2,
    load,
    shuffle,
    side_by_side,
    single_of,
    splat,
    vector_of,
)

PARTIAL = 8
"""Lanes in which float64 sums of long runs are formed."""

INF, ONE, TWO = 0, 1, 2
"""What is made of magnitudes: the largest, their sum, the sum of their squares."""


def takes_many(runs: Runs) -> bool:
    """Whether blocks are summed side by side, a lane for each."""
    return runs.length < LANES and not runs.long


def larger(b: Builder, x: Value, y: Value) -> Value:
    """The larger of two, by lane."""
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def read_numbers(b: Builder, source: Value, e: int, count: int, form: Format, code: int) -> Value:
    """`count` elements at `e` as float32 or float64, in integers; magnitudes, or what has the same squares."""
    return numbers_of(b, load(b, b.gep(source, [INT32(e)]), vector_of(form.bits, count)), form, code)


def numbers_of(b: Builder, bits: Value, form: Format, code: int) -> Value:
    """Elements in the way in which `read_numbers` gives them."""
    if form.bits == 64:
        return b.and_(bits, splat(bits.type, (1 << 63) - 1))
    return b.bitcast(single_of(b, bits, form, "any" if code == TWO else "drop"), vector_of(32, bits.type.count))


def only_if(b: Builder, condition: Value, numbers: Value) -> Value:
    """Numbers, or zeros where the condition is false. By bits: of a choice LLVM would make two loops."""
    word = ir.IntType(64 if isinstance(numbers.type.element, ir.DoubleType) else numbers.type.element.width)
    mask = broadcast(b, b.sext(condition, word), numbers.type.count)
    return b.bitcast(b.and_(b.bitcast(numbers, mask.type), mask), numbers.type)


def two_sum(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """(s, e) with s the rounded sum and s + e exact (Knuth 1969)."""
    s = b.fadd(x, y)
    t = b.fsub(s, x)
    return s, b.fadd(b.fsub(x, b.fsub(s, t)), b.fsub(y, t))


class Total:
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
        """The lanes so far, and what was lost of them."""
        return [self.b.load(place) for place in self.places]

    @values.setter
    def values(self, values: Sequence[Value]) -> None:
        for value, place in zip(values, self.places, strict=True):
            self.b.store(value, place)

    def take(self, bits: Value) -> None:
        """Take in numbers, as `read_numbers` gives them: as many as there are lanes, or twice as many."""
        b = self.b
        if self.code == INF:
            self.values = [larger(b, self.values[0], bits)]
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
        self.values = joined(self.b, self.code, self.values, other)


def joined(b: Builder, code: int, x: Sequence[Value], y: Sequence[Value]) -> list[Value]:
    """Two totals as one."""
    if code == INF:
        return [larger(b, x[0], y[0])]
    if len(x) == 1:
        return [b.fadd(x[0], y[0])]
    total, lost = two_sum(b, x[0], y[0])
    for more in (x[1], *y[1:]):
        lost = b.fadd(lost, more)
    return [total, lost]


def parts_of(form: Format) -> int:
    """Places of 8 bytes for the total of one block in many lanes."""
    return PARTIAL * max(1, form.bits // 32)


def lanes_folded(form: Format, run: int, code: int) -> int:
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


def kept_totals(b: Builder, form: Format, code: int, source: Value) -> Callable[[int], list[Value]]:
    """The totals of `LANES` blocks that were kept, from an address on."""
    total = Total(b, form, code, 0)
    words = b.bitcast(source, ir.DoubleType().as_pointer())

    def total_of(i: int) -> list[Value]:
        places = [b.gep(words, [INT32(i * parts_of(form) + k * PARTIAL)]) for k in range(len(total.places))]
        return [b.load(b.bitcast(place, total.type.as_pointer()), align=4) for place in places]

    return total_of


def folded_totals(
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
                total = [larger(b, shuffle(b, total[0], low), shuffle(b, total[0], high))]
            return total
        order, stride = orders[level - 1], strides[level - 1]
        x, y = folded(first, level - 1), folded(first + (1 << (level - 1)), level - 1)
        near, far = (
            [shuffle(b, p, [i + distance for i in order], q) for p, q in zip(x, y, strict=True)]
            for distance in (0, stride)
        )
        return joined(b, code, near, far)

    parts = [folded(first, len(orders)) for first in range(0, LANES // several, together)]
    return [side_by_side(b, [shuffle(b, part, in_order) for part in values]) for values in zip(*parts, strict=True)]
