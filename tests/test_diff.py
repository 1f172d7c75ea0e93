"""`npscope diff`: every way in which a tensor can differ, by bits and by value."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from npscope import cli
from npscope.errors import FileError
from npscope.streaming import comparison
from npscope.streaming.comparison import Difference, compare_files

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, *FLOATS]


def compare(folder: Path, a: dict[str, np.ndarray], b: dict[str, np.ndarray], **options: Any) -> list[Difference]:
    save_file(a, folder / "a")
    save_file(b, folder / "b")
    return compare_files(folder / "a", folder / "b", **options)


def only(found: list[Difference]) -> Difference:
    (one,) = found
    return one


def test_a_file_is_equal_to_itself() -> None:
    found = compare_files(DATA, DATA)
    assert len(found) == 15
    assert {one.status for one in found} == {"equal"}


def test_every_status_in_the_order_of_the_files(tmp_path: Path) -> None:
    ones = np.ones((2, 3), np.float32)
    a = {"dtype": ones, "equal": ones, "first": ones, "shape": ones, "values": ones}
    b = {"dtype": ones.astype(np.int32), "equal": ones, "second": ones, "shape": ones.T.copy(), "values": ones * 3}
    found = {one.name: one for one in compare(tmp_path, a, b)}
    statuses = {"dtype": "dtype", "equal": "equal", "first": "only in A", "shape": "shape", "values": "values"}
    assert {name: one.status for name, one in found.items()} == statuses | {"second": "only in B"}
    values = found["values"]
    assert (values.differing, values.first, values.largest) == (6, (0, 0), 2.0)
    assert (found["first"].b, found["second"].a) == (None, None)


@pytest.mark.parametrize("dtype", [*DTYPES, np.complex64], ids=lambda dtype: np.dtype(dtype).name)
def test_one_element_of_any_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr(comparison, "CHUNK_BYTES", 64)
    values = np.zeros((5, 7, 3), dtype)
    other = values.copy()
    other[3, 6, 1] = 1
    for left, right in ((values, other), (other, values)):
        found = only(compare(tmp_path, {"a": left}, {"a": right}))
        assert (found.status, found.differing, found.first) == ("values", 1, (3, 6, 1))
        assert (found.largest, found.zeros, found.nans) == (1, 0, 0)


@given(st.data())
def test_counts_and_the_largest_difference(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES[1:])))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    bits = rng.integers(0, 256, size=(2, 37, dtype.itemsize)).astype(np.uint8)
    bits[1] = np.where(rng.random((37, 1)) < 0.6, bits[0], bits[1])
    a, b = bits.view(dtype).reshape(2, 37)
    with np.errstate(invalid="ignore"):
        wide = (
            (a.astype(np.float64), b.astype(np.float64))
            if dtype.kind not in "iu"
            else (a.astype(object), b.astype(object))
        )
    found = only(compare(tmp_path_factory.mktemp("diff"), {"a": a}, {"a": b}))
    unlike = np.flatnonzero((bits[0] != bits[1]).any(axis=1))
    assert found.differing == len(unlike)
    assert found.first == ((int(unlike[0]),) if len(unlike) else None)
    gaps = [abs(x - y) for x, y in zip(*wide, strict=True) if x != y and abs(x) < np.inf > abs(y)]
    finite = [gap for gap in gaps if gap < np.inf]
    assert found.largest == (max(finite) if finite else None)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_signs_of_zero_and_bits_of_nan(tmp_path: Path, dtype: Any) -> None:
    """Case 25, case 28: differences of bits alone are found, counted apart, and left out when asked."""
    values = np.asarray([0, np.nan, 1, np.nan, 2], dtype)
    other = np.asarray([-0.0, -np.nan, 1, 3, 2], dtype)
    bits = other.view(f"u{other.itemsize}")
    bits[1] = values.view(bits.dtype)[1] ^ (1 << (8 * other.itemsize - 1))
    found = only(compare(tmp_path, {"a": values}, {"a": other}))
    assert (found.differing, found.zeros, found.nans, found.first, found.largest) == (3, 1, 1, (0,), None)
    found = only(compare(tmp_path, {"a": values}, {"a": other}, by_value=True))
    assert (found.differing, found.zeros, found.nans, found.first) == (1, 0, 0, (3,))
    found = only(compare(tmp_path, {"a": values[:3]}, {"a": other[:3]}, by_value=True))
    assert found.status == "equal"


def test_infinities_are_no_distance(tmp_path: Path) -> None:
    a = np.asarray([np.inf, np.inf, -1e308, 1.0])
    b = np.asarray([-np.inf, 1, 1e308, 1.5])
    found = only(compare(tmp_path, {"a": a}, {"a": b}))
    assert (found.differing, found.largest) == (4, 0.5)


def test_case35_integers_are_subtracted_exactly(tmp_path: Path) -> None:
    limits = np.iinfo(np.int64)
    a = np.asarray([limits.min, 5], np.int64)
    b = np.asarray([limits.max, 5], np.int64)
    assert only(compare(tmp_path, {"a": a}, {"a": b})).largest == (1 << 64) - 1


def packed(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    raw = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize("dtype", ["F4", "F8_NEW"])
def test_case60_dtypes_that_cannot_be_read_are_compared_by_bytes(tmp_path: Path, dtype: str) -> None:
    shape = (4, 4) if dtype == "F4" else (8,)
    (tmp_path / "a").write_bytes(packed(dtype, shape, b"\x00\x01\x02\x03\x04\x05\x06\x07"))
    (tmp_path / "b").write_bytes(packed(dtype, shape, b"\x00\x01\x02\x99\x04\x05\x88\x07"))
    found = only(compare_files(tmp_path / "a", tmp_path / "b"))
    assert (found.status, found.differing, found.first, found.largest) == ("values", 2, (3,), None)


def test_tensors_without_elements_are_equal(tmp_path: Path) -> None:
    """Case 15."""
    empty = np.zeros((0, 4), np.float32)
    assert only(compare(tmp_path, {"a": empty}, {"a": empty})).status == "equal"


def test_case91_a_file_that_changes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(DATA.read_bytes())
    real = comparison._compare

    def touched(*arguments: Any) -> Any:
        os.utime(tmp_path / "a", ns=(0, 0))
        return real(*arguments)

    monkeypatch.setattr(comparison, "_compare", touched)
    with pytest.raises(FileError, match="was changed"):
        compare_files(DATA, tmp_path / "a")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command_ends_with_1_when_it_finds_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.asarray([[0.0, np.nan, 1.0]], np.float32)
    compare(tmp_path, {"a": values, "b": values, "\x1b[31m": values}, {"a": -values, "b": values})
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(capsys, "diff", a, a)[:2] == (0, "3 of 3 tensors are equal\n")
    code, text, _ = run(capsys, "diff", a, b)
    assert code == 1
    assert "\x1b" not in text
    assert "values (1 only sign of zero, 1 only bits of NaN)" in " ".join(text.split())
    assert "1 of 3 tensors are equal" in text
    code, text, _ = run(capsys, "diff", a, b, "--json")
    found = json.loads(text)
    assert (code, found["equal"], found["totals"]) == (1, False, {"tensors": 3, "equal": 1, "unequal": 2})
    line = next(line for line in found["tensors"] if line["name"] == "a")
    assert (line["status"], line["differing"], line["first"], line["largest"]) == ("values", 3, [0, 0], 2.0)
    assert run(capsys, "diff", a, b, "--quiet") == (1, "", "")
    code, text, _ = run(capsys, "diff", a, tmp_path / "nowhere", "--json")
    assert (code, json.loads(text)["error"]["exit_code"]) == (3, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.complex64], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(6, 6), (5, 7, 3), (4,)])
def test_other_formats_and_orders_of_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, shape: tuple[int, ...]
) -> None:
    """An array in Fortran order is the same array; indices are those of whoever saved it."""
    monkeypatch.setattr(comparison, "CHUNK_BYTES", 64)
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    other = values.copy()
    place = tuple(n - 2 for n in shape)
    other[place] += 5
    save_file({"a": values}, tmp_path / "c.safetensors")
    np.savez(tmp_path / "f.npz", a=np.asfortranarray(values))
    np.savez_compressed(tmp_path / "g.npz", a=np.asfortranarray(other))
    paths = [tmp_path / name for name in ("c.safetensors", "f.npz", "g.npz")]
    for one, two in itertools.product(paths, paths):
        found = only(compare_files(one, two))
        differs = (one == paths[2]) != (two == paths[2])
        assert (found.status, found.first) == (("values", place) if differs else ("equal", None))
        assert found.largest == (5 if differs else None)
