"""Device memory: the same bits as on the CPU, large and hostile cases, numbers on the device, strides, CUDA graphs."""

from __future__ import annotations

import importlib
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from strategies import KINDS, hostile, same_bits

import npscope
from npscope import BlockCoupling, BlockSpec, KindError, ScopeCoupling, ScopeSpec, SpecError, View
from npscope.tiling import Leaf, block_grid_cut

FAST = ("float32", "float16", "bfloat16")


def same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, payloads of NaN aside."""
    nan = np.asarray(a != a)
    return a.dtype == b.dtype and np.array_equal(nan, np.asarray(b != b)) and same_bits(a[~nan], b[~nan])


# --- the same bits as on the CPU -----------------------------------------------------------------

CASES = [
    ((64, 128), (1, 1), (1, 4), 2),
    ((64, 128), (1, 1), (1, 2), 1),
    ((32, 128), (1, 1), (1, 8), 3),
    ((32, 128), (1, 1), (1, 16), 9),
    ((8, 1024), (1, 1), (1, -1), 512),
    ((8, 1000), (1, 1), (1, -1), 300),
    ((6, 250), (1, 1), (1, -1), 100),
    ((1024, 8), (1, 1), (-1, 1), 300),
    ((3, 2056), (1, 1), (1, -1), 1000),
    ((256, 256), (1, 1), (-1, -1), 20_000),
    ((2, 40_000), (1, 1), (1, -1), 9_999),
    ((128, 128), (4, 4), (-1, -1), 300),
    ((64, 256), (1, 16), (1, 16), 7),
    ((64, 64), (16, 16), (-1, -1), 5),
    ((64, 64), (16, 1), (-1, -1), 99),
    ((64, 64), (32, 32), (-1, -1), 2),
    ((60, 63), (3, 3), (-1, -1), 201),
    ((16, 8, 3, 3), (1, 8, 3, 3), (4, 1), 2),
    ((64, 36), (1, 36), (-1, 1), 20),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("shape", "block", "scope", "nnz"), CASES)
def test_equals_the_cpu(cupy_arrays, kind, name, shape, block, scope, nnz):
    cupy_arrays.require(name)
    x = hostile(kind, shape, name, 11)
    for order in ("C", "F"):
        host = np.asarray(x, order=order)
        device = cupy_arrays.asarray(host)
        mask = npscope.block_mask(host, nnz, block, scope)
        assert np.array_equal(cupy_arrays.to_numpy(npscope.block_mask(device, nnz, block, scope)), mask)
        kept = npscope.keep_largest(host, nnz, block, scope)
        assert same_bits(cupy_arrays.to_numpy(npscope.keep_largest(device, nnz, block, scope)), kept)
        assert same_bits(cupy_arrays.to_numpy(device), host)
        npscope.keep_largest(device, nnz, block, scope, out=device)
        assert same_bits(cupy_arrays.to_numpy(device), kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    "block", [(1, 4), (1, 16), (4, 4), (16, 1), (16, 16), (32, 32), (1, 128), (-1, -1), (2, 1), (8, 2)]
)
def test_norms_equal_the_cpu(cupy_arrays, kind, name, block):
    cupy_arrays.require(name)
    x = hostile(kind, (64, 128), name, 12)
    device = cupy_arrays.asarray(x)
    for ord in (1, 2, math.inf):
        got = cupy_arrays.to_numpy(npscope.block_norms(device, block, ord=ord))
        assert same_values(got, npscope.block_norms(x, block, ord=ord))


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "int8", "int64"])
@pytest.mark.parametrize("kind", ["normal", "constant", "two_valued", "nan_payloads", "sorted"])
def test_scopes_of_many_blocks(cupy_arrays, name, kind):
    """Histograms over many thread blocks, with ties split at the border."""
    x = hostile(kind, (5, 70_000), name, 13)
    device = cupy_arrays.asarray(x)
    for k in (1, 777, 35_000, 69_999):
        assert np.array_equal(cupy_arrays.to_numpy(npscope.topk_mask(device, k)), npscope.topk_mask(x, k))
        got = cupy_arrays.to_numpy(npscope.kth_largest(device, k))
        assert same_values(got, npscope.kth_largest(x, k))
    k = 123_456
    assert same_values(cupy_arrays.to_numpy(npscope.kth_largest(device, k, None)), npscope.kth_largest(x, k, None))


def test_keys_that_do_not_fit_the_buffer_are_read_again(cupy_arrays, monkeypatch):
    selection = importlib.import_module("npscope.backends.cupy_gpu.selection")
    monkeypatch.setattr(selection, "COLLECTED_BYTES", 4096)
    x = hostile("normal", (2, 50_000), "float32", 14)
    device = cupy_arrays.asarray(x)
    for k in (10, 20_000):
        assert np.array_equal(cupy_arrays.to_numpy(npscope.topk_mask(device, k)), npscope.topk_mask(x, k))


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("name", [*FAST, "float64", "int32"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_scopes_bracketed_by_a_sample(cupy_arrays, monkeypatch, kind, name, fits):
    """What lies between the borders is collected; where that does not fit, all is read again."""
    cupy_arrays.require(name)
    selection = importlib.import_module("npscope.backends.cupy_gpu.selection")
    monkeypatch.setattr(selection, "SAMPLED_BLOCKS", 1)
    monkeypatch.setattr(selection, "SAMPLES", 1000)
    if not fits:
        monkeypatch.setattr(selection, "COLLECTED_BYTES", 10_000)
    columns = 50_000 if fits else 50_001
    x = hostile(kind, (2, columns), name, 22)
    device = cupy_arrays.asarray(x)
    for k in (1, 500, 25_000, columns - 1, columns):
        assert np.array_equal(cupy_arrays.to_numpy(npscope.topk_mask(device, k)), npscope.topk_mask(x, k))
        assert same_values(cupy_arrays.to_numpy(npscope.kth_largest(device, k)), npscope.kth_largest(x, k))
        kept = npscope.keep_largest(x, k, (1, 1), (1, -1))
        assert same_bits(cupy_arrays.to_numpy(npscope.keep_largest(device, k, (1, 1), (1, -1))), kept)


@pytest.mark.parametrize("block", [(1, 300_000), (-1, -1), (3, 1000)])
@pytest.mark.parametrize("name", ["float32", "float64", "int16"])
def test_blocks_larger_than_a_thread_block_sums_at_once(cupy_arrays, block, name):
    x = hostile("normal", (3, 300_000), name, 15)
    for ord in (1, 2, math.inf, 3.0):
        got = cupy_arrays.to_numpy(npscope.block_norms(cupy_arrays.asarray(x), block, ord=ord))
        expected = npscope.block_norms(x, block, ord=ord)
        np.testing.assert_array_max_ulp(got, expected, maxulp=0 if name != "float64" and ord != 3.0 else 8)


@pytest.mark.parametrize("rows", [2, 64, 8192])
def test_sums_on_the_midpoint_of_two_floats(cupy_arrays, rng, rows):
    """Blocks that only exact sums decide, with one, 32 and 256 threads to a block."""
    x = rng.choice(np.asarray([1.0, 2.0**-24, 3 * 2.0**-24, 1 + 2.0**-23], np.float32), (rows, 33))
    for ord in (1, 2):
        got = cupy_arrays.to_numpy(npscope.block_norms(cupy_arrays.asarray(x), (rows, 1), ord=ord))
        assert same_bits(got, npscope.block_norms(x, (rows, 1), ord=ord))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "complex64", "float64"])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (1, 16), (16, 16), (3, 5)])
@pytest.mark.parametrize("conditioned", [False, True])
def test_shrinkage_has_the_zeros_of_the_cpu_and_nearly_its_values(cupy_arrays, rng, name, block, conditioned):
    cupy_arrays.require(name)
    shape = (48, 80) if block != (3, 5) else (48, 75)
    x = hostile("normal", shape, name, 20)
    h = rng.choice([0.5, 1.0, 2.0, 4.0], x.shape).astype(np.float32) if conditioned else None
    t = (
        (2 if conditioned else 1)
        * rng.uniform(0.3, 1.5, tuple(n // b for n, b in zip(shape, block, strict=True)))
        * math.sqrt(math.prod(block))
    )
    metric = None if h is None else cupy_arrays.asarray(h)
    b = cupy_arrays.to_numpy(npscope.soft_threshold(cupy_arrays.asarray(x), t, block, conditioner=metric))
    a = npscope.soft_threshold(x, t, block, conditioner=h)
    assert np.array_equal(a == 0, b == 0)
    assert 0 < (a == 0).mean() < 1
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 1e-12}.get(name, 2.0**-22)
    wide = np.complex128 if name == "complex64" else np.float64
    np.testing.assert_allclose(a.astype(wide), b.astype(wide), rtol=2 * eps, atol=2.0**-24)


# --- points and element masks --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FAST, "float64", "int8", "int64", "uint32"])
def test_points_between_equal_the_cpu(cupy_arrays, kind, name):
    cupy_arrays.require(name)
    x = hostile(kind, (6, 300), name, 31)
    device = cupy_arrays.asarray(x)
    for k in (1, 150, 299, np.asarray([1, 2, 3, 100, 200, 299])):
        for weight in (0.0, 1.0, 0.37):
            got = cupy_arrays.to_numpy(npscope.mid_kth_largest(device, k, k_weight=weight))
            assert same_values(got, npscope.mid_kth_largest(x, k, k_weight=weight))


def test_points_between_norms_equal_the_cpu(cupy_arrays, rng):
    x = rng.standard_normal((64, 64)).astype(np.float32)
    for block in ((1, 1), (4, 4), (1, 64)):
        for nnz in (1, 30, 62):
            points = [ScopeSpec(BlockSpec(a, block), ()).kth_mid(nnz=nnz) for a in (x, cupy_arrays.asarray(x))]
            assert same_bits(cupy_arrays.to_numpy(points[1]), points[0])


@pytest.mark.parametrize("shape", [(64, 64), (256, 256)])
@pytest.mark.parametrize("name", ["float32", "float16", "int64", "complex64"])
def test_element_masks_equal_the_cpu(cupy_arrays, rng, name, shape):
    a, b = ((9 * rng.standard_normal(shape)).astype(name) for _ in range(2))
    b = np.asfortranarray(b)
    for block, scope in (((1, 1), (1, 4)), ((4, 4), ()), ((1, 16), (2, -1))):
        masks = []
        for move in (np.asarray, cupy_arrays.asarray):
            parts = [ScopeSpec(BlockSpec(move(m), block), scope) for m in (a, b)]
            single, both = parts[0].get_masks(2), ScopeCoupling(parts).get_masks(3)
            joint = ScopeSpec(BlockCoupling([part.block for part in parts]), scope).get_masks(1)
            masks.append([*single.values(), *both.values(), *joint.values()])
        for host, device in zip(*masks, strict=True):
            assert device.dtype == np.bool_
            assert np.array_equal(cupy_arrays.to_numpy(device), host)


def test_element_masks_take_little_more_than_their_bytes(cupy_arrays):
    """One byte an element, and the norms of the blocks."""
    cupy = real_cupy(cupy_arrays)
    x, pool = cupy.ones((4096, 4096), np.float32), cupy.cuda.MemoryPool()
    masks = ScopeSpec(BlockSpec(x, (8, 8)), ()).get_masks
    masks(100)  # compiles
    pool.set_limit(size=int(1.6 * x.size))
    with cupy.cuda.using_allocator(pool.malloc):
        found = masks(100)
        assert sum(int(mask.sum()) for mask in found.values()) == 6400


# --- small and large -----------------------------------------------------------------------------


def test_a_small_call_is_one_launch(cupy_arrays, rng, monkeypatch):
    """In place and not, of functions, specs and couplings: none takes the way of large arrays."""
    cupy = real_cupy(cupy_arrays)
    small = importlib.import_module("npscope.backends.cupy_gpu.small")
    if small.MOST_ELEMENTS == 0:
        pytest.skip("the path of large arrays")
    x, y, h = (cupy.asarray(rng.uniform(0.5, 2, (64, 64)).astype(np.float32)) for _ in range(3))
    spec = ScopeSpec(BlockSpec(x, (4, 4)), ())
    both = ScopeCoupling([spec, ScopeSpec(BlockSpec(y, (1, 16)), ())])
    runs = []
    usual = small.Prepared.run
    monkeypatch.setattr(small.Prepared, "run", lambda *args, **kwargs: (runs.append(1), usual(*args, **kwargs))[1])
    for module, names in (
        (small.writing, ("prune", "mask", "threshold", "apply_mask", "scale")),
        (small.selection, ("kth", "midpoint")),
        (small.shrinkage, ("shrink",)),
        (small.tables, ("norms",)),
    ):
        for name in names:
            monkeypatch.delattr(module, name)
    for call in (
        *(lambda out=out: npscope.keep_largest(x, 9, (4, 4), (), out=out) for out in (None, x, y)),
        lambda: npscope.keep_largest(x, 9, (4, 4), (), scores=y),
        lambda: npscope.block_norms(x, (4, 4)),
        lambda: npscope.block_norms(x, (1, 64), ord=3),
        lambda: npscope.kth_largest(x, 5),
        lambda: npscope.mid_kth_largest(x, 5),
        lambda: npscope.topk_mask(x, 5),
        lambda: npscope.block_mask(x, 5, (1, 16), ()),
        lambda: npscope.hard_threshold(x, 1.0, (4, 4)),
        lambda: npscope.soft_threshold(x, 0.1, (1, 1)),
        lambda: npscope.soft_threshold(x, 0.1, (4, 4), out=x),
        lambda: npscope.soft_threshold(x, 0.1, (4, 4), conditioner=h, out=x),
        lambda: spec.get_masks(9),
        lambda: spec.soft_threshold(0.1),
        lambda: spec.kth_mid(nnz=4),
        lambda: spec.block.apply_multiplier(2.0),
        lambda: both.hard_threshold(nnz=9),
        lambda: both.get_masks(9),
    ):
        before = len(runs)
        call()
        assert len(runs) == before + 1
    before = len(runs)
    both.soft_threshold(0.1)
    assert len(runs) == before + len(both.scopes)


@pytest.mark.parametrize("columns", [256, 260])
def test_the_largest_small_problem_and_the_smallest_large_one(cupy_arrays, rng, columns):
    x = rng.standard_normal((64, columns)).astype(np.float32)
    device = cupy_arrays.asarray(x)
    for block, scope, nnz in (((1, 1), (1, 4), 3), ((1, 4), (), 1000), ((1, 1), (16, -1), 77), ((-1, -1), (), 0)):
        kept = npscope.keep_largest(x, nnz, block, scope)
        assert same_bits(cupy_arrays.to_numpy(npscope.keep_largest(device, nnz, block, scope)), kept)
        norms = npscope.block_norms(x, block)
        assert same_bits(cupy_arrays.to_numpy(npscope.block_norms(device, block)), norms)


@pytest.mark.parametrize(
    ("name", "ord", "exact"),
    [
        ("float64", 2, False), ("float64", 1, False), ("complex64", 2, False), ("float32", 2.5, False),
        ("float32", 2, True), ("float16", 1, True), ("int64", math.inf, False),
    ],
)  # fmt: skip
def test_joint_norms_are_those_of_the_parts(cupy_arrays, rng, monkeypatch, name, ord, exact):
    """Bit for bit: parts whose sums are rounded on the way, and owned by more threads or fewer, share no launch."""
    small = importlib.import_module("npscope.backends.cupy_gpu.small")
    x = [(rng.standard_normal(s) * 10.0 ** rng.integers(-4, 4, s)).astype(name) for s in ((64, 32), (64, 64))]
    parts = [ScopeSpec(BlockSpec(cupy_arrays.asarray(a), (1, -1)), ()) for a in x]
    alone = [cupy_arrays.to_numpy(part.block_norms(ord=ord)) for part in parts]
    runs, usual = [], small.Prepared.run
    monkeypatch.setattr(small.Prepared, "run", lambda *args, **kwargs: (runs.append(1), usual(*args, **kwargs))[1])
    joint = cupy_arrays.to_numpy(ScopeCoupling(parts).block_norms(ord=ord))
    assert same_bits(joint, np.concatenate(alone, axis=-1))
    assert len(runs) == (exact and small.MOST_ELEMENTS > 0)


def test_leaves_of_which_only_some_were_elsewhere(cupy_arrays, rng):
    """What no caller asks for is right too: the elements of one leaf are brought, the other is worked on in place."""
    small = importlib.import_module("npscope.backends.cupy_gpu.small")
    x, y = (rng.standard_normal((8, 16)).astype(np.float32) for _ in range(2))
    (geometry,) = BlockSpec(x, (1, -1))._cuts
    for first in (True, False):
        a, b = cupy_arrays.asarray(x), cupy_arrays.asarray(y)
        new = cupy_arrays.asarray(np.full_like(x, np.nan))
        leaves = (Leaf(new, geometry, a), Leaf(b, geometry)) if first else (Leaf(b, geometry), Leaf(new, geometry, a))
        mask = np.arange(8).reshape(8, 1) % 2 == 0
        small.apply_mask((leaves,), Leaf(mask, block_grid_cut((8, 1))))
        assert same_bits(cupy_arrays.to_numpy(new), np.where(mask, x, np.float32(0)))
        assert same_bits(cupy_arrays.to_numpy(b), np.where(mask, y, np.float32(0)))


def test_small_problems_of_more_axes_than_a_launch_carries(cupy_arrays, rng):
    x = rng.standard_normal((4,) * 6).astype(np.float32)
    block, scope = (2, 1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 2)
    kept = npscope.keep_largest(x, 3, block, scope)
    assert same_bits(cupy_arrays.to_numpy(npscope.keep_largest(cupy_arrays.asarray(x), 3, block, scope)), kept)


# --- objects -------------------------------------------------------------------------------------


def test_windows_write_through(cupy_arrays, rng):
    host = rng.standard_normal((12, 20)).astype(np.float32)
    device = cupy_arrays.asarray(host)
    for shape, stride, offset in (((6, 10), (40, 2), 0), ((12, 5), (20, -4), 19), ((3, 4, 5), (80, 20, 3), 1)):
        windows = [View(a, shape, stride, offset) for a in (host, device)]
        assert same_bits(cupy_arrays.to_numpy(windows[1].data), windows[0].data)
        for window in windows:
            ScopeSpec(BlockSpec(window, (1,) * len(shape)), (1,) * (len(shape) - 1)).hard_threshold(nnz=2)
        assert same_bits(cupy_arrays.to_numpy(device), host)
    with pytest.raises(SpecError, match="spans"):
        View(device, (13, 20), (20, 1))


@pytest.mark.parametrize("leaves", [2, 3, 9])
def test_couplings_of_many_leaves(cupy_arrays, rng, leaves):
    """More leaves than a launch carries; each of another dtype and layout."""
    names = itertools.cycle(("float32", "float16", "int8"))
    arrays = [(4 * rng.standard_normal((6, 4 + i))).astype(next(names)) for i in range(leaves)]
    arrays[1] = np.asfortranarray(arrays[1])
    results = []
    for made in (arrays, [cupy_arrays.asarray(a) for a in arrays]):
        block = BlockCoupling([BlockSpec(a, (1, -1)) for a in made])
        scope = ScopeCoupling([ScopeSpec(BlockSpec(a, (1, 2 if a.shape[1] % 2 == 0 else 1)), ()) for a in made])
        norms = block.norms()
        wide = scope.block_norms()
        scope.hard_threshold(nnz=20)
        ScopeSpec(block, ()).hard_threshold(nnz=4)
        results.append([cupy_arrays.to_numpy(a) if made is not arrays else a for a in (norms, wide, *made)])
    for host, device in zip(*results, strict=True):
        assert same_bits(device, host)


def test_coupled_shrinkage(cupy_arrays, rng):
    arrays = [rng.standard_normal((6, n)).astype(np.float32) for n in (4, 7)]
    weights = [rng.uniform(0.5, 2, a.shape) for a in arrays]
    results = []
    for move in (np.copy, cupy_arrays.asarray):
        specs = [BlockSpec(move(a), (1, -1)) for a in arrays]
        scope = ScopeSpec(BlockCoupling(specs), (2, 1))
        scope.soft_threshold(np.asarray([[0.5], [2.5], [1.0]]), dict(zip(specs, map(move, weights), strict=True)))
        scope.soft_threshold(0.1, scale=True)
        results.append([np.asarray(s.data) if move is np.copy else cupy_arrays.to_numpy(s.data) for s in specs])
    for host, device in zip(*results, strict=True):
        np.testing.assert_allclose(device, host, rtol=2.0**-21)


def test_windows_that_overlap_are_refused(cupy_arrays):
    device = cupy_arrays.asarray(np.zeros((4, 8), np.float32))
    with pytest.raises(SpecError, match="overlaps"):
        npscope.keep_largest(device[:, 1:5], 1, (1, 1), (1, -1), out=device[:, :4])
    with pytest.raises(npscope.CouplingError, match="share an element"):
        BlockCoupling([BlockSpec(device[:, :5], (1, -1)), BlockSpec(device[:, 4:], (1, -1))])
    BlockCoupling([BlockSpec(device[:, :4], (1, -1)), BlockSpec(device[:, 4:], (1, -1))])
    itself = View(device, (4, 4), (1, 1)).data
    with pytest.raises(SpecError, match="meets itself"):
        npscope.soft_threshold(itself, 1.0, (1, 1), out=itself)


# --- device and host -----------------------------------------------------------------------------


def test_host_and_device_do_not_mix(cupy_arrays):
    host = np.ones((4, 4), np.float32)
    device = cupy_arrays.asarray(host)
    with pytest.raises(KindError, match=r"scores is a NumPy array but x is a cupy|x is a cupy.* but scores|scores is"):
        npscope.keep_largest(device, 1, (1, 1), (1, 4), scores=host)
    with pytest.raises(KindError, match="move one of them"):
        npscope.hard_threshold(host, device, (1, 1))
    with pytest.raises(KindError, match="move one of them"):
        npscope.block_norms(device, (1, 4), out=np.empty((4, 1), np.float32))
    with npscope.use_backend("cupy"), pytest.raises(KindError, match=r"cupy\.asarray"):
        npscope.block_norms(host, (1, 4))
    with npscope.use_backend("numba"), pytest.raises(KindError, match="does not serve"):
        npscope.block_norms(device, (1, 4))
    assert npscope.namespace(device).name == "cupy"


def test_the_array_must_be_on_the_current_device(cupy_arrays, monkeypatch):
    cupy = importlib.import_module("cupy")
    device = cupy_arrays.asarray(np.ones((4, 4), np.float32))
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
    with pytest.raises(KindError, match=r"device 0, but the current device is 1; use `with cupy\.cuda\.Device\(0\)`"):
        npscope.block_norms(device, (1, 4))


def test_reference_serves_device_arrays_when_asked(cupy_arrays, rng):
    x = rng.standard_normal((8, 8)).astype(np.float32)
    with npscope.use_backend("reference"):
        got = npscope.keep_largest(cupy_arrays.asarray(x), 3, (2, 2), ())
    assert same_bits(cupy_arrays.to_numpy(got), npscope.keep_largest(x, 3, (2, 2), ()))


def test_counts_on_the_device_are_clamped_or_checked(cupy_arrays, rng):
    x = rng.standard_normal((4, 8)).astype(np.float32)
    device = cupy_arrays.asarray(x)
    counts = np.asarray([-5, 0, 3, 99])
    got = npscope.keep_largest(device, cupy_arrays.asarray(counts)[:, None], (1, 1), (1, -1))
    expected = npscope.keep_largest(x, np.clip(counts, 0, 8)[:, None], (1, 1), (1, -1))
    assert same_bits(cupy_arrays.to_numpy(got), expected)
    with npscope.config(check=True), pytest.raises(SpecError, match="-5 is outside"):
        npscope.keep_largest(device, cupy_arrays.asarray(counts)[:, None], (1, 1), (1, -1))


def test_bad_numbers_on_the_device_spoil_their_block_or_are_refused(cupy_arrays):
    x = np.full((1, 8), 3.0, np.float32)
    device, bad = cupy_arrays.asarray(x), cupy_arrays.asarray(np.asarray([[np.nan, 1.0, -1.0, 1.0]], np.float32))
    soft = cupy_arrays.to_numpy(npscope.soft_threshold(device, bad, (1, 2)))
    assert np.isnan(soft).tolist() == [[True, True, False, False, True, True, False, False]]
    hard = cupy_arrays.to_numpy(npscope.hard_threshold(device, bad, (1, 2)))
    assert np.isnan(hard).tolist() == [[True, True, False, False, False, False, False, False]]
    h = cupy_arrays.asarray(np.asarray([[1.0, 0.0, 1.0, 1.0, 1.0, np.nan, 1.0, 1.0]]))
    for block in ((1, 2), (1, 1)):
        conditioned = cupy_arrays.to_numpy(npscope.soft_threshold(device, 1.0, block, conditioner=h))
        assert np.isnan(conditioned).any(axis=0).reshape(4, 2).any(axis=1).tolist() == [True, False, True, False]
    slow = npscope.soft_threshold(device, 1.0, (1, 8), conditioner=_spread(cupy_arrays), max_iter=1)
    assert np.isnan(cupy_arrays.to_numpy(slow)).all()
    with npscope.config(check=True):
        with pytest.raises(SpecError, match="NaN"):
            npscope.hard_threshold(device, bad, (1, 2))
        with pytest.raises(SpecError, match="conditioner"):
            npscope.soft_threshold(device, 1.0, (1, 2), conditioner=h)
        with pytest.raises(npscope.ConvergenceError):
            npscope.soft_threshold(device, 1.0, (1, 8), conditioner=_spread(cupy_arrays), max_iter=1)


def _spread(cupy_arrays):
    return cupy_arrays.asarray(np.geomspace(1e-3, 1e3, 8)[None])


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize(
    ("name", "carried"),
    [("kth_largest", 1), ("mid_kth_largest", 1), ("topk_mask", 1), ("hard", 1), ("soft", 1), ("one for all", 0)],
)
def test_numbers_of_the_host_are_carried_over_once(cupy_arrays, rng, monkeypatch, size, name, carried):
    x = cupy_arrays.asarray(rng.uniform(1, 2, (size, size)).astype(np.float32))
    places, limits = rng.integers(1, size, size), rng.uniform(1, 2, (size // 4, size // 4))
    over = importlib.import_module("npscope.backends.cupy_gpu.operands")
    usual, moved = over.cupy.asarray, []
    monkeypatch.setattr(over.cupy, "asarray", lambda a: (moved.append(a), usual(a))[1])
    {
        "kth_largest": lambda: npscope.kth_largest(x, places),
        "mid_kth_largest": lambda: npscope.mid_kth_largest(x, places),
        "topk_mask": lambda: npscope.topk_mask(x, places),
        "hard": lambda: npscope.hard_threshold(x, limits, (4, 4)),
        "soft": lambda: npscope.soft_threshold(x, limits, (4, 4)),
        "one for all": lambda: npscope.mid_kth_largest(x, np.asarray([5])),
    }[name]()
    assert len(moved) == carried


@pytest.mark.parametrize("checked", [False, True])
def test_no_number_is_carried_over_for_a_problem_that_is_not_small(cupy_arrays, rng, monkeypatch, checked):
    """A part of the coupling is too large, or what is checked takes the way of large arrays."""
    shapes = [(64, 64), (64, 64 if checked else 1024)]
    parts = [ScopeSpec(BlockSpec(cupy_arrays.asarray(np.ones(s, np.float32)), (4, 4)), (1, -1)) for s in shapes]
    metric = {part.block: cupy_arrays.asarray(np.ones(s)) for part, s in zip(parts, shapes, strict=True)}
    limits, both = rng.uniform(0, 1, (16, 1)), ScopeCoupling(parts)
    over = importlib.import_module("npscope.backends.cupy_gpu.operands")
    usual, moved = over.cupy.asarray, []
    monkeypatch.setattr(over.cupy, "asarray", lambda a: (moved.append(a), usual(a))[1])
    with npscope.config(check=checked):
        both.soft_threshold(limits, metric)
    assert len(moved) == len(parts)


def test_float8_has_no_place_on_the_device(cupy_arrays):
    cupy = importlib.import_module("cupy")
    with pytest.raises((TypeError, ValueError, KeyError)):
        npscope.block_norms(cupy.asarray(hostile("normal", (4, 4), "float8_e5m2", 1)), (1, 4))


# --- streams and graphs --------------------------------------------------------------------------


def real_cupy(cupy_arrays):
    cupy = importlib.import_module("cupy")
    if not hasattr(cupy.cuda, "Stream"):
        pytest.skip("no CUDA device")
    return cupy


def joint_mask(x, h):
    """The element mask of one of two arrays whose blocks compete."""
    parts = [ScopeSpec(BlockSpec(a, (4, 4)), ()) for a in (x, h)]
    return ScopeCoupling(parts).get_masks(100)[parts[0].block]


GRAPHED = {
    "2:4": lambda x, h: npscope.keep_largest(x, 2, (1, 1), (1, 4), out=x),
    "2:4 elsewhere": lambda x, h: npscope.keep_largest(x, 2, (1, 1), (1, 4)),
    "rows": lambda x, h: npscope.keep_largest(x, 50, (1, 1), (1, -1), out=x),
    "global": lambda x, h: npscope.keep_largest(x, 2000, (1, 1), (-1, -1), out=x),
    "tiles": lambda x, h: npscope.keep_largest(x, 200, (4, 4), (-1, -1), out=x),
    "hard": lambda x, h: npscope.hard_threshold(x, 4.0, (4, 4), out=x),
    "soft": lambda x, h: npscope.soft_threshold(x, 1.0, (4, 4), out=x),
    "conditioned": lambda x, h: npscope.soft_threshold(x, 1.0, (4, 4), conditioner=h, out=x),
    "norms": lambda x, h: npscope.block_norms(x, (4, 4)),
    "k-th": lambda x, h: npscope.kth_largest(x, 9),
    "point": lambda x, h: npscope.mid_kth_largest(x, 9),
    "mask": lambda x, h: npscope.topk_mask(x, 9),
    "joint masks": joint_mask,
}


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("name", GRAPHED)
def test_captured_in_a_graph(cupy_arrays, rng, name, size):
    """Captured, other memory filled meanwhile, replayed on new data: as a direct call."""
    cupy = real_cupy(cupy_arrays)
    call = GRAPHED[name]
    data = [rng.standard_normal((size, size)).astype(np.float32) for _ in range(2)]
    x, h = cupy.asarray(data[0]), cupy.asarray(rng.uniform(0.5, 2, (size, size)).astype(np.float32))
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        call(x, h)  # compiles, and gives the pool its memory
        stream.synchronize()
        stream.begin_capture()
        result = call(x, h)
        graph = stream.end_capture()
    fillers = [cupy.full((1 << 20,), 7.0) for _ in range(8)]
    for new in data:
        x.set(new)
        expected = cupy.asnumpy(call(cupy.asarray(new), h))
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert same_bits(cupy.asnumpy(result), expected)
    del fillers


def test_works_on_the_current_stream(cupy_arrays, rng):
    cupy = real_cupy(cupy_arrays)
    x = rng.standard_normal((512, 512)).astype(np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        got = cupy.asnumpy(npscope.keep_largest(cupy.asarray(x), 2, (1, 1), (1, 4)), stream=stream)
    assert same_bits(got, npscope.keep_largest(x, 2, (1, 1), (1, 4)))


def test_out_of_memory_comes_before_the_first_write(cupy_arrays, rng):
    cupy = real_cupy(cupy_arrays)
    x = cupy.asarray(rng.standard_normal((256, 256)).astype(np.float32))
    before = cupy.asnumpy(x)
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(size=1024)
    with cupy.cuda.using_allocator(pool.malloc), pytest.raises(MemoryError, match="nothing was written"):
        npscope.keep_largest(x, 900, (4, 4), (-1, -1), out=x)
    assert same_bits(cupy.asnumpy(x), before)


FORK = """
import os, sys, cupy, npscope
x = cupy.ones((4, 8), "float32")
npscope.block_norms(x, (1, 4))
cupy.cuda.Device().synchronize()
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    npscope.block_norms(x, (1, 4))
except RuntimeError as error:
    os._exit(0 if "spawn" in str(error) else 3)
os._exit(4)
"""


def test_a_forked_process_is_told_so(cupy_arrays):
    real_cupy(cupy_arrays)
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=120, check=False).returncode == 0


def test_torch_tensors_through_dlpack(cupy_arrays, rng):
    """Zero-copy: the tensor itself is pruned."""
    cupy = real_cupy(cupy_arrays)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = rng.standard_normal((16, 16)).astype(np.float32)
    tensor = torch.asarray(x.copy(), device="cuda")
    ScopeSpec(BlockSpec(cupy.from_dlpack(tensor), (1, 1)), (1, 4)).hard_threshold(nnz=2)
    cupy.cuda.Device().synchronize()
    assert same_bits(tensor.cpu().numpy(), npscope.keep_largest(x, 2, (1, 1), (1, 4)))
