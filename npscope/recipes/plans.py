"""What is to be done with the tensors of a file, in exact numbers: what a recipe resolves to and what is carried out.

Every tensor of a file is in one decision: a `Plan` of its own, a `Budget` or a `Coupling` that
it shares, or a `Skip`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from npscope.weights import Axes, Tensor, WeightFile


class Scores(NamedTuple):
    """What the blocks of a tensor rank by: a tensor of another file.

    One of the shape of the weight ranks by itself. One with a number for each index of the axis
    `along` of the stored weight ranks by ``|weight| * number``, in the dtype of the norm.
    """

    weights: WeightFile
    tensor: Tensor
    along: int | None = None


class Plan(NamedTuple):
    """How one tensor is pruned, in exact numbers.

    Read as a C-contiguous array of `shape` and transposed to `order`, its axes are tiled by
    `block` (in elements) and then by `scope` (in blocks); in every one of `scopes` scopes `keep`
    of `blocks` blocks survive, ranked by their norm of order `ord`. `along` says in words where
    the pattern lies and `block_size` how large a block is there. Blocks rank by `scores` where
    there are any, else by their own values. `axes` is what the stored axes were taken to mean, and
    `rule` what asked for the plan.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    order: tuple[int, ...]
    block: tuple[int, ...]
    scope: tuple[int, ...]
    scopes: int
    blocks: int
    keep: int
    ord: float
    along: str
    block_size: tuple[int, ...]
    scores: Scores | None = None
    axes: Axes | None = None
    rule: str = ""

    @property
    def width(self) -> int:
        """Bytes of one element, or of what it ranks by where that is wider."""
        return max(self.tensor.nbytes // math.prod(self.shape), 8 if self.has_wide_norms else 0)

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along every canonical axis."""
        return tuple(self.shape[axis] // size for axis, size in zip(self.order, self.block, strict=True))

    @property
    def scope_size(self) -> tuple[int, ...]:
        """Elements of a scope along every canonical axis."""
        return tuple(size * count for size, count in zip(self.block, self.scope, strict=True))

    @property
    def scope_grid(self) -> tuple[int, ...]:
        """Scopes along every canonical axis."""
        return tuple(blocks // count for blocks, count in zip(self.grid, self.scope, strict=True))

    @property
    def has_exact_norms(self) -> bool:
        """Whether norms are correctly rounded, so that they do not depend on how the elements lie."""
        simple = self.ord in (1, 2, math.inf) and not self.has_wide_norms
        return math.prod(self.block) == 1 or simple

    @property
    def has_wide_norms(self) -> bool:
        """Whether blocks rank by norms in float64."""
        if self.scores is None:
            return self.tensor.dtype == "float64"
        own = self.scores.along is not None and self.tensor.dtype == "float64"
        return own or self.scores.tensor.dtype == "float64"

    def stored(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of canonical axes as sizes of the axes of `shape`."""
        return tuple(sizes[self.order.index(axis)] for axis in range(len(sizes)))

    @property
    def pattern(self) -> str:
        """In words: ``keep 2 of 4``, ``keep 18 of 36 blocks of 4x4``."""
        shown = "" if set(self.block_size) == {1} else f" blocks of {'x'.join(map(str, self.block_size))}"
        return f"keep {self.keep} of {self.blocks}{shown}"


class Skip(NamedTuple):
    """A tensor that is left as it is; `misfit` when it was meant but cannot take the pattern of its `rule`.

    `axes` is what the axes of a misfit were taken to mean.
    """

    tensor: Tensor
    reason: str
    misfit: bool = False
    rule: str = ""
    axes: Axes | None = None


class Budget(NamedTuple):
    """Tensors whose blocks compete in one scope, in the order of `plans`: `keep` of all blocks survive.

    Each plan has one scope, its whole tensor. `bounds` are the least and the most blocks that
    survive of each; the `keep` blocks are those that rank first among all choices within them.
    The `keep` of the plans themselves is without meaning until the values have been read.
    """

    name: str
    plans: tuple[Plan, ...]
    keep: int
    bounds: tuple[tuple[int, int], ...]


class Window(NamedTuple):
    """Elements of a tensor, as an array of `shape`: `strides` and `offset` count elements of the tensor in C order.

    Windows come from transposing, slicing and reshaping: along the axis of the largest stride, the
    elements of one index all lie before those of the next, and so inside each index.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Member(NamedTuple):
    """A window cut into blocks, its grid axes put in `order` so that the grids of all members agree.

    Blocks rank by `scores` where there are any; these lie in their tensor as the window does in its own.
    """

    window: Window
    block: tuple[int, ...]
    order: tuple[int, ...]
    scores: Scores | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along each axis of the window."""
        return tuple(length // size for length, size in zip(self.window.shape, self.block, strict=True))

    @property
    def aligned(self) -> tuple[int, ...]:
        """The grid that all members share."""
        return tuple(self.grid[axis] for axis in self.order)


class Group(NamedTuple):
    """Members whose blocks are dropped together: block i is block i of all of them, and its norm is joint.

    `scope` counts blocks of the aligned grid.
    """

    members: tuple[Member, ...]
    scope: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Blocks of this group in one scope."""
        return math.prod(self.scope)


class Coupling(NamedTuple):
    """Windows of tensors that share one decision.

    In every one of `scopes` scopes `keep` of `blocks` blocks survive, ranked by their joint norm of
    order `ord`; the blocks of several groups compete in listed order.
    """

    name: str
    groups: tuple[Group, ...]
    scopes: int
    blocks: int
    keep: int
    ord: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that have windows here, each once."""
        return tuple({m.window.tensor.name: m.window.tensor for group in self.groups for m in group.members}.values())


class Coupled(NamedTuple):
    """One tensor of a coupling, with what is said of a `Plan`."""

    tensor: Tensor
    coupling: Coupling

    @property
    def order(self) -> tuple[int, ...]:
        """The axes as they are stored."""
        return tuple(range(len(self.shape)))

    @property
    def scores(self) -> None:
        """Blocks have been ranked when the tensor is written."""
        return None

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return self.tensor.nbytes // math.prod(self.shape)

    @property
    def windows(self) -> int:
        """How many windows the tensor has in the coupling."""
        return sum(m.window.tensor.name == self.tensor.name for group in self.coupling.groups for m in group.members)

    @property
    def pattern(self) -> str:
        """In words: ``keep 6 of 12 coupled blocks``."""
        return f"keep {self.coupling.keep} of {self.coupling.blocks} coupled blocks"

    @property
    def along(self) -> str:
        """The coupling by name, and the windows where the tensor has several."""
        return f"{self.coupling.name}, {self.windows} windows" if self.windows > 1 else self.coupling.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.tensor.shape

    @property
    def scopes(self) -> int:
        """Scopes of the coupling."""
        return self.coupling.scopes

    @property
    def blocks(self) -> int:
        """Blocks of the coupling in one scope."""
        return self.coupling.blocks

    @property
    def keep(self) -> int:
        """Blocks of the coupling that survive in one scope."""
        return self.coupling.keep


Decision = Plan | Skip | Budget | Coupling
"""What is done with one tensor or several."""


def parts_of(decision: Decision) -> tuple[Plan | Coupled, ...]:
    """What a decision does to each of the tensors that it prunes."""
    if isinstance(decision, Budget):
        return decision.plans
    if isinstance(decision, Coupling):
        return tuple(Coupled(tensor, decision) for tensor in decision.tensors)
    return (decision,) if isinstance(decision, Plan) else ()
