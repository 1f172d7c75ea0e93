"""Walks over memory for code that LLVM is given: ranges of blocks that follow each other, and rows of these.

As loops in Python, around what takes rows in or writes them, they took Numba a tenth of a second each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from npscope.backends.numba_cpu.nests import length_in, place_in
from npscope.backends.numba_cpu.vectors import Builder, Value, prefetch

TOGETHER = 4
"""Rows that are read side by side, at most: a sum of four is stored, and dealt out to its block, only once."""

FAR = 1 << 11
"""Elements between what is read and what is prefetched, at most, where one row is read alone."""

_WORD = ir.IntType(64)


class Grid(NamedTuple):
    """Where block 0 of an array is, and the table of so many loops over its blocks."""

    start: Value
    table: Value
    loops: Value

    def place(self, b: Builder, block: Value) -> Value:
        """How far from the start a block is."""
        return place_in(b, self.table, self.loops, block)


class Strip(NamedTuple):
    """Blocks [i, stop) of an array, and the table of so many loops over the elements of one."""

    grid: Grid
    elements: Value
    turns: Value
    i: Value
    stop: Value


class Runs(NamedTuple):
    """How blocks lie line by line, as code is made for: in runs of so many elements, one in each row.

    Runs are `length` elements, and if they are `flat` there is one row; or `long`, any whole vectors and this rest.
    """

    length: int
    long: bool
    flat: bool


class Rows(NamedTuple):
    """A run of each of `count` adjacent blocks, in each of some rows."""

    source: Value
    """Where the first run is."""
    block: Value
    """How many blocks of the strip come before."""
    count: Value
    size: Value
    """Elements of a run."""
    rows: Value
    step: Value
    """How far these rows lie apart."""
    jump: Value
    """How far from the first of them that lies which is read next."""
    row: Value
    """The number of the first of them."""
    last: Value
    """Whether they are the last rows of their blocks."""


class Shape(NamedTuple):
    """Of the blocks of a strip: elements of a run, and rows; rows in the innermost loop over them, and their step."""

    size: Value
    rows: Value
    turns: Value
    step: Value


def shape_of(b: Builder, strip: Strip, runs: Runs) -> Shape:
    """What the tables of a strip say of its blocks."""

    def entry(row: Value, loop: Value) -> Value:
        return b.load(b.gep(strip.elements, [b.add(row, loop)]))

    size = entry(_WORD(0), b.sub(strip.turns, _WORD(1))) if runs.long else _WORD(runs.length)
    # Of a single row, too: where LLVM knows that it is one, it reads blocks before it knows whether they take a detour,
    # and has no registers left. Blocks of nine adjacent elements took a tenth longer to write.
    rows = b.sdiv(length_in(b, strip.elements, strip.turns), size)
    if runs.flat:
        return Shape(size, rows, _WORD(1), _WORD(0))
    several = b.icmp_signed(">", rows, _WORD(1))
    # The elements of a run are a loop of their own, inside of those over rows, but for runs of one.
    over_rows = _WORD(1 if runs.length == 1 and not runs.long else 2)
    loop = b.select(several, b.sub(strip.turns, over_rows), _WORD(0))
    turns, step = b.select(several, entry(_WORD(0), loop), _WORD(1)), entry(strip.turns, loop)
    return Shape(size, rows, turns, step)


def smallest(b: Builder, x: Value, *others: Value) -> Value:
    """The least of some integers."""
    for y in others:
        x = b.select(b.icmp_signed("<", x, y), x, y)
    return x


@contextmanager
def up_to(b: Builder, start: Value, stop: Value) -> Iterator[tuple[Value, Callable[[Value], None]]]:
    """A loop while a number that starts here is below `stop`: (the number, what sets the next one)."""
    place = cgutils.alloca_once_value(b, start)
    head, turn, after = (b.append_basic_block(name) for name in ("head", "turn", "after"))
    b.branch(head)
    b.position_at_end(head)
    number = b.load(place)
    b.cbranch(b.icmp_signed("<", number, stop), turn, after)
    b.position_at_end(turn)
    yield number, lambda following: b.store(following, place)
    b.branch(head)
    b.position_at_end(after)


@contextmanager
def over_ranges(
    b: Builder, grids: Sequence[Grid], i: Value, stop: Value, most: Value = None
) -> Iterator[tuple[Value, Value, list[Value]]]:
    """A loop over the ranges of blocks [i, stop) that follow each other in all arrays, of up to `most`.

    (number of the first block, of the first behind it, how far from the start of each array the first one is).
    """
    widths = [b.load(b.gep(grid.table, [b.sub(grid.loops, _WORD(1))])) for grid in grids]
    with up_to(b, i, stop) as (first, go_on_with):
        after = stop if most is None else smallest(b, stop, b.add(first, most))
        for width in widths:
            after = smallest(b, after, b.add(first, b.sub(width, b.srem(first, width))))
        yield first, after, [grid.place(b, first) for grid in grids]
        go_on_with(after)


def over_lanes(b: Builder, count: Value, lanes: int, take: Callable[[Value, int], None]) -> None:
    """``take(e, n)`` for `count` numbers, from number e on n of them: `lanes`, and of those that are left 1."""
    whole = b.sub(count, b.urem(count, _WORD(lanes)))
    for start, stop, n in ((_WORD(0), whole, lanes), (whole, count, 1)):
        with cgutils.for_range_slice(b, start, stop, _WORD(n)) as (e, _):
            take(e, n)


def over_elements(b: Builder, strip: Strip, size: Value, lanes: int, take: Callable[[Value, int], None]) -> None:
    """``take(address, n)`` for all elements of the blocks of a strip, the first of each block, the second ones, ...

    Blocks have `size` of them, and those of blocks that follow each other are adjacent: n of them at a time.
    """
    with cgutils.for_range(b, size) as loop:
        start = b.gep(strip.grid.start, [place_in(b, strip.elements, strip.turns, loop.index)])
        with over_ranges(b, [strip.grid], strip.i, strip.stop) as (first, after, (at,)):
            here = b.gep(start, [at])
            over_lanes(b, b.sub(after, first), lanes, lambda e, n: take(b.gep(here, [e]), n))


def over_rows(
    b: Builder,
    strip: Strip,
    runs: Runs,
    shape: Shape,
    take: Callable[[Rows], None],
    most: Value = None,
    finish: Callable[[Value, Value, Value], None] | None = None,
) -> None:
    """``take(rows)`` for all rows of the blocks of a strip, a range of up to `most` adjacent blocks after the other.

    After those of a range, ``finish(i, block, count)`` with the number of its first block, and in the strip.
    """
    zero, here = _WORD(0), cgutils.alloca_once(b, _WORD)
    grid = strip.grid
    with over_ranges(b, [grid], strip.i, strip.stop, most) as (i, after, (first,)):
        block, count = b.sub(i, strip.i), b.sub(after, i)
        following = grid.place(b, after)
        b.store(first, here)

        def take_rows(rows: Value, step: Value, row: Value, last: Value, further: Value) -> None:
            at = b.load(here)
            b.store(further, here)
            take(Rows(b.gep(grid.start, [at]), block, count, shape.size, rows, step, b.sub(further, at), row, last))

        if runs.flat:
            take_rows(shape.rows, zero, zero, ir.IntType(1)(1), following)
        else:
            with up_to(b, zero, shape.rows) as (row, go_on_from):
                rows = _WORD(1)
                if not runs.long:
                    left = b.sub(shape.turns, b.srem(row, shape.turns))
                    rows = smallest(b, _WORD(TOGETHER), b.sub(shape.rows, row), left)
                row_after = b.add(row, rows)
                last = b.icmp_signed("==", row_after, shape.rows)
                inside = b.add(first, place_in(b, strip.elements, strip.turns, b.mul(row_after, shape.size)))
                take_rows(rows, shape.step, row, last, b.select(last, following, inside))
                go_on_from(row_after)
        if finish is not None:
            finish(i, block, count)


class Ahead:
    """Asks for what comes next in memory, row by row, while rows are read side by side.

    Memory that is asked for in four rows at a time takes a third longer.
    """

    def __init__(self, b: Builder, bits: int, rows: Rows, *, flat: bool) -> None:
        """`flat`: the rows are a single one."""
        self.b, self.bits, self.flat, self.width, self.step = b, bits, flat, b.mul(rows.count, rows.size), rows.step
        alone = b.icmp_signed("==", rows.rows, _WORD(1))
        far = b.and_(b.icmp_signed(">", self.width, _WORD(FAR)), alone)
        start = b.gep(rows.source, [b.select(far, _WORD(FAR), rows.jump)])
        self.place, self.column = (cgutils.alloca_once_value(b, x) for x in (start, _WORD(0)))

    def fetch(self, length: int) -> None:
        """Ask for as many elements as are read now."""
        b = self.b
        here, distance = b.load(self.place), _WORD(length)
        prefetch(b, here, length * self.bits // 8, _WORD(0))
        if not self.flat:
            column = b.load(self.column)
            further = b.add(column, distance)
            ends = b.icmp_signed(">=", further, self.width)
            b.store(b.select(ends, _WORD(0), further), self.column)
            distance = b.select(ends, b.sub(self.step, column), distance)
        b.store(b.gep(here, [distance]), self.place)
