"""``npscope apply-mask``: zero what a mask does not keep."""

from __future__ import annotations

import math
from argparse import Namespace

from npscope.cli import report
from npscope.cli.options import AS_JSON, DEBUG, FORCE, OUTPUT, head
from npscope.cli.parsing import argument, flag
from npscope.cli.terminal import print_text, width

ARGUMENTS = (
    argument("input", metavar="FILE", help="A file of weights; it is only read."),
    argument("mask", metavar="MASK", help="What prune --mask-out wrote."),
    OUTPUT,
    AS_JSON,
    FORCE,
    flag("--quiet", "No report."),
    DEBUG,
)


def apply_mask(options: Namespace) -> None:
    """Zero what a mask does not keep, in a copy of a file of weights."""
    from npscope.streaming import masks

    done = masks.apply_mask(options.input, options.mask, options.output, force=options.force)
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
    if options.json:
        said = head(options, "input", "mask", "output")
        print_text(report.as_json(said | {"tensors": lines}) + "\n")
    elif not options.quiet:
        print_text(report.plain_table(lines, width=width()))
