"""`npscope verify` and `inspect` against plain loops: what holds in a file, where it does not, what is detected."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from npscope import cli, config
from npscope.errors import SpecError
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Budget, Plan, Skip
from npscope.recipes.recipe import Recipe, resolve
from npscope.streaming import occupancy, verification
from npscope.streaming.inspection import Blocks, Groups, inspect_file
from npscope.streaming.pruning import prune_file
from npscope.streaming.verification import Checked, CheckedBudget, Offence, verify, verify_file
from npscope.weights import open_weights

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"
FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


# --- the oracle ----------------------------------------------------------------------------------


def offences(plan: Plan, stored: np.ndarray) -> list[Offence]:
    """Every scope with too many blocks in use, in canonical order, by plain loops."""
    values = stored.reshape(plan.shape).transpose(plan.order)
    places = np.arange(stored.size).reshape(plan.shape).transpose(plan.order)
    grid = [n // size for n, size in zip(values.shape, plan.block, strict=True)]
    found = []
    for scope in itertools.product(*(range(n // count) for n, count in zip(grid, plan.scope, strict=True))):
        used = 0
        for inside in itertools.product(*map(range, plan.scope)):
            block = [s * count + i for s, count, i in zip(scope, plan.scope, inside, strict=True)]
            part = values[tuple(slice(b * n, b * n + n) for b, n in zip(block, plan.block, strict=True))]
            used += any(not x == 0 for x in part.ravel().astype(np.float64))  # noqa: SIM201 - NaN is in use
        if used > plan.keep:
            corner = tuple(s * count * n for s, count, n in zip(scope, plan.scope, plan.block, strict=True))
            start = np.unravel_index(places[corner], stored.shape)
            found.append(Offence(scope, tuple(map(int, start)), used))
    return found


def plan_of(path: Path, recipe: Recipe) -> Plan:
    with open_weights(path) as weights:
        (plan,) = resolve(recipe, weights.tensors.values())
    assert isinstance(plan, Plan)
    return plan


def check(path: Path, recipe: Recipe) -> Checked:
    (verdict,) = verify_file(path, recipe)
    assert isinstance(verdict, Checked)
    return verdict


def sparse(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Half of the values in use; of the rest some are -0.0, and some in use are NaN."""
    values = rng.normal(size=shape)
    kind = rng.integers(0, 12, size=shape)
    values[kind < 5] = 0.0
    values[kind == 5] = -0.0
    values[kind == 6] = np.nan
    return values.astype(dtype)


PATTERNS = [
    ("2:4", "in"),
    ("3:6", "in"),
    ("2:8", "fan-in"),
    ("1:2", "0"),
    ("8:12", "last"),
    ("block=3 scope=2 keep=1", "last"),
    ("4x2@0.5", "in"),
    ("1x1@0.6", "in"),
    ("6@0.5", "last"),
    ("block=2x2 scope=-1x1 keep=3", "in"),
    ("block=1x2 scope=1x-1 sparsity=0.7", "in"),
    ("block=4x-1 scope=3x1 keep=1", "in"),
    ("block=-1x1 scope=1x4 keep=2", "in"),
    ("block=1x1 scope=2x-1 sparsity=0.5", "in"),
    ("block=1x1 scope=4x-1 sparsity=0.6", "fan-in"),
    ("block=2x3 scope=4x-1 sparsity=0.1", "in"),
    ("block=1x2 scope=8x-1 sparsity=0.3", "in"),
]
SHAPES = [(24, 36), (12, 12, 12), (24, 12, 24), (12, 24, 2, 2)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("memory", ["whole", "pieces", "across pieces", "cut blocks", "parts of rows", "few counters"])
@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize(("pattern", "axis"), PATTERNS)
def test_every_way_of_counting_finds_what_plain_loops_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, axis: Any, layout: Any, memory: str
) -> None:
    """Case 75: tiny pieces, scopes that are counted across pieces, blocks that pieces cut, pieces that rows cut."""
    if memory != "whole":
        monkeypatch.setattr(occupancy, "PIECE_BYTES", 200)
        single_pass = {"cut blocks": 0, "across pieces": 300, "few counters": 300}.get(memory, 1 << 20)
        monkeypatch.setattr(verification, "SINGLE_PASS_BYTES", single_pass)
    if memory in ("parts of rows", "few counters"):
        monkeypatch.setattr(occupancy, "CONTIGUOUS_BYTES", 300)
        monkeypatch.setattr(verification, "COUNTERS", 5)
    rng = np.random.default_rng(7)
    recipe = Recipe.shorthand(Pattern.parse(pattern), axis=int(axis) if axis == "0" else axis, layout=layout)
    for shape in SHAPES:
        values = sparse(rng, shape)
        values[: shape[0] // 2] *= rng.integers(0, 4, size=values[: shape[0] // 2].shape) == 0
        save_file({"a": values}, tmp_path / "in")
        try:
            plan = plan_of(tmp_path / "in", recipe)
        except AssertionError:  # the pattern does not fit this shape
            continue
        expected = offences(plan, values)
        found = check(tmp_path / "in", recipe)
        assert found.offending == len(expected)
        assert found.first == (expected[0] if expected else None)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:8", "2x2@0.5"])
def test_every_dtype_nan_and_signed_zeros(tmp_path: Path, dtype: Any, pattern: str) -> None:
    """Case 25, case 28: NaN is in use, -0.0 is not."""
    values = sparse(np.random.default_rng(8), (16, 24), dtype)
    bits = values.view(f"u{values.itemsize}")
    save_file({"a": values}, tmp_path / "in")
    recipe = Recipe.shorthand(Pattern.parse(pattern))
    plan = plan_of(tmp_path / "in", recipe)
    expected = offences(plan, values)
    found = check(tmp_path / "in", recipe)
    assert (found.offending, found.first) == (len(expected), expected[0])
    bits[...] = 1 << (8 * values.itemsize - 1)
    save_file({"a": values}, tmp_path / "in")
    assert check(tmp_path / "in", recipe).holds
    bits[5, 8:11] = 1  # the smallest subnormal
    save_file({"a": values}, tmp_path / "in")
    assert check(tmp_path / "in", recipe).holds == (pattern in ("3:8", "2x2@0.5"))


@settings(max_examples=8)
@given(st.data())
def test_whatever_was_pruned_holds_and_one_more_block_does_not(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    pattern, axis = data.draw(st.sampled_from(PATTERNS))
    recipe = Recipe.shorthand(
        Pattern.parse(pattern), axis=0 if axis == "0" else axis, layout=data.draw(st.sampled_from(["out-in", "in-out"]))
    )
    folder = tmp_path_factory.mktemp("verify")
    values = np.random.default_rng(data.draw(st.integers(0, 1000))).normal(size=(24, 48)).astype(np.float32)
    save_file({"a": values}, folder / "in")
    prune_file(folder / "in", folder / "out", recipe)
    assert check(folder / "out", recipe).holds
    plan = plan_of(folder / "out", recipe)
    if plan.keep == plan.blocks:
        return
    raw = bytearray((folder / "out").read_bytes())
    pruned = np.frombuffer(raw, np.float32, offset=len(raw) - values.nbytes).reshape(24, 48)
    holes = np.argwhere(pruned == 0)
    pruned[tuple(holes[data.draw(st.integers(0, len(holes) - 1))])] = np.nan
    (folder / "more").write_bytes(raw)
    found = check(folder / "more", recipe)
    assert not found.holds
    assert found.first is not None
    assert found.first.used == plan.keep + 1
    assert [found.first] == offences(plan, pruned)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_first_offence_of_an_array_in_fortran_order_is_as_it_was_saved(tmp_path: Path, order: Any) -> None:
    values = np.zeros((8, 12), np.float32)
    values[3, 5:8] = 1
    values[6, 0:3] = 1
    np.savez(tmp_path / "in.npz", a=np.asarray(values, order=order))
    found = check(tmp_path / "in.npz", Recipe.shorthand(Pattern.parse("2:4")))
    assert (found.offending, found.first) == (2, Offence((3, 1), (3, 4), 3))


def test_a_budget_is_one_count_over_its_tensors(tmp_path: Path) -> None:
    values = np.ones((4, 8), np.float32)
    values[0] = 0
    save_file({"a": values, "b": values * 0}, tmp_path / "in")
    with open_weights(tmp_path / "in") as weights:
        plans = tuple(resolve(Recipe.shorthand(Pattern.parse("1x4@0.5")), weights.tensors.values()))
        for keep, bounds, holds in ((6, 8, True), (5, 8, False), (6, 6, True), (6, 5, False)):
            budget = Budget("all", plans, keep, ((0, bounds), (0, 0)))
            (verdict,) = verify(weights, [budget])
            assert isinstance(verdict, CheckedBudget)
            assert (verdict.used, verdict.holds) == ((6, 0), holds)


def test_nothing_to_check_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing to check"):
        verify_file(DATA, Recipe.shorthand(Pattern.parse("2:4096")))
    with pytest.raises(SpecError, match=r"conv1\.weight.*cannot take"):
        verify_file(DATA, Recipe.shorthand(Pattern.parse("2:4")), strict=True)


def test_skips_come_through_in_the_order_of_the_file() -> None:
    verdicts = verify_file(DATA, Recipe.shorthand(Pattern.parse("2:4")))
    with open_weights(DATA) as weights:
        assert [v.tensor.name if isinstance(v, Skip) else v.plan.tensor.name for v in verdicts] == list(weights.tensors)


def test_progress_ends_at_the_whole() -> None:
    seen: list[tuple[int, int]] = []
    verify_file(DATA, Recipe.shorthand(Pattern.parse("2:4")), progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] == 770560


def test_a_file_that_threads_cannot_share_is_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an archive is: one reader at a time, every tensor forwards."""
    from npscope.weights.packed import Packed

    monkeypatch.setattr(occupancy, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(Packed, "side_by_side", False)
    starts: list[tuple[str, int]] = []
    real = Packed.read

    def read(self: Packed, tensor: Any, start: int, into: memoryview) -> None:
        starts.append((tensor.name, start))
        real(self, tensor, start, into)

    monkeypatch.setattr(Packed, "read", read)
    verify_file(DATA, Recipe.shorthand(Pattern.parse("2:4")))
    for _, group in itertools.groupby(starts, key=lambda pair: pair[0]):
        places = list(group)
        assert places == sorted(places)
    assert len(starts) > 100


def test_batches_of_tensors_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[verification.Verdict]:
        with open_weights(DATA) as weights:
            decisions = resolve(Recipe.shorthand(Pattern.parse("2:4")), weights.tensors.values())
            plans = tuple(decision for decision in decisions if isinstance(decision, Plan))
            budget = Budget("all", plans[:2], 100, ((0, 100), (0, 100)))
            return verify(weights, [*decisions, budget])

    together = found()
    monkeypatch.setattr(verification, "BATCH_BYTES", 0)
    assert found() == together
    assert {type(verdict) for verdict in together} == {Checked, CheckedBudget, Skip}


def test_a_tensor_of_large_pieces_leaves_threads_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    names = ("a", "b", "large", "y", "z")
    save_file({name: np.ones((64, 64 if name == "large" else 4), np.float32) for name in names}, path)
    monkeypatch.setattr(occupancy, "MEMORY_BYTES", 10 * 1024)
    monkeypatch.setattr(occupancy, "PIECE_BYTES", 128)
    asked: list[tuple[int, int]] = []
    real = occupancy.threads.run

    def run(pieces: int, work: Any, workers: int) -> None:
        asked.append((pieces, workers))
        real(pieces, work, workers)

    monkeypatch.setattr(occupancy.threads, "run", run)
    with config(threads=8):
        found = verify_file(path, Recipe.shorthand(Pattern.parse("block=1x1 scope=8x-1 sparsity=0.5")))
    assert [type(verdict) for verdict in found] == [Checked] * 5
    assert not any(verdict.holds for verdict in found)
    assert asked == [(16, 8), (8, 4), (16, 8)]


# --- the command ---------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command_says_where_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(capsys, "prune", DATA, "-o", out, "--pattern", "2:4", "--quiet")[0] == 0
    code, text, _ = run(capsys, "verify", out, "--pattern", "2:4", "--json")
    found = json.loads(text)
    assert (code, found["holds"]) == (0, True)
    assert found["totals"] == {"checked": 6, "failed": 0, "skipped": 9, "misfits": 1}
    code, text, _ = run(capsys, "verify", out, "--pattern", "1:4", "--include", "conv2.weight", "--json")
    found = json.loads(text)
    line = next(line for line in found["tensors"] if line["name"] == "conv2.weight")
    assert (code, found["holds"], line["holds"]) == (1, False, False)
    assert (line["scope"], line["start"], line["used"], line["offending"]) == ([0, 0, 0], [0, 0, 0], 2, 6144)
    code, text, _ = run(capsys, "verify", out, "--pattern", "1:4")
    assert code == 1
    assert "first [0, 0, 0] at [0, 0, 0]: 2 in use" in text
    assert run(capsys, "verify", out, "--pattern", "1:4", "--quiet")[1] == ""


def test_the_command_without_anything_to_check_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run(capsys, "verify", DATA, "--pattern", "2:4096", "--json")
    assert (code, json.loads(text)["error"]["exit_code"]) == (2, 2)
    assert "nothing to check" in err
    assert run(capsys, "verify", "nowhere", "--pattern", "2:4")[0] == 3


def test_case91_an_input_that_changes_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    source.write_bytes(DATA.read_bytes())
    real = occupancy.Piece.surely_within

    def touched(*arguments: Any) -> Any:
        os.utime(source, ns=(0, 0))
        return real(*arguments)

    monkeypatch.setattr(occupancy.Piece, "surely_within", touched)
    code, _, err = run(capsys, "verify", source, "--pattern", "2:4")
    assert code == 3
    assert "was changed" in err


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8192, 32])
@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--pattern", "2:4"),
        ("verify", "--pattern", "2:4", "--layout", "in-out"),
        ("verify", "--pattern", "block=-1x1 scope=1x4 keep=4"),
        ("inspect",),
        ("inspect", "--layout", "in-out"),
        ("export", "--to", "2:4", "-o", "out"),
        ("export", "--to", "2:4", "--layout", "in-out", "-o", "out"),
    ],
)
def test_case75_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], rows: int
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in"
    values = np.ones((rows, (256 << 20) // 2 // rows), np.float16)  # 256 MiB
    values[::2, ::2] = values[1::2, 1::2] = 0
    save_file({"a": values}, source)

    def peak(*arguments: object) -> int:
        code = "import resource, sys; from npscope.cli import main; c = main(); "
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(c)"
        process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return int(process.stderr.split()[-1]) * (1 if sys.platform == "darwin" else 1024)

    assert peak(arguments[0], source, *arguments[1:]) - peak("--help") < 256 << 20


# --- inspect -------------------------------------------------------------------------------------


def pruned(folder: Path, values: np.ndarray, pattern: str, **options: Any) -> Path:
    save_file({"a": values}, folder / "in")
    prune_file(folder / "in", folder / "out", Recipe.shorthand(Pattern.parse(pattern), **options), force=True)
    return folder / "out"


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "4:8", "2:8", "8:16", "5:16", "7:8"])
@pytest.mark.parametrize(("axis", "along"), [("in", "axis 1 (in)"), (0, "axis 0 (out)"), ("fan-in", "fan-in")])
def test_groups_are_detected_along_their_axis_only(tmp_path: Path, pattern: str, axis: Any, along: str) -> None:
    values = np.random.default_rng(9).normal(size=(64, 64, 3, 3)).astype(np.float32)
    (found,) = inspect_file(pruned(tmp_path, values, pattern, axis=axis))
    keep, of = map(int, pattern.split(":"))
    assert found.groups == (Groups(keep, of, along),)
    assert found.blocks == ()
    assert found.zeros == values.size * (of - keep) // of


@pytest.mark.parametrize("size", ["1x4", "4x1", "1x16", "16x1", "4x4", "8x8", "16x16", "32x32", "1x-1", "-1x1"])
@pytest.mark.parametrize("layout", ["out-in", "in-out"])
def test_blocks_are_detected_by_their_size(tmp_path: Path, size: str, layout: Any) -> None:
    values = np.random.default_rng(10).normal(size=(320, 256)).astype(np.float32)
    path = pruned(tmp_path, values, f"block={size} scope=-1x-1 sparsity=0.4", layout=layout)
    (found,) = inspect_file(path, layout=layout)
    matrix = values.shape if layout == "out-in" else values.shape[::-1]
    rows, columns = (n if n > 0 else whole for n, whole in zip(map(int, size.split("x")), matrix, strict=True))
    blocks = values.size // (rows * columns)
    assert Blocks((rows, columns), math.floor(0.4 * blocks), blocks) in found.blocks
    assert found.groups == ()


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("shape", [(4, 4), (8, 16), (64, 64), (256, 512), (32, 16, 3, 3)])
def test_nothing_is_detected_in_zeros_at_random(tmp_path: Path, share: float, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(11)
    values = rng.normal(size=shape).astype(np.float32)
    values[rng.random(shape) < share] = 0
    save_file({"a": values}, tmp_path / "in")
    (found,) = inspect_file(tmp_path / "in")
    assert (found.groups, found.blocks) == ((), ())


def test_two_of_four_is_told_also_where_more_is_zero(tmp_path: Path) -> None:
    values = np.random.default_rng(13).normal(size=(128, 64)).astype(np.float32)
    values[np.random.default_rng(14).random(values.shape) < 0.5] = 0
    (found,) = inspect_file(pruned(tmp_path, values, "2:4"))
    assert found.groups == (Groups(2, 4, "axis 1 (in)"),)


def test_patterns_of_int8_are_detected(tmp_path: Path) -> None:
    """And -128, which as a float would be a zero, is none."""
    values = np.random.default_rng(15).choice([-128, 127], (64, 64)).astype(np.int8)
    values[:, ::4] = values[:, 1::4] = 0
    save_file({"a": values, "full": np.full((8, 8), -128, np.int8)}, tmp_path / "in")
    found, full = inspect_file(tmp_path / "in")
    assert found.groups == (Groups(2, 4, "axis 1 (in)"),)
    assert (found.zeros, full.zeros, full.groups) == (values.size // 2, 0, ())


def test_small_pieces_detect_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(12).normal(size=(64, 96)).astype(ml_dtypes.bfloat16)
    path = pruned(tmp_path, values, "block=1x-1 scope=-1x1 sparsity=0.5")
    whole = inspect_file(path)
    assert whole[0].blocks
    monkeypatch.setattr(occupancy, "PIECE_BYTES", 100)
    assert inspect_file(path) == whole
    monkeypatch.setattr(occupancy, "CONTIGUOUS_BYTES", 1000)
    assert inspect_file(path) == whole
