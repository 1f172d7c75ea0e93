"""The full benchmark: every section as a list of named tasks, and the results of those that were chosen."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import cold, small
from bench.cases import CURVES, HOSTILE, OURS, TABLE, WARM, of_size
from npscope.bench import Case, Plan, environment, measure
from npscope.clock import Row, arithmetic_of, steps
from npscope.options import config, thread_count

FULL = Plan(256, slow_mib=16, rounds=11, seconds=4)
QUICK = Plan(16, slow_mib=1, rounds=5, seconds=0.3)

LIBRARIES = ("torch", "sparsekit", "pyproximal", "skglm")


@dataclass
class Found:
    """What has been measured, and which peer could not do what (`unable`)."""

    rows: list[Row] = field(default_factory=list)
    unable: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A part of the benchmark; it sees what was found before it, and returns its rows."""

    name: str
    run: Callable[[Found], list[Row]]


def tasks(plan: Plan, largest_mib: float, cold_rounds: int, only: str = "") -> list[Task]:
    """All of the benchmark, in order; of the warm cases `only` the contenders whose names begin like this."""
    sizes = [4.0**i / 1024 for i in range(16) if 4.0**i / 1024 <= largest_mib]
    return [
        *(Task(case.name, partial(_warm, case, plan, only)) for case in WARM),
        *(Task(f"{case.name}, {case.data}", partial(_hostile, case, plan)) for case in HOSTILE),
        Task("small arrays", lambda before: small.rows(plan)),
        *(Task(f"{case.name}, sizes", partial(_size, of_size(case, mib), plan)) for case in CURVES for mib in sizes),
        *(
            Task(f"{case.name}, threads", partial(_threads, case, plan, count))
            for case in CURVES
            for count in steps(thread_count())
        ),
        *(Task(name, lambda before, job=job: job()) for name, job in cold.tasks(cold_rounds)),
    ]


def _warm(case: Case, plan: Plan, only: str, before: Found) -> list[Row]:
    def unable(contender: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.80}"
        before.unable.append({"case": case.name, "contender": contender, "reason": reason})

    rows = measure(case, TABLE, plan, only=(only,), unable=unable)
    return [row if row.contender == OURS else replace(row, bar=None) for row in rows]


def _hostile(case: Case, plan: Plan, before: Found) -> list[Row]:
    normal = {(row.case, row.contender): row.median_ms for row in before.rows if row.section == "warm"}
    rows = measure(case, TABLE, plan, section="hostile", only=(OURS,))
    return [replace(row, judged_by="ratio", base_ms=normal.get((row.case, row.contender))) for row in rows]


def _size(case: Case, plan: Plan, before: Found) -> list[Row]:
    rows = measure(replace(case, bar=None), TABLE, plan, section="size", only=(OURS, "numpy"))
    return [row for row in rows if row.elements == max(r.elements for r in rows)]


def _threads(case: Case, plan: Plan, threads: int, before: Found) -> list[Row]:
    with config(threads=threads):
        return measure(replace(case, bar=None), TABLE, plan, section="threads", only=(OURS,))


def run(
    chosen: list[Task], plan: Plan, progress: Callable[[str, int, int], None] = lambda name, done, total: None
) -> dict[str, Any]:
    """The results of some tasks, ready for JSON."""
    found = Found()
    for done, task in enumerate(chosen):
        progress(task.name, done, len(chosen))
        found.rows += task.run(found)
    about = environment() | {"arithmetic_of_threads": arithmetic_of(thread_count())}
    about["versions"] |= {name: number for name in LIBRARIES if (number := _version(name))}
    rows = [asdict(row) for row in found.rows]
    return {**about, "commit": commit(), "plan": asdict(plan), "unable": found.unable, "rows": rows}


def matching(all_tasks: list[Task], pattern: str) -> list[Task]:
    """The tasks whose name matches a glob."""
    return [task for task in all_tasks if fnmatchcase(task.name, pattern)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this code, if it is in a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
