"""Patterns are exactly what was written; plans say which blocks compete, or why a tensor is left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npscope import nnz_from_sparsity
from npscope.errors import SpecError
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Plan, Skip
from npscope.recipes.recipe import DEFAULT_SKIPS, Recipe, resolve
from npscope.weights import Tensor


def tensor(*shape: int, name: str = "weight", dtype: str = "float32") -> Tensor:
    return Tensor(name, dtype, shape, 4 * math.prod(shape))


def decided(pattern: str, *shape: int, **options: Any) -> Plan | Skip:
    return resolve(Recipe.shorthand(Pattern.parse(pattern), **options), [tensor(*shape)])[0]


def plan(pattern: str, *shape: int, **options: Any) -> Plan:
    decision = decided(pattern, *shape, **options)
    assert isinstance(decision, Plan), decision
    return decision


def reason(pattern: str, *shape: int, **options: Any) -> str:
    decision = decided(pattern, *shape, **options)
    assert isinstance(decision, Skip)
    assert decision.misfit
    return decision.reason


# --- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", Pattern((1,), (4,), 2)),
        (" 4:8 ", Pattern((1,), (8,), 4)),
        ("0:4", Pattern((1,), (4,), 0)),
        ("4:4", Pattern((1,), (4,), 4)),
        ("4x4@0.5", Pattern((4, 4), None, "0.5")),
        ("1x1@0.29", Pattern((1, 1), None, "0.29")),
        ("16@1/3", Pattern((16,), None, "1/3")),
        ("8x1@5e-1", Pattern((8, 1), None, "5e-1")),
        ("block=1x16 scope=1x8 keep=4 ord=1", Pattern((1, 16), (1, 8), 4, 1.0)),
        ("ord=inf  keep=3 scope=-1 block=2", Pattern((2,), (-1,), 3, math.inf)),
        ("block=4x-1 sparsity=.25 ord=1.5", Pattern((4, -1), None, ".25", 1.5)),
        ("block=4x4 keep=7", Pattern((4, 4), None, 7)),
    ],
)
def test_patterns_are_read_exactly(text: str, pattern: Pattern) -> None:
    assert Pattern.parse(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("5:4", "cannot keep 5 of 4", id="case13-N-above-M"),
        pytest.param("0:0", "size 0", id="case13-M-0"),
        pytest.param("2:0", "size 0", id="case13-N-of-0"),
        pytest.param("2:-4", "is no pattern", id="case13-negative"),
        pytest.param("0x4@0.5", "size 0", id="case1-block-0"),
        pytest.param("block=-2 keep=1", "is not one size or two", id="case2-block"),
        pytest.param("block=4 scope=0 keep=0", "size 0", id="case7-scope-0"),
        pytest.param("4x4@1.5", r"outside \[0, 1\]", id="case11-above-1"),
        pytest.param("4x4@-0.5", "is not a number", id="case11-negative"),
        pytest.param("4x4@nan", "is not a number", id="case11-nan"),
        pytest.param("4x4@1/0", "is not a number", id="case11-division-by-0"),
        pytest.param("4x4@1e-999999999", "is not a number", id="case11-exponent"),
        pytest.param("4x4@", "is no pattern", id="share-missing"),
        pytest.param("4x4x4@0.5", "one size or two", id="three-sizes"),
        pytest.param("", "block size is missing", id="empty"),
        pytest.param("half", "is no pattern", id="word"),
        pytest.param("2:4:8", "is no pattern", id="two-colons"),
        pytest.param("\u0662:\u0664", "is no pattern", id="digits-of-another-script"),
        pytest.param("block=1e99 keep=1", "one size or two", id="case6-exponent"),
        pytest.param(f"block={10**30} keep=1", "one size or two", id="case6-huge"),
        pytest.param("scope=1x4 keep=2", "block size is missing", id="no-block"),
        pytest.param("block=1x4 scope=4 keep=2", "2 sizes and scope 1", id="case4-lengths"),
        pytest.param("block=4", "either keep= or sparsity=", id="no-amount"),
        pytest.param("block=4 keep=1 sparsity=0.5", "either keep= or sparsity=", id="both-amounts"),
        pytest.param("block=4 block=8 keep=1", "given twice", id="case21-key-twice"),
        pytest.param("block=4 keeps=1", "'keeps' is unknown", id="unknown-key"),
        pytest.param("block=4 keep=1.5", "not a whole number", id="keep-float"),
        pytest.param("block=4 keep=-1", "not a whole number", id="case9-negative"),
        pytest.param("block=4 scope=8 keep=9", "cannot keep 9 of 8", id="case9-too-many"),
        pytest.param("block=4 keep=1 ord=0", "ord='0'", id="ord-0"),
        pytest.param("block=4 keep=1 ord=-1", "ord='-1'", id="ord-negative"),
        pytest.param("block=4 keep=1 ord=nan", "ord='nan'", id="ord-nan"),
    ],
)
def test_bad_patterns_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Pattern.parse(text)
    assert str(caught.value).startswith("pattern '")


@given(st.text(alphabet="0123456789x:@.-=/ blockscopekeepsparsityordinf", max_size=30))
def test_any_text_is_a_pattern_or_one_error(text: str) -> None:
    try:
        pattern = Pattern.parse(text)
    except SpecError:
        return
    assert all(size == -1 or size >= 1 for size in pattern.block)


# --- where a pattern lies ------------------------------------------------------------------------


def test_n_of_m_runs_along_the_input_axis() -> None:
    linear = plan("2:4", 6, 8)
    assert (linear.shape, linear.order, linear.block, linear.scope) == ((6, 8), (0, 1), (1, 1), (1, 4))
    assert (linear.scopes, linear.blocks, linear.keep) == (12, 4, 2)
    assert (linear.pattern, linear.along) == ("keep 2 of 4", "axis 1 (in)")

    convolution = plan("2:4", 6, 8, 3, 5)
    assert (convolution.shape, convolution.scope) == ((6, 8, 3, 5), (1, 4, 1, 1))


def test_fan_in_flattens_the_kernel() -> None:
    flat = plan("2:4", 6, 5, 2, 2, axis="fan-in")
    assert (flat.shape, flat.order, flat.scope) == ((6, 20), (0, 1), (1, 4))
    assert flat.along == "fan-in"


def test_other_axes() -> None:
    assert plan("2:4", 8, 6, axis=0).scope == (4, 1)
    assert plan("2:4", 6, 5, 4, axis="last").scope == (1, 1, 4)
    assert plan("2:4", 6, 5, 4, axis=-1) == plan("2:4", 6, 5, 4, axis=2)
    assert "no axis 3 in 3 axes" in reason("2:4", 4, 4, 4, axis=3)
    with pytest.raises(SpecError, match=r"\[out, fan-in\] matrix"):
        Recipe.shorthand(Pattern.parse("4x4@0.5"), axis="last")


def test_tiles_cut_the_matrix_of_outputs_and_fan_in() -> None:
    tiles = plan("4x4@0.29", 40, 5, 2, 2)
    assert (tiles.shape, tiles.block, tiles.scope) == ((40, 20), (4, 4), (10, 5))
    assert (tiles.scopes, tiles.blocks, tiles.keep) == (1, 50, 50 - 14)
    assert tiles.pattern == "keep 36 of 50 blocks of 4x4"

    rows = plan("block=1x16 scope=1x8 keep=4", 3, 256)
    assert (rows.block, rows.scope, rows.scopes, rows.blocks) == ((1, 16), (1, 8), 6, 8)
    assert rows.pattern == "keep 4 of 8 blocks of 1x16"


def test_case2_minus_one_is_a_whole_axis() -> None:
    whole = plan("block=1x-1 scope=-1x1 keep=2", 6, 8)
    assert (whole.block, whole.scope, whole.pattern) == ((1, 8), (6, 1), "keep 2 of 6 blocks of 1x8")
    assert plan("block=2 scope=-1 sparsity=0.5", 6, 8).scope == (1, 4)


def test_three_axes_are_a_convolution_or_a_stack() -> None:
    assert plan("4x4@0.5", 8, 4, 16).shape == (8, 64)
    stack = plan("4x4@0.5", 8, 4, 20)
    assert (stack.shape, stack.block, stack.scope) == ((8, 4, 20), (1, 4, 4), (8, 1, 5))
    assert plan("block=4x4 scope=-1x-1 keep=1", 8, 4, 20).scope == (1, 1, 5)
    assert plan("2:4", 8, 4, 20).along == "axis 2 (in)"


def test_in_out_storage() -> None:
    linear = plan("2:4", 8, 6, layout="in-out")
    assert (linear.order, linear.scope, linear.along) == ((1, 0), (1, 4), "axis 0 (in)")
    convolution = plan("2:4", 3, 3, 8, 6, layout="in-out")
    assert (convolution.order, convolution.scope) == ((3, 2, 0, 1), (1, 4, 1, 1))
    tiles = plan("4x2@0.5", 3, 3, 8, 12, layout="in-out")
    assert (tiles.shape, tiles.order, tiles.block, tiles.scope) == ((72, 12), (1, 0), (4, 2), (3, 36))
    stack = plan("4x2@0.5", 20, 8, 12, layout="in-out")
    assert (stack.shape, stack.order, stack.block) == ((20, 8, 12), (0, 2, 1), (1, 4, 2))


@pytest.mark.parametrize(
    ("pattern", "shape", "expected"),
    [
        pytest.param("2:4", (4, 6), "axis 1 (in): size 6 is not a multiple of 4", id="case13-M-does-not-divide"),
        pytest.param("4x4@0.5", (6, 8), "out: size 6 is not a multiple of 4", id="case3-block-does-not-divide"),
        pytest.param("block=1x4 scope=1x4 keep=1", (4, 24), "the size 6 is not a multiple of 4", id="case8-scope"),
        pytest.param("block=4x4 keep=5", (8, 8), "cannot keep 5 of 4 blocks", id="case9-keep"),
    ],
)
def test_what_does_not_fit_says_axis_size_and_multiple(pattern: str, shape: tuple[int, ...], expected: str) -> None:
    assert expected in reason(pattern, *shape)


def test_case18_a_kernel_that_does_not_fit_is_told_of_fan_in() -> None:
    assert "--axis fan-in (96) fits" in reason("2:4", 8, 32, 3, axis="last")
    assert "fan-in" not in reason("2:4", 8, 33, 3, axis="last")
    assert "fan-in" not in reason("2:4", 8, 33)


@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 12))
def test_case12_shares_are_exact(percent: int, rows: int, columns: int) -> None:
    text = f"{percent / 100:.2f}"
    laid = plan(f"2x3@{text}", 2 * rows, 3 * columns)
    assert laid.keep == nnz_from_sparsity(text, rows * columns) == rows * columns - percent * rows * columns // 100


# --- which tensors -------------------------------------------------------------------------------


def skipped(recipe: Recipe, *tensors: Tensor) -> dict[str, str]:
    return {d.tensor.name: d.reason for d in resolve(recipe, tensors) if isinstance(d, Skip)}


TWO_OF_FOUR = Pattern.parse("2:4")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "embeddings.word_embeddings.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "model.layers.0.input_layernorm.weight",
        "conv1_BN.weight",
        "lm_head.weight",
        "head.weight",
        "classifier.weight",
        "stft_conv.weight",
        "spectrogram.cqt_kernels_real",
    ],
)
def test_default_skips_name_what_must_be_left_alone(name: str) -> None:
    assert "default skip" in skipped(Recipe.shorthand(TWO_OF_FOUR), tensor(8, 8, name=name))[name]
    assert not skipped(Recipe.shorthand(TWO_OF_FOUR, include=(name,)), tensor(8, 8, name=name))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "encoder.layer.0.attention.output.dense.weight",
        "multihead_attn.in_proj_weight",
        "layers.3.mlp.down_proj.weight",
        "lstm_cell.weight_hh",
        "features.0.conv.weight",
    ],
)
def test_default_skips_leave_layers_to_be_pruned(name: str) -> None:
    assert not skipped(Recipe.shorthand(TWO_OF_FOUR), tensor(8, 8, name=name))


def test_every_default_skip_is_in_lower_case() -> None:
    assert all(glob == glob.lower() for glob in DEFAULT_SKIPS)


def test_what_is_not_eligible_says_why() -> None:
    reasons = skipped(
        Recipe.shorthand(TWO_OF_FOUR),
        tensor(8, name="bias"),
        tensor(8, 8, name="counter", dtype="int64"),
        tensor(0, 4, name="empty"),
        tensor(8, 8, name="packed", dtype="F4"),
    )
    assert reasons == {
        "bias": "rank 1, at least 2 is needed",
        "counter": "dtype int64 cannot be pruned",
        "empty": "no elements",
        "packed": "dtype F4 cannot be pruned",
    }


def test_globs_and_expressions_match_whole_names() -> None:
    names = ("a.weight", "b.weight", "b.weight.scale")
    tensors = [tensor(8, 8, name=name) for name in names]
    assert skipped(Recipe.shorthand(TWO_OF_FOUR, include=("*.weight",)), *tensors) == {
        "b.weight.scale": "not in --include"
    }
    assert skipped(Recipe.shorthand(TWO_OF_FOUR, include=(r"re:[ab]\.weight",)), *tensors) == {
        "b.weight.scale": "not in --include"
    }
    assert skipped(Recipe.shorthand(TWO_OF_FOUR, exclude=("b.*",)), *tensors).keys() == {"b.weight", "b.weight.scale"}
    assert skipped(Recipe.shorthand(TWO_OF_FOUR, include=("*.weight",), exclude=("b*",)), *tensors).keys() == set(
        names[1:]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"include": ("nothing*",)}, "matches none of the 1 tensors", id="case21-include-zero-match"),
        pytest.param({"exclude": ("re:x+",)}, "matches none", id="case21-exclude-zero-match"),
        pytest.param({"include": ("w*", "w*")}, "already given", id="case21-duplicate"),
        pytest.param({"include": ("w*",), "exclude": ("w*",)}, "already given as --exclude", id="case21-contradiction"),
        pytest.param({"include": ("w*",), "exclude": ("*t",)}, "has no effect", id="case21-overruled"),
        pytest.param({"include": ("re:(",)}, "no regular expression", id="bad-expression"),
        pytest.param({"exclude": ("",)}, "matches none", id="empty-glob"),
    ],
)
def test_globs_that_cannot_be_meant_are_errors(options: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(Recipe.shorthand(TWO_OF_FOUR, **options), [tensor(8, 8)])


def test_case60_an_unknown_dtype_is_an_error_when_it_is_named() -> None:
    with pytest.raises(SpecError, match="'weight': dtype F4 cannot be pruned"):
        resolve(Recipe.shorthand(TWO_OF_FOUR, include=("*",)), [tensor(8, 8, dtype="F4")])
