"""``npscope bench``: time the operations on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from npscope.cli import report
from npscope.cli.options import AsJson, Debug
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, progress_bar, width


def bench(
    mib: Annotated[int, typer.Option(min=1, max=4096, help="MiB of the array that most operations work on.")] = 64,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Job:
    """Time the operations on this machine, about a minute: which backend to use for what."""

    def job() -> None:
        from npscope.bench import quick

        with progress_bar(shown=not as_json, what="measuring") as progress:
            results = quick(mib, progress)
        if as_json:
            print_text(report.as_json(results) + "\n")
        else:
            print_text(report.bench_table(results, width=width()))

    return job
