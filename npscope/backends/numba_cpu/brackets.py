"""The k-th largest of many keys: brackets from samples, narrowed by looks at all keys, which count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MARGIN = 5.0
"""Standard deviations between the wanted rank and the ends of a bracket: a miss costs another pass."""

MAX_GUESSES = 8
"""Brackets taken from samples before the range of keys is halved instead, which ends: a key has so many bits."""


@dataclass
class _Bracket:
    """The wanted key lies in [low, high]: `above` keys of the scope lie above, `inside` within."""

    low: int
    high: int
    above: int
    inside: int


class Look(NamedTuple):
    """Keys in [low, high] are collected, and those that equal `crowd` beside them counted; `low` if there is none."""

    low: int
    high: int
    crowd: int

    @property
    def is_crowded(self) -> bool:
        """Whether there is a crowd."""
        return not self.low <= self.crowd <= self.high

    @property
    def limits(self) -> tuple[np.uint64, np.uint64, np.uint64]:
        """As kernels take it."""
        return np.uint64(self.low), np.uint64(self.high), np.uint64(self.crowd)


class Sample(NamedTuple):
    """Some keys of a scope, up to so many adjacent ones from each place."""

    keys: np.ndarray
    run: int

    def effect(self, keys: np.ndarray, share: float) -> float:
        """By what a share of the largest of some `keys` of the sample varies more than if they were drawn one by one.

        That is the design effect of a sample in clusters (Kish 1965): 1, or up to `run` where neighbours are alike.
        """
        places = self.keys.size // self.run
        if self.run == 1 or places == 0:
            return 1.0
        few = keys[:: self.run]
        about = min(int((1 - share) * few.size), few.size - 1)
        inside = self.keys[: places * self.run] >= partitioned(few, [about])[about]
        counts = inside.reshape(places, self.run).sum(axis=1)
        total = int(counts.sum())
        # The variance of the counts, and what it would be, both times the square of their number.
        spread, alone = places * int(counts @ counts) - total**2, total * (inside.size - total) / self.run
        return min(max(1.0, spread / alone), float(self.run)) if alone > 0 else 1.0


class Nth(NamedTuple):
    """The k-th largest key, how many keys equal to it are among the k largest, and how many in all."""

    key: int
    ties: int
    equal: int


class Survey(NamedTuple):
    """Keys above the range of a look, inside it, and in its crowd; and those inside, if there was room for all."""

    above: int
    inside: int
    equal: int
    found: list[np.ndarray]


def narrow(
    k: int, count: int, width: int, draw: Callable[[int, int, float], Sample], survey: Callable[[Look], Survey],
    nth_of: Callable[[list[np.ndarray], int], Nth],
) -> Nth:  # fmt: skip
    """The k-th largest of `count` keys of so many bits, from samples of them and what looks at all.

    ``draw(low, high, share)`` samples the keys in [low, high], which are such a share of all; `nth_of` finds the k-th
    of those that a look has collected.
    """
    bracket = _Bracket(0, (1 << width) - 1, 0, count)
    sample, overflowed = draw(bracket.low, bracket.high, 1.0), False
    for guesses in range(MAX_GUESSES + 2 * width):
        look = _next_look(sample, bracket, k, overflowed, halves=guesses >= MAX_GUESSES)
        low, high, crowd = look
        above, inside, equal, found = survey(look)
        # Of keys looked at, the first ones may be the crowd, or the last ones.
        first, end = above - (equal if crowd > high else 0), above + inside + (equal if crowd < low else 0)
        overflowed = False
        if k <= first:
            bracket = _Bracket(max(high, crowd) + 1, bracket.high, bracket.above, first - bracket.above)
        elif k > end:
            below = bracket.above + bracket.inside - end
            bracket = _Bracket(bracket.low, min(low, crowd) - 1, end, below)
        elif k <= above or k > above + inside:
            return Nth(crowd, k - (first if crowd > high else above + inside), equal)
        elif low == high:
            return Nth(low, k - above, inside)
        elif sum([keys.size for keys in found]) == inside:
            return nth_of(found, k - above)
        else:
            # What was collected while there was room is no sample: of a sorted array it is one end of the range.
            bracket, overflowed = _Bracket(low, high, above, inside), True
            if guesses + 1 < MAX_GUESSES:
                sample = draw(low, high, inside / count)
    raise AssertionError("a bracket narrows with every pass")


def sample_of(pieces: list[np.ndarray], size: int, low: int, high: int, share: float) -> Sample:
    """About `size` of those of some keys that are in [low, high], which are such a share of them; or all of these."""
    step = max(1, int(share * sum([keys.size for keys in pieces])) // max(1, size))
    keys = np.concatenate([keys[::step] for keys in pieces])
    return Sample(keys if share == 1 else keys[(keys >= keys.dtype.type(low)) & (keys <= keys.dtype.type(high))], 1)


def partitioned(keys: np.ndarray, places: list[int]) -> np.ndarray:
    """Keys in an order in which those at `places` stand where they would if sorted; places beyond the ends are ignored.

    At one place alone NumPy is three times as slow as at two, and twenty times where half of the keys are equal.
    """
    inside = [place for place in places if 0 <= place < keys.size]
    return np.partition(keys, [*inside, *inside[:1]]) if inside else keys


def _next_look(sample: Sample, bracket: _Bracket, k: int, overflowed: bool, *, halves: bool) -> Look:
    """Keys of the bracket that should be the k-th, from a sample; or if it `halves` that one side of its middle.

    A key that many are equal to is never collected, as the equal ones would take all the room: it is counted, alone or
    as the crowd beside a range. In an array that has been pruned before, zero is such a key, and often the k-th or the
    next below it.
    """
    keys, key_of = sample.keys, sample.keys.dtype.type  # of a Python integer and uint64 NumPy would make float64
    if halves:
        middle = bracket.low + (bracket.high - bracket.low) // 2
        return Look(middle, middle if overflowed else bracket.high, middle)
    inside = keys[(keys >= key_of(bracket.low)) & (keys <= key_of(bracket.high))]
    if not inside.size:
        return Look(bracket.low, bracket.high, bracket.low)
    share = (k - bracket.above) / bracket.inside
    place = (1 - share) * inside.size
    margin = MARGIN * (inside.size * share * (1 - share) * sample.effect(inside, share)) ** 0.5 + 2
    first, middle, last = int(place - margin), min(int(place), inside.size - 1), int(place + margin) + 1
    inside = partitioned(inside, [first, middle, last])

    def is_frequent(key: int) -> bool:
        return bool(np.count_nonzero(inside == key_of(key)) > margin)

    key = int(inside[middle])
    low = int(inside[first]) if first >= 0 else bracket.low
    high = int(inside[last]) if last < inside.size else bracket.high
    crowd = next((key for key in (key, low, high) if is_frequent(key)), None)
    if crowd is None:
        return Look(low, high, low)
    if crowd == key:
        # Of its two ends, the one nearer to the wanted place is where the k-th may be on the other side.
        start = int(np.count_nonzero(inside < key_of(key)))
        stop = start + int(np.count_nonzero(inside == key_of(key)))
        if min(place - start, stop - place) > margin:
            return Look(key, key, key)
        low, high = (key, high) if stop - place < place - start else (low, key)
    low, high = low + is_frequent(low), high - is_frequent(high)
    return Look(low, high, crowd) if low <= high else Look(crowd, crowd, crowd)
