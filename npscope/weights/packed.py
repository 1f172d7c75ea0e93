"""Files of a head and then their tensors, packed without a gap: safetensors and npy.

A writer that appends tensors of unchanged size in file order reproduces such a file, its head
included.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

from npscope.errors import FormatError
from npscope.weights import Tensor
from npscope.weights.background import Background
from npscope.weights.detection import Format, check_name
from npscope.weights.output import Target, overwrite, reserve, staged, write_all
from npscope.weights.source import Source

_COPY_BYTES = 4 << 20

_AHEAD_BYTES = 64 << 20
"""What a copy ahead does in one call: a few times a second it looks whether it shall stop, or waits for Python."""


class Packed:
    """An open file of a head and packed tensors: see `npscope.weights.WeightFile`.

    `entries` are the (start, tensor) of every tensor, in the order of their bytes, which fill the
    file from `data_start` to its end; `metadata` is what its head says beside them.
    """

    side_by_side = True  # every read says where: threads share no position in the file

    def __init__(
        self,
        format: Format,
        source: Source,
        data_start: int,
        entries: Sequence[tuple[int, Tensor]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._format = format
        self.source = source
        self.metadata = metadata or {}
        self.data_start = data_start
        self.starts = {tensor.name: start for start, tensor in entries}
        self._tensors = {tensor.name: tensor for _, tensor in entries}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, in the order of their bytes."""
        return self._tensors

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from byte `start` on."""
        check_range(tensor, start, into)
        self.source.fill(into, self.data_start + self.starts[tensor.name] + start)

    def target(self, path: str | os.PathLike[str], *, force: bool) -> Target:
        """The place for the result at `path`."""
        check_name(path, self._format)
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
    def successor(self, target: Target) -> Iterator[PackedWriter]:
        """Context with the writer of a file like this at `target`, the head written."""
        with staged(target) as fd:
            writer = PackedWriter(self, self.source.twin(), fd)
            try:
                yield writer
                writer.finish()
            finally:
                writer.close()
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """FileError when the file is not what it was at opening."""
        self.source.check_unchanged()

    def close(self) -> None:
        """Give the descriptor back; reading opens the file again."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


class PackedWriter:
    """Writes the head and the tensors of one packed file, in its order, into another file.

    Until the first tensor comes, the file is copied as it is: pages of new files cost more than
    what is written into them, and there are kernels to compile and limits to find meanwhile.
    `source` is a twin of that of `weights`; `close` closes it.
    """

    def __init__(self, weights: Packed, source: Source, fd: int) -> None:
        self._weights = weights
        self._source = source
        self._fd = fd
        self._written = 0  # bytes behind the head that are as they shall be
        self._size = source.size - weights.data_start
        reserve(fd, source.size)
        self._ahead = CopyAhead(source, fd, weights.data_start)
        self._copied: int | None = None  # bytes behind the head that are there, known when no more are copied

    def copy(self, tensor: Tensor) -> None:
        """Take over the next tensor of the file as it is."""
        copied = self._expect(tensor, tensor.nbytes)
        start, self._written = max(self._written, copied), self._written + tensor.nbytes
        if start < self._written:
            copy_range(self._source, self._weights.data_start + start, self._written - start, self._fd)

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append bytes to the next tensor of the file."""
        view = data.cast("B")
        copied = self._expect(tensor, view.nbytes)
        there = max(0, min(view.nbytes, copied - self._written))
        overwrite(self._fd, view[:there], self._weights.data_start + self._written)
        write_all(self._fd, view[there:])
        self._written += view.nbytes

    def finish(self) -> None:
        """FormatError unless every byte of every tensor was written."""
        self._stop_ahead()
        if self._written != self._size:
            raise FormatError(f"{self._written} of {self._size} bytes of tensors were written")

    def close(self) -> None:
        """End what goes on beside, and give the descriptor of the source back."""
        self._ahead.close()
        self._source.close()

    def _expect(self, tensor: Tensor, nbytes: int) -> int:
        """Check that it is the turn of these bytes; how many bytes behind the head were copied."""
        copied = self._stop_ahead()
        start = self._weights.starts[tensor.name]
        if not (start <= self._written and self._written + nbytes <= start + tensor.nbytes):
            raise out_of_order(tensor)
        return copied

    def _stop_ahead(self) -> int:
        if self._copied is None:
            self._copied = self._ahead.stop() - self._weights.data_start
        return self._copied


class CopyAhead:
    """Copies a file into another beside other work until it is told to stop; its first `least` bytes always."""

    def __init__(self, source: Source, fd: int, least: int) -> None:
        self._source = source
        self._fd = fd
        self._least = least
        self._stopping = False
        self._background = Background()
        self._copied = self._background.submit(self._copy)

    def stop(self) -> int:
        """How many bytes are there; raises what went wrong."""
        self._stopping = True
        return self._copied.result()

    def close(self) -> None:
        """Return when nothing is written any more."""
        self._stopping = True
        self._background.close()

    def _copy(self) -> int:
        done = 0
        while done < self._source.size and not (self._stopping and done >= self._least):
            piece = min(_AHEAD_BYTES, self._source.size - done)
            copy_range(self._source, done, piece, self._fd)
            done += piece
        return done


def check_range(tensor: Tensor, start: int, into: memoryview) -> None:
    """FormatError unless `tensor` has the bytes from `start` on that `into` asks for."""
    if start < 0 or start + into.nbytes > tensor.nbytes:
        raise FormatError(
            f"bytes {start} to {start + into.nbytes} of tensor {tensor.name!r:.120}: it has {tensor.nbytes}"
        )


def out_of_order(tensor: Tensor) -> FormatError:
    """The error of a writer that is handed a tensor, or bytes of it, whose turn it is not."""
    return FormatError(f"tensor {tensor.name!r:.120} is written out of order")


def copy_range(source: Source, offset: int, nbytes: int, fd: int) -> None:
    """Append `nbytes` bytes of `source` from `offset` on to the file `fd`."""
    done = source.copy_to(fd, offset, nbytes)
    buffer = memoryview(bytearray(min(_COPY_BYTES, nbytes - done)))
    while done < nbytes:
        piece = buffer[: min(_COPY_BYTES, nbytes - done)]
        source.fill(piece, offset + done)
        write_all(fd, piece)
        done += piece.nbytes
