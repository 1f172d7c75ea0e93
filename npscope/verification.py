"""Whether a file has the sparsity that a pattern or recipe asks for, whoever made the file.

A scope passes when at most `keep` of its blocks hold an element that is not zero; NaN is not
zero, -0.0 is. Nothing is ranked, so a file passes whatever the pruner's norm was, and so does
one with more zeros than asked for.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npscope.coupled import joint_norms
from npscope.errors import SpecError
from npscope.occupancy import WORDS, Piece, PieceReader, any_of, count_of
from npscope.plans import Budget, Coupling, Decision, Group, Plan, Skip
from npscope.recipe import Recipe, resolve
from npscope.slabs import Array, Box, smallest_slab, whole
from npscope.weights import WeightFile, open_weights

SINGLE_PASS_BYTES = 16 << 20
"""What a thread may hold of a tensor; scopes that take more are counted across pieces."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do in all."""


@dataclass(frozen=True, slots=True)
class Offence:
    """The first scope with too many blocks in use.

    `scope` is its index in the canonical ``[out, in, ...]`` grid of scopes, `start` the index of its
    first element in the tensor as it is stored, `used` how many of its blocks are not zero.
    """

    scope: tuple[int, ...]
    start: tuple[int, ...]
    used: int


@dataclass(frozen=True, slots=True)
class Checked:
    """One tensor that was checked: how many scopes have too many blocks in use, and the first of them."""

    plan: Plan
    offending: int
    first: Offence | None

    @property
    def holds(self) -> bool:
        """Whether every scope passes."""
        return not self.offending


@dataclass(frozen=True, slots=True)
class CheckedBudget:
    """Tensors with one budget: blocks in use of each, the limit for each, and the limit for all."""

    budget: Budget
    used: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """Whether all together and each within its bounds have no more blocks in use than may be kept."""
        within = all(used <= most for used, (_, most) in zip(self.used, self.budget.bounds, strict=True))
        return within and sum(self.used) <= self.budget.keep


@dataclass(frozen=True, slots=True)
class CheckedCoupling:
    """Tensors that share a decision: how many scopes have too many blocks in use, the first, and how many it has."""

    coupling: Coupling
    offending: int
    scope: tuple[int, ...] | None
    used: int | None

    @property
    def holds(self) -> bool:
        """Whether every scope passes."""
        return not self.offending


Verdict = Checked | CheckedBudget | CheckedCoupling | Skip


def verify_file(
    path: str | os.PathLike[str], recipe: Recipe, *, strict: bool = False, progress: Progress | None = None
) -> list[Verdict]:
    """What was found for every tensor of the weight file at `path` that `recipe` means to prune; others are skipped.

    SpecError (a ValueError) when there is nothing to check, with `strict` when a tensor cannot take the
    pattern, or for a recipe that allocates by the values before pruning (lamp); FormatError (a
    ValueError) when it is no weight file; OSError when it cannot be read.
    """
    with open_weights(path) as weights:
        decisions = resolve(_without_scores(recipe), weights.tensors.values())
        verdicts = verify(weights, decisions, strict=strict, progress=progress)
        weights.check_unchanged()
        return verdicts


def _without_scores(recipe: Recipe) -> Recipe:
    """The same recipe, without the files that its blocks rank by: only the counts are checked."""
    rules = tuple(replace(rule, scores=None) for rule in recipe.rules)
    return replace(recipe, rules=rules, couplings=tuple(replace(rule, scores=None) for rule in recipe.couplings))


def verify(
    weights: WeightFile,
    decisions: Sequence[Decision],
    *,
    strict: bool = False,
    progress: Progress | None = None,
) -> list[Verdict]:
    """What was found for each decision, in the order given."""
    if strict:
        for decision in decisions:
            if isinstance(decision, Skip) and decision.misfit:
                raise SpecError(f"tensor {decision.tensor.name!r:.120} cannot take the pattern: {decision.reason}")
    if all(isinstance(decision, Skip) for decision in decisions):
        reasons = Counter(decision.reason for decision in decisions if isinstance(decision, Skip))
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise SpecError(f"nothing to check in {len(decisions)} tensors: {listed or 'the file holds none'}")
    tell = _Progress(decisions, progress)
    reader = PieceReader(weights)
    return [
        _coupled(weights, decision, tell) if isinstance(decision, Coupling) else _verdict(reader, decision, tell)
        for decision in decisions
    ]


class _Progress:
    """Adds up what several threads have done."""

    def __init__(self, decisions: Sequence[Decision], progress: Progress | None) -> None:
        plans = [d for d in decisions if isinstance(d, Plan)]
        plans += [plan for d in decisions if isinstance(d, Budget) for plan in d.plans]
        coupled = [tensor for d in decisions if isinstance(d, Coupling) for tensor in d.tensors]
        self._total, self._done = sum(tensor.nbytes for tensor in (*(plan.tensor for plan in plans), *coupled)), 0
        self._progress, self._lock = progress, threading.Lock()

    def advance(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)


def _verdict(reader: PieceReader, decision: Plan | Budget | Skip, tell: _Progress) -> Verdict:
    if isinstance(decision, Skip):
        return decision
    if isinstance(decision, Budget):
        return CheckedBudget(decision, tuple(_used(reader, plan, tell) for plan in decision.plans))
    return _check(reader, decision, decision.keep, tell)


def _coupled(weights: WeightFile, coupling: Coupling, tell: _Progress) -> CheckedCoupling:
    counts = sum(_used_together(weights, group) for group in coupling.groups)
    tell.advance(sum(tensor.nbytes for tensor in coupling.tensors))
    found = np.argwhere(np.asarray(counts) > coupling.keep)
    if not len(found):
        return CheckedCoupling(coupling, 0, None, None)
    scope = tuple(map(int, found[0]))
    return CheckedCoupling(coupling, len(found), scope, int(np.asarray(counts)[scope]))


def _used_together(weights: WeightFile, group: Group) -> Array:
    """How many blocks of each scope are in use in any of the members; the largest magnitude says so exactly."""
    grid = group.members[0].aligned
    used = np.empty(grid, np.uint8)
    for box, norms in joint_norms(group, math.inf, weights):
        used[box] = norms != 0
    return count_of(used, whole(grid), group.scope)[0].astype(np.int64)


def _used(reader: PieceReader, plan: Plan, tell: _Progress) -> int:
    """Blocks in use of a plan with one scope."""
    offence = _check(reader, plan, -1, tell).first  # any count is more than -1
    return 0 if offence is None else offence.used


def _check(reader: PieceReader, plan: Plan, keep: int, tell: _Progress) -> Checked:
    counter = _Counter(plan, keep)

    def work(box: Box, piece: Piece) -> None:
        counter.add(box, piece)
        tell.advance(piece.bits.nbytes)

    reader.each(plan.tensor, plan.shape, counter.period, work)
    return counter.result()


class _Counter:
    """Counts the blocks in use of one tensor, from pieces in any order and on any thread.

    Memory: nothing where a piece holds whole scopes; else a number for every scope, and where a
    block does not fit in a piece a byte for every block. All axes here are those of ``plan.shape``.
    """

    def __init__(self, plan: Plan, keep: int) -> None:
        self._plan, self._keep = plan, keep
        self._block, self._scope = plan.stored(plan.block), plan.stored(plan.scope)
        self._grid, self._scopes = plan.stored(plan.grid), plan.stored(plan.scope_grid)
        in_elements = plan.stored(plan.scope_size)
        self._counts: Array | None = None
        self._blocks: Array | None = None
        self.period = in_elements
        if smallest_slab(plan.shape, in_elements) * plan.itemsize > SINGLE_PASS_BYTES:
            self.period = self._block
            self._counts = np.zeros(self._scopes, np.int64)
            if smallest_slab(plan.shape, self._block) * plan.itemsize > SINGLE_PASS_BYTES:
                self.period = (1,) * len(plan.shape)
                self._blocks = np.zeros(self._grid, np.uint8)
        # Single elements that compete with their neighbours, every scope whole: these have a way of their own.
        lone = max(in_elements[:-1], default=1) == 1 == self._block[-1] and self._counts is None
        self._neighbours = self._scope[-1] if lone else 0
        self._lock = threading.Lock()
        self._offending = 0
        self._first: tuple[int, int] | None = None  # canonical number of the scope, blocks in use

    def add(self, box: Box, piece: Piece) -> None:
        """Count one piece."""
        if self._neighbours in WORDS and piece.surely_within(self._neighbours, self._keep):
            return
        used, blocks = any_of(piece.nonzero(), box, self._block)
        if self._blocks is not None:
            with self._lock:
                self._blocks[blocks] |= used
            return
        counts, scopes = count_of(used, blocks, self._scope)
        if self._counts is None:
            self._judge(counts, scopes)
        else:
            with self._lock:
                self._counts[scopes] += counts

    def result(self) -> Checked:
        """What all pieces together say."""
        if self._blocks is not None:
            self._judge(*count_of(self._blocks, whole(self._grid), self._scope))
        elif self._counts is not None:
            self._judge(self._counts, whole(self._scopes))
        first = None if self._first is None else self._offence(*self._first)
        return Checked(self._plan, self._offending, first)

    def _judge(self, counts: Array, scopes: Box) -> None:
        """Take in the final counts of some scopes."""
        if int(counts.max()) <= self._keep:
            return
        found = np.argwhere(counts > self._keep)
        places = (found + [part.start for part in scopes])[:, self._plan.order].T
        numbers = np.ravel_multi_index(tuple(places), self._plan.scope_grid)
        at = int(np.argmin(numbers))
        first = int(numbers[at]), int(counts[tuple(found[at])])
        with self._lock:
            self._offending += len(found)
            self._first = first if self._first is None else min(first, self._first)

    def _offence(self, number: int, used: int) -> Offence:
        plan = self._plan
        scope = np.unravel_index(number, plan.scope_grid)
        corner = [int(index) * size for index, size in zip(scope, plan.scope_size, strict=True)]
        flat = np.ravel_multi_index(plan.stored(corner), plan.shape)
        start = np.unravel_index(flat, plan.tensor.shape)
        return Offence(tuple(map(int, scope)), tuple(map(int, start)), used)
