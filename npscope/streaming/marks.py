"""Which blocks of part of a tensor survive, a bit for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import IO, Self

import numpy as np

from npscope.streaming.slabs import Array, Box, extents


class Marks:
    """A truth value for each place of a box of some grid, packed along the last axis; false until it is set."""

    def __init__(self, region: Box, bits: Array | None = None) -> None:
        *rows, last = extents(region)
        self.region, self._origin = region, [side.start for side in region]
        self.bits: Array = np.zeros((*rows, -(-last // 8)), np.uint8) if bits is None else bits

    def put(self, box: Box, marks: Array) -> None:
        """Set the values in a box."""
        at, inside = self._place(box)
        wide = np.unpackbits(self.bits[at], axis=-1, bitorder="little")
        wide[..., inside] = marks
        self.bits[at] = np.packbits(wide, axis=-1, bitorder="little")

    def get(self, box: Box) -> Array:
        """The values in a box, as bool."""
        at, inside = self._place(box)
        found: Array = np.unpackbits(self.bits[at], axis=-1, bitorder="little")[..., inside].view(np.bool_)
        return found

    def _place(self, box: Box) -> tuple[Box, slice]:
        """The bytes that hold a box, and where on the last axis it lies among their bits."""
        *rows, last = (
            slice(side.start - start, side.stop - start) for side, start in zip(box, self._origin, strict=True)
        )
        first = last.start // 8
        return (*rows, slice(first, -(-last.stop // 8))), slice(last.start - 8 * first, last.stop - 8 * first)


class MarksFile:
    """Marks that memory should not hold, in a file without a name; there is none before it is needed.

    It is made in `folder`, or for None where temporary files go.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def keep(self, marks: Marks) -> Callable[[], Marks]:
        """Take over marks; what is returned maps them into memory again, to be read only and not for long."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - the context of this object closes it
        start = self._file.seek(0, 2)
        self._file.write(marks.bits.data)
        self._file.flush()
        return partial(_mapped, self._file, marks.region, start, marks.bits.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._file is not None:
            self._file.close()


def _mapped(file: IO[bytes], region: Box, start: int, shape: tuple[int, ...]) -> Marks:
    return Marks(region, np.memmap(file, np.uint8, "r", start, shape))
