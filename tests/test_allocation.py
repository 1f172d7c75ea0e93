"""Allocations add up exactly and follow their formulas, which stand here as plain loops."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from npscope import nnz_from_sparsity
from npscope.errors import SpecError
from npscope.recipes import planning
from npscope.recipes.allocation import NormHistogram, Norms, erk, lamp, uniform
from npscope.recipes.planning import plan_file
from npscope.recipes.recipe_file import parse_recipe
from npscope.streaming.pruning import prune_file

SHARES = st.integers(0, 100).map(lambda percent: f"{percent / 100:.2f}")


@given(st.lists(st.integers(0, 50), max_size=8), SHARES)
def test_uniform_is_within_a_block_of_the_share_and_adds_up(counts: list[int], share: str) -> None:
    blocks = {str(i): count for i, count in enumerate(counts)}
    keeps = uniform(blocks, share)
    keep = nnz_from_sparsity(share, sum(counts))
    assert sum(keeps.values()) == keep
    for name, count in blocks.items():
        assert abs(keeps[name] - Fraction(keep * count, sum(counts) or 1)) < 1
        assert 0 <= keeps[name] <= count


def erk_densities(shapes: list[tuple[int, ...]], keep: int) -> list[float]:
    """The rule of the paper: densities eps * sum / product, layers above 1 made dense one after the other."""
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        if not free:
            return [1.0] * len(shapes)
        rest = keep - sum(math.prod(shapes[i]) for i in dense)
        scale = rest / sum(sum(shapes[i]) for i in free)
        densities = [1.0 if i in dense else scale * sum(s) / math.prod(s) for i, s in enumerate(shapes)]
        worst = max(free, key=lambda i: densities[i])
        if densities[worst] <= 1 + 1e-12:
            return densities
        dense.add(worst)


@given(
    st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6),
    SHARES,
)
def test_erk_follows_the_paper_and_adds_up(shapes: list[tuple[int, ...]], share: str) -> None:
    keeps = erk({str(i): shape for i, shape in enumerate(shapes)}, share)
    keep = nnz_from_sparsity(share, sum(map(math.prod, shapes)))
    assert sum(keeps.values()) == keep
    for i, (shape, density) in enumerate(zip(shapes, erk_densities(shapes, keep), strict=True)):
        assert abs(keeps[str(i)] - density * math.prod(shape)) < 1 + 1e-6
        assert 0 <= keeps[str(i)] <= math.prod(shape)


def test_erk_counts_blocks_where_they_are_given() -> None:
    shapes = {"a": (64, 64), "b": (16, 16)}
    assert erk(shapes, 0.75, {"a": 64 * 4, "b": 16}) == {"a": 54, "b": 14}
    with pytest.raises(SpecError, match="'a' of shape"):
        erk({"a": (4, 0)}, 0.5)


def lamp_counts(tensors: dict[str, list[float]], keep: int) -> dict[str, int]:
    """Every score by the formula of the paper, the largest kept, the first tensor's first among equals."""
    scored = []
    for place, (name, norms) in enumerate(tensors.items()):
        total = Fraction(0)
        for rank, norm in enumerate(sorted(norms, reverse=True)):
            square = Fraction(norm) ** 2
            total += square
            scored.append((-(square / total) if total else Fraction(0), place, rank, name))
    kept = [name for *_, name in sorted(scored)[:keep]]
    return {name: kept.count(name) for name in tensors}


@given(
    st.lists(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=9), min_size=1, max_size=5),
    SHARES,
)
def test_lamp_follows_the_paper_and_adds_up(lists: list[list[float]], share: str) -> None:
    tensors = {str(i): norms for i, norms in enumerate(lists)}
    keep = nnz_from_sparsity(share, sum(map(len, lists)))
    keeps = lamp({name: Norms.of(np.asarray(norms)) for name, norms in tensors.items()}, share)
    assert sum(keeps.values()) == keep
    want = lamp_counts(tensors, keep)
    # Scores that agree to a few ulp may change places: then the counts differ, and the scores do not.
    if keeps != want:
        for name in tensors:
            assert abs(keeps[name] - want[name]) <= 1
        assert near_tie(tensors, keeps, want)


def near_tie(tensors: dict[str, list[float]], ours: dict[str, int], theirs: dict[str, int]) -> bool:
    def score(name: str, rank: int) -> float:
        squares = sorted((n * n for n in tensors[name]), reverse=True)
        return squares[rank - 1] / sum(squares[:rank]) if sum(squares[:rank]) else 0.0

    gained = [score(name, ours[name]) for name in tensors if ours[name] > theirs[name]]
    lost = [score(name, theirs[name]) for name in tensors if ours[name] < theirs[name]]
    return np.allclose(sorted(gained), sorted(lost), rtol=1e-12)


def test_lamp_of_zeros_and_of_what_has_no_score() -> None:
    zeros = Norms.of(np.zeros(4))
    assert lamp({"a": zeros, "b": Norms.of(np.asarray([1e-100, 1e10]))}, "0.5") == {"a": 1, "b": 2}
    assert lamp({"a": zeros}, 0) == {"a": 4}
    assert lamp({"a": zeros}, 1) == {"a": 0}
    for bad in (np.nan, np.inf):
        with pytest.raises(SpecError, match="'a': a norm is NaN or infinite"):
            lamp({"a": Norms.of(np.asarray([1.0, bad]))}, 0.5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_histogram_is_exact_for_single_elements_of_16_bits(dtype: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    floats = (bits if np.dtype(dtype).itemsize == 2 else bits.astype(np.uint8)).view(dtype).astype(np.float32)
    norms = np.abs(floats[np.isfinite(floats)])
    histogram = NormHistogram()
    histogram.add(norms[:1000])
    histogram.add(norms[1000:])
    want = Norms.of(norms)
    assert np.array_equal(histogram.norms().counts, want.counts)
    np.testing.assert_allclose(histogram.norms().values, want.values, rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_histogram_is_near_for_others(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: np.abs(rng.normal(size=20000) ** power).astype(dtype) for name, power in (("a", 1), ("b", 3))}
    grouped = {}
    for name, norms in tensors.items():
        histogram = NormHistogram()
        histogram.add(norms)
        grouped[name] = histogram.norms()
    exact = lamp({name: Norms.of(norms) for name, norms in tensors.items()}, 0.7)
    near = lamp(grouped, 0.7)
    assert sum(near.values()) == sum(exact.values()) == 12000
    assert all(abs(near[name] - exact[name]) <= 20 for name in tensors)  # a thousandth of the blocks


# --- in recipes ----------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        "wide": rng.normal(size=(64, 96)).astype(np.float32),
        "narrow": 3 * rng.normal(size=(8, 16)).astype(np.float32),
        "conv": rng.normal(size=(16, 8, 3, 3)).astype(np.float32) ** 3,
        "bias": rng.normal(size=64).astype(np.float32),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize("way", ["uniform", "erk", "lamp"])
def test_a_recipe_allocates_and_the_file_has_these_counts(file: Path, way: str) -> None:
    recipe = parse_recipe({"rule": [{"allocation": way, "block": "2x2", "sparsity": "0.7"}]})
    planned = {plan.tensor.name: plan for plan in plan_file(file, recipe) if plan.keep is not None}
    blocks = {name: plan.blocks for name, plan in planned.items()}
    keeps = {name: plan.keep for name, plan in planned.items()}
    assert blocks == {"wide": 1536, "narrow": 32, "conv": 288}
    assert sum(keeps.values()) == nnz_from_sparsity("0.7", sum(blocks.values()))
    before, after = load_file(file), file.with_name("out.safetensors")
    prune_file(file, after, recipe)
    for name, value in load_file(after).items():
        if name != "bias":
            tiles = value.reshape(len(value) // 2, 2, -1, 2).any((1, 3))
            assert tiles.sum() == keeps[name]
    if way == "lamp":
        norms = {
            name: np.sqrt((before[name].reshape(len(before[name]) // 2, 2, -1, 2).astype(float) ** 2).sum((1, 3)))
            for name in blocks
        }
        assert keeps == lamp({name: Norms.of(value.astype(np.float32)) for name, value in norms.items()}, "0.7")


def test_lamp_reads_large_tensors_as_a_histogram(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({"rule": [{"allocation": "lamp", "block": "1x1", "sparsity": "0.5"}]})
    exact = [plan.keep for plan in plan_file(file, recipe)]
    monkeypatch.setattr(planning, "EXACT_BLOCKS", 0)
    near = [plan.keep for plan in plan_file(file, recipe)]
    for one, other in zip(exact, near, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or abs(one - other) <= 8
