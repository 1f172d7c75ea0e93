"""What a file of weights holds: shapes, zeros, and the N:M sparsity that is already there."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from npscope.recipe import Layout, meaning
from npscope.slabs import SlabReader, count_zeros_and_nans, magnitude_bits
from npscope.weights import Tensor, open_weights

GROUP_SIZES = (2, 4, 8, 16)
"""The M for which N:M is looked for; reported when N is at most half of M."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """One tensor; the counts are None where its dtype is not floating.

    `n_of_m` are the (N, M) of the sparsest N:M that holds everywhere `along` an axis, None if none does.
    """

    tensor: Tensor
    zeros: int | None = None
    nans: int | None = None
    n_of_m: tuple[int, int] | None = None
    along: str | None = None


def inspect_file(path: str | os.PathLike[str], *, layout: Layout = "out-in") -> list[Inspection]:
    """Every tensor of the file at `path`, in its order; memory is one slab.

    FormatError (a ValueError) when it is no weight file or a damaged one, OSError when it cannot
    be read.
    """
    with open_weights(path) as weights:
        reader = SlabReader(weights)
        inspections = [_inspect(tensor, reader, layout) for tensor in weights.tensors.values()]
        weights.check_unchanged()
        return inspections


def _inspect(tensor: Tensor, reader: SlabReader, layout: Layout) -> Inspection:
    if not tensor.is_float:
        return Inspection(tensor)
    zeros = nans = 0
    if 0 not in tensor.shape:
        flat = (math.prod(tensor.shape),)
        for _, values in reader.slabs(tensor, flat, (1,)):
            more_zeros, more_nans = count_zeros_and_nans(values)
            zeros, nans = zeros + more_zeros, nans + more_nans
    # With fewer zeros no N:M of at most a half can hold: dense tensors are read once.
    if len(tensor.shape) < 2 or not zeros or 2 * zeros < math.prod(tensor.shape):
        return Inspection(tensor, zeros, nans)
    found = min(_patterns(tensor, reader, layout), key=lambda hit: (hit[0] / hit[1], hit[1]), default=None)
    if found is None:
        return Inspection(tensor, zeros, nans)
    return Inspection(tensor, zeros, nans, found[:2], found[2])


def _patterns(tensor: Tensor, reader: SlabReader, layout: Layout) -> Iterator[tuple[int, int, str]]:
    """(N, M, where) of every N:M that holds along the input axis, or along the fan-in of a convolution."""
    axes = meaning(tensor, layout)
    readings = [(tensor.shape, axes.into, f"axis {axes.into} (in)")]
    if axes.kernel and axes.has_matrix:
        shape, order = axes.matrix(tensor.shape)
        readings.append((shape, order[-1], "fan-in"))
    for shape, axis, along in readings:
        sizes = [size for size in GROUP_SIZES if shape[axis] % size == 0]
        most = dict.fromkeys(sizes, 0)
        period = tuple(max(sizes, default=1) if at == axis else 1 for at in range(len(shape)))
        for _, values in reader.slabs(tensor, shape, period) if sizes else ():
            nonzero = np.moveaxis(magnitude_bits(values) != 0, axis, -1)
            for size in sizes:
                groups = nonzero.reshape(*nonzero.shape[:-1], -1, size)
                most[size] = max(most[size], int(groups.sum(-1, dtype=np.uint8).max()))
        yield from ((n, size, along) for size, n in most.items() if 2 * n <= size)
