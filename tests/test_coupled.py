"""Coupled tensors of a file are pruned as npscope's objects prune them in memory, whatever the strips and slabs.

Oracles: `BlockCoupling` and `ScopeCoupling` on whole arrays, and networks whose neurons or heads
were sliced out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from npscope import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec, block_norms
from npscope.errors import CouplingError, FormatError, SpecError
from npscope.recipes import coupled
from npscope.recipes.coupled import Kept, blocks_in_use, drop, joint_norms, masks_of
from npscope.recipes.members import CouplingRule, MemberRule, couple, window_of
from npscope.recipes.plans import Coupled, Coupling, Group, Member, Skip, Window
from npscope.recipes.recipe import Recipe, resolve
from npscope.recipes.recipe_file import parse_recipe
from npscope.streaming.pruning import Outcome, prune_file
from npscope.weights import Axes, Tensor, Use, open_weights, strided

UP, DOWN = "mlp.up.weight", "mlp.down.weight"

NEURONS = {
    "name": "neurons",
    "sparsity": "0.5",
    "member": [{"tensor": UP, "block": [1, -1]}, {"tensor": DOWN, "block": [-1, 1], "order": [1, 0]}],
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def recipe(*couplings: dict[str, Any], **top: Any) -> Recipe:
    return parse_recipe({"coupling": list(couplings), **top})


def pruned(
    tmp_path: Path, tensors: dict[str, np.ndarray], *couplings: dict[str, Any], **options: Any
) -> dict[str, np.ndarray]:
    save_file(tensors, tmp_path / "in.safetensors")
    prune_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", recipe(*couplings), force=True, **options)
    return load_file(tmp_path / "out.safetensors")


@pytest.fixture(params=["whole", "cut"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Strips and slabs that hold everything, or that cut blocks wherever they can."""
    if request.param == "cut":
        monkeypatch.setattr(coupled, "STRIP_BYTES", 3000)
        monkeypatch.setattr(strided, "_GAP_BYTES", 64)
        monkeypatch.setattr("npscope.streaming.slabs.SLAB_BYTES", 1000)
    return str(request.param)


# --- networks ------------------------------------------------------------------------------------


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def test_an_mlp_pruned_by_neuron_computes_what_the_sliced_one_does(tmp_path: Path, memory: str) -> None:
    up, down, bias = normal(64, 32), normal(32, 64, seed=1), normal(64, seed=2)
    after = pruned(tmp_path, {UP: up, DOWN: down, "mlp.up.bias": bias}, NEURONS)
    joint = np.hypot(np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=0))
    alive = np.sort(np.argsort(-joint)[:32])
    x = normal(10, 32, seed=3)
    sliced = relu(x @ up[alive].T + bias[alive]) @ down[:, alive].T
    whole = relu(x @ after[UP].T + after["mlp.up.bias"]) @ after[DOWN].T
    np.testing.assert_allclose(whole, sliced, rtol=0, atol=1e-6 * np.abs(sliced).max())
    assert np.array_equal(after["mlp.up.bias"], bias)
    assert (after[UP].any(1) == after[DOWN].any(0)).all()
    assert after[UP].any(1).sum() == 32


def test_gated_mlp_with_fused_gate_and_up(tmp_path: Path, memory: str) -> None:
    """Rows i and n + i of gate_up and column i of down are one neuron."""
    fused, down = normal(2 * 24, 16), normal(16, 24, seed=1)
    member = {"tensor": "gate_up", "reshape": [2, 24, 16], "block": [2, 1, -1]}
    other = {"tensor": "down", "reshape": [1, 16, 24], "block": [1, -1, 1], "order": [0, 2, 1]}
    after = pruned(tmp_path, {"gate_up": fused, "down": down}, {"keep": 9, "member": [member, other]})
    # The same as two windows of one tensor.
    windows = [
        {"tensor": "gate_up", "slice": "0:24", "block": [1, -1]},
        {"tensor": "gate_up", "slice": "24:48", "block": [1, -1]},
        {"tensor": "down", "block": [-1, 1], "order": [1, 0]},
    ]
    again = pruned(tmp_path, {"gate_up": fused, "down": down}, {"keep": 9, "member": windows})
    joint = np.sqrt((fused**2).reshape(2, 24, 16).sum((0, 2)) + (down**2).sum(0))
    alive = np.zeros(24, bool)
    alive[np.argsort(-joint)[:9]] = True
    for result in (after, again):
        assert np.array_equal(result["gate_up"], fused * np.tile(alive, 2)[:, None])
        assert np.array_equal(result["down"], down * alive)


def attention(x: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, size: int) -> np.ndarray:
    """Multi-head attention; several query heads may share a key and value head."""
    query, key, value = (np.einsum("ti,hdi->htd", x, w.reshape(-1, size, x.shape[1])) for w in (q, k, v))
    shared = len(query) // len(key)
    key, value = np.repeat(key, shared, 0), np.repeat(value, shared, 0)
    scores = np.exp(query @ key.transpose(0, 2, 1) / math.sqrt(size))
    mixed = scores / scores.sum(-1, keepdims=True) @ value
    return mixed.transpose(1, 0, 2).reshape(len(x), -1) @ o.T


QKVO = [
    {"tensor": "q", "block": [32, -1]},
    {"tensor": "k", "block": [32, -1]},
    {"tensor": "v", "block": [32, -1]},
    {"tensor": "o", "block": [-1, 32], "order": [1, 0]},
]


def test_heads_of_the_minilm_shape(tmp_path: Path) -> None:
    q, k, v, o = (normal(384, 384, seed=seed) / 20 for seed in range(4))
    after = pruned(tmp_path, {"q": q, "k": k, "v": v, "o": o}, {"keep": 7, "member": QKVO})
    alive = after["q"].reshape(12, -1).any(1)
    assert alive.sum() == 7
    x = normal(5, 384, seed=9)
    parts = [w.reshape(12, 32, 384)[alive].reshape(-1, 384) for w in (q, k, v)]
    sliced = attention(x, *parts, o.reshape(384, 12, 32)[:, alive].reshape(384, -1), 32)
    whole = attention(x, after["q"], after["k"], after["v"], after["o"], 32)
    np.testing.assert_allclose(whole, sliced, rtol=0, atol=1e-6 * np.abs(sliced).max())


def test_query_heads_that_share_a_key_head_go_together(tmp_path: Path, memory: str) -> None:
    """GQA: 8 query heads, 2 of them for each of 4 key and value heads, of size 4."""
    q, k, v, o = normal(32, 16), normal(16, 16, seed=1), normal(16, 16, seed=2), normal(16, 32, seed=3)
    members = [
        {"tensor": "q", "block": [8, -1]},
        {"tensor": "k", "block": [4, -1]},
        {"tensor": "v", "block": [4, -1]},
        {"tensor": "o", "block": [-1, 8], "order": [1, 0]},
    ]
    after = pruned(tmp_path, {"q": q, "k": k, "v": v, "o": o}, {"keep": 3, "member": members})
    joint = sum((w**2).reshape(4, -1).sum(1) for w in (q, k, v)) + (o**2).reshape(16, 4, 8).sum((0, 2))
    alive = np.ones(4, bool)
    alive[np.argmin(joint)] = False
    assert np.array_equal(after["q"], q * np.repeat(alive, 8)[:, None])
    assert np.array_equal(after["v"], v * np.repeat(alive, 4)[:, None])
    assert np.array_equal(after["o"], o * np.repeat(alive, 8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_qkv(tmp_path: Path, memory: str, interleaved: bool) -> None:
    """Three windows of one tensor, one after the other or head by head."""
    heads, size, width = 6, 4, 10
    qkv = normal(3 * heads * size, width)
    shape = (heads, 3, size, width) if interleaved else (3, heads, size, width)
    axis = 1 if interleaved else 0
    takes = [", ".join([":"] * axis + [str(part)]) for part in range(3)]
    windows = [{"tensor": "qkv", "reshape": list(shape), "take": take, "block": [1, -1, -1]} for take in takes]
    out = {"tensor": "o", "reshape": [width, heads, size], "block": [-1, 1, -1], "order": [1, 2, 0]}
    o = normal(width, heads * size, seed=1)
    after = pruned(tmp_path, {"qkv": qkv, "o": o}, {"keep": 2, "member": [*windows, out]})
    parts = np.moveaxis(qkv.reshape(shape), axis, 0)
    joint = (parts**2).sum((0, 2, 3)) + (o**2).reshape(width, heads, size).sum((0, 2))
    alive = np.zeros(heads, bool)
    alive[np.argsort(-joint)[:2]] = True
    want = np.moveaxis(parts * alive[:, None, None], 0, axis).reshape(qkv.shape)
    assert np.array_equal(after["qkv"], want)
    assert np.array_equal(after["o"], o * np.repeat(alive, size))


# --- in memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_masks_are_those_of_the_objects(tmp_path: Path, memory: str, dtype: Any, ord: float) -> None:
    """Few distinct values: many ties, decided by position."""
    rng = np.random.default_rng(5)
    up, down = (rng.integers(-2, 3, size=shape).astype(dtype) for shape in ((48, 20), (20, 48)))
    up[3, 4] = np.nan
    coupling = NEURONS | {"ord": "inf" if ord == math.inf else int(ord), "scope": [8, 1]}
    after = pruned(tmp_path, {UP: up, DOWN: down}, coupling, nan="keep")
    specs = [BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))]
    ScopeSpec(BlockCoupling(specs, orders=[(0, 1), (1, 0)]), (8, 1)).hard_threshold(nnz=4, ord=ord)
    assert after[UP].tobytes() == up.tobytes()
    assert after[DOWN].tobytes() == down.tobytes()


def test_layers_that_compete_are_a_scope_coupling(tmp_path: Path, memory: str) -> None:
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in ("up", "down")]
    tensors = {
        name: normal(*((24, 10) if "up" in name else (10, 24)), seed=seed) * (1 + seed)
        for seed, name in enumerate(names)
    }
    members = [
        {"tensor": "layers.*.up", "block": [1, -1]},
        {"tensor": "layers.*.down", "block": [-1, 1], "order": [1, 0]},
    ]
    after = pruned(tmp_path, tensors, {"sparsity": "1/3", "across": True, "member": members})
    scopes = [
        ScopeSpec(
            BlockCoupling(
                [BlockSpec(tensors[f"layers.{i}.up"], (1, -1)), BlockSpec(tensors[f"layers.{i}.down"], (-1, 1))],
                orders=[(0, 1), (1, 0)],
            ),
            (),
        )
        for i in range(3)
    ]
    ScopeCoupling(scopes).hard_threshold(nnz=48)
    for name in names:
        assert after[name].tobytes() == tensors[name].tobytes()
    kept = [after[f"layers.{i}.up"].any(1).sum() for i in range(3)]
    assert sum(kept) == 48
    assert len(set(kept)) > 1


def test_each_layer_decides_alone_without_across(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": normal(8, 4, seed=i) * (i + 1) for i in range(3)}
    after = pruned(tmp_path, tensors, {"keep": 2, "member": [{"tensor": "layers.*.w", "block": [1, -1]}]})
    assert [value.any(1).sum() for value in after.values()] == [2, 2, 2]


def test_a_coupling_of_one_member_is_the_plain_pattern(tmp_path: Path) -> None:
    tensors = {"w": normal(16, 8)}
    after = pruned(tmp_path, tensors, {"keep": 5, "member": [{"tensor": "w", "block": [4, 2]}]})
    rules = parse_recipe({"rule": [{"block": "4x2", "keep": 5}]})
    prune_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", rules, force=True)
    assert after["w"].tobytes() == load_file(tmp_path / "out.safetensors")["w"].tobytes()


def test_float64_keeps_its_norms(tmp_path: Path) -> None:
    """Two rows that float32 cannot tell apart."""
    w = np.ones((2, 4))
    w[1, 0] += 1e-12
    after = pruned(tmp_path, {"w": w}, {"keep": 1, "member": [{"tensor": "w", "block": [1, -1]}]})
    assert after["w"].any(1).tolist() == [False, True]


@pytest.mark.parametrize("across", [False, True])
def test_blocks_in_use_are_those_that_survive(tmp_path: Path, memory: str, across: bool) -> None:
    tensors = {f"l.{i}.w": normal(16, 6, seed=i) * (i + 1) for i in range(2)}
    tensors["l.0.w"][0] = 1e-45  # subnormal, and its square is zero
    tensors["l.1.w"][:] = 0
    tensors["l.1.w"][3, 3] = np.nan
    table = {"keep": 3, "of": 16 if across else 8, "across": across, "member": [{"tensor": "l.*.w", "block": [1, -1]}]}
    save_file(tensors, tmp_path / "in.safetensors")
    with open_weights(tmp_path / "in.safetensors") as weights:
        couplings = resolve(recipe(table), weights.tensors.values())
        used = [blocks_in_use(c, weights).reshape(-1).tolist() for c in couplings if isinstance(c, Coupling)]
    assert used == ([[17]] if across else [[8, 8], [1, 0]])
    pruned(tmp_path, tensors, table, nan="keep")
    with open_weights(tmp_path / "out.safetensors") as weights:
        used = [blocks_in_use(c, weights).reshape(-1).tolist() for c in couplings if isinstance(c, Coupling)]
    assert used == ([[3]] if across else [[3, 3], [1, 0]])


# --- slabs ---------------------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, tuple[int, ...]]:
    """A window of a tensor, its axes in any order, sliced, reshaped; and block sizes that divide it."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    parts = []
    for length in (shape[axis] for axis in order):
        start = draw(st.integers(0, length - 1))
        parts.append(f"{start}:{draw(st.integers(start + 1, length))}:{draw(st.integers(1, 3))}")
    text = draw(st.sampled_from([None, ", ".join(parts)]))
    whole = tensor("w", *shape)
    window = window_of(whole, text, order=order)
    split = None
    if draw(st.booleans()):  # an axis cut in two
        axis = draw(st.integers(0, len(window.shape) - 1))
        first = draw(st.sampled_from([n for n in range(1, window.shape[axis] + 1) if window.shape[axis] % n == 0]))
        split = (*window.shape[:axis], first, window.shape[axis] // first, *window.shape[axis + 1 :])
    final = window_of(whole, text, split, order=order)
    block = tuple(draw(st.sampled_from([n for n in range(1, length + 1) if length % n == 0])) for length in final.shape)
    return final, block


@given(windows(), st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_dropping_slab_by_slab_is_dropping_at_once(
    window: tuple[Window, tuple[int, ...]], size: int, seed: int
) -> None:
    laid, block = window
    rng = np.random.default_rng(seed)
    values = rng.normal(size=math.prod(laid.tensor.shape)).astype(np.float32)
    mask = rng.random([n // b for n, b in zip(laid.shape, block, strict=True)]) < 0.5
    # The oracle: element indices that the window shows, by the window of an array of indices.
    indices = np.lib.stride_tricks.as_strided(
        np.arange(values.size)[laid.offset :], laid.shape, [8 * s for s in laid.strides]
    )
    element = mask
    for axis, count in enumerate(block):
        element = np.repeat(element, count, axis)
    want = values.copy()
    want[indices[~element]] = 0
    for start in range(0, values.size, size):
        drop([Kept(laid, block, mask)], start, values[start : start + size])
    assert values.tobytes() == want.tobytes()


class Held:
    """A weight file in memory, as far as it is read."""

    def __init__(self, values: np.ndarray) -> None:
        self.raw = memoryview(values.tobytes())

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        assert 0 <= start <= start + into.nbytes <= len(self.raw)
        into.cast("B")[:] = self.raw[start : start + into.nbytes]


@given(windows(), st.integers(4, 200), st.sampled_from([0, 16, 1 << 15]), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_norms_of_a_window_do_not_depend_on_how_it_is_read(
    cut: tuple[Window, tuple[int, ...]], strip: int, gap: int, seed: int
) -> None:
    laid, block = cut
    values = np.random.default_rng(seed).normal(size=math.prod(laid.tensor.shape)).astype(np.float32)
    shown = np.lib.stride_tricks.as_strided(values[laid.offset :], laid.shape, [4 * s for s in laid.strides])
    grid = [n // b for n, b in zip(laid.shape, block, strict=True)]
    order = tuple(np.random.default_rng(seed).permutation(len(block)).tolist())
    group = Group((Member(laid, block, order),), ())
    table = np.full([grid[axis] for axis in order], np.nan, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coupled, "STRIP_BYTES", strip)
        patch.setattr(strided, "_GAP_BYTES", gap)
        patch.setattr(strided, "_SPAN_BYTES", 4 * gap + 4)
        for box, norms in joint_norms(group, 2, Held(values)):  # type: ignore[arg-type]
            assert np.isnan(table[box]).all()
            table[box] = norms
    assert table.tobytes() == np.ascontiguousarray(block_norms(shown, block).transpose(order)).tobytes()


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["each", "input"])
def test_members_rank_by_scores(tmp_path: Path, memory: str, kind: str) -> None:
    up, down = normal(24, 8), normal(8, 24, seed=1)
    rng = np.random.default_rng(2)
    if kind == "each":
        scores = {UP: rng.random((24, 8)).astype(np.float32), DOWN: rng.random((8, 24)).astype(np.float32)}
        ranked = scores
    else:
        scores = {UP: rng.random(8).astype(np.float32), DOWN: rng.random(24).astype(np.float32)}
        ranked = {UP: np.abs(up) * scores[UP], DOWN: np.abs(down) * scores[DOWN]}
    save_file(scores, tmp_path / "scores.safetensors")
    after = pruned(tmp_path, {UP: up, DOWN: down}, NEURONS | {"scores": str(tmp_path / "scores.safetensors")})
    specs = [BlockSpec(up, (1, -1), name=UP), BlockSpec(down, (-1, 1), name=DOWN)]
    scope = ScopeSpec(BlockCoupling(specs, orders=[(0, 1), (1, 0)]), ())
    scope.hard_threshold(nnz=12, values=ranked)
    assert after[UP].tobytes() == up.tobytes()
    assert after[DOWN].tobytes() == down.tobytes()


@pytest.mark.parametrize("shape", [(24, 8), (8,)])
@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_scores_that_are_nan_or_negative_are_refused(tmp_path: Path, shape: tuple[int, ...], bad: float) -> None:
    scores = np.ones(shape, np.float32)
    scores[..., 5] = bad
    save_file({"w": scores}, tmp_path / "scores.safetensors")
    single = {"keep": 3, "scores": str(tmp_path / "scores.safetensors"), "member": [{"tensor": "w", "block": [1, -1]}]}
    with pytest.raises(FormatError, match=r"scores of tensor 'w' hold \d+ (NaN|negative numbers)"):
        pruned(tmp_path, {"w": normal(24, 8)}, single)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("scored", [False, True])
def test_members_are_out_in_however_they_are_stored(tmp_path: Path, memory: str, scored: bool) -> None:
    """The same weights stored [in, out] are pruned by the same coupling."""
    up, down, rng = normal(24, 24), normal(8, 24, seed=1), np.random.default_rng(2)
    coupling = dict(NEURONS)
    if scored:
        scores = {UP: rng.random(24).astype(np.float32), DOWN: rng.random(24).astype(np.float32)}
        save_file(scores, tmp_path / "scores.safetensors")
        coupling["scores"] = str(tmp_path / "scores.safetensors")
    plain = pruned(tmp_path, {UP: up, DOWN: down}, coupling)
    stored = {UP: np.ascontiguousarray(up.T), DOWN: np.ascontiguousarray(down.T)}
    other = pruned(tmp_path, stored, coupling | {"layout": "in-out"})
    for name in (UP, DOWN):
        assert np.array_equal(plain[name], other[name].T)
    assert plain[UP].any(1).sum() == 12


def test_a_graph_says_how_members_are_stored() -> None:
    use = Use("MatMul", "MatMul_0", Axes((), 1, 0, ()))
    stored = Tensor("w", "float32", (6, 8), 4 * 48, use)
    (coupling,) = resolve(recipe({"keep": 1, "member": [{"tensor": "w", "block": [1, -1]}]}), [stored])
    assert isinstance(coupling, Coupling)
    (member,) = coupling.groups[0].members
    assert (member.window.shape, member.window.strides, coupling.blocks) == ((8, 6), (1, 8), 8)


# --- what cannot be meant ------------------------------------------------------------------------


def tensor(name: str, *shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(name, dtype, shape, 4 * math.prod(shape))


def coupling(*members: MemberRule, amount: int | str = "0.5", **options: Any) -> CouplingRule:
    return CouplingRule("coupling 'c'", members, amount, **options)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        pytest.param(
            coupling(MemberRule("a", (1, -1)), MemberRule("b", (1, -1))),
            r"'b' \(6, 8\) .* has a grid \(6, 1\), member 'a' \(8, 6\) .* has \(8, 1\)",
            id="case20-grids",
        ),
        pytest.param(
            coupling(MemberRule("a", (1, -1), slice="0:5"), MemberRule("a", (1, -1), slice="3:8")),
            r"'a' \(5, 6\) .* and member 'a' \(5, 6\) .* share an element",
            id="case20-overlap",
        ),
        pytest.param(coupling(MemberRule("nothing", (1, -1))), "'nothing' matches none of the 4", id="case21-member"),
        pytest.param(coupling(MemberRule("a", (3, -1))), "'a': axis 0 has size 8, not a multiple", id="case3-block"),
        pytest.param(coupling(MemberRule("a", (1,))), "1 axes", id="case4-ndim"),
        pytest.param(coupling(MemberRule("a", order=(0, 0))), "no permutation", id="case19-order-twice"),
        pytest.param(coupling(MemberRule("a", order=(0, 2))), "outside the 2 axes", id="case19-order-range"),
        pytest.param(coupling(MemberRule("a", reshape=(5, -1))), r"cannot be reshaped to \(5, -1\)", id="reshape"),
        pytest.param(
            coupling(MemberRule("a", slice=":, 0:3", reshape=(24,))), "without a copy", id="reshape-of-a-slice"
        ),
        pytest.param(coupling(MemberRule("a", slice="0:9")), "no range within an axis of 8", id="slice-end"),
        pytest.param(coupling(MemberRule("a", slice="4:4")), "no range within", id="slice-empty"),
        pytest.param(coupling(MemberRule("a", slice="::0")), "no range within", id="slice-step-0"),
        pytest.param(coupling(MemberRule("a", slice="-1:")), "'-1:' is not a range", id="slice-negative"),
        pytest.param(coupling(MemberRule("a", slice="8")), "no index 8 in an axis of 8", id="slice-index"),
        pytest.param(coupling(MemberRule("a", slice=":,:,:")), "3 axes", id="slice-axes"),
        pytest.param(coupling(MemberRule("a", slice="0, 0")), "needed are axes", id="slice-scalar"),
        pytest.param(coupling(MemberRule("ids")), "dtype int64 cannot be pruned", id="dtype"),
        pytest.param(coupling(MemberRule("a", (1, -1)), scope=(3, 1)), "not a multiple of scope", id="case8-scope"),
        pytest.param(coupling(MemberRule("a", (1, -1)), amount=9), "cannot keep 9 of 8", id="case9-keep"),
    ],
)
def test_couplings_that_cannot_be_meant_are_errors(rule: CouplingRule, message: str) -> None:
    tensors = {t.name: t for t in (tensor("a", 8, 6), tensor("b", 6, 8), tensor("ids", 4, dtype="int64"), tensor("c"))}
    with pytest.raises(SpecError, match=message) as caught:
        couple([rule], tensors, {})
    assert str(caught.value).startswith("coupling 'c'")


def test_instances_must_be_those_of_every_member() -> None:
    tensors = {name: tensor(name, 4, 4) for name in ("l.0.up", "l.1.up", "l.0.down")}
    rule = coupling(MemberRule("l.*.up", (1, -1)), MemberRule("l.*.down", (-1, 1), (1, 0)))
    with pytest.raises(CouplingError, match=r"'l\.\*\.up' has an instance '1', 'l\.\*\.down' has none"):
        couple([rule], tensors, {})


def test_a_tensor_is_in_one_coupling(tmp_path: Path) -> None:
    rules = [CouplingRule(f"coupling {n}", (MemberRule("a", (1, -1)),), 1) for n in (1, 2)]
    with pytest.raises(CouplingError, match="'a' is in coupling 1 and in coupling 2"):
        couple(rules, {"a": tensor("a", 4, 4)}, {})


def test_rules_leave_coupled_tensors_to_their_coupling(tmp_path: Path) -> None:
    tensors = [tensor("a", 8, 8), tensor("b", 8, 8), tensor("c", 8, 8)]
    rules = [{"match": "b", "pattern": "2:4"}, {"pattern": "1:4"}]
    single = {"keep": 1, "member": [{"tensor": "a", "block": [1, -1]}]}
    decisions = resolve(parse_recipe({"rule": rules, "coupling": [single]}), tensors)
    assert [type(decision).__name__ for decision in decisions] == ["Coupling", "Plan", "Plan"]
    with pytest.raises(SpecError, match="rule 1 'a' has no effect"):
        resolve(parse_recipe({"rule": [{"match": "a", "pattern": "2:4"}], "coupling": [single]}), tensors)


def test_a_coupled_tensor_with_nan_is_refused_before_anything_is_there(tmp_path: Path) -> None:
    w = normal(8, 4)
    w[2, 2] = np.nan
    single = {"keep": 1, "member": [{"tensor": "w", "block": [1, -1]}]}
    with pytest.raises(FormatError, match="'w' holds 1 NaN"):
        pruned(tmp_path, {"w": w}, single)
    assert not (tmp_path / "out.safetensors").exists()
    assert pruned(tmp_path, {"w": w}, single, nan="keep")["w"].any(1).tolist() == [i == 2 for i in range(8)]


def test_what_was_done_is_said_of_every_tensor(tmp_path: Path) -> None:
    save_file({"w": normal(8, 4), "b": normal(8)}, tmp_path / "in.safetensors")
    single = recipe({"name": "rows", "keep": 2, "member": [{"tensor": "w", "block": [1, -1]}]})
    rest, done = prune_file(tmp_path / "in.safetensors", None, single, dry_run=True)
    assert isinstance(rest, Skip)
    assert isinstance(done, Outcome)
    assert isinstance(done.plan, Coupled)
    assert isinstance(done.plan.coupling, Coupling)
    assert (done.plan.pattern, done.plan.along) == ("keep 2 of 8 coupled blocks", "coupling 'rows'")
    assert done.zeros_after == 24


def test_memory_is_that_of_a_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read is far smaller than the tensors, and rows are read in one piece."""
    monkeypatch.setattr(coupled, "STRIP_BYTES", 1 << 16)
    save_file({UP: normal(512, 256), DOWN: normal(256, 512, seed=1)}, tmp_path / "in.safetensors")
    with open_weights(tmp_path / "in.safetensors") as weights:
        sizes: dict[str, list[int]] = {UP: [], DOWN: []}
        read: Callable[..., None] = weights.read

        def counted(t: Tensor, start: int, into: memoryview) -> None:
            sizes[t.name].append(into.nbytes)
            read(t, start, into)

        monkeypatch.setattr(weights, "read", counted)
        (decision,) = resolve(recipe(NEURONS), weights.tensors.values())
        assert isinstance(decision, Coupling)
        masks_of(decision, weights)
    assert sum(sizes[UP]) == 512 * 256 * 4
    assert max(sizes[UP]) <= 1 << 16
    assert len(sizes[UP]) == 17
