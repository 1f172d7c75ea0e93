"""``npscope prune``: zero the blocks of smallest norm in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from npscope import __version__, config
from npscope.cli import report
from npscope.cli.options import (
    FILES,
    AsJson,
    Axis,
    Debug,
    Exclude,
    Include,
    MaxBytes,
    Pattern,
    RecipeFile,
    RuleLayout,
    Scores,
    Threads,
    recipe_of_options,
)
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, progress_bar, width
from npscope.errors import FileError, NpscopeError

if TYPE_CHECKING:
    from npscope.recipes.plans import Skip
    from npscope.streaming.pruning import Outcome


def prune(
    source: Annotated[str, typer.Argument(metavar="IN", help=f"{FILES}; it is only read.")],
    pattern: Pattern = None,
    recipe: RecipeFile = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help="The file to write.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace IN itself, when the result is complete.")
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    axis: Axis = None,
    layout: RuleLayout = None,
    scores: Scores = None,
    nan: Annotated[Literal["refuse", "keep"], typer.Option(help="Tensors with NaN: refuse, or rank NaN first.")] = (
        "refuse"
    ),
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a tensor cannot take the pattern.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute and report, write nothing.")] = False,
    mask_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write what is kept, a bit for each element, for apply-mask.")
    ] = None,
    report_file: Annotated[
        str | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Also write what --json says, to a file. It comes when OUT is complete, which stays if this fails.",
        ),
    ] = None,
    as_json: AsJson = False,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT, mask or report.")] = False,
    max_bytes: MaxBytes = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table and no progress bar.")] = False,
    debug: Debug = False,
) -> Job:
    """Zero the blocks of smallest norm in a copy of a file of weights.

    Embeddings, norms, heads and fixed transform bases are left alone unless --include names them.
    """

    def job() -> None:
        from npscope.streaming.pruning import prune_file
        from npscope.streaming.storage import storage

        rules = recipe_of_options(recipe, pattern, include, exclude, axis, layout, scores)
        with _report_file(report_file, force) as write_report:
            with config(threads=threads), progress_bar(shown=not quiet) as progress:
                results = prune_file(
                    source,
                    output,
                    rules,
                    nan=nan,
                    strict=strict,
                    force=force,
                    in_place=in_place,
                    dry_run=dry_run,
                    mask_out=mask_out,
                    report_out=report_file,
                    max_bytes=max_bytes,
                    progress=progress,
                )
            lines = [_pruned(result) for result in results]
            zeros = [line.zeros_after for line in lines]
            written = source if in_place else output
            done = None if dry_run else written
            with _after(done):
                stored = None if done is None else storage(done, zeros)
                head = {"npscope": __version__, "input": source, "output": written, "dry_run": dry_run}
                head |= {"pattern": pattern, "recipe": recipe, "scores": scores}
                text = report.as_json(head | report.pruned_fields(lines) | {"bytes": stored and asdict(stored)}) + "\n"
                write_report(text)
        if as_json:
            print_text(text)
        elif not quiet:
            print_text(report.pruned_table(lines, width=width()))
            if stored is not None:
                print_text(report.storage_line(**asdict(stored)))

    return job


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
