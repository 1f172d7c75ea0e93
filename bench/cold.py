"""What a fresh process pays: imports, first calls with their compilation, and the whole command line.

``python -m bench.cold NAME`` is such a process: it prints the seconds of the first call of a case. Behind that may
stand modules that it is to miss.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.cases import OURS, TABLE, named
from npscope.bench import fresh
from npscope.clock import Row, significant, summary
from npscope.options import thread_count

ROOT = Path(__file__).parents[1]
MIB = 64
"""Of the array of a first call: enough for the kernels that smaller ones do not need, which take long to compile."""

WITHOUT_SCIPY = f"{OURS} without SciPy"

FIRST_MS = {"2:4": 1000.0}
OTHERS_MS = 1500.0
FIRST_CALLS = (
    "2:4", "8:16", "1 of 4 blocks of 1x4", "3x3 kernels, half per filter", "rows of 1024, half",
    "4x4 tiles, global half", "1x1, global half", "4x4 norms", "16x1 norms", "4x4 norms, ord 1", "4x4 norms, ord inf",
    "k-th of all", "k-th of rows of 1024", "soft 1x1", "soft 4x4", "soft 4x4, conditioned", "2:4, bfloat16",
    "2:4, ScopeSpec", "hard 4x4", "top half of rows of 1024",
)  # fmt: skip


def environment_as_installed() -> dict[str, str]:
    """The variables of a process that keeps npscope's bytecode, as an installed package has it: NumPy's lies there."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def first_call(name: str, rounds: int) -> list[Row]:
    """The first call of a case in a process that has imported npscope and made its data.

    Where SciPy is installed, Numba imports it when it first compiles, for linear algebra. So does whoever has it, and
    the bar is for that; what it takes without stands beside it.
    """
    missing: dict[str, tuple[str, ...]] = {OURS: ()}
    if importlib.util.find_spec("scipy") is not None:
        missing[WITHOUT_SCIPY] = ("scipy",)
    seconds: dict[str, list[float]] = {contender: [] for contender in missing}
    for _ in range(rounds):
        for contender, modules in missing.items():
            seconds[contender].append(_printed_by("-m", "bench.cold", name, *modules))
    bar = FIRST_MS.get(name, OTHERS_MS)
    return [
        _row(f"first call: {name}", "first call", times, contender=contender, bar=bar if contender == OURS else None)
        for contender, times in seconds.items()
    ]


def imports(rounds: int) -> list[Row]:
    """``import npscope`` against ``import numpy``."""
    seconds: dict[str, list[float]] = {"numpy": [], "npscope": []}
    for _ in range(rounds):
        for name, times in seconds.items():
            code = f"import time; s = time.perf_counter(); import {name}; print(time.perf_counter() - s)"
            times.append(_printed_by("-c", code))
    base = summary(seconds["numpy"])[0]
    row = _row("import npscope", "import", seconds["npscope"], bar=1.3, judged_by="ratio", base_ms=base)
    return [row, _row("import numpy", "import", seconds["numpy"], contender="numpy")]


def command_line(rounds: int) -> list[Row]:
    """``npscope prune`` of a file of 10 MB, from start to exit."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        _write_weights(source, matrices=10, shape=(512, 512))
        command = [sys.executable, "-m", "npscope", "prune", source, "-o", target, "--pattern", "2:4", "--force"]
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment_as_installed())
            seconds.append(time.perf_counter() - start)
    return [_row("npscope prune, 10 MB", "command line", seconds, bar=2000.0)]


def tasks(rounds: int) -> list[tuple[str, Callable[[], list[Row]]]]:
    """Names and jobs."""
    calls: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"first call: {name}", lambda name=name: first_call(name, rounds)) for name in FIRST_CALLS
    ]
    return [
        ("import npscope", lambda: imports(2 * rounds + 1)),
        *calls,
        ("npscope prune, 10 MB", lambda: command_line(rounds)),
    ]


def _row(case: str, group: str, seconds: list[float], *, contender: str = OURS, **judged: object) -> Row:
    elements = MIB * 2**18 if group == "first call" else 0
    given = {"judged_by": "ms", **judged}
    return Row(
        "cold", case, group, contender, "float32", "normal", elements, thread_count(), len(seconds),
        *summary(seconds), **given,
    )  # fmt: skip


def _printed_by(*arguments: str) -> float:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment_as_installed())
    return float(done.stdout)


def _write_weights(path: Path, matrices: int, shape: tuple[int, int]) -> None:
    data = np.random.default_rng().standard_normal((matrices, *shape), dtype=np.float32)
    size = data[0].nbytes
    header = json.dumps(
        {
            f"layers.{i}.weight": {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
            for i in range(matrices)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data.tobytes())


if __name__ == "__main__":
    asked = named(sys.argv[1])
    call = TABLE[asked.operation]["npscope"](asked, fresh(asked, MIB))
    sys.modules.update(dict.fromkeys(sys.argv[2:]))  # type: ignore[arg-type]  # None: what is not to be found
    begun = time.perf_counter()
    call()
    print(significant(time.perf_counter() - begun))
