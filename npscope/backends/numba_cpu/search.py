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
from npscope.backends.numba_cpu.codecs import signed_key_of_float32, signed_key_of_float64
from npscope.backends.numba_cpu.jit import inner, merged, standalone
from npscope.backends.numba_cpu.scalars import float_of, greatest, least
from npscope.backends.numba_cpu.vector_search import count_from, mark, neighbours_of

QUICK_PROBES = 6
"""Guesses before the search always looks for the keys next to a guess; normal data needs 5.8 in rows of 1024."""

_SIGN32, _SIGN64 = np.uint32(1 << 31), np.uint64(1 << 63)

FIRST_GUESS, FIRST_SPACING = np.uint64(1 << 30), 65536.0
"""Where a search starts that has no scope before it."""


# --- numbers along which keys are spread evenly enough to interpolate ----------------------------


@merged
def _real_of_key(key: Any, itemsize: int) -> float:
    return np.float64(key)


@merged
def _key_near(real: float, itemsize: int) -> Any:
    return np.uint64(real)


@inner
def _real_of_signed_key(key: Any, itemsize: int) -> Any:
    """The float itself: signed keys crowd around zero, by their exponents; there 14 guesses are needed and not 6."""
    if itemsize == 4:
        bits = np.uint32(key)
        return np.float64(float_of(np.uint32(bits ^ _SIGN32 if bits >= _SIGN32 else ~bits)))
    wide = np.uint64(key)
    return float_of(np.uint64(wide ^ _SIGN64 if wide >= _SIGN64 else ~wide))


@inner
def _signed_key_near(real: float, itemsize: int) -> Any:
    if itemsize == 4:
        return np.uint64(signed_key_of_float32(np.float32(real)))
    return signed_key_of_float64(real)


def reals(signed: bool) -> tuple[Any, Any, float, float]:
    """(number of a key, key near a number, least number that has one, bound of them), for keys of signed floats or not.

    Both take the bytes of a key as their last argument.
    """
    if signed:
        return _real_of_signed_key, _signed_key_near, -np.finfo(np.float64).max, np.inf
    return _real_of_key, _key_near, 0.0, 1.8e19


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
        low, high = np.uint64(0), np.uint64(keys.dtype.type(~np.uint64(0)))
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
                distance = real_of(high, keys.itemsize) - real_of(low, keys.itemsize)
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
                bottom, top = real_of(low, keys.itemsize), real_of(high, keys.itemsize)
                if guessed_low and guessed_high:
                    real = bottom + (top - bottom) * (np.float64(count_low - k) / np.float64(count_low - count_high))
                else:
                    step = spacing * np.float64(abs(count - k))
                    real = bottom + step if count > k else top - step
                    spacing *= 2.0  # a guess far off: the next step is bolder
                p = low + (width >> one)
                if first <= real < beyond:
                    p = key_near(real, keys.itemsize)
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


def group_of(n: int) -> int:
    """The `group` of a `selector` for scopes of n keys: n where they are ranked inside vectors, 0 where searched."""
    return n if n <= vector_selection.MAX_GROUP else 0


@cache
def selector(group: int, width: int) -> Any:
    """``select(keys, rows, n, keep, mask, guess, spacing)``: mask of the `keep` first-ranked of every n keys.

    Returns where to start the next search. Groups of n keys of `width` bits are ranked side by side in a
    vector: work arrays reach beyond the last of them by `SLACK` entries.
    """
    if not group:

        @standalone
        def select(keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float) -> tuple[Any, float]:
            for r in range(rows):
                limit, ties, guess, spacing = limit_of(keys, r * n, n, keep[r], guess, spacing)
                mark(keys, r * n, n, limit, ties, mask, r * n)
            return guess, spacing

        return select

    step, together = vector_selection.mark_groups(width, group), vector_selection.groups_per_line(width, group)

    @standalone
    def select_groups(
        keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float
    ) -> tuple[Any, float]:
        for r in range(0, rows, together):
            step(keys, r * group, keep, r, mask, r * group)
        return guess, spacing

    return select_groups


@standalone
def select_planes(keys: Any, rows: int, n: int, keep: Any, mask: Any, guess: Any, spacing: float) -> tuple[Any, float]:
    """As a `selector` of small groups, for keys in planes: the first of all groups, the second, ..."""
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
