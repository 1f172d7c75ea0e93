"""Where the survivors of a scope end, found in bounded memory for scopes of any size.

The blocks of a scope rank by (norm descending, position ascending). A `Limit` is the place in
that order after which all are dropped: the key of the last survivors, and the last position
among the blocks of that key. Keys are norms as integers of the same order.

A search reads the tensors a few times and never holds their norms: `npscope.streaming.narrowing`
says how it goes on from pass to pass, whatever the data. Without bounds a sample of the blocks
gives a first guess, so that one pass is mostly enough.
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
from npscope.streaming.narrowing import BINS, GATHER, Narrowing
from npscope.streaming.ranked import RankedReader, Slab
from npscope.streaming.slabs import SLAB_BYTES, Array, Box, elements_in, extents, tiles, whole

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

    def span(self, box: Box) -> tuple[int, int]:
        """The positions of the first and the last block of a box."""
        first = last = 0
        for axis, size, length in zip(self.plan.order, self.plan.block, self.grid, strict=True):
            start, stop = ((end - self.region[axis].start) // size for end in (box[axis].start, box[axis].stop))
            first, last = first * length + start, last * length + stop - 1
        return first, last


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
        self._bits: type[np.unsignedinteger[Any]] = np.uint64 if self.are_wide else np.uint32
        self._nan_bits = np.asarray(np.nan, self.floats).view(self._bits)
        self._infinity_bits = np.asarray(np.inf, self.floats).view(self._bits)
        self.infinity = int(self._infinity_bits) >> self._unused
        self.nan = int(self._nan_bits) >> self._unused
        """The key of a block with NaN, above all others."""

    def of(self, plan: Plan, ranked: Array) -> Array:
        """The keys of the blocks of part of a planned tensor, on their grid."""
        norms = block_norms(ranked, plan.block, ord=plan.ord).astype(self.floats, copy=False)
        bits = norms.view(self._bits)
        if bits.size and bits.max() > self._infinity_bits:  # NaN of either sign, which all tie
            np.copyto(bits, self._nan_bits, where=bits > self._infinity_bits)
        keys: Array = bits.view(self.integers)
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


class Search:
    """Finds limits of scopes in one file; `tick` is called with the bytes of every slab that was read."""

    def __init__(self, reader: RankedReader, tick: Callable[[int], None] = lambda nbytes: None) -> None:
        self._reader, self.tick = reader, tick

    def limits(
        self, members: Sequence[Member], keep: int, keys: Keys, bounds: Sequence[tuple[int, int]] | None = None
    ) -> list[Limit]:
        """The limit for each member that leaves the first `keep` of the blocks of all, as far as `bounds` allow.

        Blocks of one key survive in the order of the members, and in each in the order of positions.
        `bounds` are the least and the most survivors of each member; all together allow `keep`.
        """
        counts = [member.blocks for member in members]
        narrowing = Narrowing(counts, bounds or [(0, count) for count in counts], keep, keys.nan)
        if bounds is None and narrowing.open and sum(counts) > GATHER:
            narrowing.guess(*self._guess(members, keep / sum(counts), sum(counts), keys))
        while open_ := narrowing.open:
            narrowing.begin()
            for number, slab in self._members([members[i] for i in open_]):
                narrowing.add(open_[number], keys.of(members[open_[number]].plan, slab.ranked))
            narrowing.settle()
        ties = [
            _Ties(member, cut.key, cut.taken, cut.ties)
            for member, cut in zip(members, narrowing.cuts, strict=True)
            if 0 < cut.taken < cut.ties
        ]
        self._cut(ties, keys)
        lasts = iter([each.last for each in ties])
        return [
            Limit(
                cut.key,
                next(lasts) if 0 < cut.taken < cut.ties else member.blocks if cut.taken else -1,
                cut.above + cut.taken,
            )
            for member, cut in zip(members, narrowing.cuts, strict=True)
        ]

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

    def _guess(self, members: Sequence[Member], share: float, blocks: int, keys: Keys) -> tuple[int, int, float]:
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
        return low, high, 1.1 * float(inside) * blocks / sample.size

    def _cut(self, every: Sequence[_Ties], keys: Keys) -> None:
        """Find the last position of all these, in one pass unless members have very many blocks."""
        while open_ := [ties for ties in every if not ties.is_settled]:
            room = GATHER
            for ties in sorted(open_, key=lambda ties: ties.ties):
                ties.begin(gathers=ties.ties <= room, bins=max(2, BINS // len(open_)))
                room -= ties.ties
            wanted = ((i, ties.member.plan, box) for i, ties in enumerate(open_) for box in ties.boxes())
            for number, slab in self._slabs(wanted):
                ties = open_[number]
                ties.add(slab.box, keys.of(ties.member.plan, slab.ranked) == ties.key)
            for ties in open_:
                ties.settle()


class _Ties:
    """Blocks of one member that tie, of which the first `count` survive: finds the position of the last survivor.

    It lies in ``low <= position <= high``, `ties` of them there.
    """

    def __init__(self, member: Member, key: int, count: int, ties: int) -> None:
        self.member, self.key, self.ties = member, key, ties
        self._count = count
        self._low, self._high = 0, member.blocks - 1
        self._gathered: list[Array] | None = None
        self._counts = np.zeros(0, np.int64)

    @property
    def is_settled(self) -> bool:
        """Whether the position is known."""
        return self._low == self._high

    @property
    def last(self) -> int:
        """The position, when it is known."""
        return self._low

    def begin(self, *, gathers: bool, bins: int) -> None:
        """Get ready for a pass."""
        width = self._high - self._low + 1
        self._shift = max(0, (width - 1).bit_length() - bins.bit_length() + 1)
        self._gathered = [] if gathers else None
        self._counts = np.zeros(0 if gathers else ((width - 1) >> self._shift) + 1, np.int64)

    def boxes(self) -> Iterator[Box]:
        """Boxes that hold all positions at issue."""
        for box in self.member.boxes(SLAB_BYTES):
            first, last = self.member.span(box)
            if first <= self._high and last >= self._low:
                yield box

    def add(self, box: Box, chosen: Array) -> None:
        """Take in which blocks of a box tie."""
        places = self.member.positions(box, chosen)
        places = places[(places >= self._low) & (places <= self._high)]
        if self._gathered is not None:
            self._gathered.append(places)
        else:
            self._counts += np.bincount((places - self._low) >> self._shift, minlength=self._counts.size)

    def settle(self) -> None:
        """Draw the conclusions of a pass."""
        if self._gathered is not None:
            self._low = self._high = int(np.partition(np.concatenate(self._gathered), self._count - 1)[self._count - 1])
            self._gathered = None
            return
        totals = self._counts.cumsum()
        chosen = int(np.searchsorted(totals, self._count))
        self._count -= int(totals[chosen] - self._counts[chosen])
        self.ties = int(self._counts[chosen])
        self._low += chosen << self._shift
        self._high = min(self._high, self._low + (1 << self._shift) - 1)


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
