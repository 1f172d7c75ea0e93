"""Processor time, for tests that say how much work something may be.

Not the clock's time: other processes run beside the tests. No collections of garbage in between, nor before:
one takes a second where the tests before left compiled functions alive.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collections_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the body takes the process more than `seconds`."""
    with collections_off():
        start = time.process_time()
        yield
        taken = time.process_time() - start
    assert taken < seconds


def quickest(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds that something takes when it is warm."""
    work()
    taken = []
    with collections_off():
        for _ in range(rounds):
            start = time.process_time()
            work()
            taken.append(time.process_time() - start)
    return min(taken)


def assert_linear(work: Callable[[int], None], small: int, factor: int = 10) -> None:
    """Fail if `factor` times as much of something takes far more than `factor` times as long.

    Quadratic time is `factor` squared; the line is drawn at half of that, as one slow moment must not cross it.
    """

    def seconds(count: int) -> float:
        start = time.process_time()
        work(count)
        return time.process_time() - start

    with collections_off():
        seconds(small)
        few = min(seconds(small) for _ in range(3))
        many = min(seconds(factor * small) for _ in range(2))
    assert many < factor**2 / 2 * few + 0.5
