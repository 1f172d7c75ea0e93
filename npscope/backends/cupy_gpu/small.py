"""Operations of every size: small problems in one launch each, all others by their general path.

Up to some thousands of elements a call takes the time that Python needs to prepare it. A problem that
small is one launch of small_scopes.cu or small_blocks.cu, and the argument of that launch, one struct,
is made once for all calls that look alike: a call copies it and fills in addresses. What looks alike
has the same cuts, strides, dtypes and options.

The proximal step of a coupling is a problem for each part. Counts and sums of elements are never small,
nor is what an argument has no room for, nor a metric whose entries are to be checked.
"""

from __future__ import annotations

import struct as packing
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from npscope.backends import derived
from npscope.backends.cupy_gpu import norms as tables
from npscope.backends.cupy_gpu import selection, shrinkage, writing
from npscope.backends.cupy_gpu.modules import THREADS, as_bytes, kernel
from npscope.backends.cupy_gpu.norms import MEASURE, NORM, ORDERS, lanes_of, measure
from npscope.backends.cupy_gpu.operands import (
    Array,
    Blocks,
    Struct,
    code_of,
    leaf_layout,
    leaf_template,
    memory_order,
    numbers_layout,
    numbers_of,
    on_device,
    require_current,
    struct,
    word_of,
)
from npscope.backends.cupy_gpu.selection import keys_of, points_dtype, values_dtype
from npscope.backends.cupy_gpu.shrinkage import LIMITS
from npscope.dtypes import kind_of
from npscope.options import checks_devices
from npscope.tiling import Cut, Leaf, Parts

MOST_ELEMENTS = 1 << 14
"""Elements of a small problem at most: the time of a call is then mostly Python's."""

MOST_BLOCKS = 1 << 12
"""Blocks that may compete in a scope: a thread block has their keys in shared memory."""

MOST_LEAVES, MOST_LOOPS = 5, 8
"""Leaves that the argument of a launch has room for (4 KiB in all), and the loops of each."""

# Tasks, as small.cuh numbers them: up to PRUNE blocks of a scope compete, then every block is for itself.
KTH, MIDPOINT, BLOCK_MASK, ELEMENT_MASK, PRUNE = range(5)
NORMS, THRESHOLD, SHRINK, SHRINK_IN_METRIC, APPLY_MASK, SCALE, SOFTEN = range(5, 12)

LEAF = leaf_layout(MOST_LOOPS)
NUMBERS = numbers_layout(LEAF)
PART = np.dtype(
    [
        ("first", np.int32), ("leaves", np.int32), ("single", np.int32), ("start", np.int64), ("blocks", np.int64),
        ("measure", MEASURE),
    ],
    align=True,
)  # fmt: skip
PROBLEM = np.dtype(
    [
        ("task", np.int32), ("parts", np.int32), ("kind", np.int32), ("dtype", np.int32), ("values", np.int32),
        ("reads", np.int32), ("moves", np.int32), ("weighs", np.int32), ("scopes", np.int64), ("blocks", np.int64),
        ("low", np.int64), ("weight", np.float64), ("limits", LIMITS), ("numbers", NUMBERS), ("out", np.uint64),
        ("part", PART, MOST_LEAVES), ("read", LEAF, MOST_LEAVES), ("old", LEAF, MOST_LEAVES),
        ("written", LEAF, MOST_LEAVES), ("metric", LEAF, MOST_LEAVES),
    ],
    align=True,
)  # fmt: skip


_VALUE = word_of(PROBLEM, "numbers", "value")
_write_value = packing.Struct("=d").pack_into

Look = tuple[Cut, tuple[int, ...], np.dtype]
"""All of an operand but where it is."""


def _look(cut: Cut, array: Array) -> Look:
    return cut, array.strides, array.dtype


class Plan(NamedTuple):
    """A launch for problems that look alike: its argument, in which addresses go to `places`."""

    kernel: Any
    grid: tuple[int, int]
    argument: Struct
    places: tuple[int, ...]
    dtype: np.dtype | None


class Prepared(NamedTuple):
    """A small problem: its plan, its arrays in the order of the places, the one number where it is one."""

    plan: Plan
    arrays: list[Array]
    value: float

    def on_device(self) -> Prepared:
        """The same with its numbers on the device."""
        return self._replace(arrays=[on_device(array) for array in self.arrays])

    def run(self, shape: tuple[int, ...] = (), out: Array | None = None) -> Array:
        """Queue the launch; the result, if it is none of the arrays, has this shape or is written to `out`."""
        plan, arrays = self.plan, self.arrays
        if plan.dtype is not None:
            out = cupy.empty(shape, plan.dtype) if out is None else out
            arrays.append(out)
        current = cupy.cuda.runtime.getDevice()
        argument = plan.argument.copy()
        words = argument.view(np.uint64)
        for place, array in zip(plan.places, arrays, strict=True):
            memory = array.data
            if memory.device_id != current:
                require_current(array)
            words[place] = memory.ptr
        _write_value(words.data, 8 * _VALUE, self.value)
        plan.kernel(plan.grid, (THREADS,), (argument,))
        return out


def _recognise(
    task: int,
    read: Parts,
    target: Parts,
    numbers: Leaf | None,
    ord: float | None = 2.0,
    metric: Parts = (),
    weight: float = 0.0,
    steps: int = 0,
    rtol: float = 0.0,
) -> Prepared | None:
    """A problem whose blocks are ranked or measured in `read`, else as `target` was; None if it is not small.

    Numbers of the host are still there.
    """
    if not _has_few_elements(read or target):
        return None
    array, value = (None, 0.0) if numbers is None else numbers_of(numbers)
    reads = [(leaf.cut, leaf.array) for part in read for leaf in part]
    written = [(leaf.cut, leaf.array) for part in target for leaf in part]
    old = [(leaf.cut, leaf.origin) for part in target for leaf in part if leaf.origin is not None]
    if len(old) not in (0, len(written)):
        return None
    weights = [(leaf.cut, leaf.array) for part in metric for leaf in part]
    number = [] if array is None or numbers is None else [(numbers.cut, array)]
    operands = [*reads, *old, *written, *weights, *number]
    plan = _plan(
        task,
        tuple([len(part) for part in read or target]),
        tuple([_look(*operand) for operand in operands]),
        (len(reads), len(old), len(written), len(weights), len(number)),
        ord, weight, steps, rtol,
    )  # fmt: skip
    return None if plan is None else Prepared(plan, [array for _, array in operands], value)


def _prepare(*operands: Any, **options: Any) -> Prepared | None:
    """A problem ready to run; None if it is not small."""
    found = _recognise(*operands, **options)
    return None if found is None else found.on_device()


def _has_few_elements(parts: Parts) -> bool:
    """Whether a problem may be small: what is asked first, as all else takes longer to find out."""
    return sum([x.cut.scopes * x.cut.blocks * x.cut.elements for part in parts for x in part]) <= MOST_ELEMENTS


@lru_cache(maxsize=2048)
def _plan(
    task: int,
    widths: tuple[int, ...],
    looks: tuple[Look, ...],
    counts: tuple[int, ...],
    ord: float | None,
    weight: float,
    steps: int,
    rtol: float,
) -> Plan | None:
    """The launch for operands that look like this; `widths` are the leaves of each part."""
    rest = iter(looks)
    read, old, written, metric, number = ([next(rest) for _ in range(count)] for count in counts)
    parts = _blocks(read or old or written, widths)
    competing = task <= PRUNE
    lanes = _lanes(parts, ord)
    if lanes is None or not _is_small(parts, looks, competing):
        return None
    kind, bits = keys_of(parts, ord)
    dtype, values = _dtypes(task, parts, looks[0][2], ord)
    limits = struct(LIMITS, exact=parts[0].exact, narrow=parts[0].narrow, steps=steps, rtol=rtol)
    argument = struct(
        PROBLEM, task=task, parts=len(parts), kind=kind, dtype=0 if dtype is None else code_of(dtype),
        values=code_of(values), reads=bool(read), moves=bool(old), weighs=bool(metric), limits=limits[0],
        scopes=parts[0].cut.scopes, blocks=sum(part.cut.blocks for part in parts), low=task in (KTH, MIDPOINT),
        weight=weight,
    )  # fmt: skip
    start = first = 0
    for p, part in enumerate(parts):
        how = measure(part, ord or 2.0, NORM, wide=False)[0]
        argument["part"][0, p] = (first, widths[p], part.single, start, part.cut.blocks, how)
        start, first = start + part.cut.blocks, first + widths[p]
    places = []
    for name, group in (("read", read), ("old", old), ("written", written), ("metric", metric)):
        # Leaves that are worked off element by element together take the order of the written ones.
        orders = [memory_order(*look[:2]) for look in (written if group and name != "read" else group)]
        for i, (look, order) in enumerate(zip(group, orders, strict=True)):
            argument[name][0, i] = leaf_template(look[0], look[1], code_of(look[2]), order, LEAF)[0]
            places.append(word_of(PROBLEM, name) + (i * LEAF.itemsize) // 8)
    argument["numbers"]["constant"] = not number
    for cut, strides, of in number:
        argument["numbers"]["leaf"] = leaf_template(cut, strides, code_of(of), memory_order(cut, strides), LEAF)[0]
        places.append(word_of(PROBLEM, "numbers", "leaf", "data"))
    if dtype is not None:
        places.append(word_of(PROBLEM, "out"))
    if competing:
        launched, grid = kernel("small_scopes.cu", "rank_small", KEY_BITS=bits, LANES=lanes), (parts[0].cut.scopes, 1)
    else:
        in_metric = task == SHRINK_IN_METRIC
        lanes = max(lanes, 32) if in_metric else lanes  # solved sooner by a warp than by one thread
        launched = kernel("small_blocks.cu", "each_small", METRIC=int(in_metric), LANES=lanes)
        grid = max(-(-part.total * lanes // THREADS) for part in parts), len(parts)
    return Plan(launched, grid, as_bytes(argument), tuple(places), dtype)


def _blocks(looks: Sequence[Look], widths: Sequence[int]) -> list[Blocks]:
    """The blocks of every part."""
    rest = iter(looks)
    parts = [[next(rest) for _ in range(width)] for width in widths]
    return [Blocks([cut for cut, *_ in part], [kind_of(dtype) for *_, dtype in part]) for part in parts]


def _is_small(parts: Sequence[Blocks], looks: Sequence[Look], competing: bool) -> bool:
    blocks, elements = sum(part.cut.blocks for part in parts), sum(part.total * part.elements for part in parts)
    return (
        0 < elements <= MOST_ELEMENTS
        and (blocks <= MOST_BLOCKS or not competing)
        and sum(len(part.kinds) for part in parts) <= MOST_LEAVES
        and all(len(cut.scope + cut.block + cut.element) <= MOST_LOOPS for cut, *_ in looks)
    )


def _lanes(parts: Sequence[Blocks], ord: float | None) -> int | None:
    """Threads that own a block, in one launch for all parts; None where that would round sums of a part otherwise."""
    own = [lanes_of(part.elements) for part in parts]
    lanes = max(own)
    same = [n == lanes or part.single or (part.exact and ord in ORDERS) for part, n in zip(parts, own, strict=True)]
    return lanes if all(same) else None


def _dtypes(task: int, parts: Sequence[Blocks], first: np.dtype, ord: float | None) -> tuple[np.dtype | None, np.dtype]:
    """The dtype of a result that is none of the leaves, and that of k-th values."""
    values = values_dtype(parts, first, ord)
    results = {
        KTH: values,
        MIDPOINT: points_dtype(parts, values),
        BLOCK_MASK: np.dtype(np.bool_),
        NORMS: values_dtype(parts, first, ord or 2.0),
    }
    return results.get(task), values


# --- operations ----------------------------------------------------------------------------------


def norms(parts: Parts, ord: float | None, out: Array | None = None) -> Array:
    """Norm of every block: ``(S, n)`` in the norm's dtype, in `out` if given."""
    small = _prepare(NORMS, parts, (), None, ord)
    return tables.norms(parts, ord, out) if small is None else small.run(_table(parts), out)


def _table(parts: Parts) -> tuple[int, int]:
    return parts[0][0].cut.scopes, sum([part[0].cut.blocks for part in parts])


def kth(parts: Parts, k: Leaf, ord: float | None) -> Array:
    """The k-th largest rank value of every scope: ``(S,)``."""
    small = _prepare(KTH, parts, (), k, ord)
    return selection.kth(parts, k, ord) if small is None else small.run((parts[0][0].cut.scopes,))


def midpoint(parts: Parts, k: Leaf, weight: float, ord: float | None) -> Array:
    """The point between the k-th and the next rank value of every scope: ``(S,)``."""
    small = _prepare(MIDPOINT, parts, (), k, ord, weight=weight)
    return selection.midpoint(parts, k, weight, ord) if small is None else small.run((parts[0][0].cut.scopes,))


def mask(source: Leaf, keep: Leaf, ord: float | None, out: Leaf | None = None) -> Array:
    """True for the `keep` first-ranked blocks of every scope: ``(S, n)`` bool. There is no `out` for CuPy arrays."""
    parts = ((source,),)
    small = _prepare(BLOCK_MASK, parts, (), keep, ord)
    return writing.mask(parts, keep, ord) if small is None else small.run(_table(parts))


def element_masks(parts: Parts, keep: Leaf, ord: float | None) -> Sequence[Array]:
    """True for the elements of the `keep` first-ranked blocks of every scope, leaf by leaf."""
    if _has_few_elements(parts):
        masks = tuple([tuple([Leaf(cupy.empty(x.array.shape, np.bool_), x.cut) for x in part]) for part in parts])
        small = _prepare(ELEMENT_MASK, parts, masks, keep, ord)
        if small is not None:
            small.run()
            return writing.arrays(masks)
    return derived.element_masks(writing.prune, parts, keep, ord)


def prune(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero every block of `target` but those at the `keep` first-ranked places of `source`."""
    small = _prepare(PRUNE, source, target, keep, ord)
    if small is None:
        return writing.prune(target, source, keep, ord)
    small.run()
    return writing.arrays(target)


def threshold(target: Parts, source: Parts, thresholds: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero the blocks of `target` whose norm in `source` is below their threshold (NaN stays)."""
    small = _prepare(THRESHOLD, source, target, thresholds, ord)
    if small is None:
        return writing.threshold(target, source, thresholds, ord)
    small.run()
    return writing.arrays(target)


def apply_mask(target: Parts, mask: Leaf) -> Sequence[Array]:
    """Zero the blocks of `target` whose mask is False."""
    small = _prepare(APPLY_MASK, (), target, mask)
    if small is None:
        return writing.apply_mask(target, mask)
    small.run()
    return writing.arrays(target)


def scale(target: Parts, multipliers: Leaf) -> Sequence[Array]:
    """Multiply blocks by a float64 each; 0 writes +0.0, 1 keeps the bits."""
    small = _prepare(SCALE, (), target, multipliers)
    if small is None:
        return writing.scale(target, multipliers)
    small.run()
    return writing.arrays(target)


def shrink(
    target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
) -> Sequence[Array]:
    """The proximal step of ``t * norm`` on every block, in the metric of `conditioners` if given."""
    if conditioners is not None and checks_devices():
        return shrinkage.shrink(target, thresholds, conditioners, max_iter, rtol)
    found = []
    for p, part in enumerate(target):
        metric = () if conditioners is None else (conditioners[p],)
        single = len(part) == 1 and part[0].cut.elements == 1 and not kind_of(part[0].array.dtype).is_complex
        task = SOFTEN if single else SHRINK_IN_METRIC if metric else SHRINK
        limits = (max_iter, rtol) if task == SHRINK_IN_METRIC else (0, 0.0)
        small = _recognise(task, (), (part,), thresholds[p], 2.0, metric, 0.0, *limits)
        if small is None:
            return shrinkage.shrink(target, thresholds, conditioners, max_iter, rtol)
        found.append(small)
    for small in [each.on_device() for each in found]:  # all of them before the first write
        small.run()
    return writing.arrays(target)
