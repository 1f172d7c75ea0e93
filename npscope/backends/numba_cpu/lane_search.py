"""The first-ranked keys of scopes of some dozens or hundreds: of `LANES` scopes at a time, a lane of vectors for each.

To search scopes of 64 keys one by one takes 600 cycles each, most of them between two looks at the keys. Here keys are
dealt into planes, the first keys of all scopes, the second, and so on, and every lane guesses and counts by itself, as
`search.separator` does, until the last one has found its limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.vector_search import emit_mark
from npscope.backends.numba_cpu.vectors import (
    INT32,
    Builder,
    Format,
    Value,
    broadcast,
    call,
    first_lanes,
    load,
    planes_of,
    rounded_to,
    shuffle,
    signed_bits_of,
    single_of,
    splat,
    step,
    store,
    store_masked,
    vector_of,
)

LANES = 16
"""Scopes that are searched together, and keys of each that are dealt together."""

MOST_KEYS = 256
"""Keys of a scope that is searched so, at most: their planes, on the stack, fill the nearest cache, or half of it.

From 384 on it was slower than one by one.
"""

QUICK_PROBES = 10
"""Guesses before each one takes a look at the keys next to it, three times as long: most scopes are done by then."""

COUNTERS = 4
"""Sums of a lane side by side, of a quarter of its keys each: they fit the bits of a key."""

_WORD, _REAL = ir.IntType(64), ir.DoubleType()
_COUNTS = vector_of(32, LANES)


def _stored(b: Builder, value: Value) -> Value:
    """A place on the stack that holds this now."""
    place = cgutils.alloca_once(b, value.type)
    b.store(value, place)
    return place


def _sign(vector: Any) -> Value:
    """The sign bit of every lane: numbers without a sign compare as signed ones when it is turned."""
    return splat(vector, 1 << (vector.element.width - 1))


class _Planes(NamedTuple):
    """Keys of `LANES` scopes, the j-th of all in plane j, their sign bit turned; zeros beyond, up to `whole` planes."""

    start: Value
    n: Value
    whole: Value

    @classmethod
    def _on_stack(cls, b: Builder, keys: Value, n: Value) -> _Planes:
        """A place for n planes of such keys."""
        vector = vector_of(keys.type.pointee.width, LANES)
        with b.goto_entry_block():  # not `cgutils.alloca_once`, which would write zeros to all of it
            place = b.alloca(ir.ArrayType(vector, MOST_KEYS))
        start = b.bitcast(place, vector.as_pointer())
        return cls(start, n, b.and_(b.add(n, _WORD(LANES - 1)), _WORD(-LANES)))

    def _end(self, b: Builder) -> None:
        """Write the zeros."""
        with cgutils.for_range(b, b.sub(self.whole, self.n)) as loop:
            b.store(_sign(self.start.type.pointee), b.gep(self.start, [b.add(self.n, loop.index)]))

    @classmethod
    def of_planes(cls, b: Builder, keys: Value, pitch: Value, n: Value) -> _Planes:
        """Of scopes whose j-th keys lie side by side, and so far from the next ones."""
        planes = cls._on_stack(b, keys, n)
        vector = planes.start.type.pointee
        with cgutils.for_range(b, n) as loop:
            plane = load(b, b.gep(keys, [b.mul(loop.index, pitch)]), vector)
            b.store(b.xor(plane, _sign(vector)), b.gep(planes.start, [loop.index]))
        planes._end(b)
        return planes

    @classmethod
    def of_rows(cls, b: Builder, keys: Value, pitch: Value, n: Value, rows: Value) -> _Planes:
        """Of `rows` scopes of n keys, so far apart. Lanes for which there is none repeat the last one."""
        planes = cls._on_stack(b, keys, n)
        start, whole, vector = planes.start, planes.whole, planes.start.type.pointee
        last = b.sub(rows, _WORD(1))
        lanes = [call(b, "llvm.smin.i64", _WORD, [_WORD(lane), last]) for lane in range(LANES)]
        places = [b.gep(keys, [b.mul(lane, pitch)]) for lane in lanes]
        with cgutils.for_range(b, b.udiv(whole, _WORD(LANES))) as loop:
            first = b.mul(loop.index, _WORD(LANES))
            tile = [load(b, b.gep(place, [first]), vector) for place in places]
            for j, plane in enumerate(planes_of(b, tile)):
                b.store(b.xor(plane, _sign(vector)), b.gep(start, [b.add(first, _WORD(j))]))
        planes._end(b)
        return planes

    def count_from(self, b: Builder, border: Value) -> Value:
        """How many keys of each lane are at least its border, which no zero is.

        In vectors of 32 bytes: of 64, to compare and to add takes three instructions, not two.
        """
        width = border.type.element.width
        some = min(LANES, 256 // width)
        vector, parts = vector_of(width, some), [range(start, start + some) for start in range(0, LANES, some)]
        places = b.bitcast(self.start, vector.as_pointer())
        below = b.sub(b.xor(border, _sign(border.type)), splat(border.type, 1))
        limits = [shuffle(b, below, part) for part in parts]
        sums = [[_stored(b, splat(vector, 0)) for _ in range(COUNTERS)] for _ in parts]
        with cgutils.for_range(b, b.udiv(self.whole, _WORD(COUNTERS))) as loop:
            first = b.mul(loop.index, _WORD(COUNTERS * len(parts)))
            for c, (p, limit) in itertools.product(range(COUNTERS), enumerate(limits)):
                keys = b.load(b.gep(places, [b.add(first, _WORD(c * len(parts) + p))]))
                above = b.sext(b.icmp_signed(">", keys, limit), vector)
                b.store(b.sub(b.load(sums[p][c]), above), sums[p][c])
        found = []
        for part in sums:
            wide = vector_of(32, some)
            a, b_, c_, d = (_resized(b, b.load(place), wide) for place in part)
            found.append(b.add(b.add(a, b_), b.add(c_, d)))
        while len(found) > 1:
            both = range(2 * found[0].type.count)
            found = [shuffle(b, x, both, y) for x, y in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    def neighbours_of(self, b: Builder, border: Value) -> tuple[Value, Value]:
        """The least key of each lane that is at least its border, and the largest below; all ones, and 0, for none."""
        vector = border.type
        least, largest = (_stored(b, splat(vector, end)) for end in (-1, 0))
        with cgutils.for_range(b, self.n) as loop:
            keys = b.xor(b.load(b.gep(self.start, [loop.index])), _sign(vector))
            above, below, is_above = b.load(least), b.load(largest), b.icmp_unsigned(">=", keys, border)
            b.store(b.select(b.and_(is_above, b.icmp_unsigned("<", keys, above)), keys, above), least)
            b.store(b.select(b.or_(is_above, b.icmp_unsigned("<", keys, below)), below, keys), largest)
        return b.load(least), b.load(largest)


def _resized(b: Builder, numbers: Value, vector: Any) -> Value:
    """Lanes with more or fewer bits."""
    old, new = numbers.type.element.width, vector.element.width
    return numbers if old == new else (b.zext if old < new else b.trunc)(numbers, vector)


def _sum(b: Builder, numbers: Value, add: Callable[[Value, Value], Value]) -> Value:
    """The sum of all lanes."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        numbers = add(shuffle(b, numbers, range(lanes)), shuffle(b, numbers, range(lanes, 2 * lanes)))
    return b.extract_element(numbers, INT32(0))


class _Line:
    """The numbers along which keys are spread evenly enough to guess between them (`search.reals`), in vectors."""

    def __init__(self, b: Builder, width: int, signed: Format | None) -> None:
        self.b, self.signed = b, signed
        self.vector = vector_of(width, LANES)
        self.wide = width > 32
        self.real = ir.VectorType(_REAL if self.wide else ir.FloatType(), LANES)
        # The largest number that can be made an integer of so many bits.
        precision = 53 if self.wide else 24
        self.most = float(2**width - (1 << max(0, width - precision)))

    def constant(self, number: float) -> Value:
        """A number in every lane."""
        return splat(self.real, number)

    def scalar(self, number: Value) -> Value:
        """A float64 in every lane."""
        return broadcast(self.b, number if self.wide else self.b.fptrunc(number, self.real.element), LANES)

    def mean(self, numbers: Value) -> Value:
        """Of all lanes, as a float64."""
        b = self.b
        found = _sum(b, b.fmul(numbers, self.constant(1 / LANES)), b.fadd)
        return found if self.wide else b.fpext(found, _REAL)

    def count(self, numbers: Value) -> Value:
        """Counts as numbers."""
        return self.b.sitofp(numbers, self.real)

    def _number_of(self, keys: Value, form: Format) -> Value:
        """The float of a signed key."""
        bits = signed_bits_of(self.b, keys)
        return self.b.bitcast(bits, self.real) if self.wide else single_of(self.b, bits, form, "keep")

    def _bits_of(self, numbers: Value, form: Format) -> Value:
        """The bits of the float near a number: of one beyond them, or NaN, of any."""
        return self.b.bitcast(numbers, self.vector) if self.wide else rounded_to(self.b, numbers, form)

    def distance(self, low: Value, high: Value) -> Value:
        """From one key to a larger one."""
        b = self.b
        if self.signed is not None:
            return b.fsub(self._number_of(high, self.signed), self._number_of(low, self.signed))
        return b.uitofp(b.sub(high, low), self.real)

    def moved(self, keys: Value, distance: Value) -> Value:
        """The key so far above another, about; any key where that is beyond all of them, or the distance is NaN."""
        b = self.b
        if self.signed is not None:
            bits = self._bits_of(b.fadd(self._number_of(keys, self.signed), distance), self.signed)
            return b.select(
                b.icmp_signed("<", bits, splat(self.vector, 0)), b.not_(bits), b.xor(bits, _sign(self.vector))
            )
        ahead = b.select(b.fcmp_ordered(">", distance, self.constant(0.0)), distance, self.constant(0.0))
        ahead = b.select(b.fcmp_ordered("<", ahead, self.constant(self.most)), ahead, self.constant(self.most))
        moved = b.add(keys, b.fptoui(ahead, self.vector))
        return b.select(b.icmp_unsigned("<", moved, keys), splat(self.vector, -1), moved)


class _Bounds(NamedTuple):
    """What is known of every lane: more keys are at least `low` than are wanted, fewer are above `high`; how many.

    Until a guess has shown one, they are 0 and all ones.
    """

    low: Value
    high: Value
    from_low: Value
    above_high: Value

    def known(self, b: Builder) -> tuple[Value, Value]:
        """Whether guesses have shown the low one, and the high one."""
        vector = self.low.type
        return b.icmp_unsigned("!=", self.low, splat(vector, 0)), b.icmp_unsigned("!=", self.high, splat(vector, -1))


def _between(b: Builder, line: _Line, bounds: _Bounds, wanted: Value) -> Value:
    """Where the wanted key would be if keys lay evenly between the bounds."""
    low, high, from_low, above_high = bounds
    share = b.fdiv(line.count(b.sub(from_low, wanted)), line.count(b.sub(from_low, above_high)))
    return line.moved(low, b.fmul(line.distance(low, high), share))


def _next_guess(b: Builder, line: _Line, bounds: _Bounds, wanted: Value, count: Value, spacing: Value) -> Value:
    """Between the two bounds, or as far beyond the only one as keys were apart before, by the last `count`."""
    low, high, _, _ = bounds
    known_low, known_high = bounds.known(b)
    away = b.fmul(line.scalar(spacing), line.count(b.sub(count, wanted)))
    reach = line.distance(low, high)
    if line.signed is not None:
        beyond = line.moved(b.select(known_low, low, high), away)
    else:
        beyond = line.moved(low, b.select(known_low, away, b.fadd(reach, away)))
    return b.select(b.and_(known_low, known_high), _between(b, line, bounds, wanted), beyond)


def _mean_of_keys(b: Builder, keys: Value) -> Value:
    """The mean of all lanes, as 64 bits. Where the sum does not fit, what is lost of each key says nothing."""
    width, bits = keys.type.element.width, LANES.bit_length() - 1
    wide = _resized(b, keys, vector_of(max(32, width), LANES))
    if width < 32:
        mean = _sum(b, wide, b.add)
        mean = b.lshr(mean, mean.type(bits))
    else:
        mean = _sum(b, b.lshr(wide, splat(wide.type, bits)), b.add)
    return mean if mean.type == _WORD else b.zext(mean, _WORD)


def _mean_spacing(b: Builder, line: _Line, bounds: _Bounds, some: Value, spacing: Value) -> Value:
    """How far apart keys are between two guesses, where `some` lanes made them: the mean, of all as before for others.

    Between ends that met there is no distance: a spacing of 0 would never grow.
    """
    apart = b.fdiv(line.distance(bounds.low, bounds.high), line.count(b.sub(bounds.from_low, bounds.above_high)))
    measured = b.and_(some, b.fcmp_ordered("<", apart, line.constant(1e30)))
    for condition in (*bounds.known(b), b.icmp_unsigned("<", bounds.low, bounds.high)):
        measured = b.and_(measured, condition)
    return line.mean(b.select(measured, apart, line.scalar(spacing)))


class _Found(NamedTuple):
    """Places of the limits and ties of all lanes, as `search.separator` finds them, and what is known in the end."""

    limits: Value
    ties: Value
    bounds: _Bounds


def _search(
    b: Builder, planes: _Planes, line: _Line, wanted: Value, some: Value, bounds: _Bounds, every: Value,
    guesses: Value, limits: Value, ties: Value, spacing: Value,
) -> _Found:  # fmt: skip
    """The limits of `some` of the lanes, and ties, `every` where all keys from there on are kept; of others as given.

    Invariant, by lane: more keys are at least `low` than are `wanted`, fewer are above `high`.
    """
    vector = line.vector
    one = splat(vector, 1)
    low, high, from_low, above_high = (_stored(b, x) for x in bounds)
    limits, ties = _stored(b, limits), _stored(b, ties)
    guesses, searched, bold = _stored(b, guesses), _stored(b, some), _stored(b, spacing)
    with cgutils.for_range(b, _WORD(1 << 32)) as loop:
        open_ = b.load(searched)
        with b.if_then(b.icmp_unsigned("==", b.bitcast(open_, ir.IntType(LANES)), ir.IntType(LANES)(0))):
            loop.do_break()
        lower, upper = b.add(b.load(low), one), b.load(high)
        border = b.load(guesses)
        border = b.select(b.icmp_unsigned(">", border, lower), border, lower)
        border = b.select(b.icmp_unsigned("<", border, upper), border, upper)
        count = planes.count_from(b, border)
        above, below = _stored(b, border), _stored(b, b.sub(border, one))
        late = b.icmp_unsigned(">=", loop.index, _WORD(QUICK_PROBES))
        with b.if_then(late, likely=False):
            for key, place in zip(planes.neighbours_of(b, border), (above, below), strict=True):
                b.store(key, place)
        more = b.icmp_signed(">", count, wanted)
        for here, key, end, number in (
            (b.and_(open_, more), b.load(above), low, from_low),
            (b.and_(open_, b.not_(more)), b.load(below), high, above_high),
        ):
            b.store(b.select(here, key, b.load(end)), end)
            b.store(b.select(here, count, b.load(number)), number)
        bounds = _Bounds(*map(b.load, (low, high, from_low, above_high)))
        hit = b.and_(open_, b.icmp_signed("==", count, wanted))
        met = b.and_(open_, b.icmp_unsigned(">=", bounds.low, bounds.high))  # after a hit, too, which is told first
        b.store(b.select(hit, border, b.select(met, bounds.low, b.load(limits))), limits)
        b.store(b.select(hit, every, b.select(met, b.sub(wanted, bounds.above_high), b.load(ties))), ties)
        b.store(b.and_(open_, b.not_(b.or_(hit, met))), searched)
        following = _next_guess(b, line, bounds, wanted, count, b.load(bold))
        b.store(b.fmul(b.load(bold), _REAL(2.0)), bold)  # a guess far off: the next step is bolder
        middle = b.add(bounds.low, b.lshr(b.sub(bounds.high, bounds.low), one))
        halves = b.and_(late, b.trunc(loop.index, ir.IntType(1)))
        b.store(b.select(halves, middle, following), guesses)
    return _Found(limits, ties, _Bounds(*map(b.load, (low, high, from_low, above_high))))


class _Scopes(NamedTuple):
    """What `_search` finds of scopes that are in planes as a whole, for any k; and where the next search starts."""

    planes: _Planes
    limits: Value
    ties: Value
    next: Value


def _search_scopes(
    b: Builder, planes: _Planes, rows: Value, keep: Value, guess: Value, spacing: Value, signed: Format | None
) -> _Scopes:
    """The limits of `rows` scopes of which `keep` says how many are kept. It is read for all lanes."""
    line = _Line(b, planes.start.type.pointee.element.width, signed)
    zeros, ones, none = splat(line.vector, 0), splat(line.vector, -1), splat(_COUNTS, 0)
    every = broadcast(b, b.trunc(planes.n, INT32), LANES)
    wanted = b.trunc(load(b, keep, vector_of(64, LANES)), _COUNTS)
    empty = b.icmp_signed("<=", wanted, none)
    some = b.and_(b.not_(empty), b.icmp_signed("<", wanted, every))
    some = b.and_(some, first_lanes(b, rows, LANES))
    first = _resized(b, broadcast(b, guess, LANES), line.vector)
    found = _search(
        b, planes, line, wanted, some, _Bounds(zeros, ones, every, none), every, first,
        b.select(empty, ones, zeros), b.select(empty, none, every), spacing,
    )  # fmt: skip
    mean = _mean_of_keys(b, b.select(some, b.load(found.limits), first))
    spread = _mean_spacing(b, line, found.bounds, some, spacing)
    return _Scopes(planes, found.limits, found.ties, cgutils.pack_struct(b, [mean, spread]))


NEXT: Any = types.Tuple((types.uint64, types.float64))
"""The guess and the spacing with which the next search starts."""


def _each(b: Builder, found: _Scopes, rows: Value, use: Callable[[Value, Value, Value], None]) -> None:
    """``use(row, limit, ties)`` for each row."""
    limits, ties = (b.bitcast(place, place.type.pointee.element.as_pointer()) for place in (found.limits, found.ties))
    with cgutils.for_range(b, rows) as loop:
        limit, left = (b.load(b.gep(place, [loop.index])) for place in (limits, ties))
        use(loop.index, limit if limit.type == _WORD else b.zext(limit, _WORD), b.sext(left, _WORD))


@cache
def mark_rows(signed: Format | None) -> Any:
    """``(keys, start, n, rows, keep, r, mask, at, guess, spacing)``: mask of the `keep[r]` first-ranked of each row.

    Of up to `LANES` rows of n keys, which lie one after the other. Returns where to start the `NEXT` search.
    """

    def emit(
        b: Builder, keys: Value, n: Value, rows: Value, keep: Value, mask: Value, guess: Value, spacing: Value
    ) -> Value:
        found = _search_scopes(b, _Planes.of_rows(b, keys, n, n, rows), rows, keep, guess, spacing, signed)

        def mark(row: Value, limit: Value, ties: Value) -> None:
            at = b.mul(row, n)
            emit_mark(b, b.gep(keys, [at]), n, limit, ties, b.gep(mask, [at]))

        _each(b, found, rows, mark)
        return found.next

    return step(emit, 10, NEXT)


@cache
def mark_planes(signed: Format | None) -> Any:
    """``(keys, start, pitch, n, rows, keep, r, mask, at, guess, spacing)``: as `mark_rows`, side by side.

    The j-th keys of all rows, and their masks, lie so far from the next ones.
    """

    def emit(
        b: Builder, keys: Value, pitch: Value, n: Value, rows: Value, keep: Value, mask: Value, guess: Value,
        spacing: Value,
    ) -> Value:  # fmt: skip
        found = _search_scopes(b, _Planes.of_planes(b, keys, pitch, n), rows, keep, guess, spacing, signed)
        limits = b.load(found.limits)
        left = _stored(b, b.load(found.ties))
        partial, some = b.icmp_signed("<", rows, _WORD(LANES)), first_lanes(b, rows, LANES)
        with cgutils.for_range(b, n) as loop:
            own = b.xor(b.load(b.gep(found.planes.start, [loop.index])), _sign(limits.type))
            equal, ties = b.icmp_unsigned("==", own, limits), b.load(left)
            early = b.and_(equal, b.icmp_signed(">", ties, splat(_COUNTS, 0)))
            b.store(b.add(ties, b.sext(equal, _COUNTS)), left)
            kept = b.zext(b.or_(b.icmp_unsigned(">", own, limits), early), vector_of(8, LANES))
            there = b.gep(mask, [b.mul(loop.index, pitch)])
            with b.if_else(partial, likely=False) as (few, all_):
                with few:
                    store_masked(b, kept, there, some)
                with all_:
                    store(b, kept, there)
        return found.next

    return step(emit, 11, NEXT)


@cache
def limits_of_rows(signed: Format | None) -> Any:
    """``(keys, start, pitch, n, rows, keep, r, limits, l, ties, t, guess, spacing)``: as `mark_rows`, limits and ties.

    Those of `LANES` rows are written, which lie so far apart.
    """

    def emit(
        b: Builder, keys: Value, pitch: Value, n: Value, rows: Value, keep: Value, limits: Value, ties: Value,
        guess: Value, spacing: Value,
    ) -> Value:  # fmt: skip
        found = _search_scopes(b, _Planes.of_rows(b, keys, pitch, n, rows), rows, keep, guess, spacing, signed)
        store(b, b.load(found.limits), limits)
        store(b, b.load(found.ties), ties)
        return found.next

    return step(emit, 13, NEXT)


@cache
def kth_of_rows(signed: Format | None) -> Any:
    """``(keys, start, n, rows, keep, r, found, f, guess, spacing)``: as `mark_rows`, the `keep[r]`-th largest keys."""

    def emit(
        b: Builder, keys: Value, n: Value, rows: Value, keep: Value, target: Value, guess: Value, spacing: Value
    ) -> Value:
        found = _search_scopes(b, _Planes.of_rows(b, keys, n, n, rows), rows, keep, guess, spacing, signed)
        kth, _ = found.planes.neighbours_of(b, b.load(found.limits))

        def put(row: Value, key: Value, ties: Value) -> None:
            b.store(key if key.type == target.type.pointee else b.trunc(key, target.type.pointee), b.gep(target, [row]))

        _each(b, found._replace(limits=_stored(b, kth)), rows, put)
        return found.next

    return step(emit, 10, NEXT)
