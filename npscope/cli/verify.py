"""``npscope verify``: whether a file has a pattern."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from npscope import config
from npscope.cli import report
from npscope.cli.options import AS_JSON, DEBUG, RULES, STRICT, THREADS, head, recipe_of_options
from npscope.cli.parsing import argument, flag
from npscope.cli.terminal import print_text, progress_bar, width

if TYPE_CHECKING:
    from npscope.streaming.verification import Verdict


ARGUMENTS = (
    argument("file", metavar="FILE", help="A file of weights, whoever made it."),
    *RULES,
    STRICT,
    AS_JSON,
    THREADS,
    flag("--quiet", "No table and no progress bar."),
    DEBUG,
)


def verify(options: Namespace) -> int:
    """Check that a file has a pattern: in every scope no more blocks in use than may be kept; exit code 1 if not."""
    from npscope.streaming.verification import verify_file

    rules, strict = recipe_of_options(options), options.strict
    with config(threads=options.threads), progress_bar(shown=not options.quiet, what="checking") as progress:
        lines = [_verified(found) for found in verify_file(options.file, rules, strict=strict, progress=progress)]
    fields = report.verified_fields(lines)
    if options.json:
        print_text(report.as_json(head(options, "file", "pattern", "recipe") | fields) + "\n")
    elif not options.quiet:
        print_text(report.verified_table(lines, width=width()))
    return 0 if fields["holds"] else 1


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
