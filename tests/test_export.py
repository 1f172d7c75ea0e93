"""Exports against what reads them: SciPy, NumPy, and the layout of compressed-tensors."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from npscope import cli
from npscope.errors import FormatError, SpecError
from npscope.recipes.pattern import Pattern
from npscope.recipes.recipe import Recipe
from npscope.streaming import export
from npscope.streaming.export import Selection, export_bitmask, export_matrix, export_two_of_four
from npscope.streaming.pruning import prune_file
from npscope.streaming.storage import storage

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which no temporary file may be left."""
    yield tmp_path
    assert not [path.name for path in tmp_path.iterdir() if "npscope" in path.name]


@pytest.fixture(params=[100, 4 << 20], ids=["small chunks", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in many chunks, and in one."""
    monkeypatch.setattr(export, "CHUNK_BYTES", request.param)


def sparse(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    values[rng.random(shape) < 0.6] = 0
    values[1] = 0
    return values.astype(dtype)


# --- bitmask -------------------------------------------------------------------------------------

ORACLE = {
    # What compressed-tensors 0.14.0.1 makes of a bfloat16 matrix of 3 x 10: row 0 the numbers 1 to 10
    # but every third 0 (the second of them -0.0), row 1 zero, row 2 zero but for a NaN at its end.
    "compressed": [2.0, 3.0, 5.0, 6.0, 8.0, 9.0, float("nan")],
    "bitmask": [[0b10110110, 0b01], [0, 0], [0, 0b10]],
    "row_offsets": [0, 6, 6],
    "shape": [3, 10],
}


def test_the_bitmask_layout_is_that_of_compressed_tensors(folder: Path) -> None:
    values = np.zeros((3, 10), ml_dtypes.bfloat16)
    values[0] = np.arange(1, 11)
    values[0, ::3] = [0, -0.0, 0, 0]
    values[2, 9] = np.nan
    save_file({"w.weight": values}, folder / "in")
    export_bitmask(folder / "in", folder / "out", Selection(("w.weight",)))
    found = load_file(folder / "out")
    assert set(found) == {f"w.{part}" for part in ORACLE}
    dtypes = {"compressed": "bfloat16", "bitmask": "uint8", "row_offsets": "int64", "shape": "int64"}
    for part, expected in ORACLE.items():
        assert found[f"w.{part}"].dtype.name == dtypes[part]
        np.testing.assert_array_equal(found[f"w.{part}"].astype(np.float64), np.asarray(expected, np.float64))


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(2, 1), (5, 8), (7, 13), (3, 64)])
@pytest.mark.usefixtures("chunks")
def test_bitmasks_hold_all_that_is_not_zero(folder: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    values, bias = sparse(shape, dtype), np.arange(5, dtype=np.int16)
    save_file({"w": values, "bias": bias}, folder / "in", {"format": "pt"})
    (done,) = export_bitmask(folder / "in", folder / "out", Selection(("w",)))
    found = load_file(folder / "out")
    bits = np.unpackbits(found["w.bitmask"], axis=1, bitorder="little")[:, : shape[1]].astype(bool)
    np.testing.assert_array_equal(bits, values != 0)
    rebuilt = np.zeros(found["w.shape"], dtype)
    rebuilt[bits] = found["w.compressed"]
    np.testing.assert_array_equal(rebuilt, values)
    in_use = (values != 0).sum(axis=1)
    np.testing.assert_array_equal(found["w.row_offsets"], np.cumsum(in_use) - in_use)
    np.testing.assert_array_equal(found["bias"], bias)
    assert done.nbytes == sum(found[f"w.{part}"].nbytes for part in ORACLE)


def test_matrices_that_would_grow_are_left_alone_unless_named(folder: Path) -> None:
    dense = np.ones((8, 8), np.float32)
    matrix = sparse((8, 64), np.float32)
    values = {"dense.weight": dense, "m.weight": matrix, "other": matrix, "conv.weight": sparse((4, 4, 2), np.float32)}
    save_file(values, folder / "in")
    export_bitmask(folder / "in", folder / "out", Selection())
    assert set(values) & set(load_file(folder / "out")) == set(values) - {"m.weight"}
    export_bitmask(folder / "in", folder / "named", Selection(("dense.weight", "other")))
    found = load_file(folder / "named")
    np.testing.assert_array_equal(found["dense.compressed"], np.ones(64, np.float32))
    np.testing.assert_array_equal(found["other.compressed"], matrix[matrix != 0])
    with pytest.raises(SpecError, match="nothing to export"):
        export_bitmask(folder / "in", folder / "none", Selection(exclude=("m.weight",)))
    with pytest.raises(SpecError, match="matches none"):
        export_bitmask(folder / "in", folder / "none", Selection(("x*",)))
    save_file({"w": sparse((8, 64), np.float32), "w.shape": dense}, folder / "in")
    with pytest.raises(FormatError, match=r"'w\.shape'.*once"):
        export_bitmask(folder / "in", folder / "none", Selection(("w",)))
    assert not (folder / "none").exists()


# --- SciPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("block", [None, (1, 1), (2, 4), (6, 16)])
@pytest.mark.usefixtures("chunks")
def test_scipy_reads_the_matrix(folder: Path, dtype: Any, block: tuple[int, int] | None) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    values = sparse((12, 4, 8), dtype)
    values[6:8] = 0
    save_file({"w": values, "other": values[0]}, folder / "in")
    export_matrix(folder / "in", folder / "out.npz", Selection(("w",)), block)
    found = scipy_sparse.load_npz(folder / "out.npz")
    found.check_format(full_check=True)
    expected = values.reshape(12, 32).astype(np.float64 if dtype is np.float64 else np.float32)
    assert found.format == ("bsr" if block else "csr")
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.toarray(), expected)
    if block:
        assert found.blocksize == block
        assert found.data.reshape(len(found.data), -1).any(axis=1).all()
    else:
        assert found.nnz == np.count_nonzero(expected)


def test_one_matrix_at_a_time_and_blocks_that_divide_it(folder: Path) -> None:
    with pytest.raises(SpecError, match="8 tensors are meant"):
        export_matrix(DATA, folder / "out", Selection())
    with pytest.raises(SpecError, match="4x5 do not divide 512x128"):
        export_matrix(DATA, folder / "out", Selection(("lstm_cell.weight_ih",)), (4, 5))


def test_arrays_in_fortran_order_are_refused(folder: Path) -> None:
    np.savez(folder / "in.npz", **{"w.weight": np.asfortranarray(sparse((8, 64), np.float32))})
    for job in (export_bitmask, export_matrix):
        with pytest.raises(SpecError, match="Fortran order"):
            job(folder / "in.npz", folder / "out", Selection())
    prune_file(folder / "in.npz", folder / "pruned.npz", Recipe.shorthand(Pattern.parse("2:4")))
    with pytest.raises(SpecError, match="Fortran order"):
        export_two_of_four(folder / "pruned.npz", folder / "out", Recipe.shorthand(Pattern.parse("2:4")))


def test_an_empty_matrix_is_still_a_matrix(folder: Path) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    save_file({"w": np.zeros((4, 8), np.float32)}, folder / "in")
    for block in (None, (2, 2)):
        export_matrix(folder / "in", folder / "out.npz", Selection(), block, force=True)
        assert scipy_sparse.load_npz(folder / "out.npz").toarray().shape == (4, 8)


# --- 2:4 -----------------------------------------------------------------------------------------


def rebuilt(archive: Any, name: str) -> np.ndarray:
    """The tensor from its five arrays, element by element, as the layout is documented."""
    values, metadata = archive[f"{name}.values"], archive[f"{name}.metadata"]
    axis, dtype = (
        int(archive[f"{name}.axis"]),
        np.dtype(getattr(ml_dtypes, str(archive[f"{name}.dtype"]), None) or str(archive[f"{name}.dtype"])),
    )
    pairs = np.moveaxis(values.view(dtype), axis, -1)
    groups = pairs.reshape(*pairs.shape[:-1], -1, 2)
    wide = np.zeros((*groups.shape[:-1], 4), dtype)
    numbers = np.arange(groups.size // 2).reshape(
        [values.shape[at] // 2 if at == axis else values.shape[at] for at in range(values.ndim)]
    )
    numbers = np.moveaxis(numbers, axis, -1)
    for index in np.ndindex(numbers.shape):
        number = int(numbers[index])
        half = int(metadata[number // 2]) >> 4 * (number % 2) & 15
        first, second = half & 3, half >> 2
        assert first < second
        wide[index][first], wide[index][second] = groups[index]
    return np.moveaxis(wide.reshape(*pairs.shape[:-1], -1), -1, axis).reshape(archive[f"{name}.shape"])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize(("axis", "layout"), [("in", "out-in"), ("in", "in-out"), ("fan-in", "out-in"), (0, "out-in")])
@pytest.mark.usefixtures("chunks")
def test_two_of_four_comes_back(folder: Path, dtype: Any, axis: Any, layout: Any) -> None:
    recipe = Recipe.shorthand(Pattern.parse("2:4"), axis=axis, layout=layout)
    values = {
        "linear": sparse((12, 20), dtype, 1),
        "conv": sparse((4, 12, 3, 4), dtype, 2),
        "odd": np.ones((5, 7), dtype),
    }
    save_file(values, folder / "in")
    prune_file(folder / "in", folder / "pruned", recipe)
    done = export_two_of_four(folder / "pruned", folder / "out.npz", recipe)
    names = {one.tensor.name for one in done}
    assert "linear" in names
    raw = (folder / "pruned").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little")
    with np.load(folder / "out.npz", allow_pickle=False) as archive:
        for name in names:
            begin, end = header[name]["data_offsets"]
            pruned = np.frombuffer(raw[start + begin : start + end], dtype).reshape(values[name].shape)
            np.testing.assert_array_equal(rebuilt(archive, name), pruned)
            assert archive[f"{name}.values"].nbytes * 2 == pruned.nbytes


@pytest.mark.usefixtures("chunks")
def test_two_of_four_of_int8_comes_back(folder: Path) -> None:
    """With -128, whose bits are those of a sign alone, before and behind the zeros of its group."""
    values = np.random.default_rng(3).integers(-128, 128, (12, 20)).astype(np.int8)
    values[:3, :4] = [[-128, 0, 0, 0], [0, 0, 0, -128], [0, -128, -128, 0]]
    recipe = Recipe.shorthand(Pattern.parse("2:4"), include=("q",))
    save_file({"q": values}, folder / "in")
    prune_file(folder / "in", folder / "pruned", recipe)
    export_two_of_four(folder / "pruned", folder / "out.npz", recipe)
    with np.load(folder / "out.npz", allow_pickle=False) as archive:
        assert archive["q.values"].dtype == np.int8
        np.testing.assert_array_equal(rebuilt(archive, "q"), load_file(folder / "pruned")["q"])


def test_what_is_not_two_of_four_is_refused_or_left_out(folder: Path) -> None:
    recipe = Recipe.shorthand(Pattern.parse("2:4"))
    with pytest.raises(SpecError, match=r"'conv2\.weight' is not 2:4 along axis 1"):
        export_two_of_four(DATA, folder / "out", recipe)
    prune_file(DATA, folder / "pruned", Recipe.shorthand(Pattern.parse("2:4"), include=("conv2.weight",)))
    (done,) = export_two_of_four(folder / "pruned", folder / "out", recipe)
    assert done.tensor.name == "conv2.weight"
    with pytest.raises(SpecError, match=r"'conv3\.weight' is not 2:4"):
        export_two_of_four(
            folder / "pruned",
            folder / "no",
            Recipe.shorthand(Pattern.parse("2:4"), include=("conv[23].weight",)),
            strict=True,
        )


# --- what it takes -------------------------------------------------------------------------------


def test_what_storing_would_take(folder: Path) -> None:
    values = sparse((64, 100), np.float32)
    big = np.zeros((256, 512), np.float16)
    save_file({"a": values, "big": big, "other": values}, folder / "in")
    found = storage(folder / "in", [int((values == 0).sum()), None, big.size])
    assert found.now == values.nbytes + big.nbytes
    assert found.bitmask == 4 * np.count_nonzero(values) + 64 * 13 + 256 * 64
    exact = len(zlib.compress(values.tobytes())) + len(zlib.compress(big.tobytes()))
    assert found.deflated == pytest.approx(exact, abs=2000)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["bitmask", "csr", "bsr", "2:4"])
def test_the_command_exports_and_reports(folder: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    pruned, out = folder / "pruned", folder / "out"
    assert run("prune", DATA, "-o", pruned, "--pattern", "2:4", "--quiet")[0] == 0
    given = ("export", pruned, "--to", to, "-o", out, "--include", "lstm_cell.weight_ih")
    code, text, _ = run(*given, "--json")
    found = json.loads(text)
    assert (code, found["to"], [line["name"] for line in found["tensors"]]) == (0, to, ["lstm_cell.weight_ih"])
    assert found["tensors"][0]["bytes_before"] == 262144
    first = out.read_bytes()
    code, text, err = run(*given)
    assert code == 2
    assert "exists" in err
    code, text, _ = run(*given, "--force")
    assert code == 0
    assert "lstm_cell.weight_ih" in text
    assert out.read_bytes() == first  # case 100
    assert run(*given[:-1], "nothing", "--force", "--json")[0] == 2
    assert run("export", pruned, "--to", to, "-o", pruned, "--force")[0] == 2


def test_bad_blocks_are_wrong_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in ("4", "0x4", "4x", "-1x4", "4x4x4"):
        assert cli.main(["export", str(DATA), "--to", "bsr", f"--block={block}", "-o", str(folder / "out")]) == 2
        assert "not two sizes" in capsys.readouterr().err
