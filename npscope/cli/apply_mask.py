"""``npscope apply-mask``: zero what a mask does not keep."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from npscope import __version__
from npscope.cli import report
from npscope.cli.options import AsJson, Debug, Force, Output
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, width


def apply_mask(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file of weights; it is only read.")],
    mask: Annotated[str, typer.Argument(metavar="MASK", help="What prune --mask-out wrote.")],
    output: Output,
    as_json: AsJson = False,
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No report.")] = False,
    debug: Debug = False,
) -> Job:
    """Zero what a mask does not keep, in a copy of a file of weights."""

    def job() -> None:
        from npscope.streaming import masks

        done = masks.apply_mask(source, mask, output, force=force)
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
            print_text(report.as_json(head | {"tensors": lines}) + "\n")
        elif not quiet:
            print_text(report.plain_table(lines, width=width()))

    return job
