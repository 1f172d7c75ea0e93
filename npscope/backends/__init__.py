"""The operations that a backend provides, each with its contract, stated once.

A backend is a module with the functions of `Backend`. It is handed validated operands:
`Parts` say which elements form a block and which blocks compete (S scopes of n blocks;
results are ``(S, n)`` or ``(S,)``, scopes in row-major order, the blocks of a scope part by
part); every number that varies over scopes or blocks comes as a `Leaf` whose cut has
either n blocks per scope or one. Nothing here validates or chooses.

ord
    1, 2, inf or any p > 0 rank a block by the norm of its elements, rounded to the norm's
    dtype. None ranks 1-element blocks by their signed value.
rank
    (norm descending, position ascending); NaN above +inf; -0.0 equals +0.0. Blocks of one
    element in 64-bit integers rank by exact magnitude.
norms below float64
    the correctly rounded exact norm for ord 1, 2, inf of real data; else within 4 ulp,
    without overflow or underflow on the way.
writes
    zeros are +0.0; kept elements keep their bits. Every error comes before the first write.
    A writer returns one array for each leaf of `target`: the leaf's own, written through, or
    a fresh one that the caller stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from npscope.errors import SpecError
from npscope.tiling import Leaf, Parts

Ord = float | None
Array = Any


CONDITIONER_RANGE = (1e-150, 1e150)
"""Diagonal metrics outside this range would over- or underflow when squared."""


def conditioner_error(least: float, most: float) -> SpecError:
    """The error of `Backend.shrink` for a metric with entries from `least` to `most`, or with NaN."""
    low, high = CONDITIONER_RANGE
    return SpecError(f"a conditioner spans [{least}, {most}]; every entry must be in [{low}, {high}] and not NaN")


class Backend(Protocol):
    """The functions of a backend module."""

    NAME: str

    def norms(self, parts: Parts, ord: Ord, out: Array | None = None) -> Array:
        """Norm of every block: ``(S, n)`` in the norm's dtype; it may be written to `out`, which is such an array."""

    def kth(self, parts: Parts, k: Leaf, ord: Ord) -> Array:
        """The k-th largest rank value of every scope, ``(S,)``; 1 <= k <= n.

        In the norm's dtype; in the dtype of the one leaf for ord None (zeros come out as +0).
        """

    def midpoint(self, parts: Parts, k: Leaf, weight: float, ord: Ord) -> Array:
        """``(v_k + weight * v_(k+1)) / (1 + weight)`` of the rank values of every scope, ``(S,)``; 1 <= k < n.

        Computed in float64, without overflow; equal values give that value. In the dtype of `kth`, of integers in
        that of their norms; rounded to it as everywhere, to 16 bits through float32.
        """

    def mask(self, source: Leaf, keep: Leaf, ord: Ord, out: Leaf | None = None) -> Array:
        """True for the `keep` first-ranked blocks of every scope: ``(S, n)`` bool.

        Or written to `out`, a bool NumPy array cut into as many scopes and blocks, which is returned.
        """

    def element_masks(self, parts: Parts, keep: Leaf, ord: Ord) -> Sequence[Array]:
        """True for the elements of the `keep` first-ranked blocks of every scope: a bool array like each leaf."""

    def prune(self, target: Parts, source: Parts, keep: Leaf, ord: Ord) -> Sequence[Array]:
        """Zero every block of `target` but those at the `keep` first-ranked places of `source`."""

    def threshold(self, target: Parts, source: Parts, thresholds: Leaf, ord: Ord) -> Sequence[Array]:
        """Zero the blocks of `target` whose norm in `source` is below their threshold (NaN stays)."""

    def apply_mask(self, target: Parts, mask: Leaf) -> Sequence[Array]:
        """Zero the blocks of `target` whose mask is False."""

    def scale(self, target: Parts, multipliers: Leaf) -> Sequence[Array]:
        """Multiply blocks by a float64 each; 0 writes +0.0, 1 keeps the bits."""

    def shrink(
        self, target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
    ) -> Sequence[Array]:
        """The proximal step of ``t * norm`` (ord 2) on every block; with conditioners in their metric.

        One leaf of thresholds for each part.

        Without: ``x * (1 - t / ||x||)`` or 0 where the rounded norm is <= t. With H = diag(h):
        argmin ``1/2 (x - v)' H (x - v) + t ||x||``, 0 where the rounded ``||H v||`` is <= t.
        SpecError for an entry of the conditioners outside `CONDITIONER_RANGE`, ConvergenceError where
        `max_iter` steps do not reach `rtol`; single real elements move by t, or t / h, in one rounding.
        t = 0 keeps the bits; NaN blocks stay as they are; a block of infinite norm is unchanged
        for finite t and zero for infinite t.
        """

    def count_nonzero(self, parts: Parts, eps: float) -> int:
        """How many elements do not satisfy ``|x| <= eps`` (so NaN counts)."""

    def sum_squares(self, parts: Parts) -> float:
        """The sum of ``|x| ** 2`` of all elements, in float64 in any order: about 1e-12 off, and it may overflow."""
