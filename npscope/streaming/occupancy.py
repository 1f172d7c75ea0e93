"""Where a file of weights is not zero: pieces of tensors as bits, and what can be counted on them without norms.

A piece is read and counted while it is in the cache of one core. All of it is NumPy on the bits
of the values: no kernel has to be compiled before a file can be checked.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from npscope.backends import threads
from npscope.options import thread_count
from npscope.streaming.slabs import Array, Box, cells, extents, smallest_slab, tile_sizes, whole
from npscope.weights import Tensor, WeightFile, reads_side_by_side
from npscope.weights.strided import StridedReader

PIECE_BYTES = 2 << 20
"""About the size of a piece: Python's share of the work is small, and a piece is counted while it is in the cache."""

CONTIGUOUS_BYTES = 16 << 20
"""Periods that whole rows of more than this hold are read by parts of rows."""

MEMORY_BYTES = 96 << 20
"""What the buffers of all threads may take; where periods are large, fewer threads work."""

WORDS = (2, 4, 8)
"""Numbers of bytes that make an integer."""

_WIDE = 32  # elements behind an axis from which on NumPy reduces it at speed


@dataclass(frozen=True)
class Walk:
    """A tensor to be read as `shape`, in pieces that cut no period, and what is done with them: ``work(box, piece)``.

    Pieces are contiguous, unless such ones would be larger than `CONTIGUOUS_BYTES`.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    period: tuple[int, ...]
    work: Callable[[Box, Piece], None]

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.tensor.nbytes // math.prod(self.shape)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of a piece, where the end of the tensor does not cut it."""
        smallest, usual = smallest_slab(self.shape, self.period), PIECE_BYTES // self.itemsize
        contiguous = smallest * self.itemsize <= CONTIGUOUS_BYTES
        return tile_sizes(self.shape, self.period, max(usual, smallest) if contiguous else usual)

    @property
    def pieces(self) -> int:
        """The number of pieces."""
        return math.prod(-(-length // size) for length, size in zip(self.shape, self.sizes, strict=True))

    @property
    def workers(self) -> int:
        """Threads that may work at once: where pieces are large, fewer."""
        piece_bytes = math.prod(self.sizes) * (self.itemsize + 1)
        return max(1, min(thread_count(), MEMORY_BYTES // piece_bytes))


class PieceReader:
    """Reads tensors of an open file piece by piece on several threads; its buffers serve one tensor after another."""

    def __init__(self, weights: WeightFile) -> None:
        self._weights = weights
        self._buffers: list[Array] = []
        self._strided: list[StridedReader] = []

    def each(self, walks: Sequence[Walk]) -> None:
        """Do every piece of every walk once, on several threads, which do not wait for each other in between.

        Reads begin in order, one at a time unless the file can be read by several threads at once.
        """
        for workers, alike in itertools.groupby(walks, key=lambda walk: walk.workers):
            self._each_on(workers, list(alike))

    def _each_on(self, workers: int, walks: Sequence[Walk]) -> None:
        self._buffers += [np.empty(0, np.uint8)] * (workers - len(self._buffers))
        self._strided += [StridedReader() for _ in range(workers - len(self._strided))]
        places = ((walk, box) for walk in walks for box in cells(whole(walk.shape), walk.sizes))
        turn, reading = threading.Lock(), nullcontext() if reads_side_by_side(self._weights) else threading.Lock()

        def step(slot: int, piece: int) -> None:
            with reading:
                with turn:
                    place = next(places, None)
                if place is None:  # an interrupt has ended the list
                    return
                walk, box = place
                found = self._fill(slot, walk, box)
            walk.work(box, found)

        threads.run(sum(walk.pieces for walk in walks), step, workers)

    def _fill(self, slot: int, walk: Walk, box: Box) -> Piece:
        """The part `box` of a tensor, in the buffers of a thread."""
        itemsize, shape = walk.itemsize, extents(box)
        size = math.prod(shape)
        if size * (itemsize + 1) > self._buffers[slot].size:
            self._buffers[slot] = np.empty(size * (itemsize + 1), np.uint8)
        raw, flags = self._buffers[slot][: size * itemsize], self._buffers[slot][size * itemsize :]
        bits = raw.view(f"<u{itemsize}").reshape(shape)
        strides = [math.prod(walk.shape[axis + 1 :]) for axis in range(len(shape))]
        offset = sum(part.start * stride for part, stride in zip(box, strides, strict=True))
        self._strided[slot].read(self._weights, walk.tensor, offset, strides, bits)
        return Piece(bits, flags[:size], walk.tensor.sign_bits)


class Piece(NamedTuple):
    """Numbers as unsigned integers, and a buffer with a byte for each: a fresh one would cost more than the work.

    The highest bit of a float is its sign, which a zero may have.
    """

    bits: Array
    flags: Array
    sign_bits: int = 1

    def nonzero(self) -> Array:
        """1 where the number is no zero of either sign, else 0: uint8, gone with the piece, whose bits are used up."""
        found = self.flags.reshape(self.bits.shape)
        if self.sign_bits:
            np.left_shift(self.bits, self.sign_bits, out=self.bits)
        np.not_equal(self.bits, 0, out=found.view(np.bool_))
        return found

    def surely_within(self, size: int, keep: int) -> bool:
        """Whether each `size` neighbours (2, 4 or 8) hold at most `keep` numbers other than +0.0.

        A -0.0 is taken for a number in use, so False only means that somebody has to look. It costs
        less than half of an exact count, and nearly all pieces of a pruned file end here.
        """
        np.not_equal(self.bits.reshape(-1), 0, out=self.flags.view(np.bool_))
        words = self.flags.view(f"u{size}")
        ones = words.dtype.type(int.from_bytes(bytes([1] * size), "little"))
        # The highest byte of the product is the sum of all bytes, each 0 or 1.
        sums = np.multiply(words, ones, out=words)
        return int(sums.max(initial=0)) < (keep + 1) << (8 * (size - 1))


def any_of(used: Array, box: Box, sizes: tuple[int, ...]) -> tuple[Array, Box]:
    """Which blocks of `sizes` elements hold a 1 of `used`, the part `box` of a tensor; and which blocks they are.

    Blocks that reach out of the box count for what is inside.

    >>> any_of(np.asarray([[0, 0, 0, 1]], np.uint8), (slice(3, 4), slice(0, 4)), (2, 2))
    (array([[0, 1]], dtype=uint8), (slice(1, 2, None), slice(0, 2, None)))
    """
    return _fold(np.bitwise_or, used, box, sizes, used.dtype)


def count_of(used: Array, box: Box, sizes: tuple[int, ...]) -> tuple[Array, Box]:
    """How many 1 of `used`, the part `box` of a grid, each scope of `sizes` blocks holds; and which scopes they are.

    Scopes that reach out of the box count for what is inside.

    >>> count_of(np.asarray([[0, 1, 1, 1]], np.uint8), (slice(0, 1), slice(2, 6)), (1, 4))
    (array([[1, 2]], dtype=uint8), (slice(0, 1, None), slice(0, 2, None)))
    """
    groups = tuple(_groups(part, size) for part, size in zip(box, sizes, strict=True))
    if all(group.stop - group.start == 1 for group in groups):  # one scope: the fastest of all counts
        return np.full((1,) * len(groups), np.count_nonzero(used), np.int64), groups
    return _fold(np.add, used, box, sizes, np.min_scalar_type(math.prod(sizes)))


def _groups(part: slice, size: int) -> slice:
    return slice(part.start // size, -(-part.stop // size))


def _fold(
    combine: np.ufunc, values: Array, box: Box, sizes: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Array, Box]:
    """Every axis in groups of its size, counted from the start of the whole, each combined to one number of `dtype`."""
    binary = True
    for axis in reversed(range(len(box))):
        part, size = box[axis], sizes[axis]
        if size == 1:
            continue
        if part.start % size or part.stop % size:
            edges = np.arange(_groups(part, size).start, _groups(part, size).stop) * size - part.start
            values = combine.reduceat(values, np.maximum(edges, 0), axis=axis, dtype=dtype)
        else:
            values = _fold_whole(combine, values, axis, size, dtype, binary=binary)
        binary = combine is np.bitwise_or
    return values, tuple(_groups(part, size) for part, size in zip(box, sizes, strict=True))


def _fold_whole(combine: np.ufunc, values: Array, axis: int, size: int, dtype: np.dtype[Any], *, binary: bool) -> Array:
    """One axis in groups of its size, which divides it; `binary`: the values are 0 and 1, not counts."""
    lead, tail = values.shape[:axis], values.shape[axis + 1 :]
    shape = (*lead, values.shape[axis] // size)
    if binary and math.prod(tail) == 1 and size in WORDS and values.dtype == np.uint8:
        # Neighbours in one word, many at a time.
        words = np.ascontiguousarray(values).reshape(*shape, size).view(f"u{size}")
        folded = words != 0 if combine is np.bitwise_or else np.bitwise_count(words)
        counts: Array = folded.view(np.uint8).astype(dtype, copy=False)
        return counts.reshape(*shape, *tail)
    grouped = values.reshape(*shape, size, *tail)
    if math.prod(tail) >= _WIDE or size > _WIDE:
        return np.asarray(combine.reduce(grouped, axis=axis + 1, dtype=dtype))
    first, *others = np.moveaxis(grouped, axis + 1, 0)
    result: Array = first.astype(dtype)
    for other in others:
        combine(result, other, out=result, dtype=dtype)
    return result
