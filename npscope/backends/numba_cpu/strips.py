"""The steps of kernels that decide strip by strip: they read keys, look at them, and write what is kept.

A strip is a few thousand elements, which stay in the nearest cache from step to step. The steps
are functions of their own, compiled once each, and a kernel is told at which addresses they are:

read(source, i, stop, keys, sums, norms, making)
    blocks [i, stop) of an array as ordered integers;
write(target, i, stop, mask)
    what the mask says of these blocks;
cut(source, target, i, stop, limit, equal)
    adjacent elements, those neither above a limit nor equal to it, if `equal` is 1, as +0.0; or which are;
look(read, source, i, stop, low, high, crowd, found, end, stores, scratch)
    how many keys of blocks [i, stop) are above `high`, in [low, high], and equal to `crowd`; those inside are
    appended to `found` from `end` on if `stores`; up to `SLACK` entries behind them are overwritten, also if not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from npscope.backends.numba_cpu import lines, vector_norms, vector_selection, vectors
from npscope.backends.numba_cpu.codecs import Function
from npscope.backends.numba_cpu.jit import address_of, array_of, caller, kernel, make_small, standalone
from npscope.backends.numba_cpu.kernels import Numbers, load_numbers
from npscope.backends.numba_cpu.nests import length_of, place
from npscope.backends.numba_cpu.operands import Operand
from npscope.backends.numba_cpu.scalars import least
from npscope.backends.numba_cpu.vector_search import SLACK, mark_not_below

STRIP_ELEMENTS = 4096
"""Elements of a strip, where a scope is no larger: 16 KiB of float32."""

Where = tuple[np.ndarray, int, np.ndarray, np.ndarray]
"""Buffer, origin, grid and elements of an operand, the buffer in bytes where a kernel only hands it on."""

LINE = np.asarray([[1 << 62], [1]], dtype=np.int64)
"""The grid of blocks that are single numbers, one after another, however many."""


class Scratch:
    """Work arrays of one thread for strips of up to `blocks` blocks and `scopes` scopes."""

    def __init__(self, blocks: int, scopes: int, key: np.dtype, measured: int) -> None:
        """`measured`: so many of the blocks are measured at a time, 0 if they are single elements."""
        self.keys = np.zeros(blocks + SLACK, dtype=key)
        self.mask = np.zeros(blocks + SLACK, dtype=np.bool_)
        self.keep = np.zeros(scopes + SLACK, dtype=np.int64)
        self.norms = lines.NormBuffers(measured, 4)
        self.ends = (np.zeros(scopes + SLACK, dtype=key), np.zeros(scopes + SLACK, dtype=np.int32))

    @property
    def nbytes(self) -> int:
        """Their memory."""
        ends = sum(numbers.nbytes for numbers in self.ends)
        return self.keys.nbytes + self.mask.nbytes + self.keep.nbytes + ends + self.norms.nbytes

    @property
    def all(self) -> tuple[np.ndarray, ...]:
        """The last argument of a kernel."""
        return self.keys, self.mask, self.keep, *self.norms.all


# --- addresses -----------------------------------------------------------------------------------

RANGE = (types.int64, types.int64)
MASK, _WIDE, KEEP = array_of(np.bool_), array_of(np.float64), array_of(np.int64)
_COUNTS = types.UniTuple(types.int64, 3)
call_reader, call_writer, call_cutter, call_surveyor = caller(7), caller(4), caller(6), caller(11, _COUNTS)


def scratch_type(key: np.dtype) -> Any:
    """The type of `Scratch.all`."""
    return types.Tuple((array_of(key), MASK, KEEP, _WIDE, array_of(np.float32), array_of(np.int64)))


def ends_type(key: np.dtype) -> Any:
    """The type of `Scratch.ends`: limits and borders of scopes."""
    return types.Tuple((array_of(key), array_of(np.int32)))


@cache
def reader_address(read: Function, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a reader is, for buffers and keys of these dtypes."""
    norms, making = array_of(np.float32), array_of(np.int64)
    return address_of(read, lines.where_type(unit), *RANGE, array_of(key), _WIDE, norms, making)


@cache
def writer_address(write: Function, unit: np.dtype) -> int:
    """Where the code of a writer is, for buffers of this dtype."""
    return address_of(write, lines.where_type(unit), *RANGE, MASK)


@cache
def cutter_address(cut: Function, unit: np.dtype, written: np.dtype) -> int:
    """Where the code of a `cutter` is, for buffers of these dtypes that are read and `written`."""
    return address_of(cut, lines.where_type(unit), lines.where_type(written), *RANGE, types.uint64, types.int64)


@cache
def surveyor_address(look: Function, unit: np.dtype, key: np.dtype) -> int:
    """Where the code of a surveyor is, for buffers and keys of these dtypes."""
    limits, places = (types.uint64, types.uint64, types.uint64), (array_of(key), types.int64, types.boolean)
    return address_of(
        look, types.int64, lines.where_type(unit), *RANGE, *limits, *places, scratch_type(key), result=_COUNTS
    )


# --- reading -------------------------------------------------------------------------------------


@cache
def line_reader(form: vectors.Format, signed: bool) -> Function:
    """Read adjacent elements, of as many bits as their keys have; by their numbers if `signed`, or by magnitude."""
    read_strip = vector_selection.read_strip(form, signed)

    @standalone
    def read(source: Any, i: int, stop: int, keys: Any, sums: Any, norms: Any, making: Any) -> None:
        make_small()
        buffer, origin, grid, _ = source
        read_strip(buffer, origin, grid, 0, grid.shape[1], i, stop, keys, 0)

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
def norm_reader(measure: Function) -> Function:
    """Read blocks by their norms, as a `lines.measurer` finds them."""

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
    codec: Any = operand.codec
    write = (
        lines.element_writer(codec.keep, codec.drop, True) if operand.layout is None else lines.dropper(operand.layout)
    )
    return writer_address(write, operand.place.unit)


def scaler(operand: Operand, *, shrinks: bool) -> int:
    """Multiply blocks by factors; `shrinks` as for `scale_strip`."""
    codec: Any = operand.codec
    layout = operand.layout
    scale = lines.element_writer(codec.scale, codec.scale, 1.0) if layout is None else lines.scaler(layout, shrinks)
    return lines.scaler_address(scale, operand.place.unit)


@cache
def cutter(form: vectors.Format, signed: bool, marks: bool) -> Function:
    """Write adjacent elements by their own keys: +0.0 where these are too small, or if it `marks`, which are kept."""
    cut_strip = vector_selection.cut_strip(form, signed, marks)

    @standalone
    def cut(source: Any, target: Any, i: int, stop: int, limit: Any, equal: int) -> None:
        make_small()
        data, origin, grid, _ = source
        out, origin_out, grid_out, _ = target
        cut_strip(
            data, origin, grid, 0, grid.shape[1], out, origin_out, grid_out, 0, grid_out.shape[1], i, stop, limit, equal
        )

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


# --- looking --------------------------------------------------------------------------------------


@cache
def line_surveyor(form: vectors.Format, signed: bool, crowded: bool) -> Function:
    """Look at adjacent elements, each once, as a `line_reader` reads them; `read` is not called.

    Those equal to `crowd` are counted only if this is `crowded`: that takes a tenth of the time.
    """
    survey_strip = vector_selection.survey_strip(form, signed, crowded)

    @standalone
    def look(
        read: int, source: Any, i: int, stop: int, low: Any, high: Any, crowd: Any, found: Any, end: int, stores: bool,
        scratch: Any,
    ) -> tuple[int, int, int]:  # fmt: skip
        make_small()
        data, origin, grid, _ = source
        counts: tuple[int, int, int] = survey_strip(
            data, origin, grid, 0, grid.shape[1], i, stop, low, high, crowd, found, end, stores
        )
        return counts

    return look


@cache
def surveyor(width: int, crowded: bool) -> Function:
    """Look at keys that `read` reads, once they are there as a `line_surveyor` does."""
    survey_strip = vector_selection.survey_strip(vectors.KEYS[width], False, crowded)

    @standalone
    def look(
        read: int, source: Any, i: int, stop: int, low: Any, high: Any, crowd: Any, found: Any, end: int, stores: bool,
        scratch: Any,
    ) -> tuple[int, int, int]:  # fmt: skip
        make_small()
        keys, _mask, _keep, sums, norms, making = scratch
        call_reader(read, source, i, stop, keys, sums, norms, making)
        counts: tuple[int, int, int] = survey_strip(
            keys, 0, LINE, 0, 1, 0, stop - i, low, high, crowd, found, end, stores
        )
        return counts

    return look


# --- kernels that only read, write or compare ----------------------------------------------------


@kernel
def read_blocks(read: int, source: Any, i0: int, i1: int, strip: int, out: Any, scratch: Any) -> None:
    """Read the keys of blocks [i0, i1) into a dense array."""
    keys, _mask, _keep, sums, norms, making = scratch
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        if stop + SLACK <= i1:  # what a reader writes behind its blocks, the next strip overwrites
            call_reader(read, source, i, stop, out[i - i0 :], sums, norms, making)
        else:
            call_reader(read, source, i, stop, keys, sums, norms, making)
            vectors.copy_numbers(keys, 0, stop - i, out, i - i0)


@kernel
def write_blocks(write: int, target: Any, i0: int, i1: int, mask: Any) -> None:
    """Write blocks [i0, i1) by a mask that is already there."""
    call_writer(write, target, i0, i1, mask)


@kernel
def write_each(write: int, target: Any, blocks: Any, mask: Any) -> None:
    """Write to each of these blocks the one entry of a mask."""
    for block in blocks:
        call_writer(write, target, block, block + 1, mask)


@kernel
def keep_not_below(
    read: int, write: int, source: Any, target: Any, thresholds: Numbers, i0: int, i1: int, strip: int, limits: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Keep the blocks [i0, i1) whose norm is not below their threshold. `limits` have `SLACK` entries more."""
    keys, mask, _keep, sums, norms, making = scratch
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        load_numbers(*thresholds, i, stop, limits)
        call_reader(read, source, i, stop, keys, sums, norms, making)
        mark_not_below(keys, 0, stop - i, limits, 0, mask, 0)
        call_writer(write, target, i, stop, mask)
