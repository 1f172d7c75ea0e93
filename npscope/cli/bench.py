"""``npscope bench``: time the operations on this machine."""

from __future__ import annotations

from argparse import Namespace

from npscope.cli import report
from npscope.cli.options import AS_JSON, DEBUG
from npscope.cli.parsing import argument, whole_number
from npscope.cli.terminal import print_text, progress_bar, width

ARGUMENTS = (
    argument(
        "--mib",
        type=whole_number(1, 4096),
        default=64,
        metavar="N",
        help="MiB of the array that most operations work on, 1 to 4096 (default: %(default)s).",
    ),
    AS_JSON,
    DEBUG,
)


def bench(options: Namespace) -> None:
    """Time the operations on this machine, about a minute: which backend to use for what."""
    from npscope.bench import quick

    with progress_bar(shown=not options.json, what="measuring") as progress:
        results = quick(options.mib, progress)
    if options.json:
        print_text(report.as_json(results) + "\n")
    else:
        print_text(report.bench_table(results, width=width()))
