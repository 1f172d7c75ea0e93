"""Timing of calls beside the floor: the time that the bytes need which must move.

Every timing starts from a fresh copy of the data, so in-place work meets what it should and
caches are in one state for all; contenders take turns within a round; the floor is measured in
the same rounds on the same array. Numba is loaded by the floor, not by this module, which
processes that time a cold start import too.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from npscope.options import use_backend

Call = Callable[[], Any]

FAILED_ABOVE = 1.05
"""A fraction of the floor above this is a failed measurement: nothing is faster than memory."""


@dataclass(frozen=True)
class Row:
    """One contender of one case. Times are milliseconds for `elements`, fewer for slow contenders.

    `floor_ms` is the floor of as many elements, `fraction` its ratio to the median. `bar` bounds
    what `judged_by` names: the fraction from below; from above the time in ms, its ratio to
    `base_ms`, or what it adds to that. `first_ms` is the first call of this process, compilation included.
    """

    section: str
    case: str
    group: str
    contender: str
    dtype: str
    data: str
    elements: int
    threads: int
    rounds: int
    median_ms: float
    q1: float
    q3: float
    first_ms: float | None = None
    floor_ms: float | None = None
    fraction: float | None = None
    base_ms: float | None = None
    bar: float | None = None
    judged_by: Literal["fraction", "ms", "ratio", "added"] = "fraction"

    @property
    def verdict(self) -> Literal["", "met", "missed", "failed"]:
        """What the bar says; "failed" is a measurement that beats the floor and cannot be right."""
        if self.fraction is not None and self.fraction > FAILED_ABOVE:
            return "failed"
        if self.bar is None:
            return ""
        if self.judged_by == "fraction":
            return "met" if (self.fraction or 0) >= self.bar else "missed"
        if self.cost is None:
            return ""
        return "met" if self.cost <= self.bar else "missed"

    @property
    def cost(self) -> float | None:
        """What a bar from above bounds; None where there is nothing to compare with."""
        if self.judged_by == "ms":
            return self.median_ms
        if self.base_ms is None or self.judged_by == "fraction":
            return None
        return self.median_ms / self.base_ms if self.judged_by == "ratio" else self.median_ms - self.base_ms


class Timed:
    """A call on its own piece of the data: `prepare` makes it, outside the clock, from the array to work on."""

    def __init__(
        self, prepare: Callable[[np.ndarray], Call], work: np.ndarray, pristine: np.ndarray, backend: str | None = None
    ) -> None:
        self.work, self.pristine, self.backend = work, pristine, backend
        self.call = prepare(work)
        self.rounds = 0
        self.first: float | None = None
        self.seconds: list[float] = []

    def run(self) -> float:
        """Seconds of one call on fresh data."""
        np.copyto(self.work, self.pristine)
        with use_backend(self.backend) if self.backend else nullcontext():
            start = time.perf_counter()
            self.call()
            return time.perf_counter() - start


def take_turns(contenders: Sequence[Timed]) -> None:
    """Run all contenders round by round, each for as many rounds as it has."""
    for done in range(max((timed.rounds for timed in contenders), default=0)):
        for timed in contenders:
            if done < timed.rounds:
                timed.seconds.append(timed.run())


def summary(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile, in milliseconds."""
    median, q1, q3 = (significant(1e3 * float(v)) for v in np.quantile(seconds, [0.5, 0.25, 0.75]))
    return median, q1, q3


def significant(value: float) -> float:
    """`value` to four digits, which is more than a clock can tell.

    >>> significant(123.456)
    123.5
    """
    return float(f"{value:.4g}")


def steps(threads: int) -> list[int]:
    """1, 2, 4 .. `threads`.

    >>> steps(6)
    [1, 2, 4, 6]
    """
    return sorted({*(2**i for i in range(threads.bit_length())), threads})


# --- the floor -----------------------------------------------------------------------------------


class Floor:
    """The ways to go over an array once: the fastest is what no operation can beat.

    A read pass is done by Numba, an in-place pass by Numba, by NumPy and as a copy from another
    array; those by Numba on 1, 2, 4 .. `threads` slices, with and without prefetching.
    """

    def __init__(self, work: np.ndarray, pristine: np.ndarray, threads: int, rounds: int) -> None:
        from npscope.backends.numba_cpu.passes import change, change_ahead, read, read_ahead

        words, source = (a.reshape(-1).view(np.uint64) for a in (work, pristine))
        zero = np.uint64(0)
        self._pool = ThreadPoolExecutor(threads)
        self._reads: list[Call] = []
        self._passes: list[Call] = [
            partial(np.bitwise_xor, words, zero, out=words),
            partial(np.copyto, words, source),
        ]
        for count in steps(threads):
            slices = np.array_split(words, min(count, words.size))
            self._reads += [partial(self._spread, kernel, slices) for kernel in (read, read_ahead)]
            self._passes += [partial(self._spread, kernel, slices, zero) for kernel in (change, change_ahead)]
        self.timed = [Timed(partial(_as_it_is, call), words, source) for call in (*self._reads, *self._passes)]
        for timed in self.timed:
            timed.run()
            timed.rounds = rounds

    def _spread(self, work: Callable[..., Any], slices: Sequence[np.ndarray], *arguments: Any) -> None:
        helpers = [self._pool.submit(work, piece, *arguments) for piece in slices[1:]]
        work(slices[0], *arguments)
        for helper in helpers:
            helper.result()

    def milliseconds(self, reads: float, passes: float) -> float:
        """The floor of so many read passes and in-place passes over the whole array."""
        medians = [1e3 * float(np.median(timed.seconds)) for timed in self.timed]
        return reads * min(medians[: len(self._reads)]) + passes * min(medians[len(self._reads) :])

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()


def _as_it_is(call: Call, work: np.ndarray) -> Call:
    return call


# --- the machine ---------------------------------------------------------------------------------


def arithmetic_of(threads: int, rounds: int = 15) -> float:
    """How many times the arithmetic of one thread `threads` threads do together, from medians.

    As many as there are threads, if each has a core of its own; less where cores are shared, as those of a virtual
    machine may be: what is bound by arithmetic and not by memory is slower there.
    """
    from npscope.backends.numba_cpu.passes import compute

    work = np.ones((threads, 4096), np.float32)

    def seconds(pool: ThreadPoolExecutor, count: int) -> float:
        start = time.perf_counter()
        for helper in [pool.submit(compute, numbers, 1 << 16) for numbers in work[:count]]:
            helper.result()
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        seconds(pool, threads)
        one, all_ = np.median([(seconds(pool, 1), seconds(pool, threads)) for _ in range(rounds)], axis=0)
    return significant(threads * float(one / all_))


def machine() -> dict[str, str | int | float | None]:
    """What a reader of the figures needs to know of this machine; nothing that names it."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "ram_gib": _ram_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _said_of_cpu(*fields: str) -> str | None:
    """What Linux says under the first of these names that it uses."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, said = line.partition(":")
            if name.strip() in fields:
                return said.strip()
    return None


def _cpu() -> str:
    """Its name and its widest vector instructions: two of one name may differ in these, one twice as fast."""
    name = _said_of_cpu("model name") or platform.processor() or "unknown"
    features = (_said_of_cpu("flags", "Features") or "").split()
    known = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
    return next((f"{name} with {vectors}" for feature, vectors in known.items() if feature in features), name)


def _ram_gib() -> float | None:
    if sys.platform == "win32":
        return None
    with suppress(OSError, ValueError):
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return None
