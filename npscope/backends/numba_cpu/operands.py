"""Leaves as kernels take them, and the pieces in which a call works them off."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np

from npscope.backends import threads
from npscope.backends.numba_cpu.codecs import Codec, codec
from npscope.backends.numba_cpu.vectors import (
    CHUNK,
    LANES,
    LINE,
    Format,
    format_of,
)
from npscope.dtypes import Kind, common_norm, kind_of
from npscope.options import thread_count, thread_limit
from npscope.tiling import MAX_NDIM, Cut, Dim, Leaf, Part, Parts

T = TypeVar("T")

PIECE_ELEMENTS = 1 << 18
"""Elements of a piece: 1 MiB of float32, so that it stays in a core's cache between its passes."""

PIECE_WORKSPACE = 7 << 20
"""Bytes of work arrays of a piece at most, so that a thread stays within 8 MiB whatever the blocks."""

BLOCK_WORKSPACE = 48
"""Bytes of work arrays for a block, unless said otherwise: sums, norm, key, threshold, factor, mask."""

SCOPE_BLOCKS, SCOPE_ELEMENTS = 1 << 17, 1 << 22
"""A scope up to this size is decided in one piece, which takes a few milliseconds; larger ones are spread."""

SCOPE_BYTES = 3 << 20
"""Bytes of keys and masks of a scope up to which it is decided in one piece where no more is kept of its blocks."""

STRIPS_ELEMENTS = 1 << 20
"""Elements of a piece that one kernel works off strip by strip: 0.1 ms and more, so that pieces cost little."""

SOLVE_ELEMENTS = 1 << 17
"""Elements of a piece of which equations are solved, which takes ten times as long."""

SHAPED_ELEMENTS = 1 << 10
"""Elements from which kernels made for one shape of block or scope pay: compiling one takes half a second or more."""

ACROSS = 16
"""Scopes that must lie side by side to be read across: fewer do not fill a line."""

TILE_RUN = 16
"""Blocks in a row from which on a scope is read row by row: shorter ones are read with those of other scopes beside."""

PIECES_PER_THREAD = 4
"""Pieces that each thread gets at least, so that all finish together."""


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
    def compiled(self) -> Layout:
        """The layout whose kernels serve this one: one for all that have rows, and for all long runs that end alike.

        Rows of 4096 and of 14336 elements take half a second to compile only once.
        """
        run, rows = (2 * CHUNK + self.run % LANES, 1) if self.is_long else (self.run, min(self.rows, 2))
        return layout_of(self.form, self.codec, run, rows)


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
            array, place = self.array, self.place
            flags = array.flags
            if type(array) is np.ndarray and flags.writeable and flags.forc:
                self._buffer = array.ravel("K")
                if array.dtype != place.unit:
                    self._buffer = self._buffer.view(place.unit)
            else:
                address: int = array.__array_interface__["data"][0]
                self._buffer = np.asarray(_Memory(array, address + place.low, place.length, place.unit))
        return self._buffer

    def lines_hold(self, n: int) -> bool:
        """Whether blocks are single elements that lie line by line, and whole groups of n of them in each line."""
        return self.place.is_line_by_line and not self.bytewise and self.place.width % n == 0

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
            self._raw = self.buffer.view(_BYTE)
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


def workers_for(elements: int, piece: int = STRIPS_ELEMENTS) -> int:
    """Threads worth using for this many elements, of work that is done in pieces of up to `piece`: one for each half.

    To hand work to a thread and to wait for it was seen to cost 0.1 ms, about what half a piece takes: two
    threads were slower than one up to 2 MiB of float32 at 2:4, norms and rows, and as fast at 4 MiB.
    """
    worth = 2 * elements // piece
    if worth < 2:
        thread_limit()  # asked always, so that a bad setting never goes unnoticed
        return 1
    return min(worth, thread_count())


def piece_length(
    total: int, elements: int, workers: int, workspace: int, piece: int = PIECE_ELEMENTS, *, fixed: bool = False
) -> int:
    """Items (blocks or scopes of `elements` elements each, `workspace` bytes of work arrays) to a piece."""
    if workers == 1 and total * elements <= piece and total * workspace <= PIECE_WORKSPACE:
        return total
    limit = max(1, piece // max(1, elements))
    if workspace:
        limit = max(1, min(limit, PIECE_WORKSPACE // workspace))
    fair = -(-total // (workers * PIECES_PER_THREAD))
    return max(1, min(limit, fair) if workers > 1 and not fixed else limit)


def is_one_piece(total: int, elements: int, piece: int) -> bool:
    """Whether `total` items of `elements` elements each are worked off at once by the caller's thread."""
    return workers_for(total * elements, piece) == 1 and total * elements <= piece


def ranges(
    total: int,
    elements: int,
    make_work: Callable[[int, int], Callable[[int, int, int], None]],
    *,
    workspace: int = BLOCK_WORKSPACE,
    piece: int = PIECE_ELEMENTS,
    shielded: bool = False,
    fixed: bool = False,
) -> Callable[[], None]:
    """A job that works off [0, total), items of `elements` elements each, in ranges on the pool.

    ``make_work(slots, length)`` allocates for that many threads and ranges up to that length, now,
    and returns ``work(slot, start, stop)``. So a writer has all its memory before it starts. `workspace`
    is the bytes of work arrays for one item, `piece` the elements of a range; writers of blocks with several
    leaves are `shielded`. `fixed` ranges are the same for any number of threads.
    """
    if total == 0:
        return lambda: None
    workers = workers_for(total * elements, piece)
    length = piece_length(total, elements, workers, workspace, piece, fixed=fixed)
    if length >= total and not shielded:
        all_of_it = make_work(1, total)
        return lambda: all_of_it(0, 0, total)
    pieces = -(-total // length)
    work = make_work(min(workers, pieces), min(length, total))

    def use(slot: int, p: int) -> None:
        work(slot, p * length, min(total, (p + 1) * length))

    return lambda: threads.run(pieces, use, workers, shielded=shielded)
