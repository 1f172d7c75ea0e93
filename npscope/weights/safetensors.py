"""The safetensors format, read strictly and rewritten byte for byte.

A file is 8 bytes of header length, a JSON header, then the tensors, packed without a gap.
Whatever leaves a doubt is refused: a hole or overlap, a duplicate key, trailing bytes. So a
writer that appends tensors of unchanged size in file order reproduces the file, header
included. Values are read with `pread`: a mapped file that someone truncates kills the process.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Self

from npscope.errors import FileError, FormatError, about
from npscope.weights import Tensor
from npscope.weights.output import Target, reserve, staged

MAX_HEADER = 100_000_000
"""Bytes that a header may have, as in the reference implementation."""

_COPY_BYTES = 4 << 20
_MAX_COUNT = 1 << 63
_FIELDS = {"dtype", "shape", "data_offsets"}

DTYPES = {  # name in the file: (name here, bits)
    "BOOL": ("bool", 8),
    "F4": ("F4", 4),
    "F6_E2M3": ("F6_E2M3", 6),
    "F6_E3M2": ("F6_E3M2", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}

_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive (npz, or a PyTorch checkpoint: a pickle, which can run code)",
    b"\x80": "a pickle, which can run code and is never opened",
    b"\x93NUMPY": "an npy array",
    b"GGUF": "a GGUF file",
}


class Safetensors:
    """An open safetensors file: see `npscope.weights.WeightFile`.

    FormatError when it is not a regular file or anything in it contradicts the format.
    """

    side_by_side = True  # every read says where: threads share no position in the file

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with about(f"{os.fsdecode(path)!r}"):
                self._opened = os.fstat(self._fd)
                self._data_start, entries, metadata = _read_header(self._fd, self._opened)
        except BaseException:
            os.close(self._fd)
            raise
        self._path = os.fsdecode(path)
        self._metadata = metadata
        self._starts = {tensor.name: start for start, tensor in entries}
        self._tensors = {tensor.name: tensor for _, tensor in entries}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in the order of their bytes."""
        return self._tensors

    @property
    def metadata(self) -> Mapping[str, str]:
        """What ``__metadata__`` says."""
        return self._metadata

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from byte `start` on."""
        if start < 0 or start + into.nbytes > tensor.nbytes:
            raise FormatError(
                f"bytes {start} to {start + into.nbytes} of tensor {tensor.name!r:.120}: it has {tensor.nbytes}"
            )
        self._fill(into, self._data_start + self._starts[tensor.name] + start)

    def target(self, path: str | os.PathLike[str], *, force: bool) -> Target:
        """The place for the result at `path`."""
        return Target.of(path, force=force, source=self._opened)

    @contextmanager
    def successor(self, target: Target) -> Iterator[SafetensorsWriter]:
        """Context with the writer of a file like this at `target`, the header written."""
        with staged(target) as fd:
            writer = SafetensorsWriter(self, fd)
            yield writer
            writer.finish()
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """FileError when size or modification time are not what they were at opening."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise FileError(f"{self._path!r} was changed by another program while it was read; run again")

    def close(self) -> None:
        """Close the file; once is enough, twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _fill(self, into: memoryview, offset: int) -> None:
        """Fill `into` from the absolute `offset` of the file."""
        rest = into.cast("B")
        while rest:
            # A single read returns at most 2 GiB, and less when a signal comes in between.
            got = os.preadv(self._fd, [rest], offset)
            if not got:
                raise FileError(f"{self._path!r} ends at byte {offset}; it was truncated while it was read")
            rest, offset = rest[got:], offset + got


class SafetensorsWriter:
    """Writes the tensors of one safetensors file, in its order, into another file."""

    def __init__(self, source: Safetensors, fd: int) -> None:
        self._source = source
        self._fd = fd
        self._buffer = memoryview(bytearray(_COPY_BYTES))
        self._written = 0  # bytes behind the header
        self._size = source._opened.st_size - source._data_start
        reserve(fd, source._opened.st_size)
        self._copy_range(0, source._data_start)

    def copy(self, tensor: Tensor) -> None:
        """Take over the next tensor of the file as it is."""
        self._expect(tensor, tensor.nbytes)
        self._copy_range(self._source._data_start + self._written, tensor.nbytes)
        self._written += tensor.nbytes

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append bytes to the next tensor of the file."""
        view = data.cast("B")
        self._expect(tensor, view.nbytes)
        _write_all(self._fd, view)
        self._written += view.nbytes

    def finish(self) -> None:
        """FormatError unless every byte of every tensor was written."""
        if self._written != self._size:
            raise FormatError(f"{self._written} of {self._size} bytes of tensors were written")

    def _expect(self, tensor: Tensor, nbytes: int) -> None:
        start = self._source._starts[tensor.name]
        if not (start <= self._written and self._written + nbytes <= start + tensor.nbytes):
            raise FormatError(f"tensor {tensor.name!r:.120} is written out of order")

    def _copy_range(self, offset: int, nbytes: int) -> None:
        for done in range(0, nbytes, _COPY_BYTES):
            piece = self._buffer[: min(_COPY_BYTES, nbytes - done)]
            self._source._fill(piece, offset + done)
            _write_all(self._fd, piece)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _read_header(fd: int, status: os.stat_result) -> tuple[int, list[tuple[int, Tensor]], dict[str, str]]:
    """Where the data starts, the (start, tensor) of every tensor in the order of their bytes, and the metadata."""
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("this is not a regular file; needed is a safetensors file")
    head = os.pread(fd, 9, 0)
    for magic, kind in _OTHER_FORMATS.items():
        if head.startswith(magic) and head[8:] != b"{":
            raise FormatError(f"this is {kind}; needed is a safetensors file")
    if len(head) < 8:
        raise FormatError(f"{status.st_size} bytes are too few for a safetensors file, which has at least 8")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise FormatError(f"header length {length} exceeds {MAX_HEADER} bytes; this is no safetensors file")
    if not 2 <= length <= status.st_size - 8:
        raise FormatError(f"header length {length} does not fit a file of {status.st_size} bytes")
    data_start = 8 + length
    raw = b""
    while len(raw) < length:
        piece = os.pread(fd, length - len(raw), 8 + len(raw))
        if not piece:
            raise FormatError(f"the file ends at byte {8 + len(raw)}, inside its header")
        raw += piece
    header = _parse(raw)
    metadata = _metadata(header)
    return data_start, _packed(_tensors(header), status.st_size - data_start), metadata


def _parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a header, which starts with ``{`` and is padded with spaces."""
    if raw[:1] != b"{":
        raise FormatError(f"the header starts with {raw[:4]!r}, not with '{{'")
    try:
        header = json.loads(
            raw.decode("utf-8").rstrip(" "),
            object_pairs_hook=_unique,
            parse_int=_count,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except RecursionError:
        raise FormatError("the header is nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:  # not UTF-8, or not JSON
        raise FormatError(f"the header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise FormatError("the header is no JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FormatError(f"the header holds the key {twice!r:.120} twice")
    return found


def _count(text: str) -> int:
    # Before int(): thousands of digits would cost quadratic time.
    if text.startswith("-") or len(text) > 19 or int(text) >= _MAX_COUNT:
        raise FormatError(f"the header holds the number {text:.40}, which is no size or offset")
    return int(text)


def _refuse_number(text: str) -> NoReturn:
    raise FormatError(f"the header holds {text:.40}, where only whole numbers can stand")


def _tensors(header: dict[str, Any]) -> list[tuple[int, Tensor]]:
    """The (start, tensor) of every entry; each is consistent in itself."""
    return [_entry(name, fields) for name, fields in header.items() if name != "__metadata__"]


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ must be an object of strings")
    return metadata


def _entry(name: str, fields: Any) -> tuple[int, Tensor]:
    with about(f"tensor {name!r:.120}"):
        if not name.isascii():
            _check_text(name)
        if not isinstance(fields, dict) or fields.keys() != _FIELDS:
            raise FormatError("needed are exactly the fields dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str):
            raise FormatError("dtype must be a string")
        if not _are_counts(shape):
            raise FormatError("shape must be a list of whole numbers")
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise FormatError("data_offsets must be two whole numbers, the first not above the second")
        start, nbytes = offsets[0], offsets[1] - offsets[0]
        known, bits = DTYPES.get(dtype, (dtype, None))
        if bits is not None and _size(shape) * bits != nbytes * 8:
            raise FormatError(f"{dtype} of shape {shape!s:.80} does not take {nbytes} bytes")
        return start, Tensor(name, known, tuple(shape), nbytes)


def _check_text(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("the name holds half a surrogate pair and is no text") from None


def _are_counts(values: Any) -> bool:
    # type() and not isinstance(): True is an int.
    return isinstance(values, list) and all(type(v) is int for v in values)


def _size(shape: list[int]) -> int:
    """Elements of `shape`; FormatError when the axes other than 0 multiply beyond any file."""
    size = 1
    for length in shape:
        size *= length or 1
        if size >= _MAX_COUNT:
            raise FormatError(f"shape {shape!s:.80} is larger than any file")
    return 0 if 0 in shape else size


def _packed(entries: list[tuple[int, Tensor]], nbytes: int) -> list[tuple[int, Tensor]]:
    """The entries in the order of their bytes; FormatError unless they fill `nbytes` without gap or overlap."""
    ordered = sorted(entries, key=lambda entry: (entry[0], entry[1].nbytes))
    end = 0
    for start, tensor in ordered:
        if start != end:
            fault = "leaves a hole" if start > end else "overlaps the tensor before it"
            raise FormatError(f"tensor {tensor.name!r:.120} {fault}: it starts at {start}, not at {end}")
        end = start + tensor.nbytes
    if end != nbytes:
        fault = "is truncated" if end > nbytes else "has trailing bytes"
        raise FormatError(f"the file {fault}: its tensors take {end} bytes, the file holds {nbytes}")
    return ordered
