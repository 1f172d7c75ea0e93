"""Tensors of a file in pieces that fit in memory, and what can be counted on a piece.

A slab is one box of a tensor, read into a buffer that is used again: memory stays the same
whatever the size of the file. The next slab is read while the caller works on this one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from npscope.weights import Tensor, WeightFile, numpy_dtype
from npscope.weights.background import Background
from npscope.weights.strided import StridedReader

SLAB_BYTES = 5 << 20
"""About the size of a slab, norms included: long for the disk, and short for a search over single elements."""

SLABS = 3
"""Buffers of a reader: one is filled, one is worked on, one may still be written elsewhere."""

_COUNT_ELEMENTS = 1 << 18  # a piece whose temporaries stay in cache

_LARGEST_MAGNITUDE = {  # bits of the largest number that is not NaN, without the sign
    "float64": 0x7FF0 << 48,
    "float32": 0x7F80 << 16,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7E,
    "float8_e5m2": 0x7C,
    "int8": 0x80,
}

Box = tuple[slice, ...]
"""A range on every axis, the ends given."""

Array = np.ndarray[Any, Any]


def elements_in(nbytes: int, width: int) -> int:
    """How many elements take at most `nbytes`, of `width` bytes each and as norms in float32; at least 1."""
    return max(1, nbytes // max(4, width))


def extents(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(side.stop - side.start for side in box)


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is all of an array."""
    return tuple(slice(0, length) for length in shape)


def tiles(region: Box, period: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Boxes of whole periods that cover `region` in row-major order.

    A box has at most `limit` elements, unless a period has more. Periods are counted from the
    start of the region.

    >>> list(tiles((slice(0, 8), slice(0, 2)), (4, 1), 8))
    [(slice(0, 4, None), slice(0, 2, None)), (slice(4, 8, None), slice(0, 2, None))]
    """
    return cells(region, tile_sizes(extents(region), period, limit))


def tile_sizes(shape: tuple[int, ...], period: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The sizes of the `tiles` of an array of `shape`, but for those that its end cuts."""
    sizes = list(period)
    for axis in reversed(range(len(shape))):
        others = math.prod(sizes[:axis]) * math.prod(sizes[axis + 1 :])
        sizes[axis] = min(shape[axis], period[axis] * max(1, limit // (period[axis] * others)))
        if sizes[axis] < shape[axis]:
            break
    return tuple(sizes)


def cells(region: Box, sizes: tuple[int, ...]) -> Iterator[Box]:
    """Boxes of `sizes` that cover `region` in row-major order, cut where it ends.

    >>> list(cells((slice(0, 3), slice(4, 6)), (2, 2)))
    [(slice(0, 2, None), slice(4, 6, None)), (slice(2, 3, None), slice(4, 6, None))]
    """
    starts = (range(side.start, side.stop, size) for side, size in zip(region, sizes, strict=True))
    for corner in itertools.product(*starts):
        sides = zip(corner, sizes, region, strict=True)
        yield tuple(slice(start, min(start + size, side.stop)) for start, size, side in sides)


def common(one: Box, other: Box) -> Box | None:
    """The box that two boxes share, None where there is none.

    >>> common((slice(0, 4),), (slice(2, 6),))
    (slice(2, 4, None),)
    """
    sides = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)]
    return None if any(side.start >= side.stop for side in sides) else tuple(sides)


def boxes(shape: tuple[int, ...], period: tuple[int, ...], limit: int, most: int) -> Iterator[Box]:
    """Boxes that cover a C-contiguous array in the order of its bytes, each one contiguous.

    They have about `limit` elements and hold whole periods, unless that takes more than `most`
    elements: then they may cut periods.

    >>> list(boxes((8, 2), (8, 1), 8, 8))
    [(slice(0, 4, None), slice(0, 2, None)), (slice(4, 8, None), slice(0, 2, None))]
    """
    smallest = smallest_slab(shape, period)
    whole_periods = smallest <= most
    return tiles(whole(shape), period if whole_periods else (1,) * len(shape), max(limit, smallest * whole_periods))


def smallest_slab(shape: tuple[int, ...], period: tuple[int, ...]) -> int:
    """Elements of the smallest contiguous box that holds whole periods.

    >>> smallest_slab((8, 100), (4, 10))
    400
    """
    for axis, size in enumerate(period):
        if size > 1:
            return size * math.prod(shape[axis + 1 :])
    return 1


class Request(NamedTuple):
    """A box of a float tensor read as `shape`."""

    tensor: Tensor
    shape: tuple[int, ...]
    box: Box


class SlabReader:
    """Reads tensors of an open file slab by slab into buffers of its own, one slab ahead where `ahead` does the work.

    All reads that one `Background` does of a file come one after another, whichever reader asks for them.
    """

    def __init__(self, weights: WeightFile, ahead: Background | None = None) -> None:
        self._weights = weights
        self._strided = StridedReader()
        self._ahead = ahead
        self._buffers = [np.empty(0, np.uint8)] * SLABS
        self._next = 0

    def read(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Array]]:
        """(request, values) for each request; the values are gone `SLABS` - 1 slabs later."""
        if self._ahead is None:
            for request in requests:
                yield request, self._fill(request)
            return
        waiting: tuple[Request, Future[Array]] | None = None
        for request in requests:
            begun = request, self._ahead.submit(self._fill, request)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = begun
        if waiting is not None:
            yield waiting[0], waiting[1].result()

    def _fill(self, request: Request) -> Array:
        tensor, shape, box = request
        dtype, sizes = numpy_dtype(tensor), extents(box)
        nbytes = math.prod(sizes) * dtype.itemsize
        at, self._next = self._next, (self._next + 1) % SLABS
        if nbytes > self._buffers[at].size:
            self._buffers[at] = np.empty(0, np.uint8)  # the old one goes first
            self._buffers[at] = np.empty(nbytes, np.uint8)
        values = self._buffers[at][:nbytes].view(dtype).reshape(sizes)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        first = sum(side.start * stride for side, stride in zip(box, strides, strict=True))
        self._strided.read(self._weights, tensor, first, strides, values)
        return values


def magnitude_bits(values: Array) -> Array:
    """The bits of numbers without their sign: unsigned integers that order as the magnitudes do."""
    unsigned = np.dtype(f"<u{values.itemsize}")
    if values.dtype.kind == "i":
        return np.abs(values).view(unsigned)
    bits = values.view(unsigned)
    magnitudes: Array = bits & bits.dtype.type((1 << (8 * values.itemsize - 1)) - 1)
    return magnitudes


def count_zeros_and_nans(values: Array) -> tuple[int, int]:
    """How many zeros of either sign, and how many NaN, a contiguous array of a dtype that can be pruned holds."""
    flat = values.reshape(-1)
    largest = _LARGEST_MAGNITUDE[flat.dtype.name]
    zeros = nans = 0
    for start in range(0, flat.size, _COUNT_ELEMENTS):
        bits = magnitude_bits(flat[start : start + _COUNT_ELEMENTS])
        zeros += bits.size - int(np.count_nonzero(bits))
        nans += int(np.count_nonzero(bits > bits.dtype.type(largest)))
    return zeros, nans
