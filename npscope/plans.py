"""What is to be done with the tensors of a file, in exact numbers: what a recipe resolves to and what is carried out.

Every tensor of a file is in one decision: a `Plan` of its own, a `Budget` that it shares, or a `Skip`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from npscope.weights import Tensor, WeightFile


@dataclass(frozen=True, slots=True)
class Scores:
    """What the blocks of a tensor rank by: a tensor of another file.

    One of the shape of the weight ranks by itself. One with a number for each index of the axis
    `along` of the stored weight ranks by ``|weight| * number``, in the dtype of the norm.
    """

    weights: WeightFile
    tensor: Tensor
    along: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How one tensor is pruned, in exact numbers.

    Read as a C-contiguous array of `shape` and transposed to `order`, its axes are tiled by
    `block` (in elements) and then by `scope` (in blocks); in every one of `scopes` scopes `keep`
    of `blocks` blocks survive, ranked by their norm of order `ord`. `along` says in words where
    the pattern lies and `block_size` how large a block is there. Blocks rank by `scores` where
    there are any, else by their own values.
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

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.tensor.nbytes // math.prod(self.shape)

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
        simple = self.ord in (1, 2, math.inf) and "float64" not in self.ranked_dtypes
        return math.prod(self.block) == 1 or simple

    @property
    def ranked_dtypes(self) -> tuple[str, ...]:
        """The dtypes that take part in ranking."""
        return (self.tensor.dtype,) if self.scores is None else (self.tensor.dtype, self.scores.tensor.dtype)

    def stored(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of canonical axes as sizes of the axes of `shape`."""
        return tuple(sizes[self.order.index(axis)] for axis in range(len(sizes)))

    @property
    def pattern(self) -> str:
        """In words: ``keep 2 of 4``, ``keep 18 of 36 blocks of 4x4``."""
        shown = "" if set(self.block_size) == {1} else f" blocks of {'x'.join(map(str, self.block_size))}"
        return f"keep {self.keep} of {self.blocks}{shown}"


@dataclass(frozen=True, slots=True)
class Skip:
    """A tensor that is left as it is; `misfit` when it was meant but cannot take the pattern."""

    tensor: Tensor
    reason: str
    misfit: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """Tensors whose blocks compete in one scope, in the order of `plans`: `keep` of all blocks survive.

    Each plan has one scope, its whole tensor. `bounds` are the least and the most blocks that
    survive of each; the `keep` blocks are those that rank first among all choices within them.
    The `keep` of the plans themselves is without meaning.
    """

    name: str
    plans: tuple[Plan, ...]
    keep: int
    bounds: tuple[tuple[int, int], ...]
