"""Scopes of a few single elements, such as 2:4: ranked inside a vector, and read and written in one pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npscope.backends.numba_cpu import lines, vector_selection
from npscope.backends.numba_cpu.operands import STRIPS_ELEMENTS, Operand, ranges
from npscope.backends.numba_cpu.vector_selection import (
    MAX_GROUP,
)
from npscope.backends.numba_cpu.vectors import (
    format_of,
)
from npscope.tiling import Leaf, Parts


def groups_job(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Callable[[], None] | None:
    """The job that prunes `target` by its own elements, if its scopes are few adjacent ones; else None."""
    if len(target) > 1 or len(target[0]) > 1 or ord is None:
        return None
    leaf = target[0][0]
    n = leaf.cut.blocks
    read = leaf.array if leaf.origin is None else leaf.origin
    if leaf.cut.elements > 1 or not 1 < n <= MAX_GROUP or source[0][0].array is not read:
        return None
    counts, written = keep.array, Operand(leaf)
    origin = written if leaf.origin is None else Operand(Leaf(read, leaf.cut))
    form = None if written.kind is None else format_of(written.kind)
    if form is None or written.few or not (written.lines_hold(n) and origin.lines_hold(n)):
        return None
    if any(counts.strides) and counts.size > 1:
        return None
    kernel = lines.prune_groups_kernel(form, n)
    k = counts.item(0) if counts.size else 0

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        spare = [np.empty(vector_selection.group_lanes(form, n), written.buffer.dtype) for _ in range(slots)]

        def work(slot: int, s0: int, s1: int) -> None:
            kernel(
                origin.buffer, origin.origin, origin.grid, written.buffer, written.origin, written.grid,
                s0 * n, s1 * n, k, spare[slot],
            )  # fmt: skip

        return work

    return ranges(leaf.cut.scopes, n, make_work, piece=STRIPS_ELEMENTS)
