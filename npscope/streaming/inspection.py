"""What a file of weights holds: shapes, zeros, and the sparsity that is already there.

A pattern is *detected* when zeros placed at random, as many as there are, would hardly make it:
with a chance below `CHANCE`, or for blocks by `DEVIATIONS` standard deviations. So nothing is
detected in dense tensors, in zeros at random, or in tensors too small or too empty to tell.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from npscope.recipes.layout import Layout, has_matrix, meaning
from npscope.streaming.occupancy import Piece, PieceReader, Walk, any_of, count_of
from npscope.streaming.slabs import Array, Box, count_zeros_and_nans
from npscope.weights import Axes, Tensor, numpy_dtype, open_weights

GROUP_SIZES = (2, 4, 8, 16)
"""The M for which N:M is looked for, with every N below M."""

BLOCK_SIZES = (
    *((1, 4), (1, 8), (1, 16), (4, 1), (8, 1), (16, 1)),
    *((4, 4), (8, 8), (16, 16), (32, 32)),
    *((1, -1), (-1, 1)),
)
"""Blocks of the ``[out, fan-in]`` matrix that are looked for; -1 is a whole row or column."""

LEAST_SHARE = 0.01
"""Tensors with a smaller share of zeros are read once, and no pattern is looked for in them."""

CHANCE = 1e-6
DEVIATIONS = 6
COVERAGE = 0.9
"""Share of the zeros that a pattern must account for, unless it is `HARDWARE`."""

HARDWARE = (2, 4)
"""The pattern that GPUs compute with; told also where it is not what the zeros follow."""


class Groups(NamedTuple):
    """At most `keep` of every `of` neighbours `along` an axis are not zero."""

    keep: int
    of: int
    along: str


class Blocks(NamedTuple):
    """`zero` of the `blocks` blocks of `size` of the ``[out, fan-in]`` matrix are zero as a whole."""

    size: tuple[int, int]
    zero: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """One tensor: its zeros and NaN, None where its dtype cannot be pruned, and the patterns detected in it.

    Of groups the sparsest comes first, and none that follows from another one; of blocks the largest ones.
    """

    tensor: Tensor
    zeros: int | None = None
    nans: int | None = None
    groups: tuple[Groups, ...] = ()
    blocks: tuple[Blocks, ...] = ()


def inspect_file(
    path: str | os.PathLike[str], *, layout: Layout = "out-in", max_bytes: int | None = None
) -> list[Inspection]:
    """Every tensor of the file at `path`, in its order; memory is a few pieces of a tensor.

    FormatError (a ValueError) when it is no weight file or a damaged one, OSError when it cannot
    be read.
    """
    with open_weights(path, max_bytes=max_bytes) as weights:
        reader = PieceReader(weights)
        inspections = [_inspect(tensor, reader, layout) for tensor in weights.tensors.values()]
        weights.check_unchanged()
        return inspections


def _inspect(tensor: Tensor, reader: PieceReader, layout: Layout) -> Inspection:
    if not tensor.is_ranked:
        return Inspection(tensor)
    size = math.prod(tensor.shape)
    zeros, nans = _zeros_and_nans(tensor, reader) if size else (0, 0)
    if len(tensor.shape) < 2 or zeros in (0, size) or zeros < LEAST_SHARE * size:
        return Inspection(tensor, zeros, nans)
    axes, share = meaning(tensor, layout), zeros / size
    groups = [
        found
        for shape, axis, along in _readings(tensor, axes)
        for found in _groups(tensor, reader, shape, axis, along)
        if _is_no_chance(found, size // found.of, share) and _accounts_for(found, share)
    ]
    blocks = [found for found in _blocks(tensor, reader, axes) if _beyond_chance(found, zeros, size)]
    return Inspection(tensor, zeros, nans, tuple(_tightest(groups)), tuple(_largest(blocks)))


def _zeros_and_nans(tensor: Tensor, reader: PieceReader) -> tuple[int, int]:
    found: list[tuple[int, int]] = []
    dtype = numpy_dtype(tensor)

    def work(box: Box, piece: Piece) -> None:
        found.append(count_zeros_and_nans(piece.bits.view(dtype)))

    reader.each([Walk(tensor, (math.prod(tensor.shape),), (1,), work)])
    return sum(zeros for zeros, _ in found), sum(nans for _, nans in found)


# --- N:M -----------------------------------------------------------------------------------------


def _readings(tensor: Tensor, axes: Axes) -> Iterator[tuple[tuple[int, ...], int, str]]:
    """(shape, axis, what the axis is) of every way along which groups are looked for."""
    into, out = (len(tensor.shape) - 1 - axis if tensor.fortran else axis for axis in (axes.into, axes.out))
    yield tensor.shape, axes.into, f"axis {into} (in)"
    if axes.kernel and has_matrix(tensor, axes):
        shape, order = axes.matrix(tensor.shape)
        yield shape, order[-1], "fan-in"
    yield tensor.shape, axes.out, f"axis {out} (out)"


def _groups(tensor: Tensor, reader: PieceReader, shape: tuple[int, ...], axis: int, along: str) -> list[Groups]:
    """The largest number in use of any group, for every size of group that divides the axis."""
    sizes = [size for size in GROUP_SIZES if shape[axis] % size == 0]
    if not sizes:
        return []
    most = dict.fromkeys(sizes, 0)
    lock = threading.Lock()

    def work(box: Box, piece: Piece) -> None:
        used = piece.nonzero()
        counts = {size: int(count_of(used, box, _at(axis, size, shape))[0].max()) for size in sizes}
        with lock:
            most.update({size: max(most[size], count) for size, count in counts.items()})

    reader.each([Walk(tensor, shape, _at(axis, max(sizes), shape), work)])
    return [Groups(count, size, along) for size, count in most.items()]


def _at(axis: int, size: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if at == axis else 1 for at in range(len(shape)))


def _is_no_chance(found: Groups, groups: int, share: float) -> bool:
    """Whether zeros at random, a `share` of all, would leave `keep` of `of` in every one of the groups too rarely."""
    terms = (
        math.comb(found.of, used) * (1 - share) ** used * share ** (found.of - used) for used in range(found.keep + 1)
    )
    return found.keep < found.of and groups * math.log(min(1.0, sum(terms))) < math.log(CHANCE)


def _accounts_for(found: Groups, share: float) -> bool:
    """Whether it is worth telling: 12 of 16 holds along many an axis whose zeros follow another pattern."""
    return found[:2] == HARDWARE or 1 - found.keep / found.of >= COVERAGE * share


def _tightest(groups: Sequence[Groups]) -> list[Groups]:
    """Those that follow from no other, the sparsest first."""
    tight = [found for found in groups if not any(other != found and _implies(other, found) for other in groups)]
    return sorted(tight, key=lambda found: (found.keep / found.of, found.of))


def _implies(given: Groups, found: Groups) -> bool:
    """Whether one holds wherever the other does: 2 of 4 implies 4 of 8, and 2 of 8 implies 2 of 4."""
    wider = found.of % given.of == 0 and found.keep * given.of >= given.keep * found.of
    narrower = given.of % found.of == 0 and found.keep >= given.keep
    return given.along == found.along and (wider or narrower)


# --- blocks --------------------------------------------------------------------------------------


def _blocks(tensor: Tensor, reader: PieceReader, axes: Axes) -> list[Blocks]:
    """How many blocks are zero as a whole, for every size that divides the ``[out, fan-in]`` matrix."""
    if not has_matrix(tensor, axes):
        return []
    shape, order = axes.matrix(tensor.shape)
    counters = [_BlockCounter(size, shape, order) for size in _sizes(shape[order[-2]], shape[order[-1]])]
    lock = threading.Lock()

    def work(box: Box, piece: Piece) -> None:
        used = piece.nonzero()
        for counter in counters:
            blocks, where = any_of(used, box, counter.sizes)
            with lock:
                counter.add(blocks, where)

    pieces = [counter.sizes for counter in counters if counter.grid is None]
    period = tuple(max(sizes) for sizes in zip((1,) * len(shape), *pieces, strict=True))
    reader.each([Walk(tensor, shape, period, work)])
    return [counter.result() for counter in counters]


def _sizes(out: int, fan_in: int) -> list[tuple[tuple[int, int], bool]]:
    """The sizes of `BLOCK_SIZES` that divide a matrix, in elements, and whether they are whole rows or columns."""
    found: dict[tuple[int, int], bool] = {}
    for rows, columns in BLOCK_SIZES:
        size = out if rows == -1 else rows, fan_in if columns == -1 else columns
        if out % size[0] == 0 and fan_in % size[1] == 0:
            found.setdefault(size, -1 in (rows, columns))
    return list(found.items())


class _BlockCounter:
    """Counts the zero blocks of one size; of whole rows and columns, which a piece may cut, it holds a byte each."""

    def __init__(self, sized: tuple[tuple[int, int], bool], shape: tuple[int, ...], order: tuple[int, ...]) -> None:
        self.size, whole = sized
        sizes = dict(zip(order[-2:], self.size, strict=True))
        self.sizes = tuple(sizes.get(axis, 1) for axis in range(len(shape)))
        grid = tuple(length // size for length, size in zip(shape, self.sizes, strict=True))
        self.grid: Array | None = np.zeros(grid, np.uint8) if whole else None
        self._blocks, self._zero = math.prod(grid), 0

    def add(self, used: Array, where: Box) -> None:
        """Take the blocks of one piece."""
        if self.grid is None:
            self._zero += used.size - int(np.count_nonzero(used))
        else:
            self.grid[where] |= used

    def result(self) -> Blocks:
        """What all pieces together hold."""
        zero = self._zero if self.grid is None else self._blocks - int(np.count_nonzero(self.grid))
        return Blocks(self.size, zero, self._blocks)


def _beyond_chance(found: Blocks, zeros: int, size: int) -> bool:
    """Whether the zeros lie in blocks, and zeros at random would not."""
    elements = math.prod(found.size)
    chance = (zeros / size) ** elements
    expected, deviation = found.blocks * chance, math.sqrt(found.blocks * chance * (1 - chance))
    return found.zero * elements >= COVERAGE * zeros and found.zero > expected + DEVIATIONS * deviation


def _largest(blocks: Sequence[Blocks]) -> list[Blocks]:
    """Those that no other one is made of."""
    return [
        found
        for found in blocks
        if not any(
            other is not found and all(n % m == 0 for n, m in zip(other.size, found.size, strict=True))
            for other in blocks
        )
    ]
