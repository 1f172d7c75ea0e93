"""What pruning and verifying a large file of weights costs, beside copying and reading it.

python -m bench.files --gib 4
    writes bench/results/files.json, and the table of the README.

The file is a model of bfloat16 matrices of new normal data, in safetensors. Every round removes the last
output, syncs and waits, reads the inputs, then times one process from start to end, so that all contenders find the
machine alike: nothing left to be written, the input in the cache, and a processor that is awake.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import suite, tables
from bench.__main__ import RESULTS, ROOT
from bench.cold import environment_as_installed
from npscope.bench import environment
from npscope.clock import significant
from npscope.weights import Tensor
from npscope.weights.new_safetensors import create
from npscope.weights.output import Target

WIDTH = 4096
PAUSE = 4.0
"""Seconds of rest before each process: a virtual machine gives freed pages back meanwhile, as it would between runs."""

SHORT = 3
"""How often a round runs what only reads: it takes half a second, of which each tenth counts."""


@dataclass
class Contender:
    """A process and what it is measured against: seconds of all rounds."""

    name: str
    command: Sequence[object]
    floor: str = ""
    bar: float | None = None
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """One round."""
        start = time.perf_counter()
        command, environment = [str(word) for word in self.command], environment_as_installed()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
        self.seconds.append(time.perf_counter() - start)


def write_model(path: Path, gib: float) -> None:
    """A file of square bfloat16 matrices, of this size."""
    rng, shape = np.random.default_rng(), (WIDTH, WIDTH)
    count = max(1, round(gib * 2**30 / (2 * WIDTH**2)))
    tensors = [Tensor(f"layers.{i}.up_proj.weight", "bfloat16", shape, 2 * WIDTH**2) for i in range(count)]
    with create(Target.of(path, force=True), tensors, {}) as file:
        for tensor in tensors:
            numbers = rng.standard_normal(WIDTH**2, dtype=np.float32)
            file.append(tensor.name, (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).data)


def measure(folder: Path, gib: float, rounds: int) -> list[Contender]:
    """All contenders, round by round."""
    source, target, pruned = folder / "in.safetensors", folder / "out.safetensors", folder / "pruned.safetensors"
    write_model(source, gib)
    recipe = folder / "half-of-the-model.toml"
    recipe.write_text('[[rule]]\nblock = "4x4"\nbudget = 0.5\n')
    npscope = (sys.executable, "-m", "npscope")
    subprocess.run([*npscope, "prune", source, "-o", pruned, "--pattern", "2:4"], check=True, capture_output=True)
    copy = f"cp {'--reflink=never ' if sys.platform == 'linux' else ''}'{source}' '{target}' && sync"
    contenders = [
        Contender("cp and sync", ("sh", "-c", copy)),
        Contender("prune 2:4", (*npscope, "prune", source, "-o", target, "--pattern", "2:4"), "cp and sync", 1.43),
        Contender("prune half of all 4x4", (*npscope, "prune", source, "-o", target, "-r", recipe), "cp and sync", 2.5),
        Contender("prune 4x4@0.5", (*npscope, "prune", source, "-o", target, "--pattern", "4x4@0.5"), "cp and sync"),
        Contender("read", ("sh", "-c", f"cat '{pruned}' >/dev/null")),
        Contender("verify 2:4", (*npscope, "verify", pruned, "--pattern", "2:4"), "read", 1.43),
    ]
    writing, reading = contenders[:4], contenders[4:]
    for _ in range(rounds):
        for contender in writing + SHORT * reading:
            target.unlink(missing_ok=True)
            os.sync()
            time.sleep(PAUSE)
            for path in (source, pruned):
                _read(path)
            contender.run()
    return contenders


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def section(results: dict[str, Any], contenders: Sequence[Contender]) -> str:
    """The table of the README."""
    by_name = {contender.name: contender for contender in contenders}
    lines = []
    for contender in contenders:
        seconds = sorted(contender.seconds)
        floor = by_name.get(contender.floor)
        ratio = None if floor is None else median(seconds) / median(floor.seconds)
        judged = "" if ratio is None or contender.bar is None else "met" if ratio <= contender.bar else "missed"
        lines.append(
            [
                contender.name,
                f"{median(seconds):.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})",
                "" if ratio is None else f"{ratio:.2f} x {contender.floor}",
                "" if contender.bar is None else f"{contender.bar} {judged}",
            ]
        )
    machine = f"{results['machine']['cpu']}, {results['threads']} threads"
    head = (
        f"A bfloat16 model of {results['gib']} GiB, {machine}, commit {results['commit']}: seconds of a whole process, "
        f"median and range of {len(contenders[0].seconds)} runs ({SHORT * len(contenders[0].seconds)} where "
        "nothing is written). `python -m bench.files` repeats it."
    )
    return head + "\n\n" + tables.table(("process", "seconds", "ratio", "bar"), lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.files")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go: on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS / "files.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        contenders = measure(Path(folder), options.gib, options.rounds)
    results: dict[str, Any] = {**environment(), "commit": suite.commit(), "gib": options.gib}
    rows = [
        {**asdict(contender), "command": None, "seconds": [significant(s) for s in contender.seconds]}
        for contender in contenders
    ]
    options.out.write_text(json.dumps({**results, "rows": rows}, indent=1) + "\n")
    text = section(results, contenders)
    options.readme.write_text(tables.rewritten(options.readme.read_text(), text, "files"))
    print(text)


if __name__ == "__main__":
    main()
