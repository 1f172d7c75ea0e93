"""The oracles themselves, against NumPy on data so easy that NumPy is exact or by worked examples."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import oracles as o
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, dtype, layouts, place


@pytest.mark.parametrize("name", FLOATS)
@given(value=st.floats(-1e5, 1e5))
def test_rounding_is_that_of_the_dtype(name, value):
    with np.errstate(over="ignore"):
        expected = float(np.float64(value).astype(dtype(name)))
    got = o.rounded(Fraction(value), name)
    if name == "float8_e4m3fn":  # no infinity, and a top exponent that ends early: compared below it only
        expected, got = (x if abs(x) <= 448 else math.copysign(1, value) for x in (expected, got))
        if abs(value) > 448:
            return
    assert got == expected


@given(p=st.integers(0, 10**30), q=st.integers(1, 10**20))
def test_root_of_squares_is_exact_and_others_are_close(p, q):
    value = Fraction(p, q)
    assert abs(o.root(value * value) - value) <= Fraction(1, 2**1200)
    assert abs(o.root(value) ** 2 - value) <= Fraction(p + 1, 2**1100)
    assert o.root(Fraction(p * p, 4**20)) == Fraction(p, 2**20)


@pytest.mark.parametrize("ord", [1, 2, 3, 0.5, math.inf])
def test_norms_of_easy_numbers(ord):
    x = np.asarray([[3.0, -4.0], [0.0, 12.0]])
    flat = x.ravel()
    assert o.norm(list(flat), ord, "float64") == pytest.approx(
        np.linalg.norm(flat, ord) if ord >= 1 else (np.sqrt(abs(flat)).sum()) ** 2
    )


def test_norm_of_nan_and_inf():
    assert math.isnan(o.norm([math.inf, math.nan], 2, "float32"))
    assert o.norm([-math.inf, 1.0], 1, "float32") == math.inf
    assert o.norm([3e38, 3e38], 2, "float32") == math.inf
    assert o.norm([complex(3, 4)], 2, "float32") == 5


def test_ranking_puts_nan_first_and_ties_by_position():
    assert o.ranking([1.0, math.nan, 2.0, 2.0, math.inf, math.nan, -0.0, 0.0]) == [1, 5, 4, 2, 3, 0, 6, 7]


def test_keep_largest_two_of_four():
    x = np.asarray([[1.0, -4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert o.keep_largest(o.one(x, (1, 1), (1, 4)), 2)[0][0].tolist() == [[0, -4, 3, 0, 5, 5, 0, 0]]


def test_orders_are_those_of_transpose():
    x = np.arange(24.0).reshape(2, 3, 4)
    part = o.Part([o.Leaf(x, (1, 1, 1), (2, 0, 1))], (1, 1, 1))
    assert o.block_grid(part) == (4, 2, 3)
    aligned = x.transpose(2, 0, 1)
    for index in o.indices((4, 2, 3)):
        assert o.elements([part], o.block_at(0, part, index)) == [aligned[index]]


def test_coupled_parts_stand_side_by_side():
    a, b = np.asarray([[1.0, 2.0]]), np.asarray([[3.0], [4.0]])
    parts = [o.Part([o.Leaf(a, (1, 1))], (1, 1), (1, 0)), o.Part([o.Leaf(b, (1, 1))], (1, 1))]
    assert o.scope_norms(parts).tolist() == [[[1, 3]], [[2, 4]]]
    assert [r.tolist() for p in o.keep_largest(parts, 1) for r in p] == [[[0, 0]], [[3], [4]]]


def test_joint_norm_of_coupled_arrays():
    a, b = np.asarray([3.0, 0.0]), np.asarray([4.0, 1.0])
    assert o.scope_norms([o.Part([o.Leaf(a, (1,)), o.Leaf(b, (1,))], (-1,))]).tolist() == [[5, 1]]


@given(st.data())
def test_placed_windows_hold_the_data(data):
    x = np.arange(24.0).reshape(2, 3, 4)
    placed = place(x, data.draw(layouts(3)), fill=-1)
    assert (placed.view == x).all()
    assert np.shares_memory(placed.view, placed.base)
    assert (placed.base[~placed.visited] == -1).all()
    assert placed.visited.sum() == 24


@pytest.mark.parametrize("h", [[1.0, 1.0], [0.5, 4.0], [1e-3, 1e3]])
def test_conditioned_factors_minimise_the_objective(h):
    v, t = [3.0, -4.0], 0.25
    factors = o.shrink_factors(v, t, "float64", h)
    x = [float(f) * a for f, a in zip(factors, v, strict=True)]
    best = o.objective(x, v, t, h)
    for i in (0, 1):
        for step in (1e-4, -1e-4):
            moved = list(x)
            moved[i] += step
            assert o.objective(moved, v, t, h) > best


def test_plain_factors():
    assert o.shrink_factors([3.0, 4.0], 1.0, "float32") == [Fraction(4, 5)] * 2
    assert o.shrink_factors([3.0, 4.0], 5.0, "float32") == [0, 0]
    assert o.shrink_factors([3.0, math.nan], 5.0, "float32") is None
