"""Where the survivors of a scope end, found in bounded memory for scopes of any size.

The blocks of a scope rank by (norm descending, position ascending). A `Limit` is the place in
that order after which all are dropped: the key of the last survivors, and the last position
among the blocks of that key. Keys are norms as integers of the same order.

A search reads the tensors a few times and never holds their norms. A sample of the blocks gives
a guess, an interval of keys; a pass counts the blocks above it and gathers what lies inside.
Where the guess is wrong or holds too many blocks, the next pass works on the interval that is
left: every pass narrows it, whatever the data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from npscope.namespace import block_norms
from npscope.recipes.plans import Plan
from npscope.streaming.ranked import RankedReader, Slab
from npscope.streaming.slabs import SLAB_BYTES, Array, Box, elements_in, extents, tiles, whole

GATHER = 1 << 21
"""Keys that a search holds at most."""

BINS = 1 << 20
"""Counters of a pass that counts keys in bins."""

PIECES = 256
"""Places from which a sample is taken."""

PIECE_BYTES = 64 << 10
"""About the bytes that are read at each of them."""

_ERRORS = 4  # standard errors by which the guess reaches to either side of the sample's quantile


class Limit(NamedTuple):
    """The last survivors: blocks with a larger key survive, and those with `key` up to the position `last`."""

    key: int
    last: int
    kept: int
    """How many survive."""


@dataclass(frozen=True)
class Member:
    """The blocks of one scope that lie in one tensor: in the box `region` of it, whole blocks."""

    plan: Plan
    region: Box

    @classmethod
    def all_of(cls, plan: Plan) -> Member:
        """Every block of a tensor."""
        return cls(plan, whole(plan.shape))

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Blocks along every canonical axis."""
        sizes = extents(self.region)
        return tuple(sizes[axis] // size for axis, size in zip(self.plan.order, self.plan.block, strict=True))

    @cached_property
    def blocks(self) -> int:
        """How many blocks these are."""
        return math.prod(self.grid)

    def boxes(self, nbytes: int) -> Iterator[Box]:
        """Boxes of whole blocks that cover the region, of about `nbytes`."""
        return tiles(self.region, self.plan.stored(self.plan.block), elements_in(nbytes, self.plan.width))

    def positions(self, box: Box, chosen: Array) -> Array:
        """The positions of the `chosen` blocks of a box, row-major in the canonical grid of the region."""
        found = np.zeros(np.count_nonzero(chosen), np.int64)
        places = np.nonzero(chosen)
        for axis, size, length, along in zip(self.plan.order, self.plan.block, self.grid, places, strict=True):
            found = found * length + ((box[axis].start - self.region[axis].start) // size + along)
        return found


class Keys:
    """How norms become keys: integers of 64 bits where a norm of some plan is float64, else of 32.

    Bits that are zero in every norm are left out: blocks of single 16-bit floats have few keys.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.are_wide = any(plan.has_wide_norms for plan in plans)
        self.floats: type[np.floating[Any]] = np.float64 if self.are_wide else np.float32
        self.integers: type[np.signedinteger[Any]] = np.int64 if self.are_wide else np.int32
        narrow = not self.are_wide and all(math.prod(plan.block) == 1 and plan.scores is None for plan in plans)
        self._unused = min(_UNUSED_BITS.get(plan.tensor.dtype, 0) for plan in plans) if narrow else 0
        self._nan_bits = np.asarray(np.nan, self.floats).view(self.integers)
        self._infinity_bits = np.asarray(np.inf, self.floats).view(self.integers)
        self.infinity = int(self._infinity_bits) >> self._unused
        self.nan = int(self._nan_bits) >> self._unused
        """The key of a block with NaN, above all others."""

    def of(self, plan: Plan, ranked: Array) -> Array:
        """The keys of the blocks of part of a planned tensor, on their grid."""
        norms = block_norms(ranked, plan.block, ord=plan.ord).astype(self.floats, copy=False)
        keys: Array = norms.view(self.integers)
        if keys.size and keys.max() > self._infinity_bits:  # NaN, which all tie
            np.copyto(keys, self._nan_bits, where=keys > self._infinity_bits)
        if self._unused:
            keys >>= self.integers(self._unused)
        return keys

    def all_or_none(self, blocks: int) -> Limit:
        """The limit that every block is above, `blocks` in number, or for 0 none."""
        return Limit(-1, -1, blocks) if blocks else Limit(self.nan, -1, 0)

    def norms(self, keys: Array) -> Array:
        """The norms of keys up to `infinity`."""
        found: Array = (keys << self._unused).astype(self.integers).view(self.floats)
        return found


_UNUSED_BITS = {"bfloat16": 16, "float16": 13, "float8_e4m3fn": 20, "float8_e5m2": 21}
"""Low bits that are zero in every such number as float32, subnormal ones included."""


class _Tally:
    """What a pass over the members finds of the interval ``low <= key <= high``.

    The keys inside are gathered when `expected` of them fit, else counted: each value for itself
    and for each member where that takes few counters, else in bins of ``1 << shift`` values.
    """

    def __init__(self, members: Sequence[Member], low: int, high: int, expected: float) -> None:
        width = high - low + 1
        self.low, self.high = low, high
        self.above, self.inside = [0] * len(members), 0
        self.gathered: list[list[Array]] | None = [[] for _ in members] if expected <= GATHER else None
        self.by_member = width == 1 or width * len(members) <= BINS
        self.shift = 0 if self.by_member else max(0, (width - 1).bit_length() - BINS.bit_length() + 1)
        rows = len(members) if self.by_member else 1
        self.counts = np.zeros((rows, ((width - 1) >> self.shift) + 1 if self.gathered is None else 0), np.int64)

    def add(self, member: int, keys: Array) -> None:
        """Take in some keys of a member."""
        above = int(np.count_nonzero(keys > self.high))
        self.above[member] += above
        inside = keys[(keys >= self.low) & (keys <= self.high)]
        self.inside += inside.size
        if self.gathered is not None:
            if self.inside > GATHER:  # more than expected: the count is still worth something
                self.gathered = None
            else:
                self.gathered[member].append(inside)
        elif self.counts.size:
            bins = ((inside - inside.dtype.type(self.low)) >> inside.dtype.type(self.shift)).astype(np.intp)
            row = member if self.by_member else 0
            if 16 * bins.size < self.counts.shape[1]:  # then a whole array of counts costs more than it counts
                np.add.at(self.counts[row], bins, 1)
            else:
                self.counts[row] += np.bincount(bins, minlength=self.counts.shape[1])


class _Found(NamedTuple):
    """The key of the last survivors; for each member how many blocks lie above it and how many have it."""

    key: int
    above: list[int]
    ties: list[int]


class Search:
    """Finds limits of scopes in one file; `tick` is called with the bytes of every slab that was read."""

    def __init__(self, reader: RankedReader, tick: Callable[[int], None] = lambda nbytes: None) -> None:
        self._reader, self.tick = reader, tick

    def limits(self, members: Sequence[Member], keep: int, keys: Keys) -> list[Limit]:
        """The limit for each member that leaves the first `keep` of the blocks of all.

        Blocks of one key survive in the order of the members, and in each in the order of positions.
        """
        if keep in (0, sum(member.blocks for member in members)):
            return [keys.all_or_none(member.blocks if keep else 0) for member in members]
        found = self._key(members, keep, keys)
        left, limits = keep - sum(found.above), []
        for member, above, ties in zip(members, found.above, found.ties, strict=True):
            here = min(left, ties)
            left -= here
            partly = 0 < here < ties
            last = self._position(member, found.key, here, ties, keys) if partly else member.blocks if here else -1
            limits.append(Limit(found.key, last, above + here))
        return limits

    def slabs(self, plan: Plan, boxes: Iterable[Box]) -> Iterator[Slab]:
        """The slabs of boxes of one tensor, new with every slab."""
        return (slab for _, slab in self._slabs((0, plan, box) for box in boxes))

    def _members(self, members: Sequence[Member]) -> Iterator[tuple[int, Slab]]:
        """(number of the member, slab) for slabs that cover the members in order."""
        return self._slabs(
            (i, member.plan, box) for i, member in enumerate(members) for box in member.boxes(SLAB_BYTES)
        )

    def _slabs(self, wanted: Iterable[tuple[int, Plan, Box]]) -> Iterator[tuple[int, Slab]]:
        numbers: list[int] = []

        def work() -> Iterator[tuple[Plan, Box]]:
            for number, plan, box in wanted:
                numbers.append(number)
                yield plan, box

        for slab in self._reader.read(work()):
            yield numbers.pop(0), slab
            self.tick(slab.values.nbytes)

    def _key(self, members: Sequence[Member], keep: int, keys: Keys) -> _Found:
        """The `keep`-th largest key."""
        blocks = sum(member.blocks for member in members)
        low, high = 0, keys.nan  # it lies between these
        guess, expected = (low, high), float(blocks)
        if blocks > GATHER:
            guess, expected = self._guess(members, keep / blocks, blocks, keys)
        while True:
            tally = _Tally(members, *guess, expected)
            for number, slab in self._members(members):
                tally.add(number, keys.of(members[number].plan, slab.ranked))
            above = sum(tally.above)
            if keep <= above:
                low, expected = tally.high + 1, above
            elif keep > above + tally.inside:
                high, expected = tally.low - 1, blocks - above - tally.inside
            elif tally.gathered is not None:
                return _among(tally.above, [_joined(part, keys) for part in tally.gathered], keep - above)
            elif not tally.counts.size:  # gathered too many
                low, high, expected = tally.low, tally.high, tally.inside
            else:
                totals = tally.counts.sum(0)[::-1].cumsum()
                at = int(np.searchsorted(totals, keep - above))
                chosen = tally.counts.shape[1] - 1 - at
                if tally.by_member:
                    over = tally.counts[:, chosen + 1 :].sum(1).tolist()
                    beyond = [a + b for a, b in zip(tally.above, over, strict=True)]
                    return _Found(tally.low + chosen, beyond, tally.counts[:, chosen].tolist())
                expected = int(tally.counts[0, chosen])
                low, high = (
                    tally.low + (chosen << tally.shift),
                    min(tally.high, tally.low + ((chosen + 1) << tally.shift) - 1),
                )
            guess = low, high

    def _guess(self, members: Sequence[Member], share: float, blocks: int, keys: Keys) -> tuple[tuple[int, int], float]:
        """An interval that should hold the key which `share` of the blocks reach, and how many blocks it holds.

        From a sample that takes pieces at even distances over all members. Blocks of a piece are
        more alike than others, so that its error is taken from how much the pieces differ.
        """
        places = list(_pieces(members, blocks))
        slabs = self._reader.read(places)
        pieces = [keys.of(plan, slab.ranked).reshape(-1) for (plan, _), slab in zip(places, slabs, strict=True)]
        sample = np.sort(np.concatenate(pieces))
        middle = sample[min(sample.size - 1, int((1 - share) * sample.size))]
        sizes = np.asarray([piece.size for piece in pieces])
        reached = np.asarray([np.count_nonzero(piece >= middle) for piece in pieces])
        residuals = reached - sizes * (reached.sum() / sizes.sum())
        error = math.sqrt(float((residuals**2).sum()) + share * (1 - share) * sample.size) / sample.size
        reach = _ERRORS * error + 2 / sample.size
        first, last = math.floor((1 - share - reach) * sample.size), math.ceil((1 - share + reach) * sample.size)
        low = 0 if first < 0 else int(sample[first])
        high = keys.nan if last >= sample.size else int(sample[last])
        inside = np.searchsorted(sample, high, "right") - np.searchsorted(sample, low, "left")
        return (low, high), 1.1 * float(inside) * blocks / sample.size

    def _position(self, member: Member, key: int, count: int, ties: int, keys: Keys) -> int:
        """The position of the `count`-th of the `ties` blocks with this key."""
        low, high, before = 0, member.blocks - 1, 0  # it lies between these, and `before` ties lie below
        while True:
            gather = ties <= GATHER
            shift = max(0, (high - low).bit_length() - BINS.bit_length() + 1)
            counts, gathered = np.zeros(((high - low) >> shift) + 1, np.int64), []
            for _, slab in self._members([member]):
                places = member.positions(slab.box, keys.of(member.plan, slab.ranked) == key)
                places = places[(places >= low) & (places <= high)]
                if gather:
                    gathered.append(places)
                else:
                    counts += np.bincount((places - low) >> shift, minlength=counts.size)
            if gather:
                return int(np.partition(np.concatenate(gathered), count - before - 1)[count - before - 1])
            totals = counts.cumsum()
            chosen = int(np.searchsorted(totals, count - before))
            before += int(totals[chosen] - counts[chosen])
            ties = int(counts[chosen])
            low, high = low + (chosen << shift), min(high, low + ((chosen + 1) << shift) - 1)
            if low == high:
                return low


def _joined(parts: Sequence[Array], keys: Keys) -> Array:
    return np.concatenate([np.empty(0, keys.integers), *parts])


def _among(above: Sequence[int], gathered: Sequence[Array], keep: int) -> _Found:
    """The `keep`-th largest of the gathered keys."""
    every = np.concatenate(gathered)
    key = np.partition(every, every.size - keep)[every.size - keep]
    over = [a + int(np.count_nonzero(part > key)) for a, part in zip(above, gathered, strict=True)]
    return _Found(int(key), over, [int(np.count_nonzero(part == key)) for part in gathered])


def _pieces(members: Sequence[Member], blocks: int) -> Iterator[tuple[Plan, Box]]:
    """Small boxes at even distances over the blocks of all members, in order."""
    ends = list(itertools.accumulate(member.blocks for member in members))
    wanted = [int((i + 0.5) * blocks / PIECES) for i in range(PIECES)]
    for number, member in enumerate(members):
        begin = ends[number] - member.blocks
        places = [place - begin for place in wanted if begin <= place < ends[number]]
        if not places:
            continue
        boxes = list(member.boxes(PIECE_BYTES))
        for at in sorted({place * len(boxes) // member.blocks for place in places}):
            yield member.plan, boxes[at]
