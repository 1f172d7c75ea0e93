"""``npscope inspect``: the tensors of a file and the sparsity in them."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from npscope import __version__
from npscope.cli import report
from npscope.cli.options import FILES, AsJson, Debug, Layout, MaxBytes
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, width


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help=f"{FILES}.")],
    layout: Layout = "out-in",
    max_bytes: MaxBytes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Job:
    """List the tensors of a file: dtypes, shapes, zeros, and the N:M and block sparsity that is there."""

    def job() -> None:
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
            for found in inspect_file(file, layout=layout, max_bytes=max_bytes)
        ]
        if as_json:
            print_text(report.as_json({"npscope": __version__, "file": file} | report.inspected_fields(lines)) + "\n")
        else:
            print_text(report.inspected_table(lines, width=width()))

    return job
