"""The commands, in the order in which the help lists them."""

from __future__ import annotations

from collections.abc import Sequence

from npscope import __version__
from npscope.cli import apply_mask, bench, diff, export, inspect, plan, prune, verify
from npscope.cli.parsing import CommandParser, Parser
from npscope.cli.running import run

COMMANDS = (
    (prune.prune, prune.ARGUMENTS),
    (plan.plan, plan.ARGUMENTS),
    (inspect.inspect, inspect.ARGUMENTS),
    (verify.verify, verify.ARGUMENTS),
    (diff.diff, diff.ARGUMENTS),
    (apply_mask.apply_mask, apply_mask.ARGUMENTS),
    (export.export, export.ARGUMENTS),
    (bench.bench, bench.ARGUMENTS),
)
"""What each command does, with its help for a docstring, and its arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process by default); return the exit code."""
    return run(_parser(), arguments)


def _parser() -> Parser:
    parser = Parser(prog="npscope", description="Block and N:M sparsity for files of weights.")
    parser.add_argument("--version", action="version", version=f"npscope {__version__}", help="Show it and exit.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for job, arguments in COMMANDS:
        text = job.__doc__ or ""  # python -OO has no docstrings
        name, summary = job.__name__.replace("_", "-"), text.partition("\n")[0]
        commands.add_parser(name, help=summary, description=text, arguments=arguments).set_defaults(job=job)
    return parser
