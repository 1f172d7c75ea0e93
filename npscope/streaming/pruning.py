"""Prunes a file of weights into a new file, slab by slab.

The output is there complete or not at all, also when it takes the place of the input. Memory is a few
slabs, whatever the size of the file: a scope that fits in a slab is decided in the pass that
writes, a larger one before. Where very many of these lie beside each other, a bit for each block
waits in an unnamed file beside the output. While a slab is worked on the next one is read and the
last written.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from npscope.block import BlockSpec, sum_squares
from npscope.errors import FormatError, SpecError
from npscope.recipes.coupled import masks_of
from npscope.recipes.planning import decided
from npscope.recipes.plans import Budget, Coupled, Coupling, Decision, Plan, Skip
from npscope.recipes.recipe import Recipe
from npscope.recipes.scores import check_scores_unchanged
from npscope.streaming.dropping import ByWindows, Dropper, dropper_of, droppers_of, slabs_for
from npscope.streaming.limits import Search
from npscope.streaming.marks import MarksFile
from npscope.streaming.masks import MaskWriter, mask_file, mask_target
from npscope.streaming.ranked import RankedReader, Slab
from npscope.streaming.slabs import count_zeros_and_nans
from npscope.weights import Tensor, WeightFile, Writer, open_weights
from npscope.weights.background import Background
from npscope.weights.output import require_free

LEAST_SQUARES = 2.0**-900
"""Below this a sum of squares in float64 may have lost some to underflow."""

NanPolicy = Literal["refuse", "keep"]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do in all."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done to one tensor; `norm_kept` is ``||after|| / ||before||`` in the 2-norm, None if undefined."""

    plan: Plan | Coupled
    blocks_kept: int
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
    mask_out: str | os.PathLike[str] | None = None,
    report_out: str | os.PathLike[str] | None = None,
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
    mask_out
        Place for a file with the masks of the pruned tensors (`npscope.streaming.masks`). It is there
        just before the result is: no result is seen without its masks. One with the same bytes
        may be there already, without `force` too.
    report_out
        Where the caller is going to write a report: refused, as `mask_out` is, when that belongs to what
        is read or written here.
    max_bytes
        Refuse an npz whose members inflate to more than that.
    progress
        Called after every slab.

    Raises
    ------
    SpecError
        (a ValueError) nothing can be pruned, `target` exists or is `source`, a glob matches nothing;
        a mask or report would be written over, or into the folder of, something else.
    FormatError
        (a ValueError) `source` is damaged or no weight file, or holds NaN.
    FileError, OSError
        Reading or writing failed; there is no output then.
    """
    if target is not None and in_place:
        raise SpecError("an output and --in-place exclude each other")
    if target is None and not in_place and not dry_run:
        raise SpecError("no output: give -o OUT, --in-place or --dry-run")
    with ExitStack() as opened:
        weights = opened.enter_context(open_weights(source, max_bytes=max_bytes))
        _require_places_apart(weights, target, recipe, mask_out, report_out)
        place = weights.own_place() if in_place else None
        if target is not None:
            place = weights.target(target, force=force)
        decisions = opened.enter_context(decided(recipe, weights))
        ahead = opened.enter_context(Background())
        mask_place = None if mask_out is None else mask_target(mask_out, decisions, force=force)
        _require_work(decisions, strict)
        ticker = _Ticker(weights, progress)
        search, reader = Search(RankedReader(weights, ahead), ticker.more), RankedReader(weights, ahead)
        if place is None or dry_run:
            with MarksFile(None) as file:
                droppers = _droppers(decisions, weights, search, file)
                outcomes = _write(weights, droppers, reader, None, None, nan, ticker)
            weights.check_unchanged()
            check_scores_unchanged(decisions)
        else:
            with ExitStack() as stack:
                masks = None
                if mask_place is not None:
                    masks = stack.enter_context(mask_file(mask_place, decisions))
                    place = replace(place, companion=masks)
                writer = stack.enter_context(weights.successor(place))
                behind = _Behind(writer, stack.enter_context(Background()))
                folder = place.path if os.path.isdir(place.path) else os.path.dirname(place.path)
                file = stack.enter_context(MarksFile(folder))
                droppers = _droppers(decisions, weights, search, file)
                outcomes = _write(weights, droppers, reader, behind, masks, nan, ticker)
                check_scores_unchanged(decisions)
        skips = {decision.tensor.name: decision for decision in decisions if isinstance(decision, Skip)}
        return [outcomes.get(name) or skips[name] for name in weights.tensors]


def _require_places_apart(
    weights: WeightFile,
    target: str | os.PathLike[str] | None,
    recipe: Recipe,
    mask: str | os.PathLike[str] | None,
    report: str | os.PathLike[str] | None,
) -> None:
    """SpecError when a mask or report is to be where something else is read or written."""
    if mask is None and report is None:
        return
    taken = {"input": weights.files(), "recipe": [] if recipe.path is None else [recipe.path]}
    for path in recipe.score_files:
        with open_weights(path) as scores:
            taken[f"scores {path!r}"] = scores.files()
    if target is not None:
        taken["output"] = weights.places(target)
    if mask is not None:
        require_free(mask, "mask", taken)
        taken["mask"] = [os.fsdecode(mask)]
    if report is not None:
        require_free(report, "report", taken)


def _droppers(
    decisions: Iterable[Decision], weights: WeightFile, search: Search, file: MarksFile
) -> dict[str, Dropper]:
    """What drops the losers of each tensor, by its name."""
    found: dict[str, Dropper] = {}
    for decision in decisions:
        if isinstance(decision, Plan):
            found[decision.tensor.name] = dropper_of(decision, search, file)
        elif isinstance(decision, Budget):
            shared = droppers_of(decision, search, file)
            found |= {plan.tensor.name: each for plan, each in zip(decision.plans, shared, strict=True)}
        elif isinstance(decision, Coupling):
            masks = masks_of(decision, weights, search.tick)
            found |= {t.name: ByWindows(Coupled(t, decision), masks[t.name]) for t in decision.tensors}
    return found


def _require_work(decisions: Sequence[Decision], strict: bool) -> None:
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
    """Tells how much of the work is done, counting each read before the last as far as it was foreseen."""

    def __init__(self, weights: WeightFile, progress: Progress | None) -> None:
        self._total = sum(tensor.nbytes for tensor in weights.tensors.values())
        self._done = 0
        self._progress = progress

    def more(self, nbytes: int) -> None:
        """Bytes of a slab that had to be read before the pass that writes."""
        self._total += nbytes
        self.advance(nbytes)

    def advance(self, nbytes: int) -> None:
        """Bytes that are done."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Behind:
    """A writer whose last piece may still be under way: reading and ranking go on meanwhile."""

    def __init__(self, writer: Writer, background: Background) -> None:
        self._writer, self._background = writer, background
        self._under_way: Future[None] | None = None

    def copy(self, tensor: Tensor) -> None:
        """Take over a tensor."""
        self.wait()
        self._writer.copy(tensor)

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append `data`, which stays as it is until two calls later, or `wait`."""
        self.wait()
        self._under_way = self._background.submit(self._writer.write, tensor, data)

    def wait(self) -> None:
        """Return when all is written; raise what went wrong."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()


def _write(
    weights: WeightFile,
    droppers: Mapping[str, Dropper],
    reader: RankedReader,
    writer: _Behind | None,
    masks: MaskWriter | None,
    nan: NanPolicy,
    ticker: _Ticker,
) -> dict[str, Outcome]:
    """Drop and write, tensor by tensor in the order of the file; by name what was done."""
    outcomes = {}
    slabs = reader.read(
        (droppers[name].plan, box) for name in weights.tensors if name in droppers for box in slabs_for(droppers[name])
    )
    for name, tensor in weights.tensors.items():
        if name in droppers:
            outcomes[name] = _drop(droppers[name], slabs, writer, masks, nan, ticker)
        else:
            if writer is not None:
                writer.copy(tensor)
            ticker.advance(tensor.nbytes)
    if writer is not None:
        writer.wait()
    return outcomes


def _zeros_and_norm(values: np.ndarray) -> tuple[int, float]:
    """How many values are zero, and the 2-norm of all: by the plain sum of squares, where float64 can hold that."""
    flat = BlockSpec(values.reshape(-1), (-1,))
    nonzero = flat.nnz()
    squares = sum_squares(flat.data)
    lost = squares == math.inf or (nonzero and squares < LEAST_SQUARES)
    return values.size - nonzero, float(flat.norms()[0]) if lost else math.sqrt(squares)


def _drop(
    dropper: Dropper,
    slabs: Iterator[Slab],
    writer: _Behind | None,
    masks: MaskWriter | None,
    nan: NanPolicy,
    ticker: _Ticker,
) -> Outcome:
    """Drop the losers of one tensor in the next slabs, write them, and what was kept into `masks`."""
    plan = dropper.plan
    left = math.prod(plan.shape)
    before = after = nans = 0
    norm_before = norm_after = 0.0
    while left:
        slab = next(slabs)
        left -= slab.values.size
        zeros, norm = _zeros_and_norm(slab.values)
        if math.isnan(norm):
            nans += count_zeros_and_nans(slab.values)[1]
        norm_before, before = math.hypot(norm_before, norm), before + zeros
        if masks is not None:
            marks = np.ones(slab.values.shape, np.uint8)
            dropper.drop(slab._replace(values=marks, scores=slab.ranked))
            masks.add(plan.tensor, marks.reshape(-1).view(np.bool_))
        dropper.drop(slab)
        zeros, norm = _zeros_and_norm(slab.values)
        norm_after, after = math.hypot(norm_after, norm), after + zeros
        if writer is not None:
            writer.write(plan.tensor, slab.values.reshape(-1).view(np.uint8).data)
        ticker.advance(slab.values.nbytes)
    if nans and nan == "refuse":
        raise FormatError(
            f"tensor {plan.tensor.name!r:.120} holds {nans} NaN of {math.prod(plan.shape)} values; "
            "--nan keep ranks them first, --exclude leaves the tensor alone"
        )
    defined = math.isfinite(norm_before) and norm_before > 0
    return Outcome(plan, dropper.kept, before, after, norm_after / norm_before if defined else None)
