"""Integer geometry: how an axis is tiled, and how an array is cut into scopes, blocks and elements.

A block tiling of an array and a scope tiling of a block grid are the same thing,
a `Tiling`. Composing the two gives a `Cut`: three loop nests over the axes of one
array. Nothing here knows an array library, a stride or a dtype, so one cut serves
every backend, layout and view, and equal cuts can be shared.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from npscope.errors import CouplingError, KindError, SpecError

MAX_NDIM = 64
"""Axes an array may have: NumPy's own limit."""

MAX_SIZE = 2**62
"""Elements no array can have."""


def as_int(value: Any, what: str) -> int:
    """The integer `value`, NumPy integers included; bool, float and str are KindError."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or type(value).__name__ == "bool":
        raise KindError(f"{what} must be an integer, not the bool {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise KindError(f"{what} must be an integer, not {type(value).__name__} {value!r}") from None


_INTEGERS = {int}
"""The type that needs no conversion; a bool is of another one."""


def as_ints(values: Any, what: str) -> tuple[int, ...]:
    """The integers of a tuple, list or other sequence."""
    if type(values) is tuple and _INTEGERS.issuperset(map(type, values)):
        return values
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise KindError(f"{what} must be a tuple of integers, not {type(values).__name__} {values!r}")
    return tuple(as_int(v, f"{what}[{i}]") for i, v in enumerate(values))


def _tile_axis(axis: int, size: int, tile: int, noun: str) -> int:
    if tile == -1:
        return max(1, size)
    if tile < 1:
        raise SpecError(f"{noun} size {tile} for axis {axis} must be at least 1, or -1 for the whole axis")
    if tile > MAX_SIZE:
        raise SpecError(f"{noun} size {tile} for axis {axis} is larger than any array")
    if size % tile:
        below, above = size - size % tile, size - size % tile + tile
        nearest = f"{below}, {above}" if below else f"{above}"
        raise SpecError(f"axis {axis} has size {size}, not a multiple of {noun} size {tile} (nearest: {nearest})")
    return tile


@dataclass(frozen=True, slots=True)
class Tiling:
    """A shape cut into equal tiles: ``shape[i] == grid[i] * tile[i]`` on every axis.

    >>> Tiling.of((6, 8), (2, -1), noun="block")
    Tiling(shape=(6, 8), tile=(2, 8), grid=(3, 1))
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    grid: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], tile: Any, *, noun: str) -> Tiling:
        """The tiling of `shape` by `tile`; -1 is a whole axis, ``()`` is handled by the caller.

        SpecError when lengths differ or a size does not divide its axis, KindError for non-integers.
        """
        sizes = as_ints(tile, f"{noun} shape")
        if len(shape) > MAX_NDIM:
            raise SpecError(f"{len(shape)} axes, at most {MAX_NDIM} are supported")
        if len(sizes) != len(shape):
            raise SpecError(f"{noun} shape {sizes} has {len(sizes)} axes, {shape} has {len(shape)}")
        tiles = tuple(_tile_axis(i, n, t, noun) for i, (n, t) in enumerate(zip(shape, sizes, strict=True)))
        return cls(shape, tiles, tuple(n // t for n, t in zip(shape, tiles, strict=True)))

    @classmethod
    def blocks(cls, shape: tuple[int, ...], tile: Any) -> Tiling:
        """The tiling of an array by blocks; ``()`` is one element a block."""
        sizes = as_ints(tile, "block shape")
        return cls.of(shape, sizes or (1,) * len(shape), noun="block")

    @classmethod
    def scopes(cls, grid: tuple[int, ...], tile: Any) -> Tiling:
        """The tiling of a block grid by scopes; missing trailing axes are whole axes."""
        sizes = as_ints(tile, "scope shape")
        return cls.of(grid, sizes + (-1,) * (len(grid) - len(sizes)), noun="scope")


def as_orders(orders: Any, ndims: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """One permutation of axes for each part, negative axes normalised; ``()`` is "as they stand"."""
    if not hasattr(orders, "__iter__") or isinstance(orders, str | bytes):
        raise KindError(f"orders must be a tuple of axis orders, not {type(orders).__name__} {orders!r}")
    given = tuple(orders)
    if not given:
        return tuple(tuple(range(n)) for n in ndims)
    if len(given) != len(ndims):
        raise CouplingError(f"{len(given)} orders for {len(ndims)} parts; give one for each part, or ()")
    result = []
    for part, (order, ndim) in enumerate(zip(given, ndims, strict=True)):
        axes = as_ints(order, f"orders[{part}]") or tuple(range(ndim))
        if any(not -ndim <= a < ndim for a in axes):
            raise CouplingError(f"orders[{part}] = {axes} names an axis outside the {ndim} axes of that part")
        axes = tuple(a % ndim for a in axes)
        if sorted(axes) != list(range(ndim)):
            raise CouplingError(f"orders[{part}] = {axes} is no permutation of the {ndim} axes of that part")
        result.append(axes)
    return tuple(result)


def permuted(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with its axes in `order`."""
    return tuple(shape[a] for a in order)


class Dim(NamedTuple):
    """One loop: `size` steps along array axis `axis`, each of `step` elements of that axis."""

    axis: int
    size: int
    step: int


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """One array as three loop nests: over scopes, over the blocks of a scope, over the elements of a block.

    The address of an element is the sum over all loops of ``index * step * stride[axis]``:
    that is the whole of views, blocks, scopes and orders. Loops of length 1 are left out.

    Fields: `scope`, `block`, `element` (tuples of `Dim`, outermost first) and the counts
    `scopes`, `blocks` (per scope) and `elements` (per block). Cuts are compared by identity, so that
    what is derived from one is found fast: make them by `of`, which hands out one object for one geometry.
    """

    scope: tuple[Dim, ...]
    block: tuple[Dim, ...]
    element: tuple[Dim, ...]
    scopes: int
    blocks: int
    elements: int

    @classmethod
    def of(cls, scope: Sequence[Dim], block: Sequence[Dim], element: Sequence[Dim]) -> Cut:
        """The cut with these loops, in this order."""
        return _cut(tuple(scope), tuple(block), tuple(element))


@lru_cache(maxsize=4096)
def _cut(*loops: tuple[Dim, ...]) -> Cut:
    nests = [tuple(d for d in nest if d.size != 1) for nest in loops]
    counts = [math.prod(d.size for d in nest) for nest in nests]
    return Cut(nests[0], nests[1], nests[2], counts[0], counts[1], counts[2])


@lru_cache(maxsize=4096)
def cut(
    block: Tiling,
    scope: Tiling,
    block_order: tuple[int, ...],
    scope_order: tuple[int, ...],
) -> Cut:
    """The cut of one array by `block`, its grid in `block_order` by `scope`, scopes in `scope_order`.

    `block` tiles the array. ``block_order[j]`` is the array axis that stands at axis j of the
    (aligned) block grid, which `scope` tiles. ``scope_order[m]`` is the grid axis that stands
    at axis m of the (aligned) scope grid.
    """
    axes = block_order
    scopes = [Dim(axes[j], scope.grid[j], scope.tile[j] * block.tile[axes[j]]) for j in scope_order]
    blocks = [Dim(axes[j], scope.tile[j], block.tile[axes[j]]) for j in range(len(axes))]
    elements = [Dim(a, block.tile[a], 1) for a in range(len(block.tile))]
    return Cut.of(scopes, blocks, elements)


@lru_cache(maxsize=4096)
def array_cut(
    shape: tuple[int, ...], block: tuple[int, ...], scope: tuple[int, ...] = ()
) -> tuple[Cut, Tiling, Tiling]:
    """(cut, block tiling, scope tiling) of an array of this shape, as it stands.

    Equal numbers of other types are one key here, so the caller makes integers of them before (`as_ints`).
    """
    blocks = Tiling.blocks(shape, block)
    scopes = Tiling.scopes(blocks.grid, scope)
    axes = tuple(range(len(shape)))
    return cut(blocks, scopes, axes, axes), blocks, scopes


@lru_cache(maxsize=4096)
def scope_grid_cut(shape: tuple[int, ...]) -> Cut:
    """The cut of a bare grid of numbers, each entry a scope."""
    return array_cut(shape, (), (1,) * len(shape))[0]


@lru_cache(maxsize=4096)
def block_grid_cut(shape: tuple[int, ...]) -> Cut:
    """The cut of a bare grid of numbers, all of them the blocks of one scope."""
    return array_cut(shape, ())[0]


@lru_cache(maxsize=4096)
def axis_cut(shape: tuple[int, ...], axis: int | None) -> Cut:
    """The cut in which the entries along `axis` are the 1-element blocks of one scope; None takes all axes."""
    along = [Dim(i, n, 1) for i, n in enumerate(shape) if axis is None or i == axis]
    across = [Dim(i, n, 1) for i, n in enumerate(shape) if axis is not None and i != axis]
    return Cut.of(across, along, ())


@dataclass(slots=True, eq=False)
class Leaf:
    """One array and its cut: all that a backend needs to know of an operand.

    Written leaves may have an `origin`: the array (cut alike) that holds the elements as they were.
    """

    array: Any
    cut: Cut
    origin: Any = None


Part = tuple[Leaf, ...]
"""Leaves whose elements join into one block, block by block: same scopes and blocks, own elements."""

Parts = tuple[Part, ...]
"""Parts whose blocks compete: same scopes; the blocks of a scope stand side by side in this order."""
