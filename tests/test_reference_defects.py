"""Each defect of the PyTorch reference, pinned so that it cannot come here."""

from __future__ import annotations

import math

import numpy as np
import oracles as o
import pytest
from builders import build
from strategies import hostile, same_bits

import npscope
from npscope import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec, View


def couple(*arrays, block=(1, 1), scope=()):
    return ScopeCoupling([ScopeSpec(BlockSpec(a, block), scope) for a in arrays])


@pytest.mark.parametrize("nnz", range(9))
def test_ties_keep_exactly_nnz(backend, nnz):
    x = np.ones((1, 8), dtype=np.float32)
    ScopeSpec(BlockSpec(x, (1, 1)), (1, 8)).hard_threshold(nnz=nnz)
    assert x[0].tolist() == [1] * nnz + [0] * (8 - nnz)


@pytest.mark.parametrize("nnz", range(7))
def test_ties_between_parts_keep_exactly_nnz(backend, nnz):
    x, y = np.ones((1, 4), dtype=np.float32), np.ones((2, 1), dtype=np.float32)
    couple(x, y).hard_threshold(nnz=nnz)
    assert [*x.ravel(), *y.ravel()] == [1] * nnz + [0] * (6 - nnz)


def test_couplings_rank_and_apply_with_the_same_values(backend):
    """The reference ranked by `values` and then compared the norms of the data with the k-th value."""
    x, y = np.full((1, 2), 100, dtype=np.float32), np.full((1, 2), 0.01, dtype=np.float32)
    both = couple(x, y)
    a, b = both.specs()
    both.hard_threshold(nnz=2, values={a: np.asarray([[1.0, 4.0]]), b: np.asarray([[3.0, 2.0]])})
    assert x.tolist() == [[0, 100]]
    assert y.tolist() == [[np.float32(0.01), 0]]


def test_level_of_values_applies_to_values(backend):
    x = np.full((1, 4), 100, dtype=np.float32)
    scope = ScopeSpec(BlockSpec(x, ()), ())
    values = np.asarray([[1.0, 4.0, 3.0, 2.0]])
    scope.hard_threshold(scope.kth_largest(values, nnz=2), values=values)
    assert x.tolist() == [[0, 100, 100, 0]]


def test_two_norm_kernels_never_disagree_about_the_kth_block(backend, rng):
    """Thresholding at the k-th norm keeps the k-th block: it is the same norm, to the last bit."""
    x = rng.standard_normal((50, 64)).astype(np.float32)
    for k in range(1, 17):
        y = x.copy()
        scope = ScopeSpec(BlockSpec(y, (1, 4)), (1, -1))
        scope.hard_threshold(scope.kth_largest(nnz=k))
        assert (y.reshape(50, 16, 4).any(-1).sum(-1) == k).all()


@pytest.mark.parametrize("shapes", [((1, 4), (1, 9)), ((1, 2), (1, 2))])
def test_scale_is_per_block(backend, shapes):
    """sqrt(elements of a block), part by part: not that of the scope, nor that of the first part."""
    arrays = [np.full(shape, 10.0) for shape in shapes]
    parts = [ScopeSpec(BlockSpec(a, (1, -1)), ()) for a in arrays]
    ScopeCoupling(parts).soft_threshold(1.0, scale=True)
    for a in arrays:
        n = a.size
        np.testing.assert_allclose(a, 10 * (1 - math.sqrt(n) / (10 * math.sqrt(n))), rtol=1e-14)


def test_scale_counts_all_leaves_of_a_block(backend):
    x, y = np.full((1, 4), 10.0), np.full((1, 12), 10.0)
    ScopeSpec(BlockCoupling([BlockSpec(a, (1, -1)) for a in (x, y)]), ()).soft_threshold(1.0, scale=True)
    np.testing.assert_allclose([x[0, 0], y[0, 0]], 9.0, rtol=1e-14)


def test_elements_are_not_blocks():
    scope = ScopeSpec(BlockSpec(np.ones((8, 8)), (2, 4)), (2, 2))
    assert (scope.numel_per_scope(), scope.numblk_per_scope()) == (32, 4)
    assert (scope.numblk(), scope.numscp(), scope.nnz()) == (8, 2, 64)
    two = ScopeCoupling([scope, ScopeSpec(BlockSpec(np.ones((4, 2)), (1, 1)), (2, -1))], orders=[(0, 1), (0, 1)])
    assert (two.numel_per_scope(), two.numblk_per_scope()) == (36, 8)
    joint = ScopeSpec(BlockCoupling([BlockSpec(np.ones((4, 4)), (1, 4)), BlockSpec(np.ones((4, 2)), (1, 2))]), (2,))
    assert (joint.numel_per_scope(), joint.numblk_per_scope()) == (12, 2)


@pytest.mark.parametrize(
    ("s", "n", "keep"),
    [(0.29, 100, 71), (0.1, 10, 9), (0.7, 10, 3), (0.57, 100, 43), ("0.29", 100, 71), (np.float32(0.29), 100, 71),
     (np.float16(0.1), 10, 9), (1 / 3, 3, 3), ("1/3", 3, 2), (0.0, 7, 7), (1.0, 7, 0), (1, 7, 0)],
)  # fmt: skip
def test_sparsity_is_the_decimal_that_was_written(s, n, keep):
    assert npscope.nnz_from_sparsity(s, n) == keep


def test_trailing_axes_ride_along():
    scope = ScopeSpec(BlockSpec(np.ones((4, 6)), (1, 1)), (2, 3))
    b = np.arange(4 * 6 * 5).reshape(4, 6, 5)
    assert scope.block_to_scope(b, merge=True).shape == (2, 2, 6, 5)
    assert same_bits(scope.scope_to_block(scope.block_to_scope(b, merge=True)), b)


def test_missing_trailing_scope_axes_are_whole():
    block = BlockSpec(hostile("normal", (4, 6, 2), "float32", 1), (1, 1, 1))
    assert ScopeSpec(block, (2,)) == ScopeSpec(block, (2, 6, 2))
    assert ScopeSpec(block, ()).numscp() == 1


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((4, 4), (4, 1), 1),
        ((5,), (4,), 0),
        ((2,), (-1,), 0),
        ((1,), (1,), 16),
        ((1,), (1,), -1),
        ((2, 2), (2**62, 1), 0),
        ((3,), (-8,), 15),
    ],
)
def test_views_cannot_leave_their_array(shape, stride, offset):
    with pytest.raises(ValueError, match="View: "):
        View(np.zeros(16), shape, stride, offset)


def test_nan_is_kept_and_visible(backend):
    x = np.asarray([[1.0, np.nan, 3.0, 2.0]])
    ScopeSpec(BlockSpec(x, ()), (1, 4)).hard_threshold(nnz=2)
    assert np.isnan(x[0, 1])
    assert x[0, [0, 2, 3]].tolist() == [0, 3, 0]
    BlockSpec(x, (1, 4)).soft_threshold(1.0)
    assert np.isnan(x[0, 1])
    assert x[0, 2] == 3


@pytest.mark.parametrize("value", [-1.0, np.inf, -np.inf, np.nan])
def test_dropped_elements_are_plus_zero(backend, value):
    x = np.full((1, 4), value)
    ScopeSpec(BlockSpec(x, ()), ()).hard_threshold(nnz=0)
    assert same_bits(x, np.zeros((1, 4)))
    if value == -1:
        x = np.full((1, 4), -1.0)
        BlockSpec(x, (1, 4)).soft_threshold(2.0)
        assert same_bits(x, np.zeros((1, 4)))


def test_minus_zero_is_kept_as_it_is(backend):
    x = np.asarray([[-0.0, 0.0, -0.0]])
    ScopeSpec(BlockSpec(x, ()), ()).hard_threshold(nnz=3)
    assert np.signbit(x).tolist() == [[True, False, True]]


def test_no_placeholder_shapes():
    scope = ScopeSpec(BlockSpec(np.ones((4, 6)), (-1, 1)), (-1, -1))
    assert scope.shape == (1, 6)
    assert scope.blocks()[0].shape == (4, 1)


@pytest.mark.parametrize(
    "verb", ["hard_threshold", "soft_threshold", "get_masks", "kth_largest", "kth_mid", "block_norms"]
)
def test_spec_and_coupling_have_the_same_signatures(verb):
    import inspect

    assert inspect.signature(getattr(ScopeSpec, verb)) == inspect.signature(getattr(ScopeCoupling, verb))
    if hasattr(BlockSpec, verb):
        assert inspect.signature(getattr(BlockSpec, verb)) == inspect.signature(getattr(BlockCoupling, verb))


def test_nothing_of_a_layout_is_guessed_from_a_shape(backend):
    """A square matrix and its transpose are told apart by the orders alone."""
    x, y = hostile("normal", (4, 4), "float32", 2), hostile("normal", (4, 4), "float32", 3)
    parts = [o.Part([o.Leaf(x, (1, 4), (0, 1)), o.Leaf(y, (4, 1), (1, 0))], (-1, -1))]
    built = build(parts)
    built.scope.hard_threshold(nnz=2)
    norms = np.sqrt((x.astype(float) ** 2).sum(1) + (y.astype(float) ** 2).sum(0))
    kept = sorted(np.argsort(-norms)[:2].tolist())
    assert np.flatnonzero(built.arrays[0][0].any(1)).tolist() == kept
    assert np.flatnonzero(built.arrays[0][1].any(0)).tolist() == kept
