"""The proximal steps, plain and conditioned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npscope.backends import CONDITIONER_RANGE, conditioner_error
from npscope.backends.numba_cpu import conditioned, lines, proximal, secular
from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu.loans import Loan
from npscope.backends.numba_cpu.norms import norm_ranges
from npscope.backends.numba_cpu.operands import (
    SOLVE_ELEMENTS,
    STRIPS_ELEMENTS,
    Competitors,
    Operand,
    competitors,
    ranges,
)
from npscope.backends.numba_cpu.vectors import LANES
from npscope.backends.numba_cpu.writing import Numbers, arrays, fill, rescale
from npscope.errors import ConvergenceError, SpecError
from npscope.tiling import Leaf, Part, Parts, axis_cut


def shrink(
    target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
) -> Sequence[np.ndarray]:
    """The proximal step of ``t * norm`` on every block, in the metric of `conditioners` if given."""
    # Norms are read where the elements are now, which for a target with an origin is there.
    read = [tuple(Leaf(x.array if x.origin is None else x.origin, x.cut) for x in part) for part in target]
    try:
        jobs = [
            _job(source, part, thresholds[p], None if conditioners is None else conditioners[p], max_iter, rtol)
            for p, (source, part) in enumerate(zip(competitors(read), target, strict=True))
        ]
    except ConvergenceError:
        for leaf in (leaf for metric in conditioners or () for leaf in metric):
            require_conditioner(leaf.array)  # which may be what kept the iteration from its end
        raise
    fill(target)
    for run in jobs:
        run()
    return arrays(target)


def _job(
    source: Competitors, part: Part, thresholds: Leaf, conditioners: Part | None, max_iter: int, rtol: float
) -> Callable[[], None]:
    """The job that shrinks a part, whose elements are those of `source` by then."""
    written = [Operand(leaf, like) for leaf, like in zip(part, source.leaves, strict=True)]
    metric = None if conditioners is None else [
        Operand(h, like) for h, like in zip(conditioners, source.leaves, strict=True)
    ]  # fmt: skip
    if source.elements == 1:
        if metric is not None:
            require_conditioner(metric[0].array)
        return soften_job(source, thresholds, written[0], metric[0] if metric else None)
    if metric is None:
        return shrink_job(source, Competitors(part), thresholds)
    return conditioned_job(source, written, thresholds, metric, max_iter, rtol)


def require_conditioner(h: np.ndarray) -> None:
    """SpecError unless every entry of `h` is in `CONDITIONER_RANGE`."""
    numbers = Operand(Leaf(h, axis_cut(h.shape, None)))
    count_outside = nk.count_outside(numbers, *CONDITIONER_RANGE)
    found: list[int] = []

    def count(slot: int, i0: int, i1: int) -> None:
        found.append(count_outside(i0, i1))

    ranges(h.size, 1, lambda slots, length: count, workspace=1)()
    if any(found):
        with np.errstate(invalid="ignore"):
            raise conditioner_error(float(h.min()), float(h.max()))


def _thresholds(thresholds: Leaf, part: Competitors) -> nk.Numbers:
    """Thresholds over blocks or scopes as kernels read them."""
    repeat = part.blocks if thresholds.cut.blocks == 1 else 1
    return nk.numbers_over(Operand(thresholds), repeat, thresholds.array.dtype)


def in_place(
    part: Competitors,
    run: Callable[..., None],
    *make_buffers: Callable[[], Any],
    shielded: bool = False,
    piece: int = STRIPS_ELEMENTS,
) -> Callable[[], None]:
    """The job of ``run(i0, i1, *buffers)`` on all blocks, each thread with its own buffers."""

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        buffers = [[make() for make in make_buffers] for _ in range(slots)]
        return lambda slot, i0, i1: run(i0, i1, *buffers[slot])

    return ranges(part.total, part.elements, make_work, workspace=0, piece=piece, shielded=shielded)


def soften_job(part: Competitors, thresholds: Leaf, x: Operand, metric: Operand | None) -> Callable[[], None]:
    """The job that shrinks blocks of one element, which needs no memory for each of them, and cannot fail."""
    form = x.layout.form if x.layout is not None and (metric is None or metric.layout is not None) else None
    soften = proximal.soften_kernel(x.codec, form, None if metric is None else metric.codec)
    where, t = (*x.where, *(x if metric is None else metric).where), _thresholds(thresholds, part)
    return in_place(
        part,
        lambda i0, i1, limits: soften(*where, i0, i1, t, limits),
        lambda: nk.room_for(t, proximal.STRIP, thresholds.array.dtype),
    )


def shrink_job(source: Competitors, written: Competitors, thresholds: Leaf) -> Callable[[], None]:
    """The job that shrinks every block of `written` by its norm in `source`, whose elements it has by then."""
    x = written.leaves[0]
    if x.layout is not None and not source.spans_leaves and source.exact and lines.can_sum(x.layout, nk.TWO):
        layout, unit = x.layout.compiled, x.place.unit
        measure, scale = lines.measurer_address(layout, nk.TWO, unit, source.norm), lines.scaler_address(layout, unit)
        head: tuple[Any, ...] = (measure, scale, *x.where)
        strip, t = lines.strip_blocks(x.layout), _thresholds(thresholds, written)
        return in_place(
            written,
            lambda i0, i1, limits, norms: proximal.shrink_blocks(*head, i0, i1, strip, t, limits, *norms.work.all),
            lambda: nk.room_for(t, lines.STRIP_BLOCKS, thresholds.array.dtype),
            lambda: Loan(lines.NormBuffers, lines.STRIP_BLOCKS, source.norm),
        )

    def make_use(slots: int, length: int) -> Callable[..., None]:
        limits = [Numbers(thresholds, source, np.float64, length) for _ in range(slots)]

        def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
            proximal.shrink_factors(norm, wide, limits[slot].fill(i0, i1))
            rescale(written, i0, i1, wide)

        return use

    return norm_ranges(source, 2.0, make_use, shielded=written.spans_leaves)


def conditioned_job(
    source: Competitors,
    written: list[Operand],
    thresholds: Leaf,
    metric: list[Operand],
    max_iter: int,
    rtol: float,
) -> Callable[[], None]:
    """Solve every block now, before anything is written; the job then writes."""
    total, elements = source.total, source.elements
    mus = np.empty(total)
    pairs = tuple((x.codec, x.layout, h.codec, h.layout) for x, h in zip(source.leaves, metric, strict=True))
    leaves = tuple((*x.where, *h.where, x.size) for x, h in zip(source.leaves, metric, strict=True))
    narrow, looks = source.norm.itemsize == 4, [0]
    single = all(leaf.kind is not None and leaf.kind.rounds_correctly for leaf in (*source.leaves, *metric))
    plane = np.dtype(np.float32 if single else np.float64)
    solve, deal = conditioned.solve_kernel(narrow, single), conditioned.dealer_address(pairs, leaves, plane)
    t, near, pitch = (
        _thresholds(thresholds, source),
        conditioned.near_enough(rtol, single),
        conditioned.strip_pitch(elements),
    )

    def solve_range(i0: int, i1: int, v: np.ndarray, h: np.ndarray, s: np.ndarray, limits: np.ndarray) -> None:
        works = (leaves, i0, i1, t, elements, pitch, max_iter, *near, v, h, s, limits, mus)
        found = solve(deal, *looks, *works)
        if found == conditioned.LOOK_CLOSER:
            looks[:] = [conditioned.looker_address(source.exact, narrow, leaves, thresholds.array.dtype, plane)]
            found = solve(deal, *looks, *works)
        if found == conditioned.OUTSIDE:
            for leaf in metric:
                require_conditioner(leaf.array)
            raise SpecError("a conditioner changed while it was read; it must stay as it is until the call returns")
        if found == conditioned.TOO_MANY_STEPS:
            raise ConvergenceError(
                f"the conditioned shrink did not reach rtol = {rtol} within max_iter = {max_iter} steps"
            )

    def planes() -> np.ndarray:
        return np.empty(conditioned.plane_numbers(elements), dtype=plane)

    in_place(
        source,
        solve_range,
        planes,
        planes,
        lambda: np.empty(secular.ROWS * secular.DISTANCE),
        lambda: nk.room_for(t, secular.WIDTH, thresholds.array.dtype),
        piece=SOLVE_ELEMENTS,
    )()

    weighs = [_weigh(x, h) for x, h in zip(written, metric, strict=True)]

    def write(i0: int, i1: int, mu: np.ndarray) -> None:
        for weigh in weighs:
            weigh(i0, i1, mus, mu)

    return in_place(source, write, lambda: np.empty(conditioned.STRIP + LANES), shielded=source.spans_leaves)


def _weigh(x: Operand, h: Operand) -> Callable[..., None]:
    if x.layout is not None and h.layout is not None and x.layout.run == h.layout.run:
        weigh = conditioned.weigh_kernel(x.codec, h.codec, x.layout.run, x.layout.form, h.layout.form)
    else:
        weigh = conditioned.weigh_kernel(x.codec, h.codec, 0, None, None)
    return lambda i0, i1, *numbers: weigh(*x.where, *h.where, i0, i1, x.size, *numbers)
