"""One lazily made pool of threads that works off numbered pieces.

Kernels release the GIL, so plain threads run them side by side. Own threads and not a
numba threading layer, because those abort, hang or get killed when two Python threads
enter or a process forks. The caller works too, so a pool that is busy, shut down or
refused by the system only costs speed; a call from inside a piece runs in its own thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

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


def _submit(work: Callable[[], None], size: int) -> bool:
    """Give `work` to the pool, grown to `size` threads; False where no thread can be had (it may still run later)."""
    global _pool, _pool_size
    try:
        from concurrent.futures import ThreadPoolExecutor  # not before it is needed: it would slow `import npscope`

        with _lock:
            if _pool is None or _pool_size < size:
                if _pool is not None:
                    _pool.shutdown(wait=False)
                _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="npscope"), size
            _pool.submit(work)
    except (RuntimeError, ImportError):  # interpreter shutdown, or the system refuses another thread
        return False
    except BaseException:  # an interrupt may have left a lock of the pool locked for ever: nobody may use it again
        _pool, _pool_size = None, 0
        raise
    return True


PATIENCE = 1.0
"""Seconds after which a caller that waits asks whether anybody works: once a pool had lost what was given to it."""


class _Job:
    """The pieces of one call, taken one by one by the threads that have entered it."""

    def __init__(self, pieces: int, work: Work, threads: int) -> None:
        self.pieces, self.work, self.threads = pieces, work, threads
        self.taken = 0
        self.slots = 0
        self.active = 0
        self.closed = False
        self.failure: BaseException | None = None
        self.changed = threading.Condition()

    def enter(self) -> None:
        """Work off pieces until none is left, in a thread of the pool or the caller's."""
        with self.changed:
            if self.closed or self.slots == self.threads:  # a thread that comes late finds nothing to do
                return
            slot = self.slots
            self.slots += 1
            self.active += 1
        _inside.active = True
        try:
            while (piece := self._next()) is not None:
                self.work(slot, piece)
        except BaseException as error:  # handed to the caller, who raises it
            self.fail(error)
        finally:
            _inside.active = False
            with self.changed:
                self.active -= 1
                self.changed.notify_all()

    def _next(self) -> int | None:
        with self.changed:
            if self.failure is not None or self.taken >= self.pieces:
                return None
            self.taken += 1
            return self.taken - 1

    def fail(self, error: BaseException) -> None:
        """Stop every thread at its next piece."""
        if isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt):
            error = error.__context__  # it came while a condition had let go of its lock, whose release then fails
        self.failure = self.failure or error

    def close(self) -> None:
        """Let no more threads in, and wait until those inside have left, whatever interrupts the waiting."""
        while True:
            try:
                with self.changed:
                    self.closed = True
                    self.changed.wait_for(lambda: self.active == 0)
                    return
            except BaseException as error:  # Ctrl-C while waiting: stop the others, then report it
                self.fail(error)

    def wait_done(self) -> None:
        """Wait until the pieces are done, by threads other than the caller's."""
        try:
            with self.changed:
                while not self.changed.wait_for(
                    lambda: self.active == 0 and (self.failure or self.taken >= self.pieces), PATIENCE
                ):
                    if self.active == 0:
                        threading.Thread(target=self.enter, daemon=True).start()
        except BaseException as error:
            self.fail(error)


def run(pieces: int, work: Work, workers: int, *, shielded: bool = False) -> None:
    """Call ``work(slot, piece)`` once for every piece, on up to `workers` threads, slots below `workers`.

    The first exception stops the others at their next piece and is raised when all have stopped.
    Python delivers signals to the main thread, between any two of its instructions. A `shielded`
    piece, which several kernel calls must finish together, is therefore left to other threads.
    """
    shielded = shielded and threading.current_thread() is threading.main_thread()
    if ((workers <= 1 or pieces <= 1) and not shielded) or getattr(_inside, "active", False):
        for piece in range(pieces):
            work(0, piece)
        return
    job = _Job(pieces, work, min(workers, pieces))
    helpers = job.threads - (0 if shielded else 1)
    try:
        started = [_submit(job.enter, helpers) for _ in range(helpers)]
        if shielded and all(started):
            job.wait_done()
        else:
            job.enter()
    except BaseException as error:
        job.fail(error)
    finally:
        job.close()
    if job.failure is not None:
        raise job.failure
