"""Kernels that decide: strip by strip they read keys, mark what is kept, and write.

A strip is a few thousand elements, which stay in the nearest cache between its three steps. The
steps are functions of their own, compiled once each, and a kernel is told at which addresses they are:

read(source, i, stop, keys, sums, norms, making)
    blocks [i, stop) of an array as ordered integers;
select(keys, rows, n, keep, mask, guess, spacing)
    the mask of the first-ranked keys, see `search.selector`;
write(target, i, stop, mask)
    what the mask says of these blocks;
cut(source, target, i, stop, limit, equal)
    adjacent elements, those neither above a limit nor equal to it, if `equal` is 1, as +0.0; or which are;
look(read, source, i, stop, low, high, crowd, found, end, stores, scratch)
    how many keys of blocks [i, stop) are above `high`, in [low, high], and equal to `crowd`; those inside are
    appended to `found` from `end` on if `stores`, which writes up to `SLACK` entries more than it needs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from npscope.backends.numba_cpu import lines, search, vector_norms, vector_selection, vectors
from npscope.backends.numba_cpu.codecs import Codec, Function, key_of_float32, key_of_float64
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, kernel, make_small, merged, standalone
from npscope.backends.numba_cpu.kernels import Numbers, load_numbers
from npscope.backends.numba_cpu.lane_search import NEXT
from npscope.backends.numba_cpu.nests import length_of, place
from npscope.backends.numba_cpu.operands import Layout, Operand
from npscope.backends.numba_cpu.scalars import largest_key, least
from npscope.backends.numba_cpu.vector_search import SLACK, count_from, mark, neighbours_of, tie_border

STRIP_ELEMENTS = 4096
"""Elements of a strip, where a scope is no larger: 16 KiB of float32."""

Where = tuple[np.ndarray, int, np.ndarray, np.ndarray]
"""Buffer, origin, grid and elements of an operand, the buffer in bytes where a kernel only hands it on."""


class Scratch:
    """Work arrays of one thread for strips of up to `blocks` blocks and `scopes` scopes."""

    def __init__(self, blocks: int, scopes: int, key: np.dtype, measured: int) -> None:
        """`measured`: so many of the blocks are measured at a time, 0 if they are single elements."""
        self.keys = np.zeros(blocks + SLACK, dtype=key)
        self.mask = np.zeros(blocks + SLACK, dtype=np.bool_)
        self.keep = np.zeros(scopes + SLACK, dtype=np.int64)
        self.norms = lines.NormBuffers(measured, np.dtype(np.float32))

    @property
    def nbytes(self) -> int:
        """Their memory."""
        return self.keys.nbytes + self.mask.nbytes + self.keep.nbytes + self.norms.nbytes

    @property
    def all(self) -> tuple[np.ndarray, ...]:
        """The last argument of a kernel."""
        return self.keys, self.mask, self.keep, *self.norms.all


# --- addresses -----------------------------------------------------------------------------------

_RANGE = (types.int64, types.int64)
_MASK, _WIDE, _KEEP = array_of(np.bool_), array_of(np.float64), array_of(np.int64)
_COUNTS = types.UniTuple(types.int64, 3)
_EXPECTED = types.UniTuple(types.float64, 3)
_LIMIT = types.Tuple((types.uint64, types.int64, types.int64, types.uint64, _EXPECTED))
_call_reader, _call_writer, _call_cutter, _call_selector = caller(7), caller(4), caller(6), caller(7, NEXT)
_call_surveyor, _call_searcher = caller(11, _COUNTS), caller(9, _LIMIT)
_call_turner, _call_columns_cutter = caller(5), caller(7)
_call_limiter, _call_finder = caller(9, NEXT), caller(8, NEXT)


def _scratch(key: np.dtype) -> Any:
    """The type of `Scratch.all`."""
    return types.Tuple((array_of(key), _MASK, _KEEP, _WIDE, array_of(np.float32), array_of(np.int64)))


@cache
def reader_address(read: Function, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a reader is, for buffers and keys of these dtypes."""
    norms, making = array_of(np.float32), array_of(np.int64)
    return address_of(read, lines.where_type(unit), *_RANGE, array_of(key), _WIDE, norms, making)


@cache
def writer_address(write: Function, unit: np.dtype) -> int:
    """Where the code of a writer is, for buffers of this dtype."""
    return address_of(write, lines.where_type(unit), *_RANGE, _MASK)


@cache
def cutter_address(cut: Function, unit: np.dtype, written: np.dtype) -> int:
    """Where the code of a `cutter` is, for buffers of these dtypes that are read and `written`."""
    return address_of(cut, lines.where_type(unit), lines.where_type(written), *_RANGE, types.uint64, types.int64)


@cache
def surveyor_address(look: Function, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a surveyor is, for buffers and keys of these dtypes."""
    limits, places = (types.uint64, types.uint64, types.uint64), (array_of(key), types.int64, types.boolean)
    return address_of(
        look, types.int64, lines.where_type(unit), *_RANGE, *limits, *places, _scratch(key), result=_COUNTS
    )


@cache
def selector_address(group: int, key: np.dtype, signed: bool) -> int:
    """Where the code of a `search.selector` is, for keys of this dtype."""
    select = search.selector(group, 8 * key.itemsize, signed)
    return address_of(select, array_of(key), *_RANGE, _KEEP, _MASK, types.uint64, types.float64, result=NEXT)


@cache
def plane_selector_address(group: int, key: np.dtype, signed: bool) -> int:
    """Where the code of a `search.plane_selector` is, for keys of this dtype."""
    select = search.plane_selector(group, signed)
    return address_of(select, array_of(key), *_RANGE, _KEEP, _MASK, types.uint64, types.float64, result=NEXT)


@cache
def limiter_address(key: np.dtype, signed: bool) -> int:
    """Where the code of a `search.limiter` is, for keys of this dtype."""
    rows = types.int64, types.int64, types.int64, _KEEP, array_of(key), array_of(np.int32)
    return address_of(search.limiter(signed), array_of(key), *rows, types.uint64, types.float64, result=NEXT)


@cache
def finder_address(key: np.dtype, signed: bool) -> int:
    """Where the code of a `search.finder` is, for keys of this dtype."""
    rows = types.int64, types.int64, _KEEP, array_of(key), types.int64
    return address_of(search.finder(signed), array_of(key), *rows, types.uint64, types.float64, result=NEXT)


# --- reading -------------------------------------------------------------------------------------


@cache
def line_reader(form: vectors.Format, signed: bool) -> Function:
    """Read adjacent elements, of as many bits as their keys have; by their numbers if `signed`, or by magnitude."""
    lanes = form.lanes
    step, one = (vector_selection.read_keys(form, n, signed) for n in (lanes, 1))

    @standalone
    def read(source: Any, i: int, stop: int, keys: Any, sums: Any, norms: Any, making: Any) -> None:
        make_small()
        buffer, origin, grid, _ = source
        width, start = grid[0, -1], i
        while i < stop:
            after = least(stop, i + width - i % width)
            at, count, first = origin + place(i, grid), after - i, i - start
            whole = count - count % lanes
            for e in range(0, whole, lanes):
                step(buffer, at + e, keys, first + e)
            for e in range(whole, count):
                one(buffer, at + e, keys, first + e)
            i = after

    return read


@cache
def element_reader(key: Function) -> Function:
    """Read 1-element blocks by `key`, which makes an ordered integer of an element."""

    @standalone
    def read(
        source: Any, i: int, stop: int, keys: Any, sums: Any, norms: Any, making: Any
    ) -> None:  # fmt: skip
        buffer, origin, grid, _ = source
        width, stride = grid[0, -1], grid[1, -1]
        start = i
        while i < stop:
            after = least(stop, i + width - i % width)
            at = origin + place(i, grid)
            for j in range(after - i):
                keys[np.uintp(i - start + j)] = key(buffer, at + j * stride)
            i = after

    return read


def dense_reader(key: np.dtype) -> int:
    """Read keys that are already there."""
    return reader_address(line_reader(vectors.KEYS[8 * key.itemsize], False), key, key)


def dense_surveyor(key: np.dtype, *, crowded: bool) -> int:
    """Look at keys that are already there; `crowded` as for a `line_surveyor`."""
    return surveyor_address(line_surveyor(vectors.KEYS[8 * key.itemsize], False, crowded), key, key)


@cache
def norm_reader(layout: Layout, code: int) -> Function:
    """Read blocks by their norms."""
    measure = lines.measurer(layout, code)

    @standalone
    def read(
        source: Any, i: int, stop: int, keys: Any, sums: Any, norms: Any, making: Any
    ) -> None:  # fmt: skip
        make_small()
        buffer, origin, grid, elements = source
        measure(buffer, origin, grid, elements, i, stop, sums, norms, making)
        vector_norms.keys_of_norms(norms, 0, stop - i, keys, 0)

    return read


# --- writing -------------------------------------------------------------------------------------


def dropper(operand: Operand) -> int:
    """Write +0.0 to the blocks whose mask is False."""
    write = _dropper(operand.codec) if operand.layout is None else lines.dropper(operand.layout.compiled)
    return writer_address(write, operand.place.unit)


@cache
def _dropper(codec: Codec) -> Function:
    keep = codec.keep

    @standalone
    def drop(target: Any, i: int, stop: int, mask: Any) -> None:
        buffer, origin, grid, elements = target
        width, stride = grid[0, -1], grid[1, -1]
        run, step = elements[0, -1], elements[1, -1]
        total = length_of(elements)
        start = i
        while i < stop:
            after = least(stop, i + width - i % width)
            at = origin + place(i, grid)
            for j in range(after - i):
                if not mask[i - start + j]:
                    for e in range(0, total, run):
                        first = at + j * stride + place(e, elements)
                        for r in range(run):
                            keep(buffer, first + r * step, False)
            i = after

    return drop


@cache
def cutter(form: vectors.Format, signed: bool, marks: bool) -> Function:
    """Write adjacent elements by their own keys: +0.0 where these are too small, or if it `marks`, which are kept."""
    lanes = form.lanes
    step, one = (vector_selection.cut_line(form, signed, marks, n) for n in (lanes, 1))

    @standalone
    def cut(source: Any, target: Any, i: int, stop: int, limit: Any, equal: int) -> None:
        make_small()
        if limit == 0 and equal and not marks:
            return  # all stay
        data, origin, grid, _ = source
        out, origin_out, grid_out, _ = target
        width, width_out = grid[0, -1], grid_out[0, -1]
        while i < stop:
            after = least(stop, least(i + width - i % width, i + width_out - i % width_out))
            at, at_out, count = origin + place(i, grid), origin_out + place(i, grid_out), after - i
            whole = count - count % lanes
            for e in range(0, whole, lanes):
                step(data, at + e, out, at_out + e, limit, equal)
            for e in range(whole, count):
                one(data, at + e, out, at_out + e, limit, equal)
            i = after

    return cut


SHORT_RUN = 64
"""Bools that are written one by one: to call for a copy of so few takes longer."""


@standalone
def _mark(target: Any, i: int, stop: int, mask: Any) -> None:
    buffer, origin, grid, elements = target
    width, stride = grid[0, -1], grid[1, -1]
    total, run = length_of(elements), elements[0, -1] if elements[1, -1] == 1 else 1
    start = i
    while i < stop:
        after = least(stop, i + width - i % width)
        at, count, first = origin + place(i, grid), after - i, i - start
        fills_line = stride == run and count * run > SHORT_RUN
        for e in range(0, total, run):
            here = at + place(e, elements)
            if fills_line and e > 0:
                vectors.copy_numbers(buffer, at, count * run, buffer, here)
            elif fills_line and run == 1:
                vectors.copy_numbers(mask, first, count, buffer, here)
            else:
                for j in range(count):
                    kept = mask[np.uintp(first + j)]
                    for r in range(run):
                        buffer[np.uintp(here + j * stride + r)] = kept
        i = after


def marker() -> int:
    """Write the mask of blocks to their elements, which are bools."""
    return writer_address(_mark, np.dtype(np.bool_))


@kernel
def write_blocks(write: int, target: Any, i0: int, i1: int, mask: Any) -> None:
    """Write blocks [i0, i1) by a mask that is already there."""
    _call_writer(write, target, i0, i1, mask)


@kernel
def write_each(write: int, target: Any, blocks: Any, mask: Any) -> None:
    """Write to each of these blocks the one entry of a mask."""
    for block in blocks:
        _call_writer(write, target, block, block + 1, mask)


# --- scopes that fit in cache ----------------------------------------------------------------------


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
        _call_reader(read, source, s * n, stop * n, keys, sums, norms, making)
        guess, spacing = _call_selector(select, keys, stop - s, n, keep, mask, guess, spacing)
        _call_writer(write, target, s * n, stop * n, mask)


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
        _call_reader(read, source, (at + s) * within, (at + stop) * within, plane, sums, norms, making)


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
            _call_writer(write, target, (j * scopes + s) * within, (j * scopes + stop) * within, kept)
        if not in_planes:
            _call_writer(write, target, s * n, stop * n, mask)


WIDE_SCOPE = 512
"""Keys of a scope from which on those near the expected limit are looked at first; fewer are searched as fast."""

WIDE_ELEMENTS = 1 << 23
"""Elements from which on that pays: it takes a third of a second to compile, and saves a millisecond for so many."""

REACH, FAR_REACH, WEIGHT = 3.0, 24.0, 0.25
"""Standard deviations of a rank between the expected limit and the ends of a look: at least, and after misses; and
how much a new limit counts in what is expected next."""

PAUSE = 32.0
"""Scopes that are searched without a look after one that reached far and missed: they are not like each other."""


@cache
def searcher(signed: bool) -> Function:
    """``search_scope(look, read, source, i, n, k, guess, expected, scratch)``: a `search.separator` of n keys.

    Returns (limit, ties, count, guess, expected): limit and ties for any k. All keys that can be the least from `limit`
    on are among the first `count` in the work array; those are the scope as it is if `count` is n. `guess` is the key
    where a search starts. What is `expected` of the next scope: its limit, as a number; the distance between keys near
    it; and how far off it may be, 0 for unknown, and below zero the scopes that are not looked at first.
    """
    separate = search.separator(signed)
    real_of, key_near, first, beyond = search.reals(signed)

    @merged
    def key_at(real: float, keys: Any) -> Any:
        if not real >= first:
            return np.uint64(0)
        ones = largest_key(0, keys)
        return ones if real >= beyond else least(key_near(real, keys), ones)

    @standalone
    def search_scope(
        look: int, read: int, source: Any, i: int, n: int, k: int, guess: Any, expected: tuple[float, float, float],
        scratch: Any,
    ) -> tuple[Any, int, int, Any, tuple[float, float, float]]:  # fmt: skip
        keys, _mask, _keep, sums, norms, making = scratch
        center, spacing, reach = expected
        if k <= 0:
            return ~np.uint64(0), 0, 0, guess, expected
        if reach > 0 and k < n:
            step = reach * spacing * np.sqrt(np.float64(k) * np.float64(n - k) / np.float64(n))
            low, high = key_at(center - step, keys), key_at(center + step, keys)
            above, inside, _ = _call_surveyor(look, read, source, i, i + n, low, high, low, keys, 0, True, scratch)
            if above < k <= above + inside:
                limit, ties = low, n
                if k < above + inside:
                    limit, ties, _ = separate(keys, 0, inside, k - above, guess, spacing)
                    ties = n if ties == inside else ties
                spacing = (real_of(high, keys) - real_of(low, keys)) / np.float64(inside)
                center += WEIGHT * (real_of(limit, keys) - center)
                reach *= 0.9
                return limit, ties, inside, limit, (center, spacing, REACH if reach < REACH else reach)
        _call_reader(read, source, i, i + n, keys, sums, norms, making)
        if k >= n:
            return np.uint64(0), n, n, guess, expected
        limit, ties, spacing = separate(keys, 0, n, k, guess, spacing)
        center = real_of(limit, keys)
        if reach >= FAR_REACH or not abs(center) < np.inf or not spacing < np.inf:
            reach = -PAUSE
        else:
            reach = 2.0 * reach if reach > 0 else reach + 1.0 if reach < 0 else REACH
        return limit, ties, n, limit, (center, spacing, reach)

    return search_scope


@cache
def searcher_address(signed: bool, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a `searcher` is, for buffers and keys of these dtypes."""
    where = types.int64, types.int64, lines.where_type(unit), types.int64, types.int64, types.int64
    return address_of(searcher(signed), *where, types.uint64, _EXPECTED, _scratch(key), result=_LIMIT)


@kernel
def cut_in_scopes(
    seek: int, look: int, read: int, cut: int, source: Any, target: Any, counts: Numbers, s0: int, s1: int, n: int,
    rows: int, scratch: Any,
) -> None:  # fmt: skip
    """As `keep_in_scopes`, for elements in scopes that are searched, and cut by their limit without a mask.

    By a `searcher` at the address `seek`, if it is not 0.
    """
    keys, _mask, keep, sums, norms, making = scratch
    guess, spacing, expected = search.FIRST_GUESS, search.FIRST_SPACING, (0.0, search.FIRST_SPACING, 0.0)
    for s in range(s0, s1, rows):
        stop = least(s1, s + rows)
        load_numbers(*counts, s, stop, keep)
        if seek == 0:
            _call_reader(read, source, s * n, stop * n, keys, sums, norms, making)
        for r in range(stop - s):
            i, first, count = (s + r) * n, r * n, n
            if seek == 0:
                limit, ties, guess, spacing = search.limit_of(keys, first, n, keep[r], guess, spacing)
            else:
                first = 0
                limit, ties, count, guess, expected = _call_searcher(
                    seek, look, read, source, i, n, keep[r], guess, expected, scratch
                )
            border = n
            if ties < n:
                if count < n:
                    _call_reader(read, source, i, i + n, keys, sums, norms, making)
                border, _ = tie_border(keys, first, n, limit, ties)
            _call_cutter(cut, source, target, i, i + border, limit, 1)
            if border < n:
                _call_cutter(cut, source, target, i + border, i + n, limit, 0)


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
    guess, spacing, expected = search.FIRST_GUESS, search.FIRST_SPACING, (0.0, search.FIRST_SPACING, 0.0)
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
            if seek == 0:
                limit, ties, guess, spacing = search.limit_of(turned, r * pitch, n, keep[r], guess, spacing)
            else:
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
        _call_reader(read, source, s * n, stop * n, keys, sums, norms, making)
        guess, spacing = _call_finder(find, keys, stop - s, n, keep, found, s, guess, spacing)


@cache
def kth_kernel(signed: bool) -> Any:
    """The kernel that finds the k-th largest key of scopes [s0, s1); `signed`: keys of signed floats.

    If `turn` is not 0, it reads the keys of an `array` strip by strip, as for `cut_in_columns`; else `line` is 1.
    """
    separate = search.separator(signed)

    @kernel
    def kth_of_scopes(
        turn: int, array: Any, past: int, line: int, seek: int, look: int, read: int, turned: Any, source: Any,
        pitch: int, counts: Numbers, s0: int, s1: int, n: int, rows: int, found: Any, scratch: Any,
    ) -> None:  # fmt: skip
        keys, _mask, keep, sums, norms, making = scratch
        guess, spacing, expected = search.FIRST_GUESS, search.FIRST_SPACING, (0.0, search.FIRST_SPACING, 0.0)
        s = s0
        while s < s1:
            stop, start = strip_end(s, s1, rows, past, line), s
            load_numbers(*counts, s, stop, keep)
            if turn != 0:
                _call_turner(turn, array, s * n, stop * n, turned, pitch)
                start = 0
            elif seek == 0:
                _call_reader(read, source, s * n, stop * n, keys, sums, norms, making)
            for r in range(stop - s):
                first, count, limit, ties = r * n, n, np.uint64(0), n
                if seek != 0:
                    first = 0
                    limit, ties, count, guess, expected = _call_searcher(
                        seek, look, read, source, (start + r) * pitch, n, keep[r], guess, expected, scratch
                    )
                elif keep[r] < n:
                    limit, ties, spacing = separate(keys, first, n, keep[r], guess, spacing)
                if ties == n:
                    limit, _ = neighbours_of(keys, first, count, limit)
                found[s + r] = guess = limit
            s = stop

    return kth_of_scopes


# --- scopes of any size ----------------------------------------------------------------------------


@merged
def _count_above(keys: Any, count: int, key: Any) -> int:
    """How many of the first keys are above one of them."""
    last = np.uint64(key)
    return 0 if last == largest_key(0, keys) else count_from(keys, 0, count, last + np.uint64(1))


@cache
def surveyor(width: int) -> Function:
    """Look at keys that `read` reads."""
    lanes_ = 8 * vectors.LINE // width
    collect = vector_selection.collect(width)

    @standalone
    def look(
        read: int, source: Any, i: int, stop: int, low: Any, high: Any, crowd: Any, found: Any, end: int, stores: bool,
        scratch: Any,
    ) -> tuple[int, int, int]:  # fmt: skip
        keys, _mask, _keep, sums, norms, making = scratch
        _call_reader(read, source, i, stop, keys, sums, norms, making)
        count = stop - i
        above, equal = _count_above(keys, count, high), 0
        if crowd < low or crowd > high:
            equal = count_from(keys, 0, count, crowd) - _count_above(keys, count, crowd)
        if not stores:
            return above, count_from(keys, 0, count, low) - above, equal
        bottom, span = keys.dtype.type(low), keys.dtype.type(high - low)
        start, whole = end, count - count % lanes_
        for e in range(0, whole, lanes_):
            end += collect(keys, e, found, end, bottom, span)
        for e in range(whole, count):
            found[end] = keys[e]
            end += keys[e] - bottom <= span
        return above, end - start, equal

    return look


@cache
def line_surveyor(form: vectors.Format, signed: bool, crowded: bool) -> Function:
    """Look at adjacent elements, each once, as a `line_reader` reads them; `read` is not called.

    Those equal to `crowd` are counted only if this is `crowded`: that takes a tenth of the time.
    """
    lanes = form.lanes
    step, one = (vector_selection.survey_keys(form, n, signed, crowded) for n in (lanes, 1))

    @standalone
    def look(
        read: int, source: Any, i: int, stop: int, low: Any, high: Any, crowd: Any, found: Any, end: int, stores: bool,
        scratch: Any,
    ) -> tuple[int, int, int]:  # fmt: skip
        data, origin, grid, _ = source
        width, move = grid[0, -1], int(stores)
        above, inside, equal = 0, 0, 0
        while i < stop:
            after = least(stop, i + width - i % width)
            at, count = origin + place(i, grid), after - i
            whole = count - count % lanes
            for e in range(0, whole, lanes):
                counts = step(data, at + e, found, end, low, high, crowd)
                within = counts & 0xFFFF
                above, equal = above + (counts >> 32), equal + (counts >> 16 & 0xFFFF)
                inside, end = inside + within, end + move * within
            for e in range(whole, count):
                counts = one(data, at + e, found, end, low, high, crowd)
                within = counts & 0xFFFF
                above, equal = above + (counts >> 32), equal + (counts >> 16 & 0xFFFF)
                inside, end = inside + within, end + move * within
            i = after
        return above, inside, equal

    return look


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2 ** 64 over the golden ratio: high bits of its multiples are spread evenly."""


@kernel
def survey(
    look: int, read: int, source: Any, first: int, bounds: Any, p0: int, p1: int, step: int, run: int, low: Any,
    high: Any, crowd: Any, found: Any, end: int, counts: Any, scratch: Any,
) -> int:  # fmt: skip
    """Count the keys of pieces [p0, p1) above `high`, and count and collect those in [low, high].

    Pieces lie between two rows of `bounds`, counted from block `first` on; of every `step` blocks a run of `run` is
    taken, up to `STRIP_ELEMENTS`, somewhere among them: in rows of a regular array, places at regular distances
    would be a few lines. Rows of `counts` tell how many keys of a piece are above, inside, and stored from `end` on in
    `found`, which are fewer where they do not fit; and how many equal `crowd`, if that is not inside. Returns where the
    stored ones end.
    """
    for p in range(p0, p1):
        above, inside, equal, start, i1 = 0, 0, 0, end, first + bounds[1, p]
        for at in range(first + bounds[0, p], i1, step):
            i = at + np.int64((np.uint64(at) * _GOLDEN >> np.uint64(32)) % np.uint64(step - run + 1))
            stop = least(i1, i + run)
            if i >= stop:
                break
            stores = low != high and end + stop - i + SLACK <= found.size
            over, within, same = _call_surveyor(
                look, read, source, i, stop, low, high, crowd, found, end, stores, scratch
            )
            above, inside, equal = above + over, inside + within, equal + same
            if stores:
                end += within
        counts[0, p], counts[1, p], counts[2, p], counts[3, p] = above, inside, end - start, equal
    return end


@kernel
def read_blocks(read: int, source: Any, i0: int, i1: int, strip: int, out: Any, scratch: Any) -> None:
    """Read the keys of blocks [i0, i1) into a dense array."""
    keys, _mask, _keep, sums, norms, making = scratch
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        _call_reader(read, source, i, stop, keys, sums, norms, making)
        for j in range(stop - i):
            out[np.uintp(i - i0 + j)] = keys[np.uintp(j)]


@kernel
def keep_above(
    read: int, write: int, source: Any, start: int, target: Any, i0: int, i1: int, strip: int, limit: Any, ties: int,
    scratch: Any,
) -> Any:  # fmt: skip
    """Keep, of blocks [i0, i1), those above `limit` and the first `ties` equal to it; how many ties are left."""
    keys, mask, _keep, sums, norms, making = scratch
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        _call_reader(read, source, start + i - i0, start + stop - i0, keys, sums, norms, making)
        ties = mark(keys, 0, stop - i, limit, ties, mask, 0)
        _call_writer(write, target, i, stop, mask)
    return ties


@kernel
def cut_elements(cut: int, source: Any, target: Any, i0: int, border: int, i1: int, limit: Any) -> None:
    """Keep, of elements [i0, i1), those above `limit`, and those equal to it that stand before the `border`."""
    _call_cutter(cut, source, target, i0, border, limit, 1)
    _call_cutter(cut, source, target, border, i1, limit, 0)


@kernel
def count_ties(
    read: int, source: Any, first: int, i0: int, i1: int, limit: Any, inner: int, turns: int, counts: Any, scratch: Any
) -> None:  # fmt: skip
    """Add how many of blocks [i0, i1) equal `limit` to the counts of their turns: of `inner` blocks, from `first` on.

    After `turns` of them the first one comes again.
    """
    keys, _mask, _keep, sums, norms, making = scratch
    key = keys.dtype.type(limit)
    for i in range(i0, i1, STRIP_ELEMENTS):
        stop = least(i1, i + STRIP_ELEMENTS)
        _call_reader(read, source, i, stop, keys, sums, norms, making)
        e = 0
        while e < stop - i:
            turn, past = divmod((i + e - first) % (inner * turns), inner)
            if inner == 1:
                run = least(stop - i - e, turns - turn)
                for j in range(run):
                    counts[np.uintp(turn + j)] += keys[np.uintp(e + j)] == key
            else:
                run = least(stop - i - e, inner - past)
                for j in range(run):
                    counts[np.uintp(turn)] += keys[np.uintp(e + j)] == key
            e += run


@kernel
def find_ties(
    read: int, source: Any, first: int, count: int, limit: Any, inner: int, turns: int, turn: int, found: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """The blocks of a turn, of `count` from `first` on, that equal `limit`: as many numbers as there is room for."""
    keys, _mask, _keep, sums, norms, making = scratch
    key, n = keys.dtype.type(limit), 0
    for start in range(turn * inner, count, inner * turns):
        for i in range(start, start + inner, STRIP_ELEMENTS):
            stop = least(start + inner, i + STRIP_ELEMENTS)
            _call_reader(read, source, first + i, first + stop, keys, sums, norms, making)
            for j in range(stop - i):
                if keys[np.uintp(j)] == key and n < found.size:
                    found[n] = i + j
                    n += 1


@kernel
def cut_by_turns(
    cut: int, source: Any, target: Any, first: int, i0: int, i1: int, limit: Any, inner: int, turns: int, last: int
) -> None:  # fmt: skip
    """Keep, of elements [i0, i1), those above `limit`, and those equal to it in turns (`count_ties`) up to the last."""
    i = i0
    while i < i1:
        past = (i - first) % (inner * turns)
        border = (last + 1) * inner
        stays = past < border
        stop = least(i1, i + (border if stays else inner * turns) - past)
        _call_cutter(cut, source, target, i, stop, limit, int(stays))
        i = stop


@kernel
def tie_border_in(read: int, source: Any, i0: int, i1: int, limit: Any, ties: int, scratch: Any) -> Any:
    """The block of [i0, i1) that equals `limit` after the first `ties` do; i1 if there is none."""
    keys, _mask, _keep, sums, norms, making = scratch
    for i in range(i0, i1, STRIP_ELEMENTS):
        stop = least(i1, i + STRIP_ELEMENTS)
        _call_reader(read, source, i, stop, keys, sums, norms, making)
        border, ties = tie_border(keys, 0, stop - i, limit, ties)
        if border < stop - i:
            return i + border
    return i1


# --- thresholds ------------------------------------------------------------------------------------


@merged
def _key_not_below(limit: float) -> Any:
    """The key of the least float32 that is not below a limit > 0: a float64, where another part of a scope is one."""
    near = np.float32(limit)
    return np.uint32(key_of_float32(near) + np.uint32(np.float64(near) < np.float64(limit)))


@cache
def threshold_kernel(wide: bool) -> Any:
    """The kernel that keeps the blocks [i0, i1) whose norm is not below their threshold.

    Nothing is below a threshold of 0 or less.
    """
    key: Any = key_of_float64 if wide else _key_not_below

    @kernel
    def keep_not_below(
        read: int, write: int, source: Any, target: Any, thresholds: Numbers, i0: int, i1: int, strip: int,
        limits: Any, scratch: Any,
    ) -> None:  # fmt: skip
        keys, mask, _keep, sums, norms, making = scratch
        for i in range(i0, i1, strip):
            stop = least(i1, i + strip)
            load_numbers(*thresholds, i, stop, limits)
            _call_reader(read, source, i, stop, keys, sums, norms, making)
            for j in range(stop - i):
                limit = limits[np.uintp(j)]
                mask[np.uintp(j)] = not ((limit > 0) & (keys[np.uintp(j)] < key(limit)))
            _call_writer(write, target, i, stop, mask)

    return keep_not_below
