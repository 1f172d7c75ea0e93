"""Leaves as kernels take them, and the pieces in which a call works them off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from npscope.backends import threads
from npscope.backends.numba_cpu.codecs import Codec, codec
from npscope.backends.numba_cpu.lanes import CHUNK, Format, format_of
from npscope.dtypes import common_norm, kind_of
from npscope.options import thread_count
from npscope.tiling import Cut, Dim, Leaf, Part

PIECE_ELEMENTS = 1 << 18
"""Elements of a piece: 1 MiB of float32, so that it stays in a core's cache between its passes."""

PIECE_WORKSPACE = 7 << 20
"""Bytes of work arrays of a piece at most, so that a thread stays within 8 MiB whatever the blocks."""

BLOCK_WORKSPACE = 48
"""Bytes of work arrays for a block, unless said otherwise: sums, norm, key, threshold, factor, mask."""

SCOPE_BLOCKS, SCOPE_ELEMENTS = 1 << 17, 1 << 22
"""A scope up to this size is decided in one piece, which takes a few milliseconds; larger ones are spread."""

STRIPS_ELEMENTS = 1 << 20
"""Elements of a piece that one kernel works off strip by strip: 0.1 ms and more, so that pieces cost little."""

SERIAL_ELEMENTS = 1 << 16
"""Below this many elements a call is about 0.1 ms of work and runs in the calling thread."""

PIECES_PER_THREAD = 4
"""Pieces that each thread gets at least, so that all finish together."""


class _Memory:
    """Raw memory as a flat writable buffer: one kernel signature, whatever flags and strides an array has."""

    def __init__(self, owner: np.ndarray, address: int, length: int, unit: np.dtype) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (length,),
            "typestr": unit.str,
            "version": 3,
        }


@lru_cache(maxsize=4096)
def _nest(dims: tuple[Dim, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Loops over axes with these strides as a (sizes, strides) table; loops that continue each other are one."""
    merged: list[tuple[int, int]] = []
    for dim in dims:
        size, stride = dim.size, dim.step * strides[dim.axis]
        if merged and merged[-1][1] == stride * size:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return np.asarray(merged or [(1, 0)], dtype=np.int64).T.copy()


@dataclass(frozen=True)
class Layout:
    """Blocks that follow each other in memory: each is `rows` runs of `run` adjacent elements."""

    form: Format
    codec: Codec
    run: int
    rows: int

    @property
    def steps(self) -> int:
        """Additions in sequence for one block, where a step takes `CHUNK` elements."""
        return self.rows * -(-self.run // CHUNK)


class Operand:
    """A leaf as kernels see it: flat buffer, origin, and the loop tables of its grid and its elements.

    Operands that a kernel reads side by side must have their elements in one order: `like` another.
    """

    def __init__(self, leaf: Leaf, like: Operand | None = None) -> None:
        array: np.ndarray = leaf.array
        dtype = array.dtype
        kind = None if dtype == np.bool_ else kind_of(dtype)
        address: int = array.__array_interface__["data"][0]
        strides, itemsize = array.strides, dtype.itemsize
        reach = [(n - 1) * s for n, s in zip(array.shape, strides, strict=True)] if array.size else []
        low = sum(r for r in reach if r < 0)
        high = sum(r for r in reach if r > 0) + (itemsize if array.size else 0)
        scalar = itemsize // 2 if kind is not None and kind.is_complex else itemsize
        bytewise = not (
            dtype.isnative
            and (address + low) % scalar == 0
            and all(s % scalar == 0 for n, s in zip(array.shape, strides, strict=True) if n > 1)
        )
        self.kind, self.bytewise = kind, bytewise
        self.codec: Codec | None = None if kind is None else codec(kind, bytewise, not dtype.isnative)
        unit = np.dtype(np.bool_) if self.codec is None else self.codec.unit
        self.buffer = np.asarray(_Memory(array, address + low, (high - low) // unit.itemsize, unit))
        self.origin = -low // unit.itemsize
        steps = tuple(s // unit.itemsize for s in strides)
        cut = leaf.cut
        # Elements of a block may come in any order, so the order of memory: contiguous innermost.
        by_memory = tuple(sorted(cut.element, key=lambda d: -abs(d.step * steps[d.axis])))
        self.order: tuple[Dim, ...] = like.order if like else by_memory
        self.elements = _nest(self.order, steps)
        self.grid = _nest((*cut.scope, *cut.block), steps)
        self.steps, self.cut = steps, cut
        self.size = cut.elements

    @cached_property
    def layout(self) -> Layout | None:
        """How the blocks lie in memory, if they can be taken line by line."""
        form = None if self.kind is None or self.bytewise else format_of(self.kind)
        if form is None or self.codec is None or self.size == 0:
            return None
        sizes, strides = self.elements
        run = int(sizes[-1]) if strides[-1] == 1 and sizes[-1] > 1 else 1
        width, step = int(self.grid[0, -1]), int(self.grid[1, -1])
        return Layout(form, self.codec, run, self.size // run) if step == run or width == 1 else None

    @property
    def is_one_number(self) -> bool:
        """Whether all entries are one and the same."""
        return not any(self.grid[1])

    @property
    def where(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """The leading arguments of a kernel."""
        return self.buffer, self.origin, self.grid, self.elements


class Competitors:
    """The blocks of one part: its operands, and how its blocks are measured."""

    def __init__(self, part: Part) -> None:
        kinds = [kind_of(leaf.array.dtype) for leaf in part]
        self.leaves = [Operand(leaf) for leaf in part]
        self.cut: Cut = part[0].cut
        self.blocks = self.cut.blocks
        self.total = self.cut.scopes * self.cut.blocks
        self.elements = sum(leaf.size for leaf in self.leaves)
        self.norm = np.dtype(common_norm(kinds))
        self.spans_leaves = len(part) > 1
        self.exact = all(kind.rounds_correctly for kind in kinds)
        self.wide_integers = all(kind.is_wide_integer for kind in kinds)


def competitors(parts: Sequence[Part]) -> list[Competitors]:
    """The parts of a problem as kernels see them."""
    return [Competitors(part) for part in parts]


def workers_for(elements: int) -> int:
    """Threads worth using for this many elements."""
    count = thread_count()  # asked always, so that a bad setting never goes unnoticed
    return 1 if elements < SERIAL_ELEMENTS else count


def piece_length(total: int, elements: int, workers: int, workspace: int, piece: int = PIECE_ELEMENTS) -> int:
    """Items (blocks or scopes of `elements` elements each, `workspace` bytes of work arrays) to a piece."""
    limit = max(1, piece // max(1, elements))
    if workspace:
        limit = max(1, min(limit, PIECE_WORKSPACE // workspace))
    fair = -(-total // (workers * PIECES_PER_THREAD))
    return max(1, min(limit, fair) if workers > 1 else limit)


def ranges(
    total: int,
    elements: int,
    make_work: Callable[[int, int], Callable[[int, int, int], None]],
    *,
    workspace: int = BLOCK_WORKSPACE,
    piece: int = PIECE_ELEMENTS,
    shielded: bool = False,
) -> Callable[[], None]:
    """A job that works off [0, total), items of `elements` elements each, in ranges on the pool.

    ``make_work(slots, length)`` allocates for that many threads and ranges up to that length, now,
    and returns ``work(slot, start, stop)``. So a writer has all its memory before it starts. `workspace`
    is the bytes of work arrays for one item, `piece` the elements of a range; writers of blocks with several
    leaves are `shielded`.
    """
    if total == 0:
        return lambda: None
    workers = workers_for(total * elements)
    length = piece_length(total, elements, workers, workspace, piece)
    pieces = -(-total // length)
    work = make_work(min(workers, pieces), length)

    def use(slot: int, p: int) -> None:
        work(slot, p * length, min(total, (p + 1) * length))

    return lambda: threads.run(pieces, use, workers, shielded=shielded)
