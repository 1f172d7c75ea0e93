"""What ``npscope`` promises: right bytes out, the input untouched, an output whole or absent, one line and one code.

Most tests call the command in this process; those about signals, pipes and imports start it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from files import contents, save_onnx, save_sharded, small
from rich.cells import cell_len
from safetensors.numpy import load_file, save_file

import npscope
from npscope import cli
from npscope.cli import app, report
from npscope.cli.table import text_table
from npscope.errors import SpecError
from npscope.options import thread_count
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Skip
from npscope.recipes.recipe import Recipe
from npscope.streaming import dropping, limits, pruning, slabs, verification
from npscope.weights import output
from npscope.weights.output import hidden_name

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(text: str) -> None:
            raise AssertionError(f"{text} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Result:
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which no temporary file may be left."""
    yield tmp_path
    assert not [path.name for path in tmp_path.iterdir() if "npscope" in path.name]


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "npscope", *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def header_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def bytes_of(path: Path, name: str) -> bytes:
    """The bytes of a tensor, also of dtypes that the safetensors package cannot load into NumPy."""
    header = header_of(path)
    begin, end = json.loads(header[8:])[name]["data_offsets"]
    return path.read_bytes()[len(header) + begin : len(header) + end]


def is_one_line(result: Result) -> bool:
    return result.err.startswith("npscope: error: ") and result.err.count("\n") == 1


# --- the oracle ----------------------------------------------------------------------------------


def pruned_rows(rows: np.ndarray, keep: int) -> np.ndarray:
    """Each row (scope, block, element) with its `keep` largest blocks, the first of equals."""
    wide = rows.astype(np.float64)
    norms = np.sqrt((wide * wide).sum(-1))
    if rows.dtype.itemsize < 8:
        norms = norms.astype(np.float32)
    order = np.argsort(-norms, axis=-1, kind="stable")
    result = np.zeros_like(rows)
    for row, kept in enumerate(order[:, :keep]):
        result[row, kept] = rows[row, kept]
    return result


def two_of_four(weight: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(weight, axis, -1)
    rows = np.ascontiguousarray(moved).reshape(-1, 4, 1)
    return np.moveaxis(pruned_rows(rows, 2).reshape(moved.shape), -1, axis)


def tiles(matrix: np.ndarray, size: tuple[int, int], keep: int) -> np.ndarray:
    rows, columns = matrix.shape[0] // size[0], matrix.shape[1] // size[1]
    cut = matrix.reshape(rows, size[0], columns, size[1]).transpose(0, 2, 1, 3)
    pruned = pruned_rows(np.ascontiguousarray(cut).reshape(1, rows * columns, -1), keep)
    return pruned.reshape(rows, columns, *size).transpose(0, 2, 1, 3).reshape(matrix.shape)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- right bytes ---------------------------------------------------------------------------------


def test_two_of_four_on_a_real_model(run: Run, folder: Path) -> None:
    out = folder / "out.safetensors"
    assert run("prune", DATA, "-o", out, "--pattern", "2:4").code == 0
    assert header_of(out) == header_of(DATA)
    before, after = load_file(DATA), load_file(out)
    meant = {"conv2.weight", "conv3.weight", "conv4.weight", "final_conv.weight"}
    meant |= {"lstm_cell.weight_ih", "lstm_cell.weight_hh"}
    for name, weight in before.items():
        expected = two_of_four(weight, 1) if name in meant else weight
        assert same_bytes(after[name], expected), name


@pytest.mark.parametrize("axis", ["fan-in", "last", "0", "-2"])
def test_axes(run: Run, folder: Path, axis: str) -> None:
    weight = np.random.default_rng(1).normal(size=(8, 12, 4, 4)).astype(np.float32)
    save_file({"conv": weight}, folder / "in")
    assert run("prune", folder / "in", "-o", folder / "out", "--pattern", "2:4", "--axis", axis).code == 0
    if axis == "fan-in":
        expected = two_of_four(weight.reshape(8, -1), 1).reshape(weight.shape)
    else:
        expected = two_of_four(weight, {"last": 3, "0": 0, "-2": 2}[axis])
    assert same_bytes(load_file(folder / "out")["conv"], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_every_floating_dtype(run: Run, folder: Path, dtype: Any) -> None:
    values = np.random.default_rng(2).normal(size=(16, 24)).astype(dtype)
    save_file({"a": values, "b": values[:8]}, folder / "in")
    assert run("prune", folder / "in", "-o", folder / "out", "--pattern", "2:4", "--include", "a").code == 0
    assert bytes_of(folder / "out", "a") == two_of_four(values, 1).tobytes()
    assert bytes_of(folder / "out", "b") == values[:8].tobytes()


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("layout", ["out-in", "in-out"])
def test_tiles_of_a_matrix(run: Run, folder: Path, dtype: Any, layout: str) -> None:
    values = np.random.default_rng(3).normal(size=(24, 40)).astype(dtype)
    save_file({"a": values}, folder / "in")
    given = ("--pattern", "4x2@0.29", "--layout", layout)
    assert run("prune", folder / "in", "-o", folder / "out", *given).code == 0
    if layout == "out-in":
        expected = tiles(values, (4, 2), 120 - 34)
    else:
        expected = tiles(values.T, (4, 2), 120 - 34).T
    assert same_bytes(load_file(folder / "out")["a"], np.ascontiguousarray(expected))


@pytest.mark.parametrize("pattern", ["4:4", "1x1@0", "block=1x3 scope=2x2 keep=4", "4x1@0.000"])
def test_case65_pruning_nothing_gives_the_same_file(run: Run, folder: Path, pattern: str) -> None:
    out = folder / "out"
    assert run("prune", DATA, "-o", out, "--pattern", pattern, "--include", "*conv*.weight").code == 0
    assert out.read_bytes() == DATA.read_bytes()


def test_kept_bits_and_zeros(run: Run, folder: Path) -> None:
    """Case 28, case 32: a kept -0.0 or subnormal stays as it is, and what is dropped is +0.0."""
    values = np.asarray([[-0.0, -1e-45, -5.0, -4.0], [-0.0, -0.0, 1e-45, 0.0]], np.float32)
    save_file({"a": values}, folder / "in")
    assert run("prune", folder / "in", "-o", folder / "out", "--pattern", "2:4").code == 0
    expected = np.asarray([[0.0, 0.0, -5.0, -4.0], [-0.0, 0.0, 1e-45, 0.0]], np.float32)
    assert same_bytes(load_file(folder / "out")["a"], expected)


PATTERNS = [
    ("2:4", "in"),
    ("2:4", "fan-in"),
    ("block=3 scope=2 keep=1", "last"),
    ("4x2@0.5", "in"),
    ("1x1@0.9", "in"),
    ("6@0.5", "last"),
    ("block=2x2 scope=-1x1 keep=3", "in"),
    ("block=1x2 scope=1x-1 sparsity=0.7 ord=1", "in"),
    ("block=4x-1 scope=3x1 keep=1 ord=inf", "in"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize(("pattern", "axis"), PATTERNS)
def test_slabs_and_passes_do_not_change_the_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, axis: Any, layout: Any
) -> None:
    """Case 75: tiny slabs, limits that are searched first, and searches that can gather and count little."""
    rng = np.random.default_rng(4)
    weights = {
        "linear": rng.normal(size=(24, 36)),
        "ties": rng.integers(-2, 3, size=(36, 24)),
        "conv": rng.normal(size=(12, 12, 12)),
        "stack": rng.normal(size=(24, 12, 24)),
        "one": rng.normal(size=(1, 12, 1, 12)),
    }
    save_file({name: weight.astype(np.float32) for name, weight in weights.items()}, folder / "in")
    recipe = Recipe.shorthand(Pattern.parse(pattern), axis=axis, layout=layout)
    whole = pruning.prune_file(folder / "in", folder / "whole", recipe)
    for module in (slabs, dropping, limits):
        if hasattr(module, "SLAB_BYTES"):
            monkeypatch.setattr(module, "SLAB_BYTES", 1000)
    small = pruning.prune_file(folder / "in", folder / "slabs", recipe)
    monkeypatch.setattr(dropping, "SCOPE_BYTES", 0)
    two = pruning.prune_file(folder / "in", folder / "passes", recipe)
    monkeypatch.setattr(dropping, "SCOPE_BYTES", 400)
    monkeypatch.setattr(limits, "GATHER", 20)
    monkeypatch.setattr(limits, "BINS", 64)
    monkeypatch.setattr(limits, "PIECES", 3)
    monkeypatch.setattr(limits, "PIECE_BYTES", 64)
    poor = pruning.prune_file(folder / "in", folder / "poor", recipe)
    expected = (folder / "whole").read_bytes()
    assert expected == (folder / "slabs").read_bytes() == (folder / "passes").read_bytes()
    assert expected == (folder / "poor").read_bytes()
    assert expected != (folder / "in").read_bytes()
    for one, *others in zip(whole, small, two, poor, strict=True):
        for other in others:
            if isinstance(one, Skip):
                assert one == other
            else:
                assert isinstance(other, pruning.Outcome)
                assert (other.zeros_before, other.zeros_after) == (one.zeros_before, one.zeros_after)
                assert other.blocks_kept == one.blocks_kept
                assert other.norm_kept == pytest.approx(one.norm_kept, rel=1e-6)


@pytest.mark.parametrize("limit", [1, 7, 64, 1000, 10**9])
@pytest.mark.parametrize("most", [0, 10, 10**9])
@pytest.mark.parametrize(
    ("shape", "period"),
    [((6, 4, 5), (2, 2, 1)), ((6, 4, 5), (1, 4, 5)), ((1, 8), (1, 2)), ((12,), (3,)), ((2, 3), (2, 3))],
)
def test_boxes_cover_an_array_once_in_order(
    shape: tuple[int, ...], period: tuple[int, ...], most: int, limit: int
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape)
    seen: list[int] = []
    smallest = slabs.smallest_slab(shape, period)
    for box in slabs.boxes(shape, period, limit, most):
        part = values[box]
        assert smallest > most or all(length % size == 0 for length, size in zip(part.shape, period, strict=True))
        assert part.size <= (limit if smallest > most else max(limit, smallest))
        seen.extend(part.ravel())
    assert seen == list(range(values.size))


@pytest.mark.parametrize("limit", [1, 7, 20, 64, 1000])
@pytest.mark.parametrize("region", [((0, 6), (0, 4), (0, 5)), ((2, 6), (2, 4), (1, 3))])
def test_tiles_cover_a_region_in_whole_periods(region: tuple[tuple[int, int], ...], limit: int) -> None:
    values, period = np.arange(120).reshape(6, 4, 5), (2, 2, 1)
    parts = [values[box] for box in slabs.tiles(tuple(slice(*side) for side in region), period, limit)]
    wanted = values[tuple(slice(*side) for side in region)]
    assert sorted(np.concatenate([part.ravel() for part in parts])) == sorted(wanted.ravel())
    assert all(length % size == 0 for part in parts for length, size in zip(part.shape, period, strict=True))
    assert max(part.size for part in parts) <= max(limit, 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_zeros_and_nans_are_counted_whatever_their_bits(dtype: Any) -> None:
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    patterns = np.arange(1 << 16, dtype=np.uint64) << (8 * max(bits.itemsize - 2, 0))
    values = patterns.astype(bits).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = int((values == 0).sum()), int((values != values).sum())
    assert slabs.count_zeros_and_nans(values) == expected


# --- NaN -----------------------------------------------------------------------------------------


def with_nan(folder: Path) -> Path:
    values = np.asarray([[1, np.nan, 3, 2], [np.nan, np.nan, np.nan, np.inf]], np.float32)
    save_file({"a": values, "b": np.ones((4, 4), np.float32)}, folder / "in")
    return folder / "in"


def test_case25_nan_is_refused_with_its_count(run: Run, folder: Path) -> None:
    result = run("prune", with_nan(folder), "-o", folder / "out", "--pattern", "2:4")
    assert result.code == 2
    assert is_one_line(result)
    assert "tensor 'a' holds 4 NaN of 8 values" in result.err
    assert not (folder / "out").exists()


def test_case25_nan_is_kept_when_asked(run: Run, folder: Path) -> None:
    result = run("prune", with_nan(folder), "-o", folder / "out", "--pattern", "2:4", "--nan", "keep", "--json")
    assert result.code == 0
    expected = np.asarray([[0, np.nan, 3, 0], [np.nan, np.nan, 0, 0]], np.float32)
    np.testing.assert_array_equal(load_file(folder / "out")["a"], expected)
    assert [line["norm_kept"] for line in result.json["tensors"]] == [None, pytest.approx(0.5**0.5)]


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_norm_kept_is_told_also_where_squares_leave_float64(run: Run, folder: Path, scale: float) -> None:
    save_file({"a": np.asarray([[4.0, 1.0, 3.0, 0.0]]) * scale}, folder / "in")
    result = run("prune", folder / "in", "-o", folder / "out", "--pattern", "2:4", "--json")
    assert [line["norm_kept"] for line in result.json["tensors"]] == [pytest.approx((25 / 26) ** 0.5)]


def test_nan_in_a_tensor_left_alone_is_no_error(run: Run, folder: Path) -> None:
    source = with_nan(folder)
    assert run("prune", source, "-o", folder / "out", "--pattern", "2:4", "--exclude", "a").code == 0


# --- which output --------------------------------------------------------------------------------


def test_case89_an_existing_output_is_refused(run: Run, folder: Path) -> None:
    out = folder / "out"
    out.write_text("precious")
    result = run("prune", DATA, "-o", out, "--pattern", "2:4")
    assert result.code == 2
    assert is_one_line(result)
    assert "--force" in result.err
    assert out.read_text() == "precious"


def test_case90_force_replaces_and_keeps_the_mode(run: Run, folder: Path) -> None:
    out = folder / "out"
    out.write_text("old")
    out.chmod(0o640)
    assert run("prune", DATA, "-o", out, "--pattern", "2:4", "--force").code == 0
    assert header_of(out) == header_of(DATA)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


def test_case90_a_new_file_has_the_mode_that_the_umask_leaves(run: Run, folder: Path) -> None:
    before = os.umask(0o027)
    try:
        assert run("prune", DATA, "-o", folder / "out", "--pattern", "2:4").code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "out").stat().st_mode) == 0o640


@pytest.mark.parametrize("force", [False, True])
def test_case89_an_output_that_appears_meanwhile(folder: Path, force: bool) -> None:
    out = folder / "out"

    def appear(done: int, total: int) -> None:
        out.write_text("precious")

    recipe = Recipe.shorthand(Pattern.parse("2:4"))
    if force:
        pruning.prune_file(DATA, out, recipe, force=True, progress=appear)
        assert header_of(out) == header_of(DATA)
    else:
        with pytest.raises(SpecError, match="exists"):
            pruning.prune_file(DATA, out, recipe, progress=appear)
        assert out.read_text() == "precious"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*paths: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    recipe = Recipe.shorthand(Pattern.parse("2:4"))
    pruning.prune_file(DATA, folder / "out", recipe)
    assert header_of(folder / "out") == header_of(DATA)
    with pytest.raises(SpecError, match="exists"):
        pruning.prune_file(DATA, folder / "new", recipe, progress=lambda done, total: (folder / "new").touch())
    assert not (folder / "new").read_bytes()


@pytest.mark.parametrize("how", ["same", "dotted", "symlink", "hardlink"])
def test_case88_the_input_is_never_the_output(run: Run, folder: Path, how: str) -> None:
    source, out = folder / "in", folder / "link"
    source.write_bytes(DATA.read_bytes())
    if how == "symlink":
        out.symlink_to(source)
    elif how == "hardlink":
        out.hardlink_to(source)
    else:
        out = source if how == "same" else folder / "." / "in"
    result = run("prune", source, "-o", out, "--pattern", "2:4", "--force")
    assert result.code == 2
    assert "is the input" in result.err
    assert source.read_bytes() == DATA.read_bytes()


def test_case87_a_symlink_is_followed_and_kept(run: Run, folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    link = folder / "out"
    link.symlink_to(folder / "elsewhere" / "real")
    assert run("prune", DATA, "-o", link, "--pattern", "2:4").code == 0
    assert link.is_symlink()
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["real"]
    assert run("prune", DATA, "-o", link, "--pattern", "2:4").code == 2
    assert run("prune", DATA, "-o", link, "--pattern", "2:4", "--force").code == 0
    assert link.is_symlink()


def test_case87_bad_places_for_an_output(run: Run, folder: Path) -> None:
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    for out, code in (
        (folder / "missing" / "out", 3),
        (DATA / "out", 3),
        (folder / "directory", 2),
        (folder / "fifo", 2),
        ("/dev/null", 2),
    ):
        result = run("prune", DATA, "-o", out, "--pattern", "2:4", "--force")
        assert result.code == code, result.err
        assert is_one_line(result)


def test_case80_long_and_strange_names(run: Run, folder: Path) -> None:
    for name in ("x" * 255, os.fsdecode(b"\xff\xfe spaced \x1b[31m"), "-o"):
        assert run("prune", DATA, "-o", folder / name, "--pattern", "2:4").code == 0
        result = run("prune", DATA, "-o", folder / name, "--pattern", "2:4")
        assert result.code == 2
        assert is_one_line(result)
        assert "\x1b" not in result.err
    assert run("prune", DATA, "-o", folder / ("x" * 256), "--pattern", "2:4").code == 3


def test_dry_run_writes_nothing_and_reports_the_same(run: Run, folder: Path) -> None:
    dry = run("prune", DATA, "-o", folder / "out", "--pattern", "2:4", "--dry-run", "--json")
    assert dry.code == 0
    assert not list(folder.iterdir())
    wet = run("prune", DATA, "-o", folder / "out", "--pattern", "2:4", "--json")
    assert dry.json["tensors"] == wet.json["tensors"]
    assert run("prune", DATA, "--pattern", "2:4", "--dry-run").code == 0


# --- failures ------------------------------------------------------------------------------------


def test_case91_an_input_that_changes_is_an_error(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder / "in"
    source.write_bytes(DATA.read_bytes())

    def touched(*arguments: Any, **options: Any) -> Any:
        os.utime(source, ns=(0, 0))
        return real(*arguments, **options)

    real = npscope.keep_largest
    monkeypatch.setattr(dropping, "keep_largest", touched)
    result = run("prune", source, "-o", folder / "out", "--pattern", "2:4")
    assert result.code == 3
    assert "was changed" in result.err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("copy_file_range", 1),
        ("write", 1),  # where no file system copies by itself
        ("pwrite", 1),
        ("pwrite", 2),
        ("pwrite", 6),  # the last
        ("preadv", 1),
        ("preadv", 7),
        ("fsync", 1),
        ("close", 2),  # of the file, while it is locked
        ("link", 1),
        ("fsync", 2),  # of the folder, when the file is in place
        ("close", 4),
    ],
)
def test_case85_a_full_disk_leaves_nothing(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    if not hasattr(os, call):
        pytest.skip(f"this system has no {call}")
    real, calls = getattr(os, call), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*arguments) if call == "close" or calls != number else None
        if calls == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return result

    with monkeypatch.context() as patch:
        if call == "write":
            patch.delattr(os, "copy_file_range", raising=False)
        patch.setattr(os, call, failing)
        result = run("prune", DATA, "-o", folder / "out", "--pattern", "2:4")
    assert calls >= number
    assert result.code == 3
    assert is_one_line(result)
    assert "No space left" in result.err
    in_place = (call, number) in (("fsync", 2), ("close", 4))
    assert (folder / "out").exists() == in_place
    assert not in_place or header_of(folder / "out") == header_of(DATA)


def test_case76_out_of_memory(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(dropping, "keep_largest", full)
    result = run("prune", DATA, "-o", folder / "out", "--pattern", "2:4", "--json")
    assert result.code == 3
    assert result.json["error"] == {"kind": "MemoryError", "message": "out of memory", "exit_code": 3}
    assert not (folder / "out").exists()


SLOW = """
import sys, time
import npscope
from npscope import cli
from npscope.streaming import dropping
def slow(*arguments, **options):
    time.sleep(60)
dropping.keep_largest = slow
sys.exit(cli.main())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_case83_a_signal_removes_the_temporary_file(folder: Path, name: str) -> None:
    number = signal.Signals[name]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "prune", DATA, "-o", folder / "out", "--pattern", "2:4"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    (temporary,) = folder.iterdir()
    assert temporary.name.startswith(".out.npscope-")
    assert temporary.name.endswith(".tmp")
    sent = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert process.returncode == 128 + number
    assert err == ""
    assert not list(folder.iterdir())


@pytest.mark.parametrize("pause", [0.01, 0])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_whose_exception_python_ignores_is_not_lost(folder: Path, name: str, pause: float) -> None:
    """Such as one in the callback that drops the lock of a module which was imported.

    It may come again before Python has said that it ignored it.
    """
    ignored = f"""
import os, signal, weakref
from npscope.cli import running
running.RAISED_AGAIN_S = {pause}
class Module: pass
def callback(reference):
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000): pass
module = Module()
reference = weakref.ref(module, callback)
"""
    code = SLOW.replace("    time.sleep(60)", "    globals().pop('module')\n    time.sleep(60)")
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", ignored + code, "prune", DATA, "-o", folder / "out", "--pattern", "2:4"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert time.monotonic() - start < 40
    assert process.returncode == 128 + signal.Signals[name]
    assert process.stderr == ""
    assert not list(folder.iterdir())


def test_ctrl_c_while_numba_is_imported_is_no_broken_numba(tmp_path: Path) -> None:
    """Python 3.11 raises a RuntimeError for one that comes while a class names its attributes."""
    broken = """
class Slow:
    def __set_name__(self, owner, name):
        raise KeyboardInterrupt
class Owner:
    slow = Slow()
"""
    (tmp_path / "numba.py").write_text(broken)
    process = subprocess.run(
        [sys.executable, "-c", "import numpy, npscope; npscope.block_norms(numpy.ones((2, 2)), (1, 1))"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "KeyboardInterrupt" in process.stderr.splitlines()  # Python 3.12 says in what class body, behind it
    assert "slow reference" not in process.stderr
    assert process.returncode != 0


def test_case84_a_closed_pipe_ends_quietly(folder: Path) -> None:
    for arguments in (["inspect", DATA], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        try:
            process = subprocess.run(
                [sys.executable, "-m", "npscope", *map(str, arguments)],
                stdout=write,
                stderr=subprocess.PIPE,
                timeout=60,
            )
        finally:
            os.close(write)
        assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_case80_a_full_standard_output(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "npscope", "inspect", DATA],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert process.returncode == 3
    assert "No space left" in process.stderr
    assert "Traceback" not in process.stderr


# --- exit codes and reports ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["paint"], 2, "paint"),
        (["prune"], 2, "required: IN"),
        (["prune", "--loud"], 2, "no such option: --loud"),
        (["prune", DATA, "--pattern"], 2, "--pattern"),
        (["prune", DATA, "--pattern", "2:4", "--loud"], 2, "--loud"),
        (["prune", DATA, "--pat", "2:4", "--dry-run"], 2, "no such option: --pat"),
        (["prune", DATA, "--pattern", "2:4", "--dry-run=no"], 2, "--dry-run"),
        (["prune", DATA, "--pattern", "2:4", "--layout", "sideways", "--dry-run"], 2, "'sideways' (choose from"),
        (["prune", DATA, "--pattern", "2:4", "--axis", "depth", "--dry-run"], 2, "axis 'depth'"),
        (["prune", DATA, "--pattern", "2:4"], 2, "no output"),
        (["prune", DATA, "--pattern", "5:4", "--dry-run"], 2, "cannot keep 5 of 4"),
        (["prune", DATA, "--pattern", "2:4", "--include", "nothing*", "--dry-run"], 2, "matches none"),
        (["prune", DATA, "--pattern", "2:4", "--strict", "--dry-run"], 2, "'conv1.weight' cannot take the pattern"),
        (["prune", DATA, "--pattern", "2:4096", "--dry-run"], 2, "nothing to prune in 15 tensors"),
        (["prune", "nowhere", "--pattern", "2:4", "--dry-run"], 3, "'nowhere': No such file"),
        (["prune", DATA, "--pattern", "2:4", "-o", "/x/y", "--mask-out", "/x/z"], 3, "does not exist"),
        (["verify", DATA], 2, "nothing says what to"),
        (["verify", DATA, "--pattern", "2:4096"], 2, "nothing to check in 15 tensors"),
        (["verify", DATA, "--pattern", "2:4", "--include", "nothing*"], 2, "matches none"),
        (["verify", DATA, "--pattern", "2:4", "--strict"], 2, "'conv1.weight' cannot take the pattern"),
        (["verify", "nowhere", "--pattern", "2:4"], 3, "'nowhere': No such file"),
        (["diff", DATA], 2, "required: B"),
        (["diff", DATA, "nowhere"], 3, "'nowhere': No such file"),
        (["apply-mask", DATA, "nowhere", "-o", "/x/y"], 3, "'nowhere': No such file"),
        (["apply-mask", DATA, DATA, "-o", "/x/y"], 3, "does not exist"),
        (["export", DATA], 2, "required: --to, -o/--output"),
        (["export", DATA, "--to", "coo", "-o", "/x/y"], 2, "'coo' (choose from"),
        (["bench", "--mib", "4097"], 2, "'4097' is not a whole number from 1 to 4096"),
        (["export", "nowhere", "--to", "csr", "-o", "/x/y"], 3, "'nowhere': No such file"),
        (["inspect", "nowhere"], 3, "No such file"),
        (["inspect", DATA, "nowhere"], 2, "nowhere"),
        (["inspect", DATA, "--max-bytes", "-1"], 2, "'-1' is not a whole number from 0"),
        (["inspect", __file__], 2, "header length"),
        (["inspect", Path(__file__).parent], 2, "not a regular file"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_failures_are_one_line_and_one_code(
    run: Run, arguments: list[object], code: int, message: str, as_json: bool
) -> None:
    result = run(*arguments[:1], *(["--json"] if as_json else []), *arguments[1:])
    assert result.code == code
    assert is_one_line(result)
    assert message in result.err
    assert bool(result.out) == as_json
    if as_json:
        assert result.json["error"]["exit_code"] == code
        assert message in result.json["error"]["message"]


def test_no_command_is_wrong_use(run: Run) -> None:
    assert run() == (2, "", "npscope: error: the following arguments are required: COMMAND (npscope --help)\n")


@pytest.mark.parametrize("value", ["-x.*", "-o", "--json", "--", "-1", "-", "="])
def test_the_value_of_an_option_may_be_any_word(run: Run, value: str) -> None:
    for given in (["--include", value], [f"--include={value}"], ["--include", "*", "--include", value]):
        result = run("prune", *given, DATA, "--pattern", "2:4", "--dry-run")
        assert result.code == 2
        assert f"--include {value!r} matches none" in result.err


def test_what_follows_two_dashes_is_a_file(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("-o", "--"):
        assert run("prune", DATA, "-o", name, "--pattern", "2:4").code == 0
    assert run("diff", "--quiet", "--", "-o", "--") == (0, "", "")
    assert "'--help': No such file" in run("inspect", "--", "--help").err


def test_the_version_and_the_short_option_for_help(run: Run) -> None:
    assert run("--version") == (0, f"npscope {npscope.__version__}\n", "")
    assert run("-h") == run("--help")
    assert run("verify", "-h") == run("verify", "--help")


@pytest.mark.parametrize("name", [None, *(job.__name__.replace("_", "-") for job, _ in app.COMMANDS)])
def test_help_fits_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    result = run(*([] if name is None else [name]), "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("usage: npscope ")
    assert max(map(len, result.out.splitlines())) < 60


def test_debug_shows_the_traceback(run: Run) -> None:
    result = run("inspect", "nowhere", "--debug")
    assert result.code == 3
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("npscope: error: ")


def test_an_unexpected_error_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropping, "keep_largest", lambda *arguments, **options: 1 / 0)
    result = run("prune", DATA, "--pattern", "2:4", "--dry-run")
    assert result.code == 3
    assert is_one_line(result)
    assert "ZeroDivisionError" in result.err


def test_windows_is_told_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    result = run("inspect", DATA)
    assert result.code == 2
    assert "not supported on Windows" in result.err


def test_the_report_counts_what_the_file_holds(run: Run, folder: Path) -> None:
    out = folder / "out"
    found = run("prune", DATA, "-o", out, "--pattern", "4x1@0.5", "--json").json
    after = load_file(out)
    assert (found["input"], found["output"], found["dry_run"]) == (str(DATA), str(out), False)
    lines = {line["name"]: line for line in found["tensors"]}
    assert lines.keys() == after.keys()
    for name, before in load_file(DATA).items():
        line, weight = lines[name], after[name]
        assert line["shape"] == list(weight.shape)
        if line["skipped"] is not None:
            assert same_bytes(before, weight)
            continue
        assert line["zeros_before"] == np.count_nonzero(before == 0)
        assert line["zeros_after"] == np.count_nonzero(weight == 0)
        assert line["blocks"] == weight.size // 4
        assert line["blocks_kept"] == line["blocks"] - line["blocks"] // 2
        shares = [np.linalg.norm(w.astype(np.float64)) for w in (weight, before)]
        assert line["norm_kept"] == pytest.approx(shares[0] / shares[1], rel=1e-6)
    pruned = [line for line in lines.values() if line["skipped"] is None]
    assert found["totals"] == {
        "tensors": 15,
        "pruned": len(pruned),
        "skipped": 15 - len(pruned),
        "misfits": 1,
        "elements": sum(line["elements"] for line in pruned),
        "zeros_before": sum(line["zeros_before"] for line in pruned),
        "zeros_after": sum(line["zeros_after"] for line in pruned),
        "sparsity": sum(line["zeros_after"] for line in pruned) / sum(line["elements"] for line in pruned),
    }


def test_the_table_says_what_was_done_and_why_not(run: Run) -> None:
    out = run("prune", DATA, "--pattern", "2:4", "--dry-run").out
    rows = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.strip()}
    assert rows["conv2.weight"].startswith(
        "conv2.weight float32 64x128x3 keep 2 of 4, axis 1 (in) 12288 of 24576 0.00 % 50.00 % 0.9"
    )
    assert "skipped: default skip *stft*" in rows["stft_conv.weight"]
    assert "skipped: axis 1 (in): size 129 is not a multiple of 4" in rows["conv1.weight"]
    assert rows["pruned"].startswith("pruned 6 of 15 tensors (1 could not take the pattern)")


def test_quiet_says_nothing(run: Run, folder: Path) -> None:
    assert run("prune", DATA, "-o", folder / "out", "--pattern", "2:4", "--quiet") == (0, "", "")


def test_inspect_finds_the_pattern_that_was_pruned(run: Run, folder: Path) -> None:
    for pattern, axis, expected in (("2:4", "in", "axis 1 (in)"), ("1:8", "fan-in", "fan-in")):
        out = folder / axis
        given = ("--pattern", pattern, "--axis", axis, "--include", "conv4.weight", "--include", "lstm_cell.weight_ih")
        assert run("prune", DATA, "-o", out, *given).code == 0
        lines = {line["name"]: line for line in run("inspect", out, "--json").json["tensors"]}
        found = lines["conv4.weight"]
        assert found["groups"][0] == {"keep": int(pattern[0]), "of": int(pattern[2]), "along": expected}
        assert found["zeros"] == np.count_nonzero(load_file(out)["conv4.weight"] == 0)
        assert lines["conv2.weight"]["groups"] == lines["conv2.weight"]["blocks"] == []
        assert f"keep {pattern[0]} of {pattern[2]}, {expected}" in run("inspect", out).out


def test_inspect_counts_and_lists_everything(run: Run, folder: Path) -> None:
    values = np.asarray([[0.0, -0.0, np.nan, 1.0]], np.float32)
    integers = {"q": np.asarray([[-128, 0, 127]], np.int8), "i": np.zeros((2, 3), np.int16)}
    save_file({"a": values, **integers, "e": np.zeros((0, 4), np.float16)}, folder / "in")
    found = run("inspect", folder / "in", "--json").json
    lines = {line["name"]: line for line in found["tensors"]}
    assert (lines["a"]["zeros"], lines["a"]["nans"], lines["a"]["sparsity"]) == (2, 1, 0.5)
    assert (lines["q"]["zeros"], lines["q"]["nans"]) == (1, 0)
    assert (lines["i"]["dtype"], lines["i"]["zeros"]) == ("int16", None)
    assert (lines["e"]["zeros"], lines["e"]["sparsity"]) == (0, None)
    assert found["totals"] == {"tensors": 4, "elements": 7, "zeros": 3, "nans": 1, "sparsity": 3 / 7}


def test_unstructured_zeros_are_no_pattern(run: Run, folder: Path) -> None:
    values = np.random.default_rng(5).normal(size=(64, 64)).astype(np.float32)
    values[:, 32:] = 0
    values[0] = 0
    save_file({"a": values}, folder / "in")
    assert run("inspect", folder / "in", "--json").json["tensors"][0]["groups"] == []


def test_case62_names_cannot_steer_the_terminal(run: Run, folder: Path) -> None:
    name = "\x1b[31m\x07[bold]\u202e\n../x"
    save_file({name: np.ones((4, 4), np.float32), "b" * 5000: np.ones(2, np.float32)}, folder / "in")
    for result in (
        run("inspect", folder / "in"),
        run("prune", folder / "in", "--pattern", "2:4", "--dry-run"),
        run("prune", folder / "in", "--pattern", "3:8", "--dry-run", "--strict"),
        run("inspect", folder / "in", "--json"),
    ):
        assert not set("\x1b\x07\u202e") & set(result.out + result.err)
    assert r"\x1b[31m\x07[bold]\u202e\n../x" in run("inspect", folder / "in").out
    assert run("inspect", folder / "in", "--json").json["tensors"][0]["name"] in (name, "b" * 5000)


def test_printable_leaves_ordinary_text_alone() -> None:
    assert report.printable("weights of größe 2") == "weights of größe 2"
    assert report.printable("a\ud800b\u2028") == r"a\ud800b\u2028"
    assert report.printable("x" * 10, limit=4) == "xxx\N{HORIZONTAL ELLIPSIS}"


def test_case98_any_environment_gives_the_same_bytes(run: Run, folder: Path) -> None:
    assert run("prune", DATA, "-o", folder / "here", "--pattern", "4x1@0.3").code == 0
    strange = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "TZ": "x"}
    process = command("prune", DATA, "-o", folder / "there", "--pattern", "4x1@0.3", env=strange)
    assert (process.returncode, process.stderr) == (0, "")
    assert (folder / "here").read_bytes() == (folder / "there").read_bytes()


def test_help_is_quick_and_needs_no_kernels() -> None:
    code = "import sys; from npscope.cli import main; c = main(['prune', '--help']); "
    code += "print(sorted(sys.modules)); sys.exit(c)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0
    assert "--pattern" in process.stdout
    loaded = process.stdout.splitlines()[-1]
    for module in ("numba", "ml_dtypes", "rich", "npscope.streaming.pruning"):
        assert f"'{module}'" not in loaded


def test_signal_handlers_are_put_back(run: Run) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert run("inspect", DATA).code == 0
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((8192, 16384), ("--pattern", "2:4")),
        ((8192, 16384), ("--pattern", "4x4@0.5")),
        ((8192, 16384), ("--pattern", "1x1@0.5", "--scores", "scores")),
        ((8, 4 << 20), ("--pattern", "2:4", "--layout", "in-out")),
        ((8, 4 << 20), ("--pattern", "4x4@0.5", "--mask-out", "mask")),
    ],
    ids=["2:4", "4x4", "float64 scores", "many scopes in wide rows", "blocks in wide rows, mask"],
)
def test_case75_memory_does_not_grow_with_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], options: Sequence[str]
) -> None:
    monkeypatch.chdir(folder)
    save_file({"a": np.ones(shape, np.float16 if shape[0] > 8 else np.float32)}, "in")
    if "--scores" in options:
        save_file({"a": np.ones(shape)}, "scores")

    def peak(*arguments: str) -> int:
        code = "import resource, sys; from npscope.cli import main; c = main(); "
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(c)"
        process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return int(process.stderr.split()[-1]) * (1 if sys.platform == "darwin" else 1024)

    assert peak("prune", "in", "-o", "out", *options) - peak("--help") < 256 << 20


def test_a_report_is_a_file_of_what_json_says(run: Run, folder: Path) -> None:
    given = ("prune", DATA, "--pattern", "2:4", "--report", folder / "report.json")
    said = run(*given, "-o", folder / "out", "--json")
    assert said.code == 0
    assert (folder / "report.json").read_text() == said.out
    assert is_one_line(run(*given, "-o", folder / "other"))
    assert not (folder / "other").exists()  # refused before there is anything to tell
    assert run(*given, "--dry-run", "--force", "--quiet").out == ""
    assert json.loads((folder / "report.json").read_text())["dry_run"] is True


def test_a_report_has_a_place_of_its_own(run: Run, folder: Path) -> None:
    """Case 88."""
    source = folder / "in"
    source.write_bytes(DATA.read_bytes())
    given = ("prune", source, "-o", folder / "out", "--mask-out", folder / "mask", "--pattern", "2:4", "--force")
    for place, message in ((source, "the input"), (folder / "out", "the output"), (folder / "mask", "the mask")):
        result = run(*given, "--report", place)
        assert (result.code, is_one_line(result)) == (2, True)
        assert message in result.err
    assert source.read_bytes() == DATA.read_bytes()
    assert os.listdir(folder) == ["in"]


def test_a_report_that_cannot_be_is_no_work_for_nothing(run: Run, folder: Path) -> None:
    given = ("prune", DATA, "-o", folder / "out", "--pattern", "2:4", "--report", folder / "report")
    hidden = folder / hidden_name("report", "new.tmp")
    hidden.mkdir()
    result = run(*given)
    hidden.rmdir()
    assert (result.code, is_one_line(result)) == (3, True)
    assert os.listdir(folder) == []


def test_an_error_behind_the_output_says_that_it_is_complete(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(temporary: str, target: output.Target, real: Callable[..., None] = output.publish) -> None:
        if target.path.endswith("report"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(temporary, target)

    given = ("prune", DATA, "--pattern", "2:4", "--quiet")
    assert run(*given, "-o", folder / "whole").code == 0
    monkeypatch.setattr(output, "publish", full)
    result = run(*given, "-o", folder / "out", "--report", folder / "report")
    assert (result.code, is_one_line(result)) == (3, True)
    assert f"{str(folder / 'out')!r} is complete, but not the report" in result.err
    assert (folder / "out").read_bytes() == (folder / "whole").read_bytes()
    assert "complete" not in run(*given, "--dry-run", "--report", folder / "report").err
    assert sorted(os.listdir(folder)) == ["out", "whole"]


def sharded_and_onnx(folder: Path) -> None:
    """Two models of many files, and a recipe that ranks by scores in many."""
    save_sharded(folder / "model", small(), shards=3)
    (folder / "model" / "config.json").write_text("{}")
    save_onnx(folder / "onnx", small())
    scores = {name: np.abs(weight) for name, weight in small().items() if weight.dtype.kind == "f"}
    save_sharded(folder / "scores", scores)
    rule = '[[rule]]\nmatch = "a.weight"\npattern = "2:4"\nscores = "scores"\n'
    (folder / "recipe.toml").write_text(rule)
    for name in ("out", "onnx-out"):
        (folder / name).mkdir()


@pytest.mark.parametrize("option", ["--mask-out", "--report"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("place", "belongs_to"),
    [
        ("model/model-00001-of-00003.safetensors", "input"),
        ("model/model.safetensors.index.json", "input"),
        ("model/config.json", "input"),
        ("model/mask.safetensors", "input"),
        ("link/mask", "input"),
        ("recipe.toml", "recipe"),
        ("scores/model-00001-of-00002.safetensors", "scores"),
        ("out/mask", "output"),
    ],
)
def test_case88_a_mask_or_report_is_no_part_of_a_model(
    run: Run, folder: Path, option: str, in_place: bool, place: str, belongs_to: str
) -> None:
    sharded_and_onnx(folder)
    (folder / "link").symlink_to("model")
    before = contents(folder)
    where = ("--in-place",) if in_place else ("-o", folder / "out")
    for source in ("model", "model/model.safetensors.index.json"):
        given = ("prune", folder / source, *where, "-r", folder / "recipe.toml", "--force")
        result = run(*given, option, folder / place)
        if belongs_to == "output" and in_place:
            assert result.code == 0
            continue
        assert (result.code, is_one_line(result)) == (2, True)
        assert f"belongs to the {belongs_to}" in result.err
        assert contents(folder) == before


@pytest.mark.parametrize("option", ["--mask-out", "--report"])
@pytest.mark.parametrize(
    ("place", "belongs_to"), [("onnx/data", "input"), ("onnx/m.onnx", "input"), ("onnx-out/data", "output")]
)
def test_case88_a_mask_or_report_is_no_data_of_a_model(
    run: Run, folder: Path, option: str, place: str, belongs_to: str
) -> None:
    sharded_and_onnx(folder)
    before = contents(folder)
    given = ("prune", folder / "onnx" / "m.onnx", "-o", folder / "onnx-out" / "m.onnx", "--pattern", "2:4", "--force")
    result = run(*given, option, folder / place)
    assert (result.code, is_one_line(result)) == (2, True)
    assert f"belongs to the {belongs_to}" in result.err
    assert contents(folder) == before


def test_case88_nothing_is_exported_into_a_model(run: Run, folder: Path) -> None:
    sharded_and_onnx(folder)
    before = contents(folder)
    place = folder / "model" / "model-00001-of-00003.safetensors"
    result = run("export", folder / "model", "--to", "bitmask", "-o", place, "--force")
    assert (result.code, is_one_line(result)) == (2, True)
    assert contents(folder) == before


@pytest.mark.parametrize("command", ["prune", "verify"])
def test_threads_are_counted(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    seen: list[int] = []
    real = {"prune": pruning.prune_file, "verify": verification.verify_file}[command]

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(thread_count())
        return real(*arguments, **options)

    monkeypatch.setattr(pruning if command == "prune" else verification, real.__name__, spy)
    more = ("-o", folder / "out") if command == "prune" else ()
    assert run(command, DATA, "--pattern", "2:4", *more, "-j", "3", "--quiet").code in (0, 1)
    assert seen == [3]
    for bad in ("0", "-1", "many", "2000"):
        result = run(command, DATA, "--pattern", "2:4", *more, "--threads", bad)
        assert (result.code, is_one_line(result)) == (2, True), result


WIDE = "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 30


@pytest.mark.parametrize("width", [20, 40, 79, 200])
@pytest.mark.parametrize(
    "name", ["w", "a.very.long.name." * 6, WIDE, "[red] of two words", "e\N{COMBINING ACUTE ACCENT}" * 40]
)
def test_a_table_fits_the_terminal_and_loses_nothing(width: int, name: str) -> None:
    row = (name, "float32", "keep 2 of 4, axis 1 (in)")
    text = text_table(("tensor", "dtype", "pattern"), [row, ("b", "", "last")], width)
    assert max(map(cell_len, text.splitlines())) <= width
    body = text[text.rindex("---") + 3 :]
    shown = Counter("".join(body.split()))
    assert shown == Counter("".join("".join((*row, "blast")).split()))


@pytest.mark.parametrize(
    "cell", ["a.very.long.name." * 6, WIDE, "x  y of  two spaces", "x \N{COMBINING ACUTE ACCENT} y", ""]
)
def test_a_folded_cell_reads_on(cell: str) -> None:
    for width in range(2, 40):
        _, rule, *lines = text_table(("t",), [(cell,)], width).splitlines()
        assert "".join(lines).replace(" ", "") == cell.replace(" ", "")
        assert max(map(cell_len, lines)) <= len(rule) <= width
        assert "" not in lines[1:]


def test_a_mask_file_without_tensors_is_a_report_without_lines(run: Run, folder: Path) -> None:
    save_file({}, folder / "none", metadata={"npscope.mask": "1", "recipe": "0" * 64, "tensors": "{}"})
    result = run("apply-mask", DATA, folder / "none", "-o", folder / "out")
    assert (result.code, result.err) == (0, "")
    assert (folder / "out").read_bytes() == DATA.read_bytes()


def test_columns_stand_below_each_other_whatever_the_width_of_characters() -> None:
    lines = text_table(("tensor", "dtype"), [(WIDE, "int8"), ("w", "int8")]).splitlines()
    begin = lines[0].index("dtype")
    assert [cell_len(line[: line.index("int8")]) for line in lines[2:]] == [begin, begin]


def test_many_tensors_cost_a_table_little() -> None:
    rows = [(f"layers.{i}.weight", "bfloat16", "4096x4096", "keep 2 of 4, axis 1 (in)", "holds") for i in range(2000)]
    start = time.process_time()
    text_table(("tensor", "dtype", "shape", "pattern", "found"), rows, 200)
    assert time.process_time() - start < 0.5
