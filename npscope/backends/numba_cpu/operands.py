"""How leaves lie in memory, and what kernels take in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np

from npscope.backends.numba_cpu.codecs import Codec, codec
from npscope.backends.numba_cpu.orders import Positions
from npscope.backends.numba_cpu.rows import Runs
from npscope.backends.numba_cpu.vectors import CHUNK, LANES, LINE, Format, format_of
from npscope.dtypes import Kind, common_norm, kind_of
from npscope.tiling import MAX_NDIM, Cut, Dim, Leaf, Part, Parts

T = TypeVar("T")

SHAPED_ELEMENTS = 1 << 10
"""Elements from which kernels made for one shape of block or scope pay: compiling one takes half a second or more."""

ACROSS = 16
"""Scopes that must lie side by side to be read across: fewer do not fill a line."""

TILE_RUN = 16
"""Blocks in a row from which on a scope is read row by row: shorter ones are read with those of other scopes beside."""


class _Memory:
    """Raw memory as a flat writable buffer."""

    def __init__(self, owner: np.ndarray, address: int, length: int, unit: np.dtype) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (length,),
            "typestr": unit.str,
            "version": 3,
        }


def _nest(dims: tuple[Dim, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Loops over axes with these strides as a (sizes, strides) table; loops that continue each other are one."""
    merged: list[tuple[int, int]] = []
    for dim in dims:
        size, stride = dim.size, dim.step * strides[dim.axis]
        if merged and merged[-1][1] == stride * size:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return np.asarray(merged or [(1, 0)], dtype=np.int64).T.copy()


@dataclass(frozen=True, eq=False)
class Layout:
    """Blocks that follow each other in memory: each is `rows` runs of `run` adjacent elements."""

    form: Format
    codec: Codec
    run: int
    rows: int

    @property
    def is_long(self) -> bool:
        """Whether kernels ask the tables how long runs are, and how many, instead of being compiled for it."""
        return self.run > CHUNK

    @property
    def runs(self) -> Runs:
        """What is compiled for it: the same for all that have rows, and for all long runs that end alike.

        Rows of 4096 and of 14336 elements take half a second to compile only once.
        """
        long = self.is_long
        return Runs(self.run % LANES if long else self.run, long, self.rows == 1 and not long)


layout_of = cache(Layout)
"""One object for one layout, because kernels are found by it; each stands for kernels that are kept as well."""


class Placement:
    """How an array is cut, laid out and encoded: all that an operand is but its memory.

    A function of integers and a dtype (`placement`), made once for calls that look alike.
    """

    def __init__(
        self,
        cut: Cut,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: np.dtype,
        aligned: bool,
        order: tuple[Dim, ...] | None,
    ) -> None:
        self.shape, self.strides, self.dtype, self.aligned = shape, strides, dtype, aligned
        self.kind = None if dtype == np.bool_ else kind_of(dtype)
        self.bytewise = not (dtype.isnative and aligned)
        self.codec: Codec | None = None if self.kind is None else codec(self.kind, self.bytewise, not dtype.isnative)
        self.unit = np.dtype(np.bool_) if self.codec is None else self.codec.unit
        reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True)] if 0 not in shape else []
        self.low = sum(r for r in reach if r < 0)
        high = sum(r for r in reach if r > 0) + (0 if 0 in shape else dtype.itemsize)
        self.length = (high - self.low) // self.unit.itemsize
        self.origin = -self.low // self.unit.itemsize
        self.cut = cut
        self.steps = tuple(s // self.unit.itemsize for s in strides)
        # Elements of a block may come in any order, so the order of memory: contiguous innermost.
        self.order: tuple[Dim, ...] = order or tuple(
            sorted(cut.element, key=lambda d: -abs(d.step * self.steps[d.axis]))
        )
        self.elements = _nest(self.order, self.steps)
        self.grid = _nest((*cut.scope, *cut.block), self.steps)
        self.is_one_number = not self.grid[1].any()
        self.width = int(self.grid[0, -1])
        self.few = cut.scopes * cut.blocks * cut.elements < SHAPED_ELEMENTS
        self.nests = _nest(cut.scope, self.steps), _nest(cut.block, self.steps)
        # Loops over blocks that lie inside of the innermost one over scopes, if others lie outside.
        self.inner = self._inner()
        self.side_by_side = self._side_by_side()
        self.in_tiles = bool(self.inner) and not self._fills_lines()
        self.across = self.side_by_side and cut.elements == 1
        self.layout = self._layout()
        # Whether blocks are single elements, adjacent in each line; or of scopes side by side, adjacent in each row.
        self.is_line_by_line = cut.elements == 1 and (self.width == 1 or int(self.grid[1, -1]) == 1)
        self.lies_in_columns = self.across and int(self.nests[0][1, -1]) == 1

    def lines_hold(self, n: int) -> bool:
        """Whether blocks are single elements that lie line by line, and whole groups of n of them in each line."""
        return self.is_line_by_line and not self.bytewise and self.width % n == 0

    def _inner(self) -> tuple[int, ...]:
        if self.cut.blocks == 1 or self.few or not self.cut.scope:
            return ()
        scope, *loops = (abs(dim.step * self.steps[dim.axis]) for dim in (self.cut.scope[-1], *self.cut.block))
        inner = tuple(i for i, stride in enumerate(loops) if stride < scope)
        return inner if len(inner) < len(loops) and self.cut.scope[-1].size >= ACROSS else ()

    def _fills_lines(self) -> bool:
        """Whether blocks that follow each other in a scope are many in a row."""
        return len(self.cut.block) - 1 in self.inner and self.cut.block[-1].size >= TILE_RUN

    def _side_by_side(self) -> bool:
        """Whether scopes lie next to each other, and the blocks of each apart."""
        if self.cut.blocks == 1 or self.few:
            return False
        scopes, blocks = self.nests
        return bool(0 < abs(scopes[1, -1]) < abs(blocks[1, -1]) and scopes[0, -1] >= ACROSS)

    def in_reals(self, in_planes: bool = False) -> Placement | None:
        """The same memory, complex numbers as pairs of real ones along an axis more, where these lie line by line.

        Else None. `in_planes`: of complex64, also where the pairs lie so block by block.
        """
        if self.dtype.kind != "c" or len(self.shape) == MAX_NDIM:
            return None
        real = np.dtype(f"{self.dtype.byteorder}f{self.dtype.itemsize // 2}")
        cut = Cut.of(self.cut.scope, self.cut.block, (*self.cut.element, Dim(len(self.shape), 2, 1)))
        found = placement(cut, (*self.shape, 2), (*self.strides, real.itemsize), real, self.aligned, None)
        in_planes = in_planes and real.itemsize == 4 and found.side_by_side
        return None if (found.block_by_block if in_planes else found).layout is None else found

    def _loops(self) -> tuple[list[Dim], list[Dim]]:
        """Loops over blocks outside of those over scopes, and inside."""
        block = self.cut.block
        inner = [block[i] for i in self.inner]
        return [dim for i, dim in enumerate(block) if i not in self.inner], inner

    @cached_property
    def block_by_block(self) -> Placement:
        """The same, its blocks numbered in another order: the first of all scopes, then the second of all, ...

        Where some lie inside of scopes, those that do are one after another.
        """
        outer, inner = self._loops()
        return self.with_cut(Cut.of((*outer, *self.cut.scope, *inner), (), self.cut.element))

    def order_block_by_block(self) -> tuple[np.ndarray, int]:
        """The blocks of a scope in the order of `block_by_block`, and how many of them lie inside of scopes."""
        outer, inner = self._loops()
        order = Positions(Cut.of((), (*outer, *inner), ()), Cut.of((), self.cut.block, ()))
        return order.of(np.arange(self.cut.blocks)), math.prod(dim.size for dim in inner)

    def with_cut(self, cut: Cut) -> Placement:
        """The same array, cut in another way."""
        return placement(cut, self.shape, self.strides, self.dtype, self.aligned, None)

    def _layout(self) -> Layout | None:
        form = None if self.kind is None or self.bytewise else format_of(self.kind)
        if form is None or self.codec is None or self.cut.elements == 0:
            return None
        if self.few and self.cut.elements > 1:
            return None
        sizes, strides = self.elements
        run = int(sizes[-1]) if strides[-1] == 1 and sizes[-1] > 1 else 1
        width, step = int(self.grid[0, -1]), int(self.grid[1, -1])
        return layout_of(form, self.codec, run, self.cut.elements // run) if step == run or width == 1 else None


placement = lru_cache(maxsize=2048)(Placement)
"""The placement of an array with these facts."""


def place_of(leaf: Leaf, order: tuple[Dim, ...] | None = None) -> Placement:
    """The placement of a leaf."""
    array: np.ndarray = leaf.array
    return placement(leaf.cut, array.shape, array.strides, array.dtype, array.flags.aligned, order)


_BYTE = np.dtype(np.uint8)


class Operand:
    """A leaf as kernels see it: flat buffer, origin, and the loop tables of its grid and its elements.

    What is asked of most operands can be asked of them; all else that does not depend on memory, of their place.
    Operands that a kernel reads side by side must have their elements in one order: `like` another.
    """

    __slots__ = ("_buffer", "_raw", "array", "place")

    def __init__(self, array: np.ndarray, place: Placement) -> None:
        self.array, self.place = array, place
        self._buffer: np.ndarray | None = None
        self._raw: np.ndarray | None = None

    @classmethod
    def of(cls, leaf: Leaf, like: Operand | None = None) -> Operand:
        """The operand that a leaf is."""
        return cls(leaf.array, place_of(leaf, None if like is None else like.place.order))

    @property
    def kind(self) -> Kind | None:
        """The kind of its elements; None for bool."""
        return self.place.kind

    @property
    def codec(self) -> Codec | None:
        """How its elements are read and written; None for bool."""
        return self.place.codec

    @property
    def bytewise(self) -> bool:
        """Whether its elements are read byte by byte."""
        return self.place.bytewise

    @property
    def cut(self) -> Cut:
        """Its scopes, blocks and elements."""
        return self.place.cut

    @property
    def size(self) -> int:
        """Elements of a block."""
        return self.place.cut.elements

    @property
    def origin(self) -> int:
        """Where in the buffer its first element is."""
        return self.place.origin

    @property
    def grid(self) -> np.ndarray:
        """The loops over its blocks."""
        return self.place.grid

    @property
    def elements(self) -> np.ndarray:
        """The loops over the elements of a block."""
        return self.place.elements

    @property
    def layout(self) -> Layout | None:
        """How blocks follow each other in memory, if they do."""
        return self.place.layout

    @property
    def float_layout(self) -> Layout | None:
        """The layout of blocks of floats."""
        return None if self.layout is None or self.layout.form.is_integer else self.layout

    @property
    def buffer(self) -> np.ndarray:
        """The memory as one flat writable array: one kernel signature, whatever flags and strides the leaf has."""
        if self._buffer is None:
            self._buffer = self._flat(self.place.unit)
        return self._buffer

    def _flat(self, unit: np.dtype) -> np.ndarray:
        """The memory in other units."""
        array, flags = self.array, self.array.flags
        if type(array) is np.ndarray and flags.writeable and flags.forc:
            flat = array.ravel("K")
            return flat if flat.dtype == unit else flat.view(unit)
        place, address = self.place, array.__array_interface__["data"][0]
        length = place.length * place.unit.itemsize // unit.itemsize
        return np.asarray(_Memory(array, address + place.low, length, unit))

    @property
    def where(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """The leading arguments of a kernel."""
        place = self.place
        return self.buffer, place.origin, place.grid, place.elements

    @property
    def line(self) -> tuple[int, int]:
        """Units of the buffer that its first element lies past the start of a line of a cache, and that fill a line."""
        address: int = self.buffer.__array_interface__["data"][0]
        units = LINE // self.buffer.itemsize
        return (address // self.buffer.itemsize + self.origin) % units, units

    @property
    def raw(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """As `where`, for kernels that only hand it on to code at an address, which knows the dtype: in bytes.

        So one kernel serves all dtypes. The other numbers count in units of the buffer.
        """
        place = self.place
        return self._bytes(), place.origin, place.grid, place.elements

    @property
    def raw_across(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """As `raw`, of elements in scopes that lie side by side: loops over scopes, and over the blocks of one."""
        return self._bytes(), self.origin, *self.place.nests

    def _bytes(self) -> np.ndarray:
        if self._raw is None:
            self._raw = self._flat(_BYTE)
        return self._raw


def measure_of(places: Sequence[Placement]) -> tuple[np.dtype, bool, bool]:
    """(dtype of the norms, are they correctly rounded, are all 64-bit integers) of blocks of leaves placed so."""
    kinds = [kind_of(place.dtype) for place in places]
    return (
        np.dtype(common_norm(kinds)),
        all(kind.rounds_correctly for kind in kinds),
        all(kind.is_wide_integer for kind in kinds),
    )


def kept_for_one(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator of functions of placements first of all: results are kept for single ones.

    Tuples of many would be kept alive in many combinations.
    """

    @lru_cache(maxsize=2048)
    def of_one(place: Placement, *rest: Any) -> T:
        return function((place,), *rest)

    @wraps(function)
    def of_all(places: tuple[Placement, ...], *rest: Any) -> T:
        return of_one(places[0], *rest) if len(places) == 1 else function(places, *rest)

    return of_all


class _Facts(NamedTuple):
    """What `Competitors` knows of leaves, whatever their memory."""

    blocks: int
    total: int
    elements: int
    norm: np.dtype
    exact: bool
    wide_integers: bool


@kept_for_one
def _facts_of(places: tuple[Placement, ...]) -> _Facts:
    cut, elements = places[0].cut, sum(place.cut.elements for place in places)
    return _Facts(cut.blocks, cut.scopes * cut.blocks, elements, *measure_of(places))


class Competitors:
    """The blocks of one part: its operands, and how its blocks are measured."""

    __slots__ = (
        "blocks", "cut", "elements", "exact", "leaves", "norm", "places", "spans_leaves", "total", "wide_integers",
    )  # fmt: skip

    def __init__(self, leaves: Sequence[Operand]) -> None:
        self.leaves, self.places = leaves, tuple([leaf.place for leaf in leaves])
        self.cut, self.spans_leaves = self.places[0].cut, len(leaves) > 1
        facts = _facts_of(self.places)
        self.blocks, self.total, self.elements = facts.blocks, facts.total, facts.elements
        self.norm, self.exact, self.wide_integers = facts.norm, facts.exact, facts.wide_integers

    @classmethod
    def of(cls, part: Part) -> Competitors:
        """The blocks of this part."""
        return cls([Operand.of(leaf) for leaf in part])


COMPLEX = ("complex64", "complex128")


def in_reals(
    parts: Parts, ord: float | None, dtypes: Sequence[str] = COMPLEX, *, in_planes: bool = False
) -> tuple[Parts, float | None]:
    """The same elements, complex numbers of these dtypes as two real ones where these lie line by line; and their ord.

    Only if norms of order 2 of these are the same: for ord 2, and where all blocks are single elements, whose norm is
    their magnitude whatever the order. What reads lines of real numbers is written for vectors: single complex numbers
    took five times as long. `in_planes`: complex64 also where the pairs lie so block by block.
    """
    if ord is None or not any(leaf.array.dtype.kind == "c" for part in parts for leaf in part):
        return parts, ord  # asked by its kind: to form a name takes a tenth of a small call
    if ord != 2 and any(len(part) > 1 or part[0].cut.elements > 1 for part in parts):
        return parts, ord
    return tuple(tuple(_in_reals(leaf, dtypes, in_planes) for leaf in part) for part in parts), 2.0


def _in_reals(leaf: Leaf, dtypes: Sequence[str], in_planes: bool) -> Leaf:
    place = place_of(leaf).in_reals(in_planes) if leaf.array.dtype.name in dtypes else None
    if place is None:
        return leaf

    def pairs(array: np.ndarray) -> np.ndarray:
        real = array.real
        return np.lib.stride_tricks.as_strided(real, (*real.shape, 2), (*real.strides, real.itemsize))

    return Leaf(pairs(leaf.array), place.cut, None if leaf.origin is None else pairs(leaf.origin))


def competitors(parts: Sequence[Part]) -> list[Competitors]:
    """The parts of a problem as kernels see them."""
    return [Competitors.of(part) for part in parts]
