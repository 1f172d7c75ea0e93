"""The safetensors reader takes what the format allows and nothing that leaves a doubt.

Case numbers are those of the catalogue of bad inputs. The oracle is the safetensors package:
whatever it refuses is refused here too.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from timing import assert_linear, within

from npscope.errors import FileError, FormatError
from npscope.weights import Tensor, numpy_dtype, open_weights
from npscope.weights import packed as packed_files
from npscope.weights import safetensors as own

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def packed(header: Any, data: bytes = bytes(8)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(**changes: Any) -> bytes:
    """A good file of one tensor, apart from `changes` to its entry."""
    return packed({"a": entry() | changes})


def accepts(read: Callable[[Path], object], path: Path) -> bool:
    try:
        read(path)
    except (FormatError, safetensors.SafetensorError, UnicodeDecodeError):
        return False
    return True


def package_reads(path: Path) -> object:
    with safetensors.safe_open(path, "np") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118


def npscope_reads(path: Path) -> object:
    with open_weights(path) as weights:
        return list(weights.tensors)


GOOD = {
    "one tensor": one(),
    "no tensors": packed({}, b""),
    "padding": packed(json.dumps({"a": entry()}).encode() + b"     "),
    "metadata": packed({"__metadata__": {"format": "pt"}, "a": entry()}),
    "case15-no-elements": packed({"a": entry(shape=(0, 3), end=0), "b": entry()}),
    "case14-scalar": packed({"a": entry("F64", (), 0, 8)}),
    "case62-empty-name": packed({"": entry()}),
    "case62-path-name": packed({"../x": entry()}),
    "case62-control-name": packed({"\0\n\x1b[31m": entry()}),
    "case62-NFC-and-NFD": packed({"\u00e9": entry(end=4, shape=(1,)), "e\u0301": entry(begin=4, shape=(1,))}),
    "case62-1MB-name": packed({"x" * 1_000_000: entry()}),
    "case64-unaligned": packed(json.dumps({"a": entry()}).encode() + b" " * 3),
    "case65-unordered": packed({"b": entry(shape=(1,), begin=4), "a": entry(shape=(1,), end=4)}),
    "half a byte": packed({"a": entry("F4", (16,))}),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD.keys())
def test_good_files_are_read_as_the_package_reads_them(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with safetensors.safe_open(path, "np") as theirs, open_weights(path) as ours:
        assert set(ours.tensors) == set(theirs.keys())
        for name, tensor in ours.tensors.items():
            assert list(tensor.shape) == theirs.get_slice(name).get_shape()


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

BAD = {
    "case54-empty": b"",
    "case54-7-bytes": bytes(7),
    "case54-n-0": bytes(8),
    "case54-n-beyond-file": struct.pack("<Q", 1000) + b"{}",
    "case54-n-2**63": struct.pack("<Q", 1 << 63) + b"{}",
    "case54-n-2**64-1": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "case55-header-too-long": struct.pack("<Q", own.MAX_HEADER + 1) + b"{}",
    "case56-no-json": packed(b"{hello}"),
    "case56-array": packed(b"[]", b""),
    "case56-bad-utf8": packed(b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "case56-BOM": packed(b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode()),
    "case56-leading-space": packed(b" " + json.dumps({"a": entry()}).encode()),
    "case56-NUL-after": packed(json.dumps({"a": entry()}).encode() + b"\0"),
    "case56-NaN": packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "case56-1e400": packed(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}'),
    "case56-5000-digits": packed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
    "case56-depth": packed(DEEP),
    "case57-tensor-twice": packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "case57-field-twice": packed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "case58-hole": packed({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
    "case58-hole-at-start": packed({"a": entry(begin=4, end=12)}, bytes(12)),
    "case58-overlap": packed({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "case58-same-bytes": packed({"a": entry(), "b": entry()}),
    "case58-reversed": one(data_offsets=[8, 0]),
    "case58-negative": one(data_offsets=[-8, 0]),
    "case58-minus-zero": packed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}'),
    "case58-float": one(data_offsets=[0, 8.0]),
    "case58-bool": one(data_offsets=[False, 8]),
    "case58-three": one(data_offsets=[0, 4, 8]),
    "case58-none": one(data_offsets=None),
    "case58-trailing-bytes": packed({"a": entry()}, bytes(9)),
    "case58-trailing-without-tensors": packed({}, bytes(1)),
    "case58-short-data": packed({"a": entry()}, bytes(7)),
    "case59-size": one(shape=[3]),
    "case59-half-byte": one(dtype="F4", shape=[15]),
    "case59-overflow": one(shape=[1 << 40, 1 << 40]),
    "case59-overflow-times-0": packed({"a": entry(shape=(1 << 40, 1 << 40, 0), end=0)}, b""),
    "case59-negative": one(shape=[-2]),
    "case59-two-negatives": one(shape=[-1, -2]),
    "case59-float": one(shape=[2.0]),
    "case59-bool": one(shape=[True, 2]),
    "case59-no-list": one(shape=2),
    "case60-dtype-no-string": one(dtype=4),
    "case61-metadata-number": packed({"__metadata__": {"a": 1}, "a": entry()}),
    "case61-metadata-tensor": packed({"__metadata__": entry()}),
    "case61-metadata-list": packed({"__metadata__": []}, b""),
    "case62-half-surrogate": packed(b'{"\\ud800":%s}' % json.dumps(entry()).encode()),
    "missing-field": packed({"a": {"dtype": "F32", "shape": [2]}}),
    "unknown-field": packed({"a": entry() | {"compressed": True}}),
    "no-object": packed({"a": [1, 2]}),
    "case71-zip": b"PK\x03\x04" + bytes(100),
    "case70-pickle": b"\x80\x04" + bytes(100),
    "case71-npy": b"\x93NUMPY\x01\x00" + bytes(100),
}

TAKEN_BY_THE_PACKAGE = {"case56-leading-space", "case57-tensor-twice", "case58-minus-zero", "unknown-field"}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_with_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with within(0.5), pytest.raises(FormatError, match=r"x\.safetensors") as caught:
        open_weights(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", sorted(BAD.keys() - TAKEN_BY_THE_PACKAGE))
def test_the_package_refuses_them_too(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(BAD[case])
    assert not accepts(package_reads, path)


@given(st.data())
def test_whatever_the_package_refuses_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of a good file changed, removed or inserted at random."""
    content = bytearray(packed({"a": entry(shape=(1,), end=4), "b": entry(shape=(1,), begin=4)}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(content)
    known = content.count(b'"F32"') == 2  # an unknown dtype is taken here, and passed through
    if known and accepts(npscope_reads, path):
        assert accepts(package_reads, path)


def test_case55_a_header_of_the_largest_length_is_not_refused_for_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", own.MAX_HEADER) + b"{}")
    with pytest.raises(FormatError, match="does not fit a file of 10 bytes"):
        open_weights(path)


def test_case60_an_unknown_dtype_is_listed_but_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(one(dtype="F8_NEW"))
    with open_weights(path) as weights:
        tensor = weights.tensors["a"]
        assert tensor == Tensor("a", "F8_NEW", (2,), 8)
        assert tensor.is_opaque
        with pytest.raises(FormatError, match="F8_NEW"):
            numpy_dtype(tensor)


def test_case63_a_hundred_thousand_tensors_take_linear_time(tmp_path: Path) -> None:
    def opened(count: int) -> None:
        header = {f"t{i}": entry(shape=(1,), begin=4 * i, end=4 * i + 4) for i in range(count)}
        path = tmp_path / f"{count}.safetensors"
        path.write_bytes(packed(header, bytes(4 * count)))
        with open_weights(path) as weights:
            assert len(weights.tensors) == count

    assert_linear(opened, 10_000)


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_case80_what_is_no_regular_file_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path(os.devnull)
    with pytest.raises(FormatError, match="not a regular file"):
        open_weights(path)


def test_a_missing_file_is_an_oserror() -> None:
    with pytest.raises(FileNotFoundError):
        open_weights("nowhere.safetensors")


@pytest.mark.parametrize(
    "dtype",
    [
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_values_are_those_of_the_package(dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(dtype)
    safetensors.numpy.save_file({"a": np.zeros(3, np.int64), "b": values}, path)
    with open_weights(path) as weights:
        tensor = weights.tensors["b"]
        buffer = bytearray(tensor.nbytes - 2 * values.itemsize)
        weights.read(tensor, 2 * values.itemsize, memoryview(buffer))
        assert numpy_dtype(tensor) == values.dtype
    assert bytes(buffer) == values.tobytes()[2 * values.itemsize :]


def test_reading_outside_a_tensor_is_refused() -> None:
    with open_weights(DATA) as weights:
        tensor = weights.tensors["conv1.bias"]
        for start, count in ((-1, 4), (0, tensor.nbytes + 1), (tensor.nbytes, 1)):
            with pytest.raises(FormatError, match=r"conv1\.bias"):
                weights.read(tensor, start, memoryview(bytearray(count)))


def test_case91_a_file_cut_short_while_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(DATA.read_bytes())
    with open_weights(path) as weights:
        last = list(weights.tensors.values())[-1]
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileError, match="truncated"):
            weights.read(last, 0, memoryview(bytearray(last.nbytes)))
        with pytest.raises(FileError, match="changed"):
            weights.check_unchanged()


def test_case91_a_touched_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(DATA.read_bytes())
    with open_weights(path) as weights:
        weights.check_unchanged()
        os.utime(path, ns=(0, 0))
        with pytest.raises(FileError, match="changed"):
            weights.check_unchanged()


def test_case65_copying_every_tensor_gives_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    with open_weights(DATA) as weights, weights.successor(weights.target(path, force=False)) as writer:
        for tensor in weights.tensors.values():
            writer.copy(tensor)
    assert path.read_bytes() == DATA.read_bytes()


def test_a_writer_refuses_another_order(tmp_path: Path) -> None:
    with open_weights(DATA) as weights, weights.successor(weights.target(tmp_path / "copy", force=False)) as writer:
        first, second, *rest = weights.tensors.values()
        with pytest.raises(FormatError, match="out of order"):
            writer.copy(second)
        writer.write(first, memoryview(bytes(8)))
        with pytest.raises(FormatError, match="out of order"):
            writer.copy(first)
        with pytest.raises(FormatError, match="out of order"):
            writer.write(second, memoryview(bytes(4)))
        writer.write(first, memoryview(bytes(first.nbytes - 8)))
        for tensor in (second, *rest):
            writer.copy(tensor)


def test_a_file_that_ends_early_is_never_there(tmp_path: Path) -> None:
    def write_too_little() -> None:
        with open_weights(DATA) as weights, weights.successor(weights.target(tmp_path / "copy", force=False)) as writer:
            writer.write(next(iter(weights.tensors.values())), memoryview(bytes(8)))

    with pytest.raises(FormatError, match="8 of"):
        write_too_little()
    assert list(tmp_path.iterdir()) == []


def test_opening_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"nothing")
    probe = os.dup(0)
    os.close(probe)
    with pytest.raises(FormatError):
        open_weights(bad)
    with open_weights(DATA):
        pass
    after = os.dup(0)
    os.close(after)
    assert after == probe


@pytest.mark.parametrize("ahead", [0, 1, 40, 100, 10**9])
def test_however_much_was_copied_ahead_the_file_is_the_same(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(self: packed_files.CopyAhead) -> int:
        done = min(self._least + ahead, self._source.size)
        packed_files.copy_range(self._source, 0, done, self._fd)
        return done

    monkeypatch.setattr(packed_files.CopyAhead, "_copy", copy)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file({name: np.arange(20, dtype=np.float32) for name in "abc"}, source)
    with open_weights(source) as weights, weights.successor(weights.target(target, force=False)) as writer:
        a, b, c = weights.tensors.values()
        writer.copy(a)
        for start in range(0, 80, 16):
            writer.write(b, memoryview(bytes([start + 1] * 16)))
        writer.copy(c)
    expected = bytearray(source.read_bytes())
    expected[-160:-80] = b"".join(bytes([start + 1] * 16) for start in range(0, 80, 16))
    assert target.read_bytes() == expected
