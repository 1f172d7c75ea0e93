"""The CuPy backend against the bandwidth of the card: ``python -m bench.cuda --out bench/results/cuda.json``.

Every figure is a fraction of its floor, the time that the bytes which must move take at the speeds of
plain kernels measured in the same run. Data is restored before each timing; both are queued together, so
that the card never waits for the host. Events time the device; the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

import npscope
from npscope import BlockSpec, ScopeCoupling, ScopeSpec

FLOORS = r"""
extern "C" __global__ void in_place(float4* x, long long n, float f) {
    long long step = gridDim.x * (long long)blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        float4 v = x[i];
        v.x *= f; v.y *= f; v.z *= f; v.w *= f;
        x[i] = v;
    }
}
extern "C" __global__ void read(const float4* x, long long n, float* out) {
    float sum = 0;
    long long step = gridDim.x * (long long)blockDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += step) {
        float4 v = x[i];
        sum += v.x + v.y + v.z + v.w;
    }
    if (sum == 1e30f) out[0] = sum;
}
"""


@dataclass
class Case:
    """One operation: its call on an array and a metric, and its floor in whole reads and in-place passes."""

    name: str
    call: Callable[[Any, Any], Any]
    reads: float
    passes: float
    bar: float
    dtype: str = "float32"
    data: str = "normal"
    shape: tuple[int, int] | None = None
    peers: dict[str, Callable[[Any], Any]] = field(default_factory=dict)


@dataclass
class Row:
    """One measured case."""

    name: str
    dtype: str
    data: str
    elements: int
    floor_ms: float
    median_ms: float
    least_ms: float
    fraction: float
    bar: float
    first_ms: float
    peers: dict[str, float] = field(default_factory=dict)


def prune(block: tuple[int, int], scope: tuple[int, int], share: float = 0.5) -> Callable[[Any, Any], Any]:
    def call(x: Any, h: Any) -> Any:
        grid = tuple(n // b for n, b in zip(x.shape, block, strict=True))
        blocks = int(np.prod([g if s == -1 else s for g, s in zip(grid, scope, strict=True)]))
        return npscope.keep_largest(x, int(blocks * share), block, scope, out=x)

    return call


def norms(block: tuple[int, int]) -> Callable[[Any, Any], Any]:
    return lambda x, h: npscope.block_norms(x, block)


def soft(block: tuple[int, int], conditioned: bool = False) -> Callable[[Any, Any], Any]:
    t = 0.7 * float(np.sqrt(np.prod(block)))
    return lambda x, h: npscope.soft_threshold(x, t, block, conditioner=h if conditioned else None, out=x)


# --- what a user of another library would write ----------------------------------------------------


def tiled(x: Any, block: tuple[int, int]) -> Any:
    return x.reshape(x.shape[0] // block[0], block[0], x.shape[1] // block[1], block[1])


def tensor(x: Any) -> Any:
    """A torch tensor on the memory of `x`."""
    import torch

    return torch.from_dlpack(x)


def cupy_norms(x: Any, block: tuple[int, int]) -> Any:
    import cupy

    tiles = tiled(x, block)
    return cupy.sqrt((tiles * tiles).sum(axis=(1, 3)))


def torch_norms(x: Any, block: tuple[int, int]) -> Any:
    import torch

    return torch.linalg.vector_norm(tiled(tensor(x), block), dim=(1, 3))


def norm_peers(block: tuple[int, int]) -> dict[str, Callable[[Any], Any]]:
    return {"cupy": lambda x: cupy_norms(x, block), "torch": lambda x: torch_norms(x, block)}


def row_peers(columns: int, keep: int) -> dict[str, Callable[[Any], Any]]:
    """Scopes of single elements side by side: `cupy.partition` for a threshold; topk and scatter."""

    def by_cupy(x: Any) -> None:
        import cupy

        rows = x.reshape(-1, columns)
        sizes = cupy.abs(rows)
        rows[sizes < cupy.partition(sizes, columns - keep, axis=1)[:, columns - keep, None]] = 0

    def by_torch(x: Any) -> None:
        rows = tensor(x).reshape(-1, columns)
        dropped = rows.abs().topk(columns - keep, dim=1, largest=False, sorted=False).indices
        rows.scatter_(1, dropped, 0)

    return {"cupy": by_cupy, "torch": by_torch}


def global_peers(block: tuple[int, int]) -> dict[str, Callable[[Any], Any]]:
    def by_cupy(x: Any) -> None:
        import cupy

        table = cupy_norms(x, block) if block != (1, 1) else cupy.abs(x)
        n = table.size
        kept = table >= cupy.partition(table.ravel(), n // 2)[n // 2]
        tiled(x, block)[...] *= kept[:, None, :, None]

    def by_torch(x: Any) -> None:
        table = torch_norms(x, block) if block != (1, 1) else tensor(x).abs()
        least = table.reshape(-1).topk(table.numel() // 2, sorted=False).values.min()
        tiled(tensor(x), block).masked_fill_((table < least)[:, None, :, None], 0)

    return {"cupy": by_cupy, "torch": by_torch}


def kth_peers(share: float) -> dict[str, Callable[[Any], Any]]:
    def by_cupy(x: Any) -> Any:
        import cupy

        k = int(x.size * share)
        return cupy.partition(x.ravel(), x.size - k)[x.size - k]

    return {
        "cupy": by_cupy,
        "torch": lambda x: tensor(x).reshape(-1).topk(int(x.size * share), sorted=False).values.min(),
    }


def soft_peers(block: tuple[int, int]) -> dict[str, Callable[[Any], Any]]:
    t = 0.7 * float(np.sqrt(np.prod(block)))

    def by_cupy(x: Any) -> None:
        import cupy

        if block == (1, 1):
            x[...] = cupy.sign(x) * cupy.maximum(cupy.abs(x) - cupy.float32(t), 0)
        else:
            factors = cupy.maximum(1 - cupy.float32(t) / cupy_norms(x, block), 0)
            tiled(x, block)[...] *= factors[:, None, :, None]

    def by_torch(x: Any) -> None:
        import torch

        if block == (1, 1):
            tensor(x).copy_(torch.nn.functional.softshrink(tensor(x), t))
        else:
            tiled(tensor(x), block).mul_((1 - t / torch_norms(x, block)).clamp_(min=0)[:, None, :, None])

    return {"cupy": by_cupy, "torch": by_torch}


def measured_peers(cupy: Any, case: Case, restore: Callable[[], None], view: Any) -> dict[str, float]:
    """Median milliseconds of each peer, of three calls after one; what is not installed or fails is left out."""
    found = {}
    for name, call in case.peers.items():
        try:
            restore()
            call(view)
            found[name] = statistics.median(timed(cupy, restore, partial(call, view), 3))
        except Exception as error:
            print(f"{case.name} by {name}: {type(error).__name__}: {error}"[:150], flush=True)
        if name == "cupy":
            cupy.get_default_memory_pool().free_all_blocks()
        elif "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
    return found


def cases(size: int) -> list[Case]:
    rows = (size * size // 1024, 1024)
    made = [
        Case(f"block_norms {r}x{c}", norms((r, c)), 1, 1 / (r * c), 0.85, peers=norm_peers((r, c)))
        for r, c in ((1, 4), (1, 16), (4, 4), (16, 1), (16, 16), (32, 32))
    ]
    made += [
        Case(f"{n}:{m}", prune((1, 1), (1, m), n / m), 0, 1, 0.85, peers=row_peers(m, n))
        for n, m in ((2, 4), (4, 8), (8, 16))
    ]
    made += [
        Case("rows of 1024, half", prune((1, 1), (1, -1)), 0, 1, 0.5, shape=rows, peers=row_peers(1024, 512)),
        Case("1x16 blocks, 1024 a scope, half", prune((1, 16), (1, 1024)), 0, 1, 0.6),
        Case("4x4 global half", prune((4, 4), (-1, -1)), 1, 1, 0.6, peers=global_peers((4, 4))),
        Case("16x16 global half", prune((16, 16), (-1, -1)), 1, 0.5, 0.6, peers=global_peers((16, 16))),
        Case("1x1 global half", prune((1, 1), (-1, -1)), 3, 1, 1, peers=global_peers((1, 1))),
        Case(
            "kth_largest, k half", lambda x, h: npscope.kth_largest(x, x.size // 2, None), 3, 0, 1, peers=kth_peers(0.5)
        ),
        Case(
            "kth_largest, k 1 %",
            lambda x, h: npscope.kth_largest(x, x.size // 100, None),
            3,
            0,
            1,
            peers=kth_peers(0.01),
        ),
        Case("soft_threshold 1x1", soft((1, 1)), 0, 1, 0.85, peers=soft_peers((1, 1))),
        Case("soft_threshold 4x4", soft((4, 4)), 0, 1, 0.8, peers=soft_peers((4, 4))),
        Case("soft_threshold 16x16", soft((16, 16)), 0, 1, 0.8, peers=soft_peers((16, 16))),
        Case("soft_threshold 4x4 conditioned", soft((4, 4), True), 1, 1, 0.4),
        Case("soft_threshold 1x16 conditioned", soft((1, 16), True), 1, 1, 0.4),
    ]
    for dtype in ("float16", "bfloat16"):
        made += [
            Case("2:4", prune((1, 1), (1, 4)), 0, 0.5, 0.8, dtype),
            Case("block_norms 4x4", norms((4, 4)), 0.5, 1 / 16, 0.8, dtype),
            Case("block_norms 1x16", norms((1, 16)), 0.5, 1 / 16, 0.8, dtype),
        ]
    hostile = ("2:4", "rows of 1024, half", "4x4 global half", "1x1 global half", "kth_largest, k half")
    made += [
        Case(c.name, c.call, c.reads, c.passes, c.bar / 3, c.dtype, data, c.shape)
        for c in made
        if c.name in hostile and c.dtype == "float32"
        for data in ("constant", "two-valued", "sorted", "heavy-tailed")
    ]
    return made


def filled(cupy: Any, data: str, count: int) -> Any:
    random = cupy.random.default_rng(1)
    x = random.standard_normal(count, dtype=cupy.float32)
    if data == "constant":
        x[:] = 0.1
    elif data == "two-valued":
        x = cupy.where(x > 0, cupy.float32(0.25), cupy.float32(-0.5))
    elif data == "sorted":
        x = cupy.sort(x)
    elif data == "heavy-tailed":
        x = x / random.standard_normal(count, dtype=cupy.float32)
        x = x * x * x
    return x


def timed(cupy: Any, restore: Callable[[], None], call: Callable[[], Any], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        restore()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return times


def small_calls(cupy: Any) -> dict[str, float]:
    """Microseconds for a call on a 64x64 array, in a row of them; each row begins with random data."""
    random = cupy.random.default_rng(2)
    x, y, h = (random.standard_normal((64, 64), dtype=cupy.float32) for _ in range(3))
    originals = x.copy(), y.copy()
    h = cupy.abs(h) + cupy.float32(0.5)
    groups, tiles = ScopeSpec(BlockSpec(x, (1, 1)), (1, 4)), ScopeSpec(BlockSpec(x, (4, 4)), ())
    both = ScopeCoupling([tiles, ScopeSpec(BlockSpec(y, (4, 4)), ())])
    results = {}
    for name, call in {
        "2:4": lambda: npscope.keep_largest(x, 2, (1, 1), (1, 4), out=x),
        "2:4 elsewhere": lambda: npscope.keep_largest(x, 2, (1, 1), (1, 4)),
        "rows": lambda: npscope.keep_largest(x, 32, (1, 1), (1, -1), out=x),
        "1x1 global": lambda: npscope.keep_largest(x, 2048, (1, 1), (-1, -1), out=x),
        "4x4 global": lambda: npscope.keep_largest(x, 128, (4, 4), (-1, -1), out=x),
        "block_norms 4x4": lambda: npscope.block_norms(x, (4, 4)),
        "kth_largest": lambda: npscope.kth_largest(x, 32),
        "mid_kth_largest": lambda: npscope.mid_kth_largest(x, 32),
        "topk_mask": lambda: npscope.topk_mask(x, 32),
        "block_mask 4x4": lambda: npscope.block_mask(x, 128, (4, 4), ()),
        "hard_threshold 4x4": lambda: npscope.hard_threshold(x, 0.1, (4, 4), out=x),
        "soft_threshold 1x1": lambda: npscope.soft_threshold(x, 1e-5, (1, 1), out=x),
        "soft_threshold 4x4": lambda: npscope.soft_threshold(x, 1e-5, (4, 4), out=x),
        "soft_threshold 4x4 conditioned": lambda: npscope.soft_threshold(x, 1e-5, (4, 4), conditioner=h, out=x),
        "spec, hard_threshold 2:4": lambda: groups.hard_threshold(nnz=2),
        "spec, soft_threshold 4x4": lambda: tiles.soft_threshold(1e-5),
        "spec, kth_mid 4x4": lambda: tiles.kth_mid(nnz=128),
        "spec, get_masks 4x4": lambda: tiles.get_masks(128),
        "coupling, hard_threshold 4x4": lambda: both.hard_threshold(nnz=256),
        "coupling, soft_threshold 4x4": lambda: both.soft_threshold(1e-5),
        "coupling, get_masks 4x4": lambda: both.get_masks(256),
    }.items():
        call()
        rounds = []
        for _ in range(5):
            for array, original in zip((x, y), originals, strict=True):
                cupy.copyto(array, original)
            cupy.cuda.Device().synchronize()
            begin = time.perf_counter()
            for _ in range(200):
                call()
            cupy.cuda.Device().synchronize()
            rounds.append((time.perf_counter() - begin) / 200 * 1e6)
        results[name] = round(statistics.median(rounds), 1)
    return results


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    import cupy

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=16384, help="rows and columns of the matrix")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", default="")
    parser.add_argument("--commit", default="", help="of the code, where there is no repository to ask")
    args = parser.parse_args()
    count, rounds = args.size * args.size, args.rounds
    floors = cupy.RawModule(code=FLOORS)
    x, h = (
        cupy.empty(count, cupy.float32),
        cupy.random.default_rng(3).random(count, dtype=cupy.float32) + cupy.float32(0.5),
    )
    sink = cupy.empty(1, cupy.float32)
    original = filled(cupy, "normal", count)
    n, grid = np.int64(count // 4), (132 * 16,)

    def floor(name: str, last: Any) -> float:
        kernel = floors.get_function(name)
        return min(
            statistics.median(
                timed(cupy, lambda: cupy.copyto(x, original), lambda g=g: kernel((g,), (256,), (x, n, last)), rounds)
            )
            for g in (grid[0], count // 1024)
        )

    in_place, read = floor("in_place", np.float32(1.0)), floor("read", sink)
    print(f"in place {in_place:.3f} ms, read {read:.3f} ms", flush=True)
    table, data, dtype = [], "normal", "float32"
    for case in cases(args.size):
        try:
            if (case.data, case.dtype) != (data, dtype):
                data, dtype = case.data, case.dtype
                original = filled(cupy, data, count)
                if dtype != "float32":
                    import ml_dtypes

                    original = original.astype(getattr(ml_dtypes, dtype, dtype))
                x = cupy.empty(count, original.dtype)
            view = x.reshape(case.shape or (args.size, args.size))
            metric = h.reshape(view.shape)
            begin = time.perf_counter()
            cupy.copyto(x, original)
            case.call(view, metric)
            cupy.cuda.Device().synchronize()
            first = (time.perf_counter() - begin) * 1e3
            times = timed(cupy, partial(cupy.copyto, x, original), partial(case.call, view, metric), rounds)
        except Exception as error:
            print(f"{case.name} {case.dtype} {case.data}: {type(error).__name__}: {error}"[:200], flush=True)
            continue
        lowest = case.reads * read + case.passes * in_place
        middle = statistics.median(times)
        row = Row(case.name, case.dtype, case.data, count, lowest, middle, min(times), lowest / middle, case.bar, first)
        if case.data == "normal":
            row.peers = measured_peers(cupy, case, partial(cupy.copyto, x, original), view)
        table.append(row)
        verdict = "ok" if row.fraction >= row.bar else "MISSED"
        print(
            f"{row.name:34s} {row.dtype:9s} {row.data:13s} {middle:9.3f} ms  floor {lowest:6.3f}  "
            f"{row.fraction:6.3f} of it, bar {row.bar:.2f} {verdict}  first {first:.0f} ms"
            + "".join(f"  {name} {ms:.2f}" for name, ms in row.peers.items()),
            flush=True,
        )
    small = small_calls(cupy)
    print("64x64, us a call:", small)
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    commit = args.commit or _commit()
    report = {
        "device": properties["name"].decode(),
        "cupy": cupy.__version__,
        "numpy": np.__version__,
        "npscope": npscope.__version__,
        "torch": sys.modules["torch"].__version__ if "torch" in sys.modules else None,
        "commit": commit,
        "in_place_ms": in_place,
        "read_ms": read,
        "rows": [asdict(row) for row in table],
        "small_calls_us": small,
    }
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
