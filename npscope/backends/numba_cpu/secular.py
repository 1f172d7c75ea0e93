"""Vector code of the secular equation of conditioned blocks, for `LANES` of them at a time.

A block of elements v in the metric h is shrunk by its threshold to ``h / (h + mu) * v``. With RATE = LIMIT / mu,
``|| h v / (h * RATE + LIMIT) || = 1``; the norm falls with RATE, and its reciprocal is concave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.lanes import Lanes, choose
from npscope.backends.numba_cpu.vectors import (
    INT32,
    LANES,
    Builder,
    Value,
    broadcast,
    first_lanes,
    has_only_avx2,
    shuffle,
    splat,
    step,
    vector_of,
)

WIDTH = 128
"""Most blocks of a strip: a multiple of `LANES`."""

ROWS, DISTANCE = 21, WIDTH + LANES
(
    UNIT, LIMIT, RATE, SQUARES, SLOPES, BENDS, NORM, MEAN, SPREAD, LOW, HIGH, ACTIVE,
    TOP, WIDEST, SIZE, SIZE_LOST, WEIGHED, WEIGHED_LOST, SHARES, CUBES, PAIRS,
) = (row * DISTANCE for row in range(ROWS))  # fmt: skip
"""Where the numbers of a strip of blocks lie in one work array. Vectors from any block of a strip on lie within it.

A block is v * UNIT in the metric h * UNIT, by a power of two, and LIMIT its threshold, by UNIT ** 2. In these numbers
NORM = ||h v||, MEAN the mean of h weighted by (h v) ** 2, SPREAD = ||v|| / ||h v||. The root RATE is in [LOW, HIGH].
Both factors take the unit, as small elements may weigh most: v * UNIT ** 2 of them would be subnormal, and so would
RATE.
ACTIVE, in float32, is 2 where it is to be sought and 1 while it is, 0 for the zero block (LIMIT = 1, RATE = 0), the
unchanged one (LIMIT = 0, RATE = 1) and one whose RATE is found, -1 for a block that needs a closer look. What that sees
is in the rows from TOP on.
"""

NEAR = 2.0**-20
"""Norms so near their threshold, relatively, are compared by sums that are good for it."""

SAFE_TOP, SAFE_UNIT = 2.0**450, 2.0**600
"""Numbers within [1 / SAFE_TOP, SAFE_TOP] may be squared and summed; SAFE_UNIT brings any other there."""

BEYOND = (2.0**128 - 2.0**103) ** 2
"""Squares of norms from here on round to infinity in float32; exact in float64."""

_DOUBLE, _SINGLE = ir.DoubleType(), ir.FloatType()


class _Rows:
    """The numbers of `LANES` blocks, from an address on."""

    def __init__(self, b: Builder, start: Value) -> None:
        self.b, self.start = b, start

    def _place(self, row: int) -> Value:
        vector = ir.VectorType(_SINGLE if row == ACTIVE else _DOUBLE, LANES)
        return self.b.bitcast(self.b.gep(self.start, [INT32(row)]), vector.as_pointer())

    def __getitem__(self, row: int) -> Lanes:
        return Lanes(self.b, self.b.load(self._place(row), align=8))

    def __setitem__(self, row: int, numbers: Lanes) -> None:
        self.b.store(numbers.value, self._place(row), align=8)


def _over_blocks(
    emit: Callable[..., Value], arrays: int, others: int, returns: Any = types.void, *, told_left: bool = False
) -> Any:
    """A step for all blocks of a strip: ``(array, i, .., blocks, *others)``, with so many arrays and others.

    ``emit(b, *addresses, *others)`` writes it for `LANES` blocks, and is `told_left` last how many blocks there are
    from here on, if it asks; what it returns is added up. A loop around each in kernels took Numba twice as long.
    """

    def over_blocks(b: Builder, *values: Value) -> Value:
        places, count, rest = values[:arrays], values[arrays], values[arrays + 1 :]
        total = cgutils.alloca_once_value(b, count.type(0))
        with cgutils.for_range_slice(b, count.type(0), count, count.type(LANES)) as (block, _):
            left = [b.sub(count, block)] if told_left else []
            found = emit(b, *[b.gep(place, [block]) for place in places], *rest, *left)
            if found is not None:
                b.store(b.add(b.load(total), found), total)
        return None if returns == types.void else b.load(total)

    return step(over_blocks, 2 * arrays + 1 + others, returns)


def _load(b: Builder, place: Value) -> Lanes:
    """`LANES` floats, in the precision that they have there."""
    vector = ir.VectorType(place.type.pointee, LANES)
    return Lanes(b, b.load(b.bitcast(place, vector.as_pointer()), align=4))


def _number(like: Lanes, x: Any) -> Lanes:
    return Lanes(like.b, splat(like.value.type, x))


def _add_up(
    b: Builder, planes: Sequence[Value], rows: Value, pitch: Value, starts: Sequence[Any], together: int,
    take: Callable[..., Sequence[Lanes]],
) -> list[Lanes]:  # fmt: skip
    """What ``take(so far, rows of each plane ..)`` makes of the `starts` over all rows, kept in registers.

    It takes `together` rows at a time, and those which are left one by one.
    """
    kept = [cgutils.alloca_once_value(b, start) for start in starts]

    def turns(first: Value, stop: Value, count: int) -> None:
        with cgutils.for_range_slice(b, first, stop, first.type(count)) as (row, _):
            offset = b.mul(row, pitch)
            numbers: list[list[Lanes]] = [[] for _ in planes]
            for _ in range(count):
                for plane, found in zip(planes, numbers, strict=True):
                    found.append(_load(b, b.gep(plane, [offset])))
                offset = b.add(offset, pitch)
            taken = take([Lanes(b, b.load(place)) for place in kept], *numbers)
            for place, lanes in zip(kept, taken, strict=True):
                b.store(lanes.value, place)

    whole = b.sub(rows, b.urem(rows, rows.type(together))) if together > 1 else rows
    turns(rows.type(0), whole, together)
    if together > 1:
        turns(whole, rows, 1)
    return [Lanes(b, b.load(place)) for place in kept]


def _inverses(numbers: Sequence[Lanes]) -> list[Lanes]:
    """Their reciprocals, by one division: products of pairs are inverted, and taken apart again (Montgomery 1987)."""
    if len(numbers) == 1:
        return [1.0 / numbers[0]]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    inverses = _inverses([x * y for x, y in pairs])
    return [z for (x, y), inverse in zip(pairs, inverses, strict=True) for z in (inverse * y, inverse * x)]


@cache
def measure() -> Any:
    """``(v, i, h, j, rows, k, blocks, first, stop, pitch)``: sums of (h v) ** 2, v ** 2 and (h v) ** 2 h.

    Of a strip of blocks, over their elements [first, stop), in rows of planes that lie `pitch` apart; added to those of
    earlier elements.
    """

    def take(so_far: list[Lanes], x: list[Lanes], c: list[Lanes]) -> list[Lanes]:
        wide, weight = x[0].to(_DOUBLE), c[0].to(_DOUBLE)
        p = weight * wide
        p = p * p
        return [so_far[0] + p, wide.times_plus(wide, so_far[1]), p.times_plus(weight, so_far[2])]

    def emit(b: Builder, v: Value, h: Value, start: Value, first: Value, stop: Value, pitch: Value) -> None:
        zeros = splat(ir.VectorType(_DOUBLE, LANES), 0.0)
        _add_to(_Rows(b, start), first, _add_up(b, (v, h), b.sub(stop, first), pitch, [zeros] * 3, 1, take))

    return _over_blocks(emit, 3, 3)


@cache
def classify(narrow: bool) -> Any:
    """``(rows, k, limits, m, blocks)``: norms, means, and what ACTIVE and RATE become, by what `measure` has found.

    Returns how many blocks need a closer look. Lanes behind the blocks are unchanged ones. Pruned arrays have many
    blocks of zeros: if norms are `narrow`, float32, no other has squares that sum to zero in float64.
    """
    least, largest = (2.0**-252, 1e76) if narrow else (1e-100, 1e100)  # of squares, not to underflow as a float32

    def emit(b: Builder, start: Value, limits: Value, left: Value) -> Value:
        s, limit = _Rows(b, start), _load(b, limits).to(_DOUBLE)
        squares, plain, bends = s[SQUARES], s[SLOPES], s[BENDS]
        norm = squares.root()
        ordinary = (
            (squares > least) & (squares < 1e100) & (plain > 1e-100) & (plain < largest) & (limit < float("inf"))
            & ((norm - limit).size() > norm * NEAR)
        )  # fmt: skip
        same = plain.is_nan() | limit.is_equal(0.0) | ~Lanes(b, first_lanes(b, left, LANES))
        known = same | plain.is_equal(0.0) if narrow else same
        careful, one = ~ordinary & ~known, _number(norm, 1.0)
        s[UNIT], s[NORM], s[MEAN], s[SPREAD] = one, norm, bends / squares, (plain / squares).root()
        s[RATE] = choose(same, one, 0.0)
        _set_state(s, careful, ordinary & ~known & (norm > limit), 2.0)
        return careful.count()

    return _over_blocks(emit, 2, 0, types.int64, told_left=True)


def _set_state(s: _Rows, careful: Lanes, active: Lanes, state: float) -> None:
    """ACTIVE of blocks that need a closer look, of those with a root, in this `state`, and of all others."""
    sought = Lanes(s.b, splat(ir.VectorType(_SINGLE, LANES), state))
    s[ACTIVE] = choose(careful, -1.0, choose(active, sought, 0.0))


def _safe_unit(top: Lanes) -> Lanes:
    """A power of four that brings `top` where it may be squared; 1 where it already is."""
    small = (top > 0.0) & (top < 1.0 / SAFE_TOP)
    return choose(top > SAFE_TOP, 1.0 / SAFE_UNIT, choose(small, _number(top, SAFE_UNIT), 1.0))


def _larger(x: Lanes, y: Lanes) -> Lanes:
    return choose(x > y, x, y)


def _two_sum(x: Lanes, y: Lanes) -> tuple[Lanes, Lanes]:
    """(s, e) with s the rounded sum and s + e exact (Knuth 1969)."""
    s = x + y
    t = s - x
    return s, (x - (s - t)) + (y - t)


def looks(single: bool) -> int:
    """Turns of a closer `look`: planes of float32 need no unit, and one turn."""
    return 1 if single else 3


@cache
def look(single: bool) -> Any:
    """``(v, i, h, j, rows, k, blocks, first, stop, pitch, turn)``: what decides on blocks that need a closer look.

    As `measure`, by sums that neither overflow nor round amiss, in as many turns over all elements as it `looks`: the
    TOP; then the sum of squares of v, by its safe unit, and WIDEST, the largest h v * UNIT ** 2; and sums of these by
    theirs.
    """

    def emit(
        b: Builder, v: Value, h: Value, start: Value, first: Value, stop: Value, pitch: Value, turn: Value
    ) -> None:
        s = _Rows(b, start)

        def over_rows(places: Sequence[int], take: Callable[..., Sequence[Lanes]]) -> None:
            goes_on = Lanes(b, b.icmp_signed(">", first, first.type(0)))
            starts = [choose(goes_on, s[place], 0.0).value for place in places]
            for place, found in zip(
                places, _add_up(b, (v, h), b.sub(stop, first), pitch, starts, 1, take), strict=True
            ):
                s[place] = found

        def at_all() -> None:
            def take(so_far: list[Lanes], x: list[Lanes], c: list[Lanes]) -> list[Lanes]:
                wide, weight = x[0].to(_DOUBLE), c[0].to(_DOUBLE)
                weighed = weight * wide
                weighed = weighed * weighed
                size, size_lost = _two_sum(so_far[0], wide * wide)
                total, lost = _two_sum(so_far[2], weighed)
                return [size, so_far[1] + size_lost, total, so_far[3] + lost, weighed.times_plus(weight, so_far[4])]

            over_rows((SIZE, SIZE_LOST, WEIGHED, WEIGHED_LOST, CUBES), take)

        def at_top() -> None:
            def take(so_far: list[Lanes], x: list[Lanes], c: list[Lanes]) -> list[Lanes]:
                return [_larger(x[0].size(), so_far[0])]

            over_rows((TOP,), take)

        def at_size() -> None:
            safe = _safe_unit(s[TOP])
            unit = safe.root()

            def take(so_far: list[Lanes], x: list[Lanes], c: list[Lanes]) -> list[Lanes]:
                wide, weighed = x[0] * safe, (c[0] * unit) * (x[0] * unit)
                total, lost = _two_sum(so_far[1], wide * wide)
                return [_larger(weighed.size(), so_far[0]), total, so_far[2] + lost]

            over_rows((WIDEST, SIZE, SIZE_LOST), take)

        def at_weighed() -> None:
            unit, scale, inverse = _safe_unit(s[TOP]).root(), _safe_unit(s[WIDEST]), 1.0 / s[WIDEST]

            def take(so_far: list[Lanes], x: list[Lanes], c: list[Lanes]) -> list[Lanes]:
                weight = c[0] * unit
                weighed = weight * (x[0] * unit)
                scaled, share = weighed * scale, weighed * inverse
                total, lost = _two_sum(so_far[0], scaled * scaled)
                share = share * share  # of numbers near 1, or the third power leaves the range
                return [total, so_far[1] + lost, so_far[2] + share, share.times_plus(weight, so_far[3])]

            over_rows((WEIGHED, WEIGHED_LOST, SHARES, CUBES), take)

        needed = (s[ACTIVE] < 0.0).count()
        with b.if_then(b.icmp_signed(">", needed, needed.type(0)), likely=False):
            for number, find in enumerate([at_all] if single else [at_top, at_size, at_weighed]):
                with b.if_then(b.icmp_signed("==", turn, turn.type(number))):
                    find()

    return _over_blocks(emit, 3, 4)


def _rounded_root(squares: Lanes, lost: Lanes) -> Lanes:
    """The float32 nearest to the root of squares + lost: the side of their midpoint tells which of two."""
    b, words = squares.b, vector_of(32, LANES)
    root = squares.root()
    below = (root * (1 - 2.0**-42)).to(_SINGLE)
    bits = b.bitcast(below.value, words)
    above = Lanes(b, b.bitcast(b.add(bits, splat(words, 1)), below.value.type)).to(_DOUBLE)
    middle = (below.to(_DOUBLE) + choose(above < float("inf"), above, 2.0**128)) * 0.5
    side = (squares - middle * middle) + lost
    odd = Lanes(b, b.trunc(bits, vector_of(1, LANES)))
    found = choose((side > 0.0) | (side.is_equal(0.0) & odd), above, below.to(_DOUBLE))
    return choose((root > 0.0) & (root < 3.5e38), found, root.to(_SINGLE).to(_DOUBLE))


@cache
def decide(exact: bool, narrow: bool, single: bool) -> Any:
    """``(rows, i, limits, j, blocks)``: what becomes of blocks that were looked at, as `classify` says it of others."""

    def emit(b: Builder, start: Value, limits: Value) -> None:
        s, limit, inf = _Rows(b, start), _load(b, limits).to(_DOUBLE), float("inf")
        careful, one = s[ACTIVE] < 0.0, _number(limit, 1.0)
        safe, scale = (one, one) if single else (_safe_unit(s[TOP]), _safe_unit(s[WIDEST]))
        unit = one if single else safe.root()
        size, norm = (s[SIZE] + s[SIZE_LOST]).root(), (s[WEIGHED] + s[WEIGHED_LOST]).root() / scale
        infinite = s[SIZE].is_equal(inf) if single else s[TOP].is_equal(inf)
        if narrow:
            infinite |= safe.is_equal(1.0) & ((s[SIZE] - BEYOND) + s[SIZE_LOST] >= 0.0)
        else:
            infinite |= (size / safe).is_equal(inf)
        rounded = norm
        if exact:
            rounded = choose(scale.is_equal(1.0), _rounded_root(s[WEIGHED], s[WEIGHED_LOST]), norm)
        if narrow:
            rounded = rounded.to(_SINGLE).to(_DOUBLE)
        active = careful & ~infinite & (rounded > limit * safe)
        mean, spread = s[CUBES] / s[WEIGHED if single else SHARES], size / (norm * unit)
        if not single:  # what weighs most may be small beside TOP, and RATE in proportion to it, by no unit subnormal
            lifted = unit.is_equal(1.0) & (norm < mean * (1.0 / SAFE_TOP))
            lift = choose(lifted, _number(unit, SAFE_UNIT).root(), one)
            unit, norm, mean, spread = unit * lift, norm * lift * lift, mean * lift, spread / lift
        for row, numbers in ((UNIT, unit), (NORM, norm), (MEAN, mean), (SPREAD, spread)):
            s[row] = choose(active, numbers, s[row])
        state = s[ACTIVE]
        s[ACTIVE] = choose(careful, choose(active, _number(state, 2.0), 0.0), state)
        s[RATE] = choose(infinite & careful & (limit < inf), one, s[RATE])

    return _over_blocks(emit, 2, 0)


def _with_powers(sums: Sequence[Lanes], q: Lanes, p: Lanes) -> list[Lanes]:
    """Sums of q ** 2, q ** 2 p and q ** 2 p ** 2, with those of one more element."""
    slope = q * p
    return [a.times_plus(b, so_far) for a, b, so_far in zip((q, q, slope), (q, slope, slope), sums, strict=True)]


def _first_rate(limit: Lanes, norm: Lanes, mean: Lanes, spread: Lanes, real: ir.Type) -> tuple[Lanes, Lanes]:
    """Where an iteration starts, found in `real` numbers, and 1 / (MEAN * SPREAD) in these.

    The reciprocal norm, times RATE + LIMIT, is a concave function y of RATE / NORM, between
    MEAN * RATE / NORM + tau, its tangent at 0, and RATE / NORM / SPREAD + tau, with tau = LIMIT / NORM: so the root
    is between (NORM - LIMIT) / MEAN and (NORM - LIMIT) * SPREAD. The start is exact for
    z - (1 - 1 / (MEAN * SPREAD)) * (z - tau) ** 2 / z, where z is the tangent: the same slope at infinity. Norms beyond
    that start at the end of their bracket.
    """
    tau, unlike = limit.to(real) / norm.to(real), 1.0 / (mean * spread).to(real)
    under = 1.0 - 4.0 * (1.0 - unlike) * tau * (1.0 - tau)
    root = choose(under > 0.0, under, 0.0).to(_SINGLE).root().to(real)  # good enough for a start
    return ((1.0 - 2.0 * tau + root) * 0.5).to(norm.value.type.element) * spread * norm, unlike


@cache
def begin(single: bool) -> Any:
    """``(rows, i, limits, j, blocks)``: the bracket of every block that is to be sought, and where it starts.

    LIMIT and RATE, too, of those that are not; how many are sought from now on. The start is found in float32 if that
    is `single`.
    """

    def emit(b: Builder, start: Value, limits: Value) -> Value:
        s, state = _Rows(b, start), _Rows(b, start)[ACTIVE]
        fresh, sought, rate, norm = state > 1.0, state.is_equal(1.0), s[RATE], s[NORM]
        limit = _load(b, limits).to(_DOUBLE) * s[UNIT] * s[UNIT]
        first, _ = _first_rate(limit, norm, s[MEAN], s[SPREAD], _SINGLE if single else _DOUBLE)
        gap = norm - limit
        low, high = gap / s[MEAN], gap * s[SPREAD]
        first = choose(first < high, first, high)
        first = choose(first > low, first, low)
        s[LOW], s[HIGH] = choose(fresh, low, s[LOW]), choose(fresh, high, s[HIGH])
        s[LIMIT] = choose(fresh, limit, choose(sought, s[LIMIT], 1.0 - rate))
        s[RATE], s[ACTIVE] = choose(fresh, first, rate), choose(fresh, _number(state, 1.0), state)
        return (fresh | sought).count()

    return _over_blocks(emit, 2, 0, types.int64)


def _add_to(s: _Rows, first: Value, sums: Sequence[Lanes]) -> None:
    """Add to the sums of elements up to the `first`."""
    goes_on = Lanes(s.b, s.b.icmp_signed(">", first, first.type(0)))
    for row, found in zip((SQUARES, SLOPES, BENDS), sums, strict=True):
        s[row] = found + choose(goes_on, s[row], 0.0)


@cache
def sum_secular(single: bool) -> Any:
    """``(v, i, h, j, rows, k, blocks, first, stop, pitch)``: sums of q ** 2, q ** 2 p and q ** 2 p ** 2, as `measure`.

    With d = h * RATE + LIMIT, q = h * v / d, p = h * RATE / d, all by UNIT. Planes of float32 need none: what comes of
    them stays in the range of float64 if p = h / (h + mu) and q * RATE = v * p, as mu = LIMIT / RATE is at most the
    largest h by the relative distance of two float32.
    """
    # Rows that share a division: those of AVX2 are as fast as what it takes to share them.
    together = 2 if single and not has_only_avx2() else 1

    def emit(b: Builder, v: Value, h: Value, start: Value, first: Value, stop: Value, pitch: Value) -> None:
        s = _Rows(b, start)
        unit, limit, rate = s[UNIT], s[LIMIT], s[RATE]
        inverse = 1.0 / rate
        mu = limit * inverse

        def take(so_far: list[Lanes], xs: list[Lanes], cs: list[Lanes]) -> list[Lanes]:
            weights = [c.to(_DOUBLE) if single else c * unit for c in cs]
            inverses = _inverses([w + mu if single else w * rate + limit for w in weights])
            for x, w, r in zip(xs, weights, inverses, strict=True):
                p = w * r if single else w * r * rate  # w * rate may underflow, where it is nothing beside LIMIT
                q = x.to(_DOUBLE) * p if single else w * (x * unit) * r
                so_far = _with_powers(so_far, q, p)
            return so_far

        zeros = splat(ir.VectorType(_DOUBLE, LANES), 0.0)
        sums = _add_up(b, (v, h), b.sub(stop, first), pitch, [zeros] * 3, together, take)
        if single:
            scale = inverse * inverse
            sums = [x * scale for x in sums]
        _add_to(s, first, sums)

    return _over_blocks(emit, 3, 3)


@cache
def approach() -> Any:
    """``(v, i, h, j, rows, k, blocks, count, pitch)``: a step to the root for every active block, by sums in float32.

    As `sum_secular` and `advance` by Halley do, in a third of the time. It proves nothing, so that the bracket stays.
    """

    def emit(b: Builder, v: Value, h: Value, start: Value, count: Value, pitch: Value) -> None:
        s = _Rows(b, start)
        share = _step_in_single(b, (v, h), count, pitch, s[RATE].to(_SINGLE), s[LIMIT].to(_SINGLE), 1).to(_DOUBLE)
        at = s[RATE]
        following = at + at * share
        following = choose(following > s[LOW], following, s[LOW])
        s[RATE] = choose(s[ACTIVE] > 0.0, choose(following < s[HIGH], following, s[HIGH]), at)

    return _over_blocks(emit, 3, 2)


def _step_in_single(
    b: Builder, planes: Sequence[Value], count: Value, pitch: Value, rate: Lanes, limit: Lanes, together: int
) -> Lanes:
    """By which part of itself RATE is to move to the root, by sums over q = v * p and p = h / (h + mu).

    So many rows `together` share a division: in an ordinary metric the product of two is in the range of float32. Where
    numbers leave that, the step is none, or leads astray.
    """
    enlarge = 1.0 / rate
    mu = limit * enlarge

    def take(so_far: list[Lanes], xs: list[Lanes], cs: list[Lanes]) -> list[Lanes]:
        for x, c, inverse in zip(xs, cs, _inverses([c + mu for c in cs]), strict=True):
            p = c * inverse
            so_far = _with_powers(so_far, x * p, p)
        return so_far

    zeros = splat(ir.VectorType(_SINGLE, LANES), 0.0)
    squares, slopes, bends = _add_up(b, planes, count, pitch, [zeros] * 3, together, take)
    over, inverse = squares.root() * enlarge - 1.0, 1.0 / squares
    slope, bend = slopes * inverse, bends * inverse
    square = slope * slope
    bend, most = 1.5 * over * (bend - square), 0.5 * square
    share = over * slope / (square - choose(bend < most, bend, most))
    return choose(share.size() < 1.0, share, 0.0)


QUICK_ELEMENTS, QUICK_NEAR, QUICK_SLACK = 64, 2.0**-15, 0.25
"""Blocks of up to so many elements may be looked at in float32; how near norms then are too near; and what ends move.

Sums over them take 67 roundings of 2 ** -24 at most, less than 2 ** -17, so that norms are right to 2 ** -18. One that
is 2 ** -15 of itself from its threshold is on its right side, and the gap, 2 ** 3 times that error, right to an eighth.
MEAN and SPREAD are right to 2 ** -16: ends moved by a quarter of themselves enclose the root, as 0.75 * 9 / 8 < 1 <
1.25 * 7 / 8. What underflows is off by 2 ** -150: nothing beside sums of squares from 2 ** -90 on, nor times h, whose
span in an ordinary metric is less than 2 ** 27.
"""

MANY = 1 << 32
"""More blocks than a strip has: two counts in one number."""


@cache
def begin_quickly() -> Any:
    """``(v, i, h, j, rows, k, limits, m, blocks, count, pitch)``: all that comes before sums in float64, in float32.

    What `measure`, `classify`, `begin` and `approach` do one after another, for blocks of up to `QUICK_ELEMENTS` in an
    ordinary metric. Returns how many blocks are sought, plus `MANY` for each that needs a closer look, which has to
    `begin` after it.
    """
    words = vector_of(32, LANES)

    def take(so_far: list[Lanes], xs: list[Lanes], cs: list[Lanes]) -> list[Lanes]:
        b, x, c = xs[0].b, xs[0], cs[0]
        p = c * x
        p = p * p
        marks = b.or_(*(b.bitcast(number.value, words) for number in (so_far[3], x)))
        marks = Lanes(b, b.bitcast(marks, x.value.type))
        return [so_far[0] + p, x.times_plus(x, so_far[1]), p.times_plus(c, so_far[2]), marks]

    def emit(
        b: Builder, v: Value, h: Value, start: Value, limits: Value, count: Value, pitch: Value, left: Value
    ) -> Value:
        s, given = _Rows(b, start), _load(b, limits)
        limit, zeros = given.to(_SINGLE), splat(ir.VectorType(_SINGLE, LANES), 0.0)
        squares, plain, bends, marks = _add_up(b, (v, h), count, pitch, [zeros] * 4, 1, take)
        sizes = b.and_(b.bitcast(marks.value, words), splat(words, (1 << 31) - 1))
        is_zero = Lanes(b, b.icmp_unsigned("==", sizes, splat(words, 0)))
        norm, inverse = squares.root(), 1.0 / squares
        gap, mean, spread = norm - limit, bends * inverse, (plain * inverse).root()
        ordinary = (
            (squares > 2.0**-90) & (squares < 2.0**100) & (plain > 2.0**-90) & (plain < 2.0**100)
            & (bends > 2.0**-120) & (bends < 2.0**120)  # h may be as small as 2 ** -40, or as large as that is small
            & (limit < float("inf")) & (gap.size() > norm * QUICK_NEAR)
        )  # fmt: skip
        same = plain.is_nan() | given.is_equal(0.0) | ~Lanes(b, first_lanes(b, left, LANES))
        known = same | is_zero
        careful, active = ~ordinary & ~known, ordinary & ~known & (gap > 0.0)
        first, unlike = _first_rate(limit, norm, mean, spread, _SINGLE)
        high = gap * spread
        low, high = high * unlike * (1.0 - QUICK_SLACK), high * (1.0 + QUICK_SLACK)

        def within(rate: Lanes) -> Lanes:
            rate = choose(rate < high, rate, high)
            return choose(rate > low, rate, low)

        rate = within(first)
        share = _step_in_single(b, (v, h), count, pitch, rate, limit, 2)
        one = _number(rate, 1.0)
        rate = choose(active, within(rate + rate * share), choose(same, one, 0.0))
        s[LIMIT] = choose(active, given, choose(same, 0.0, _number(given, 1.0))).to(_DOUBLE)
        s[LOW], s[HIGH], s[RATE] = low.to(_DOUBLE), high.to(_DOUBLE), rate.to(_DOUBLE)
        _set_state(s, careful, active, 1.0)
        return b.add(active.count(), b.mul(careful.count(), ir.IntType(64)(MANY)))

    return _over_blocks(emit, 4, 2, types.int64, told_left=True)


@cache
def advance(single: bool) -> Any:
    """``(rows, i, blocks, near, floor, short, bends)``: a safeguarded step for every active block; how many go on.

    By Halley if it `bends`, else by Newton. Newton steps rise to the root of a concave function from its left, so that
    one which does not has reached the rounding of the norm, unless it comes from a start, a Halley step or an end of
    the bracket. So a step that falls goes on only if it falls below `floor` of RATE, from a square of the norm that is
    less than `short`. The step itself, which is small, is found in float32 if that is `single`.
    """
    real = _SINGLE if single else _DOUBLE

    def emit(b: Builder, start: Value, near: Value, floor: Value, short: Value, bends: Value) -> Value:
        s = _Rows(b, start)
        active, at, exact = s[ACTIVE] > 0.0, s[RATE], s[SQUARES]
        squares, inverse = exact.to(real), 1.0 / s[SLOPES].to(real)
        over = (exact - 1.0).to(real) / (squares.root() + 1.0)
        newton = over * squares * inverse
        bend = 1.5 * over * (s[BENDS].to(real) * inverse * (squares * inverse) - 1.0)
        bend = choose(Lanes(b, b.icmp_signed("!=", bends, bends.type(0))), bend, 0.0)
        bend = choose(bend < 0.5, bend, 0.5)
        share = choose(active, newton / (1.0 - bend), 0.0)
        up, down = (Lanes(b, broadcast(b, x, LANES)) for x in (near, floor))
        wide = share.to(_DOUBLE)
        s[RATE], s[ACTIVE] = at + at * wide, choose(active, 0.0, s[ACTIVE])
        most, lowest = up.to(real), (down - 1.0).to(real)
        large = ~((share <= most) & (share >= choose(lowest > -1.0 * most, lowest, -1.0 * most)))
        many = large.count()
        going = cgutils.alloca_once_value(b, many.type(0))
        with b.if_then(b.icmp_signed("!=", many, many.type(0)), likely=False):
            # A small step is the last, wherever the bracket ends, and nothing here changes it: a block depends on no
            # neighbour. A large fall may be the last, too, but not beyond the bracket.
            low, high = choose(exact >= 1.0, at, s[LOW]), choose(exact <= 1.0, at, s[HIGH])
            beyond = active & ~(share.size() < float("inf"))
            following = at + at * wide
            following = choose(following > low, following, low)
            following = choose(following < high, following, high)
            falls = (following < at * down) & (exact < Lanes(b, broadcast(b, short, LANES)))
            moves = large & ((following > at * (up + 1.0)) | falls) | beyond
            # Where sums overflow, it is halved instead.
            s[RATE] = choose(beyond, low.root() * high.root(), choose(large, following, s[RATE]))
            s[LOW], s[HIGH], s[ACTIVE] = low, high, choose(moves, _number(s[ACTIVE], 1.0), 0.0)
            b.store(moves.count(), going)
        return b.load(going)

    return _over_blocks(emit, 1, 4, types.int64)


@cache
def finish(single: bool) -> Any:
    """``(rows, i, blocks)``: RATE becomes mu, infinite for zero blocks, 0 for unchanged ones, PAIRS its two float32."""

    def emit(b: Builder, start: Value) -> None:
        s = _Rows(b, start)
        mu = (s[LIMIT] if single else s[LIMIT] / s[UNIT]) / s[RATE]
        high = mu.to(_SINGLE)
        low = (mu - high.to(_DOUBLE)).to(_SINGLE)
        pairs = shuffle(b, high.value, [lane + half for lane in range(LANES) for half in (0, LANES)], low.value)
        s[RATE], s[PAIRS] = mu, Lanes(b, b.bitcast(pairs, mu.value.type))

    return _over_blocks(emit, 1, 0)
