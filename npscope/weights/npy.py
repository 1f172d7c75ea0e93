"""The npy format: a line that says dtype, order and shape, and then the numbers of one array.

The line is written as a Python literal, and read here by a grammar of its own: nothing is
evaluated. Arrays of objects are pickles and refused; big-endian, structured and other dtypes
that npscope does not prune are taken over as they are.
"""

from __future__ import annotations

import math
import os
import re
from typing import NamedTuple

from npscope.errors import FormatError, about
from npscope.weights import Tensor
from npscope.weights.packed import Packed
from npscope.weights.source import Source
from npscope.weights.strict_json import MAX_COUNT

MAGIC = b"\x93NUMPY"

MAX_HEADER = 10_000
"""Bytes that a header may have, as NumPy limits it."""

PREFIX_BYTES = 12
"""Enough of a file to know the length of its header."""

MAX_AXES = 64

_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
_ENCODINGS = {(1, 0): "latin-1", (2, 0): "latin-1", (3, 0): "utf-8"}

_ITEM = re.compile(
    r"""\s* (?P<quote>['"]) (?P<key>\w+) (?P=quote) \s* : \s*
        (?: (?P<text>'[^'"\\]*'|"[^'"\\]*") | (?P<truth>True|False)
          | \( \s* (?P<lengths> (?: \d{1,19} \s* , \s* )* (?:\d{1,19} \s*)? ) \) )
        \s* (?P<end>,|(?=\})) """,
    re.VERBOSE | re.ASCII,
)
_DESCR = re.compile(r"(?P<order>[<>|=])(?P<kind>[biufcSUaVmM])(?P<count>\d{1,9})(?P<unit>\[[\w/]+\])?", re.ASCII)

_KINDS = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
_WIDTHS = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "c": (8, 16)}


class Header(NamedTuple):
    """What the header of an npy array says, and how long it is.

    `dtype` is named as in `Tensor`, or as the file says where npscope has no name for it.
    """

    nbytes: int
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    fortran: bool

    def tensor(self, name: str) -> Tensor:
        """The array under a name, its shape in the order in which it is stored."""
        shape = self.shape[::-1] if self.fortran else self.shape
        return Tensor(name, self.dtype, shape, math.prod(shape) * self.itemsize, fortran=self.fortran)


def open_npy(path: str | os.PathLike[str]) -> Packed:
    """The npy file at `path`, its header checked; its one tensor is called as the file is, without ``.npy``.

    FormatError when it is not a regular file or anything in it contradicts the format.
    """
    with about(f"{os.fsdecode(path)!r}"):
        source = Source(path)
        try:
            prefix = source.bytes_at(0, min(PREFIX_BYTES, source.size))
            length = header_length(prefix)
            if length > source.size:
                raise FormatError(f"a header of {length} bytes does not fit a file of {source.size}")
            header = parse_header(source.bytes_at(0, length))
            tensor = header.tensor(os.path.basename(source.path).removesuffix(".npy"))
            check_size(tensor, source.size - length)
            return Packed("npy", source, length, [(0, tensor)])
        except BaseException:
            source.close()
            raise


def header_length(prefix: bytes) -> int:
    """Bytes before the numbers, from the first `PREFIX_BYTES` of an array; FormatError when there is none."""
    if not prefix.startswith(MAGIC):
        raise FormatError(f"it starts with {prefix[:6]!r}, not with {MAGIC!r}; this is no npy array")
    if len(prefix) < PREFIX_BYTES:
        raise FormatError(f"{len(prefix)} bytes are too few for an npy array")
    version = (prefix[6], prefix[7])
    count = _LENGTH_BYTES.get(version)
    if count is None:
        raise FormatError(f"npy version {version[0]}.{version[1]} is unknown; needed is 1.0, 2.0 or 3.0")
    length = int.from_bytes(prefix[8 : 8 + count], "little")
    if length > MAX_HEADER:
        raise FormatError(f"a header of {length} bytes exceeds the {MAX_HEADER} that are allowed")
    return 8 + count + length


def parse_header(raw: bytes) -> Header:
    """The header in `raw`, which starts with the magic bytes and ends with the header."""
    version = (raw[6], raw[7])
    try:
        text = raw[8 + _LENGTH_BYTES[version] :].decode(_ENCODINGS[version])
    except UnicodeDecodeError:
        raise FormatError("the header is not UTF-8") from None
    fields = _fields(text)
    descr, fortran, lengths = fields["descr"]["text"], fields["fortran_order"]["truth"], fields["shape"]["lengths"]
    if descr is None:
        raise FormatError("descr is no string; structured arrays are not supported")
    if fortran is None:
        raise FormatError("fortran_order must be True or False")
    if lengths is None:
        raise FormatError("shape must be a tuple of whole numbers")
    dtype, itemsize = _dtype(descr[1:-1])
    return Header(len(raw), dtype, itemsize, _shape(lengths, itemsize), fortran == "True")


def check_size(tensor: Tensor, nbytes: int) -> None:
    """FormatError unless `nbytes` is what the numbers of `tensor` take."""
    if tensor.nbytes != nbytes:
        fault = "is truncated" if tensor.nbytes > nbytes else "has trailing bytes"
        raise FormatError(f"the array {fault}: its numbers take {tensor.nbytes} bytes, it has {nbytes}")


def _fields(text: str) -> dict[str, re.Match[str]]:
    """The three items of the header by key; FormatError unless the text is a dictionary of just those."""
    body = text.rstrip(" \n")
    if not (body.startswith("{") and body.endswith("}")):
        raise FormatError(f"the header {text!r:.80} is no dictionary")
    found: dict[str, re.Match[str]] = {}
    at = 1
    while body[at:].strip(" ") != "}":
        item = _ITEM.match(body, at)
        if item is None:
            raise FormatError(f"the header cannot be read from {body[at:]!r:.80} on")
        if item["key"] in found:
            raise FormatError(f"the header holds the key {item['key']!r:.80} twice")
        found[item["key"]] = item
        at = item.end()
    if found.keys() != {"descr", "fortran_order", "shape"}:
        raise FormatError("the header must hold exactly descr, fortran_order and shape")
    return found


def _dtype(descr: str) -> tuple[str, int]:
    """Name and bytes of the dtype that `descr` encodes."""
    if descr[1:2] == "O":
        raise FormatError("an array of objects is not supported: it is a pickle, which can run code")
    parts = _DESCR.fullmatch(descr)
    if parts is None:
        raise FormatError(f"descr {descr!r:.40} is unknown")
    order, kind, count = parts["order"], parts["kind"], int(parts["count"])
    little = order == "<" or (order == "|" and count == 1)
    if parts["unit"] is None and little and count in _WIDTHS.get(kind, ()):
        return f"{_KINDS[kind]}{8 * count}", count
    if descr == "|b1":
        return "bool", 1
    return descr, 4 * count if kind == "U" else count


def _shape(lengths: str, itemsize: int) -> tuple[int, ...]:
    items = [item.strip() for item in lengths.split(",")]
    if len(items) == 1 and items[0]:
        raise FormatError(f"shape ({items[0]:.40}) is a number in brackets and no tuple")
    shape = tuple(int(item) for item in items if item)
    if len(shape) > MAX_AXES:
        raise FormatError(f"{len(shape)} axes are more than the {MAX_AXES} that NumPy has")
    # The axes of length 0 aside: a shape must be possible whatever its other axes are.
    if math.prod(length or 1 for length in shape) * max(itemsize, 1) >= MAX_COUNT:
        raise FormatError(f"shape {shape!s:.80} is larger than any file")
    return shape
