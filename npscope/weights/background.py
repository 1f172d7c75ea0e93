"""Reading and writing beside other work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Background:
    """One thread that works ahead; where none can be started, the caller's own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "npscope-io")

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Begin ``function(*arguments)``; its result or failure is in the future."""
        if self._pool is not None:
            try:
                return self._pool.submit(function, *arguments)
            except RuntimeError:  # no thread to be had
                self._pool = None
        done: Future[T] = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        """Wait for what has begun, whatever signal comes: it uses descriptors that are closed next."""
        interrupted: KeyboardInterrupt | None = None
        while self._pool is not None:
            try:
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = None
            except KeyboardInterrupt as signal:
                interrupted = signal
        if interrupted is not None:
            raise interrupted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
