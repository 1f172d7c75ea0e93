"""What a user of another library would write, one setup for each operation that the library has.

Libraries are imported by the setups, so this table needs none of them; each is used through its
public functions only, on the memory of the NumPy array where it can be.
"""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from npscope.bench import Case, Setup, by_scope, conditioner_of, split
from npscope.clock import Call
from npscope.options import thread_count


def installed(library: str) -> bool:
    return find_spec(library) is not None


def tensor(x: np.ndarray) -> Any:
    """A torch tensor on the memory of `x`."""
    import torch

    torch.set_num_threads(thread_count())
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


# --- torch ---------------------------------------------------------------------------------------


def torch_norms(case: Case, x: np.ndarray) -> Call:
    import torch

    t = tensor(x)
    if math.prod(case.block) == 1:
        return t.abs
    tiles = split(t, case.block)
    return partial(torch.linalg.vector_norm, tiles, case.ord, dim=tuple(range(1, tiles.ndim, 2)))


def torch_keep_largest(case: Case, x: np.ndarray) -> Call:
    """topk and scatter along an axis; the k-th value where all blocks compete."""
    t, norms, n, kept = tensor(x), torch_norms(case, x), case.blocks_per_scope(x), case.nnz(x)
    if math.prod(case.block) == 1 and set(case.scope[:-1]) == {1}:
        few = (*[1] * (x.ndim - 1), n)

        def by_index() -> None:
            dropped = split(norms(), few).topk(n - kept, dim=-1, largest=False, sorted=False).indices
            split(t, few).scatter_(-1, dropped, 0)

        return by_index
    tiles = split(t, case.block)
    per_block = [size for g in tiles.shape[::2] for size in (g, 1)]

    def by_kth() -> None:
        table = split(norms(), case.scope)
        order, inside = by_scope(table)
        limits = table.permute(order).reshape(*table.shape[::2], n).kthvalue(n - kept + 1, dim=-1).values
        dropped = table < limits.reshape([1 if axis in inside else size for axis, size in enumerate(table.shape)])
        tiles.masked_fill_(dropped.reshape(per_block), 0)

    return by_kth


def torch_kth_largest(case: Case, x: np.ndarray) -> Call:
    t, n, k = tensor(x), case.blocks_per_scope(x), case.nnz(x)
    t = t.reshape(-1) if case.scope == (-1, -1) else t
    return lambda: t.kthvalue(n - k + 1, dim=-1).values


def torch_topk_mask(case: Case, x: np.ndarray) -> Call:
    import torch

    t, k = tensor(x), case.nnz(x)
    return lambda: torch.zeros_like(t, dtype=torch.bool).scatter_(-1, t.topk(k, dim=-1, sorted=False).indices, True)


def torch_soft_threshold(case: Case, x: np.ndarray) -> Call:
    t, norms = tensor(x), torch_norms(case, x)
    if math.prod(case.block) == 1:
        return lambda: t.sub_(t.clamp(-1, 1))
    tiles = split(t, case.block)
    per_block = [size for g in tiles.shape[::2] for size in (g, 1)]
    return lambda: tiles.mul_((1 - 1 / norms()).clamp_(min=0).reshape(per_block))


# --- sparsekit -----------------------------------------------------------------------------------


def sparsekit_norms(case: Case, x: np.ndarray) -> Call:
    from sparsekit import BlockSpec

    t = tensor(x)
    return partial(BlockSpec(t, case.block).norms, t, p=case.ord)


def sparsekit_keep_largest(case: Case, x: np.ndarray) -> Call:
    from sparsekit import BlockSpec, ScopeSpec

    return partial(ScopeSpec(BlockSpec(tensor(x), case.block), case.scope).hard_threshold, nnz=case.nnz(x))


def sparsekit_kth_largest(case: Case, x: np.ndarray) -> Call:
    from sparsekit.tensor_ops import kth_largest

    return partial(kth_largest, tensor(x), case.nnz(x), None if case.scope == (-1, -1) else -1)


def sparsekit_soft_threshold(case: Case, x: np.ndarray) -> Call:
    import torch
    from sparsekit import BlockSpec

    t = tensor(x)
    h = tensor(conditioner_of(x)) if case.operation.startswith("conditioned") else None
    thresholds = torch.ones(case.grid(x), dtype=t.dtype)
    return partial(BlockSpec(t, case.block).soft_threshold, thresholds, conditioners=h)


# --- proximal operators --------------------------------------------------------------------------


def _by_block(x: np.ndarray, block: tuple[int, ...]) -> np.ndarray:
    """The elements of every block side by side, as libraries of group norms want them: ``(G1, G2, t1, t2)``."""
    return split(x, block).transpose(0, 2, 1, 3)


def pyproximal_soft_threshold(case: Case, x: np.ndarray) -> Call:
    """Groups are columns there, so blocks are copied into its layout and back, inside the clock."""
    import pyproximal

    size = math.prod(case.block)
    if size == 1:
        prox = pyproximal.L1()
        return lambda: np.copyto(x, prox.prox(x.reshape(-1), 1.0).reshape(x.shape))
    groups, tiles = pyproximal.L21(ndim=size), _by_block(x, case.block)

    def call() -> None:
        shrunk = groups.prox(tiles.reshape(-1, size).T.reshape(-1), 1.0)
        np.copyto(tiles, shrunk.reshape(size, -1).T.reshape(tiles.shape))

    return call


def skglm_soft_threshold(case: Case, x: np.ndarray) -> Call:
    """It has a kernel for one contiguous float64 group: blocks are copied to a loop over it and back, in the clock."""
    from numba import njit
    from skglm.utils.prox_funcs import BST, ST_vec

    size = math.prod(case.block)
    if size == 1:
        return lambda: np.copyto(x, ST_vec(x.reshape(-1), np.float32(1)).reshape(x.shape))

    @njit
    def shrink(groups: np.ndarray) -> None:
        for i in range(len(groups)):
            groups[i] = BST(groups[i], 1.0)

    tiles = _by_block(x, case.block)

    def call() -> None:
        groups = tiles.reshape(-1, size).astype(np.float64)
        shrink(groups)
        np.copyto(tiles, groups.reshape(tiles.shape), casting="same_kind")

    return call


PEERS: dict[str, dict[str, Setup]] = {
    "block_norms": {"torch": torch_norms, "sparsekit": sparsekit_norms},
    "keep_largest": {"torch": torch_keep_largest, "sparsekit": sparsekit_keep_largest},
    "ScopeSpec.hard_threshold": {"torch": torch_keep_largest, "sparsekit": sparsekit_keep_largest},
    "kth_largest": {"torch": torch_kth_largest, "sparsekit": sparsekit_kth_largest},
    "topk_mask": {"torch": torch_topk_mask},
    "soft_threshold": {
        "torch": torch_soft_threshold,
        "sparsekit": sparsekit_soft_threshold,
        "pyproximal": pyproximal_soft_threshold,
        "skglm": skglm_soft_threshold,
    },
    "conditioned soft_threshold": {"sparsekit": sparsekit_soft_threshold},
}
"""Operation -> {library: setup}, beside those of `npscope.bench.TABLE`."""
