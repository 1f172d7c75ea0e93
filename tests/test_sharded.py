"""A model in many files: an index that is checked, a folder that appears at once, an index never edited.

Case numbers are those of the catalogue of bad inputs.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import DATA, contents, load_sharded, refused, run, save_sharded, small
from safetensors.numpy import load_file, save_file

from npscope.errors import FileError, FormatError
from npscope.recipes.pattern import Pattern
from npscope.recipes.recipe import Recipe
from npscope.streaming.pruning import prune_file
from npscope.weights import open_weights

pytestmark = pytest.mark.usefixtures("uncompiled")

INDEX = "model.safetensors.index.json"
FIRST, SECOND, LAST = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
RECIPE = Recipe.shorthand(Pattern.parse("2:4"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three shards, an index, and what lies beside them in the wild."""
    folder = save_sharded(tmp_path / "model", small(), shards=3)
    (folder / "config.json").write_text('{"torch_dtype": "float16"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "tokenizer" / "empty").mkdir()
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "linked.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("from elsewhere")
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return found


@pytest.mark.parametrize("given", ["folder", "index"])
def test_the_result_is_a_folder_like_the_input(model: Path, tmp_path: Path, given: str) -> None:
    out, before = tmp_path / "out", contents(model)
    source = model if given == "folder" else model / INDEX
    assert run("prune", source, "-o", out, "--pattern", "2:4").code == 0
    assert contents(model) == before
    after = contents(out)
    assert after.keys() == before.keys()
    shards = {FIRST, SECOND, LAST}
    assert {name for name in before if before[name] != after[name]} <= shards
    save_file(small(), tmp_path / "one")
    assert run("prune", tmp_path / "one", "-o", tmp_path / "one.out", "--pattern", "2:4").code == 0
    expected, found = load_file(tmp_path / "one.out"), load_sharded(out)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert (out / "tokenizer" / "empty").is_dir()
    assert os.access(out / "run.sh", os.X_OK)
    assert not (out / "linked.txt").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.txt", "model", "one", "one.out", "out"]


def test_tensors_come_shard_by_shard(model: Path) -> None:
    with open_weights(model) as weights:
        names = list(weights.tensors)
        in_files = [name for shard in (FIRST, SECOND, LAST) for name in load_file(model / shard)]
        assert sorted(names) == sorted(in_files)
        assert [name for name in names if name in load_file(model / FIRST)] == names[: len(load_file(model / FIRST))]
        for name, array in small().items():
            buffer = bytearray(array.nbytes)
            weights.read(weights.tensors[name], 0, memoryview(buffer))
            assert buffer == array.tobytes()
        weights.check_unchanged()


def test_case65_pruning_nothing_gives_the_same_files(model: Path, tmp_path: Path) -> None:
    assert run("prune", model, "-o", tmp_path / "out", "--pattern", "4:4").code == 0
    assert contents(tmp_path / "out") == contents(model)


def test_a_new_folder_has_the_modes_that_the_umask_leaves(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert run("prune", model, "-o", tmp_path / "out", "--pattern", "2:4").code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "out" / FIRST).stat().st_mode) == 0o640


def test_inspect_reads_all_shards(model: Path) -> None:
    lines = run("inspect", model, "--json").json["tensors"]
    assert {line["name"] for line in lines} == small().keys()


# --- which output --------------------------------------------------------------------------------


def test_case89_no_folder_with_files_is_ever_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("precious")
    for options in ((), ("--force",)):
        assert refused(run("prune", model, "-o", out, "--pattern", "2:4", *options), "no folder is ever replaced")
    (out / "precious").unlink()
    assert run("prune", model, "-o", out, "--pattern", "2:4").code == 0
    assert (out / INDEX).exists()


def test_case89_a_folder_that_appears_meanwhile(model: Path, tmp_path: Path) -> None:
    def appear(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious").write_text("precious")

    with pytest.raises(ValueError, match="exists"):
        prune_file(model, tmp_path / "out", RECIPE, progress=appear)
    assert contents(tmp_path / "out") == {"precious": b"precious"}
    assert not list(tmp_path.glob(".*"))


def test_case87_bad_places_for_a_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(model)
    for out, code, message in (
        (model, 2, "is the input"),
        (tmp_path / "link", 2, "is the input"),
        (model / "pruned", 2, "inside it"),
        (tmp_path, 2, "exists"),
        (tmp_path / "file", 2, "exists"),
        (tmp_path / "missing" / "out", 3, "does not exist"),
        (tmp_path / "file" / "out", 3, "Not a directory"),
    ):
        assert refused(run("prune", model, "-o", out, "--force", "--pattern", "2:4"), message, code)
    before = contents(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "real")
    assert run("prune", model, "-o", tmp_path / "broken", "--pattern", "2:4").code == 0
    assert (tmp_path / "broken").is_symlink()
    shutil.rmtree(tmp_path / "real")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["fifo", "link to a folder", "broken link"])
def test_case80_what_cannot_be_taken_along_is_named_before_anything_is_written(
    model: Path, tmp_path: Path, what: str
) -> None:
    strange = model / "tokenizer" / "strange"
    if what == "fifo":
        os.mkfifo(strange)
    else:
        strange.symlink_to(tmp_path if what == "link to a folder" else tmp_path / "nowhere")
    result = run("prune", model, "-o", tmp_path / "out", "--pattern", "2:4")
    assert refused(result, "strange' is no file or folder", 3)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.txt", "model"]


def test_leftovers_of_other_runs_are_not_taken_along(model: Path, tmp_path: Path) -> None:
    (model / f".{FIRST}.npscope-new.tmp").write_text("half")
    (model / ".x.npscope-partial").mkdir()
    assert run("prune", model, "-o", tmp_path / "out", "--pattern", "2:4").code == 0
    assert not list((tmp_path / "out").glob(".*"))


# --- in place ------------------------------------------------------------------------------------


def test_case92_in_place_replaces_the_shards_alone(model: Path, tmp_path: Path) -> None:
    (model / FIRST).chmod(0o600)
    before = contents(model)
    inodes = {name: (model / name).stat().st_ino for name in before if name.endswith(("json", "txt", "sh"))}
    assert run("prune", model, "-o", tmp_path / "out", "--pattern", "2:4").code == 0
    (tmp_path / "link").symlink_to(model)
    assert run("prune", tmp_path / "link", "--in-place", "--pattern", "2:4").code == 0
    assert contents(model) == contents(tmp_path / "out") != before
    assert stat.S_IMODE((model / FIRST).stat().st_mode) == 0o600
    assert inodes == {name: (model / name).stat().st_ino for name in inodes}
    assert not list(model.rglob("*npscope*"))


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_case92_any_command_finishes_a_move_that_was_cut_short(model: Path, tmp_path: Path, moved: int) -> None:
    assert run("prune", model, "-o", tmp_path / "out", "--pattern", "2:4").code == 0
    ready = model / f".{INDEX}.npscope-partial" / "ready"
    ready.mkdir(parents=True)
    for number, shard in enumerate((FIRST, SECOND, LAST)):
        shutil.copy(tmp_path / "out" / shard, (model if number < moved else ready) / shard)
    if moved == 1:
        result = run("prune", model, "-o", tmp_path / "again", "--pattern", "4:4")
    elif moved == 2:
        result = run("prune", model / INDEX, "--dry-run", "--pattern", "2:4")
    else:
        result = run("inspect", model)
    assert result.code == 0
    assert contents(model) == contents(tmp_path / "out")
    assert not (model / f".{INDEX}.npscope-partial").exists()


def test_case92_what_a_killed_run_had_begun_is_begun_anew(model: Path, tmp_path: Path) -> None:
    building = model / f".{INDEX}.npscope-partial" / "building"
    building.mkdir(parents=True)
    (building / FIRST).write_bytes(b"half a shard")
    partial = tmp_path / ".out.npscope-partial"
    partial.mkdir()
    (partial / FIRST).write_bytes(b"half a shard")
    before = contents(model)
    assert run("inspect", model).code == 0
    assert contents(model) == before  # reading commands leave it alone
    assert run("prune", model, "-o", tmp_path / "out", "--pattern", "2:4").code == 0
    assert run("prune", model, "--in-place", "--pattern", "2:4").code == 0
    assert contents(model) == contents(tmp_path / "out")
    assert not list(tmp_path.rglob("*npscope*"))


def test_case91_a_shard_that_changes_is_an_error(model: Path, tmp_path: Path) -> None:
    for name in (FIRST, INDEX):
        for out in (tmp_path / "out", None):
            before = contents(model)
            with pytest.raises(FileError, match=f"{name}.*changed"):
                prune_file(
                    model, out, RECIPE, in_place=out is None, progress=lambda *_, name=name: os.utime(model / name)
                )
            assert contents(model) == before
            assert not list(tmp_path.rglob("*npscope*"))


# --- bad indices ---------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = index_of(folder)
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def move(tensor: str, shard: Any) -> Callable[[Path], None]:
    return edit(lambda index: index["weight_map"].update({tensor: shard}))


def link_shard(folder: Path) -> None:
    (folder / FIRST).rename(folder.parent / "elsewhere.safetensors")
    (folder / FIRST).symlink_to(folder.parent / "elsewhere.safetensors")


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / INDEX).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def in_two_shards(folder: Path) -> None:
    save_file(load_file(folder / SECOND) | {"a.weight": small()["a.weight"]}, folder / SECOND)


BAD = {
    "case66-up": (move("a.weight", f"../model/{FIRST}"), "no plain file name"),
    "case66-absolute": (move("a.weight", "/etc/passwd.safetensors"), "no plain file name"),
    "case66-folder": (move("a.weight", f"tokenizer/{FIRST}"), "no plain file name"),
    "case66-dots": (move("a.weight", ".."), "no name of a safetensors file"),
    "case66-empty": (move("a.weight", ""), "no name of a safetensors file"),
    "case66-NUL": (move("a.weight", "a\0.safetensors"), "no plain file name"),
    "case66-escape": (move("a.weight", "\x1b[31m.safetensors"), "no plain file name"),
    "case66-surrogate": (move("a.weight", "\ud800.safetensors"), "no plain file name"),
    "case66-long": (move("a.weight", "x" * 300 + ".safetensors"), "no plain file name"),
    "case66-hidden": (move("a.weight", ".x.safetensors"), "no name of a safetensors file"),
    "case66-pickle": (move("a.weight", "pytorch_model-00001.bin"), "a pickle can run code"),
    "case66-number": (move("a.weight", 1), "must map to strings"),
    "case66-linked": (link_shard, "symbolic link"),
    "case66-missing": (lambda folder: (folder / FIRST).unlink(), f"shard '{FIRST}': the file is missing"),
    "case66-shard-not-in-map": (lambda folder: save_file(small(), folder / "x.safetensors"), "not in the index"),
    "case66-tensor-not-in-map": (
        edit(lambda index: index["weight_map"].pop("e.weight")),
        "'e.weight', which the index",
    ),
    "case66-tensor-missing": (move("nothing", FIRST), "'nothing' should be in it"),
    "case66-tensor-elsewhere": (move("a.weight", SECOND), "'a.weight'"),
    "case66-tensor-in-two": (in_two_shards, "'a.weight', which the index does not place there"),
    "case66-total": (edit(lambda index: index["metadata"].update(total_size=1)), "total_size of 1;"),
    "case66-total-text": (edit(lambda index: index["metadata"].update(total_size="many")), "total_size of 'many'"),
    "case66-total-bool": (edit(lambda index: index["metadata"].update(total_size=True)), "total_size of True"),
    "case66-metadata": (edit(lambda index: index.update(metadata=[])), "metadata must be an object"),
    "case66-no-map": (edit(lambda index: index.pop("weight_map")), "needed is weight_map"),
    "case66-empty-map": (edit(lambda index: index.update(weight_map={})), "needed is weight_map"),
    "case66-map-list": (edit(lambda index: index.update(weight_map=[])), "needed is weight_map"),
    "case66-twice": (text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'), "key 'a' twice"),
    "case66-list": (text("[]"), "no JSON object"),
    "case66-no-json": (text("hello"), "no JSON"),
    "case66-empty-file": (text(""), "no JSON"),
    "case66-NaN": (text('{"metadata": {"total_size": NaN}, "weight_map": {}}'), "NaN"),
    "case66-digits": (text('{"metadata": {"total_size": ' + "9" * 5000 + "}}"), "no size or offset"),
    "case66-depth": (text("[" * 100_000), "nested too deeply"),
    "case66-no-utf8": (text(b'{"\xff": 1}'), "no JSON"),
    "case66-damaged-shard": (lambda folder: os.truncate(folder / FIRST, 50), f"shard '{FIRST}'"),
    "case66-shard-is-a-folder": (
        lambda folder: ((folder / FIRST).unlink(), (folder / FIRST).mkdir()),
        "not a regular file",
    ),
    "case66-two-indices": (
        lambda folder: shutil.copy(folder / INDEX, folder / "other.safetensors.index.json"),
        "name one of them",
    ),
    "case66-no-index": (lambda folder: (folder / INDEX).unlink(), "a folder without an index"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_index_is_refused_before_anything_is_written(case: str, model: Path, tmp_path: Path) -> None:
    change, message = BAD[case]
    change(model)
    before = contents(tmp_path)
    with pytest.raises(FormatError, match="model"):
        open_weights(model)
    for given in (("-o", tmp_path / "out"), ("--in-place",)):
        assert refused(run("prune", model, *given, "--pattern", "2:4"), message)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == sorted({path.split("/")[0] for path in before})


@pytest.mark.parametrize("change", [
    lambda index: index.pop("metadata"),
    lambda index: index["metadata"].pop("total_size"),
    lambda index: index["metadata"].update(total_parameters=1.5, format="pt"),
    lambda index: index["metadata"].update(total_size=float(index["metadata"]["total_size"])),
    lambda index: index.update(more=[None, True, "x"]),
])  # fmt: skip
def test_what_an_index_may_say_besides(change: Callable[[dict[str, Any]], object], model: Path) -> None:
    edit(change)(model)
    assert run("inspect", model).code == 0


def test_one_of_two_indices_can_be_named(model: Path) -> None:
    shutil.copy(model / INDEX, model / "other.safetensors.index.json")
    (model / "pytorch_model.bin.index.json").write_text("{}")
    assert run("inspect", model / INDEX).code == 0
    (model / "other.safetensors.index.json").unlink()
    assert run("inspect", model).code == 0  # an index of safetensors goes before others


def test_names_of_tensors_are_never_paths(tmp_path: Path) -> None:
    """Case 62."""
    save_sharded(tmp_path / "model", {"../../x": np.ones((4, 4), np.float32), "/etc/x\n": np.ones((4, 4), np.float32)})
    assert run("prune", tmp_path / "model", "-o", tmp_path / "out", "--pattern", "2:4").code == 0
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_a_real_model_cut_in_two(tmp_path: Path) -> None:
    save_sharded(tmp_path / "model", load_file(DATA))
    assert run("prune", tmp_path / "model", "-o", tmp_path / "out", "--pattern", "2:4").code == 0
    assert run("prune", DATA, "-o", tmp_path / "one", "--pattern", "2:4").code == 0
    expected, found = load_file(tmp_path / "one"), load_sharded(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(expected[name].tobytes() == found[name].tobytes() for name in expected)
