"""Couplings of tensors in files: joint norms strip by strip, one decision, and masks for the pass that writes.

A strip is a run of blocks; each member's elements for these blocks are read, wherever they lie in
their tensor, into an array, and `BlockCoupling` gives their joint norms. What is held at a time is
a strip and a number for each block, whatever the size of the tensors.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from npscope.block import BlockCoupling, BlockSpec
from npscope.recipes.plans import Coupling, Group, Member, Scores, Window
from npscope.recipes.scores import Array, input_vector, require_usable, scaled
from npscope.scope import ScopeCoupling, ScopeSpec
from npscope.weights import Tensor, WeightFile, numpy_dtype
from npscope.weights.strided import StridedReader, span

Box = tuple[slice, ...]
"""A range on every axis, the ends given."""

STRIP_BYTES = 16 << 20
"""About the bytes of all members that are held for one strip, norms included; a single block may have more."""


class Kept(NamedTuple):
    """Which blocks of a window survive: `mask` is True where they do, over the grid of blocks of size `block`."""

    window: Window
    block: tuple[int, ...]
    mask: Array


def masks_of(
    coupling: Coupling, weights: WeightFile, advance: Callable[[int], None] | None = None
) -> dict[str, list[Kept]]:
    """What survives of every tensor of `coupling`, window by window; `advance` is told the bytes read.

    Ranking and ties are those of `npscope.ScopeCoupling` over a `npscope.BlockCoupling` for each
    group. FileError when `weights` ends early, FormatError when scores are NaN or negative.
    """
    tables = [_table(group, coupling.ord, weights, advance) for group in coupling.groups]
    common = np.result_type(*tables)
    parts = [
        ScopeSpec(BlockSpec(table.astype(common, copy=False), ()), group.scope)
        for table, group in zip(tables, coupling.groups, strict=True)
    ]
    decision = parts[0] if len(parts) == 1 else ScopeCoupling(parts)
    masks = decision.get_masks(coupling.keep)
    kept: dict[str, list[Kept]] = defaultdict(list)
    for part, group in zip(parts, coupling.groups, strict=True):
        (leaf,) = part.specs()
        for member in group.members:
            mask = masks[leaf].transpose(np.argsort(member.order))
            kept[member.window.tensor.name].append(Kept(member.window, member.block, mask))
    return dict(kept)


def blocks_in_use(coupling: Coupling, weights: WeightFile, advance: Callable[[int], None] | None = None) -> Array:
    """How many blocks of every scope hold an element that is not zero in some member; NaN is not zero.

    An array over the grid of scopes: a file satisfies a coupling where it is at most ``coupling.keep``.
    `advance` is told the bytes read. FileError when `weights` ends early.
    """
    used: list[Array] = []
    for group in coupling.groups:
        stored = group._replace(members=tuple(member._replace(scores=None) for member in group.members))
        largest = _table(stored, math.inf, weights, advance)
        scopes = ScopeSpec(BlockSpec(largest, ()), group.scope)
        used.append(scopes.block_to_scope(largest != 0, merge=True).sum(axis=-1))
    counts: Array = np.sum(used, axis=0)
    return counts


def drop(kept: Iterable[Kept], start: int, values: Array) -> None:
    """Set the elements of dropped blocks to +0.0 in `values`: a tensor's elements in C order from `start` on.

    `values` has one axis and is written in place; windows may reach beyond it on both sides, also
    in the middle of a block.
    """
    for window, block, mask in kept:
        outwards = _by_stride(window.strides)
        shape, strides, sizes = (tuple(of[axis] for axis in outwards) for of in (window.shape, window.strides, block))
        _drop(values, window.offset - start, shape, strides, sizes, mask.transpose(outwards))


def _drop(
    values: Array,
    first: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
    mask: Array,
) -> None:
    """Drop blocks of the window, its largest stride first, that starts at index `first` of `values` or outside."""
    end = first + span(shape, strides)
    if end <= 0 or first >= values.size:
        return
    if first >= 0 and end <= values.size:
        steps = tuple(stride * values.itemsize for stride in strides)
        view = np.lib.stride_tricks.as_strided(values[first:], shape, steps)
        BlockSpec(view, block).apply_mask(mask)
        return
    length, stride, size = shape[0], max(1, strides[0]), block[0]
    inner = span(shape[1:], strides[1:])
    low = max(0, -(first // stride))
    high = max(low, min(length, (values.size - first - inner) // stride + 1))
    begin, stop = max(0, -((first + inner - 1) // stride)), min(length, (values.size - 1 - first) // stride + 1)
    for index in (*range(begin, min(low, stop)), *range(max(high, begin), stop)):  # cut by an end of `values`
        _drop(values, first + index * stride, shape[1:], strides[1:], block[1:], mask[index // size])
    # Whole blocks in one call, and what is left of a block at either end in one each.
    head = min(high, -(-low // size) * size)
    tail = max(head, high // size * size)
    for begin, stop in ((low, head), (head, tail), (tail, high)):
        if begin < stop:
            _drop(
                values,
                first + begin * stride,
                (stop - begin, *shape[1:]),
                strides,
                (min(size, stop - begin), *block[1:]),
                mask[begin // size : -(-stop // size)],
            )


def _table(group: Group, ord: float, weights: WeightFile, advance: Callable[[int], None] | None) -> Array:
    """The norm of every block of a group, on the aligned grid."""
    aligned = group.members[0].aligned
    table: Array | None = None
    for box, norms in joint_norms(group, ord, weights):
        if table is None:
            table = np.empty(aligned, norms.dtype)
        table[box] = norms
        if advance is not None:
            advance(norms.size * _bytes_per_block(group))
    return np.empty(aligned, np.float32) if table is None else table


def joint_norms(group: Group, ord: float, weights: WeightFile) -> Iterator[tuple[Box, Array]]:
    """The joint norms of the blocks of a group, strip by strip: a box of the aligned grid, and the norms in it."""
    reader = _WindowReader(weights)
    blocks = max(1, STRIP_BYTES // (_bytes_per_block(group) + 8))  # a number for each block is held as well
    for box in _strips(group.members[0].aligned, blocks):
        specs = [BlockSpec(reader.ranked(member, _elements(member, box)), member.block) for member in group.members]
        yield box, BlockCoupling(specs, orders=[member.order for member in group.members]).norms(ord=ord)


def _strips(grid: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Boxes of at most `limit` blocks that cover a grid: runs along one axis, whole in those behind it."""
    axis = next(axis for axis in range(len(grid)) if math.prod(grid[axis + 1 :]) <= limit)
    step = limit // math.prod(grid[axis + 1 :])
    rest = tuple(slice(0, length) for length in grid[axis + 1 :])
    for outside in itertools.product(*map(range, grid[:axis])):
        lead = tuple(slice(index, index + 1) for index in outside)
        for start in range(0, grid[axis], step):
            yield (*lead, slice(start, min(start + step, grid[axis])), *rest)


def _bytes_per_block(group: Group) -> int:
    return sum(math.prod(member.block) * numpy_dtype(member.window.tensor).itemsize for member in group.members)


def _elements(member: Member, box: Box) -> Box:
    """The elements of a member's window that blocks of the aligned grid consist of."""
    by_axis = dict(zip(member.order, box, strict=True))
    return tuple(slice(by_axis[axis].start * size, by_axis[axis].stop * size) for axis, size in enumerate(member.block))


class _WindowReader:
    """Reads boxes of windows."""

    def __init__(self, weights: WeightFile) -> None:
        self._weights = weights
        self._strided = StridedReader()

    def ranked(self, member: Member, box: Box) -> Array:
        """What blocks in a box of a member's window rank by: its elements, or their scores."""
        window, scores = member.window, member.scores
        if scores is None:
            return self._read(self._weights, window.tensor, window, box)
        if scores.along is None:
            values = self._read(scores.weights, scores.tensor, window, box)
            require_usable(scores.tensor, values)
            return values
        values = self._read(self._weights, window.tensor, window, box)
        return scaled(values, _factors(scores, window, box))

    def _read(self, weights: WeightFile, tensor: Tensor, window: Window, box: Box) -> Array:
        """The elements of `tensor`, which lie in it as `window` does, in a box of the window."""
        outwards = _by_stride(window.strides)
        out = np.empty([box[axis].stop - box[axis].start for axis in outwards], numpy_dtype(tensor))
        offset = window.offset + sum(p.start * s for p, s in zip(box, window.strides, strict=True))
        self._strided.read(weights, tensor, offset, [window.strides[axis] for axis in outwards], out)
        return out.transpose(np.argsort(outwards))


def _factors(scores: Scores, window: Window, box: Box) -> Array:
    """The score of the input channel of every element in a box of a window."""
    shape, along = window.tensor.shape, scores.along or 0
    places = np.full((1,) * len(box), window.offset)
    for axis, (part, stride) in enumerate(zip(box, window.strides, strict=True)):
        steps = np.arange(part.start, part.stop) * stride
        places = places + steps.reshape([-1 if other == axis else 1 for other in range(len(box))])
    channels: Array = input_vector(scores)[places // math.prod(shape[along + 1 :]) % shape[along]]
    return channels


def _by_stride(strides: Sequence[int]) -> list[int]:
    """Axes, that of the largest stride first."""
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])
