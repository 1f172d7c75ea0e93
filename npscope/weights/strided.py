"""Reading elements of a tensor that lie apart in its file: a range of columns, one head of a fused matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from npscope.weights import Tensor, WeightFile

Array = np.ndarray[Any, Any]

_GAP_BYTES = 32 << 10
"""What lies between two runs is read along with them up to this size: that takes no longer than another call."""

_SPAN_BYTES = 1 << 20
"""About the bytes that are read at once to pick runs from."""


class StridedReader:
    """Reads elements of tensors at regular distances; not for several threads at once."""

    def __init__(self) -> None:
        self._scratch = np.empty(0, np.uint8)

    def read(self, weights: WeightFile, tensor: Tensor, offset: int, strides: Sequence[int], out: Array) -> None:
        """Fill `out`, C-contiguous, with elements of `tensor` from number `offset` on.

        `strides` are the elements from one index to the next, by axis and the largest first: all
        elements of one index lie before those of the next.
        """
        length, itemsize = span(out.shape, strides), out.itemsize
        if not out.size:
            return
        if length == out.size:
            weights.read(tensor, offset * itemsize, out.reshape(-1).view(np.uint8).data)
            return
        gap = (strides[0] - span(out.shape[1:], strides[1:])) * itemsize
        if gap > _GAP_BYTES or strides[0] * itemsize > _SPAN_BYTES:
            for index in range(out.shape[0]):
                self.read(weights, tensor, offset + index * strides[0], strides[1:], out[index, ...])
        elif length * itemsize > _SPAN_BYTES:
            together = _SPAN_BYTES // (strides[0] * itemsize)
            for index in range(0, out.shape[0], together):
                self.read(weights, tensor, offset + index * strides[0], strides, out[index : index + together])
        else:
            raw = self._room(length * itemsize)
            weights.read(tensor, offset * itemsize, raw.data)
            steps = [stride * itemsize for stride in strides]
            out[...] = np.lib.stride_tricks.as_strided(raw.view(out.dtype), out.shape, steps)

    def _room(self, nbytes: int) -> Array:
        if self._scratch.size < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch[:nbytes]


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a window, both included.

    >>> span((2, 3), (10, 1))
    13
    """
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
