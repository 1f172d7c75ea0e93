"""One lazily made pool of threads that works off numbered pieces.

Kernels release the GIL, so plain threads run them side by side. Own threads and not a
numba threading layer, because those abort, hang or get killed when two Python threads
enter or a process forks. The caller works too, so a pool that is busy, shut down or
refused by the system only costs speed; a call from inside a piece runs in its own thread.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

Work = Callable[[int, int], None]
"""``work(slot, piece)``: `slot` numbers the threads of one call, for their workspaces."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_inside = threading.local()


def _forget_pool() -> None:
    """A forked child has none of the parent's threads, and maybe its lock in the locked state."""
    global _lock, _pool, _pool_size, _inside
    _lock, _pool, _pool_size, _inside = threading.Lock(), None, 0, threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _submit(work: Callable[[int], None], slot: int, helpers: int) -> Future[None] | None:
    """`work(slot)` given to the pool, grown to `helpers` threads; None where no thread can be had."""
    global _pool, _pool_size
    try:
        with _lock:
            if _pool is None or _pool_size < helpers:
                if _pool is not None:
                    _pool.shutdown(wait=False)
                _pool, _pool_size = ThreadPoolExecutor(helpers, thread_name_prefix="npscope"), helpers
            return _pool.submit(work, slot)
    except RuntimeError:  # interpreter shutdown, or the system refuses another thread
        return None


def run(pieces: int, work: Work, workers: int) -> None:
    """Call ``work(slot, piece)`` once for every piece, on up to `workers` threads, slots below `workers`.

    The first exception stops the others at their next piece and is raised when all have stopped;
    so is KeyboardInterrupt, which Python delivers to the calling thread between two pieces.
    """
    if workers <= 1 or pieces <= 1 or getattr(_inside, "active", False):
        for piece in range(pieces):
            work(0, piece)
        return
    numbers = itertools.count()
    failures: list[BaseException] = []

    def drain(slot: int) -> None:
        _inside.active = True
        try:
            while not failures and (piece := next(numbers)) < pieces:
                work(slot, piece)
        except BaseException as error:  # handed to the caller below
            failures.append(error)
        finally:
            _inside.active = False

    helpers = min(workers, pieces) - 1
    futures = [f for slot in range(1, helpers + 1) if (f := _submit(drain, slot, helpers)) is not None]
    drain(0)
    _join(futures, failures)
    if failures:
        raise failures[0]


def _join(futures: list[Future[None]], failures: list[BaseException]) -> None:
    """Wait until every started helper has stopped, whatever interrupts the waiting."""
    running = [f for f in futures if not f.cancel()]
    while running:
        try:
            running = list(wait(running).not_done)
        except BaseException as error:  # Ctrl-C while waiting: stop the helpers, then report it
            failures.append(error)
