"""The k-th largest of many keys is found whatever the sample says, and whatever there is room for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

brackets = pytest.importorskip("npscope.backends.numba_cpu.brackets")

COUNT, WIDTH = 20_000, 32

KEYS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "all different": lambda rng: rng.permutation(COUNT) * 7,
    "any": lambda rng: rng.integers(0, 1 << WIDTH, COUNT),
    "all the same": lambda rng: np.full(COUNT, 99),
    "the least and the largest": lambda rng: rng.choice([0, (1 << WIDTH) - 1], COUNT),
    "half zero": lambda rng: rng.integers(0, 1 << WIDTH, COUNT) * rng.integers(0, 2, COUNT),
    "mostly the largest": lambda rng: np.where(rng.random(COUNT) < 0.9, (1 << WIDTH) - 1, rng.integers(0, 50, COUNT)),
    "few numbers": lambda rng: rng.integers(0, 5, COUNT),
    "near each other": lambda rng: rng.integers(0, 300, COUNT) + (1 << 31),
}

SAMPLES: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "good": lambda rng, keys: rng.choice(keys, 2000),
    "small": lambda rng, keys: rng.choice(keys, 3),
    "too low": lambda rng, keys: np.zeros(2000, keys.dtype),
    "too high": lambda rng, keys: np.full(2000, (1 << WIDTH) - 1, keys.dtype),
    "of one key": lambda rng, keys: np.repeat(keys[:1], 2000),
    "of other keys": lambda rng, keys: rng.integers(0, 1 << WIDTH, 2000).astype(keys.dtype),
}


@pytest.mark.parametrize("run", [1, 32])
@pytest.mark.parametrize("room", [COUNT, 300, 0])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("data", KEYS)
def test_the_kth_is_found_whatever_the_sample_says(rng, data, sample, room, run):
    """Nothing depends on it but the number of looks."""
    keys = KEYS[data](rng).astype(np.uint32)
    looks = []

    def survey(look):
        looks.append(look)
        wide = keys.astype(np.int64)
        inside = keys[(wide >= look.low) & (wide <= look.high)]
        equal = int((wide == look.crowd).sum()) if look.is_crowded else 0
        found = inside if look.low != look.high else inside[:0]
        return brackets.Survey(int((wide > look.high).sum()), inside.size, equal, [found[:room]])

    def nth_of(pieces, k):
        found = np.sort(np.concatenate(pieces))
        key = found[found.size - k]
        return brackets.Nth(int(key), k - int((found > key).sum()), int((found == key).sum()))

    for k in (1, 2, COUNT // 3, COUNT // 2, COUNT - 1, COUNT):
        looks.clear()
        given = brackets.Sample(SAMPLES[sample](rng, keys).astype(np.uint32), run)

        def draw(low, high, share, given=given):
            assert np.count_nonzero((keys >= low) & (keys <= high)) == pytest.approx(share * COUNT)
            return given

        nth = brackets.narrow(k, COUNT, WIDTH, draw, survey, nth_of)
        expected = np.sort(keys)[COUNT - k]
        assert nth.key == expected
        assert nth.ties == k - int((keys > expected).sum())
        assert nth.equal == int((keys == expected).sum())
        if sample == "good" and room == COUNT and run == 1:
            assert len(looks) <= 2


def test_a_sample_of_a_range_of_collected_keys(rng):
    """About as many as were asked for, or all that there are, and none beside the range."""
    pieces = [rng.integers(0, 1000, size).astype(np.uint32) for size in (5000, 0, 9000)]
    keys = np.concatenate(pieces)
    for low, high in ((0, 1000), (100, 120), (999, 1000)):
        inside = keys[(keys >= low) & (keys <= high)]
        for size in (1, 100, 20_000):
            sample = brackets.sample_of(pieces, size, low, high, inside.size / keys.size)
            assert sample.run == 1
            assert np.isin(sample.keys, inside).all()
            assert sample.keys.size <= 4 * size + 8
            assert sample.keys.size >= (inside.size if size >= inside.size else size // 2)


def test_the_design_effect_of_a_sample():
    """Neighbours that are alike count as one; drawn one by one they all count."""
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.integers(0, 1 << 32, 1000, dtype=np.uint32), 32)
    apart = rng.permutation(alike)
    for share in (0.5, 0.1):
        assert brackets.Sample(alike, 32).effect(alike, share) == pytest.approx(32)
        assert brackets.Sample(apart, 32).effect(apart, share) == pytest.approx(1, abs=0.15)
        assert brackets.Sample(alike, 1).effect(alike, share) == 1
    same = np.full(320, 7, dtype=np.uint32)
    assert brackets.Sample(same, 32).effect(same, 0.5) == 1
