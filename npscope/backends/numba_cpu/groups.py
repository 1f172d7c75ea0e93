"""Scopes of a few single elements, such as 2:4: ranked in vectors, and read and written in one pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npscope.backends.numba_cpu import lines, vector_selection
from npscope.backends.numba_cpu.operands import Operand
from npscope.backends.numba_cpu.orders import in_memory_order
from npscope.backends.numba_cpu.pieces import STRIPS_ELEMENTS, ranges
from npscope.backends.numba_cpu.vector_selection import MAX_GROUP
from npscope.backends.numba_cpu.vectors import Format, format_of
from npscope.tiling import Leaf, Parts


def groups_job(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Callable[[], None] | None:
    """The job that prunes or marks elements by their own norms, if scopes are small and adjacent or side by side.

    It writes all elements, also those that stay. None if there is no such kernel.
    """
    if len(target) > 1 or len(target[0]) > 1 or ord is None:
        return None
    leaf, origin = target[0][0], source[0][0]
    n = origin.cut.blocks
    if origin.cut.elements > 1 or leaf.cut.elements > 1 or not 1 < n <= MAX_GROUP:
        return None
    counts, written = keep.array, Operand.of(leaf)
    read = written if origin.array is leaf.array else Operand.of(origin)
    form = None if read.kind is None else format_of(read.kind)
    if form is None or read.place.few or (any(counts.strides) and counts.size > 1):
        return None
    if written.codec is not None and origin.array is not (leaf.array if leaf.origin is None else leaf.origin):
        return None
    k = counts.item(0) if counts.size else 0
    if read.lines_hold(n) and written.lines_hold(n):
        return _adjacent_job(read, written, form, n, k)
    target, source, _ = in_memory_order(target, source, keep)
    return _columns_job(Operand.of(source[0][0]), Operand.of(target[0][0]), form, n, k)


def _adjacent_job(read: Operand, written: Operand, form: Format, n: int, k: int) -> Callable[[], None]:
    """The job for groups of adjacent elements."""
    kernel = lines.groups_kernel(form, n, written.codec is None)
    size = vector_selection.group_lanes(form, n)

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [(np.empty(size, read.place.unit), np.empty(size, written.place.unit)) for _ in range(slots)]

        def work(slot: int, s0: int, s1: int) -> None:
            kernel(
                read.buffer, read.origin, read.grid, written.buffer, written.origin, written.grid, s0 * n, s1 * n, k,
                *works[slot],
            )  # fmt: skip

        return work

    return ranges(written.cut.scopes, n, make_work, piece=STRIPS_ELEMENTS)


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
