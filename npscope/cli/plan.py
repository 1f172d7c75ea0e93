"""``npscope plan``: what a recipe would do to each tensor."""

from __future__ import annotations

from typing import Annotated

import typer

from npscope import __version__
from npscope.cli import report
from npscope.cli.options import (
    FILES,
    AsJson,
    Axis,
    Debug,
    Exclude,
    Include,
    Pattern,
    RecipeFile,
    RuleLayout,
    Scores,
    recipe_of_options,
)
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, width


def plan(
    file: Annotated[str, typer.Argument(metavar="FILE", help=f"{FILES}.")],
    pattern: Pattern = None,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    axis: Axis = None,
    layout: RuleLayout = None,
    scores: Scores = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Job:
    """Say what a pattern or recipe would do to every tensor: its rule, its axes, its blocks, or why it is left."""

    def job() -> None:
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
            for planned in plan_file(file, recipe_of_options(recipe, pattern, include, exclude, axis, layout, scores))
        ]
        if as_json:
            head = {"npscope": __version__, "file": file, "pattern": pattern, "recipe": recipe, "scores": scores}
            print_text(report.as_json(head | report.planned_fields(lines)) + "\n")
        else:
            print_text(report.planned_table(lines, width=width()))

    return job
