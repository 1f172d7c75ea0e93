"""Scopes of a few single elements, such as 2:4: ranked in vectors, and read and written in one pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npscope.backends.numba_cpu import lines, vector_selection
from npscope.backends.numba_cpu.operands import STRIPS_ELEMENTS, Operand, in_memory_order, ranges
from npscope.backends.numba_cpu.vector_selection import MAX_GROUP
from npscope.backends.numba_cpu.vectors import Format, format_of
from npscope.tiling import Leaf, Parts


def groups_job(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Callable[[], None] | None:
    """The job that prunes `target` by its own elements, if scopes are few adjacent ones or side by side; else None."""
    if len(target) > 1 or len(target[0]) > 1 or ord is None:
        return None
    leaf = target[0][0]
    n = leaf.cut.blocks
    read = leaf.array if leaf.origin is None else leaf.origin
    if leaf.cut.elements > 1 or not 1 < n <= MAX_GROUP or source[0][0].array is not read:
        return None
    counts, written = keep.array, Operand(leaf)
    form = None if written.kind is None else format_of(written.kind)
    if form is None or written.few or (any(counts.strides) and counts.size > 1):
        return None
    k = counts.item(0) if counts.size else 0
    origin = written if leaf.origin is None else Operand(Leaf(read, leaf.cut))
    if written.lines_hold(n) and origin.lines_hold(n):
        return _adjacent_job(origin, written, form, n, k)
    leaf = in_memory_order(target, source, keep)[0][0][0]
    written = Operand(leaf)
    origin = written if leaf.origin is None else Operand(Leaf(read, leaf.cut))
    return _columns_job(origin, written, form, n, k)


def _adjacent_job(origin: Operand, written: Operand, form: Format, n: int, k: int) -> Callable[[], None]:
    """The job for groups of adjacent elements."""
    kernel = lines.prune_groups_kernel(form, n)

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        spare = [np.empty(vector_selection.group_lanes(form, n), written.buffer.dtype) for _ in range(slots)]

        def work(slot: int, s0: int, s1: int) -> None:
            kernel(
                origin.buffer, origin.origin, origin.grid, written.buffer, written.origin, written.grid,
                s0 * n, s1 * n, k, spare[slot],
            )  # fmt: skip

        return work

    return ranges(written.cut.scopes, n, make_work, piece=STRIPS_ELEMENTS)


def _columns_job(origin: Operand, written: Operand, form: Format, n: int, k: int) -> Callable[[], None] | None:
    """The job for groups that lie side by side, their elements apart; None if they do not."""
    operands = []
    for x in (origin, written):
        scopes, blocks = x.place.nests
        if x.bytewise or not x.across or scopes[1, -1] != 1:
            return None
        apart = np.indices(blocks[0]).reshape(len(blocks[0]), n).T @ blocks[1]
        operands += [x.buffer, x.origin, scopes, apart]
    kernel, past = lines.prune_columns_kernel(form, n), written.past_line

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        return lambda slot, s0, s1: kernel(*operands, past, s0, s1, k)

    return ranges(written.cut.scopes, n, make_work, piece=STRIPS_ELEMENTS)
