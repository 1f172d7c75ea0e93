"""Where CPU kernels change their way: at the ends of work arrays, of vectors and of float formats."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

import npscope as ns

pytest.importorskip("numba")
from numba import types

from npscope.backends.numba_cpu import scope_strips, search
from npscope.backends.numba_cpu.jit import kernel
from npscope.backends.numba_cpu.vector_search import SLACK, emit_count_from, mark, neighbours_of, tie_border
from npscope.backends.numba_cpu.vectors import format_of, step
from npscope.dtypes import kind_of
from npscope.tiling import Leaf, array_cut


def of_reference(call, *arguments, **named):
    with ns.use_backend("reference"):
        return call(*arguments, **named)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ord", [1, 2, np.inf])
@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((4, 400_000), (4, 4), np.float32),
        ((2, 160_000), (2, 1), np.float32),
        ((2, 160_000), (2, 2), np.float16),
        ((8, 6000), (1, 3), np.float32),
        ((8, 6000), (1, 3), np.float64),
        ((12, 4500), (3, 9), np.float32),
    ],
)
def test_scopes_of_more_blocks_than_work_arrays_hold(rng, shape, block, dtype, ord):
    x = rng.standard_normal(shape).astype(dtype)
    blocks = shape[1] // block[1]
    got = ns.block_mask(x, blocks // 3, block, (1, -1), ord=ord)
    assert np.array_equal(got, of_reference(ns.block_mask, x, blocks // 3, block, (1, -1), ord=ord))


@pytest.mark.parametrize("ord", [1, 2, np.inf])
@pytest.mark.parametrize("dtypes", [("f4", "f8"), ("f8", "f4"), ("f2", "f8"), ("f4", "i8")])
def test_norms_of_parts_of_several_precisions(rng, dtypes, ord):
    arrays = [(100 * rng.standard_normal((64, 64))).astype(dtype) for dtype in dtypes]
    scope = ns.ScopeCoupling([ns.ScopeSpec(ns.BlockSpec(a, (4, 4)), (-1, -1)) for a in arrays])
    each = [ns.block_norms(a, (4, 4), ord=ord).ravel() for a in arrays]
    assert np.array_equal(scope.block_norms(ord=ord).ravel(), np.concatenate(each))


@pytest.mark.parametrize("ord", [1, 2, np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_blocks_of_sixteen_in_a_row_whatever_lies_behind(rng, dtype, ord):
    """Sixteen are measured at a time, and in another place those that do not fill a vector."""
    x = (30 * rng.standard_normal((70, 41 * 16))).astype(dtype)
    x[:9, ::16] = rng.choice([np.nan, np.inf, 0.0], (9, 41))
    x[9:18] = 0
    for count in (40, 17, 16, 15, 1):
        here = x[:, : count * 16]
        x[:, count * 16 :] = np.nan
        got, expected = (
            norms(here, (1, 16), ord=ord) for norms in (ns.block_norms, partial(of_reference, ns.block_norms))
        )
        if dtype == "f8":
            np.testing.assert_array_max_ulp(got, expected, maxulp=4)
        else:
            assert np.array_equal(got, expected, equal_nan=True)


FACTORS = [2.0, 0.5, -3.0, 1e40, 1e-50, 2e-45, 1e-40, np.inf, 0.0, 1.0]


@pytest.mark.parametrize("factor", FACTORS)
def test_any_multiplier_of_any_number(rng, factor):
    numbers = np.array([0.0, -0.0, 3e38, -3e38, np.inf, np.nan, 1e-10, 1e30, 1e-38, 1e-45, 1.5], dtype=np.float32)
    x = rng.choice(numbers, (64, 64))
    expected = x.copy()
    with np.errstate(all="ignore"):
        if factor != 1:
            expected = (x.astype(np.float64) * factor).astype(np.float32) if factor else np.zeros_like(x)
    ns.BlockSpec(x, (4, 4)).apply_multiplier(np.full((16, 16), factor))
    nan = np.isnan(expected)
    assert np.array_equal(nan, np.isnan(x))
    assert np.array_equal(x[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("block", [(1, 2), (1, 4), (1, 16), (4, 4)])
def test_multipliers_that_differ_from_block_to_block(rng, name, block):
    factors = [1.0, 0.0, -0.0, 1 - 2.0**-52, 1 + 2.0**-52, 0.1, -1 / 3, 2.0**63, 2.0**-64, 5e-324, -np.inf, 1e300]
    numbers = np.asarray([0.0, -0.0, 1e-45, -3e38, np.inf, -np.inf, np.nan, 1.5, -0.7, 1e-30], dtype=name)
    bits = np.dtype(f"u{numbers.itemsize}")
    around = rng.choice(numbers, (70, 80))
    around.view(bits)[::5, ::3] = np.asarray([np.inf], dtype=name).view(bits)[0] + 1  # NaN that signals
    before, x = around.copy(), around[3:67, 8:72]
    table = rng.choice(np.asarray(factors), (64 // block[0], 64 // block[1]))
    ns.BlockSpec(x, block).apply_multiplier(table)
    each = np.repeat(np.repeat(table, block[0], axis=0), block[1], axis=1)
    old = before[3:67, 8:72]
    with np.errstate(all="ignore"):
        expected = np.where(each == 0, 0.0, old.astype(np.float64) * each).astype(name)
    kept, nan = each == 1, np.isnan(expected)
    assert np.array_equal(x[kept].view(bits), old[kept].view(bits))
    assert np.array_equal(np.isnan(x), nan)
    changed = ~kept & ~nan
    assert np.array_equal(np.signbit(x[changed]), np.signbit(expected[changed]))
    np.testing.assert_array_max_ulp(x[changed], expected[changed], maxulp=int(name == "float32"))
    around[3:67, 8:72] = old
    assert np.array_equal(around.view(bits), before.view(bits))


@pytest.mark.parametrize("scale", [1.0, 1e-37, 1e-44])
def test_shrinking_keeps_signs_of_zeros_and_small_numbers_in_any_layout(rng, scale):
    wide = (scale * rng.standard_normal((64, 128))).astype(np.float32)
    wide[::3, ::4] = -0.0
    dense, strided = np.ascontiguousarray(wide[:, ::2]), wide[:, ::2]
    t = float(np.median(ns.block_norms(dense, (4, 4))))
    got, other = ns.soft_threshold(dense, t, (4, 4)), ns.soft_threshold(strided, t, (4, 4))
    small = np.abs(got) < 1e-30
    assert np.array_equal(got[small].view(np.uint32), other[small].view(np.uint32))
    np.testing.assert_array_max_ulp(got, other, maxulp=1)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32, np.float32, np.float64])
def test_kth_of_scopes_larger_than_a_piece(rng, dtype):
    for n in (131_073, 140_000):
        x = (rng.standard_normal(n) * 200).astype(dtype) if np.dtype(dtype).kind != "u" else rng.integers(
            0, 2000, n, dtype=dtype
        )  # fmt: skip
        expected = np.sort(x)[::-1]
        for k in (1, n // 5, n // 2, 72_681, n - 1):
            assert ns.kth_largest(x, k) == expected[k - 1]


def test_sums_of_magnitudes_just_too_long_to_be_exact(rng):
    """Beside a large number, one that a float64 sum loses just where the rounding turns."""
    count = 512
    x = np.zeros((count, 4), np.float32)
    x[:, 0] = 2.0**24 + 2 * rng.integers(0, 100, count)
    x[:, 1], x[:, 2] = 1 - 2.0**-7, 2.0**-7 + 2.0**-30
    x = rng.permuted(x, axis=1)
    expected = []
    for row in x:
        exact = sum(Fraction(float(v)) for v in row)
        below = np.float32(row.max())
        above = np.nextafter(below, np.float32(np.inf))
        expected.append(above if exact > (Fraction(float(below)) + Fraction(float(above))) / 2 else below)
    assert np.array_equal(ns.block_norms(x, (1, 4), ord=1).ravel(), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_earlier_calls_left_decides_no_rounding(rng, threads):
    """Work arrays are handed on: negative numbers in them once passed for the largest sum."""
    x = np.zeros((13, 100), np.float32)
    x[:, 0] = 2.0**24 + 2 * rng.integers(0, 100, 13)
    x[:, 1], x[:, 2] = 1 - 2.0**-7, 2.0**-7 + 2.0**-30
    x = x.reshape(1, -1)
    expected = of_reference(ns.block_norms, x, (1, 100), ord=1)
    negative = -1e3 * abs(rng.standard_normal((16, 75))).astype(np.float32)
    with ns.config(threads=threads):
        for block in ((4, 15), (4, 5), (1, 3)):
            ns.block_norms(negative, block, ord=2)
            assert np.array_equal(ns.block_norms(x, (1, 100), ord=1), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("last", [0.0, np.inf, np.nan, 1e-40])
def test_one_threshold_for_all_where_the_last_block_needs_a_closer_look(rng, dtype, last):
    """Blocks are solved in strips of 128 and less, and a kernel that stops to look closer begins again."""
    for blocks in (129, 136, 259):
        x = rng.standard_normal((blocks, 4)).astype(dtype)
        x[-1] = last
        h = np.full_like(x, 2.0)
        expected = of_reference(ns.soft_threshold, x, 0.5, (1, 4), conditioner=h)
        got = ns.soft_threshold(x, 0.5, (1, 4), conditioner=h)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert np.array_equal(got == 0, expected == 0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("run", "dtype", "ord"),
    [
        *((run, np.float32, ord) for run in (2, 8, 13, 17) for ord in (1, 2)),
        *((13, dtype, ord) for dtype, ord in ((np.float32, np.inf), (np.float16, 2), (np.float64, 2))),
    ],
)
def test_rows_of_few_blocks_of_any_length(rng, run, dtype, ord):
    """Blocks that do not fill a vector, in an array with others around it."""
    for rows, blocks in ((1, 1), (1, 15), (1, 17), (3, 5), (5, 16), (2, 33)):
        around = rng.standard_normal((2 * rows + 2, run * blocks + 7)).astype(dtype)
        x = around[1:-1, 3:-4]
        norms = ns.block_norms(x, (rows, run), ord=ord)
        expected = of_reference(ns.block_norms, x, (rows, run), ord=ord)
        exact = dtype != np.float64
        np.testing.assert_allclose(norms, expected, rtol=0 if exact else 2e-15)
        border = np.median(norms) * (1 if exact else 1.001)
        for call, argument in ((ns.hard_threshold, border), (ns.soft_threshold, border / 2)):
            after, want = around.copy(), around.copy()
            call(after[1:-1, 3:-4], argument, (rows, run), out=after[1:-1, 3:-4])
            want[1:-1, 3:-4] = of_reference(call, x, argument, (rows, run))
            np.testing.assert_allclose(after, want, rtol=2 * np.finfo(dtype).eps)
            assert np.array_equal(after == 0, want == 0)


# --- what looks at keys --------------------------------------------------------------------------

count_from = step(emit_count_from, 4, types.int64)


@kernel
def looks(keys, start, n, limit, ties, mask, at):
    above, below = neighbours_of(keys, start, n, limit)
    border, rest = tie_border(keys, start, n, limit, ties)
    return count_from(keys, start, n, limit), above, below, mark(keys, start, n, limit, ties, mask, at), border, rest


@given(st.data(), st.sampled_from([8, 16, 32, 64]))
def test_looks_at_keys_are_those_of_loops(data, bits):
    top = (1 << bits) - 1
    keys = st.sampled_from([0, 1, top, top - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]) | st.integers(0, top)
    values = data.draw(st.lists(keys, min_size=1, max_size=8))
    n, start, at = (
        data.draw(st.sampled_from([0, 1, 2, 63, 64, 65, 128, 200])),
        *data.draw(st.tuples(*[st.integers(0, 70)] * 2)),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dtype = np.dtype(f"u{bits // 8}")
    array = rng.choice(np.array(values, dtype=dtype), start + n + SLACK)
    limit, own = data.draw(st.sampled_from(values)), array[start : start + n].tolist()
    equal = [i for i, key in enumerate(own) if key == limit]
    ties = data.draw(st.integers(0, n + 1))
    mask = np.full(at + n + SLACK + 5, 7, np.uint8)
    count, above, below, left, border, rest = looks(array, start, n, np.uint64(limit), ties, mask.view(np.bool_), at)
    assert count == sum(key >= limit for key in own)
    assert above == min((key for key in own if key >= limit), default=top)
    assert below == max((key for key in own if key < limit), default=0)
    assert (border, rest) == ((equal[ties], 0) if ties < len(equal) else (n, ties - len(equal)))
    assert left == max(0, ties - len(equal))
    assert mask[at : at + n].tolist() == [key > limit or i in equal[:ties] for i, key in enumerate(own)]
    assert (mask[:at] == 7).all()
    assert (mask[at + n + SLACK :] == 7).all()


@kernel
def strip_ends(s, s1, rows, past, line):
    return scope_strips.strip_end(s, s1, rows, past, line)


def test_strips_end_at_lines_and_always_go_on():
    for rows, line in itertools.product((1, 5, 8, 15, 16, 48, 80, 128), (1, 8, 16, 32, 64)):
        for past in {0, 3, line - 1}:
            s, unit = 0, min(line, 16) if rows < line else line
            while s < 500:
                stop = strip_ends(s, 500, rows, past, line)
                assert s < stop <= min(500, s + rows)
                assert rows < unit or stop == 500 or (stop + past) % unit == 0
                s = stop


@pytest.mark.parametrize(
    ("values", "block"),
    [
        ("pairs", (1, 1)),
        ("few", (2, 3)),
        pytest.param("pairs", (2, 3), marks=pytest.mark.slow),
        pytest.param("distinct", (2, 3), marks=pytest.mark.slow),
        ("few", (1, 1)),
    ],
)
def test_large_scopes_of_arrays_in_another_order_of_memory(rng, values, block):
    """Blocks are looked at as they lie, but where of equal ones the first have to be told from the others."""
    x = rng.standard_normal((900, 1200)).astype(np.float32)
    x = {"distinct": x, "pairs": np.concatenate([x[:450], x[:450]]), "few": np.round(2 * x)}[values]
    for array in (x.T.copy().T, x[::-1, ::2], np.asfortranarray(x).reshape(30, 30, 1200, order="F")):
        blocks = (*(1,) * (array.ndim - 2), *block)
        whole = (-1,) * array.ndim
        half = array.size // 12 | 1  # of a pair, one
        expected = of_reference(ns.keep_largest, array, half, blocks, whole)
        assert np.array_equal(ns.keep_largest(array, half, blocks, whole), expected)
        assert np.array_equal(
            ns.kth_largest(array, half, axis=None), of_reference(ns.kth_largest, array, half, axis=None)
        )
    arrays = [x.T.copy().T, x, np.asfortranarray(x[:600])]
    results = []
    for backend in ("reference", "numba"):
        with ns.use_backend(backend):
            parts = [a.copy(order="K") for a in arrays]
            scope = ns.ScopeCoupling([ns.ScopeSpec(ns.BlockSpec(a, block), (-1, -1)) for a in parts])
            scope.hard_threshold(scope.numblk_per_scope() // 3 | 1)
            results.append(parts)
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("block", "scope", "dtype"),
    [
        ((1, 1), (2, 2), "float32"),
        ((1, 1), (4, 8), "float32"),
        ((4, 1), (2, 3), "float32"),
        ((1, 2), (3, 2), "bfloat16"),
        ((1, 1), (5, 16), "int8"),
        pytest.param((2, 2), (2, 2), "complex64", marks=pytest.mark.slow),
        pytest.param((1, 1), (24, 7), "float64", marks=pytest.mark.slow),
    ],
)
def test_scopes_that_are_tiles(rng, block, scope, dtype):
    """Rows of scopes are read row by row of their blocks, whichever axis is the first in memory."""
    tile = [b * s for b, s in zip(block, scope, strict=True)]
    kind = strategies.dtype(dtype)
    x = np.round(3 * rng.standard_normal((3 * tile[0], 37 * tile[1]))).astype(kind)
    y = np.round(3 * rng.standard_normal((37 * tile[0], 3 * tile[1]))).astype(kind)
    nnz = rng.integers(0, scope[0] * scope[1] + 1, (3, 37))
    for array, keep in ((x, nnz), (y.T.copy().T, nnz.reshape(37, 3)), (x[:, ::-1], nnz), (y[::-1].T.copy().T, 1)):
        for call in (ns.keep_largest, ns.block_mask):
            expected = of_reference(call, array, keep, block, scope)
            assert np.array_equal(call(array, keep, block, scope), expected)
        scores = np.asfortranarray(np.round(array.real.astype(np.float32)))
        expected = of_reference(ns.keep_largest, array, keep, block, scope, scores=scores)
        assert np.array_equal(ns.keep_largest(array, keep, block, scope, scores=scores), expected)
        spec = ns.ScopeSpec(ns.BlockSpec(array, block), scope)
        assert np.array_equal(spec.kth_largest(nnz=2), of_reference(spec.kth_largest, nnz=2))


def test_large_blocks_of_large_scopes_are_written_by_all_threads():
    """Piece by piece: one call for a GiB could not be interrupted."""
    large_scopes = pytest.importorskip("npscope.backends.numba_cpu.large_scopes")
    ranking = pytest.importorskip("npscope.backends.numba_cpu.ranking")
    part = (Leaf(np.zeros((64, 1 << 17), dtype=np.float32), array_cut((64, 1 << 17), (1, 1 << 17))[0]),)
    pieces = large_scopes.LargeScopes(ranking.Ranking((part,), 2.0)).pieces
    assert [piece.b1 - piece.b0 for piece in pieces] == [8] * 8


@pytest.mark.parametrize(("turns", "late"), [(1 << 17, 1 << 17), (1, 1 << 17), (1 << 17, 5)])
def test_ties_in_arrays_whose_first_axis_lies_within(rng, monkeypatch, turns, late):
    """Of many equal elements the first stay, up to the end of a turn of that axis or inside one, however counted."""
    large_cuts = pytest.importorskip("npscope.backends.numba_cpu.large_cuts")
    monkeypatch.setattr(large_cuts, "MOST_TURNS", turns)
    monkeypatch.setattr(large_cuts, "MOST_LATE", late)
    for x in (np.ones((150, 24, 40), np.float32), rng.integers(1, 3, (150, 24, 40)).astype(np.int8)):
        array = x.transpose(1, 0, 2)
        largest = int(np.count_nonzero(array == array.max()))
        for nnz in (6000, 12 * 6000, 12 * 6000 + 1, largest - 1, largest):
            expected = of_reference(ns.keep_largest, array, nnz, (1, 1, 1), (-1, -1, -1))
            assert np.array_equal(ns.keep_largest(array, nnz, (1, 1, 1), (-1, -1, -1)), expected)
    for nnz in (100_001, 24 * 90 * 40):  # all of the first part
        results = []
        for backend in ("reference", "numba"):
            with ns.use_backend(backend):
                parts = [np.ones((90, 24, 40), np.float32).transpose(1, 0, 2), np.ones((24, 90, 40), np.float32)]
                scope = ns.ScopeCoupling([ns.ScopeSpec(ns.BlockSpec(a, (1, 1, 1)), (-1, -1, -1)) for a in parts])
                scope.hard_threshold(nnz=nnz)
                results.append(parts)
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("block", [(1, 1, 1), (2, 1, 3), pytest.param((1, 4, 1), marks=pytest.mark.slow)])
def test_blocks_of_arrays_in_another_order_of_memory(rng, block):
    """What is done block by block is done as they lie; thresholds and metrics are theirs, whatever their own order."""
    x = rng.standard_normal((12, 40, 30)).astype(np.float32)
    grid = tuple(n // b for n, b in zip(x.shape, block, strict=True))
    t, h = rng.uniform(0, 2, grid).astype(np.float32), rng.uniform(0.5, 2, x.shape).astype(np.float32)
    arrays = (x.transpose(2, 0, 1).copy().transpose(1, 2, 0), np.asfortranarray(x), x[::-1, :, ::-1], x)
    for array, metric in zip(arrays, (h, np.asfortranarray(h), h, np.asfortranarray(h)), strict=True):
        for call, arguments in (
            (ns.hard_threshold, {}),
            (ns.soft_threshold, {}),
            (ns.soft_threshold, {"conditioner": metric}),
        ):
            for limits in (t, np.asfortranarray(t), 0.7, t[:, :1]):
                expected = of_reference(call, array, limits, block, **arguments)
                got = call(array, limits, block, **arguments)
                assert np.allclose(got, expected, rtol=1e-6, atol=0)
                out = np.empty_like(x)
                call(array, limits, block, out=out, **arguments)
                assert np.allclose(out, expected, rtol=1e-6, atol=0)
        specs = []
        for backend in ("reference", "numba"):
            with ns.use_backend(backend):
                spec = ns.BlockSpec(array.copy(order="K"), block)
                spec.apply_multiplier(t - 0.5)
                specs.append(spec.view.data)
        assert np.allclose(*specs, rtol=1e-6, atol=0)


def test_scores_that_many_rows_share(rng):
    """Broadcast arrays have steps of 0: their scopes lie in one place, not side by side."""
    x, row = rng.standard_normal((64, 1024)).astype(np.float32), rng.standard_normal(1024).astype(np.float32)
    scores = np.broadcast_to(row, x.shape)
    for array, shared, scope in ((x, scores, (1, -1)), (x.T.copy(), scores.T, (-1, 1))):
        expected = of_reference(ns.keep_largest, array, 512, (1, 1), scope, scores=shared)
        assert np.array_equal(ns.keep_largest(array, 512, (1, 1), scope, scores=shared), expected)
    many = np.broadcast_to(row, (10000, 1024))
    assert (ns.kth_largest(many, 100, axis=1) == np.sort(row)[-100]).all()


def test_parts_of_one_block_beside_large_ones_in_another_order_of_memory(rng):
    """The equal blocks are those of several parts, one of which has no order of blocks."""
    weights = rng.permutation(np.arange(1, 512 * 512 + 1)).astype(np.float32).reshape(512, 512)
    for rank in (100000, 512 * 512 - 1):
        for bias in (float(512 * 512 + 1 - rank), 1e6):
            results = []
            for backend in ("reference", "numba"):
                arrays = [np.asfortranarray(weights), np.array([[bias]], dtype=np.float32), weights.T.copy().T]
                with ns.use_backend(backend):
                    parts = [ns.ScopeSpec(ns.BlockSpec(a, (1, 1)), (-1, -1)) for a in arrays]
                    ns.ScopeCoupling(parts).hard_threshold(2 * rank)
                results.append(arrays)
            assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_a_search_finds_its_limit_and_leaves_a_distance_to_go_on_with(rng, name, signed):
    """Among keys that are all apart, or of which many are equal; each search starts with what the last one left."""
    form, width = format_of(kind_of(strategies.dtype(name))), 8 * strategies.dtype(name).itemsize
    separate = search.separator(form if signed else None)

    @kernel
    def separate_here(keys, n, k, guess, spacing):
        return separate(keys, 0, n, k, guess, spacing)

    guess, spacing = search.FIRST_GUESS, search.FIRST_SPACING
    for n, values in itertools.product((2, 63, 65, 300), (1, 2, 3, 1 << 15)):
        bits = rng.integers(-values, values + 1, n).astype(strategies.dtype(name)).view(f"u{width // 8}")
        top = bits.dtype.type(1 << (width - 1))
        keys = np.where(bits & top, ~bits, bits ^ top) if signed else bits & ~top
        room = np.concatenate([keys, rng.integers(0, 1 << width, SLACK, dtype=bits.dtype)])
        for k in range(1, n, 1 + n // 7):
            limit, ties, spacing = separate_here(room, n, k, np.uint64(guess), spacing)
            above = np.count_nonzero(keys > limit)
            assert spacing > 0
            if ties == n:
                assert np.count_nonzero(keys >= limit) == k
            else:
                assert 0 < ties == k - above < np.count_nonzero(keys == limit)
            guess = limit


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize(("n", "k"), [(4, 2), (8, 3), (16, 8), (3, 1)])
def test_groups_whose_lines_end_elsewhere_where_they_are_written(rng, dtype, n, k):
    wide = (rng.standard_normal((60, 500)) * 50).astype(dtype)
    x = wide[:, : 5 * n]
    out, expected = np.zeros(x.shape, dtype), of_reference(ns.keep_largest, x, k, (1, 1), (1, n))
    assert strategies.same_bits(ns.keep_largest(x, k, (1, 1), (1, n), out=out), expected)
    whole = np.ascontiguousarray(x)
    part = np.zeros_like(wide)[:, n : 6 * n]
    assert strategies.same_bits(ns.keep_largest(whole, k, (1, 1), (1, n), out=part), expected)
    assert np.array_equal(ns.block_mask(x, k, (1, 1), (1, n)), of_reference(ns.block_mask, x, k, (1, 1), (1, n)))


@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_values_of_small_scopes(rng, dtype, n):
    x = (rng.standard_normal((700, n)) * 5).astype(dtype)
    if x.dtype.kind == "f":
        x[::7], x[1::7] = np.nan, -0.0
    k = rng.integers(1, n + 1, len(x))
    for array in (x, np.asfortranarray(x)):
        expected = of_reference(ns.kth_largest, array, k)
        assert np.array_equal(ns.kth_largest(array, k), expected, equal_nan=x.dtype.kind == "f")


@pytest.mark.parametrize(
    ("block", "dtype", "kept"),
    [
        ((2, 4), "float16", (False, False)), ((4, 4), "float16", (True, True)), ((2, 4), "float32", (False, False)),
        ((4, 4), "float32", (False, True)), ((4, 8), "float32", (True, True)), ((1, 2), "float64", (True, True)),
        ((1, 1), "float64", (False, False)),
    ],
)  # fmt: skip
def test_norms_that_are_kept(monkeypatch, rng, block, dtype, kept):
    """Those of large blocks; of blocks in between where something else is written, which the last pass has to read."""
    large_scopes = pytest.importorskip("npscope.backends.numba_cpu.large_scopes")
    found, make = [], large_scopes.LargeScopes.__init__

    def noted(self, *arguments, **options):
        make(self, *arguments, **options)
        found.append(bool(self.lasting))

    monkeypatch.setattr(large_scopes.LargeScopes, "__init__", noted)
    x = rng.standard_normal((4128, 1024)).astype(dtype)
    apart = ns.keep_largest(x, 1000, block, ())
    ns.block_mask(x, 1000, block, ())
    assert np.array_equal(ns.keep_largest(x, 1000, block, (), out=x), apart)
    assert found == [kept[1], kept[1], kept[0]]
