"""The protobuf wire format, read strictly and without what the fields hold.

A message is a run of fields, each with a number, a wire type and a value: a varint, 4 or 8 bytes,
or a length and that many bytes. Reading it gives where every value lies in the file, so that a
payload of gigabytes costs as much as its tag. What protobuf readers would take but could mean two
things is refused: a field given twice that may stand once, a wire type that is not the field's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from npscope.errors import FormatError

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
"""Wire types; 3 and 4 are groups, which nothing writes any more."""

_WINDOW_BYTES = 64 << 10
_MAX_TEXT = 16 << 20


class Span(NamedTuple):
    """Bytes of the file, from `start` to before `stop`."""

    start: int
    stop: int


class Field(NamedTuple):
    """One field: its number, wire type, the value of a varint (else 0), and where its bytes lie."""

    number: int
    wire: int
    value: int
    at: Span


class Schema(NamedTuple):
    """The fields of a message that are read: their wire types by number; those of `once` may stand once."""

    name: str
    once: Mapping[int, int]
    repeated: Mapping[int, tuple[int, ...]]


class Wire:
    """A file of `size` bytes in the wire format; `read` gives bytes from an offset, as many as asked for."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self._size = size
        self._base = 0
        self._window = b""

    def fields(self, within: Span) -> Iterator[Field]:
        """Every field of the message that fills `within`."""
        at, stop = within
        while at < stop:
            key, body = self._varint(at, stop)
            number, wire = key >> 3, key & 7
            value = 0
            if not number or key >> 32:
                raise FormatError(f"byte {at}: no field has the tag {key}")
            if wire == BYTES:
                length, body = self._varint(body, stop)
                end = body + length
            elif wire == VARINT:
                value, end = self._varint(body, stop)
            elif wire in (EIGHT_BYTES, FOUR_BYTES):
                end = body + (8 if wire == EIGHT_BYTES else 4)
            else:
                raise FormatError(f"byte {at}: field {number} has wire type {wire}, which is not in use")
            if end > stop:
                raise FormatError(f"byte {at}: field {number} ends at byte {end}, its message at {stop}")
            yield Field(number, wire, value, Span(body, end))
            at = end

    def known(self, within: Span, schema: Schema) -> Iterator[Field]:
        """The fields of the message in `within` that `schema` names."""
        seen = set()
        for field in self.fields(within):
            if field.number in schema.once:
                fits = field.wire == schema.once[field.number]
                if field.number in seen:
                    raise FormatError(f"byte {field.at.start}: field {field.number} of a {schema.name} stands twice")
                seen.add(field.number)
            elif field.number in schema.repeated:
                fits = field.wire in schema.repeated[field.number]
            else:
                continue
            if not fits:
                raise FormatError(
                    f"byte {field.at.start}: field {field.number} of a {schema.name} has wire type {field.wire}"
                )
            yield field

    def varints(self, field: Field) -> Iterator[int]:
        """The numbers of a repeated field of varints, one alone or packed."""
        if field.wire == VARINT:
            yield field.value
            return
        at, stop = field.at
        while at < stop:
            value, at = self._varint(at, stop)
            yield value

    def text(self, at: Span) -> str:
        """The string in `at`."""
        if at.stop - at.start > _MAX_TEXT:
            raise FormatError(f"byte {at.start}: a name of {at.stop - at.start} bytes; at most {_MAX_TEXT} are read")
        begin, end = at.start - self._base, at.stop - self._base
        inside = begin >= 0 and end <= len(self._window)
        raw = self._window[begin:end] if inside else self._read(at.start, at.stop - at.start)
        try:
            return sys.intern(raw.decode("utf-8"))  # a model says most names several times
        except UnicodeDecodeError:
            raise FormatError(f"byte {at.start}: a name is not UTF-8") from None

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """The number at `at`, of at most 64 bits, and where it ends."""
        window, begin = self._window, at - self._base
        if 0 <= begin < len(window) and at < stop and window[begin] < 0x80:
            return window[begin], at + 1  # most are of one byte
        if begin < 0 or (begin + 10 > len(window) and self._base + len(window) < self._size):
            window = self._window = self._read(at, min(_WINDOW_BYTES, self._size - at))
            self._base, begin = at, 0
        end = min(begin + 10, begin + stop - at, len(window))
        value = 0
        for index in range(begin, end):
            byte = window[index]
            value |= (byte & 0x7F) << 7 * (index - begin)
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at + index - begin + 1
        raise FormatError(f"byte {at}: a number does not end within its message, or has more than 64 bits")
