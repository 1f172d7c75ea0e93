"""Selection: exactly nnz blocks of every scope, by (norm descending, position ascending), NaN first."""

from __future__ import annotations

import math

import numpy as np
import oracles as o
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ALL_DTYPES,
    COMPLEX,
    EXACT_DTYPES,
    FINITE,
    NAN_BITS,
    ORDS,
    Problem,
    dtype,
    hostile,
    problems,
    same_bits,
)

import npscope
from npscope.backends import derived
from npscope.tiling import Leaf, scope_grid_cut

RANKED_EXACTLY = (*EXACT_DTYPES, "int32", "uint32")


def draw_nnz(data: st.DataObject, p: Problem):
    """An integer, or an array broadcast over the scope grid."""
    grid = o.scope_grid(o.one(p.x, p.block, p.scope))
    if data.draw(st.booleans()) or not grid:
        return data.draw(st.integers(0, p.count))
    shape = [n if data.draw(st.booleans()) else 1 for n in grid]
    seed = data.draw(st.integers(0, 1000))
    kind = data.draw(st.sampled_from(["int64", "uint8", "int32"]))
    return np.random.default_rng(seed).integers(0, p.count, shape, endpoint=True).astype(kind)


# --- blocks --------------------------------------------------------------------------------------


@given(data=st.data(), ord=st.sampled_from(ORDS))
def test_keep_largest_and_its_mask(xp, data, ord):
    p = data.draw(problems([n for n in RANKED_EXACTLY if n in xp.dtypes]))
    nnz = draw_nnz(data, p)
    if isinstance(nnz, np.ndarray) and str(nnz.dtype) not in xp.dtypes:
        nnz = nnz.astype("int64")
    kept = xp.call(npscope.keep_largest, p.x, nnz, p.block, p.scope, ord=ord)
    mask = xp.call(npscope.block_mask, p.x, nnz, p.block, p.scope, ord=ord)
    assert same_bits(kept, o.keep_largest(o.one(p.x, p.block, p.scope), nnz, ord)[0][0])
    assert same_bits(mask, o.block_mask(p.x, nnz, p.block, p.scope, ord))


def assert_kept_are_the_largest(p: Problem, mask: np.ndarray, nnz: int, ord: float) -> None:
    """Exactly nnz a scope, and no dropped block beats a kept one by more than the norms may err."""
    parts = o.one(p.x, p.block, p.scope)
    sizes = o.block_sizes(parts[0].leaves[0])
    for _, blocks in o.all_scopes(parts):
        inside = [mask[tuple(s.start // b for s, b in zip(b_[0].where, sizes, strict=True))] for b_ in blocks]
        assert sum(inside) == nnz
        values = [o.elements(parts, b) for b in blocks]
        values = [math.inf if any(map(o.is_inf, v)) else o.exact_norm(v, ord) for v in values]
        kept = [v for v, k in zip(values, inside, strict=True) if k]
        dropped = [v for v, k in zip(values, inside, strict=True) if not k]
        if kept and dropped and min(kept) != math.inf:
            margin = o.Fraction(1, 2**49 if o.norm_dtype(p.x.dtype) == "float64" else 2**20)
            assert min(kept) >= max(dropped) * (1 - margin)


@given(data=st.data(), ord=st.sampled_from([1, 2, math.inf, 3.0]))
def test_keep_largest_of_float64_and_complex(xp, data, ord):
    p = data.draw(problems(["float64", *COMPLEX], kinds=tuple(k for k in FINITE if k != "near_overflow")))
    nnz = data.draw(st.integers(0, p.count))
    mask = xp.call(npscope.block_mask, p.x, nnz, p.block, p.scope, ord=ord)
    assert_kept_are_the_largest(p, mask, nnz, ord)
    expanded = mask
    for axis, (n, g) in enumerate(zip(p.x.shape, mask.shape, strict=True)):
        expanded = np.repeat(expanded, n // g if g else 1, axis=axis)
    kept = xp.call(npscope.keep_largest, p.x, nnz, p.block, p.scope, ord=ord)
    assert same_bits(kept, np.where(expanded, p.x, p.x.dtype.type(0)))


@pytest.mark.parametrize("name", ["int64", "uint64"])
@given(data=st.data())
def test_64_bit_integers_rank_by_exact_magnitude(xp, name, data):
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)))
    top = 2**63 if name == "int64" else 2**64 - 1
    near = [top - i for i in range(4)] + [2**53, 2**53 + 1, 2**53 + 2, 0, 1]
    seed = data.draw(st.integers(0, 10**6))
    sizes = np.random.default_rng(seed).choice(np.asarray(near, dtype=np.uint64), shape)
    x = sizes.astype(name)
    if name == "int64":
        x = np.where(sizes == 2**63, np.int64(-(2**63)), np.where(np.arange(x.size).reshape(shape) % 2, -x, x))
    nnz = data.draw(st.integers(0, shape[1]))
    assert same_bits(xp.call(npscope.block_mask, x, nnz, (), (1, -1)), o.block_mask(x, nnz, (), (1, -1)))


@given(data=st.data(), ord=st.sampled_from(ORDS))
def test_scores_rank_instead_of_the_data(xp, data, ord):
    p = data.draw(problems([n for n in EXACT_DTYPES if n in xp.dtypes]))
    names = [n for n in ("float32", "int16", "bfloat16") if n in xp.dtypes]
    scores = hostile(
        data.draw(st.sampled_from(["normal", "two_valued", "nan_payloads"])),
        p.x.shape,
        data.draw(st.sampled_from(names)),
        5,
    )
    nnz = data.draw(st.integers(0, p.count))
    parts, ranked = o.one(p.x, p.block, p.scope), o.one(scores, p.block, p.scope)
    got = xp.call(npscope.keep_largest, p.x, nnz, p.block, p.scope, scores=scores, ord=ord)
    assert same_bits(got, o.keep_largest(parts, nnz, ord, ranked)[0][0])
    mask = xp.call(npscope.block_mask, p.x, nnz, p.block, p.scope, scores=scores, ord=ord)
    assert same_bits(mask, o.block_mask(scores, nnz, p.block, p.scope, ord))


@given(data=st.data(), ord=st.sampled_from(ORDS))
def test_hard_threshold(xp, data, ord):
    p = data.draw(problems([n for n in EXACT_DTYPES if n in xp.dtypes], max_axes=3))
    norms = o.block_norms(p.x, p.block, ord)
    levels = [0.0, -1.0, math.inf, 0.5, *(v for v in norms.ravel()[:5].tolist() if v == v)]
    level = data.draw(st.sampled_from(levels))
    got = xp.call(npscope.hard_threshold, p.x, level, p.block, ord=ord)
    assert same_bits(got, o.hard_threshold_blocks(p.x, level, p.block, ord))
    if norms.ndim:
        row = np.resize(np.asarray(levels), norms.shape[-1])
        got = xp.call(npscope.hard_threshold, p.x, row, p.block, ord=ord)
        assert same_bits(got, o.hard_threshold_blocks(p.x, row, p.block, ord))


def test_a_threshold_is_rounded_to_the_norm_dtype_and_then_compared(xp):
    x = np.asarray([0.1, 0.1], dtype=np.float32)
    assert xp.call(npscope.hard_threshold, x, 0.1, (1,)).tolist() == x.tolist()
    assert xp.call(npscope.hard_threshold, x, np.nextafter(np.float32(0.1), np.float32(1)).item(), (1,)).tolist() == [
        0,
        0,
    ]


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0, math.inf])
@pytest.mark.parametrize("ord", [1, 2, math.inf, 3])
def test_nan_blocks_pass_any_threshold(xp, level, ord):
    x = np.asarray([[np.nan, 0.0], [0.5, 0.0], [np.inf, -np.inf]], dtype=np.float32)
    expected = x.copy()
    expected[1] = 0 if level > 0.5 else expected[1]
    got = xp.call(npscope.hard_threshold, x, level, (1, 2), ord=ord)
    assert same_bits(got, expected)


# --- ties, NaN, zeros ----------------------------------------------------------------------------


@pytest.mark.parametrize("nnz", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("size", [8, 64, 20_000])
def test_ties_go_to_the_earlier_block(xp, nnz, size):
    nnz = nnz * size // 8
    x = np.where(np.arange(size) % 2, np.float32(0.5), np.float32(-0.5))
    assert np.flatnonzero(xp.call(npscope.keep_largest, x, nnz, (1,), (-1,))).tolist() == list(range(nnz))


@pytest.mark.parametrize("size", [8, 40, 3000])
def test_ties_at_the_border_only(xp, size):
    x = np.tile(np.asarray([1.0, 2.0, 2.0, 3.0], dtype=np.float32), size // 4)
    mask = xp.call(npscope.topk_mask, x, size // 2)
    assert mask.sum() == size // 2
    assert mask[3::4].all()
    assert not mask[0::4].any()
    twos = mask[np.flatnonzero(x == 2)]
    assert twos[: size // 4].all()
    assert not twos[size // 4 :].any()


@pytest.mark.parametrize("name", NAN_BITS)
def test_nan_ranks_above_infinity_whatever_its_bits(xp, name):
    xp.require(name)
    raw = np.dtype(f"u{dtype(name).itemsize}")
    x = np.ones(len(NAN_BITS[name]) + 4, dtype=dtype(name))
    x[0], x[2] = (448, 448) if name == "float8_e4m3fn" else (np.inf, -np.inf)
    x.view(raw)[4:] = np.asarray(NAN_BITS[name], dtype=raw)
    for nnz in range(len(x) + 1):
        expected = [*range(4, len(x)), 0, 2, 1, 3][:nnz]
        kept = xp.call(npscope.keep_largest, x, nnz, (1,), (-1,))
        assert same_bits(kept[expected], x[expected])
        assert not np.delete(kept.view(raw), expected).any()


def test_minus_zero_equals_zero_and_keeps_its_sign(xp):
    x = np.asarray([0.0, -0.0, 0.0, -0.0], dtype=np.float32)
    kept = xp.call(npscope.keep_largest, x, 2, (1,), (-1,))
    assert np.signbit(kept).tolist() == [False, True, False, False]
    assert xp.call(npscope.topk_mask, np.asarray([-1.0, -0.0, 0.0]), 1).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -1.0])
def test_dropped_cells_are_plus_zero(xp, bad):
    x = np.asarray([[bad, 5.0], [bad, 6.0]])
    scores = np.asarray([[1.0, 1.0], [2.0, 2.0]])
    kept = xp.call(npscope.keep_largest, x, 1, (1, 2), (-1, -1), scores=scores)
    assert kept[0].tolist() == [0, 0]
    assert not np.signbit(kept[0]).any()


@pytest.mark.sampled(2)
def test_all_and_none(xp, any_dtype):
    xp.require(any_dtype.name)
    x = hostile("nan_payloads" if any_dtype.name in NAN_BITS else "normal", (4, 6), any_dtype.name, 1)
    assert same_bits(xp.call(npscope.keep_largest, x, 6, (2, 1), (1, -1)), x)
    assert same_bits(xp.call(npscope.keep_largest, x, 0, (2, 1), (1, -1)), np.zeros_like(x))


@pytest.mark.parametrize("size", [5000, 70_000])
@pytest.mark.parametrize(
    "kind", ["normal", "heavy_tailed", "bf16_quantised", "two_valued", "sorted", "nan_payloads", "subnormal"]
)
@pytest.mark.parametrize("name", ["float32", "float16", "int64", "float64"])
def test_large_scopes(backend, size, kind, name):
    """Sizes where a fast path replaces a sort: against a stable NumPy sort, which is exact for single elements."""
    x = hostile(kind, (2, size), name, 9)
    keys = np.where(np.isnan(x), np.inf, np.abs(x.astype(np.float64)))
    if name == "int64":
        keys = np.where(x == np.iinfo("int64").min, np.uint64(2**63), np.abs(x).astype(np.uint64))
        order = np.argsort(np.uint64(2**64 - 1) - keys, axis=-1, kind="stable")
    else:
        order = np.lexsort((np.broadcast_to(np.arange(size), x.shape), -keys, ~np.isnan(x)), axis=-1)
    for nnz in (1, size // 2, size - 1):
        expected = np.zeros(x.shape, dtype=bool)
        np.put_along_axis(expected, order[:, :nnz], True, axis=-1)
        assert same_bits(npscope.block_mask(x, nnz, (), (1, -1)), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "uint8"])
@pytest.mark.parametrize("kind", ["normal", "two_valued", "nan_payloads", "sorted"])
def test_rows_larger_than_a_piece_are_searched_one_by_one(monkeypatch, kind, name):
    """As by all threads together, and in little memory."""
    ranking = pytest.importorskip("npscope.backends.numba_cpu.ranking")
    x = hostile("normal" if kind == "nan_payloads" and name == "uint8" else kind, (3, 150_000), name, 4)
    nnz, results = np.asarray([[70_000], [1], [149_999]]), []
    with npscope.use_backend("numba"), npscope.config(threads=2):
        for room in (0, ranking.SCOPE_BYTES):
            monkeypatch.setattr(ranking, "SCOPE_BYTES", room)
            kept, mask = (f(x, nnz, (1, 1), (1, -1)) for f in (npscope.keep_largest, npscope.block_mask))
            results.append((kept, mask, npscope.kth_largest(x, 70_000)))
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)
    assert results[0][1].sum(axis=1).tolist() == nnz[:, 0].tolist()


# --- signed values -------------------------------------------------------------------------------

REAL = tuple(n for n in ALL_DTYPES if n not in COMPLEX)


@st.composite
def rows(draw, dtypes):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    x = hostile(draw(st.sampled_from(list(o_kinds))), shape, draw(st.sampled_from(dtypes)), draw(st.integers(0, 9999)))
    axis = draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    return x, axis, x.size if axis is None else shape[axis]


o_kinds = (*FINITE, "infinities", "nan_payloads")


def equal_with_nan(got: np.ndarray, expected: np.ndarray) -> bool:
    """Same dtype and shape; same bits but for the payloads of NaN."""
    nan = np.asarray(expected != expected)
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and np.array_equal(nan, np.asarray(got != got))
        and same_bits(np.asarray(got)[~nan], np.asarray(expected)[~nan])
    )


@given(data=st.data())
def test_kth_largest(xp, data):
    x, axis, n = data.draw(rows([d for d in REAL if d in xp.dtypes]))
    k = data.draw(st.integers(1, n))
    assert equal_with_nan(xp.call(npscope.kth_largest, x, k, axis), o.kth_largest(x, k, axis))


@given(data=st.data())
def test_topk_mask(xp, data):
    x, axis, n = data.draw(rows([d for d in REAL if d in xp.dtypes]))
    k = data.draw(st.integers(0, n))
    assert same_bits(xp.call(npscope.topk_mask, x, k, axis), o.topk_mask(x, k, axis))


def test_k_may_be_an_array(xp, rng):
    x = rng.standard_normal((3, 4, 7)).astype(np.float32)
    k = rng.integers(1, 8, (3, 1))
    assert same_bits(xp.call(npscope.kth_largest, x, k), o.kth_largest(x, k))
    k = rng.integers(0, 8, (4,))
    assert same_bits(xp.call(npscope.topk_mask, x, k), o.topk_mask(x, k))
    k = rng.integers(0, 4, (1, 7))
    assert same_bits(xp.call(npscope.topk_mask, x, k, axis=0), o.topk_mask(x, k, axis=0))


def test_kth_zero_is_positive(xp):
    got = xp.call(npscope.kth_largest, np.asarray([[-0.0, -0.0], [0.0, -0.0]]), 2)
    assert not np.signbit(got).any()


def test_kth_nan_comes_first(xp):
    a = np.asarray([1.0, np.nan, np.inf, -np.inf])
    got = [float(xp.call(npscope.kth_largest, a, k)) for k in (1, 2, 3, 4)]
    assert math.isnan(got[0])
    assert got[1:] == [math.inf, 1.0, -math.inf]


@pytest.mark.parametrize("weight", [1.0, 0.0, 3.0, 0.25, -0.5])
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16", "int8", "int32"])
def test_mid_kth_largest(xp, rng, name, weight):
    xp.require(name)
    a = (rng.standard_normal((6, 9)) * 50).astype(dtype(name))
    result = a.dtype.name if name not in ("int8", "int32") else o.norm_dtype(name)
    for k in (1, 4, 8):
        got = xp.call(npscope.mid_kth_largest, a, k, k_weight=weight)
        assert got.dtype.name == result
        for i in range(6):
            upper, lower = (o.number(o.kth_largest(a[i], j)[()]) for j in (k, k + 1))
            exact = (o.Fraction(upper) + o.Fraction(weight) * o.Fraction(lower)) / (1 + o.Fraction(weight))
            slack = o.Fraction(1 + abs(weight)) * max(abs(upper), abs(lower)) / 2**52 / o.Fraction(1 + weight)
            assert abs(o.Fraction(float(got[i])) - exact) <= o.quantum(exact, o.FORMATS[result]) + slack


def test_a_threshold_at_the_midpoint_keeps_k(xp, rng):
    a = rng.permutation(np.arange(1.0, 41.0)).reshape(4, 10)
    for k in range(1, 10):
        middle = xp.call(npscope.mid_kth_largest, a, k)
        assert ((a >= middle[:, None]).sum(axis=1) == k).all()


def test_equal_ends_give_that_end(xp):
    a = np.asarray([[np.inf, np.inf], [0.1, 0.1], [-np.inf, -np.inf], [1.7e308, 1.7e308]])
    assert xp.call(npscope.mid_kth_largest, a, 1, k_weight=3.0).tolist() == a[:, 0].tolist()


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 10, 100, 1000])
def test_nnz_from_sparsity_means_the_decimal_it_shows(n):
    for hundredths in range(101):
        expected = n - hundredths * n // 100
        s = hundredths / 100
        for given_ in (s, str(s), np.float64(s), o.Fraction(hundredths, 100), np.float32(s), np.float16(s)):
            assert npscope.nnz_from_sparsity(given_, n) == expected


# --- the next place ------------------------------------------------------------------------------


def test_one_place_for_many_scopes_is_not_written_out():
    """The first search takes the places as they are; the next places stand for as many scopes as these."""
    cut = scope_grid_cut((300, 500))
    taken = []

    def kth(parts, k, ord):
        taken.append(k)
        return np.zeros(k.array.size, dtype=np.float32)

    for entries in (np.int64(7), np.arange(500), np.arange(300)[:, None], np.arange(150_000).reshape(300, 500)):
        k = Leaf(np.broadcast_to(entries, (300, 500)), cut)
        derived.midpoint(kth, (), k, 1.0, None)
        first, second = taken[-2:]
        assert first is k
        assert np.array_equal(second.array, k.array + 1)
        assert [step == 0 for step in second.array.strides] == [step == 0 for step in k.array.strides]


# --- scopes larger than a piece --------------------------------------------------------------------

CROWDED = {
    "NaN first": lambda x: np.where(np.arange(x.size) < x.size // 3, np.nan, x),
    "all NaN": lambda x: np.full_like(x, np.nan),
    "inf and NaN": lambda x: np.where(x > 0, np.inf, np.nan),
    "constant": np.ones_like,
    "two values": lambda x: np.where(x > 0, 1, -2),
    "mostly zero": lambda x: np.where(x > 2.5, x, 0),
    "few values": lambda x: np.round(4 * x),
    "sorted": np.sort,
    "heavy tails": lambda x: x**15,
    "half zero": lambda x: np.where(np.abs(x) < np.median(np.abs(x)), 0, x),
}


SCALES = {
    "alike": lambda rows: np.ones(rows),
    "of any size": lambda rows: 2.0 ** np.random.default_rng(3).integers(-30, 30, rows),
    "drifting": lambda rows: 1.02 ** np.arange(rows),
}


@pytest.mark.sampled(2)
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name",
    [
        "float32",
        "float64",
        "float16",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("bfloat16", "float8_e4m3fn")),
    ],
)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("data", CROWDED)
def test_what_is_expected_of_a_row_never_changes_what_is_found(monkeypatch, data, scale, name):
    """Large arrays are searched near the limits of the rows before: small ones, too, here, and rows side by side."""
    scope_strips = pytest.importorskip("npscope.backends.numba_cpu.scope_strips")
    monkeypatch.setattr(scope_strips, "WIDE_ELEMENTS", 0)
    n, rows, rng = 700, 24, np.random.default_rng(6)
    monkeypatch.setattr("npscope.backends.numba_cpu.ranking.TILES_ELEMENTS", 16 * n)  # so that there are several strips
    with np.errstate(all="ignore"):
        values = rng.permuted(CROWDED[data](rng.standard_normal(n * rows)).reshape(rows, n), axis=1)
        x = (values * SCALES[scale](rows)[:, None]).astype(dtype(name))
    for nnz in (n // 2, n - 1, np.arange(rows) * n // (rows - 1), rng.integers(0, n + 1, rows)):
        each, k = np.reshape(nnz, (-1, 1)), np.maximum(np.broadcast_to(nnz, rows), 1)

        def results(array, each=each, k=k):
            masks = npscope.block_mask(array, each, (1, 1), (1, -1)), npscope.topk_mask(array, k, axis=-1)
            return npscope.keep_largest(array, each, (1, 1), (1, -1)), npscope.kth_largest(array, k, axis=-1), *masks

        with npscope.use_backend("reference"):
            expected = results(x)
        for array in (x, np.asfortranarray(np.concatenate([x[:3], x]))[3:]):
            with npscope.use_backend("numba"):
                found = results(array)
            assert same_bits(found[0], expected[0])
            np.testing.assert_equal(found[1].astype(np.float64), expected[1].astype(np.float64))
            np.testing.assert_array_equal(found[2], expected[2])
            np.testing.assert_array_equal(found[3], expected[3])


@pytest.mark.parametrize("n", [3000, 20000])
@pytest.mark.parametrize("data", ["normal", "with ties", "of zeros", "one scope apart"])
def test_few_and_many_keys_near_the_limits_of_rows(monkeypatch, data, n):
    """Those of several rows are searched together where they are few; where they are many, row by row."""
    monkeypatch.setattr(pytest.importorskip("npscope.backends.numba_cpu.scope_strips"), "WIDE_ELEMENTS", 0)
    rows = 40
    x = np.random.default_rng(8).standard_normal((rows, n)).astype(np.float32)
    if data == "with ties":
        x = np.round(x * 64) / 64
    elif data == "of zeros":
        x[np.abs(x) < 0.7] = 0.0
    elif data == "one scope apart":
        x[21] *= 1000.0
    for k in (1, n // 3, n // 2, n):
        with npscope.use_backend("numba"):
            found = npscope.kth_largest(x, k), npscope.topk_mask(x, k), npscope.keep_largest(x, k, (1, 1), (1, -1))
        with npscope.use_backend("reference"):
            expected = npscope.kth_largest(x, k), npscope.topk_mask(x, k), npscope.keep_largest(x, k, (1, 1), (1, -1))
        for here, there in zip(found, expected, strict=True):
            np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize(
    ("name", "score"), [("complex64", "float32"), ("complex128", "float64"), ("complex64", "int32")]
)
@pytest.mark.parametrize("scope", [(1, 4), (1, 16), (1, 64), (1, 512), (4, 4), (-1, -1)])
def test_complex_numbers_that_are_ranked_by_scores(xp, rng, name, score, scope):
    """Scores may be as wide as the parts of the numbers, of which there are two."""
    xp.require(name)
    xp.require(score)
    x = (rng.standard_normal((16, 512)) + 1j * rng.standard_normal((16, 512))).astype(name)
    scores = (100 * rng.standard_normal(x.shape)).astype(score)
    n = (scope[0] % 17) * (scope[1] % 513)
    got = xp.call(npscope.keep_largest, x, n // 4, (1, 1), scope, scores=scores)
    mask = xp.call(npscope.block_mask, scores, n // 4, (1, 1), scope)
    assert int(mask.sum()) == n // 4 * (x.size // n)
    assert same_bits(got, np.where(mask, x, 0).astype(name))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("elements", [0, 1 << 23], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["float32", "float16", "float64", "int8"])
@pytest.mark.parametrize(("shape", "scope"), [((8, 640), (1, 4)), ((8, 640), (1, 16)), ((8, 640), (1, 32)),
                                              ((8, 640), (1, -1)), ((512, 300), (-1, -1))])  # fmt: skip
def test_scores_rank_and_the_array_is_kept(monkeypatch, shape, scope, name, elements):
    """Scopes of every size, where other numbers decide: what is kept are the array's own bits."""
    monkeypatch.setattr(pytest.importorskip("npscope.backends.numba_cpu.scope_strips"), "WIDE_ELEMENTS", elements)
    x, scores = hostile("normal", shape, name, 1), hostile("normal", shape, name, 2)
    count = math.prod(n if s == -1 else s for n, s in zip(shape, scope, strict=True))
    for nnz in (1, count // 2, count - 1):
        with npscope.use_backend("reference"):
            expected = npscope.keep_largest(x, nnz, (1, 1), scope, scores=scores)
        with npscope.use_backend("numba"):
            assert same_bits(npscope.keep_largest(x, nnz, (1, 1), scope, scores=scores), expected)
            for out in (x.copy(), np.empty_like(x)):
                source = out if same_bits(out, x) else x
                assert same_bits(npscope.keep_largest(source, nnz, (1, 1), scope, scores=scores, out=out), expected)


@pytest.fixture
def passes(monkeypatch):
    """The passes over large scopes so far: each reads everything."""
    large_scopes = pytest.importorskip("npscope.backends.numba_cpu.large_scopes").LargeScopes
    found, survey = [], large_scopes._survey
    monkeypatch.setattr(large_scopes, "_survey", lambda self, *look: found.append(look) or survey(self, *look))
    return found


def test_passes_over_smooth_arrays(passes):
    """Neighbours that are alike, and lines of a regular array, do not mislead a sample."""
    rows, columns = np.sin(np.arange(2048) / 120), np.cos(np.arange(1024) / 75)
    for x in (np.add.outer(rows, columns), np.add.outer(rows, columns).T, np.multiply.outer(rows, columns)):
        for block in ((1, 1), (1, 4)):
            spec = npscope.ScopeSpec(npscope.BlockSpec(x.astype(np.float32), block), (-1, -1))
            with npscope.use_backend("numba"):
                for share in (0.01, 0.1, 0.37, 0.5, 0.75, 0.9):
                    passes.clear()
                    spec.kth_largest(nnz=int(share * spec.numblk_per_scope()))
                    assert len(passes) <= 2, (block, share, passes)


@pytest.mark.parametrize("data", CROWDED)
def test_passes_over_large_scopes(passes, data):
    """Two find the key, where many are equal and on pruned arrays, too."""
    for elements in (200_000, 300_000, 400_000):
        x = np.abs(CROWDED[data](np.random.default_rng(5).standard_normal(elements))).astype(np.float32)
        ascending = np.sort(x)
        with npscope.use_backend("numba"):
            for nnz in (1, 1000, elements // 3 + 7, *range(elements // 2 - 2, elements // 2 + 3), elements - 1):
                passes.clear()
                np.testing.assert_equal(npscope.kth_largest(x, nnz), ascending[-nnz])
                assert 1 <= len(passes) <= 2, (elements, nnz, passes)


def test_equal_keys_are_counted_in_whatever_order_they_were_stored(monkeypatch):
    """A look that stores nothing changes nothing that another one has yet to read."""
    large_scopes = pytest.importorskip("npscope.backends.numba_cpu.large_scopes").LargeScopes
    step, count = [1], large_scopes.equal_by_piece

    def backwards(self, key):
        step[0] = -1
        try:
            return count(self, key)
        finally:
            step[0] = 1

    def each(self, pieces, use, *, shielded=False):
        for piece in range(pieces)[:: step[0]]:
            use(0, piece)

    monkeypatch.setattr(large_scopes, "equal_by_piece", backwards)
    monkeypatch.setattr(large_scopes, "each", each)
    x = (1 + 1e-5 * np.random.default_rng(0).standard_normal(4_000_000)).astype(np.float32)
    ascending = np.sort(x)
    for k in (1_200_000, 2_800_000, 3_600_000):
        expected = x > ascending[-k]
        expected[np.flatnonzero(x == ascending[-k])[: k - np.count_nonzero(expected)]] = True
        with npscope.use_backend("numba"):
            np.testing.assert_array_equal(npscope.block_mask(x, k, (1,), (-1,)), expected)


def test_places_of_a_sample_do_not_fall_into_step_with_a_period():
    """Whatever the distance is: places in a saw were three times as many at some phases, by one multiplication."""
    mixed = pytest.importorskip("npscope.backends.numba_cpu.scope_passes").mixed

    @pytest.importorskip("npscope.backends.numba_cpu.jit").kernel
    def mix_all(numbers):
        for i in range(numbers.size):
            numbers[i] = mixed(numbers[i])

    for step in (1230, 4096, 9424, 11_690, 14_263, 16_323):
        starts = np.arange(0, 8000 * step, step)
        numbers = starts.astype(np.uint64)
        mix_all(numbers)
        places = starts + (numbers % np.uint64(step - 31)).astype(np.int64)
        for period in (256, 1024, 4096, 65536):
            counts = np.bincount(places % period * 16 // period, minlength=16)
            if step * 16 > period:  # else whole sixteenths are passed one after another
                expected = starts.size / 16
                assert ((counts - expected) ** 2).sum() / expected < 15 * 4, (step, period, counts)


@pytest.mark.parametrize("block", [(1,), (4,)])
def test_passes_over_sorted_arrays(passes, monkeypatch, block):
    """Neighbours are all alike, so that more keys are near the k-th than there is room for: a new sample is taken."""
    monkeypatch.setattr(pytest.importorskip("npscope.backends.numba_cpu.large_scopes"), "FOUND_BYTES", 1 << 18)
    x = np.sort(np.random.default_rng(3).standard_normal(1 << 22).astype(np.float32))
    for array in (x, np.sort(np.abs(x))):
        norms = np.sort(npscope.block_norms(array, block))
        spec = npscope.ScopeSpec(npscope.BlockSpec(array, block), (-1,))
        with npscope.use_backend("numba"):
            for share in (0.03, 0.1, 0.3, 0.44, 0.5, 0.9):
                passes.clear()
                k = int(share * norms.size)
                assert spec.kth_largest(nnz=k) == norms[-k]
                assert len(passes) <= 3, (share, passes)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_passes_over_what_many_threads_have_collected(monkeypatch, rng, name):
    """One narrows it, as a rule, though each thread has found a part of it only."""
    large_scopes = pytest.importorskip("npscope.backends.numba_cpu.large_scopes")
    looks, survey = set(), large_scopes.LargeScopes._survey_keys
    monkeypatch.setattr(
        large_scopes.LargeScopes, "_survey_keys", lambda self, look, *rest: looks.add(look) or survey(self, look, *rest)
    )
    monkeypatch.setattr(large_scopes, "workers_for", lambda elements: 8)
    x = rng.standard_normal(3_000_000).astype(name)
    ascending = np.sort(x)
    for k in (x.size // 10, x.size // 2):
        looks.clear()
        with npscope.use_backend("numba"):
            assert npscope.kth_largest(x, k) == ascending[-k]
        assert 1 <= len(looks) <= 2


def test_large_scopes_of_signed_beside_unsigned_integers(monkeypatch):
    """Magnitudes above 2 ** 63 are what unsigned ones alone can have, and are not taken for negative numbers."""
    monkeypatch.setattr(pytest.importorskip("npscope.backends.numba_cpu.large_scopes"), "FEW_KEYS", 64)
    results, rng = [], np.random.default_rng(8)
    signed, unsigned = (
        rng.integers(*ends, 100_000, dtype=name)
        for ends, name in (((-9, 2**63 - 1), "int64"), ((0, 2**64 - 1), "uint64"))
    )
    for backend in ("reference", "numba"):
        with npscope.use_backend(backend):
            parts = signed.copy(), unsigned.copy()
            scope = npscope.ScopeCoupling([npscope.ScopeSpec(npscope.BlockSpec(a, (1,)), (-1,)) for a in parts])
            scope.hard_threshold(nnz=25_000)
            results.append(parts)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert sum(map(np.count_nonzero, results[1])) == 25_000


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "int8", "int64"])
@pytest.mark.parametrize("data", CROWDED)
def test_large_scopes_of_crowded_keys(backend, data, name):
    """Brackets from samples end in the right key, whatever share of the keys is the same one."""
    values = CROWDED[data](np.random.default_rng(5).standard_normal(1 << 18))
    with np.errstate(all="ignore"):
        x = (50 * np.nan_to_num(values, posinf=2, neginf=2)).clip(-127, 127) if name.startswith("int") else values
        x = np.asarray(x).astype(name)
    size = np.abs(x.astype(np.float64))
    order = np.lexsort((np.arange(x.size), -np.where(np.isnan(size), np.inf, size), ~np.isnan(size)))
    for nnz in (1, 1000, x.size // 3 + 7, x.size // 2, x.size - 1):
        expected = np.zeros(x.size, dtype=bool)
        expected[order[:nnz]] = True
        assert same_bits(npscope.block_mask(x, nnz, (1,), (-1,)), expected)
        assert same_bits(npscope.keep_largest(x, nnz, (1,), (-1,)), np.where(expected, x, x.dtype.type(0)))


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("small_as_large")
@pytest.mark.parametrize(
    ("n", "name"),
    [
        (17, "float32"),
        (256, "float32"),
        (33, "int8"),
        *(
            pytest.param(n, name, marks=pytest.mark.slow)
            for n in (18, 31, 32, 100, 255)
            for name in ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int64")
        ),
    ],
)
@pytest.mark.parametrize("data", CROWDED)
def test_scopes_searched_side_by_side(data, n, name):
    """Sixteen at a time, and fewer at the end: each has its own count, and waits for the others without harm."""
    rows, rng = 37, np.random.default_rng(n)
    with np.errstate(all="ignore"):
        values = rng.permuted(CROWDED[data](rng.standard_normal(n * rows)).reshape(rows, n), axis=1)
        values = values * 2.0 ** rng.integers(-8, 8, (rows, 1))
        whole = (50 * np.nan_to_num(values, posinf=2, neginf=-2)).clip(-127, 127)
        x = (whole if name.startswith("int") else values).astype(dtype(name))
    for nnz in (n // 2, n - 1, rng.integers(0, n + 1, (rows, 1))):
        k = np.maximum(np.ravel(nnz), 1) if np.ndim(nnz) else nnz

        def results(array, nnz=nnz, k=k):
            call = npscope.keep_largest, npscope.block_mask
            kept = [f(array, nnz, (1, 1), (1, n)) for f in call]
            return [*kept, npscope.topk_mask(array, k), npscope.kth_largest(array, k)]

        with npscope.use_backend("reference"):
            *expected, kth = results(x)
        for array in (x, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
            with npscope.use_backend("numba"):
                *found, own = results(array)
            assert all(map(same_bits, found, expected))
            np.testing.assert_equal(own.astype(np.float64), kth.astype(np.float64))
    some = rng.integers(0, n + 1, (rows, 1))
    blocks = np.repeat(np.repeat(x, 2, axis=0), 2, axis=1)
    blocks[1::2, ::2] = 0
    for first in (1, 15, 16, 17, rows):
        array, counts = blocks[: 2 * first], some[:first]
        with npscope.use_backend("reference"):
            expected = [
                f(array, counts, (2, 2), (1, n), ord=np.inf) for f in (npscope.keep_largest, npscope.block_mask)
            ]
        for same in (array, np.asfortranarray(array)):
            with npscope.use_backend("numba"):
                found = [
                    f(same, counts, (2, 2), (1, n), ord=np.inf) for f in (npscope.keep_largest, npscope.block_mask)
                ]
            assert all(map(same_bits, found, expected))
