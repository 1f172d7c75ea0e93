"""Files of weights for tests, and the command in this process."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from npscope import cli

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"

Weights = Mapping[str, np.ndarray]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object) -> Result:
    """The command ``npscope`` with these arguments."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def refused(result: Result, message: str, code: int = 2) -> bool:
    """Whether a command ended with one line that says `message`."""
    one_line = result.err.startswith("npscope: error: ") and result.err.count("\n") == 1
    assert (result.code, one_line) == (code, True), result
    assert message in result.err, result.err
    return True


def small(rows: int = 8) -> dict[str, np.ndarray]:
    """Weights of three layers, a bias and an integer among them."""
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(rows, 16)).astype(np.float32),
        "b.bias": rng.normal(size=rows).astype(np.float32),
        "c.steps": np.arange(3),
        "d.weight": rng.normal(size=(4, 8, 2)).astype(np.float16),
        "e.weight": rng.integers(-2, 3, size=(12, rows)).astype(np.float64),
    }


def save_sharded(folder: Path, weights: Weights, shards: int = 2, **metadata: object) -> Path:
    """A folder with an index and the weights in turn in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(weights)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total} | metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def load_sharded(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a folder as the index says, read by the safetensors package."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    return {name: shards[file][name] for name, file in index["weight_map"].items()}


def save_onnx(folder: Path, weights: Weights) -> None:
    """A model, half of its weights in a data file beside it."""
    folder.mkdir()
    w = weights["a.weight"].T.copy()
    (folder / "data").write_bytes(w.tobytes())
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=w.shape, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="data")
    arrays = [outside, numpy_helper.from_array(w[:8].copy(), "v")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=arrays)
    (folder / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def npy(array: np.ndarray, **options: Any) -> bytes:
    """An array as NumPy saves it."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


class Entry(NamedTuple):
    """A member for `archive`, with whatever is wrong about it."""

    name: str
    content: bytes
    deflated: bool = False
    flags: int = 0
    method: int | None = None
    crc: int | None = None
    size: int | None = None
    local_name: str | None = None
    wide: bool = False  # sizes in 64 bits, in the directory too
    described: bool = False  # checksum and sizes behind the data
    extra: bytes = b""
    raw: bytes | None = None  # instead of the compressed content


def archive(
    *entries: Entry, before: bytes = b"", between: bytes = b"", behind: bytes = b"", wide: bool = False
) -> bytes:
    """A zip archive, written down field by field."""
    body, directory = before, b""
    for entry in entries:
        packed = entry.content
        if entry.deflated:
            deflate = zlib.compressobj(wbits=-15)
            packed = deflate.compress(entry.content) + deflate.flush()
        packed = packed if entry.raw is None else entry.raw
        method = (8 if entry.deflated else 0) if entry.method is None else entry.method
        crc = zlib.crc32(entry.content) if entry.crc is None else entry.crc
        size = len(entry.content) if entry.size is None else entry.size
        flags = entry.flags | (8 if entry.described else 0)
        stated = (0, 0, 0) if entry.described else (crc, len(packed), size)
        extra, central_extra = entry.extra, entry.extra
        central = (crc, len(packed), size)
        start = len(body)
        if entry.wide:
            extra += struct.pack("<2H2Q", 1, 16, stated[2], stated[1])
            central_extra += struct.pack("<2H3Q", 1, 24, size, len(packed), start)
            stated, central, start = (stated[0], *[2**32 - 1] * 2), (crc, *[2**32 - 1] * 2), 2**32 - 1
        name, local = entry.name.encode(), (entry.local_name or entry.name).encode()
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 45, flags, method, 0, 33, *stated, len(local), len(extra))
        body += local + extra + packed
        if entry.described:
            body += struct.pack("<4s3L", b"PK\7\10", crc, len(packed), size)
        body += between
        lengths = (len(name), len(central_extra), 0, 0, 0, 0, start)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, flags, method, 0, 33, *central, *lengths)
        directory += name + central_extra
    count, at, length = len(entries), len(body), len(directory)
    end = b""
    if wide:
        end += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, at)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, at + length, 1)
        count, at, length = 0xFFFF, 2**32 - 1, 2**32 - 1
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, length, at, 0)
    return body + directory + end + behind


def members(path: Path) -> dict[str, bytes]:
    """The members of an archive as they lie in the file, local headers included."""
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        infos = sorted(file.infolist(), key=lambda info: info.header_offset)
        ends = [*(info.header_offset for info in infos[1:]), file.start_dir]
    return {info.filename: raw[info.header_offset : end] for info, end in zip(infos, ends, strict=True)}
