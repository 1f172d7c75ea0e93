"""Thresholds and multipliers that lie in the array being written are those of before the call, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Library
from strategies import same_bits

import npscope
from npscope import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec

sizes = pytest.mark.parametrize("size", [64, 256])
"""Small problems of the CuPy backend, and what is too large to be one."""

Method = Callable[[list[BlockSpec], Any], None]


def softened(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.where(x <= t, np.float32(0), x - t)


def dropped(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.where(x < t, np.float32(0), x)


FUNCTIONS = {"hard_threshold": dropped, "soft_threshold": softened}


def positive(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.uniform(0.5, 2, (size, size)).astype(np.float32)


def writable(xp: Library) -> None:
    if xp.name == "jax":
        pytest.skip("jax arrays are immutable")


@sizes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_with_thresholds_in_out(xp, rng, name, size):
    """`out` is the thresholds themselves; a row of `x` is the thresholds, in place."""
    writable(xp)
    x, t = positive(rng, size), positive(rng, size)
    function = getattr(npscope, name)
    out = xp.asarray(t.copy())
    function(xp.asarray(x.copy()), out, (1, 1), out=out)
    assert same_bits(xp.to_numpy(out), FUNCTIONS[name](x, t))
    given = xp.asarray(x.copy())
    function(given, given[:1, :], (1, 1), out=given)
    assert same_bits(xp.to_numpy(given), FUNCTIONS[name](x, x[:1]))


METHODS: dict[str, tuple[Method, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "apply_multiplier": (lambda specs, t: specs[0].apply_multiplier(t), np.multiply),
    "hard_threshold": (lambda specs, t: specs[0].hard_threshold(t), dropped),
    "soft_threshold": (lambda specs, t: specs[0].soft_threshold(t), softened),
    "scopes, hard_threshold": (lambda specs, t: over(specs[:1]).hard_threshold(t), dropped),
    "scopes, soft_threshold": (lambda specs, t: over(specs[:1]).soft_threshold(t), softened),
    "coupled scopes, soft_threshold": (lambda specs, t: over(specs).soft_threshold(t), softened),
}


def over(specs: list[BlockSpec]) -> ScopeCoupling:
    """A scope for each element, so that thresholds are over elements there too."""
    return ScopeCoupling([ScopeSpec(spec, (1, 1)) for spec in specs])


def of_strided_memory(xp: Library) -> None:
    if xp.backend is None:
        pytest.skip(f"{xp.name} arrays cannot be windowed")


@sizes
@pytest.mark.parametrize("name", METHODS)
def test_methods_with_numbers_in_the_window(xp, rng, name, size):
    of_strided_memory(xp)
    method, expected = METHODS[name]
    x, y = positive(rng, size), positive(rng, size)
    for order in ("C", "F"):
        windows = [xp.asarray(np.array(a, order=order)) for a in (x, y)]
        method([BlockSpec(a, (1, 1)) for a in windows], windows[0][:1])
        assert same_bits(xp.to_numpy(windows[0]), expected(x, x[:1]))
        if "coupled" in name:
            assert same_bits(xp.to_numpy(windows[1]), expected(y, x[:1]))


@sizes
def test_numbers_in_another_window_of_the_coupling(xp, rng, size):
    """They lie in the second leaf, and the first is written before it."""
    of_strided_memory(xp)
    x, y = (positive(rng, size) for _ in range(2))
    windows = [xp.asarray(a.copy()) for a in (x, y)]
    BlockCoupling([BlockSpec(a, (1, 1)) for a in windows]).apply_multiplier(windows[1])
    assert same_bits(xp.to_numpy(windows[0]), x * y)
    assert same_bits(xp.to_numpy(windows[1]), y * y)
