"""Writing ranges of blocks, and numbers over blocks or scopes that say what to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu import lines, side_by_side, strips
from npscope.backends.numba_cpu.operands import Competitors, Operand, in_reals
from npscope.backends.numba_cpu.orders import blocks_in_memory_order, outermost_axis
from npscope.backends.numba_cpu.pieces import STRIPS_ELEMENTS, ranges
from npscope.tiling import Leaf, Part, Parts


def fill(target: Parts) -> None:
    """Copy the elements of `target` from their origins: the first write of a call."""
    for part in target:
        for leaf in part:
            if leaf.origin is not None:
                _copy(leaf.array, leaf.origin)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy by ranges of the axis that is outermost in memory: the first touch of new memory takes most of the time."""
    if target.size <= STRIPS_ELEMENTS:
        np.copyto(target, source)
        return
    axis = outermost_axis(target)
    to, from_ = np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0)

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        return lambda slot, i0, i1: np.copyto(to[i0:i1], from_[i0:i1])

    ranges(len(to), to[0].size, make_work, workspace=0, piece=STRIPS_ELEMENTS)()


def arrays(target: Parts) -> list[np.ndarray]:
    """The arrays of all leaves, in order."""
    return [leaf.array for part in target for leaf in part]


def writer_of(written: Operand, *, across: bool = False) -> int:
    """What writes to blocks by a mask: +0.0 where it is False, or to bools the mask itself.

    `across`: to elements of whole scopes that lie side by side.
    """
    codec = written.codec
    if across:
        write = side_by_side.across_marker() if codec is None else side_by_side.across_dropper(codec)
        return strips.writer_address(write, written.place.unit)
    return strips.marker() if codec is None else strips.dropper(written)


_NOT_KEPT = np.zeros(1, dtype=np.bool_)


class Written:
    """The blocks of a part that is written, in one leaf or several: elements to zero, or bools."""

    def __init__(self, leaves: Sequence[Operand]) -> None:
        self.leaves = leaves
        self.only = leaves[0] if len(leaves) == 1 else None
        """The leaf, if a kernel can write all of a block at once; None if there are several."""

    def put(self, i0: int, i1: int, mask: np.ndarray) -> None:
        """Write what the mask of blocks [i0, i1) says."""
        for leaf in self.leaves:
            strips.write_blocks(writer_of(leaf), leaf.raw, i0, i1, mask)

    def drop_each(self, blocks: np.ndarray) -> None:
        """Write that these blocks are not kept."""
        for leaf in self.leaves:
            strips.write_each(writer_of(leaf), leaf.raw, blocks, _NOT_KEPT)


def drop(part: Competitors, i0: int, i1: int, mask: np.ndarray) -> None:
    """Zero the blocks [i0, i1) of a part whose mask is False, in all its leaves."""
    Written(part.leaves).put(i0, i1, mask)


def rescale(part: Competitors, i0: int, i1: int, factors: np.ndarray, *, shrinks: bool = False) -> None:
    """Multiply the blocks [i0, i1) of a part by their factors, in all its leaves; `shrinks` as in `scale_strip`."""
    for leaf in part.leaves:
        lines.scale_blocks(strips.scaler(leaf, shrinks=shrinks), *leaf.raw, i0, i1, factors)


class Numbers:
    """Numbers over the blocks or the scopes of a part, read into a dense array block by block."""

    def __init__(self, leaf: Leaf, part: Competitors, dtype: Any, length: int) -> None:
        self.operand = Operand.of(leaf)
        self.repeat = part.blocks if leaf.cut.blocks == 1 else 1
        self.dense = np.empty(length, dtype=dtype)

    def fill(self, i0: int, i1: int) -> np.ndarray:
        """The numbers of blocks [i0, i1); a view that the next call overwrites."""
        read, dense = self.operand, self.dense[: i1 - i0]
        nk.gather(read.buffer, read.origin, read.grid, self.repeat, i0, i1, dense)
        return dense


def with_numbers(
    target: Parts, numbers: Leaf, dtype: Any, write: Callable[[Competitors, int, int, np.ndarray], None]
) -> Sequence[np.ndarray]:
    """``write(part, i0, i1, the numbers of these blocks)`` for all blocks of `target`."""

    def job(leaves: Part) -> Callable[[], None]:
        in_order = blocks_in_memory_order(leaves[0])
        ((ordered,), _), over = in_reals((tuple(map(in_order, leaves)),), 2), in_order(numbers)
        part = Competitors.of(ordered)

        def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
            values = [Numbers(over, part, dtype, length) for _ in range(slots)]
            return lambda slot, i0, i1: write(part, i0, i1, values[slot].fill(i0, i1))

        return ranges(part.total, part.elements, make_work, shielded=part.spans_leaves)

    jobs = [job(part) for part in target]
    fill(target)
    for run in jobs:
        run()
    return arrays(target)
