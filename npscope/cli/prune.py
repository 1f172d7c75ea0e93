"""``npscope prune``: zero the blocks of smallest norm in a file."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from npscope import config
from npscope.cli import report
from npscope.cli.options import (
    AS_JSON,
    DEBUG,
    FILES,
    MAX_BYTES,
    RULES,
    SCORES,
    STRICT,
    THREADS,
    head,
    recipe_of_options,
)
from npscope.cli.parsing import argument, flag
from npscope.cli.terminal import print_text, progress_bar, width
from npscope.errors import FileError, NpscopeError

if TYPE_CHECKING:
    from npscope.recipes.plans import Skip
    from npscope.streaming.pruning import Outcome


ARGUMENTS = (
    argument("input", metavar="IN", help=f"{FILES}; it is only read."),
    argument("-o", "--output", metavar="OUT", help="The file to write."),
    flag("--in-place", "Replace IN itself, when the result is complete."),
    *RULES,
    SCORES,
    argument(
        "--nan",
        choices=("refuse", "keep"),
        default="refuse",
        help="Tensors with NaN: refuse, or rank NaN first (default: %(default)s).",
    ),
    STRICT,
    flag("--dry-run", "Compute and report, write nothing."),
    argument("--mask-out", metavar="FILE", help="Write what is kept, a bit for each element, for apply-mask."),
    argument(
        "--report",
        metavar="FILE",
        help="Also write what --json says, to a file. It comes when OUT is complete, which stays if this fails.",
    ),
    AS_JSON,
    THREADS,
    flag("--force", "Replace an existing OUT, mask or report."),
    MAX_BYTES,
    flag("--quiet", "No table and no progress bar."),
    DEBUG,
)


def prune(options: Namespace) -> None:
    """Zero the blocks of smallest norm in a copy of a file of weights.

    Embeddings, norms, heads and fixed transform bases are left alone unless --include names them.
    """
    from npscope.streaming.pruning import prune_file
    from npscope.streaming.storage import storage

    rules = recipe_of_options(options, options.scores)
    with _report_file(options.report, options.force) as write_report:
        with config(threads=options.threads), progress_bar(shown=not options.quiet) as progress:
            results = prune_file(
                options.input,
                options.output,
                rules,
                nan=options.nan,
                strict=options.strict,
                force=options.force,
                in_place=options.in_place,
                dry_run=options.dry_run,
                mask_out=options.mask_out,
                report_out=options.report,
                max_bytes=options.max_bytes,
                progress=progress,
            )
        lines = [_pruned(result) for result in results]
        zeros = [line.zeros_after for line in lines]
        written = options.input if options.in_place else options.output
        done = None if options.dry_run else written
        with _after(done):
            stored = None if done is None else storage(done, zeros)
            said = head(options, "input", "output", "dry_run", "pattern", "recipe", "scores") | {"output": written}
            text = report.as_json(said | report.pruned_fields(lines) | {"bytes": stored and asdict(stored)}) + "\n"
            write_report(text)
    if options.json:
        print_text(text)
    elif not options.quiet:
        print_text(report.pruned_table(lines, width=width()))
        if stored is not None:
            print_text(report.storage_line(**asdict(stored)))


@contextmanager
def _report_file(path: str | None, force: bool) -> Iterator[Callable[[str], None]]:
    """Context with what writes the report, if there is to be one, into a file that is begun before the work is.

    SpecError when a file is there, without `force`.
    """
    from npscope.weights.output import Target, stage, write_all

    if path is None:
        yield lambda text: None
        return
    with stage(Target.of(path, force=force)) as building:

        def write(text: str) -> None:
            write_all(building.fd, memoryview(text.encode()))
            building.publish()

        yield write


@contextmanager
def _after(output: str | None) -> Iterator[None]:
    """Context of what comes when `output`, if there is one, is in its place: an error says so."""
    try:
        yield
    except (NpscopeError, OSError) as error:
        if output is None:
            raise
        raise FileError(f"{output!r} is complete, but not the report: {error}") from error


def _pruned(result: Outcome | Skip) -> report.Pruned:
    from npscope.recipes.plans import Skip

    if isinstance(result, Skip):
        tensor = result.tensor
        return report.Pruned(
            tensor.name,
            tensor.dtype,
            tensor.saved_shape,
            math.prod(tensor.shape),
            skipped=result.reason,
            misfit=result.misfit,
        )
    plan = result.plan
    return report.Pruned(
        plan.tensor.name,
        plan.tensor.dtype,
        plan.tensor.saved_shape,
        math.prod(plan.shape),
        pattern=plan.pattern,
        along=plan.along,
        blocks=plan.scopes * plan.blocks,
        blocks_kept=result.blocks_kept,
        zeros_before=result.zeros_before,
        zeros_after=result.zeros_after,
        norm_kept=result.norm_kept,
    )
