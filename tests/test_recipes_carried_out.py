"""Budgets and scores of recipes as files show them afterwards, against whole arrays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from files import run
from safetensors.numpy import load_file, save_file

from npscope import BlockSpec, ScopeSpec, cli, keep_largest
from npscope.errors import FormatError, SpecError
from npscope.recipes.recipe_file import parse_recipe, read_recipe
from npscope.streaming.pruning import prune_file

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"


def pruned(tmp_path: Path, tensors: dict[str, np.ndarray], **top: Any) -> dict[str, np.ndarray]:
    save_file(tensors, tmp_path / "in.safetensors")
    prune_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", parse_recipe(top), force=True)
    return load_file(tmp_path / "out.safetensors")


def rows_of_tiles(value: np.ndarray, size: int) -> np.ndarray:
    """The square tiles of a matrix, one in each row, in row-major order."""
    tiles = value.reshape(len(value) // size, size, -1, size).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).reshape(-1, size * size)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_a_budget_is_one_competition_in_the_order_of_names(tmp_path: Path, dtype: Any) -> None:
    """Few distinct values, so that ties are cut; names whose order in bytes is not that of the file."""
    rng = np.random.default_rng(0)
    names = ["b.10", "a", "b.9", "C"]
    tensors = {name: rng.integers(-2, 3, size=(8 * (i + 1), 16)).astype(dtype) for i, name in enumerate(names)}
    after = pruned(tmp_path, tensors, rule=[{"block": "2x2", "budget": "0.6"}])
    ordered = sorted(names, key=str.encode)
    joined = np.concatenate([rows_of_tiles(tensors[name], 2) for name in ordered])
    want = keep_largest(joined, len(joined) - int(0.6 * len(joined)), block=(1, 4), scope=(-1, -1))
    got = np.concatenate([rows_of_tiles(after[name], 2) for name in ordered])
    assert got.tobytes() == want.tobytes()


def test_a_budget_keeps_its_bounds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: (scale * rng.normal(size=(16, 16))).astype(np.float32) for name, scale in (("a", 1), ("b", 50))}
    rule = {"block": [1, 1], "budget": "0.5", "max_sparsity": "0.75"}
    kept = {name: np.count_nonzero(value) for name, value in pruned(tmp_path, tensors, rule=[rule]).items()}
    assert kept == {"a": 64, "b": 192}


@pytest.mark.parametrize("per_input", [False, True])
def test_rules_rank_by_scores(tmp_path: Path, per_input: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 32)).astype(np.float32)
    scores = rng.random(32 if per_input else (16, 32)).astype(np.float32)
    save_file({"w": scores}, tmp_path / "scores.safetensors")
    path = str(tmp_path / "scores.safetensors")
    after = pruned(tmp_path, {"w": w}, scores=path, rule=[{"pattern": "2:4"}])
    spec = BlockSpec(w, (1, 1))
    ScopeSpec(spec, (1, 4)).hard_threshold(nnz=2, values=np.abs(w) * scores if per_input else scores)
    assert after["w"].tobytes() == w.tobytes()


def test_optimal_brain_damage_adds_up_over_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w, h = rng.normal(size=(8, 8)).astype(np.float32), rng.random((8, 8)).astype(np.float32)
    save_file({"w": w * w * h / 2}, tmp_path / "scores.safetensors")
    path = str(tmp_path / "scores.safetensors")
    after = pruned(tmp_path, {"w": w}, rule=[{"block": "2x2", "sparsity": "0.5", "ord": 1, "scores": path}])
    saliency = rows_of_tiles(w * w * h / 2, 2).astype(np.float64).sum(1)
    kept = rows_of_tiles(after["w"], 2).any(1)
    assert saliency[kept].min() > saliency[~kept].max()
    assert kept.sum() == 8


def test_bad_scores_leave_no_output(tmp_path: Path) -> None:
    save_file({"w": np.full(8, np.nan, np.float32)}, tmp_path / "scores.safetensors")
    save_file({"w": np.ones((8, 8), np.float32)}, tmp_path / "in.safetensors")
    recipe = parse_recipe({"rule": [{"pattern": "2:4", "scores": str(tmp_path / "scores.safetensors")}]})
    with pytest.raises(FormatError, match=r"scores of .*'w'"):
        prune_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", recipe)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_recipe_of_the_readme_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "recipe.toml").write_text(text)
    out = tmp_path / "out.safetensors"
    assert cli.main(["prune", str(DATA), "-r", str(tmp_path / "recipe.toml"), "-o", str(out)]) == 0
    assert "channels" in capsys.readouterr().out
    before, after = load_file(DATA), load_file(out)
    alive = after["conv1.weight"].any((1, 2))
    assert alive.sum() == 96
    assert np.array_equal(after["conv2.weight"], before["conv2.weight"] * alive[:, None])
    cells = [after[f"lstm_cell.weight_{kind}"] for kind in ("ih", "hh")]
    assert sum(int(rows_of_tiles(cell, 4).any(1).sum()) for cell in cells) == 4096
    assert read_recipe(tmp_path / "recipe.toml").rules


@pytest.mark.parametrize("text", ["2:4", "4x4@0.5", "1x1@0.3"])
def test_int8_is_pruned_where_it_is_named_in_full(tmp_path: Path, text: str) -> None:
    """Ranked by exact magnitude, -128 above 127; a glob does not mean it."""
    values = np.random.default_rng(5).integers(-128, 128, (16, 16)).astype(np.int8)
    values[0, :4] = (-128, 127, -127, 0)
    save_file({"q": values, "w": values.astype(np.float32)}, tmp_path / "in")
    given = ("--pattern", text, "--quiet")
    assert run("prune", tmp_path / "in", "-o", tmp_path / "float", *given).code == 0
    assert run("prune", tmp_path / "in", "-o", tmp_path / "globs", "--include", "*", *given).code == 0
    assert (tmp_path / "globs").read_bytes() == (tmp_path / "float").read_bytes()
    named = ("--include", "q", "--mask-out", tmp_path / "mask")
    assert run("prune", tmp_path / "in", "-o", tmp_path / "named", *named, *given).code == 0
    got = load_file(tmp_path / "named")["q"]
    np.testing.assert_array_equal(got, load_file(tmp_path / "float")["w"].astype(np.int8))
    assert run("verify", tmp_path / "named", "--include", "q", *given).code == 0
    assert run("verify", tmp_path / "in", "--include", "q", *given).code == 1
    assert run("apply-mask", tmp_path / "in", tmp_path / "mask", "-o", tmp_path / "masked", "--quiet").code == 0
    assert (tmp_path / "masked").read_bytes() == (tmp_path / "named").read_bytes()


def test_int8_members_are_named_in_full(tmp_path: Path) -> None:
    values = np.random.default_rng(5).integers(-128, 128, (8, 8)).astype(np.int8)
    got = pruned(tmp_path, {"l.0.q": values}, coupling=[{"keep": 2, "member": [{"tensor": "l.0.q", "block": [1, -1]}]}])
    assert got["l.0.q"].any(axis=1).sum() == 2
    with pytest.raises(SpecError, match=r"member 'l\.0\.q': dtype int8 .* in full"):
        pruned(tmp_path, {"l.0.q": values}, coupling=[{"keep": 2, "member": [{"tensor": "l.*.q", "block": [1, -1]}]}])


def test_verify_takes_the_least_int8_for_a_number_in_use(tmp_path: Path) -> None:
    save_file({"q": np.full((4, 4), -128, np.int8)}, tmp_path / "in")
    assert run("verify", tmp_path / "in", "--include", "q", "--pattern", "2:4", "--quiet").code == 1
