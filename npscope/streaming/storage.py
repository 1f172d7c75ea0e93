"""What pruned tensors take on disk, and what they would take with their zeros left out."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from npscope.weights import Tensor, WeightFile, open_weights

SAMPLES, SAMPLE_BYTES = 4, 16 << 10
"""Pieces of each tensor that are deflated to learn how well all of it would be, and their size."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of tensors: as they are, as values and a bit for each element, and deflated (an estimate from samples)."""

    now: int
    bitmask: int
    deflated: int


def storage(path: str | os.PathLike[str], zeros: Sequence[int | None]) -> Storage:
    """What the tensors of the weight file at `path` take, of which each has so many zeros; None leaves one out."""
    now = bitmask = deflated = 0
    with open_weights(path) as weights:
        for tensor, count in zip(weights.tensors.values(), zeros, strict=True):
            if count is None:
                continue
            now += tensor.nbytes
            bitmask += bitmask_bytes(tensor, count)
            deflated += round(tensor.nbytes * _deflated_share(weights, tensor))
    return Storage(now, bitmask, deflated)


def bitmask_bytes(tensor: Tensor, zeros: int) -> int:
    """Bytes of the values that are not zero and of a bit for each element, rows padded to whole bytes."""
    size = math.prod(tensor.shape)
    columns = tensor.shape[-1] if tensor.shape else 1
    return (size - zeros) * (tensor.nbytes // max(size, 1)) + (size // max(columns, 1)) * -(-columns // 8)


def _deflated_share(weights: WeightFile, tensor: Tensor) -> float:
    """Deflated bytes for each byte of samples at even distances."""
    whole = tensor.nbytes <= SAMPLES * SAMPLE_BYTES
    length = tensor.nbytes if whole else SAMPLE_BYTES
    starts = [0] if whole else [at * (tensor.nbytes - length) // (SAMPLES - 1) for at in range(SAMPLES)]
    read = packed = 0
    for start in starts:
        piece = bytearray(length)
        weights.read(tensor, start, memoryview(piece))
        read, packed = read + length, packed + len(zlib.compress(piece))
    return packed / read if read else 1.0
