"""A recipe file is read exactly or refused by key; what it resolves to is what it says, for the right tensors.

Case numbers are those of the catalogue of bad inputs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from npscope import cli
from npscope.errors import FileError, FormatError, NpscopeError, SpecError
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Budget, Coupling, Decision, Plan, Skip
from npscope.recipes.recipe import Recipe, Rule, resolve
from npscope.recipes.recipe_file import MAX_BYTES, parse_recipe, read_recipe, recipe_of
from npscope.recipes.scores import check_scores_unchanged, require_usable, scores_of
from npscope.streaming.pruning import prune_file
from npscope.weights import Axes, Tensor, Use, open_weights

DATA = Path(__file__).parent / "data" / "silero_vad_16k.safetensors"


def tensor(name: str, *shape: int, dtype: str = "float32", use: Use | None = None) -> Tensor:
    return Tensor(name, dtype, shape, 4 * math.prod(shape), use)


def toml(text: str, folder: Path) -> Recipe:
    (folder / "recipe.toml").write_text(text)
    return read_recipe(folder / "recipe.toml")


def rules(*tables: dict[str, Any]) -> Recipe:
    return parse_recipe({"rule": list(tables)})


def by_name(decisions: list[Decision]) -> dict[str, Plan | Skip]:
    return {d.tensor.name: d for d in decisions if isinstance(d, Plan | Skip)}


def said(decisions: list[Decision]) -> dict[str, str]:
    return {name: d.reason if isinstance(d, Skip) else d.pattern for name, d in by_name(decisions).items()}


# --- files ---------------------------------------------------------------------------------------

FULL = """
layout = "in-out"

[[rule]]
name = "attention"
match = ["*.q", 're:.*\\.k']
pattern = "2:4"
axis = "fan-in"
ord = 1
misfit = "skip"

[[rule]]
match = "*.bias"
skip = true

[[rule]]
op = "Conv"
node = "body/*"
shape = [64, -1, 3, 3]
block = [4, 4]
scope = "-1x2"
keep = 3
layout = "out-in"
default_skips = false

[[rule]]
match = "mlp*"
block = "1x16"
budget = 0.29
min_sparsity = 0.1
max_sparsity = "9/10"

[[rule]]
block = 2
sparsity = 5e-1
allocation = "erk"
ord = inf
"""


def test_every_key_of_a_rule(tmp_path: Path) -> None:
    assert toml(FULL, tmp_path).rules == (
        Rule(
            "rule 'attention'",
            names=("*.q", r"re:.*\.k"),
            pattern=Pattern((1,), (4,), 2, 1.0),
            axis="fan-in",
            layout="in-out",
            misfit="skip",
        ),
        Rule("rule 2", names=("*.bias",)),
        Rule(
            "rule 3",
            op="Conv",
            node="body/*",
            shape=(64, -1, 3, 3),
            pattern=Pattern((4, 4), (-1, 2), 3),
            default_skips=False,
        ),
        Rule(
            "rule 4",
            names=("mlp*",),
            pattern=Pattern((1, 16), None, "0.29"),
            layout="in-out",
            spread="budget",
            bounds=("0.1", "9/10"),
        ),
        Rule("rule 5", pattern=Pattern((2,), None, "0.5", math.inf), layout="in-out", spread="erk"),
    )


def test_json_is_the_same(tmp_path: Path) -> None:
    tables = {
        "layout": "in-out",
        "rule": [
            {"match": "mlp*", "block": "1x16", "budget": 0.29, "min_sparsity": 0.1, "max_sparsity": "9/10"},
            {"keep": 2, "of": 4, "ord": "inf"},
        ],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(tables))
    text = """
        layout = "in-out"
        [[rule]]
        match = "mlp*"
        block = "1x16"
        budget = 0.29
        min_sparsity = 0.1
        max_sparsity = "9/10"
        [[rule]]
        keep = 2
        of = 4
        ord = inf
    """
    assert read_recipe(tmp_path / "recipe.json") == toml(text, tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"pattern": "2:4"}, {"keep": 2, "of": 4}),
        ({"pattern": "2:4"}, {"block": [1], "scope": [4], "keep": 2}),
        ({"pattern": "4x4@0.5"}, {"block": "4x4", "sparsity": "0.5"}),
        ({"pattern": "block=1x16 scope=1x8 keep=4 ord=1"}, {"block": "1x16", "of": 8, "keep": 4, "ord": 1}),
        ({"pattern": "block=4x-1 sparsity=1/3"}, {"block": [4, -1], "sparsity": "1/3"}),
    ],
)
def test_a_pattern_may_be_written_key_by_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert rules(one) == rules(other)


def test_the_shorthand_is_a_recipe_of_rules() -> None:
    short = recipe_of(pattern="2:4", include=["*.w"], exclude=["a.*"], axis="last", layout="in-out")
    left, meant = short.rules
    assert (left.names, left.pattern) == (("a.*",), None)
    assert (meant.names, meant.pattern, meant.misfit) == (("*.w",), Pattern.parse("2:4"), "skip")
    assert (meant.axis, meant.layout, meant.default_skips) == ("last", "in-out", False)
    (default,) = recipe_of(pattern="2:4").rules
    assert default.is_default
    assert default.default_skips


def test_a_recipe_and_the_shorthand_are_one_or_the_other(tmp_path: Path) -> None:
    path = str(tmp_path / "recipe.toml")
    with pytest.raises(SpecError, match="give --pattern, or a recipe with -r"):
        recipe_of()
    for options in ({"pattern": "2:4"}, {"include": ["a"]}, {"axis": 0}, {"layout": "in-out"}):
        with pytest.raises(SpecError, match=rf"--{next(iter(options))} and --recipe cannot both"):
            recipe_of(path, **options)


BAD = {
    "case21-unknown-key": ('[[rule]]\nsparcity = 0.5\nblock = "4x4"', "unknown key 'sparcity'; did you mean 'sparsity"),
    "case21-unknown-table": ("[[rules]]\n", "unknown key 'rules'; did you mean 'rule'"),
    "unknown-member-key": ('[[coupling]]\nkeep=1\n[[coupling.member]]\ntensr="a"', "coupling 1, member 1: unknown key"),
    "one-bracket": ('[rule]\npattern = "2:4"', r"rule: must be a list of tables: write \[\[rule\]\]"),
    "no-rule": ("", r"no \[\[rule\]\] and no \[\[coupling\]\]"),
    "no-toml": ("[[rule]]\npattern = 2:4\n", r"no TOML: .*line 2"),
    "toml-key-twice": ('[[rule]]\nord = 1\nord = 2\n', "no TOML: .*line 3"),
    "nothing-to-do": ('[[rule]]\nmatch = "a"', "rule 1: nothing says how much to keep"),
    "skip-and-pattern": ('[[rule]]\nskip = true\npattern = "2:4"', "pattern says how to prune, and skip = true not to"),
    "skip-no-bool": ("[[rule]]\nskip = 1", "rule 1: skip: must be true or false, not int 1"),
    "default-first": ('[[rule]]\npattern = "2:4"\n[[rule]]\nmatch = "a"\nskip = true', "put it last"),
    "two-ways": ('[[rule]]\npattern = "2:4"\nkeep = 2', "rule 1: pattern and keep cannot both"),
    "keep-and-sparsity": ("[[rule]]\nkeep = 2\nsparsity = 0.5", "keep and sparsity cannot both"),
    "scope-and-of": ("[[rule]]\nkeep = 2\nof = 4\nscope = 4", "scope and of cannot both"),
    "budget-and-keep": ("[[rule]]\nbudget = 0.5\nkeep = 4", "budget and keep cannot both"),
    "budget-and-sparsity": ("[[rule]]\nbudget = 0.5\nsparsity = 0.5", "budget and sparsity cannot both"),
    "budget-and-scope": ("[[rule]]\nbudget = 0.5\nscope = 4", "leave out scope"),
    "budget-bounds": ("[[rule]]\nbudget = 0.5\nmin_sparsity = 0.6\nmax_sparsity = 0.4", "exceeds max_sparsity"),
    "bounds-alone": ("[[rule]]\nsparsity = 0.5\nmin_sparsity = 0.6", "min_sparsity needs budget"),
    "allocation-unknown": ('[[rule]]\nallocation = "earl"\nsparsity = 0.5', "must be uniform, erk, lamp, not str"),
    "allocation-no-sparsity": ('[[rule]]\nallocation = "erk"', "allocation needs sparsity"),
    "lamp-scores": ('scores = "s"\n[[rule]]\nallocation = "lamp"\nsparsity = 0.5', "leave out scores"),
    "case11-above-1": ("[[rule]]\nsparsity = 1.5", r"rule 1: sparsity: .*outside \[0, 1\]"),
    "case11-nan": ("[[rule]]\nsparsity = nan", "rule 1: sparsity: .*not a number"),
    "case11-bool": ("[[rule]]\nsparsity = true", "must be a share of blocks"),
    "case11-exponent": ("[[rule]]\nsparsity = 1e-999999999", "not a number"),
    "case1-block": ('[[rule]]\nblock = "0x4"\nsparsity = 0.5', "block: must be sizes of at least 1"),
    "case5-block": ("[[rule]]\nblock = 4.0\nsparsity = 0.5", "block: must be a list of whole numbers"),
    "case9-keep": ("[[rule]]\nkeep = 5\nof = 4", "cannot keep 5 of 4"),
    "case9-keep-float": ("[[rule]]\nkeep = 2.0\nof = 4", "keep: must be a whole number of blocks, not the number 2.0"),
    "case7-of": ("[[rule]]\nkeep = 0\nof = 0", "of: must be a number of blocks, at least 1"),
    "case4-sizes": ('[[rule]]\nblock = "4x4"\nscope = 4\nkeep = 1', "block has 2 sizes and scope 1"),
    "three-sizes": ('[[rule]]\nblock = "4x4x4"\nsparsity = 0.5', "block has 3 sizes"),
    "axis": ('[[rule]]\npattern = "2:4"\naxis = "fanin"', "axis: must be in, fan-in, last or a number.*mean 'fan-in'"),
    "axis-of-tiles": ('[[rule]]\npattern = "4x4@0.5"\naxis = "last"', r"rule 1: axis: .*\[out, fan-in\]"),
    "layout": ('layout = "out"\n[[rule]]\npattern = "2:4"', "layout: must be out-in, in-out"),
    "match-empty": ('[[rule]]\nmatch = []\npattern = "2:4"', "match: must be a string or a list of strings"),
    "ord-0": ('[[rule]]\npattern = "2:4"\nord = 0', "rule 1: ord: ord='0'"),
    "ord-date": ('[[rule]]\npattern = "2:4"\nord = 2020-01-01', "rule 1: ord: must be 1, 2, inf"),
    "misfit": ('[[rule]]\npattern = "2:4"\nmisfit = "warn"', "misfit: must be error, skip"),
    "pattern": ('[[rule]]\npattern = "2;4"', "rule 1: pattern: pattern '2;4'"),
    "name": ("[[rule]]\nname = 4", "rule 1: name: must be a string"),
    "no-member": ("[[coupling]]\nkeep = 4", r"coupling 1: there is no \[\[coupling.member\]\]"),
    "no-tensor": ("[[coupling]]\nkeep = 4\n[[coupling.member]]\nblock = 1", "member 1: tensor is missing"),
    "names": ('names = "a"\n[[rule]]\npattern = "2:4"', "names: must be a table of strings"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_meant_is_refused_by_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((SpecError, FormatError), match=message) as caught:
        toml(text, tmp_path)
    assert str(caught.value).startswith(f"recipe '{tmp_path}/recipe.toml': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"[]", "a JSON object", id="list"),
        pytest.param(b'{"rule": [{"ord": NaN}]}', "NaN is no JSON", id="nan"),
        pytest.param(b'{"rule": [], "rule": []}', "'rule' stands twice", id="case57-key-twice"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="case56-depth"),
        pytest.param(b"{", "no JSON", id="cut"),
        pytest.param(b"\xff", "byte 0 is no UTF-8", id="utf8"),
        pytest.param(b" " * (MAX_BYTES + 1), "are no recipe", id="length"),
        pytest.param(b'{"rule": [{"sparsity": 1e99999999999999999999}]}', "no number of a size", id="exponent"),
    ],
)
def test_bad_json_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_recipe(tmp_path / "r.json")


def test_case80_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.toml")
    with pytest.raises(FormatError, match="not a regular file"):
        read_recipe(tmp_path / "r.toml")
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "nowhere.toml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from(["a", "2:4", "4x4", "0.5", "-1", "erk", "in"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["tensor", "block"]), inner),
    max_leaves=5,
)
KEYS = ["match", "skip", "pattern", "block", "scope", "keep", "of", "sparsity", "budget", "allocation", "ord", "shape"]


@given(
    st.lists(st.dictionaries(st.sampled_from([*KEYS, "axis", "member", "x"]), VALUES, max_size=5), max_size=3),
    st.sampled_from(["rule", "coupling"]),
)
def test_any_tables_are_a_recipe_or_one_error(tables: list[dict[str, Any]], key: str) -> None:
    with suppress(NpscopeError):
        recipe = parse_recipe({key: tables})
        resolve(recipe, [tensor("a", 8, 8), tensor("b.weight", 16, 4)])


# --- which rule takes which tensor ---------------------------------------------------------------

MODEL = [
    tensor("embed.weight", 32, 8),
    tensor("attn.q.weight", 8, 8),
    tensor("attn.k.weight", 8, 8),
    tensor("attn.q.bias", 8),
    tensor("mlp.up.weight", 16, 8),
    tensor("mlp.norm.weight", 8),
    tensor("lm_head.weight", 32, 8),
]


def test_the_first_rule_that_matches_takes_a_tensor() -> None:
    recipe = rules(
        {"match": "attn.q.*", "pattern": "2:4"}, {"match": "attn.*", "pattern": "1:4"}, {"pattern": "4x4@0.5"}
    )
    decisions = resolve(recipe, MODEL)
    assert said(decisions) == {
        "embed.weight": "default skip *embed* (--include or a rule with the name in full overrides)",
        "attn.q.weight": "keep 2 of 4",
        "attn.k.weight": "keep 1 of 4",
        "attn.q.bias": "rank 1, at least 2 is needed",
        "mlp.up.weight": "keep 4 of 8 blocks of 4x4",
        "mlp.norm.weight": "default skip *norm* (--include or a rule with the name in full overrides)",
        "lm_head.weight": "default skip *lm_head* (--include or a rule with the name in full overrides)",
    }
    assert by_name(decisions)["attn.k.weight"].rule == "rule 2 attn.*"
    assert [d.tensor.name for d in decisions if isinstance(d, Plan | Skip)] == [t.name for t in MODEL]


def test_a_tensor_that_no_rule_takes_is_left() -> None:
    decisions = resolve(rules({"match": "mlp.up.weight", "pattern": "2:4"}), MODEL)
    assert said(decisions)["attn.q.weight"] == "no rule takes it"


def test_default_skips_yield_to_a_full_name_or_to_the_rule() -> None:
    glob, full = {"match": "*head*", "pattern": "2:4"}, {"match": "lm_head.weight", "pattern": "2:4"}
    assert "default skip" in said(resolve(rules(glob), MODEL))["lm_head.weight"]
    assert said(resolve(rules(full), MODEL))["lm_head.weight"] == "keep 2 of 4"
    assert said(resolve(rules(glob | {"default_skips": False}), MODEL))["lm_head.weight"] == "keep 2 of 4"


def test_skip_rules_say_so() -> None:
    decisions = resolve(rules({"match": ["*.q.*", "mlp*"], "skip": True}, {"pattern": "2:4"}), MODEL)
    assert said(decisions)["attn.q.weight"] == "rule 1 *.q.*"
    assert said(decisions)["mlp.up.weight"] == "rule 1 mlp*"


def test_what_cannot_take_the_pattern_is_an_error_unless_the_rule_says_skip() -> None:
    odd = [tensor("a", 8, 6), tensor("b", 8, 8)]
    with pytest.raises(SpecError, match=r"rule 1: tensor 'a' cannot take the pattern: axis 1 \(in\): size 6 .* misfit"):
        resolve(rules({"pattern": "2:4"}), odd)
    first, second = resolve(rules({"pattern": "2:4", "misfit": "skip"}), odd)
    assert isinstance(first, Skip)
    assert first.misfit
    assert isinstance(second, Plan)


@pytest.mark.parametrize("named", [tensor("bias", 8), tensor("count", 8, 8, dtype="int64"), tensor("none", 0, 8)])
def test_a_tensor_named_in_full_that_cannot_be_pruned_is_an_error(named: Tensor) -> None:
    with pytest.raises(SpecError, match=f"'{named.name}' cannot take the pattern"):
        resolve(rules({"match": named.name, "pattern": "2:4"}), [named, tensor("w", 8, 8)])
    assert isinstance(resolve(rules({"match": "*", "pattern": "2:4"}), [named])[0], Skip)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        pytest.param([{"match": "nothing*", "pattern": "2:4"}], "rule 1 'nothing.' matches none of the 7", id="zero"),
        pytest.param([{"match": ["attn*", "x"], "pattern": "2:4"}], "rule 1 'x' matches none", id="one-of-two"),
        pytest.param([{"match": "x", "skip": True}, {"pattern": "2:4"}], "rule 1 'x' matches none", id="skip"),
        pytest.param(
            [{"match": "attn*", "skip": True}, {"match": "attn.q.*", "pattern": "2:4"}],
            "rule 2 'attn.q.*' has no effect",
            id="overruled",
        ),
        pytest.param(
            [{"match": "attn*", "skip": True}, {"name": "two", "match": "attn*", "pattern": "2:4"}],
            "rule 'two' 'attn.' is already given as rule 1",
            id="duplicate",
        ),
        pytest.param([{"shape": [3, 3], "pattern": "2:4"}], "rule 1 matches none of the 7 tensors;", id="shape"),
        pytest.param([{"op": "Conv", "pattern": "2:4"}], "none of the 7 tensors; the file has no graph", id="graph"),
        pytest.param([{"match": "re:(", "pattern": "2:4"}], r"rule 1 're:\(' is no regular expression", id="re"),
    ],
)
def test_case21_rules_that_decide_nothing_are_errors(tables: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(rules(*tables), MODEL)


def test_case60_an_unknown_dtype_is_an_error_when_a_rule_matches_it() -> None:
    packed = tensor("w", 8, 8, dtype="F4")
    with pytest.raises(SpecError, match="'w': dtype F4 cannot be pruned; leave it out of rule 1"):
        resolve(rules({"match": "*", "pattern": "2:4"}), [packed])
    assert isinstance(resolve(rules({"pattern": "2:4"}), [packed])[0], Skip)


def test_a_graph_is_chosen_from_by_op_node_and_shape() -> None:
    matmul = Use("MatMul", "body/if/then/MatMul_3", Axes((), 1, 0, ()))
    conv = Use("Conv", "Conv_0", Axes((), 0, 1, (2, 3)))
    base = Use("Conv", "base/Conv", None, "a fixed basis")
    graph = [
        tensor("onnx::1", 16, 8, use=matmul),
        tensor("onnx::2", 8, 16, 3, 3, use=conv),
        tensor("onnx::3", 8, 1, 3, 3, use=base),
        tensor("onnx::4", 16, 4, use=matmul),
    ]
    recipe = rules(
        {"op": "MatMul", "shape": [-1, 8], "pattern": "2:4"},
        {"node": "Conv_*", "pattern": "1:4"},
        {"op": "MatMul", "pattern": "4x4@0.5"},
    )
    decisions = resolve(recipe, graph)
    assert said(decisions) == {
        "onnx::1": "keep 2 of 4",
        "onnx::2": "keep 1 of 4",
        "onnx::3": "no rule takes it",
        "onnx::4": "keep 2 of 4 blocks of 4x4",
    }
    first = by_name(decisions)["onnx::1"]
    assert isinstance(first, Plan)
    assert (first.along, first.order) == ("axis 0 (in)", (1, 0))
    assert said(resolve(rules({"op": "Conv", "shape": [8, 1, 3, 3], "pattern": "2:4"}), graph))["onnx::3"] == (
        "a fixed basis"
    )


def test_heads_of_a_graph_are_known_by_their_node() -> None:
    head = tensor("onnx::7", 8, 8, use=Use("MatMul", "/Classifier/MatMul", Axes((), 1, 0, ())))
    assert said(resolve(rules({"pattern": "2:4"}), [head]))["onnx::7"].startswith("default skip of nodes *classifier*")
    assert isinstance(resolve(rules({"match": "onnx::7", "pattern": "2:4"}), [head])[0], Plan)
    assert isinstance(resolve(rules({"node": "*Cl*", "pattern": "2:4", "default_skips": False}), [head])[0], Plan)


# --- budgets -------------------------------------------------------------------------------------


def budget(table: dict[str, Any], *tensors: Tensor, **top: Any) -> Budget:
    recipe = parse_recipe({"rule": [table], **top})
    (found,) = (d for d in resolve(recipe, tensors) if isinstance(d, Budget))
    return found


def test_a_budget_spans_the_tensors_of_its_rule_by_name() -> None:
    found = budget(
        {"block": "4x4", "budget": "0.29"},
        *(tensor(name, 8, 8 * (i + 1)) for i, name in enumerate(["z", "b.10", "b.9", "\u00e9", "B"])),
        tensor("norm", 8, 8),
    )
    assert [plan.tensor.name for plan in found.plans] == ["B", "b.10", "b.9", "z", "\u00e9"]
    assert [plan.blocks for plan in found.plans] == [20, 8, 12, 4, 16]
    assert all(plan.scopes == 1 for plan in found.plans)
    assert found.keep == 60 - 17
    assert found.bounds == ((0, 20), (0, 8), (0, 12), (0, 4), (0, 16))


def test_bounds_of_a_budget_are_exact() -> None:
    found = budget(
        {"block": [1, 1], "budget": "0.3", "min_sparsity": "0.29", "max_sparsity": "1/3"},
        tensor("a", 10, 10),
        tensor("b", 3, 3),
    )
    # of 100 at least 29 and at most 33 are pruned, of 9 at least 2.61 and at most 3
    assert found.bounds == ((67, 71), (6, 6))
    assert found.keep == 109 - 32


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_sparsity": "0.6"}, "keeps 50 of 100 blocks, but .* leave between 0 and 40"),
        ({"max_sparsity": "0.4"}, "leave between 60 and 100"),
        ({"min_sparsity": "0.501", "max_sparsity": "0.502"}, "no count of the blocks of 'a' lies within"),
    ],
)
def test_bounds_that_no_choice_meets_are_errors(bounds: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=f"rule 1: .*{message}"):
        budget({"block": 1, "budget": "0.5", **bounds}, tensor("a", 10, 10))


def test_each_rule_has_a_budget_of_its_own() -> None:
    recipe = rules({"match": "attn*", "block": 1, "budget": "0.5"}, {"block": 1, "budget": "0.25"})
    first, second = (d for d in resolve(recipe, MODEL) if isinstance(d, Budget))
    assert (first.name, first.keep, len(first.plans)) == ("rule 1", 64, 2)
    assert (second.name, second.keep, len(second.plans)) == ("rule 2", 96, 1)


# --- names ---------------------------------------------------------------------------------------


def test_one_recipe_serves_two_files_through_a_map_of_names() -> None:
    """The same weights under other names: the same rules, and the same order in a budget."""
    top = {"names": {"onnx::9": "a.weight", "onnx::1": "b.weight"}}
    table = {"match": "*.weight", "block": 1, "budget": "0.5"}
    plain = budget(table, tensor("a.weight", 4, 4), tensor("b.weight", 8, 4), **top)
    mapped = budget(table, tensor("onnx::1", 8, 4), tensor("onnx::9", 4, 4), **top)
    assert [plan.tensor.name for plan in plain.plans] == ["a.weight", "b.weight"]
    assert [plan.tensor.name for plan in mapped.plans] == ["onnx::9", "onnx::1"]
    assert [plan.blocks for plan in mapped.plans] == [plan.blocks for plan in plain.plans]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"x": "y"}, "holds neither 'x' nor 'y'"),
        ({"a": "b"}, "'a' and 'b' would both be 'b'"),
        ({"a": "c", "b": "c"}, "would both be 'c'"),
    ],
)
def test_maps_of_names_that_cannot_be_meant_are_errors(names: dict[str, str], message: str) -> None:
    recipe = parse_recipe({"rule": [{"pattern": "2:4"}], "names": names})
    with pytest.raises(SpecError, match=f"names: .*{message}"):
        resolve(recipe, [tensor("a", 8, 8), tensor("b", 8, 8)])


# --- scores --------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., Path]:
    def write(**tensors: np.ndarray) -> Path:
        save_file(tensors, tmp_path / "scores.safetensors")
        return tmp_path / "scores.safetensors"

    return write


def test_scores_are_of_the_weight_or_of_its_inputs(scored: Callable[..., Path]) -> None:
    path = scored(
        a=np.ones((8, 4), np.float32), b=np.ones(4, np.float16), c=np.ones(8), d=np.ones((1, 4)), i=np.ones(4, int)
    )
    with open_weights(path) as file:
        whole = scores_of(file, "s", tensor("a", 8, 4), "a", Axes((), 0, 1, ()))
        assert (whole.tensor.name, whole.along) == ("a", None)
        vector = scores_of(file, "s", tensor("w", 8, 4, 3), "b", Axes((), 0, 1, (2,)))
        assert (vector.tensor.name, vector.along) == ("b", 1)
        assert scores_of(file, "s", tensor("w", 8, 4), "c", Axes((), 1, 0, ())).along == 0
        for name, message in (
            ("c", r"scores 's': tensor 'c' has shape \(8,\); needed is shape \(8, 4\) or \(4,\), one for each input"),
            ("d", r"has shape \(1, 4\)"),
            ("i", "dtype int64"),
            ("nothing", r"there is no tensor 'nothing'; needed is one of shape \(8, 4\) or \(4,\)"),
        ):
            with pytest.raises(SpecError, match=message):
                scores_of(file, "s", tensor("w", 8, 4), name, Axes((), 0, 1, ()))


def test_a_rule_ranks_by_its_scores_or_by_those_of_the_recipe(tmp_path: Path, scored: Callable[..., Path]) -> None:
    path = scored(a=np.ones((8, 4)), b=np.ones(4))
    text = """
        scores = "scores.safetensors"
        [[rule]]
        match = "a"
        pattern = "2:4"
        [[rule]]
        match = "c"
        skip = true
        [[rule]]
        pattern = "1:4"
        scores = "other.safetensors"
    """
    recipe = toml(text, tmp_path)
    assert recipe.score_files == (str(path), str(tmp_path / "other.safetensors"))
    shorthand = Recipe.shorthand(Pattern.parse("2:4")).with_scores(str(path))
    assert shorthand.score_files == (str(path),)
    with open_weights(path) as file:
        first, second = resolve(shorthand, [tensor("a", 8, 4), tensor("b", 16, 4)], scores={str(path): file})
        assert isinstance(first, Plan)
        assert isinstance(second, Plan)
        assert first.scores is not None
        assert second.scores is not None
        assert (first.scores.along, second.scores.along) == (None, 1)
        check_scores_unchanged([first, second])
        os.utime(path, ns=(0, 0))
        with pytest.raises(FileError, match="changed"):
            check_scores_unchanged([first, second])


@pytest.mark.parametrize(("bad", "message"), [(np.nan, "hold 1 NaN"), (-1.0, "hold 1 negative numbers")])
def test_scores_are_no_nan_and_not_negative(bad: float, message: str) -> None:
    values = np.asarray([-0.0, np.inf, 1.0])
    require_usable(tensor("a", 3), values)
    values[1] = bad
    with pytest.raises(FormatError, match=f"scores of tensor 'a' {message}"):
        require_usable(tensor("a", 3), values)


# --- the command line ----------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_prune_by_a_recipe_is_prune_by_the_shorthand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text('[[rule]]\npattern = "2:4"\nmisfit = "skip"\n')
    ours, theirs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run(capsys, "prune", DATA, "-r", tmp_path / "r.toml", "-o", ours)[0] == 0
    assert run(capsys, "prune", DATA, "--pattern", "2:4", "-o", theirs)[0] == 0
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.read_bytes() != DATA.read_bytes()


def test_plan_lists_every_tensor_with_its_rule_axes_and_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(
        '[[rule]]\nname = "cells"\nmatch = "lstm_cell.weight_*"\nblock = "4x4"\nbudget = 0.5\n'
        '[[rule]]\npattern = "2:4"\naxis = "fan-in"\nmisfit = "skip"\n'
    )
    code, out, err = run(capsys, "plan", DATA, "-r", tmp_path / "r.toml", "--json")
    fields = json.loads(out)
    assert (code, err) == (0, "")
    lines = {line["name"]: line for line in fields["tensors"]}
    with open_weights(DATA) as weights:
        assert list(lines) == list(weights.tensors)
    cell = lines["lstm_cell.weight_hh"]
    assert cell["rule"] == "rule 'cells' lstm_cell.weight_*"
    assert (cell["axes"], cell["blocks"], cell["keep"], cell["group"]) == (["out", "in"], 4096, None, "rule 'cells'")
    assert cell["pattern"] == "keep 4096 of 8192 blocks in all"
    odd = lines["conv1.weight"]
    assert (odd["axes"], odd["misfit"]) == (["out", "in", "kernel"], True)
    assert odd["skipped"] == "fan-in: size 387 is not a multiple of 4"
    conv = lines["conv2.weight"]
    assert (conv["axes"], conv["pattern"], conv["along"]) == (["out", "in", "kernel"], "keep 2 of 4", "fan-in")
    assert lines["conv1.bias"]["skipped"] == "rank 1, at least 2 is needed"
    assert "default skip *stft*" in lines["stft_conv.weight"]["skipped"]
    assert fields["totals"]["tensors"] == fields["totals"]["pruned"] + fields["totals"]["skipped"]

    code, out, err = run(capsys, "plan", DATA, "--pattern", "2:4")
    assert (code, err) == (0, "")
    assert "out x in x kernel" in out
    assert "tensors to prune (" in out


def test_plan_shows_couplings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"qkv": np.ones((12, 4), np.float32), "o": np.ones((4, 4), np.float32)}, tmp_path / "m.safetensors")
    windows = [{"tensor": "qkv", "slice": f"{4 * i}:{4 * i + 4}", "block": [2, -1]} for i in range(3)]
    out_ = {"tensor": "o", "block": [-1, 2], "order": [1, 0]}
    (tmp_path / "r.json").write_text(
        json.dumps({"coupling": [{"name": "heads", "keep": 1, "member": [*windows, out_]}]})
    )
    code, out, _ = run(capsys, "plan", tmp_path / "m.safetensors", "-r", tmp_path / "r.json", "--json")
    lines = {line["name"]: line for line in json.loads(out)["tensors"]}
    assert code == 0
    assert lines["qkv"]["along"] == " and ".join(["4x4 in blocks of 2x4"] * 3)
    assert lines["qkv"]["pattern"] == "keep 1 of 2 coupled blocks"
    assert (lines["o"]["blocks"], lines["o"]["keep"], lines["o"]["group"]) == (2, 1, "coupling 'heads'")

    done = ["prune", tmp_path / "m.safetensors", "-r", tmp_path / "r.json", "-o", tmp_path / "out.safetensors"]
    code, out, _ = run(capsys, *done, "--json")
    lines = {line["name"]: line for line in json.loads(out)["tensors"]}
    assert code == 0
    assert lines["qkv"]["pattern"] == "keep 1 of 2 coupled blocks"
    assert lines["qkv"]["along"] == "coupling 'heads', 3 windows"
    assert (lines["o"]["blocks"], lines["o"]["blocks_kept"], lines["o"]["zeros_after"]) == (2, 1, 8)


def test_the_example_of_the_readme_does_what_its_comments_say(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    recipe = toml(text, tmp_path)
    with open_weights(DATA) as weights:
        decisions = resolve(recipe, weights.tensors.values())
        (tiles,) = (d for d in decisions if isinstance(d, Budget))
        (channels,) = (d for d in decisions if isinstance(d, Coupling))
        assert [plan.tensor.name for plan in tiles.plans] == ["lstm_cell.weight_hh", "lstm_cell.weight_ih"]
        assert [(low, high) for low, high in tiles.bounds] == [(820, 4096), (820, 4096)]
        assert tiles.keep == 4096
        assert (channels.blocks, channels.keep) == (128, 96)
        assert [tensor.name for tensor in channels.tensors] == ["conv1.weight", "conv2.weight"]
        assert said(decisions)["conv3.weight"] == "keep 2 of 4"
        assert said(decisions)["final_conv.weight"] == "rule 2 final_conv.*"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["--pattern", "2:5"], 0, "", id="misfits-are-shown"),
        pytest.param(["-r", "r.toml"], 2, "recipe 'r.toml': rule 1: unknown key 'ptern'", id="key"),
        pytest.param(["-r", "nowhere.toml"], 3, "nowhere.toml", id="missing"),
        pytest.param([], 2, "give --pattern, or a recipe", id="neither"),
        pytest.param(["-r", "r.toml", "--pattern", "2:4"], 2, "cannot both be given", id="both"),
        pytest.param(["--pattern", "2:4", "--include", "nothing"], 2, "matches none", id="case21-include"),
        pytest.param(["--pattern", "2:4", "--scores", "nowhere.safetensors"], 3, "nowhere", id="scores-missing"),
        pytest.param(["--pattern", "2:4", "--scores", DATA], 0, "", id="scores"),
    ],
)
def test_exit_codes_of_plan(
    arguments: list[object],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text('[[rule]]\nptern = "2:4"\n')
    got, _, err = run(capsys, "plan", DATA, *arguments)
    assert (got, err.count("\n")) == (code, int(bool(message)))
    assert message in err
    assert got == 0 or run(capsys, "plan", DATA, *arguments, "--json")[1].startswith('{"npscope"')


def test_planning_writes_nothing_and_reads_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations by shape need no values either."""
    from npscope.recipes.planning import plan_file
    from npscope.weights.packed import Packed

    monkeypatch.setattr(Packed, "read", None)
    recipe = rules({"block": 1, "sparsity": "0.5", "allocation": "erk"})
    assert any(plan.keep for plan in plan_file(DATA, recipe))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_recipe_leaves_no_output(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="matches none"):
        prune_file(DATA, tmp_path / "out", rules({"match": "x", "pattern": "2:4"}))
    assert list(tmp_path.iterdir()) == []
