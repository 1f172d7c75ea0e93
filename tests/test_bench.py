"""The benchmark: every contender computes what it is timed for, fractions are right, tables come from the JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npscope import bench as core
from npscope import cli, clock, use_backend
from npscope.clock import Floor, Row, Timed, steps, summary, take_turns

pytest.importorskip("bench.cases", reason="the full benchmark is part of a checkout, not of the wheel")

from bench import __main__ as command
from bench import cases, cuda_report, plots, suite, tables
from bench.peers import installed

TINY = core.Plan(mib=1 / 64, slow_mib=1 / 64, rounds=3, seconds=0.01)
MASKS = ("block_mask", "ScopeSpec.get_masks", "topk_mask")
ENTRIES = [(case, library) for case in (*cases.WARM, *cases.SMALL) for library in cases.ALL[case.operation]]


def distinct(case: core.Case, rng: np.random.Generator) -> np.ndarray:
    """Data without equal magnitudes in an array that the case's blocks cut, in its dtype."""
    scope = case.block[-1] * case.scope[-1]  # along the last axis of what is worked on
    few = max(64, scope if not case.transposed else 0)
    row = tuple(min(n, few) for n in case.row) if case.block != (1, 1024) and len(case.row) == 1 else case.row
    shape = (
        max(32, scope) if case.transposed else 32,
        *(min(n, 16) if len(row) > 1 and i == 0 else n for i, n in enumerate(row)),
    )
    size = int(np.prod(shape))
    if case.dtype in ("float16", "bfloat16"):  # 0x3000 .. are ordinary numbers of either
        bits = rng.permutation(0x3000 + np.arange(size, dtype=np.uint16)) | (rng.integers(0, 2, size) << 15)
        return bits.astype(np.uint16).view(core.dtype_of(case.dtype)).reshape(shape)
    x = rng.permutation(np.linspace(0.01, 1.8, size)) * rng.choice([-1, 1], size)
    if case.dtype.startswith("complex"):
        x = x + 1j * rng.standard_normal(size)
    return x.astype(case.dtype).reshape(shape)


def result_of(case: core.Case, setup: core.Setup, data: np.ndarray) -> np.ndarray:
    work = data.copy()
    call = setup(case, work.T if case.transposed else work)
    given = call()
    if case.operation in ("block_norms", "kth_largest", *MASKS):
        return np.asarray(given.float() if str(getattr(given, "dtype", "")) == "torch.bfloat16" else given)
    return work


@pytest.mark.parametrize(("case", "library"), ENTRIES, ids=lambda v: v if isinstance(v, str) else v.name)
def test_every_contender_agrees_with_the_reference(case, library, rng):
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    data = distinct(case, rng)
    with use_backend("reference"):
        expected = result_of(case, cases.ALL[case.operation]["npscope"], data)
    try:
        got = result_of(case, cases.ALL[case.operation][library], data)
    except RuntimeError as error:
        if library == "sparsekit" and "active drivers" in str(error):
            pytest.skip("sparsekit selects in many scopes on a GPU only")
        raise
    assert got.shape == expected.shape
    if case.operation in ("keep_largest", "ScopeSpec.hard_threshold", "hard_threshold", *MASKS):
        assert np.array_equal(got, expected)
        kept = np.count_nonzero(expected) / expected.size
        assert 0 < kept < 1, "a case that keeps all or nothing shows nothing"
    else:
        loose = 2e-2 if library == "sparsekit" and case.operation.startswith("conditioned") else 1e-5
        np.testing.assert_allclose(got.astype(expected.dtype), expected, rtol=loose, atol=loose / 10)


def test_the_quick_look_is_part_of_the_full_table():
    assert {case.name for case in core.CASES} <= {case.name for case in (*cases.WARM, *cases.SMALL)}
    for case in core.CASES:
        full = next(c for c in (*cases.WARM, *cases.SMALL) if c.name == case.name)
        assert replace(full, group=case.group) == case
    assert len({case.name for case in cases.WARM}) == len(cases.WARM)


def test_names_of_cold_calls_exist():
    from bench import cold

    assert {case.name for case in cases.WARM} >= {*cold.FIRST_CALLS, *cold.FIRST_MS}


def test_processes_that_time_a_first_call_have_loaded_nothing_for_it():
    code = "import bench.cold, sys; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=command.ROOT)
    assert not set(done.stdout.split()) & {"numba", "llvmlite", "ml_dtypes", "array_api_compat", "torch", "rich"}


def test_first_calls_are_timed_in_a_process_of_their_own():
    from bench import cold

    found = cold.first_call("k-th of all", rounds=1)[0]
    assert (found.bar, found.judged_by) == (cold.OTHERS_MS, "ms")
    assert found.median_ms > 1


def test_first_calls_are_timed_also_without_scipy_where_it_is_installed(monkeypatch):
    from bench import cold

    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(cold, "_printed_by", lambda *arguments: asked.append(arguments[2:]) or len(asked) / 1000)
    for scipy, rest in ((object(), [("2:4", "scipy")]), (None, [])):
        asked.clear()
        monkeypatch.setattr(cold.importlib.util, "find_spec", lambda name, found=scipy: found)
        rows = cold.first_call("2:4", rounds=3)
        assert asked == [("2:4",), *rest] * 3
        assert [row.bar for row in rows] == [1000, *[None] * len(rest)]


def test_sizes_of_cases():
    case = cases.named("2:4")
    assert case.shape(256) == (65536, 1024)
    assert replace(case, dtype="bfloat16").shape(256) == (65536, 1024)
    assert replace(case, dtype="float64").shape(256) == (32768, 1024)
    assert cases.of_size(case, 1 / 1024).shape(256) == (32, 16)
    assert case.nnz(np.empty((4, 8))) == 2
    assert cases.named("1 of 4 blocks of 1x4").nnz(np.empty((4, 32))) == 1
    assert cases.named("3x3 kernels, half per filter").nnz(np.empty((4, 8, 3, 3))) == 4


@pytest.mark.parametrize("kind", ["normal", *dict.fromkeys(case.data for case in cases.HOSTILE)])
def test_data_is_fresh_and_what_it_says(kind):
    case = replace(cases.named("2:4"), data=kind)
    x, again = core.fresh(case, 1 / 8), core.fresh(case, 1 / 8)
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    assert np.array_equal(x, again) == (kind == "constant")
    assert len(np.unique(x)) == {"constant": 1, "two-valued": 2}.get(kind, len(np.unique(x)))
    assert (np.diff(x.reshape(-1)) >= 0).all() == (kind in ("constant", "sorted"))
    largest, info = np.abs(x).max(), np.finfo(np.float32)
    assert (largest > info.max / 8) == (kind == "near overflow")
    assert (largest < info.smallest_normal) == (kind == "subnormal")


# --- the clock -----------------------------------------------------------------------------------


def test_floors_are_positive_and_change_nothing():
    pristine = np.random.default_rng().standard_normal((64, 64), dtype=np.float32)
    work = pristine.copy()
    with Floor(work, pristine, threads=3, rounds=3) as floor:
        take_turns(floor.timed)
    assert np.array_equal(work, pristine)
    read, change = floor.milliseconds(1, 0), floor.milliseconds(0, 1)
    assert read > 0
    assert change > 0
    assert floor.milliseconds(2, 0.5) == pytest.approx(2 * read + change / 2)
    assert steps(3) == [1, 2, 3]


def test_contenders_take_turns_on_restored_data():
    log: list[tuple[str, float]] = []
    pristine = np.arange(4.0)
    entries = []
    for name, rounds in (("a", 2), ("b", 3)):

        def prepare(x: np.ndarray, name: str = name) -> Any:
            return lambda: (log.append((name, float(x.sum()))), x.fill(-1))

        entry = Timed(prepare, pristine.copy(), pristine)
        entry.rounds = rounds
        entries.append(entry)
    take_turns(entries)
    assert log == [("a", 6), ("b", 6), ("a", 6), ("b", 6), ("b", 6)]
    assert [len(entry.seconds) for entry in entries] == [2, 3]


def test_rows_say_what_was_measured():
    rows = core.measure(cases.named("2:4"), core.TABLE, TINY)
    assert [row.contender for row in rows] == ["npscope reference", "npscope numba", "numpy"]
    for row in rows:
        assert row.floor_ms > 0
        assert row.fraction == pytest.approx(row.floor_ms / row.median_ms, rel=2e-3)
        assert row.q1 <= row.median_ms <= row.q3
        assert row.rounds >= 3
        assert row.elements == 32 * 1024


def test_slow_contenders_get_a_part_and_its_share_of_the_floor(monkeypatch):
    import time

    table = {"keep_largest": {"slow": lambda case, x: lambda: time.sleep(0.002), "fast": lambda case, x: lambda: None}}
    slow, fast = core.measure(cases.named("2:4"), table, core.Plan(1, slow_mib=0.25, rounds=3, seconds=0.012))
    assert (slow.elements, fast.elements) == (2**16, 2**18)
    assert slow.floor_ms == pytest.approx(fast.floor_ms / 4, rel=2e-3)
    assert slow.median_ms >= 2


def test_a_peer_that_fails_is_left_out_and_npscope_is_not():
    def broken(case: core.Case, x: np.ndarray) -> Any:
        raise RuntimeError("no driver")

    told: list[str] = []
    measure = core.measure
    case = cases.named("2:4")
    assert not measure(case, {"keep_largest": {"peer": broken}}, TINY, unable=lambda n, e: told.append(f"{n}: {e}"))
    assert told == ["peer: no driver"]
    with pytest.raises(RuntimeError, match="no driver"):
        measure(case, {"keep_largest": {"peer": broken}}, TINY)
    with pytest.raises(RuntimeError, match="no driver"):
        measure(case, {"keep_largest": {"npscope": broken}}, TINY, unable=lambda n, e: None)


def row(**fields: Any) -> Row:
    given = {
        "section": "warm", "case": "2:4", "group": "N:M", "contender": tables.OURS, "dtype": "float32",
        "data": "normal", "elements": 2**20, "threads": 2, "rounds": 5, "median_ms": 2.0, "q1": 1.9, "q3": 2.2,
        "floor_ms": 1.0, "fraction": 0.5,
    }  # fmt: skip
    return Row(**(given | fields))


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({}, ""),
        ({"bar": 0.5}, "met"),
        ({"bar": 0.51}, "missed"),
        ({"fraction": 1.06}, "failed"),
        ({"fraction": 1.06, "bar": 0.5}, "failed"),
        ({"fraction": 1.05, "bar": 0.5}, "met"),
        ({"bar": 2.0, "judged_by": "ms"}, "met"),
        ({"bar": 1.9, "judged_by": "ms"}, "missed"),
        ({"bar": 2.0, "judged_by": "ratio", "base_ms": 1.0}, "met"),
        ({"bar": 1.9, "judged_by": "ratio", "base_ms": 1.0}, "missed"),
        ({"bar": 3.0, "judged_by": "ratio"}, ""),
        ({"bar": 1.0, "judged_by": "added", "base_ms": 1.0}, "met"),
        ({"bar": 0.9, "judged_by": "added", "base_ms": 1.0}, "missed"),
    ],
)
def test_verdicts(fields, verdict):
    assert row(**fields).verdict == verdict


def test_the_roofline_marks_other_libraries_only_where_there_are_any():
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    ours = [row(), row(case="4:8")]
    for peers, marked in (([], {}), ([row(contender="numpy", fraction=0.2)], {"2:4": 0.2})):
        axes = figure.Figure().add_subplot()
        plots._roofline(axes, [*ours, *peers], ["2:4", "4:8"])
        marks = [line for line in axes.get_lines() if line.get_label() == "best other library"]
        found = {case: x for line in marks for x, case in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        assert found == marked


def test_summary_is_median_and_quartiles():
    assert summary([0.001, 0.002, 0.003, 0.004, 0.005]) == (3.0, 2.0, 4.0)


# --- the command ---------------------------------------------------------------------------------


KEYS = {"machine", "versions", "threads", "mib", "rows", "use"}


def test_npscope_bench_as_json(capsys):
    assert cli.main(["bench", "--mib", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert set(results) == KEYS
    assert set(results["machine"]) == {"cpu", "cores", "ram_gib", "system"}
    assert set(results["versions"]) == {"python", "npscope", "numpy", "numba"}
    rows = [Row(**fields) for fields in results["rows"]]
    assert {(r.case, r.contender) for r in rows} >= {(case.name, "npscope numba") for case in core.CASES}
    assert {r.contender for r in rows} == {"npscope numba", "npscope reference", "numpy"}
    assert set(results["use"]) == {case.group for case in core.CASES}
    assert {use["backend"] for use in results["use"].values()} <= set(core.backends())


def test_npscope_bench_prints_the_table_and_the_advice(capsys, monkeypatch):
    monkeypatch.setattr(core, "CASES", core.CASES[:1])
    assert cli.main(["bench", "--mib", "1"]) == 0
    out = capsys.readouterr().out
    assert "4x4 norms" in out
    assert "block norms: use numba, " in out
    assert cli.main(["bench", "--mib", "0"]) == 2


def test_advice_names_the_fastest_backend():
    rows = [
        row(contender="npscope reference", fraction=0.01),
        row(contender="npscope numba", fraction=0.5),
        row(contender="numpy", fraction=1.0),
    ]
    assert core.advice(rows) == {
        "N:M": {"backend": "numba", "times_as_fast_as": {"npscope reference": 50.0, "numpy": 0.5}}
    }


# --- the full run and its report -----------------------------------------------------------------


def test_a_run_of_some_rows(tmp_path):
    out = tmp_path / "tiny.json"
    command.main(["--quick", "--mib", "0.25", "--largest-mib", "0.004", "--rows", "2:4*", "--out", str(out)])
    results = tables.load(out)
    about = {"machine", "versions", "threads", "arithmetic_of_threads", "commit", "plan", "unable"}
    assert set(results.about) == about
    assert {r.section for r in results.rows} == {"warm", "hostile", "size", "threads"}
    assert all(r.cost is not None for r in results.of("hostile"))
    text = out.read_text()
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert "| 2:4 |" in out.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="nothing at all"):
        command.main(["--rows", "nothing at all", "--out", str(out)])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [
        row(bar=0.4),
        row(contender="numpy", median_ms=1.25, fraction=0.8),
        row(contender="torch", elements=2**18, median_ms=4.0, fraction=0.06),
        row(case="soft 1x1", bar=0.8),
        row(case="4x4 norms", bar=0.8, fraction=1.2),
        row(section="hostile", data="constant", bar=3.0, base_ms=0.5, judged_by="ratio"),
        row(section="small", case="2:4 of 64x64", median_ms=0.0141, bar=0.015, judged_by="ms", fraction=None),
        row(section="cold", case="first call: 2:4", median_ms=1600.0, bar=1500.0, judged_by="ms", fraction=None),
        row(section="cold", case="first call: 2:4", contender="npscope numba without SciPy", median_ms=1300.0),
        *(row(section="size", elements=4**i, fraction=0.1 * i) for i in range(5, 8)),
        *(row(section="threads", threads=i, median_ms=4 / i) for i in (1, 2)),
    ]
    about = {
        "machine": {"cpu": "A CPU with AVX2", "cores": 2, "ram_gib": 8.0, "system": "Linux x86_64"},
        "versions": {"python": "3.12.0", "numpy": "2.4.0"},
        "threads": 2,
        "commit": "abc",
        "plan": asdict(core.Plan(4, 1, 5, 1.0)),
        "unable": [{"case": "2:4", "contender": "sparsekit", "reason": "RuntimeError: no driver"}],
    }
    folder = tmp_path / "results"
    folder.mkdir()
    path = folder / "tiny.json"
    path.write_text(json.dumps(about | {"rows": [asdict(r) for r in rows]}))
    return path


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu avx2 avx512f sve\n", "A CPU with AVX-512"),
        ("model name\t: A CPU\nflags\t\t: fpu avx2\nflags : avx512f\n", "A CPU with AVX2"),
        ("Features\t: fp asimd\n", "Plain with NEON"),
        ("Features\t: fp asimd sve\n", "Plain with SVE"),
        ("model name\t: A CPU\nflags\t\t: fpu sse2\n", "A CPU"),
        (None, "Plain"),
    ],
)
def test_a_machine_is_named_with_its_vectors(monkeypatch, tmp_path, said, expected):
    path = tmp_path / "cpuinfo"
    if said is not None:
        path.write_text(said)
    monkeypatch.setattr(clock, "Path", lambda _: path)
    monkeypatch.setattr(clock.platform, "processor", lambda: "Plain")
    assert clock.machine()["cpu"] == expected


def test_the_report_says_all_and_hides_no_loss(results):
    document = tables.document(tables.load(results), ["tiny-roofline.png"])
    assert document.splitlines()[2].startswith("A CPU with AVX2, 2 threads of 2 cores, 8.0 GiB")
    assert "| 2:4 | 1 | 2 (0.5) | 1.25 (0.8) | ~16 (0.06) |" in document
    assert "sparsekit raises `RuntimeError: no driver`" in document
    assert "Bars met: 2 of 6." in document
    assert "soft 1x1 (0.5, bar 0.8)" in document
    assert "2:4, constant (4.00 x, bar 3 x)" in document
    assert "first call: 2:4 (1600 ms, bar 1500 ms)" in document
    assert "2:4 (numpy 1.60 x)" in document
    assert "Failed measurements (above 1.05 of the floor): 4x4 norms of 4 MiB by npscope numba (1.2)." in document
    assert "14.1" in document
    assert "![tiny-roofline.png](tiny-roofline.png)" in document


def test_a_report_of_one_section_shows_no_empty_table(results):
    all_of_it = tables.load(results)
    cold = tables.Results(all_of_it.about, all_of_it.of("cold"))
    document = tables.document(cold, [])
    assert "| operation |" not in document
    assert "Spread" not in document
    assert "faster" not in document
    (line,) = [line for line in document.splitlines() if line.startswith("| first call: 2:4 | 1600 |")]
    assert "| 1300 | 1500 ms |" in line


def test_the_report_rewrites_its_section_of_the_readme(results, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    command.main(["report", str(results), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\nA CPU with AVX2, 2 threads")
    assert text.endswith("\n<!-- bench:end -->\nafter\n")
    assert "old" not in text
    assert "| 2:4 | 1 | 2 (0.5) |" in text
    assert "[results/tiny.md](results/tiny.md)" in text
    command.main(["report", str(results), "--readme", str(readme)])
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="bench:begin"):
        command.main(["report", str(results), "--readme", str(readme)])


def test_the_report_draws_its_pictures(results):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command.main(["report", str(results), "--readme", str(_readme(results.parent))])
    for kind in ("roofline", "backends", "sizes", "threads"):
        assert (results.parent / f"tiny-{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert "![tiny-roofline.png](tiny-roofline.png)" in results.with_suffix(".md").read_text()


def _readme(folder: Path) -> Path:
    path = folder / "README.md"
    path.write_text("<!-- bench:begin --><!-- bench:end -->")
    return path


def test_the_readme_of_the_project_has_the_marks():
    tables.rewritten((command.ROOT / "README.md").read_text(), "")


def test_parts_are_chosen_by_name():
    names = [task.name for task in suite.matching(suite.tasks(TINY, 1, 1), "2:4*")]
    assert names[0] == "2:4"
    assert {"2:4, constant", "2:4, sizes", "2:4, threads", "2:4, ScopeSpec"} <= set(names)
    assert not [name for name in names if not name.startswith("2:4")]


def test_the_report_of_a_card_is_that_of_its_json():
    """Written again from the committed JSON, `cuda.md` is what it is, and the README has the section."""
    folder = command.ROOT / "bench" / "results"
    gpu, cpu = cuda_report.load(folder / "cuda.json"), tables.load(folder / "cpu.json")
    assert cuda_report.is_cuda(gpu)
    assert (folder / "cuda.md").read_text() == cuda_report.document(gpu, ["cpu-and-gpu.png"])
    section = cuda_report.side_by_side(cpu, gpu, "bench/results", ["cpu-and-gpu.png"])
    assert section in (command.ROOT / "README.md").read_text()
