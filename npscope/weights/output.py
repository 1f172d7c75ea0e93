"""An output file that appears complete or not at all.

It is built beside its target under a hidden name, so that publishing it is one rename on one
file system, and removed when anything goes wrong, a signal turned into an exception included.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from npscope.errors import FileError, SpecError

_NAME_BYTES = 200
"""Bytes of the target's name in the temporary one; a file name has at most 255."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Target:
    """A place for an output file, symbolic links followed; `mode` of the file there now, None if there is none."""

    path: str
    mode: int | None
    replace: bool

    @classmethod
    def of(cls, path: str | os.PathLike[str], *, force: bool, source: os.stat_result | None = None) -> Target:
        """The target at `path`.

        SpecError (a ValueError) when something is there that may not be replaced: the file with the
        status `source`, by whatever link, a file without `force`, or no regular file. FileError when
        its directory does not exist.
        """
        real = os.path.realpath(os.fsdecode(path))
        try:
            status = os.stat(real)
        except FileNotFoundError:
            if not os.path.isdir(os.path.dirname(real)):
                raise FileError(f"output {path!r}: the directory {os.path.dirname(real)!r} does not exist") from None
            return cls(real, None, force)
        if source is not None and os.path.samestat(source, status):
            raise SpecError(f"output {os.fsdecode(path)!r} is the input; choose another name")
        if not stat.S_ISREG(status.st_mode):
            raise SpecError(f"output {path!r} exists and is not a regular file; choose another name")
        if not force:
            raise _exists(real)
        return cls(real, stat.S_IMODE(status.st_mode), force)


def _exists(path: str) -> SpecError:
    return SpecError(f"output {path!r} exists; choose another name, or --force to replace it")


@contextmanager
def staged(target: Target) -> Iterator[int]:
    """Context with the descriptor of an empty file that becomes `target` when the body succeeds.

    The content is on disk before the name is. Without `replace` no file is ever replaced, whenever
    it came into being (SpecError). A file that is replaced hands on its mode.
    """
    folder, name = os.path.split(target.path)
    short = os.fsdecode(os.fsencode(name)[:_NAME_BYTES])
    temporary = os.path.join(folder, f".{short}.npscope-{secrets.token_hex(8)}.tmp")
    fd = -1
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        yield fd
        if target.mode is not None:
            os.fchmod(fd, target.mode)
        os.fsync(fd)
        closing, fd = fd, -1
        os.close(closing)  # some file systems report a full disk only here
        publish(temporary, target)
    finally:
        if fd >= 0:
            with suppress(OSError):  # the failure that led here is the one to report
                os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    sync_folder(folder)


def publish(temporary: str, target: Target) -> None:
    """Give the complete file at `temporary` the name of `target`; SpecError when another file has it."""
    if target.replace:
        os.replace(temporary, target.path)
        return
    try:
        os.link(temporary, target.path)  # unlike a rename this never replaces
    except FileExistsError:
        raise _exists(target.path) from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(target.path):
            raise _exists(target.path) from None
        os.rename(temporary, target.path)


def sync_folder(folder: str) -> None:
    """Make the names in `folder` as durable as the disk can."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose directories cannot be synchronised
            raise
    finally:
        os.close(fd)
