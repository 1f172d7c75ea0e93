"""Exact sums of float32 magnitudes or their squares, and the rounding that they demand.

A sum is one integer of 640 bits, in units of half the smallest magnitude or of its square: 2**64 of the largest
squares fit. Written for LLVM, which adds integers of any width: Numba took longer to compile this than all else of
a norm.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.vectors import INT32, Builder, Value, step

EXACT_WORDS = 10
"""The int64 that an exact sum takes."""

_SUM, _PAIR, _WORD = ir.IntType(64 * EXACT_WORDS), ir.IntType(128), ir.IntType(64)


def _halves_of(b: Builder, number: Value) -> tuple[Value, Value]:
    """(m, e) of a float32 magnitude: it is m times 2**e of half the smallest one."""
    bits = b.bitcast(number, INT32)
    exponent = b.lshr(bits, INT32(23))
    normal = b.zext(b.icmp_unsigned("!=", exponent, INT32(0)), INT32)
    mantissa = b.or_(b.and_(bits, INT32((1 << 23) - 1)), b.shl(normal, INT32(23)))
    return b.zext(b.add(mantissa, mantissa), _WORD), b.zext(b.sub(exponent, normal), _WORD)


def _term(b: Builder, mantissa: Value, exponent: Value, square: Value) -> Value:
    """A number or its square as an integer of the sum. By way of memory: LLVM takes 50 ms over such a wide shift."""
    mantissa = b.select(square, b.mul(mantissa, mantissa), mantissa)
    exponent = b.select(square, b.add(exponent, exponent), exponent)
    place = cgutils.alloca_once(b, _SUM)
    b.store(_SUM(0), place, align=8)
    shift = b.zext(b.and_(exponent, _WORD(63)), _PAIR)
    word = b.gep(b.bitcast(place, _WORD.as_pointer()), [b.lshr(exponent, _WORD(6))])
    b.store(b.shl(b.zext(mantissa, _PAIR), shift), b.bitcast(word, _PAIR.as_pointer()), align=8)
    return b.load(place, align=8)


def _add(b: Builder, place: Value, number: Value, square: Value) -> None:
    total = b.bitcast(place, _SUM.as_pointer())
    b.store(b.add(b.load(total, align=8), _term(b, *_halves_of(b, number), square)), total, align=8)


def _nearest(b: Builder, place: Value, below: Value, square: Value) -> Value:
    mantissa, exponent = _halves_of(b, below)
    middle = _term(b, b.add(mantissa, _WORD(1)), exponent, square)
    bits = b.bitcast(below, INT32)
    # What lies just between goes up if `below` is odd: as if it were a unit more.
    odd = b.zext(b.trunc(bits, ir.IntType(1)), _SUM)
    total = b.add(b.load(b.bitcast(place, _SUM.as_pointer()), align=8), odd)
    up = b.zext(b.icmp_unsigned(">", total, middle), INT32)
    return b.bitcast(b.add(bits, up), ir.FloatType())


add_exactly = step(_add, 4)
"""``add_exactly(sums, i, x, square)``: add float32 x >= 0, or its square, to the sum in words `i` and following."""

round_exactly = step(_nearest, 4, types.float32)
"""``round_exactly(sums, i, below, square)``: the float32 nearest to a sum, or to its root if it is one of squares.

That is `below` or the next larger one, infinity included; of two that are as near the even one.
"""
