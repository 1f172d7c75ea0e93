"""Scopes of a few single elements, such as 2:4: ranked in vectors, and read and written in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from npscope.backends.numba_cpu import lines
from npscope.backends.numba_cpu.operands import Operand, Placement
from npscope.backends.numba_cpu.orders import in_memory_order
from npscope.backends.numba_cpu.pieces import STRIPS_ELEMENTS, is_one_piece, ranges
from npscope.backends.numba_cpu.vector_selection import MAX_GROUP
from npscope.backends.numba_cpu.vectors import Format, format_of
from npscope.tiling import Leaf, Parts


class _Groups(NamedTuple):
    """How groups are ranked and written, whatever their memory."""

    form: Format
    kernel: Any
    """That of adjacent elements, or None."""


@lru_cache(maxsize=2048)
def _groups_of(read: Placement, written: Placement) -> _Groups | None:
    """How groups placed so are ranked and written; None if they are no small groups of single elements."""
    n, form = read.cut.blocks, None if read.kind is None else format_of(read.kind)
    if form is None or read.few or read.cut.elements > 1 or written.cut.elements > 1 or not 1 < n <= MAX_GROUP:
        return None
    adjacent = read.lines_hold(n) and written.lines_hold(n)
    kernel = lines.groups_kernel(form, n, written.codec is None) if adjacent else None
    return _Groups(form, kernel)


def groups_job(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Callable[[], None] | None:
    """The job that prunes or marks elements by their own norms, if scopes are small and adjacent or side by side.

    It writes all elements, also those that stay. None if there is no such kernel.
    """
    if len(target) > 1 or len(target[0]) > 1 or ord is None:
        return None
    leaf, origin, counts = target[0][0], source[0][0], keep.array
    written = Operand.of(leaf)
    read = written if origin.array is leaf.array else Operand.of(origin)
    groups = _groups_of(read.place, written.place)
    if groups is None or (any(counts.strides) and counts.size > 1):
        return None
    if written.codec is not None and origin.array is not (leaf.array if leaf.origin is None else leaf.origin):
        return None
    k = counts.item(0) if counts.size else 0
    if groups.kernel is not None:
        return _adjacent_job(read, written, groups.kernel, k)
    target, source, _ = in_memory_order(target, source, keep)
    return _columns_job(Operand.of(source[0][0]), Operand.of(target[0][0]), groups.form, origin.cut.blocks, k)


def _adjacent_job(read: Operand, written: Operand, kernel: Any, k: int) -> Callable[[], None]:
    """The job for groups of adjacent elements."""
    here, there = read.place, written.place
    n, where = here.cut.blocks, (read.buffer, here.origin, here.grid, written.buffer, there.origin, there.grid)
    if is_one_piece(there.cut.scopes, n, STRIPS_ELEMENTS):  # as `ranges` would, which takes a twentieth of a small call
        return lambda: kernel(*where, 0, there.cut.scopes * n, k)

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        return lambda slot, s0, s1: kernel(*where, s0 * n, s1 * n, k)

    return ranges(there.cut.scopes, n, make_work, piece=STRIPS_ELEMENTS)


def _columns_job(read: Operand, written: Operand, form: Format, n: int, k: int) -> Callable[[], None] | None:
    """The job for groups that lie side by side, their elements apart; None if they do not."""
    operands = []
    for x in (read, written):
        scopes, blocks = x.place.nests
        if x.bytewise or not x.place.across or scopes[1, -1] != 1:
            return None
        apart = np.indices(blocks[0]).reshape(len(blocks[0]), n).T @ blocks[1]
        operands += [x.buffer, x.origin, scopes, apart]
    marks = written.codec is None
    kernel, past = lines.columns_kernel(form, n, marks), (read if marks else written).line[0]

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        return lambda slot, s0, s1: kernel(*operands, past, s0, s1, k)

    return ranges(written.cut.scopes, n, make_work, piece=STRIPS_ELEMENTS)
