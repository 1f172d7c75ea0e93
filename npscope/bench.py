"""How fast every operation is on this machine: its backends and the NumPy idiom, beside the floor.

``npscope bench`` prints a quick look. The full benchmark of a checkout (``bench/``) adds cases and
peers to the same table, and the tests run every entry of the table against the reference.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from npscope.axes import array_namespace
from npscope.clock import Call, Floor, Row, Timed, machine, significant, summary, take_turns
from npscope.dtypes import kind_of
from npscope.errors import KindError
from npscope.namespace import block_norms, keep_largest, kth_largest, namespace, soft_threshold
from npscope.options import thread_count

_ROWS = 32  # rows come in multiples of this, which the blocks of all cases divide


@dataclass(frozen=True)
class Case:
    """One operation on one kind of array, and the passes over that array which are its floor.

    `keep` None is half of the blocks of each scope. `reads` and `passes` count read passes and
    in-place passes over the array, `bar` is the least share of the floor's speed that will do.
    `row` is the shape of what lies along the first axis; `mib` overrides the size of the run.
    """

    name: str
    group: str
    operation: str
    block: tuple[int, ...] = (1, 1)
    scope: tuple[int, ...] = (-1, -1)
    keep: int | None = None
    ord: float = 2
    reads: float = 0
    passes: float = 0
    bar: float | None = None
    dtype: str = "float32"
    row: tuple[int, ...] = (1024,)
    data: str = "normal"
    transposed: bool = False
    mib: float | None = None

    def shape(self, mib: float) -> tuple[int, ...]:
        """Rows for `mib` MiB of float32; wider dtypes get no more bytes, narrower ones no more elements."""
        elements = (self.mib or mib) * 2**20 / max(4, dtype_of(self.dtype).itemsize)
        return (max(1, int(elements) // math.prod(self.row) // _ROWS) * _ROWS, *self.row)

    def grid(self, x: Any) -> tuple[int, ...]:
        """The block grid of `x`."""
        return tuple(1 if b == -1 else n // b for n, b in zip(x.shape, self.block, strict=True))

    def blocks_per_scope(self, x: Any) -> int:
        """Blocks of `x` that compete in each scope."""
        return math.prod(g if s == -1 else s for g, s in zip(self.grid(x), self.scope, strict=True))

    def nnz(self, x: Any) -> int:
        """Blocks of `x` that are kept in each scope."""
        return self.blocks_per_scope(x) // 2 if self.keep is None else self.keep


Setup = Callable[[Case, Any], Call]
"""From a case and an array to the call that is timed; what else it needs it makes of the array's library.

The call works on the array, again and again, and returns its result, or None where the array is the result.
"""

Table = Mapping[str, Mapping[str, Setup]]
"""Operation -> {library: setup}."""


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name, those of ml_dtypes too."""
    if hasattr(np, name):
        return np.dtype(name)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


# --- npscope, and what a good user of NumPy would write --------------------------------------------


def _norms(case: Case, x: Any) -> Call:
    xp = array_namespace(x)
    out = xp.empty_like(x, dtype=getattr(xp, kind_of(x.dtype).norm), shape=case.grid(x))
    return partial(block_norms, x, case.block, ord=case.ord, out=out)


def _kth(case: Case, x: Any) -> Call:
    return partial(kth_largest, x, case.nnz(x), axis=None if case.scope == (-1, -1) else -1)


def conditioner_of(x: Any) -> Any:
    """A diagonal metric for `x`, the same for every contender."""
    return array_namespace(x).asarray(np.random.default_rng(0).uniform(0.5, 2, x.shape).astype(x.dtype))


def split(x: Any, block: Sequence[int]) -> Any:
    """`x` as a view of shape ``(G1, t1, G2, t2, ..)``: every axis cut in blocks."""
    sizes = [n if b == -1 else b for n, b in zip(x.shape, block, strict=True)]
    return x.reshape([n for whole, b in zip(x.shape, sizes, strict=True) for n in (whole // b, b)])


def numpy_norms(case: Case, x: np.ndarray) -> Call:
    """Norms of blocks; magnitudes where a block is an element (of a bfloat16 the bits, which rank alike and fast)."""
    if math.prod(case.block) == 1:
        return lambda: x.view(np.uint16) & 0x7FFF if x.dtype.name == "bfloat16" else np.abs(x)
    tiles = split(x, case.block)
    axes, letters = tuple(range(1, tiles.ndim, 2)), list(range(tiles.ndim))
    if case.ord == 1:
        return lambda: np.abs(tiles).sum(axis=axes)
    if case.ord == math.inf:
        return lambda: np.abs(tiles).max(axis=axes)
    if x.dtype.kind == "c":
        return lambda: np.sqrt((np.square(tiles.real) + np.square(tiles.imag)).sum(axis=axes))
    return lambda: np.sqrt(np.einsum(tiles, letters, tiles, letters, letters[::2]))


def by_scope(table: Any) -> tuple[list[int], tuple[int, ...]]:
    """For a `split` grid: its axes with those inside of scopes last, and these."""
    inside = tuple(range(1, table.ndim, 2))
    return [*range(0, table.ndim, 2), *inside], inside


def numpy_keep_largest(case: Case, x: np.ndarray) -> Call:
    """Small groups of elements drop by index; others compare with the k-th norm (and may keep more on ties)."""
    n, kept, norms = case.blocks_per_scope(x), case.nnz(x), numpy_norms(case, x)
    if n <= 16 and math.prod(case.block) == 1 and case.scope[-1] == n:
        few = (*[1] * (x.ndim - 1), n)

        def by_index() -> None:
            dropped = np.argpartition(split(norms(), few), n - kept - 1, axis=-1)[..., : n - kept]
            np.put_along_axis(split(x, few), dropped, 0, axis=-1)

        return by_index
    tiles = split(x, case.block)
    per_block = [size for g in tiles.shape[::2] for size in (g, 1)]

    def by_kth() -> None:
        table = split(norms(), case.scope)
        order, inside = by_scope(table)
        ranked = table.transpose(order).reshape(*table.shape[::2], n)
        dropped = table < np.expand_dims(np.partition(ranked, n - kept, axis=-1)[..., n - kept], inside)
        np.copyto(tiles, tiles.dtype.type(0), where=dropped.reshape(per_block))

    return by_kth


def _numpy_kth(case: Case, x: np.ndarray) -> Call:
    axis = None if case.scope == (-1, -1) else -1
    k = case.blocks_per_scope(x) - case.nnz(x)
    return lambda: np.partition(x, k, axis=axis)[..., k]


def _numpy_soft_threshold(case: Case, x: np.ndarray) -> Call:
    if math.prod(case.block) == 1:
        return lambda: np.subtract(x, np.clip(x, -1, 1), out=x)
    tiles, norms = split(x, case.block), numpy_norms(case, x)
    axes = tuple(range(1, tiles.ndim, 2))
    return lambda: np.multiply(tiles, np.expand_dims(np.maximum(0, 1 - 1 / norms()), axes), out=tiles)


TABLE: dict[str, dict[str, Setup]] = {
    "block_norms": {"npscope": _norms, "numpy": numpy_norms},
    "keep_largest": {
        "npscope": lambda case, x: partial(keep_largest, x, case.nnz(x), case.block, case.scope, out=x),
        "numpy": numpy_keep_largest,
    },
    "kth_largest": {"npscope": _kth, "numpy": _numpy_kth},
    "soft_threshold": {
        "npscope": lambda case, x: partial(soft_threshold, x, 1.0, case.block, out=x),
        "numpy": _numpy_soft_threshold,
    },
    "conditioned soft_threshold": {
        "npscope": lambda case, x: partial(soft_threshold, x, 1.0, case.block, conditioner=conditioner_of(x), out=x),
    },
}

CASES = (
    Case("4x4 norms", "block norms", "block_norms", (4, 4), reads=1, passes=1 / 16, bar=0.8),
    Case("1x16 norms", "block norms", "block_norms", (1, 16), reads=1, passes=1 / 16, bar=0.8),
    Case("2:4", "N:M", "keep_largest", (1, 1), (1, 4), passes=1, bar=0.8),
    Case("rows of 1024, half", "large scopes", "keep_largest", (1, 1), (1, -1), passes=1, bar=0.4),
    Case("4x4 tiles, global half", "large scopes", "keep_largest", (4, 4), reads=1, passes=0.5, bar=0.6),
    Case("1x1, global half", "large scopes", "keep_largest", reads=1, passes=0.5, bar=0.5),
    Case("k-th of rows of 1024", "k-th largest", "kth_largest", (1, 1), (1, -1), reads=1, bar=0.4),
    Case("soft 4x4", "shrinkage", "soft_threshold", (4, 4), passes=1, bar=0.6),
    Case("soft 4x4, conditioned", "shrinkage", "conditioned soft_threshold", (4, 4), passes=1, reads=1, bar=0.25),
    Case("2:4 of 64x64", "small arrays", "keep_largest", (1, 1), (1, 4), passes=1, row=(64,), mib=1 / 64),
)
"""The quick look. The full table contains it."""


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How much to measure: MiB of the array, and of its part for slow contenders; rounds; seconds for a contender."""

    mib: float
    slow_mib: float
    rounds: int
    seconds: float


def backends() -> tuple[str, ...]:
    """The backends of this installation that serve NumPy arrays."""
    found = []
    for name in ("reference", "numba"):
        try:
            found.append(namespace(name).name)
        except KindError:
            continue
    return tuple(found)


def contenders(case: Case, table: Table, only: Sequence[str] = ("",)) -> dict[str, tuple[str | None, Setup]]:
    """Name -> (backend, setup) of all that do `case`, npscope once for each backend; `only` limits by first words."""
    found: dict[str, tuple[str | None, Setup]] = {}
    for library, setup in table[case.operation].items():
        for backend in backends() if library == "npscope" else (None,):
            name = f"{library} {backend}" if backend else library
            if name.startswith(tuple(only)):
                found[name] = (backend, setup)
    return found


def fresh(case: Case, mib: float) -> np.ndarray:
    """New random data for `case`."""
    rng, shape = np.random.default_rng(), case.shape(mib)
    x: np.ndarray = rng.standard_normal(shape, dtype=np.float32)
    if case.data == "constant":
        x[...] = 1.2345678  # the norm of nine is halfway between two float32
    elif case.data == "two-valued":
        x = np.where(x > 0, np.float32(1.2345678), np.float32(-0.7654321))
    elif case.data == "sorted":
        x.reshape(-1).sort()
    elif case.data == "heavy-tailed":
        x = (x / (np.abs(rng.standard_normal(shape, dtype=np.float32)) + np.float32(1e-6))) ** 3
    elif case.data == "near overflow":
        x *= np.float32(np.finfo(np.float32).max / 16)
    elif case.data == "subnormal":
        x *= np.float32(np.finfo(np.float32).smallest_normal / 16)
    elif case.data == "pruned":
        x = keep_largest(x, case.nnz(x), case.block, case.scope)
    if case.dtype.startswith("complex"):
        x = x + 1j * rng.standard_normal(shape, dtype=np.float32)
    return x.astype(dtype_of(case.dtype), copy=False)


def measure(
    case: Case,
    table: Table,
    plan: Plan,
    *,
    section: str = "warm",
    only: Sequence[str] = ("",),
    unable: Callable[[str, Exception], None] | None = None,
) -> list[Row]:
    """Time the contenders of `case` in turns, beside the floor of their array.

    Other libraries that fail are left out, and `unable` is told; without it, and for npscope, the error is raised.
    """
    pristine = fresh(case, plan.mib)
    work = pristine.copy()
    threads = thread_count()
    timed: dict[str, Timed] = {}
    with Floor(work, pristine, threads, plan.rounds) as floor:
        for name, (backend, setup) in contenders(case, table, only).items():
            try:
                timed[name] = _fitted(case, setup, backend, work, pristine, plan)
            except Exception as error:
                if unable is None or backend is not None:
                    raise
                unable(name, error)
        take_turns([*floor.timed, *timed.values()])
    full = floor.milliseconds(case.reads, case.passes)
    rows = []
    for name, entry in timed.items():
        median, q1, q3 = summary(entry.seconds)
        least = full * entry.work.size / work.size
        rows.append(
            Row(
                section, case.name, case.group, name, case.dtype, case.data, entry.work.size, threads, entry.rounds,
                median, q1, q3, first_ms=significant(1e3 * (entry.first or 0)), floor_ms=significant(least),
                fraction=significant(least / median), bar=case.bar,
            )
        )  # fmt: skip
    return rows


def _fitted(case: Case, setup: Setup, backend: str | None, work: np.ndarray, pristine: np.ndarray, plan: Plan) -> Timed:
    """The contender on all of the array if that takes no more than its share of time, else on a part."""

    def prepare(x: np.ndarray) -> Call:
        return setup(case, x.T if case.transposed else x)

    rows = case.shape(min(plan.mib, plan.slow_mib))[0]
    timed = Timed(prepare, work[:rows], pristine[:rows], backend)
    first, usual = timed.run(), timed.run()
    if rows < len(work) and usual * len(work) / rows * plan.rounds <= plan.seconds:
        timed = Timed(prepare, work, pristine, backend)
        usual = min(timed.run(), timed.run())
    most = plan.rounds * (10 if work.nbytes <= 2**18 else 1)  # short calls are noisy
    timed.first, timed.rounds = first, min(most, max(3, int(plan.seconds / max(usual, 1e-9))))
    return timed


def environment() -> dict[str, Any]:
    """Machine, versions and threads: what figures must be read with."""
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("npscope", "numpy", "numba")},
        "threads": thread_count(),
    }


# --- the quick look ------------------------------------------------------------------------------


def quick(mib: float = 64, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The quick look, ready for JSON: environment, rows, and for every group which backend to `use`."""
    plan = Plan(mib, slow_mib=1, rounds=7, seconds=0.6)
    rows: list[Row] = []
    for done, case in enumerate(CASES, start=1):
        rows += measure(case, TABLE, plan)
        if progress is not None:
            progress(done, len(CASES))
    return {**environment(), "mib": mib, "rows": [asdict(row) for row in rows], "use": advice(rows)}


def advice(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Group -> the backend that is fastest in it, and how many times as fast as each other contender it is."""
    found = {}
    for group in dict.fromkeys(row.group for row in rows):
        speed: dict[str, list[float]] = {}
        for row in rows:
            if row.group == group:
                speed.setdefault(row.contender, []).append(math.log(row.fraction or 1))
        means = {name: math.exp(sum(logs) / len(logs)) for name, logs in speed.items()}
        best = max((name for name in means if name.startswith("npscope ")), key=means.__getitem__)
        times = {name: significant(means[best] / mean) for name, mean in means.items() if name != best}
        found[group] = {"backend": best.removeprefix("npscope "), "times_as_fast_as": times}
    return found
