"""The k-th largest of dense ordered integers, and the mask of the first-ranked, scope by scope.

Keys lie in a work array that fits the caches, a scope after the other. Counting those above a
guess costs tens of nanoseconds for a thousand, so the search is guess and count: the first guess
comes from the scope before, the next from interpolation, and once exactly k keys lie above a
guess it need not be a key at all. No guess can change which keys are found.

Array indices are unsigned here: Numba's test for negative ones keeps LLVM from vectorising.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from npscope.backends.numba_cpu import vector_selection
from npscope.backends.numba_cpu.jit import merged, standalone
from npscope.backends.numba_cpu.lane_search import LANES, MOST_KEYS, kth_of_rows, limits_of_rows, mark_planes, mark_rows
from npscope.backends.numba_cpu.scalars import (
    float_of_signed_key,
    greatest,
    key_near,
    largest_key,
    least,
    number_of_key,
    signed_key_near,
)
from npscope.backends.numba_cpu.vector_search import count_from, mark, neighbours_of, tie_border

QUICK_PROBES = 6
"""Guesses before the search always looks for the keys next to a guess; normal data needs 5.8 in rows of 1024."""

FIRST_GUESS, FIRST_SPACING = np.uint64(1 << 30), 65536.0
"""Where a search starts that has no scope before it."""


# --- numbers along which keys are spread evenly enough to interpolate ----------------------------


def reals(signed: bool) -> tuple[Any, Any, float, float]:
    """(number of a key, key near a number, least number that has one, bound of them), for keys of signed floats or not.

    Both take an array of such keys as their last argument. Signed keys stand for their floats: they crowd around zero,
    by their exponents, where 14 guesses are needed and not 6.
    """
    if signed:
        return float_of_signed_key, signed_key_near, -np.finfo(np.float64).max, np.inf
    return number_of_key, key_near, 0.0, 1.8e19


@cache
def separator(signed: bool) -> Any:
    """``separate(keys, start, n, k, guess, spacing)``: (limit, ties, spacing), for 0 < k < n.

    The first-ranked k of n keys are those above `limit` and the first `ties` equal to it. Where `ties` is n,
    exactly k keys are at least `limit`, which need not be one of them. `spacing` says how far apart keys lie
    near there, for the next guess. `signed`: the keys are of signed floats.

    Invariant: more than k keys are at least `low`, fewer than k are above `high`.
    """
    real_of, key_near, first, beyond = reals(signed)

    @standalone
    def separate(keys: Any, start: int, n: int, k: int, guess: Any, spacing: float) -> tuple[Any, int, float]:
        one = np.uint64(1)
        low, high = np.uint64(0), largest_key(0, keys)
        count_low, count_high = n, 0
        guessed_low = guessed_high = False
        p = guess
        probes = 0
        last = 0
        while low < high:
            p = least(greatest(p, low + one), high)
            count = count_from(keys, start, n, p)
            probes += 1
            stuck = count == last  # between two guesses lies no key, so keys are few and many are equal
            last = count
            if guessed_low and guessed_high:
                distance = real_of(high, keys) - real_of(low, keys)
                if distance < np.inf:
                    spacing = distance / np.float64(count_low - count_high)
            if count == k:
                return p, n, spacing
            above, below = p, p - one
            if stuck or probes > QUICK_PROBES:
                above, below = neighbours_of(keys, start, n, p)
            if count > k:
                low, count_low, guessed_low = above, count, True
            else:
                high, count_high, guessed_high = below, count, True
            width = high - low
            if probes > QUICK_PROBES and probes & 1:
                p = low + (width >> one)
            else:
                bottom, top = real_of(low, keys), real_of(high, keys)
                if guessed_low and guessed_high:
                    real = bottom + (top - bottom) * (np.float64(count_low - k) / np.float64(count_low - count_high))
                else:
                    step = spacing * np.float64(abs(count - k))
                    real = bottom + step if count > k else top - step
                    spacing *= 2.0  # a guess far off: the next step is bolder
                p = low + (width >> one)
                if first <= real < beyond:
                    p = key_near(real, keys)
        return low, k - count_high, spacing

    return separate


_separate = separator(False)


# --- ranks ---------------------------------------------------------------------------------------


@merged
def limit_of(keys: Any, start: int, n: int, k: int, guess: Any, spacing: float) -> tuple[Any, Any, Any, float]:
    """`separator` for any k, with where to start the next search: (limit, ties, guess, spacing)."""
    if k <= 0:
        return ~np.uint64(0), 0, guess, spacing
    if k >= n:
        return np.uint64(0), n, guess, spacing
    limit, ties, spacing = _separate(keys, start, n, k, guess, spacing)
    return limit, ties, limit, spacing


IN_LANES = -1
"""The `group` of scopes that are searched several at a time."""


def group_of(n: int) -> int:
    """The `group` of a `selector` for scopes of n keys: n if ranked in vectors, `IN_LANES`, or 0 for one by one."""
    if n <= vector_selection.MAX_GROUP:
        return n
    return IN_LANES if n <= MOST_KEYS else 0


@cache
def selector(group: int, width: int, signed: bool, sizes: bool) -> Any:
    """``select(keys, rows, n, keep, mask, guess, spacing)``: mask of the `keep` first-ranked of every n keys.

    Returns where to start the next search. Groups of n keys of `width` bits are ranked side by side in a vector, or
    searched side by side: work arrays, `keep` too, reach beyond the last of them by `SLACK` entries. `sizes`: keys are
    magnitudes of floats.
    """
    if not group:

        @standalone
        def select(keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float) -> tuple[Any, float]:
            for r in range(rows):
                limit, ties, guess, spacing = limit_of(keys, r * n, n, keep[r], guess, spacing)
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
def limiter(signed: bool) -> Any:
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
def finder(signed: bool) -> Any:
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
def plane_selector(group: int, signed: bool) -> Any:
    """As a `selector`, for keys in planes, and masks: the first of all scopes, the second, ... `group` is not 0."""
    return _lanes_of_planes(signed) if group == IN_LANES else _rank_planes


def _lanes_of_planes(signed: bool) -> Any:
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
