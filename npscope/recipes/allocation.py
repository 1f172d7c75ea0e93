"""How many blocks each of several tensors keeps, from shapes or weights alone, so that the total is exact.

Shares are exact fractions until they are rounded, and rounded so that they add up: the tensors
whose fractions are cut most get one block more, the first of equals in the order given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from npscope.counts import Share, nnz_from_sparsity
from npscope.errors import SpecError, about

Array = np.ndarray[Any, Any]

_LEADING_BITS = {4: 13, 8: 42}
"""By the width of a norm: bits to drop so that sign, exponent and 10 bits of the fraction are left."""

_PIECE = 1 << 20
"""Norms that are counted at a time, so that what is made of them stays small."""


class Norms(NamedTuple):
    """The norms of the blocks of a tensor: distinct `values` in descending order, each with its count."""

    values: Array
    counts: Array

    @classmethod
    def of(cls, norms: Array) -> Norms:
        """Those of an array of norms, exactly.

        >>> Norms.of(np.asarray([1.0, 3.0, 1.0])).counts
        array([1, 2])
        """
        values, counts = np.unique(norms, return_counts=True)
        return cls(values[::-1].astype(np.float64), counts[::-1])


class NormHistogram:
    """Counts norms in a memory of a few MiB: those that agree in 11 leading bits count as equal to their mean square.

    That is exact for single elements of 16 bits and fewer.
    """

    def __init__(self) -> None:
        self._counts = self._squares = np.zeros(0)

    def add(self, norms: Array) -> None:
        """Count the norms in an array of float32 or float64, always of the same dtype."""
        flat = np.ascontiguousarray(norms).reshape(-1)
        drop = _LEADING_BITS[flat.itemsize]
        bins = 1 << (8 * flat.itemsize - 1 - drop)
        if not self._counts.size:
            self._counts, self._squares = np.zeros(bins, np.int64), np.zeros(bins)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            keys = (piece.view(f"u{piece.itemsize}") >> drop).astype(np.int64)
            wide = piece.astype(np.float64)
            self._counts += np.bincount(keys, minlength=bins)
            self._squares += np.bincount(keys, weights=wide * wide, minlength=bins)

    def norms(self) -> Norms:
        """What was counted."""
        there = np.flatnonzero(self._counts)[::-1]
        counts = self._counts[there].astype(np.int64)
        return Norms(np.sqrt(self._squares[there] / counts), counts)


def uniform(blocks: Mapping[str, int], sparsity: Share) -> dict[str, int]:
    """Blocks to keep of each tensor so that all lose the same share, as near as whole blocks allow.

    Parameters
    ----------
    blocks
        Number of blocks by tensor.
    sparsity
        Share of all blocks to prune, as for `npscope.nnz_from_sparsity`.

    Returns
    -------
    Counts by tensor; they add up to ``nnz_from_sparsity(sparsity, sum(blocks.values()))``.

    Raises
    ------
    SpecError
        (a ValueError) `sparsity` outside [0, 1].

    >>> uniform({"a": 3, "b": 5}, 0.5)
    {'a': 2, 'b': 2}
    """
    total = sum(blocks.values())
    keep = nnz_from_sparsity(sparsity, total)
    return _rounded({name: Fraction(keep * count, total or 1) for name, count in blocks.items()}, keep)


def erk(
    shapes: Mapping[str, Sequence[int]], sparsity: Share, blocks: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Blocks to keep of each tensor in proportion to (sum of its axes) / (product of its axes).

    Wide layers are pruned more than narrow ones; a layer that would get more than all of its blocks
    keeps all, and the others share the rest. This is the Erdos-Renyi-Kernel rule of Evci et al.,
    "Rigging the Lottery" (2020).

    Parameters
    ----------
    shapes
        ``(out, in, *kernel)`` by tensor.
    sparsity
        Share of all blocks to prune, as for `npscope.nnz_from_sparsity`.
    blocks
        Number of blocks by tensor; single elements if left out.

    Returns
    -------
    Counts by tensor; they add up to ``nnz_from_sparsity(sparsity, total number of blocks)``.

    Raises
    ------
    SpecError
        (a ValueError) `sparsity` outside [0, 1], a shape with an axis of length 0.

    >>> erk({"wide": (100, 100), "narrow": (10, 10)}, 0.8)
    {'wide': 1920, 'narrow': 100}
    """
    for name, shape in shapes.items():
        if 0 in shape or not shape:
            raise SpecError(f"tensor {name!r:.120} of shape {tuple(shape)} has no density")
    counts = {name: math.prod(shape) for name, shape in shapes.items()} if blocks is None else dict(blocks)
    keep = nnz_from_sparsity(sparsity, sum(counts.values()))
    weights = {name: Fraction(sum(shape), math.prod(shape)) * counts[name] for name, shape in shapes.items()}
    shares: dict[str, Fraction] = {}
    open_, rest = set(counts), Fraction(keep)
    while open_:
        scale = rest / (sum(weights[name] for name in open_) or 1)
        full = {name for name in open_ if weights[name] * scale >= counts[name]}
        shares |= {name: Fraction(counts[name]) if name in full else weights[name] * scale for name in open_}
        if not full:
            break
        open_ -= full
        rest -= sum(counts[name] for name in full)
    return _rounded({name: shares[name] for name in counts}, keep)


def lamp(norms: Mapping[str, Norms], sparsity: Share) -> dict[str, int]:
    """Blocks to keep of each tensor so that those with the largest LAMP scores of all survive.

    The score of a block is its squared norm divided by the sum of the squared norms of the blocks
    of its tensor that rank no lower, itself included: Lee et al., "Layer-adaptive sparsity for the
    magnitude-based pruning" (2021), with blocks for weights. Inside a tensor scores order as norms
    do, so that counts say everything.

    Parameters
    ----------
    norms
        The norms of all blocks, by tensor.
    sparsity
        Share of all blocks to prune, as for `npscope.nnz_from_sparsity`.

    Returns
    -------
    Counts by tensor; they add up to ``nnz_from_sparsity(sparsity, total number of blocks)``.

    Raises
    ------
    SpecError
        (a ValueError) `sparsity` outside [0, 1], a norm that is NaN or infinite.

    >>> lamp({"a": Norms.of(np.asarray([9.0, 1.0])), "b": Norms.of(np.asarray([0.3, 0.2, 0.2]))}, 0.4)
    {'a': 1, 'b': 2}
    """
    costs = {name: _Costs(name, table) for name, table in norms.items()}
    keep = nnz_from_sparsity(sparsity, sum(cost.blocks for cost in costs.values()))

    def within(limit: float) -> dict[str, int]:
        return {name: cost.within(limit) for name, cost in costs.items()}

    # The bits of positive floats order as the floats do: a search on them ends at neighbours.
    low, high = (int(np.float64(limit).view(np.int64)) for limit in (0.5, math.inf))
    while high - low > 1:
        middle = (low + high) // 2
        enough = sum(within(float(np.int64(middle).view(np.float64))).values()) >= keep
        low, high = (low, middle) if enough else (middle, high)
    sure, possible = (within(float(np.int64(bits).view(np.float64))) for bits in (low, high))
    rest = keep - sum(sure.values())
    for name in sure:  # what costs the same, in the order given
        more = min(rest, possible[name] - sure[name])
        sure[name] += more
        rest -= more
    return sure


class _Costs:
    """The inverse LAMP scores of a tensor's blocks: 1 for the first, then ever more.

    Of m equal norms v behind a sum s of larger squares, the j-th costs ``s / v**2 + j``.
    """

    def __init__(self, name: str, norms: Norms) -> None:
        values = norms.values
        with about(f"tensor {name!r:.120}"):
            if values.size and not np.isfinite(values).all():
                raise SpecError("a norm is NaN or infinite, so that LAMP scores are undefined")
        squares = np.square(values / (values[0] if values.size and values[0] else 1.0))  # no overflow
        sums = np.cumsum(squares * norms.counts)
        before = np.concatenate([[0.0], sums[:-1]])[: squares.size]
        ratios = np.full(squares.shape, math.inf)
        np.divide(before, squares, out=ratios, where=squares > 0)
        self._ratios = np.maximum.accumulate(ratios) if ratios.size else ratios
        self._counts = norms.counts
        self._starts = np.cumsum(norms.counts) - norms.counts
        self.blocks = int(norms.counts.sum())

    def within(self, limit: float) -> int:
        """How many blocks cost at most `limit`."""
        if math.isinf(limit):
            return self.blocks
        last = int(np.searchsorted(self._ratios, limit - 1, side="right")) - 1
        if last < 0:
            return 0
        return int(self._starts[last]) + min(int(self._counts[last]), math.floor(limit - float(self._ratios[last])))


def _rounded(shares: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Whole numbers next to `shares` that add up to `total`, as these do."""
    counts = {name: math.floor(share) for name, share in shares.items()}
    by_loss = sorted(shares, key=lambda name: counts[name] - shares[name])
    for name in by_loss[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
