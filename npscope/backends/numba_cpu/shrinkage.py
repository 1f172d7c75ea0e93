"""The proximal steps, plain and conditioned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from npscope.backends import CONDITIONER_RANGE, conditioner_error
from npscope.backends.numba_cpu import conditioned, lines, proximal, secular, strips
from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu.loans import Loan
from npscope.backends.numba_cpu.norms import norm_ranges
from npscope.backends.numba_cpu.operands import Competitors, Operand, in_reals
from npscope.backends.numba_cpu.orders import blocks_in_memory_order, outermost_axis
from npscope.backends.numba_cpu.pieces import SOLVE_ELEMENTS, STRIPS_ELEMENTS, ranges
from npscope.backends.numba_cpu.writing import Numbers, arrays, fill, rescale
from npscope.dtypes import kind_of
from npscope.errors import ConvergenceError
from npscope.tiling import Leaf, Part, Parts


def shrink(
    target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
) -> Sequence[np.ndarray]:
    """The proximal step of ``t * norm`` on every block, in the metric of `conditioners` if given."""
    jobs = []
    for part, t, metric in zip(target, thresholds, conditioners or [None] * len(target), strict=True):
        in_order = blocks_in_memory_order(part[0])
        ordered = tuple(map(in_order, part))
        if metric is None:
            (ordered,), _ = in_reals((ordered,), 2)
        # Norms are read where the elements are now, which for a target with an origin is there.
        source = Competitors.of(tuple(Leaf(x.array if x.origin is None else x.origin, x.cut) for x in ordered))
        h = None if metric is None else Metric(tuple(map(in_order, metric)))
        jobs.append(_job(source, ordered, in_order(t), h, max_iter, rtol))
    fill(target)
    for run in jobs:
        run()
    return arrays(target)


def _job(
    source: Competitors, part: Part, thresholds: Leaf, metric: Metric | None, max_iter: int, rtol: float
) -> Callable[[], None]:
    """The job that shrinks a part, whose elements are those of `source` by then."""
    written = Competitors.of(part)
    if source.elements == 1:
        x = written.leaves[0]
        return soften_job(source, thresholds, x, None if metric is None else Operand.of(metric.leaves[0], x))
    if metric is None:
        return shrink_job(source, written, thresholds)
    return conditioned_job(source, written, thresholds, metric, max_iter, rtol)


class Metric:
    """The diagonal metric of a part. SpecError unless every entry is in `CONDITIONER_RANGE`."""

    def __init__(self, part: Part) -> None:
        self.leaves = part
        ends = [_ends(leaf) for leaf in part]
        self.least, self.most = min([least for least, _ in ends]), max([most for _, most in ends])

    @property
    def ordinary(self) -> bool:
        """Whether `ORDINARY_STEPS` suffice, and nothing that ``h / (h + mu)`` is made of leaves the range of float32.

        As a norm is above its threshold by the relative distance of two float64 or more, no mu is further above the
        largest entry than by the reciprocal of that.
        """
        lowest, highest = ORDINARY
        return lowest <= self.least and self.most <= highest and self.most <= self.least * ORDINARY_SPAN


def _ends(leaf: Leaf) -> tuple[float, float]:
    """The least and the largest entry of a conditioner, or SpecError; of an empty one 1 and 1."""
    h: np.ndarray = leaf.array
    if h.size == 0:
        return 1.0, 1.0
    find, rows, dtype = _finder_of_ends(leaf)
    found: list[tuple[Any, Any]] = []

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        return lambda slot, i0, i1: found.append(find(i0, i1))

    ranges(rows, h.size // rows, make_work, workspace=0)()
    lows, highs = np.asarray(found, dtype).T
    ends = np.asarray([lows.min(), highs.max()], dtype)
    least, most = map(float, ends.view(h.dtype))
    if not CONDITIONER_RANGE[0] <= least <= most <= CONDITIONER_RANGE[1]:
        with np.errstate(invalid="ignore"):
            raise conditioner_error(float(h.min()), float(h.max()))
    return least, most


def _finder_of_ends(leaf: Leaf) -> tuple[Callable[[int, int], tuple[Any, Any]], int, np.dtype]:
    """What finds the ends of rows [i0, i1) of a conditioner, how many rows there are, and the dtype of the ends.

    Positive floats order like their bits; NaN and negative ones come behind. NumPy is quick at integers of any width,
    but not as quick as memory: it reads them twice, and does not ask for what comes.
    """
    h: np.ndarray = leaf.array
    by_bits = h.dtype.isnative and not kind_of(h.dtype).is_integer
    word = np.dtype(f"u{h.itemsize}") if by_bits else h.dtype
    if by_bits and h.flags.forc and h.flags.aligned:
        words = Operand.of(leaf).buffer.view(word)
        return partial(conditioned.ends_of, words), words.size, word
    rows = (h.ravel("K") if h.flags.forc else np.moveaxis(h, outermost_axis(h), 0)).view(word)

    def find(i0: int, i1: int) -> tuple[Any, Any]:
        with np.errstate(invalid="ignore"):
            return rows[i0:i1].min(), rows[i0:i1].max()

    return find, len(rows), word


def _thresholds(thresholds: Leaf, part: Competitors) -> nk.Numbers:
    """Thresholds over blocks or scopes as kernels read them."""
    repeat = part.blocks if thresholds.cut.blocks == 1 else 1
    return nk.numbers_over(Operand.of(thresholds), repeat, thresholds.array.dtype)


def in_place(
    part: Competitors,
    run: Callable[..., None],
    *make_buffers: Callable[[], Any],
    piece: int = STRIPS_ELEMENTS,
) -> Callable[[], None]:
    """The job of ``run(i0, i1, *buffers)`` on all blocks, each thread with its own buffers."""

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        buffers = [[make() for make in make_buffers] for _ in range(slots)]
        return lambda slot, i0, i1: run(i0, i1, *buffers[slot])

    return ranges(part.total, part.elements, make_work, workspace=0, piece=piece)


def soften_job(part: Competitors, thresholds: Leaf, x: Operand, metric: Operand | None) -> Callable[[], None]:
    """The job that shrinks blocks of one element, which needs no memory for each of them, and cannot fail."""
    form = x.layout.form if x.layout is not None and (metric is None or metric.float_layout) else None
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
        measure = lines.measurer_address(x.layout, nk.TWO, x.place.unit, source.norm)
        head: tuple[Any, ...] = (measure, strips.scaler(x, shrinks=True), *x.raw)
        strip, t = lines.strip_blocks(x.layout), _thresholds(thresholds, written)
        return in_place(
            written,
            lambda i0, i1, limits, norms: proximal.shrink_blocks(*head, i0, i1, strip, t, limits, *norms.work.all),
            lambda: nk.room_for(t, lines.STRIP_BLOCKS, thresholds.array.dtype),
            lambda: Loan(lines.NormBuffers, lines.STRIP_BLOCKS, source.norm.itemsize),
        )

    def make_use(slots: int, length: int) -> Callable[..., None]:
        limits = [Numbers(thresholds, source, np.float64, length) for _ in range(slots)]

        def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
            proximal.shrink_factors(norm, wide, limits[slot].fill(i0, i1))
            rescale(written, i0, i1, wide, shrinks=True)

        return use

    return norm_ranges(source, 2.0, make_use, shielded=written.spans_leaves)


ORDINARY, ORDINARY_SPAN, ORDINARY_STEPS = (2.0**-40, 2.0**40), 1e8, 20
"""The range of an `ordinary` metric, by which factor entries differ at most, and steps; 16 were the most ever seen."""

MANY_STEPS = 1000
"""A limit that no iteration reaches: a Newton step to the root of a concave function divides what is left of its value
times its slope by 4, and of both together float64 and the widest metric hold less than 2 ** 1100."""


def conditioned_job(
    source: Competitors, written: Competitors, thresholds: Leaf, metric: Metric, max_iter: int, rtol: float
) -> Callable[[], None]:
    """The job that shrinks blocks in a metric; it has no error to tell that does not come now.

    A strip of blocks is written as soon as it is solved. Only where an iteration might not end in time, all blocks
    are solved now, before anything is written.
    """
    if metric.ordinary and max_iter >= ORDINARY_STEPS:
        return _solver(written, thresholds, metric, MANY_STEPS, rtol, None)
    mus = np.empty(source.total)
    _solver(source, thresholds, metric, max_iter, rtol, mus)()
    (leaves, readings), (weights, metric_readings) = _chain(written.leaves), _chain(_weights(written, metric))
    weigh = conditioned.weigher_address(readings, metric_readings, paired=False)
    return in_place(written, lambda i0, i1, s: conditioned.weigh_blocks(weigh, leaves, weights, i0, i1, mus, s), _work)


def _weights(part: Competitors, metric: Metric) -> list[Operand]:
    """The metric of a part, leaf by leaf."""
    return [Operand.of(h, x) for x, h in zip(part.leaves, metric.leaves, strict=True)]


def _chain(leaves: Sequence[Operand]) -> tuple[Any, tuple[conditioned.Reading, ...]]:
    """Leaves as kernels take them, and how their elements are read."""
    return conditioned.chained([(*x.raw, x.size) for x in leaves]), tuple([(x.codec, x.float_layout) for x in leaves])


def _work() -> np.ndarray:
    """The numbers of a strip of blocks."""
    return np.empty(secular.ROWS * secular.DISTANCE)


def _solver(
    part: Competitors, thresholds: Leaf, metric: Metric, max_iter: int, rtol: float, mus: np.ndarray | None
) -> Callable[[], None]:
    """The job that solves every block of a part: it finds `mus`, or where there are none shrinks the blocks."""
    elements = part.elements
    (leaves, readings), (weights, metric_readings) = _chain(part.leaves), _chain(_weights(part, metric))
    dtypes = {x.array.dtype for x in part.leaves} | {h.array.dtype for h in metric.leaves}
    single = all(kind_of(dtype).rounds_correctly for dtype in dtypes)
    plane = np.dtype(np.float32 if single else np.float64)
    narrow = part.norm.itemsize == 4
    quick = single and narrow and metric.ordinary and elements <= secular.QUICK_ELEMENTS
    solve = conditioned.solve_kernel(part.exact, narrow, single, quick)
    deal_v, deal_h = (conditioned.dealer_address(x, elements, plane) for x in (readings, metric_readings))
    weigh = conditioned.weigher_address(readings, metric_readings, paired=True) if mus is None else 0
    code = (deal_v, deal_h, weigh, leaves, weights)
    kept = np.empty(0) if mus is None else mus
    near, pitch = conditioned.near_enough(rtol, single), conditioned.strip_pitch(elements)
    t = _thresholds(thresholds, part)

    def solve_range(i0: int, i1: int, *works: np.ndarray) -> None:
        if not solve(*code, i0, i1, t, elements, pitch, max_iter, *near, kept, *works):
            raise ConvergenceError(
                f"the conditioned shrink did not reach rtol = {rtol} within max_iter = {max_iter} steps"
            )

    def planes() -> np.ndarray:
        return np.empty(conditioned.plane_numbers(elements), dtype=plane)

    return in_place(
        part,
        solve_range,
        planes,
        planes,
        _work,
        lambda: nk.room_for(t, secular.WIDTH, thresholds.array.dtype),
        piece=SOLVE_ELEMENTS,
    )
