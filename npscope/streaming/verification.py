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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from npscope.errors import SpecError
from npscope.recipes.coupled import blocks_in_use
from npscope.recipes.planning import decided
from npscope.recipes.plans import Budget, Coupling, Decision, Plan, Skip, parts_of
from npscope.recipes.recipe import Recipe
from npscope.streaming.occupancy import WORDS, Piece, PieceReader, Walk, any_of, count_of
from npscope.streaming.slabs import Array, Box, smallest_slab
from npscope.weights import WeightFile, open_weights

SINGLE_PASS_BYTES = 16 << 20
"""What a thread may hold of a tensor; scopes that whole rows of more bytes hold are counted across pieces, if few."""

COUNTERS = 1 << 20
"""Scopes, or blocks, of which a number is held while pieces come; more than that are read whole, by parts of rows."""

BATCH_BYTES = 16 << 20
"""What the counters of tensors may hold that are read without a pause in between; a budget is not cut."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes to do in all."""


class Offence(NamedTuple):
    """The first scope with too many blocks in use.

    `scope` is its index in the canonical ``[out, in, ...]`` grid of scopes, `start` the index of its
    first element in the tensor as it was saved, `used` how many of its blocks are not zero.
    """

    scope: tuple[int, ...]
    start: tuple[int, ...]
    used: int


class Checked(NamedTuple):
    """One tensor that was checked: how many scopes have too many blocks in use, and the first of them."""

    plan: Plan
    offending: int
    first: Offence | None

    @property
    def holds(self) -> bool:
        """Whether every scope passes."""
        return not self.offending


class CheckedBudget(NamedTuple):
    """Tensors with one budget: blocks in use of each, the limit for each, and the limit for all."""

    budget: Budget
    used: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """Whether all together and each within its bounds have no more blocks in use than may be kept."""
        within = all(used <= most for used, (_, most) in zip(self.used, self.budget.bounds, strict=True))
        return within and sum(self.used) <= self.budget.keep


class CheckedCoupling(NamedTuple):
    """Coupled tensors: how many scopes have too many blocks with an element in use in any of their members.

    `scope` is the index of the first of them in the grid of scopes, `used` how many blocks are in use there.
    """

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

    SpecError (a ValueError) when there is nothing to check, or with `strict` when a tensor cannot take
    the pattern; FormatError (a ValueError) when it is no weight file; OSError when it cannot be read.
    """
    with open_weights(path) as weights, decided(recipe, weights) as decisions:
        verdicts = verify(weights, decisions, strict=strict, progress=progress)
        weights.check_unchanged()
        return verdicts


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
    verdicts: list[Verdict] = []
    for batch in _batches(decisions):
        reader.each([counter.walk(tell) for _, counters in batch for counter in counters])
        verdicts += [_verdict(weights, decision, counters, tell) for decision, counters in batch]
        del batch  # before the next one is made
    return verdicts


class _Progress:
    """Adds up what several threads have done."""

    def __init__(self, decisions: Sequence[Decision], progress: Progress | None) -> None:
        self._total = sum(part.tensor.nbytes for decision in decisions for part in parts_of(decision))
        self._done = 0
        self._progress, self._lock = progress, threading.Lock()

    def advance(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)


def _batches(decisions: Sequence[Decision]) -> Iterator[list[tuple[Decision, list[_Counter]]]]:
    """Decisions with the counters of their tensors, so many that these take about `BATCH_BYTES`."""
    batch: list[tuple[Decision, list[_Counter]]] = []
    held = 0
    for decision in decisions:
        if isinstance(decision, Budget):
            counters = [_Counter(plan, -1) for plan in decision.plans]  # any count is more than -1, so it is told
        else:
            counters = [_Counter(decision, decision.keep)] if isinstance(decision, Plan) else []
        batch.append((decision, counters))
        held += sum(counter.nbytes for counter in counters)
        if held > BATCH_BYTES:
            yield batch
            batch, held = [], 0
    yield batch


def _verdict(weights: WeightFile, decision: Decision, counters: Sequence[_Counter], tell: _Progress) -> Verdict:
    if isinstance(decision, Skip):
        return decision
    if isinstance(decision, Coupling):
        return _check_coupling(weights, decision, tell)
    found = [counter.result() for counter in counters]
    if isinstance(decision, Budget):
        return CheckedBudget(decision, tuple(0 if each.first is None else each.first.used for each in found))
    return found[0]


def _check_coupling(weights: WeightFile, coupling: Coupling, tell: _Progress) -> CheckedCoupling:
    counts = blocks_in_use(coupling, weights, tell.advance)
    found = np.argwhere(counts > coupling.keep)
    if not found.size:
        return CheckedCoupling(coupling, 0, None, None)
    scope = tuple(map(int, found[0]))
    return CheckedCoupling(coupling, len(found), scope, int(counts[scope]))


class _Counter:
    """Counts the blocks in use of one tensor, from pieces in any order and on any thread.

    Memory: nothing where a piece holds whole scopes; else a number for every scope, and where a
    block does not fit in a piece a byte for every block, at most `COUNTERS` of them unless they are
    large. All axes here are those of ``plan.shape``.
    """

    def __init__(self, plan: Plan, keep: int) -> None:
        self._plan, self._keep = plan, keep
        self._block, self._scope = _stored(plan, plan.block), _stored(plan, plan.scope)
        self._grid = tuple(n // size for n, size in zip(plan.shape, self._block, strict=True))
        self._scopes = tuple(n // size for n, size in zip(self._grid, self._scope, strict=True))
        itemsize = plan.tensor.nbytes // math.prod(plan.shape)
        in_elements = tuple(b * s for b, s in zip(self._block, self._scope, strict=True))
        self._counts: Array | None = None
        self._blocks: Array | None = None
        self.period = in_elements
        if self._goes_across(in_elements, itemsize, self._scopes):
            self.period = self._block
            self._counts = np.zeros(self._scopes, np.int64)
            if self._goes_across(self._block, itemsize, self._grid):
                self.period = (1,) * len(plan.shape)
                self._blocks = np.zeros(self._grid, np.uint8)
        # Single elements that compete with their neighbours, every scope whole: these have a way of their own.
        lone = max(in_elements[:-1], default=1) == 1 == self._block[-1] and self._counts is None
        self._neighbours = self._scope[-1] if lone else 0
        self._lock = threading.Lock()
        self._offending = 0
        self._first: tuple[int, int] | None = None  # canonical number of the scope, blocks in use

    def _goes_across(self, size: tuple[int, ...], itemsize: int, grid: tuple[int, ...]) -> bool:
        """Whether things of a size are cut by pieces."""
        alone = math.prod(size) * itemsize > SINGLE_PASS_BYTES
        in_rows = smallest_slab(self._plan.shape, size) * itemsize > SINGLE_PASS_BYTES
        return alone or (in_rows and math.prod(grid) <= COUNTERS)

    @property
    def nbytes(self) -> int:
        """About what it holds."""
        return 1024 + sum(0 if numbers is None else numbers.nbytes for numbers in (self._counts, self._blocks))

    def walk(self, tell: _Progress) -> Walk:
        """How its tensor is read: every piece is counted, and told."""

        def work(box: Box, piece: Piece) -> None:
            self.add(box, piece)
            tell.advance(piece.bits.nbytes)

        return Walk(self._plan.tensor, self._plan.shape, self.period, work)

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
        whole = tuple(slice(0, length) for length in self._grid)
        if self._blocks is not None:
            self._judge(*count_of(self._blocks, whole, self._scope))
        elif self._counts is not None:
            self._judge(self._counts, tuple(slice(0, length) for length in self._scopes))
        first = None if self._first is None else self._offence(*self._first)
        return Checked(self._plan, self._offending, first)

    def _judge(self, counts: Array, scopes: Box) -> None:
        """Take in the final counts of some scopes."""
        if int(counts.max()) <= self._keep:
            return
        found = np.argwhere(counts > self._keep)
        places = (found + [part.start for part in scopes])[:, self._plan.order].T
        numbers = np.ravel_multi_index(tuple(places), tuple(self._scopes[axis] for axis in self._plan.order))
        at = int(np.argmin(numbers))
        first = int(numbers[at]), int(counts[tuple(found[at])])
        with self._lock:
            self._offending += len(found)
            self._first = first if self._first is None else min(first, self._first)

    def _offence(self, number: int, used: int) -> Offence:
        order = self._plan.order
        scope = np.unravel_index(number, tuple(self._scopes[axis] for axis in order))
        sizes = zip(scope, self._plan.scope, self._plan.block, strict=True)
        corner = [int(index) * count * size for index, count, size in sizes]
        flat = np.ravel_multi_index(_stored(self._plan, corner), self._plan.shape)
        start = np.unravel_index(flat, self._plan.tensor.shape)
        index = tuple(map(int, start))
        return Offence(tuple(map(int, scope)), index[::-1] if self._plan.tensor.fortran else index, used)


def _stored(plan: Plan, sizes: Sequence[int]) -> tuple[int, ...]:
    """Numbers of canonical axes as those of the axes of ``plan.shape``."""
    return tuple(sizes[plan.order.index(axis)] for axis in range(len(sizes)))
