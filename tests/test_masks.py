"""Masks of `prune --mask-out`: what is in the file, and what `apply-mask` does with it."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from npscope import cli
from npscope.errors import FormatError, SpecError
from npscope.recipes.pattern import Pattern
from npscope.recipes.recipe import Recipe
from npscope.streaming import dropping, masks, slabs
from npscope.streaming.masks import apply_mask
from npscope.streaming.pruning import prune_file
from npscope.weights import Tensor
from npscope.weights.new_safetensors import create
from npscope.weights.output import Target

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which no temporary file may be left."""
    yield tmp_path
    assert not [path.name for path in tmp_path.iterdir() if "npscope" in path.name]


def recipe(pattern: str, **options: Any) -> Recipe:
    return Recipe.shorthand(Pattern.parse(pattern), **options)


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "np") as file:
        return dict(file.metadata())


def elements(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A mask as an array, and that its padding is 0."""
    bits = np.unpackbits(load_file(path)[name], bitorder="little").astype(bool)
    size = math.prod(shape)
    assert bits.size == -(-size // 8) * 8
    assert not bits[size:].any()
    return bits[:size].reshape(shape)


# --- what is in the file -------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("pattern", ["2:4", "4x1@0.5", "1x1@0.7", "block=1x3 scope=2x2 keep=1"])
@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_mask_and_the_input_give_the_bytes_that_pruning_gave(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, layout: Any, passes: int
) -> None:
    rng = np.random.default_rng(0)
    values = {"linear": rng.integers(-2, 3, size=(12, 36)), "conv": rng.normal(size=(12, 12, 12))}
    values |= {"stack": rng.normal(size=(24, 12, 24)), "bias": rng.normal(size=5)}
    save_file({name: value.astype(np.float32) for name, value in values.items()}, folder / "in")
    monkeypatch.setattr(slabs, "SLAB_BYTES", 500)
    if passes == 2:
        monkeypatch.setattr(dropping, "SCOPE_BYTES", 0)
    prune_file(folder / "in", folder / "out", recipe(pattern, layout=layout), mask_out=folder / "mask")
    prune_file(folder / "in", folder / "alone", recipe(pattern, layout=layout))
    assert (folder / "out").read_bytes() == (folder / "alone").read_bytes()
    apply_mask(folder / "in", folder / "mask", folder / "again")
    assert (folder / "again").read_bytes() == (folder / "out").read_bytes()
    assert set(load_file(folder / "mask")) == {"linear", "conv", "stack"}


def test_the_bits_are_those_of_the_layout(folder: Path) -> None:
    """Zeros that survive are 1: the count is exact. Element 0 is the lowest bit of the first byte."""
    values = np.asarray([[0, 0, 0, 0], [-1, 5, 0, 2], [9, 0, -8, 7]], np.float32)
    save_file({"a": values}, folder / "in")
    prune_file(folder / "in", folder / "out", recipe("2:4"), mask_out=folder / "mask")
    assert load_file(folder / "mask")["a"].tolist() == [0b1010_0011, 0b0000_0101]
    expected = [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    np.testing.assert_array_equal(elements(folder / "mask", "a", (3, 4)), np.asarray(expected, bool))
    described = metadata_of(folder / "mask")
    assert described["npscope.mask"] == "1"
    assert json.loads(described["tensors"]) == {"a": {"shape": [3, 4], "pattern": "keep 2 of 4, axis 1 (in)"}}
    assert len(bytes.fromhex(described["recipe"])) == 32


def test_the_hash_is_of_the_numbers_and_not_of_the_words(folder: Path) -> None:
    save_file({"a": np.ones((4, 8), np.float32)}, folder / "in")
    hashes = {}
    for pattern in ("2:4", "block=1 scope=4 sparsity=0.5", "1:4", "block=1 scope=4 keep=2 ord=1"):
        prune_file(folder / "in", folder / "out", recipe(pattern), mask_out=folder / "mask", force=True)
        hashes[pattern] = metadata_of(folder / "mask")["recipe"]
    assert hashes["2:4"] == hashes["block=1 scope=4 sparsity=0.5"]
    assert len(set(hashes.values())) == 3


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_and_nan(folder: Path, dtype: Any) -> None:
    """Case 25, case 28: bits that are kept stay, those that are dropped become +0.0."""
    values = np.random.default_rng(1).normal(size=(5, 12)).astype(dtype)
    values[0, :4] = [np.nan, -0.0, 1, -0.0]
    save_file({"a": values}, folder / "in")
    prune_file(folder / "in", folder / "out", recipe("2:4"), nan="keep", mask_out=folder / "mask")
    (done,) = apply_mask(folder / "in", folder / "mask", folder / "again")
    assert (folder / "again").read_bytes() == (folder / "out").read_bytes()
    assert done.dropped == 30


def test_case100_the_same_bytes_every_time(folder: Path) -> None:
    for name in ("one", "two"):
        prune_file(DATA, folder / name, recipe("2:4"), mask_out=folder / f"{name}.mask")
    assert (folder / "one.mask").read_bytes() == (folder / "two.mask").read_bytes()


def test_a_dry_run_writes_no_mask(folder: Path) -> None:
    prune_file(DATA, None, recipe("2:4"), dry_run=True, mask_out=folder / "mask")
    assert not list(folder.iterdir())


def test_places_that_a_mask_cannot_have(folder: Path) -> None:
    """Case 88, case 89: not the input, not the output, not an existing file."""
    source = folder / "in"
    source.write_bytes(DATA.read_bytes())
    for place, message in ((source, "the input"), (folder / "out", "the output"), (folder / "there", "exists")):
        (folder / "there").write_text("precious")
        with pytest.raises(SpecError, match=message):
            prune_file(source, folder / "out", recipe("2:4"), mask_out=place)
        assert not (folder / "out").exists()
        assert (folder / "there").read_text() == "precious"
    assert source.read_bytes() == DATA.read_bytes()


RECIPE = """
[[rule]]
match = ["lstm_cell.*_ih", "lstm_cell.*_hh"]
block = "4x4"
budget = 0.5
max_sparsity = 0.8

[[rule]]
pattern = "2:4"
misfit = "skip"

[[coupling]]
name = "channels"
sparsity = 0.25
[[coupling.member]]
tensor = "conv1.weight"
block = [1, -1, -1]
[[coupling.member]]
tensor = "conv2.weight"
block = [-1, 1, -1]
order = [1, 0, 2]
"""


def test_budgets_and_couplings_have_masks_and_can_be_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.toml").write_text(RECIPE)
    given = ("-r", folder / "recipe.toml")

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, capsys.readouterr().out

    assert run("prune", DATA, "-o", folder / "out", *given, "--mask-out", folder / "mask", "--quiet")[0] == 0
    assert run("apply-mask", DATA, folder / "mask", "-o", folder / "again", "--quiet")[0] == 0
    assert (folder / "again").read_bytes() == (folder / "out").read_bytes()
    described = json.loads(metadata_of(folder / "mask")["tensors"])
    pattern = "keep 96 of 128 coupled blocks, coupling 'channels'"
    assert described["conv1.weight"] == {"shape": [128, 129, 3], "pattern": pattern}
    assert elements(folder / "mask", "conv1.weight", (128, 129, 3)).any(axis=(1, 2)).sum() == 96

    code, text = run("verify", folder / "out", *given, "--json")
    assert (code, json.loads(text)["totals"]["failed"]) == (0, 0)
    code, text = run("verify", DATA, *given, "--json")
    found = {line["name"]: line for line in json.loads(text)["tensors"] if line["holds"] is False}
    assert code == 1
    assert (found["coupling 'channels'"]["scope"], found["coupling 'channels'"]["used"]) == ([0, 0, 0], 128)
    assert found["coupling 'channels'"]["pattern"] == "keep 96 of 128 coupled blocks, 2 tensors"
    assert sum(line["used"] for line in found.values() if line["scope"] is None) == 8192
    assert "coupled" in run("verify", DATA, *given)[1]


# --- applying ------------------------------------------------------------------------------------


def mask_of(folder: Path, values: np.ndarray, kept: np.ndarray, **changes: Any) -> Path:
    """A mask file for the tensor "a", apart from `changes` to its metadata."""
    described = {"npscope.mask": "1", "recipe": "", "tensors": json.dumps({"a": {"shape": list(values.shape)}})}
    bits = np.packbits(kept.reshape(-1), bitorder="little")
    save_file({"a": bits}, folder / "mask", described | changes)
    return folder / "mask"


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int8, np.uint16, np.int64, np.complex64, *FLOATS], ids=lambda dtype: np.dtype(dtype).name
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 2, 2)])
def test_any_dtype_and_shape_can_be_masked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(masks, "CHUNK_ELEMENTS", 8)
    rng = np.random.default_rng(2)
    raw = rng.integers(1, 2 if dtype is np.bool_ else 250, size=(*shape, np.dtype(dtype).itemsize)).astype(np.uint8)
    values = raw.view(dtype).reshape(shape)
    kept = np.asarray(rng.integers(0, 2, size=shape), bool)
    save_file({"a": values, "b": values}, folder / "in")
    (done,) = apply_mask(folder / "in", mask_of(folder, values, kept), folder / "out")
    assert (done.dropped, done.changed) == ((~kept).sum(),) * 2
    before, after = (path.read_bytes() for path in (folder / "in", folder / "out"))
    size = values.nbytes
    expected = np.where(kept[..., None], raw, 0).astype(np.uint8).tobytes()
    assert after == before[: -2 * size] + expected + before[-size:]


def bad_masks() -> dict[str, tuple[dict[str, Any], str, type[Exception]]]:
    good = json.dumps({"a": {"shape": [3, 3]}})
    return {
        "no mask": ({"npscope.mask": ""}, "no mask file of version 1", FormatError),
        "later version": ({"npscope.mask": "2"}, "no mask file of version 1", FormatError),
        "no json": ({"tensors": good[:-1]}, "lacks a JSON object", FormatError),
        "no object": ({"tensors": "[]"}, "lacks a JSON object", FormatError),
        "no shape": ({"tensors": '{"a": {}}'}, "lacks a JSON object", FormatError),
        "depth": ({"tensors": "[" * 100_000}, "lacks a JSON object", FormatError),
        "bool": ({"tensors": '{"a": {"shape": [true, 9]}}'}, "lacks a JSON object", FormatError),
        "negative": ({"tensors": '{"a": {"shape": [-3, -3]}}'}, "lacks a JSON object", FormatError),
        "another tensor": ({"tensors": '{"b": {"shape": [3, 3]}}'}, "does not describe", FormatError),
        "transposed": ({"tensors": '{"a": {"shape": [9, 1]}}'}, r"shape \[9, 1\], the tensor \[3, 3\]", SpecError),
    }


@pytest.mark.parametrize(("changes", "message", "kind"), bad_masks().values(), ids=bad_masks().keys())
def test_bad_masks_are_refused_before_anything_is_written(
    folder: Path, changes: dict[str, Any], message: str, kind: type[Exception]
) -> None:
    values = np.ones((3, 3), np.float32)
    save_file({"a": values}, folder / "in")
    with pytest.raises(kind, match=message):
        apply_mask(folder / "in", mask_of(folder, values, np.ones(9, bool), **changes), folder / "out")
    assert not (folder / "out").exists()


def test_masks_that_do_not_fit(folder: Path) -> None:
    values = np.ones((3, 3), np.float32)
    save_file({"other": values}, folder / "other")
    save_file({"a": values}, folder / "in")
    good = mask_of(folder, values, np.ones(9, bool))
    with pytest.raises(SpecError, match="none of this name"):
        apply_mask(folder / "other", good, folder / "out")
    padding = np.ones(9, bool), np.zeros(6, bool), np.ones(1, bool)
    with pytest.raises(FormatError, match="behind the last element are set"):
        apply_mask(folder / "in", mask_of(folder, values, np.concatenate(padding)), folder / "out")
    with pytest.raises(FormatError, match="cannot be the mask of 9 elements"):
        apply_mask(folder / "in", mask_of(folder, values, np.ones(17, bool)), folder / "out")
    with pytest.raises(FormatError, match="no mask file"):
        apply_mask(folder / "in", folder / "other", folder / "out")
    good = mask_of(folder, values, np.ones(9, bool))
    with pytest.raises(SpecError, match="belongs to the mask"):
        apply_mask(folder / "in", good, good, force=True)
    with pytest.raises(SpecError, match="is the input"):
        apply_mask(folder / "in", good, folder / "in", force=True)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("order", ["C", "F"])
def test_other_formats_and_orders_of_axes(folder: Path, order: Any) -> None:
    """A mask counts the elements as they are stored, so it is refused where they lie in another order."""
    values = np.asarray(np.random.default_rng(4).normal(size=(8, 8)), np.float32, order=order)
    np.savez(folder / "in.npz", a=values, b=np.ones(3))
    prune_file(folder / "in.npz", folder / "out.npz", recipe("2:4"), mask_out=folder / "mask")
    apply_mask(folder / "in.npz", folder / "mask", folder / "again.npz")
    assert (folder / "again.npz").read_bytes() == (folder / "out.npz").read_bytes()
    save_file({"a": np.ascontiguousarray(values)}, folder / "in.safetensors")
    if order == "C":
        apply_mask(folder / "in.safetensors", folder / "mask", folder / "other.safetensors")
        with np.load(folder / "out.npz") as pruned:
            np.testing.assert_array_equal(load_file(folder / "other.safetensors")["a"], pruned["a"])
    else:
        with pytest.raises(SpecError, match="Fortran order"):
            apply_mask(folder / "in.safetensors", folder / "mask", folder / "other.safetensors")


# --- every fault ---------------------------------------------------------------------------------


CALLS = ("open", "write", "pwrite", "preadv", "pread", "fsync", "close", "link")


def failing_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], bool]:
    """Make the `number`-th call to the system fail; tell whether it came to that."""
    calls = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if name == "close":
                    real(*arguments)
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, failing)

    for name in CALLS:
        wrap(name)
    return lambda: calls >= number


@pytest.mark.parametrize("command", ["prune", "apply-mask", "export"])
def test_case86_every_call_may_fail(folder: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The N-th call fails, for N = 1, 2, 3, ... until a run meets no fault: a whole output or none, and code 3."""
    save_file({"a": np.arange(1, 97, dtype=np.float32).reshape(4, 24), "b": np.ones(3, np.int8)}, folder / "in")
    given: dict[str, list[str]] = {
        "prune": ["prune", "in", "-o", "out", "--pattern", "2:4", "--mask-out", "out.mask", "--quiet"],
        "apply-mask": ["apply-mask", "in", "mask", "-o", "out", "--quiet"],
        "export": ["export", "pruned", "--to", "bitmask", "--include", "a", "-o", "out", "--quiet"],
    }
    arguments = [
        str(folder / word) if word in ("in", "out", "mask", "out.mask", "pruned") else word for word in given[command]
    ]
    prune_file(folder / "in", folder / "pruned", recipe("2:4"), mask_out=folder / "mask")
    assert cli.main(arguments) == 0
    whole = {path.name: path.read_bytes() for path in folder.glob("out*")}
    for number in range(1, 200):
        for path in folder.glob("out*"):
            path.unlink()
        with pytest.MonkeyPatch.context() as patch:
            met = failing_at(patch, number)
            code = cli.main(arguments)
            if not met():
                break
        assert code == 3, capsys.readouterr().err
        assert not list(folder.glob(".*"))
        for path in folder.glob("out*"):
            assert path.read_bytes() == whole[path.name]
        assert command != "prune" or (folder / "out.mask").exists() or not (folder / "out").exists()
    assert 10 < number < 199
    assert code == 0


def test_case90_a_mask_has_the_mode_that_the_umask_leaves(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        prune_file(DATA, folder / "out", recipe("2:4"), mask_out=folder / "mask")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "mask").stat().st_mode) == 0o640


def test_the_command_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["prune", DATA, "-o", folder / "out", "--pattern", "2:4", "--mask-out", folder / "mask", "--quiet"]
    assert cli.main([str(word) for word in given]) == 0
    given = ["apply-mask", DATA, folder / "mask", "-o", folder / "again"]
    assert cli.main([str(word) for word in (*given, "--json")]) == 0
    lines = json.loads(capsys.readouterr().out)["tensors"]
    assert {line["name"]: line["dropped"] for line in lines}["conv2.weight"] == 12288
    assert cli.main([str(word) for word in given]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main([str(word) for word in (*given, "--force")]) == 0
    assert "12288" in capsys.readouterr().out
    assert (folder / "again").read_bytes() == (folder / "out").read_bytes()


# --- the writer of new safetensors files ---------------------------------------------------------


def write(path: Path, values: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    tensors = [Tensor(name, value.dtype.name, value.shape, value.nbytes) for name, value in values.items()]
    with create(Target.of(path, force=False), tensors, metadata or {}) as file:
        for name, value in reversed(values.items()):
            raw = value.tobytes()
            for start in range(0, len(raw), 7):
                file.append(name, memoryview(raw[start : start + 7]))


def test_the_package_reads_what_is_written(folder: Path) -> None:
    rng = np.random.default_rng(3)
    dtypes = [np.bool_, np.int8, np.uint16, np.int64, np.complex64, *FLOATS]
    values = {f"t{i}": rng.integers(0, 2, size=(i % 3, 5)).astype(dtype) for i, dtype in enumerate(dtypes)}
    values |= {"": np.ones((), np.float32), "\u00e9\n": np.ones(3, np.int8)}
    write(folder / "out", values, {"b": "2", "a": "\u00e9"})
    with safetensors.safe_open(folder / "out", "np") as file:
        assert file.metadata() == {"a": "\u00e9", "b": "2"}
        assert set(file.keys()) == set(values)
        for name, value in values.items():
            assert file.get_slice(name).get_shape() == list(value.shape)
    content = (folder / "out").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert list(header) == sorted(header)
    for name, value in values.items():
        start, end = header[name]["data_offsets"]
        assert start % value.itemsize == 0
        assert content[8 + length + start : 8 + length + end] == value.tobytes()


def test_what_cannot_be_written(folder: Path) -> None:
    """Case 61, case 62: names that the format cannot hold."""
    one = Tensor("a", "float32", (2,), 8)
    place = Target.of(folder / "out", force=False)
    for tensors, message in (
        ([one, one], "a name once"),
        ([Tensor("__metadata__", "float32", (2,), 8)], "a name once"),
        ([Tensor("\ud800", "float32", (2,), 8)], "surrogate"),
        ([Tensor("a", "int3", (2,), 8)], "no dtype int3"),
    ):
        with pytest.raises(FormatError, match=message), create(place, tensors, {}):
            pass
    with pytest.raises(FormatError, match="lacks 4 bytes"), create(place, [one], {}) as file:
        file.append("a", memoryview(bytes(4)))
    with pytest.raises(FormatError, match="more bytes"), create(place, [one], {}) as file:
        file.append("a", memoryview(bytes(9)))
    assert not list(folder.iterdir())
