"""The options that several commands have, and what their texts mean."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from npscope import __version__
from npscope.cli.parsing import argument, flag, whole_number
from npscope.errors import SpecError
from npscope.options import MAX_THREADS

if TYPE_CHECKING:
    from npscope.recipes.recipe import Recipe

AxisName = Literal["in", "fan-in", "last"]

FILES = "A safetensors, npy, npz or ONNX file, or the folder or index of a sharded model"
LAYOUTS = ("out-in", "in-out")

AS_JSON = flag("--json", "Write JSON to standard output, on failure too.")
DEBUG = flag("--debug", "Show the traceback of an error.")
STRICT = flag("--strict", "Fail when a tensor cannot take the pattern.")
LAYOUT = argument(
    "--layout",
    choices=LAYOUTS,
    default="out-in",
    help="How weights are stored: [out, in, ...] as PyTorch does, [..., in, out] as Flax and GPT-2 do "
    "(default: %(default)s).",
)
INCLUDE = argument(
    "--include",
    action="append",
    default=[],
    metavar="GLOB",
    help="Only tensors of these names (glob, or re:EXPRESSION); overrides the skips.",
)
EXCLUDE = argument("--exclude", action="append", default=[], metavar="GLOB", help="Leave these tensors alone.")
RULES = (
    argument(
        "--pattern",
        help='"2:4" keeps 2 of 4 along the input axis; "4x4@0.5" prunes half of the 4x4 tiles of each '
        '[out, fan-in] matrix; "block=1x16 scope=1x8 keep=4 ord=1" (or sparsity=0.5) says it in full, '
        "scope counted in blocks, -1 a whole axis.",
    ),
    argument("-r", "--recipe", metavar="FILE", help="Rules and couplings in a TOML or JSON file, for --pattern."),
    INCLUDE,
    EXCLUDE,
    argument(
        "--axis",
        help="Where a pattern with one size runs: in (the default), fan-in (in x kernel), last, or a number.",
    ),
    argument(
        "--layout",
        choices=LAYOUTS,
        help="How weights are stored: out-in (the default) as PyTorch does, in-out as Flax and GPT-2 do.",
    ),
)
"""What `recipe_of_options` reads, but for the file of scores."""

SCORES = argument(
    "--scores", metavar="FILE", help="Rank by these scores: one for each weight, or for each input channel."
)
OUTPUT = argument("-o", "--output", required=True, metavar="OUT", help="The file to write (required).")
FORCE = flag("--force", "Replace an existing OUT.")
THREADS = argument(
    "-j",
    "--threads",
    type=whole_number(1, MAX_THREADS),
    metavar="N",
    help="N threads compute, otherwise one for each CPU there is; up to three more read and write.",
)
MAX_BYTES = argument(
    "--max-bytes",
    type=whole_number(0),
    metavar="N",
    help="Refuse an npz whose members inflate to more than N bytes.",
)


def head(options: Namespace, *names: str) -> dict[str, Any]:
    """What a report in JSON begins with: the version, and the options of these names."""
    return {"npscope": __version__} | {name: getattr(options, name) for name in names}


def recipe_of_options(options: Namespace, scores: str | None = None) -> Recipe:
    """The recipe that the options of a command describe."""
    from npscope.recipes.recipe_file import recipe_of

    return recipe_of(
        options.recipe,
        pattern=options.pattern,
        include=options.include,
        exclude=options.exclude,
        axis=None if options.axis is None else axis_of(options.axis),
        layout=options.layout,
        scores=scores,
    )


def axis_of(text: str) -> AxisName | int:
    """The axis that ``--axis`` names."""
    if text in get_args(AxisName):
        return cast(AxisName, text)
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 3):
        raise SpecError(f"axis {text!r:.40} is not in, fan-in, last or a number")
    return int(text)


def block_of(text: str) -> tuple[int, int]:
    """The sizes that ``--block`` names."""
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text, re.ASCII)
    if match is None:
        raise SpecError(f"block {text!r:.40} is not two sizes like 4x4")
    return int(match[1]), int(match[2])
