"""What is to be done with the tensors of a file, in exact numbers: what a recipe resolves to and what is carried out.

Every tensor of a file is in one decision: a `Plan` of its own, a `Budget` that it shares, or a `Skip`.
"""

from __future__ import annotations

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
