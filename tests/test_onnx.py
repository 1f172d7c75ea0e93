"""ONNX models: every weight found wherever it sits, its axes as its users take them, all other bytes left alone.

Case numbers are those of the catalogue of bad inputs. The oracles are the onnx package, for what a
file holds and how a model is written, and onnxruntime, for what it computes.
"""

from __future__ import annotations

import os
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from timing import assert_linear, within

import npscope
from npscope.errors import FileError, FormatError, SpecError
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Skip
from npscope.recipes.recipe import Recipe, resolve
from npscope.streaming.pruning import prune_file
from npscope.weights import Axes, Tensor, Use, WeightFile, open_weights
from npscope.weights.onnx import Onnx

RNG = np.random.default_rng(11)
FLOAT = TensorProto.FLOAT
OPSET = [helper.make_opsetid("", 17)]


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    """Small arrays of many dtypes: without this most of the time goes into compiling kernels."""
    with npscope.use_backend("reference"):
        yield


def weight(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def model_of(
    nodes: list[Any],
    initializers: dict[str, np.ndarray] | list[Any] = {},  # noqa: B006 - never changed
    inputs: dict[str, Any] = {},  # noqa: B006
    outputs: dict[str, Any] | None = None,
    *,
    functions: Any = (),
    opsets: Any = OPSET,
    **options: Any,
) -> onnx.ModelProto:
    """A model of float inputs and outputs; None is a shape that is not known."""

    def values(shapes: dict[str, Any]) -> list[Any]:
        return [
            shape if isinstance(shape, onnx.ValueInfoProto) else helper.make_tensor_value_info(name, FLOAT, shape)
            for name, shape in shapes.items()
        ]

    if isinstance(initializers, dict):
        initializers = [numpy_helper.from_array(array, name) for name, array in initializers.items()]
    graph = helper.make_graph(nodes, "g", values(inputs), values({"y": None} if outputs is None else outputs))
    graph.initializer.extend(initializers)
    return helper.make_model(graph, opset_imports=list(opsets), functions=list(functions), ir_version=9, **options)


def saved(model: onnx.ModelProto | bytes, path: Path) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def bytes_of(weights: WeightFile, tensor: Tensor) -> bytes:
    found = bytearray(tensor.nbytes)
    weights.read(tensor, 0, memoryview(found))
    return bytes(found)


def pruned(array: np.ndarray, axis: int) -> np.ndarray:
    """The largest 2 of 4 along `axis`, the first of equals, by a plain sort."""
    moved = np.moveaxis(array, axis, -1)
    groups = moved.reshape(-1, 4).copy()
    order = np.argsort(-np.abs(groups.astype(np.float64)), axis=1, kind="stable")
    np.put_along_axis(groups, order[:, 2:], groups.dtype.type(0), axis=1)
    return np.ascontiguousarray(np.moveaxis(groups.reshape(moved.shape), -1, axis))


def verdict(path: Path) -> str:
    """What the checker of the onnx package says of a model."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return "good"


TWO_OF_FOUR = Recipe.shorthand(Pattern.parse("2:4"))


def computed(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


# --- networks: the same output as when the weights are pruned by hand ----------------------------


class Network(NamedTuple):
    """A model of weights, the weights, their axis of inputs (None: none to prune), and what it is fed with."""

    build: Callable[..., onnx.ModelProto]
    weights: list[np.ndarray]
    into: list[int | None]
    feeds: dict[str, np.ndarray]


def _product(op: str, *, left: bool = False, **attributes: Any) -> Callable[..., onnx.ModelProto]:
    def build(w: np.ndarray) -> onnx.ModelProto:
        inputs = ["w", "x"] if left else ["x", "w"]
        return model_of([helper.make_node(op, inputs, ["y"], **attributes)], {"w": w}, {"x": None})

    return build


def _transposed(w: np.ndarray) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Identity", ["w"], ["same"]),
        helper.make_node("Transpose", ["same"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    return model_of(nodes, {"w": w}, {"x": None})


def _constant(w: np.ndarray) -> onnx.ModelProto:
    return model_of([constant("w", w), helper.make_node("MatMul", ["x", "w"], ["y"])], {}, {"x": None})


def _branches(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> onnx.ModelProto:
    """`a` in one branch, `b` in the other under the same name, `c` put out by a branch of another If."""
    info = helper.make_tensor_value_info
    bodies = [
        helper.make_graph(
            [constant("w", array), helper.make_node("MatMul", ["x", "w"], ["h"])], "b", [], [info("h", FLOAT, None)]
        )
        for array in (a, b)
    ]
    chosen = [
        helper.make_graph([constant("v", array)], "c", [], [info("v", FLOAT, None)]) for array in (c, np.zeros_like(c))
    ]
    nodes = [
        helper.make_node("If", ["go"], ["m"], "outer", then_branch=bodies[0], else_branch=bodies[1]),
        helper.make_node("If", ["go"], ["n"], then_branch=chosen[0], else_branch=chosen[1]),
        helper.make_node("Gemm", ["m", "n"], ["y"], transB=1),
    ]
    return model_of(nodes, {}, {"x": None, "go": info("go", TensorProto.BOOL, [])})


def _loop(w: np.ndarray) -> onnx.ModelProto:
    """A body that sees `w` of the graph around it by name."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["h2"]), helper.make_node("Identity", ["c"], ["c2"])],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("h", FLOAT, None)],
        [info("c2", TensorProto.BOOL, []), info("h2", FLOAT, None)],
    )
    times = numpy_helper.from_array(np.asarray(3, np.int64), "times")
    loop = helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)
    return model_of([loop], [numpy_helper.from_array(w, "w"), times], {"x": None})


def _lstm(w: np.ndarray, r: np.ndarray) -> onnx.ModelProto:
    """As PyTorch writes it: gates put in another order by Slice and Concat, the direction by Unsqueeze."""
    nodes = [constant("zero", np.zeros(1, np.int64))]
    for name in ("w", "r"):
        for part, begin in enumerate((0, 12, 4, 8)):
            nodes.append(constant(f"{name}b{part}", np.asarray([begin], np.int64)))
            nodes.append(constant(f"{name}e{part}", np.asarray([begin + 4], np.int64)))
            nodes.append(
                helper.make_node("Slice", [name, f"{name}b{part}", f"{name}e{part}", "zero"], [f"{name}{part}"])
            )
        nodes.append(helper.make_node("Concat", [f"{name}{part}" for part in range(4)], [f"{name}c"], axis=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}c", "zero"], [f"{name}u"]))
    nodes.append(helper.make_node("LSTM", ["x", "wu", "ru"], ["y"], hidden_size=4))
    return model_of(nodes, {"w": w, "r": r}, {"x": None})


NETWORKS = {
    "MatMul": Network(_product("MatMul"), [weight(8, 5)], [0], {"x": weight(3, 8)}),
    "MatMul of a stack": Network(_product("MatMul"), [weight(2, 8, 5)], [1], {"x": weight(2, 3, 8)}),
    "MatMul from the left": Network(_product("MatMul", left=True), [weight(5, 8)], [1], {"x": weight(8, 3)}),
    "Gemm": Network(_product("Gemm"), [weight(8, 5)], [0], {"x": weight(3, 8)}),
    "Gemm transB": Network(_product("Gemm", transB=1), [weight(5, 8)], [1], {"x": weight(3, 8)}),
    "Gemm from the left": Network(_product("Gemm", left=True), [weight(5, 8)], [1], {"x": weight(8, 3)}),
    "Gemm transA from the left": Network(
        _product("Gemm", left=True, transA=1), [weight(8, 5)], [0], {"x": weight(8, 3)}
    ),
    "Conv": Network(_product("Conv"), [weight(6, 4, 3, 3)], [1], {"x": weight(1, 4, 5, 5)}),
    "Conv of groups": Network(_product("Conv", group=2), [weight(6, 4, 3)], [1], {"x": weight(1, 8, 5)}),
    "ConvTranspose": Network(_product("ConvTranspose"), [weight(8, 3, 2, 2)], [0], {"x": weight(1, 8, 4, 4)}),
    "Identity and Transpose": Network(_transposed, [weight(5, 8)], [1], {"x": weight(3, 8)}),
    "case73-Constant": Network(_constant, [weight(8, 5)], [0], {"x": weight(3, 8)}),
    "case73-If": Network(
        _branches,
        [weight(8, 4), weight(8, 4), weight(5, 4)],
        [0, 0, 1],
        {"x": weight(3, 8), "go": np.asarray(True)},
    ),
    "case73-Loop": Network(_loop, [weight(8, 8)], [0], {"x": weight(3, 8)}),
    "LSTM": Network(_lstm, [weight(16, 8), weight(16, 4)], [1, 1], {"x": weight(3, 1, 8)}),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_network_pruned_here_is_the_network_pruned_by_hand(network: Network, tmp_path: Path) -> None:
    source, out = saved(network.build(*network.weights), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    prune_file(source, out, TWO_OF_FOUR)
    expected = network.build(*(pruned(w, axis) for w, axis in zip(network.weights, network.into, strict=True)))
    assert out.read_bytes() == expected.SerializeToString()
    before, after = computed(source, network.feeds), computed(out, network.feeds)
    for a, b, by_hand in zip(before, after, computed(expected, network.feeds), strict=True):
        assert not np.array_equal(a, b)
        np.testing.assert_array_equal(b, by_hand)
    assert verdict(out) == verdict(source)


def test_tiles_and_fan_in_lie_on_the_matrix_that_the_node_sees(tmp_path: Path) -> None:
    """A MatMul of [in, out] takes the tiles of its transpose; a kernel's fan-in is flattened."""
    dense, kernel = weight(8, 12), weight(4, 3, 2, 2)
    nodes = [helper.make_node("MatMul", ["x", "dense"], ["h"]), helper.make_node("Conv", ["i", "kernel"], ["y"])]
    source = saved(model_of(nodes, {"dense": dense, "kernel": kernel}, {"x": None, "i": None}), tmp_path / "in.onnx")
    prune_file(source, tmp_path / "fan.onnx", Recipe.shorthand(Pattern.parse("2:4"), axis="fan-in"))
    prune_file(source, tmp_path / "tiles.onnx", Recipe.shorthand(Pattern.parse("6x2@0.5"), include=("dense",)))
    fan = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "fan.onnx").graph.initializer}
    np.testing.assert_array_equal(fan["dense"], pruned(dense, 0))
    np.testing.assert_array_equal(fan["kernel"], pruned(kernel.reshape(4, 12), 1).reshape(kernel.shape))
    tiled = numpy_helper.to_array(onnx.load(tmp_path / "tiles.onnx").graph.initializer[0])
    tiles = dense.T.reshape(2, 6, 4, 2).transpose(0, 2, 1, 3).reshape(8, 12)
    kept = np.sort(np.argsort(-np.linalg.norm(tiles.astype(np.float64), axis=1))[:4])
    np.testing.assert_array_equal(
        tiled.T.reshape(2, 6, 4, 2).transpose(0, 2, 1, 3).reshape(8, 12).any(1).nonzero()[0], kept
    )


def test_a_fan_in_that_is_stored_around_the_outputs_is_no_matrix(tmp_path: Path) -> None:
    source = saved(NETWORKS["ConvTranspose"].build(weight(8, 4, 2, 2)), tmp_path / "in.onnx")
    for recipe in (Recipe.shorthand(Pattern.parse("2:4"), axis="fan-in"), Recipe.shorthand(Pattern.parse("2x2@0.5"))):
        with pytest.raises(SpecError, match=r"no \[out, fan-in\] matrix"):
            prune_file(source, tmp_path / "out.onnx", recipe)
    matrix = saved(NETWORKS["ConvTranspose"].build(weight(8, 4, 1, 1)), tmp_path / "in.onnx")
    with open_weights(matrix) as weights:
        assert weights.tensors["w"].use == Use("ConvTranspose", "ConvTranspose#0", Axes((), 1, 0, (2, 3)))


# --- what the users make of a tensor ------------------------------------------------------------


def node(op: str, inputs: list[str], output: str = "y", name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name, **attributes)


def use_of(
    nodes: list[Any], w: np.ndarray, tmp_path: Path, more: dict[str, np.ndarray] | None = None, **rest: Any
) -> Any:
    model = model_of(nodes, {"w": w, **(more or {})}, {"x": None}, **rest)
    with open_weights(saved(model, tmp_path / "m.onnx")) as weights:
        return weights.tensors["w"].use


def test_shared_weights_keep_their_axes_where_the_users_agree(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("Shape", ["w"], "s"), node("MatMul", ["a", "w"], "y", "second")]
    use = use_of(nodes, weight(8, 8), tmp_path)
    assert (use.op, use.node, use.axes) == ("MatMul", "MatMul#0", Axes((), 1, 0, ()))
    both = [node("Transpose", ["w"], "t"), node("Gemm", ["x", "t"], "a", transB=1), node("MatMul", ["a", "w"])]
    assert use_of(both, weight(8, 8), tmp_path).axes == Axes((), 1, 0, ())


LEFT_ALONE = {
    "case73-users disagree": (
        [node("MatMul", ["x", "w"], "a"), node("Gemm", ["a", "w"], transB=1)],
        "its users disagree about its axes: MatMul#0 and Gemm#1",
    ),
    "case73-Gather": ([node("Gather", ["w", "x"])], "Gather uses it as input 0"),
    "case73-tied to a Gather": (
        [node("Gather", ["w", "i"], "a"), node("MatMul", ["a", "w"])],
        "Gather uses it as input 0",
    ),
    "case73-Einsum": ([node("Einsum", ["x", "w"], equation="ab,bc->ac")], "Einsum uses it as input 1"),
    "a factor": ([node("Mul", ["x", "w"])], "Mul uses it as input 1"),
    "the data of a product": ([node("Conv", ["w", "x"])], "Conv uses it as input 0"),
    "a bias": ([node("Gemm", ["x", "x", "w"])], "Gemm uses it as input 2"),
    "reshaped": ([node("Reshape", ["w", "s"], "a"), node("MatMul", ["x", "a"])], "Reshape uses it as input 0"),
    "quantised": ([node("DequantizeLinear", ["w", "s"], "a"), node("MatMul", ["x", "a"])], "DequantizeLinear uses it"),
    "an output": ([node("MatMul", ["x", "w"]), node("Identity", ["w"], "z")], "it is an output of the graph"),
    "custom domain": ([node("MatMul", ["x", "w"], domain="my.ops")], "my.ops.MatMul uses it as input 1"),
    "not used": ([node("Relu", ["x"])], "no node uses it"),
    "groups": ([node("ConvTranspose", ["x", "w"], group=2)], "ConvTranspose uses it as input 1"),
    "one row": ([node("Unsqueeze", ["w"], "a", axes=[0]), node("Squeeze", ["a"], "b", axes=[9])], "Squeeze uses it"),
}


@pytest.mark.parametrize(("nodes", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_is_no_weight_says_why(nodes: list[Any], reason: str, tmp_path: Path) -> None:
    outputs = {"y": None, "z": None} if any("z" in n.output for n in nodes) else None
    use = use_of(nodes, weight(8, 8, 3) if reason.startswith("ConvT") else weight(8, 8), tmp_path, outputs=outputs)
    assert use.axes is None
    assert reason in use.reason
    with open_weights(tmp_path / "m.onnx") as weights:
        decision = next(
            d for d in resolve(Recipe.shorthand(Pattern.parse("2:4"), include=("w",)), weights.tensors.values())
        )
    assert isinstance(decision, Skip)
    assert decision.reason == use.reason


def test_an_axis_that_was_inserted_is_no_row_and_no_column(tmp_path: Path) -> None:
    axes = np.asarray([1], np.int64)
    nodes = [node("Unsqueeze", ["w", "axes"], "a"), node("MatMul", ["x", "a"])]
    use = use_of(nodes, weight(8), tmp_path, {"axes": axes})
    assert (use.axes, use.reason) == (None, "its rows or columns are single for MatMul")
    nodes = [node("Squeeze", ["w", "axes"], "a"), node("MatMul", ["x", "a"])]
    assert use_of(nodes, weight(8, 1, 4), tmp_path, {"axes": axes}).axes == Axes((1,), 2, 0, ())
    nodes = [constant("axes", axes), node("Unsqueeze", ["w", "axes"], "a"), node("Conv", ["x", "a"])]
    assert use_of(nodes, weight(8, 3), tmp_path).reason == "its rows or columns are single for Conv"
    nodes = [
        node("Constant", [], "axes", value_ints=[-1]),
        node("Unsqueeze", ["w", "axes"], "a"),
        node("Conv", ["x", "a"]),
    ]
    assert use_of(nodes, weight(8, 3), tmp_path).axes == Axes((), 0, 1, ())


def test_case73_names_inside_graphs_hide_those_outside(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info("h", FLOAT, None)
    uses = helper.make_graph([node("MatMul", ["x", "w"], "h")], "b", [], [info])
    hides = helper.make_graph([node("Relu", ["x"], "w"), node("MatMul", ["x", "w"], "h")], "b", [], [info])
    hides.initializer.append(numpy_helper.from_array(weight(8, 8), "v"))
    nodes = [node("If", ["x"], "y", "choose", then_branch=uses, else_branch=hides)]
    model = model_of(nodes, {"w": weight(8, 8), "v": weight(4, 4)}, {"x": None})
    with open_weights(saved(model, tmp_path / "m.onnx")) as weights:
        assert list(weights.tensors) == ["choose.else_branch/v", "w", "v"]
        use = weights.tensors["w"].use
        assert use is not None
        assert (use.node, use.axes) == ("choose.then_branch/MatMul#0", Axes((), 1, 0, ()))
        assert (
            weights.tensors["v"].use.reason == weights.tensors["choose.else_branch/v"].use.reason == "no node uses it"
        )  # type: ignore[union-attr]


def test_many_nodes_in_a_row_and_many_users_take_bounded_time(tmp_path: Path) -> None:
    """Every tensor reaches every node; following each to the end would take minutes."""
    names = [f"w{i}" for i in range(60)]
    chain = [node("Concat", names, "c0", axis=0)]
    chain += [node("Identity", [f"c{i}"], f"c{i + 1}") for i in range(3000)]
    chain += [node("MatMul", ["x", f"c{i}"], f"m{i}") for i in range(3000)]
    model = model_of(chain, {name: weight(2, 2) for name in names}, {"x": None})
    path = saved(model, tmp_path / "m.onnx")
    with within(5), open_weights(path) as weights:
        reasons = {tensor.use.reason for tensor in weights.tensors.values() if tensor.use}
    assert reasons == {"more than 256 nodes use it"}
    model = model_of([node("Relu", ["w"], f"y{i}") for i in range(1000)], {"w": weight(2, 2)}, {})
    with open_weights(saved(model, tmp_path / "m.onnx")) as weights:
        assert weights.tensors["w"].use == Use("Relu", "Relu#0", None, "more than 256 nodes use it")


def test_names_are_unique_whatever_the_model_calls_things(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info("h", FLOAT, None)
    body = helper.make_graph([constant("c", weight(2)), node("Identity", ["x"], "h")], "b", [], [info])
    nodes = [node("If", ["x"], "y", "same", then_branch=body), node("If", ["x"], "z", "same", then_branch=body)]
    nameless = helper.make_node("Constant", [], [""], value=numpy_helper.from_array(weight(1)))
    arrays = [numpy_helper.from_array(weight(3), ""), numpy_helper.from_array(weight(4), "same.then_branch/c")]
    model = model_of([*nodes, nameless], arrays, {"x": None})
    with open_weights(saved(model, tmp_path / "m.onnx")) as weights:
        sizes = {name: tensor.shape[0] for name, tensor in weights.tensors.items()}
    assert len(sizes) == 5
    assert sizes["Constant#2"] == 1
    assert sizes["initializer#0"] == 3
    assert sorted(sizes.values()) == [1, 2, 2, 3, 4]


def test_case73_an_initializer_that_is_an_input_is_a_weight(tmp_path: Path) -> None:
    """All were in models of IR version 3; a value fed by the caller replaces it as before."""
    w = weight(8, 5)
    model = model_of([node("MatMul", ["x", "w"])], {"w": w}, {"x": None, "w": [8, 5]})
    prune_file(saved(model, tmp_path / "in.onnx"), tmp_path / "out.onnx", TWO_OF_FOUR)
    x = weight(3, 8)
    np.testing.assert_array_equal(computed(tmp_path / "out.onnx", {"x": x})[0], x @ pruned(w, 0))
    np.testing.assert_allclose(computed(tmp_path / "out.onnx", {"x": x, "w": w})[0], x @ w, rtol=1e-5)


def test_case73_quantised_weights_pass_through(tmp_path: Path) -> None:
    w = RNG.integers(-128, 127, (8, 8)).astype(np.int8)
    nodes = [node("DequantizeLinear", ["w", "scale"], "f"), node("MatMul", ["x", "f"], "h"), node("MatMul", ["h", "v"])]
    arrays = {"w": w, "scale": np.float32(0.1).reshape(()), "v": weight(8, 4)}
    source = saved(model_of(nodes, arrays, {"x": None}), tmp_path / "in.onnx")
    prune_file(source, tmp_path / "out.onnx", TWO_OF_FOUR)
    after = onnx.load(tmp_path / "out.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(after[0]), w)
    np.testing.assert_array_equal(numpy_helper.to_array(after[2]), pruned(arrays["v"], 0))


def test_heads_and_bases_are_known_by_their_node_and_folded_norms_are_not(tmp_path: Path) -> None:
    names = {"lm": "/model/lm_head/MatMul", "cq": "model_1/cq_t2010v2_1/conv1d", "bn": "net/batch_norm_3;net/conv"}
    nodes = [node("MatMul", ["x", w], f"y{w}", name) for w, name in names.items()]
    model = model_of(nodes, {w: weight(8, 8) for w in names}, {"x": None}, {f"y{w}": None for w in names})
    done = prune_file(saved(model, tmp_path / "in.onnx"), tmp_path / "out.onnx", TWO_OF_FOUR)
    assert [isinstance(each, Skip) for each in done] == [True, True, False]
    assert isinstance(done[0], Skip)
    assert done[0].reason == "default skip of nodes *lm_head* (--include or a rule with the name in full overrides)"


# --- encodings ---------------------------------------------------------------------------------

STORED = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}


def samples(dtype: Any, *shape: int) -> np.ndarray:
    values = RNG.normal(size=shape) * 100
    if np.dtype(dtype).kind == "c":
        return (values + 1j * RNG.normal(size=shape)).astype(dtype)
    return (np.abs(values) if np.dtype(dtype).kind == "u" else values).astype(dtype)


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def tagged(number: int, payload: bytes | int) -> bytes:
    """A field: a varint, or a length and bytes."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def typed(array: np.ndarray) -> onnx.TensorProto:
    """The tensor with its values in the field of their type, not as raw data."""
    code = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = helper.make_tensor("w", code, array.shape, array.reshape(-1))
    assert not tensor.HasField("raw_data")
    return tensor


def hand_made(tensor: onnx.TensorProto, shape: str) -> bytes:
    """The bytes of a typed tensor whose values stand in single fields, or in packed chunks of 3."""
    raw = tensor.SerializeToString()
    field = next(f for f, _ in tensor.ListFields() if f.name.endswith("_data"))
    values = list(getattr(tensor, field.name))
    if field.name in ("float_data", "double_data"):
        size = "<f4" if field.name == "float_data" else "<f8"
        encoded = [np.asarray(v, size).tobytes() for v in values]
        alone = [varint(field.number << 3 | (5 if size == "<f4" else 1)) + e for e in encoded]
    else:
        encoded = [varint(v % (1 << 64)) for v in values]
        alone = [varint(field.number << 3) + e for e in encoded]
    whole = tagged(field.number, b"".join(encoded))
    assert whole in raw
    if shape == "single":
        return raw.replace(whole, b"".join(alone))
    chunks = [b"".join(encoded[i : i + 3]) for i in range(0, len(encoded), 3)]
    return raw.replace(whole, b"".join(tagged(field.number, chunk) for chunk in chunks))


def file_with(tensor: bytes) -> bytes:
    """A model around one serialised initializer `w`, the weight of a MatMul."""
    model = model_of([node("MatMul", ["x", "w"])], {}, {"x": None})
    graph = model.graph.SerializeToString() + tagged(5, tensor)
    model.ClearField("graph")
    return model.SerializeToString() + tagged(7, graph)


ENCODINGS = ["raw", "packed", "chunks", "single"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED.keys())
def test_case73_values_are_those_of_the_package(dtype: Any, encoding: str, tmp_path: Path) -> None:
    array = samples(dtype, 8, 5)
    if encoding == "raw":
        tensor = numpy_helper.from_array(array, "w").SerializeToString()
    else:
        tensor = typed(array).SerializeToString() if encoding == "packed" else hand_made(typed(array), encoding)
    path = saved(file_with(tensor), tmp_path / "m.onnx")
    theirs = numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    with open_weights(path) as weights:
        ours = weights.tensors["w"]
        assert ours.shape == array.shape
        if encoding == "single" and np.dtype(dtype) not in (np.float32, np.float64, np.complex64, np.complex128):
            assert ours.dtype == f"{np.dtype(dtype).name} in single fields"
            return
        assert ours.dtype == np.dtype(dtype).name
        assert bytes_of(weights, ours) == theirs.tobytes() == array.tobytes()
        for start, stop in ((1, ours.nbytes - 1), (3, 4), (ours.nbytes, ours.nbytes)):
            part = bytearray(stop - start)
            weights.read(ours, start, memoryview(part))
            assert bytes(part) == array.tobytes()[start:stop]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", [name for name in STORED if "float" in name])
def test_case73_every_encoding_of_floats_is_pruned_where_it_lies(name: str, encoding: str, tmp_path: Path) -> None:
    array = samples(STORED[name], 8, 5)
    if encoding == "raw":
        tensor = numpy_helper.from_array(array, "w").SerializeToString()
    else:
        tensor = typed(array).SerializeToString() if encoding == "packed" else hand_made(typed(array), encoding)
    source = saved(file_with(tensor), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    if encoding == "single" and name not in ("float32", "float64"):
        with pytest.raises(SpecError, match="in single fields cannot be pruned"):
            prune_file(source, out, TWO_OF_FOUR)
        return
    prune_file(source, out, TWO_OF_FOUR)
    assert out.stat().st_size == source.stat().st_size
    after = numpy_helper.to_array(onnx.load(out).graph.initializer[0])
    assert after.tobytes() == pruned(array, 0).tobytes()
    assert verdict(out) == verdict(source)


def test_long_values_in_varints_are_read_and_written_in_pieces(tmp_path: Path) -> None:
    array = samples(np.float16, 400, 500)
    source = saved(file_with(typed(array).SerializeToString()), tmp_path / "in.onnx")
    prune_file(source, tmp_path / "out.onnx", TWO_OF_FOUR)
    after = onnx.load(tmp_path / "out.onnx").graph.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(after), pruned(array, 0))
    with open_weights(source) as weights:
        part = bytearray(300_001)
        weights.read(weights.tensors["w"], 77_777, memoryview(part))
    assert bytes(part) == array.tobytes()[77_777 : 77_777 + len(part)]


def test_a_value_that_needs_more_room_than_the_old_one_is_refused(tmp_path: Path) -> None:
    source = saved(file_with(typed(np.zeros((4, 4), np.float16)).SerializeToString()), tmp_path / "in.onnx")
    with open_weights(source) as weights:
        tensor, place = weights.tensors["w"], weights.target(tmp_path / "out.onnx", force=False)
        with pytest.raises(FormatError, match="more bytes"), weights.successor(place) as writer:
            writer.write(tensor, memoryview(np.ones(16, np.float16)))
        with pytest.raises(FormatError, match="whole elements"), weights.successor(place) as writer:
            writer.write(tensor, memoryview(bytes(3)))
    assert os.listdir(tmp_path) == ["in.onnx"]


def test_strings_and_unknown_types_are_listed_and_left_alone(tmp_path: Path) -> None:
    text = helper.make_tensor("s", TensorProto.STRING, [2], [b"a", b"b"])
    odd = numpy_helper.from_array(weight(2, 2), "odd")
    odd.data_type = 99
    part = numpy_helper.from_array(weight(2, 2), "part")
    part.segment.begin, part.segment.end = 0, 2
    small = helper.make_tensor("i4", TensorProto.INT4, [3], [1, 2, 3])
    arrays = [text, odd, part, small, numpy_helper.from_array(weight(8, 4), "w")]
    source = saved(model_of([node("MatMul", ["x", "w"])], arrays, {"x": None}), tmp_path / "in.onnx")
    with open_weights(source) as weights:
        kinds = {name: (tensor.dtype, tensor.is_opaque) for name, tensor in weights.tensors.items()}
    assert kinds == {
        "s": ("string", True),
        "odd": ("data type 99", True),
        "part": ("float32 segment", True),
        "i4": ("int4", True),
        "w": ("float32", False),
    }
    prune_file(source, tmp_path / "out.onnx", TWO_OF_FOUR)
    changed = [a != b for a, b in zip(source.read_bytes(), (tmp_path / "out.onnx").read_bytes(), strict=True)]
    where = source.read_bytes().find(arrays[4].raw_data)
    assert not any(changed[:where])
    assert not any(changed[where + 128 :])


# --- what is not weights stays as it is -----------------------------------------------------------


def everything(w: np.ndarray) -> onnx.ModelProto:
    """Unknown operators, a custom domain, functions, metadata, a new operator set, sparse tensors, odd fields."""
    function = helper.make_function(
        "my.ops",
        "Twice",
        ["a"],
        ["b"],
        [constant("two", np.float32(2).reshape(1)), node("Mul", ["a", "two"], "b")],
        [helper.make_opsetid("", 21)],
    )
    nodes = [
        node("Twice", ["x"], "h", domain="my.ops"),
        node("Nonsense", ["h", "w"], "n", domain="other.ops", value=weight(2).tolist()),
        node("MatMul", ["h", "v"], doc_string="a product"),
    ]
    opsets = [helper.make_opsetid("", 30), helper.make_opsetid("my.ops", 1), helper.make_opsetid("other.ops", 7)]
    model = model_of(
        nodes, {"w": weight(8, 8), "v": w}, {"x": [3, 8]}, {"y": [3, 4]}, functions=[function], opsets=opsets
    )
    model.graph.sparse_initializer.add().values.CopyFrom(numpy_helper.from_array(weight(2), "sparse"))
    model.graph.sparse_initializer[0].indices.CopyFrom(numpy_helper.from_array(np.arange(2), "i"))
    model.graph.sparse_initializer[0].dims.append(9)
    model.metadata_props.add(key="k", value="v")
    model.training_info.add().algorithm.name = "training"
    return model


def test_case74_everything_else_stays_and_so_does_the_verdict(tmp_path: Path) -> None:
    w = weight(8, 4)
    unknown = tagged(2000, b"of a later version")
    source = saved(everything(w).SerializeToString() + unknown, tmp_path / "in.onnx")
    prune_file(source, tmp_path / "out.onnx", TWO_OF_FOUR)
    before, after = source.read_bytes(), (tmp_path / "out.onnx").read_bytes()
    assert after == before.replace(w.tobytes(), pruned(w, 0).tobytes())
    assert after != before
    assert verdict(source) == verdict(tmp_path / "out.onnx")


def test_case65_pruning_nothing_gives_the_same_file(tmp_path: Path) -> None:
    source = saved(everything(weight(8, 4)), tmp_path / "in.onnx")
    prune_file(source, tmp_path / "out.onnx", Recipe.shorthand(Pattern.parse("4:4")))
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


def test_the_writer_wants_every_tensor_once_and_in_order(tmp_path: Path) -> None:
    source = saved(everything(weight(8, 4)), tmp_path / "in.onnx")
    with open_weights(source) as weights:
        place = weights.target(tmp_path / "out.onnx", force=False)
        first, second = weights.tensors.values()
        with pytest.raises(FormatError, match="out of order"), weights.successor(place) as writer:
            writer.copy(second)
        with pytest.raises(FormatError, match="1 of 2"), weights.successor(place) as writer:
            writer.copy(first)
        with pytest.raises(FormatError, match="out of order"), weights.successor(place) as writer:
            writer.write(first, memoryview(bytes(first.nbytes + 1)))
        assert os.listdir(tmp_path) == ["in.onnx"]
        with weights.successor(place) as writer:
            writer.write(first, memoryview(bytes(7)))
            writer.write(first, memoryview(bytes(first.nbytes - 7)))
            writer.copy(second)
        for start, count in ((-1, 4), (0, first.nbytes + 1)):
            with pytest.raises(FormatError, match="it has 256"):
                weights.read(first, start, memoryview(bytearray(count)))


# --- damaged files ------------------------------------------------------------------------------


GRAPH = 7
INITIALIZER = 5
RAW = tagged(1, 2) + tagged(2, 1) + tagged(8, b"w") + tagged(9, bytes(8))


def model_with(tensor: bytes) -> bytes:
    return tagged(GRAPH, tagged(INITIALIZER, tensor))


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = tagged(1, tagged(4, b"If") + tagged(5, tagged(1, b"then_branch") + tagged(6, graph)))
    return tagged(GRAPH, graph)


BAD = {
    "case74-empty": (b"", "0 bytes"),
    "case74-no graph": (tagged(1, 8), "without a graph"),
    "case74-text": (b"this is a text, and not a model", "byte"),
    "case74-group": (varint(30 << 3 | 3) + varint(30 << 3 | 4), "wire type 3"),
    "case74-wire type 7": (varint(30 << 3 | 7), "wire type 7"),
    "case74-field 0": (varint(2) + b"\0", "tag"),
    "case74-huge tag": (b"\xff" * 9 + b"\x01", "tag"),
    "case74-length beyond the file": (varint(GRAPH << 3 | 2) + varint(1 << 62), "ends at byte"),
    "case74-length beyond the message": (tagged(GRAPH, varint(INITIALIZER << 3 | 2) + varint(9) + b"1"), "its message"),
    "case74-number of 11 bytes": (b"\x08" + b"\x80" * 10 + b"\x01", "does not end"),
    "case74-number of 70 bits": (b"\x08" + b"\xff" * 9 + b"\x7f", "does not end"),
    "case74-number that is cut": (tagged(GRAPH, b"") + b"\x08\x80", "does not end"),
    "case74-graph twice": (tagged(GRAPH, b"") * 2, "stands twice"),
    "case74-graph is a number": (tagged(GRAPH, 1), "wire type 0"),
    "case74-depth": (nested(2000), "inside one another"),
    "case74-name twice": (model_with(RAW + tagged(8, b"v")), "stands twice"),
    "case74-name of bad UTF-8": (model_with(RAW.replace(b"w", b"\xff")), "UTF-8"),
    "case74-two values of one name": (tagged(GRAPH, tagged(INITIALIZER, RAW) * 2), "'w' to two values"),
    "case59-size": (model_with(RAW + tagged(1, 3)), "takes 24 bytes, not 8"),
    "case59-negative": (model_with(RAW + tagged(1, (1 << 64) - 1)), "negative or larger"),
    "case59-overflow": (model_with(RAW + tagged(1, 1 << 62)), "negative or larger"),
    "case59-overflow times 0": (model_with(RAW + tagged(1, 0) + tagged(1, 1 << 62)), "negative or larger"),
    "case59-rank": (model_with(RAW + tagged(1, 1) * 64), "more than 64 axes"),
    "data type": (model_with(RAW.replace(tagged(2, 1), tagged(2, 1 << 31))), "data type"),
    "data location": (model_with(RAW + tagged(14, 2)), "data location 2"),
    "raw and typed": (model_with(RAW + tagged(4, bytes(8))), "in the fields"),
    "wrong field": (model_with(RAW.replace(tagged(9, bytes(8)), tagged(7, bytes(2)))), "in the fields"),
    "float and a half": (model_with(RAW.replace(tagged(9, bytes(8)), tagged(4, bytes(6)))), "no whole numbers"),
    "no values": (model_with(RAW.replace(tagged(9, bytes(8)), b"")), "takes 8 bytes, not 0"),
    "packed numbers that are cut": (
        model_with(tagged(1, 1) + tagged(2, 10) + tagged(5, b"\x80")),
        "do not end with one",
    ),
    "packed number of 11 bytes": (
        model_with(tagged(1, 1) + tagged(2, 10) + tagged(5, b"\x80" * 10 + b"\x01")),
        "more than 10",
    ),
    "attribute type": (
        tagged(GRAPH, tagged(1, tagged(5, tagged(1, b"value") + tagged(20, 99)))),
        "an attribute of type 99",
    ),
    "attribute twice": (
        tagged(GRAPH, tagged(1, tagged(5, tagged(1, b"axis") + tagged(3, 1)) * 2)),
        "'axis' stands twice",
    ),
    "here and outside": (model_with(RAW + tagged(14, 1)), "and in another file"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_with_one_error(content: bytes, message: str, tmp_path: Path) -> None:
    path = saved(content, tmp_path / "m.onnx")
    with within(0.5), pytest.raises(FormatError, match=r"m\.onnx") as caught:
        open_weights(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_graphs_inside_one_another_are_read_to_the_depth_that_the_package_reads(tmp_path: Path) -> None:
    with open_weights(saved(nested(31), tmp_path / "m.onnx")) as weights:
        assert not weights.tensors
    with pytest.raises(FormatError):
        open_weights(saved(nested(32), tmp_path / "m.onnx"))
    onnx.load(saved(nested(31), tmp_path / "m.onnx"), load_external_data=False)
    with pytest.raises(DecodeError):
        onnx.load(saved(nested(40), tmp_path / "m.onnx"), load_external_data=False)


def test_case74_every_cut_of_a_file_is_refused_or_read_as_the_package_reads_it(tmp_path: Path) -> None:
    content = everything(weight(2, 2)).SerializeToString()
    path, taken = tmp_path / "m.onnx", 0
    for cut in range(len(content)):
        ours = seen_here(saved(content[:cut], path))
        if ours is not None:
            taken += 1
            assert ours == seen_by_the_package(path)
    assert 0 < taken < 20  # between the fields behind the graph


def their_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    def of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        for each in graph.node:
            for attribute in each.attribute:
                is_value = each.op_type == "Constant" and each.domain in ("", "ai.onnx") and attribute.name == "value"
                if is_value and attribute.HasField("t") and attribute.type in (0, 4):
                    yield attribute.t
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from of(inner)

    yield from of(model.graph)


Seen = list[tuple[list[int], int, bytes]]
"""Shape, data type and bytes of every tensor whose numbers can be read."""


def seen_here(path: Path) -> Seen | None:
    """What npscope sees in a file, None when it refuses the file."""
    try:
        weights = open_weights(path)
    except FormatError:
        return None
    with weights:
        return sorted(
            (list(t.shape), helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[t.dtype])), bytes_of(weights, t))
            for t in weights.tensors.values()
            if not t.is_opaque
        )


def seen_by_the_package(path: Path) -> Seen | None:
    """The same of the onnx package."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return None
    return sorted((list(t.dims), t.data_type, values_of(t)) for t in their_tensors(model) if is_readable(t))


DTYPES: dict[str, Any] = STORED | {"int16": np.int16, "uint16": np.uint16}


def values_of(tensor: onnx.TensorProto) -> bytes:
    array: np.ndarray = numpy_helper.to_array(tensor)
    return array.tobytes()


def is_readable(tensor: onnx.TensorProto) -> bool:
    known = {helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in DTYPES.values()}
    return tensor.data_type in known and not tensor.HasField("segment")


def small_model() -> bytes:
    info = helper.make_tensor_value_info("h", FLOAT, None)
    body = helper.make_graph([constant("c", np.ones((2, 1), np.int8)), node("Identity", ["c"], "h")], "b", [], [info])
    nodes = [node("If", ["x"], "h", "if", then_branch=body), node("MatMul", ["h", "w"])]
    arrays = [typed(np.asarray([[1.5, 2.0]], np.float16)), numpy_helper.from_array(np.ones(2, np.float32), "v")]
    return model_of(nodes, arrays, {"x": None}).SerializeToString()


SMALL = small_model()


@given(st.data())
def test_case74_damaged_bytes_are_refused_or_read_as_the_package_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path = saved(bytes(content), tmp_path_factory.mktemp("fuzz") / "m.onnx")
    ours = seen_here(path)
    if ours is not None:
        theirs = seen_by_the_package(path)
        # What npscope does not read, such as types of inputs, it hands on as it is, damaged or not.
        assert theirs is None or ours == theirs


def test_case74_every_byte_changed_is_refused_or_read_as_the_package_reads_it(tmp_path: Path) -> None:
    path = saved(SMALL, tmp_path / "m.onnx")
    whole, refused = seen_here(path), 0
    for at in range(len(SMALL)):
        for change in (0x01, 0x80, 0xFF):
            content = bytearray(SMALL)
            content[at] ^= change
            ours = seen_here(saved(bytes(content), path))
            if ours is None:
                refused += 1
                continue
            theirs = seen_by_the_package(path)
            # Damage in what npscope does not read, such as types of inputs, is handed on.
            assert ours == (whole if theirs is None else theirs)
    assert len(SMALL) < refused < 3 * len(SMALL)


# --- external data ------------------------------------------------------------------------------


def outside(array: np.ndarray, name: str, **entries: object) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def external(folder: Path, location: str = "data/w.bin", **more: object) -> tuple[Path, np.ndarray]:
    """A model of one MatMul whose weight lies at byte 16 of a file, and that weight."""
    w = weight(8, 4)
    path = folder / location
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"sixteen bytes!!!" + w.tobytes() + b"the end")
    entries = {"location": location, "offset": 16, "length": w.nbytes} | more
    model = model_of([node("MatMul", ["x", "w"])], [outside(w, "w", **entries)], {"x": [3, 8]}, {"y": [3, 4]})
    return saved(model, folder / "in.onnx"), w


def test_case72_external_data_is_pruned_beside_the_output(tmp_path: Path) -> None:
    source, w = external(tmp_path / "a")
    (tmp_path / "b").mkdir()
    out = tmp_path / "b" / "out.onnx"
    prune_file(source, out, TWO_OF_FOUR)
    assert out.read_bytes() == source.read_bytes()
    data = tmp_path / "b" / "data" / "w.bin"
    assert data.read_bytes() == b"sixteen bytes!!!" + pruned(w, 0).tobytes() + b"the end"
    assert sorted(p.name for p in (tmp_path / "b").rglob("*")) == ["data", "out.onnx", "w.bin"]
    x = weight(3, 8)
    np.testing.assert_allclose(computed(out, {"x": x})[0], x @ pruned(w, 0), rtol=1e-5)
    assert verdict(out) == verdict(source) == "good"


def test_several_files_and_the_model_take_tensors_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """As `onnx.save` writes them, one file a tensor or one for all, beside tensors in the model."""
    arrays = {f"w{i}": weight(8, 8) for i in range(4)}
    nodes = [node("MatMul", [f"h{i}", f"w{i}"], f"h{i + 1}") for i in range(4)]
    for together in (True, False):
        folder = tmp_path / str(together)
        (folder / "out").mkdir(parents=True)
        model = model_of(nodes, dict(reversed(arrays.items())), {"h0": [3, 8]}, {"h4": [3, 8]})
        held = model.graph.initializer[2]
        onnx.save(
            model,
            folder / "in.onnx",
            save_as_external_data=True,
            all_tensors_to_one_file=together,
            location="all.bin" if together else None,
            size_threshold=0,
        )
        model = onnx.load(folder / "in.onnx", load_external_data=False)
        model.graph.initializer[2].CopyFrom(numpy_helper.from_array(arrays[held.name], held.name))
        saved(model, folder / "in.onnx")
        with open_weights(folder / "in.onnx") as weights:
            assert list(weights.tensors) == [held.name, *(name for name in reversed(arrays) if name != held.name)]
        prune_file(folder / "in.onnx", folder / "out" / "m.onnx", TWO_OF_FOUR)
        for each in onnx.load(folder / "out" / "m.onnx").graph.initializer:
            np.testing.assert_array_equal(numpy_helper.to_array(each), pruned(arrays[each.name], 0))


def test_without_offset_and_length_the_whole_file_is_the_tensor(tmp_path: Path) -> None:
    w = weight(8, 4)
    (tmp_path / "w.bin").write_bytes(w.tobytes())
    tensor = outside(w, "w", location="./w.bin", checksum="whatever")
    source = saved(model_of([node("MatMul", ["x", "w"])], [tensor], {"x": None}), tmp_path / "m.onnx")
    with open_weights(source) as weights:
        assert bytes_of(weights, weights.tensors["w"]) == w.tobytes()


CASE72 = {
    "parent": ({"location": "../w.bin"}, FormatError, "leads out"),
    "parent inside": ({"location": "data/../data/w.bin"}, FormatError, "leads out"),
    "absolute": ({"location": "/etc/passwd"}, FormatError, "absolute"),
    "empty": ({"location": ""}, FormatError, "names no file"),
    "no location": ({"location": None}, FormatError, "names no file"),
    "NUL": ({"location": "data/w.bin\0.txt"}, FormatError, "names no file"),
    "folder": ({"location": "data"}, FormatError, "not a regular file"),
    "slash at the end": ({"location": "data/w.bin/"}, FormatError, "names no file"),
    "dot": ({"location": "."}, FormatError, "names no file"),
    "below a file": ({"location": "data/w.bin/x"}, FormatError, "no folder"),
    "long": ({"location": "x" * 5000}, FormatError, "external data"),
    "missing": ({"location": "data/v.bin"}, FileError, "no such file"),
    "negative offset": ({"offset": -1}, FormatError, "whole number"),
    "offset that is no number": ({"offset": "1e3"}, FormatError, "whole number"),
    "offset past the end": ({"offset": 1000}, FormatError, "the file has 151 bytes"),
    "huge offset": ({"offset": 10**18}, FormatError, "the file has 151 bytes"),
    "5000 digits": ({"offset": "9" * 5000}, FormatError, "whole number"),
    "negative length": ({"length": -128}, FormatError, "whole number"),
    "length past the end": ({"offset": 100}, FormatError, "the file has 151 bytes"),
    "huge length": ({"length": 2**62}, FormatError, "the file has 151 bytes"),
    "other length": ({"length": 127}, FormatError, "its shape takes 128"),
    "no length": ({"length": None}, FormatError, "of 135 bytes; its shape takes 128"),
    "symlink": ({"location": "link"}, FormatError, "symbolic link"),
    "symlink on the way": ({"location": "folder/w.bin"}, FormatError, "symbolic link"),
    "hard link": ({"location": "hard"}, FormatError, "2 names"),
    "FIFO": ({"location": "fifo"}, FormatError, "not a regular file"),
}


@pytest.mark.parametrize(("entries", "kind", "message"), CASE72.values(), ids=CASE72.keys())
def test_case72_unsafe_external_data_is_refused(
    entries: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    source, w = external(folder)
    (folder / "link").symlink_to("data/w.bin")
    (folder / "folder").symlink_to("data")
    os.mkfifo(folder / "fifo")
    (tmp_path / "w.bin").write_bytes((folder / "data" / "w.bin").read_bytes())
    if entries.get("location") == "hard":
        os.link(folder / "data" / "w.bin", folder / "hard")
    given = {"location": "data/w.bin", "offset": 16, "length": w.nbytes} | entries
    tensor = outside(w, "w", **{key: value for key, value in given.items() if value is not None})
    saved(model_of([node("MatMul", ["x", "w"])], [tensor], {"x": None}), source)
    with pytest.raises(kind, match=r"in\.onnx") as caught:
        open_weights(source)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_case72_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    source, w = external(tmp_path)
    tensor = outside(w, "w", location="data/w.bin", offset=16, length=w.nbytes)
    tensor.external_data.add(key="offset", value="0")
    with pytest.raises(FormatError, match="'offset' twice"):
        open_weights(saved(model_of([], [tensor]), source))


def test_tensors_that_share_bytes_are_no_weights(tmp_path: Path) -> None:
    source, w = external(tmp_path)
    arrays = [outside(w, name, location="data/w.bin", offset=16, length=w.nbytes) for name in ("a", "b")]
    (tmp_path / "out").mkdir()
    inside = outside(weight(2, 4), "c", location="data/w.bin", offset=32, length=32)
    last = outside(weight(1), "d", location="data/w.bin", offset=144, length=4)
    nodes = [node("MatMul", ["x", name], f"y{name}") for name in "abc"]
    saved(
        model_of(
            [*nodes, node("MatMul", ["x", "v"])], [*arrays, inside, last, numpy_helper.from_array(w, "v")], {"x": None}
        ),
        source,
    )
    with open_weights(source) as weights:
        reasons = {name: tensor.use.reason for name, tensor in weights.tensors.items() if tensor.use}
    assert [reasons[name] for name in "abc"] == [f"its bytes are those of '{other}' too" for other in "baa"]
    assert reasons["d"] == "no node uses it"
    prune_file(source, tmp_path / "out" / "m.onnx", TWO_OF_FOUR)
    assert (tmp_path / "out" / "data" / "w.bin").read_bytes() == (tmp_path / "data" / "w.bin").read_bytes()


def test_case72_the_output_never_replaces_data_of_the_input(tmp_path: Path) -> None:
    source, _ = external(tmp_path, "w.bin")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for force in (False, True):
        with pytest.raises(SpecError, match="belongs to the input; choose an output in another folder"):
            prune_file(source, tmp_path / "out.onnx", TWO_OF_FOUR, force=force)
        with pytest.raises(SpecError, match="is the input"):
            prune_file(source, source, TWO_OF_FOUR, force=force)
    with Onnx(source) as weights, pytest.raises(SpecError, match="cannot be replaced in place"):
        weights.own_place()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with Onnx(saved(everything(weight(4, 4)), tmp_path / "all.onnx")) as weights:
        assert weights.own_place().path == str(tmp_path / "all.onnx")
        assert weights.own_place().replace


@pytest.mark.parametrize("what", ["file", "symlink", "folder", "symlink on the way"])
def test_case72_what_lies_where_data_goes_is_not_written_through(what: str, tmp_path: Path) -> None:
    source, _ = external(tmp_path / "a")
    out, victim = tmp_path / "b", tmp_path / "victim"
    out.mkdir()
    victim.mkdir()
    (victim / "w.bin").write_bytes(b"precious")
    if what == "symlink on the way":
        (out / "data").symlink_to(victim)
    else:
        (out / "data").mkdir()
        place = out / "data" / "w.bin"
        if what == "file":
            place.write_bytes(b"precious")
        elif what == "folder":
            place.mkdir()
        else:
            place.symlink_to(victim / "w.bin")
    before = sorted(tmp_path.rglob("*"))
    for force in (False, True) if what != "file" else (False,):
        with pytest.raises(SpecError, match=r"w\.bin"):
            prune_file(source, out / "m.onnx", TWO_OF_FOUR, force=force)
    assert (victim / "w.bin").read_bytes() == b"precious"
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces_model_and_data_together(tmp_path: Path) -> None:
    source, _ = external(tmp_path / "a")
    (tmp_path / "b").mkdir()
    out, data = tmp_path / "b" / "m.onnx", tmp_path / "b" / "data" / "w.bin"
    prune_file(source, out, TWO_OF_FOUR)
    data.chmod(0o640)
    prune_file(source, out, Recipe.shorthand(Pattern.parse("1:4")), force=True)
    assert np.count_nonzero(np.frombuffer(data.read_bytes()[16:144], np.float32)) == 8
    assert data.stat().st_mode & 0o777 == 0o640
    assert len(list((tmp_path / "b").rglob("*"))) == 3
    source, _ = external(tmp_path / "c", "m.data")
    with pytest.raises(SpecError, match="the output itself"):
        prune_file(source, tmp_path / "b" / "m.data", TWO_OF_FOUR)


@pytest.mark.parametrize("forced", [False, True])
def test_case85_a_run_that_fails_at_any_call_leaves_no_plausible_output(
    forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Nth write, sync, link or rename fails, for every N: the old output, the new one, or no model at all."""
    source, _ = external(tmp_path / "a")
    model = onnx.load(source, load_external_data=False)
    model.graph.node.append(node("MatMul", ["y", "v"], "z"))
    model.graph.initializer.append(numpy_helper.from_array(weight(4, 4), "v"))
    saved(model, source)
    (tmp_path / "whole").mkdir()
    prune_file(source, tmp_path / "whole" / "m.onnx", TWO_OF_FOUR)
    new = files_in(tmp_path / "whole")
    for n in range(1, 100):
        folder = tmp_path / f"out{n}"
        folder.mkdir()
        if forced:
            prune_file(source, folder / "m.onnx", Recipe.shorthand(Pattern.parse("1:4")))
        old = files_in(folder)
        calls = iter(range(1, 1000))
        with monkeypatch.context() as patch:
            for name in ("write", "fsync", "link", "rename", "replace"):
                patch.setattr(os, name, failing(getattr(os, name), calls, n))
            try:
                prune_file(source, folder / "m.onnx", TWO_OF_FOUR, force=forced)
            except OSError:
                after = files_in(folder)
                assert "m.onnx" not in after or after in (old, new)
                assert after.keys() <= new.keys()
                assert forced or after == new or not list(folder.iterdir())
                continue
        assert files_in(folder) == new
        assert n > 12
        return
    raise AssertionError("some call always fails")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_case82_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    source, w = external(tmp_path / "a")
    folder = tmp_path / "b" / "data"
    folder.mkdir(parents=True)
    (folder / ".w.bin.npscope-data.tmp").write_bytes(b"half")
    prune_file(source, tmp_path / "b" / "m.onnx", TWO_OF_FOUR)
    assert [path.name for path in folder.iterdir()] == ["w.bin"]
    assert pruned(w, 0).tobytes() in (folder / "w.bin").read_bytes()


def test_case93_data_of_another_run_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = external(tmp_path / "a")
    (tmp_path / "b").mkdir()
    hidden = tmp_path / "b" / "data" / ".w.bin.npscope-data.tmp"
    real = os.fsync

    def interfere(fd: int) -> None:
        """When the data waits for the model to be on disk, another run puts its own there."""
        real(fd)
        if hidden.exists() and hidden.read_bytes() != b"another's":
            (tmp_path / "other").write_bytes(b"another's")
            (tmp_path / "other").replace(hidden)

    monkeypatch.setattr(os, "fsync", interfere)
    with pytest.raises(FileError, match="was replaced while the output was written"):
        prune_file(source, tmp_path / "b" / "m.onnx", TWO_OF_FOUR)
    assert [path for path in (tmp_path / "b").rglob("*") if path.is_file()] == [hidden]


def test_case77_many_data_files_need_few_descriptors(tmp_path: Path) -> None:
    arrays = {f"w{i}": weight(8, 8) for i in range(40)}
    nodes = [node("MatMul", [f"h{i}", f"w{i}"], f"h{i + 1}") for i in range(40)]
    (tmp_path / "out").mkdir()
    onnx.save(
        model_of(nodes, arrays, {"h0": None}, {"h40": None}),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=0,
    )
    free = [os.dup(0) for _ in range(8)]  # others may be open between them
    for probe in free:
        os.close(probe)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
    try:
        prune_file(tmp_path / "in.onnx", tmp_path / "out" / "m.onnx", TWO_OF_FOUR)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for each in onnx.load(tmp_path / "out" / "m.onnx").graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(each), pruned(arrays[each.name], 0))
    assert len(list((tmp_path / "out").iterdir())) == 41


def test_data_files_are_read_ahead_while_others_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads read at once, of different files: the one ahead, and the one that copies what is not pruned."""
    arrays = {f"w{i}": weight(8, 8) for i in range(12)}
    nodes = [node("MatMul", [f"h{i}", f"w{i}"], f"h{i + 1}") for i in range(12)]
    (tmp_path / "out").mkdir()
    onnx.save(
        model_of(nodes, arrays, {"h0": None}, {"h12": None}),
        tmp_path / "in.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=0,
    )
    with (tmp_path / "w5").open("ab") as file:
        file.write(b"behind the last value")
    preadv = os.preadv

    def slow(fd: int, into: Any, offset: int) -> int:
        """Bytes come half by half, and other threads run in between."""
        time.sleep(1e-3)
        part = memoryview(into[0])
        return preadv(fd, [part[: max(1, len(part) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", slow)
    skipped = {"w1", "w2", "w6", "w9"}
    recipe = Recipe.shorthand(Pattern.parse("2:4"), exclude=sorted(skipped))
    prune_file(tmp_path / "in.onnx", tmp_path / "out" / "m.onnx", recipe)
    for name, array in arrays.items():
        expected = array if name in skipped else pruned(array, 0)
        assert (tmp_path / "out" / name).read_bytes() == expected.tobytes() + (tmp_path / name).read_bytes()[256:]


def failing(call: Callable[..., Any], calls: Iterator[int], at: int) -> Callable[..., Any]:
    def instead(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        return call(*args, **options)

    return instead


def test_case91_data_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    source, _ = external(tmp_path / "a")
    data = tmp_path / "a" / "data" / "w.bin"
    with open_weights(source) as weights:
        weights.check_unchanged()
        os.utime(data, ns=(0, 0))
        with pytest.raises(FileError, match=r"w\.bin.*changed"):
            weights.check_unchanged()
    with open_weights(source) as weights:
        os.truncate(data, 20)
        with pytest.raises(FileError, match="truncated"):
            bytes_of(weights, weights.tensors["w"])
    source, _ = external(tmp_path / "a")
    with open_weights(source) as weights:
        data.rename(tmp_path / "old")
        data.write_bytes(bytes(200))
        with pytest.raises(FileError, match=r"w\.bin.*changed"):
            bytes_of(weights, weights.tensors["w"])


# --- size ------------------------------------------------------------------------------------------


def test_case74_data_beyond_2_gib_is_read_where_it_lies(tmp_path: Path) -> None:
    w, offset = weight(8, 4), (5 << 30) + 4
    with (tmp_path / "w.bin").open("wb") as file:
        file.seek(offset)
        file.write(w.tobytes())
    tensor = outside(w, "w", location="w.bin", offset=offset, length=w.nbytes)
    huge = outside(np.empty(0, np.float16), "huge", location="w.bin", offset=0, length=5 << 30)
    huge.dims[:] = [5 << 20, 512]
    nodes = [node("MatMul", ["x", "w"])]
    with open_weights(saved(model_of(nodes, [tensor, huge], {"x": None}), tmp_path / "m.onnx")) as weights:
        assert list(weights.tensors) == ["huge", "w"]
        assert weights.tensors["huge"].nbytes == 5 << 30
        assert bytes_of(weights, weights.tensors["w"]) == w.tobytes()


@pytest.mark.slow
def test_case74_data_beyond_2_gib_is_written_where_it_lay(tmp_path: Path) -> None:
    w, offset = weight(8, 4), (2 << 30) + 4
    with (tmp_path / "w.bin").open("wb") as file:
        file.seek(offset)
        file.write(w.tobytes())
    tensor = outside(w, "w", location="w.bin", offset=offset, length=w.nbytes)
    (tmp_path / "out").mkdir()
    source = saved(model_of([node("MatMul", ["x", "w"])], [tensor], {"x": None}), tmp_path / "m.onnx")
    prune_file(source, tmp_path / "out" / "m.onnx", TWO_OF_FOUR)
    with (tmp_path / "out" / "w.bin").open("rb") as file:
        file.seek(offset - 8)
        assert file.read() == bytes(8) + pruned(w, 0).tobytes()
    (tmp_path / "out" / "w.bin").unlink()


def test_case74_a_model_beyond_2_gib_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = saved(everything(weight(4, 4)), tmp_path / "m.onnx")
    os.truncate(path, 1 << 31)
    with pytest.raises(FormatError, match="as external data"):
        open_weights(path)


def test_values_are_not_read_to_open_a_file(tmp_path: Path) -> None:
    arrays = {"w": np.zeros((4096, 2048), np.float32), "v": np.ones((2048, 8), np.float32)}
    path = saved(
        model_of([node("MatMul", ["x", "w"], "h"), node("MatMul", ["h", "v"])], arrays, {"x": None}),
        tmp_path / "m.onnx",
    )
    tracemalloc.start()
    with open_weights(path) as weights:
        used = tracemalloc.get_traced_memory()[1]
        assert len(weights.tensors) == 2
    tracemalloc.stop()
    assert used < 1 << 20


def test_case63_many_tensors_take_linear_time(tmp_path: Path) -> None:
    def opened(count: int) -> None:
        initializers = b"".join(
            tagged(INITIALIZER, RAW.replace(tagged(8, b"w"), tagged(8, b"w%d" % i))) for i in range(count)
        )
        nodes = b"".join(
            tagged(1, tagged(1, b"w%d" % i) + tagged(2, b"y%d" % i) + tagged(4, b"Relu")) for i in range(count)
        )
        path = saved(tagged(GRAPH, initializers + nodes), tmp_path / "m.onnx")
        with open_weights(path) as weights:
            assert len(weights.tensors) == count

    assert_linear(opened, 2000)


def test_case80_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    (tmp_path / "folder.onnx").mkdir()
    for name in ("fifo.onnx", "folder.onnx"):
        with pytest.raises(FormatError, match="not a regular file"):
            open_weights(tmp_path / name)


def test_opening_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    good, _ = external(tmp_path / "a")
    bad = saved(b"nothing", tmp_path / "bad.onnx")
    probe = os.dup(0)
    os.close(probe)
    with pytest.raises(FormatError):
        open_weights(bad)
    with open_weights(good) as weights:
        bytes_of(weights, weights.tensors["w"])
    after = os.dup(0)
    os.close(after)
    assert after == probe
