"""Times the main operations on fresh random data, beside their floor and the NumPy idiom: ``python -m bench [MiB]``.

Compilation is left out (one call before), data are restored before every in-place timing,
and contenders take turns. Times are the median of the rounds, the spread their quartiles.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

import npscope

ROUNDS = 7


def two_of_four_by_numpy(x: np.ndarray) -> None:
    """The 2:4 mask that a good NumPy user would write (ties may keep other elements)."""
    quads = np.abs(x).reshape(-1, 4)
    dropped = np.argpartition(quads, 1, axis=1)[:, :2]
    np.put_along_axis(x.reshape(-1, 4), dropped, 0, axis=1)


CASES: dict[str, dict[str, Callable[[np.ndarray], object]]] = {
    "in place": {"floor: numpy x *= 1": lambda x: np.multiply(x, np.float32(1), out=x)},
    "2:4 in place": {
        "npscope": lambda x: npscope.keep_largest(x, 2, (1, 1), (1, 4), out=x),
        "numpy": two_of_four_by_numpy,
    },
    "4x4 norms": {
        "npscope": lambda x: npscope.block_norms(x, (4, 4)),
        "numpy": lambda x: np.sqrt(np.square(x).reshape(len(x) // 4, 4, -1, 4).sum(axis=(1, 3))),
    },
    "4x4 global half": {
        "npscope": lambda x: npscope.keep_largest(x, x.size // 32, (4, 4), (-1, -1), out=x),
    },
    "1x1 global half": {
        "npscope": lambda x: npscope.keep_largest(x, x.size // 2, (1, 1), (-1, -1), out=x),
        "numpy": lambda x: np.copyto(x, 0, where=np.abs(x) < np.partition(np.abs(x).ravel(), x.size // 2)[x.size // 2]),
    },
    "soft 4x4": {"npscope": lambda x: npscope.soft_threshold(x, 1.0, (4, 4), out=x)},
}


def main() -> None:
    """Run every case on a float32 matrix of the given number of MiB (64) and print a table as JSON."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    data = np.random.default_rng().standard_normal((mib * 256, 1024), dtype=np.float32)
    work = np.empty_like(data)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS + 1):
        for case, contenders in CASES.items():
            for name, call in contenders.items():
                np.copyto(work, data)
                start = time.perf_counter()
                call(work)
                seconds.setdefault((case, name), []).append(time.perf_counter() - start)
    rows = []
    for (case, name), times in seconds.items():
        low, median, high = statistics.quantiles(times[1:], n=4)  # the first call compiles
        rows.append(
            {"case": case, "contender": name, "ms": round(1e3 * median, 2), "iqr_ms": round(1e3 * (high - low), 2)}
        )
    machine = {"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__}
    print(json.dumps({"npscope": npscope.__version__, "mib": mib, **machine, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
