"""Operations that follow from others, for backends that have no kernels of their own for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npscope.axes import array_namespace
from npscope.dtypes import kind_of
from npscope.tiling import Leaf, Parts

Array = Any
Ord = float | None


def midpoint(kth: Callable[[Parts, Leaf, Ord], Array], parts: Parts, k: Leaf, weight: float, ord: Ord) -> Array:
    """`Backend.midpoint` by two searches."""
    upper, lower = (kth(parts, place, ord) for place in (k, following(k)))
    return _between(upper, lower, weight)


def following(k: Leaf) -> Leaf:
    """The places after these; where one place stands for many, so does the next."""
    array = k.array
    entries = array[tuple([slice(None) if step else slice(1) for step in array.strides])]
    return Leaf(array_namespace(array).broadcast_to(entries + 1, array.shape), k.cut)


def _between(upper: Array, lower: Array, weight: float) -> Array:
    xp, kind = array_namespace(upper), kind_of(upper.dtype)
    a, b = (xp.astype(v, xp.float64) for v in (upper, lower))
    with np.errstate(over="ignore", invalid="ignore"):
        if weight > 0:
            point = a / (1 + weight) + b * (weight / (1 + weight))
        else:  # beyond a: by halves, for what is added to b may be twice the largest number
            point = xp.where(xp.isinf(a), a, 2 * (b / 2 + (a / 2 - b / 2) / (1 + weight)))
        point = xp.where((a == b) | (weight == 0), a, point)
        point = xp.astype(point, getattr(xp, kind.norm))
        return point if kind.is_integer else xp.astype(point, upper.dtype)


def element_masks(
    prune: Callable[[Parts, Parts, Leaf, Ord], Sequence[Array]], parts: Parts, keep: Leaf, ord: Ord
) -> Sequence[Array]:
    """`Backend.element_masks`: ones of which the dropped blocks are zeroed."""
    ones = tuple(tuple(Leaf(_ones(leaf.array), leaf.cut) for leaf in part) for part in parts)
    marks = prune(ones, parts, keep, ord)
    return [_as_flags(mark) for mark in marks]


def _as_flags(mark: Array) -> Array:
    """Ones and zeros as bools: the same memory, where it is memory with strides."""
    return (
        mark.view(np.bool_)
        if hasattr(mark, "strides")
        else array_namespace(mark).astype(mark, array_namespace(mark).bool)
    )


def _ones(array: Array) -> Array:
    """Ones of the shape of an array, beside it."""
    xp = array_namespace(array)
    return xp.ones(tuple(array.shape), dtype=xp.uint8, device=array.device)
