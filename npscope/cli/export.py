"""``npscope export``: pruned weights without their zeros."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from npscope import __version__
from npscope.cli import report
from npscope.cli.options import AsJson, Debug, Exclude, Force, Include, Layout, Output, axis_of, block_of
from npscope.cli.running import Job
from npscope.cli.terminal import print_text, width


def export(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A pruned file of weights; it is only read.")],
    to: Annotated[
        Literal["bitmask", "csr", "bsr", "2:4"],
        typer.Option(
            help="bitmask: safetensors as compressed-tensors has it; csr, bsr: one matrix for "
            "scipy.sparse.load_npz; 2:4: an npz of values and 2-bit places."
        ),
    ],
    output: Output,
    include: Include = None,
    exclude: Exclude = None,
    block: Annotated[str, typer.Option(metavar="RxC", help="Size of the blocks of bsr.")] = "4x4",
    axis: Annotated[str, typer.Option(help="Where 2:4 runs: in, fan-in (in x kernel), last, or a number.")] = "in",
    layout: Layout = "out-in",
    as_json: AsJson = False,
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No report.")] = False,
    debug: Debug = False,
) -> Job:
    """Write pruned weights without their zeros, in a layout that other programs read."""

    def job() -> None:
        from npscope.recipes.pattern import Pattern
        from npscope.recipes.recipe import Recipe
        from npscope.streaming import export as exports

        names = tuple(include or ()), tuple(exclude or ())
        if to == "2:4":
            rules = Recipe.shorthand(Pattern.parse("2:4"), *names, axis_of(axis), layout)
            done = exports.export_two_of_four(source, output, rules, strict=bool(include), force=force)
        elif to == "bitmask":
            done = exports.export_bitmask(source, output, exports.Selection(*names), force=force)
        else:
            size = None if to == "csr" else block_of(block)
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
            print_text(report.as_json(head | {"tensors": lines}) + "\n")
        elif not quiet:
            print_text(report.plain_table(lines, width=width()))

    return job
