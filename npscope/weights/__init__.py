"""What npscope needs of a file of weights, whatever its format.

A format is a module here with one class that is a `WeightFile`. Its writer is told the
tensors in the order in which the file holds them, each one either copied or written from
its first byte to its last: that is what a packed file, a deflated archive and a file of
tagged fields can all do, in one pass and without holding a tensor in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from npscope.errors import FormatError, SpecError

if TYPE_CHECKING:
    import numpy as np

    from npscope.weights.output import Target

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""Floating dtypes whose tensors can be pruned, by the names that `npscope.dtypes` uses."""

RANKED = (*FLOATS, "int8")
"""All dtypes whose tensors can be pruned."""

_OTHERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"bool", "complex64", "complex128"}


class Axes(NamedTuple):
    """The axes of a stored weight by what they mean: stacked matrices, output, input, kernel."""

    stack: tuple[int, ...]
    out: int
    into: int
    kernel: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The canonical order ``[stack, out, in, *kernel]``, in which positions are counted."""
        return (*self.stack, self.out, self.into, *self.kernel)

    def reversed(self) -> Axes:
        """The same axes of an array that is stored in Fortran order, which is C order of the reversed shape."""
        last = len(self.order) - 1
        stack, kernel = (tuple(last - axis for axis in axes) for axes in (self.stack, self.kernel))
        return Axes(stack, last - self.out, last - self.into, kernel)

    @property
    def has_matrix(self) -> bool:
        """Whether the fan-in is one axis, or lies side by side behind the stack with the output axis on one side."""
        leads = self.stack == tuple(range(len(self.stack)))
        return not self.kernel or (leads and self.out in (len(self.stack), len(self.order) - 1))

    def matrix(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and order that make `shape` a (stack of) ``[out, fan-in]``, fan-in in storage order.

        SpecError (a ValueError) when the axes are stored in an order of which no reshape makes one.
        """
        if not self.has_matrix:
            raise SpecError(
                f"out is axis {self.out} and the fan-in axes {(self.into, *self.kernel)}: stored like this they form "
                "no [out, fan-in] matrix; a pattern with one size along an axis fits"
            )
        if not self.kernel:
            return shape, self.order
        stack = tuple(shape[axis] for axis in self.stack)
        fan_in = math.prod(shape[axis] for axis in (self.into, *self.kernel))
        lead = tuple(range(len(stack)))
        if self.out < self.into:
            return (*stack, shape[self.out], fan_in), (*lead, len(lead), len(lead) + 1)
        return (*stack, fan_in, shape[self.out]), (*lead, len(lead) + 1, len(lead))


class Use(NamedTuple):
    """What a file with a graph says of a tensor: which nodes compute with it, and as what.

    `op` is the type of those nodes and `node` the path of the first; `axes` is None where
    the tensor is no weight, and `reason` says why.
    """

    op: str
    node: str
    axes: Axes | None
    reason: str = ""


class Tensor(NamedTuple):
    """One tensor of a file: its name, dtype, shape in storage order (C-contiguous) and size in bytes.

    `dtype` is the name that NumPy or ml_dtypes has for it, or what the file says where they have
    none; such a tensor can be copied but not read as numbers. `use` is None in files that hold
    tensors alone. `fortran` says that the file means the axes in reverse: the array that was saved
    had shape ``shape[::-1]``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    use: Use | None = None
    fortran: bool = False

    @property
    def saved_shape(self) -> tuple[int, ...]:
        """The shape as whoever saved the tensor knows it, whatever order it is stored in."""
        return self.shape[::-1] if self.fortran else self.shape

    @property
    def is_float(self) -> bool:
        """Real floating point of a width that npscope ranks."""
        return self.dtype in FLOATS

    @property
    def is_ranked(self) -> bool:
        """Of a dtype that can be pruned: floating, or int8, as symmetric quantisers make it."""
        return self.dtype in RANKED

    @property
    def sign_bits(self) -> int:
        """How many of the highest bits of a number a zero may have: the sign of a float."""
        return int(self.is_float)

    @property
    def is_opaque(self) -> bool:
        """Of a dtype whose numbers npscope cannot read: packed below a byte, or unknown."""
        return not self.is_float and self.dtype not in _OTHERS


class Writer(Protocol):
    """Writes a file with the same tensors and other values; every method raises OSError as it comes.

    Tensors come in the order of the file, each one once.
    """

    def copy(self, tensor: Tensor) -> None:
        """Take over the next tensor of the file as it is."""

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append bytes to the next tensor of the file, until all of its bytes are there."""


class WeightFile(Protocol):
    """An open file of weights, checked in full when opened except for the values themselves."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in the order in which the file holds them."""

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from byte `start` on; FileError when the file ends early."""

    def target(self, path: str | os.PathLike[str], *, force: bool) -> Target:
        """The place for this file's successor at `path`.

        SpecError (a ValueError) when something is there that may not be replaced: this file itself,
        a file without `force`, anything of another kind. FileError when its directory does not exist.
        """

    def own_place(self) -> Target:
        """The place of this file itself, for a successor that replaces it."""

    def files(self) -> Sequence[str]:
        """Paths of all that is read: of files, or of a folder whose content is the model."""

    def places(self, path: str | os.PathLike[str]) -> Sequence[str]:
        """Paths of all that a successor at `path` writes, likewise."""

    def successor(self, target: Target) -> AbstractContextManager[Writer]:
        """Context with the writer of a file with the same tensors and other values.

        The file is at `target`, complete and on disk, when the context ends without an error; with
        one, nothing is. FormatError at the end when a tensor is missing or incomplete, FileError when
        this file has changed since it was opened.
        """

    def check_unchanged(self) -> None:
        """FileError when size or modification time are not what they were at opening."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...


def open_weights(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> WeightFile:
    """The weight file at `path`, open for reading, its header checked; for a sharded model its folder or index.

    The content decides which format it is. `max_bytes` limits what the members of an npz file
    inflate to together. FormatError (a ValueError) when it is no weight file, a damaged one or
    another than its name says; OSError when it cannot be read. Pickles are never opened as such.
    """
    from npscope.weights.detection import format_of

    found = format_of(path)
    if found == "npy":
        from npscope.weights.npy import open_npy

        return open_npy(path)
    if found == "npz":
        from npscope.weights.npz import Npz

        return Npz(path, max_bytes=max_bytes)
    if found == "sharded safetensors":
        from npscope.weights.sharded import Sharded

        return Sharded(path)
    if found == "ONNX":
        from npscope.weights.onnx import Onnx

        return Onnx(path)
    from npscope.weights.safetensors import open_safetensors

    return open_safetensors(path)


def reads_side_by_side(weights: WeightFile) -> bool:
    """Whether several threads may read this file at once: a format says so with ``side_by_side = True``."""
    return bool(getattr(weights, "side_by_side", False))


def numpy_dtype(tensor: Tensor) -> np.dtype[np.generic]:
    """The little-endian NumPy dtype of a tensor that can be pruned; FormatError for any other."""
    import numpy as np

    if not tensor.is_ranked:
        raise FormatError(f"tensor {tensor.name!r:.120} has dtype {tensor.dtype}; needed is one of {', '.join(RANKED)}")
    if tensor.dtype in ("float64", "float32", "float16", "int8"):
        return np.dtype(tensor.dtype).newbyteorder("<")
    import ml_dtypes

    dtype: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, tensor.dtype))
    return dtype
