"""Steps of selection inside vectors: ranks of small groups, surveys between limits, and cuts by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.rows import Grid, Strip, over_elements, over_lanes, over_ranges
from npscope.backends.numba_cpu.vectors import (
    INT32,
    LINE,
    Builder,
    Format,
    Value,
    all_keys_of,
    broadcast,
    call,
    copy_at,
    first_lanes,
    has_only_avx2,
    keys_of,
    load,
    load_masked,
    narrow,
    on_floats,
    planes_of,
    prefetch,
    shuffle,
    spare_room,
    splat,
    step,
    store,
    store_masked,
    vector_of,
)

MAX_GROUP = 16
"""Largest scope that is ranked inside a vector: the work grows with the square of it."""


def _ranks(b: Builder, keys: Value, n: int, *, spare_bit: bool) -> Value:
    """How many of its group of n adjacent lanes rank before each lane: a larger key, or an equal one earlier.

    `spare_bit`: keys leave the highest bit free, so that one comparison tells both.
    """
    vector = keys.type
    ranks = splat(vector, 0)
    for distance in range(1, n):
        places = [i % n + distance for i in range(vector.count)]
        rivals, earlier = shuffle(b, keys, [i - i % n + p % n for i, p in enumerate(places)]), [p >= n for p in places]
        if spare_bit:  # an earlier rival wins ties: one less is to be beaten, which -1 is for 0
            before = b.icmp_signed(">", rivals, b.sub(keys, ir.Constant(vector, list(map(int, earlier)))))
        else:
            equal = b.icmp_unsigned("==", rivals, keys)
            before = b.or_(
                b.icmp_unsigned(">", rivals, keys), b.and_(equal, ir.Constant(vector_of(1, vector.count), earlier))
            )
        ranks = b.add(ranks, b.zext(before, vector))
    return ranks


@cache
def keep_groups(form: Format, n: int, marks: bool) -> Any:
    """``(source, o, grid, 0, loops, target, p, grid2, 0, loops2, i, stop, k)``: the k first-ranked of every n elements.

    They are written to `target`, with zeros where the others are; or if it `marks`, to bools, which they are. All else
    as for `cut_strip`.
    """
    lanes = n * max(1, form.lanes // n)  # of whole groups
    # Sorted side by side, a lane for each group: for groups of 16, a third of the operations that ranks take.
    sorts = n in (8, 16) and n <= form.lanes

    def keep(b: Builder, source: Value, target: Value, k: Value, several: bool) -> None:
        """Of a vector of groups, or of n vectors that are sorted."""
        starts, lines = range(0, lanes * (n if several else 1), lanes), []
        for start in starts:
            here = b.gep(source, [INT32(start)])
            prefetch(b, here, lanes * form.bits // 8)
            lines.append(load(b, here, vector_of(form.bits, lanes)))
        keys = [keys_of(b, bits, form) for bits in lines]
        if several:
            kept = _first_by_sorting(b, keys, k, n)
        else:
            ranks = _ranks(b, keys[0], n, spare_bit=not form.is_integer)
            kept = [b.icmp_unsigned("<", ranks, narrow(b, k, keys[0].type))]
        for start, bits, flags in zip(starts, lines, kept, strict=True):
            found = _flags(b, flags) if marks else b.select(flags, bits, splat(bits.type, 0))
            store(b, found, b.gep(target, [INT32(start)]))

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, target: Value, grid2: Value, loops2: Value, i: Value,
        stop: Value, k: Value,
    ) -> None:  # fmt: skip
        word = ir.IntType(64)
        grids = [Grid(source, grid, loops), Grid(target, grid2, loops2)]
        spare, spare2 = (spare_room(b, lanes, place) for place in (source, target))
        with over_ranges(b, grids, i, stop) as (first, after, (at, at2)):
            here, there, count, done = b.gep(source, [at]), b.gep(target, [at2]), b.sub(after, first), word(0)
            for several in (True, False) if sorts else (False,):
                step = word(lanes * (n if several else 1))
                whole = b.sub(count, b.urem(count, step))
                with cgutils.for_range_slice(b, done, whole, step) as (e, _):
                    keep(b, b.gep(here, [e]), b.gep(there, [e]), k, several)
                done = whole
            rest = b.sub(count, done)
            with b.if_then(b.icmp_signed(">", rest, word(0)), likely=False):
                # Groups that do not fill a vector take a detour over one.
                copy_at(b, b.gep(here, [done]), rest, spare)
                keep(b, spare, spare2, k, False)
                copy_at(b, spare2, rest, b.gep(there, [done]))

    return step(emit, 13)


def _flags(b: Builder, kept: Value) -> Value:
    """Lanes that are true or false as bools in memory."""
    return b.zext(kept, vector_of(8, kept.type.count))


@cache
def keep_columns(form: Format, n: int, marks: bool, partial: bool) -> Any:
    """``(source, i, apart, a, target, j, apart2, a2, k, left)``: as `keep_groups`, for groups that lie side by side.

    The n elements of the first one are `apart[a], apart[a + 1] ..` from where `source` is, and go so far from where
    `target` is as `apart2` says. One group for each lane of a line, only the `left` first of them if `partial`.
    """
    bits = vector_of(form.bits, form.lanes)

    def emit(b: Builder, source: Value, apart: Value, target: Value, apart2: Value, k: Value, left: Value) -> None:
        def places(start: Value, table: Value) -> list[Value]:
            return [b.gep(start, [b.load(b.gep(table, [INT32(j)]))]) for j in range(n)]

        mask = first_lanes(b, left, form.lanes) if partial else None
        lines = []
        for here in places(source, apart):
            if mask is None:
                prefetch(b, here, LINE)
            lines.append(load(b, here, bits) if mask is None else load_masked(b, here, bits, mask))
        flags = _first_of_columns(b, [keys_of(b, line, form) for line in lines], k)
        for line, kept, there in zip(lines, flags, places(target, apart2), strict=True):
            found = _flags(b, kept) if marks else b.select(kept, line, splat(bits, 0))
            if mask is None:
                store(b, found, there)
            else:
                store_masked(b, found, there, mask)

    return step(emit, 10)


def _first_by_sorting(b: Builder, keys: list[Value], k: Value, n: int) -> list[Value]:
    """Which of n vectors of keys, in which groups of n lie side by side, are the k first-ranked of their group."""
    vector = keys[0].type
    lanes = vector.count
    groups = [[(v * lanes + i) // n for i in range(lanes)] for v in range(n)]
    planes = planes_of(b, keys)  # lane g of plane j: key j of group g
    limit = _kth_of_planes(b, planes, k)
    limits = [shuffle(b, limit, order) for order in groups]

    def without_late_ties() -> list[Value]:
        left, kept = _ties_left(b, planes, limit, k), []
        for key, most, order in zip(keys, limits, groups, strict=True):
            equal = b.icmp_unsigned("==", key, most)
            turn = b.zext(equal, vector)
            for distance in (1, 2, 4, 8)[: n.bit_length() - 1]:
                # The lane of the group that lies so far before; where there is none, a zero.
                earlier = [i - distance if i % n >= distance else lanes for i in range(lanes)]
                turn = b.add(turn, shuffle(b, turn, earlier, splat(vector, 0)))
            stays = b.and_(equal, b.icmp_signed("<=", turn, shuffle(b, left, order)))
            kept.append(b.or_(b.icmp_unsigned(">", key, most), stays))
        return kept

    return _from_limit_on(b, keys, limits, k, without_late_ties)


def _first_of_columns(b: Builder, planes: list[Value], k: Value) -> list[Value]:
    """Which keys of the groups whose n-th keys are the n-th of these vectors are the k first-ranked of their group."""
    vector, n = planes[0].type, len(planes)
    if n not in (8, 16):
        # Of two, the earlier ranks before the later one if it is not smaller.
        ranks = [splat(vector, n - 1 - j) for j in range(n)]
        for i in range(n):
            for j in range(i + 1, n):
                before = b.icmp_unsigned(">=", planes[i], planes[j])
                ranks[i], ranks[j] = b.add(ranks[i], b.sext(before, vector)), b.add(ranks[j], b.zext(before, vector))
        return [b.icmp_unsigned("<", rank, narrow(b, k, vector)) for rank in ranks]
    limit = _kth_of_planes(b, planes, k)

    def without_late_ties() -> list[Value]:
        left, kept = _ties_left(b, planes, limit, k), []
        for plane in planes:
            equal = b.icmp_unsigned("==", plane, limit)
            stays = b.and_(equal, b.icmp_signed(">", left, splat(vector, 0)))
            left = b.add(left, b.sext(equal, vector))
            kept.append(b.or_(b.icmp_unsigned(">", plane, limit), stays))
        return kept

    return _from_limit_on(b, planes, [limit] * n, k, without_late_ties)


def _kth_of_planes(b: Builder, planes: list[Value], k: Value) -> Value:
    """The k-th largest key of each group; for k = 0 all ones, which no key is but those of the largest integers."""
    planes, vector = list(planes), planes[0].type
    for i, j in _sorting_network(len(planes)):
        larger = b.icmp_unsigned(">", planes[i], planes[j])
        planes[i], planes[j] = b.select(larger, planes[i], planes[j]), b.select(larger, planes[j], planes[i])
    table = b.bitcast(cgutils.alloca_once(b, ir.ArrayType(vector, len(planes))), vector.as_pointer())
    for j, plane in enumerate(planes):
        b.store(plane, b.gep(table, [INT32(j)]))
    zero, one = (ir.Constant(k.type, number) for number in (0, 1))
    none = b.icmp_signed("<=", k, zero)
    last = b.select(none, zero, b.sub(k, one))
    return b.select(none, splat(vector, -1), b.load(b.gep(table, [last])))


def _ties_left(b: Builder, planes: list[Value], limit: Value, k: Value) -> Value:
    """How many keys that equal the limit are among the k first-ranked of each group."""
    left = narrow(b, k, limit.type)
    for plane in planes:
        left = b.sub(left, b.zext(b.icmp_unsigned(">", plane, limit), limit.type))
    return left


def _from_limit_on(
    b: Builder, keys: list[Value], limits: list[Value], k: Value, without_late_ties: Callable[[], list[Value]]
) -> list[Value]:
    """Which keys are kept: those from their limit on, k of each group, or more if the last of them are equal.

    Only then, which is rare, the first of these have to be told from the others.
    """
    flags = [cgutils.alloca_once_value(b, b.icmp_unsigned(">=", x, y)) for x, y in zip(keys, limits, strict=True)]
    found, lanes = ir.Constant(k.type, 0), ir.Constant(k.type, keys[0].type.count)
    for place in flags:
        found = b.add(found, _count(b, b.load(place)))
    with b.if_then(b.icmp_unsigned("!=", found, b.mul(k, lanes)), likely=False):
        for place, kept in zip(flags, without_late_ties(), strict=True):
            b.store(kept, place)
    return [b.load(place) for place in flags]


def _sorting_network(n: int) -> list[tuple[int, int]]:
    """The comparisons that sort n numbers, a power of two, the largest first: odd-even merges (Batcher 1968)."""
    pairs = []
    block = 1
    while block < n:
        distance = block
        while distance:
            for start in range(distance % block, n - distance, 2 * distance):
                for i in range(start, min(start + distance, n - distance)):
                    if i // (2 * block) == (i + distance) // (2 * block):
                        pairs.append((i, i + distance))
            distance //= 2
        block *= 2
    return pairs


def _load_ahead(b: Builder, source: Value, form: Format, lanes: int) -> Value:
    """Numbers as they are in memory, while those further on are asked for; a single one stands where they end."""
    if lanes > 1:
        prefetch(b, source, LINE)
    return load(b, source, vector_of(form.bits, lanes))


TILE = 16
"""Scopes that lie side by side, and elements of each, that are turned together."""


@cache
def turn_keys(form: Format, signed: bool) -> Any:
    """``(source, i, apart, keys, j, n, ahead)``: keys of `TILE` rows of `TILE` numbers as `TILE` rows, n apart.

    Those that are read lie `apart`; asked for are the numbers so far `ahead` of them.
    """
    line = vector_of(form.bits, TILE)

    def emit(b: Builder, source: Value, apart: Value, keys: Value, n: Value, ahead: Value) -> None:
        rows = []
        for _ in range(TILE):
            prefetch(b, source, TILE * form.bits // 8, ahead)
            rows.append(all_keys_of(b, load(b, source, line), form, signed))
            source = b.gep(source, [apart])
        for row in planes_of(b, rows):
            store(b, row, keys)
            keys = b.gep(keys, [n])

    return step(emit, 7)


@cache
def cut_columns(form: Format, signed: bool, marks: bool, partial: bool) -> Any:
    """``(source, i, target, j, limits, l, borders, m, row, rest)``: `cut_strip`, each lane with a limit of its own.

    Keys equal to it are kept where the row is before a border. Only in the `rest` first lanes if `partial`; else what
    is so far ahead in `target` is asked for.
    """
    bits, words = vector_of(form.bits, form.lanes), vector_of(32, form.lanes)
    width = 8 if marks else form.bits

    def emit(b: Builder, source: Value, target: Value, limits: Value, borders: Value, row: Value, rest: Value) -> None:
        mask = first_lanes(b, rest, form.lanes) if partial else None

        def read(at: Value) -> Value:
            return load(b, at, bits) if mask is None else load_masked(b, at, bits, mask)

        own = None if marks else read(target)  # first, as in `cut_strip`
        if mask is None:
            prefetch(b, target, form.lanes * width // 8, rest)
        keys, limit = all_keys_of(b, read(source), form, signed), load(b, limits, bits)
        early = b.icmp_signed("<", narrow(b, row, words), load(b, borders, words))
        kept = _from(b, keys, limit, early)
        found = _flags(b, kept) if own is None else b.select(kept, own, splat(bits, 0))
        if mask is None:
            store(b, found, target)
        else:
            store_masked(b, found, target, mask)

    return step(emit, 10)


@cache
def cut_strip(form: Format, signed: bool, marks: bool) -> Any:
    """``(source, o, grid, 0, loops, target, p, grid2, 0, loops2, i, stop, limit, equal)``: cut elements [i, stop).

    +0.0 in `target` where keys are neither above a limit, nor `equal` to it if that is 1. Keys are those of `source`,
    which may be the same numbers, or others that rank them. If it `marks`, `target` is bools, and they become whether a
    number is kept. The first elements are `o` and `p`; grids are tables of so many loops, whose innermost are lines.
    """

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, target: Value, grid2: Value, loops2: Value, i: Value,
        stop: Value, limit: Value, equal: Value,
    ) -> None:  # fmt: skip
        zero = limit.type(0)
        all_stay = b.and_(b.icmp_unsigned("==", limit, zero), b.icmp_unsigned("!=", equal, zero))
        limit = b.sub(limit, equal)

        def cut(here: Value, there: Value, lanes: int) -> None:
            # Read before memory is asked for, or LLVM writes by a mask, which takes AMD without AVX-512 twice as long.
            own = None if marks else load(b, there, vector_of(form.bits, lanes))
            bits = _load_ahead(b, here, form, lanes)
            kept = b.icmp_unsigned(">", all_keys_of(b, bits, form, signed), narrow(b, limit, bits.type))
            if own is None:
                store(b, _flags(b, b.or_(kept, broadcast(b, all_stay, lanes))), there)
            else:
                store(b, b.select(kept, own, splat(bits.type, 0)), there)

        grids = [Grid(source, grid, loops), Grid(target, grid2, loops2)]
        # Where all numbers stay as they are, there is nothing to do.
        with over_ranges(b, grids, i if marks else b.select(all_stay, stop, i), stop) as (first, after, (at, at2)):
            here, there = b.gep(source, [at]), b.gep(target, [at2])
            over_lanes(b, b.sub(after, first), form.lanes, lambda e, n: cut(b.gep(here, [e]), b.gep(there, [e]), n))

    return step(emit, 14)


def _from(b: Builder, keys: Value, limit: Value, equal: Value) -> Value:
    """Which keys are above a limit, or equal to it where that is enough."""
    return b.or_(b.icmp_unsigned(">", keys, limit), b.and_(b.icmp_unsigned("==", keys, limit), equal))


def groups_per_line(width: int, n: int) -> int:
    """Groups of n numbers of `width` bits that a vector holds."""
    return max(1, 8 * LINE // width // n)


@cache
def mark_groups(width: int, n: int, sizes: bool) -> Any:
    """``(keys, i, keep, s, mask, j)``: mask of the `keep[s]` first-ranked of n keys, for `groups_per_line` groups.

    `sizes`: keys are magnitudes of floats, all ones for NaN.
    """
    groups = groups_per_line(width, n)
    vector, few = vector_of(width, n * groups), vector_of(64, groups)

    def emit(b: Builder, keys: Value, keep: Value, mask: Value) -> None:
        own = load(b, keys, vector)
        if sizes:
            top = splat(vector, (1 << (width - 1)) - 1)
            own = b.select(b.icmp_unsigned("<", own, top), own, top)
        ranks = _ranks(b, own, n, spare_bit=sizes)
        counts = load(b, keep, few)
        counts = counts if width == 64 else b.trunc(counts, vector_of(width, groups))
        kept = b.icmp_unsigned("<", ranks, shuffle(b, counts, [i // n for i in range(vector.count)]))
        store(b, _flags(b, kept), mask)

    return step(emit, 6)


def _count(b: Builder, flags: Value) -> Value:
    """How many lanes are true."""
    bits = b.bitcast(flags, ir.IntType(flags.type.count))
    found = call(b, f"llvm.ctpop.i{flags.type.count}", bits.type, [bits])
    return found if flags.type.count == 64 else b.zext(found, ir.IntType(64))


def _append(b: Builder, numbers: Value, chosen: Value, target: Value) -> None:
    """Store the chosen lanes side by side, and anything behind them."""
    vector = numbers.type
    if vector.count == 1:
        store(b, numbers, target)
        return
    if has_only_avx2():
        _append_by_table(b, numbers, chosen, target)
        return
    function = b.module.declare_intrinsic(
        f"llvm.experimental.vector.compress.v{vector.count}i{vector.element.width}",
        (),
        ir.FunctionType(vector, [vector, chosen.type, vector]),
    )
    store(b, b.call(function, [numbers, chosen, ir.Constant(vector, ir.Undefined)]), target)


def _append_by_table(b: Builder, numbers: Value, chosen: Value, target: Value) -> None:
    """As `_append`, up to eight numbers at a time, in an order that a table gives for each choice among them.

    LLVM makes one instruction of AVX2 of a permutation of words of 32 bits, or of 16 bytes, while it moves what it is
    to compress lane by lane: 18 ns for 16 numbers of 32 bits, where this takes 6.
    """
    width, word = numbers.type.element.width, ir.IntType(64)
    size = 32 if width >= 32 else 8
    lanes, each = min(numbers.type.count, 4 if width == 64 else 8), width // size
    words, table = vector_of(size, lanes * each), _orders(b, lanes, each)
    for start in range(0, numbers.type.count, lanes):
        some = shuffle(b, numbers, range(start, start + lanes))
        choice = b.zext(b.bitcast(shuffle(b, chosen, range(start, start + lanes)), ir.IntType(lanes)), word)
        order, own = b.load(b.gep(table, [INT32(0), choice]), align=8), b.bitcast(some, words)
        if size > 8:
            order = b.zext(order, words)
        found = ir.Constant(words, ir.Undefined)
        for i in range(words.count):
            found = b.insert_element(found, b.extract_element(own, b.extract_element(order, INT32(i))), INT32(i))
        store(b, b.bitcast(found, some.type), target)
        target = b.gep(target, [call(b, "llvm.ctpop.i64", word, [choice])])


def _orders(b: Builder, lanes: int, words: int) -> Value:
    """For each choice of lanes, a bit each, the words of those that are chosen, so many each, and some behind them."""
    name = f"orders_of_{lanes}_times_{words}"
    found = b.module.globals.get(name)
    if found is None:
        row = vector_of(8, lanes * words)
        rows = []
        for choice in range(1 << lanes):
            first = sorted(range(lanes), key=lambda lane: not choice >> lane & 1)
            rows.append(ir.Constant(row, [lane * words + word for lane in first for word in range(words)]))
        table = ir.Constant(ir.ArrayType(row, len(rows)), rows)
        found = cgutils.global_constant(b.module, name, table)
    return found


@cache
def read_strip(form: Format, signed: bool) -> Any:
    """``(source, o, grid, 0, loops, i, stop, keys, 0)``: the keys of elements [i, stop), as for `cut_strip`."""

    def emit(b: Builder, source: Value, grid: Value, loops: Value, i: Value, stop: Value, keys: Value) -> None:
        with over_ranges(b, [Grid(source, grid, loops)], i, stop) as (first, after, (at,)):
            here, there = b.gep(source, [at]), b.gep(keys, [b.sub(first, i)])

            def read(e: Value, n: int) -> None:
                numbers = _load_ahead(b, b.gep(here, [e]), form, n)
                store(b, all_keys_of(b, numbers, form, signed), b.gep(there, [e]))

            over_lanes(b, b.sub(after, first), form.lanes, read)

    return step(emit, 9)


def _is_compared_as_number(form: Format, crowded: bool) -> bool:
    """Whether `survey_strip` compares and appends numbers as they are: to make keys of all takes half of the time."""
    return form.name in ("float32", "float64") and not crowded


def _floor_of_key(b: Builder, key: Value, form: Format, signed: bool) -> Value:
    """The largest number but NaN whose key is at most this one, an int64; NaN where there is none."""
    word, top = key.type, 1 << (form.bits - 1)
    real = ir.DoubleType() if form.bits == 64 else ir.FloatType()
    last = word(form.inf + (top if signed else 0))
    key = b.select(b.icmp_unsigned("<", key, last), key, last)
    bits = key
    if signed:
        # No number has the key below that of zero, which -0.0 would have.
        negative = b.sub(word(2 * top - 1), b.select(b.icmp_unsigned("==", key, word(top - 1)), word(top - 2), key))
        bits = b.select(b.icmp_unsigned("<", key, word(top)), negative, b.xor(key, word(top)))
    # Keys below that of -inf are negative bits of NaN.
    return b.bitcast(bits if form.bits == 64 else b.trunc(bits, ir.IntType(form.bits)), real)


def _survey_numbers(
    b: Builder, bits: Value, form: Format, signed: bool, low: Value, high: Value
) -> tuple[Value, Value]:
    """Which numbers have keys in [low, high], and which above: NaN, and every number, is not at most NaN."""
    lanes, word = bits.type.count, low.type
    real = ir.DoubleType() if form.bits == 64 else ir.FloatType()
    numbers = b.bitcast(bits, ir.VectorType(real, lanes))
    if not signed:
        numbers = on_floats(b, "fabs", numbers)
    below = _floor_of_key(b, b.sub(low, word(1)), form, signed)
    below = b.select(b.icmp_unsigned("==", low, word(0)), real(math.nan), below)
    most = broadcast(b, _floor_of_key(b, high, form, signed), lanes)
    any_above = b.icmp_unsigned("!=", high, word((1 << form.bits) - 1))  # which is the key of NaN
    above = b.and_(b.fcmp_unordered(">", numbers, most), broadcast(b, any_above, lanes))
    return b.and_(b.fcmp_unordered(">", numbers, broadcast(b, below, lanes)), b.not_(above)), above


@cache
def survey_strip(form: Format, signed: bool, crowded: bool) -> Any:
    """``(source, o, grid, 0, loops, i, stop, low, high, crowd, found, end, stores)``: look at elements [i, stop).

    Returns how many of the keys are above `high`, how many in [low, high], and if it is `crowded` how many equal
    `crowd`. Those inside are written to `found` from `end` on, one after another if it `stores`; else a few entries
    there are written all the same. All else as for `cut_strip`.
    """
    word, by_number = ir.IntType(64), _is_compared_as_number(form, crowded)

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, i: Value, stop: Value, low: Value, high: Value,
        crowd: Value, found: Value, stores: Value,
    ) -> Value:  # fmt: skip
        above, inside, equal, end = (cgutils.alloca_once_value(b, word(0)) for _ in range(4))
        move = b.sext(stores, word)

        def add(place: Value, number: Value) -> None:
            b.store(b.add(b.load(place), number), place)

        def look(here: Value, lanes: int) -> None:
            bits, target = _load_ahead(b, here, form, lanes), b.gep(found, [b.load(end)])
            if by_number:
                within, over = _survey_numbers(b, bits, form, signed, low, high)
                _append(b, bits, within, target)
            else:
                keys = all_keys_of(b, bits, form, signed)
                first, last, same = (narrow(b, key, keys.type) for key in (low, high, crowd))
                over = b.icmp_unsigned(">", keys, last)
                within = b.and_(b.icmp_unsigned(">=", keys, first), b.not_(over))
                _append(b, keys, within, target)
                if crowded:
                    add(equal, _count(b, b.icmp_unsigned("==", keys, same)))
            count = _count(b, within)
            add(above, _count(b, over))
            add(inside, count)
            add(end, b.and_(count, move))

        with over_ranges(b, [Grid(source, grid, loops)], i, stop) as (first, after, (at,)):
            here = b.gep(source, [at])
            over_lanes(b, b.sub(after, first), form.lanes, lambda e, n: look(b.gep(here, [e]), n))
        if by_number:
            with cgutils.for_range_slice(b, word(0), b.load(end), word(form.lanes)) as (e, _):
                there = b.gep(found, [e])
                numbers = load(b, there, vector_of(form.bits, form.lanes))
                store(b, all_keys_of(b, numbers, form, signed), there)
        return cgutils.pack_array(b, [b.load(place) for place in (above, inside, equal)])

    return step(emit, 13, types.UniTuple(types.int64, 3))


@cache
def count_magnitudes_above(form: Format) -> Any:
    """``(source, o, grid, 0, loops, elements, 0, turns, i, stop, size, most)``: how many elements of blocks [i, stop).

    Those whose magnitude has bits above `most`, as NaN has. Blocks have `size` elements, each adjacent to that of the
    next block; all else as for `cut_strip`.
    """
    word = ir.IntType(64)

    def emit(
        b: Builder, source: Value, grid: Value, loops: Value, elements: Value, turns: Value, i: Value, stop: Value,
        size: Value, most: Value,
    ) -> Value:  # fmt: skip
        found = cgutils.alloca_once_value(b, word(0))

        def take(here: Value, lanes: int) -> None:
            bits = _load_ahead(b, here, form, lanes)
            magnitudes = b.and_(bits, splat(bits.type, (1 << (form.bits - 1)) - 1))
            count = _count(b, b.icmp_unsigned(">", magnitudes, narrow(b, most, bits.type)))
            b.store(b.add(b.load(found), count), found)

        over_elements(b, Strip(Grid(source, grid, loops), elements, turns, i, stop), size, form.lanes, take)
        return b.load(found)

    return step(emit, 12, types.int64)
