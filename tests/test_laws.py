"""Laws that hold whatever the data: couplings of one part, permuted parts, exact counts, projections."""

from __future__ import annotations

import math

import numpy as np
import oracles as o
import pytest
from builders import assert_bits, build
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import COMPLEX, FINITE, KINDS, coupled_parts, hostile, problems, same_bits

import npscope
from npscope import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec

FLOATS = ("float32", "float16")


@given(data=st.data())
def test_a_coupling_of_one_part_is_the_spec(backend, data):
    p = data.draw(problems(FLOATS, max_axes=3))
    assume(p.x.size)
    nnz = data.draw(st.integers(0, p.count))
    spec = BlockSpec(p.x.copy(), p.block)
    coupled = BlockSpec(p.x.copy(), p.block)
    plain = ScopeSpec(spec, p.scope)
    wrapped = ScopeCoupling([ScopeSpec(BlockCoupling([coupled]), p.scope)])
    assert wrapped.grid_shape == plain.grid_shape
    for member in ("numscp", "numblk", "numblk_per_scope", "numel_per_scope", "nnz"):
        assert getattr(wrapped, member)() == getattr(plain, member)()
    assert same_bits(wrapped.block_norms(), plain.block_norms())
    assert same_bits(wrapped.get_masks(nnz)[coupled], plain.get_masks(nnz)[spec])
    plain.hard_threshold(nnz=nnz)
    wrapped.hard_threshold(nnz=nnz)
    assert same_bits(spec.data, coupled.data)
    plain.soft_threshold(0.5, scale=True)
    wrapped.soft_threshold(0.5, scale=True)
    assert same_bits(spec.data, coupled.data)


@given(data=st.data())
def test_functions_are_the_objects(backend, data):
    p = data.draw(problems(FLOATS, max_axes=3))
    assume(p.x.size)
    nnz = data.draw(st.integers(0, p.count))
    a, b = BlockSpec(p.x.copy(), p.block), BlockSpec(p.x.copy(), p.block)
    assert same_bits(a.norms(), npscope.block_norms(p.x, p.block))
    ScopeSpec(a, p.scope).hard_threshold(nnz=nnz)
    assert same_bits(a.data, npscope.keep_largest(p.x, nnz, p.block, p.scope))
    b.soft_threshold(0.3)
    assert same_bits(b.data, npscope.soft_threshold(p.x, 0.3, p.block))


@given(data=st.data())
def test_permuting_parts_permutes_results(backend, data):
    """With norms that differ, the order of the parts decides nothing but the order of the results."""
    parts = data.draw(coupled_parts(kinds=("normal",)))
    norms = o.scope_norms(parts)
    assume(all(len(set(row)) == len(row) for row in norms.reshape(-1, norms.shape[-1]).tolist()))
    nnz = data.draw(st.integers(0, o.blocks_per_scope(parts)))
    turn = data.draw(st.permutations(range(len(parts))))
    one, two = build(parts), build([parts[i] for i in turn])
    one.scope.hard_threshold(nnz=nnz)
    two.scope.hard_threshold(nnz=nnz)
    assert_bits(two, [one.arrays[i] for i in turn])


@given(data=st.data())
def test_permuting_leaves_changes_nothing(backend, data):
    """The norm of a joint block is correctly rounded, so the order of its leaves cannot matter, ties included."""
    (part,) = data.draw(coupled_parts(("float32", "bfloat16"), max_parts=1, max_leaves=3))
    nnz = data.draw(st.integers(0, o.blocks_per_scope([part])))
    turned = part._replace(leaves=part.leaves[::-1])
    one, two = build([part]), build([turned])
    one.scope.hard_threshold(nnz=nnz)
    two.scope.hard_threshold(nnz=nnz)
    assert_bits(two, [one.arrays[0][::-1]])


@given(data=st.data())
def test_orders_are_transposes(backend, data):
    """A transposed array with an order is the array itself without one, where no ties occur."""
    x = hostile("normal", (4, 6), "float32", data.draw(st.integers(0, 999)))
    y = hostile("normal", (4, 6), "float32", data.draw(st.integers(1000, 1999)))
    nnz = data.draw(st.integers(0, 4))
    a, b, bt = BlockSpec(x.copy(), (1, 2)), BlockSpec(y.copy(), (1, 2)), BlockSpec(np.ascontiguousarray(y.T), (2, 1))
    a2 = BlockSpec(x.copy(), (1, 2))
    ScopeSpec(BlockCoupling([a, b]), (2, -1)).hard_threshold(nnz=nnz)
    ScopeSpec(BlockCoupling([a2, bt], orders=[(0, 1), (1, 0)]), (2, -1)).hard_threshold(nnz=nnz)
    assert same_bits(a.data, a2.data)
    assert same_bits(b.data, np.ascontiguousarray(bt.data.T))


@given(data=st.data())
def test_masks_keep_exactly_k(xp, data):
    p = data.draw(
        problems([n for n in ("float32", "float64", "complex64", "int64", "float8_e5m2") if n in xp.dtypes], max_axes=3)
    )
    nnz = data.draw(st.integers(0, p.count))
    ord = data.draw(st.sampled_from([1, 2, math.inf, 3]))
    mask = xp.call(npscope.block_mask, p.x, nnz, p.block, p.scope, ord=ord)
    assert mask.sum() == nnz * (mask.size // max(p.count, 1))
    if p.x.ndim and p.x.shape[-1] and p.x.dtype.name not in COMPLEX:
        k = data.draw(st.integers(0, p.x.shape[-1]))
        assert (xp.call(npscope.topk_mask, p.x, k).sum(axis=-1) == k).all()


@given(data=st.data())
def test_masks_are_nested(backend, data):
    """The blocks kept for nnz are kept for nnz + 1."""
    p = data.draw(problems(("float32", "float64", "int8", "complex64"), max_axes=2))
    smaller = np.zeros(p.grid, dtype=bool)
    for nnz in range(p.count + 1):
        larger = npscope.block_mask(p.x, nnz, p.block, p.scope)
        assert (larger | ~smaller).all()
        smaller = larger


@given(data=st.data())
def test_threshold_at_the_kth_norm_keeps_all_down_to_it(backend, data):
    """hard_threshold(kth_largest(k)) keeps the k largest and what ties with the k-th; without ties, exactly k."""
    parts = data.draw(coupled_parts())
    k = data.draw(st.integers(1, o.blocks_per_scope(parts)))
    by_count, by_level = build(parts), build(parts)
    level = by_level.scope.kth_largest(nnz=k)
    assume(not np.isnan(level).any())
    norms = by_level.scope.block_norms()
    by_count.scope.hard_threshold(nnz=k)
    by_level.scope.hard_threshold(level)
    kept = ~(norms < level[..., None])
    assert (kept.sum(-1) >= k).all()
    if (kept.sum(-1) == k).all():
        assert_bits(by_count, by_level.arrays)


@given(data=st.data())
def test_threshold_at_the_midpoint_is_the_count(backend, data):
    parts = data.draw(coupled_parts(kinds=("normal", "sorted")))
    n = o.blocks_per_scope(parts)
    assume(n > 1)
    k = data.draw(st.integers(1, n - 1))
    by_count, by_level = build(parts), build(parts)
    middle = by_level.scope.kth_mid(nnz=k)
    assume((middle > by_level.scope.kth_largest(nnz=k + 1)).all())
    by_count.scope.hard_threshold(nnz=k)
    by_level.scope.hard_threshold(middle)
    assert_bits(by_count, by_level.arrays)


@given(data=st.data())
def test_pruning_is_idempotent(backend, data):
    parts = data.draw(coupled_parts(FLOATS))
    nnz = data.draw(st.integers(0, o.blocks_per_scope(parts)))
    built = build(parts)
    built.scope.hard_threshold(nnz=nnz)
    once = [[a.copy() for a in row] for row in built.arrays]
    built.scope.hard_threshold(nnz=nnz)
    assert_bits(built, once)


@given(data=st.data())
def test_hard_thresholds_are_idempotent(xp, data):
    p = data.draw(problems([n for n in ("float32", "float64", "int16") if n in xp.dtypes], max_axes=3))
    level = data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0, math.inf]))
    once = xp.call(npscope.hard_threshold, p.x, level, p.block)
    assert same_bits(xp.call(npscope.hard_threshold, once, level, p.block), once)


@given(data=st.data())
def test_masks_say_what_hard_threshold_does(backend, data):
    parts = data.draw(coupled_parts(FLOATS, kinds=KINDS))
    nnz = data.draw(st.integers(0, o.blocks_per_scope(parts)))
    built = build(parts)
    masks = built.scope.get_masks(nnz)
    before = {spec: array.copy() for spec, array in built.flat()}
    built.scope.hard_threshold(nnz=nnz)
    for spec, array in built.flat():
        assert same_bits(array, np.where(masks[spec], before[spec], before[spec].dtype.type(0)))


@given(data=st.data())
def test_pruning_is_the_nearest_sparse_array(xp, data):
    """By enumeration of all subsets: no choice of k blocks is nearer in the Euclidean norm."""
    g, b = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    x = hostile(data.draw(st.sampled_from(FINITE)), (1, g * b), "float32", data.draw(st.integers(0, 9999)))
    nnz = data.draw(st.integers(0, g))
    kept = xp.call(npscope.keep_largest, x, nnz, (1, b), (1, -1))
    blocks = [[(0, i * b + j) for j in range(b)] for i in range(g)]
    distance = sum((o.Fraction(float(u)) - o.Fraction(float(v))) ** 2 for u, v in zip(x.flat, kept.flat, strict=True))
    best = o.best_k_sparse(x, nnz, blocks)
    assert best <= distance <= best * (1 + o.Fraction(1, 2**21)), "norms that round to one number may tie"


@pytest.mark.parametrize("nnz", range(7))
def test_couplings_are_the_nearest_sparse_arrays(backend, nnz):
    parts = [o.Part([o.Leaf(hostile("normal", (3, 2), "float32", s), (1, 2))], (-1, -1)) for s in (1, 2)]
    built = build(parts)
    before = np.concatenate([leaf.data for p in parts for leaf in p.leaves])
    built.scope.hard_threshold(nnz=nnz)
    after = np.concatenate([a for _, a in built.flat()])
    distance = sum(
        (o.Fraction(float(u)) - o.Fraction(float(v))) ** 2 for u, v in zip(before.flat, after.flat, strict=True)
    )
    assert distance == o.best_k_sparse(before, nnz, [[(i, 0), (i, 1)] for i in range(6)])


@given(data=st.data())
def test_soft_threshold_is_a_contraction_towards_zero(xp, data):
    p = data.draw(
        problems([n for n in ("float32", "float64") if n in xp.dtypes], kinds=("normal", "heavy_tailed", "symmetric"))
    )
    t = data.draw(st.sampled_from([0.1, 1.0, 2.0]))
    y = xp.call(npscope.soft_threshold, p.x, t, p.block)
    assert (np.abs(y) <= np.abs(p.x)).all()
    assert ((y == 0) | (np.sign(y) == np.sign(p.x))).all()
    norms, after = o.block_norms(p.x, p.block), o.block_norms(y, p.block)
    np.testing.assert_allclose(after, np.maximum(norms - t, 0), rtol=1e-5, atol=1e-5)


@given(data=st.data())
def test_scaled_data_and_thresholds_scale_the_result(backend, data):
    p = data.draw(problems(("float32",), kinds=("normal",), max_axes=3))
    x, nnz = p.x, p.count // 2
    shrunk, kept = npscope.soft_threshold(x, 0.5, p.block), npscope.keep_largest(x, nnz, p.block, p.scope)
    assert np.array_equal(npscope.soft_threshold(np.asarray(x * 4), 2.0, p.block), shrunk * 4)
    assert np.array_equal(npscope.keep_largest(np.asarray(x * -8), nnz, p.block, p.scope), kept * -8)
