"""``npscope export``: pruned weights without their zeros."""

from __future__ import annotations

from argparse import Namespace

from npscope.cli import report
from npscope.cli.options import AS_JSON, DEBUG, EXCLUDE, FORCE, INCLUDE, LAYOUT, OUTPUT, axis_of, block_of, head
from npscope.cli.parsing import argument, flag
from npscope.cli.terminal import print_text, width

ARGUMENTS = (
    argument("input", metavar="FILE", help="A pruned file of weights; it is only read."),
    argument(
        "--to",
        required=True,
        choices=("bitmask", "csr", "bsr", "2:4"),
        help="bitmask: safetensors as compressed-tensors has it; csr, bsr: one matrix for "
        "scipy.sparse.load_npz; 2:4: an npz of values and 2-bit places (required).",
    ),
    OUTPUT,
    INCLUDE,
    EXCLUDE,
    argument("--block", default="4x4", metavar="RxC", help="Size of the blocks of bsr (default: %(default)s)."),
    argument(
        "--axis",
        default="in",
        help="Where 2:4 runs: in, fan-in (in x kernel), last, or a number (default: %(default)s).",
    ),
    LAYOUT,
    AS_JSON,
    FORCE,
    flag("--quiet", "No report."),
    DEBUG,
)


def export(options: Namespace) -> None:
    """Write pruned weights without their zeros, in a layout that other programs read."""
    from npscope.recipes.pattern import Pattern
    from npscope.recipes.recipe import Recipe
    from npscope.streaming import export as exports

    names = tuple(options.include), tuple(options.exclude)
    source, output, force = options.input, options.output, options.force
    if options.to == "2:4":
        rules = Recipe.shorthand(Pattern.parse("2:4"), *names, axis_of(options.axis), options.layout)
        done = exports.export_two_of_four(source, output, rules, strict=bool(options.include), force=force)
    elif options.to == "bitmask":
        done = exports.export_bitmask(source, output, exports.Selection(*names), force=force)
    else:
        size = None if options.to == "csr" else block_of(options.block)
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
    if options.json:
        print_text(report.as_json(head(options, "input", "output", "to") | {"tensors": lines}) + "\n")
    elif not options.quiet:
        print_text(report.plain_table(lines, width=width()))
