"""Kernels over whole scopes that fit in cache: strip by strip they read keys, decide, and write.

Their steps are those of `strips`, and what decides, at its address as well:

select(keys, rows, n, keep, mask, guess, spacing)
    the mask of the first-ranked keys, see `search.selector`;
seek(look, read, source, i, pitch, r0, r1, n, keep, exact, ends, guess, expected, scratch)
    the limits of scopes, see `searcher`;
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
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, kernel, make_small, merged, standalone
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
    ends_type,
    scratch_type,
)
from npscope.backends.numba_cpu.vector_search import neighbours_of, tie_border
from npscope.backends.numba_cpu.vectors import Format, copy_numbers

_EXPECTED = types.UniTuple(types.float64, 3)
_SEARCHED = types.Tuple((types.uint64, _EXPECTED))
_call_selector, _call_limiter, _call_finder = caller(7, NEXT), caller(9, NEXT), caller(8, NEXT)
_call_searcher, _call_turner, _call_columns_cutter = caller(14, _SEARCHED), caller(5), caller(7)


@cache
def selector_address(group: int, key: np.dtype, signed: Format | None, sizes: bool) -> int:
    """Where the code of a `search.selector` is, for keys of this dtype."""
    select = search.selector(group, 8 * key.itemsize, signed, sizes)
    return address_of(select, array_of(key), *RANGE, KEEP, MASK, types.uint64, types.float64, result=NEXT)


@cache
def plane_selector_address(group: int, key: np.dtype, signed: Format | None) -> int:
    """Where the code of a `search.plane_selector` is, for keys of this dtype."""
    select = search.plane_selector(group, signed)
    return address_of(select, array_of(key), *RANGE, KEEP, MASK, types.uint64, types.float64, result=NEXT)


@cache
def limiter_address(key: np.dtype, signed: Format | None) -> int:
    """Where the code of a `search.limiter` is, for keys of this dtype."""
    rows = types.int64, types.int64, types.int64, KEEP, array_of(key), array_of(np.int32)
    return address_of(search.limiter(signed), array_of(key), *rows, types.uint64, types.float64, result=NEXT)


@cache
def finder_address(key: np.dtype, signed: Format | None) -> int:
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

WIDE_ELEMENTS = 1 << 24
"""Elements from which on that pays: it takes a third of a second to compile, and saves 3 ms for so many."""

REACH, FAR_REACH, SHARE = 3.0, 24.0, 0.25
"""Standard deviations of a rank between the expected limit and the ends of a look: at least, and after misses; and the
share of a scope in what is expected of the next one."""

FIRST_EXPECTED = (0.0, search.FIRST_SPACING, 0.0)
"""What is expected of the first scope."""

CROWD = 6.0
"""Times the deviation of ranks, of which twice that is expected in a look, from which on many keys must be equal."""

PAUSE = 32.0
"""Scopes that are searched without a look after one that reached far and missed: they are not like each other.

Or that found a crowd of equal keys: the limit of the scope before tells more than they do.
"""


@cache
def searcher(signed: Format | None) -> Function:
    """``search(look, read, source, i, pitch, r0, r1, n, keep, exact, ends, guess, expected, scratch)``: ends of scopes.

    Those of scopes [r0, r1), of n keys each, from i on and so far apart. The r-th has the `keep[r]` first-ranked above
    its limit, and equal to it before its border. Or if they are to be `exact`, the limit is the last of these itself,
    and the border means nothing. It reads all keys; `look` is for a `looking_searcher`: kernels call both alike.

    Returns (guess, expected): the key where the next search starts; and what is expected of the next scope: its limit,
    as a number; the distance between keys near it; and how far off it may be, 0 for unknown, and below zero the scopes
    that are not looked at first.
    """
    separate = search.separator(signed)

    @standalone
    def search_scopes(
        look: int, read: int, source: Any, i: int, pitch: int, r0: int, r1: int, n: int, keep: Any, exact: bool,
        ends: Any, guess: Any, expected: tuple[float, float, float], scratch: Any,
    ) -> tuple[Any, tuple[float, float, float]]:  # fmt: skip
        make_small()
        keys, _mask, _keep, sums, norms, making = scratch
        limits, borders = ends
        center, spacing, reach = expected
        for r in range(r0, r1):
            at, k, limit, border = i + r * pitch, keep[r], ~np.uint64(0), 0
            if k > 0:
                call_reader(read, source, at, at + n, keys, sums, norms, making)
                limit, border = np.uint64(0), n
                if k < n:
                    limit, border, spacing = separate(keys, 0, n, k, guess, spacing)
                    guess = limit
                if border == n and exact:
                    limit, _ = neighbours_of(keys, 0, n, limit)
                elif border < n and not exact:
                    border, _ = tie_border(keys, 0, n, limit, border)
            limits[r], borders[r] = limit, border
        return guess, (center, spacing, reach)

    return search_scopes


@cache
def looking_searcher(signed: Format | None) -> Function:
    """A `searcher` that first looks at the keys near the expected limit, by a surveyor at the address `look`.

    A scope that misses them is searched as a whole. To wait for `LANES` scopes and search what was found of them
    together took a tenth less, and twice as long to compile.
    """
    separate, search_all = search.separator(signed), searcher(signed)
    real_of, key_at = search.reals(signed)

    @standalone
    def search_scopes(
        look: int, read: int, source: Any, i: int, pitch: int, r0: int, r1: int, n: int, keep: Any, exact: bool,
        ends: Any, guess: Any, expected: tuple[float, float, float], scratch: Any,
    ) -> tuple[Any, tuple[float, float, float]]:  # fmt: skip
        make_small()
        keys, _mask, _keep, sums, norms, making = scratch
        limits, borders = ends
        for r in range(r0, r1):
            (center, spacing, reach), k, at, found = expected, keep[r], i + r * pitch, False
            if reach > 0 and 0 < k < n:
                ranks = reach * np.sqrt(np.float64(k) * np.float64(n - k) / np.float64(n))
                low, high = key_at(center - ranks * spacing, keys), key_at(center + ranks * spacing, keys)
                above, inside, _ = call_surveyor(look, read, source, at, at + n, low, high, low, keys, 0, True, scratch)
                found = above < k <= above + inside
                if found:
                    top = real_of(high, keys)
                    spacing = (top - real_of(low, keys)) / np.float64(inside)
                    limit, border = low, n
                    if k < above + inside:
                        # Where it would be if keys lay evenly in between: nearer than that of the scope before.
                        guess = key_at(top - spacing * np.float64(k - above), keys)
                        limit, border, _ = separate(keys, 0, inside, k - above, guess, spacing)
                        border = n if border == inside else border
                    if border == n and exact:
                        limit, _ = neighbours_of(keys, 0, inside, limit)
                    elif border < n and not exact:
                        call_reader(read, source, at, at + n, keys, sums, norms, making)
                        border, _ = tie_border(keys, 0, n, limit, border)
                    limits[r], borders[r], guess = limit, border, limit
                    center += SHARE * (real_of(limit, keys) - center)
                    reach = -PAUSE if np.float64(inside) > CROWD * ranks else reach + SHARE * (REACH - reach)
                    expected = center, spacing, reach
            if not found:
                guess, expected = search_all(
                    look, read, source, i, pitch, r, r + 1, n, keep, exact, ends, guess, expected, scratch
                )
                center, spacing = real_of(guess, keys), expected[1]
                if reach >= FAR_REACH or not abs(center) < np.inf or not spacing < np.inf:
                    reach = -PAUSE
                else:
                    reach = 2.0 * reach if reach > 0 else reach + 1.0 if reach < 0 else REACH
                if 0 < k < n:
                    expected = center, spacing, reach
        return guess, expected

    return search_scopes


@cache
def searcher_address(search_scopes: Function, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a `searcher` is, for buffers and keys of these dtypes."""
    where = types.int64, types.int64, lines.where_type(unit), *[types.int64] * 5
    return address_of(
        search_scopes, *where, KEEP, types.boolean, ends_type(key), types.uint64, _EXPECTED, scratch_type(key),
        result=_SEARCHED,
    )  # fmt: skip


@kernel
def cut_in_scopes(
    seek: int, look: int, read: int, cut: int, source: Any, target: Any, counts: Numbers, s0: int, s1: int, n: int,
    rows: int, ends: Any, scratch: Any,
) -> None:  # fmt: skip
    """As `keep_in_scopes`, for elements in scopes that are searched by a `searcher`, and cut by their limit."""
    _keys, _mask, keep, _sums, _norms, _making = scratch
    limits, borders = ends
    guess, expected = search.FIRST_GUESS, FIRST_EXPECTED
    for s in range(s0, s1, rows):
        stop = least(s1, s + rows)
        load_numbers(*counts, s, stop, keep)
        guess, expected = _call_searcher(
            seek, look, read, source, s * n, n, 0, stop - s, n, keep, False, ends, guess, expected, scratch
        )
        for r in range(stop - s):
            i, border, limit = (s + r) * n, np.int64(borders[r]), np.uint64(limits[r])
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
    source: Any, pitch: int, cut: int, target: Any, counts: Numbers, s0: int, s1: int, n: int, rows: int, ends: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """As `cut_in_scopes`, for scopes of adjacent elements side by side: strip by strip, `turn` reads their keys.

    By a `search.limiter` at the address `limit_rows`, if it is not 0.

    These are `turned`, scope by scope `pitch` apart, and searched as those of `source`, which is the same. The first
    element lies `past` the start of a line of a cache, of `line` elements: tiles that straddle lines take a sixth
    longer, so that strips end where lines do, of the first row of scopes and those that are whole lines from it.
    """
    _keys, _mask, keep, _sums, _norms, _making = scratch
    limits, borders = ends
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
        else:
            guess, expected = _call_searcher(
                seek, look, read, source, 0, pitch, 0, stop - s, n, keep, False, ends, guess, expected, scratch
            )
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
    pitch: int, counts: Numbers, s0: int, s1: int, n: int, rows: int, found: Any, ends: Any, scratch: Any,
) -> None:  # fmt: skip
    """Find the k-th largest key of scopes [s0, s1), by a `searcher`.

    If `turn` is not 0, it reads the keys of an `array` strip by strip, as for `cut_in_columns`; else `line` is 1.
    """
    _keys, _mask, keep, _sums, _norms, _making = scratch
    guess, expected = search.FIRST_GUESS, FIRST_EXPECTED
    s = s0
    while s < s1:
        stop, start = strip_end(s, s1, rows, past, line), s
        load_numbers(*counts, s, stop, keep)
        if turn != 0:
            _call_turner(turn, array, s * n, stop * n, turned, pitch)
            start = 0
        guess, expected = _call_searcher(
            seek, look, read, source, start * pitch, pitch, 0, stop - s, n, keep, True, ends, guess, expected, scratch
        )
        copy_numbers(ends[0], 0, stop - s, found, s)
        s = stop
