"""The commands, in the order in which the help lists them."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from npscope.cli import apply_mask, bench, diff, export, inspect, plan, prune, verify
from npscope.cli.running import run

app = typer.Typer(
    help="Block and N:M sparsity for files of weights.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    prune.prune,
    plan.plan,
    inspect.inspect,
    verify.verify,
    diff.diff,
    apply_mask.apply_mask,
    export.export,
    bench.bench,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process by default); return the exit code."""
    return run(app, arguments)
