"""The k-th largest of dense ordered integers, and the mask of the first-ranked, scope by scope.

Keys lie in a work array that fits the caches, a scope after the other. Counting those above a
guess costs tens of nanoseconds for a thousand, so the search is guess and count: the first guess
comes from the scope before, the next from interpolation, and once exactly k keys lie above a
guess it need not be a key at all. No guess can change which keys are found.

Array indices are unsigned here: Numba's test for negative ones keeps LLVM from vectorising.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu import vector_selection
from npscope.backends.numba_cpu.jit import standalone
from npscope.backends.numba_cpu.lane_search import LANES, MOST_KEYS, kth_of_rows, limits_of_rows, mark_planes, mark_rows
from npscope.backends.numba_cpu.scalars import (
    emit_float_of_key,
    emit_key_near_float,
    float_of_signed_key,
    key_at,
    least,
    number_of_key,
    numbers_within,
    signed_key_at,
)
from npscope.backends.numba_cpu.vector_search import emit_count_from, emit_neighbours_of, mark, tie_border
from npscope.backends.numba_cpu.vectors import Builder, Format, Value, call, step

QUICK_PROBES = 6
"""Guesses before the search always looks for the keys next to a guess; normal data needs 5.8 in rows of 1024."""

FIRST_GUESS, FIRST_SPACING = np.uint64(1 << 30), 65536.0
"""Where a search starts that has no scope before it."""


# --- numbers along which keys are spread evenly enough to interpolate ----------------------------


def reals(signed: Format | None) -> tuple[Any, Any]:
    """(number of a key, key at a number), for keys of signed floats of a format, or of others.

    Both take an array of such keys as their last argument. Signed keys stand for their floats: they crowd around zero,
    by their exponents, where 14 guesses are needed and not 6.
    """
    return (number_of_key, key_at) if signed is None else (float_of_signed_key(signed), signed_key_at(signed))


@cache
def separator(signed: Format | None) -> Any:
    """``separate(keys, start, n, k, guess, spacing)``: (limit, ties, spacing), for 0 < k < n.

    The first-ranked k of n keys are those above `limit` and the first `ties` equal to it. Where `ties` is n,
    exactly k keys are at least `limit`, which need not be one of them. `spacing` says how far apart keys lie
    near there, for the next guess. Keys are of `signed` floats of a format, or of others.
    """
    separate_keys = _separate_keys(signed)

    @standalone
    def separate(keys: Any, start: int, n: int, k: int, guess: Any, spacing: float) -> tuple[Any, int, float]:
        found: tuple[Any, int, float] = separate_keys(keys, start, n, k, guess, spacing)
        return found

    return separate


def _separate_keys(signed: Format | None) -> Any:
    """``(keys, start, n, k, guess, spacing)``: what a `separator` does, written for LLVM: Numba took 260 ms over it."""
    word, real, flag = ir.IntType(64), ir.DoubleType(), ir.IntType(1)
    first, beyond = numbers_within(signed)

    def emit(b: Builder, keys: Value, n: Value, k: Value, guess: Value, start_spacing: Value) -> Value:
        bits = keys.type.pointee.width

        def real_of(key: Value) -> Value:
            return b.uitofp(key, real) if signed is None else emit_float_of_key(b, key, signed)

        def real_number(count: Value) -> Value:
            return b.sitofp(count, real)

        # Invariant: more than k keys are at least `low`, fewer than k are above `high`.
        # Where the search is: the bracket, what its ends are as numbers, how many keys lie from them on, and whether
        # they have been guesses; the next guess; how many there were, and what the last one found.
        zero, one = word(0), word(1)
        low, high = (cgutils.alloca_once_value(b, word(end)) for end in (0, (1 << bits) - 1))
        bottom, top = (cgutils.alloca_once_value(b, real_of(b.load(end))) for end in (low, high))
        count_low, count_high = cgutils.alloca_once_value(b, n), cgutils.alloca_once_value(b, zero)
        guessed_low, guessed_high = (cgutils.alloca_once_value(b, flag(0)) for _ in range(2))
        p, spacing = cgutils.alloca_once_value(b, guess), cgutils.alloca_once_value(b, start_spacing)
        probes, last = (cgutils.alloca_once_value(b, zero) for _ in range(2))
        limit, ties = (cgutils.alloca_once(b, word) for _ in range(2))

        def set_all(*changes: tuple[Value, Value]) -> None:
            for place, value in changes:
                b.store(value, place)

        head, probe, exact, narrow, ends, after = (
            b.append_basic_block(name) for name in ("head", "probe", "exact", "narrow", "ends", "after")
        )
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(b.icmp_unsigned("<", b.load(low), b.load(high)), probe, ends)

        b.position_at_end(probe)
        border = call(b, "llvm.umax.i64", word, [b.load(p), b.add(b.load(low), one)])
        border = call(b, "llvm.umin.i64", word, [border, b.load(high)])
        count = emit_count_from(b, keys, n, border)
        set_all((probes, b.add(b.load(probes), one)))
        b.cbranch(b.icmp_signed("==", count, k), exact, narrow)

        b.position_at_end(exact)
        set_all((limit, border), (ties, n))
        b.branch(after)

        b.position_at_end(narrow)
        # Between two guesses lies no key, so keys are few and many are equal: then, and after many guesses, a look at
        # the keys next to it.
        stuck = b.icmp_signed("==", count, b.load(last))
        late = b.icmp_signed(">", b.load(probes), word(QUICK_PROBES))
        set_all((last, count))
        above, below = cgutils.alloca_once_value(b, border), cgutils.alloca_once_value(b, b.sub(border, one))
        with b.if_then(b.or_(stuck, late), likely=False):
            found = emit_neighbours_of(b, keys, n, border)
            set_all(*((place, b.extract_value(found, i)) for i, place in enumerate((above, below))))
        many = b.icmp_signed(">", count, k)
        with b.if_else(many) as (then, otherwise):
            with then:
                key = b.load(above)
                set_all((low, key), (count_low, count), (guessed_low, flag(1)), (bottom, real_of(key)))
            with otherwise:
                key = b.load(below)
                set_all((high, key), (count_high, count), (guessed_high, flag(1)), (top, real_of(key)))
        from_here, number = b.load(bottom), cgutils.alloca_once(b, real)
        with b.if_else(b.and_(b.load(guessed_low), b.load(guessed_high))) as (then, otherwise):
            with then:
                inside = b.sub(b.load(count_low), b.load(count_high))
                apart = b.fdiv(b.fsub(b.load(top), from_here), real_number(inside))
                ahead = b.fmul(apart, real_number(b.sub(b.load(count_low), k)))
                b.store(b.fadd(from_here, ahead), number)
                # Between ends that met there is no distance: a spacing of 0 would never grow.
                measured = b.and_(b.fcmp_ordered(">", apart, real(0.0)), b.fcmp_ordered("<", apart, real(math.inf)))
                b.store(b.select(measured, apart, b.load(spacing)), spacing)
            with otherwise:  # a guess far off: the next step is bolder
                wide = b.load(spacing)
                step = b.fmul(wide, real_number(b.select(many, b.sub(count, k), b.sub(k, count))))
                b.store(b.select(many, b.fadd(from_here, step), b.fsub(b.load(top), step)), number)
                b.store(b.fadd(wide, wide), spacing)
        half = b.lshr(b.sub(b.load(high), b.load(low)), one)
        b.store(b.add(b.load(low), half), p)
        x = b.load(number)
        halves = b.and_(late, b.icmp_unsigned("!=", b.and_(b.load(probes), one), zero))
        has_key = b.and_(b.fcmp_ordered(">=", x, real(first)), b.fcmp_ordered("<", x, real(beyond)))
        with b.if_then(b.and_(has_key, b.not_(halves))):
            b.store(b.fptoui(x, word) if signed is None else emit_key_near_float(b, x, signed), p)
        b.branch(head)

        b.position_at_end(ends)
        set_all((limit, b.load(low)), (ties, b.sub(k, b.load(count_high))))
        b.branch(after)

        b.position_at_end(after)
        return cgutils.pack_struct(b, [b.load(place) for place in (limit, ties, spacing)])

    return step(emit, 6, types.Tuple((types.uint64, types.int64, types.float64)))


# --- ranks ---------------------------------------------------------------------------------------


IN_LANES = -1
"""The `group` of scopes that are searched several at a time."""


def group_of(n: int) -> int:
    """The `group` of a `selector` for scopes of n keys: n if ranked in vectors, `IN_LANES`, or 0 for one by one."""
    if n <= vector_selection.MAX_GROUP:
        return n
    return IN_LANES if n <= MOST_KEYS else 0


@cache
def selector(group: int, width: int, signed: Format | None, sizes: bool) -> Any:
    """``select(keys, rows, n, keep, mask, guess, spacing)``: mask of the `keep` first-ranked of every n keys.

    Returns where to start the next search. Groups of n keys of `width` bits are ranked side by side in a vector, or
    searched side by side: work arrays, `keep` too, reach beyond the last of them by `SLACK` entries. `sizes`: keys are
    magnitudes of floats.
    """
    if not group:
        separate = separator(signed)

        @standalone
        def select(keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float) -> tuple[Any, float]:
            for r in range(rows):
                k, limit, ties = keep[r], ~np.uint64(0), 0
                if k >= n:
                    limit, ties = np.uint64(0), n
                elif k > 0:
                    limit, ties, spacing = separate(keys, r * n, n, k, guess, spacing)
                    guess = limit
                mark(keys, r * n, n, limit, ties, mask, r * n)
            return guess, spacing

        return select

    if group == IN_LANES:
        mark_lanes = mark_rows(signed)

        @standalone
        def select_in_lanes(
            keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float
        ) -> tuple[Any, float]:
            for r in range(0, rows, LANES):
                some = least(LANES, rows - r)
                guess, spacing = mark_lanes(keys, r * n, n, some, keep, r, mask, r * n, guess, spacing)
            return guess, spacing

        return select_in_lanes

    step = vector_selection.mark_groups(width, group, sizes)
    together = vector_selection.groups_per_line(width, group)

    @standalone
    def select_groups(
        keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float
    ) -> tuple[Any, float]:
        for r in range(0, rows, together):
            step(keys, r * group, keep, r, mask, r * group)
        return guess, spacing

    return select_groups


@cache
def limiter(signed: Format | None) -> Any:
    """``limit(keys, pitch, rows, n, keep, limits, borders, guess, spacing)``: limits of rows so far apart, and borders.

    Of those equal to its limit a row keeps the ones before its border. Returns where to start the next search. Both
    results have room for `SLACK` more, and n is one for which `group_of` is `IN_LANES`.
    """
    find = limits_of_rows(signed)

    @standalone
    def limit_in_lanes(
        keys: Any, pitch: int, rows: int, n: int, keep: Any, limits: Any, borders: Any, guess: Any, spacing: float
    ) -> tuple[Any, float]:
        for r in range(0, rows, LANES):
            some = least(LANES, rows - r)
            guess, spacing = find(keys, r * pitch, pitch, n, some, keep, r, limits, r, borders, r, guess, spacing)
        for r in range(rows):
            if borders[r] < n:
                borders[r], _ = tie_border(keys, r * pitch, n, np.uint64(limits[r]), np.int64(borders[r]))
        return guess, spacing

    return limit_in_lanes


@cache
def finder(signed: Format | None) -> Any:
    """``find(keys, rows, n, k, found, s, guess, spacing)``: the k-th largest of every n keys, from entry s on.

    Returns where to start the next search. Nothing is written beyond them; n is as for a `limiter`.
    """
    find = kth_of_rows(signed)

    @standalone
    def find_in_lanes(
        keys: Any, rows: int, n: int, k: Any, found: Any, s: int, guess: Any, spacing: float
    ) -> tuple[Any, float]:
        for r in range(0, rows, LANES):
            guess, spacing = find(keys, r * n, n, least(LANES, rows - r), k, r, found, s + r, guess, spacing)
        return guess, spacing

    return find_in_lanes


@cache
def plane_selector(group: int, signed: Format | None) -> Any:
    """As a `selector`, for keys in planes, and masks: the first of all scopes, the second, ... `group` is not 0."""
    return _lanes_of_planes(signed) if group == IN_LANES else _rank_planes


def _lanes_of_planes(signed: Format | None) -> Any:
    mark_lanes = mark_planes(signed)

    @standalone
    def select_in_planes(
        keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float
    ) -> tuple[Any, float]:
        for r in range(0, rows, LANES):
            some = least(LANES, rows - r)
            guess, spacing = mark_lanes(keys, r, rows, n, some, keep, r, mask, r, guess, spacing)
        return guess, spacing

    return select_in_planes


@standalone
def _rank_planes(keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float) -> tuple[Any, float]:
    ranks = mask.view(np.uint8)
    for j in range(n):
        own = j * rows
        for r in range(rows):
            ranks[np.uintp(own + r)] = 0
        for rival in range(n):
            other = rival * rows
            if rival < j:  # earlier, so that it wins ties
                for r in range(rows):
                    ranks[np.uintp(own + r)] += keys[np.uintp(other + r)] >= keys[np.uintp(own + r)]
            elif rival > j:
                for r in range(rows):
                    ranks[np.uintp(own + r)] += keys[np.uintp(other + r)] > keys[np.uintp(own + r)]
    for j in range(n):
        for r in range(rows):
            mask[np.uintp(j * rows + r)] = ranks[np.uintp(j * rows + r)] < keep[np.uintp(r)]
    return guess, spacing
