"""The table of the full benchmark: ``operation -> {library: setup}``, and the cases with their floors and bars.

The same table feeds the correctness tests (``tests/test_bench.py``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from bench.peers import PEERS, installed
from npscope import BlockSpec, ScopeSpec, block_mask, hard_threshold, topk_mask
from npscope.bench import CASES as QUICK
from npscope.bench import TABLE as CORE
from npscope.bench import Case, Setup, numpy_keep_largest, numpy_norms, split
from npscope.clock import Call

OURS = "npscope numba"
"""The contender that bars are for."""

HARD = 4.0  # about the median norm of a 4x4 block of normal data


def _spec(case: Case, x: np.ndarray) -> Call:
    return partial(ScopeSpec(BlockSpec(x, case.block), case.scope).hard_threshold, nnz=case.nnz(x))


def _numpy_hard_threshold(case: Case, x: np.ndarray) -> Call:
    tiles, norms = split(x, case.block), numpy_norms(case, x)
    axes = tuple(range(1, tiles.ndim, 2))
    return lambda: np.copyto(tiles, 0, where=np.expand_dims(norms() < HARD, axes))


def _numpy_topk_mask(case: Case, x: np.ndarray) -> Call:
    k = x.shape[-1] - case.nnz(x)
    return lambda: x >= np.partition(x, k, axis=-1)[:, k, None]


def _numpy_block_mask(case: Case, x: np.ndarray) -> Call:
    n, kept, norms = case.blocks_per_scope(x), case.nnz(x), numpy_norms(case, x)
    scopes = (*[1] * (x.ndim - 1), n)

    def call() -> np.ndarray:
        table = split(norms(), scopes)
        mask: np.ndarray = table >= np.partition(table, n - kept, axis=-1)[..., n - kept, None]
        return mask.reshape(case.grid(x))

    return call


def _get_masks(case: Case, x: np.ndarray) -> Call:
    leaf = BlockSpec(x, case.block)
    masks = partial(ScopeSpec(leaf, case.scope).get_masks, case.nnz(x))
    return lambda: masks()[leaf]


def _numpy_element_masks(case: Case, x: np.ndarray) -> Call:
    mask = _numpy_block_mask(case, x)
    return lambda: np.repeat(np.repeat(mask(), case.block[0], axis=0), case.block[1], axis=1)


MORE: dict[str, dict[str, Setup]] = {
    "ScopeSpec.hard_threshold": {"npscope": _spec, "numpy": numpy_keep_largest},
    "hard_threshold": {
        "npscope": lambda case, x: partial(hard_threshold, x, HARD, case.block, out=x),
        "numpy": _numpy_hard_threshold,
    },
    "block_mask": {
        "npscope": lambda case, x: partial(block_mask, x, case.nnz(x), case.block, case.scope),
        "numpy": _numpy_block_mask,
    },
    "ScopeSpec.get_masks": {"npscope": _get_masks, "numpy": _numpy_element_masks},
    "topk_mask": {
        "npscope": lambda case, x: partial(topk_mask, x, case.nnz(x)),
        "numpy": _numpy_topk_mask,
    },
}

ALL = {name: {**CORE.get(name, {}), **MORE.get(name, {}), **PEERS.get(name, {})} for name in {**CORE, **MORE}}
"""Every entry, whether its library is installed or not."""

TABLE = {name: {lib: setup for lib, setup in entry.items() if installed(lib)} for name, entry in ALL.items()}


_quick = {case.name: case for case in QUICK}


def _norms() -> list[Case]:
    cases = []
    for block in ((1, 4), (1, 16), (4, 4), (16, 1), (16, 16), (32, 32), (1, 1024)):
        for order in (1, 2, math.inf):
            name = f"{block[0]}x{block[1]} norms" + ("" if order == 2 else f", ord {order}")
            share = 1 / math.prod(block)
            case = Case(name, "block norms", "block_norms", block, ord=order, reads=1, passes=share, bar=0.8)
            cases.append(_quick.get(name, case))
    return cases


WARM: list[Case] = [
    *_norms(),
    _quick["2:4"],
    Case("4:8", "N:M", "keep_largest", (1, 1), (1, 8), passes=1, bar=0.5),
    Case("8:16", "N:M", "keep_largest", (1, 1), (1, 16), passes=1, bar=0.4),
    Case("16:32", "N:M", "keep_largest", (1, 1), (1, 32), passes=1),
    Case("64:128", "N:M", "keep_largest", (1, 1), (1, 128), passes=1),
    Case("1 of 4 blocks of 1x4", "N:M", "keep_largest", (1, 4), (1, 4), keep=1, passes=1, bar=0.6),
    Case(
        "3x3 kernels, half per filter", "large scopes", "keep_largest",
        (1, 1, 3, 3), (1, -1, -1, -1), row=(256, 3, 3), passes=1, bar=0.6,
    ),
    _quick["rows of 1024, half"],
    _quick["4x4 tiles, global half"],
    _quick["1x1, global half"],
    Case("k-th of all", "k-th largest", "kth_largest", reads=1, bar=0.4),
    _quick["k-th of rows of 1024"],
    Case("soft 1x1", "shrinkage", "soft_threshold", passes=1, bar=0.8),
    _quick["soft 4x4"],
    _quick["soft 4x4, conditioned"],
    Case("2:4, bfloat16", "other dtypes", "keep_largest", scope=(1, 4), passes=1, bar=0.7, dtype="bfloat16"),
    Case("1x1, global half, bfloat16", "other dtypes", "keep_largest", reads=1, passes=0.5, bar=0.4, dtype="bfloat16"),
    Case("2:4, float16", "other dtypes", "keep_largest", scope=(1, 4), passes=1, dtype="float16"),
    Case("2:4, float64", "other dtypes", "keep_largest", scope=(1, 4), passes=1, dtype="float64"),
    Case("2:4, complex64", "other dtypes", "keep_largest", scope=(1, 4), passes=1, dtype="complex64"),
    Case("4x4 norms, complex64", "other dtypes", "block_norms", (4, 4), reads=1, passes=1 / 32, dtype="complex64"),
    Case("4x4 elements, half", "other scopes", "keep_largest", (1, 1), (4, 4), passes=1),
    Case(
        "4x4 elements, half, transposed view", "other scopes", "keep_largest",
        (1, 1), (4, 4), passes=1, transposed=True,
    ),
    Case("2x2 of 4x4 blocks, half", "other scopes", "keep_largest", (4, 4), (2, 2), passes=1),
    Case("2:4, transposed view", "other layouts", "keep_largest", scope=(1, 4), passes=1, transposed=True),
    Case(
        "4x4 tiles, global half, transposed view", "other layouts", "keep_largest",
        (4, 4), (-1, -1), reads=1, passes=0.5, transposed=True,
    ),
    Case(
        "1 of 4 blocks of 1x4, transposed view", "other layouts", "keep_largest",
        (1, 4), (1, 4), keep=1, passes=1, transposed=True,
    ),
    Case("4x4 norms, transposed view", "other layouts", "block_norms", (4, 4), reads=1, passes=1 / 16, transposed=True),
    Case(
        "rows of 1024, half, transposed view", "other layouts", "keep_largest",
        (1, 1), (1, 1024), passes=1, transposed=True,
    ),
    Case("soft 4x4, transposed view", "other layouts", "soft_threshold", (4, 4), passes=1, transposed=True),
    Case("2:4, ScopeSpec", "objects", "ScopeSpec.hard_threshold", scope=(1, 4), passes=1),
    Case("hard 4x4", "thresholds", "hard_threshold", (4, 4), passes=1),
    Case("mask of 2:4", "masks", "block_mask", scope=(1, 4), reads=1, passes=0.25),
    Case("mask of 2:4, transposed view", "masks", "block_mask", scope=(1, 4), reads=1, passes=0.25, transposed=True),
    Case("element masks of 4x4", "masks", "ScopeSpec.get_masks", (4, 4), (1, -1), reads=1, passes=0.25),
    Case("top half of rows of 1024", "masks", "topk_mask", scope=(1, -1), reads=1, passes=0.25),
]  # fmt: skip


def named(name: str) -> Case:
    """The warm case of this name."""
    return next(case for case in WARM if case.name == name)


HOSTILE: list[Case] = [
    replace(named(name), data=data, bar=3.0)
    for name in (
        "4x4 norms",
        "2:4",
        "3x3 kernels, half per filter",
        "rows of 1024, half",
        "4x4 tiles, global half",
        "1x1, global half",
        "soft 4x4",
    )
    for data in ("constant", "two-valued", "sorted", "heavy-tailed", "pruned", "near overflow", "subnormal")
]
"""Data that some ways of summing or selecting are slow on; `bar` is how many times the time of normal data will do."""

CURVES: list[Case] = [named(name) for name in ("2:4", "4x4 norms", "1x1, global half")]


def of_size(case: Case, mib: float) -> Case:
    """`case` on an array of `mib` MiB, narrower where it is small."""
    width = min(1024, 2 ** (int(math.log2(mib * 2**18)) // 2))
    return replace(case, mib=mib, row=(width,))


SMALL: list[Case] = [
    replace(named(name), name=f"{name} of 64x64", group="small arrays", row=(64,), mib=1 / 64, bar=None)
    for name in ("2:4", "2:4, ScopeSpec", "4x4 norms")
]
