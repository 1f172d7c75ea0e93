"""Work arrays that one call hands on to the next: a small call takes longer to make them than to use them.

What is freed goes back to the system, and comes again as pages to be cleared: that was a third of the
time of the norms of a 64x64 array.
"""

from __future__ import annotations

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


@lru_cache(maxsize=KINDS)
def _kept(make: Callable[..., W], arguments: tuple[Any, ...]) -> list[W]:
    return []


class Loan(Generic[W]):
    """Work arrays of the kind ``make(*arguments)``, new or from an earlier call; dropping this gives them back."""

    __slots__ = ("_kept", "work")

    def __init__(self, make: Callable[..., W], *arguments: Any) -> None:
        kept: list[W] = _kept(make, arguments)
        try:
            self.work = kept.pop()
        except IndexError:  # also where another thread took the last
            self.work = make(*arguments)
        self._kept = kept

    def __del__(self) -> None:
        if hasattr(self, "_kept") and self.work.nbytes <= KEPT_BYTES and len(self._kept) < KEPT_EACH:
            self._kept.append(self.work)
