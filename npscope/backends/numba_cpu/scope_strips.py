"""Kernels over whole scopes that fit in cache: strip by strip they read keys, decide, and write.

Their steps are those of `strips`, and what decides, at its address as well:

select(keys, rows, n, keep, mask, guess, spacing)
    the mask of the first-ranked keys, see `search.selector`;
seek(look, read, source, i, n, k, guess, expected, scratch)
    the limit of one scope, see `searcher`;
turn(source, i, stop, keys, pitch)
    the keys of scopes that lie side by side, see `side_by_side.columns_turner`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from npscope.backends.numba_cpu import lines, search, vector_selection
from npscope.backends.numba_cpu.codecs import Function
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, kernel, merged, standalone
from npscope.backends.numba_cpu.kernels import Numbers, load_numbers
from npscope.backends.numba_cpu.lane_search import NEXT
from npscope.backends.numba_cpu.scalars import least
from npscope.backends.numba_cpu.strips import (
    KEEP,
    MASK,
    RANGE,
    call_cutter,
    call_reader,
    call_surveyor,
    call_writer,
    scratch_type,
)
from npscope.backends.numba_cpu.vector_search import neighbours_of, tie_border

_EXPECTED = types.UniTuple(types.float64, 3)
_LIMIT = types.Tuple((types.uint64, types.int64, types.int64, types.uint64, _EXPECTED))
_call_selector, _call_limiter, _call_finder = caller(7, NEXT), caller(9, NEXT), caller(8, NEXT)
_call_searcher, _call_turner, _call_columns_cutter = caller(9, _LIMIT), caller(5), caller(7)


@cache
def selector_address(group: int, key: np.dtype, signed: bool, sizes: bool) -> int:
    """Where the code of a `search.selector` is, for keys of this dtype."""
    select = search.selector(group, 8 * key.itemsize, signed, sizes)
    return address_of(select, array_of(key), *RANGE, KEEP, MASK, types.uint64, types.float64, result=NEXT)


@cache
def plane_selector_address(group: int, key: np.dtype, signed: bool) -> int:
    """Where the code of a `search.plane_selector` is, for keys of this dtype."""
    select = search.plane_selector(group, signed)
    return address_of(select, array_of(key), *RANGE, KEEP, MASK, types.uint64, types.float64, result=NEXT)


@cache
def limiter_address(key: np.dtype, signed: bool) -> int:
    """Where the code of a `search.limiter` is, for keys of this dtype."""
    rows = types.int64, types.int64, types.int64, KEEP, array_of(key), array_of(np.int32)
    return address_of(search.limiter(signed), array_of(key), *rows, types.uint64, types.float64, result=NEXT)


@cache
def finder_address(key: np.dtype, signed: bool) -> int:
    """Where the code of a `search.finder` is, for keys of this dtype."""
    rows = types.int64, types.int64, KEEP, array_of(key), types.int64
    return address_of(search.finder(signed), array_of(key), *rows, types.uint64, types.float64, result=NEXT)


@kernel
def keep_in_scopes(
    read: int, select: int, write: int, source: Any, target: Any, counts: Numbers, s0: int, s1: int, n: int, rows: int,
    scratch: Any,
) -> None:  # fmt: skip
    """Keep the first-ranked blocks of scopes [s0, s1), in strips of `rows` scopes of n blocks."""
    keys, mask, keep, sums, norms, making = scratch
    guess, spacing = search.FIRST_GUESS, search.FIRST_SPACING
    for s in range(s0, s1, rows):
        stop = least(s1, s + rows)
        load_numbers(*counts, s, stop, keep)
        call_reader(read, source, s * n, stop * n, keys, sums, norms, making)
        guess, spacing = _call_selector(select, keys, stop - s, n, keep, mask, guess, spacing)
        call_writer(write, target, s * n, stop * n, mask)


@merged
def _read_planes(
    read: int, source: Any, s: int, stop: int, planes: int, within: int, scopes: int, scratch: Any
) -> None:  # fmt: skip
    """Read the keys of scopes [s, stop) plane by plane: `within` blocks of the first scope, as many of the second, ...

    So blocks are numbered, over all `scopes`. They are read in this order, because a reader may write beyond the end of
    what it reads.
    """
    keys, _mask, _keep, sums, norms, making = scratch
    for j in range(planes):
        plane, at = keys[j * (stop - s) * within :], j * scopes
        call_reader(read, source, (at + s) * within, (at + stop) * within, plane, sums, norms, making)


@merged
def _deal(rows: Any, count: int, order: Any, within: int, planes: Any, at: int) -> None:
    """Numbers of `count` scopes from planes into rows, from an entry on; `order` says which entry comes when."""
    n = order.size
    for j in range(0, n, within):
        for r in range(count):
            row, start = at + r * n, j * count + r * within
            for i in range(within):
                rows[np.uintp(row + order[np.uintp(j + i)])] = planes[np.uintp(start + i)]


@kernel
def read_in_planes(
    read: int, source: Any, s0: int, s1: int, order: Any, within: int, scopes: int, rows: int, out: Any, scratch: Any
) -> None:  # fmt: skip
    """As `read_blocks`, of scopes that lie side by side, whose blocks are numbered as for `_read_planes`."""
    n = order.size
    for s in range(s0, s1, rows):
        stop = least(s1, s + rows)
        _read_planes(read, source, s, stop, n // within, within, scopes, scratch)
        _deal(out, stop - s, order, within, scratch[0], (s - s0) * n)


@kernel
def keep_in_planes(
    read: int, select: int, write: int, source: Any, target: Any, in_planes: bool, as_they_lie: bool, counts: Numbers,
    s0: int, s1: int, order: Any, within: int, scopes: int, rows: int, turned: Any, plane: Any, scratch: Any,
) -> None:  # fmt: skip
    """As `keep_in_scopes`, for scopes that lie side by side, whose blocks are numbered as for `_read_planes`.

    Those of `target` too if it is written `in_planes`. Then they may be ranked `as_they_lie`, by a `plane_selector`.
    """
    keys, mask, keep, _sums, _norms, _making = scratch
    guess, spacing = search.FIRST_GUESS, search.FIRST_SPACING
    n = order.size
    for s in range(s0, s1, rows):
        stop = least(s1, s + rows)
        count = stop - s
        load_numbers(*counts, s, stop, keep)
        _read_planes(read, source, s, stop, n // within, within, scopes, scratch)
        if as_they_lie:
            guess, spacing = _call_selector(select, keys, count, n, keep, mask, guess, spacing)
        else:
            _deal(turned, count, order, within, keys, 0)
            guess, spacing = _call_selector(select, turned, count, n, keep, mask, guess, spacing)
        for j in range(n // within if in_planes else 0):
            if as_they_lie:
                kept = mask[j * count :]
            else:
                kept = plane
                for r in range(count):
                    for i in range(within):
                        kept[np.uintp(r * within + i)] = mask[np.uintp(r * n + order[np.uintp(j * within + i)])]
            call_writer(write, target, (j * scopes + s) * within, (j * scopes + stop) * within, kept)
        if not in_planes:
            call_writer(write, target, s * n, stop * n, mask)


WIDE_SCOPE = 512
"""Keys of a scope from which on those near the expected limit are looked at first; fewer are searched as fast."""

WIDE_ELEMENTS = 1 << 23
"""Elements from which on that pays: it takes a fifth of a second to compile, and saves a millisecond for so many."""

REACH, FAR_REACH, WEIGHT = 3.0, 24.0, 0.25
"""Standard deviations of a rank between the expected limit and the ends of a look: at least, and after misses; and
how much a new limit counts in what is expected next."""

FIRST_EXPECTED = (0.0, search.FIRST_SPACING, 0.0)
"""What is expected of the first scope."""

PAUSE = 32.0
"""Scopes that are searched without a look after one that reached far and missed: they are not like each other."""


@cache
def searcher(signed: bool) -> Function:
    """``search_scope(look, read, source, i, n, k, guess, expected, scratch)``: a `search.separator` of n keys.

    It reads all of them; `look` is for a `looking_searcher`, so that kernels call both alike.

    Returns (limit, ties, count, guess, expected): limit and ties for any k. All keys that can be the least from `limit`
    on are among the first `count` in the work array; those are the scope as it is if `count` is n. `guess` is the key
    where a search starts. What is `expected` of the next scope: its limit, as a number; the distance between keys near
    it; and how far off it may be, 0 for unknown, and below zero the scopes that are not looked at first.
    """
    separate = search.separator(signed)

    @standalone
    def search_scope(
        look: int, read: int, source: Any, i: int, n: int, k: int, guess: Any, expected: tuple[float, float, float],
        scratch: Any,
    ) -> tuple[Any, int, int, Any, tuple[float, float, float]]:  # fmt: skip
        keys, _mask, _keep, sums, norms, making = scratch
        if k <= 0:
            return ~np.uint64(0), 0, 0, guess, expected
        call_reader(read, source, i, i + n, keys, sums, norms, making)
        if k >= n:
            return np.uint64(0), n, n, guess, expected
        limit, ties, spacing = separate(keys, 0, n, k, guess, expected[1])
        return limit, ties, n, limit, (expected[0], spacing, expected[2])

    return search_scope


@cache
def looking_searcher(signed: bool) -> Function:
    """A `searcher` that first looks at the keys near the expected limit, by a surveyor at the address `look`."""
    separate, search_all = search.separator(signed), searcher(signed)
    real_of, key_at = search.reals(signed)

    @standalone
    def search_scope(
        look: int, read: int, source: Any, i: int, n: int, k: int, guess: Any, expected: tuple[float, float, float],
        scratch: Any,
    ) -> tuple[Any, int, int, Any, tuple[float, float, float]]:  # fmt: skip
        keys, (center, spacing, reach) = scratch[0], expected
        if reach > 0 and 0 < k < n:
            step = reach * spacing * np.sqrt(np.float64(k) * np.float64(n - k) / np.float64(n))
            low, high = key_at(center - step, keys), key_at(center + step, keys)
            above, inside, _ = call_surveyor(look, read, source, i, i + n, low, high, low, keys, 0, True, scratch)
            if above < k <= above + inside:
                limit, ties = low, n
                bottom, top = real_of(low, keys), real_of(high, keys)
                spacing = (top - bottom) / np.float64(inside)
                if k < above + inside:
                    # Where it would be if keys lay evenly in between: nearer than that of the scope before.
                    start = key_at(top - spacing * np.float64(k - above), keys)
                    limit, ties, _ = separate(keys, 0, inside, k - above, start, spacing)
                    ties = n if ties == inside else ties
                center += WEIGHT * (real_of(limit, keys) - center)
                reach *= 0.9
                return limit, ties, inside, limit, (center, spacing, REACH if reach < REACH else reach)
        limit, ties, count, guess, expected = search_all(look, read, source, i, n, k, guess, expected, scratch)
        if not 0 < k < n:
            return limit, ties, count, guess, expected
        center, spacing = real_of(limit, keys), expected[1]
        if reach >= FAR_REACH or not abs(center) < np.inf or not spacing < np.inf:
            reach = -PAUSE
        else:
            reach = 2.0 * reach if reach > 0 else reach + 1.0 if reach < 0 else REACH
        return limit, ties, count, guess, (center, spacing, reach)

    return search_scope


@cache
def searcher_address(search_scope: Function, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a `searcher` is, for buffers and keys of these dtypes."""
    where = types.int64, types.int64, lines.where_type(unit), types.int64, types.int64, types.int64
    return address_of(search_scope, *where, types.uint64, _EXPECTED, scratch_type(key), result=_LIMIT)


@kernel
def cut_in_scopes(
    seek: int, look: int, read: int, cut: int, source: Any, target: Any, counts: Numbers, s0: int, s1: int, n: int,
    rows: int, scratch: Any,
) -> None:  # fmt: skip
    """As `keep_in_scopes`, for elements in scopes that are searched by a `searcher`, and cut by their limit."""
    keys, _mask, keep, sums, norms, making = scratch
    guess, expected = search.FIRST_GUESS, FIRST_EXPECTED
    for s in range(s0, s1, rows):
        stop = least(s1, s + rows)
        load_numbers(*counts, s, stop, keep)
        for r in range(stop - s):
            i, border = (s + r) * n, n
            limit, ties, count, guess, expected = _call_searcher(
                seek, look, read, source, i, n, keep[r], guess, expected, scratch
            )
            if ties < n:
                if count < n:
                    call_reader(read, source, i, i + n, keys, sums, norms, making)
                border, _ = tie_border(keys, 0, n, limit, ties)
            call_cutter(cut, source, target, i, i + border, limit, 1)
            if border < n:
                call_cutter(cut, source, target, i + border, i + n, limit, 0)


@merged
def strip_end(s: int, s1: int, rows: int, past: int, line: int) -> Any:
    """Where a strip of up to `rows` scopes from `s` on ends: at a line of so many, or of as many as a tile has.

    Strips of fewer scopes than that do not: each has one at least.
    """
    unit = line if rows >= line else least(line, vector_selection.TILE)
    return least(s1, s + rows - ((s + rows + past) % unit if rows >= unit else 0))


@kernel
def cut_in_columns(
    turn: int, array: Any, past: int, line: int, limit_rows: int, seek: int, look: int, read: int, turned: Any,
    source: Any, pitch: int, cut: int, target: Any, limits: Any, borders: Any, counts: Numbers, s0: int, s1: int,
    n: int, rows: int, scratch: Any,
) -> None:  # fmt: skip
    """As `cut_in_scopes`, for scopes of adjacent elements side by side: strip by strip, `turn` reads their keys.

    By a `search.limiter` at the address `limit_rows`, if it is not 0.

    These are `turned`, scope by scope `pitch` apart, and searched as those of `source`, which is the same. The first
    element lies `past` the start of a line of a cache, of `line` elements: tiles that straddle lines take a sixth
    longer, so that strips end where lines do, of the first row of scopes and those that are whole lines from it.
    """
    _keys, _mask, keep, _sums, _norms, _making = scratch
    guess, spacing, expected = search.FIRST_GUESS, search.FIRST_SPACING, FIRST_EXPECTED
    s = s0
    while s < s1:
        stop = strip_end(s, s1, rows, past, line)
        load_numbers(*counts, s, stop, keep)
        _call_turner(turn, array, s * n, stop * n, turned, pitch)
        if limit_rows != 0:
            guess, spacing = _call_limiter(
                limit_rows, turned, pitch, stop - s, n, keep, limits, borders, guess, spacing
            )
        for r in range(0 if limit_rows != 0 else stop - s):
            limit, ties, _, guess, expected = _call_searcher(
                seek, look, read, source, r * pitch, n, keep[r], guess, expected, scratch
            )
            limits[r], borders[r] = limit, n
            if ties < n:
                borders[r], _ = tie_border(turned, r * pitch, n, limit, ties)
        _call_columns_cutter(cut, array, target, s, stop, n, limits, borders)
        s = stop


@kernel
def kth_in_lanes(
    read: int, find: int, source: Any, counts: Numbers, s0: int, s1: int, n: int, rows: int, found: Any, scratch: Any
) -> None:  # fmt: skip
    """Find the k-th largest key of scopes [s0, s1), by a `search.finder`."""
    keys, _mask, keep, sums, norms, making = scratch
    guess, spacing = search.FIRST_GUESS, search.FIRST_SPACING
    for s in range(s0, s1, rows):
        stop = least(s1, s + rows)
        load_numbers(*counts, s, stop, keep)
        call_reader(read, source, s * n, stop * n, keys, sums, norms, making)
        guess, spacing = _call_finder(find, keys, stop - s, n, keep, found, s, guess, spacing)


@kernel
def kth_of_scopes(
    turn: int, array: Any, past: int, line: int, seek: int, look: int, read: int, turned: Any, source: Any,
    pitch: int, counts: Numbers, s0: int, s1: int, n: int, rows: int, found: Any, scratch: Any,
) -> None:  # fmt: skip
    """Find the k-th largest key of scopes [s0, s1), by a `searcher`.

    If `turn` is not 0, it reads the keys of an `array` strip by strip, as for `cut_in_columns`; else `line` is 1.
    """
    keys, _mask, keep, _sums, _norms, _making = scratch
    guess, expected = search.FIRST_GUESS, FIRST_EXPECTED
    s = s0
    while s < s1:
        stop, start = strip_end(s, s1, rows, past, line), s
        load_numbers(*counts, s, stop, keep)
        if turn != 0:
            _call_turner(turn, array, s * n, stop * n, turned, pitch)
            start = 0
        for r in range(stop - s):
            limit, ties, count, guess, expected = _call_searcher(
                seek, look, read, source, (start + r) * pitch, n, keep[r], guess, expected, scratch
            )
            if ties == n:
                limit, _ = neighbours_of(keys, 0, count, limit)
            found[s + r] = guess = limit
        s = stop
