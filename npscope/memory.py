"""Facts about strided host memory: does a window meet itself, do two windows share an element."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

MAX_EXACT_ELEMENTS = 1 << 22
"""Windows with more elements than this are not enumerated to find out whether they meet themselves."""

MAX_EXACT_WORK: Any = 1_000_000  # NumPy's stubs know only 0 and -1
"""Bound on the exact search for an element shared by two windows (numpy.shares_memory)."""


@lru_cache(maxsize=1024)
def meets_itself(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether two indices of a window reach the same memory; True also when that cannot be decided.

    Strides and `itemsize` in one unit. Nested strides (each longer than all that lies inside it)
    prove that they do not; other windows are enumerated if small enough.
    """
    dims = sorted((abs(s), n) for n, s in zip(shape, strides, strict=True) if n != 1)
    if any(n == 0 for _, n in dims):
        return False
    extent = itemsize
    for stride, n in dims:
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:
        return False
    if any(stride == 0 for stride, _ in dims) or math.prod(n for _, n in dims) > MAX_EXACT_ELEMENTS:
        return True
    starts = np.zeros(1, dtype=np.int64)
    for stride, n in dims:
        starts = (starts[:, None] + stride * np.arange(n, dtype=np.int64)).ravel()
    starts.sort()
    return bool((np.diff(starts) < itemsize).any())


def neighbours(written: Sequence[np.ndarray], read: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Indices (i, j) of all ``written[i]`` and ``read[j]`` whose byte ranges overlap; a sort, where none do."""
    events = []
    for which, arrays in enumerate((written, read)):
        for i, array in enumerate(arrays):
            low, high = np.lib.array_utils.byte_bounds(array)
            if array.size:
                events.append((low, high, which, i))
    open_: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for low, high, which, i in sorted(events):
        for side in open_:
            side[:] = [entry for entry in side if entry[0] > low]
        for _, j in open_[1 - which]:
            yield (j, i) if which else (i, j)
        open_[which].append((high, i))


def same_window(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same elements at the same indices."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and all(s == t for n, s, t in zip(a.shape, a.strides, b.strides, strict=True) if n > 1)
    )


def share_an_element(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have a byte in common; True also when that cannot be decided."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=MAX_EXACT_WORK))
    except np.exceptions.TooHardError:
        return True
