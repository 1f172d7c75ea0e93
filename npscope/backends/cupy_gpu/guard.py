"""What may go wrong around every operation, said so that it can be mended: no memory, a forked process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import cupy

from npscope.backends.cupy_gpu.modules import has_launched

P = ParamSpec("P")
R = TypeVar("R")


class _Fork:
    """Whether this process was forked from one that had used CUDA, which does not survive that."""

    broke_cuda = False


def _after_fork() -> None:
    _Fork.broke_cuda = has_launched()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def guarded(operation: Callable[P, R]) -> Callable[P, R]:
    """`operation`, which is refused in forked processes, and says what to do where memory is short.

    CuPy's pool has by then given its unused memory back and tried again.
    """

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _Fork.broke_cuda:
            raise RuntimeError(
                "CUDA was in use when this process was forked, and cannot be used here; "
                "start workers with the method 'spawn' or 'forkserver'"
            )
        try:
            return operation(*args, **kwargs)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise MemoryError(
                f"too little device memory for the workspace of this call, nothing was written: {error} "
                "Free arrays, or raise the limit of CuPy's memory pool"
            ) from None

    return run
