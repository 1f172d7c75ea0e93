"""``npscope inspect``: the tensors of a file and the sparsity in them."""

from __future__ import annotations

import math
from argparse import Namespace

from npscope.cli import report
from npscope.cli.options import AS_JSON, DEBUG, FILES, LAYOUT, MAX_BYTES, head
from npscope.cli.parsing import argument
from npscope.cli.terminal import print_text, width

ARGUMENTS = (
    argument("file", metavar="FILE", help=f"{FILES}."),
    LAYOUT,
    MAX_BYTES,
    AS_JSON,
    DEBUG,
)


def inspect(options: Namespace) -> None:
    """List the tensors of a file: dtypes, shapes, zeros, and the N:M and block sparsity that is there."""
    from npscope.streaming.inspection import inspect_file

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
        for found in inspect_file(options.file, layout=options.layout, max_bytes=options.max_bytes)
    ]
    if options.json:
        print_text(report.as_json(head(options, "file") | report.inspected_fields(lines)) + "\n")
    else:
        print_text(report.inspected_table(lines, width=width()))
