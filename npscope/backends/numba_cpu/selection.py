"""The first-ranked blocks of every scope: in one piece where a scope fits, else by radix passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npscope.backends import threads
from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu.norms import NormWork, put
from npscope.backends.numba_cpu.operands import (
    BLOCK_WORKSPACE,
    SCOPE_BLOCKS,
    SCOPE_ELEMENTS,
    Competitors,
    Operand,
    competitors,
    piece_length,
    ranges,
    workers_for,
)
from npscope.dtypes import kind_of
from npscope.tiling import Leaf, Parts


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
        self.parts = competitors(parts)
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
        # Where each part's blocks stand among the blocks of a scope.
        starts = itertools.accumulate((part.blocks for part in self.parts), initial=0)
        self.columns = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self.fits_a_piece = self.blocks <= SCOPE_BLOCKS and self.elements <= SCOPE_ELEMENTS
        self.spans_leaves = any(part.spans_leaves for part in self.parts)

    def work(self, part: Competitors, length: int) -> KeyWork:
        """Work arrays for the keys of up to `length` blocks of a part."""
        return KeyWork(part, self.ord, self.exact_integers, self.key, length)


class ScopeWork:
    """Work arrays of one thread for up to `length` whole scopes."""

    def __init__(self, ranking: Ranking, counts: Operand, length: int) -> None:
        self.ranking = ranking
        self.counts = counts
        self.length = length
        self.works = [ranking.work(part, length * part.blocks) for part in ranking.parts]
        self.keys = np.empty(length * ranking.blocks, dtype=ranking.key)
        several = len(ranking.parts) > 1
        longest = max(part.blocks for part in ranking.parts) * length if several else 0
        self.part_keys = np.empty(longest, dtype=ranking.key)
        self.part_mask = np.empty(length * ranking.blocks if several else 0, dtype=np.bool_)
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
        return [self._columns(mask, rows, columns) for columns in self.ranking.columns]

    def _columns(self, mask: np.ndarray, rows: int, columns: slice) -> np.ndarray:
        dense = self.part_mask[columns.start * self.length :][: rows * (columns.stop - columns.start)]
        dense.reshape(rows, -1)[:] = mask.reshape(rows, -1)[:, columns]
        return dense


Sink = Callable[[int, int, int, np.ndarray], None]
"""``sink(part, i0, i1, mask)`` takes the mask of blocks [i0, i1) of a part."""


def select_blocks(
    ranking: Ranking,
    keep: Leaf,
    sink: Sink,
    ready: Callable[[], None] = lambda: None,
    *,
    shielded: bool = False,
) -> None:
    """Hand `sink` the mask of the `keep` first-ranked blocks of every scope, piece by piece.

    `ready` is called once, when everything is allocated and before the first mask; `shielded` says
    that a call of `sink` must not be interrupted.
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
            selection.select(scope, k, sink, shielded)
        return

    def make_work(slots: int, length: int) -> Callable[[int, int, int], None]:
        works = [ScopeWork(ranking, counts, length) for _ in range(slots)]

        def work(slot: int, s0: int, s1: int) -> None:
            for p, mask_ in enumerate(works[slot].masks(s0, s1)):
                n = ranking.parts[p].blocks
                sink(p, s0 * n, s1 * n, mask_)

        return work

    workspace = BLOCK_WORKSPACE * ranking.blocks
    job = ranges(ranking.scopes, ranking.elements, make_work, workspace=workspace, shielded=shielded)
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
        self.workers = workers_for(ranking.elements)
        lengths = [piece_length(p.blocks, p.elements, self.workers, BLOCK_WORKSPACE) for p in ranking.parts]
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
        self.totals = np.empty(1 << nk.DIGIT_BITS, dtype=np.int64)
        self.ties, self.left = np.empty((2, len(self.pieces)), dtype=np.int64)

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

    def _each(self, use: Callable[[int, int, _Piece], None], *, shielded: bool = False) -> None:
        threads.run(len(self.pieces), lambda slot, p: use(slot, p, self.pieces[p]), self.workers, shielded=shielded)

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
            self._count_digits(scope, prefix, known, shift)
            np.cumsum(self.totals, out=self.totals)
            place = int(np.searchsorted(self.totals, k))
            k -= int(self.totals[place - 1]) if place else 0
            prefix |= ((1 << nk.DIGIT_BITS) - 1 - place) << shift
            known |= ((1 << nk.DIGIT_BITS) - 1) << shift
        return prefix, k

    def _count_digits(self, scope: int, prefix: int, known: int, shift: int) -> None:
        """Into `totals`, largest digit first: how often each digit occurs among the keys that match `prefix`."""
        self.digits[:] = 0
        pattern = np.uint64(prefix), np.uint64(known), np.uint64(shift)

        def use(slot: int, p: int, piece: _Piece) -> None:
            keys = self._load(slot, piece, scope)
            nk.digit_counts(keys, 0, keys.size, *pattern, self.digits[slot])

        self._each(use)
        self.digits.sum(axis=0, out=self.totals[::-1])

    def select(self, scope: int, k: int, sink: Sink, shielded: bool) -> None:
        """Hand `sink` the mask of the k first-ranked blocks of a scope."""
        limit, ties = self._limit(scope, k)
        limit_ = np.uint64(limit)

        def count(slot: int, p: int, piece: _Piece) -> None:
            keys = self._load(slot, piece, scope)
            self.ties[p] = nk.count_equal(keys, keys.size, limit_)

        def write(slot: int, p: int, piece: _Piece) -> None:
            keys = self._load(slot, piece, scope)
            mask_ = self.mask[slot, : keys.size]
            nk.mark(keys, 0, keys.size, limit_, self.left[p], mask_)
            first = scope * self.ranking.parts[piece.part].blocks
            sink(piece.part, first + piece.b0, first + piece.b1, mask_)

        self._each(count)
        # Ties go to the earlier blocks: each piece may keep what the pieces before it left.
        np.cumsum(self.ties, out=self.left)
        self.left -= self.ties
        np.subtract(ties, self.left, out=self.left)
        np.maximum(self.left, 0, out=self.left)
        self._each(write, shielded=shielded)

    def _limit(self, scope: int, k: int) -> tuple[int, int]:
        if 0 < k < self.ranking.blocks:
            return self.nth(scope, k)
        if self._has_norms:
            self._compute_norms(scope)
        # All are kept above key 0 with every tie, or none above the largest key.
        return (0, self.ranking.blocks) if k > 0 else ((1 << 64) - 1, 0)


def mask(parts: Parts, keep: Leaf, ord: float | None) -> np.ndarray:
    """True for the `keep` first-ranked blocks of every scope: ``(S, n)`` bool."""
    ranking = Ranking(parts, ord)
    result = np.empty((ranking.scopes, ranking.blocks), dtype=np.bool_)
    columns = [result[:, c] for c in ranking.columns]
    select_blocks(ranking, keep, lambda part, i0, i1, mask_: put(columns[part], i0, i1, mask_))
    return result


def kth(parts: Parts, k: Leaf, ord: float | None) -> np.ndarray:
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

        ranges(ranking.scopes, ranking.elements, make_work, workspace=BLOCK_WORKSPACE * ranking.blocks)()
    elif ranking.scopes:
        selection = LargeScopes(ranking)
        keeps = k.array.reshape(-1)
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
