"""Ranking: from parts and a count to the cut of every scope, decided on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from npscope.backends import derived
from npscope.backends.cupy_gpu.modules import (
    ANY,
    DTYPES,
    ROW_KEYS,
    THREADS,
    blocks_for,
    element_of,
    is_dense_pair,
    launch,
)
from npscope.backends.cupy_gpu.norms import measure_part
from npscope.backends.cupy_gpu.operands import (
    LEAF,
    Array,
    Blocks,
    Operand,
    Struct,
    code_of,
    leaf_on_device,
    leaf_struct,
    leaf_template,
    nest,
    numbers,
    operands,
    require_current,
    struct,
    table_cut,
    table_on_device,
    word_of,
)
from npscope.dtypes import common_norm
from npscope.tiling import Cut, Leaf, Parts

MAGNITUDE, SIGNED, INTEGER = 0, 1, 2

SOURCE = np.dtype([("start", np.int64), ("blocks", np.int64), ("leaf", LEAF)], align=True)
SOURCES = np.dtype(
    [("count", np.int32), ("kind", np.int32), ("blocks", np.int64), ("more", np.uint64), ("first", SOURCE)], align=True
)

POINTER = word_of(SOURCES, "first", "leaf", "data")
"""The word of the only source's address."""

ROW_BLOCKS = 32 * max(ROW_KEYS)
"""Scopes up to this many blocks are ranked in the registers of one warp."""

LARGE_BLOCKS = 1 << 15
"""Scopes from this many blocks on are spread over many thread blocks."""

LARGE_SCOPES = 256
"""Large scopes worked on at a time."""

BINS = 1 << 12
PASSES = {32: 3, 64: 6}
TILE = 16 * THREADS

COLLECTED_BYTES = 48 << 20
"""Keys that may be collected from large scopes, in all: with the histograms 64 MiB."""

SEARCH_BYTES = 72

SAMPLED_BLOCKS = 1 << 24
"""Single sources from this many blocks on are bracketed by a sample, which saves reading them twice."""

SAMPLES = 1 << 19
"""Keys of a sample: it brackets the cut between 0.6 % of all keys, or fewer."""

BRACKET = 96
"""The part of all keys that must fit the buffer for a bracket to be worth it."""

FILLING = 132 * 4
"""Thread blocks that keep a large card busy."""


@dataclass
class Ranking:
    """What ranks the blocks of every scope: single elements as they lie, and tables of norms."""

    parts: list[Operand]
    leaves: list[Leaf]
    structs: list[Struct]
    starts: list[int]
    kind: int
    bits: int
    ord: float | None

    @property
    def scopes(self) -> int:
        """Number of scopes."""
        return self.parts[0].cut.scopes

    @property
    def blocks(self) -> int:
        """Blocks of a scope."""
        return self.starts[-1] + self.parts[-1].cut.blocks

    @property
    def element(self) -> int:
        """The ELEMENT macro of kernels that read all sources."""
        return element_of({DTYPES[code_of(leaf.array.dtype)] for leaf in self.leaves})

    def sources(self, which: int | None = None) -> tuple[Struct, Array]:
        """All sources, or one of them, as an argument, and the table that must live until the kernel has run."""
        chosen = range(len(self.parts)) if which is None else (which,)
        made = [
            struct(SOURCE, start=self.starts[i], blocks=self.parts[i].cut.blocks, leaf=self.structs[i][0])
            for i in chosen
        ]
        table = table_on_device(made[1:]) if len(made) > 1 else None
        more = 0 if table is None else table.data.ptr
        return struct(SOURCES, count=len(made), kind=self.kind, blocks=self.blocks, more=more, first=made[0][0]), table

    def dense(self, which: int) -> bool:
        """Whether the keys of a source's scopes lie side by side on 16-byte borders."""
        leaf = self.leaves[which]
        item = leaf.array.dtype.itemsize
        if not is_dense_pair(code_of(leaf.array.dtype), self.bits):
            return False
        blocks, scopes = nest(leaf.cut.block, leaf.array.strides), nest(leaf.cut.scope, leaf.array.strides)
        return (
            leaf.array.data.ptr % 16 == 0
            and leaf.cut.blocks * item % 16 == 0
            and len(blocks) == 1
            and blocks[0][1] == item
            and all(step % 16 == 0 for _, step in scopes)
        )


def keys_of(parts: Sequence[Blocks], ord: float | None) -> tuple[int, int]:
    """(kind, bits) of the keys by which the blocks of these parts rank."""
    narrow = all(part.narrow for part in parts)
    if ord is None:
        return SIGNED, 32 if narrow and not parts[0].kinds[0].is_integer else 64
    if all(part.single and part.kinds[0].is_wide_integer for part in parts):
        return INTEGER, 64
    return MAGNITUDE, 32 if narrow else 64


def values_dtype(parts: Sequence[Blocks], dtype: np.dtype, ord: float | None) -> np.dtype:
    """The dtype of k-th values: that of the leaf, which is `dtype`, for signed values, else that of the norms."""
    return dtype if ord is None else np.dtype(common_norm(kind for part in parts for kind in part.kinds))


def points_dtype(parts: Sequence[Blocks], values: np.dtype) -> np.dtype:
    """The dtype of a point between two k-th values of a dtype: a float."""
    return np.dtype(common_norm(parts[0].kinds)) if values.kind in "iu" else values


def rank(parts: Parts, ord: float | None) -> Ranking:
    """The ranking of parts; norms of larger blocks are measured now, into a table."""
    made = operands(parts)
    kind, bits = keys_of(made, ord)
    narrow = all(part.narrow for part in made)
    widths = [part.cut.blocks for part in made]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    leaves: list[Leaf] = []
    several = not all(part.single for part in made)
    table = cupy.empty((made[0].cut.scopes, sum(widths) if several else 0), np.float32 if narrow else np.float64)
    for part, start, width in zip(made, starts, widths, strict=True):
        if part.single:
            leaves.append(part.part[0])
        else:
            measure_part(part, float(ord or 2), table, start)
            columns = table[:, start : start + width]
            leaves.append(Leaf(columns, table_cut(*columns.shape)))
    structs = [leaf_struct(leaf.array, leaf.cut) for leaf in leaves]
    return Ranking(made, leaves, structs, starts, kind, bits, ord)


def cut_scopes(ranking: Ranking, keep: Leaf, low: int, *, places: bool = True) -> Array:
    """The cut of every scope: key and position of the last of `keep` blocks, which is clamped to [low, n].

    Without `places` only the keys need be right.
    """
    scopes, blocks = ranking.scopes, ranking.blocks
    cutoffs = cupy.empty((scopes, 2), np.uint64)
    counts, kept = numbers(keep)
    if blocks >= LARGE_BLOCKS:
        for first in range(0, scopes, LARGE_SCOPES):
            _cut_large(ranking, counts, low, first, min(LARGE_SCOPES, scopes - first), cutoffs, places)
        return cutoffs
    sources, table = ranking.sources()
    args = sources, counts, np.int64(low), np.int64(scopes), cutoffs
    macros = {"ELEMENT": ranking.element, "KEY_BITS": ranking.bits}
    if blocks <= ROW_BLOCKS:
        dense = len(ranking.parts) == 1 and ranking.dense(0)
        keys = row_keys(blocks, 16 // ranking.leaves[0].array.dtype.itemsize if dense else 1)
        launch("rows.cu", "decide_rows", blocks_for(32 * scopes), args, **macros, DENSE=int(dense), KEYS=keys)
    else:
        launch("selection.cu", "decide_scopes", scopes, args, **macros, DENSE=0)
    del kept, table
    return cutoffs


def row_keys(blocks: int, vector: int) -> int:
    """Keys that a lane holds where a warp owns a scope, in vectors of so many."""
    return next(k for k in ROW_KEYS if 32 * k >= blocks and k % vector == 0)


def dense_source(leaf: Leaf, kind: int) -> tuple[Struct, int]:
    """The only source of scopes of single elements that lie densely, and how many keys a lane takes."""
    require_current(leaf.array)
    template, keys = _dense_template(leaf.cut, leaf.array.strides, leaf.array.dtype, kind)
    made = template.copy()
    made.view(np.uint64)[POINTER] = leaf.array.data.ptr
    return made, keys


@lru_cache(maxsize=2048)
def _dense_template(cut: Cut, strides: tuple[int, ...], dtype: np.dtype, kind: int) -> tuple[Struct, int]:
    leaf = leaf_template(cut, strides, code_of(dtype), cut.element)
    first = struct(SOURCE, blocks=cut.blocks, leaf=leaf[0])
    made = struct(SOURCES, count=1, kind=kind, blocks=cut.blocks, first=first[0])
    return made, row_keys(cut.blocks, 16 // dtype.itemsize)


def _cut_large(
    ranking: Ranking, counts: Struct, low: int, first: int, scopes: int, cutoffs: Array, places: bool
) -> None:
    """Cut `scopes` scopes from `first` on, between the borders that a sample gives, or by histograms of digits."""
    width = ranking.bits // 8
    entry = width + (4 if width == 4 else 0)  # narrow keys have their positions beside them
    capacity = min(ranking.blocks, COLLECTED_BYTES // entry // scopes)
    sampled = len(ranking.parts) == 1 and ranking.blocks >= SAMPLED_BLOCKS and capacity * BRACKET >= ranking.blocks
    samples = min(SAMPLES, capacity, ranking.blocks // 8) if sampled else 0
    each = 3 if samples else 1
    searches = cupy.empty((scopes * each, SEARCH_BYTES), np.uint8)
    histograms = cupy.zeros((scopes * each, BINS), np.uint64)
    buffer = cupy.empty((scopes, capacity * entry), np.uint8)
    s0, n, room = np.int64(first), np.int64(ranking.blocks), np.int64(capacity)
    taken, none = np.int64(samples), np.int64(0)

    def run(name: str, grid: int | tuple[int, int], args: tuple[Any, ...], which: int | None = None) -> None:
        element = ranking.element if which is None else element_of({DTYPES[code_of(ranking.leaves[which].array.dtype)]})
        dense = which is not None and ranking.dense(which)
        launch("selection.cu", name, grid, args, ELEMENT=element, KEY_BITS=ranking.bits, DENSE=int(dense))

    run(
        "large_start", blocks_for(scopes),
        (counts, np.int64(low), n, s0, np.int64(scopes), taken, searches, cutoffs),
    )  # fmt: skip
    sources = [ranking.sources(i)[0] for i in range(len(ranking.parts))]
    grid = max(1, min(-(-ranking.blocks // TILE), FILLING // scopes))
    yes, no = np.int32(1), np.int32(0)
    if samples:
        run("large_sample", (max(1, FILLING // scopes), scopes), (sources[0], s0, taken, buffer, room), 0)
        borders, bins = searches[scopes:], histograms[scopes:]
        for p in range(PASSES[ranking.bits]):
            args = sources[0], s0, n, np.int32(p), borders, bins, buffer, room, yes, yes, taken, cutoffs
            run("large_histogram", (-(-samples // TILE), 2 * scopes), args, 0)
        run("large_gather", (grid, scopes), (sources[0], s0, np.int64(scopes), searches, buffer, room, cutoffs), 0)
    for p in range(PASSES[ranking.bits]):
        for i, source in enumerate(sources):
            ends = (yes if i == 0 else no), (yes if i == len(sources) - 1 else no)
            args = source, s0, n, np.int32(p), searches, histograms, buffer, room, *ends, none, cutoffs
            run("large_histogram", (grid, scopes), args, i)
    if not places:
        return
    for i, source in enumerate(sources):
        run("large_ties", (min(grid, BINS), scopes), (source, s0, n, searches, histograms, buffer, room), i)
    everything, table = ranking.sources()
    run("large_last", (scopes, 1), (everything, s0, searches, histograms, cutoffs))
    del table


def kth(parts: Parts, k: Leaf, ord: float | None) -> Array:
    """The k-th largest rank value of every scope: ``(S,)``."""
    ranking = rank(parts, ord)
    dtype = values_dtype(ranking.parts, parts[0][0].array.dtype, ord)
    out = cupy.empty(ranking.scopes, dtype)
    if ranking.scopes:
        cutoffs = cut_scopes(ranking, k, 1, places=False)
        launch(
            "writing.cu", "write_kth", blocks_for(ranking.scopes),
            (cutoffs, np.int32(ranking.kind), np.int64(ranking.scopes), np.int32(code_of(dtype)), out),
            ELEMENT=ANY, KEY_BITS=ranking.bits,
        )  # fmt: skip
    return out


def midpoint(parts: Parts, k: Leaf, weight: float, ord: float | None) -> Array:
    """The point between the k-th and the next rank value of every scope: ``(S,)``."""
    ranking = rank(parts, ord)
    values = values_dtype(ranking.parts, parts[0][0].array.dtype, ord)
    dtype = points_dtype(ranking.parts, values)
    out = cupy.empty(ranking.scopes, dtype)
    if ranking.scopes:
        k = leaf_on_device(k)
        upper, lower = (cut_scopes(ranking, place, 1, places=False) for place in (k, derived.following(k)))
        launch(
            "writing.cu", "write_midpoints", blocks_for(ranking.scopes),
            (
                upper, lower, np.float64(weight), np.int32(ranking.kind), np.int64(ranking.scopes),
                np.int32(code_of(values)), np.int32(code_of(dtype)), out,
            ),
            ELEMENT=ANY, KEY_BITS=ranking.bits,
        )  # fmt: skip
    return out
