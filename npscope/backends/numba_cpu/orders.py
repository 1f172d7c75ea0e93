"""The order in which loops over scopes and blocks are taken: that of memory, where results do not depend on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from npscope.tiling import Cut, Dim, Leaf, Parts


def _order(nest: tuple[Dim, ...], strides: tuple[int, ...]) -> list[int]:
    """The loops of a nest, the longest steps first."""
    return sorted(range(len(nest)), key=lambda d: -abs(nest[d].step * strides[nest[d].axis]))


def _with_scopes(leaf: Leaf, order: list[int]) -> Leaf:
    cut = leaf.cut
    return Leaf(leaf.array, Cut.of([cut.scope[d] for d in order], cut.block, cut.element), leaf.origin)


def outermost_axis(array: np.ndarray) -> int:
    """The axis of the longest steps in memory, of an array that has axes."""
    return max(range(array.ndim), key=lambda i: abs(array.strides[i]) if array.shape[i] > 1 else 0)


def in_memory_order(target: Parts, source: Parts, numbers: Leaf) -> tuple[Parts, Parts, Leaf]:
    """The same problem, its scopes taken in the order in which the first written array lies in memory."""
    first = target[0][0]
    order = _order(first.cut.scope, first.array.strides)
    if order == sorted(order):
        return target, source, numbers

    def each(parts: Parts) -> Parts:
        return tuple(tuple(_with_scopes(leaf, order) for leaf in part) for part in parts)

    return each(target), each(source), _with_scopes(numbers, order)


def scopes_in_memory_order(parts: Parts, numbers: Leaf) -> tuple[Parts, Leaf, Callable[[np.ndarray], np.ndarray]]:
    """As `in_memory_order`, for what is read; and how results, one or a row for each scope, come into the order before.

    A copy of them, where there was another.
    """
    scope = parts[0][0].cut.scope
    reordered, _, numbers_too = in_memory_order(parts, parts, numbers)
    order = [reordered[0][0].cut.scope.index(dim) for dim in scope]
    if order == sorted(order):
        return parts, numbers, lambda results: results

    def as_before(results: np.ndarray) -> np.ndarray:
        rest = results.shape[1:]
        table = results.reshape(*[dim.size for dim in reordered[0][0].cut.scope], *rest)
        axes = [*order, *range(len(order), table.ndim)]
        return np.ascontiguousarray(table.transpose(axes)).reshape(-1, *rest)

    return reordered, numbers_too, as_before


@lru_cache(maxsize=2048)
def table_cut(cut: Cut) -> Cut:
    """The cut of an ``(S, n)`` table, of an entry for each block, by the same loops over scopes and blocks."""
    scope, block = (
        [Dim(axis, dim.size, math.prod(inner.size for inner in nest[d + 1 :])) for d, dim in enumerate(nest)]
        for axis, nest in enumerate((cut.scope, cut.block))
    )
    return Cut.of(scope, block, ())


def blocks_in_memory_order(leaf: Leaf, *, scopes: bool = True) -> Callable[[Leaf], Leaf]:
    """What takes the blocks of this leaf, and those of others with them, in the order in which this one lies in memory.

    And the `scopes`. Only these are reordered where the other has no blocks, but numbers over scopes. For what is done
    block by block, or does not depend on positions.
    """
    orders = [_order(nest, leaf.array.strides) for nest in (leaf.cut.scope, leaf.cut.block)]
    if not scopes:
        orders[0].sort()
    if all(order == sorted(order) for order in orders):
        return as_it_is

    def reordered(other: Leaf) -> Leaf:
        scope, block = (
            [nest[d] for d in order] if nest else nest
            for nest, order in zip((other.cut.scope, other.cut.block), orders, strict=True)
        )
        return Leaf(other.array, Cut.of(scope, block, other.cut.element), other.origin)

    return reordered


class Positions:
    """Where in a scope of `plain` blocks are that are numbered by `cut`, whose loops are the same in another order.

    In an outermost loop of `plain`, the number of its turn comes first: of each `inner` blocks of `cut` it is the same,
    and after `turns` times as many it starts anew.
    """

    def __init__(self, cut: Cut, plain: Cut) -> None:
        self._loops = [
            (dim.size, math.prod(inner.size for inner in plain.block[plain.block.index(dim) + 1 :]))
            for dim in reversed(cut.block)
        ]
        outer = cut.block.index(plain.block[0]) if plain.block else 0
        self.inner = math.prod(dim.size for dim in cut.block[outer + 1 :])
        self.turns = plain.block[0].size if plain.block else 1

    def of(self, blocks: np.ndarray) -> np.ndarray:
        """The positions of these blocks."""
        found = np.zeros_like(blocks)
        for size, step in self._loops:
            blocks, turn = np.divmod(blocks, size)
            found += turn * step
        return found


def as_it_is(leaf: Leaf) -> Leaf:
    """The leaf."""
    return leaf
