"""The npz format: a zip archive of npy arrays, never unpickled.

A member whose numbers come out as they were is copied as it is, and so is an archive in which
none has changed: what is written is compared with what was there, and a member is packed anew
from the first difference on. No member is ever held in memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Self

from npscope.errors import FormatError, about
from npscope.weights import Tensor
from npscope.weights.archive import ArchiveWriter, Inflated, Member, Rewritten, read_directory
from npscope.weights.detection import check_name
from npscope.weights.npy import PREFIX_BYTES, check_size, header_length, parse_header
from npscope.weights.output import Target, staged
from npscope.weights.packed import check_range, out_of_order
from npscope.weights.source import Source

_KEPT_STREAMS = 4
"""Members that are read at once: as many as one coupling may alternate between."""

_PIECE = 1 << 18


class Array(NamedTuple):
    """A member, and where its numbers start in its content."""

    member: Member
    header: int


class Npz:
    """An open npz file: see `npscope.weights.WeightFile`.

    FormatError when it is not a regular file, anything in it contradicts the formats, a member is
    no array of numbers, or all members together inflate to more than `max_bytes`.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        with about(f"{os.fsdecode(path)!r}"):
            self.source = Source(path)
            try:
                self.directory = read_directory(self.source)
                self.arrays: dict[str, Array] = {}
                self._tensors: dict[str, Tensor] = {}
                self._check_names(max_bytes)
                for member in sorted(self.directory.members, key=lambda member: member.start):
                    with about(f"member {member.name!r:.120}"):
                        self._add(member)
            except BaseException:
                self.source.close()
                raise
        self.verified: set[str] = set()  # names of tensors whose checksums are right
        self._streams: dict[str, Inflated] = {}
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every array by name, in the order of their bytes."""
        return self._tensors

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from byte `start` on; cheap where reads follow each other."""
        check_range(tensor, start, into)
        with self._lock:
            stream = self._streams.pop(tensor.name, None) or self.stream(tensor)
            self._streams[tensor.name] = stream
            if len(self._streams) > _KEPT_STREAMS:
                del self._streams[next(iter(self._streams))]
            stream.fill(into, self.arrays[tensor.name].header + start)

    def stream(self, tensor: Tensor) -> Inflated:
        """The content of the member of `tensor`, its header read: reading on from there verifies the checksum."""
        member, header = self.arrays[tensor.name]
        stream = Inflated(self.source, member, partial(self.verified.add, tensor.name))
        stream.fill(memoryview(bytearray(header)), 0)
        return stream

    def target(self, path: str | os.PathLike[str], *, force: bool) -> Target:
        """The place for the result at `path`."""
        check_name(path, "npz")
        return Target.of(path, force=force, source=self.source.status)

    def own_place(self) -> Target:
        """The place of this file itself."""
        return Target.of(self.source.path, force=True)

    def files(self) -> list[str]:
        """The path of this file."""
        return [self.source.path]

    def places(self, path: str | os.PathLike[str]) -> list[str]:
        """The path of a successor, which is one file."""
        return [os.fsdecode(path)]

    @contextmanager
    def successor(self, target: Target) -> Iterator[NpzWriter]:
        """Context with the writer of a file like this at `target`."""
        with staged(target) as fd:
            writer = NpzWriter(self, fd)
            yield writer
            writer.finish()
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """FileError when the file is not what it was at opening."""
        self.source.check_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.source.close()

    def _check_names(self, max_bytes: int | None) -> None:
        for member in self.directory.members:
            with about(f"member {member.name!r:.120}"):
                if member.name.endswith(".pkl"):
                    raise FormatError("a PyTorch checkpoint is not supported: it is a pickle, which can run code")
                if not member.name.endswith(".npy"):
                    raise FormatError("it is no npy array; an npz file holds nothing else")
                if member.name.startswith("/") or ".." in member.name.replace("\\", "/").split("/"):
                    raise FormatError("its name leads out of the archive")
        total = sum(member.size for member in self.directory.members)
        if max_bytes is not None and total > max_bytes:
            raise FormatError(f"its members inflate to {total} bytes, more than the {max_bytes} of --max-bytes")

    def _add(self, member: Member) -> None:
        content = Inflated(self.source, member)
        prefix = bytearray(min(PREFIX_BYTES, member.size))
        content.fill(memoryview(prefix), 0)
        length = header_length(bytes(prefix))
        if length > member.size:
            raise FormatError(f"a header of {length} bytes does not fit {member.size} bytes")
        raw = bytearray(length)
        content.fill(memoryview(raw), 0)
        tensor = parse_header(bytes(raw)).tensor(member.name.removesuffix(".npy"))
        check_size(tensor, member.size - length)
        self.arrays[tensor.name] = Array(member, length)
        self._tensors[tensor.name] = tensor


class NpzWriter:
    """Writes the arrays of an npz file, in its order, into another file."""

    def __init__(self, weights: Npz, fd: int) -> None:
        self._weights = weights
        self._archive = ArchiveWriter(weights.source, weights.directory, fd)
        self._to_come = list(weights.tensors)[::-1]
        self._current: _Rewriting | None = None

    def copy(self, tensor: Tensor) -> None:
        """Take over the next array as it is, its checksum verified."""
        self._expect(tensor)
        self._take_over(tensor)

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append bytes to the next array."""
        if self._current is None or self._current.tensor != tensor:
            self._expect(tensor)
            self._current = _Rewriting(self._weights, self._archive, tensor)
        self._current.write(data.cast("B"))
        if self._current.is_complete:
            rewritten, self._current = self._current.result, None
            if rewritten is None:
                self._take_over(tensor)
            else:
                self._verify(tensor)
                self._archive.add(rewritten.finish())

    def finish(self) -> None:
        """Write the directory; FormatError unless every array was written to its end."""
        if self._to_come or self._current is not None:
            raise FormatError(f"{len(self._to_come)} arrays were not written, or one not to its end")
        self._archive.finish()

    def _expect(self, tensor: Tensor) -> None:
        if self._current is not None or self._to_come[-1:] != [tensor.name]:
            raise out_of_order(tensor)
        self._to_come.pop()

    def _take_over(self, tensor: Tensor) -> None:
        self._verify(tensor)
        self._archive.copy(self._weights.arrays[tensor.name].member)

    def _verify(self, tensor: Tensor) -> None:
        if tensor.name not in self._weights.verified:
            self._weights.stream(tensor).verify()


class _Rewriting:
    """An array that is written: compared with what it was, and packed anew from the first difference on."""

    def __init__(self, weights: Npz, archive: ArchiveWriter, tensor: Tensor) -> None:
        self.tensor = tensor
        self.result: Rewritten | None = None
        self._weights, self._archive = weights, archive
        self._member, self._header = weights.arrays[tensor.name]
        self._before = weights.stream(tensor)
        self._done = 0

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are there."""
        return self._done == self.tensor.nbytes

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        if self._done + data.nbytes > self.tensor.nbytes:
            raise out_of_order(self.tensor)
        if self.result is None and not self._is_as_before(data):
            self.result = self._begun()
        if self.result is not None:
            self.result.write(data)
        self._done += data.nbytes

    def _is_as_before(self, data: memoryview) -> bool:
        at = self._header + self._done
        return all(piece == data[start : start + len(piece)] for start, piece in _pieces(self._before, at, data.nbytes))

    def _begun(self) -> Rewritten:
        """The member packed anew up to where it is the same."""
        result = self._archive.begin(self._member)
        for _, piece in _pieces(self._weights.stream(self.tensor), 0, self._header + self._done):
            result.write(piece)
        return result


def _pieces(stream: Inflated, start: int, nbytes: int) -> Iterator[tuple[int, memoryview]]:
    """(offset from `start`, bytes) of a part of a content, piece by piece; the bytes are gone with the next."""
    buffer = memoryview(bytearray(min(_PIECE, nbytes)))
    for done in range(0, nbytes, _PIECE):
        piece = buffer[: min(_PIECE, nbytes - done)]
        stream.fill(piece, start + done)
        yield done, piece
