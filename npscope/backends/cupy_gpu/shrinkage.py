"""The proximal steps, plain and conditioned: everything is solved before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import cupy
import numpy as np

from npscope.backends import CONDITIONER_RANGE, conditioner_error
from npscope.backends.cupy_gpu.modules import DTYPES, METRIC_ROWS, blocks_for, element_of, launch
from npscope.backends.cupy_gpu.norms import FACTOR, MATRIX, Tiles, lanes_for, measure_part, tiles_of
from npscope.backends.cupy_gpu.operands import (
    Array,
    Operand,
    leaf_struct,
    leaves_struct,
    memory_order,
    numbers,
    operand,
    struct,
    table_leaf,
)
from npscope.backends.cupy_gpu.writing import arrays, fill, lie_side_by_side, scale_part
from npscope.dtypes import kind_of
from npscope.errors import ConvergenceError
from npscope.options import checks_devices
from npscope.tiling import Leaf, Part, Parts

LIMITS = np.dtype([("exact", np.int32), ("narrow", np.int32), ("steps", np.int32), ("rtol", np.float64)], align=True)


def shrink(
    target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
) -> Sequence[Array]:
    """The proximal step of ``t * norm`` on every block, in the metric of `conditioners` if given.

    What is wrong on the device makes its block NaN: an entry of the metric out of range, an iteration that
    does not end. Under ``config(check=True)`` it is an error.
    """
    if conditioners is not None and checks_devices():
        for leaf in (leaf for metric in conditioners for leaf in metric):
            _require_conditioner(leaf.array)
    jobs: list[Callable[[], None]] = []
    for p, part in enumerate(target):
        source = operand(tuple(Leaf(x.array if x.origin is None else x.origin, x.cut) for x in part))
        if source.total * source.elements == 0:
            continue
        metric = None if conditioners is None else conditioners[p]
        if source.is_one_number:
            jobs.append(_soften(source, part, thresholds[p], metric))
        elif metric is None:
            jobs.append(_shrink(source, part, thresholds[p]))
        else:
            jobs.append(_shrink_in_metric(source, part, thresholds[p], metric, max_iter, rtol))
    for write in jobs:
        write()
    return arrays(target)


def _require_conditioner(h: Array) -> None:
    low, high = CONDITIONER_RANGE
    if h.size and not (float(h.min()) >= low and float(h.max()) <= high):
        raise conditioner_error(float(h.min()), float(h.max()))


def _counts(source: Operand) -> tuple[np.int64, np.int64]:
    return np.int64(source.cut.scopes), np.int64(source.cut.blocks)


def _soften(source: Operand, part: Part, thresholds: Leaf, metric: Part | None) -> Callable[[], None]:
    """Blocks of one real number, which need no table."""
    limits, kept = numbers(thresholds)
    written = leaf_struct(part[0].array, part[0].cut)
    weights = written if metric is None else leaf_struct(metric[0].array, metric[0].cut)
    flags = np.int32(metric is not None), np.int32(source.narrow)
    item = source.part[0].array.dtype.itemsize
    dense = metric is None and lie_side_by_side(part[0], source.part[0])

    def write() -> None:
        if dense:
            launch(
                "writing.cu", "soften_dense", blocks_for(source.total * item // 64),
                (limits, source.part[0].array, part[0].array, *_counts(source)),
                ELEMENT=element_of(source.names), KEY_BITS=32,
            )  # fmt: skip
            return
        fill((part,))
        launch(
            "writing.cu", "soften", blocks_for(source.total),
            (limits, written, weights, *flags, *_counts(source), np.int64(0)),
            ELEMENT=element_of(source.names), KEY_BITS=32 if source.narrow else 64,
        )  # fmt: skip
        del_after(kept)

    return write


def del_after(*kept: object) -> None:
    """Names what must live until here: the launch before has then been queued, and the pool is in stream order."""


def _shrink(source: Operand, part: Part, thresholds: Leaf) -> Callable[[], None]:
    read, written = _tiles_of(source, part)
    if read is not None and written is not None:
        limits, kept_limits = numbers(thresholds)

        def write_tiles() -> None:
            launch(
                "tiles.cu", "shrink_tiles", blocks_for(source.total * read.team),
                (read.pointer, read.matrix, limits, *_counts(source)[::-1], written.pointer, written.matrix),
                ELEMENT=read.element, RUN=read.run,
            )  # fmt: skip
            del_after(kept_limits)

        return write_tiles
    factors = cupy.empty(_counts(source), np.float64)
    measure_part(source, 2.0, factors, 0, FACTOR, thresholds)
    made, kept = numbers(table_leaf(factors))

    def write() -> None:
        fill((part,))
        scale_part(part, made, 0)
        del_after(kept)

    return write


def _tiles_of(source: Operand, part: Part) -> tuple[Tiles | None, Tiles | None]:
    """A part as it is read and as it is written, where both are tiles that kernels take in vectors."""
    if len(part) > 1:
        return None, None
    read, written = tiles_of(source.part[0]), tiles_of(Leaf(part[0].array, part[0].cut))
    if read is None or written is None or not (read.in_vectors and written.in_vectors):
        return None, None
    return (read, written) if (read.run, read.rows) == (written.run, written.rows) else (None, None)


def _shrink_tiles_in_metric(
    source: Operand, read: Tiles, written: Tiles, weights: Tiles, thresholds: Leaf, max_iter: int, rtol: float
) -> Callable[[], None]:
    limits, kept = numbers(thresholds)

    def write() -> None:
        launch(
            "metric_tiles.cu", "shrink_in_metric", blocks_for(source.total * read.team),
            (
                read.pointer, read.matrix, weights.pointer, weights.matrix, limits, np.int32(max_iter),
                np.float64(rtol), *_counts(source)[::-1], written.pointer, written.matrix,
            ),
            ELEMENT=read.element, RUN=read.run, ROWS=read.rows,
        )  # fmt: skip
        del_after(kept)

    return write


def _folded(*tiles: Tiles) -> Iterable[Tiles]:
    """Dense rows of 8 or 16 as tiles of 2 or 4 runs of 4, so that one lane solves a tile instead of a team.

    On an H100 what lanes of a team all compute took longer than the elements: 1x16 2.7 ms.
    """
    run = tiles[0].run
    if run not in (8, 16) or any(t.run != run or t.rows > 1 or t.columns != t.matrix["tiles"][0] for t in tiles):
        return tiles
    return [
        t._replace(
            run=4, rows=run // 4, columns=1, pitch=4,
            matrix=struct(MATRIX, tiles=t.columns, columns=1, pitch=4, rows=run // 4),
        )
        for t in tiles
    ]  # fmt: skip


def _shrink_in_metric(
    source: Operand, part: Part, thresholds: Leaf, metric: Part, max_iter: int, rtol: float
) -> Callable[[], None]:
    """Solves every block now; the job then writes. What fits registers is solved where it is written."""
    read, written_tiles = _tiles_of(source, part)
    if read is not None and written_tiles is not None and not checks_devices():
        weights_tiles = tiles_of(metric[0])
        if weights_tiles is not None:
            read, written_tiles, weights_tiles = _folded(read, written_tiles, weights_tiles)
        if (
            weights_tiles is not None
            and weights_tiles.in_vectors
            and (weights_tiles.run, weights_tiles.rows, weights_tiles.element)
            == (read.run, read.rows, DTYPES.index("float32"))
            and read.element == weights_tiles.element
            and read.run >= 4
            and read.rows in METRIC_ROWS
        ):
            return _shrink_tiles_in_metric(source, read, written_tiles, weights_tiles, thresholds, max_iter, rtol)
    orders = [memory_order(x.cut, x.array.strides) for x in source.part]
    weights = [leaf_struct(h.array, h.cut, order) for h, order in zip(metric, orders, strict=True)]
    written = [leaf_struct(x.array, x.cut, order) for x, order in zip(part, orders, strict=True)]
    limits, kept_numbers = numbers(thresholds)
    leaves, kept_leaves = leaves_struct(source.structs)
    metrics, kept_metrics = leaves_struct(weights)
    mus, failures = cupy.empty(source.total, np.float64), cupy.zeros(1, np.int32)
    lanes = lanes_for(source)
    how = struct(LIMITS, exact=source.exact, narrow=source.narrow, steps=max_iter, rtol=rtol)
    launch(
        "shrinkage.cu", "solve", blocks_for(source.total * lanes),
        (leaves, metrics, limits, how, *_counts(source), np.int64(0), mus, failures),
        ELEMENT=element_of(source.names), LANES=lanes,
    )  # fmt: skip
    if checks_devices() and int(failures[0]):
        raise ConvergenceError(f"the conditioned shrink did not reach rtol = {rtol} within max_iter = {max_iter} steps")

    def write() -> None:
        fill((part,))
        for x, h, leaf in zip(written, weights, part, strict=True):
            launch(
                "shrinkage.cu", "weigh", blocks_for(source.total * leaf.cut.elements),
                (mus, x, h, *_counts(source)), ELEMENT=element_of({kind_of(leaf.array.dtype).name}), LANES=lanes,
            )  # fmt: skip
        del_after(kept_numbers, kept_leaves, kept_metrics)

    return write
