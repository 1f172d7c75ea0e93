"""What to do with each tensor of a file: which ones to prune, and how the pattern lies on them.

Everything here is decided from names, dtypes and shapes, before a value is read, so a plan can
be shown, checked and refused at no cost. A pattern with one size runs along an axis of the
tensor, one with two sizes tiles the ``[out, fan-in]`` matrix.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from npscope.errors import SpecError
from npscope.pattern import Pattern
from npscope.plans import Plan, Skip
from npscope.weights import Axes, Tensor

DEFAULT_SKIPS = (
    # embeddings: looked up row by row, not multiplied
    "*embed*",
    "*wte*",
    "*wpe*",
    "*position_bias*",
    # norms
    "*norm*",
    "*_bn.*",
    "*.bn*",
    # heads: the last layer is small and sensitive
    "*lm_head*",
    "head.*",
    "*.head.*",
    "*classifier*",
    "output.weight",
    "score.*",
    # fixed bases of Fourier, constant-Q and mel transforms
    "*fft*",
    "*stft*",
    "*cqt*",
    "*mel_basis*",
    "*mel_filter*",
)
"""Globs of tensors that are left alone unless ``--include`` names them; compared in lower case."""

NODE_SKIPS = (
    "*lm_head*",
    "*classifier*",
    "*fft*",
    "*stft*",
    "*cqt*",
    "*cq_t*",
    "*mel_basis*",
    "*mel_filter*",
)
"""The same for the path of the node that uses a tensor, where names of tensors say nothing.

Only heads and bases: embeddings and norms are used by other nodes than products, and converters
call a convolution by the norm that they fold into it.
"""

CONVOLUTION_WIDTH = 16
"""A tensor of 3 axes is a 1-D convolution when its kernel axis is at most this long, else a stack of matrices."""

Layout = Literal["out-in", "in-out"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A pattern, the tensors that it is meant for, and how their axes are to be read.

    `include` and `exclude` are globs, or regular expressions after ``re:``, that match whole
    names; without `include` every tensor is meant that `DEFAULT_SKIPS` does not name. `axis`
    ("in", "fan-in", "last" or a number) is where a pattern with one size runs.
    """

    pattern: Pattern
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    axis: Literal["in", "fan-in", "last"] | int = "in"
    layout: Layout = "out-in"

    def __post_init__(self) -> None:
        if len(self.pattern.block) == 2 and self.axis not in ("in", "fan-in"):
            raise SpecError(
                f"axis {self.axis}: a pattern with two sizes lies on the [out, fan-in] matrix; leave it out"
            )


def resolve(recipe: Recipe, tensors: Iterable[Tensor]) -> list[Plan | Skip]:
    """What happens to each tensor, in the order given.

    SpecError (a ValueError) when a glob matches nothing, is given twice, is overruled
    entirely, or names a tensor of unknown dtype.
    """
    listed = list(tensors)
    include = [Names(text, "--include") for text in recipe.include]
    exclude = [Names(text, "--exclude") for text in recipe.exclude]
    _check_selection(include, exclude, [tensor.name for tensor in listed])
    return [_decide(recipe, tensor, include, exclude) for tensor in listed]


class Names:
    """The names that a glob, or ``re:`` and a regular expression, matches from end to end."""

    def __init__(self, text: str, option: str) -> None:
        self.text, self.option = text, option
        expression = text.removeprefix("re:") if text.startswith("re:") else fnmatch.translate(text)
        try:
            self._match = re.compile(expression, re.DOTALL).fullmatch
        except (re.error, OverflowError, RecursionError) as error:
            raise SpecError(f"{option} {text!r:.80} is no regular expression: {error}") from None

    def __contains__(self, name: str) -> bool:
        return self._match(name) is not None


def _check_selection(include: Sequence[Names], exclude: Sequence[Names], names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for pattern in (*include, *exclude):
        if pattern.text in seen:
            raise SpecError(f"{pattern.option} {pattern.text!r:.80} is already given as {seen[pattern.text]}")
        seen[pattern.text] = pattern.option
        if not any(name in pattern for name in names):
            raise SpecError(
                f"{pattern.option} {pattern.text!r:.80} matches none of the {len(names)} tensors; "
                "`npscope inspect` lists their names"
            )
    for pattern in include:
        if all(any(name in other for other in exclude) for name in names if name in pattern):
            raise SpecError(
                f"{pattern.option} {pattern.text!r:.80} has no effect: --exclude removes all that it matches"
            )


def _decide(recipe: Recipe, tensor: Tensor, include: Sequence[Names], exclude: Sequence[Names]) -> Plan | Skip:
    if reason := _not_meant(tensor, include, exclude):
        return Skip(tensor, reason)
    if include and tensor.is_opaque:
        raise SpecError(f"tensor {tensor.name!r:.120}: dtype {tensor.dtype} cannot be pruned; --exclude it")
    if tensor.use is not None and tensor.use.axes is None:
        return Skip(tensor, tensor.use.reason)
    if not tensor.is_float:
        return Skip(tensor, f"dtype {tensor.dtype} cannot be pruned")
    if len(tensor.shape) < 2:
        return Skip(tensor, f"rank {len(tensor.shape)}, at least 2 is needed")
    if 0 in tensor.shape:
        return Skip(tensor, "no elements")
    try:
        return lay(recipe, tensor)
    except SpecError as error:
        return Skip(tensor, str(error), misfit=True)


def _not_meant(tensor: Tensor, include: Sequence[Names], exclude: Sequence[Names]) -> str | None:
    """Why a tensor of this name and use is none of those to prune."""
    for rule in exclude:
        if tensor.name in rule:
            return f"--exclude {rule.text}"
    if include:
        return None if any(tensor.name in rule for rule in include) else "not in --include"
    for glob in DEFAULT_SKIPS:
        if fnmatch.fnmatchcase(tensor.name.lower(), glob):
            return f"default skip {glob} (--include overrides)"
    for glob in NODE_SKIPS if tensor.use else ():
        if tensor.use and fnmatch.fnmatchcase(tensor.use.node.lower(), glob):
            return f"default skip of nodes {glob} (--include overrides)"
    return None


def axes_of(shape: tuple[int, ...], layout: Layout) -> Axes:
    """Axes of a weight of 2 axes or more whose file does not say what they mean.

    "out-in" stores ``[out, in, *kernel]`` (PyTorch, ONNX), "in-out" ``[*kernel, in, out]``
    (Flax, Keras, GPT-2). Three axes without a kernel are ``[stack, out, in]`` or
    ``[stack, in, out]``.
    """
    last = len(shape) - 1
    if layout == "out-in":
        if len(shape) == 3 and shape[2] > CONVOLUTION_WIDTH:
            return Axes((0,), 1, 2, ())
        return Axes((), 0, 1, tuple(range(2, last + 1)))
    if len(shape) == 3 and shape[0] > CONVOLUTION_WIDTH:
        return Axes((0,), 2, 1, ())
    return Axes((), last, last - 1, tuple(range(last - 1)))


def meaning(tensor: Tensor, layout: Layout) -> Axes:
    """What the axes of a tensor mean: as its file says, else by `layout`."""
    return axes_of(tensor.shape, layout) if tensor.use is None or tensor.use.axes is None else tensor.use.axes


def lay(recipe: Recipe, tensor: Tensor) -> Plan:
    """The pattern of `recipe` laid on one tensor of at least 2 axes; SpecError when it does not fit."""
    pattern, axes = recipe.pattern, meaning(tensor, recipe.layout)
    ground = _ground(recipe, axes, tensor.shape)
    block, scope = [1] * len(ground.order), [1] * len(ground.order)
    grid = [ground.shape[axis] for axis in ground.order]
    for at, name, size in zip(ground.tiled, ground.names, pattern.block, strict=True):
        block[at], grid[at] = _cut(name, "size", grid[at], size, hint=_hint(recipe, axes, tensor.shape))
    for at, name, count in zip(ground.tiled, ground.names, pattern.scope or (), strict=False):
        unit = "size" if block[at] == 1 else f"with blocks of {block[at]} the size"
        scope[at], _ = _cut(name, unit, grid[at], count, hint=_hint(recipe, axes, tensor.shape))
    if pattern.scope is None:
        scope = grid
    blocks = math.prod(scope)
    keep = pattern.keep_of(blocks)
    return Plan(
        tensor=tensor,
        shape=ground.shape,
        order=ground.order,
        block=tuple(block),
        scope=tuple(scope),
        scopes=math.prod(grid) // blocks,
        blocks=blocks,
        keep=keep,
        ord=pattern.ord,
        along=ground.along,
        block_size=tuple(block[at] for at in ground.tiled),
    )


class _Ground(NamedTuple):
    """What a pattern is laid on: shape and order of a `Plan`, and which of its axes are tiled, by name."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    tiled: tuple[int, ...]
    names: tuple[str, ...]
    along: str


def _ground(recipe: Recipe, axes: Axes, shape: tuple[int, ...]) -> _Ground:
    if len(recipe.pattern.block) == 2:
        matrix, order = axes.matrix(shape)
        last = len(matrix) - 1
        return _Ground(matrix, order, (last - 1, last), ("out", "fan-in"), "[out, fan-in]")
    if recipe.axis == "fan-in":
        matrix, order = axes.matrix(shape)
        return _Ground(matrix, order, (len(matrix) - 1,), ("fan-in",), "fan-in")
    axis = _axis(recipe.axis, axes, len(shape))
    name = f"axis {axis} (in)" if axis == axes.into else f"axis {axis}"
    return _Ground(shape, axes.order, (axes.order.index(axis),), (name,), name)


def _axis(chosen: str | int, axes: Axes, ndim: int) -> int:
    if chosen == "in":
        return axes.into
    axis = ndim - 1 if chosen == "last" else int(chosen)
    if not -ndim <= axis < ndim:
        raise SpecError(f"there is no axis {axis} in {ndim} axes")
    return axis % ndim


def _cut(name: str, what: str, length: int, size: int, *, hint: str) -> tuple[int, int]:
    """Size and number of the pieces when `length` is cut by `size`, -1 for the whole."""
    if size == -1:
        return length, 1
    if length % size:
        raise SpecError(f"{name}: {what} {length} is not a multiple of {size}{hint}")
    return size, length // size


def _hint(recipe: Recipe, axes: Axes, shape: tuple[int, ...]) -> str:
    """The way out for a pattern along one axis of a convolution, if the fan-in is one."""
    pattern = recipe.pattern
    if len(pattern.block) == 2 or recipe.axis == "fan-in" or not axes.kernel or not axes.has_matrix:
        return ""
    fan_in = math.prod(shape[axis] for axis in (axes.into, *axes.kernel))
    period = math.prod(max(size, 1) for size in (*pattern.block, *(pattern.scope or ())))
    return "" if fan_in % period else f"; --axis fan-in ({fan_in}) fits"
