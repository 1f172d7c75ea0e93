"""Scores: what blocks rank by instead of the weights themselves.

A file of scores holds a tensor under the name of the weight. One of the weight's shape ranks by
itself; one with a number for each input channel ranks by ``|weight| * number``. A score is
finite or infinite, but no NaN and not below 0: anything else is a sign of a broken calibration.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from npscope.errors import FormatError, SpecError
from npscope.recipes.plans import Budget, Coupling, Decision, Plan, Scores
from npscope.weights import Axes, Tensor, WeightFile, numpy_dtype

Array = np.ndarray[Any, Any]


def scores_of(weights: WeightFile, path: str, tensor: Tensor, name: str, axes: Axes | None) -> Scores:
    """The scores that the open file at `path` holds for `tensor`, known as `name`, whose axes are `axes`.

    SpecError (a ValueError) when there are none, or of another shape or dtype than can rank.
    """
    found = weights.tensors.get(name)
    subject = f"scores {path!r:.120}"
    per_input = None if axes is None else tensor.shape[axes.into]
    wanted = f"shape {tensor.shape}" + (f" or ({per_input},), one for each input" if per_input is not None else "")
    if found is None:
        raise SpecError(f"{subject}: there is no tensor {name!r:.120}; needed is one of {wanted}")
    if not found.is_float:
        raise SpecError(f"{subject}: tensor {name!r:.120} has dtype {found.dtype}; scores are floating point numbers")
    if found.shape == tensor.shape:
        return Scores(weights, found)
    if axes is not None and found.shape == (per_input,):
        return Scores(weights, found, axes.into)
    raise SpecError(f"{subject}: tensor {name!r:.120} has shape {found.shape}; needed is {wanted}")


def require_usable(tensor: Tensor, values: Array) -> None:
    """FormatError when some of the scores `values` of `tensor` are NaN or negative."""
    if not np.all(values >= 0):
        nans, negative = int(np.count_nonzero(np.isnan(values))), int(np.count_nonzero(values < 0))
        what = f"{nans} NaN" if nans else f"{negative} negative numbers"
        raise FormatError(f"scores of tensor {tensor.name!r:.120} hold {what}; scores are at least 0")


def check_scores_unchanged(decisions: Iterable[Decision]) -> None:
    """FileError when a file of the scores that `decisions` rank by has changed since it was opened."""
    for weights in {id(scores.weights): scores.weights for d in decisions for scores in _ranked_by(d)}.values():
        weights.check_unchanged()


def _ranked_by(decision: Decision) -> Iterable[Scores]:
    if isinstance(decision, Coupling):
        owners: Iterable[Scores | None] = (m.scores for group in decision.groups for m in group.members)
    elif isinstance(decision, Budget):
        owners = (plan.scores for plan in decision.plans)
    else:
        owners = (decision.scores,) if isinstance(decision, Plan) else ()
    return (scores for scores in owners if scores is not None)


def input_vector(scores: Scores) -> Array:
    """The numbers by input channel, read whole; FormatError when one is NaN or negative."""
    vector = np.empty(scores.tensor.shape, numpy_dtype(scores.tensor))
    scores.weights.read(scores.tensor, 0, vector.view(np.uint8).data)
    require_usable(scores.tensor, vector)
    return vector


def scaled(values: Array, factors: Array) -> Array:
    """``|values| * factors`` in the dtype of the norm; infinity times 0 is NaN, and ranks as such."""
    dtype = np.result_type(np.float64 if np.float64 in (values.dtype, factors.dtype) else np.float32)
    with np.errstate(all="ignore"):
        product: Array = np.abs(values.astype(dtype)) * factors.astype(dtype)
    return product
