"""Work arrays that one call hands on to the next: a small call takes longer to make them than to use them.

What is freed goes back to the system, and comes again as pages to be cleared: that was a third of the
time of the norms of a 64x64 array.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

KEPT_BYTES, KINDS, KEPT_EACH = 1 << 18, 16, 4
"""Bytes of work arrays that are kept at most, kinds of them, and how many of a kind: 16 MiB in all, mostly far less."""


class Work(Protocol):
    """Work arrays of one thread, whatever stands in them."""

    @property
    def nbytes(self) -> int:
        """Their memory."""


W = TypeVar("W", bound=Work)


class _Return(weakref.ref["Loan[Any]"]):
    """Gives work arrays back when their loan is dropped, in C: an interrupt inside of a `__del__` would be lost."""

    __slots__ = ("work",)
    work: Any


@lru_cache(maxsize=KINDS)
def _kept(make: Callable[..., Any], arguments: tuple[Any, ...]) -> deque[_Return]:
    return deque(maxlen=KEPT_EACH)


class Loan(Generic[W]):
    """Work arrays of the kind ``make(*arguments)``, new or from an earlier call; dropping this gives them back."""

    __slots__ = ("__weakref__", "_return", "work")

    def __init__(self, make: Callable[..., W], *arguments: Any) -> None:
        kept = _kept(make, arguments)
        try:
            work: W = kept.pop().work
        except IndexError:  # also where another thread took the last
            work = make(*arguments)
        self.work = work
        if work.nbytes <= KEPT_BYTES:
            self._return = back = _Return(self, kept.append)
            back.work = work
