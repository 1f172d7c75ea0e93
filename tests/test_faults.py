"""Whatever fails, and whenever: the old bytes or the new ones, no stray file, and an exit code that says so.

A fault is put into every single call that a run makes of the file system, one run for each.
Case numbers are those of the catalogue of bad inputs.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faults import Faults, How, done_and_error, error, faults, interrupt, interrupted, kill
from files import DATA, contents, refused, run, save_onnx, save_sharded, small
from safetensors.numpy import load_file, save_file

from npscope.errors import FileError
from npscope.recipes.pattern import Pattern
from npscope.recipes.recipe import Recipe
from npscope.streaming.pruning import prune_file
from npscope.weights import open_weights, output
from npscope.weights.output import Target, hidden_name, staged
from npscope.weights.output_folder import staged_folder

pytestmark = [
    pytest.mark.usefixtures("uncompiled"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

PATTERN = ("--pattern", "2:4", "--quiet")

REFERENCE = {"NPSCOPE_BACKEND": "reference"}


@pytest.fixture(autouse=True)
def _no_test_cuts_the_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: os.fstat(fd))


def save(kind: str, folder: Path) -> Path:
    folder.mkdir()
    weights = small()
    if kind == "safetensors":
        save_file(weights, folder / "in")
    elif kind == "npz":
        np.savez_compressed(folder / "in.npz", **weights)
        return folder / "in.npz"
    elif kind == "npy":
        np.save(folder / "in.npy", weights["a.weight"])
        return folder / "in.npy"
    elif kind == "onnx":
        save_onnx(folder / "in", weights)
    else:
        save_sharded(folder / "in", weights, shards=3)
        (folder / "in" / "config.json").write_text("{}")
        (folder / "in" / "more").mkdir()
        (folder / "in" / "more" / "text").write_text("hello")
    return folder / "in"


def snapshot(path: Path) -> object:
    """What is at a path: the bytes of a file, or of everything in a folder, or nothing."""
    return contents(path) if path.is_dir() else path.read_bytes() if path.exists() else None


def visible(path: Path) -> object:
    """The same without what is being built."""
    found = snapshot(path)
    return {name: raw for name, raw in found.items() if "npscope" not in name} if isinstance(found, dict) else found


def hidden(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*npscope*")]


class Scene:
    """An input, a place for the output, what may be there before and must be there after."""

    def __init__(self, kind: str, how: str, folder: Path) -> None:
        self.folder, self.kind, self.how = folder / "scene", kind, how
        self.pristine = folder / "pristine"
        self.source = self.folder / save(kind, self.pristine).name
        self.target = self.source if how == "in place" else self.folder / "out"
        if how == "replaced" and kind == "onnx":
            (self.pristine / "out").mkdir()
            for name in ("m.onnx", "data"):
                (self.pristine / "out" / name).write_text("old")
        elif how == "replaced":
            (self.pristine / "out").write_text("old")
        self.reset()
        self.before, self.input = snapshot(self.target), snapshot(self.source)
        self.arguments = ("prune", self.source / self.model, *self.options, *PATTERN)
        assert run(*self.arguments).code == 0
        self.after = snapshot(self.target)
        assert self.after != self.before
        self.reset()

    @property
    def model(self) -> str:
        """Where the model lies in the folder that `source` or `target` is, if neither is the model itself."""
        return "m.onnx" if self.kind == "onnx" else ""

    @property
    def options(self) -> tuple[object, ...]:
        if self.how == "in place":
            return ("--in-place",)
        return ("-o", self.target / self.model, *(["--force"] if self.how == "replaced" else []))

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.pristine, self.folder)

    def check(self, *, strays: bool) -> None:
        """Old or new bytes and the input as it was; a move that has begun is finished by looking at the folder."""
        if list(self.folder.rglob("ready")):
            assert (self.kind, self.how) == ("sharded", "in place")
            assert run("inspect", self.source).code == 0
            assert snapshot(self.target) == self.after
            assert not hidden(self.folder)
        elif not strays:
            assert not hidden(self.folder)
        found = {path: raw for path, raw in contents(self.folder).items() if "npscope" not in path}
        assert snapshot(self.target) in (self.before, self.after) or hidden(self.target)
        if self.how != "in place":
            assert snapshot(self.source) == self.input
        assert {path.split("/")[0] for path in found} <= {self.source.name, self.target.name}

    def check_next_run(self) -> None:
        """It succeeds and leaves nothing behind, unless it finds that its output is there already."""
        is_there = self.how == "new" and self.target.exists()
        result = run(*self.arguments)
        assert result.code == (2 if is_there else 0), result
        assert snapshot(self.target) == self.after
        if not is_there:
            assert not hidden(self.folder)


SCENES = [  # the formats share how they are replaced, but for folders, which never are
    ("safetensors", "new"),
    ("safetensors", "replaced"),
    ("safetensors", "in place"),
    ("npy", "replaced"),
    ("npz", "new"),
    ("npz", "in place"),
    ("sharded", "new"),
    ("sharded", "in place"),
]


@pytest.fixture(params=SCENES, ids=lambda scene: " ".join(scene))
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    return Scene(*request.param, tmp_path)


def every_call(
    scene: Scene, how: How, *, last: float | None = None, start: int = 1, step: int = 1
) -> Iterator[tuple[Faults, int]]:
    """(faults, exit code) of one run after another, a later call failing each time, until none is met."""
    for number in range(start, 2000, step):
        scene.reset()
        with faults(how, number, last) as found:
            code = run(*scene.arguments).code
        if not found.met:
            assert code == 0
            assert number > 20
            return
        yield found, code
    raise AssertionError("there is no end of calls")


@pytest.mark.sampled(2)
def test_case86_any_call_fails(scene: Scene) -> None:
    for found, code in every_call(scene, error):
        assert code == 3, found.met
        scene.check(strays=False)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("start", [1, 2, *(pytest.param(at, marks=pytest.mark.slow) for at in (3, 4, 5))])
def test_case86_any_call_fails_after_it_did_its_work(scene: Scene, start: int) -> None:
    for found, code in every_call(scene, done_and_error, start=start, step=5):
        assert code == 3, found.met
        scene.check(strays=True)
        scene.check_next_run()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("start", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 3, 4, 5))])
def test_case85_a_disk_that_fails_from_some_call_on(scene: Scene, start: int) -> None:
    for found, code in every_call(scene, error, last=float("inf"), start=start, step=5):
        assert code == 3, found.met
        scene.check(strays=True)
        scene.check_next_run()


@pytest.mark.sampled(2)
def test_case83_a_signal_in_any_call(scene: Scene) -> None:
    for found, code in every_call(scene, interrupt):
        assert code == 143, found.met
        scene.check(strays=False)


@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_case83_a_signal_between_any_two_instructions(tmp_path: Path, kind: str, leftover: bool) -> None:
    target = tmp_path / "out"
    building = tmp_path / hidden_name("out", "new.tmp" if kind == "file" else "partial")

    def build() -> None:
        if kind == "file":
            with staged(Target.of(target, force=False)) as fd:
                os.write(fd, b"new")
        else:
            with staged_folder(Target.of(target, force=False)) as folder:
                Path(folder, "file").write_bytes(b"new")

    def remove(path: Path) -> None:
        if path.exists():
            path.unlink() if kind == "file" else shutil.rmtree(path)

    at, is_interrupted = 0, True
    while is_interrupted:
        at += 1
        if leftover:  # of a killed process: it may outlive an interrupted run, which may not have come to it
            building.touch() if kind == "file" else building.mkdir()
        is_interrupted = interrupted(build, at)
        assert snapshot(target) in (None, b"new" if kind == "file" else {"file": b"new"}), at
        assert leftover or not building.exists(), at
        remove(target)
        remove(building)
    assert at > 300


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "way", [error, *(pytest.param(way, marks=pytest.mark.slow) for way in (done_and_error, interrupt))]
)
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("safetensors", "replaced"),
        ("npz", "new"),
        ("sharded", "new"),
        ("sharded", "in place"),
        ("onnx", "replaced"),
    ],
)
def test_case86_no_output_without_its_mask(tmp_path: Path, kind: str, how: str, way: How) -> None:
    """The mask gets its name just before the output does, when both are on disk."""
    scene = Scene(kind, how, tmp_path)
    mask = scene.folder / "mask"
    scene.arguments = (*scene.arguments, "--mask-out", mask)
    assert run(*scene.arguments).code == 0
    whole, old = mask.read_bytes(), b"old" if how == "replaced" else None
    if old is not None:
        (scene.pristine / "mask").write_bytes(old)
    for found, code in every_call(scene, way, step=2):
        assert code == (143 if way is interrupt else 3), found.met
        is_moving = bool(list(scene.folder.rglob("ready")))
        if visible(scene.target) != scene.before or is_moving:  # the new output is there, or the old one no more
            assert snapshot(mask) == whole
        elif old is None and way is error:
            assert snapshot(mask) is None
        else:
            assert snapshot(mask) in (old, whole)
        if visible(scene.target) == scene.before:  # nothing but what is left of the mask is in the way of the next run
            assert run(*scene.arguments).code == 0, found.met
            assert (snapshot(scene.target), snapshot(mask)) == (scene.after, whole)


@pytest.mark.parametrize(
    ("kind", "how"), [("safetensors", "new"), ("npz", "in place"), ("sharded", "new"), ("sharded", "in place")]
)
def test_case82_a_mask_that_a_killed_run_left_is_in_nobodys_way(tmp_path: Path, kind: str, how: str) -> None:
    scene = Scene(kind, how, tmp_path)
    mask = scene.folder / "mask"
    scene.arguments = (*scene.arguments, "--mask-out", mask)
    assert run(*scene.arguments).code == 0
    whole = mask.read_bytes()
    (scene.pristine / "mask").write_bytes(whole)
    scene.reset()
    assert refused(run(*scene.arguments, "--exclude", "a.weight"), "exists")
    (scene.folder / "mask").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refused(run(*scene.arguments), "exists")
    assert snapshot(scene.target) == scene.before
    scene.reset()
    assert run(*scene.arguments).code == 0
    assert (snapshot(scene.target), mask.read_bytes()) == (scene.after, whole)
    assert not hidden(scene.folder)


def test_space_is_reserved_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 85: a full disk shows before anything is written; a signal waits for one step."""
    calls: list[tuple[int, int]] = []

    def reserve(fd: int, start: int, nbytes: int) -> None:
        calls.append((start, nbytes))
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "posix_fallocate", reserve, raising=False)
    monkeypatch.setattr(output, "_RESERVED_BYTES", 1000)
    save_file({"a": np.ones((16, 64), np.float32)}, tmp_path / "in")
    assert refused(run("prune", tmp_path / "in", "-o", tmp_path / "out", *PATTERN), "No space left", 3)
    assert calls == [(0, 1000), (1000, 1000), (2000, 1000)]
    assert os.listdir(tmp_path) == ["in"]


def in_a_child(job: Callable[[], int]) -> int:
    """Exit code of `job` in a forked process, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = job()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("start", "step"), [(1, 5), *(pytest.param(at, 5, marks=pytest.mark.slow) for at in (2, 3, 4, 5))]
)
def test_case82_killed_in_any_call(scene: Scene, start: int, step: int) -> None:
    for number in range(start, 2000, step):
        scene.reset()

        def job(number: int = number) -> int:
            with faults(kill, number):
                return run(*scene.arguments).code

        code = in_a_child(job)
        if code == 0:
            assert number > 20
            return
        assert code == -signal.SIGKILL
        scene.check(strays=True)
        scene.check_next_run()
    raise AssertionError("there is no end of calls")


@pytest.mark.slow
def test_case82_killed_at_50_random_points(tmp_path: Path) -> None:
    """A process of its own, killed by the clock."""
    rng = random.Random(0)
    weight = np.random.default_rng(0).normal(size=(2048, 4096)).astype(np.float16)
    save_file({"a": weight}, tmp_path / "in")
    np.savez(tmp_path / "in.npz", a=weight)
    before = {name: (tmp_path / name).read_bytes() for name in ("in", "in.npz")}
    environment = os.environ | REFERENCE
    seen = {True: 0, False: 0}
    for name in ("in", "in.npz"):
        source, out = tmp_path / name, tmp_path / f"out{Path(name).suffix}"
        command = [sys.executable, "-m", "npscope", "prune", str(source), "-o", str(out), *PATTERN, "--force"]
        start = time.monotonic()
        subprocess.run(command, check=True, env=environment)
        lasts = time.monotonic() - start
        after = out.read_bytes()
        for _ in range(25):
            out.unlink(missing_ok=True)
            process = subprocess.Popen(command, env=environment)
            time.sleep(rng.uniform(0.2, 1.1) * lasts)
            process.kill()
            process.wait()
            assert source.read_bytes() == before[name]
            assert not out.exists() or out.read_bytes() == after
            seen[out.exists()] += 1
        assert subprocess.run(command, env=environment).returncode == 0
        assert out.read_bytes() == after
        assert not hidden(tmp_path)
    assert min(seen.values()) > 0


def test_case86_short_reads_and_writes_are_continued(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    write, pwrite, preadv = os.write, os.pwrite, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: max(1, len(data) // 2)]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(1, len(data) // 2)], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][: max(1, len(into[0]) // 2)]], at))
    assert run(*scene.arguments).code == 0
    assert snapshot(scene.target) == scene.after


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EINTR, errno.ENOMEM])
def test_case85_the_message_says_what_the_system_said(tmp_path: Path, code: int) -> None:
    def full(name: str, call: Callable[[], object]) -> None:
        raise OSError(code, os.strerror(code))

    scene = Scene("safetensors", "new", tmp_path)
    for number in range(1, 60, 7):
        with faults(full, number) as found:
            result = run(*scene.arguments)
        if found.met:
            assert refused(result, os.strerror(code), 3)
        scene.reset()


# --- two runs at once ----------------------------------------------------------------------------


@contextmanager
def another_run(job: Callable[[], object]) -> Iterator[int]:
    """Context in which a forked process stands inside `job`; killed at the end."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            with job():  # type: ignore[attr-defined]
                os.write(write, b"x")
                time.sleep(60)
        finally:
            os._exit(0)
    try:
        assert os.read(read, 1) == b"x"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_case93_a_second_run_meets_the_lock_and_a_dead_one_has_none(scene: Scene) -> None:
    @contextmanager
    def job() -> Iterator[None]:
        with open_weights(scene.source) as weights:
            place = weights.own_place() if scene.how == "in place" else weights.target(scene.target, force=True)
            with weights.successor(place):
                yield

    with another_run(job):
        (left,) = hidden(scene.folder)
        result = run(*scene.arguments)
        assert refused(result, "is locked", 3)
        assert str(scene.folder / left) in result.err
        assert hidden(scene.folder) == [left]  # the lock of the other is not touched
        assert snapshot(scene.target) == scene.before or scene.kind == "sharded"
    assert hidden(scene.folder) == [left]
    scene.check_next_run()


@pytest.mark.parametrize("kind", ["safetensors", "npz", "sharded"])
def test_case93_many_runs_at_once_never_interleave(tmp_path: Path, kind: str) -> None:
    scene = Scene(kind, "in place" if kind == "sharded" else "replaced", tmp_path)
    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            try:
                codes = {run(*scene.arguments).code for _ in range(10)}
                os._exit(0 if 0 in codes and codes <= {0, 3} else 1)
            finally:
                os._exit(99)
        children.append(child)
    exits = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(exits) <= {0, 1}  # 1: the others were always faster, or a file changed under its reader
    assert 0 in exits
    assert snapshot(scene.target) == scene.after
    assert not hidden(scene.folder)


def test_case93_outputs_of_other_names_do_not_wait(tmp_path: Path) -> None:
    with staged(Target.of(tmp_path / "one", force=False)):
        assert run("prune", DATA, "-o", tmp_path / "other", *PATTERN).code == 0
        assert refused(run("prune", DATA, "-o", tmp_path / "one", *PATTERN), ".one.npscope-new.tmp", 3)


def test_case93_a_failing_run_leaves_the_hidden_file_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that worked and says that it did not, and a run that started in between."""
    replace = os.replace

    def overtaken(origin: str, target: str) -> None:
        replace(origin, target)
        Path(origin).write_text("of the next run")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", overtaken)
    assert run("prune", DATA, "-o", tmp_path / "out", "--force", *PATTERN).code == 3
    assert (tmp_path / ".out.npscope-new.tmp").read_text() == "of the next run"


@pytest.mark.parametrize("left", ["file", "empty", "link", "fifo", "folder"])
def test_case82_whatever_lies_at_the_hidden_name(tmp_path: Path, left: str) -> None:
    """What a dead run can have left gives way; anything else stays, and is named."""
    hidden_path = tmp_path / ".out.npscope-new.tmp"
    precious = tmp_path / "precious"
    precious.write_text("precious")
    if left == "link":
        hidden_path.symlink_to(precious)
    elif left == "fifo":
        os.mkfifo(hidden_path)
    elif left == "folder":
        hidden_path.mkdir()
    else:
        hidden_path.write_bytes(b"" if left == "empty" else b"half an output")
    result = run("prune", DATA, "-o", tmp_path / "out", *PATTERN)
    if left in ("link", "folder"):
        assert refused(result, ".out.npscope-new.tmp", 3)
    else:
        assert result.code == 0, result
        assert not hidden(tmp_path)
    assert precious.read_text() == "precious"


# --- in place ------------------------------------------------------------------------------------


def copy_of_data(folder: Path) -> Path:
    shutil.copy(DATA, folder / "in")
    (folder / "in").chmod(0o640)
    return folder / "in"


def expected(folder: Path) -> bytes:
    assert run("prune", DATA, "-o", folder / "expected", *PATTERN).code == 0
    raw = (folder / "expected").read_bytes()
    (folder / "expected").unlink()
    return raw


def test_case88_in_place_replaces_the_input_and_keeps_its_mode(tmp_path: Path) -> None:
    source, after = copy_of_data(tmp_path), expected(tmp_path)
    result = run("prune", source, "--in-place", "--pattern", "2:4", "--json")
    assert result.code == 0
    assert (result.json["input"], result.json["output"]) == (str(source), str(source))
    assert source.read_bytes() == after
    assert stat.S_IMODE(source.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["in"]


def test_case88_in_place_follows_and_keeps_links(tmp_path: Path) -> None:
    source, after = copy_of_data(tmp_path), expected(tmp_path)
    (tmp_path / "other").hardlink_to(source)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(source)
    assert run("prune", tmp_path / "folder" / "link", "--in-place", *PATTERN).code == 0
    assert (tmp_path / "folder" / "link").is_symlink()
    assert source.read_bytes() == after
    assert (tmp_path / "other").read_bytes() == DATA.read_bytes()  # a file of its own from now on
    assert os.listdir(tmp_path / "folder") == ["link"]


def test_case88_in_place_and_output_exclude_each_other(tmp_path: Path) -> None:
    source = copy_of_data(tmp_path)
    result = run("prune", source, "--in-place", "-o", tmp_path / "out", *PATTERN)
    assert refused(result, "exclude each other")
    assert refused(run("prune", source, "-o", source, "--force", *PATTERN), "--in-place")
    assert run("prune", source, "--in-place", "--dry-run", *PATTERN).code == 0
    assert source.read_bytes() == DATA.read_bytes()


def test_case88_an_error_in_place_leaves_the_input(tmp_path: Path) -> None:
    save_file({"a": np.ones((4, 4), np.float32), "b": np.full((4, 4), np.nan, np.float32)}, tmp_path / "in")
    before = (tmp_path / "in").read_bytes()
    assert refused(run("prune", tmp_path / "in", "--in-place", *PATTERN), "NaN")
    assert (tmp_path / "in").read_bytes() == before
    assert os.listdir(tmp_path) == ["in"]


RECIPE = Recipe.shorthand(Pattern.parse("2:4"))


def test_case91_an_input_replaced_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    source = copy_of_data(tmp_path)

    def replace(done: int, total: int) -> None:
        (tmp_path / "new").write_text("precious")
        os.replace(tmp_path / "new", source)

    with pytest.raises(FileError, match="changed"):
        prune_file(source, None, RECIPE, in_place=True, progress=replace)
    assert source.read_text() == "precious"
    assert os.listdir(tmp_path) == ["in"]


def test_case91_another_file_of_the_same_size_and_time_is_another_file(tmp_path: Path) -> None:
    source = copy_of_data(tmp_path)
    twin = tmp_path / "twin"
    twin.write_bytes(DATA.read_bytes()[:-1] + b"x")
    shutil.copystat(source, twin)

    def replace(done: int, total: int) -> None:
        if twin.exists():
            twin.rename(source)

    with pytest.raises(FileError, match="changed"):
        prune_file(source, None, RECIPE, in_place=True, progress=replace)
    assert source.read_bytes()[-1:] == b"x"


@pytest.mark.parametrize("in_place", [False, True])
def test_case91_an_input_that_vanishes_is_an_error(tmp_path: Path, in_place: bool) -> None:
    source = copy_of_data(tmp_path)
    out = None if in_place else tmp_path / "out"
    with pytest.raises(FileError, match="changed"):
        prune_file(source, out, RECIPE, in_place=in_place, progress=lambda done, total: source.unlink(missing_ok=True))
    assert os.listdir(tmp_path) == []


def test_case87_a_folder_that_vanishes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileError, match="removed or replaced"):
        prune_file(
            DATA,
            tmp_path / "there" / "out",
            RECIPE,
            progress=lambda done, total: shutil.rmtree(tmp_path / "there", ignore_errors=True),
        )
    assert os.listdir(tmp_path) == []


# --- limits --------------------------------------------------------------------------------------


def test_case77_a_file_size_limit(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")

    def job() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return run("prune", DATA, "-o", tmp_path / "out", "--force", *PATTERN).code

    assert in_a_child(job) == 3
    assert contents(tmp_path) == {"out": b"old"}


def test_case77_500_shards_with_16_descriptors(tmp_path: Path) -> None:
    weights = {f"w{at:03}": np.full((4, 4), at + 1, np.float16) for at in range(500)}
    save_sharded(tmp_path / "model", weights, shards=500)

    def job() -> int:
        os.closerange(3, 1024)
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
        code = run("prune", tmp_path / "model", "-o", tmp_path / "out", *PATTERN).code
        return code or run("prune", tmp_path / "model", "--in-place", *PATTERN).code

    assert in_a_child(job) == 0
    assert contents(tmp_path / "model") == contents(tmp_path / "out")
    found = {
        name: array for file in (tmp_path / "out").glob("*.safetensors") for name, array in load_file(file).items()
    }
    assert all(np.count_nonzero(found[name]) == 8 for name in weights)
    assert not hidden(tmp_path)


@pytest.mark.slow
def test_case76_an_address_space_limit_leaves_the_old_output(tmp_path: Path) -> None:
    save_file({"a": np.ones((4096, 1 << 15), np.float32)}, tmp_path / "in")  # 512 MiB: one scope of 16 Mi rows
    (tmp_path / "out").write_text("old")

    # A process of its own: one that has done much before has memory that it can use again.
    code = """
        import resource, sys
        from npscope import cli
        from npscope.streaming import pruning
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)
        sys.exit(cli.main(sys.argv[1:]))
    """
    arguments = ("prune", tmp_path / "in", "-o", tmp_path / "out", "--force", "--pattern", "1x1@0.5", "--quiet")
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | REFERENCE)
    assert (done.returncode, "out of memory" in done.stderr) == (3, True), done.stderr
    assert (tmp_path / "out").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
