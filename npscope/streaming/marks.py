"""Which blocks of part of a tensor survive, a bit for each."""

from __future__ import annotations

import numpy as np

from npscope.streaming.slabs import Array, Box, extents


class Marks:
    """A truth value for each place of a box of some grid, packed along the last axis; false until it is set."""

    def __init__(self, region: Box) -> None:
        *rows, last = extents(region)
        self._origin = [side.start for side in region]
        self._bits = np.zeros((*rows, -(-last // 8)), np.uint8)

    def put(self, box: Box, marks: Array) -> None:
        """Set the values in a box."""
        at, inside = self._place(box)
        wide = np.unpackbits(self._bits[at], axis=-1, bitorder="little")
        wide[..., inside] = marks
        self._bits[at] = np.packbits(wide, axis=-1, bitorder="little")

    def get(self, box: Box) -> Array:
        """The values in a box, as bool."""
        at, inside = self._place(box)
        found: Array = np.unpackbits(self._bits[at], axis=-1, bitorder="little")[..., inside].view(np.bool_)
        return found

    def _place(self, box: Box) -> tuple[Box, slice]:
        """The bytes that hold a box, and where on the last axis it lies among their bits."""
        *rows, last = (
            slice(side.start - start, side.stop - start) for side, start in zip(box, self._origin, strict=True)
        )
        first = last.start // 8
        return (*rows, slice(first, -(-last.stop // 8))), slice(last.start - 8 * first, last.stop - 8 * first)
