"""Norms: correctly rounded below float64, within 4 ulp elsewhere, no overflow or underflow on the way."""

from __future__ import annotations

import importlib
import math
from fractions import Fraction
from functools import partial

import numpy as np
import oracles as o
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALL_DTYPES, EXACT_DTYPES, FINITE, ORDS, dtype, hostile, problems, same_bits
from timing import quickest

import npscope
from npscope.block import sum_squares

pytestmark = pytest.mark.usefixtures("small_as_large")


def assert_within(got: np.ndarray, x: np.ndarray, block: tuple[int, ...], ord: float, limit: float) -> None:
    part = o.one(x, block)[0]
    assert got.shape == o.block_grid(part)
    assert got.dtype.name == o.norm_dtype(x.dtype)
    for index in o.indices(got.shape):
        values = o.elements([part], o.block_at(0, part, index))
        assert o.ulps(float(got[index]), o.exact_norm(values, ord), got.dtype.name) <= limit


@given(data=st.data(), ord=st.sampled_from(ORDS))
def test_correctly_rounded_below_float64(xp, data, ord):
    p = data.draw(problems([n for n in EXACT_DTYPES if n in xp.dtypes]))
    got = xp.call(npscope.block_norms, p.x, p.block, ord=ord)
    assert same_bits(np.where(np.isnan(got), np.float32(np.nan), got), o.block_norms(p.x, p.block, ord))


@given(data=st.data(), ord=st.sampled_from(ORDS))
def test_within_4_ulp_in_float64_and_complex(xp, data, ord):
    p = data.draw(problems([n for n in ALL_DTYPES if n not in EXACT_DTYPES and n in xp.dtypes], kinds=FINITE))
    assert_within(xp.call(npscope.block_norms, p.x, p.block, ord=ord), p.x, p.block, ord, 4)


@given(data=st.data(), ord=st.sampled_from([0.1, 0.5, 1.5, 3, 10.0, np.float32(2.5)]))
def test_within_4_ulp_for_other_orders(xp, data, ord):
    names = [n for n in ("float16", "float32", "float64", "complex64", "int32") if n in xp.dtypes]
    p = data.draw(problems(names, kinds=FINITE, max_axes=3))
    assert_within(xp.call(npscope.block_norms, p.x, p.block, ord=ord), p.x, p.block, float(ord), 4)


@given(data=st.data(), ord=st.sampled_from([1, 2, math.inf, 3.0]))
def test_nan_and_inf_blocks(xp, data, ord):
    p = data.draw(problems(xp.dtypes, kinds=("nan_payloads", "infinities"), max_axes=2))
    got, expected = xp.call(npscope.block_norms, p.x, p.block, ord=ord), o.block_norms(p.x, p.block, ord)
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert np.array_equal(np.isinf(got), np.isinf(expected))


# --- blocks built so that float64 sums cannot tell the side of a midpoint -------------------------


def significant(n: int, bits: int) -> int:
    """`n` cut to its leading `bits` bits."""
    return n >> (n.bit_length() - bits) << (n.bit_length() - bits) if n.bit_length() > bits else n


def as_sum(total: int, power: int, bits: int) -> list[int]:
    """Integers of at most `bits` bits whose `power`-th powers add up to `total`: greedy, at most a dozen or so."""
    terms = []
    while total:
        term = significant(math.isqrt(total) if power == 2 else total, bits)
        terms.append(term)
        total -= term**power
    return terms


def near_midpoints(
    rng: np.random.Generator, power: int, bits: int, count: int = 60
) -> tuple[list[list[int]], list[int]]:
    """(terms, side): blocks whose norm is (side 0), or is just above or below (+-1), a 25-bit odd midpoint."""
    blocks, sides = [], []
    for _ in range(count):
        middle = 2 * int(rng.integers(2**23, 2**24)) + 1
        for shift in (0, 20, 45):
            for side in (-1, 0, 1):
                blocks.append(as_sum((middle << shift) ** power + side, power, bits))
                sides.append(side)
    return blocks, sides


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("ord", [1, 2])
@pytest.mark.parametrize("scale", [-100, -30, 0, 20])
def test_one_unit_from_a_midpoint(xp, rng, name, ord, scale):
    xp.require(name)
    blocks, sides = near_midpoints(rng, ord, 24 if name == "float32" else 8)
    length = max(map(len, blocks))
    rows = np.zeros((len(blocks), length))
    for row, terms in zip(rows, blocks, strict=True):
        row[: len(terms)] = terms
        rng.shuffle(row)
    x = (np.ldexp(rows, scale) * rng.choice([1.0, -1.0], rows.shape)).astype(dtype(name))
    assert np.array_equal(np.abs(x).astype(np.float64), np.ldexp(rows, scale)), "the block must be exact"
    got = xp.call(npscope.block_norms, x, (1, -1), ord=ord)[:, 0]
    assert same_bits(got, o.block_norms(x, (1, -1), ord)[:, 0])
    below = np.asarray(sides) == -1
    assert (got[below] < got[np.asarray(sides) == 1]).all(), "the two sides of a midpoint must differ"


def scattered(rng: np.random.Generator, total: int, power: int, pieces: int) -> list[int]:
    """As `as_sum`, first of so many terms of any size."""
    terms = []
    for _ in range(pieces):
        size = int(rng.integers(1, total.bit_length() // power))
        term = int(rng.integers(1, 2 ** min(24, size))) << max(0, size - 24)
        if term**power < total:
            terms.append(term)
            total -= term**power
    return terms + as_sum(total, power, 24)


@pytest.mark.parametrize("block", [(1, 96), (16, 6), (96, 1)])
@pytest.mark.parametrize("ord", [1, 2])
def test_sums_of_numbers_of_any_size_beside_a_midpoint(backend, rng, block, ord):
    """A sum of many numbers, from the largest to the smallest, is a midpoint, or one unit of the smallest off it."""
    rows = np.zeros((180, 96), dtype=np.float32)
    for i, row in enumerate(rows):
        middle, shift = 2 * int(rng.integers(2**23, 2**24)) + 1, int(rng.integers(100, 240))
        terms = scattered(rng, (middle << shift) ** ord + i % 3 - 1, ord, int(rng.integers(1, 50)))
        row[: len(terms)] = np.ldexp(np.asarray(terms, dtype=np.float64), -149 if i % 2 else max(100 - shift, -149))
        rng.shuffle(row)
    x = rows.reshape(12, 15, *block).swapaxes(1, 2).reshape(12 * block[0], 15 * block[1])
    expected = np.asarray([o.norm(row.tolist(), ord, "float32") for row in rows], dtype=np.float32)
    assert same_bits(npscope.block_norms(x, block, ord=ord).reshape(-1), expected)


BLOCKS = [
    (1, 2),
    (1, 4),
    (2, 2),
    (4, 4),
    (8, 1),
    (16, 1),
    (1, 8),
    (1, 12),
    (1, 16),
    (3, 24),
    (16, 16),
    (1, 96),
    (2, 288),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("exponent", [-149, -140, -60, 0, 90])
def test_exact_sums_round_to_even(backend, rng, block, exponent):
    """Sums of few bits, of which many are midpoints: float64 holds them, and float32 must round them to even."""
    shape = (48, 576)
    for bits in (3, 12, 21, 24):
        whole = rng.integers(-(2**bits) + 1, 2**bits, shape)
        x = np.ldexp(whole.astype(np.float64), exponent).astype(np.float32)
        sums = np.abs(whole).reshape(shape[0] // block[0], block[0], -1, block[1]).sum(axis=(1, 3))
        expected = np.ldexp(sums.astype(np.float64), exponent).astype(np.float32)
        for layout in (np.ascontiguousarray(x), np.asfortranarray(x)):
            assert same_bits(npscope.block_norms(layout, block, ord=1), expected)


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (16, 1), (1, 16), (1, 96)])
@pytest.mark.parametrize("crumb", [0.0, 2.0**-149, 2.0**-100, 2.0**-40, 2.0**-29])
def test_a_crumb_beside_a_midpoint(backend, rng, block, crumb):
    """A midpoint of two float32 is a tie; with any more it is not, and a neighbour of any size changes nothing."""
    grid = (96 // block[0], 96 // block[1])
    middle = 2 * rng.integers(2**23, 2**24, grid) + 1
    tiles = np.zeros((*grid, *block), dtype=np.float64).reshape(*grid, -1)
    tiles[..., 0], tiles[..., 1], tiles[..., 2] = middle // 2, middle - middle // 2 - 3, 3
    up = rng.random(grid) < 0.5
    tiles[..., 3] = np.where(up, crumb, 0)
    lone = rng.random(grid) < 0.05  # blocks of the widest spread, whose sums are nowhere near a midpoint
    tiles[lone] = 0
    tiles[lone, 0], tiles[lone, 1] = 2.0**127, 2.0**-149
    rng.permuted(tiles, axis=-1, out=tiles)
    x = tiles.reshape(*grid, *block).swapaxes(1, 2).reshape(96, 96).astype(np.float32)
    got = npscope.block_norms(x, block, ord=1)
    even = middle // 2 + middle // 2 % 2
    expected = np.where(up & (crumb > 0), middle // 2 + 1, even).astype(np.float64) * 2
    assert same_bits(got, np.where(lone, 2.0**127, expected).astype(np.float32))


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (4, 1), (1, 16), (1, 24), (1, 65)])
@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ((15220311, 7064000, 2.0**-20, 0), 16779690),  # just above 16779689, which would be rounded down
        ((15039002, 7442207, 31718 / 64, 121819 / 64), 16779690),  # just below 16779691, which would be rounded up
    ],
)
def test_a_single_block_beside_a_midpoint(backend, block, terms, expected):
    """Whichever it is of those that are measured together, and though all others are sure."""
    for column in range(32):
        x = np.ones((3, block[0], 32, block[1]), dtype=np.float32)
        x[1, :, column] = np.resize([*terms, *[0] * (math.prod(block) - 4)], block)
        norms = npscope.block_norms(x.reshape(3 * block[0], 32 * block[1]), block)
        assert norms[1, column] == expected


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ord", [1, 2])
@pytest.mark.parametrize("block", [(1, 4), (4, 1), (1, 3), (4, 4), (1, 16), (2, 17), (16, 1), (1, 64)])
def test_sums_that_float64_rounds_across_a_midpoint(backend, rng, block, ord):
    """The last element brings the norm within a few units of float64 of a midpoint: what is off in a sum matters."""
    n, rows = math.prod(block), []
    while len(rows) < 200:
        middle = 2 * int(rng.integers(2**23, 2**24)) + 1
        terms = rng.random(n - 1) * 2.0 ** -rng.integers(0, 2 * 16 // ord, n - 1)
        whole = float(middle) ** ord
        terms *= whole * (1 - 2.0 ** -rng.integers(1, 28)) / terms.sum()
        given = (terms ** (1 / ord)).astype(np.float32)
        left = Fraction(middle) ** ord - sum(Fraction(float(x)) ** ord for x in given)
        if left > 0:
            rows.append(rng.permutation(np.append(given, np.float32(float(left) ** (1 / ord)))))
    x = np.asarray(rows).reshape(-1, 20, *block).swapaxes(1, 2).reshape(-1, 20 * block[1])
    expected = np.asarray([o.norm(row.tolist(), ord, "float32") for row in rows], dtype=np.float32)
    assert same_bits(npscope.block_norms(x, block, ord=ord).reshape(-1), expected)


@pytest.mark.parametrize("ord", [1, 2])
@pytest.mark.parametrize("block", [(1, 4), (4, 4), (1, 16), (3, 3)])
def test_any_spread_of_exponents(backend, rng, block, ord):
    shape = (24, 48)
    for low, high in ((-149, 104), (-149, -140), (-52, 7), (77, 104), (-100, -80)):
        whole = rng.integers(1, 2**24, shape) * rng.integers(0, 2, shape) * rng.choice([-1, 1], shape)
        with np.errstate(under="ignore", over="ignore"):
            x = np.ldexp(whole.astype(np.float64), rng.integers(low, high + 1, shape)).astype(np.float32)
        assert same_bits(npscope.block_norms(x, block, ord=ord), o.block_norms(x, block, ord))


@pytest.mark.parametrize("unit", [2.0**-149, 2.0**-140])
def test_one_unit_from_a_subnormal_midpoint(xp, rng, unit):
    """sqrt(k * (k + 1)) lies just below k + 1/2, sqrt(k * (k + 1) + 1) above it."""
    k = rng.integers(1, 2**22, 100).tolist()
    blocks = [as_sum(n * (n + 1) + side, 2, 24) for n in k for side in (0, 1)]
    rows = np.zeros((len(blocks), max(map(len, blocks))))
    for row, terms in zip(rows, blocks, strict=True):
        row[: len(terms)] = terms
    x = (rows * unit).astype(np.float32)
    got = xp.call(npscope.block_norms, x, (1, -1))[:, 0]
    assert same_bits(got, o.block_norms(x, (1, -1))[:, 0])
    if unit == 2.0**-149:
        assert np.array_equal(
            got.reshape(-1, 2), np.stack([k, np.asarray(k) + 1], 1).astype(np.float32) * np.float32(unit)
        )


MAX = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([MAX, 2.0**103], math.inf),  # the midpoint between the largest number and 2**128 goes to the even side
        ([MAX, 2.0**103 * (1 - 2.0**-24)], MAX),
        ([MAX, 2.0**102, 2.0**102, -(2.0**-149)], math.inf),
        ([MAX, MAX], math.inf),
        ([MAX, 2.0**100], MAX),
        ([1.0, 2.0**-24], 1.0),
        ([1.0, 2.0**-24, 2.0**-149], 1 + 2.0**-23),
        ([1 + 2.0**-23, 2.0**-24], 1 + 2.0**-22),
        ([1.0, *(2.0**-24 * (1 - 2.0**-24) * 2.0 ** (-24 * i) for i in range(4))], 1.0),
        ([2.0**-149] * 3, 3 * 2.0**-149),
    ],
)
def test_worked_sums(xp, terms, expected):
    x = np.asarray([terms, terms[::-1]], dtype=np.float32)
    assert xp.call(npscope.block_norms, x, (1, -1), ord=1).tolist() == [[expected], [expected]]


@pytest.mark.parametrize("length", [5003, 70_000])
@pytest.mark.parametrize("ord", [1, 2])
def test_long_blocks(backend, rng, length, ord):
    """A block longer than any piece of work, with a tie at stake: 2**-24 relative to the rest."""
    x = rng.standard_normal((2, length)).astype(np.float32)
    x[1] = 0
    x[1, [0, length // 2, -1]] = [1.0, 2.0**-24, 2.0**-149]
    assert same_bits(npscope.block_norms(x, (1, -1), ord=ord), o.block_norms(x, (1, -1), ord))


@pytest.mark.parametrize("name", [">f4", ">f8"])
@pytest.mark.parametrize("ord", [1, 2, math.inf, 3.0])
def test_blocks_larger_than_a_piece(monkeypatch, rng, name, ord):
    """Are cut at the same elements whatever the number of threads, and their sums joined."""
    pytest.importorskip("numba")
    monkeypatch.setattr(importlib.import_module("npscope.backends.numba_cpu.norms"), "PIECE_ELEMENTS", 1 << 10)
    x = rng.standard_normal((2, 1 << 20)).astype(name)
    x[0, 5] = 2.0**40
    found = []
    for threads in (1, 2, 3):
        with npscope.use_backend("numba"), npscope.config(threads=threads):
            found.append(npscope.block_norms(x, (1, -1), ord=ord))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
    size = np.abs(x.astype(np.longdouble))
    expected = size.max(axis=1) if ord == math.inf else (size**ord).sum(axis=1) ** (1 / np.longdouble(ord))
    np.testing.assert_allclose(
        found[0][:, 0].astype(np.longdouble), expected, rtol=2.0 ** (-24 if name == ">f4" else -50)
    )
    x[1, -1] = np.nan
    with npscope.use_backend("numba"):
        assert np.isnan(npscope.block_norms(x, (1, -1), ord=ord)[:, 0]).tolist() == [False, True]


# --- range, dtypes, exact cases -------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "complex64", "complex128"])
@pytest.mark.parametrize("ord", [1, 2, 3.0])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.45, 0.55, 0.9, 0.97])
def test_no_overflow_or_underflow_on_the_way(xp, name, ord, fraction):
    xp.require(name)
    form = o.FORMATS[name]
    exponent = round(form.lowest + 2 + fraction * (form.top - form.lowest - 4))
    x = np.ldexp(np.asarray([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), min(exponent, form.top - 5)).astype(
        dtype(name)
    )
    assert_within(xp.call(npscope.block_norms, x, (1, 3), ord=ord), x, (1, 3), ord, 4)


@pytest.mark.parametrize("ord", [5e-324, 1e-310, 1e-300, 1e-20])
@pytest.mark.parametrize("name", ["float64", "float32", "complex128", "int64"])
def test_tiny_orders(xp, name, ord):
    """(a**p + b**p)**(1 / p) is beyond every format as soon as two numbers are not zero; one alone is itself."""
    xp.require(name)
    x = np.asarray([[3, 2, 0], [1, 1, 1], [0, -5, 0], [0, 0, 0], [1, 0, -1]]).astype(name)
    got = xp.call(npscope.block_norms, x, (1, 3), ord=ord)[:, 0]
    assert got.tolist() == [math.inf, math.inf, 5, 0, math.inf]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ord", [1, 2, math.inf, 3, 0.5])
def test_one_element_is_its_magnitude(xp, any_dtype, ord):
    xp.require(any_dtype.name)
    x = hostile("normal", (40,), any_dtype.name, 3)
    x = np.concatenate([x, hostile("near_overflow", (20,), any_dtype.name, 4)])
    got = xp.call(npscope.block_norms, x, (1,), ord=ord)
    expected = [o.rounded(o.root(o.square(o.number(v))), got.dtype.name) for v in x]
    if any_dtype.kind == "c":
        assert all(o.ulps(g, o.root(o.square(o.number(v))), got.dtype.name) <= 4 for g, v in zip(got, x, strict=True))
    else:
        assert got.tolist() == expected


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [n for n in ALL_DTYPES if n.startswith(("int", "uint"))])
def test_extreme_integers(xp, name):
    xp.require(name)
    info = np.iinfo(name)
    x = np.asarray([[info.min, info.min], [info.max, info.max], [info.min, info.max]], dtype=name)
    for ord in ORDS:
        assert_within(xp.call(npscope.block_norms, x, (1, 2), ord=ord), x, (1, 2), ord, 4)


def test_norm_dtype(xp, any_dtype):
    xp.require(any_dtype.name)
    got = xp.call(npscope.block_norms, np.ones((2, 4), dtype=any_dtype), (1, 2))
    assert got.dtype.name == o.norm_dtype(any_dtype)


def test_zero_norms_are_positive(xp):
    got = xp.call(npscope.block_norms, np.full((2, 4), -0.0, dtype=np.float32), (1, 2))
    assert not np.signbit(got).any()
    assert not np.signbit(xp.call(npscope.block_norms, np.full(3, -0.0), (1,))).any()


def test_float32_is_summed_wider(xp):
    x = np.asarray([[1e30, 1e30, 1e30], [1e-30, 1e-30, 1e-30]], dtype=np.float32)
    got = xp.call(npscope.block_norms, x, (1, 3))
    assert got[0, 0] == np.float32(math.sqrt(3) * float(np.float32(1e30)))
    assert 0 < got[1, 0] < got[0, 0]
    assert Fraction(float(got[1, 0])) == Fraction(o.norm([float(x[1, 0])] * 3, 2, "float32"))


@pytest.mark.parametrize("ord", [1, 2, 3.0])
@pytest.mark.parametrize("name", ["float64", "complex64", "int64", "float32"])
def test_zeros_are_not_slow(name, ord):
    """Blocks of zeros need no rescaling: their norms take about the time of any others, not one call a block."""
    seconds = []
    for x in (hostile("normal", (2**16, 4), name, 12), np.zeros((2**16, 4), dtype=name)):
        seconds.append(quickest(partial(npscope.namespace("numba").block_norms, x, (1, 4), ord=ord)))
    assert seconds[1] < 20 * seconds[0] + 0.02


@pytest.mark.parametrize("block", [(1, 4), (4, 4), (3, 3), (16, 1)])
@pytest.mark.parametrize("case", ["ord 1", "ord 2", "large", "small"])
def test_blocks_that_take_a_closer_look_are_not_slow(rng, block, case):
    """All beside a midpoint of float32, or float64 whose squares leave its range: not one call a block."""
    x = rng.standard_normal((512 * block[0], 512 * block[1]))
    if case.startswith("ord"):
        x = x.astype(np.float32)
        # 5 * (2**22 + 1) and 2**24 + 1 have 25 bits; a float64 does not tell either from what a crumb makes of it.
        terms = [2.0**24, 1, 2.0**-40] if case == "ord 1" else [3 * (2**22 + 1), 4 * (2**22 + 1), 2.0**-30]
        tile = np.resize([*terms, *[0.0] * 13], block)
        closer = np.tile(tile, (512, 512)).astype(np.float32)
    else:
        closer = x * (1e200 if case == "large" else 1e-200)
    seconds = []
    for values in (x, closer):
        norms = partial(npscope.namespace("numba").block_norms, values, block, ord=1 if case == "ord 1" else 2)
        seconds.append(quickest(norms))
    assert seconds[1] < 10 * seconds[0]


def test_normal_blocks_with_long_runs_take_no_closer_look(rng):
    """Also where they are fewer than what is measured together: flags of others mean nothing."""
    x, seconds = rng.standard_normal((1 << 10, 1 << 11)), []
    for ord in (1, 2):
        norms = partial(npscope.namespace("numba").block_norms, x, (1, 1 << 11), ord=ord)
        seconds.append(quickest(norms))
    assert seconds[1] < 4 * seconds[0]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("block", [(1, 96), (4, 24), (32, 3)])
def test_norms_whose_squares_are_just_infinite(backend, block, step):
    """The sum of the squares is finite before what was lost of it is added, and not after."""
    x = np.full((4 * block[0], 8 * block[1] * step), 1.3684286665667228e153)[:, ::step]
    np.testing.assert_allclose(npscope.block_norms(x, block), 1.34078079299425982e154, rtol=1e-15)


@pytest.mark.sampled(3)
def test_sums_of_squares(xp, any_dtype):
    xp.require(any_dtype.name)
    x = hostile("normal", (6, 40), any_dtype.name, 5)
    for window in (x, x[:, 1::3], x.T):
        part = window.astype(np.complex128) if window.dtype.kind == "c" else window.astype(np.float64)
        expected = math.fsum(abs(value) ** 2 for value in part.ravel().tolist())
        assert sum_squares(xp.asarray(window)) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(sum_squares(xp.asarray(np.asarray([1.0, np.nan, 2.0]))))


def test_sums_of_squares_do_not_depend_on_the_threads(rng):
    x = rng.standard_normal(1 << 21)
    found = set()
    for threads in (1, 2, 3, 5):
        with npscope.config(threads=threads):
            found |= {sum_squares(x) for _ in range(3)}
    assert len(found) == 1


@pytest.mark.parametrize("block", [(1, 4), (3, 5), (1, 20), (40, 1), (16, 32), (1, 600)])
def test_zero_and_tiny_blocks_of_float64(block):
    """A block whose squares are zero is measured again, and one that is zero is not taken for it."""
    x = np.random.default_rng(2).standard_normal((40 * block[0], 30 * block[1]))
    blocks = x.reshape(40, block[0], 30, block[1])
    blocks[3::2, :, ::3] = 0
    for tiny in (None, 3e-200, 5e-324):
        if tiny is not None:
            blocks[5::7, -1, ::3, -1] = tiny
            blocks[6, 0, 4, 0] = -tiny
        norms = npscope.block_norms(x, block)
        expected = np.sqrt(np.einsum("arbc->ab", (blocks * 1e150) ** 2)) / 1e150 if tiny != 5e-324 else None
        if expected is not None:
            np.testing.assert_allclose(norms, expected, rtol=1e-14)
        largest = np.abs(blocks).max(axis=(1, 3))
        assert ((norms == 0) == (largest == 0)).all()
        assert (norms >= largest).all()
