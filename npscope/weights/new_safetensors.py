"""Safetensors files of new tensors: of other names, dtypes or shapes than any file that was read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from npscope.errors import FormatError, about
from npscope.weights import Tensor
from npscope.weights.output import Stage, Target, overwrite, stage
from npscope.weights.safetensors import DTYPES, MAX_HEADER


@contextmanager
def create(target: Target, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> Iterator[NewSafetensors]:
    """Context with the writer of a new file with these tensors, in whatever order they come.

    It is at `target` when the context ends without an error, or when its writer publishes it before.

    The header's keys are sorted, and tensors of wide dtypes lie before those of narrow ones, so that
    all are aligned: the same tensors give the same bytes. FormatError for two tensors of one name
    or a name that the format cannot hold, and at the end when a tensor is incomplete.
    """
    header, starts = _new_header(list(tensors), metadata)
    with stage(target) as building:
        writer = NewSafetensors(building, header, starts)
        yield writer
        if not writer.is_published:
            writer.publish()


def is_begun(path: str, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether the file at `path` has the header and the size of a new one with these tensors."""
    header, starts = _new_header(list(tensors), metadata)
    size = len(header) + max((end for _, end in starts.values()), default=0)
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header


class NewSafetensors:
    """Writes tensors into a new file, each from its first byte to its last, any number at the same time."""

    def __init__(self, building: Stage, header: bytes, starts: Mapping[str, tuple[int, int]]) -> None:
        self.is_published = False
        self._building = building
        self._ends = {name: len(header) + end for name, (_, end) in starts.items()}
        self._next = {name: len(header) + start for name, (start, _) in starts.items()}
        overwrite(building.fd, memoryview(header), 0)

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of the tensor `name`."""
        rest = data.cast("B")
        if self._next[name] + rest.nbytes > self._ends[name]:
            raise FormatError(f"tensor {name!r:.120} is given more bytes than it has")
        overwrite(self._building.fd, rest, self._next[name])
        self._next[name] += rest.nbytes

    def publish(self) -> None:
        """Put the file in its place; FormatError unless every tensor is complete."""
        for name, end in self._ends.items():
            if self._next[name] != end:
                raise FormatError(f"tensor {name!r:.120} lacks {end - self._next[name]} bytes")
        self._building.publish()
        self.is_published = True

    def withdraw(self) -> None:
        """Take the name away again, if the file was published where none was."""
        self._building.withdraw()


def _new_header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file with these tensors, and where behind them each starts and ends."""
    codes = {name: (code, bits) for code, (name, bits) in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, tuple[int, int]] = {}
    end = 0
    for tensor in tensors:
        if tensor.dtype not in codes:
            raise FormatError(f"tensor {tensor.name!r:.120}: a safetensors file has no dtype {tensor.dtype}")
    for tensor in sorted(tensors, key=lambda tensor: (-codes[tensor.dtype][1], tensor.name)):
        with about(f"tensor {tensor.name!r:.120}"):
            if tensor.name in starts or tensor.name == "__metadata__":
                raise FormatError("a safetensors file holds a name once, and __metadata__ is none")
            start, end = end, end + tensor.nbytes
            starts[tensor.name] = start, end
            fields = {"dtype": codes[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": [start, end]}
            header[tensor.name] = fields
    try:
        raw = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FormatError("a name or the metadata holds half a surrogate pair and is no text") from None
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise FormatError(f"a header of {len(raw)} bytes is needed; a safetensors file can have {MAX_HEADER}")
    return len(raw).to_bytes(8, "little") + raw, starts
