"""Many limits narrowed by the same passes: those of members that share a count of survivors within bounds.

Each member holds blocks with keys, integers that order as their norms. The members compete: from
the largest key down blocks survive until `keep` of them do, but of each member no fewer than its
least and no more than its most. A member that its bounds stop ends at a key of its own, the others
at one key of all. All these keys are searched at the same time. A pass counts for each the keys
above an interval in which it lies and gathers those inside, or counts them in bins; what comes out
settles it, or narrows its interval.

The choice is the first within bounds: where bounds bind, it is that of Bitran and Hax 1981,
"Disaggregation and resource allocation using convex knapsack problems with bounded variables".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from npscope.streaming.slabs import Array

GATHER = 1 << 21
"""Keys that a search holds at most."""

BINS = 1 << 20
"""Counters of a pass that counts keys in bins."""


class Cut(NamedTuple):
    """Where the survivors of a member end: all `above` the key survive, and `taken` of the `ties` that have it."""

    key: int
    above: int
    ties: int
    taken: int


@dataclass(frozen=True)
class _Contest:
    """Members of which `keep` blocks survive in all; the key that they share lies in ``floor <= key <= ceiling``.

    It is looked for in ``low <= key <= high``, where `expected` keys are thought to be.
    """

    members: tuple[int, ...]
    keep: int
    floor: int
    ceiling: int
    low: int
    high: int
    expected: float

    @classmethod
    def inside(cls, members: Iterable[int], keep: int, low: int, high: int, expected: float) -> _Contest:
        """It is looked for wherever it can lie."""
        return cls(tuple(members), keep, low, high, low, high, expected)

    def between(self, low: int, high: int, expected: float) -> _Contest:
        """The same contest, when it is known that the key lies there."""
        return _Contest.inside(self.members, self.keep, low, high, expected)


class Narrowing:
    """The cuts of members of so many `blocks`, found pass by pass; keys are 0 to `top`.

    In every pass `begin` comes first, then `add` for all keys of the `open` members, then `settle`.
    The bounds allow `keep` survivors in all.
    """

    def __init__(self, blocks: Sequence[int], bounds: Sequence[tuple[int, int]], keep: int, top: int) -> None:
        self._blocks, self._bounds, self._top = blocks, bounds, top
        self.cuts = [Cut(top, 0, 0, 0)] * len(blocks)
        """Those of members that are not open."""
        self._contests: list[_Contest] = []
        self._tallies: list[_Tally] = []
        self._of: dict[int, _Tally] = {}
        self._held = 0  # keys that are gathered
        least, most = (sum(bound[side] for bound in bounds) for side in (0, 1))
        if least < keep < most:
            self._contests = [_Contest.inside(range(len(blocks)), keep, 0, top, sum(blocks))]
        else:
            for member, bound in enumerate(bounds):
                self._alone(member, bound[0 if keep == least else 1], 0, top, blocks[member])

    @property
    def open(self) -> list[int]:
        """The members that the next pass has to read."""
        return sorted(member for contest in self._contests for member in contest.members)

    def guess(self, low: int, high: int, expected: float) -> None:
        """Look for the key that all members share between these first, where so many keys are expected."""
        (contest,) = self._contests
        self._contests = [replace(contest, low=low, high=high, expected=expected)]

    def begin(self) -> None:
        """Get ready for the keys of a pass."""
        room, counting, gathering = float(GATHER), 0, set()
        for contest in sorted(self._contests, key=lambda contest: contest.expected):
            if contest.expected <= room:
                gathering.add(contest)
                room -= contest.expected
            else:
                counting += len(contest.members)
        bins, self._held = BINS // max(1, counting), 0
        self._tallies = [_Tally(each, each in gathering, bins, self._are_free(each)) for each in self._contests]
        self._of = {member: tally for tally in self._tallies for member in tally.contest.members}

    def add(self, member: int, keys: Array) -> None:
        """Take in some keys of an open member."""
        tally = self._of[member]
        self._held += tally.add(member, keys)
        if tally.gathered is not None and self._held > GATHER:  # more than expected; their number is worth something
            self._held -= sum(part.size for parts in tally.gathered.values() for part in parts)
            tally.gathered = None

    def settle(self) -> None:
        """Draw the conclusions of a pass."""
        tallies, self._tallies, self._of, self._contests = self._tallies, [], {}, []
        for tally in tallies:
            tally.close()
            contest, keep = tally.contest, tally.contest.keep
            if keep <= self._survivors(tally, contest.high + 1):
                self._contests.append(
                    contest.between(contest.high + 1, contest.ceiling, tally.reached(contest.high + 1))
                )
            elif keep > self._survivors(tally, contest.low):
                below = sum(self._blocks[member] for member in contest.members) - tally.reached(contest.low)
                self._contests.append(contest.between(contest.floor, contest.low - 1, below))
            elif tally.is_blind:
                inside = tally.reached(contest.low) - tally.reached(contest.high + 1)
                self._contests.append(contest.between(contest.low, contest.high, inside))
            else:
                self._divide(tally)

    def _divide(self, tally: _Tally) -> None:
        """Look on inside the bin that holds the key which all share; members that bounds stop go on alone."""
        contest, left = tally.contest, tally.contest.keep
        low, high = tally.bin_of(lambda key: self._survivors(tally, key) >= contest.keep)
        sharing = []
        for member in contest.members:
            least, most = self._bounds[member]
            if not tally.is_shared and (tally.reach(member, high + 1) >= most or tally.reach(member, low) <= least):
                keep = most if tally.reach(member, high + 1) >= most else least
                left -= keep
                self._go_on_alone(tally, member, keep)
            else:
                sharing.append(member)
        if not tally.is_exact:
            inside = (
                tally.reached(low) - tally.reached(high + 1)
                if tally.is_shared
                else sum(tally.reach(member, low) - tally.reach(member, high + 1) for member in sharing)
            )
            self._contests.append(_Contest.inside(sharing, left, low, high, inside))
            return
        above = {member: tally.reach(member, high + 1) for member in sharing}
        taken = {member: max(0, self._bounds[member][0] - above[member]) for member in sharing}
        left -= sum(above.values()) + sum(taken.values())
        for member in sharing:
            ties = tally.reach(member, low) - above[member]
            more = min(left, min(ties, self._bounds[member][1] - above[member]) - taken[member])
            left -= more
            self.cuts[member] = Cut(low, above[member], ties, taken[member] + more)

    def _go_on_alone(self, tally: _Tally, member: int, keep: int) -> None:
        """Find the `keep`-th largest key of a member, of which a tally says something."""
        contest = tally.contest
        above, inside = tally.reach(member, contest.high + 1), tally.reach(member, contest.low)
        if keep < above or keep == 0:
            self._alone(member, keep, contest.high + 1, contest.ceiling, above)
        elif keep == above:
            self.cuts[member] = Cut(contest.high, above, 0, 0)
        elif keep > inside:
            self._alone(member, keep, contest.floor, contest.low - 1, self._blocks[member] - inside)
        else:
            low, high = tally.bin_of(lambda key: tally.reach(member, key) >= keep)
            over = tally.reach(member, high + 1)
            ties = tally.reach(member, low) - over
            if tally.is_exact:
                self.cuts[member] = Cut(low, over, ties, keep - over)
            else:
                self._alone(member, keep, low, high, ties)

    def _alone(self, member: int, keep: int, low: int, high: int, expected: float) -> None:
        """A contest of one member: its bounds have had their say."""
        blocks = self._blocks[member]
        if keep in (0, blocks):
            self.cuts[member] = Cut(-1, blocks, 0, 0) if keep else Cut(self._top, 0, 0, 0)
        else:
            self._contests.append(_Contest.inside([member], keep, low, high, expected))

    def _are_free(self, contest: _Contest) -> bool:
        """Whether no bound can stop a member of the contest."""
        return len(contest.members) == 1 or all(
            self._bounds[member] == (0, self._blocks[member]) for member in contest.members
        )

    def _survivors(self, tally: _Tally, key: int) -> int:
        """How many blocks survive where the shared key is this one and all its ties survive."""
        if tally.is_free:
            return tally.reached(key)
        bounds = ((member, *self._bounds[member]) for member in tally.contest.members)
        return sum(min(max(tally.reach(member, key), least), most) for member, least, most in bounds)


class _Tally:
    """What a pass over the members of a contest finds of its interval.

    The keys inside are gathered or counted: each value for itself where the counters suffice, else in
    bins of ``1 << shift`` values; for each member, of which each has `bins` counters, or together
    where no bounds are and that lets bins be finer.
    """

    def __init__(self, contest: _Contest, gathers: bool, bins: int, is_free: bool) -> None:
        self.contest, self.is_free = contest, is_free
        members, width = len(contest.members), contest.high - contest.low + 1
        self.is_shared = is_free and not gathers and members > 1 and width > bins
        most = bins * members if self.is_shared else max(2, bins)
        self._shift = 0 if gathers else max(0, (width - 1).bit_length() - most.bit_length() + 1)
        self._size = ((width - 1) >> self._shift) + 1
        self._rows = {member: 0 if self.is_shared else row for row, member in enumerate(contest.members)}
        self._above, self._inside = (dict.fromkeys(contest.members, 0) for _ in range(2))
        self.gathered: dict[int, list[Array]] | None = {m: [] for m in contest.members} if gathers else None
        rows = 0 if gathers else 1 + max(self._rows.values())
        self._counts = np.zeros((rows, self._size if rows else 0), np.int64)

    @property
    def is_blind(self) -> bool:
        """Whether it is only known how many keys there are."""
        return self.gathered is None and not self._counts.size

    @property
    def is_exact(self) -> bool:
        """Whether every key is known for itself, and whose it is."""
        return self._shift == 0 and not self.is_shared

    def add(self, member: int, keys: Array) -> int:
        """Take in some keys of a member; how many of them are held."""
        low, high = self.contest.low, self.contest.high
        self._above[member] += int(np.count_nonzero(keys > high))
        inside = keys[(keys >= low) & (keys <= high)]
        self._inside[member] += inside.size
        if self.gathered is not None:
            self.gathered[member].append(inside)
            return int(inside.size)
        if self._counts.size:
            places = ((inside - inside.dtype.type(low)) >> inside.dtype.type(self._shift)).astype(np.intp)
            row = self._counts[self._rows[member]]
            if 16 * places.size < row.size:  # then a whole array of counts costs more than it counts
                np.add.at(row, places, 1)
            else:
                row += np.bincount(places, minlength=row.size)
        return 0

    def close(self) -> None:
        """All keys were taken in."""
        self._sorted = {
            member: np.sort(np.concatenate([np.empty(0, np.int32), *parts]))
            for member, parts in (self.gathered or {}).items()
        }
        self._tails = self._counts[:, ::-1].cumsum(axis=1)[:, ::-1]

    def reached(self, key: int) -> int:
        """How many blocks of all members have at least this key, which begins a bin or is beyond the interval."""
        if self.is_shared and self.contest.low < key <= self.contest.high:
            return sum(self._above.values()) + int(self._tails[0, (key - self.contest.low) >> self._shift])
        return sum(self.reach(member, key) for member in self.contest.members)

    def reach(self, member: int, key: int) -> int:
        """How many blocks of one member have."""
        above, inside = self._above[member], self._inside[member]
        if key > self.contest.high:
            return above
        if key <= self.contest.low:
            return above + inside
        if self.gathered is not None:
            keys = self._sorted[member]
            return above + inside - int(np.searchsorted(keys, keys.dtype.type(key)))
        return above + int(self._tails[self._rows[member], (key - self.contest.low) >> self._shift])

    def bin_of(self, holds: Callable[[int], bool]) -> tuple[int, int]:
        """First and last key of the last bin for whose first key something holds that does for all before it."""
        first, behind = 0, self._size
        while behind - first > 1:
            middle = (first + behind) // 2
            first, behind = (middle, behind) if holds(self.contest.low + (middle << self._shift)) else (first, middle)
        low = self.contest.low + (first << self._shift)
        return low, min(self.contest.high, low + (1 << self._shift) - 1)
