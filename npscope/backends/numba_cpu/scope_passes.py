"""Kernels for passes over pieces of a scope of any size: they count keys, and write by a limit."""

from __future__ import annotations

from typing import Any

import numpy as np

from npscope.backends.numba_cpu.jit import inner, kernel
from npscope.backends.numba_cpu.scalars import least
from npscope.backends.numba_cpu.strips import STRIP_ELEMENTS, call_cutter, call_reader, call_surveyor, call_writer
from npscope.backends.numba_cpu.vector_search import SLACK, mark, tie_border

_GOLDEN, _AGAIN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
"""The factors of SplitMix64 (Steele, Lea and Flood 2014): 2 ** 64 over the golden ratio, and one found by search."""


@inner
def mixed(number: Any) -> Any:
    """A number of 32 bits made of this one, by two rounds: those of one, at regular distances, follow a pattern."""
    high = number * _GOLDEN
    high ^= high >> np.uint64(32)
    return high * _AGAIN >> np.uint64(32)


@kernel
def survey(
    look: int, read: int, source: Any, first: int, bounds: Any, p0: int, p1: int, step: int, run: int, low: Any,
    high: Any, crowd: Any, found: Any, end: int, counts: Any, scratch: Any,
) -> int:  # fmt: skip
    """Count the keys of pieces [p0, p1) above `high`, and count and collect those in [low, high].

    Pieces lie between two rows of `bounds`, counted from block `first` on; of every `step` blocks a run of `run` is
    taken, up to `STRIP_ELEMENTS`, somewhere among them: in rows of a regular array, places at regular distances
    would be a few lines. Rows of `counts` tell how many keys of a piece are above, inside, and stored from `end` on in
    `found`, which are fewer where they do not fit; and how many equal `crowd`, if that is not inside. Returns where the
    stored ones end.
    """
    for p in range(p0, p1):
        above, inside, equal, start, i1 = 0, 0, 0, end, first + bounds[1, p]
        for at in range(first + bounds[0, p], i1, step):
            i = at + np.int64(mixed(np.uint64(at)) % np.uint64(step - run + 1))
            stop = least(i1, i + run)
            if i >= stop:
                break
            stores = low != high and end + stop - i + SLACK <= found.size
            over, within, same = call_surveyor(
                look, read, source, i, stop, low, high, crowd, found, end, stores, scratch
            )
            above, inside, equal = above + over, inside + within, equal + same
            if stores:
                end += within
        counts[0, p], counts[1, p], counts[2, p], counts[3, p] = above, inside, end - start, equal
    return end


@kernel
def keep_above(
    read: int, write: int, source: Any, start: int, target: Any, i0: int, i1: int, strip: int, limit: Any, ties: int,
    scratch: Any,
) -> Any:  # fmt: skip
    """Keep, of blocks [i0, i1), those above `limit` and the first `ties` equal to it; how many ties are left."""
    keys, mask, _keep, sums, norms, making = scratch
    for i in range(i0, i1, strip):
        stop = least(i1, i + strip)
        call_reader(read, source, start + i - i0, start + stop - i0, keys, sums, norms, making)
        ties = mark(keys, 0, stop - i, limit, ties, mask, 0)
        call_writer(write, target, i, stop, mask)
    return ties


@kernel
def cut_elements(cut: int, source: Any, target: Any, i0: int, border: int, i1: int, limit: Any) -> None:
    """Keep, of elements [i0, i1), those above `limit`, and those equal to it that stand before the `border`."""
    call_cutter(cut, source, target, i0, border, limit, 1)
    call_cutter(cut, source, target, border, i1, limit, 0)


@kernel
def count_ties(
    read: int, source: Any, first: int, i0: int, i1: int, limit: Any, inner: int, turns: int, counts: Any, scratch: Any
) -> None:  # fmt: skip
    """Add how many of blocks [i0, i1) equal `limit` to the counts of their turns: of `inner` blocks, from `first` on.

    After `turns` of them the first one comes again.
    """
    keys, _mask, _keep, sums, norms, making = scratch
    key = keys.dtype.type(limit)
    for i in range(i0, i1, STRIP_ELEMENTS):
        stop = least(i1, i + STRIP_ELEMENTS)
        call_reader(read, source, i, stop, keys, sums, norms, making)
        e = 0
        while e < stop - i:
            turn, past = divmod((i + e - first) % (inner * turns), inner)
            if inner == 1:
                run = least(stop - i - e, turns - turn)
                for j in range(run):
                    counts[np.uintp(turn + j)] += keys[np.uintp(e + j)] == key
            else:
                run = least(stop - i - e, inner - past)
                for j in range(run):
                    counts[np.uintp(turn)] += keys[np.uintp(e + j)] == key
            e += run


@kernel
def find_ties(
    read: int, source: Any, first: int, count: int, limit: Any, inner: int, turns: int, turn: int, found: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """The blocks of a turn, of `count` from `first` on, that equal `limit`: as many numbers as there is room for."""
    keys, _mask, _keep, sums, norms, making = scratch
    key, n = keys.dtype.type(limit), 0
    for start in range(turn * inner, count, inner * turns):
        for i in range(start, start + inner, STRIP_ELEMENTS):
            stop = least(start + inner, i + STRIP_ELEMENTS)
            call_reader(read, source, first + i, first + stop, keys, sums, norms, making)
            for j in range(stop - i):
                if keys[np.uintp(j)] == key and n < found.size:
                    found[n] = i + j
                    n += 1


@kernel
def cut_by_turns(
    cut: int, source: Any, target: Any, first: int, i0: int, i1: int, limit: Any, inner: int, turns: int, last: int
) -> None:  # fmt: skip
    """Keep, of elements [i0, i1), those above `limit`, and those equal to it in turns (`count_ties`) up to the last."""
    i = i0
    while i < i1:
        past = (i - first) % (inner * turns)
        border = (last + 1) * inner
        stays = past < border
        stop = least(i1, i + (border if stays else inner * turns) - past)
        call_cutter(cut, source, target, i, stop, limit, int(stays))
        i = stop


@kernel
def tie_border_in(read: int, source: Any, i0: int, i1: int, limit: Any, ties: int, scratch: Any) -> Any:
    """The block of [i0, i1) that equals `limit` after the first `ties` do; i1 if there is none."""
    keys, _mask, _keep, sums, norms, making = scratch
    for i in range(i0, i1, STRIP_ELEMENTS):
        stop = least(i1, i + STRIP_ELEMENTS)
        call_reader(read, source, i, stop, keys, sums, norms, making)
        border, ties = tie_border(keys, 0, stop - i, limit, ties)
        if border < stop - i:
            return i + border
    return i1
