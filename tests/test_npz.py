"""npy and npz files: the same mask as in safetensors, untouched members as they were, and nothing doubtful taken.

Case numbers are those of the catalogue of bad inputs. The oracle is NumPy.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from files import DATA, Entry, archive, members, npy, refused, run, save_sharded, small
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from timing import assert_linear, within

import npscope
from npscope.errors import FileError, FormatError
from npscope.weights import archive as own_archive
from npscope.weights import npz, open_weights

pytestmark = pytest.mark.usefixtures("uncompiled")


def loaded(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a
    )


def prune(source: Path, target: Path, *arguments: object) -> None:
    result = run("prune", source, "-o", target, *arguments)
    assert result.code == 0, result.err


# --- the same mask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ("--pattern", "2:4"),
        ("--pattern", "2:4", "--axis", "0"),
        ("--pattern", "2:4", "--axis", "-2"),
        ("--pattern", "4x2@0.5"),
        ("--pattern", "1x1@0.7", "--layout", "in-out"),
        ("--pattern", "2:4", "--layout", "in-out"),
        ("--pattern", "block=2 scope=-1 keep=1 ord=1", "--axis", "last"),
    ],
    ids=lambda given: " ".join(given[1:]),
)
def test_every_format_gives_the_same_mask(tmp_path: Path, given: tuple[str, ...]) -> None:
    weights = small() | {"stack": np.random.default_rng(1).normal(size=(20, 8, 24)).astype(np.float32)}
    weights = {name: weight for name, weight in weights.items() if weight.ndim != 3 or weight.shape[2] > 16}
    save_file(weights, tmp_path / "a.safetensors")
    save_sharded(tmp_path / "model", weights)
    np.savez(tmp_path / "stored.npz", **weights)
    np.savez_compressed(tmp_path / "deflated.npz", **weights)
    np.savez(tmp_path / "fortran.npz", **{name: np.asfortranarray(weight) for name, weight in weights.items()})
    prune(tmp_path / "a.safetensors", tmp_path / "out.safetensors", *given)
    expected = load_file(tmp_path / "out.safetensors")
    assert not same(expected, weights)
    prune(tmp_path / "model", tmp_path / "sharded", *given)
    found = {
        name: weight
        for file in (tmp_path / "sharded").glob("*.safetensors")
        for name, weight in load_file(file).items()
    }
    assert same(found, expected)
    for kind in ("stored", "deflated", "fortran"):
        prune(tmp_path / f"{kind}.npz", tmp_path / "out.npz", "--force", *given)
        assert same(loaded(tmp_path / "out.npz"), expected), kind
    np.save(tmp_path / "e.weight.npy", weights["e.weight"])
    prune(tmp_path / "e.weight.npy", tmp_path / "out.npy", *given)
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected["e.weight"])


def test_a_convolution_in_fortran_order(tmp_path: Path) -> None:
    """Its axes can be pruned along; its flattened fan-in is no axis, and npscope says so."""
    weight = np.random.default_rng(2).normal(size=(8, 8, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "c.npz", conv=weight)
    np.savez(tmp_path / "f.npz", conv=np.asfortranarray(weight))
    for along in (("2:4",), ("1:3", "--axis", "last"), ("1:3", "--axis", "2")):
        prune(tmp_path / "c.npz", tmp_path / "c", "--force", "--pattern", *along)
        prune(tmp_path / "f.npz", tmp_path / "f", "--force", "--pattern", *along)
        assert same(loaded(tmp_path / "c"), loaded(tmp_path / "f"))
    for along in (("2:4", "--axis", "fan-in"), ("4x4@0.5",)):
        result = run("prune", tmp_path / "f.npz", "-o", tmp_path / "x", "--pattern", *along)
        assert refused(result, "save it in C order")


def test_arrays_in_fortran_order_are_reported_as_they_were_saved(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.asfortranarray(np.ones((4, 8, 3), np.float32)))
    for command in (("prune", "--dry-run", "--pattern", "2:4"), ("inspect",)):
        assert run(*command, tmp_path / "in.npz", "--json").json["tensors"][0]["shape"] == [4, 8, 3]
    assert "axis 1 (in)" in run("prune", tmp_path / "in.npz", "--dry-run", "--pattern", "2:4").out


def test_a_real_model_is_pruned_as_its_safetensors(tmp_path: Path) -> None:
    weights = load_file(DATA)
    np.savez_compressed(tmp_path / "in.npz", **weights)
    prune(DATA, tmp_path / "out.safetensors", "--pattern", "4x1@0.5")
    prune(tmp_path / "in.npz", tmp_path / "out.npz", "--pattern", "4x1@0.5")
    assert same(loaded(tmp_path / "out.npz"), load_file(tmp_path / "out.safetensors"))
    assert run("inspect", tmp_path / "out.npz").code == 0


# --- what is not touched stays -------------------------------------------------------------------


@pytest.fixture(params=["np.savez", "np.savez_compressed", "level 9", "described", "wide"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The small weights, in archives of several writers."""
    path, weights = tmp_path / "in.npz", small()
    if request.param.startswith("np."):
        getattr(np, request.param[3:])(path, **weights)
    elif request.param == "level 9":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            for name, weight in weights.items():
                file.writestr(f"{name}.npy", npy(weight))
    else:
        wide, described = request.param == "wide", request.param == "described"
        entries = [
            Entry(f"{name}.npy", npy(weight), deflated=at % 2 == 0, wide=wide, described=described, extra=b"xy\1\0z")
            for at, (name, weight) in enumerate(weights.items())
        ]
        path.write_bytes(archive(*entries, wide=wide))
    assert same(loaded(path), weights)
    return path


def test_case65_nothing_pruned_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    for number, pattern in enumerate(("4:4", "1x1@0")):
        prune(saved, tmp_path / f"{number}.npz", "--pattern", pattern)
        assert (tmp_path / f"{number}.npz").read_bytes() == saved.read_bytes()


def test_case65_a_pattern_that_holds_already_changes_nothing(saved: Path, tmp_path: Path) -> None:
    prune(saved, tmp_path / "1.npz", "--pattern", "2:4")
    assert (tmp_path / "1.npz").read_bytes() != saved.read_bytes()
    prune(tmp_path / "1.npz", tmp_path / "2.npz", "--pattern", "2:4")
    assert (tmp_path / "2.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()


def test_case65_unchanged_members_are_copied_raw(saved: Path, tmp_path: Path) -> None:
    prune(saved, tmp_path / "out.npz", "--pattern", "2:4", "--include", "e.weight")
    before, after = members(saved), members(tmp_path / "out.npz")
    assert list(before) == list(after)
    assert [name for name in before if before[name] != after[name]] == ["e.weight.npy"]
    weights, found = small(), loaded(tmp_path / "out.npz")
    assert all(np.array_equal(found[name], weights[name]) for name in weights if name != "e.weight")
    assert (found["e.weight"] == 0).mean() >= 0.5


def test_case68_zip64_is_kept_and_made_where_it_is_needed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if 64 bits were needed from 300 bytes on."""
    prune(saved, tmp_path / "expected.npz", "--pattern", "2:4")
    monkeypatch.setattr(own_archive, "_WIDE", 300)
    prune(saved, tmp_path / "out.npz", "--pattern", "2:4")
    assert b"PK\6\6" in (tmp_path / "out.npz").read_bytes()
    assert members(tmp_path / "out.npz").keys() == members(saved).keys()
    assert same(loaded(tmp_path / "out.npz"), loaded(tmp_path / "expected.npz"))
    prune(tmp_path / "out.npz", tmp_path / "again.npz", "--pattern", "2:4")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()


def test_a_change_in_the_last_byte_alone(tmp_path: Path) -> None:
    """What was the same so far is written again from the file."""
    weight = np.zeros((300, 1000), np.float32)
    weight[-1, -4:] = [4, 3, 2, 1]
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "in.npz", a=weight, b=np.ones(3))
        prune(tmp_path / "in.npz", tmp_path / "out.npz", "--pattern", "3:4", "--force")
        expected = weight.copy()
        expected[-1, -1] = 0
        assert same(loaded(tmp_path / "out.npz"), {"a": expected, "b": np.ones(3)})


def test_case100_two_runs_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        prune(saved, tmp_path / name, "--pattern", "4x1@0.5")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


UNPRUNABLE = {
    "big-endian": (np.arange(16).reshape(4, 4).astype(">f4"), ">f4"),
    "bfloat16": (np.ones((4, 4), ml_dtypes.bfloat16), "<V2"),
    "text": (np.full((4, 4), "ab"), "<U2"),
    "bytes": (np.full((4, 4), b"ab"), "|S2"),
    "dates": (np.zeros((4, 4), "M8[ns]"), "<M8[ns]"),
    "long double": (np.zeros((4, 4), np.longdouble), np.dtype(np.longdouble).str),
    "empty text": (np.zeros((4, 4), "V0"), "|V0"),
}


@pytest.mark.parametrize("case", UNPRUNABLE)
def test_case60_other_dtypes_pass_through(case: str, tmp_path: Path) -> None:
    array, dtype = UNPRUNABLE[case]
    values = io.BytesIO()
    with zipfile.ZipFile(values, "w") as file:
        file.writestr("x.npy", npy(array))
        file.writestr("w.npy", npy(np.ones((4, 4), np.float32)))
    (tmp_path / "in.npz").write_bytes(values.getvalue())
    result = run("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--pattern", "2:4", "--json")
    assert result.code == 0, result.err
    line = next(line for line in result.json["tensors"] if line["name"] == "x")
    assert line["skipped"] == f"dtype {dtype} cannot be pruned"
    assert members(tmp_path / "out.npz")["x.npy"] == members(tmp_path / "in.npz")["x.npy"]
    assert refused(run("prune", tmp_path / "in.npz", "--dry-run", "--pattern", "2:4", "--include", "x"), dtype)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_every_version(version: tuple[int, int], tmp_path: Path) -> None:
    weight = small()["a.weight"]
    (tmp_path / "w.npy").write_bytes(npy(weight, version=version))
    prune(tmp_path / "w.npy", tmp_path / "out.npy", "--pattern", "2:4")
    after = (tmp_path / "out.npy").read_bytes()
    head = len(after) - weight.nbytes
    assert after[:head] == npy(weight, version=version)[:head]
    kept = np.load(tmp_path / "out.npy")
    assert np.array_equal(kept, np.where(kept == 0, 0, weight))
    assert np.count_nonzero(kept) == weight.size // 2


def test_values_are_read_from_anywhere(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "_KEPT_STREAMS", 1)
    rng, weights = np.random.default_rng(3), small()
    with open_weights(saved) as file:
        for _ in range(60):
            name = str(rng.choice(list(weights)))
            raw = weights[name].tobytes()
            start, end = sorted(rng.integers(0, len(raw) + 1, size=2))
            buffer = bytearray(end - start)
            file.read(file.tensors[name], int(start), memoryview(buffer))
            assert buffer == raw[start:end]
        with pytest.raises(FormatError, match="it has"):
            file.read(file.tensors["a.weight"], 0, memoryview(bytearray(10_000)))


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([("copy", 1)], "out of order"),
        ([("write", 0), ("copy", 1)], "out of order"),
        ([("copy", 0), ("copy", 0)], "out of order"),
        ([("copy", 0)], "not written"),
        ([("copy", 0), ("write", 1)], "not written"),
    ],
)
def test_a_writer_refuses_another_order(
    saved: Path, tmp_path: Path, calls: list[tuple[str, int]], message: str
) -> None:
    def write() -> None:
        with open_weights(saved) as file, file.successor(file.target(tmp_path / "out", force=False)) as writer:
            tensors = list(file.tensors.values())
            for call, at in calls:
                if call == "copy":
                    writer.copy(tensors[at])
                else:
                    writer.write(tensors[at], memoryview(bytes(4)))

    with pytest.raises(FormatError, match=message):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_case91_an_archive_that_changes_is_an_error(saved: Path) -> None:
    with open_weights(saved) as file:
        file.check_unchanged()
        os.truncate(saved, saved.stat().st_size // 2)
        with pytest.raises(FileError, match="changed"):
            file.check_unchanged()
        last = list(file.tensors.values())[-1]
        with pytest.raises(FileError, match="truncated"):
            file.read(last, 0, memoryview(bytearray(last.nbytes)))


# --- bad npy -------------------------------------------------------------------------------------


def header(text: str | bytes, version: tuple[int, int] = (1, 0), data: bytes = bytes(8)) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    length = struct.pack("<H" if version == (1, 0) else "<L", len(raw))
    return b"\x93NUMPY" + bytes(version) + length + raw + data


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(2,)", more: str = "") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {more}}}\n")


GOOD_NPY = {
    "plain": described(),
    "no comma": header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}\n"),
    "another order": header("{'shape': (2,), 'descr': \"<f4\", 'fortran_order': False}   \n"),
    "two axes": described(shape="(1, 2)"),
    "scalar": described("'<f8'", shape="()"),
    "empty": header("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3), }", data=b""),
}

BAD_NPY = {
    "case67-magic": b"\x93NUMPX" + described()[6:],
    "case67-short": described()[:9],
    "case67-truncated-header": described()[:30],
    "case67-version-9": header("{}", (9, 0)),
    "case67-version-0": header("{}", (0, 0)),
    "case67-call": described(shape="(__import__('os').system('touch canary'),)"),
    "case67-call-only": header("__import__('os').system('touch canary')"),
    "case67-expression": described(shape="(1+1,)"),
    "case67-power": described(shape="(9**9**9,)"),
    "case67-long": header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }" + " " * 10_000),
    "case67-4GiB-header": b"\x93NUMPY\2\0" + b"\xff" * 4 + bytes(100),
    "case67-negative": described(shape="(-2,)"),
    "case67-huge": described(shape="(4611686018427387904,)"),
    "case67-huge-times-0": described(shape="(4611686018427387904, 0)"),
    "case67-overflow": described(shape="(4294967296, 4294967296, 4)"),
    "case67-many-digits": described(shape=f"({'9' * 5000},)"),
    "case67-bool-dims": described(shape="(True, 2)"),
    "case67-float-dims": described(shape="(2.0,)"),
    "case67-long-ints": described(shape="(2L,)"),
    "case67-number": described(shape="2"),
    "case67-brackets": described(shape="(2)"),
    "case67-list": described(shape="[2]"),
    "case67-65-axes": described(shape="(" + "1," * 64 + "2,)"),
    "case67-object": described("'|O'"),
    "case67-object-8": described("'|O8'"),
    "case34-structured": described("[('a', '<f4')]"),
    "case34-unknown": described("'<q7'"),
    "case34-name": described("'float32'"),
    "case34-none": described("None"),
    "case67-order": described(order="1"),
    "case67-missing": header("{'descr': '<f4', 'shape': (2,), }"),
    "case67-more": described(more="'x': True, "),
    "case67-twice": described(more="'shape': (2,), "),
    "case67-no-dict": header("['descr', '<f4']"),
    "case67-behind": header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), } + {}"),
    "case67-comment": header("{'descr': '<f4', #\n 'fortran_order': False, 'shape': (2,), }"),
    "case67-no-utf8": header(b"{'descr': '\xff', 'fortran_order': False, 'shape': (2,), }", (3, 0)),
    "case67-trailing": described() + b"\0",
    "case67-truncated": described()[:-1],
    "case67-nothing": b"",
}


@pytest.mark.parametrize("content", GOOD_NPY.values(), ids=GOOD_NPY.keys())
def test_good_npy_is_read_as_numpy_reads_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    expected = np.load(tmp_path / "x.npy")
    with open_weights(tmp_path / "x.npy") as file:
        (tensor,) = file.tensors.values()
        assert (tensor.name, tensor.dtype, tensor.shape) == ("x", expected.dtype.name, expected.shape)


@pytest.mark.parametrize("content", BAD_NPY.values(), ids=BAD_NPY.keys())
def test_bad_npy_is_refused_alone_and_inside_npz(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npy").write_bytes(content)
    (tmp_path / "x.npz").write_bytes(archive(Entry("x.npy", content, deflated=True)))
    for name in ("x.npy", "x.npz"):
        with within(0.5), pytest.raises(FormatError, match=name) as caught:
            open_weights(name)
        assert len(str(caught.value)) < 500
        assert refused(run("prune", name, "-o", "out", "--pattern", "2:4"), name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.npz"]


# --- bad npz -------------------------------------------------------------------------------------

W = npy(np.ones((4, 4), np.float32))
A, B = Entry("a.npy", W), Entry("b.npy", W, deflated=True)
GOOD_NPZ = archive(A, B)

BAD_NPZ = {
    "case68-twice": archive(A, A),
    "case68-a-and-a.npy": archive(A, Entry("a", W)),
    "case68-other-member": archive(A, Entry("readme.txt", b"hello")),
    "case68-folder": archive(Entry("x/", b""), A),
    "case68-up": archive(Entry("../a.npy", W)),
    "case68-up-inside": archive(Entry("x/../../a.npy", W)),
    "case68-up-backslash": archive(Entry("..\\a.npy", W)),
    "case68-absolute": archive(Entry("/a.npy", W)),
    "case68-NUL": archive(Entry("a\0.npy", W)),
    "case68-encrypted": archive(A._replace(flags=1)),
    "case68-strongly-encrypted": archive(A._replace(flags=65)),
    "case68-version": GOOD_NPZ.replace(b"PK\1\2\x2d\0\x2d", b"PK\1\2\x2d\0\x40"),
    "case68-patch": archive(A._replace(flags=32)),
    "case68-deflate64": archive(B._replace(method=9)),
    "case68-bzip2": archive(B._replace(method=12)),
    "case68-lzma": archive(B._replace(method=14)),
    "case68-zstd": archive(B._replace(method=93)),
    "case68-prefix": archive(A, before=b"#!/bin/sh\n"),
    "case68-hidden-prefix": archive(A, before=b"PK\3\4"),
    "case68-suffix": archive(A, behind=b"x"),
    "case68-between": archive(A, B, between=b"x"),
    "case68-truncated": GOOD_NPZ[:-1],
    "case68-truncated-directory": GOOD_NPZ[:-60],
    "case68-directory-only": GOOD_NPZ[GOOD_NPZ.index(b"PK\1\2") :],
    "case68-no-end": GOOD_NPZ[: GOOD_NPZ.index(b"PK\1\2")],
    "case68-local-name": archive(A._replace(local_name="b.npy")),
    "case68-stored-size": archive(A._replace(size=len(W) + 1)),
    "case68-comment": GOOD_NPZ[:-2] + b"\5\0hello",
    "case68-count": GOOD_NPZ[:-14] + struct.pack("<2H", 3, 3) + GOOD_NPZ[-10:],
    "case69-declared-too-large": archive(B._replace(size=1 << 31)),
    "case69-declared-too-small": archive(B._replace(size=100)),
    "case68-extra": archive(A._replace(extra=b"x")),
    "case68-wide-twice": archive(A._replace(wide=True, extra=struct.pack("<2HQ", 1, 8, 1))),
    "case70-pytorch": archive(Entry("archive/data.pkl", b"\x80\2."), Entry("archive/version", b"3")),
}


@pytest.mark.parametrize("content", BAD_NPZ.values(), ids=BAD_NPZ.keys())
def test_bad_npz_is_refused_before_anything_is_written(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with within(0.5), pytest.raises(FormatError, match=r"x\.npz") as caught:
        open_weights(path)
    assert len(str(caught.value)) < 500
    assert refused(run("prune", path, "-o", tmp_path / "out", "--pattern", "2:4"), "x.npz")
    assert [found.name for found in tmp_path.iterdir()] == ["x.npz"]


DEFLATED = zlib.compressobj(wbits=-15)
LONGER = DEFLATED.compress(W + bytes(100)) + DEFLATED.flush()
DEFLATED = zlib.compressobj(wbits=-15)
SHORTER = DEFLATED.compress(W[:-8]) + DEFLATED.flush()

DAMAGED = {
    "case68-crc": archive(A, B._replace(crc=1)),
    "case68-crc-stored": archive(A._replace(crc=1), B),
    "case69-inflates-to-more": archive(A, B._replace(raw=LONGER)),
    "case69-inflates-to-less": archive(A, B._replace(raw=SHORTER)),
    "case68-cut": archive(A, B._replace(raw=LONGER[:-4])),
    "case68-junk-behind": archive(A, B._replace(raw=LONGER + b"junk")),
    "case68-no-deflate": archive(A, B._replace(raw=b"\xff" * 40)),
    "case68-empty-crc": archive(A, B, Entry("c.npy", npy(np.ones((0, 4))), crc=5)),
}


@pytest.mark.parametrize("which", ["a", "b", "both"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_content_leaves_no_output(case: str, which: str, tmp_path: Path) -> None:
    """Whether the damaged member is pruned or copied, changed or not."""
    path = tmp_path / "x.npz"
    path.write_bytes(DAMAGED[case])
    include = () if which == "both" else ("--include", which)
    for pattern in ("2:4", "4:4"):
        result = run("prune", path, "-o", tmp_path / "out", "--pattern", pattern, *include)
        assert refused(result, "member")
        assert [found.name for found in tmp_path.iterdir()] == ["x.npz"]


def test_case69_a_bomb_is_refused_by_its_size_before_it_is_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.zeros((1 << 12, 1 << 12), np.float32)  # 64 MiB
    np.savez_compressed(tmp_path / "in.npz", a=array)
    assert (tmp_path / "in.npz").stat().st_size < 100_000
    total = len(npy(array))
    with monkeypatch.context() as patch:
        patch.setattr(own_archive.zlib, "decompressobj", None)
        for command in (("prune", "--dry-run", "--pattern", "2:4"), ("inspect",)):
            assert refused(run(*command, tmp_path / "in.npz", "--max-bytes", total - 1), "--max-bytes")
    with npscope.config(threads=2):  # each has work arrays
        tracemalloc.start()
        assert run("inspect", tmp_path / "in.npz", "--max-bytes", total).code == 0
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 << 20  # one slab and its temporaries


def test_case63_many_members_take_linear_time(tmp_path: Path) -> None:
    def opened(count: int) -> None:
        path = tmp_path / f"{count}.npz"
        path.write_bytes(archive(*(Entry(f"t{i}.npy", described()) for i in range(count))))
        with open_weights(path) as file:
            assert len(file.tensors) == count

    assert_linear(opened, 300)


@given(st.data())
def test_what_is_taken_is_what_numpy_reads(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of a good archive changed, removed or inserted at random."""
    content = bytearray(archive(A, B._replace(wide=True), A._replace(name="c.npy", described=True)))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path = tmp_path_factory.mktemp("fuzz") / "x.npz"
    path.write_bytes(content)
    try:
        with open_weights(path) as file:
            found = {}
            for name, tensor in file.tensors.items():
                buffer = bytearray(tensor.nbytes)
                file.read(tensor, 0, memoryview(buffer))
                found[name] = (tensor.dtype, tensor.shape[:: -1 if tensor.fortran else 1], bytes(buffer))
    except FormatError:
        return
    with np.load(path, allow_pickle=False) as theirs:
        assert set(theirs) == set(found)
        for name, array in theirs.items():
            dtype, shape, raw = found[name]
            assert shape == array.shape
            if dtype == array.dtype.name:
                assert raw == array.tobytes("A")


def test_nothing_crashes_on_any_single_damaged_byte(tmp_path: Path) -> None:
    good, path = archive(A, B), tmp_path / "x.npz"
    for at, change in itertools.product(range(0, len(good), 3), (1, 0xFF)):
        path.write_bytes(good[:at] + bytes([good[at] ^ change]) + good[at + 1 :])
        result = run("prune", path, "-o", tmp_path / "out", "--pattern", "2:4", "--force", "--quiet")
        assert result.code in (0, 2), result
        assert "this should not happen" not in result.err
        if result.code == 0:
            loaded(tmp_path / "out")


# --- pickles and wrong names ---------------------------------------------------------------------


class Canary:
    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("name", ["m.pkl", "m.pt", "m.pth", "m.bin", "m.ckpt", "m.npy", "m.safetensors", "m"])
def test_case70_no_pickle_is_ever_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps(Canary())
    objects = np.empty(1, object)
    objects[0] = Canary()
    npz_bytes = archive(Entry("x.npy", npy(objects)))
    for content in (payload, npy(objects), npz_bytes, archive(Entry("archive/data.pkl", payload))):
        Path(name).write_bytes(content)
        for command in (("inspect", name), ("prune", name, "-o", "out", "--pattern", "2:4")):
            result = run(*command)
            assert result.code == 2, result
            assert any(word in result.err for word in ("pickle", "its content is", "npy")), result.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    pickle.loads(payload)
    assert Path("canary").exists()  # the canary does sing


CONTENTS = {
    "safetensors": DATA.read_bytes,
    "npy": lambda: W,
    "npz": lambda: GOOD_NPZ,
    "json": lambda: b'{"weight_map": {}}',
}


@pytest.mark.parametrize("named", [*CONTENTS, "onnx"])
@pytest.mark.parametrize("content", CONTENTS)
def test_case71_the_content_decides_and_a_wrong_name_is_an_error(content: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{named}"
    path.write_bytes(CONTENTS[content]())
    result = run("inspect", path)
    if content == named:
        assert result.code == (2 if named == "json" else 0)
    else:
        assert refused(result, f"is named .{named} and its content is")


@pytest.mark.parametrize("named", ["safetensors", "npy", "npz", "onnx", "json"])
@pytest.mark.parametrize("content", ["safetensors", "npy", "npz"])
def test_case71_an_output_is_not_named_as_what_it_is_not(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(CONTENTS[content]())
    result = run("prune", tmp_path / "in", "-o", tmp_path / f"out.{named}", "--pattern", "2:4")
    assert result.code == 0 if content == named else refused(result, f"is named .{named}")


@pytest.mark.parametrize("content", ["safetensors", "npy", "npz"])
def test_case71_a_name_that_says_nothing_is_right(content: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.dat"
    path.write_bytes(CONTENTS[content]())
    assert run("inspect", path).code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"GGUF" + bytes(20), "GGUF"), (b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5"), (b"\x80\4" + bytes(20), "pickle")],
)
def test_case71_other_formats_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert refused(run("inspect", tmp_path / "x"), message)


def test_case71_onnx_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Module:
        Onnx = opened.append

    monkeypatch.setitem(sys.modules, "npscope.weights.onnx", Module)
    path = tmp_path / "x.onnx"
    for content in (b"\x08\x08\x12\x07pytorch:", b":\x10abc", b""):
        path.write_bytes(content)
        open_weights(path)
    assert opened == [path] * 3
