"""How a pattern lies on a tensor: what the tensor's axes mean, and which of them are cut.

A pattern with one size runs along an axis, one with two sizes tiles the ``[out, fan-in]``
matrix. Only dtypes and shapes are looked at, never a value.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from npscope.errors import SpecError
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Plan
from npscope.weights import Axes, Tensor

CONVOLUTION_WIDTH = 16
"""A tensor of 3 axes is a 1-D convolution when its kernel axis is at most this long, else a stack of matrices."""

Layout = Literal["out-in", "in-out"]

Axis = Literal["in", "fan-in", "last"] | int
"""Where a pattern with one size runs: along the input, along input and kernel, or along an axis by number."""


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
    if tensor.use is not None and tensor.use.axes is not None:
        return tensor.use.axes
    return axes_of(tensor.shape[::-1], layout).reversed() if tensor.fortran else axes_of(tensor.shape, layout)


def has_matrix(tensor: Tensor, axes: Axes) -> bool:
    """Whether a reshape makes the tensor an ``[out, fan-in]`` matrix with the fan-in as it was saved."""
    fan_in = (axes.into, *axes.kernel)
    return axes.has_matrix and not (tensor.fortran and sum(tensor.shape[axis] > 1 for axis in fan_in) > 1)


def require_axis(pattern: Pattern, axis: Axis) -> None:
    """SpecError when a pattern cannot run along `axis`."""
    if len(pattern.block) == 2 and axis not in ("in", "fan-in"):
        raise SpecError(f"axis {axis}: a pattern with two sizes lies on the [out, fan-in] matrix; leave it out")


def lay(pattern: Pattern, tensor: Tensor, *, axis: Axis = "in", layout: Layout = "out-in", rule: str = "") -> Plan:
    """The plan of `pattern` on a tensor of at least 2 axes, which `rule` asked for; SpecError when it does not fit."""
    axes = meaning(tensor, layout)
    ground = _ground(pattern, axis, axes, tensor)
    hint = _hint(pattern, axis, axes, tensor.shape)
    block, scope = [1] * len(ground.order), [1] * len(ground.order)
    grid = [ground.shape[axis] for axis in ground.order]
    for at, of, size in zip(ground.tiled, ground.names, pattern.block, strict=True):
        block[at], grid[at] = _cut(of, "size", grid[at], size, hint=hint)
    for at, of, count in zip(ground.tiled, ground.names, pattern.scope or (), strict=False):
        unit = "size" if block[at] == 1 else f"with blocks of {block[at]} the size"
        scope[at], _ = _cut(of, unit, grid[at], count, hint=hint)
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
        axes=axes,
        rule=rule,
    )


class _Ground(NamedTuple):
    """What a pattern is laid on: shape and order of a `Plan`, and which of its axes are tiled, by name."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    tiled: tuple[int, ...]
    names: tuple[str, ...]
    along: str


def _ground(pattern: Pattern, chosen: Axis, axes: Axes, tensor: Tensor) -> _Ground:
    shape = tensor.shape
    flat = len(pattern.block) == 2 or chosen == "fan-in"
    if flat and axes.has_matrix and not has_matrix(tensor, axes):
        raise SpecError("in Fortran order the fan-in of a convolution is no single axis; save it in C order")
    if len(pattern.block) == 2:
        matrix, order = axes.matrix(shape)
        last = len(matrix) - 1
        return _Ground(matrix, order, (last - 1, last), ("out", "fan-in"), "[out, fan-in]")
    if chosen == "fan-in":
        matrix, order = axes.matrix(shape)
        return _Ground(matrix, order, (len(matrix) - 1,), ("fan-in",), "fan-in")
    axis = _axis(chosen, axes, len(shape), fortran=tensor.fortran)
    shown = len(shape) - 1 - axis if tensor.fortran else axis
    name = f"axis {shown} (in)" if axis == axes.into else f"axis {shown}"
    return _Ground(shape, axes.order, (axes.order.index(axis),), (name,), name)


def _axis(chosen: Axis, axes: Axes, ndim: int, *, fortran: bool) -> int:
    if chosen == "in":
        return axes.into
    axis = ndim - 1 if chosen == "last" else int(chosen)
    if not -ndim <= axis < ndim:
        raise SpecError(f"there is no axis {axis} in {ndim} axes")
    return ndim - 1 - axis % ndim if fortran else axis % ndim


def _cut(name: str, what: str, length: int, size: int, *, hint: str) -> tuple[int, int]:
    """Size and number of the pieces when `length` is cut by `size`, -1 for the whole."""
    if size == -1:
        return length, 1
    if length % size:
        raise SpecError(f"{name}: {what} {length} is not a multiple of {size}{hint}")
    return size, length // size


def _hint(pattern: Pattern, chosen: Axis, axes: Axes, shape: tuple[int, ...]) -> str:
    """The way out for a pattern along one axis of a convolution, if the fan-in is one."""
    if len(pattern.block) == 2 or chosen == "fan-in" or not axes.kernel or not axes.has_matrix:
        return ""
    fan_in = math.prod(shape[axis] for axis in (axes.into, *axes.kernel))
    period = math.prod(max(size, 1) for size in (*pattern.block, *(pattern.scope or ())))
    return "" if fan_in % period else f"; --axis fan-in ({fan_in}) fits"
