"""How elements of scopes that lie side by side are read and written: whole lines of them at a time.

In the place of the grid and the elements of an operand stand the loops over scopes and those over the blocks of a
scope (`Operand.raw_across`). Functions that kernels of `scope_strips` call at their addresses, as readers, writers, and

turn(source, i, stop, keys, pitch)
    blocks [i, stop) of whole scopes as ordered integers, in rows of scopes so far apart;
cut(source, target, s0, s1, n, limits, borders)
    elements of scopes [s0, s1), those that are not kept as +0.0, or which are kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from npscope.backends.numba_cpu import lines, vector_selection, vectors
from npscope.backends.numba_cpu.codecs import Codec, Function
from npscope.backends.numba_cpu.jit import address_of, array_of, inner, make_small, standalone
from npscope.backends.numba_cpu.nests import length_of, place
from npscope.backends.numba_cpu.scalars import least

_RANGE = (types.int64, types.int64)

AHEAD_ROWS = 16
"""Rows between what is read of scopes side by side and what is asked for. Further is no better, and where rows are a
power of two apart few of them fit a cache."""


@cache
def across_reader(key: Function) -> Function:
    """Read 1-element blocks of scopes that lie side by side in memory, block by block of all of them."""
    walk = _across(_key_to(key))

    @standalone
    def read(source: Any, i: int, stop: int, keys: Any, sums: Any, norms: Any, making: Any) -> None:
        walk(source, i, stop, keys, length_of(source[3]))

    return read


@cache
def across_dropper(codec: Codec) -> Function:
    """Write what `across_reader` reads: +0.0 where the mask is False."""
    walk = _across(_kept_by(codec))

    @standalone
    def drop(target: Any, i: int, stop: int, mask: Any) -> None:
        walk(target, i, stop, mask, length_of(target[3]))

    return drop


@cache
def across_marker() -> Function:
    """Write the mask itself to bools that lie as what `across_reader` reads."""
    walk = _across(_mark)

    @standalone
    def mark(target: Any, i: int, stop: int, mask: Any) -> None:
        walk(target, i, stop, mask, length_of(target[3]))

    return mark


@cache
def tiles_reader(form: vectors.Format, signed: bool, key: Function) -> Function:
    """An `across_reader` of scopes whose first blocks are adjacent, by tiles that are turned inside vectors."""
    walk = columns_turner(form, signed, key)

    @standalone
    def read(source: Any, i: int, stop: int, keys: Any, sums: Any, norms: Any, making: Any) -> None:
        walk(source, i, stop, keys, length_of(source[3]))

    return read


@cache
def columns_turner(form: vectors.Format, signed: bool, key: Function) -> Function:
    """``turn(source, i, stop, keys, pitch)``: what a `tiles_reader` reads, the keys of scopes so far apart."""
    return _across(_key_to(key), vector_selection.turn_keys(form, signed))


@cache
def turner_address(turn: Function, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a `columns_turner` is, for buffers and keys of these dtypes."""
    return address_of(turn, lines.where_type(unit), *_RANGE, array_of(key), types.int64)


@cache
def _key_to(key: Function) -> Function:
    @inner
    def key_to(buffer: Any, i: int, keys: Any, j: int) -> None:
        keys[np.uintp(j)] = key(buffer, i)

    return key_to


@cache
def _kept_by(codec: Codec) -> Function:
    keep = codec.keep

    @inner
    def kept_by(buffer: Any, i: int, mask: Any, j: int) -> None:
        keep(buffer, i, mask[np.uintp(j)])

    return kept_by


@inner
def _mark(buffer: Any, i: int, mask: Any, j: int) -> None:
    buffer[np.uintp(i)] = mask[np.uintp(j)]


@cache
def _across(step: Function, turn: Any = None) -> Function:
    """``walk(array, i, stop, dense, pitch)``: a step for every element and its place in rows, `pitch` apart, of scopes.

    Or if there is a `turn` for tiles of as many adjacent scopes as elements, which are evenly apart, one for each tile.
    """
    tile = vector_selection.TILE

    @standalone
    def walk(array: Any, i: int, stop: int, dense: Any, pitch: int) -> None:
        buffer, origin, scopes, blocks = array
        n = length_of(blocks)
        width, stride, apart = scopes[0, -1], scopes[1, -1], blocks[1, -1]
        first, last = i // n, stop // n
        s = first
        while s < last:
            after = least(last, s + width - s % width)
            at, own = origin + place(s, scopes), (s - first) * pitch
            tiled = 0
            if turn is not None:
                whole, tiled = (after - s) - (after - s) % tile, n - n % tile
                for j in range(0, tiled, tile):
                    here = at + j * apart
                    ahead = AHEAD_ROWS * apart + (0 if j + AHEAD_ROWS < n else after - s - n * apart)
                    for r in range(0, whole, tile):
                        turn(buffer, here + r, apart, dense, own + r * pitch + j, pitch, ahead)
                    for q in range(tile if whole < after - s else 0):
                        for r in range(whole, after - s):
                            step(buffer, here + q * apart + r, dense, own + r * pitch + j + q)
            for j in range(tiled, n):
                here = at + place(j, blocks)
                for r in range(after - s):
                    step(buffer, here + r * stride, dense, own + r * pitch + j)
            s = after

    return walk


@cache
def columns_cutter(form: vectors.Format, signed: bool, marks: bool) -> Function:
    """Write elements of adjacent scopes by their own keys, and by a limit and a border for each scope.

    Kept are those above the limit, and those equal to it that stand before the border in their scope. If it `marks`,
    which are kept is written to bools.
    """
    line, rest = (vector_selection.cut_columns(form, signed, marks, partial) for partial in (False, True))
    lanes = form.lanes

    @standalone
    def cut(source: Any, target: Any, s0: int, s1: int, n: int, limits: Any, borders: Any) -> None:
        make_small()
        data, origin, scopes, blocks = source
        out, origin_out, scopes_out, blocks_out = target
        width, width_out = scopes[0, -1], scopes_out[0, -1]
        s = s0
        while s < s1:
            after = least(s1, least(s + width - s % width, s + width_out - s % width_out))
            at, at_out, count, first = origin + place(s, scopes), origin_out + place(s, scopes_out), after - s, s - s0
            whole, ahead = count - count % lanes, AHEAD_ROWS * blocks_out[1, -1]
            for j in range(n):
                here, there = at + place(j, blocks), at_out + place(j, blocks_out)
                for e in range(0, whole, lanes):
                    line(data, here + e, out, there + e, limits, first + e, borders, first + e, j, ahead)
                if whole < count:
                    e = whole
                    rest(data, here + e, out, there + e, limits, first + e, borders, first + e, j, count - whole)
            s = after

    return cut


@cache
def columns_cutter_address(cut: Function, unit: np.dtype, written: np.dtype, key: np.dtype) -> int:
    """Where the code of a `columns_cutter` is, for what is read and `written`, and keys, of these dtypes."""
    limits, borders = array_of(key), array_of(np.int32)
    where = lines.where_type(unit), lines.where_type(written)
    return address_of(cut, *where, *_RANGE, types.int64, limits, borders)
