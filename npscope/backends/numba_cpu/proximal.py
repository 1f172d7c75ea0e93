"""The loops of the proximal steps: measure, decide and rescale while the blocks are in the nearest cache.

A kernel takes a few thousand elements at a time, and reads the threshold of each block itself: one
number for all of them, one a block, or one for the `repeat` blocks of a scope.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from npscope.backends.numba_cpu.codecs import Codec
from npscope.backends.numba_cpu.jit import inner, kernel
from npscope.backends.numba_cpu.kernels import TWO, place
from npscope.backends.numba_cpu.lines import _measure, _scale, strip_blocks
from npscope.backends.numba_cpu.operands import Layout

STRIP = 2048
"""Elements whose thresholds are read at a time where a block is one element."""


@inner
def read_numbers(buffer: Any, origin: int, grid: Any, repeat: int, i: int, stop: int, out: Any) -> None:
    """The numbers of blocks [i, stop), dense."""
    width, step = grid[0, -1], grid[1, -1]
    start = i
    while i < stop:
        entry = i // repeat
        at = origin + place(entry, grid)
        if repeat > 1 or step == 0:  # one number for several blocks
            after = min(stop, (entry + 1) * repeat if repeat > 1 else i + width - i % width)
            value = buffer[at]
            for j in range(after - i):
                out[np.uintp(i - start + j)] = value
        else:
            after = min(stop, i + width - i % width)
            for j in range(after - i):
                out[np.uintp(i - start + j)] = buffer[at + j * step]
        i = after


@cache
def soften_kernel(codec: Codec, adjacent: bool) -> Any:
    """The kernel that moves the 1-element blocks [i0, i1) towards zero by their thresholds."""
    soften = codec.soften

    @kernel
    def soften_elements(
        x: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int,
        t: Any, t_origin: int, t_grid: Any, repeat: int, limits: Any,
    ) -> None:  # fmt: skip
        width = grid[0, -1]
        step = 1 if adjacent else grid[1, -1]
        i = i0
        while i < i1:
            stop = min(i1, i + limits.size, i + width - i % width)
            read_numbers(t, t_origin, t_grid, repeat, i, stop, limits)
            at = origin + place(i, grid)
            for j in range(stop - i):
                soften(x, np.uintp(at + j * step), limits[np.uintp(j)])
            i = stop

    return soften_elements


@inner
def form_factors(norms: Any, wide: Any, t: Any, count: int) -> None:
    """From norms (rounded, and in float64) to what blocks are multiplied by, in place of the latter.

    1 - t / norm, 0 where the rounded norm is <= t, 1 where nothing changes.
    """
    for k in range(count):
        j = np.uintp(k)
        norm, size, limit = norms[j], wide[j], t[j]
        factor = (size - limit) / size  # always, for a branch would keep LLVM from making vectors
        factor = 0.0 if norm <= limit else factor
        same = (norm != norm) | (limit == 0.0) | ((norm == np.inf) & (limit != np.inf))
        wide[j] = 1.0 if same else factor


@kernel
def shrink_factors(norms: Any, wide: Any, t: Any) -> None:
    """`form_factors` of all blocks whose norms are given."""
    form_factors(norms, wide, t, norms.size)


@cache
def shrink_kernel(layout: Layout) -> Any:
    """The kernel that shrinks the blocks [i0, i1) by their norm."""
    measure, scale, strip = _measure(layout, TWO), _scale(layout), strip_blocks(layout)

    @kernel
    def shrink_blocks(
        x: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int,
        t: Any, t_origin: int, t_grid: Any, repeat: int, limits: Any, sums: Any, norms: Any, limbs: Any,
    ) -> None:  # fmt: skip
        for i in range(i0, i1, strip):
            stop = min(i1, i + strip)
            measure(x, origin, grid, elements, i, stop, sums, norms, limbs)
            read_numbers(t, t_origin, t_grid, repeat, i, stop, limits)
            form_factors(norms, sums, limits, stop - i)
            scale(x, origin, grid, elements, i, stop, sums)

    return shrink_blocks
