"""Tensors of a file in pieces that fit in memory, and what can be counted on a piece.

A slab is one contiguous run of a tensor, read into a buffer that is used again for the next
one: memory stays the same whatever the size of the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from npscope.weights import Tensor, WeightFile, numpy_dtype

SLAB_BYTES = 8 << 20
"""About the size of a slab: long enough for the disk, short enough that Ctrl-C is answered at once."""

_COUNT_ELEMENTS = 1 << 18  # a piece whose temporaries stay in cache

_LARGEST_MAGNITUDE = {  # bits of the largest number that is not NaN, without the sign
    "float64": 0x7FF0 << 48,
    "float32": 0x7F80 << 16,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7E,
    "float8_e5m2": 0x7C,
}

Box = tuple[slice, ...]
"""A range on every axis, the ends given."""

Array = np.ndarray[Any, Any]


def smallest_slab(shape: tuple[int, ...], period: tuple[int, ...], itemsize: int) -> int:
    """Bytes of the smallest slab that holds whole periods."""
    _, step, inner = _cut_axis(shape, period, itemsize, 1)
    return step * inner


def boxes(shape: tuple[int, ...], period: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Box]:
    """Contiguous boxes that cover a C-contiguous array in order, none cutting a period.

    A box has at most `limit` bytes, unless the smallest that holds whole periods has more.

    >>> list(boxes((8, 2), (4, 1), 1, 8))
    [(slice(0, 4, None), slice(0, 2, None)), (slice(4, 8, None), slice(0, 2, None))]
    """
    axis, step, _ = _cut_axis(shape, period, itemsize, limit)
    inside = tuple(slice(0, length) for length in shape[axis + 1 :])
    for outside in itertools.product(*(range(length) for length in shape[:axis])):
        lead = tuple(slice(index, index + 1) for index in outside)
        for start in range(0, shape[axis], step):
            yield (*lead, slice(start, min(start + step, shape[axis])), *inside)


def _cut_axis(shape: tuple[int, ...], period: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, int, int]:
    """The axis to cut, the step there, and the bytes of one index there.

    A box is contiguous when it holds one index of every axis before the cut; so the cut goes
    inwards only past axes where one index is a whole period.
    """
    axis, inner = 0, math.prod(shape[1:]) * itemsize
    while axis < len(shape) - 1 and period[axis] == 1 and inner > limit:
        axis += 1
        inner //= shape[axis]
    return axis, period[axis] * max(1, limit // (period[axis] * inner)), inner


class SlabReader:
    """Reads tensors of an open file slab by slab into one buffer."""

    def __init__(self, weights: WeightFile) -> None:
        self._weights = weights
        self._buffer = np.empty(0, np.uint8)

    def slabs(self, tensor: Tensor, shape: tuple[int, ...], period: tuple[int, ...]) -> Iterator[tuple[Box, Array]]:
        """(box, values) of one float tensor read as `shape`; the values are gone with the next slab."""
        dtype = numpy_dtype(tensor)
        steps = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
        for box in boxes(shape, period, dtype.itemsize, SLAB_BYTES):
            extents = tuple(part.stop - part.start for part in box)
            nbytes = math.prod(extents) * dtype.itemsize
            if nbytes > self._buffer.size:
                self._buffer = np.empty(nbytes, np.uint8)
            raw = self._buffer[:nbytes]
            self._weights.read(tensor, sum(b.start * s for b, s in zip(box, steps, strict=True)), raw.data)
            yield box, raw.view(dtype).reshape(extents)


def magnitude_bits(values: Array) -> Array:
    """The bits of floats without their sign: unsigned integers that order as the magnitudes do."""
    bits = values.view(np.dtype(f"<u{values.itemsize}"))
    magnitudes: Array = bits & bits.dtype.type((1 << (8 * values.itemsize - 1)) - 1)
    return magnitudes


def count_zeros_and_nans(values: Array) -> tuple[int, int]:
    """How many zeros of either sign, and how many NaN, a contiguous array of floats holds."""
    flat = values.reshape(-1)
    largest = _LARGEST_MAGNITUDE[flat.dtype.name]
    zeros = nans = 0
    for start in range(0, flat.size, _COUNT_ELEMENTS):
        bits = magnitude_bits(flat[start : start + _COUNT_ELEMENTS])
        zeros += bits.size - int(np.count_nonzero(bits))
        nans += int(np.count_nonzero(bits > bits.dtype.type(largest)))
    return zeros, nans
