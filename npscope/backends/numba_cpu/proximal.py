"""The loops of the proximal steps: measure, decide and rescale while the blocks are in the nearest cache.

A kernel takes a few thousand elements at a time, and reads the threshold of each block itself: one
number for all of them, one a block, or one for the `repeat` blocks of a scope.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from npscope.backends.numba_cpu import vector_shrinkage
from npscope.backends.numba_cpu.codecs import Codec
from npscope.backends.numba_cpu.jit import inner, kernel, standalone
from npscope.backends.numba_cpu.kernels import FILLED, Numbers, load_numbers
from npscope.backends.numba_cpu.lines import call_measurer, call_scaler
from npscope.backends.numba_cpu.nests import place
from npscope.backends.numba_cpu.scalars import least
from npscope.backends.numba_cpu.vectors import Format

STRIP = 2048
"""Elements whose thresholds are read at a time where a block is one element."""


@inner
def read_limits(t: Numbers, i: int, stop: int, limits: Any) -> None:
    """The thresholds of elements [i, stop), dense; -0.0 for zero, which is how `vector_shrinkage.soften` knows it.

    Of zeros that are `FILLED` in, too, which stay zeros.
    """
    load_numbers(*t, i, stop, limits)
    for j in range(np.uintp(stop - i)):
        limit = limits[j]
        limits[j] = -limits.dtype.type(0) if limit == 0 else limit


@cache
def soften_kernel(codec: Codec, form: Format | None, metric: Codec | None) -> Any:
    """The kernel that takes the proximal step of 1-element blocks [i0, i1), without a metric or in one.

    `form` is that of elements which are adjacent, with those of the metric.
    """
    soften, weight = codec.soften, None if metric is None else metric.value
    adjacent, by_lines, lanes = form is not None, False, 1
    soften_line: Any = None
    if form is not None and form.bits >= 32 and metric is None:
        soften_line, by_lines, lanes = vector_shrinkage.soften(form), True, form.lanes

    @kernel
    def soften_elements(
        x: Any, origin: int, grid: Any, elements: Any, h: Any, h_origin: int, h_grid: Any, h_elements: Any,
        i0: int, i1: int, t: Numbers, limits: Any,
    ) -> None:  # fmt: skip
        width, h_width = grid[0, -1], h_grid[0, -1]
        step, h_step = (1, 1) if adjacent else (grid[1, -1], h_grid[1, -1])
        alike = t[0] == FILLED
        if alike:
            read_limits(t, i0, least(i1, i0 + limits.size), limits)
        i = i0
        while i < i1:
            stop = least(least(i1, i + limits.size), least(i + width - i % width, i + h_width - i % h_width))
            if not alike:
                read_limits(t, i, stop, limits)
            at, h_at = origin + place(i, grid), h_origin + place(i, h_grid)
            whole = 0
            if by_lines:
                whole = (stop - i) - (stop - i) % lanes
                for j in range(0, whole, lanes):
                    soften_line(x, at + j, limits, j)
            for j in range(whole, stop - i):
                c = limits.dtype.type(1) if weight is None else weight(h, h_at + j * h_step)
                soften(x, at + j * step, limits[np.uintp(j)], c)
            i = stop

    return soften_elements


@standalone
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


@kernel
def shrink_blocks(
    measure: int, scale: int, x: Any, origin: int, grid: Any, elements: Any, i0: int, i1: int, strip: int,
    t: Numbers, limits: Any, sums: Any, norms: Any, making: Any,
) -> None:  # fmt: skip
    """Shrink the blocks [i0, i1) by their norm."""
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        call_measurer(measure, x, origin, grid, elements, i, stop, sums, norms, making)
        load_numbers(*t, i, stop, limits)
        form_factors(norms, sums, limits, stop - i)
        call_scaler(scale, (x, origin, grid, elements), i, stop, sums)
