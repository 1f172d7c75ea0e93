"""Parts E and F of the catalogue of bad inputs, where they are about processes: CPUs, threads, forks, libraries.

The number of a case stands in the name of its test; what is about files stands beside their other tests.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from files import DATA, refused, run, small
from safetensors.numpy import save_file
from timing import collections_off

import npscope
from npscope import options
from npscope.options import thread_count

PRUNE = ("--pattern", "2:4", "--quiet")


def python(code: str, **environment: str) -> str:
    """What a new interpreter prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- CPUs and threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["0", "-1", "abc", "1000000000", "", "1.5"])
def test_case78_a_bad_number_of_threads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    options._environment_threads.cache_clear()  # the first use decides, and has been
    monkeypatch.setenv("NPSCOPE_NUM_THREADS", count)
    weight = np.ones((4, 4), np.float32)
    with pytest.raises(npscope.SpecError, match="NPSCOPE_NUM_THREADS"):
        npscope.keep_largest(np.ones((512, 1024), np.float32), 2, (1, 1), (1, 4))
    np.savez(tmp_path / "in.npz", a=weight)
    assert refused(run("verify", tmp_path / "in.npz", "--pattern", "2:4"), "NPSCOPE_NUM_THREADS")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_case78_one_cpu_is_one_thread_and_the_same_bytes(tmp_path: Path) -> None:
    assert run("prune", DATA, "-o", tmp_path / "all", *PRUNE).code == 0
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert thread_count() == 1
        assert run("prune", DATA, "-o", tmp_path / "one", *PRUNE).code == 0
    finally:
        os.sched_setaffinity(0, before)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "all").read_bytes()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_case78_more_threads_than_a_cgroup_gives_time_to_write_the_same_bytes(tmp_path: Path) -> None:
    """A quota of processor time does not show in the affinity: to the threads it is as one CPU for many of them."""
    assert run("prune", DATA, "-o", tmp_path / "one", *PRUNE, "-j", 1).code == 0
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert run("prune", DATA, "-o", tmp_path / "many", *PRUNE, "-j", 16).code == 0
        assert run("verify", tmp_path / "many", "--pattern", "2:4", "-j", 16, "--quiet").code == 0
    finally:
        os.sched_setaffinity(0, before)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


NO_THREADS = """
import sys, threading
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
from npscope import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("uncompiled")
def test_case79_without_threads_files_are_read_and_written_in_one(tmp_path: Path) -> None:
    save_file(small(), tmp_path / "in")
    assert run("prune", tmp_path / "in", "-o", tmp_path / "threads", *PRUNE).code == 0
    for arguments in (
        ("prune", tmp_path / "in", "-o", tmp_path / "none", *PRUNE),
        ("verify", tmp_path / "none", "--pattern", "2:4", "--quiet"),
    ):
        command = [sys.executable, "-c", NO_THREADS, *map(str, arguments)]
        subprocess.run(command, check=True, timeout=120, env=os.environ | {"NPSCOPE_BACKEND": "reference"})
    assert (tmp_path / "none").read_bytes() == (tmp_path / "threads").read_bytes()


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda x: x,
    "sorted": np.sort,
    "constant": lambda x: np.full_like(x, 0.5),
    "two-valued": lambda x: np.where(x > 0, np.float32(0.5), np.float32(2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1 << 22, pytest.param(10**8, marks=pytest.mark.slow)])
def test_case81_a_huge_scope_takes_no_more_than_two_partitions(size: int, kind: str) -> None:
    """Processor time of all threads; that of `np.partition` on normal data, which is its ordinary case."""
    x = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    values, k = KINDS[kind](x), size // 2
    npscope.kth_largest(values[: 1 << 20], 1 << 19)  # compiles

    def least(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(3):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        return min(seconds)

    with collections_off():
        ours, theirs = least(lambda: npscope.kth_largest(values, k)), least(lambda: np.partition(x, k))
    assert npscope.kth_largest(values, k) == np.partition(values, size - k)[size - k]
    assert ours <= 2 * theirs


# --- processes -----------------------------------------------------------------------------------


DIGEST = """
import hashlib, numpy, npscope
x = numpy.random.default_rng(0).standard_normal((64, 1024)).astype("f4")
print(hashlib.sha256(npscope.block_norms(x, (4, 4)).tobytes()).hexdigest())
"""


def digest() -> str:
    x = np.random.default_rng(0).standard_normal((64, 1024)).astype("f4")
    return hashlib.sha256(npscope.block_norms(x, (4, 4)).tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("cache", "count"),
    [("missing", 1), ("read-only", 1), ("damaged", 2), pytest.param("damaged", 8, marks=pytest.mark.slow)],
)
def test_case94_cold_processes_at_once_and_caches_that_cannot_be_used(tmp_path: Path, cache: str, count: int) -> None:
    """There is no cache of compiled code: nothing is read from one, and nothing written."""
    folder = tmp_path / "cache"
    if cache != "missing":
        folder.mkdir()
        (folder / "kernels.nbi").write_bytes(b"damaged")
    if cache == "read-only":
        folder.chmod(0o500)
    environment = {"HOME": "/nonexistent", "NUMBA_CACHE_DIR": str(folder), "XDG_CACHE_HOME": str(folder)}
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda _: python(DIGEST, **environment).strip(), range(count)))
    assert found == [digest()] * count
    assert cache == "missing" or [path.name for path in folder.iterdir()] == ["kernels.nbi"]


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_case95_pools_of_processes(method: str) -> None:
    """After a call here; fork alone has more tests beside those of threads."""
    here = digest()
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        assert [each.result(120) for each in [pool.submit(digest) for _ in range(4)]] == [here] * 4


def test_case95_many_threads_at_once() -> None:
    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(lambda _: digest(), range(128))) == {digest()}


# --- what is said --------------------------------------------------------------------------------


def strictly(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("command", ["prune", "inspect", "verify", "plan", "diff", "apply-mask", "export"])
def test_case97_json_also_on_failure(tmp_path: Path, command: str) -> None:
    more: dict[str, tuple[object, ...]] = {
        "prune": ("-o", tmp_path / "out", "--pattern", "2:4"),
        "verify": ("--pattern", "2:4"),
        "plan": ("--pattern", "2:4"),
        "diff": (DATA,),
        "apply-mask": (DATA, "-o", tmp_path / "out"),
        "export": ("--to", "bitmask", "-o", tmp_path / "out"),
    }
    result = run(command, tmp_path / "nowhere", *more.get(command, ()), "--json")
    assert (result.code, result.err.count("\n")) == (3, 1)
    found = strictly(result.out)
    assert isinstance(found, dict)
    assert found["error"]["exit_code"] == 3


def test_case97_json_of_numbers_that_are_none(tmp_path: Path) -> None:
    weight = np.asarray([[np.nan, np.inf, -np.inf, 1.0]] * 4, np.float32)
    np.savez(tmp_path / "in.npz", a=weight, b=np.zeros((4, 4), np.float32))
    np.savez(tmp_path / "other.npz", a=weight * 2, b=np.full((4, 4), np.nan, np.float32))
    for arguments in (
        ("prune", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--pattern", "2:4", "--nan", "keep"),
        ("inspect", tmp_path / "in.npz"),
        ("verify", tmp_path / "in.npz", "--pattern", "2:4"),
        ("plan", tmp_path / "in.npz", "--pattern", "2:4"),
        ("diff", tmp_path / "in.npz", tmp_path / "other.npz"),
    ):
        result = run(*arguments, "--json")
        assert result.code in (0, 1), result
        assert strictly(result.out)


WITHOUT = """
import sys, warnings
{hide}
import numpy, npscope
x = numpy.arange(16, dtype="f4").reshape(4, 4)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        kept = npscope.keep_largest(x, 2, (1, 1), (1, 4))
assert (kept == numpy.where(numpy.arange(4) > 1, x, 0)).all()
print(len(said), said[0].category.__name__, "reference" in str(said[0].message), npscope.namespace(x).name)
"""

HIDE = {
    "absent": "sys.modules['numba'] = None",
    "broken": "import pathlib, tempfile; folder = tempfile.mkdtemp(); sys.path.insert(0, folder); "
    "pathlib.Path(folder, 'numba.py').write_text('raise SystemError(1)')",
    "too old": "import types; sys.modules['numba'] = types.ModuleType('numba')",
}


@pytest.mark.parametrize("state", HIDE)
def test_case99_without_numba_arrays_are_served_with_one_warning(state: str) -> None:
    assert python(WITHOUT.format(hide=HIDE[state])).split() == ["1", "RuntimeWarning", "True", "reference"]


def test_case99_without_cupy_it_is_said_who_asks_for_it() -> None:
    code = "import sys; sys.modules['cupy'] = None\nimport npscope\n"
    code += "try: npscope.namespace('cupy')\nexcept TypeError as error: print(error)"
    assert "'cupy' is not available here" in python(code)
