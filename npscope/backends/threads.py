"""One lazily made pool of threads that works off numbered pieces.

Kernels release the GIL, so plain threads run them side by side. Own threads and not a
numba threading layer, because those abort, hang or get killed when two Python threads
enter or a process forks. The caller works too, so a pool that is busy, shut down or
refused by the system only costs speed; a call from inside a piece runs in its own thread.

Python delivers signals to the main thread, between any two of its instructions, also those of
`threading.Condition` and of executors, whose locks then stay taken for ever. So what the caller
shares with the pool are primitives of C, each of whose calls is done or not: queues, lists, a
lock that only wakes, and threads without a handshake.
"""

from __future__ import annotations

import _thread
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from queue import SimpleQueue

Work = Callable[[int, int], None]
"""``work(slot, piece)``: `slot` numbers the threads of one call, for their workspaces."""

_inside = threading.local()


class _Pool:
    """Threads that wait for what is put into one queue, and end with the process."""

    def __init__(self) -> None:
        from queue import SimpleQueue  # not before it is needed: it would slow `import npscope`

        self.tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.size = 0

    def submit(self, task: Callable[[], None], size: int) -> bool:
        """Have `task` called by one of up to `size` threads; False where the system refuses the first of them."""
        try:
            while self.size < size:
                _thread.start_new_thread(self._serve, ())
                self.size += 1
        except RuntimeError:  # no more threads, or the interpreter shuts down
            if self.size == 0:
                return False
        self.tasks.put(task)
        return True

    def _serve(self) -> None:
        while True:
            self.tasks.get()()


_pool: _Pool | None = None


def _submit(task: Callable[[], None], size: int) -> bool:
    """`_Pool.submit` of the only pool."""
    global _pool
    _pool = _pool or _Pool()
    return _pool.submit(task, size)


def _forget_pool() -> None:
    """A forked child has none of the parent's threads."""
    global _pool, _inside
    _pool, _inside = None, threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


PATIENCE = 1.0
"""Seconds after which a caller that waits for threads looks whether there are any."""


def _next(numbers: deque[int]) -> int | None:
    try:
        return numbers.popleft()
    except IndexError:
        return None


class _Job:
    """The pieces of one call, taken one by one by the caller, in slot 0 or not at all, and by threads of the pool."""

    def __init__(self, pieces: int, work: Work, slots: range) -> None:
        self.work = work
        self.pieces, self.slots = deque(range(pieces)), deque(slots)
        self.closed = False
        self.failure: BaseException | None = None
        self.entered: list[int] = []
        self.left: list[int] = []
        self.changed = threading.Lock()  # taken until a thread has left
        self.changed.acquire()

    @property
    def active(self) -> int:
        """How many threads of the pool are inside. Who has left is counted first: who comes meanwhile counts."""
        return -len(self.left) + len(self.entered)

    def help(self) -> None:
        """Work off pieces until none is left, in a thread of the pool: it enters first, then looks if it may."""
        self.entered.append(0)
        slot = None if self.closed else _next(self.slots)
        if slot is not None:  # a thread that comes late finds nothing to do
            self.work_off(slot)
        self.left.append(0)
        with suppress(RuntimeError):  # it is free since another left
            self.changed.release()

    def work_off(self, slot: int) -> None:
        """Work off pieces until none is left. Nothing is raised here, but by an interrupt."""
        _inside.active = True
        try:
            while self.failure is None and (piece := _next(self.pieces)) is not None:
                self.work(slot, piece)
        except BaseException as error:  # handed to the caller, who raises it
            self.failure = self.failure or error
        finally:
            _inside.active = False

    def wait_done(self) -> None:
        """Wait until the pieces are done, by threads other than the caller's."""
        while (self.pieces and self.failure is None) or self.active:
            if not self.changed.acquire(timeout=PATIENCE) and not self.active:  # the pool is busy with other calls
                _thread.start_new_thread(self.help, ())

    def close(self) -> None:
        """Let no more threads in, and wait until those inside have left, whatever interrupts the waiting."""
        while not self.closed or self.active:
            try:
                _inside.active = False
                self.closed = True
                if self.active:
                    self.changed.acquire(timeout=PATIENCE)
            except BaseException as error:  # Ctrl-C while waiting: stop the others, then report it
                self.failure = self.failure or error


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
    workers = min(workers, pieces)
    helpers = workers if shielded else workers - 1
    job = _Job(pieces, work, range(workers - helpers, workers))
    try:
        try:
            started = [_submit(job.help, helpers) for _ in range(helpers)]
            if shielded and any(started):
                job.wait_done()
            else:
                job.work_off(0)
        except BaseException as error:
            job.failure = job.failure or error
        finally:
            job.close()
    finally:  # once more, for an interrupt can come before the first instruction of a call
        job.close()
    if job.failure is not None:
        raise job.failure
