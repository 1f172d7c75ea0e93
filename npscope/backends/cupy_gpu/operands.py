"""Leaves as kernels take them: structs of a pointer and three loop nests, passed by value.

What follows from the geometry is made once and kept (`leaf_template`); a call fills in the pointer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import cupy
import numpy as np

from npscope.backends.cupy_gpu.modules import DTYPES, launch
from npscope.dtypes import Kind, common_norm, dtype_name, kind_of
from npscope.errors import KindError
from npscope.tiling import Cut, Dim, Leaf, Part, Parts

LOOP = np.dtype([("size", np.int64), ("step", np.int64)])


def leaf_layout(loops: int) -> np.dtype:
    """The struct Leaf of elements.cuh where MAX_LOOPS is `loops`."""
    fields = [("data", np.uint64), ("elements", np.int64), ("dtype", np.int32), ("ranks", np.int32, 3)]
    return np.dtype([*fields, ("loops", LOOP, loops)], align=True)


def numbers_layout(leaf: np.dtype) -> np.dtype:
    """The struct Numbers of elements.cuh."""
    return np.dtype([("constant", np.int32), ("value", np.float64), ("leaf", leaf)], align=True)


LEAF = leaf_layout(40)
LEAVES = np.dtype([("count", np.int32), ("more", np.uint64), ("first", LEAF)], align=True)
NUMBERS = numbers_layout(LEAF)

UPLOAD = 3584
"""Bytes that one launch carries into a table on the device."""

Struct = np.ndarray
Array = Any


def struct(layout: np.dtype, /, **fields: Any) -> Struct:
    """One struct with these fields, as a kernel's argument."""
    result = np.zeros(1, layout)
    for name, value in fields.items():
        result[name] = value
    return result


def table_on_device(structs: Sequence[Struct]) -> Array:
    """Structs side by side in device memory, carried there by launches, which a graph can capture."""
    raw = np.concatenate(structs).view(np.uint8)
    table = cupy.empty(raw.size, cupy.uint8)
    for start in range(0, raw.size, UPLOAD):
        piece = np.zeros(UPLOAD, np.uint8)
        part = raw[start : start + UPLOAD]
        piece[: part.size] = part
        carrier = piece.view(f"V{UPLOAD}")
        launch("upload.cu", "upload", 1, (carrier, table[start:], np.int64(part.size)))
    return table


def word_of(layout: np.dtype, *names: str) -> int:
    """Where a field of a struct, or of a struct in it, starts, in words of eight bytes; KeyError if there is none."""
    start = 0
    for name in names:
        fields: Mapping[str, Any] = layout.fields or {}
        layout, offset = fields[name][:2]
        start += offset
    if start % 8:
        raise KeyError(f"{names[-1]} is at byte {start} and not on a border of words")
    return start // 8


# --- leaves --------------------------------------------------------------------------------------


Nest = tuple[tuple[int, int], ...]
"""Loops as (size, step in bytes), outermost first."""


@lru_cache(maxsize=4096)
def nest(dims: tuple[Dim, ...], strides: tuple[int, ...]) -> Nest:
    """Loops over axes with these strides as (size, step) pairs; loops that continue each other are one."""
    merged: list[tuple[int, int]] = []
    for dim in dims:
        size, step = dim.size, dim.step * strides[dim.axis]
        if merged and merged[-1][1] == step * size:
            size *= merged.pop()[0]
        merged.append((size, step))
    return tuple(merged)


@lru_cache(maxsize=256)
def code_of(dtype: np.dtype) -> int:
    """The number of a dtype in elements.cuh."""
    return DTYPES.index(dtype_name(dtype))


def grid_of(leaf: Leaf) -> Nest:
    """The loops over all blocks, scope by scope."""
    return nest(leaf.cut.scope + leaf.cut.block, leaf.array.strides)


@lru_cache(maxsize=4096)
def memory_order(cut: Cut, strides: tuple[int, ...]) -> tuple[Dim, ...]:
    """The loops over the elements of a block, the most adjacent innermost: any order of elements will do."""
    return tuple(sorted(cut.element, key=lambda dim: -abs(dim.step * strides[dim.axis])))


@lru_cache(maxsize=2048)
def leaf_template(
    cut: Cut, strides: tuple[int, ...], code: int, order: tuple[Dim, ...], layout: np.dtype = LEAF
) -> Struct:
    """The struct of arrays that lie like this, without a pointer; to be copied."""
    nests = [nest(dims, strides) for dims in (cut.scope, cut.block, order)]
    loops = [loop for part in nests for loop in part]
    result = struct(layout, elements=cut.elements, dtype=code, ranks=[[len(part) for part in nests]])
    result["loops"][0, : len(loops)] = np.array(loops, LOOP) if loops else []
    return result


def require_current(array: Array) -> None:
    """KindError for an array that is not on the current device, on whose stream the work is queued."""
    home, current = array.data.device_id, cupy.cuda.runtime.getDevice()
    if home != current:
        raise KindError(
            f"an array is on CUDA device {home}, but the current device is {current}; "
            f"use `with cupy.cuda.Device({home})`"
        )


def leaf_struct(array: Array, cut: Cut, order: tuple[Dim, ...] | None = None) -> Struct:
    """An array and its cut; elements in the order of memory, or in that of another leaf."""
    require_current(array)
    strides = array.strides
    made = leaf_template(cut, strides, code_of(array.dtype), order or memory_order(cut, strides)).copy()
    made["data"] = array.data.ptr
    return made


class Blocks:
    """The blocks of a part, as far as cuts and dtypes tell."""

    def __init__(self, cuts: Sequence[Cut], kinds: Sequence[Kind]) -> None:
        self.cut = cuts[0]
        self.kinds = kinds
        self.elements = sum(cut.elements for cut in cuts)

    @property
    def total(self) -> int:
        """Blocks in all scopes."""
        return self.cut.scopes * self.cut.blocks

    @property
    def names(self) -> set[str]:
        """The dtypes of the leaves."""
        return {kind.name for kind in self.kinds}

    @property
    def exact(self) -> bool:
        """Whether norms of order 1 and 2 are correctly rounded."""
        return all(kind.rounds_correctly for kind in self.kinds)

    @property
    def narrow(self) -> bool:
        """Whether norms are float32."""
        return common_norm(self.kinds) == "float32"

    @property
    def single(self) -> bool:
        """Whether a block is one element."""
        return len(self.kinds) == 1 and self.cut.elements == 1

    @property
    def is_one_number(self) -> bool:
        """Whether a block is one real number."""
        return self.single and not self.kinds[0].is_complex


class Operand(Blocks):
    """A part as kernels take it: its leaves, and what they are made of."""

    def __init__(self, part: Part) -> None:
        super().__init__([leaf.cut for leaf in part], [kind_of(leaf.array.dtype) for leaf in part])
        self.part = part

    @cached_property
    def structs(self) -> list[Struct]:
        """The leaves as structs: not every kernel takes them."""
        return [leaf_struct(leaf.array, leaf.cut) for leaf in self.part]


def operand(part: Part) -> Operand:
    """A part, read where its elements are now."""
    for leaf in part:
        require_current(leaf.array)
    return Operand(part)


def operands(parts: Parts) -> list[Operand]:
    """All parts of an operation."""
    return [operand(part) for part in parts]


def leaves_struct(structs: Sequence[Struct]) -> tuple[Struct, Array]:
    """Leaves as one argument, and the table that must live until the kernel has run."""
    table = table_on_device(structs[1:]) if len(structs) > 1 else None
    more = 0 if table is None else table.data.ptr
    return struct(LEAVES, count=len(structs), more=more, first=structs[0][0]), table


# --- numbers -------------------------------------------------------------------------------------


def numbers(leaf: Leaf | None) -> tuple[Struct, Array]:
    """Numbers over scopes or blocks as one argument, and the array that must live until the kernel has run."""
    if leaf is None:
        return struct(NUMBERS, constant=1), None
    array, value = numbers_of(leaf)
    if array is None:
        return _constant(value), None
    array = on_device(array)
    return struct(NUMBERS, leaf=leaf_struct(array, leaf.cut)[0]), array


def numbers_of(leaf: Leaf) -> tuple[Array | None, float]:
    """Numbers over scopes or blocks: an array, of the host in C order, or None and the one number for all."""
    array = leaf.array
    if not isinstance(array, np.ndarray):
        return array, 0.0
    if array.size == 1 or not any(array.strides):
        return None, float(array.item(0)) if array.size else 0.0
    return np.ascontiguousarray(array), 0.0


def on_device(array: Array) -> Array:
    """Numbers where kernels read them: those of the host are carried over."""
    return cupy.asarray(array) if isinstance(array, np.ndarray) else array


def leaf_on_device(leaf: Leaf) -> Leaf:
    """Numbers that several launches read, carried over once; one number for all stays where it is."""
    array, _ = numbers_of(leaf)
    return leaf if array is None else Leaf(on_device(array), leaf.cut)


@lru_cache(maxsize=256)
def _constant(value: float) -> Struct:
    """One number for all; never written to. A zero of either sign is one key here, and no one's sign matters."""
    return struct(NUMBERS, constant=1, value=value)


def table_cut(scopes: int, blocks: int) -> Cut:
    """The cut of an ``(S, n)`` table: one element a block."""
    return Cut.of((Dim(0, scopes, 1),), (Dim(1, blocks, 1),), ())


def table_leaf(table: Array) -> Leaf:
    """A table with one number for each block."""
    return Leaf(table, table_cut(*table.shape))
