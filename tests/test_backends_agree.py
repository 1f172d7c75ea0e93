"""Every backend, layout and thread count gives the same bits, on thousands of small problems and on large ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from strategies import EXACT_DTYPES, INTEGERS, KINDS, Problem, hostile, same_bits

import npscope
from npscope import BlockSpec, ScopeSpec

RANKED = (*EXACT_DTYPES, "int32", "uint32", "int64", "uint64")


def random_problem(rng: np.random.Generator, dtypes: tuple[str, ...] = RANKED) -> Problem:
    """A small problem of 1 to 3 axes, any kind of data."""
    ndim = int(rng.integers(1, 4))
    scopes, counts, block = (rng.integers(1, top, ndim) for top in (4, 6 - ndim, 5 - ndim))
    name, kind = str(rng.choice(dtypes)), str(rng.choice(KINDS))
    if math.prod((*counts, *block)) > 1 and name.endswith("64") and name in INTEGERS:
        block = np.ones(ndim, dtype=int)  # sums of 64-bit integers are not exact
    shape = tuple(int(n) for n in scopes * counts * block)
    x = hostile(kind, shape, name, int(rng.integers(2**30)))
    if name in ("int32", "uint32"):
        x = x // np.asarray(2**16, dtype=name)  # so that sums of squares are exact in float64
    if rng.random() < 0.5:
        x = np.ascontiguousarray(x.T).T
    grid = tuple(int(n) for n in scopes * counts)
    return Problem(x, tuple(map(int, block)), tuple(map(int, counts)), math.prod(map(int, counts)), grid)


def results(p: Problem, nnz: int, ord: float, level: float) -> Iterator[tuple[str, np.ndarray]]:
    yield "block_norms", npscope.block_norms(p.x, p.block, ord=ord)
    yield "block_mask", npscope.block_mask(p.x, nnz, p.block, p.scope, ord=ord)
    yield "keep_largest", npscope.keep_largest(p.x, nnz, p.block, p.scope, ord=ord)
    yield "hard_threshold", npscope.hard_threshold(p.x, level, p.block, ord=ord)
    yield "topk_mask", npscope.topk_mask(p.x, max(p.x.shape[-1] // 2, 0))
    yield "kth_largest", npscope.kth_largest(p.x, 1 + p.x.shape[-1] // 3 % p.x.shape[-1])


def same_values(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, payloads of NaN aside in what was computed."""
    nan = np.asarray(a != a)
    return a.dtype == b.dtype and np.array_equal(nan, np.asarray(b != b)) and same_bits(a[~nan], b[~nan])


def compare(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    for i in range(count):
        p = random_problem(rng)
        nnz, ord = int(rng.integers(0, p.count + 1)), rng.choice([1, 2, math.inf])
        level = float(rng.choice([0.5, 1.0, 0.0, 100.0]))
        with npscope.use_backend("reference"):
            expected = list(results(p, nnz, ord, level))
        with npscope.use_backend("numba"), npscope.config(threads=1 + i % 2):
            for (name, want), (_, got) in zip(expected, results(p, nnz, ord, level), strict=True):
                equal = same_values if name in ("block_norms", "kth_largest") else same_bits
                assert equal(want, got), (
                    f"problem {i} of seed {seed}: {name} of {p}, nnz {nnz}, ord {ord}, level {level}"
                )


@pytest.mark.parametrize("seed", range(4))
def test_numba_equals_reference(seed):
    compare(seed, 250)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_numba_equals_reference_10000(seed):
    compare(seed, 500)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "block", "scope", "nnz"),
    [
        ((256, 512), (1, 1), (1, 4), 2),
        ((512, 256), (1, 1), (4, 1), 2),
        ((256, 256), (1, 1), (-1, -1), 20_000),
        ((256, 256), (4, 4), (-1, -1), 1000),
        ((64, 1024), (1, 1), (1, -1), 300),
        ((1024, 64), (16, 1), (-1, 1), 30),
        ((1024, 64), (1, 16), (4, 2), 3),
        ((8, 32, 32, 3), (1, 1, 1, 3), (1, -1, 8), 100),
    ],
)
def test_larger_problems_at_any_thread_count(kind, shape, block, scope, nnz):
    x = hostile(kind, shape, "float32", 17)
    with npscope.use_backend("reference"):
        expected = npscope.keep_largest(x, nnz, block, scope)
    for array in (x, np.asfortranarray(x)):
        for threads in (1, 3):
            with npscope.use_backend("numba"), npscope.config(threads=threads):
                assert same_bits(npscope.keep_largest(array, nnz, block, scope), expected)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", ["float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "int8", "int16", "int64", "uint64"]
)
@pytest.mark.parametrize("kind", ["normal", "two_valued", "nan_payloads", "near_overflow"])
def test_larger_problems_of_other_dtypes(name, kind):
    x = hostile(kind, (128, 256), name, 18)
    for block, scope, nnz in (((1, 1), (1, 4), 2), ((1, 1), (-1, -1), 9000), ((1, 1), (-1, 1), 40)):
        with npscope.use_backend("reference"):
            expected = npscope.keep_largest(x, nnz, block, scope)
        with npscope.use_backend("numba"):
            assert same_bits(npscope.keep_largest(x, nnz, block, scope), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scope", [(-1, -1), (1, -1), (1, 16), (-1, 1)])
@pytest.mark.parametrize("name", ["complex64", "complex128"])
def test_a_complex_number_has_one_norm(name, scope):
    """However it is read: the k-th largest is one of the norms, and is not below itself as a threshold."""
    x = hostile("normal", (300, 512), name, 21)
    norms = npscope.block_norms(x, (1, 1))
    assert same_bits(norms, npscope.block_norms(np.repeat(x, 2, axis=1)[:, ::2], (1, 1)))
    for array in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x.astype(x.dtype.newbyteorder())):
        spec = npscope.ScopeSpec(npscope.BlockSpec(array, (1, 1)), scope)
        kth = np.asarray(spec.kth_largest(nnz=7))
        assert np.isin(kth, norms).all()
        spec.hard_threshold(thresholds=kth)
        assert np.count_nonzero(array) >= 7 * kth.size
        assert np.abs(array[array != 0]).min() >= 0.999 * kth.min()


@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("block", [(1, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("name", ["complex64", "complex128", "float32"])
def test_no_block_is_below_its_own_norm(name, block, leaves):
    """Norms are formed in one way, whoever asks for them; a unit in the last place would drop a tenth of these."""
    arrays = [hostile("normal", (64, 64), name, seed) for seed in range(leaves)]
    coupled = npscope.BlockCoupling(tuple(npscope.BlockSpec(array, block) for array in arrays))
    coupled.hard_threshold(coupled.norms())
    for array, seed in zip(arrays, range(leaves), strict=True):
        assert same_bits(array, hostile("normal", (64, 64), name, seed))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", ["complex64", "complex128"])
@pytest.mark.parametrize("kind", ["normal", "nan_payloads"])
@pytest.mark.parametrize(
    ("scope", "nnz"), [((1, 4), 2), ((4, 1), 2), ((1, 32), 20), ((-1, 1), 100), ((1, -1), 300), ((-1, -1), 60_000)]
)
def test_complex_numbers_in_scopes_of_every_size(kind, name, scope, nnz):
    """They are ranked as pairs of real numbers, or one by one: their magnitudes are the same for every order."""
    x = hostile(kind, (300, 512), name, 20)

    def results(array, ord):
        pruned, mask = (f(array, nnz, (1, 1), scope, ord=ord) for f in (npscope.keep_largest, npscope.block_mask))
        kth = npscope.ScopeSpec(npscope.BlockSpec(array, (1, 1)), scope).kth_largest(nnz=nnz, ord=ord)
        limit = np.nanmean(np.abs(x[:3, :3]))
        norms = npscope.block_norms(array, (1, 1), ord=ord)
        return pruned, mask, np.asarray(kth), norms, npscope.hard_threshold(array, limit, (1, 1), ord=ord)

    with npscope.use_backend("reference"):
        expected = results(x, 2)
    for array in (
        x,
        np.asfortranarray(x),
        np.concatenate([x, x])[300:, ::-1][:, ::-1],
        x.astype(x.dtype.newbyteorder()),
    ):
        for ord in (2, 1):
            with npscope.use_backend("numba"):
                pruned, mask, kth, norms, cut = results(array, ord)
            assert same_bits(pruned.astype(x.dtype), expected[0])
            assert np.array_equal(mask, expected[1])
            np.testing.assert_allclose(kth, expected[2], rtol=1e-6 if name == "complex64" else 1e-15)
            np.testing.assert_allclose(norms, expected[3], rtol=1e-6 if name == "complex64" else 1e-15)
            assert same_bits(cut.astype(x.dtype), expected[4])


@pytest.mark.sampled(32)
@pytest.mark.parametrize("name", [f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")])
@pytest.mark.parametrize(
    ("scope", "nnz"),
    [((1, 4), 2), ((4, 1), 2), ((1, 8), 3), ((8, 1), 3), ((1, 16), 9), ((16, 1), 9), ((1, 7), 4), ((1, 32), 20),
     ((32, 1), 20), ((-1, 1), 100), ((1, -1), 300), ((-1, -1), 60_000)],
)  # fmt: skip
def test_integers_in_scopes_of_every_size(rng, name, scope, nnz):
    """The least integer has the largest magnitude, which no integer of its width is; and all have 0 in them."""
    info = np.iinfo(name)
    x = rng.integers(info.min, info.max, (320, 448), dtype=name, endpoint=True)
    x[rng.random(x.shape) < 0.2] = rng.choice(np.asarray([0, 1, info.min, info.min + 1, info.max], dtype=name))
    x[::3] = rng.integers(0, 3, x[::3].shape)

    def results(array):
        pruned, mask = (f(array, nnz, (1, 1), scope) for f in (npscope.keep_largest, npscope.block_mask))
        kth = npscope.ScopeSpec(npscope.BlockSpec(array, (1, 1)), scope).kth_largest(nnz=nnz)
        axis = {(-1, 1): 0, (1, -1): 1, (-1, -1): None}
        if scope not in axis:
            return pruned, mask, kth
        own = [f(array, nnz, axis=axis[scope]) for f in (npscope.topk_mask, npscope.kth_largest)]
        return pruned, mask, kth, *own

    with npscope.use_backend("reference"):
        expected = results(x)
    for array in (
        x,
        np.asfortranarray(x),
        np.concatenate([x, x])[320:, ::-1][:, ::-1],
        x.astype(x.dtype.newbyteorder()),
    ):
        with npscope.use_backend("numba"):
            found = results(array)
        for got, want in zip(found, expected, strict=True):
            assert got.dtype.newbyteorder("=") == want.dtype
            assert np.array_equal(got, want)


@pytest.mark.parametrize("name", ["float64", "complex64", "complex128", "int32", "uint32"])
@pytest.mark.parametrize("ord", [1, 2, 3.0])
def test_norms_beyond_the_exact_contract_agree_within_8_ulp(rng, name, ord):
    x = hostile("normal", (40, 30), name, 19)
    tables = []
    for backend in ("reference", "numba"):
        with npscope.use_backend(backend):
            tables += [npscope.block_norms(a, (4, 5), ord=ord) for a in (x, np.asfortranarray(x))]
    for other in tables[1:]:
        np.testing.assert_array_max_ulp(tables[0], other, maxulp=8)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "complex64", "float64"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_shrinkage_has_the_same_zeros_and_nearly_the_same_values(rng, name, conditioned):
    x = hostile("normal", (64, 48), name, 20)
    h = rng.choice([0.5, 1.0, 2.0, 4.0], x.shape).astype(np.float32) if conditioned else None
    t = rng.uniform(0.5, 8, (16, 12))
    results_ = []
    for backend in ("reference", "numba"):
        with npscope.use_backend(backend):
            results_.append(npscope.soft_threshold(x, t, (4, 4), conditioner=h))
    a, b = results_
    assert np.array_equal(a == 0, b == 0)
    assert (a == 0).any()
    assert (a != 0).any()
    real = np.float64 if name != "complex64" else np.complex64
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 1e-12}.get(name, 2.0**-22)
    np.testing.assert_allclose(a.astype(real), b.astype(real), rtol=2 * eps, atol=2.0**-24)


@pytest.mark.parametrize("name", ["float32", "float64", "complex128"])
def test_bits_do_not_depend_on_threads(rng, name):
    """Also in float64: a long block is cut at fixed offsets and combined in fixed order."""
    x = hostile("normal", (6, 150_000), name, 30)
    h = rng.uniform(0.5, 2, x.shape)
    with npscope.use_backend("numba"):
        outcomes = []
        for threads in (1, 2, 5):
            with npscope.config(threads=threads):
                outcomes.append(
                    [
                        npscope.block_norms(x, (1, -1)),
                        npscope.block_norms(x, (-1, 50), ord=1),
                        npscope.keep_largest(x, 9000, (2, 5), (-1, -1)),
                        npscope.soft_threshold(x, 20.0, (6, 500)),
                        npscope.soft_threshold(x, 20.0, (6, 500), conditioner=h),
                    ]
                )
    for other in outcomes[1:]:
        for one, two in zip(outcomes[0], other, strict=True):
            assert same_bits(one, two)


def test_repeated_calls_give_the_same_bits(rng):
    x = rng.standard_normal((300, 400))
    with npscope.use_backend("numba"):
        first = npscope.soft_threshold(x, 0.7, (3, 4))
        for _ in range(3):
            assert same_bits(npscope.soft_threshold(x, 0.7, (3, 4)), first)


GROUPS = {(n, name) for n in range(2, 18) for name in ("float32", "bfloat16", "float64", "int8")}
FEW_GROUPS = {(n, "float32") for n in (2, 3, 8, 16, 17)} | {(4, "bfloat16"), (5, "float64"), (7, "int8")}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["normal", "two_valued"])
@pytest.mark.parametrize(
    ("n", "name"),
    [pytest.param(*case, marks=() if case in FEW_GROUPS else pytest.mark.slow) for case in sorted(GROUPS)],
)
def test_scopes_ranked_inside_vectors(n, name, kind):
    """Scopes of every size that fits a vector, beside others and at the end of a row that no vector fills."""
    x = hostile(kind, (27, 66 * n), name, n)
    x[0, 0] = x[1, n : 2 * n] = 0
    for block in ((1, 1), (1, 2)):
        counts = np.random.default_rng(n).integers(0, n + 1, (27, 66 // block[1]))
        for nnz in (0, n // 2, n - 1, counts):
            with npscope.use_backend("reference"):
                expected, mask = (f(x, nnz, block, (1, n)) for f in (npscope.keep_largest, npscope.block_mask))
            for array in (x, np.asfortranarray(x), np.asfortranarray(x[::-1])[::-1]):
                with npscope.use_backend("numba"):
                    assert same_bits(npscope.keep_largest(array, nnz, block, (1, n)), expected)
                    assert same_bits(npscope.block_mask(array, nnz, block, (1, n)), mask)


COLUMNS = [
    (n, name) for n in (2, 3, 4, 8, 16) for name in ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn")
]
FEW_COLUMNS = {(4, "float32"), (3, "bfloat16"), (8, "float16"), (16, "float32"), (2, "float8_e4m3fn"), (4, "float64")}


@pytest.mark.parametrize("kind", ["normal", "two_valued", "nan_payloads"])
@pytest.mark.parametrize(
    ("n", "name"), [pytest.param(*case, marks=() if case in FEW_COLUMNS else pytest.mark.slow) for case in COLUMNS]
)
def test_scopes_side_by_side_are_ranked_across_vectors(n, name, kind):
    """Their elements lie apart: in rows of a C-ordered array, in several loops, and from one layout to another."""
    x = hostile(kind, (8 * n, 77), name, n)
    x[:n, ::3] = 0
    x[0, ::6] = -0.0
    several = (2, n // 2) if n % 2 == 0 else (1, n)
    cases = {
        "columns": (x, (n, 1)),
        "transposed": (x.T, (1, n)),
        "part": (hostile(kind, (8 * n, 200), name, n)[:, 3:80], (n, 1)),
        "cube": (hostile(kind, (4, n, 5, 77), name, n), (*several, 1, 1)),
        "backwards": (x[::-1], (n, 1)),
    }
    for array, scope in cases.values():
        ones = (1,) * array.ndim
        for nnz in sorted({0, 1, n // 2, n}):
            with npscope.use_backend("reference"):
                expected, mask = (f(array, nnz, ones, scope) for f in (npscope.keep_largest, npscope.block_mask))
            with npscope.use_backend("numba"):
                assert same_bits(npscope.keep_largest(array, nnz, ones, scope), expected)
                assert same_bits(npscope.block_mask(array, nnz, ones, scope), mask)
                same = array.copy(order="K")
                for source, out in (
                    (array, np.empty_like(array, order="C")),
                    (array, np.empty_like(array, order="F")),
                    (same, same),
                ):
                    npscope.keep_largest(source, nnz, ones, scope, out=out)
                    assert same_bits(out, expected)


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ((4, 1), "float32"),
        ((2, 3), "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((4, 1), "float8_e5m2"), ((1, 4), "float32"), ((5, 2), "float16"), ((2, 2), "int8"))
        ),
    ],
)
@pytest.mark.parametrize("n", [2, 4, 16, 19])
def test_blocks_of_scopes_side_by_side_are_ranked_as_they_lie(n, block, name, rng):
    """Of equal blocks the first are kept, and what is written may lie otherwise than what is read."""
    shape = block[0] * n * 4, block[1] * 53
    x = hostile("two_valued", shape, name, n)
    x[: block[0] * n] = hostile("normal", x[: block[0] * n].shape, name, 1)
    counts = rng.integers(0, n + 1, (4, 53))
    for array, cut, scope, nnz in (
        (x, block, (n, 1), counts),
        (x.T, block[::-1], (1, n), counts.T),
        (x[:, block[1] :], block, (2 * n, 1), n),
        (x[::-1], block, (n, 1), n // 2),
    ):
        found = {}
        for backend in ("reference", "numba"):
            with npscope.use_backend(backend):
                same = array.copy(order="K")
                found[backend] = [
                    npscope.keep_largest(same, nnz, cut, scope, out=same),
                    npscope.keep_largest(array, nnz, cut, scope, out=np.empty_like(array, order="C")),
                    npscope.keep_largest(array, nnz, cut, scope, out=np.empty_like(array, order="F")),
                    npscope.block_mask(array, nnz, cut, scope),
                    ScopeSpec(BlockSpec(array, cut), scope).kth_largest(nnz=np.maximum(nnz, 1)),
                ]
        assert all(map(same_bits, found["numba"], found["reference"]))


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (17, "float32"),
        (40, "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((96, "float32"), (40, "float16"), (33, "float64"), (33, "int8"))
        ),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "two_valued", "nan_payloads"])
def test_longer_scopes_side_by_side_are_read_by_tiles(kind, n, name):
    """And what no tile fills, beside and below, number by number."""
    kind = "normal" if name == "int8" else kind
    x = hostile(kind, (2 * n, 77), name, n)
    cube = np.ascontiguousarray(hostile(kind, (2, 3, n, 50), name, n))
    for array, axis in ((x, 0), (x.T, 1), (cube, 2), (x[::-1], 0), (x[:, 40:59], 0)):
        scope = tuple(n if a == axis else 1 for a in range(array.ndim))
        ones = (1,) * array.ndim
        found = {}
        for backend in ("reference", "numba"):
            with npscope.use_backend(backend):
                found[backend] = [
                    npscope.keep_largest(array, n // 3, ones, scope),
                    npscope.keep_largest(array, n // 3, ones, scope, out=np.empty_like(array, order="F")),
                    npscope.block_mask(array, n // 3, ones, scope),
                    npscope.topk_mask(array, n // 3, axis=axis),
                    npscope.kth_largest(array, n // 3, axis=axis),
                ]
        *expected, kth = found["reference"]
        *got, own = found["numba"]
        assert all(map(same_bits, got, expected))
        assert np.array_equal(own.astype(np.float64), kth.astype(np.float64), equal_nan=name != "int8")
