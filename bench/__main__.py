"""The full benchmark, and its report.

python -m bench [--quick] [--mib N] [--rows GLOB] [--out bench/results/NAME.json]
    measures, and writes NAME.json, NAME.md and pictures.
python -m bench report bench/results/NAME.json
    writes NAME.md and the pictures again from the JSON, and the section of the README.
"""

from __future__ import annotations

import argparse
import json
import os.path
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from bench import cuda_report, suite, tables
from bench.plots import draw
from npscope.bench import Plan

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["report"]:
        parser = argparse.ArgumentParser("python -m bench report")
        parser.add_argument("json", type=Path)
        parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
        options = parser.parse_args(given[1:])
        report(options.json, options.readme)
        return
    parser = argparse.ArgumentParser("python -m bench", epilog="python -m bench report JSON makes the report again")
    parser.add_argument("--quick", action="store_true", help="smaller arrays and fewer rounds: a few minutes")
    parser.add_argument("--mib", type=float, help="MiB of the arrays (256, quick 16)")
    parser.add_argument("--largest-mib", type=float, help="end of the size curve (1024, quick 16)")
    parser.add_argument("--rows", default="*", metavar="GLOB", help="only the parts of these names")
    parser.add_argument("--only", default="", metavar="CONTENDER", help="only contenders whose names begin like this")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", metavar="JSON")
    measure(parser.parse_args(given))


def measure(options: argparse.Namespace) -> None:
    plan = suite.QUICK if options.quick else suite.FULL
    plan = replace(plan, mib=options.mib or plan.mib, slow_mib=min(plan.slow_mib, options.mib or plan.mib))
    largest = options.largest_mib or (16 if options.quick else 1024)
    all_tasks = suite.tasks(plan, largest, cold_rounds=1 if options.quick else 5, only=options.only)
    chosen = suite.matching(all_tasks, options.rows)
    if not chosen:
        raise SystemExit(f"no part of the benchmark is named {options.rows!r}")
    results = _with_progress(chosen, plan)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    report(options.out, None)
    print(tables.losses(tables.load(options.out)))


def _with_progress(chosen: list[suite.Task], plan: Plan) -> dict[str, object]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("", total=len(chosen))
        return suite.run(
            chosen, plan, lambda name, done, total: bars.update(bar, description=f"{name:32.32}", completed=done)
        )


def report(path: Path, readme: Path | None) -> None:
    """Tables and pictures beside the JSON, and the section of the README if it is given."""
    if cuda_report.is_cuda(json.loads(path.read_text())):
        _report_cuda(path, readme)
        return
    results = tables.load(path)
    pictures = draw(results, path.parent, path.stem) if find_spec("matplotlib") else []
    path.with_suffix(".md").write_text(tables.document(results, pictures))
    if readme is not None:
        section = tables.summary(
            results, Path(os.path.relpath(path.parent, readme.parent)).as_posix(), path.stem, pictures
        )
        readme.write_text(tables.rewritten(readme.read_text(), section))


def _report_cuda(path: Path, readme: Path | None) -> None:
    """That of a card, with the CPU beside it where its results lie in the same folder."""
    gpu = cuda_report.load(path)
    cpu = tables.load(path.with_name("cpu.json")) if path.with_name("cpu.json").exists() else None
    pictures = cuda_report.draw(cpu, gpu, path.parent) if find_spec("matplotlib") else []
    path.with_suffix(".md").write_text(cuda_report.document(gpu, pictures))
    if readme is not None and cpu is not None:
        folder = Path(os.path.relpath(path.parent, readme.parent)).as_posix()
        section = cuda_report.side_by_side(cpu, gpu, folder, pictures)
        readme.write_text(tables.rewritten(readme.read_text(), section, "cuda"))


if __name__ == "__main__":
    main()
