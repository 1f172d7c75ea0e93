"""What a caller may set around a call: the backend, the number of threads, device checks.

Context variables, so that threads and tasks do not see each other's settings.
Environment values are read and checked at first use, never at import; good ones are kept, for two
looks into the environment take a tenth of a small call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from npscope.errors import KindError, SpecError
from npscope.tiling import as_int

BACKENDS = ("reference", "numba", "cupy")
MAX_THREADS = 1024

_backend: ContextVar[str | None] = ContextVar("npscope_backend", default=None)
_threads: ContextVar[int | None] = ContextVar("npscope_threads", default=None)
_check: ContextVar[bool] = ContextVar("npscope_check", default=False)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context in which every call is served by the backend `name`: "reference", "numba" or "cupy".

    An array that this backend does not serve is then a KindError: nothing is moved to another
    device and nothing falls back. SpecError for an unknown name.

    >>> import numpy, npscope
    >>> with npscope.use_backend("reference"):
    ...     npscope.block_norms(numpy.asarray([[3.0, 4.0]]), (1, 2))
    array([[5.]])
    """
    if name not in BACKENDS:
        raise SpecError(f"backend {name!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def config(*, threads: int | None = None, check: bool | None = None) -> Iterator[None]:
    """Context with at most `threads` CPU threads, and with `check` of values that live on a device.

    Results never depend on the number of threads. ``check=True`` lets npscope read device values
    (counts, thresholds, conditioners) back and raise on bad ones. What is left out stays as it is.

    >>> import numpy, npscope
    >>> with npscope.config(threads=1):
    ...     npscope.topk_mask(numpy.asarray([1, 3, 2]), 2)
    array([False,  True,  True])
    """
    if check is not None and not isinstance(check, bool):
        raise KindError(f"check must be True or False, not {type(check).__name__} {check!r}")
    count = _threads.get() if threads is None else _valid_threads(as_int(threads, "threads"), "threads")
    threads_token = _threads.set(count)
    check_token = _check.set(checks_devices() if check is None else check)
    try:
        yield
    finally:
        _check.reset(check_token)
        _threads.reset(threads_token)


def chosen_backend() -> str | None:
    """The backend set by `use_backend`, else by NPSCOPE_BACKEND, if any."""
    return _backend.get() or _environment_backend()


@cache
def _environment_backend() -> str | None:
    given = os.environ.get("NPSCOPE_BACKEND")
    if given is None or given in BACKENDS:
        return given
    raise SpecError(f"NPSCOPE_BACKEND={given!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")


def checks_devices() -> bool:
    """Whether values on a device may be read back to be checked."""
    return _check.get()


def thread_limit() -> int | None:
    """The number of threads set by `config`, else by NPSCOPE_NUM_THREADS, if any."""
    return _threads.get() or _environment_threads()


@cache
def _environment_threads() -> int | None:
    given = os.environ.get("NPSCOPE_NUM_THREADS")
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) < 10):
        raise SpecError(f"NPSCOPE_NUM_THREADS={given!r:.80} is not a whole number from 1 to {MAX_THREADS}")
    return _valid_threads(int(given), "NPSCOPE_NUM_THREADS")


def thread_count() -> int:
    """CPU threads to use: as many as were set, else the CPUs this process may run on."""
    return thread_limit() or _available_cpus()


def _valid_threads(count: int, what: str) -> int:
    if not 1 <= count <= MAX_THREADS:
        raise SpecError(f"{what}={count} is not a whole number from 1 to {MAX_THREADS}")
    return count


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)
