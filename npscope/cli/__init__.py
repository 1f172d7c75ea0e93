"""The command ``npscope``: parse, call the library, report, and an exit code.

Commands only parse; each returns the job to run, so that signals and failures are met in one
place and not inside the parser. What computes is imported by the jobs: ``npscope --help`` is
quick.

Exit codes: 0 done; 1 a check failed; 2 wrong use or bad input; 3 input/output or resources;
128 + n ended by signal n (130 is Ctrl-C, 141 a closed pipe).
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from npscope import __version__, report
from npscope.errors import FileError, NpscopeError, SpecError

if TYPE_CHECKING:
    from npscope.comparison import Difference
    from npscope.plans import Skip
    from npscope.pruning import Outcome, Progress
    from npscope.recipe import Recipe
    from npscope.verification import Verdict

Job = Callable[[], int | None]
"""What a command does when it is parsed; it returns its exit code, None for 0."""
AxisName = Literal["in", "fan-in", "last"]

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What the parser raises for wrong use, wherever this version of typer keeps it."""

app = typer.Typer(
    help="Block and N:M sparsity for files of weights.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_JSON = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, on failure too.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_LAYOUT = Annotated[
    Literal["out-in", "in-out"],
    typer.Option(help="How weights are stored: [out, in, ...] as PyTorch does, [..., in, out] as Flax and GPT-2 do."),
]
_PATTERN = Annotated[
    str | None,
    typer.Option(
        help='"2:4" keeps 2 of 4 along the input axis; "4x4@0.5" prunes half of the 4x4 tiles of each '
        '[out, fan-in] matrix; "block=1x16 scope=1x8 keep=4 ord=1" (or sparsity=0.5) says it in full, '
        "scope counted in blocks, -1 a whole axis."
    ),
]
_RECIPE = Annotated[
    str | None,
    typer.Option("-r", "--recipe", metavar="FILE", help="Rules and couplings in a TOML or JSON file, for --pattern."),
]
_INCLUDE = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only tensors of these names (glob, or re:EXPRESSION); overrides the skips."),
]
_EXCLUDE = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these tensors alone.")]
_AXIS = Annotated[
    str | None,
    typer.Option(help="Where a pattern with one size runs: in (the default), fan-in (in x kernel), last, or a number."),
]
_RULE_LAYOUT = Annotated[
    Literal["out-in", "in-out"] | None,
    typer.Option(help="How weights are stored: out-in (the default) as PyTorch does, in-out as Flax and GPT-2 do."),
]
_SCORES = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Rank by these scores: one for each weight, or for each input channel."),
]


_OUTPUT = Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The file to write.")]
_FORCE = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]


_MAX_BYTES = Annotated[
    int | None,
    typer.Option("--max-bytes", min=0, metavar="N", help="Refuse an npz whose members inflate to more than N bytes."),
]
_FILES = "A safetensors, npy, npz or ONNX file, or the folder or index of a sharded model"


@app.command()
def prune(
    source: Annotated[str, typer.Argument(metavar="IN", help=f"{_FILES}; it is only read.")],
    pattern: _PATTERN = None,
    recipe: _RECIPE = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help="The file to write.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace IN itself, when the result is complete.")
    ] = False,
    include: _INCLUDE = None,
    exclude: _EXCLUDE = None,
    axis: _AXIS = None,
    layout: _RULE_LAYOUT = None,
    scores: _SCORES = None,
    nan: Annotated[Literal["refuse", "keep"], typer.Option(help="Tensors with NaN: refuse, or rank NaN first.")] = (
        "refuse"
    ),
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a tensor cannot take the pattern.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute and report, write nothing.")] = False,
    mask_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write what is kept, a bit for each element, for apply-mask.")
    ] = None,
    as_json: _JSON = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    max_bytes: _MAX_BYTES = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table and no progress bar.")] = False,
    debug: _DEBUG = False,
) -> Job:
    """Zero the blocks of smallest norm in a copy of a file of weights.

    Embeddings, norms, heads and fixed transform bases are left alone unless --include names them.
    """

    def job() -> None:
        from npscope.pruning import prune_file
        from npscope.storage import storage

        rules = _recipe(recipe, pattern, include, exclude, axis, layout, scores)
        with _progress_bar(shown=not quiet) as progress:
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
                max_bytes=max_bytes,
                progress=progress,
            )
        lines = [_pruned(result) for result in results]
        zeros = [line.zeros_after for line in lines]
        written = source if in_place else output
        stored = None if dry_run or written is None else storage(written, zeros)
        if as_json:
            head = {"npscope": __version__, "input": source, "output": written, "dry_run": dry_run}
            head |= {"pattern": pattern, "recipe": recipe, "scores": scores}
            _print(report.as_json(head | report.pruned_fields(lines) | {"bytes": stored and asdict(stored)}) + "\n")
        elif not quiet:
            _print(report.pruned_table(lines, width=_width()))
            if stored is not None:
                _print(report.storage_line(**asdict(stored)))

    return job


@app.command()
def plan(
    file: Annotated[str, typer.Argument(metavar="FILE", help=f"{_FILES}.")],
    pattern: _PATTERN = None,
    recipe: _RECIPE = None,
    include: _INCLUDE = None,
    exclude: _EXCLUDE = None,
    axis: _AXIS = None,
    layout: _RULE_LAYOUT = None,
    scores: _SCORES = None,
    as_json: _JSON = False,
    debug: _DEBUG = False,
) -> Job:
    """Say what a pattern or recipe would do to every tensor: its rule, its axes, its blocks, or why it is left."""

    def job() -> None:
        from npscope.planning import plan_file

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
            for planned in plan_file(file, _recipe(recipe, pattern, include, exclude, axis, layout, scores))
        ]
        if as_json:
            head = {"npscope": __version__, "file": file, "pattern": pattern, "recipe": recipe, "scores": scores}
            _print(report.as_json(head | report.planned_fields(lines)) + "\n")
        else:
            _print(report.planned_table(lines, width=_width()))

    return job


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help=f"{_FILES}.")],
    layout: _LAYOUT = "out-in",
    max_bytes: _MAX_BYTES = None,
    as_json: _JSON = False,
    debug: _DEBUG = False,
) -> Job:
    """List the tensors of a file: dtypes, shapes, zeros, and the N:M and block sparsity that is there."""

    def job() -> None:
        from npscope.inspection import inspect_file

        lines = [
            report.Inspected(
                found.tensor.name,
                found.tensor.dtype,
                found.tensor.saved_shape,
                math.prod(found.tensor.shape),
                found.zeros,
                found.nans,
                tuple(group._asdict() for group in found.groups),
                tuple(block._asdict() for block in found.blocks),
            )
            for found in inspect_file(file, layout=layout, max_bytes=max_bytes)
        ]
        if as_json:
            _print(report.as_json({"npscope": __version__, "file": file} | report.inspected_fields(lines)) + "\n")
        else:
            _print(report.inspected_table(lines, width=_width()))

    return job


@app.command()
def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of weights, whoever made it.")],
    pattern: _PATTERN = None,
    recipe: _RECIPE = None,
    include: _INCLUDE = None,
    exclude: _EXCLUDE = None,
    axis: _AXIS = None,
    layout: _RULE_LAYOUT = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a tensor cannot take the pattern.")] = False,
    as_json: _JSON = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table and no progress bar.")] = False,
    debug: _DEBUG = False,
) -> Job:
    """Check that a file has a pattern: in every scope no more blocks in use than may be kept; exit code 1 if not."""

    def job() -> int:
        from npscope.verification import verify_file

        rules = _recipe(recipe, pattern, include, exclude, axis, layout, None)
        with _progress_bar(shown=not quiet, what="checking") as progress:
            lines = [_verified(verdict) for verdict in verify_file(file, rules, strict=strict, progress=progress)]
        fields = report.verified_fields(lines)
        if as_json:
            head = {"npscope": __version__, "file": file, "pattern": pattern, "recipe": recipe}
            _print(report.as_json(head | fields) + "\n")
        elif not quiet:
            _print(report.verified_table(lines, width=_width()))
        return 0 if fields["holds"] else 1

    return job


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A file of weights.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of any format.")],
    by_value: Annotated[
        bool, typer.Option("--by-value", help="Zeros of unlike sign are equal, and NaN of unlike bits.")
    ] = False,
    as_json: _JSON = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table.")] = False,
    debug: _DEBUG = False,
) -> Job:
    """Compare two files tensor by tensor, by their bits; exit code 1 when they differ."""

    def job() -> int:
        from npscope.comparison import compare_files

        lines = [_differing(found) for found in compare_files(a, b, by_value=by_value)]
        fields = report.differing_fields(lines)
        if as_json:
            _print(report.as_json({"npscope": __version__, "a": a, "b": b, "by_value": by_value} | fields) + "\n")
        elif not quiet:
            _print(report.differing_table(lines, width=_width()))
        return 0 if fields["equal"] else 1

    return job


@app.command("apply-mask")
def apply_mask_command(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file of weights; it is only read.")],
    mask: Annotated[str, typer.Argument(metavar="MASK", help="What prune --mask-out wrote.")],
    output: _OUTPUT,
    as_json: _JSON = False,
    force: _FORCE = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No report.")] = False,
    debug: _DEBUG = False,
) -> Job:
    """Zero what a mask does not keep, in a copy of a file of weights."""

    def job() -> None:
        from npscope.masks import apply_mask

        done = apply_mask(source, mask, output, force=force)
        lines = [
            {
                "name": masked.tensor.name,
                "dtype": masked.tensor.dtype,
                "shape": masked.tensor.saved_shape,
                "elements": math.prod(masked.tensor.shape),
                "dropped": masked.dropped,
                "changed": masked.changed,
            }
            for masked in done
        ]
        if as_json:
            head = {"npscope": __version__, "input": source, "mask": mask, "output": output}
            _print(report.as_json(head | {"tensors": lines}) + "\n")
        elif not quiet:
            _print(report.plain_table(lines, width=_width()))

    return job


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A pruned file of weights; it is only read.")],
    to: Annotated[
        Literal["bitmask", "csr", "bsr", "2:4"],
        typer.Option(
            help="bitmask: safetensors as compressed-tensors has it; csr, bsr: one matrix for "
            "scipy.sparse.load_npz; 2:4: an npz of values and 2-bit places."
        ),
    ],
    output: _OUTPUT,
    include: _INCLUDE = None,
    exclude: _EXCLUDE = None,
    block: Annotated[str, typer.Option(metavar="RxC", help="Size of the blocks of bsr.")] = "4x4",
    axis: Annotated[str, typer.Option(help="Where 2:4 runs: in, fan-in (in x kernel), last, or a number.")] = "in",
    layout: _LAYOUT = "out-in",
    as_json: _JSON = False,
    force: _FORCE = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No report.")] = False,
    debug: _DEBUG = False,
) -> Job:
    """Write pruned weights without their zeros, in a layout that other programs read."""

    def job() -> None:
        from npscope import export as exports
        from npscope.pattern import Pattern
        from npscope.recipe import Recipe

        names = tuple(include or ()), tuple(exclude or ())
        if to == "2:4":
            rules = Recipe.shorthand(Pattern.parse("2:4"), *names, _axis(axis), layout)
            done = exports.export_two_of_four(source, output, rules, strict=bool(include), force=force)
        elif to == "bitmask":
            done = exports.export_bitmask(source, output, exports.Selection(*names), force=force)
        else:
            size = None if to == "csr" else _block(block)
            done = exports.export_matrix(source, output, exports.Selection(*names), size, force=force)
        lines = [
            {
                "name": exported.tensor.name,
                "dtype": exported.tensor.dtype,
                "shape": exported.tensor.shape,
                "bytes_before": exported.tensor.nbytes,
                "bytes": exported.nbytes,
            }
            for exported in done
        ]
        if as_json:
            head = {"npscope": __version__, "input": source, "output": output, "to": to}
            _print(report.as_json(head | {"tensors": lines}) + "\n")
        elif not quiet:
            _print(report.plain_table(lines, width=_width()))

    return job


@app.command()
def bench(
    mib: Annotated[int, typer.Option(min=1, max=4096, help="MiB of the array that most operations work on.")] = 64,
    as_json: _JSON = False,
    debug: _DEBUG = False,
) -> Job:
    """Time the operations on this machine, about a minute: which backend to use for what."""

    def job() -> None:
        from npscope.bench import quick

        with _progress_bar(shown=not as_json, what="measuring") as progress:
            results = quick(mib, progress)
        if as_json:
            _print(report.as_json(results) + "\n")
        else:
            _print(report.bench_table(results, width=_width()))

    return job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process by default); return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _signals_raise():
            return _run(given)
    except BaseException as error:
        return _fail(error, options=set(given[: given.index("--")] if "--" in given else given))


def _run(arguments: list[str]) -> int:
    if sys.platform == "win32":
        raise SpecError("the command line is not supported on Windows; the Python functions are")
    try:
        job = app(arguments, prog_name="npscope", standalone_mode=False)
    except SystemExit:  # how the parser ends when nobody reads its help
        raise BrokenPipeError from None
    code = job() if callable(job) else None
    sys.stdout.flush()
    return code or 0


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP raise `Stopped`, unless the caller ignores them."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread() and sys.platform != "win32":
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(ending) is not signal.SIG_IGN:
                before[ending] = signal.signal(ending, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(error: BaseException, options: set[str]) -> int:
    """Report a failure in one line; the exit code that it has."""
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    code, message = _explained(error)
    if "--json" in options:
        with suppress(OSError):
            fields = {"kind": type(error).__name__, "message": message, "exit_code": code}
            _print(report.as_json({"npscope": __version__, "error": fields}) + "\n")
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    with suppress(OSError):
        if "--debug" in options:
            traceback.print_exception(error)
        print(f"npscope: error: {report.printable(message)}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Send standard output nowhere: what is left in its buffer would fail again, loudly, when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error."""
    if isinstance(error, _UsageError):
        return 2, error.format_message() + " (npscope --help)"  # type: ignore[attr-defined]
    if isinstance(error, NpscopeError):
        return 3 if isinstance(error, FileError) else 2, str(error)
    if isinstance(error, MemoryError):
        return 3, f"out of memory {error}".rstrip()
    if isinstance(error, OSError):
        return 3, f"{error.filename!r}: {error.strerror}" if error.filename is not None else str(error)
    return 3, f"{type(error).__name__}: {error} (this should not happen; --debug shows where it did)"


def _recipe(
    path: str | None,
    pattern: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    axis: str | None,
    layout: Literal["out-in", "in-out"] | None,
    scores: str | None,
) -> Recipe:
    """The recipe that the options of a command describe."""
    from npscope.recipe_file import recipe_of

    return recipe_of(
        path,
        pattern=pattern,
        include=include or (),
        exclude=exclude or (),
        axis=None if axis is None else _axis(axis),
        layout=layout,
        scores=scores,
    )


def _axis(text: str) -> AxisName | int:
    if text in get_args(AxisName):
        return cast(AxisName, text)
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 3):
        raise SpecError(f"axis {text!r:.40} is not in, fan-in, last or a number")
    return int(text)


def _block(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text, re.ASCII)
    if match is None:
        raise SpecError(f"block {text!r:.40} is not two sizes like 4x4")
    return int(match[1]), int(match[2])


def _verified(verdict: Verdict) -> report.Verified:
    from npscope.plans import Skip
    from npscope.verification import CheckedBudget, CheckedCoupling

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


def _differing(found: Difference) -> report.Differing:
    return report.Differing(
        found.name,
        found.status,
        (None if found.a is None else found.a.dtype, None if found.b is None else found.b.dtype),
        (None if found.a is None else found.a.saved_shape, None if found.b is None else found.b.saved_shape),
        None if found.a is None else math.prod(found.a.saved_shape),
        found.differing,
        found.zeros,
        found.nans,
        found.first,
        found.largest,
    )


def _pruned(result: Outcome | Skip) -> report.Pruned:
    from npscope.plans import Skip

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


@contextmanager
def _progress_bar(*, shown: bool, what: str = "pruning") -> Iterator[Progress | None]:
    """Context with a callback that draws a bar on standard error, or None when that is no terminal."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
