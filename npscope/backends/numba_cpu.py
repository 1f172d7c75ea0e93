"""The CPU backend: Numba kernels over pieces of the block grid, on a pool of threads.

Every operation walks pieces: ranges of whole scopes, or of the blocks of a scope too large
for one piece. Per piece the norms or keys of the blocks come into dense work arrays, the
decision is made there, and the decision is written back. The work arrays are allocated
before the first write; for 1-element blocks nothing else is, because the passes over a
large scope (radix digits, ties, writing) read the array again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from npscope.backends import numba_kernels as nk
from npscope.backends import threads
from npscope.backends.numba_codecs import Codec, codec
from npscope.dtypes import common_norm, kind_of
from npscope.errors import ConvergenceError
from npscope.options import thread_count
from npscope.tiling import Cut, Dim, Leaf, Part, Parts

NAME = "numba"
WRITES_THROUGH = True

Array = Any

PIECE_ELEMENTS = 1 << 18
"""Elements of a piece: 1 MiB of float32, so that it stays in a core's cache between its passes."""

PIECE_BLOCKS = 1 << 18
"""Blocks of a piece at most; also the largest scope that is decided in one piece."""

SERIAL_ELEMENTS = 1 << 16
"""Below this many elements a call is about 0.1 ms of work and runs in the calling thread."""

PIECES_PER_THREAD = 4
"""Pieces that each thread gets at least, so that all finish together."""

UNSURE_ROWS = 2048
"""Undecided norms that are summed exactly at a time."""


# --- operands ------------------------------------------------------------------------------------


class _Memory:
    """Raw memory as a flat writable buffer: one kernel signature, whatever flags and strides an array has."""

    def __init__(self, owner: np.ndarray, address: int, length: int, unit: np.dtype) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (length,),
            "typestr": unit.str,
            "version": 3,
        }


@lru_cache(maxsize=4096)
def _nest(dims: tuple[Dim, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Loops over axes with these strides as a (sizes, strides) table; loops that continue each other are one."""
    merged: list[tuple[int, int]] = []
    for dim in dims:
        size, stride = dim.size, dim.step * strides[dim.axis]
        if merged and merged[-1][1] == stride * size:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return np.asarray(merged or [(1, 0)], dtype=np.int64).T.copy()


class Operand:
    """A leaf as kernels see it: flat buffer, origin, and the loop tables of its grid and its elements."""

    def __init__(self, leaf: Leaf, like: Operand | None = None) -> None:
        array: np.ndarray = leaf.array
        dtype = array.dtype
        kind = None if dtype == np.bool_ else kind_of(dtype)
        address: int = array.__array_interface__["data"][0]
        strides, itemsize = array.strides, dtype.itemsize
        low = sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True) if s < 0)
        high = sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True) if s > 0) + itemsize
        scalar = itemsize // 2 if kind is not None and kind.is_complex else itemsize
        bytewise = not (
            dtype.isnative
            and (address + low) % scalar == 0
            and all(s % scalar == 0 for n, s in zip(array.shape, strides, strict=True) if n > 1)
        )
        self.codec: Codec | None = None if kind is None else codec(kind, bytewise, not dtype.isnative)
        unit = np.dtype(np.bool_) if self.codec is None else self.codec.unit
        self.buffer = np.asarray(_Memory(array, address + low, (high - low) // unit.itemsize, unit))
        self.origin = -low // unit.itemsize
        steps = tuple(s // unit.itemsize for s in strides)
        cut = leaf.cut
        # Elements of a block may come in any order, so the order of memory: contiguous innermost.
        self.order = like.order if like else tuple(sorted(cut.element, key=lambda d: -abs(d.step * steps[d.axis])))
        self.elements = _nest(self.order, steps)
        self.grid = _nest((*cut.scope, *cut.block), steps)
        self.size = cut.elements

    @property
    def where(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        """The leading arguments of a kernel."""
        return self.buffer, self.origin, self.grid, self.elements


class Competitors:
    """The blocks of one part: its operands, and how its blocks are measured."""

    def __init__(self, part: Part) -> None:
        kinds = [kind_of(leaf.array.dtype) for leaf in part]
        self.leaves = [Operand(leaf) for leaf in part]
        self.cut: Cut = part[0].cut
        self.blocks = self.cut.blocks
        self.total = self.cut.scopes * self.cut.blocks
        self.elements = sum(leaf.size for leaf in self.leaves)
        self.norm = np.dtype(common_norm(kinds))
        self.exact = all(kind.rounds_correctly for kind in kinds)
        self.wide_integers = all(kind.is_wide_integer for kind in kinds)


def _competitors(parts: Parts) -> list[Competitors]:
    return [Competitors(part) for part in parts]


# --- pieces --------------------------------------------------------------------------------------


def _workers(elements: int) -> int:
    return 1 if elements < SERIAL_ELEMENTS else thread_count()


def _piece_length(total: int, elements: int, workers: int) -> int:
    """Items (blocks or scopes of `elements` elements each) to a piece."""
    limit = max(1, min(PIECE_ELEMENTS // max(1, elements), PIECE_BLOCKS))
    fair = -(-total // (workers * PIECES_PER_THREAD))
    return max(1, min(limit, fair) if workers > 1 else limit)


def _ranges(
    total: int, elements: int, make_work: Callable[[int, int], Callable[[int, int, int], None]]
) -> Callable[[], None]:
    """A job that works off [0, total), items of `elements` elements each, in ranges on the pool.

    ``make_work(slots, length)`` allocates for that many threads and ranges up to that length, now,
    and returns ``work(slot, start, stop)``. So a writer has all its memory before it starts.
    """
    if total == 0:
        return lambda: None
    workers = _workers(total * elements)
    length = _piece_length(total, elements, workers)
    pieces = -(-total // length)
    work = make_work(min(workers, pieces), length)
    return lambda: threads.run(pieces, lambda slot, p: work(slot, p * length, min(total, (p + 1) * length)), workers)


# --- norms ---------------------------------------------------------------------------------------


class NormWork:
    """Work arrays for the norms of up to `length` blocks of a part, and the passes that fill them."""

    def __init__(self, part: Competitors, ord: float, length: int) -> None:
        self.part = part
        self.p = ord
        single = part.elements == 1
        self.code = nk.INF if single or math.isinf(ord) else {1: nk.ONE, 2: nk.TWO}.get(ord, nk.POWER)  # type: ignore[call-overload]
        self.chunk = nk.EXACT_CHUNK if part.exact else nk.WIDE_CHUNK
        self.hi, self.lo = np.empty(length), np.empty(length)
        self.norm = np.empty(length, dtype=part.norm)
        self.top = np.empty(length if self.code == nk.POWER else 1)
        self.unsure = np.empty(length if self.code in (nk.ONE, nk.TWO) else 0, dtype=np.int64)
        rows = min(length, UNSURE_ROWS) if part.exact else 0
        self.limbs = np.empty((rows, nk.LIMBS), dtype=np.int64)

    def fill(self, i0: int, i1: int) -> tuple[np.ndarray, np.ndarray]:
        """(norms, the same in float64) of blocks [i0, i1); views that the next call overwrites."""
        count = i1 - i0
        hi, lo, norm = self.hi[:count], self.lo[:count], self.norm[:count]
        if self.code == nk.POWER:
            self._scaled(i0, i1, hi, lo, self.top[:count], norm)
            return norm, hi
        self._sums(self.code, i0, i1, hi, lo)
        if self.code == nk.INF:
            norm[:] = hi
        elif self.part.exact:
            unsure = nk.finish_exact(hi, lo, self.code == nk.TWO, norm, self.unsure)
            for start in range(0, unsure, UNSURE_ROWS):
                self._decide(i0, self.unsure[start : min(unsure, start + UNSURE_ROWS)], norm)
        else:
            for b in self.unsure[: nk.finish_wide(hi, lo, self.code == nk.TWO, norm, self.unsure)]:
                one = slice(b, b + 1)
                self._scaled(i0 + b, i0 + b + 1, hi[one], lo[one], self.top, norm[one])
        return norm, hi

    def _sums(self, code: int, i0: int, i1: int, hi: np.ndarray, lo: np.ndarray) -> None:
        hi[:], lo[:] = 0.0, 0.0
        for leaf in self.part.leaves:
            nk.kernels(leaf.codec).accumulate(*leaf.where, i0, i1, 0, leaf.size, code, self.chunk, hi, lo)

    def _scaled(self, i0: int, i1: int, hi: np.ndarray, lo: np.ndarray, top: np.ndarray, norm: np.ndarray) -> None:
        """Norms by sums of powers of |x| / max |x|, which neither over- nor underflow."""
        self._sums(nk.INF, i0, i1, top, lo)
        hi[:], lo[:] = 0.0, 0.0
        for leaf in self.part.leaves:
            nk.kernels(leaf.codec).accumulate_scaled(*leaf.where, i0, i1, 0, leaf.size, top, self.p, hi, lo)
        nk.finish_scaled(hi, lo, top, self.p, norm)

    def _decide(self, i0: int, chosen: np.ndarray, norm: np.ndarray) -> None:
        """The norms of the `chosen` blocks, rounded by their exact sums."""
        self.limbs[: chosen.size] = 0
        square = self.code == nk.TWO
        for leaf in self.part.leaves:
            nk.kernels(leaf.codec).accumulate_limbs(*leaf.where, i0, chosen, chosen.size, leaf.size, square, self.limbs)
        nk.finish_unsure(self.limbs, chosen, chosen.size, square, norm)


def _norm_ranges(
    part: Competitors,
    ord: float,
    make_use: Callable[[int, int], Callable[[int, int, int, np.ndarray, np.ndarray], None]],
) -> Callable[[], None]:
    """A job that hands ``use(slot, i0, i1, norm, wide)`` the norms of all blocks of a part, piece by piece."""

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [NormWork(part, ord, length) for _ in range(slots)]
        use = make_use(slots, length)
        return lambda slot, i0, i1: use(slot, i0, i1, *works[slot].fill(i0, i1))

    return _ranges(part.total, part.elements, make_work)


def norms(parts: Parts, ord: float | None) -> Array:
    """Norm of every block: ``(S, n)`` in the norm's dtype."""
    competitors = _competitors(parts)
    scopes, n = competitors[0].cut.scopes, sum(part.blocks for part in competitors)
    result = np.empty((scopes, n), dtype=max(part.norm for part in competitors))
    start = 0
    for part in competitors:
        _norms_into(part, float(ord or 2), result[:, start : start + part.blocks])
        start += part.blocks
    return result


def _norms_into(part: Competitors, ord: float, columns: np.ndarray) -> None:
    """The norms of a part into its columns of a table."""

    def make_use(slots: int, length: int) -> Callable[..., None]:
        def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
            _put(columns, i0, i1, norm)

        return use

    _norm_ranges(part, ord, make_use)()


def _put(columns: np.ndarray, i0: int, i1: int, values: np.ndarray) -> None:
    """`values` into entries [i0, i1), counted row by row, of a table whose rows may lie apart."""
    if columns.flags.c_contiguous:
        columns.reshape(-1)[i0:i1] = values
        return
    n = columns.shape[1]
    i = i0
    while i < i1:
        row, column = divmod(i, n)
        count = min(i1 - i, n - column)
        if column == 0 and i1 - i >= n:
            rows = (i1 - i) // n
            columns[row : row + rows] = values[i - i0 : i - i0 + rows * n].reshape(rows, n)
            i += rows * n
        else:
            columns[row, column : column + count] = values[i - i0 : i - i0 + count]
            i += count


# --- ranking -------------------------------------------------------------------------------------


class KeyWork:
    """Work arrays to read up to `length` blocks of a part as ordered integers."""

    def __init__(
        self, part: Competitors, ord: float | None, exact_integers: bool, dtype: np.dtype, length: int
    ) -> None:
        self.part = part
        self.norms: NormWork | None = None
        if ord is not None and not (part.elements == 1 and (exact_integers or not part.wide_integers)):
            self.norms = NormWork(part, ord, length)
            return
        made = nk.kernels(part.leaves[0].codec)
        self.kernel = made.keys_signed if ord is None else made.keys32 if dtype.itemsize == 4 else made.keys64

    def fill(self, i0: int, i1: int, keys: np.ndarray) -> None:
        """The keys of blocks [i0, i1)."""
        if self.norms is not None:
            nk.keys_of_norms(self.norms.fill(i0, i1)[0], keys)
        else:
            leaf = self.part.leaves[0]
            self.kernel(leaf.buffer, leaf.origin, leaf.grid, i0, i1, keys)


class Ranking:
    """The blocks of all parts as ordered integers, and the choice of the first-ranked of every scope."""

    def __init__(self, parts: Parts, ord: float | None) -> None:
        self.parts = _competitors(parts)
        self.ord = ord
        self.exact_integers = all(part.wide_integers and part.elements == 1 for part in self.parts)
        if ord is None:
            codec_ = self.parts[0].leaves[0].codec
            width = 64 if codec_ is None else codec_.signed_width
        else:
            width = 8 * max(part.norm.itemsize for part in self.parts)
        self.key = np.dtype(f"u{width // 8}")
        self.scopes = self.parts[0].cut.scopes
        self.blocks = sum(part.blocks for part in self.parts)
        self.elements = sum(part.blocks * part.elements for part in self.parts)
        self.fits_a_piece = self.blocks <= PIECE_BLOCKS

    def work(self, part: Competitors, length: int) -> KeyWork:
        return KeyWork(part, self.ord, self.exact_integers, self.key, length)

    @cached_property
    def columns(self) -> list[slice]:
        """Where each part's blocks stand among the blocks of a scope."""
        starts = np.cumsum([0, *(part.blocks for part in self.parts)]).tolist()
        return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


class ScopeWork:
    """Work arrays of one thread for up to `length` whole scopes."""

    def __init__(self, ranking: Ranking, counts: Operand, length: int) -> None:
        self.ranking = ranking
        self.counts = counts
        self.works = [ranking.work(part, length * part.blocks) for part in ranking.parts]
        self.keys = np.empty(length * ranking.blocks, dtype=ranking.key)
        several = len(ranking.parts) > 1
        longest = max(part.blocks for part in ranking.parts) * length if several else 0
        self.part_keys, self.part_mask = np.empty(longest, dtype=ranking.key), np.empty(longest, dtype=np.bool_)
        self.mask = np.empty(length * ranking.blocks, dtype=np.bool_)
        self.keep = np.empty(length, dtype=np.int64)
        self.digits = np.empty(256, dtype=np.int64)

    def load(self, s0: int, s1: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys of all blocks of scopes [s0, s1), their counts)."""
        ranking, rows = self.ranking, s1 - s0
        keys, keep = self.keys[: rows * ranking.blocks], self.keep[:rows]
        nk.gather(self.counts.buffer, self.counts.origin, self.counts.grid, s0, s1, keep)
        for work, columns in zip(self.works, ranking.columns, strict=True):
            n = work.part.blocks
            if len(self.works) == 1:
                work.fill(s0 * n, s1 * n, keys)
            else:
                part_keys = self.part_keys[: rows * n]
                work.fill(s0 * n, s1 * n, part_keys)
                keys.reshape(rows, ranking.blocks)[:, columns] = part_keys.reshape(rows, n)
        return keys, keep

    def masks(self, s0: int, s1: int) -> list[np.ndarray]:
        """Each part's mask of the kept blocks of scopes [s0, s1), dense."""
        keys, keep = self.load(s0, s1)
        rows, n = s1 - s0, self.ranking.blocks
        mask = self.mask[: rows * n]
        nk.select_rows(keys, rows, n, keep, mask, self.digits)
        if len(self.works) == 1:
            return [mask]
        return [np.ascontiguousarray(mask.reshape(rows, n)[:, columns]).reshape(-1) for columns in self.ranking.columns]


Sink = Callable[[int, int, int, np.ndarray], None]
"""``sink(part, i0, i1, mask)`` takes the mask of blocks [i0, i1) of a part."""


def _select(ranking: Ranking, keep: Leaf, sink: Sink, ready: Callable[[], None] = lambda: None) -> None:
    """Hand `sink` the mask of the `keep` first-ranked blocks of every scope, piece by piece.

    `ready` is called once, when everything is allocated and before the first mask.
    """
    if ranking.scopes * ranking.blocks == 0:
        return
    counts = Operand(keep)
    if not ranking.fits_a_piece:
        keeps = np.empty(ranking.scopes, dtype=np.int64)
        nk.gather(counts.buffer, counts.origin, counts.grid, 0, ranking.scopes, keeps)
        selection = LargeScopes(ranking)
        ready()
        for scope, k in enumerate(keeps.tolist()):
            selection.select(scope, k, sink)
        return

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [ScopeWork(ranking, counts, length) for _ in range(slots)]

        def work(slot: int, s0: int, s1: int) -> None:
            for p, mask_ in enumerate(works[slot].masks(s0, s1)):
                n = ranking.parts[p].blocks
                sink(p, s0 * n, s1 * n, mask_)

        return work

    job = _ranges(ranking.scopes, ranking.elements, make_work)
    ready()
    job()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks [b0, b1) of a scope of part `part`, `at` positions into the scope."""

    part: int
    b0: int
    b1: int
    at: int


class LargeScopes:
    """Selection in scopes larger than a piece: radix passes over all their blocks, one digit a pass.

    Keys of 1-element blocks are read from the array in every pass; norms are computed once
    and kept, which is O(blocks). Counts are integers, so threads cannot change the outcome.
    """

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self.workers = _workers(ranking.elements)
        lengths = [_piece_length(p.blocks, p.elements, self.workers) for p in ranking.parts]
        self.pieces = [
            _Piece(p, b0, min(part.blocks, b0 + length), columns.start + b0)
            for p, (part, length, columns) in enumerate(zip(ranking.parts, lengths, ranking.columns, strict=True))
            for b0 in range(0, part.blocks, length)
        ]
        self.works = [
            [ranking.work(part, n) for part, n in zip(ranking.parts, lengths, strict=True)] for _ in range(self.workers)
        ]
        self.norm_keys = np.empty(ranking.blocks if self._has_norms else 0, dtype=ranking.key)
        longest = max(lengths)
        self.keys = np.empty((self.workers, longest), dtype=ranking.key)
        self.mask = np.empty((self.workers, longest), dtype=np.bool_)
        self.digits = np.empty((self.workers, 1 << nk.DIGIT_BITS), dtype=np.int64)
        self.ties = np.empty(len(self.pieces), dtype=np.int64)

    @property
    def _has_norms(self) -> bool:
        return any(work.norms is not None for work in self.works[0])

    def _load(self, slot: int, piece: _Piece, scope: int) -> np.ndarray:
        """The keys of a piece."""
        count = piece.b1 - piece.b0
        work = self.works[slot][piece.part]
        if work.norms is not None:
            return self.norm_keys[piece.at : piece.at + count]
        keys = self.keys[slot, :count]
        first = scope * work.part.blocks
        work.fill(first + piece.b0, first + piece.b1, keys)
        return keys

    def _each(self, use: Callable[[int, int, _Piece], None]) -> None:
        threads.run(len(self.pieces), lambda slot, p: use(slot, p, self.pieces[p]), self.workers)

    def _compute_norms(self, scope: int) -> None:
        def use(slot: int, p: int, piece: _Piece) -> None:
            work = self.works[slot][piece.part]
            if work.norms is not None:
                first = scope * work.part.blocks
                keys = self.norm_keys[piece.at : piece.at + piece.b1 - piece.b0]
                work.fill(first + piece.b0, first + piece.b1, keys)

        self._each(use)

    def nth(self, scope: int, k: int) -> tuple[int, int]:
        """(k-th largest key of a scope, how many keys equal to it are among the k largest)."""
        if self._has_norms:
            self._compute_norms(scope)
        prefix = known = 0
        for shift in range(8 * self.ranking.key.itemsize - nk.DIGIT_BITS, -1, -nk.DIGIT_BITS):
            self.digits[:] = 0

            def use(slot: int, p: int, piece: _Piece) -> None:
                keys = self._load(slot, piece, scope)
                nk.digit_counts(
                    keys, 0, keys.size, np.uint64(prefix), np.uint64(known), np.uint64(shift), self.digits[slot]
                )

            self._each(use)
            from_top = np.cumsum(self.digits.sum(axis=0)[::-1])
            place = int(np.searchsorted(from_top, k))
            k -= int(from_top[place - 1]) if place else 0
            prefix |= ((1 << nk.DIGIT_BITS) - 1 - place) << shift
            known |= ((1 << nk.DIGIT_BITS) - 1) << shift
        return prefix, k

    def select(self, scope: int, k: int, sink: Sink) -> None:
        """Hand `sink` the mask of the k first-ranked blocks of a scope."""
        limit, ties = self._limit(scope, k)
        limit_ = np.uint64(limit)

        def count(slot: int, p: int, piece: _Piece) -> None:
            keys = self._load(slot, piece, scope)
            self.ties[p] = nk.count_equal(keys, keys.size, limit_)

        def write(slot: int, p: int, piece: _Piece) -> None:
            keys = self._load(slot, piece, scope)
            mask_ = self.mask[slot, : keys.size]
            nk.mark(keys, 0, keys.size, limit_, left[p], mask_)
            first = scope * self.ranking.parts[piece.part].blocks
            sink(piece.part, first + piece.b0, first + piece.b1, mask_)

        self._each(count)
        before = np.cumsum(self.ties) - self.ties
        left = np.maximum(ties - before, 0)
        self._each(write)

    def _limit(self, scope: int, k: int) -> tuple[int, int]:
        if 0 < k < self.ranking.blocks:
            return self.nth(scope, k)
        if self._has_norms:
            self._compute_norms(scope)
        # All are kept above key 0 with every tie, or none above the largest key.
        return (0, self.ranking.blocks) if k > 0 else ((1 << 64) - 1, 0)


def mask(parts: Parts, keep: Leaf, ord: float | None) -> Array:
    """True for the `keep` first-ranked blocks of every scope: ``(S, n)`` bool."""
    ranking = Ranking(parts, ord)
    result = np.empty((ranking.scopes, ranking.blocks), dtype=np.bool_)
    columns = [result[:, c] for c in ranking.columns]
    _select(ranking, keep, lambda part, i0, i1, mask_: _put(columns[part], i0, i1, mask_))
    return result


def kth(parts: Parts, k: Leaf, ord: float | None) -> Array:
    """The k-th largest rank value of every scope: ``(S,)``."""
    ranking = Ranking(parts, ord)
    found = np.empty(ranking.scopes, dtype=ranking.key)
    if ranking.scopes and ranking.fits_a_piece:
        counts = Operand(k)

        def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
            works = [ScopeWork(ranking, counts, length) for _ in range(slots)]

            def work(slot: int, s0: int, s1: int) -> None:
                keys, keep = works[slot].load(s0, s1)
                nk.kth_rows(keys, s1 - s0, ranking.blocks, keep, found[s0:s1], works[slot].digits)

            return work

        _ranges(ranking.scopes, ranking.elements, make_work)()
    elif ranking.scopes:
        selection = LargeScopes(ranking)
        keeps = np.broadcast_to(k.array, k.array.shape).reshape(-1)
        for scope in range(ranking.scopes):
            found[scope] = selection.nth(scope, int(keeps[scope]))[0]
    return _values_of_keys(found, parts, ord, ranking.exact_integers)


def _values_of_keys(keys: np.ndarray, parts: Parts, ord: float | None, exact_integers: bool) -> np.ndarray:
    """The numbers that keys stand for: norms, or signed values in the dtype of their array."""
    unsigned, floating = keys.dtype, np.dtype(f"f{keys.itemsize}")
    sign = unsigned.type(1 << (8 * keys.itemsize - 1))
    if ord is not None:
        if exact_integers:
            return keys.astype(np.float64)
        values = keys.view(floating).copy()
        values[keys == unsigned.type(-1 & ((1 << 8 * keys.itemsize) - 1))] = np.nan
        return values
    dtype = parts[0][0].array.dtype.newbyteorder("=")
    kind = kind_of(dtype)
    if kind.is_integer:
        return (keys ^ sign).view(np.int64).astype(dtype) if kind.family == "int" else keys.astype(dtype)
    values = np.where(keys >= sign, keys ^ sign, ~keys).view(floating)
    values[keys == ~unsigned.type(0)] = np.nan
    return values.astype(dtype)


# --- writing -------------------------------------------------------------------------------------


def _fill(target: Parts) -> None:
    """Copy the elements of `target` from their origins: the first write of a call."""
    for part in target:
        for leaf in part:
            if leaf.origin is not None:
                np.copyto(leaf.array, leaf.origin)


def _arrays(target: Parts) -> list[Array]:
    return [leaf.array for part in target for leaf in part]


def _drop(part: Competitors, i0: int, i1: int, mask_: np.ndarray) -> None:
    """Zero the blocks [i0, i1) of a part whose mask is False, in all its leaves."""
    for leaf in part.leaves:
        nk.kernels(leaf.codec).drop(*leaf.where, i0, i1, leaf.size, mask_)


def _rescale(part: Competitors, i0: int, i1: int, factors: np.ndarray) -> None:
    """Multiply the blocks [i0, i1) of a part by their factors, in all its leaves."""
    for leaf in part.leaves:
        nk.kernels(leaf.codec).rescale(*leaf.where, i0, i1, leaf.size, factors)


class Numbers:
    """Numbers over the blocks or the scopes of a part, read into a dense array block by block."""

    def __init__(self, leaf: Leaf, part: Competitors, dtype: Any, length: int) -> None:
        self.operand = Operand(leaf)
        self.repeat = part.blocks if leaf.cut.blocks == 1 else 1
        self.dense = np.empty(length, dtype=dtype)
        self.few = np.empty(length // self.repeat + 2, dtype=dtype) if self.repeat > 1 else self.dense

    def fill(self, i0: int, i1: int) -> np.ndarray:
        """The numbers of blocks [i0, i1); a view that the next call overwrites."""
        read, n = self.operand, self.repeat
        dense = self.dense[: i1 - i0]
        if n == 1:
            nk.gather(read.buffer, read.origin, read.grid, i0, i1, dense)
            return dense
        s0, s1 = i0 // n, -(-i1 // n)
        nk.gather(read.buffer, read.origin, read.grid, s0, s1, self.few)
        nk.repeat_each(self.few, n, i0 - s0 * n, dense)
        return dense


def prune(target: Parts, source: Parts, keep: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero every block of `target` but those at the `keep` first-ranked places of `source`."""
    written = _competitors(target)
    _select(
        Ranking(source, ord),
        keep,
        lambda part, i0, i1, mask_: _drop(written[part], i0, i1, mask_),
        lambda: _fill(target),
    )
    return _arrays(target)


def threshold(target: Parts, source: Parts, thresholds: Leaf, ord: float | None) -> Sequence[Array]:
    """Zero the blocks of `target` whose norm in `source` is below their threshold."""

    def job(measured: Competitors, written: Competitors) -> Callable[[], None]:
        def make_use(slots: int, length: int) -> Callable[..., None]:
            limits = [Numbers(thresholds, measured, thresholds.array.dtype, length) for _ in range(slots)]
            masks = np.empty((slots, length), dtype=np.bool_)

            def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
                mask_ = masks[slot, : i1 - i0]
                nk.not_below(norm, limits[slot].fill(i0, i1), mask_)
                _drop(written, i0, i1, mask_)

            return use

        return _norm_ranges(measured, float(ord or 2), make_use)

    jobs = [job(m, w) for m, w in zip(_competitors(source), _competitors(target), strict=True)]
    _fill(target)
    for run in jobs:
        run()
    return _arrays(target)


def _with_numbers(
    target: Parts, numbers: Leaf, dtype: Any, write: Callable[[Competitors, int, int, np.ndarray], None]
) -> Sequence[Array]:
    """``write(part, i0, i1, the numbers of these blocks)`` for all blocks of `target`."""

    def job(part: Competitors) -> Callable[[], None]:
        def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
            values = [Numbers(numbers, part, dtype, length) for _ in range(slots)]
            return lambda slot, i0, i1: write(part, i0, i1, values[slot].fill(i0, i1))

        return _ranges(part.total, part.elements, make_work)

    jobs = [job(part) for part in _competitors(target)]
    _fill(target)
    for run in jobs:
        run()
    return _arrays(target)


def apply_mask(target: Parts, mask: Leaf) -> Sequence[Array]:
    """Zero the blocks of `target` whose mask is False."""
    return _with_numbers(target, mask, np.bool_, _drop)


def scale(target: Parts, multipliers: Leaf) -> Sequence[Array]:
    """Multiply blocks by a float64 each; 0 writes +0.0, 1 keeps the bits."""
    return _with_numbers(target, multipliers, np.float64, _rescale)


# --- shrinkage -----------------------------------------------------------------------------------


def shrink(
    target: Parts, thresholds: Sequence[Leaf], conditioners: Parts | None, max_iter: int, rtol: float
) -> Sequence[Array]:
    """The proximal step of ``t * norm`` on every block, in the metric of `conditioners` if given."""
    # Norms are read where the elements are now, which for a target with an origin is there.
    read = tuple(
        tuple(Leaf(leaf.array if leaf.origin is None else leaf.origin, leaf.cut) for leaf in p) for p in target
    )
    metrics: Sequence[Part | None] = [None] * len(target) if conditioners is None else conditioners
    jobs = [
        _shrink_job(source, written, t)
        if metric is None
        else _conditioned_job(
            source,
            written,
            t,
            [Operand(h, like) for h, like in zip(metric, source.leaves, strict=True)],
            max_iter,
            rtol,
        )
        for source, written, t, metric in zip(
            _competitors(read), _competitors(target), thresholds, metrics, strict=True
        )
    ]
    _fill(target)
    for run in jobs:
        run()
    return _arrays(target)


def _shrink_job(source: Competitors, written: Competitors, thresholds: Leaf) -> Callable[[], None]:
    def make_use(slots: int, length: int) -> Callable[..., None]:
        limits = [Numbers(thresholds, source, np.float64, length) for _ in range(slots)]
        factors = np.empty((slots, length))

        def use(slot: int, i0: int, i1: int, norm: np.ndarray, wide: np.ndarray) -> None:
            factor = factors[slot, : i1 - i0]
            nk.shrink_factors(norm, wide, limits[slot].fill(i0, i1), factor)
            _rescale(written, i0, i1, factor)

        return use

    return _norm_ranges(source, 2.0, make_use)


class ConditionedWork:
    """Work arrays of one thread to solve the conditioned shrink of up to `length` blocks."""

    def __init__(
        self, part: Competitors, metric: list[Operand], thresholds: Leaf, max_iter: int, rtol: float, length: int
    ) -> None:
        self.part, self.metric = part, metric
        self.max_iter, self.rtol = max_iter, rtol
        self.limits = Numbers(thresholds, part, np.float64, length)
        self.arrays = np.empty((11, length))
        self.active = np.empty(length, dtype=np.bool_)

    def _pairs(self, i0: int, i1: int) -> list[tuple[Any, tuple[Any, ...]]]:
        """(kernels, their leading arguments) of every leaf and its metric."""
        return [
            (nk.pair_kernels(x.codec, h.codec), (*x.where, *h.where, i0, i1, x.size))
            for x, h in zip(self.part.leaves, self.metric, strict=True)
        ]

    def solve(self, i0: int, i1: int, hmax: np.ndarray, tau: np.ndarray, sigma: np.ndarray) -> None:
        """The root sigma of every block; ConvergenceError if one is not reached."""
        hi, lo, top, unit, scale_, hmin, n, low, high, squares, slopes = self.arrays[:, : i1 - i0]
        active = self.active[: i1 - i0]
        pairs = self._pairs(i0, i1)
        top[:] = 0.0
        for x in self.part.leaves:
            nk.kernels(x.codec).accumulate(*x.where, i0, i1, 0, x.size, nk.INF, nk.WIDE_CHUNK, top, lo)
        nk.safe_units(top, unit)
        squares[:], hmin[:], hmax[:] = 0.0, np.inf, 0.0
        for made, where in pairs:
            made.widest(*where, unit, squares, hmin, hmax)
        nk.safe_units(squares, scale_)
        hi[:], lo[:] = 0.0, 0.0
        for made, where in pairs:
            made.weighted_squares(*where, unit, scale_, hi, lo)
        t = self.limits.fill(i0, i1)
        nk.open_conditioned(
            top, unit, hi, lo, scale_, t, self.part.exact, self.part.norm.itemsize == 4,
            hmin, hmax, n, tau, sigma, low, high, active,
        )  # fmt: skip
        if not active.any():
            return
        for _ in range(self.max_iter):
            squares[:], slopes[:] = 0.0, 0.0
            for made, where in pairs:
                made.secular_sums(*where, unit, n, hmax, tau, sigma, active, squares, slopes)
            if not nk.newton_step(squares, slopes, sigma, low, high, active, self.rtol):
                return
        raise ConvergenceError(
            f"the conditioned shrink did not reach rtol = {self.rtol} within max_iter = {self.max_iter} steps"
        )


def _conditioned_job(
    source: Competitors,
    written: Competitors,
    thresholds: Leaf,
    metric: list[Operand],
    max_iter: int,
    rtol: float,
) -> Callable[[], None]:
    """Solve every block now, before anything is written; the job then writes.

    A 1-element block cannot fail (its bracket is a point), so those are solved as they are written,
    which needs no memory for each of them.
    """

    def write(i0: int, i1: int, hmax: np.ndarray, tau: np.ndarray, sigma: np.ndarray) -> None:
        for x, h in zip(written.leaves, metric, strict=True):
            made = nk.pair_kernels(x.codec, h.codec)
            made.rescale_conditioned(*x.where, *h.where, i0, i1, x.size, hmax, tau, sigma)

    def make_works(slots: int, length: int) -> list[ConditionedWork]:
        return [ConditionedWork(source, metric, thresholds, max_iter, rtol, length) for _ in range(slots)]

    if source.elements == 1:

        def make_both(slots: int, length: int) -> Callable[[int, int, int], None]:
            works, roots = make_works(slots, length), np.empty((slots, 3, length))

            def work(slot: int, i0: int, i1: int) -> None:
                solution = roots[slot, :, : i1 - i0]
                works[slot].solve(i0, i1, *solution)
                write(i0, i1, *solution)

            return work

        return _ranges(source.total, 1, make_both)

    solutions = np.empty((3, source.total))

    def make_solve(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = make_works(slots, length)
        return lambda slot, i0, i1: works[slot].solve(i0, i1, *solutions[:, i0:i1])

    _ranges(source.total, source.elements, make_solve)()
    return _ranges(
        source.total, source.elements, lambda slots, length: lambda slot, i0, i1: write(i0, i1, *solutions[:, i0:i1])
    )


# --- counting ------------------------------------------------------------------------------------


def count_nonzero(parts: Parts, eps: float) -> int:
    """How many elements do not satisfy ``|x| <= eps``."""
    total = 0
    for part in _competitors(parts):
        found: list[int] = []

        def make_work(
            slots: int, length: int, part: Competitors = part, found: list[int] = found
        ) -> Callable[..., None]:
            def work(slot: int, i0: int, i1: int) -> None:
                for leaf in part.leaves:
                    found.append(nk.kernels(leaf.codec).count_above(*leaf.where, i0, i1, leaf.size, eps))

            return work

        _ranges(part.total, part.elements, make_work)()
        total += sum(found)
    return total
