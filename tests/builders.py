"""npscope objects for the problems that the oracles describe, on copies of their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import oracles as o

from npscope import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec


class Built(NamedTuple):
    """The scope object, the arrays it holds and its leaf specs, each part by part."""

    scope: ScopeSpec | ScopeCoupling
    arrays: list[list[np.ndarray]]
    leaves: list[list[BlockSpec]]

    def flat(self) -> list[tuple[BlockSpec, np.ndarray]]:
        """All leaves with their arrays."""
        return [
            pair
            for specs, arrays in zip(self.leaves, self.arrays, strict=True)
            for pair in zip(specs, arrays, strict=True)
        ]


def is_plain(order: o.Index | None) -> bool:
    """Whether an order leaves the axes as they stand."""
    return order is None or list(order) == sorted(order)


def build(parts: Sequence[o.Part], arrays: list[list[np.ndarray]] | None = None, couple: bool = False) -> Built:
    """Objects over `arrays` (copies of the data by default); `couple` makes couplings even where a spec would do."""
    arrays = o.copies(parts) if arrays is None else arrays
    leaves, scopes = [], []
    for p, (part, held) in enumerate(zip(parts, arrays, strict=True)):
        specs = [
            BlockSpec(a, leaf.block, name=f"{p}.{i}") for i, (leaf, a) in enumerate(zip(part.leaves, held, strict=True))
        ]
        alone = len(specs) == 1 and is_plain(part.leaves[0].order) and not couple
        orders = [leaf.order if leaf.order is not None else tuple(range(leaf.data.ndim)) for leaf in part.leaves]
        block = specs[0] if alone else BlockCoupling(specs, orders=orders)
        scopes.append(ScopeSpec(block, part.scope, name=f"part {p}"))
        leaves.append(specs)
    if len(parts) == 1 and is_plain(parts[0].order) and not couple:
        return Built(scopes[0], arrays, leaves)
    orders = [
        p.order if p.order is not None else tuple(range(len(s.grid_shape))) for p, s in zip(parts, scopes, strict=True)
    ]
    return Built(ScopeCoupling(scopes, orders=orders), arrays, leaves)


def assert_bits(built: Built, expected: o.Results) -> None:
    """The arrays that an object holds equal those of an oracle, bit for bit."""
    for got_part, expected_part in zip(built.arrays, expected, strict=True):
        for got, want in zip(got_part, expected_part, strict=True):
            assert got.dtype == want.dtype
            assert got.tobytes() == want.tobytes(), f"\n{got}\n!=\n{want}"
