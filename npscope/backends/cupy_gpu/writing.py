"""Decisions written into arrays: masks, dropped and scaled blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cupy
import numpy as np

from npscope.backends.cupy_gpu.modules import (
    ANY,
    FAST,
    GROUPS,
    blocks_for,
    element_of,
    launch,
)
from npscope.backends.cupy_gpu.norms import norm_table, tiles_of
from npscope.backends.cupy_gpu.operands import (
    LEAF,
    NUMBERS,
    Array,
    Operand,
    Struct,
    code_of,
    grid_of,
    leaf_struct,
    numbers,
    operands,
    require_current,
    struct,
    table_leaf,
)
from npscope.backends.cupy_gpu.selection import MAGNITUDE, ROW_BLOCKS, SIGNED, cut_scopes, dense_source, rank
from npscope.dtypes import kind_of
from npscope.tiling import Leaf, Parts

BY_RANK, BY_THRESHOLD, BY_MASK = 0, 1, 2

DECISION = np.dtype(
    [
        ("rule", np.int32),
        ("kind", np.int32),
        ("narrow", np.int32),
        ("start", np.int64),
        ("cutoffs", np.uint64),
        ("numbers", NUMBERS),
        ("leaf", LEAF),
    ],
    align=True,
)


def arrays(parts: Parts) -> list[Array]:
    """The written arrays, in order."""
    return [leaf.array for part in parts for leaf in part]


def fill(target: Parts) -> None:
    """Bring the elements as they were to where they are worked on."""
    for part in target:
        for leaf in part:
            if leaf.origin is not None:
                cupy.copyto(leaf.array, leaf.origin)


# --- decisions -----------------------------------------------------------------------------------


class Decision:
    """What stays of one part: the struct that kernels take, and the arrays that it points to."""

    def __init__(self, made: Struct, bits: int, leaf: Leaf | None, kept: object) -> None:
        self.struct, self.bits, self.leaf, self.kept = made, bits, leaf, kept


def ranked(source: Parts, keep: Leaf, ord: float | None) -> list[Decision]:
    """The decisions that keep the first-ranked blocks of every scope."""
    ranking = rank(source, ord)
    if ranking.scopes * ranking.blocks == 0:
        return []
    cutoffs = cut_scopes(ranking, keep, 0)
    made = [
        struct(DECISION, rule=BY_RANK, kind=ranking.kind, start=start, cutoffs=cutoffs.data.ptr, leaf=leaf[0])
        for start, leaf in zip(ranking.starts, ranking.structs, strict=True)
    ]
    return [
        Decision(one, ranking.bits, leaf, (ranking, cutoffs)) for one, leaf in zip(made, ranking.leaves, strict=True)
    ]


def below(source: Sequence[Operand], thresholds: Leaf, ord: float) -> list[Decision]:
    """The decisions that drop blocks below their thresholds."""
    made, start = [], 0
    limits, kept = numbers(thresholds)
    for part in source:
        leaf = part.part[0] if part.single else table_leaf(norm_table([part], ord))
        one = struct(
            DECISION, rule=BY_THRESHOLD, narrow=part.narrow, start=start, numbers=limits[0],
            leaf=leaf_struct(leaf.array, leaf.cut)[0],
        )  # fmt: skip
        made.append(Decision(one, 32, leaf, kept))
        start += part.cut.blocks
    return made


def masked(target: Parts, mask: Leaf) -> list[Decision]:
    """The decisions of a mask."""
    flags, kept = numbers(mask)
    starts = np.cumsum([0, *(part[0].cut.blocks for part in target)])
    return [
        Decision(struct(DECISION, rule=BY_MASK, start=start, numbers=flags[0]), 32, None, kept) for start in starts[:-1]
    ]


# --- writing -------------------------------------------------------------------------------------


def mask(parts: Parts, keep: Leaf, ord: float | None) -> Array:
    """True for the `keep` first-ranked blocks of every scope: ``(S, n)`` bool."""
    scopes, blocks = parts[0][0].cut.scopes, sum(part[0].cut.blocks for part in parts)
    result = cupy.empty((scopes, blocks), np.bool_)
    for part, decision in zip(parts, ranked(parts, keep, ord), strict=False):
        count = part[0].cut.blocks
        if count:
            launch(
                "writing.cu", "write_mask", blocks_for(scopes * count),
                (decision.struct, np.int64(scopes), np.int64(count), np.int64(blocks), result),
                ELEMENT=ANY, KEY_BITS=decision.bits,
            )  # fmt: skip
    return result


def prune(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero every block of `target` but those at the `keep` first-ranked places of `source`."""
    if not (_keep_in_groups(target, source, keep, ord) or _keep_in_rows(target, source, keep, ord)):
        _drop_all(target, ranked(source, keep, ord))
    return arrays(target)


def threshold(target: Parts, source: Parts, thresholds: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero the blocks of `target` whose norm in `source` is below their threshold (NaN stays)."""
    _drop_all(target, below(operands(source), thresholds, float(ord or 2)))
    return arrays(target)


def apply_mask(target: Parts, mask: Leaf) -> Sequence[Array]:
    """Zero the blocks of `target` whose mask is False."""
    _drop_all(target, masked(target, mask))
    return arrays(target)


def scale(target: Parts, multipliers: Leaf) -> Sequence[Array]:
    """Multiply blocks by a float64 each; 0 writes +0.0, 1 keeps the bits."""
    factors, kept = numbers(multipliers)
    fill(target)
    start = 0
    for part in target:
        scale_part(part, factors, start)
        start += part[0].cut.blocks
    del kept
    return arrays(target)


def scale_part(part: Sequence[Leaf], factors: Struct, start: int) -> None:
    """Multiply the blocks of one part by numbers, from column `start` on."""
    for leaf in part:
        cut = leaf.cut
        count = cut.scopes * cut.blocks * cut.elements
        if count:
            launch(
                "writing.cu", "scale", blocks_for(count),
                (factors, leaf_struct(leaf.array, cut), np.int64(cut.scopes), np.int64(cut.blocks), np.int64(start)),
                ELEMENT=element_of({kind_of(leaf.array.dtype).name}), KEY_BITS=32 if _is_fast(leaf) else 64,
            )  # fmt: skip


def _is_fast(leaf: Leaf) -> bool:
    return kind_of(leaf.array.dtype).name in FAST


def count_nonzero(parts: Parts, eps: float) -> int:
    """How many elements do not satisfy ``|x| <= eps``; waits for the device."""
    total = cupy.zeros(1, np.uint64)
    for leaf, counts, threads in _each(parts):
        launch(
            "writing.cu", "count_nonzero", threads,
            (leaf_struct(leaf.array, leaf.cut), *counts, np.float64(eps), total),
            ELEMENT=element_of({kind_of(leaf.array.dtype).name}), KEY_BITS=32 if _is_fast(leaf) else 64,
        )  # fmt: skip
    return int(total[0])


def sum_squares(parts: Parts) -> float:
    """The sum of ``|x| ** 2`` of all elements, in float64; waits for the device."""
    total = cupy.zeros(1, np.float64)
    for leaf, counts, threads in _each(parts):
        launch(
            "writing.cu", "sum_squares", threads, (leaf_struct(leaf.array, leaf.cut), *counts, total),
            ELEMENT=element_of({kind_of(leaf.array.dtype).name}), KEY_BITS=32 if _is_fast(leaf) else 64,
        )  # fmt: skip
    return float(total[0])


def _each(parts: Parts) -> Iterator[tuple[Leaf, tuple[np.int64, np.int64], int]]:
    """The leaves that have elements, their scopes and blocks, and the thread blocks to read them with."""
    for leaf in (leaf for part in parts for leaf in part):
        cut = leaf.cut
        count = cut.scopes * cut.blocks * cut.elements
        if count:
            yield leaf, (np.int64(cut.scopes), np.int64(cut.blocks)), min(blocks_for(count), 1 << 12)


def _drop_all(target: Parts, decisions: Sequence[Decision]) -> None:
    fill(target)
    for part, decision in zip(target, decisions, strict=False):
        for leaf in part:
            if leaf.cut.scopes * leaf.cut.blocks * leaf.cut.elements:
                _drop(leaf, decision)


def _drop(leaf: Leaf, decision: Decision) -> None:
    """+0.0 into the dropped blocks of a leaf, by the widest kernel that fits how it lies."""
    cut, made = leaf.cut, decision.struct
    scopes, blocks = np.int64(cut.scopes), np.int64(cut.blocks)
    source = decision.leaf
    if made["rule"][0] == BY_RANK and decision.bits == 32 and source is not None and lie_side_by_side(leaf, source):
        element = code_of(leaf.array.dtype)
        launch(
            "writing.cu", "drop_dense", blocks_for(cut.scopes * cut.blocks * leaf.array.dtype.itemsize // 64),
            (made, source.array, leaf.array, scopes, blocks), ELEMENT=element, KEY_BITS=32,
        )  # fmt: skip
        return
    tiles = tiles_of(leaf) if decision.bits == 32 and cut.elements > 1 else None
    if tiles is not None and tiles.aligned(32):
        launch(
            "tiles.cu", "drop_tiles", blocks_for(cut.scopes * cut.blocks * cut.elements * tiles.itemsize // 32),
            (np.uint64(tiles.address), tiles.matrix, made, blocks, scopes), ELEMENT=tiles.element, RUN=tiles.run,
        )  # fmt: skip
        return
    launch(
        "writing.cu", "drop", blocks_for(cut.scopes * cut.blocks * cut.elements),
        (made, leaf_struct(leaf.array, cut), scopes, blocks), ELEMENT=ANY, KEY_BITS=decision.bits,
    )  # fmt: skip


def lie_side_by_side(target: Leaf, source: Leaf) -> bool:
    """Whether single elements of two arrays lie densely, in the order of their blocks, on 16-byte borders."""
    item = target.array.dtype.itemsize
    return (
        _is_fast(target)
        and target.array.dtype == source.array.dtype
        and target.cut.blocks * item % 16 == 0
        and all(
            leaf.cut.elements == 1
            and leaf.array.data.ptr % 16 == 0
            and grid_of(leaf) == ((leaf.cut.scopes * leaf.cut.blocks, item),)
            for leaf in (target, source)
        )
    )


def _one_pass(target: Parts, source: Parts) -> tuple[Leaf, Leaf] | None:
    """The one leaf as written and as read, if its single elements lie densely and rank themselves."""
    if len(target) != 1 or len(target[0]) != 1:
        return None
    leaf, read = target[0][0], source[0][0]
    from_origin = leaf.origin is not None and leaf.origin is read.array and read.cut is leaf.cut
    if not (from_origin or (leaf.origin is None and leaf.array is read.array)):
        return None
    require_current(leaf.array)
    item = leaf.array.dtype.itemsize
    if not _is_fast(leaf) or leaf.cut.elements != 1 or read.cut.scopes * read.cut.blocks == 0:
        return None
    return (leaf, read) if all(_lies_densely(x, item) for x in (leaf, read)) else None


def _keep_in_groups(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> bool:
    """N:M of single elements that lie side by side, in one pass; False where it is something else."""
    group = source[0][0].cut.blocks
    found = _one_pass(target, source) if group in GROUPS else None
    if found is None:
        return False
    leaf, read = found
    total, held = read.cut.scopes * group, max(group, 16 // leaf.array.dtype.itemsize)
    if total % held:
        return False
    counts, kept = numbers(keep)
    kind = SIGNED if ord is None else MAGNITUDE
    launch(
        "groups.cu", "keep_in_groups", blocks_for(total // held),
        (read.array, leaf.array, counts, np.int32(kind), np.int64(total // held)),
        ELEMENT=code_of(leaf.array.dtype), GROUP=group,
    )  # fmt: skip
    del kept
    return True


def _keep_in_rows(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> bool:
    """Scopes of single elements that lie side by side, each in the registers of a warp, in one pass."""
    blocks = source[0][0].cut.blocks
    found = _one_pass(target, source) if blocks <= ROW_BLOCKS else None
    if found is None:
        return False
    leaf, read = found
    if blocks * read.array.dtype.itemsize % 16:
        return False
    counts, kept = numbers(keep)
    kind = SIGNED if ord is None else MAGNITUDE
    sources, keys = dense_source(read, kind)
    launch(
        "rows.cu", "keep_rows", blocks_for(32 * read.cut.scopes),
        (sources, counts, np.int64(read.cut.scopes), leaf.array),
        ELEMENT=code_of(leaf.array.dtype), KEY_BITS=32, DENSE=1, KEYS=keys,
    )  # fmt: skip
    del kept
    return True


def _lies_densely(leaf: Leaf, item: int) -> bool:
    return leaf.array.data.ptr % 16 == 0 and grid_of(leaf) == ((leaf.cut.scopes * leaf.cut.blocks, item),)
