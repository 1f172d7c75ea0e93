"""Norms of blocks, and what is made of them block by block, into tables on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from npscope.backends.cupy_gpu.modules import FAST, RUNS, blocks_for, element_of, launch
from npscope.backends.cupy_gpu.operands import (
    Array,
    Blocks,
    Operand,
    Struct,
    code_of,
    grid_of,
    leaves_struct,
    memory_order,
    nest,
    numbers,
    operands,
    struct,
)
from npscope.dtypes import kind_of
from npscope.tiling import Cut, Leaf, Parts

ORDERS = {1.0: 0, 2.0: 1, math.inf: 2}
LARGEST, POWER = 2, 3
NORM, FACTOR = 0, 1

MEASURE = np.dtype(
    [
        ("order", np.int32),
        ("exact", np.int32),
        ("narrow", np.int32),
        ("output", np.int32),
        ("wide_output", np.int32),
        ("p", np.float64),
    ],
    align=True,
)

CHUNK = 1 << 16
"""Elements of one partial sum; blocks of two and more are cut where blocks alone would not fill the card."""

FEW_BLOCKS = 1024
"""Thread blocks that fill a large card."""

THREAD_ELEMENTS, WARP_ELEMENTS = 32, 4096
"""Blocks up to this size are measured by one thread, by one warp; larger ones by a thread block."""

PLAIN_ELEMENTS = 1024
"""Terms that a plain float64 sum may have and still be good to 2**-42."""

TEAM_TILES = 4
"""Tiles that a team of lanes measures at once."""

MATRIX = np.dtype([("tiles", np.int64), ("columns", np.int64), ("pitch", np.int64), ("rows", np.int32)], align=True)


class Tiles(NamedTuple):
    """A leaf whose blocks are tiles of dense rows, side by side: what tiles.cu takes."""

    run: int
    element: int
    itemsize: int
    matrix: Struct
    rows: int
    columns: int
    pitch: int
    address: int

    @property
    def vector(self) -> int:
        """Bytes that a lane reads at once."""
        return min(16, self.run * self.itemsize)

    @property
    def team(self) -> int:
        """Lanes that own a tile."""
        return self.run * self.itemsize // self.vector

    @property
    def in_vectors(self) -> bool:
        """Whether every vector of every row is aligned."""
        return self.run > 1 and self.address % self.vector == 0 and self.pitch * self.itemsize % self.vector == 0

    @property
    def pointer(self) -> np.uint64:
        """The first tile, as an argument."""
        return np.uint64(self.address)

    def aligned(self, size: int) -> bool:
        """Whether every row, and every `size` bytes of a row of tiles, starts at a multiple of `size`."""
        width = self.columns * self.run * self.itemsize
        return self.address % size == 0 and self.pitch * self.itemsize % size == 0 and width % size == 0


def tiles_of(leaf: Leaf) -> Tiles | None:
    """The leaf as a matrix of tiles, if it is one."""
    array = leaf.array
    tiles = _tiles(leaf.cut, array.strides, array.dtype)
    return None if tiles is None else tiles._replace(address=array.data.ptr)


@lru_cache(maxsize=2048)
def _tiles(cut: Cut, strides: tuple[int, ...], dtype: np.dtype) -> Tiles | None:
    name, item = kind_of(dtype).name, dtype.itemsize
    if name not in FAST or cut.elements > PLAIN_ELEMENTS:
        return None
    elements = nest(memory_order(cut, strides), strides)
    run = 1
    if elements and elements[-1][1] == item:
        run, elements = elements[-1][0], elements[:-1]
    if run not in RUNS or len(elements) > 1:
        return None
    rows, pitch = elements[0] if elements else (1, 0)
    grid = nest(cut.scope + cut.block, strides) or ((1, run * item),)
    columns, step = grid[-1]
    if len(grid) > 2 or (step != run * item and columns > 1):
        return None
    if len(grid) == 2:
        if rows == 1:
            pitch = grid[0][1]
        elif grid[0][1] != rows * pitch:
            return None
    if pitch % item:
        return None
    tiles = cut.scopes * cut.blocks
    matrix = struct(MATRIX, tiles=tiles, columns=columns, pitch=pitch // item, rows=rows)
    return Tiles(run, code_of(dtype), item, matrix, rows, columns, pitch // item, 0)


def measure(part: Blocks, ord: float, output: int, wide: bool) -> Struct:
    """How a part is measured: that of one element is its magnitude, whatever the order."""
    order = LARGEST if part.single else ORDERS.get(ord, POWER)
    return struct(MEASURE, order=order, exact=part.exact, narrow=part.narrow, output=output, wide_output=wide, p=ord)


def lanes_for(part: Operand) -> int:
    """Threads that own a block. Where blocks lie side by side and their elements apart, one: neighbours share lines."""
    leaf = part.part[0]
    strides, item = leaf.array.strides, leaf.array.dtype.itemsize
    grid, elements = grid_of(leaf), nest(memory_order(leaf.cut, strides), strides)
    across = bool(grid and elements) and grid[-1][1] == item and elements[-1][1] != item and part.total >= CHUNK
    return 1 if across else lanes_of(part.elements)


def lanes_of(elements: int) -> int:
    """Threads that own a block of so many elements, which lie side by side."""
    if elements <= THREAD_ELEMENTS:
        return 1
    return 32 if elements <= WARP_ELEMENTS else 256


def measure_part(
    part: Operand, ord: float, table: Array, start: int, output: int = NORM, thresholds: Leaf | None = None
) -> None:
    """Norms (or factors) of a part into columns of a table from `start` on."""
    if part.total == 0:
        return
    if output == NORM and start == 0 and table.shape[1] == part.cut.blocks and _measure_tiles(part, ord, table):
        return
    how = measure(part, ord, output, table.dtype == np.float64)
    lanes, element = lanes_for(part), element_of(part.names)
    leaves, kept = leaves_struct(part.structs)
    limits, kept_numbers = numbers(thresholds)
    counts = np.int64(part.cut.scopes), np.int64(part.cut.blocks)
    chunks, partials = 0, None
    if lanes == 256 and part.total < FEW_BLOCKS and part.elements >= 2 * CHUNK and how["order"][0] != POWER:
        chunks = -(-part.elements // CHUNK)
        partials = cupy.empty((part.total, chunks, 3), np.float64)
        launch(
            "norms.cu", "partial_sums", part.total * chunks, (leaves, how, *counts, np.int64(chunks), partials),
            ELEMENT=element, LANES=lanes,
        )  # fmt: skip
    launch(
        "norms.cu",
        "norms",
        blocks_for(part.total * lanes),
        (leaves, how, limits, *counts, np.int64(table.shape[1]), np.int64(start), partials, np.int64(chunks), table),
        ELEMENT=element,
        LANES=lanes,
    )
    del kept, kept_numbers


def _measure_tiles(part: Operand, ord: float, table: Array) -> bool:
    """Norms of tiles by their own kernels, where they have any."""
    tiles = tiles_of(part.part[0]) if len(part.part) == 1 and ord in ORDERS and table.dtype == np.float32 else None
    if tiles is None or part.single:
        return False
    order = np.int32(ORDERS[ord])
    macros = {"ELEMENT": tiles.element, "RUN": tiles.run}
    if tiles.vector < 16 and (tiles.rows > 1 or tiles.run == 1) and tiles.aligned(16):
        launch(
            "tiles.cu", "narrow_norms", blocks_for(part.total * tiles.vector // 16),
            (tiles.pointer, tiles.matrix, order, table), **macros,
        )  # fmt: skip
        return True
    if not tiles.in_vectors:
        return False
    args = tiles.pointer, tiles.matrix, order, table
    if tiles.rows == 1:
        launch("tiles.cu", "run_norms", blocks_for(-(-part.total // TEAM_TILES) * tiles.team), args, **macros)
    else:
        launch("tiles.cu", "tile_norms", blocks_for(part.total * tiles.team), args, **macros)
    return True


def norm_table(parts: Sequence[Operand], ord: float, out: Array | None = None) -> Array:
    """``(S, n)`` norms of all parts side by side."""
    if out is None:
        shape = parts[0].cut.scopes, sum(part.cut.blocks for part in parts)
        out = cupy.empty(shape, np.float32 if all(part.narrow for part in parts) else np.float64)
    start = 0
    for part in parts:
        measure_part(part, ord, out, start)
        start += part.cut.blocks
    return out


def norms(parts: Parts, ord: float | None, out: Any = None) -> Array:
    """Norm of every block: ``(S, n)`` in the norm's dtype, in `out` if given."""
    return norm_table(operands(parts), float(ord or 2), out)
