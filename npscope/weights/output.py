"""An output file that appears complete or not at all, built by one process at a time.

It is built beside its target under a hidden name, so that publishing it is one rename on one
file system, and removed when anything goes wrong, a signal turned into an exception included.
The hidden name is the same for every run to one target, and the file is locked while it is built:
a second run meets the lock, which ends with the process that holds it, and what a killed run left
is unlocked and gives way to the next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from npscope.errors import FileError, SpecError

_NAME_BYTES = 200
"""Bytes of the target's name in the temporary one; a file name has at most 255."""

_NO_RESERVATION = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV}

_RESERVED_BYTES = 256 << 20
"""What is reserved in one call: where a file system writes zeros for it, a signal waits no longer than that."""

_COMPARED_BYTES = 1 << 20

_ATTEMPTS = 100  # to claim a name that other processes release and claim meanwhile

_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""How a file system says that it has no locks; two runs are then told apart by the names of their files only."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Companion(Protocol):
    """What is there before an output is: its mask."""

    def publish(self) -> None:
        """Give it its name, when it is complete and on disk."""

    def withdraw(self) -> None:
        """Take the name away again, if `publish` gave it one that nothing had; there is a failure to report already."""


@dataclass(frozen=True)
class Target:
    """A place for an output file, symbolic links followed; `mode` of the file there now, None if there is none.

    The file there is replaced, or with `keep_equal` left as it is when it is byte for byte the new
    one. The `companion` gets its name just before the output does.
    """

    path: str
    mode: int | None
    replace: bool
    keep_equal: bool = False
    companion: Companion | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        *,
        force: bool,
        source: os.stat_result | None = None,
        keep_equal: bool = False,
    ) -> Target:
        """The target at `path`.

        SpecError (a ValueError) when something is there that may not be replaced: the file with the
        status `source`, by whatever link, a file without `force` or `keep_equal`, or no regular file.
        FileError when its directory does not exist.
        """
        real = os.path.realpath(os.fsdecode(path))
        try:
            status = os.stat(real)
        except FileNotFoundError:
            if not os.path.isdir(os.path.dirname(real)):
                raise FileError(f"output {path!r}: the directory {os.path.dirname(real)!r} does not exist") from None
            return cls(real, None, force)
        if source is not None and os.path.samestat(source, status):
            raise SpecError(f"output {os.fsdecode(path)!r} is the input; choose another name, or --in-place")
        if not stat.S_ISREG(status.st_mode):
            raise SpecError(f"output {path!r} exists and is not a regular file; choose another name")
        if not (force or keep_equal):
            raise exists(real)
        return cls(real, stat.S_IMODE(status.st_mode), force, keep_equal)

    @contextmanager
    def named(self, is_named: Callable[[], bool]) -> Iterator[None]:
        """Context in which the output, complete and on disk, gets its name: its companion is there, or neither is."""
        try:
            if self.companion is not None:
                self.companion.publish()
            yield
        except BaseException:
            if self.companion is not None and not is_named():
                self.companion.withdraw()
            raise


def require_free(path: str | os.PathLike[str], what: str, taken: Mapping[str, Iterable[str]]) -> None:
    """SpecError when `path`, where `what` is to be written, is one of the paths in `taken` or inside it.

    `taken` maps a word for a thing to its paths.
    """
    real = os.path.realpath(os.fsdecode(path))
    for thing, others in taken.items():
        for other in map(os.path.realpath, others):
            is_inside = os.path.commonpath([real, other]) == other
            if is_inside or (os.path.exists(real) and os.path.exists(other) and os.path.samefile(real, other)):
                raise SpecError(
                    f"the {what} is to be {os.fsdecode(path)!r}, which belongs to the {thing}; choose another place"
                )


def exists(path: str) -> SpecError:
    """The error of an output that is there and may not be replaced."""
    return SpecError(f"output {path!r} exists; choose another name, or --force to replace it")


@dataclass(frozen=True)
class Stage:
    """A new file, open as `fd`, under the name `temporary` until it is published as `target`."""

    fd: int
    temporary: str
    target: Target

    def publish(self) -> None:
        """Give the file its name, when its content is on disk. A file that is replaced hands on its mode."""
        if self.target.mode is not None:
            os.fchmod(self.fd, self.target.mode)
        os.fsync(self.fd)
        os.close(os.dup(self.fd))  # some file systems report a full disk only here; the lock stays with `fd`
        with self.target.named(self._is_named):
            check_still_there(self.fd, self.temporary)
            publish(self.temporary, self.target)
        sync_folder(os.path.dirname(self.target.path))

    def withdraw(self) -> None:
        """Take the name away again from a file that was published where none was; without an error."""
        with suppress(OSError):
            if self.target.mode is None and self._is_named():
                os.unlink(self.target.path)

    def _is_named(self) -> bool:
        return is_at(self.fd, self.target.path)


@contextmanager
def staged(target: Target) -> Iterator[int]:
    """Context with the descriptor of an empty file that becomes `target` when the body succeeds.

    Without `replace` no file is ever replaced, whenever it came into being (SpecError). FileError
    when another process is building the same target.
    """
    with stage(target) as building:
        yield building.fd
        building.publish()


@contextmanager
def stage(target: Target) -> Iterator[Stage]:
    """Context like `staged`, whose body publishes the file itself."""
    folder, name = os.path.split(target.path)
    temporary = os.path.join(folder, hidden_name(name, "new.tmp"))
    with claimed(temporary, FILE) as fd:
        yield Stage(fd, temporary, target)


def hidden_name(name: str, ending: str) -> str:
    """The name beside `name` under which its successor is built."""
    short = os.fsdecode(os.fsencode(name)[:_NAME_BYTES])
    return f".{short}.npscope-{ending}"


def is_hidden_name(name: str) -> bool:
    """Whether `hidden_name` makes such names."""
    return name.startswith(".") and (name.endswith((".npscope-new.tmp", ".npscope-data.tmp", ".npscope-partial")))


def write_all(fd: int, data: memoryview) -> None:
    """Append all of `data`, in as many writes as that takes."""
    while data:
        data = data[os.write(fd, data) :]


def overwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` over what is there from `offset` on; the position of `fd` stays."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


class Kind(NamedTuple):
    """How something with a name is made, opened and removed; `create` fails when something has the name."""

    create: Callable[[str], int]
    open: Callable[[str], int]
    remove: Callable[[str], None]


def _create_folder(path: str) -> int:
    os.mkdir(path)
    try:
        return _open_folder(path)
    except BaseException:
        os.rmdir(path)
        raise


def _open_folder(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


FILE = Kind(
    lambda path: os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666),
    lambda path: os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC),
    lambda path: os.unlink(path),
)
FOLDER = Kind(_create_folder, _open_folder, lambda path: shutil.rmtree(path))


@contextmanager
def claimed(path: str, kind: Kind) -> Iterator[int]:
    """Context with the descriptor of something new at `path`, locked against other processes.

    The body takes it away from `path`; when it fails, what it did not take away is removed.
    What a dead process left at `path` is removed first. FileError when a living one holds it.
    """
    held: list[int] = []
    try:
        _claim(path, kind, held)
        yield held[0]
    except BaseException:
        if held:
            _discard(held[0], path, kind)
        else:  # an interrupt may have come between the creation and its result
            _discard_leftover(path, kind)
        raise
    os.close(held[0])


def lock(fd: int, path: str) -> None:
    """Lock what `fd` is open on until `fd` is closed; FileError when another process has it locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(
            f"{path!r} is locked: another npscope is writing this output; wait for it, or choose another name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def check_still_there(fd: int, path: str) -> None:
    """FileError when what `fd` is open on has lost its name `path`."""
    if not is_at(fd, path):
        raise FileError(f"{path!r} was removed or replaced while it was written; run again")


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


def _claim(path: str, kind: Kind, held: list[int]) -> None:
    """Make what is to be at `path` and lock it; its descriptor is in `held` until it is closed."""
    for _ in range(_ATTEMPTS):
        try:
            held.append(kind.create(path))
        except FileExistsError:
            _remove_leftover(path, kind)
            continue
        try:
            lock(held[0], path)
        except FileError:
            # Even what is new can be locked: by a process that found it before this one locked it, takes it
            # for a leftover and is about to remove it.
            os.close(held.pop())
            raise
        if is_at(held[0], path):
            return
        os.close(held.pop())
    raise FileError(f"{path!r} is made and removed by other processes all the time; run again when they are done")


def _remove_leftover(path: str, kind: Kind) -> None:
    """Remove what a process left at `path` that is no more, if anything; FileError when a living one holds it."""
    try:
        fd = kind.open(path)
    except FileNotFoundError:  # its owner has just finished
        return
    try:
        lock(fd, path)
        if is_at(fd, path):
            kind.remove(path)
    finally:
        os.close(fd)


def _discard_leftover(path: str, kind: Kind) -> None:
    """`_remove_leftover` where there is a failure to report already."""
    with suppress(OSError):
        _remove_leftover(path, kind)


def _discard(fd: int, path: str, kind: Kind) -> None:
    """Remove what `fd` is open on and close it; there is a failure to report already, so this has none."""
    with suppress(OSError):
        if is_at(fd, path):
            kind.remove(path)
    with suppress(OSError):
        os.close(fd)


def is_at(fd: int, path: str) -> bool:
    """Whether what `fd` is open on has the name `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def reserve(fd: int, nbytes: int) -> None:
    """Take the space for a file whose size is known: a full disk shows at once, and writing is faster.

    Measured on ext4: 2 GiB in 8 MiB pieces and fsync, 0.9 to 1.3 s after it and 1.6 to 7 s without.
    """
    if sys.platform == "linux":
        for start in range(0, nbytes, _RESERVED_BYTES):
            try:
                os.posix_fallocate(fd, start, min(_RESERVED_BYTES, nbytes - start))
            except OSError as error:
                if error.errno not in _NO_RESERVATION:
                    raise
                break


def publish(temporary: str, target: Target) -> None:
    """Give the complete file at `temporary` the name of `target`; SpecError when another file has it."""
    if target.replace:
        os.replace(temporary, target.path)
        return
    try:
        os.link(temporary, target.path)  # unlike a rename this never replaces
    except FileExistsError:
        _require_equal(temporary, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if not os.path.lexists(target.path):
            os.rename(temporary, target.path)
            return
        _require_equal(temporary, target)
    os.unlink(temporary)


def _require_equal(temporary: str, target: Target) -> None:
    """SpecError unless the file at `target` may stay and holds what the one at `temporary` does."""
    if target.keep_equal:
        with open(temporary, "rb") as new, open(target.path, "rb") as old:
            while (piece := new.read(_COMPARED_BYTES)) == old.read(_COMPARED_BYTES):
                if not piece:
                    return
    raise exists(target.path) from None
