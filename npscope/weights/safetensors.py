"""The safetensors format, read strictly and rewritten byte for byte.

A file is 8 bytes of header length, a JSON header, then the tensors, packed without a gap.
Whatever leaves a doubt is refused: a hole or overlap, a duplicate key, trailing bytes.
"""

from __future__ import annotations

import os
from typing import Any

from npscope.errors import FormatError, about
from npscope.weights import Tensor
from npscope.weights.packed import Packed
from npscope.weights.source import Source
from npscope.weights.strict_json import MAX_COUNT, parse_object

MAX_HEADER = 100_000_000
"""Bytes that a header may have, as in the reference implementation."""

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


def open_safetensors(path: str | os.PathLike[str]) -> Packed:
    """The safetensors file at `path`, its header checked.

    FormatError when it is not a regular file or anything in it contradicts the format.
    """
    with about(f"{os.fsdecode(path)!r}"):
        source = Source(path)
        try:
            return Packed("safetensors", source, *_read_header(source))
        except BaseException:
            source.close()
            raise


def _read_header(source: Source) -> tuple[int, list[tuple[int, Tensor]], dict[str, str]]:
    """Where the data starts, the (start, tensor) of every tensor in the order of their bytes, and the metadata."""
    if source.size < 8:
        raise FormatError(f"{source.size} bytes are too few for a safetensors file, which has at least 8")
    length = int.from_bytes(source.bytes_at(0, 8), "little")
    if length > MAX_HEADER:
        raise FormatError(f"header length {length} exceeds {MAX_HEADER} bytes; this is no safetensors file")
    if not 2 <= length <= source.size - 8:
        raise FormatError(f"header length {length} does not fit a file of {source.size} bytes")
    raw = source.bytes_at(8, length)
    if raw[:1] != b"{":
        raise FormatError(f"the header starts with {raw[:4]!r}, not with '{{'")
    header = parse_object(raw.rstrip(b" "), "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ must be an object of strings")
    entries = [_entry(name, fields) for name, fields in header.items()]
    return 8 + length, _packed(entries, source.size - 8 - length), metadata


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
        if size >= MAX_COUNT:
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
