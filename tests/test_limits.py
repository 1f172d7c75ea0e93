"""Large scopes and shared budgets of weight files: the exact survivors, however poor the search's means.

The oracle ranks all blocks at once, in memory. The searches run with slabs of a few blocks, room
for a few keys and samples of a few places, so that every way through them is taken.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import npscope
from npscope.errors import FormatError, SpecError
from npscope.recipes.layout import lay
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Budget, Plan, Scores
from npscope.recipes.recipe import Recipe
from npscope.recipes.recipe_file import recipe_of
from npscope.streaming import dropping, limits, narrowing, pruning, slabs
from npscope.streaming.marks import Marks
from npscope.weights import numpy_dtype, open_weights

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float64")


@pytest.fixture(params=[(5, 16, 200), (1 << 21, 1 << 20, 200), (5, 16, 0)], ids=["few", "enough", "cut blocks"])
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, bins, scope_bytes = request.param
    for module in (limits, narrowing):
        monkeypatch.setattr(module, "GATHER", gather)
        monkeypatch.setattr(module, "BINS", bins)
    monkeypatch.setattr(limits, "PIECES", 4)
    monkeypatch.setattr(limits, "PIECE_BYTES", 32)
    for module in (limits, dropping, slabs):
        monkeypatch.setattr(module, "SLAB_BYTES", 160, raising=False)
    monkeypatch.setattr(dropping, "SCOPE_BYTES", scope_bytes)
    if request.param_index != 1:
        monkeypatch.setattr(dropping, "LIMITS", 1)
        monkeypatch.setattr(dropping, "MARK_BYTES", 2)


def numbers(kind: str, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.normal(size=shape),
        "two-valued": lambda: rng.choice([0.5, -2.0], size=shape),
        "constant": lambda: np.full(shape, -1.5),
        "zeros": lambda: np.zeros(shape),
        "sorted": lambda: np.sort(rng.normal(size=shape), axis=None).reshape(shape),
        "heavy": lambda: np.clip(rng.standard_cauchy(size=shape) ** 3, -400, 400),
        "nan": lambda: np.where(
            rng.random(shape) < 0.3,
            rng.choice([np.nan, np.copysign(np.nan, -1), np.inf, -np.inf], size=shape),
            rng.integers(-2, 3, size=shape),
        ),
    }[kind]()
    return values.astype(getattr(ml_dtypes, dtype, dtype))


def pruned(folder: Path, tensors: dict[str, np.ndarray], decide: Any) -> dict[str, np.ndarray]:
    """The tensors after pruning what ``decide(plan of a tensor)`` says."""
    save_file(tensors, folder / "in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "decided", lambda recipe, weights: nullcontext(decide(weights.tensors)))
        pruning.prune_file(
            folder / "in", folder / "out", Recipe.shorthand(Pattern.parse("2:4")), nan="keep", force=True
        )
    return load(folder / "out")


def load(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with open_weights(path) as weights:
        for name, tensor in weights.tensors.items():
            raw = np.empty(tensor.nbytes, np.uint8)
            weights.read(tensor, 0, raw.data)
            found[name] = raw.view(numpy_dtype(tensor)).reshape(tensor.shape)
    return found


def norms_of(plan: Plan, values: np.ndarray) -> np.ndarray:
    view = values.reshape(plan.shape).transpose(plan.order)
    return npscope.block_norms(view, plan.block, ord=plan.ord)


def with_mask(plan: Plan, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    result = values.copy()
    npscope.BlockSpec(result.reshape(plan.shape).transpose(plan.order), plan.block).apply_mask(mask)
    return result


def best(norms: list[np.ndarray], keep: int, bounds: list[tuple[int, int]]) -> list[np.ndarray]:
    """Masks of the first choice within bounds: every least, then by rank as far as the most allows."""
    blocks = [(i, p, float(x)) for i, n in enumerate(norms) for p, x in enumerate(n.flat)]
    ranked = sorted(blocks, key=lambda block: (not np.isnan(block[2]), -np.nan_to_num(block[2]), block[:2]))
    masks = [np.zeros(n.size, bool) for n in norms]
    for i, p, _ in ranked:
        if masks[i].sum() < bounds[i][0]:
            masks[i][p] = True
    for i, p, _ in ranked:
        if sum(mask.sum() for mask in masks) < keep and masks[i].sum() < bounds[i][1]:
            masks[i][p] = True
    return [mask.reshape(n.shape) for mask, n in zip(masks, norms, strict=True)]


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("means")
@pytest.mark.parametrize("layout", ["out-in", "in-out"])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((dtype, kind) for dtype in DTYPES for kind in ("two-valued", "nan")),
        *(("float32", kind) for kind in ("normal", "constant", "zeros", "sorted", "heavy")),
    ],
)
def test_one_large_scope(tmp_path: Path, dtype: str, kind: str, layout: Any) -> None:
    values = numbers(kind, (12, 20), dtype, 1)
    for text in ("1x1@0.37", "2x4@0.5", "block=1x2 scope=-1x2 keep=9 ord=1", "block=12x1 scope=1x10 keep=3"):
        if layout == "in-out":
            text = text.replace("12x1", "20x1").replace("1x10", "1x12")
        plans: list[Plan] = []

        def decide(tensors: Any, text: str = text, plans: list[Plan] = plans) -> list[Plan]:
            plans.append(lay(Pattern.parse(text), tensors["w"], layout=layout))
            return plans

        found = pruned(tmp_path, {"w": values}, decide)["w"]
        (plan,) = plans
        expected = values.copy()
        view = expected.reshape(plan.shape).transpose(plan.order)
        npscope.keep_largest(view, plan.keep, plan.block, plan.scope, ord=plan.ord, out=view)
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8), err_msg=text)


@pytest.mark.usefixtures("means")
@given(data=st.data())
def test_budgets_with_bounds(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), label="tensors")
    kinds = st.sampled_from(["normal", "two-valued", "constant", "sorted", "heavy", "nan"])
    tensors = {
        f"t{i}": numbers(
            data.draw(kinds),
            data.draw(st.sampled_from([(4, 4), (6, 8), (2, 20)])),
            data.draw(st.sampled_from(DTYPES)),
            i,
        )
        for i in range(count)
    }
    block = data.draw(st.sampled_from(["1x1", "2x2", "1x4"]))
    layout: Any = data.draw(st.sampled_from(["out-in", "in-out"]))
    sizes = [value.size // int(np.prod([int(s) for s in block.split("x")])) for value in tensors.values()]
    bounds = [tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in sizes]
    keep = data.draw(st.integers(sum(low for low, _ in bounds), sum(high for _, high in bounds)), label="keep")
    plans: list[Plan] = []

    def decide(found: Any) -> list[Budget]:
        text = f"block={'4x1' if block == '1x4' and layout == 'in-out' else block} sparsity=0.5"
        plans.extend(lay(Pattern.parse(text), found[name], layout=layout) for name in tensors)
        return [Budget("all", tuple(plans), keep, tuple(bounds))]

    result = pruned(tmp_path_factory.mktemp("budget"), tensors, decide)
    norms = [norms_of(plan, value) for plan, value in zip(plans, tensors.values(), strict=True)]
    masks = best(norms, keep, bounds)
    for plan, (name, value), mask in zip(plans, tensors.items(), masks, strict=True):
        expected = with_mask(plan, value, mask)
        np.testing.assert_array_equal(result[name].view(np.uint8), expected.view(np.uint8))


@pytest.mark.usefixtures("means")
def test_a_budget_of_float64_and_float32(tmp_path: Path) -> None:
    """Limits that float32 cannot say, and values that are equal in both."""
    tensors = {"a": np.full((8, 8), 1 + 2.0**-40), "b": np.ones((8, 8), np.float32), "c": np.ones((8, 8))}

    def decide(found: Any) -> list[Budget]:
        plans = tuple(lay(Pattern.parse("1x1@0.5"), found[name]) for name in tensors)
        return [Budget("all", plans, 100, ((0, 64),) * 3)]

    result = pruned(tmp_path, tensors, decide)
    assert [np.count_nonzero(result[name]) for name in tensors] == [64, 36, 0]
    assert result["b"].reshape(-1)[:36].all()


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("means")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["1x1@0.9", "2x2@0", "2x2@1", "block=1x2 scope=-1x2 keep=16"])
def test_infinities_zeros_of_either_sign_and_all_or_nothing(tmp_path: Path, dtype: str, text: str) -> None:
    values = numbers("zeros", (16, 16), dtype, 0)
    values[::2] = -values[::2]
    values[:, 3] = 448 if dtype == "float8_e4m3fn" else np.inf
    scores = np.zeros((16, 16), np.float32)
    save_file({"w": scores}, tmp_path / "scores")
    for ranked in (None, scores):
        with open_weights(tmp_path / "scores") as other:
            plans: list[Plan] = []

            def decide(found: Any, ranked: Any = ranked, plans: list[Plan] = plans, other: Any = other) -> list[Plan]:
                plan = lay(Pattern.parse(text), found["w"])
                plans.append(plan if ranked is None else plan._replace(scores=Scores(other, other.tensors["w"])))
                return plans

            found = pruned(tmp_path, {"w": values}, decide)["w"]
        (plan,) = plans
        expected = npscope.keep_largest(values, plan.keep, plan.block, plan.scope, scores=ranked, ord=plan.ord)
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_a_budget_that_no_choice_meets(tmp_path: Path) -> None:
    def decide(found: Any) -> list[Budget]:
        plan = lay(Pattern.parse("1x1@0.5"), found["w"])
        return [Budget("all", (plan,), 9, ((2, 8),))]

    with pytest.raises(SpecError, match=r"'all': 9 blocks are to survive; its bounds allow 2 to 8"):
        pruned(tmp_path, {"w": np.ones((4, 4), np.float32)}, decide)


@pytest.mark.usefixtures("means")
@pytest.mark.parametrize("text", ["2:4", "1x2@0.5", "2x2@0.25", "block=1x1 scope=3x4 keep=5"])
@pytest.mark.parametrize("vector", [False, True])
def test_scores(tmp_path: Path, text: str, vector: bool) -> None:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(12, 8)).astype(np.float32)
    scores = rng.random(8 if vector else (12, 8)).astype(np.float32)
    save_file({"w": scores}, tmp_path / "scores")
    with open_weights(tmp_path / "scores") as other:
        plans: list[Plan] = []

        def decide(found: Any) -> list[Plan]:
            plan = lay(Pattern.parse(text), found["w"])
            plans.append(plan._replace(scores=Scores(other, other.tensors["w"], 1 if vector else None)))
            return plans

        result = pruned(tmp_path, {"w": weight}, decide)["w"]
    (plan,) = plans
    ranked = np.abs(weight) * scores
    if not vector:
        ranked = scores
    expected = npscope.keep_largest(weight, plan.keep, plan.block, plan.scope, scores=ranked)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_scores_that_are_no_scores(tmp_path: Path, bad: float) -> None:
    save_file({"w": np.asarray([[1, bad, 1, 1]], np.float32)}, tmp_path / "scores")
    with open_weights(tmp_path / "scores") as other:

        def decide(found: Any) -> list[Plan]:
            return [lay(Pattern.parse("2:4"), found["w"])._replace(scores=Scores(other, other.tensors["w"]))]

        with pytest.raises(FormatError, match="scores of tensor 'w' hold 1 "):
            pruned(tmp_path, {"w": np.ones((1, 4), np.float32)}, decide)


@pytest.mark.parametrize("text", ["2:4", "block=1x2 scope=2x2 keep=2"])
@pytest.mark.parametrize("rows", [8, 64])
def test_marks_are_found_by_reading_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rows: int
) -> None:
    """In windows of whole rows, one after another."""
    monkeypatch.setattr(dropping, "SCOPE_BYTES", 1024)
    monkeypatch.setattr(dropping, "LIMITS", 1)
    monkeypatch.setattr(dropping, "MARK_BYTES", rows * 512 // 8)
    values = numbers("normal", (64, 512), "float32", 4)
    save_file({"w": values}, tmp_path / "in")
    seen = [0]
    recipe = Recipe.shorthand(Pattern.parse(text), layout="in-out")
    progress = lambda done, total: seen.append(total)  # noqa: E731
    (done,) = pruning.prune_file(tmp_path / "in", None, recipe, dry_run=True, progress=progress)
    assert seen[-1] == 2 * values.nbytes
    assert isinstance(done, pruning.Outcome)
    assert done.zeros_after == values.size // 2


@pytest.mark.parametrize("dry_run", [False, True])
def test_marks_in_windows_of_columns_are_found_by_reading_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    """Every slab of rows meets all windows."""
    monkeypatch.setattr(dropping, "SCOPE_BYTES", 1024)
    monkeypatch.setattr(dropping, "SLAB_BYTES", 4 * 512 * 4)
    monkeypatch.setattr(dropping, "LIMITS", 1)
    monkeypatch.setattr(dropping, "MARK_BYTES", 64 * 56 // 8)
    values = numbers("normal", (64, 512), "float32", 4)
    save_file({"w": values}, tmp_path / "in")
    seen = [0]
    recipe = Recipe.shorthand(Pattern.parse("block=1x1 scope=1x-1 keep=20"), layout="in-out")
    progress = lambda done, total: seen.append(total)  # noqa: E731
    pruning.prune_file(tmp_path / "in", tmp_path / "out", recipe, dry_run=dry_run, progress=progress)
    assert seen[-1] == 2 * values.nbytes
    if not dry_run:
        expected = npscope.keep_largest(values, 20, (1, 1), (-1, 1))
        np.testing.assert_array_equal(load(tmp_path / "out")["w"], expected)
    assert {path.name for path in tmp_path.iterdir()} == ({"in"} if dry_run else {"in", "out"})


@given(data=st.data())
def test_marks_are_those_that_were_put(data: st.DataObject) -> None:
    region = tuple(slice(at, at + size) for at, size in ((2, 3), (0, 2), (5, 21)))
    marks, oracle = Marks(region), np.zeros((5, 2, 26), bool)
    boxes = st.tuples(*(st.tuples(*[st.integers(side.start, side.stop)] * 2) for side in region))
    for number in range(4):
        box = tuple(slice(*sorted(side)) for side in data.draw(boxes))
        oracle[box] = np.random.default_rng(number).integers(0, 2, oracle[box].shape)
        marks.put(box, oracle[box])
        box = tuple(slice(*sorted(side)) for side in data.draw(boxes))
        np.testing.assert_array_equal(marks.get(box), oracle[box])


@pytest.mark.parametrize(
    ("kind", "reads"), [("normal", 1), ("heavy", 1), ("constant", 2), ("sorted", 3), ("two-valued", 4)]
)
def test_how_often_a_search_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reads: int) -> None:
    """Once where the sample is like the rest; at most twice more for the key, and once for where its ties end."""
    monkeypatch.setattr(limits, "GATHER", 4000)
    monkeypatch.setattr(narrowing, "GATHER", 4000)
    monkeypatch.setattr(dropping, "SCOPE_BYTES", 4)
    values = numbers(kind, (512, 512), "float32", 2)
    seen = [0]
    save_file({"w": values}, tmp_path / "in")
    recipe = Recipe.shorthand(Pattern.parse("1x1@0.5"))
    progress = lambda done, total: seen.append(total)  # noqa: E731
    pruning.prune_file(tmp_path / "in", None, recipe, dry_run=True, progress=progress)
    assert seen[-1] <= (1 + reads) * values.nbytes


@pytest.mark.parametrize("kind", ["normal", "heavy", "constant", "sorted", "two-valued"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_often_a_bounded_budget_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    """Three times for the ends of all tensors, whether bounds stop them or not, and little more than once for ties."""
    monkeypatch.setattr(limits, "SLAB_BYTES", 1 << 13)
    for module in (limits, narrowing):
        monkeypatch.setattr(module, "GATHER", 1 << 11)
        monkeypatch.setattr(module, "BINS", 1 << 16)
    scales = [0.25, 0.5, 1, 1, 1.5, 2, 3, 4]
    tensors = {f"t{i}": (numbers(kind, (128, 256), "float32", i) * x) for i, x in enumerate(scales)}
    tensors = {name: values.astype(getattr(ml_dtypes, dtype, dtype)) for name, values in tensors.items()}
    size = sum(values.nbytes for values in tensors.values())
    save_file(tensors, tmp_path / "in")
    (tmp_path / "recipe.toml").write_text(
        '[[rule]]\nmatch = "*"\nblock = "1x1"\nbudget = 0.5\nmin_sparsity = 0.45\nmax_sparsity = 0.55\n'
    )
    seen = [0]
    progress = lambda done, total: seen.append(total)  # noqa: E731
    outcomes = pruning.prune_file(
        tmp_path / "in", None, recipe_of(str(tmp_path / "recipe.toml")), dry_run=True, nan="keep", progress=progress
    )
    assert seen[-1] <= (1 + 3 + 1.1) * size
    kept = [outcome.blocks_kept for outcome in outcomes if isinstance(outcome, pruning.Outcome)]
    n = 128 * 256
    least, most = n - math.floor(0.55 * n), math.floor(0.55 * n)
    assert sum(kept) == len(scales) * n // 2
    assert {min(kept), max(kept)} == {least, most}
