"""The ONNX format, rewritten byte for byte but for the values of weights.

The successor is a copy of the input with other bytes in the ranges that hold values, so operator
sets, custom domains, functions and whatever this version of npscope does not know stay as they
are. Tensors are the initializers and the Constant nodes of all graphs. An initializer that is an
input of the graph too, as all were in old models, is a weight: its values are what runs unless
the caller gives others. Data in files beside the model is written to the same locations beside
the output.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Self

import numpy as np

from npscope.errors import FormatError, SpecError, about
from npscope.weights import Tensor
from npscope.weights.external import MODEL, Files
from npscope.weights.onnx_model import MAX_BYTES, Stored, read_model
from npscope.weights.onnx_uses import Found, find_tensors
from npscope.weights.output import Target

_COPY_BYTES = 4 << 20
_SMALL_BYTES = 512


class Onnx:
    """An open ONNX model with the files of its external data: see `npscope.weights.WeightFile`.

    FormatError when it is not a regular file, larger than a protobuf message can be, or anything in
    it contradicts the format or could mean two things.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._files = Files(path)
        try:
            with about(f"{os.fsdecode(path)!r}"):
                _check_kind(self._files.status(MODEL))
                found = find_tensors(read_model(self._files), self._small_ints)
        except BaseException:
            self.close()
            raise
        found = _without_shared(_in_order(found, [MODEL, *self._files.locations]))
        self._stored = {each.name: each.stored for each in found}
        self._tensors = {each.name: _described(each) for each in found}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in the order of their bytes: those of the model, then those of other files."""
        return self._tensors

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from byte `start` on."""
        if start < 0 or start + into.nbytes > tensor.nbytes:
            raise FormatError(
                f"bytes {start} to {start + into.nbytes} of tensor {tensor.name!r:.120}: it has {tensor.nbytes}"
            )
        stored = self._stored[tensor.name]
        if stored.payload is not None:
            stored.payload.read(partial(self._files.read, stored.location), start, into.cast("B"))

    def target(self, path: str | os.PathLike[str], *, force: bool) -> Target:
        """The place for the result at `path`; the files of external data must have theirs beside it too."""
        place = Target.of(path, force=force, source=self._files.status(MODEL))
        self._files.targets(place)
        return place

    def own_place(self) -> Target:
        """The place of this file itself; SpecError when there are others, which cannot be replaced as one."""
        if self._files.locations:
            raise SpecError(
                f"{self._files.path!r} keeps data in other files and cannot be replaced in place; "
                "give an output in another folder"
            )
        status = self._files.status(MODEL)
        return Target(os.path.realpath(self._files.path), stat.S_IMODE(status.st_mode), True)

    def files(self) -> list[str]:
        """The paths of the model and of the files of its external data."""
        return self._files.beside(self._files.path)

    def places(self, path: str | os.PathLike[str]) -> list[str]:
        """The paths of a model at `path` and of the files of its external data."""
        return self._files.beside(os.path.realpath(os.fsdecode(path)))

    @contextmanager
    def successor(self, target: Target) -> Iterator[OnnxWriter]:
        """Context with the writer of a model like this at `target`."""
        with self._files.outputs(target) as output:
            writer = OnnxWriter(self, output)
            yield writer
            writer.finish()
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """FileError when the model or a file of its data is not what it was at opening."""
        self._files.check_unchanged()

    def close(self) -> None:
        """Close the files; once is enough, twice does no harm."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _small_ints(self, stored: Stored) -> tuple[int, ...] | None:
        """The values of a small tensor of integers, None of any other."""
        payload = stored.payload
        if payload is None or payload.nbytes > _SMALL_BYTES or stored.dtype not in ("int64", "int32"):
            return None
        raw = bytearray(payload.nbytes)
        payload.read(partial(self._files.read, stored.location), 0, memoryview(raw))
        return tuple(np.frombuffer(raw, np.dtype(stored.dtype).newbyteorder("<")).tolist())


class OnnxWriter:
    """Writes the tensors of one model, in its order, into another; what lies between them is copied."""

    def __init__(self, source: Onnx, output: Callable[[str], int]) -> None:
        self._source = source
        self._output = output
        self._locations = iter(source._files.locations)
        self._buffer = memoryview(bytearray(_COPY_BYTES))
        self._names = list(source.tensors)
        self._next = 0  # the tensor to write, and how many of its bytes are written
        self._done = 0
        self._begin(MODEL)

    def copy(self, tensor: Tensor) -> None:
        """Take over the next tensor of the file as it is."""
        self._expect(tensor, tensor.nbytes)
        self._advance(tensor, tensor.nbytes)

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append bytes to the next tensor of the file."""
        view = data.cast("B")
        self._expect(tensor, view.nbytes)
        stored = self._source._stored[tensor.name]
        if stored.payload is not None:
            while self._location != stored.location:
                self._complete()
                self._begin(next(self._locations))
            fill = partial(self._source._files.read, stored.location)
            for offset, patch in stored.payload.replace(fill, self._done, view):
                if offset < self._at:
                    raise FormatError(f"tensor {tensor.name!r:.120} shares its bytes with the one before")
                self._copy_until(offset)
                _write_all(self._fd, patch)
                self._at += patch.nbytes
        self._advance(tensor, view.nbytes)

    def finish(self) -> None:
        """Complete every file; FormatError unless every byte of every tensor was written."""
        if self._next != len(self._names):
            raise FormatError(f"{self._next} of {len(self._names)} tensors were written")
        self._complete()
        for location in self._locations:
            self._begin(location)
            self._complete()

    def _expect(self, tensor: Tensor, nbytes: int) -> None:
        is_next = self._next < len(self._names) and self._names[self._next] == tensor.name
        if not is_next or self._done + nbytes > tensor.nbytes:
            raise FormatError(f"tensor {tensor.name!r:.120} is written out of order")

    def _advance(self, tensor: Tensor, nbytes: int) -> None:
        self._done += nbytes
        if self._done == tensor.nbytes:
            self._next, self._done = self._next + 1, 0

    def _begin(self, location: str) -> None:
        self._location, self._at = location, 0
        self._fd = self._output(location)

    def _complete(self) -> None:
        self._copy_until(self._source._files.status(self._location).st_size)

    def _copy_until(self, offset: int) -> None:
        """Copy what lies between the last byte written and `offset`."""
        while self._at < offset:
            piece = self._buffer[: min(_COPY_BYTES, offset - self._at)]
            self._source._files.read(self._location, self._at, piece)
            _write_all(self._fd, piece)
            self._at += piece.nbytes


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("this is not a regular file; needed is an ONNX model")
    if not status.st_size:
        raise FormatError("0 bytes; this is no ONNX model")
    if status.st_size > MAX_BYTES:
        raise FormatError(
            f"{status.st_size} bytes; a model has at most {MAX_BYTES}: save it with its weights as external data"
        )


def _in_order(found: list[Found], locations: list[str]) -> list[Found]:
    rank = {location: index for index, location in enumerate(locations)}

    def place(each: Found) -> tuple[int, int]:
        at, location, payload = each.stored.at, each.stored.location, each.stored.payload
        return rank[location], at if payload is None or location == MODEL else payload.begin

    return sorted(found, key=place)


def _without_shared(ordered: list[Found]) -> list[Found]:
    """The same tensors; those whose bytes in an external file are another's too are no weights."""
    shared: dict[str, str] = {}
    last: Found | None = None  # the one that reaches furthest
    for each in ordered:
        payload = each.stored.payload
        if each.stored.location == MODEL or payload is None or not payload.nbytes:
            continue
        is_same_file = last is not None and last.stored.location == each.stored.location
        if last is not None and last.stored.payload is not None and is_same_file:
            if payload.begin < last.stored.payload.end:
                shared[each.name] = last.name
                shared.setdefault(last.name, each.name)
            if payload.end <= last.stored.payload.end:
                continue
        last = each
    return [
        each._replace(use=each.use._replace(axes=None, reason=f"its bytes are those of {shared[each.name]!r:.120} too"))
        if each.name in shared
        else each
        for each in ordered
    ]


def _described(found: Found) -> Tensor:
    stored = found.stored
    return Tensor(found.name, stored.dtype, stored.shape, stored.payload.nbytes if stored.payload else 0, found.use)
