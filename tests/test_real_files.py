"""Real models: pruned, verified, and loaded by their own libraries.

They are no part of this repository: NPSCOPE_REAL_FILES names a folder of them (safetensors, npz, ONNX).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npscope.cli import main


def load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(path)


def load_npz(path: Path) -> dict[str, Any]:
    with np.load(path) as members:
        return dict(members)


def load_onnx(path: Path) -> dict[str, Any]:
    """The initializers, of a model that the checker accepts and that starts in onnxruntime."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {array.name: onnx.numpy_helper.to_array(array) for array in model.graph.initializer}


LOADERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".safetensors": load_safetensors,
    ".npz": load_npz,
    ".onnx": load_onnx,
}

FOLDER = os.environ.get("NPSCOPE_REAL_FILES")
FILES = sorted(path for path in Path(FOLDER).iterdir() if path.suffix in LOADERS) if FOLDER else []

pytestmark = pytest.mark.skipif(not FILES, reason="NPSCOPE_REAL_FILES names no folder of real models")


@pytest.mark.parametrize("pattern", ["2:4", "1x1@0.5", "4x4@0.5"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_real_model_is_pruned_verified_and_loaded(path: Path, pattern: str, tmp_path: Path) -> None:
    pruned = tmp_path / path.name
    named = ["--include", "*"] if "word" in path.name else []  # an embedding, which is left alone unless named
    code = main(["prune", str(path), "-o", str(pruned), "--pattern", pattern, "--quiet", *named])
    if code == 2:
        pytest.skip(f"no tensor takes {pattern}")
    assert code == 0
    assert main(["verify", str(pruned), "--pattern", pattern, "--quiet", *named]) == 0
    before, after = LOADERS[path.suffix](path), LOADERS[path.suffix](pruned)
    assert list(before) == list(after)
    for name, array in before.items():
        assert (after[name].shape, after[name].dtype) == (array.shape, array.dtype)
        changed = after[name] != array
        assert not np.any(after[name][changed & ~np.isnan(array)]), "something other than zero was written"


def nearest(vectors: Any, queries: Any) -> Any:
    """The ten most similar other rows of each query."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similar = unit[queries] @ unit.T
    similar[np.arange(len(queries)), queries] = -2
    return np.argsort(-similar, axis=1)[:, :10]


@pytest.mark.parametrize(("pattern", "low", "high"), [("2:4", 0.69, 0.73), ("1x1@0.5", 0.72, 0.76)])
def test_neighbours_of_words_survive(pattern: str, low: float, high: float, tmp_path: Path) -> None:
    found = [path for path in FILES if path.name.startswith("wordllama")]
    if not found:
        pytest.skip("no wordllama there")
    pruned = tmp_path / found[0].name
    command = ["prune", str(found[0]), "-o", str(pruned), "--pattern", pattern, "--include", "*", "--quiet"]
    assert main(command) == 0
    dense, sparse = (next(iter(load_safetensors(path).values())).astype(np.float32) for path in (found[0], pruned))
    queries = np.random.default_rng(0).choice(len(dense), 400, replace=False)
    pairs = zip(nearest(dense, queries), nearest(sparse, queries), strict=True)
    assert low <= np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) <= high
