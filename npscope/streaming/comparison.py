"""How two files of weights differ, tensor by tensor, whatever their formats and the order of their axes.

Numbers are compared by their bits. Two kinds of difference are none in value, and are counted
apart: zeros of unlike sign, and NaN of unlike bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npscope.streaming.slabs import Array, Box, boxes, extents
from npscope.weights import Tensor, WeightFile, numpy_dtype, open_weights

CHUNK_BYTES = 1 << 20
"""About the bytes of each file that are compared at a time."""

Status = Literal["equal", "values", "dtype", "shape", "only in A", "only in B"]


@dataclass(frozen=True, slots=True)
class Difference:
    """What one tensor is in two files; None where a file has none of this name.

    With the status "values": `differing` of its elements differ, the first at the index `first`;
    of these `zeros` are zeros of unlike sign and `nans` NaN of unlike bits. `largest` is the
    largest |a - b| where both are finite numbers, None where there is no such pair. Of a dtype
    that packs several elements in a byte, bytes are counted and `first` is the index of a byte.
    """

    name: str
    status: Status
    a: Tensor | None
    b: Tensor | None
    differing: int = 0
    zeros: int = 0
    nans: int = 0
    first: tuple[int, ...] | None = None
    largest: float | int | None = None


def compare_files(a: str | os.PathLike[str], b: str | os.PathLike[str], *, by_value: bool = False) -> list[Difference]:
    """Every tensor of the files `a` and `b`, in the order of `a` and then of `b`.

    With `by_value` zeros of unlike sign are equal, and so are NaN of unlike bits. FormatError (a
    ValueError) when one is no weight file, OSError when it cannot be read.
    """
    with open_weights(a) as first, open_weights(b) as second:
        names = {**first.tensors, **second.tensors}
        found = [_compare(name, first, second, by_value) for name in names]
        first.check_unchanged()
        second.check_unchanged()
        return found


def _compare(name: str, first: WeightFile, second: WeightFile, by_value: bool) -> Difference:
    a, b = first.tensors.get(name), second.tensors.get(name)
    if a is None or b is None:
        return Difference(name, "only in B" if a is None else "only in A", a, b)
    if a.dtype != b.dtype:
        return Difference(name, "dtype", a, b)
    if a.saved_shape != b.saved_shape or a.nbytes != b.nbytes:
        return Difference(name, "shape", a, b)
    differing = zeros = nans = 0
    place: int | None = None
    largest: float | int | None = None
    for start, left, right in _unequal_chunks(first, second, a, b):
        unlike = (left != right).reshape(left.shape[0], -1).any(axis=1)
        both_zero, both_nan, distance = _values(a, left, right)
        if by_value:
            unlike &= ~(both_zero | both_nan)
        else:
            zeros += int(np.count_nonzero(unlike & both_zero))
            nans += int(np.count_nonzero(unlike & both_nan))
        if not unlike.any():
            continue
        differing += int(np.count_nonzero(unlike))
        place = start + int(np.argmax(unlike)) if place is None else place
        if distance is not None:
            largest = distance if largest is None else max(largest, distance)
    if place is None:
        return Difference(name, "equal", a, b)
    index = (place,) if _unit(a) is None else tuple(map(int, np.unravel_index(place, a.shape)))
    if a.fortran:
        index = index[::-1]
    return Difference(name, "values", a, b, differing, zeros, nans, index, largest)


def _unit(tensor: Tensor) -> int | None:
    """Bytes of one element, None when that is no whole number."""
    size = math.prod(tensor.shape)
    return tensor.nbytes // size if size and tensor.nbytes % size == 0 else None


def _unequal_chunks(first: WeightFile, second: WeightFile, a: Tensor, b: Tensor) -> Iterator[tuple[int, Array, Array]]:
    """(number of the first element, its words of both files) for chunks with a difference, a row for each element."""
    unit = _unit(a) or 1
    shape = a.shape if _unit(a) is not None else (a.nbytes,)
    start = 0
    for box in boxes(shape, (1,) * len(shape), max(1, CHUNK_BYTES // unit), a.nbytes) if a.nbytes else ():
        left = _bytes_of(first, a, shape, box, unit)
        if a.fortran == b.fortran:
            right = _bytes_of(second, b, shape, box, unit)
        else:  # the same axes in reverse
            right = _bytes_of(second, b, shape[::-1], box[::-1], unit)
            right = right.transpose(*reversed(range(len(shape))), len(shape))
        if not np.array_equal(left, right):
            yield start, _words(left, unit), _words(right, unit)
        start += math.prod(extents(box))


def _words(raw: Array, unit: int) -> Array:
    """A row of words for each element, as few as can be."""
    word = math.gcd(unit, 8)
    return np.ascontiguousarray(raw).view(f"<u{word}").reshape(-1, unit // word)


def _bytes_of(weights: WeightFile, tensor: Tensor, shape: tuple[int, ...], box: Box, unit: int) -> Array:
    """A box of a tensor whose elements have `unit` bytes: its shape, and an axis of bytes behind it."""
    sizes = extents(box)
    found = np.empty((*sizes, unit), np.uint8)
    steps = [math.prod(shape[axis + 1 :]) * unit for axis in range(len(shape))]
    cut = len(shape)  # from this axis inwards the box is one run of bytes
    while cut and math.prod(sizes[cut:]) == math.prod(shape[cut:]):
        cut -= 1
    for outside in np.ndindex(sizes[:cut]):
        at = sum((part.start + i) * step for part, i, step in zip(box, outside, steps, strict=False))
        at += sum(part.start * step for part, step in zip(box[cut:], steps[cut:], strict=True))
        weights.read(tensor, at, found[outside].reshape(-1).data)
    return found


def _values(tensor: Tensor, left: Array, right: Array) -> tuple[Array, Array, float | int | None]:
    """Where both are zero, where both are NaN, and the largest distance of finite numbers that differ."""
    none = np.zeros(len(left), np.bool_)
    if tensor.is_opaque:
        return none, none, None
    if tensor.is_float or tensor.dtype.startswith("complex"):
        dtype = numpy_dtype(tensor) if tensor.is_float else np.dtype(tensor.dtype).newbyteorder("<")
        wide = np.complex128 if dtype.kind == "c" else np.float64
        with np.errstate(invalid="ignore", over="ignore"):  # signalling NaN; inf - inf
            a, b = (words.reshape(-1).view(dtype).astype(wide) for words in (left, right))
            apart = np.abs(a - b)
        apart = apart[np.isfinite(apart) & (a != b)]
        return (a == 0) & (b == 0), np.isnan(a) & np.isnan(b), float(apart.max()) if apart.size else None
    integers = np.dtype(np.uint8 if tensor.dtype == "bool" else tensor.dtype).newbyteorder("<")
    x, y = (words.reshape(-1).view(integers) for words in (left, right))
    # As unsigned numbers of 64 bits the subtraction is exact, whatever the signs.
    gaps = np.maximum(x, y).astype(np.uint64) - np.minimum(x, y).astype(np.uint64)
    largest = int(gaps.max(initial=0))
    return none, none, largest or None
