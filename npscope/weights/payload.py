"""Where the values of a tensor lie in a file of tagged fields, and how they are read and replaced there.

Either as little-endian bytes, in one run, in several, or each behind a tag of its own; or as packed
varints. Replaced values take the bytes that the old ones took: a varint may be longer than its
number needs, so a zero fits wherever a number was, and no length in the file changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np

from npscope.errors import FormatError

Array = np.ndarray[Any, Any]
Fill = Callable[[int, memoryview], None]
"""Fills a buffer with the bytes of the file from an offset on."""

Patch = tuple[int, memoryview]
"""An offset in the file and the bytes that replace those there."""

_PIECE_BYTES = 256 << 10
_MAX_VARINT = 10


class Payload(Protocol):
    """The values of one tensor, as the `nbytes` bytes of a C-contiguous little-endian array."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""

    @property
    def begin(self) -> int:
        """Offset of the first of its bytes in the file."""

    @property
    def end(self) -> int:
        """Offset behind the last of them."""

    def read(self, fill: Fill, start: int, into: memoryview) -> None:
        """The bytes of the array from `start` on."""

    def replace(self, fill: Fill, start: int, data: memoryview) -> Iterator[Patch]:
        """What makes the bytes of the array from `start` on be `data`, by rising offset."""


class Block(NamedTuple):
    """Values that lie as they are, side by side; see `Payload`."""

    begin: int
    nbytes: int

    @property
    def end(self) -> int:
        """Offset behind the last byte."""
        return self.begin + self.nbytes

    def read(self, fill: Fill, start: int, into: memoryview) -> None:
        """The bytes from `start` on."""
        fill(self.begin + start, into)

    def replace(self, fill: Fill, start: int, data: memoryview) -> Iterator[Patch]:
        """What makes the bytes from `start` on be `data`: themselves."""
        yield self.begin + start, data


class Run(NamedTuple):
    """As many `elements` of `width` bytes, the first at `offset`, one every `step` bytes."""

    offset: int
    width: int
    elements: int
    step: int

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without what lies between them."""
        return self.width * self.elements

    @property
    def end(self) -> int:
        """Offset behind the last element."""
        return self.offset + (self.elements - 1) * self.step + self.width


class Runs:
    """Values that lie as they are, in several runs or behind a tag each; see `Payload`."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = [run for run in runs if run.nbytes]
        self._starts = list(accumulate((run.nbytes for run in self._runs), initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self._starts[-1]

    @property
    def begin(self) -> int:
        """Offset of the first byte."""
        return self._runs[0].offset if self._runs else 0

    @property
    def end(self) -> int:
        """Offset behind the last byte."""
        return self._runs[-1].end if self._runs else 0

    def read(self, fill: Fill, start: int, into: memoryview) -> None:
        """The bytes from `start` on."""
        for run, first, part in self._parts(start, into):
            offset, span, places = _span(fill, run, first, part.nbytes)
            np.frombuffer(part, np.uint8)[:] = span[places - offset]

    def replace(self, fill: Fill, start: int, data: memoryview) -> Iterator[Patch]:
        """What makes the bytes from `start` on be `data`."""
        for run, first, part in self._parts(start, data):
            offset, span, places = _span(fill, run, first, part.nbytes)
            span[places - offset] = np.frombuffer(part, np.uint8)
            yield offset, span.data

    def _parts(self, start: int, buffer: memoryview) -> Iterator[tuple[Run, int, memoryview]]:
        """(run, byte in the run, part of `buffer`) for what `buffer` covers from `start` on."""
        stop = start + buffer.nbytes
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for run, begin in zip(self._runs[first:], self._starts[first:-1], strict=True):
            if begin >= stop:
                return
            low, high = max(start, begin), min(stop, begin + run.nbytes)
            for at in range(low, high, _PIECE_BYTES):
                yield run, at - begin, buffer[at - start : min(at + _PIECE_BYTES, high) - start]


def _span(fill: Fill, run: Run, first: int, nbytes: int) -> tuple[int, Array, Array]:
    """The bytes of the file from byte `first` of a run's elements on, where they start, and where the elements' lie."""
    at = np.arange(first, first + nbytes)
    places = run.offset + at // run.width * run.step + at % run.width
    offset = int(places[0])
    span = np.empty(int(places[-1]) + 1 - offset, np.uint8)
    fill(offset, span.data)
    return offset, span, places


class _Piece(NamedTuple):
    """Whole varints side by side in the file, the first of them element `element` of the tensor."""

    element: int
    offset: int
    nbytes: int


class Varints:
    """Values of `width` bytes as packed varints in one or more chunks of the file; see `Payload`.

    They are counted when this is made: FormatError when a chunk does not end with a number or a
    number has more than 10 bytes.
    """

    def __init__(self, fill: Fill, chunks: Iterable[tuple[int, int]], width: int) -> None:
        self._width = width
        self._pieces: list[_Piece] = []
        count = 0
        for start, stop in chunks:
            for offset, raw in _whole_varints(fill, start, stop):
                self._pieces.append(_Piece(count, offset, raw.size))
                count += int(np.count_nonzero(raw < 0x80))
        self._count = count

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self._count * self._width

    @property
    def begin(self) -> int:
        """Offset of the first varint."""
        return self._pieces[0].offset if self._pieces else 0

    @property
    def end(self) -> int:
        """Offset behind the last varint."""
        return self._pieces[-1].offset + self._pieces[-1].nbytes if self._pieces else 0

    def read(self, fill: Fill, start: int, into: memoryview) -> None:
        """The bytes from `start` on."""
        done = start
        for piece in self._covering(start, start + into.nbytes):
            raw = _bytes(fill, piece.offset, piece.nbytes)
            values = _values(raw, *_bounds(raw), self._width).reshape(-1)
            skip = done - piece.element * self._width
            part = values[skip : skip + start + into.nbytes - done]
            into[done - start : done - start + part.size] = part.data
            done += part.size

    def replace(self, fill: Fill, start: int, data: memoryview) -> Iterator[Patch]:
        """What makes the bytes from `start` on be `data`, which are those of whole elements."""
        if start % self._width or data.nbytes % self._width:
            raise FormatError(f"{data.nbytes} bytes from {start} on are no whole elements of {self._width} bytes")
        wanted = np.frombuffer(data, np.uint8).reshape(-1, self._width)
        first = start // self._width
        for piece in self._covering(start, start + data.nbytes):
            raw = _bytes(fill, piece.offset, piece.nbytes)
            starts, lengths = _bounds(raw)
            low = max(first - piece.element, 0)
            high = min(first + len(wanted) - piece.element, starts.size)
            starts, lengths = starts[low:high], lengths[low:high]
            new = wanted[piece.element + low - first : piece.element + high - first]
            changed = (new != _values(raw, starts, lengths, self._width)).any(axis=1)
            _put(raw, starts[changed], lengths[changed], new[changed])
            begin, end = int(starts[0]), int(starts[-1] + lengths[-1])
            yield piece.offset + begin, raw[begin:end].data

    def _covering(self, start: int, stop: int) -> Iterator[_Piece]:
        """The pieces that hold the bytes from `start` to `stop` of the array."""
        if start == stop:
            return
        first = int(np.searchsorted([piece.element for piece in self._pieces], start // self._width, side="right")) - 1
        for piece in self._pieces[first:]:
            if piece.element * self._width >= stop:
                return
            yield piece


def _whole_varints(fill: Fill, start: int, stop: int) -> Iterator[tuple[int, Array]]:
    """(offset, bytes) of pieces of a chunk, cut between numbers."""
    while start < stop:
        raw = _bytes(fill, start, min(_PIECE_BYTES, stop - start))
        ends = np.flatnonzero(raw < 0x80)
        if not ends.size or (ends[-1] + 1 < raw.size and start + raw.size == stop):
            raise FormatError(f"byte {start}: packed numbers do not end with one")
        raw = raw[: int(ends[-1]) + 1]
        if int(_bounds(raw)[1].max()) > _MAX_VARINT:
            raise FormatError(f"byte {start}: a packed number has more than {_MAX_VARINT} bytes")
        yield start, raw
        start += raw.size


def _bytes(fill: Fill, offset: int, nbytes: int) -> Array:
    raw = np.empty(nbytes, np.uint8)
    fill(offset, raw.data)
    return raw


def _bounds(raw: Array) -> tuple[Array, Array]:
    """Starts and lengths of the varints that fill `raw`."""
    stops = np.flatnonzero(raw < 0x80) + 1
    starts = np.concatenate([[0], stops[:-1]])
    return starts, stops - starts


def _values(raw: Array, starts: Array, lengths: Array, width: int) -> Array:
    """The low `width` bytes of each varint, little-endian, as rows."""
    numbers = np.zeros(starts.size, "<u8")
    for byte in range(int(lengths.max(initial=0))):
        there = lengths > byte
        numbers[there] |= (raw[starts[there] + byte] & np.uint64(0x7F)).astype("<u8") << np.uint64(7 * byte)
    return numbers.view(np.uint8).reshape(-1, 8)[:, :width]


def _put(raw: Array, starts: Array, lengths: Array, rows: Array) -> None:
    """Write the numbers whose little-endian bytes are `rows` as varints of the given lengths."""
    wide = np.zeros((len(rows), 8), np.uint8)
    wide[:, : rows.shape[1]] = rows
    left = wide.view("<u8").reshape(-1)
    for byte in range(int(lengths.max(initial=0))):
        there = lengths > byte
        more = np.where(lengths[there] > byte + 1, 0x80, 0).astype(np.uint8)
        raw[starts[there] + byte] = (left[there] & np.uint64(0x7F)).astype(np.uint8) | more
        left[there] >>= np.uint64(7)
    if left.any():
        raise FormatError("a value needs more bytes than the one that it replaces")
