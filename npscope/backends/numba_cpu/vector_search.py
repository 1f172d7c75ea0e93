"""Vector code that looks at the dense keys of a scope: how many are large enough, and which ones those are.

Whole loops, over `SLACK` keys at a time: written in Python, they took half a second to compile. Work arrays have
so many entries beyond those in use; they are read, and written where a mask is, and count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.rows import over_lanes
from npscope.backends.numba_cpu.vectors import (
    LINE,
    Builder,
    Value,
    broadcast,
    call,
    first_lanes,
    load,
    narrow,
    prefetch,
    splat,
    step,
    store,
    vector_of,
)

SLACK = 64
"""Keys that are looked at together: only in one such chunk of a scope do ties have to be told apart."""

_WORD, _FLAGS = ir.IntType(64), vector_of(1, SLACK)


@contextmanager
def _chunks(b: Builder, keys: Value, n: Value) -> Iterator[tuple[Value, Value, Value, Callable[[], None]]]:
    """A loop over chunks of n keys: (number of the first key, keys, bits of those that are among the n, break)."""
    vector = vector_of(keys.type.pointee.width, SLACK)
    with cgutils.for_range(b, b.udiv(b.add(n, _WORD(SLACK - 1)), _WORD(SLACK))) as loop:
        first = b.mul(loop.index, _WORD(SLACK))
        left = b.sub(n, first)
        some = b.sub(b.shl(_WORD(1), b.and_(left, _WORD(SLACK - 1))), _WORD(1))
        inside = b.select(b.icmp_signed(">=", left, _WORD(SLACK)), _WORD(-1), some)
        yield first, load(b, b.gep(keys, [first]), vector), inside, loop.do_break


def _bits(b: Builder, sign: str, keys: Value, border: Value) -> Value:
    """A bit for each key that compares so with the border."""
    return b.bitcast(b.icmp_unsigned(sign, keys, border), _WORD)


def _add(b: Builder, place: Value, number: Value) -> None:
    b.store(b.add(b.load(place), number), place)


def _number_of(b: Builder, bits: Value) -> Value:
    return call(b, "llvm.ctpop.i64", _WORD, [bits])


def _without_first(b: Builder, bits: Value, count: Value) -> Value:
    """Bits without the lowest `count` of those that are set."""
    place = cgutils.alloca_once_value(b, bits)
    with cgutils.for_range(b, count):
        rest = b.load(place)
        b.store(b.and_(rest, b.sub(rest, _WORD(1))), place)
    return b.load(place)


def emit_count_from(b: Builder, keys: Value, n: Value, limit: Value) -> Value:
    """How many of n keys are at least `limit`."""
    found = cgutils.alloca_once_value(b, _WORD(0))
    border = narrow(b, limit, vector_of(keys.type.pointee.width, SLACK))
    with _chunks(b, keys, n) as (_, some, inside, _):
        _add(b, found, _number_of(b, b.and_(_bits(b, ">=", some, border), inside)))
    return b.load(found)


def emit_neighbours_of(b: Builder, keys: Value, n: Value, limit: Value) -> Value:
    """Write `neighbours_of`, of less than 2 ** 31 keys, which a scope in a work array has."""
    vector = vector_of(keys.type.pointee.width, SLACK)
    border, ones, zeros = narrow(b, limit, vector), splat(vector, -1), splat(vector, 0)
    above, below = cgutils.alloca_once_value(b, ones), cgutils.alloca_once_value(b, zeros)
    with _chunks(b, keys, n) as (first, some, _, _):
        flags, valid = b.icmp_unsigned(">=", some, border), first_lanes(b, b.sub(n, first), SLACK)
        up = b.select(b.and_(flags, valid), some, ones)
        down = b.select(b.and_(b.not_(flags), valid), some, zeros)
        for place, key, sign in ((above, up, "<"), (below, down, ">")):
            best = b.load(place)
            b.store(b.select(b.icmp_unsigned(sign, key, best), key, best), place)
    suffix = f"v{SLACK}i{vector.element.width}"
    ends = (
        call(b, f"llvm.vector.reduce.{name}.{suffix}", vector.element, [b.load(place)])
        for name, place in (("umin", above), ("umax", below))
    )
    return cgutils.pack_array(b, [end if vector.element.width == 64 else b.zext(end, _WORD) for end in ends])


def emit_mark(b: Builder, keys: Value, n: Value, limit: Value, ties: Value, mask: Value) -> Value:
    """Write `mark`."""
    border = narrow(b, limit, vector_of(keys.type.pointee.width, SLACK))
    left = cgutils.alloca_once_value(b, ties)
    with _chunks(b, keys, n) as (first, some, inside, _):
        here = b.gep(mask, [first])
        # Without AVX-512, flags that were bits in between are taken apart one by one.
        store(b, b.zext(b.icmp_unsigned(">=", some, border), vector_of(8, SLACK)), here)
        equal = b.and_(_bits(b, "==", some, border), inside)
        count, before = _number_of(b, equal), b.load(left)
        enough = b.icmp_signed(">=", before, count)
        with b.if_then(b.not_(enough), likely=False):
            kept = b.and_(_bits(b, ">=", some, border), b.not_(_without_first(b, equal, before)))
            store(b, b.zext(b.bitcast(kept, _FLAGS), vector_of(8, SLACK)), here)
        b.store(b.select(enough, b.sub(before, count), _WORD(0)), left)
    return b.load(left)


def _mark_not_below(b: Builder, keys: Value, n: Value, limits: Value, mask: Value) -> None:
    real = ir.DoubleType() if keys.type.pointee.width == 64 else ir.FloatType()
    norms, borders = (ir.VectorType(kind, SLACK) for kind in (real, limits.type.pointee))
    with _chunks(b, keys, n) as (first, some, _, _):
        sizes, border = b.bitcast(some, norms), b.load(b.bitcast(b.gep(limits, [first]), borders.as_pointer()), align=4)
        sizes = sizes if norms == borders else b.fpext(sizes, borders)
        store(b, b.zext(b.fcmp_unordered(">=", sizes, border), vector_of(8, SLACK)), b.gep(mask, [first]))


def _tie_border(b: Builder, keys: Value, n: Value, limit: Value, ties: Value) -> Value:
    border = narrow(b, limit, vector_of(keys.type.pointee.width, SLACK))
    found, left = cgutils.alloca_once_value(b, n), cgutils.alloca_once_value(b, ties)
    with _chunks(b, keys, n) as (first, some, inside, leave):
        equal = b.and_(_bits(b, "==", some, border), inside)
        count, before = _number_of(b, equal), b.load(left)
        with b.if_then(b.icmp_signed("<", before, count), likely=False):
            rest = _without_first(b, equal, before)
            at = call(b, "llvm.cttz.i64", _WORD, [rest, ir.IntType(1)(1)])
            b.store(b.add(first, at), found)
            b.store(_WORD(0), left)
            leave()
        b.store(b.sub(before, count), left)
    return cgutils.pack_array(b, [b.load(found), b.load(left)])


_PAIR: Any = types.UniTuple(types.uint64, 2)

neighbours_of = step(emit_neighbours_of, 4, _PAIR)
"""``neighbours_of(keys, start, n, limit)``: (least key that is at least `limit`, largest below it).

All ones and 0 where there is none.
"""

mark = step(emit_mark, 7, types.int64)
"""``mark(keys, start, n, limit, ties, mask, at)``: mask of n keys, and how many ties are left.

True for those above `limit`, and for the first `ties` that equal it.
"""

mark_not_below = step(_mark_not_below, 7)
"""``mark_not_below(keys, start, n, limits, l, mask, at)``: mask of n keys of norms, NaN among them, and their limits.

Limits are floats as wide as norms, or wider.
"""

tie_border = step(_tie_border, 5, types.UniTuple(types.int64, 2))
"""``tie_border(keys, start, n, limit, ties)``: the key that equals `limit` after the first `ties` do, and ties left.

That is n where there is none.
"""


def _ends_of(b: Builder, keys: Value, n: Value) -> Value:
    line = vector_of(keys.type.pointee.width, 8 * LINE // keys.type.pointee.width)
    least, most = (cgutils.alloca_once_value(b, splat(line, end)) for end in (-1, 0))

    def take(e: Value, count: int) -> None:
        here = b.gep(keys, [e])
        if count > 1:
            prefetch(b, here, LINE)
            found = load(b, here, line)
        else:
            found = broadcast(b, b.load(here), line.count)
        for place, sign in ((least, "<"), (most, ">")):
            kept = b.load(place)
            b.store(b.select(b.icmp_unsigned(sign, found, kept), found, kept), place)

    over_lanes(b, n, line.count, take)
    names = (f"llvm.vector.reduce.{end}.v{line.count}i{line.element.width}" for end in ("umin", "umax"))
    ends = (call(b, name, line.element, [b.load(place)]) for name, place in zip(names, (least, most), strict=True))
    return cgutils.pack_array(b, [end if end.type == _WORD else b.zext(end, _WORD) for end in ends])


ends_of = step(_ends_of, 3, types.UniTuple(types.uint64, 2))
"""``ends_of(keys, i, n)``: the least and the largest of n keys."""
