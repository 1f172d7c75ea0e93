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
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from npscope import __version__, report
from npscope.errors import FileError, NpscopeError, SpecError

if TYPE_CHECKING:
    from npscope.plans import Skip
    from npscope.pruning import Outcome, Progress

Job = Callable[[], None]
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


_MAX_BYTES = Annotated[
    int | None,
    typer.Option("--max-bytes", min=0, metavar="N", help="Refuse an npz whose members inflate to more than N bytes."),
]
_FILES = "A safetensors, npy, npz or ONNX file, or the folder or index of a sharded model"


@app.command()
def prune(
    source: Annotated[str, typer.Argument(metavar="IN", help=f"{_FILES}; it is only read.")],
    pattern: Annotated[
        str,
        typer.Option(
            help='"2:4" keeps 2 of 4 along the input axis; "4x4@0.5" prunes half of the 4x4 tiles of each '
            '[out, fan-in] matrix; "block=1x16 scope=1x8 keep=4 ord=1" (or sparsity=0.5) says it in full, '
            "scope counted in blocks, -1 a whole axis."
        ),
    ],
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help="The file to write.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace IN itself, when the result is complete.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only tensors of these names (glob, or re:EXPRESSION); overrides the skips."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these tensors alone.")] = None,
    axis: Annotated[
        str, typer.Option(help="Where a pattern with one size runs: in, fan-in (in x kernel), last, or a number.")
    ] = "in",
    layout: _LAYOUT = "out-in",
    nan: Annotated[Literal["refuse", "keep"], typer.Option(help="Tensors with NaN: refuse, or rank NaN first.")] = (
        "refuse"
    ),
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a tensor cannot take the pattern.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute and report, write nothing.")] = False,
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
        from npscope.pattern import Pattern
        from npscope.pruning import prune_file
        from npscope.recipe import Recipe

        recipe = Recipe(Pattern.parse(pattern), tuple(include or ()), tuple(exclude or ()), _axis(axis), layout)
        with _progress_bar(shown=not quiet) as progress:
            results = prune_file(
                source,
                output,
                recipe,
                nan=nan,
                strict=strict,
                force=force,
                in_place=in_place,
                dry_run=dry_run,
                max_bytes=max_bytes,
                progress=progress,
            )
        lines = [_pruned(result) for result in results]
        if as_json:
            written = source if in_place else output
            head = {"npscope": __version__, "input": source, "output": written, "dry_run": dry_run, "pattern": pattern}
            _print(report.as_json(head | report.pruned_fields(lines)) + "\n")
        elif not quiet:
            _print(report.pruned_table(lines, width=_width()))

    return job


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help=f"{_FILES}.")],
    layout: _LAYOUT = "out-in",
    max_bytes: _MAX_BYTES = None,
    as_json: _JSON = False,
    debug: _DEBUG = False,
) -> Job:
    """List the tensors of a file: dtypes, shapes, zeros, and the N:M sparsity that is there."""

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
                None if found.n_of_m is None else "keep {} of {}".format(*found.n_of_m),
                found.along,
            )
            for found in inspect_file(file, layout=layout, max_bytes=max_bytes)
        ]
        if as_json:
            _print(report.as_json({"npscope": __version__, "file": file} | report.inspected_fields(lines)) + "\n")
        else:
            _print(report.inspected_table(lines, width=_width()))

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
            _run(given)
        return 0
    except BaseException as error:
        return _fail(error, options=set(given[: given.index("--")] if "--" in given else given))


def _run(arguments: list[str]) -> None:
    if sys.platform == "win32":
        raise SpecError("the command line is not supported on Windows; the Python functions are")
    try:
        job = app(arguments, prog_name="npscope", standalone_mode=False)
    except SystemExit:  # how the parser ends when nobody reads its help
        raise BrokenPipeError from None
    if callable(job):
        job()
    sys.stdout.flush()


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


def _axis(text: str) -> AxisName | int:
    if text in get_args(AxisName):
        return cast(AxisName, text)
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 3):
        raise SpecError(f"axis {text!r:.40} is not in, fan-in, last or a number")
    return int(text)


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
        blocks_kept=plan.scopes * plan.keep,
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
