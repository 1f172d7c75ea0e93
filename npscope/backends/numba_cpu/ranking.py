"""The blocks of a problem as ordered integers, and how kernels read them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from npscope.backends.numba_cpu import kernels as nk
from npscope.backends.numba_cpu import lines, scope_strips, side_by_side, strips
from npscope.backends.numba_cpu.codecs import Function
from npscope.backends.numba_cpu.lane_search import LANES
from npscope.backends.numba_cpu.loans import Loan
from npscope.backends.numba_cpu.norms import code_of, measuring_of, workspace_of
from npscope.backends.numba_cpu.operands import ACROSS, COMPLEX, Competitors, Operand, competitors, in_reals
from npscope.backends.numba_cpu.pieces import SCOPE_BLOCKS, SCOPE_BYTES, SCOPE_ELEMENTS, workers_for
from npscope.backends.numba_cpu.search import IN_LANES, group_of
from npscope.backends.numba_cpu.strips import STRIP_ELEMENTS, Scratch, Where
from npscope.backends.numba_cpu.vector_selection import TILE
from npscope.backends.numba_cpu.vectors import Format, format_of
from npscope.dtypes import kind_of
from npscope.tiling import Parts

ACROSS_ELEMENTS, ACROSS_BYTES = 1 << 14, 6 << 20
"""Elements of a strip of scopes side by side, and bytes of keys and mask of one whose scopes are longer than that."""

TILES_ELEMENTS = 1 << 17
"""Elements of such a strip that is read by tiles: eight lines side by side take memory little longer than one.

And of a strip that is made longer, so that as many scopes as are searched together are in it: half of the second cache.
"""

PLANES_ELEMENTS = 1 << 18
"""Elements of a strip that is read block by block of all scopes: half as many took a third longer for 4x4 and 1x4."""

TWO_LINES = 128
"""Bytes of a row that such a strip has at least: of scopes of 8192, one line at a time took a third longer."""


def ranked_in_reals(parts: Parts, ord: float | None) -> tuple[Parts, float | None]:
    """As `in_reals`, what is ranked faster so: of single elements those that kernels read as blocks of two.

    Norms of two float64 are formed in a pass of their own, and of large scopes they would be kept.
    """
    single = all(len(part) == 1 and part[0].cut.elements == 1 for part in parts)
    fits = sum([part[0].cut.blocks for part in parts]) <= SCOPE_BLOCKS
    return in_reals(parts, ord, ("complex64",) if single else COMPLEX, in_planes=fits)


def _most_rows(n: int, key_bytes: int) -> int:
    """Scopes of n blocks whose keys, of so many bytes each, and mask there is room for."""
    return max(1, ACROSS_BYTES // (n * (key_bytes + 1)))


def whole_lanes(rows: int) -> int:
    """So many scopes, or fewer, that fill the groups in which scopes are searched side by side."""
    return rows - rows % LANES if rows > LANES else rows


def turned_form(leaf: Operand, blocks: int, width: int) -> Format | None:
    """The format of scopes that lie side by side, if tiles of their elements can be turned into keys of this width.

    There is room for a strip of tiles then.
    """
    place = leaf.place
    if not place.across or place.bytewise or place.kind is None or min(blocks, _most_rows(blocks, width // 8)) < TILE:
        return None
    scopes, apart = place.nests
    form = format_of(place.kind) if scopes[1, -1] == 1 and apart.shape[1] == 1 else None
    return form if form is not None and form.bits == width else None


class Turner(NamedTuple):
    """The format of elements that are turned into rows of keys by tiles, and what compiles what does that."""

    form: Format
    make: Callable[[], int]


@dataclass(frozen=True)
class Source:
    """How kernels read the keys of a part: what compiles a reader, what it reads, and the blocks of a strip.

    And how elements are turned by tiles while they are read, if they are.
    """

    make_reader: Callable[[], int]
    where: Where
    strip: int
    turner: Turner | None = None

    @property
    def read(self) -> int:
        """The address of the reader, which is compiled for it."""
        return self.make_reader()


class Planes(NamedTuple):
    """How kernels read the blocks of scopes that lie side by side: block by block, those inside of scopes together."""

    source: Source
    order: np.ndarray
    """The blocks of a scope, as they are read."""
    within: int
    """How many of them lie inside of scopes."""


def source_of(
    part: Competitors,
    ord: float | None,
    width: int,
    exact_integers: bool,
    *,
    across: bool = False,
    in_planes: bool = False,
) -> Source | None:
    """How a kernel reads the keys of a part by itself; None where norms are computed pass by pass.

    `across`: whole scopes are read, which may lie side by side. `in_planes`: blocks are numbered block by block.
    """
    leaf = part.leaves[0]
    leaf = Operand(leaf.array, leaf.place.block_by_block) if in_planes else leaf
    if part.spans_leaves or leaf.codec is None:
        return None
    unit, key_dtype = leaf.place.unit, np.dtype(f"u{width // 8}")

    def address(read: Function) -> Callable[[], int]:
        return partial(strips.reader_address, read, unit, key_dtype)

    if ord is None or (part.elements == 1 and (exact_integers or not part.wide_integers)):
        key = leaf.codec.signed_key if ord is None else leaf.codec.key_of_width(width)
        if across and leaf.place.across:
            turned = turned_form(leaf, part.blocks, width)
            if turned is None:
                return Source(address(side_by_side.across_reader(key)), leaf.raw_across, ACROSS_ELEMENTS)
            read, turn = (
                make(turned, ord is None, key) for make in (side_by_side.tiles_reader, side_by_side.columns_turner)
            )
            turner = Turner(turned, partial(side_by_side.turner_address, turn, unit, key_dtype))
            return Source(address(read), leaf.raw_across, TILES_ELEMENTS, turner)
        form = None if leaf.layout is None else leaf.layout.form
        adjacent = form is not None and form.bits == width
        read = strips.line_reader(form, ord is None) if adjacent else strips.element_reader(key)
        return Source(address(read), leaf.raw, STRIP_ELEMENTS)
    code = code_of(ord, part.elements)
    if leaf.layout is not None and lines.can_sum(leaf.layout, code):
        read = strips.norm_reader(lines.measurer(leaf.layout, code))
        return Source(address(read), leaf.raw, lines.strip_blocks(leaf.layout))
    return None


class Ranking:
    """The blocks of all parts as ordered integers, and the choice of the first-ranked of every scope."""

    def __init__(self, parts: Parts, ord: float | None, *, values: bool = False) -> None:
        """`values`: the keys will be turned into numbers again, so they are not narrowed."""
        self.parts = competitors(parts)
        self.ord = ord
        self.exact_integers = all(part.wide_integers and part.elements == 1 for part in self.parts)
        if ord is None:
            codec_ = self.parts[0].leaves[0].codec
            width = 64 if codec_ is None else codec_.width
        else:
            width = 8 * max(part.norm.itemsize for part in self.parts)
            first = self.parts[0]
            narrow = first.leaves[0].codec is not None and first.leaves[0].codec.narrow_key is not None
            integers = kind_of(parts[0][0].array.dtype).is_integer
            if narrow and len(self.parts) == 1 and first.elements == 1 and (integers or not values):
                width, self.exact_integers = 8 * parts[0][0].array.dtype.itemsize, integers
        self.width = width
        kind = parts[0][0].array.dtype
        # The format of signed floats, whose keys crowd around zero; there are few of 8 bits.
        self.signed = None if ord is not None or kind_of(kind).is_integer or width == 8 else format_of(kind_of(kind))
        self.sizes = ord is not None and not self.exact_integers  # whether keys are magnitudes of floats
        self.key = np.dtype(f"u{width // 8}")
        self.scopes = self.parts[0].cut.scopes
        self.blocks = sum(part.blocks for part in self.parts)
        self.elements = sum(part.blocks * part.elements for part in self.parts)
        # Where each part's blocks stand among the blocks of a scope.
        starts = itertools.accumulate((part.blocks for part in self.parts), initial=0)
        self.columns = [slice(a, b) for a, b in itertools.pairwise(starts)]
        few = all(leaf.place.few for part in self.parts for leaf in part.leaves)
        self.group = 0 if few else group_of(self.blocks)
        if values and self.group > 0:  # no vector ranks for a value, which small scopes have found in lanes as well
            self.group = IN_LANES
        self.fits_a_piece = self.blocks <= SCOPE_BLOCKS and self.elements <= SCOPE_ELEMENTS
        across = self.fits_a_piece and len(self.parts) == 1
        self.sources = [source_of(part, ord, width, self.exact_integers, across=across) for part in self.parts]
        # Scopes that lie side by side are read block by block where nothing else reads them, or they are small.
        self.planes = [self._planes(p) for p in range(len(self.parts))]

    def _planes(self, p: int) -> Planes | None:
        part, source = self.parts[p], self.sources[p]
        place = part.leaves[0].place
        if not self.fits_a_piece or not (place.in_tiles or (place.side_by_side and (self.group > 0 or source is None))):
            return None
        by_block = source_of(part, self.ord, self.width, self.exact_integers, in_planes=True)
        return None if by_block is None else Planes(by_block, *place.order_block_by_block())

    @property
    def workspace(self) -> int:
        """Bytes of work arrays for the norms of a scope's blocks, and to decide on them."""
        return sum(workspace_of(part.elements, part.exact) * part.blocks for part in self.parts)

    @property
    def is_searched_one_by_one(self) -> bool:
        """Whether scopes of elements line by line had better be searched one by one, as small ones are, in each thread.

        They may be larger than other scopes that fit a piece, as only keys and a mask are kept of them.
        """
        part, is_read = self.parts[0], self.sources[0] is not None
        alone = len(self.parts) == 1 and part.elements == 1 and is_read and part.leaves[0].place.is_line_by_line
        few_bytes = self.blocks * (self.key.itemsize + 1) <= SCOPE_BYTES
        return alone and few_bytes and self.scopes >= max(2, workers_for(self.scopes * self.elements))

    @property
    def is_wide(self) -> bool:
        """Whether scopes of elements are so large, and so many, that to look near their expected limits first pays."""
        large = self.group == 0 and self.elements == self.blocks >= scope_strips.WIDE_SCOPE
        if not large or len(self.parts) > 1 or self.scopes * self.blocks < scope_strips.WIDE_ELEMENTS:
            return False
        turned = self.sources[0] is not None and self.sources[0].turner is not None
        return turned or self.adjacent_form(0) is not None

    @property
    def reads_by_itself(self) -> bool:
        """Whether there is one part, and kernels had better read its scopes one after another."""
        return len(self.parts) == 1 and not (self.planes[0] is not None and self.parts[0].leaves[0].place.in_tiles)

    def adjacent_form(self, p: int) -> Format | None:
        """The format of a part's elements if they are adjacent and their bits alone make their keys."""
        part = self.parts[p]
        layout = part.leaves[0].layout
        if layout is None or part.elements > 1 or layout.form.bits != self.width:
            return None
        # Wide integers beside floats compete by their norms, which are as wide.
        by_norm = layout.form.is_integer and self.ord is not None and not self.exact_integers
        return None if by_norm else layout.form

    def rows_of_planes(self, p: int, planes: Planes) -> int:
        """Whole scopes of a part that make a strip of planes."""
        part = self.parts[p]
        rows = (ACROSS_ELEMENTS if self.group > 0 else PLANES_ELEMENTS) // (part.blocks * part.elements)
        twice = 2 * self.key.itemsize  # in planes, and in rows
        rows = max(rows, min(ACROSS, _most_rows(part.blocks, twice)))
        return whole_lanes(max(1, min(planes.source.strip // planes.within, rows)))

    def scopes_of_a_strip(self, strip: int) -> int:
        """Whole scopes that make a strip of about `strip` blocks."""
        rows = max(1, strip // self.blocks)
        if self.group == IN_LANES:
            rows = whole_lanes(max(rows, LANES if LANES * self.elements <= TILES_ELEMENTS else 1))
        if len(self.parts) > 1 or not self.parts[0].leaves[0].place.across:
            return rows
        most = _most_rows(self.blocks, self.key.itemsize)
        rows = max(rows, min(most, TWO_LINES // self.key.itemsize))
        return rows - rows % TILE if rows >= TILE else min(ACROSS, most)


class KeyWork:
    """Work arrays to compute the keys of up to `length` blocks of a part that no kernel reads by itself."""

    def __init__(self, ranking: Ranking, p: int, length: int) -> None:
        part, source, planes = ranking.parts[p], ranking.sources[p], ranking.planes[p]
        self.source, self.planes, self.part = source, planes, part
        reads = source is not None or planes is not None
        self.norms = None if reads else measuring_of(part.places, float(ranking.ord or 2)).make(part.leaves, length)
        if planes is not None:
            self.rows = ranking.rows_of_planes(p, planes)
            self.scratch = Loan(Scratch, self.rows * part.blocks, 0, ranking.key, self.rows * planes.within)
        elif source is not None:
            self.strip = source.strip
            if ranking.fits_a_piece:  # whole scopes, which may lie side by side
                self.strip = ranking.scopes_of_a_strip(source.strip) * part.blocks
            self.strip = min(self.strip, length)
            self.scratch = Loan(Scratch, self.strip, 0, ranking.key, 0 if part.elements == 1 else self.strip)

    def fill(self, i0: int, i1: int, keys: np.ndarray) -> None:
        """The keys of blocks [i0, i1)."""
        if self.norms is not None:
            nk.keys_of_norms(self.norms.fill(i0, i1)[0], keys)
        elif self.planes is not None:
            (source, order, within), n, scopes = self.planes, self.part.blocks, self.part.cut.scopes
            scope_strips.read_in_planes(
                source.read, source.where, i0 // n, i1 // n, order, within, scopes, self.rows, keys,
                self.scratch.work.all,
            )  # fmt: skip
        elif self.source is not None:
            strips.read_blocks(self.source.read, self.source.where, i0, i1, self.strip, keys, self.scratch.work.all)


_FLAT = np.asarray([[1], [0]], dtype=np.int64)


def dense(array: np.ndarray, origin: int = 0) -> Where:
    """A flat array whose entry 0 is block `-origin`, as kernels take an operand that they hand on (`Operand.raw`)."""
    return array.view(np.uint8), origin, strips.LINE, _FLAT


def cutter_of(ranking: Ranking, p: int, written: Operand | None) -> int | None:
    """How adjacent elements are zeroed or marked by their own keys; None where those of part p or `written` are not.

    A complex number that is ranked by a score is written as two real ones.
    """
    form = ranking.adjacent_form(p)
    if written is None or form is None or written.size > 1:
        return None
    marks = written.codec is None
    if not (written.place.is_line_by_line if marks else written.layout is not None and written.layout.form == form):
        return None
    cut = strips.cutter(form, ranking.ord is None, marks)
    return strips.cutter_address(cut, ranking.parts[p].leaves[0].place.unit, written.place.unit)


def line_surveyor_of(ranking: Ranking, p: int, *, crowded: bool) -> int | None:
    """How the keys of adjacent elements are looked at; `crowded` as for a `line_surveyor`."""
    form = ranking.adjacent_form(p)
    if form is None:
        return None
    unit = ranking.parts[p].leaves[0].place.unit
    return strips.surveyor_address(strips.line_surveyor(form, ranking.ord is None, crowded), unit, ranking.key)


def surveyor_of(ranking: Ranking, p: int, *, crowded: bool) -> tuple[int, int]:
    """How the keys of a part that kernels read by themselves are looked at, and the reader that this takes or 0."""
    look, source = line_surveyor_of(ranking, p, crowded=crowded), ranking.sources[p]
    if look is not None or source is None:  # without a source, what has been kept is looked at
        return look or 0, 0
    unit = ranking.parts[p].leaves[0].place.unit
    return strips.surveyor_address(strips.surveyor(ranking.width, crowded), unit, ranking.key), source.read


def columns_cutter_of(ranking: Ranking, turner: Turner, written: Operand) -> int | None:
    """As `cutter_of`, where scopes lie side by side and their elements are turned when they are read."""
    marks = written.codec is None
    if not (
        written.place.lies_in_columns if marks else turned_form(written, ranking.blocks, ranking.width) == turner.form
    ):
        return None
    cut = side_by_side.columns_cutter(turner.form, ranking.ord is None, marks)
    read = ranking.parts[0].leaves[0].place.unit
    return side_by_side.columns_cutter_address(cut, read, written.place.unit, ranking.key)


def selector_of(ranking: Ranking) -> int:
    """What marks the first-ranked of every scope, in dense keys."""
    in_vectors = ranking.group > 0  # what does not matter must not have the same be compiled twice
    signed, sizes = None if in_vectors else ranking.signed, ranking.sizes and in_vectors
    return scope_strips.selector_address(ranking.group, ranking.key, signed, sizes)


def plane_selector_of(ranking: Ranking) -> int:
    """The same, in planes of keys."""
    return scope_strips.plane_selector_address(ranking.group, ranking.key, ranking.signed)


def search_of(ranking: Ranking, *, kept: bool = False) -> tuple[int, int]:
    """Addresses of what searches whole scopes, and of how it looks at them or 0 where that does not pay.

    `kept`: it reads keys that are there, as it does where elements are turned before.
    """
    turned = ranking.sources[0] is not None and ranking.sources[0].turner is not None
    unit = ranking.key if kept or turned else ranking.parts[0].leaves[0].place.unit
    look: int | None = None
    if ranking.is_wide and not kept:
        look = (
            strips.dense_surveyor(ranking.key, crowded=False) if turned else line_surveyor_of(ranking, 0, crowded=False)
        )
    make = scope_strips.looking_searcher if look else scope_strips.searcher
    return scope_strips.searcher_address(make(ranking.signed), unit, ranking.key), look or 0
