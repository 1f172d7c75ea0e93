"""A model in many safetensors files, named by an index (``*.index.json``) in the same folder.

The index says which file holds which tensor and is checked against all of them. It is never
edited: tensors keep their names, sizes and files.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from npscope.errors import FileError, FormatError, SpecError, about
from npscope.weights import Tensor
from npscope.weights.output import Target, is_hidden_name
from npscope.weights.output_folder import roll_forward, staged_folder, staged_inside
from npscope.weights.packed import Packed, PackedWriter, copy_range, out_of_order
from npscope.weights.safetensors import MAX_HEADER, open_safetensors
from npscope.weights.source import Source
from npscope.weights.strict_json import parse_object

_KEPT_OPEN = 4
"""Shards with a descriptor: as many as one coupling may alternate between, and few under any limit."""

_SUFFIX = ".safetensors"


class Sharded:
    """The open shards of a folder, or of an index in it: see `npscope.weights.WeightFile`.

    Tensors stand in the order of the names of their shards, and of their bytes there. FormatError
    when the index and the shards contradict each other or a shard lies outside the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = os.path.realpath(os.fsdecode(path))
        with about(f"{os.fsdecode(path)!r}"):
            self._folder, self._index_name = _located(given)
            roll_forward(self._folder, self._index_name)
            self._index = Source(os.path.join(self._folder, self._index_name))
            try:
                total, placed = _read_index(self._index)
            finally:
                self._index.close()
            _refuse_strangers(self._folder, placed)
            self._shards = {name: _open_shard(self._folder, name, placed[name]) for name in sorted(placed)}
            self._shard_of = {tensor: name for name, shard in self._shards.items() for tensor in shard.tensors}
            self._tensors = {name: tensor for shard in self._shards.values() for name, tensor in shard.tensors.items()}
            _check_total(total, sum(tensor.nbytes for tensor in self._tensors.values()))
        self._recent: list[str] = []
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name, shard by shard."""
        return self._tensors

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from byte `start` on."""
        with self._lock:  # a shard must not lose its descriptor while another thread reads it
            name = self._shard_of[tensor.name]
            self._keep_open(name)
            self._shards[name].read(tensor, start, into)

    def shard_of(self, tensor: Tensor) -> str:
        """Name of the shard that holds `tensor`."""
        return self._shard_of[tensor.name]

    def target(self, path: str | os.PathLike[str], *, force: bool) -> Target:
        """The place for the resulting folder at `path`; a folder with files in it is never replaced."""
        real = os.path.realpath(os.fsdecode(path))
        if os.path.commonpath([real, self._folder]) == self._folder:
            raise SpecError(f"output {os.fsdecode(path)!r} is the input or inside it; choose another name")
        if os.path.isdir(real) and not os.listdir(real):
            return Target(real, None, replace=False)
        if os.path.lexists(real):
            raise SpecError(f"output {real!r} exists and no folder is ever replaced; remove it or choose another name")
        return Target.of(real, force=False)

    def own_place(self) -> Target:
        """The place of this folder itself."""
        return Target(self._folder, None, replace=True)

    def files(self) -> list[str]:
        """The path of this folder."""
        return [self._folder]

    def places(self, path: str | os.PathLike[str]) -> list[str]:
        """The path of a successor, which is a folder."""
        return [os.fsdecode(path)]

    @contextmanager
    def successor(self, target: Target) -> Iterator[ShardedWriter]:
        """Context with the writer of a folder like this at `target`; of its shards alone when that is this folder."""
        in_place = target.replace
        others = [] if in_place else list(_others(self._folder, set(self._shards)))
        stage = staged_inside(target, self._index_name) if in_place else staged_folder(target)
        with stage as folder:
            writer = ShardedWriter(self, folder, self._shards, keep_modes=in_place)
            try:
                writer.begin()
                yield writer
                writer.finish()
            finally:
                writer.close()
            for name, is_folder in others:
                _take_along(os.path.join(self._folder, name), os.path.join(folder, name), is_folder=is_folder)
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """FileError when the index or a shard is not what it was at opening."""
        self._index.check_unchanged()
        for shard in self._shards.values():
            shard.check_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        for name in self._recent:
            self._shards[name].close()

    def _keep_open(self, name: str) -> None:
        """Take note that a shard is about to be read; the one that was not for longest loses its descriptor."""
        if name in self._recent:
            self._recent.remove(name)
        self._recent.append(name)
        if len(self._recent) > _KEPT_OPEN:
            self._shards[self._recent.pop(0)].close()


class ShardedWriter:
    """Writes the shards one after the other into a folder."""

    def __init__(self, weights: Sharded, folder: str, shards: Mapping[str, Packed], *, keep_modes: bool) -> None:
        self._weights = weights
        self._folder = folder
        self._shards = shards
        self._to_come = list(shards)
        self._keep_modes = keep_modes
        self._name = ""
        self._writer: PackedWriter | None = None
        self._fd = -1

    def begin(self) -> PackedWriter:
        """Make the file of the next shard."""
        self._name = self._to_come.pop(0)
        shard = self._shards[self._name]
        self._fd = _new_file(os.path.join(self._folder, self._name), 0o666)
        if self._keep_modes:
            os.fchmod(self._fd, stat.S_IMODE(shard.source.status.st_mode))
        self._writer = PackedWriter(shard, shard.source.twin(), self._fd)
        return self._writer

    def copy(self, tensor: Tensor) -> None:
        """Take over the next tensor as it is."""
        self._at(tensor).copy(tensor)

    def write(self, tensor: Tensor, data: memoryview) -> None:
        """Append bytes to the next tensor."""
        self._at(tensor).write(tensor, data)

    def finish(self) -> None:
        """FormatError unless every byte of every shard was written."""
        self._finish_shard()
        if self._to_come:
            raise FormatError(f"{len(self._to_come)} shards were not written")

    def close(self) -> None:
        """Give the descriptors back."""
        if self._writer is not None:
            self._writer.close()
        if self._fd >= 0:
            closing, self._fd = self._fd, -1
            os.close(closing)

    def _at(self, tensor: Tensor) -> PackedWriter:
        """The writer of the shard of `tensor`."""
        name = self._weights.shard_of(tensor)
        if self._writer is not None and name == self._name:
            return self._writer
        if self._to_come[:1] != [name]:
            raise out_of_order(tensor)
        self._finish_shard()
        return self.begin()

    def _finish_shard(self) -> None:
        if self._writer is not None:
            with about(f"shard {self._name!r:.120}"):
                self._writer.finish()
            os.fsync(self._fd)
            self.close()


def _located(path: str) -> tuple[str, str]:
    """Folder and name of the index at `path`, or of the one in the folder `path`."""
    if not os.path.isdir(path):
        folder, name = os.path.split(path)
        return folder, name
    indices = sorted(name for name in os.listdir(path) if name.endswith(".index.json"))
    own = [name for name in indices if name.endswith(f"{_SUFFIX}.index.json")]
    found = own or indices
    if not found:
        raise FormatError("a folder without an index (*.index.json), and not a regular file; name a file of weights")
    if len(found) > 1:
        raise FormatError(f"the folder holds the indices {', '.join(map(repr, found))}; name one of them")
    return path, found[0]


def _read_index(index: Source) -> tuple[object, dict[str, set[str]]]:
    """The total size that an index states, and the names of the tensors of every shard."""
    with about("index"):
        if index.size > MAX_HEADER:
            raise FormatError(f"{index.size} bytes are more than the {MAX_HEADER} that an index may have")
        fields = parse_object(index.bytes_at(0, index.size), "the text", parse_float=float)
        metadata, weight_map = fields.get("metadata", {}), fields.get("weight_map")
        if not isinstance(metadata, dict):
            raise FormatError("metadata must be an object")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError("needed is weight_map, an object of tensor names and file names")
        placed: dict[str, set[str]] = {}
        for tensor, shard in weight_map.items():
            placed.setdefault(_checked(shard), set()).add(tensor)
        return metadata.get("total_size"), placed


def _checked(name: Any) -> str:
    """A name from an index, if it is that of a safetensors file in the same folder."""
    if not isinstance(name, str):
        raise FormatError("weight_map must map to strings")
    if "/" in name or "\0" in name or not name.isprintable() or len(os.fsencode(name)) > 255:
        raise FormatError(f"{name!r:.120} is no plain file name; every shard lies in the folder of the index")
    if name.endswith((".bin", ".pt", ".pth")):
        raise FormatError(f"{name!r:.120} is not supported: a pickle can run code; convert it to safetensors")
    if not name.endswith(_SUFFIX) or name.startswith("."):
        raise FormatError(f"{name!r:.120} is no name of a safetensors file")
    return name


def _refuse_strangers(folder: str, placed: Mapping[str, object]) -> None:
    """A file of weights that the index does not know would be taken along as it is."""
    for name in sorted(os.listdir(folder)):
        if name.endswith(_SUFFIX) and name not in placed:
            raise FormatError(f"{name!r:.120} is not in the index; move it elsewhere")


def _open_shard(folder: str, name: str, expected: set[str]) -> Packed:
    with about(f"shard {name!r:.120}"):
        path = os.path.join(folder, name)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            raise FormatError("the file is missing") from None
        if stat.S_ISLNK(status.st_mode):
            raise FormatError("it is a symbolic link; copy the folder with its links resolved (cp -rL)")
        shard = open_safetensors(path)
        shard.close()
        if missing := expected - shard.tensors.keys():
            raise FormatError(f"tensor {min(missing)!r:.120} should be in it and is not")
        if extra := shard.tensors.keys() - expected:
            raise FormatError(f"it holds tensor {min(extra)!r:.120}, which the index does not place there")
        return shard


def _check_total(stated: object, found: int) -> None:
    if stated is not None and (isinstance(stated, bool) or stated != found):
        raise FormatError(f"the index states a total_size of {stated!r:.40}; the tensors take {found} bytes")


def _others(folder: str, shards: set[str], under: str = "") -> Iterator[tuple[str, bool]]:
    """(path in the folder, is it a folder) of everything but the shards, folders before what is in them."""
    with os.scandir(os.path.join(folder, under)) as found:
        entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    for entry in entries:
        path = os.path.join(under, entry.name)
        if path in shards or is_hidden_name(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield path, True
            yield from _others(folder, shards, path)
        elif entry.is_file():  # also by a link: the result stands on its own
            yield path, False
        else:
            raise FileError(f"{os.path.join(folder, path)!r} is no file or folder; move it elsewhere")


def _take_along(origin: str, copy: str, *, is_folder: bool) -> None:
    if is_folder:
        os.mkdir(copy)
        return
    source = Source(origin)
    try:
        fd = _new_file(copy, stat.S_IMODE(source.status.st_mode))
        try:
            copy_range(source, 0, source.size, fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        source.check_unchanged()
    finally:
        source.close()


def _new_file(path: str, mode: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
