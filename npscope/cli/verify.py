"""``npscope verify``: whether a file has a pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from npscope import __version__, config
from npscope.cli import report
from npscope.cli.options import (
    AsJson,
    Axis,
    Debug,
    Exclude,
    Include,
    Pattern,
    RecipeFile,
    RuleLayout,
    Threads,
    recipe_of_options,
)
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, progress_bar, width

if TYPE_CHECKING:
    from npscope.streaming.verification import Verdict


def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of weights, whoever made it.")],
    pattern: Pattern = None,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    axis: Axis = None,
    layout: RuleLayout = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a tensor cannot take the pattern.")] = False,
    as_json: AsJson = False,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table and no progress bar.")] = False,
    debug: Debug = False,
) -> Job:
    """Check that a file has a pattern: in every scope no more blocks in use than may be kept; exit code 1 if not."""

    def job() -> int:
        from npscope.streaming.verification import verify_file

        rules = recipe_of_options(recipe, pattern, include, exclude, axis, layout, None)
        with config(threads=threads), progress_bar(shown=not quiet, what="checking") as progress:
            lines = [_verified(verdict) for verdict in verify_file(file, rules, strict=strict, progress=progress)]
        fields = report.verified_fields(lines)
        if as_json:
            head = {"npscope": __version__, "file": file, "pattern": pattern, "recipe": recipe}
            print_text(report.as_json(head | fields) + "\n")
        elif not quiet:
            print_text(report.verified_table(lines, width=width()))
        return 0 if fields["holds"] else 1

    return job


def _verified(verdict: Verdict) -> report.Verified:
    from npscope.recipes.plans import Skip
    from npscope.streaming.verification import CheckedBudget, CheckedCoupling

    if isinstance(verdict, Skip):
        tensor = verdict.tensor
        return report.Verified(
            tensor.name, tensor.dtype, tensor.saved_shape, skipped=verdict.reason, misfit=verdict.misfit
        )
    if isinstance(verdict, CheckedBudget):
        budget = verdict.budget
        pattern = f"keep {budget.keep} of {sum(plan.blocks for plan in budget.plans)}, {len(budget.plans)} tensors"
        return report.Verified(budget.name, None, None, pattern, holds=verdict.holds, used=sum(verdict.used))
    if isinstance(verdict, CheckedCoupling):
        coupling = verdict.coupling
        pattern = f"keep {coupling.keep} of {coupling.blocks} coupled blocks, {len(coupling.tensors)} tensors"
        return report.Verified(
            coupling.name,
            None,
            None,
            pattern,
            holds=verdict.holds,
            scopes=coupling.scopes,
            offending=verdict.offending,
            scope=verdict.scope,
            used=verdict.used,
        )
    plan, first = verdict.plan, verdict.first
    return report.Verified(
        plan.tensor.name,
        plan.tensor.dtype,
        plan.tensor.saved_shape,
        plan.pattern,
        plan.along,
        verdict.holds,
        plan.scopes,
        verdict.offending,
        *((None, None, None) if first is None else (first.scope, first.start, first.used)),
    )
