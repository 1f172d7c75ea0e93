"""Faults put in: the Nth call of the file system goes wrong, or an interrupt comes before the Nth instruction."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

from npscope import cli

CALLS = [
    *("open", "close", "dup", "pread", "preadv", "write", "pwrite", "copy_file_range", "fsync", "fchmod"),
    *(["posix_fallocate"] if hasattr(os, "posix_fallocate") else []),
    *("fstat", "stat", "lstat", "listdir", "scandir", "mkdir", "rmdir", "unlink", "link", "rename", "replace"),
]

OURS = ("npscope.weights", "shutil")
"""Modules whose calls are counted."""

How = Callable[[str, Callable[[], Any]], Any]
"""What to do instead of a call: given its name, and the call itself."""


def error(name: str, call: Callable[[], Any]) -> Any:
    """The call fails, and has done nothing; but a descriptor is closed whatever its closing says."""
    if name == "close":
        call()
    raise OSError(errno.EIO, f"injected into {name}")


def done_and_error(name: str, call: Callable[[], Any]) -> Any:
    """The call does its work and says that it failed, as network file systems can."""
    _do_and_lose(name, call)
    raise OSError(errno.EIO, f"injected behind {name}")


def interrupt(name: str, call: Callable[[], Any]) -> Any:
    """A signal arrives in the call."""
    _do_and_lose(name, call)
    raise cli.Stopped(signal.SIGTERM)


def kill(name: str, call: Callable[[], Any]) -> Any:
    """The process dies in the call, when it is done."""
    with suppress(OSError):
        call()
    os.kill(os.getpid(), signal.SIGKILL)


def _do_and_lose(name: str, call: Callable[[], Any]) -> None:
    with suppress(OSError):
        result = call()
        if name in ("open", "dup"):
            os.close(result)
        elif name == "scandir":
            result.close()


@dataclass
class Faults:
    """Calls so far, and which of them go wrong."""

    how: How
    first: int
    last: float
    calls: int = 0
    met: list[str] = field(default_factory=list)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if not sys._getframe(1).f_globals.get("__name__", "").startswith(OURS):
                return real(*arguments, **options)
            self.calls += 1
            if self.first <= self.calls <= self.last:
                self.met.append(name)
                return self.how(name, lambda: real(*arguments, **options))
            return real(*arguments, **options)

        return wrapped


@contextmanager
def faults(how: How, first: int, last: float | None = None) -> Iterator[Faults]:
    """Context in which call number `first` goes wrong, or all up to `last`."""
    found = Faults(how, first, first if last is None else last)
    # What shutil asks `os` for stays as it is: a wrapped function is none of those it knows.
    supports = {name: getattr(os, name) | set() for name in ("supports_dir_fd", "supports_fd")}
    with mock.patch.multiple(fcntl, flock=found.wrap("flock", fcntl.flock)):
        wrapped = {name: found.wrap(name, getattr(os, name)) for name in CALLS}
        for kinds in supports.values():
            kinds |= {wrapped[name] for name in CALLS if getattr(os, name) in kinds}
        with mock.patch.multiple(os, **wrapped, **supports):
            yield found


def interrupted(call: Callable[[], None], at: int) -> bool:
    """Whether `call` was interrupted at instruction number `at` of ours and of contextlib, or had fewer.

    Between any two instructions of Python a signal can raise.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_globals["__name__"].startswith(("npscope", "contextlib")):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                raise KeyboardInterrupt  # which also ends the tracing
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks only now whether instructions are traced anywhere
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
