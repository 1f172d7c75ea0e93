"""The proximal steps, plain and conditioned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu import lines, proximal
from npscope.backends.numba_cpu.norms import NormWork, norm_ranges
from npscope.backends.numba_cpu.operands import Competitors, Operand, competitors, ranges
from npscope.backends.numba_cpu.writing import Numbers, arrays, fill, rescale
from npscope.errors import ConvergenceError
from npscope.tiling import Leaf, Parts


def shrink(
    target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
) -> Sequence[np.ndarray]:
    """The proximal step of ``t * norm`` on every block, in the metric of `conditioners` if given."""
    # Norms are read where the elements are now, which for a target with an origin is there.
    read = [tuple(Leaf(x.array if x.origin is None else x.origin, x.cut) for x in part) for part in target]
    jobs = []
    for p, (source, part) in enumerate(zip(competitors(read), target, strict=True)):
        if conditioners is None:
            jobs.append(shrink_job(source, Competitors(part), thresholds[p]))
        else:
            written = [Operand(leaf, like) for leaf, like in zip(part, source.leaves, strict=True)]
            metric = [Operand(h, like) for h, like in zip(conditioners[p], source.leaves, strict=True)]
            jobs.append(conditioned_job(source, written, thresholds[p], metric, max_iter, rtol))
    fill(target)
    for run in jobs:
        run()
    return arrays(target)


def shrink_job(source: Competitors, written: Competitors, thresholds: Leaf) -> Callable[[], None]:
    """The job that shrinks every block of `written` by its norm in `source`, whose elements it has by then."""
    limits = Operand(thresholds)
    repeat = source.blocks if thresholds.cut.blocks == 1 else 1
    where = (limits.buffer, limits.origin, limits.grid, repeat)
    x = written.leaves[0]

    def in_place(run: Callable[..., None], make_buffers: Callable[[], tuple[np.ndarray, ...]]) -> Callable[[], None]:
        def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
            buffers = [make_buffers() for _ in range(slots)]
            return lambda slot, i0, i1: run(*x.where, i0, i1, *where, *buffers[slot])

        return ranges(source.total, source.elements, make_work, workspace=1)

    def some_limits(length: int) -> np.ndarray:
        return np.empty(length, dtype=thresholds.array.dtype)

    if source.elements == 1 and x.codec is not None and x.codec.soften is not None:
        run = proximal.soften_kernel(x.codec, x.layout is not None)
        return in_place(run, lambda: (some_limits(proximal.STRIP),))
    if not source.spans_leaves and source.exact and lines.can_sum(x.layout, nk.TWO):
        run = proximal.shrink_kernel(x.layout)
        return in_place(run, lambda: (some_limits(lines.STRIP_BLOCKS), *lines.NormBuffers().all))

    def make_use(slots: int, length: int) -> Callable[..., None]:
        limits = [Numbers(thresholds, source, np.float64, length) for _ in range(slots)]

        def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
            proximal.shrink_factors(norm, wide, limits[slot].fill(i0, i1))
            rescale(written, i0, i1, wide)

        return use

    return norm_ranges(source, 2.0, make_use, shielded=written.spans_leaves)


CONDITIONED_WORKSPACE = 192
"""Bytes of work arrays for one block of the conditioned shrink."""


class ConditionedWork:
    """Work arrays of one thread to solve the conditioned shrink of up to `length` blocks."""

    def __init__(
        self, part: Competitors, metric: list[Operand], thresholds: Leaf, max_iter: int, rtol: float, length: int
    ) -> None:
        self.part, self.metric = part, metric
        self.max_iter, self.rtol = max_iter, rtol
        self.limits = Numbers(thresholds, part, np.float64, length)
        self.arrays = np.empty((11, length))
        self.active = np.empty(length, dtype=np.bool_)
        self.norms = NormWork(part, 2.0, length)

    def _pairs(self, i0: int, i1: int) -> list[tuple[Any, tuple[Any, ...]]]:
        """(kernels, their leading arguments) of every leaf and its metric."""
        return [
            (nk.pair_kernels(x.codec, h.codec), (*x.where, *h.where, i0, i1, x.size))
            for x, h in zip(self.part.leaves, self.metric, strict=True)
        ]

    def solve(self, i0: int, i1: int, hmax: np.ndarray, tau: np.ndarray, sigma: np.ndarray) -> None:
        """The root sigma of every block; ConvergenceError if one is not reached."""
        hi, lo, top, unit, scale_, hmin, n, low, high, squares, slopes = self.arrays[:, : i1 - i0]
        active = self.active[: i1 - i0]
        pairs = self._pairs(i0, i1)
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
            top[:] = self.norms.fill(i0, i1)[0]
        nk.safe_units(top, unit)
        squares[:], hmin[:], hmax[:] = 0.0, np.inf, 0.0
        for made, where in pairs:
            made.widest(*where, unit, squares, hmin, hmax)
        nk.safe_units(squares, scale_)
        hi[:], lo[:] = 0.0, 0.0
        for made, where in pairs:
            made.weighted_squares(*where, unit, scale_, hi, lo)
        t = self.limits.fill(i0, i1)
        nk.open_conditioned(
            top, unit, hi, lo, scale_, t, self.part.exact, self.part.norm.itemsize == 4,
            hmin, hmax, n, tau, sigma, low, high, active,
        )  # fmt: skip
        if not active.any():
            return
        for _ in range(self.max_iter):
            squares[:], slopes[:] = 0.0, 0.0
            for made, where in pairs:
                made.secular_sums(*where, unit, n, hmax, tau, sigma, active, squares, slopes)
            if not nk.newton_step(squares, slopes, sigma, low, high, active, self.rtol):
                return
        raise ConvergenceError(
            f"the conditioned shrink did not reach rtol = {self.rtol} within max_iter = {self.max_iter} steps"
        )


def conditioned_job(
    source: Competitors,
    written: list[Operand],
    thresholds: Leaf,
    metric: list[Operand],
    max_iter: int,
    rtol: float,
) -> Callable[[], None]:
    """Solve every block now, before anything is written; the job then writes.

    A 1-element block cannot fail (its bracket is a point), so those are solved as they are written,
    which needs no memory for each of them.
    """

    def write(i0: int, i1: int, hmax: np.ndarray, tau: np.ndarray, sigma: np.ndarray) -> None:
        for x, h in zip(written, metric, strict=True):
            made = nk.pair_kernels(x.codec, h.codec)
            made.rescale_conditioned(*x.where, *h.where, i0, i1, x.size, hmax, tau, sigma)

    def make_works(slots: int, length: int) -> list[ConditionedWork]:
        return [ConditionedWork(source, metric, thresholds, max_iter, rtol, length) for _ in range(slots)]

    if source.elements == 1:

        def make_both(slots: int, length: int) -> Callable[[int, int, int], None]:
            works, roots = make_works(slots, length), np.empty((slots, 3, length))

            def work(slot: int, i0: int, i1: int) -> None:
                solution = roots[slot, :, : i1 - i0]
                works[slot].solve(i0, i1, *solution)
                write(i0, i1, *solution)

            return work

        return ranges(source.total, 1, make_both, workspace=CONDITIONED_WORKSPACE)

    solutions = np.empty((3, source.total))

    def make_solve(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = make_works(slots, length)
        return lambda slot, i0, i1: works[slot].solve(i0, i1, *solutions[:, i0:i1])

    ranges(source.total, source.elements, make_solve, workspace=CONDITIONED_WORKSPACE)()
    return ranges(
        source.total,
        source.elements,
        lambda slots, length: lambda slot, i0, i1: write(i0, i1, *solutions[:, i0:i1]),
        shielded=source.spans_leaves,
    )
