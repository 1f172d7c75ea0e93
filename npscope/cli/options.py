"""The options that several commands have, and what their texts mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from npscope.errors import SpecError

if TYPE_CHECKING:
    from npscope.recipes.recipe import Recipe

AxisName = Literal["in", "fan-in", "last"]

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, on failure too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Layout = Annotated[
    Literal["out-in", "in-out"],
    typer.Option(help="How weights are stored: [out, in, ...] as PyTorch does, [..., in, out] as Flax and GPT-2 do."),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        help='"2:4" keeps 2 of 4 along the input axis; "4x4@0.5" prunes half of the 4x4 tiles of each '
        '[out, fan-in] matrix; "block=1x16 scope=1x8 keep=4 ord=1" (or sparsity=0.5) says it in full, '
        "scope counted in blocks, -1 a whole axis."
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option("-r", "--recipe", metavar="FILE", help="Rules and couplings in a TOML or JSON file, for --pattern."),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only tensors of these names (glob, or re:EXPRESSION); overrides the skips."),
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these tensors alone.")]
Axis = Annotated[
    str | None,
    typer.Option(help="Where a pattern with one size runs: in (the default), fan-in (in x kernel), last, or a number."),
]
RuleLayout = Annotated[
    Literal["out-in", "in-out"] | None,
    typer.Option(help="How weights are stored: out-in (the default) as PyTorch does, in-out as Flax and GPT-2 do."),
]
Scores = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Rank by these scores: one for each weight, or for each input channel."),
]


Output = Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]


Threads = Annotated[
    int | None,
    typer.Option(
        "-j",
        "--threads",
        metavar="N",
        help="N threads compute, otherwise one for each CPU there is; up to three more read and write.",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option("--max-bytes", min=0, metavar="N", help="Refuse an npz whose members inflate to more than N bytes."),
]
FILES = "A safetensors, npy, npz or ONNX file, or the folder or index of a sharded model"


def recipe_of_options(
    path: str | None,
    pattern: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    axis: str | None,
    layout: Literal["out-in", "in-out"] | None,
    scores: str | None,
) -> Recipe:
    """The recipe that the options of a command describe."""
    from npscope.recipes.recipe_file import recipe_of

    return recipe_of(
        path,
        pattern=pattern,
        include=include or (),
        exclude=exclude or (),
        axis=None if axis is None else axis_of(axis),
        layout=layout,
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
