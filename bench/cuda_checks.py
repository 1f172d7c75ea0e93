"""Every kernel of the CuPy backend on small arrays, against the CPU: for compute-sanitizer, which makes them slow.

``compute-sanitizer --tool memcheck python -m bench.cuda_checks 1 memcheck``, then part 2 and racecheck, as in the
logs under ``bench/results``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np

import npscope
from npscope import BlockCoupling, BlockSpec, ScopeSpec

SHAPE = (32, 1024)
NORMS = ((1, 4), (4, 4), (1, 16), (16, 1), (16, 16), (1, 1024), (8, 2))
PRUNED = (
    ((1, 1), (1, 4), 2), ((1, 1), (1, 16), 7), ((1, 1), (1, -1), 500), ((1, 1), (1, 64), 30),
    ((1, 1), (-1, -1), 20_000),
    ((4, 4), (-1, -1), 999), ((1, 16), (1, 64), 30), ((1, 1), (-1, 1), 20), ((16, 1), (-1, -1), 1000),
)  # fmt: skip
SOFT = ((1, 1), (4, 4), (16, 16), (1, 16))
CONDITIONED = ((1, 1), (4, 4), (1, 16), (1, 64), (32, 8))


class Checks:
    """Comparisons, counted."""

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.done, self.wrong = cupy, 0, 0

    def __call__(self, name: str, got: Any, want: np.ndarray, tolerance: float = 0) -> None:
        got = self.cupy.asnumpy(got)
        a, b = got.astype(np.float64), want.astype(np.float64)
        right = np.allclose(a, b, rtol=tolerance, atol=0) if tolerance else np.array_equal(got, want)
        self.done += 1
        self.wrong += not right
        print("ok  " if right else "BAD ", name, flush=True)


def of_dtype(check: Checks, cupy: Any, rng: np.random.Generator, name: str) -> None:
    x = rng.standard_normal(SHAPE).astype(name)
    x[:8] = 0.5
    device = cupy.asarray(x)
    for block in NORMS:
        tolerance = 1e-15 if name == "float64" else 0
        norms = npscope.block_norms(device, block)
        check(f"norms {name} {block}", norms, npscope.block_norms(x, block), tolerance)
    for block, scope, nnz in PRUNED:
        kept = npscope.keep_largest(x, nnz, block, scope)
        check(f"prune {name} {block} {scope}", npscope.keep_largest(device, nnz, block, scope), kept)
    for block in SOFT:
        tolerance = 2e-3 if name == "float16" else 1e-6
        soft = npscope.soft_threshold(device, 0.5, block)
        check(f"soft {name} {block}", soft, npscope.soft_threshold(x, 0.5, block), tolerance)
    check(f"hard {name}", npscope.hard_threshold(device, 2.0, (4, 4)), npscope.hard_threshold(x, 2.0, (4, 4)))
    large_scopes(check, cupy, rng, name)
    small(check, cupy, rng, name)


def large_scopes(check: Checks, cupy: Any, rng: np.random.Generator, name: str) -> None:
    selection = import_module("npscope.backends.cupy_gpu.selection")
    x = rng.standard_normal((1, 40_000)).astype(name)
    x[:, :9000] = 0.25
    device = cupy.asarray(x)
    for k in (300, 20_000, 39_000):
        check(f"kth {name} {k}", npscope.kth_largest(device, k), npscope.kth_largest(x, k))
        check(f"point {name} {k}", npscope.mid_kth_largest(device, k), npscope.mid_kth_largest(x, k))
    usual = selection.SAMPLED_BLOCKS, selection.SAMPLES
    selection.SAMPLED_BLOCKS, selection.SAMPLES = 1, 1000
    for k in (300, 20_000, 39_000):
        check(f"sampled {name} {k}", npscope.topk_mask(device, k), npscope.topk_mask(x, k))
    selection.SAMPLED_BLOCKS, selection.SAMPLES = usual


def small(check: Checks, cupy: Any, rng: np.random.Generator, name: str) -> None:
    """What is solved in one launch."""
    x = rng.standard_normal((32, 64)).astype(name)
    x[:4] = 0.5
    h, device = rng.uniform(0.5, 2, x.shape).astype(np.float32), cupy.asarray(x)
    close = {"float16": 2e-3, "float32": 1e-6, "float64": 1e-12}[name]
    for block in ((1, 1), (4, 4), (1, 64), (-1, -1)):
        exact = 1e-15 if name == "float64" else 0
        check(f"small norms {name} {block}", npscope.block_norms(device, block), npscope.block_norms(x, block), exact)
        soft = npscope.soft_threshold(device, 0.5, block)
        check(f"small soft {name} {block}", soft, npscope.soft_threshold(x, 0.5, block), close)
        soft = npscope.soft_threshold(device, 0.5, block, conditioner=cupy.asarray(h))
        check(f"small metric {name} {block}", soft, npscope.soft_threshold(x, 0.5, block, conditioner=h), close)
        hard = npscope.hard_threshold(device, 2.0, block)
        check(f"small hard {name} {block}", hard, npscope.hard_threshold(x, 2.0, block))
    for block, scope, nnz in (((1, 1), (1, 4), 2), ((1, 1), (), 1000), ((4, 4), (), 40), ((1, 64), (), 9)):
        kept = npscope.keep_largest(x, nnz, block, scope)
        check(f"small prune {name} {block}", npscope.keep_largest(device, nnz, block, scope), kept)
        masks = [ScopeSpec(BlockSpec(a, block), scope).get_masks(nnz) for a in (device, x)]
        check(f"small masks {name} {block}", *(mask for found in masks for mask in found.values()))
    check(f"small kth {name}", npscope.kth_largest(device, 9), npscope.kth_largest(x, 9))
    check(f"small point {name}", npscope.mid_kth_largest(device, 9), npscope.mid_kth_largest(x, 9))
    check(f"small top {name}", npscope.topk_mask(device, 9, 0), npscope.topk_mask(x, 9, 0))


def conditioned(check: Checks, cupy: Any, rng: np.random.Generator) -> None:
    x, h = rng.standard_normal(SHAPE).astype(np.float32), rng.uniform(0.5, 2, SHAPE).astype(np.float32)
    for block in CONDITIONED:
        shrunk = npscope.soft_threshold(cupy.asarray(x), 1.0, block, conditioner=cupy.asarray(h))
        check(f"conditioned {block}", shrunk, npscope.soft_threshold(x, 1.0, block, conditioner=h), 1e-6)


def objects(check: Checks, cupy: Any, rng: np.random.Generator) -> None:
    large = rng.standard_normal((160, 1024)).astype(np.float32)
    check("large block", npscope.block_norms(cupy.asarray(large), (-1, -1)), npscope.block_norms(large, (-1, -1)))
    a, b = large[:16].copy(), large[16:32, :512].copy()
    device_a, device_b = cupy.asarray(a), cupy.asarray(b)
    for one, other in ((a, b), (device_a, device_b)):
        coupling = BlockCoupling([BlockSpec(one, (1, -1)), BlockSpec(other, (1, -1))])
        ScopeSpec(coupling, ()).hard_threshold(nnz=7)
    check("coupling", device_a, a)
    check("coupling, second part", device_b, b)
    spec = BlockSpec(device_a, (1, 4))
    spec.apply_multiplier(cupy.full(spec.grid_shape, 0.5, np.float32))
    check("scale", device_a, a * np.float32(0.5))
    check("nnz", cupy.asarray(spec.nnz()), np.asarray(BlockSpec(a, (1, 4)).nnz()))


def main(part: str, tool: str = "") -> int:
    import cupy

    if tool == "memcheck":
        cupy.cuda.set_allocator(None)  # every array its own allocation, so that each bound is watched
    check, rng = Checks(cupy), np.random.default_rng(5)
    for name in ("float32",) if part == "1" else ("float16", "float64"):
        of_dtype(check, cupy, rng, name)
    (conditioned if part == "1" else objects)(check, cupy, rng)
    print(check.done, "checks, wrong:", check.wrong)
    return int(check.wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
