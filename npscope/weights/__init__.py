"""What npscope needs of a file of weights, whatever its format.

A format is a module here with one class that is a `WeightFile`. Its writer is told the
tensors in the order in which the file holds them, each one either copied or written from
its first byte to its last: that is what a packed file, a deflated archive and a file of
tagged fields can all do, in one pass and without holding a tensor in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from npscope.errors import FormatError

if TYPE_CHECKING:
    import numpy as np

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""Dtypes whose tensors can be pruned, by the names that `npscope.dtypes` uses."""

_OTHERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"bool", "complex64", "complex128"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: its name, dtype, shape in storage order (C-contiguous) and size in bytes.

    `dtype` is the name that NumPy or ml_dtypes has for it, or what the file says where they have
    none; such a tensor can be copied but not read as numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Real floating point of a width that npscope ranks."""
        return self.dtype in FLOATS

    @property
    def is_opaque(self) -> bool:
        """Of a dtype whose numbers npscope cannot read: packed below a byte, or unknown."""
        return not self.is_float and self.dtype not in _OTHERS


class Writer(Protocol):
    """Writes a file with the same tensors and other values; every method raises OSError as it comes."""

    def copy(self, tensor: Tensor) -> None:
        """Take over the next tensor of the file as it is."""

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append bytes to the next tensor of the file, until all of its bytes are there."""

    def finish(self) -> None:
        """Write what follows the last tensor; FormatError when a tensor is missing or incomplete."""


class WeightFile(Protocol):
    """An open file of weights, checked in full when opened except for the values themselves."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in the order in which the file holds them."""

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from byte `start` on; FileError when the file ends early."""

    def writer(self, fd: int) -> Writer:
        """A writer of this file's successor into the empty file `fd`, which stays the caller's."""

    def is_same_file(self, path: str | os.PathLike[str]) -> bool:
        """Whether `path` exists and is this very file, by whatever link."""

    def check_unchanged(self) -> None:
        """FileError when size or modification time are not what they were at opening."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...


def open_weights(path: str | os.PathLike[str]) -> WeightFile:
    """The weight file at `path`, open for reading, its header checked.

    FormatError (a ValueError) when it is no weight file or a damaged one; OSError when it
    cannot be read. Pickles are never opened as such.
    """
    from npscope.weights.safetensors import Safetensors

    return Safetensors(path)


def numpy_dtype(tensor: Tensor) -> np.dtype[np.generic]:
    """The little-endian NumPy dtype of a float tensor; FormatError for any other."""
    import numpy as np

    if not tensor.is_float:
        raise FormatError(f"tensor {tensor.name!r:.120} has dtype {tensor.dtype}; needed is one of {', '.join(FLOATS)}")
    if tensor.dtype in ("float64", "float32", "float16"):
        return np.dtype(tensor.dtype).newbyteorder("<")
    import ml_dtypes

    dtype: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, tensor.dtype))
    return dtype
