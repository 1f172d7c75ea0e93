"""``npscope plan``: what a recipe would do to each tensor."""

from __future__ import annotations

from argparse import Namespace

from npscope.cli import report
from npscope.cli.options import AS_JSON, DEBUG, FILES, RULES, SCORES, head, recipe_of_options
from npscope.cli.parsing import argument
from npscope.cli.terminal import print_text, width

ARGUMENTS = (
    argument("file", metavar="FILE", help=f"{FILES}."),
    *RULES,
    SCORES,
    AS_JSON,
    DEBUG,
)


def plan(options: Namespace) -> None:
    """Say what a pattern or recipe would do to every tensor: its rule, its axes, its blocks, or why it is left."""
    from npscope.recipes.planning import plan_file

    lines = [
        report.Planned(
            planned.tensor.name,
            planned.tensor.dtype,
            planned.tensor.shape,
            planned.axes,
            planned.rule,
            planned.pattern,
            planned.along,
            planned.blocks,
            planned.keep,
            planned.group,
            planned.skipped,
            planned.misfit,
        )
        for planned in plan_file(options.file, recipe_of_options(options, options.scores))
    ]
    if options.json:
        said = head(options, "file", "pattern", "recipe", "scores")
        print_text(report.as_json(said | report.planned_fields(lines)) + "\n")
    else:
        print_text(report.planned_table(lines, width=width()))
