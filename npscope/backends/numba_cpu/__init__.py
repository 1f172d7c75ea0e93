"""The CPU backend: Numba kernels over pieces of the block grid, on a pool of threads.

Every operation walks pieces: ranges of whole scopes, or of the blocks of a scope too large
for one piece. Per piece the norms or keys of the blocks come into dense work arrays, the
decision is made there, and the decision is written back. The work arrays are allocated
before the first write; for 1-element blocks nothing else is, because the passes over a
large scope (counting, ties, writing) read the array again.

To read it in order:

- how operands lie: `operands` (buffers, loops, layouts), `orders`, `nests`, `rows` (walks over them in LLVM code),
  `loans` (work arrays);
- how a call is divided: `pieces`, on threads;
- how code is made: `jit`, `scalars`, `vectors` and `lanes` (LLVM vectors), `codecs` (elements);
- norms: `lines`, `vector_norms`, `totals` and `doubts` (blocks in rows), `kernels`, `exact`, `arithmetic` (any block),
  `norms`;
- who is kept: `ranking` (keys, and what reads them), `search`, `vector_search` and `lane_search` (the k-th key of a
  scope), `strips` (the steps of kernels), `scope_strips` (whole scopes), `scope_passes` (large ones), `planes` and
  `side_by_side` (scopes that lie side by side), `vector_selection`, `groups` (n:m), `brackets`, `large_scopes` and
  `large_cuts`, `selection` (which of these);
- writing: `vector_writing`, `writing`;
- the proximal step: `proximal`, `vector_shrinkage`, `secular` and `conditioned` (in a metric), `shrinkage`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from npscope.backends import derived
from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu.groups import groups_job
from npscope.backends.numba_cpu.norms import norm_ranges, norms
from npscope.backends.numba_cpu.operands import Competitors, Operand, in_reals
from npscope.backends.numba_cpu.orders import Positions, as_it_is, blocks_in_memory_order, in_memory_order, table_cut
from npscope.backends.numba_cpu.pieces import ranges
from npscope.backends.numba_cpu.ranking import Ranking, ranked_in_reals
from npscope.backends.numba_cpu.selection import kth, select_blocks, strips_of_thresholds
from npscope.backends.numba_cpu.shrinkage import shrink
from npscope.backends.numba_cpu.writing import Numbers, Written, arrays, drop, fill, rescale, with_numbers
from npscope.tiling import Leaf, Part, Parts

__all__ = [
    "NAME",
    "apply_mask",
    "count_nonzero",
    "element_masks",
    "kth",
    "mask",
    "midpoint",
    "norms",
    "prune",
    "scale",
    "shrink",
    "sum_squares",
    "threshold",
]

NAME = "numba"

midpoint = partial(derived.midpoint, kth)


def prune(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Sequence[np.ndarray]:
    """Zero every block of `target` but those at the `keep` first-ranked places of `source`."""
    _select(target, source, keep, ord, prunes=True)
    return arrays(target)


def mask(source: Leaf, keep: Leaf, ord: float | None, out: Leaf | None = None) -> np.ndarray:
    """True for the `keep` first-ranked blocks of every scope: the array of `out`, or ``(S, n)`` bool."""
    if out is None:
        cut = source.cut
        out = Leaf(np.empty((cut.scopes, cut.blocks), dtype=np.bool_), table_cut(cut))
    _select(((out,),), ((source,),), keep, ord)
    marked: np.ndarray = out.array
    return marked


def element_masks(parts: Parts, keep: Leaf, ord: float | None) -> Sequence[np.ndarray]:
    """True for the elements of the `keep` first-ranked blocks of every scope: a bool array like each leaf."""
    target = tuple(
        tuple(Leaf(np.empty_like(leaf.array, dtype=np.bool_, subok=False), leaf.cut) for leaf in part) for part in parts
    )
    _select(target, parts, keep, ord)
    return arrays(target)


def _select(
    target: Parts,
    source: Parts,
    keep: Leaf,
    ord: float | None,
    *,
    prunes: bool = False,
) -> None:
    """Write to every block of `target` whether it is at one of the `keep` first-ranked places of `source`.

    `target` is bools; or elements, if it `prunes`: +0.0 is written where they are not kept. Those that have an origin
    are copied from it first, but not before all memory is there that is needed; `groups_job` copies by itself.
    """
    quick = groups_job(target, source, keep, ord)
    if quick is not None:
        quick()
        return
    ready = partial(fill, target if prunes else ())  # of bools, all are written
    shielded = prunes and any(len(part) > 1 for part in target)
    target, source, keep = in_memory_order(target, source, keep)

    def select(written: Parts, ranking: Ranking, positions: Sequence[Positions] | None = None) -> bool:
        targets = [Written([Operand.of(leaf) for leaf in part]) for part in in_reals(written, 2, in_planes=True)[0]]
        return select_blocks(ranking, keep, targets, ready, shielded=shielded, positions=positions)

    ranking = Ranking(*ranked_in_reals(source, ord))
    orders = [] if ranking.fits_a_piece else [blocks_in_memory_order(part[0], scopes=False) for part in target]
    if any(in_order is not as_it_is for in_order in orders):
        ordered, read = (
            tuple(tuple(map(in_order, part)) for in_order, part in zip(orders, parts, strict=True))
            for parts in (target, source)
        )
        positions = [Positions(part[0].cut, plain[0].cut) for part, plain in zip(ordered, target, strict=True)]
        if select(ordered, Ranking(*ranked_in_reals(read, ord)), positions):
            return
    select(target, ranking)


def threshold(target: Parts, source: Parts, thresholds: Leaf, ord: float | None) -> Sequence[np.ndarray]:
    """Zero the blocks of `target` whose norm in `source` is below their threshold."""

    def job(read: Part, part: Part) -> Callable[[], None]:
        in_order = blocks_in_memory_order(part[0])
        (source_part,), ord_ = in_reals((tuple(map(in_order, read)),), ord)
        (target_part,), _ = in_reals((tuple(map(in_order, part)),), 2)
        measured, written, over = Competitors.of(source_part), Competitors.of(target_part), in_order(thresholds)
        by = float(ord_ or 2)
        quick = strips_of_thresholds(measured, written, over, by)
        if quick is not None:
            return quick

        def make_use(slots: int, length: int) -> Callable[..., None]:
            limits = [Numbers(over, measured, over.array.dtype, length) for _ in range(slots)]
            masks = np.empty((slots, length), dtype=np.bool_)

            def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
                mask_ = masks[slot, : i1 - i0]
                nk.not_below(norm, limits[slot].fill(i0, i1), mask_)
                drop(written, i0, i1, mask_)

            return use

        return norm_ranges(measured, by, make_use, shielded=written.spans_leaves)

    jobs = [job(read, part) for read, part in zip(source, target, strict=True)]
    fill(target)
    for run in jobs:
        run()
    return arrays(target)


def apply_mask(target: Parts, mask: Leaf) -> Sequence[np.ndarray]:
    """Zero the blocks of `target` whose mask is False."""
    return with_numbers(target, mask, np.bool_, drop)


def scale(target: Parts, multipliers: Leaf) -> Sequence[np.ndarray]:
    """Multiply blocks by a float64 each; 0 writes +0.0, 1 keeps the bits."""
    return with_numbers(target, multipliers, np.float64, rescale)


def count_nonzero(parts: Parts, eps: float) -> int:
    """How many elements do not satisfy ``|x| <= eps``."""
    return sum(_count_nonzero(part, eps) for part in _walked(parts))


def _count_nonzero(part: Competitors, eps: float) -> int:
    def count(leaf: Operand, i0: int, i1: int) -> int:
        return nk.count_above(leaf, eps)(i0, i1)

    return int(_total(part, count))


def sum_squares(parts: Parts) -> float:
    """The sum of ``|x| ** 2`` of all elements, in float64."""
    return sum(_total(part, nk.sum_of_squares) for part in _walked(parts))


def _walked(parts: Parts) -> list[Competitors]:
    """The parts, their blocks in the order of memory."""
    return [Competitors.of(tuple(map(blocks_in_memory_order(part[0]), part))) for part in parts]


def _total(part: Competitors, measure: Callable[[Operand, int, int], float]) -> float:
    """The sum of ``measure(leaf, i0, i1)`` over all blocks and leaves of a part, the same for any number of threads."""

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        def work(slot: int, i0: int, i1: int) -> None:
            found.extend(measure(leaf, i0, i1) for leaf in part.leaves)

        return work

    found: list[float] = []
    ranges(part.total, part.elements, make_work, fixed=True)()
    return sum(sorted(found))  # not in the order in which threads came
