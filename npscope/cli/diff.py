"""``npscope diff``: how two files differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from npscope import __version__
from npscope.cli import report
from npscope.cli.options import AsJson, Debug
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, width

if TYPE_CHECKING:
    from npscope.streaming.comparison import Difference


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A file of weights.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of any format.")],
    by_value: Annotated[
        bool, typer.Option("--by-value", help="Zeros of unlike sign are equal, and NaN of unlike bits.")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table.")] = False,
    debug: Debug = False,
) -> Job:
    """Compare two files tensor by tensor, by their bits; exit code 1 when they differ."""

    def job() -> int:
        from npscope.streaming.comparison import compare_files

        lines = [_differing(found) for found in compare_files(a, b, by_value=by_value)]
        fields = report.differing_fields(lines)
        if as_json:
            print_text(report.as_json({"npscope": __version__, "a": a, "b": b, "by_value": by_value} | fields) + "\n")
        elif not quiet:
            print_text(report.differing_table(lines, width=width()))
        return 0 if fields["equal"] else 1

    return job


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
