"""Shrinkage: values to the last bit but one, the zero set exactly, the optimality conditions, the conditioned step."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import oracles as o
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FINITE, SHRINKABLE, dtype, hostile, problems, same_bits

import npscope


def parts_of(x: np.ndarray) -> list[np.ndarray]:
    return [x.real, x.imag] if x.dtype.kind == "c" else [x]


def assert_shrunk(
    got: np.ndarray, x: np.ndarray, block, t: np.ndarray, h: np.ndarray | None = None, limit: float = 1
) -> None:
    """`got` is the exact step within `limit` ulp (float64: the error of a norm within 4 ulp), zeros are +0.0."""
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    part = o.one(x, block)[0]
    name = o.norm_dtype(x.dtype)
    t = np.broadcast_to(np.asarray(t), o.block_grid(part)).astype(name)
    for index in o.indices(t.shape):
        where = o.block_at(0, part, index)[0].where
        metric = None if h is None else [float(v) for v in h[where].flat]
        factors = o.shrink_factors([o.number(v) for v in x[where].flat], float(t[index]), name, metric)
        if factors is None:
            assert same_bits(got[where], x[where])
            continue
        for before, after in zip(parts_of(x[where]), parts_of(got[where]), strict=True):
            for a, b, factor in zip(before.flat, after.flat, factors, strict=True):
                assert_close_product(float(a), float(b), factor, x.dtype.name, limit)


def assert_close_product(before: float, after: float, factor: Fraction, name: str, limit: float) -> None:
    if factor == 0 or before == 0:
        assert after == 0
        assert factor != 0 or math.copysign(1, after) == 1
        return
    exact = Fraction(before) * factor
    slack = abs(Fraction(before)) / 2**48 if o.FORMATS[name].bits == 53 else 0
    assert abs(Fraction(after) - exact) <= limit * o.quantum(exact, o.FORMATS[name]) + slack


@given(data=st.data())
def test_soft_threshold(xp, data):
    p = data.draw(problems([n for n in SHRINKABLE if n in xp.dtypes], kinds=(*FINITE, "infinities"), max_axes=3))
    norms = o.block_norms(p.x, p.block)
    finite = [v for v in norms.ravel().tolist() if math.isfinite(v)][:3]
    levels = [0.0, math.inf, 0.3, *finite, *(v * 0.999 for v in finite), *(v / 3 for v in finite)]
    t = np.asarray(np.resize(data.draw(st.permutations(levels)), norms.shape), dtype=np.float64)
    assert_shrunk(xp.call(npscope.soft_threshold, p.x, t, p.block), p.x, p.block, t)


@pytest.mark.parametrize("name", SHRINKABLE)
def test_nan_blocks_stay_bit_for_bit(xp, name):
    xp.require(name)
    x = hostile("nan_payloads", (8, 6), name, 2)
    got = xp.call(npscope.soft_threshold, x, 0.5, (1, 3))
    nan = np.isnan(x).reshape(8, 2, 3).any(-1)
    assert nan.any()
    assert not nan.all()
    touched = got.reshape(8, 2, 3)[nan]
    assert same_bits(touched, x.reshape(8, 2, 3)[nan])
    assert_shrunk(got, x, (1, 3), 0.5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SHRINKABLE)
def test_zero_threshold_is_the_identity(xp, name):
    xp.require(name)
    for kind in ("signed_zeros", "nan_payloads", "subnormal", "near_overflow", "infinities"):
        x = hostile(kind, (6, 4), name, 7)
        assert same_bits(xp.call(npscope.soft_threshold, x, 0.0, (2, 2)), x)
        h = np.full(x.shape, 2.0, dtype=o.norm_dtype(name))
        assert same_bits(xp.call(npscope.soft_threshold, x, 0.0, (2, 2), conditioner=h), x)


def test_infinite_norms(xp):
    x = np.asarray([[np.inf, 1.0], [np.inf, -1.0], [1.0, 2.0], [-np.inf, -0.0]])
    t = np.asarray([[1.0], [np.inf], [np.inf], [1e300]])
    got = xp.call(npscope.soft_threshold, x, t, (1, 2))
    assert same_bits(got, np.asarray([[np.inf, 1.0], [0.0, 0.0], [0.0, 0.0], [-np.inf, -0.0]]))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("metric", [None, 1.0, 0.25])
@pytest.mark.parametrize(
    ("name", "value"), [("float32", 3e38), ("bfloat16", 3e38), ("complex64", 3e38), ("float64", 1.7e308)]
)
def test_norms_beyond_their_dtype_count_as_infinite(xp, name, value, metric):
    """Finite elements, a norm that rounds to inf: unchanged for a finite threshold, whatever the conditioner."""
    xp.require(name)
    x = np.full((3, 4), value).astype(dtype(name))
    t = np.asarray([[value / 3], [np.inf], [1e-3]])
    h = {} if metric is None else {"conditioner": np.full(x.shape, metric, dtype=np.float32)}
    got = xp.call(npscope.soft_threshold, x, t, (1, 4), **h)
    assert same_bits(got[[0, 2]], x[[0, 2]])
    assert same_bits(got[1], np.zeros_like(x[1]))


def test_a_norm_equal_to_its_threshold_is_zero(xp):
    x = np.asarray([[3.0, -4.0], [1.0, 2.0**-24]], dtype=np.float32)
    got = xp.call(npscope.soft_threshold, x, np.asarray([[5.0], [1.0]]), (1, 2))
    assert same_bits(got, np.zeros_like(x))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_optimality_conditions(xp, rng, name):
    """x - v + t x / ||x|| = 0 where x != 0, ||v|| <= t elsewhere: with no oracle of the result."""
    v = rng.standard_normal((50, 8)).astype(name)
    t = rng.uniform(0.1, 5, (50, 1))
    x = xp.call(npscope.soft_threshold, v, t, (1, 8)).astype(np.float64)
    size = np.sqrt((x**2).sum(axis=1, keepdims=True))
    zero = size[:, 0] == 0
    assert zero.any()
    assert not zero.all()
    tolerance = 1e-5 if name == "float32" else 1e-13
    t = t.astype(name).astype(np.float64)
    slope = x - v + t * x / np.where(size == 0, 1, size)
    assert np.abs(slope[~zero]).max() < tolerance * 5
    assert (np.sqrt((v.astype(np.float64) ** 2).sum(axis=1))[zero] <= t[zero, 0] * (1 + tolerance)).all()


@pytest.mark.parametrize("name", ["complex64", "complex128"])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_complex_zeros_keep_their_signs(xp, name, factor):
    xp.require(name)
    signed = [0.0, -0.0, 3.0, -3.0]
    x = np.asarray([[complex(a, b) for a in signed for b in signed]], dtype=name)
    expected = x.copy()
    expected.real, expected.imag = x.real * factor, x.imag * factor
    got = xp.call(npscope.soft_threshold, x, 12 * (1 - factor), (1, 16))  # the norm is 12
    assert same_bits(got, expected)
    conditioned = xp.call(npscope.soft_threshold, x, 12 * (1 - factor), (1, 16), conditioner=np.ones(x.shape))
    assert np.array_equal(np.signbit([conditioned.real, conditioned.imag]), np.signbit([x.real, x.imag]))


# --- conditioned ---------------------------------------------------------------------------------


def conditioners(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if kind == "ones":
        return np.ones(shape)
    if kind == "wide":
        return 10 ** rng.uniform(-8, 8, shape)
    if kind == "clustered":
        return rng.choice([1e-3, 1.0, 1e3], shape)
    if kind == "extreme":
        return rng.choice([1e-150, 1e150], shape)
    return rng.uniform(0.5, 2, shape)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["ones", "mild", "clustered", "wide"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_conditioned_values(xp, rng, kind, name):
    xp.require(name)
    x = hostile("normal", (5, 12), name, 11)
    h = conditioners(kind, x.shape, rng).astype(
        "float64" if kind == "wide" or name.endswith(("64", "128")) else "float32"
    )
    sizes = [
        o.root(sum((Fraction(float(c)) ** 2 * o.square(o.number(v)) for c, v in zip(hr, xr, strict=True)), Fraction(0)))
        for hr, xr in zip(h.reshape(15, 4), x.reshape(15, 4), strict=True)
    ]
    shares = rng.choice([0.01, 0.5, 0.9, 0.999, 1.5], 15)
    t = np.asarray([float(s) * c for s, c in zip(sizes, shares, strict=True)]).reshape(5, 3)
    got = xp.call(npscope.soft_threshold, x, t, (1, 4), conditioner=h)
    assert_shrunk(got, x, (1, 4), t, h, limit=1)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_conditioner_of_ones_is_the_plain_step(xp, rng, name):
    x = rng.standard_normal((20, 6)).astype(name)
    h = np.ones_like(x)
    t = rng.uniform(0.1, 3, (20, 2))
    plain = xp.call(npscope.soft_threshold, x, t, (1, 3))
    conditioned = xp.call(npscope.soft_threshold, x, t, (1, 3), conditioner=h)
    assert np.array_equal(plain == 0, conditioned == 0)
    np.testing.assert_allclose(conditioned, plain, rtol=1e-6 if name == "float32" else 1e-11)


@given(data=st.data())
def test_conditioned_optimality(xp, data):
    """H(x - v) + t x / ||x|| = 0 or ||H v|| <= t, for conditioners over up to sixteen decades."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    kind = data.draw(st.sampled_from(["ones", "mild", "clustered", "wide"]))
    n = data.draw(st.integers(1, 6))
    v, h = rng.standard_normal((4, n)), conditioners(kind, (4, n), rng)
    size = np.sqrt(((h * v) ** 2).sum(1, keepdims=True))
    t = size * rng.choice([1e-6, 0.1, 0.7, 0.9999, 1.0001, 3.0], (4, 1))
    x = xp.call(npscope.soft_threshold, v, t, (1, -1), conditioner=h)
    for row in range(4):
        if not x[row].any():
            assert size[row, 0] <= t[row, 0] * (1 + 1e-12)
            continue
        with mpmath.workprec(200):
            xs, vs, hs = ([mpmath.mpf(float(a)) for a in array[row]] for array in (x, v, h))
            length = mpmath.norm(xs)
            for a, b, c in zip(xs, vs, hs, strict=True):
                slope = c * (a - b) + mpmath.mpf(float(t[row, 0])) * a / length
                assert abs(slope) <= 1e-9 * (abs(c * b) + mpmath.mpf(float(t[row, 0])) * abs(a) / length)


def assert_optimal(x: np.ndarray, v: np.ndarray, h: np.ndarray, t: float, tolerance: float) -> None:
    """H(x - v) + t x / ||x|| = 0 in every row of `x` that is not zero, ||H v|| <= t in the others."""
    x, v, h = (a.astype(np.float64) for a in (x, v, h))
    size = np.sqrt((x**2).sum(axis=1, keepdims=True))
    zero = size[:, 0] == 0
    assert (np.sqrt(((h * v) ** 2).sum(axis=1))[zero] <= t * (1 + tolerance)).all()
    slope = np.abs(h * (x - v) + t * x / np.where(size == 0, 1, size))
    assert (slope[~zero] <= tolerance * (np.abs(h * v) + t)[~zero]).all()


@pytest.mark.parametrize("rtol", [1e-12, 1e-17])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_plain_data_converge(backend, name, rtol):
    """Where the rounding of the secular norm stops Newton's progress, the step is done and not stuck."""
    rows = 500_000 if backend == "numba" else 20_000
    for seed in range(2):
        random = np.random.default_rng(seed)
        v = random.standard_normal((rows, 4), dtype=name)
        h = 0.5 + random.random((rows, 4), dtype=name)
        x = npscope.soft_threshold(v, 2.0, (1, 4), conditioner=h, rtol=rtol)
        assert x.any(axis=1).mean() > 0.1
        assert_optimal(x, v, h, 2.0, 1e-6 if name == "float32" else 1e-12)


@pytest.mark.parametrize("rtol", [1e-12, 1e-17])
def test_a_block_on_which_newton_used_to_swing_converges(xp, rtol):
    v = np.asarray([[0.6333526228249152, -2.2035098806466507]])
    h = np.asarray([[1.1291081515397092, 1.4271545530678673]])
    t = 3.2250347038182854
    x = xp.call(npscope.soft_threshold, v, t, (1, 2), conditioner=h, rtol=rtol)
    assert_optimal(x, v, h, t, 1e-12)


def test_conditioned_blocks_with_nan_inf_and_zero(xp):
    x = np.asarray([[np.nan, 1.0], [np.inf, 1.0], [np.inf, 1.0], [0.0, -0.0], [1.0, 1.0]])
    h = np.asarray([[1.0, 2.0]] * 5)
    t = np.asarray([[1.0], [1.0], [np.inf], [1.0], [100.0]])
    got = xp.call(npscope.soft_threshold, x, t, (1, 2), conditioner=h)
    assert same_bits(got[:2], x[:2])
    assert same_bits(got[2:], np.zeros((3, 2)))


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_conditioned_step_scales(xp, rng, scale):
    """The step is homogeneous: (c v, c t) gives c x, and (c H, c t) gives x."""
    v, h, t = rng.standard_normal((6, 3)), rng.uniform(0.1, 10, (6, 3)), rng.uniform(0.1, 2, (6, 1))
    base = xp.call(npscope.soft_threshold, v, t, (1, -1), conditioner=h)
    np.testing.assert_allclose(
        xp.call(npscope.soft_threshold, v * scale, t * scale, (1, -1), conditioner=h), base * scale, rtol=1e-10
    )
    np.testing.assert_allclose(
        xp.call(npscope.soft_threshold, v, t * scale, (1, -1), conditioner=h * scale), base, rtol=1e-10
    )


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_extreme_conditioners_converge(xp, rng, name):
    v = rng.standard_normal((30, 4)).astype(name)
    h = conditioners("extreme", v.shape, rng)
    got = xp.call(npscope.soft_threshold, v, 1e-3, (1, -1), conditioner=h, max_iter=200)
    assert np.isfinite(got).all()
    assert (np.abs(got) <= np.abs(v)).all()


def test_too_few_steps_raise_and_write_nothing(backend, rng):
    x = rng.standard_normal((10, 8))
    before = x.copy()
    h = conditioners("wide", x.shape, rng)
    t = 0.5 * np.sqrt(((h * x) ** 2).sum(1, keepdims=True))
    with pytest.raises(npscope.ConvergenceError, match=r"max_iter = 1\b"):
        npscope.soft_threshold(x, t, (1, -1), conditioner=h, max_iter=1, out=x)
    assert same_bits(x, before)


def test_default_limits_suffice_up_to_a_condition_of_1e8(backend, rng):
    x = rng.standard_normal((3000, 8))
    h = 10 ** rng.uniform(-4, 4, x.shape)
    t = rng.uniform(0, 1.2, (3000, 1)) * np.sqrt(((h * x) ** 2).sum(1, keepdims=True))
    got = npscope.soft_threshold(x, t, (1, -1), conditioner=h)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("metric", ["bfloat16", "int16"])
def test_conditioners_of_other_dtypes(xp, rng, metric):
    xp.require(metric)
    x = rng.standard_normal((6, 4)).astype(np.float32)
    h = rng.integers(1, 9, x.shape).astype(dtype(metric))
    assert_shrunk(xp.call(npscope.soft_threshold, x, 1.0, (1, 4), conditioner=h), x, (1, 4), 1.0, h)


# --- single elements, and strips of blocks -------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_single_elements_move_in_one_rounding(xp, rng, name, conditioned):
    """x - t / h or x + t / h, rounded once: no factor comes between, so that every backend has the same bits."""
    x = rng.standard_normal((7, 5000)).astype(name)
    x[0, :9] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, np.finfo(name).tiny, -np.finfo(name).max]
    h = rng.choice([0.5, 1.0, 3.0], x.shape) if conditioned else np.ones(x.shape)
    t = rng.choice([0.0, 0.25, 1.0, np.inf], (7, 1)).astype(name)
    t[0] = 1.0
    got = xp.call(npscope.soft_threshold, x, t, (1, 1), **({"conditioner": h} if conditioned else {}))
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        shift = t.astype(np.float64) / h
        moved = np.where(wide > 0, wide - shift, wide + shift).astype(name)
        zero = (h * np.abs(wide)).astype(name) <= t
    expected = np.where(np.isnan(x) | (t == 0), x, np.where(zero, np.zeros_like(x), moved))
    assert same_bits(got, expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_single_elements_of_few_bits_move_in_one_rounding(xp, rng, name, conditioned):
    """Differences as near to the midpoint of two numbers as thresholds of float32 allow: not rounded to it before."""
    xp.require(name)
    x = (rng.integers(1, 2**7, 500) * 2.0 ** rng.integers(-8, 3, 500)).astype(dtype(name))
    wide = x.astype(np.float64)
    bits = 11 if name == "float16" else 8
    below = wide * (1 - rng.integers(1, 2**5, 500) / 2.0**6)
    unit = 2.0 ** (np.frexp(below)[1] - bits)
    midpoint = (np.floor(below / unit) + 0.5) * unit
    t = (wide - midpoint).astype(np.float32)
    for limit in (t, np.nextafter(t, np.float32(0)), np.nextafter(t, np.float32(np.inf))):
        h = {"conditioner": np.ones(x.shape)} if conditioned else {}
        got = xp.call(npscope.soft_threshold, x, limit, (1,), **h)
        expected = [o.rounded(Fraction(a) - Fraction(b), name) for a, b in zip(wide, limit.astype(float), strict=True)]
        assert got.astype(np.float64).tolist() == expected


@pytest.mark.parametrize("block", [(4, 4), (1, 16), (1, 1), (3, 5)])
@pytest.mark.parametrize("conditioned", [False, True])
def test_thresholds_over_scopes_are_those_of_their_blocks(backend, rng, block, conditioned):
    """However thresholds lie (one for all, one a scope, one a block, strided), strips read the same numbers."""
    x = rng.standard_normal((4 * block[0], 1500 * block[1])).astype(np.float32)
    h = {"conditioners": np.full(x.shape, 2.0, dtype=np.float32)} if conditioned else {}
    grid = (4, 1500)
    few = rng.uniform(0.1, 4, (2, 3))
    many = np.repeat(np.repeat(few, 2, axis=0), 500, axis=1)
    strided = np.repeat(many, 3, axis=1)[:, ::3]
    results = []
    for t in (few, many, strided, np.asfortranarray(many)):
        y = x.copy()
        spec = npscope.BlockSpec(y, block)
        if t is few:
            npscope.ScopeSpec(spec, (2, 500)).soft_threshold(t, **h)
        else:
            assert t.shape == grid
            spec.soft_threshold(t, **h)
        results.append(y)
    for other in results[1:]:
        assert same_bits(results[0], other)


def assert_as_the_reference_has_it(x, t, block, h):
    """The conditioned shrink of the Numba backend: the same zeros, and within 1 ulp."""
    results = []
    for backend in ("reference", "numba"):
        with npscope.use_backend(backend):
            results.append(npscope.soft_threshold(x, t, block, conditioner=h))
    assert np.array_equal(results[0] == 0, results[1] == 0)
    np.testing.assert_array_max_ulp(*results, maxulp=1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "block", [(1, 2), (1, 3), (4, 4), (2, 8), (1, 16), (3, 16), (1, 48), (16, 1), (7, 9), (6, 500), (6, 1440)]
)
@pytest.mark.parametrize("layout", ["C", "F", "strided"])
def test_conditioned_blocks_of_every_shape(rng, block, layout):
    """Vectors of blocks, what is left over of them, blocks beyond the planes: all as the reference has it."""
    shape = (block[0] * (42 // block[0]), block[1] * max(1, 1440 // block[1]))
    x, h = rng.standard_normal(shape).astype(np.float32), rng.uniform(0.5, 2, shape).astype(np.float32)
    if layout == "F":
        x, h = np.asfortranarray(x), np.ascontiguousarray(h)
    elif layout == "strided":
        x, h = np.repeat(x, 2, axis=1)[:, ::2], np.repeat(h, 2, axis=0)[::2]
    grid = (shape[0] // block[0], shape[1] // block[1])
    t = rng.uniform(0, 2.2, grid) * math.sqrt(block[0] * block[1])
    t[0, 0] = 0
    assert_as_the_reference_has_it(x, t, block, h)


@pytest.mark.parametrize("block", [(1, 2), (4, 4), (1, 64), (5, 13)])
@pytest.mark.parametrize("power", [-120, -60, -44, 0, 20, 44, 60, 100])
def test_thresholds_near_the_norms_of_numbers_of_any_size(rng, block, power):
    """Norms that float32 tells from their threshold, those that it does not, and those that it cannot square."""
    shape = (block[0] * 8, block[1] * 24)
    x = (rng.standard_normal(shape) * 2.0**power).astype(np.float32)
    x[: block[0], : 8 * block[1]] = 0
    h = np.exp2(rng.uniform(-9, 9, shape)).astype(np.float32)
    norms = np.sqrt(((h * x.astype(np.float64)) ** 2).reshape(8, block[0], 24, block[1]).sum(axis=(1, 3)))
    t = (norms * (1 + rng.choice([-1, 1], (8, 24)) * np.exp2(-rng.uniform(1, 30, (8, 24))))).astype(np.float32)
    assert_as_the_reference_has_it(x, t, block, h)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_strips_with_odd_blocks(xp, rng, name):
    """Zero, NaN, infinite, tiny, huge, unchanged and barely shrunk blocks side by side with ordinary ones."""
    x = rng.standard_normal((64, 4)).astype(name)
    info = np.finfo(name)
    x[0], x[3, 1], x[5, 2] = 0, np.nan, -np.inf
    x[7], x[9] = info.tiny * 4, info.max / 8
    h = rng.uniform(0.5, 2, x.shape)
    with np.errstate(over="ignore"):
        size = np.sqrt(((h * x.astype(np.longdouble)) ** 2).sum(1))
    t = rng.uniform(0, 1.1, 64)
    for row, share in ((7, 0.5), (9, 0.25), (11, 1.0), (13, 1 - 1e-6), (15, 1 + 1e-6), (17, 1 - 1e-9), (19, 0.0)):
        t[row] = float(size[row]) * share
    t = np.where(np.isfinite(t), t, 1.0)[:, None].astype(name)
    got = xp.call(npscope.soft_threshold, x, t, (1, 4), conditioner=h)
    assert_shrunk(got, x, (1, 4), t, h)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("float32", 1),
        ("float32", 4),
        ("bfloat16", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("float32", 21), ("float16", 1), ("float16", 4), ("bfloat16", 21))
        ),
    ],
)
def test_conditioned_at_the_ends_of_an_ordinary_metric(xp, rng, name, run):
    """Where factors are found in float32: the widest of such metrics, thresholds near norms, elements of any size."""
    xp.require(name)
    blocks = 12 if run < 10 else 4
    largest = 2.0 ** (o.FORMATS[name].top - 1)
    for least, most in ((2.0**-40, 2.0**-14), (2.0**14, 2.0**40), (0.5, 2.0)):
        h = (least * (most / least) ** rng.choice([0, 1, rng.random()], (blocks, 2, run))).astype(np.float32)
        scale = largest ** rng.uniform(-1, 1, (blocks, 1, 1))
        with np.errstate(under="ignore"):
            x = (rng.standard_normal(h.shape) * scale).clip(-largest, largest).astype(dtype(name))
        x[rng.random(x.shape) < 0.1] = -0.0
        with np.errstate(over="ignore", under="ignore"):
            norms = np.sqrt(((h * x.astype(np.float64)) ** 2).sum((1, 2))).astype(np.float32)
            share = rng.choice([1e-30, 0.1, 1 - 2.0**-24, 1 + 2.0**-23], blocks)
            t = np.where(np.isfinite(norms), norms * share, 1.0).astype(np.float32)[None]
        x, h = (np.ascontiguousarray(a.transpose(1, 0, 2).reshape(2, -1)) for a in (x, h))
        got = xp.call(npscope.soft_threshold, x, t, (2, run), conditioner=h)
        assert_shrunk(got, x, (2, run), t, h)


def test_planes_hold_quick_blocks_as_a_whole():
    conditioned = pytest.importorskip("npscope.backends.numba_cpu.conditioned")
    assert not any(map(conditioned.in_parts, range(1, conditioned.secular.QUICK_ELEMENTS + 1)))
    assert conditioned.in_parts(1 << 20)


def test_ordinary_metrics_need_no_more_steps_than_they_may_take(rng, monkeypatch):
    """What is solved and written at once cannot fail: here it would, as metrics beyond do."""
    shrinkage = pytest.importorskip("npscope.backends.numba_cpu.shrinkage")
    span, steps = shrinkage.ORDINARY_SPAN, shrinkage.ORDINARY_STEPS
    monkeypatch.setattr(shrinkage, "ORDINARY_SPAN", 0.0)
    for name, size in itertools.product(("float32", "float64"), (2, 3, 8, 16)):
        shape, half = (4000, size), math.log10(span) / 2
        exponents = [rng.uniform(-half, half, shape), rng.choice([-half, half], shape), np.full(shape, -half)]
        exponents[2][:, 0] = half
        for exponent in (*exponents, -exponents[2], np.linspace(-half, half, size) * np.ones((4000, 1))):
            h = 10**exponent
            x = rng.standard_normal(shape) / h ** rng.uniform(0, 2, (4000, 1))
            norms = np.sqrt(((h * x) ** 2).sum(1, keepdims=True))
            share = 10 ** rng.uniform(-9, 0, norms.shape)
            t = norms * rng.choice([share, 1 - share])
            got = npscope.soft_threshold(x.astype(name), t.astype(name), (1, -1), conditioner=h, max_iter=steps)
            assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("names", "sizes", "max_iter"),
    [
        (("float32", "float32"), (2, 3), 15),
        (("float32", "float64", "float16"), (4, 1, 5), 20),
        (("bfloat16",) * 4, (3, 3, 3, 3), 20),
        (("float32", "float32", "float32"), (16, 33000, 4), 20),
        (("float64", "float32"), (5, 33000), 15),
    ],
)
def test_conditioned_blocks_that_span_leaves(rng, names, sizes, max_iter):
    """Also where they are too large to be dealt at once, and where they are solved before any is written."""
    rows = 40 if max(sizes) < 100 else 3
    arrays = [rng.standard_normal((rows, size)).astype(dtype(name)) for name, size in zip(names, sizes, strict=True)]
    metrics = [rng.uniform(0.5, 2, x.shape).astype(np.float32) for x in arrays]
    squares = sum(((x.astype(np.float64) * h) ** 2).sum(1) for x, h in zip(arrays, metrics, strict=True))
    t = np.sqrt(squares)[:, None] * rng.choice([0.0, 0.3, 0.9, 1.1], (rows, 1))
    results = {}
    for backend in ("reference", "numba"):
        specs = [npscope.BlockSpec(x.copy(), (1, -1)) for x in arrays]
        given = dict(zip(specs, metrics, strict=True))
        with npscope.use_backend(backend):
            npscope.BlockCoupling(specs).soft_threshold(t, given, max_iter=max_iter)
        results[backend] = [spec.data for spec in specs]
    for name, expected, got in zip(names, *results.values(), strict=True):
        if name == "float64":
            assert np.allclose(got, expected, rtol=1e-10, atol=0)
        else:
            places = [x.view(f"i{x.itemsize}").astype(np.int64) for x in (expected, got)]
            assert np.abs(places[0] - places[1]).max() <= 1


def test_work_arrays_hold_a_vector_from_any_block_on():
    """Of blocks one element wide, as many numbers are read as fill a vector, from the last block of a strip on too."""
    secular = pytest.importorskip("npscope.backends.numba_cpu.secular")
    assert secular.DISTANCE >= secular.WIDTH - 1 + secular.LANES


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_blocks_do_not_depend_on_their_neighbours(rng, name):
    """Which strip a block is in, with one that needs a closer look or without, depends on the number of threads."""
    x, h = rng.standard_normal((512, 1024)).astype(name), rng.uniform(0.5, 2, (512, 1024)).astype(np.float32)
    norms = np.sqrt(((h * x.astype(np.float64)) ** 2).reshape(512, -1, 8).sum(2))
    t = np.where(rng.random(norms.shape) < 0.01, norms * (1 - 1e-8), norms / 3)
    results = []
    for threads in (1, 2, 3, 5):
        with npscope.config(threads=threads):
            results.append(npscope.soft_threshold(x, t, (1, 8), conditioner=h))
    alone = npscope.soft_threshold(x[:3], t[:3], (1, 8), conditioner=h[:3])
    assert same_bits(alone, results[0][:3])
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("place", [0, 700, 4999])
@pytest.mark.parametrize("span", [1.0, 1e9])
def test_an_odd_block_far_into_an_array(rng, place, span):
    """One that needs a closer look, in a strip that is written after others."""
    x = rng.standard_normal((5000, 4)).astype(np.float32)
    h = np.full_like(x, span)
    h[:, 0] = 1
    t = np.full((5000, 1), 0.5, dtype=np.float32)
    t[place] = np.linalg.norm(h[place] * x[place].astype(np.float64)) * (1 - 1e-7)
    results = []
    for backend in ("reference", "numba"):
        with npscope.use_backend(backend):
            results.append(npscope.soft_threshold(x, t, (1, 4), conditioner=h))
    np.testing.assert_array_max_ulp(*results, maxulp=1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("block", [(1, 2), (1, 3), (2, 4), (1, 32)])
def test_every_number_of_16_bits_is_rounded(name, block):
    """Subnormal ones too. The factor is one whose products lie apart from ties, in float32 as well."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype(name))
    x = np.resize(np.where(np.isfinite(x.astype(np.float32)), x, x[:1]), (192, 384))
    h = np.ones_like(x)
    results = []
    for backend in ("reference", "numba"):
        with npscope.use_backend(backend):
            norms = npscope.block_norms(x, block)
            with np.errstate(over="ignore"):
                results.append(npscope.soft_threshold(x, norms * np.float32(0.123456), block, conditioner=h))
    assert same_bits(*results)


@pytest.mark.parametrize("rtol", [1e-15, 1e-9, 1e-6, 1e-3])
def test_the_iteration_ends_within_its_tolerance(xp, rng, rtol):
    """The last step tells how far the root is, so that no step is spent to see the next one vanish."""
    x, h = rng.standard_normal((500, 6)), 10 ** rng.uniform(-2, 2, (500, 6))
    t = rng.uniform(0.05, 0.95, (500, 1)) * np.sqrt(((h * x) ** 2).sum(1, keepdims=True))
    exact = xp.call(npscope.soft_threshold, x, t, (1, -1), conditioner=h, rtol=1e-16, max_iter=60)
    got = xp.call(npscope.soft_threshold, x, t, (1, -1), conditioner=h, rtol=rtol, max_iter=60)
    np.testing.assert_allclose(got, exact, rtol=max(rtol, 1e-12))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "int16"])
@pytest.mark.parametrize("block", [(1, 4), (1, 3), (4, 4), (1, 1024)])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_conditioner_out_of_range_is_found_wherever_it_is(backend, rng, name, block, place):
    """Also where its blocks do not fill a vector, and in what is read without its sign for anything else."""
    x = rng.standard_normal((block[0] * 5, block[1] * 7)).astype(np.float32)
    before = x.copy()
    for bad in (0.0, -1.0, math.nan, math.inf) if name != "int16" else (0, -1):
        h = np.ones(x.shape).astype(dtype(name))
        h[(0, 0) if place == "first" else (-1, -1)] = bad
        with pytest.raises(npscope.SpecError, match="conditioner"):
            npscope.soft_threshold(x, 0.5, block, conditioner=h, out=x)
        assert same_bits(x, before)


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1.0, 1e20, 1e36])
@pytest.mark.parametrize("weight", [1e-37, 1e-12, 1e12, 1e37])
def test_float32_of_any_size_in_metrics_of_any_size(rng, size, weight):
    """Where the first steps, in float32, leave its range, those that follow find the root as well."""
    x = (rng.standard_normal((37, 8)) * size).astype(np.float32)
    h = (10 ** rng.uniform(-1, 1, x.shape) * weight).astype(np.float32)
    norms = np.sqrt((np.longdouble(h) ** 2 * np.longdouble(x) ** 2).sum(1, keepdims=True))
    t = np.clip((norms * rng.choice([1e-3, 0.3, 0.9, 1 - 1e-6, 1.1], (37, 1))).astype(np.float64), 0, 3e38)
    results = []
    for backend in ("reference", "numba"):
        with npscope.use_backend(backend):
            results.append(npscope.soft_threshold(x, t, (1, 8), conditioner=h))
    assert np.array_equal(results[0] == 0, results[1] == 0)
    np.testing.assert_array_max_ulp(*results, maxulp=1)


def test_one_step_suffices_where_the_metric_is_the_same_everywhere(xp, rng):
    x = rng.standard_normal((40, 6)).astype(np.float32)
    h = np.full_like(x, 0.5)
    got = xp.call(npscope.soft_threshold, x, 0.5, (1, 3), conditioner=h, max_iter=1)
    np.testing.assert_allclose(got, xp.call(npscope.soft_threshold, x, 1.0, (1, 3)), rtol=1e-6)


@pytest.mark.parametrize(("largest", "smallest"), [(136, -143), (143, -143), (149, -149)])
def test_small_elements_that_weigh_as_much_as_the_largest(xp, rng, largest, smallest):
    """What is done against the overflow of large elements must not lose small ones, of large weights."""
    powers = np.concatenate([[largest], rng.uniform(smallest, smallest + 10, 3), rng.uniform(-largest, largest, 3)])
    x = 10.0 ** (powers + rng.uniform(-1, 1, (8, 7)))
    h = 10.0 ** np.clip(rng.uniform(-1, 1, x.shape) - powers, -149, 149)
    shares = rng.choice([1e-9, 0.01, 0.5, 0.99], 8).tolist()
    t, expected = [], []
    for v, w, share in zip(x.tolist(), h.tolist(), shares, strict=True):
        with mpmath.workprec(200):
            t.append([share * float(mpmath.norm([mpmath.mpf(a) * b for a, b in zip(v, w, strict=True)]))])
        factors = o.shrink_factors(v, t[-1][0], "float64", w)
        expected.append([float(Fraction(a) * factor) for a, factor in zip(v, factors, strict=True)])
    got = xp.call(npscope.soft_threshold, x, np.asarray(t), (1, 7), conditioner=h, max_iter=200)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=5e-324)


@pytest.mark.parametrize(
    ("x", "h", "t"),
    [
        ([1e-165, 1e140, 1e145], [1e150, 1e-140, 1e-145], 1.3),  # one element is most of the mean of the metric
        ([1e-165, 1e140, 1e145], [1e150, 1e-140, 1e-145], 1.1),
        ([1.55e-170, -2.84e135, 3.37e150], [1e150, 4.23e-135, 1e-150], 1.0),
        ([1e120, 1.0], [1e-150, 1e150], 1e-140),  # the norm overflows where the search begins
        ([1e-150, 1e-45, 5e44], [1e150, 1e44, 1e-150], 1e-105),
    ],
)
def test_a_step_beyond_the_root_is_not_the_last(xp, x, h, t):
    _assert_shrunk_as_exactly(xp, x, h, t)


@pytest.mark.parametrize(
    ("x", "h", "t"),
    [
        ([-5.6e-135, 2.6e-165, 1.32140297e-314], [1e-150, 1e-150, 1e150], 1.3214029702211436e-164),
        ([5.37e-313, 9.1e-53, 2.33e-312], [1.5e149, 8.7e-111, 1e150], 1.233e-162),
    ],
)
def test_subnormal_elements_that_weigh_most_beside_larger_ones(xp, x, h, t):
    """The root of the secular equation is in proportion to them, and must not be subnormal itself."""
    _assert_shrunk_as_exactly(xp, x, h, t)


def test_a_subnormal_number_that_is_all_of_its_shift_becomes_plus_zero(xp):
    """Although it weighs more than its threshold: t / h is rounded to it."""
    x, h, t = np.asarray([[-5e-324, 5e-324]]), np.full((1, 2), 3.1557258317119493e65), 1.559135565229097e-258
    assert (h * np.abs(x) > t).all()
    got = xp.call(npscope.soft_threshold, x, t, (1, 1), conditioner=h)
    assert same_bits(got, np.zeros((1, 2)))


def _assert_shrunk_as_exactly(xp, x, h, t):
    expected = [float(Fraction(a) * factor) for a, factor in zip(x, o.shrink_factors(x, t, "float64", h), strict=True)]
    got = xp.call(npscope.soft_threshold, np.asarray([x]), t, (1, len(x)), conditioner=np.asarray([h]))
    np.testing.assert_allclose(got[0], expected, rtol=1e-11, atol=5e-324)


@pytest.mark.parametrize("size", [1e-150, 1e-120, 1e-110, 1.0, 1e110, 1e150])
def test_metrics_whose_third_power_leaves_float64(xp, size):
    got = xp.call(
        npscope.soft_threshold, np.ones((1, 2)), 0.3 * 2**0.5 * size, (1, 2), conditioner=np.full((1, 2), size)
    )
    np.testing.assert_allclose(got, 0.7, rtol=1e-12)


def test_complex_norms_decide_as_rounded_in_a_metric_as_without(xp):
    xp.require("complex64")
    x = np.asarray([[1, 2e-4], [1, 2e-3]], dtype=np.complex64)
    assert np.array_equal(xp.call(npscope.block_norms, x, (1, 2)) <= 1, [[True], [False]])
    for metric in ({}, {"conditioner": np.ones((2, 2), np.float32)}):
        got = xp.call(npscope.soft_threshold, x, np.float32(1), (1, 2), **metric)
        assert np.array_equal(got == 0, [[True, True], [False, False]])


def test_a_norm_that_is_subnormal_decides_as_rounded(xp):
    x, h = np.full((1, 2), 2.0**-23 * 0.72, dtype=np.float32), np.full((1, 2), 2.0**-126, dtype=np.float32)
    got = xp.call(npscope.soft_threshold, x, np.float32(2.0**-149), (1, 2), conditioner=h)
    assert same_bits(got, np.zeros_like(x))


def test_a_bad_conditioner_is_told_before_an_iteration_that_does_not_end(backend, rng):
    x = np.tile(rng.standard_normal((1, 8)), (1000, 1)).astype(np.float32)
    h = np.tile(np.asarray([1e-3, 1, 10, 1e3, 1, 1, 1, 1], dtype=np.float32), (1000, 1))
    with pytest.raises(npscope.ConvergenceError):
        npscope.soft_threshold(x, 0.5, (1, 8), conditioner=h, max_iter=1)
    h[-1, 0] = -1
    with pytest.raises(npscope.SpecError, match="conditioner"):
        npscope.soft_threshold(x, 0.5, (1, 8), conditioner=h, max_iter=1)
