"""From arguments to an exit code: signals, failures, and what is said of them."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from npscope import __version__
from npscope.cli import report
from npscope.cli.terminal import print_text
from npscope.errors import FileError, NpscopeError, SpecError


def run(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Do the job that `parser` finds in `arguments` (those of the process by default); return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _signals_raise():
            return _run(parser, given)
    except BaseException as error:
        return _fail(error, options=set(given[: given.index("--")] if "--" in given else given))


def _run(parser: ArgumentParser, arguments: list[str]) -> int:
    if sys.platform == "win32":
        raise SpecError("the command line is not supported on Windows; the Python functions are")
    try:
        options = parser.parse_args(arguments)
    except SystemExit:  # how argparse ends behind its help
        code = None
    else:
        code = options.job(options)
    sys.stdout.flush()
    return code or 0


RAISED_AGAIN_S = 0.01
"""After so long a signal is sent once more whose exception Python ignored."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _send_again(number: int) -> None:
    """Send this thread a signal in a moment: by another thread, of which nothing is waited for meanwhile."""

    def send(thread: int) -> None:
        time.sleep(RAISED_AGAIN_S)
        signal.pthread_kill(thread, number)

    _thread.start_new_thread(send, (threading.get_ident(),))


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP raise `Stopped`, unless the caller ignores them.

    Python ignores what is raised in a callback of a weak reference, such as the one that drops the lock of a module
    that was imported, or in a `__del__`: such a signal is sent again, until it is raised elsewhere. Nor is it raised
    while Python says so: it would be ignored there, and lost.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is unraisable.__code__:
                _send_again(number)
                return
            frame = frame.f_back
        raise Stopped(number)

    def unraisable(ignored: sys.UnraisableHookArgs) -> None:
        if isinstance(ignored.exc_value, Stopped):
            _send_again(ignored.exc_value.number)
        else:
            hook(ignored)

    before: dict[int, Any] = {}
    hook = sys.unraisablehook
    if threading.current_thread() is threading.main_thread() and sys.platform != "win32":
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(ending) is not signal.SIG_IGN:
                before[ending] = signal.signal(ending, stop)
        sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(error: BaseException, options: set[str]) -> int:
    """Report a failure in one line; the exit code that it has."""
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    code, message = _explained(error)
    if "--json" in options:
        with suppress(OSError):
            fields = {"kind": type(error).__name__, "message": message, "exit_code": code}
            print_text(report.as_json({"npscope": __version__, "error": fields}) + "\n")
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    with suppress(OSError):
        if "--debug" in options:
            traceback.print_exception(error)
        print(f"npscope: error: {report.printable(message)}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Send standard output nowhere: what is left in its buffer would fail again, loudly, when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error."""
    if isinstance(error, NpscopeError):
        return 3 if isinstance(error, FileError) else 2, str(error)
    if isinstance(error, MemoryError):
        return 3, f"out of memory {error}".rstrip()
    if isinstance(error, OSError):
        return 3, f"{error.filename!r}: {error.strerror}" if error.filename is not None else str(error)
    return 3, f"{type(error).__name__}: {error} (this should not happen; --debug shows where it did)"
