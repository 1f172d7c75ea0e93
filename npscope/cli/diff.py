"""``npscope diff``: how two files differ."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import TYPE_CHECKING

from npscope.cli import report
from npscope.cli.options import AS_JSON, DEBUG, head
from npscope.cli.parsing import argument, flag
from npscope.cli.terminal import print_text, width

if TYPE_CHECKING:
    from npscope.streaming.comparison import Difference


ARGUMENTS = (
    argument("a", metavar="A", help="A file of weights."),
    argument("b", metavar="B", help="Another one, of any format."),
    flag("--by-value", "Zeros of unlike sign are equal, and NaN of unlike bits."),
    AS_JSON,
    flag("--quiet", "No table."),
    DEBUG,
)


def diff(options: Namespace) -> int:
    """Compare two files tensor by tensor, by their bits; exit code 1 when they differ."""
    from npscope.streaming.comparison import compare_files

    lines = [_differing(found) for found in compare_files(options.a, options.b, by_value=options.by_value)]
    fields = report.differing_fields(lines)
    if options.json:
        print_text(report.as_json(head(options, "a", "b", "by_value") | fields) + "\n")
    elif not options.quiet:
        print_text(report.differing_table(lines, width=width()))
    return 0 if fields["equal"] else 1


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
