"""Splitting, permuting and joining the axes of an array of any library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any


def array_namespace(array: Array) -> Any:
    """The array API namespace of an array; NumPy itself for NumPy arrays."""
    return np if isinstance(array, np.ndarray | np.generic) else _CUPY.get(type(array)) or _namespace_of(array)


def _namespace_of(array: Array) -> Any:
    import array_api_compat

    found = array_api_compat.array_namespace(array)
    if array_api_compat.is_cupy_namespace(found):
        _CUPY[type(array)] = found
    return found


_CUPY: dict[type, Any] = {}
"""The namespace of CuPy's arrays, for the search takes microseconds; arrays of other types may have one each."""


def reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    """`array` in another shape; a view where it can be."""
    return array.reshape(shape) if hasattr(array, "reshape") else array_namespace(array).reshape(array, shape)


def regroup(array: Array, split: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> Array:
    """`array` reshaped to `split`, its axes put in `order`, reshaped to `shape`; a view where it can be.

    Axes of length 1 are left out on the way, so that the split may have more axes than arrays can.
    """
    long = [axis for axis in range(len(split)) if split[axis] != 1]
    axes = [long.index(axis) for axis in order if split[axis] != 1]
    if axes == sorted(axes):
        return reshaped(array, tuple(shape))
    moved = reshaped(array, tuple(split[axis] for axis in long))
    return reshaped(array_namespace(array).permute_dims(moved, tuple(axes)), tuple(shape))


def interleaved(ndim: int) -> tuple[int, ...]:
    """The order that turns axes ``(a0, a1, .., b0, b1, ..)`` into ``(a0, b0, a1, b1, ..)``."""
    return tuple(axis for pair in zip(range(ndim), range(ndim, 2 * ndim), strict=True) for axis in pair)


def separated(ndim: int) -> tuple[int, ...]:
    """The order that turns axes ``(a0, b0, a1, b1, ..)`` into ``(a0, a1, .., b0, b1, ..)``."""
    return (*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2))


def paired(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """``(a0, b0, a1, b1, ..)``."""
    return tuple(n for pair in zip(first, second, strict=True) for n in pair)
