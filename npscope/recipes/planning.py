"""What a recipe does to an open file: scores opened, counts settled, tensor by tensor. Nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np

from npscope.recipes.allocation import NormHistogram, Norms
from npscope.recipes.coupled import joint_norms
from npscope.recipes.members import window_of
from npscope.recipes.plans import Budget, Coupled, Coupling, Decision, Group, Member, Plan, Skip
from npscope.recipes.recipe import Recipe, resolve
from npscope.weights import Axes, Tensor, WeightFile, open_weights

EXACT_BLOCKS = 1 << 16
"""Norms of a tensor with at most as many blocks are held one by one for LAMP, those of others as a histogram."""


@contextmanager
def decided(recipe: Recipe, weights: WeightFile) -> Iterator[list[Decision]]:
    """Context with the decisions of `recipe` on an open file, in which the files of its scores are open.

    SpecError and FormatError (ValueErrors) as `npscope.recipes.recipe.resolve` and `npscope.weights.open_weights`.
    """
    with ExitStack() as stack:
        scores = {path: stack.enter_context(open_weights(path)) for path in recipe.score_files}
        yield resolve(recipe, weights.tensors.values(), scores=scores, norms=lambda plan: _norms_of(plan, weights))


def _norms_of(plan: Plan, weights: WeightFile) -> Norms:
    """The norms of all blocks of a plan, strip by strip."""
    block = tuple(plan.block[plan.order.index(axis)] for axis in range(len(plan.order)))
    member = Member(window_of(plan.tensor, reshape=plan.shape), block, plan.order)
    found = (norms for _, norms in joint_norms(Group((member,), plan.scope), plan.ord, weights))
    if plan.scopes * plan.blocks <= EXACT_BLOCKS:
        return Norms.of(np.concatenate([norms.reshape(-1) for norms in found]))
    histogram = NormHistogram()
    for norms in found:
        histogram.add(norms)
    return histogram.norms()


class Planned(NamedTuple):
    """What is to be done with one tensor of a file, and why.

    `axes` are words for the stored axes as they are understood, `blocks` all blocks that compete
    with each other in some scope, `keep` how many of them survive (None in a budget, where only
    the values tell). Tensors of one `group` share a decision.
    """

    tensor: Tensor
    rule: str
    axes: tuple[str, ...]
    pattern: str | None = None
    along: str | None = None
    blocks: int | None = None
    keep: int | None = None
    group: str | None = None
    skipped: str | None = None
    misfit: bool = False


def plan_file(path: str | os.PathLike[str], recipe: Recipe) -> list[Planned]:
    """What `recipe` would do to every tensor of the file at `path`, in the order of the file.

    Values are read only where an allocation needs them. Errors as `decided`.
    """
    with open_weights(path) as weights, decided(recipe, weights) as decisions:
        by_tensor = {plan.tensor.name: plan for decision in decisions for plan in _planned(decision)}
        weights.check_unchanged()
        return [by_tensor[name] for name in weights.tensors]


def _planned(decision: Decision) -> Sequence[Planned]:
    """A line for each tensor of a decision."""
    if isinstance(decision, Skip):
        tensor = decision.tensor
        words = axes_in_words(decision.axes, tensor)
        return [Planned(tensor, decision.rule, words, skipped=decision.reason, misfit=decision.misfit)]
    if isinstance(decision, Coupling):
        return [_coupled(Coupled(tensor, decision)) for tensor in decision.tensors]
    if isinstance(decision, Budget):
        total = sum(plan.scopes * plan.blocks for plan in decision.plans)
        pattern = f"keep {decision.keep} of {total} blocks in all"
        return [_single(plan, pattern, None, decision.name) for plan in decision.plans]
    return [_single(decision, decision.pattern, decision.scopes * decision.keep, None)]


def _single(plan: Plan, pattern: str, keep: int | None, group: str | None) -> Planned:
    words = axes_in_words(plan.axes, plan.tensor)
    return Planned(plan.tensor, plan.rule, words, pattern, plan.along, plan.scopes * plan.blocks, keep, group)


def _coupled(part: Coupled) -> Planned:
    windows = " and ".join(
        "x".join(map(str, member.window.shape)) + " in blocks of " + "x".join(map(str, member.block))
        for group in part.coupling.groups
        for member in group.members
        if member.window.tensor.name == part.tensor.name
    )
    coupling = part.coupling
    return Planned(
        part.tensor,
        coupling.name,
        (),
        part.pattern,
        windows,
        coupling.scopes * coupling.blocks,
        coupling.scopes * coupling.keep,
        coupling.name,
    )


def axes_in_words(axes: Axes | None, tensor: Tensor) -> tuple[str, ...]:
    """A word for each stored axis; no words where nothing is known.

    >>> axes_in_words(Axes((), 1, 0, ()), Tensor("w", "float32", (8, 4), 128))
    ('in', 'out')
    """
    if axes is None:
        return ()
    words = {axes.out: "out", axes.into: "in"}
    words |= dict.fromkeys(axes.stack, "stack") | dict.fromkeys(axes.kernel, "kernel")
    return tuple(words.get(axis, "?") for axis in range(len(tensor.shape)))
