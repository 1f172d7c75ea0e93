"""Slabs of planned tensors, each with what its blocks rank by: its own values, or scores of another file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from npscope.recipes.plans import Coupled, Plan, Scores
from npscope.recipes.scores import input_vector, require_usable, scaled
from npscope.streaming.slabs import Array, Box, Request, SlabReader
from npscope.weights import WeightFile
from npscope.weights.background import Background


class Slab(NamedTuple):
    """A box of a planned tensor, its values as they are stored, and what its blocks rank by, in canonical order."""

    plan: Plan | Coupled
    box: Box
    values: Array
    ranked: Array
    scores: Array | None
    """What blocks rank by if not by the values."""

    @property
    def view(self) -> Array:
        """The values in canonical order."""
        return self.values.transpose(self.plan.order)


class RankedReader:
    """Reads planned tensors of an open file, one slab ahead where `ahead` does the work."""

    def __init__(self, weights: WeightFile, ahead: Background | None = None) -> None:
        self._weights = SlabReader(weights, ahead)
        self._scores: dict[int, SlabReader] = {}
        self._factors: tuple[Scores, Array] | None = None

    def read(self, work: Iterable[tuple[Plan | Coupled, Box]]) -> Iterator[Slab]:
        """The slab of every (plan, box); its values are gone two slabs later, what it ranks by one."""
        plans: list[Plan | Coupled] = []

        def requests() -> Iterator[Request]:
            for plan, box in work:
                plans.append(plan)
                yield Request(plan.tensor, plan.shape, box)

        for request, values in self._weights.read(requests()):
            plan = plans.pop(0)
            ranked = values if plan.scores is None else self._ranked(request, plan.scores, values)
            ranked = ranked.transpose(plan.order)
            yield Slab(plan, request.box, values, ranked, None if plan.scores is None else ranked)

    def _ranked(self, request: Request, scores: Scores, values: Array) -> Array:
        if scores.along is None:
            reader = self._scores.setdefault(id(scores.weights), SlabReader(scores.weights))
            _, ranked = next(reader.read([request._replace(tensor=scores.tensor)]))
            require_usable(scores.tensor, ranked)
            return ranked
        if self._factors is None or self._factors[0] is not scores:
            self._factors = scores, _factors(scores, request)
        factors = self._factors[1]
        sides = zip(request.box, factors.shape, strict=True)
        return scaled(values, factors[tuple(slice(None) if n == 1 else s for s, n in sides)])


def _factors(scores: Scores, request: Request) -> Array:
    """The numbers that multiply a weight's magnitudes, broadcastable to its reading."""
    return _spread(input_vector(scores), scores.along or 0, request.tensor.shape, request.shape)


def _spread(numbers: Array, along: int, stored: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Numbers for the axis `along` of a tensor stored as `stored`, broadcastable to its reading as `shape`.

    >>> _spread(np.asarray([1.0, 2.0]), 1, (3, 2, 2), (3, 4))
    array([[1., 1., 2., 2.]])
    """
    merged = len(stored) - len(shape) + 1  # stored axes that are one axis of `shape`, if any
    at = next((axis for axis in range(len(shape)) if shape[axis] != stored[axis]), along) if merged > 1 else along
    sizes = stored[at : at + merged]
    line = np.broadcast_to(numbers.reshape([-1 if at + i == along else 1 for i in range(merged)]), sizes).reshape(-1)
    return line.reshape([-1 if axis == at else 1 for axis in range(len(shape))])
