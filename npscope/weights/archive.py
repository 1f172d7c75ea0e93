"""The zip archive under an npz, read strictly and rewritten member by member.

Unlike `zipfile` this takes nothing on trust that two programs could read in two ways: the members
fill the file from its first byte to the directory without a gap, none is there twice, and every
local header agrees with the directory. Only stored and deflated members are known.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from npscope.errors import FormatError, about
from npscope.weights.output import write_all
from npscope.weights.packed import copy_range
from npscope.weights.source import Source

STORED, DEFLATED = 0, 8

_CHUNK = 1 << 16  # compressed bytes read at a time
_INFLATE = 1 << 20  # inflated bytes handled at a time
_LIMIT = 0xFFFFFFFF  # stands for a number that is elsewhere, in 64 bits
_WIDE = _LIMIT  # numbers from here on are written in 64 bits
_MANY = 0xFFFF
_ZIP64 = 1
_NEWEST = 63  # version of the format, times ten

_FLAG_ENCRYPTED = 1 | 1 << 6 | 1 << 13
_FLAG_DESCRIPTOR = 1 << 3
_FLAG_UTF8 = 1 << 11
_KNOWN_FLAGS = 0b110 | _FLAG_DESCRIPTOR | _FLAG_UTF8  # bits 1 and 2 say how hard the deflater tried
_DESCRIPTOR_SIZES = {12, 16, 20, 24}

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")


@dataclass(frozen=True, slots=True)
class Member:
    """One member: what the directory says of it, and where its parts lie in the file.

    `start` and `end` enclose its local header, data and descriptor; `local` are flags and extra
    fields of the local header. `made`, `stamp`, `tail` and `extra` are carried from directory to
    directory as they are.
    """

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    compressed: int
    size: int
    start: int
    data: int
    end: int
    has_zip64: bool
    local_extra: bytes
    made: tuple[int, int]  # version made by, version needed
    stamp: tuple[int, int]
    tail: tuple[int, int]  # internal and external attributes
    extra: bytes
    comment: bytes


@dataclass(frozen=True, slots=True)
class Directory:
    """Members in the order of the directory, where it starts, and whether it ends in 64-bit numbers."""

    members: tuple[Member, ...]
    start: int
    has_zip64: bool


def read_directory(source: Source) -> Directory:
    """The directory of an archive, checked against every local header."""
    head = source.bytes_at(0, min(4, source.size))
    if not head.startswith(b"PK"):
        raise FormatError(f"it starts with {head!r} and not with a member; this is no zip archive, or one behind junk")
    start, size, count, has_zip64 = _end(source)
    raw = source.bytes_at(start, size)
    members: list[Member] = []
    at = 0
    while at < size:
        member, at = _central(raw, at)
        members.append(member)
    if len(members) != count:
        raise FormatError(f"the directory holds {len(members)} members and states {count}")
    _check_names(members)
    by_offset = sorted(members, key=lambda member: member.start)
    borders = [*(member.start for member in by_offset), start]
    if borders[0] != 0:
        raise FormatError(f"{borders[0]} bytes lie before the first member")
    placed = {}
    for member, (_, end) in zip(by_offset, pairwise(borders), strict=True):
        with about(f"member {member.name!r:.120}"):
            placed[member.name] = _placed(source, member, end)
    return Directory(tuple(placed[member.name] for member in members), start, has_zip64)


def _end(source: Source) -> tuple[int, int, int, bool]:
    """Start, size and number of members of the directory, and whether 64-bit numbers say so."""
    at = source.size - _END.size
    fields = _END.unpack(source.bytes_at(at, _END.size)) if at >= 0 else (b"",)
    if fields[0] != b"PK\5\6":
        raise FormatError("its end is no end of a zip archive: it is truncated, or has bytes behind it")
    _, disk, directory_disk, here, count, size, start, comment = fields
    if disk or directory_disk or here != count or comment:
        raise FormatError("archives on many disks or with a comment are not supported")
    has_zip64 = at >= _LOCATOR.size and source.bytes_at(at - _LOCATOR.size, 4) == b"PK\6\7"
    if has_zip64:
        _, disk, end64, disks = _LOCATOR.unpack(source.bytes_at(at - _LOCATOR.size, _LOCATOR.size))
        narrow = (count, size, start)
        at -= _LOCATOR.size + _END64.size
        if disk or disks != 1 or end64 != at or at < 0:
            raise FormatError("the 64-bit end of the archive is not where it should be")
        magic, length, _, _, disk, directory_disk, here, count, size, start = _END64.unpack(
            source.bytes_at(at, _END64.size)
        )
        if magic != b"PK\6\6" or length != _END64.size - 12 or disk or directory_disk or here != count:
            raise FormatError("the 64-bit end of the archive is damaged")
        for value, wide, sentinel in zip(narrow, (count, size, start), (_MANY, _LIMIT, _LIMIT), strict=True):
            if value not in (wide, sentinel):
                raise FormatError("the two ends of the archive contradict each other")
    if start + size != at:
        raise FormatError(f"the directory should end at byte {at} and ends at {start + size}: junk before or inside")
    return start, size, count, has_zip64


def _central(raw: bytes, at: int) -> tuple[Member, int]:
    """The member whose entry in the directory starts at `at`, and where the next one does."""
    if at + _CENTRAL.size > len(raw) or raw[at : at + 4] != b"PK\1\2":
        raise FormatError("the directory is damaged or truncated")
    (
        _, made_by, needed, flags, method, time, date, crc, compressed, size,
        name_length, extra_length, comment_length, disk, internal, external, start,
    ) = _CENTRAL.unpack_from(raw, at)  # fmt: skip
    at += _CENTRAL.size
    ends = (at + name_length, at + name_length + extra_length, at + name_length + extra_length + comment_length)
    if ends[-1] > len(raw):
        raise FormatError("the directory is damaged or truncated")
    raw_name, extra, comment = raw[at : ends[0]], raw[ends[0] : ends[1]], raw[ends[1] : ends[2]]
    name = _decoded(raw_name, flags)
    with about(f"member {name!r:.120}"):
        if flags & _FLAG_ENCRYPTED:
            raise FormatError("it is encrypted")
        if needed > _NEWEST:
            raise FormatError(f"it needs version {needed} of the zip format; the newest known is {_NEWEST}")
        if flags & ~_KNOWN_FLAGS or disk:
            raise FormatError(f"its flags {flags:#06x} are not supported")
        if method not in (STORED, DEFLATED):
            raise FormatError(f"compression method {method} is not supported; needed is stored or deflated")
        wide, rest = _split_extra(extra)
        values, used = [], 0
        for value in (size, compressed, start):
            if value == _LIMIT and wide is not None:
                if used + 8 > len(wide):
                    raise FormatError("its 64-bit sizes are missing")
                value = int.from_bytes(wide[used : used + 8], "little")
                used += 8
            values.append(value)
        size, compressed, start = values
        if method == STORED and size != compressed:
            raise FormatError(f"it is stored and {size} bytes take {compressed}")
    member = Member(
        name, raw_name, flags, method, crc, compressed, size, start, 0, 0, False, b"",
        (made_by, needed), (time, date), (internal, external), rest, comment,
    )  # fmt: skip
    return member, ends[-1]


def _decoded(raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & _FLAG_UTF8 else "cp437")
    except UnicodeDecodeError:
        raise FormatError(f"the member name {raw!r:.80} is not UTF-8") from None
    if "\0" in name:
        raise FormatError(f"the member name {name!r:.80} holds a NUL")
    return name


def _check_names(members: list[Member]) -> None:
    seen = set()
    for member in members:
        if member.name in seen:
            raise FormatError(f"member {member.name!r:.120} is there twice")
        seen.add(member.name)


def _split_extra(extra: bytes) -> tuple[bytes | None, bytes]:
    """The 64-bit field among extra fields, and the others."""
    wide, rest, at = None, b"", 0
    while at < len(extra):
        if at + 4 > len(extra):
            raise FormatError("its extra fields are damaged")
        kind, length = struct.unpack_from("<2H", extra, at)
        end = at + 4 + length
        if end > len(extra) or (kind == _ZIP64 and wide is not None):
            raise FormatError("its extra fields are damaged")
        if kind == _ZIP64:
            wide = extra[at + 4 : end]
        else:
            rest += extra[at:end]
        at = end
    return wide, rest


def _placed(source: Source, member: Member, end: int) -> Member:
    """The member with what its local header says, which must be what the directory says."""
    if member.start + _LOCAL.size > end:
        raise FormatError("it overlaps the member behind it")
    magic, _, flags, method, _, _, crc, compressed, size, name_length, extra_length = _LOCAL.unpack(
        source.bytes_at(member.start, _LOCAL.size)
    )
    data = member.start + _LOCAL.size + name_length + extra_length
    if magic != b"PK\3\4" or data + member.compressed > end:
        raise FormatError("its local header is missing, or it overlaps the member behind it")
    behind = source.bytes_at(member.start + _LOCAL.size, name_length + extra_length)
    wide, rest = _split_extra(behind[name_length:])
    described = bool(flags & _FLAG_DESCRIPTOR)
    if wide is not None and _LIMIT in (size, compressed):
        if len(wide) < 16:
            raise FormatError("its local header lacks 64-bit sizes")
        size, compressed = struct.unpack_from("<2Q", wide)
    same = (flags, method, behind[:name_length]) == (member.flags, member.method, member.raw_name)
    stated = (crc, compressed, size)
    if not same or (stated != (member.crc, member.compressed, member.size) and not (described and not any(stated))):
        raise FormatError("its local header contradicts the directory")
    gap = end - data - member.compressed
    if gap and not (described and gap in _DESCRIPTOR_SIZES):
        raise FormatError(f"{gap} bytes lie between it and what follows")
    return replace(member, data=data, end=end, has_zip64=wide is not None, local_extra=rest)


class Inflated:
    """The content of a member, read at growing offsets; going back starts it anew.

    Whoever reads it from its start to its end has its checksum verified, and `when_verified` is
    called. Memory is one window.
    """

    def __init__(self, source: Source, member: Member, when_verified: Callable[[], object] = lambda: None) -> None:
        self._source, self._member, self._when_verified = source, member, when_verified
        self._rewind()

    def fill(self, into: memoryview, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on; FormatError when they are not there or damaged."""
        rest = into.cast("B")
        with about(f"member {self._member.name!r:.120}"):
            if offset < self._at:
                self._rewind()
            if self._member.method == STORED:
                self._fill_stored(rest, offset)
            else:
                while self._at < offset:
                    self._next(min(_CHUNK, offset - self._at))
                while rest:
                    piece = self._next(min(_INFLATE, len(rest)))
                    rest[: len(piece)] = piece
                    rest = rest[len(piece) :]
                if self._at == self._member.size:
                    self._finish()

    def verify(self) -> None:
        """FormatError when the checksum is not that of the content, which is read as far as it was not yet."""
        buffer = memoryview(bytearray(_CHUNK))
        while self._crc_at < self._member.size:
            self.fill(buffer[: self._member.size - self._crc_at], self._crc_at)
        if not self._member.size:
            with about(f"member {self._member.name!r:.120}"):
                self._finish()

    def _rewind(self) -> None:
        self._at = self._crc_at = self._crc = 0
        self._taken = 0  # compressed bytes
        self._inflate = zlib.decompressobj(-15)

    def _fill_stored(self, into: memoryview, offset: int) -> None:
        if offset + len(into) > self._member.size:
            raise FormatError("its content ends early")
        self._source.fill(into, self._member.data + offset)
        self._at = offset + len(into)
        if offset == self._crc_at:
            self._count(into)
            if self._at == self._member.size:
                self._finish()

    def _next(self, most: int) -> bytes:
        """The next bytes of the content: at least one, at most `most`."""
        while True:
            waiting = self._inflate.unconsumed_tail
            if not waiting and not self._inflate.eof:
                count = min(_CHUNK, self._member.compressed - self._taken)
                waiting = self._source.bytes_at(self._member.data + self._taken, count)
                self._taken += count
            found = self._inflated(waiting, most)
            if found:
                self._at += len(found)
                self._count(found)
                return found
            if self._inflate.eof or (not waiting and self._taken == self._member.compressed):
                raise FormatError(f"it inflates to {self._at} bytes and states {self._member.size}")

    def _inflated(self, waiting: bytes, most: int) -> bytes:
        try:
            return self._inflate.decompress(waiting, most)
        except zlib.error as error:
            raise FormatError(f"it is damaged: {error}") from None

    def _count(self, found: bytes | memoryview) -> None:
        self._crc = zlib.crc32(found, self._crc)
        self._crc_at = self._at

    def _finish(self) -> None:
        if self._crc_at != self._member.size:
            return
        if self._crc != self._member.crc:
            raise FormatError("its checksum is not that of its content")
        if self._member.method == DEFLATED:
            self._finish_inflating()
        self._when_verified()

    def _finish_inflating(self) -> None:
        """FormatError unless the compressed content ends here too."""
        left = self._member.compressed - self._taken
        if not self._inflate.eof and left <= _CHUNK:
            waiting = self._inflate.unconsumed_tail + self._source.bytes_at(self._member.data + self._taken, left)
            self._taken, left = self._member.compressed, 0
            if self._inflated(waiting, 1) or not self._inflate.eof:
                raise FormatError(f"it inflates to more than the {self._member.size} bytes that it states")
        if left or self._inflate.unused_data:
            raise FormatError("bytes lie behind its compressed content")


class ArchiveWriter:
    """Appends members to a new archive at `fd`, one after the other, and then the directory."""

    def __init__(self, source: Source, directory: Directory, fd: int) -> None:
        self._source, self._directory, self._fd = source, directory, fd
        self._written: dict[str, Member] = {}
        self._at = 0

    def copy(self, member: Member) -> None:
        """Append a member as it is."""
        copy_range(self._source, member.start, member.end - member.start, self._fd)
        start, self._at = self._at, self._at + member.end - member.start
        self._written[member.name] = replace(member, start=start)

    def begin(self, member: Member) -> Rewritten:
        """A new content for a member, to be written to its end and finished."""
        return Rewritten(self._fd, self._at, member)

    def add(self, member: Member) -> None:
        """Take note of a member that was rewritten."""
        self._at = member.end
        self._written[member.name] = member

    def finish(self) -> None:
        """Append the directory: the bytes of the old one when every member is what it was."""
        old = self._directory
        members = [self._written[member.name] for member in old.members]
        if all(new == then for new, then in zip(members, old.members, strict=True)):
            copy_range(self._source, old.start, self._source.size - old.start, self._fd)
            return
        size = 0
        for member in members:
            record = _central_record(member)
            write_all(self._fd, memoryview(record))
            size += len(record)
        write_all(self._fd, memoryview(_end_records(len(members), size, self._at, has_zip64=old.has_zip64)))


class Rewritten:
    """A member with a new content of the same size, stored or deflated as the old one was."""

    def __init__(self, fd: int, start: int, member: Member) -> None:
        self._fd = fd
        # Deflating can add a little: near the limit of 32 bits the numbers are 64-bit ones.
        wide = member.has_zip64 or member.size > _WIDE - (_WIDE >> 8)
        self._member = replace(
            member, start=start, crc=0, compressed=0, flags=member.flags & ~_FLAG_DESCRIPTOR, has_zip64=wide
        )
        self._deflate = zlib.compressobj(wbits=-15) if member.method == DEFLATED else None
        write_all(fd, memoryview(_local_record(self._member)))

    def write(self, data: memoryview) -> None:
        """Append bytes to the content."""
        for start in range(0, len(data), _INFLATE):  # what comes out of a long piece would be as long
            piece = data[start : start + _INFLATE]
            self._member = replace(self._member, crc=zlib.crc32(piece, self._member.crc))
            self._append(piece if self._deflate is None else self._deflate.compress(piece))

    def finish(self) -> Member:
        """The member as it is now, its header filled in."""
        if self._deflate is not None:
            self._append(self._deflate.flush())
        record = _local_record(self._member)
        data = self._member.start + len(record)
        _write_at(self._fd, record, self._member.start)
        return replace(self._member, data=data, end=data + self._member.compressed)

    def _append(self, data: bytes | memoryview) -> None:
        write_all(self._fd, memoryview(data))
        self._member = replace(self._member, compressed=self._member.compressed + len(data))


def _write_at(fd: int, data: bytes, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _local_record(member: Member) -> bytes:
    sizes, extra = (member.compressed, member.size), member.local_extra
    if member.has_zip64:
        extra = struct.pack("<2H2Q", _ZIP64, 16, member.size, member.compressed) + extra
        sizes = (_LIMIT, _LIMIT)
    fields = (member.made[1], member.flags, member.method, *member.stamp, member.crc, *sizes)
    return _LOCAL.pack(b"PK\3\4", *fields, len(member.raw_name), len(extra)) + member.raw_name + extra


def _central_record(member: Member) -> bytes:
    values = (member.size, member.compressed, member.start)
    wide = [value for value in values if value >= _WIDE]
    size, compressed, start = (_LIMIT if value >= _WIDE else value for value in values)
    extra = member.extra
    if wide:
        extra = struct.pack(f"<2H{len(wide)}Q", _ZIP64, 8 * len(wide), *wide) + extra
    made = (member.made[0], max(member.made[1], 45) if wide else member.made[1])
    fields = (*made, member.flags, member.method, *member.stamp, member.crc)
    lengths = (len(member.raw_name), len(extra), len(member.comment))
    record = _CENTRAL.pack(b"PK\1\2", *fields, compressed, size, *lengths, 0, *member.tail, start)
    return record + member.raw_name + extra + member.comment


def _end_records(count: int, size: int, start: int, *, has_zip64: bool) -> bytes:
    records = b""
    if has_zip64 or count >= _MANY or size >= _WIDE or start >= _WIDE:
        records += _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
        records += _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    size, start = (_LIMIT if value >= _WIDE else value for value in (size, start))
    count = min(count, _MANY)
    return records + _END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0)
