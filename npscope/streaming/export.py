"""Pruned weights without their zeros, in layouts that other programs read.

``bitmask``
    A safetensors file as compressed-tensors 0.14 makes it (``sparse-bitmask``). A matrix
    ``M.weight`` of shape [rows, columns] becomes ``M.compressed``, its values that are not zero,
    row-major; ``M.bitmask``, U8 of shape ``[rows, ceil(columns / 8)]``: bit ``j % 8``, from the least
    significant, of byte ``j // 8`` of a row is 1 where element j is not zero; ``M.row_offsets``, I64
    of shape [rows]: where each row begins in the values; and ``M.shape``, I64. All other tensors
    stay as they are. compressed-tensors knows no other names than these; a matrix W of another
    name becomes ``W.compressed`` and so on, when it is asked for.
``csr``, ``bsr``
    One matrix as an ``.npz`` for ``scipy.sparse.load_npz``. Floats of 16 and 8 bits are widened
    to float32, which SciPy can compute with.
``2:4``
    An ``.npz`` with five arrays for each tensor W, of floats or int8, of which at most 2 of every 4
    neighbours along an axis are not zero. ``W.values`` has the shape of W with that axis halved:
    the two values kept of each group, in order (bfloat16 and float8 as their bits, all others as
    they are). ``W.metadata``, U8: for each group, in the order of W's elements, 4 bits, its two
    places from 0 to 3 of 2 bits each, the first one lower; even groups in the lower half of a byte.
    Where fewer than two are not zero, the earliest zeros fill up. ``W.axis`` is the axis,
    ``W.dtype`` the name of the dtype, and ``W.shape`` the shape as it was stored: another one than
    that of the values when the axis is the fan-in of a convolution.

A zero of either sign counts as zero, so -0.0 comes back as +0.0.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from npscope.errors import FormatError, SpecError, about
from npscope.recipes.planning import decided
from npscope.recipes.plans import Plan
from npscope.recipes.recipe import Names, Recipe
from npscope.streaming.slabs import Array, Box, cells, extents, tile_sizes, whole
from npscope.streaming.storage import bitmask_bytes
from npscope.streaming.verification import Checked, verify
from npscope.weights import Tensor, WeightFile, numpy_dtype, open_weights
from npscope.weights.new_safetensors import NewSafetensors, create
from npscope.weights.output import Target, require_free, staged
from npscope.weights.strided import StridedReader

Layout = Literal["bitmask", "csr", "bsr", "2:4"]

CHUNK_BYTES = 4 << 20
"""About the bytes of a tensor that are at work at a time."""


@dataclass(frozen=True, slots=True)
class Exported:
    """One tensor that was exported, and the bytes that it takes now."""

    tensor: Tensor
    nbytes: int


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors are exported, by name: globs, or regular expressions after ``re:``. No `include` is all."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def of(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The floating tensors of at least 2 axes that are meant; SpecError when an entry matches no name."""
        meant, left = ([Names(text, option) for text in texts] for option, texts in self._options())
        for names in (*meant, *left):
            if not any(name in names for name in tensors):
                raise SpecError(f"{names.option} {names.text!r:.80} matches none of the {len(tensors)} tensors")
        return [
            tensor
            for name, tensor in tensors.items()
            if tensor.is_float and len(tensor.shape) > 1 and tensor.nbytes
            if not any(name in names for names in left)
            if not meant or any(name in names for names in meant)
        ]

    def _options(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return ("--include", self.include), ("--exclude", self.exclude)


def export_bitmask(
    source: str | os.PathLike[str], target: str | os.PathLike[str], selection: Selection, *, force: bool = False
) -> list[Exported]:
    """Write the weights in `source` to `target` with the zeros of matrices left out, as values and bitmasks.

    Meant are matrices called ``*.weight`` that become smaller so, and all that `selection` includes
    by name. SpecError (a ValueError) when there is none or `target` cannot be written; FormatError,
    FileError and OSError as for every command.
    """
    with open_weights(source) as weights:
        require_free(target, "output", {"input": weights.files()})
        place = Target.of(target, force=force)
        _require_c_order(weights.tensors.values())
        counts = {}
        for tensor in selection.of(weights.tensors):
            if len(tensor.shape) == 2 and (selection.include or tensor.name.endswith(".weight")):
                in_use = _in_rows(weights, tensor)
                if selection.include or bitmask_bytes(tensor, _zeros(tensor, in_use)) < tensor.nbytes:
                    counts[tensor.name] = in_use
        if not counts:
            raise SpecError(
                "nothing to export: no matrix called *.weight would become smaller; --include exports others"
            )
        parts = [
            part
            for tensor in weights.tensors.values()
            for part in (_bitmask_parts(tensor, counts[tensor.name]) if tensor.name in counts else (tensor,))
        ]
        metadata: Mapping[str, str] = getattr(weights, "metadata", {})
        with create(place, parts, metadata) as file:
            for tensor in weights.tensors.values():
                if tensor.name in counts:
                    _write_bitmask(file, weights, tensor, counts[tensor.name])
                else:
                    for start in range(0, tensor.nbytes, CHUNK_BYTES):
                        piece = memoryview(bytearray(min(CHUNK_BYTES, tensor.nbytes - start)))
                        weights.read(tensor, start, piece)
                        file.append(tensor.name, piece)
            weights.check_unchanged()
        return [
            Exported(weights.tensors[name], sum(part.nbytes for part in _bitmask_parts(weights.tensors[name], in_use)))
            for name, in_use in counts.items()
        ]


def export_matrix(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    selection: Selection,
    block: tuple[int, int] | None = None,
    *,
    force: bool = False,
) -> list[Exported]:
    """Write one tensor of `source` to `target` for SciPy: CSR, or BSR of blocks of the size `block`.

    A tensor of more than 2 axes is the matrix ``[first axis, all others]``. SpecError (a ValueError)
    when `selection` is not one tensor, or the block does not divide the matrix.
    """
    with open_weights(source) as weights:
        require_free(target, "output", {"input": weights.files()})
        place = Target.of(target, force=force)
        meant = selection.of(weights.tensors)
        if len(meant) != 1:
            raise SpecError(f"{len(meant)} tensors are meant, but such a file holds one matrix; --include NAME chooses")
        _require_c_order(meant)
        (tensor,) = meant
        rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
        high, wide = block or (1, 1)
        if rows % high or columns % wide:
            raise SpecError(f"tensor {tensor.name!r:.120}: blocks of {high}x{wide} do not divide {rows}x{columns}")
        with staged(place) as fd, _npz(fd) as member:
            _write_rows(member, weights, tensor, block)
            weights.check_unchanged()
        return [Exported(tensor, os.stat(place.path).st_size)]


def export_two_of_four(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    recipe: Recipe,
    *,
    strict: bool = False,
    force: bool = False,
) -> list[Exported]:
    """Write the tensors of `source` that are 2:4 as `recipe` lays it to `target`, as values and 2-bit places.

    SpecError (a ValueError) when there is none, or with `strict` when one that is meant is not 2:4.
    """
    with open_weights(source) as weights, decided(recipe, weights) as decisions:
        require_free(target, "output", {"input": weights.files()})
        place = Target.of(target, force=force)
        checked = verify(weights, decisions, strict=strict)
        plans = [verdict.plan for verdict in checked if isinstance(verdict, Checked) and verdict.holds]
        _require_c_order(plan.tensor for plan in plans)
        failed = [verdict.plan for verdict in checked if isinstance(verdict, Checked) and not verdict.holds]
        if failed and (strict or not plans):
            raise SpecError(
                f"tensor {failed[0].tensor.name!r:.120} is not 2:4 along {failed[0].along}; `npscope verify` says where"
            )
        with staged(place) as fd, _npz(fd) as member:
            for plan in plans:
                _write_two_of_four(member, weights, plan)
            weights.check_unchanged()
        return [Exported(plan.tensor, plan.tensor.nbytes // 2 + -(-math.prod(plan.shape) // 8)) for plan in plans]


# --- values, rows and bits -----------------------------------------------------------------------


def _chunks(weights: WeightFile, tensor: Tensor, row: int) -> Iterator[Array]:
    """The values of a tensor as bits, in chunks of whole rows of `row` elements."""
    itemsize = tensor.nbytes // math.prod(tensor.shape)
    step = max(1, CHUNK_BYTES // (row * itemsize)) * row * itemsize
    for start in range(0, tensor.nbytes, step):
        raw = np.empty(min(step, tensor.nbytes - start), np.uint8)
        weights.read(tensor, start, raw.data)
        yield raw.view(f"<u{itemsize}").reshape(-1, row)


def _require_c_order(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.fortran and len(tensor.shape) > 1:
            raise SpecError(f"tensor {tensor.name!r:.120} is in Fortran order; save it in C order, then export that")


def _used(tensor: Tensor, bits: Array) -> Array:
    """Where numbers of a tensor, given as their bits, are no zeros of either sign."""
    found: Array = np.left_shift(bits, tensor.sign_bits) != 0
    return found


def _in_rows(weights: WeightFile, tensor: Tensor) -> Array:
    """How many values of each row of a matrix are not zero."""
    counts = [np.count_nonzero(_used(tensor, bits), axis=1) for bits in _chunks(weights, tensor, tensor.shape[1])]
    return np.concatenate(counts).astype(np.int64)


def _zeros(tensor: Tensor, in_use: Array) -> int:
    return math.prod(tensor.shape) - int(in_use.sum())


# --- bitmask -------------------------------------------------------------------------------------


def _bitmask_parts(tensor: Tensor, in_use: Array) -> tuple[Tensor, ...]:
    """The tensors that a matrix becomes."""
    rows, columns = tensor.shape
    total, width = int(in_use.sum()), -(-columns // 8)
    itemsize = tensor.nbytes // (rows * columns)
    name = tensor.name.removesuffix(".weight")
    return (
        Tensor(f"{name}.compressed", tensor.dtype, (total,), total * itemsize),
        Tensor(f"{name}.bitmask", "uint8", (rows, width), rows * width),
        Tensor(f"{name}.row_offsets", "int64", (rows,), 8 * rows),
        Tensor(f"{name}.shape", "int64", (2,), 16),
    )


def _write_bitmask(file: NewSafetensors, weights: WeightFile, tensor: Tensor, in_use: Array) -> None:
    values, bitmask, offsets, shape = (part.name for part in _bitmask_parts(tensor, in_use))
    file.append(shape, np.asarray(tensor.shape, "<i8").data)
    file.append(offsets, (np.cumsum(in_use) - in_use).astype("<i8").data)
    for bits in _chunks(weights, tensor, tensor.shape[1]):
        used = _used(tensor, bits)
        file.append(bitmask, np.packbits(used, axis=1, bitorder="little").data)
        if used.any():
            file.append(values, bits[used].data)


# --- npz -----------------------------------------------------------------------------------------

Member = Callable[[str, Any, Sequence[int], Iterator[Array]], None]
"""``member(name, dtype, shape, pieces)`` writes one array of an archive, its values piece by piece."""


@contextmanager
def _npz(fd: int) -> Iterator[Member]:
    """Context with what writes arrays into a new archive; the same arrays give the same bytes."""
    with os.fdopen(os.dup(fd), "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str, dtype: Any, shape: Sequence[int], pieces: Iterator[Array]) -> None:
            if "\0" in name:
                raise FormatError(f"tensor {name!r:.120}: an archive cannot hold a name with NUL")
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(map(int, shape))}
            with archive.open(info, "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, header)
                for piece in pieces:
                    out.write(np.ascontiguousarray(piece, np.dtype(dtype)).tobytes())

        yield member


def _write_rows(member: Member, weights: WeightFile, tensor: Tensor, block: tuple[int, int] | None) -> None:
    """The arrays of a CSR matrix, or of a BSR matrix of `block`; a CSR matrix has blocks of one element."""
    high, wide = block or (1, 1)
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    dtype = numpy_dtype(tensor)
    stored = dtype if tensor.dtype in ("float32", "float64") else np.dtype(np.float32)

    def blocks() -> Iterator[tuple[Array, Array]]:
        """(bits, used) of the blocks: (row of blocks, block, y, x) and (row of blocks, block)."""
        for bits in _chunks(weights, tensor, high * columns):
            cut = bits.reshape(-1, high, columns // wide, wide).swapaxes(1, 2)
            yield cut, np.asarray(_used(tensor, cut).any(axis=(2, 3)))

    counts = np.concatenate([np.count_nonzero(used, axis=1) for _, used in blocks()])
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1])
    index = np.int32 if max(total, rows, columns) < 1 << 31 else np.int64
    member("format", "S3", (), iter([np.asarray(b"bsr" if block else b"csr")]))
    member("shape", np.int64, (2,), iter([np.asarray((rows, columns))]))
    member("indptr", index, (ends.size + 1,), iter([np.zeros(1, index), ends]))
    member("indices", index, (total,), (np.nonzero(used)[1] for _, used in blocks()))
    shape = (total, high, wide) if block else (total,)
    member("data", stored, shape, (cut[used].view(dtype).astype(stored) for cut, used in blocks()))


def _write_two_of_four(member: Member, weights: WeightFile, plan: Plan) -> None:
    tensor, axis = plan.tensor, plan.order[plan.scope.index(4)]
    behind = math.prod(plan.shape[axis + 1 :])
    itemsize = tensor.nbytes // math.prod(plan.shape)
    as_they_are = tensor.dtype in ("float64", "float32", "float16", "int8")
    number = numpy_dtype(tensor) if as_they_are else np.dtype(f"<u{itemsize}")

    reader, shape = StridedReader(), (math.prod(plan.shape[:axis]) * (plan.shape[axis] // 4), 4, behind)
    sizes = tile_sizes(shape, (1, 4, 1), CHUNK_BYTES // itemsize)

    def groups(boxes: Iterable[Box]) -> Iterator[tuple[Array, Array]]:
        """(bits, places) with the 4 members of a group, or the 2 places kept, along axis 1."""
        for box in boxes:
            bits = np.empty(extents(box), f"<u{itemsize}")
            reader.read(weights, tensor, box[0].start * 4 * behind + box[2].start, (4 * behind, behind, 1), bits)
            # A stable sort puts those in use first, and the earliest zeros behind them.
            yield bits, np.sort(np.argsort(~_used(tensor, bits), axis=1, kind="stable")[:, :2], axis=1)

    def kept() -> Iterator[Array]:
        for rows in cells(whole(shape), (sizes[0], 4, behind)):
            parts = list(cells(rows, sizes))
            # Of groups that parts cut, all first values lie before all second ones.
            for which in [slice(0, 2)] if len(parts) == 1 else [slice(0, 1), slice(1, 2)]:
                for bits, places in groups(parts):
                    yield np.take_along_axis(bits, places[:, which], axis=1).view(number)

    def packed() -> Iterator[Array]:
        rest = np.empty(0, np.uint8)
        for _, places in groups(cells(whole(shape), sizes)):
            halves = np.concatenate([rest, (places[:, 0] | places[:, 1] << 2).astype(np.uint8).reshape(-1)])
            even = halves.size // 2 * 2
            yield halves[:even:2] | halves[1:even:2] << 4
            rest = halves[even:]
        yield rest

    halved = (*plan.shape[:axis], plan.shape[axis] // 2, *plan.shape[axis + 1 :])
    with about(f"tensor {tensor.name!r:.120}"):
        member(f"{tensor.name}.values", number, halved, kept())
        size = -(-math.prod(plan.shape) // 8)
        member(f"{tensor.name}.metadata", np.uint8, (size,), packed())
        member(f"{tensor.name}.axis", np.int64, (), iter([np.asarray(axis)]))
        member(f"{tensor.name}.dtype", f"<U{len(tensor.dtype)}", (), iter([np.asarray(tensor.dtype)]))
        member(f"{tensor.name}.shape", np.int64, (len(tensor.shape),), iter([np.asarray(tensor.shape)]))
