"""Every exception that npscope raises on purpose.

Each is a `NpscopeError` and also the built-in that a caller would have caught
anyway (`ValueError`, `TypeError`, `OSError`), so neither kind of handler breaks.
Inner code states a short fact; the boundary names the subject once (`about`).
"""

from __future__ import annotations

from types import TracebackType


class NpscopeError(Exception):
    """Base class of every error that npscope raises on purpose."""


class SpecError(NpscopeError, ValueError):
    """A shape, count, threshold or option has a value that cannot work."""


class CouplingError(SpecError):
    """Parts of a coupling do not fit together."""


class KindError(NpscopeError, TypeError):
    """An argument is of the wrong type, dtype, device or array library."""


class ConvergenceError(NpscopeError, ValueError):
    """An iteration reached its limit; nothing was written."""


class FormatError(NpscopeError, ValueError):
    """A file is not what it claims to be."""


class FileError(NpscopeError, OSError):
    """A file cannot be read or written."""


class about:  # noqa: N801 - reads as a word where it is used
    """Context manager that puts ``subject: `` in front of an npscope error, once.

    A class and not a generator: it stands on the path of every small call.
    """

    __slots__ = ("subject",)

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, NpscopeError):
            raise type(error)(f"{self.subject}: {error}") from None
