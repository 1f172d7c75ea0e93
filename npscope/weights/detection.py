"""Which format a file has: by what is in it, and never by its name alone.

A name that claims another format than the content is an error: somebody is mistaken about the
file, or wants somebody to be.
"""

from __future__ import annotations

import os
import stat
from typing import Literal

from npscope.errors import FormatError, SpecError

Format = Literal["safetensors", "sharded safetensors", "npy", "npz", "ONNX"]

_HEAD_BYTES = 16

_MAGIC: dict[bytes, Format] = {b"\x93NUMPY": "npy", b"PK\3\4": "npz", b"PK\5\6": "npz"}

_NAMED: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".json": "sharded safetensors",
    ".npy": "npy",
    ".npz": "npz",
    ".onnx": "ONNX",
}

_FOREIGN = {
    b"\x80": "a pickle, which can run code and is never opened",
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
}

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def format_of(path: str | os.PathLike[str]) -> Format:
    """The format of the file or folder at `path`.

    FormatError when it is one that is not supported, or another than its name says. A content that
    tells nothing is what the name says, and without a name that says anything safetensors: their
    readers say what is wrong with it.
    """
    name = os.fsdecode(path)
    # O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            return "sharded safetensors"
        if not stat.S_ISREG(mode):
            raise FormatError(f"{name!r} is not a regular file; needed is a file of weights")
        head = os.pread(fd, _HEAD_BYTES, 0)
    finally:
        os.close(fd)
    found, extension = _told(head), _extension(name)
    claimed = _NAMED.get(extension)
    if found == "npz" and extension in _PICKLED:
        raise FormatError(f"{name!r} is not supported: a PyTorch checkpoint is a pickle, which can run code")
    for magic, kind in _FOREIGN.items():
        if found is None and head.startswith(magic):
            raise FormatError(f"{name!r} is {kind}; needed is safetensors, npy, npz or ONNX")
    if found is not None and claimed is not None and found != claimed:
        raise FormatError(f"{name!r} is named {extension} and its content is {found}; rename it if that is right")
    return found or claimed or "safetensors"


def check_name(path: str | os.PathLike[str], written: Format) -> None:
    """SpecError when an output at `path` is named as another format than the one that is `written`."""
    extension = _extension(os.fsdecode(path))
    if _NAMED.get(extension, written) != written:
        name = os.fsdecode(path)
        raise SpecError(
            f"output {name!r} is named {extension} and will be {written}, as the input; choose another name"
        )


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _told(head: bytes) -> Format | None:
    """What the first bytes of a file tell."""
    # First: the length of a header can be any bytes, also those of another format.
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "safetensors"
    for magic, found in _MAGIC.items():
        if head.startswith(magic):
            return found
    return "sharded safetensors" if head[:1] == b"{" and head[1:].lstrip()[:1] in (b'"', b"}") else None
