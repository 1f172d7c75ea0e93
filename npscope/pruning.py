"""Prunes a file of weights into a new file, slab by slab.

The output is there complete or not at all, also when it takes the place of the input. Memory is one
slab, and for scopes that are larger than a slab the norms of their blocks: those are computed
in a first pass over the tensor, and a second one drops the blocks that lost.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npscope.block import BlockSpec
from npscope.errors import FormatError, SpecError
from npscope.namespace import block_mask, block_norms, keep_largest
from npscope.plans import Plan, Skip
from npscope.recipe import Recipe, resolve
from npscope.slabs import Array, Box, SlabReader, count_zeros_and_nans, smallest_slab
from npscope.weights import Writer, open_weights

SINGLE_PASS_BYTES = 32 << 20
"""A scope that takes a slab of at most this size is decided in one pass."""

NanPolicy = Literal["refuse", "keep"]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do in all."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done to one tensor; `norm_kept` is ``||after|| / ||before||`` in the 2-norm, None if undefined."""

    plan: Plan
    zeros_before: int
    zeros_after: int
    norm_kept: float | None


def prune_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    recipe: Recipe,
    *,
    nan: NanPolicy = "refuse",
    strict: bool = False,
    force: bool = False,
    in_place: bool = False,
    dry_run: bool = False,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Outcome | Skip]:
    """Prune the weights in `source` into the new file `target`; say for every tensor what was done.

    Parameters
    ----------
    source
        A safetensors, npy or npz file, or the folder or index of a sharded model. It is only read.
    target
        Place for the result; None in place, and may be None in a dry run.
    recipe
        What to do with which tensor.
    nan
        "refuse" raises on a tensor to prune that holds NaN; "keep" ranks it above infinity.
    strict
        Raise when a tensor that is meant cannot take the pattern, instead of leaving it as it is.
    force
        Replace an existing `target`. The input itself is never replaced.
    in_place
        Replace the input itself, when the result is complete.
    dry_run
        Do everything but write.
    max_bytes
        Refuse an npz whose members inflate to more than that.
    progress
        Called after every slab.

    Raises
    ------
    SpecError
        (a ValueError) nothing can be pruned, `target` exists or is `source`, a glob matches nothing.
    FormatError
        (a ValueError) `source` is damaged or no weight file, or holds NaN.
    FileError, OSError
        Reading or writing failed; there is no output then.
    """
    if target is not None and in_place:
        raise SpecError("an output and --in-place exclude each other")
    if target is None and not in_place and not dry_run:
        raise SpecError("no output: give -o OUT, --in-place or --dry-run")
    with open_weights(source, max_bytes=max_bytes) as weights:
        place = weights.own_place() if in_place else None
        if target is not None:
            place = weights.target(target, force=force)
        decisions = resolve(recipe, weights.tensors.values())
        _require_work(decisions, strict)
        reader, ticker = SlabReader(weights), _Ticker(decisions, progress)
        if place is None or dry_run:
            outcomes = list(_outcomes(decisions, reader, None, nan, ticker))
            weights.check_unchanged()
        else:
            with weights.successor(place) as writer:
                outcomes = list(_outcomes(decisions, reader, writer, nan, ticker))
        return outcomes


def _require_work(decisions: Sequence[Plan | Skip], strict: bool) -> None:
    skips = [decision for decision in decisions if isinstance(decision, Skip)]
    misfits = [skip for skip in skips if skip.misfit]
    if strict and misfits:
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise SpecError(f"tensor {misfits[0].tensor.name!r:.120} cannot take the pattern: {misfits[0].reason}{more}")
    if len(skips) == len(decisions):
        reasons = Counter(skip.reason for skip in sorted(skips, key=lambda skip: not skip.misfit))
        listed = "; ".join(f"{count} x {reason}" for reason, count in list(reasons.items())[:3])
        raise SpecError(f"nothing to prune in {len(skips)} tensors: {listed or 'the file holds none'}")


class _Ticker:
    """Tells how much of the work is done."""

    def __init__(self, decisions: Iterable[Plan | Skip], progress: Progress | None) -> None:
        self._total = sum(decision.tensor.nbytes * _passes(decision) for decision in decisions)
        self._done = 0
        self._progress = progress

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _outcomes(
    decisions: Iterable[Plan | Skip], reader: SlabReader, writer: Writer | None, nan: NanPolicy, ticker: _Ticker
) -> Iterator[Outcome | Skip]:
    for decision in decisions:
        if isinstance(decision, Plan):
            yield _prune(decision, reader, writer, nan, ticker)
            continue
        if writer is not None:
            writer.copy(decision.tensor)
        ticker.advance(decision.tensor.nbytes)
        yield decision


def _prune(plan: Plan, reader: SlabReader, writer: Writer | None, nan: NanPolicy, ticker: _Ticker) -> Outcome:
    """Prune one tensor into `writer`."""
    kept = None if _passes(plan) == 1 else _select(plan, reader, ticker)
    before = after = nans = 0
    norm_before = norm_after = 0.0
    for box, values in reader.slabs(plan.tensor, plan.shape, _period(plan)):
        zeros, unordered = count_zeros_and_nans(values)
        before, nans = before + zeros, nans + unordered
        norm_before = math.hypot(norm_before, _norm(values))
        view = values.transpose(plan.order)
        if kept is None:
            keep_largest(view, plan.keep, plan.block, plan.scope, ord=plan.ord, out=view)
        else:
            BlockSpec(view, plan.block).apply_mask(kept[_on_grid(plan, box)])
        after += count_zeros_and_nans(values)[0]
        norm_after = math.hypot(norm_after, _norm(values))
        if writer is not None:
            writer.write(plan.tensor, values.reshape(-1).view(np.uint8).data)
        ticker.advance(values.nbytes)
    if nans and nan == "refuse":
        raise FormatError(
            f"tensor {plan.tensor.name!r:.120} holds {nans} NaN of {math.prod(plan.shape)} values; "
            "--nan keep ranks them first, --exclude leaves the tensor alone"
        )
    defined = math.isfinite(norm_before) and norm_before > 0
    return Outcome(plan, before, after, norm_after / norm_before if defined else None)


def _norm(values: Array) -> float:
    return float(block_norms(values.reshape(-1), (-1,))[0])


def _select(plan: Plan, reader: SlabReader, ticker: _Ticker) -> Array:
    """The mask of the blocks to keep, over the whole block grid, from a pass over the tensor."""
    grid = tuple(plan.shape[axis] // size for axis, size in zip(plan.order, plan.block, strict=True))
    norms = np.empty(grid, np.float64 if plan.tensor.dtype == "float64" else np.float32)
    for box, values in reader.slabs(plan.tensor, plan.shape, _period(plan)):
        norms[_on_grid(plan, box)] = block_norms(values.transpose(plan.order), plan.block, ord=plan.ord)
        ticker.advance(values.nbytes)
    mask: Array = block_mask(norms, plan.keep, (), plan.scope)
    return mask


def _on_grid(plan: Plan, box: Box) -> Box:
    """The blocks of the grid that a slab holds."""
    sides = zip((box[axis] for axis in plan.order), plan.block, strict=True)
    return tuple(slice(side.start // size, side.stop // size) for side, size in sides)


def _passes(decision: Plan | Skip) -> int:
    """How often a tensor is read: twice when a scope is too large for a slab."""
    if isinstance(decision, Skip):
        return 1
    return 1 if smallest_slab(decision.shape, _scope_period(decision), _itemsize(decision)) <= SINGLE_PASS_BYTES else 2


def _itemsize(plan: Plan) -> int:
    return plan.tensor.nbytes // math.prod(plan.shape)


def _period(plan: Plan) -> tuple[int, ...]:
    """Elements along every stored axis that a slab must not cut: those of a scope, or in two passes of a block."""
    return _scope_period(plan) if _passes(plan) == 1 else _stored(plan, plan.block)


def _scope_period(plan: Plan) -> tuple[int, ...]:
    return _stored(plan, [size * count for size, count in zip(plan.block, plan.scope, strict=True)])


def _stored(plan: Plan, sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes of canonical axes as sizes of stored axes."""
    return tuple(sizes[plan.order.index(axis)] for axis in range(len(sizes)))
