"""The files of a model: its own, and those beside it that hold its data.

Where a data file lies is what the model says, so a name may come from a stranger: it is followed
only downwards from the model's folder, through real folders, to a regular file that no second
name leads to. Few descriptors are open at a time, however many files there are.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from npscope.errors import FileError, FormatError, SpecError, about
from npscope.weights.output import Target, hidden_name, publish, stage, staged, sync_folder

MODEL = ""
"""The location of the model itself."""


class Files:
    """The model at `path`, open, and files beside it, opened when they are read.

    A location is a relative path with ``/`` between its parts. FormatError when one is unsafe or
    no regular file, FileError when it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        # O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._status = {MODEL: os.fstat(self._fd)}
        self._other: tuple[str, int] | None = None
        self._lock = threading.Lock()

    @property
    def locations(self) -> list[str]:
        """Those of all data files that were added, without the model."""
        return [location for location in self._status if location != MODEL]

    def status(self, location: str) -> os.stat_result:
        """What was known of a file when it was opened first."""
        return self._status[location]

    def add(self, location: str) -> str:
        """Check the data file at `location`; return the location that names it from now on."""
        with about(f"external data {location!r:.120}"):
            known = _normal(location)
            if known not in self._status:
                fd = _open_beneath(self._folder, known)
                try:
                    status = os.fstat(fd)
                finally:
                    os.close(fd)
                _check_kind(status)
                self._status[known] = status
        return known

    def read(self, location: str, offset: int, into: memoryview) -> None:
        """Fill `into` with bytes from `offset` on; FileError when the file ends early."""
        rest = into.cast("B")
        with self._lock:  # a file must not lose its descriptor while another thread reads it
            fd = self._open(location)
            while rest:
                # A single read returns at most 2 GiB, and less when a signal comes in between.
                got = os.preadv(fd, [rest], offset)
                if not got:
                    name = location or self.path
                    raise FileError(f"{name!r:.200} ends at byte {offset}; it was truncated while it was read")
                rest, offset = rest[got:], offset + got

    def check_unchanged(self) -> None:
        """FileError when size or modification time of a file are not what they were at opening."""
        for location in self._status:
            with self._lock:
                now = os.fstat(self._open(location))
            then = self._status[location]
            if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise _changed(location or self.path)

    def close(self) -> None:
        """Close what is open; twice does no harm."""
        self._close_other()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def beside(self, path: str) -> list[str]:
        """The paths of a model at `path` and of its data files."""
        return [path, *(os.path.join(os.path.dirname(path), *location.split("/")) for location in self.locations)]

    def targets(self, target: Target) -> dict[str, Target]:
        """Where the data files go when the model goes to `target`: to the same locations beside it.

        SpecError (a ValueError) when one is there that may not be replaced, above all one of this
        model's own, or when a symbolic link is on the way.
        """
        places: dict[str, Target] = {}
        for location, path in zip(self.locations, self.beside(target.path)[1:], strict=True):
            with about(f"external data {location!r:.120} of the output"):
                if os.path.realpath(path) != path:
                    raise SpecError(f"a symbolic link leads to {path!r}; remove it, or choose another folder")
                if path == target.path:
                    raise SpecError(f"the output itself is {path!r}; choose another name")
                places[location] = _place(path, target.replace, self._status.values())
        return places

    @contextmanager
    def outputs(self, target: Target) -> Iterator[Callable[[str], int]]:
        """Context with a function from a location to the descriptor of its file under the output.

        When it is called for the next data file, the one before is complete. The data files get
        their names when the context ends without an error, and the model at `target` after them:
        whoever finds it finds all of it.
        """
        places = self.targets(target)
        ready: list[_Ready] = []
        new: list[str] = []
        folders: list[str] = []
        built: os.stat_result | None = None
        try:
            with stage(Target(target.path, target.mode, target.replace)) as building_model:
                model = building_model.fd
                built = os.fstat(model)
                with ExitStack() as building:

                    def output(location: str) -> int:
                        building.pop_all().close()
                        if location == MODEL:
                            return model
                        place = places[location]
                        folders.extend(_make_folders(os.path.dirname(place.path)))
                        hidden = _hidden(place)
                        fd = building.enter_context(staged(hidden))
                        ready.append(_Ready(hidden.path, os.fstat(fd), place))
                        return fd

                    yield output
                os.fsync(model)
                with target.named(lambda: _is_at(built, target.path)):
                    if any(data.place.mode is not None for data in ready):
                        # What is there now must not be read with the new data, if this is where the run ends.
                        with suppress(FileNotFoundError):
                            os.unlink(target.path)
                    for data in ready:
                        data.publish()
                        if data.place.mode is None:
                            new.append(data.place.path)
                        sync_folder(os.path.dirname(data.place.path))
                    building_model.publish()
        except BaseException:
            _remove([data.hidden for data in ready if _is_at(data.status, data.hidden)], [])
            if not _is_at(built, target.path):
                _remove(new, folders)
            raise

    @property
    def _folder(self) -> str:
        return os.path.dirname(self.path) or os.curdir

    def _open(self, location: str) -> int:
        if location == MODEL:
            return self._fd
        if self._other is None or self._other[0] != location:
            self._close_other()
            fd = _open_beneath(self._folder, location)
            self._other = location, fd
            if not os.path.samestat(os.fstat(fd), self._status[location]):
                raise _changed(location)
        return self._other[1]

    def _close_other(self) -> None:
        if self._other is not None:
            os.close(self._other[1])
            self._other = None


def _normal(location: str) -> str:
    """`location` in its one form; FormatError when it is no path down from the model's folder."""
    parts = location.split("/")
    if not parts[-1] or "\0" in location:
        raise FormatError("this names no file")
    if not parts[0]:
        raise FormatError("an absolute path; needed is one from the folder of the model")
    if ".." in parts:
        raise FormatError("this leads out of the folder of the model")
    kept = [part for part in parts if part not in ("", ".")]
    if not kept or parts[-1] == ".":
        raise FormatError("this names no file")
    return "/".join(kept)


def _open_beneath(folder: str, location: str) -> int:
    """A descriptor of the file at `location` in `folder`; no part of the location may be a link."""
    *parents, name = location.split("/")
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except FileNotFoundError:
        raise FileError(f"there is no such file in {folder!r}") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO):
            raise FormatError(
                "a symbolic link, or something that is no folder, is on the way to it; put a copy of the file there"
            ) from None
        raise
    finally:
        os.close(at)


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("this is not a regular file")
    if status.st_nlink > 1:
        raise FormatError(f"the file has {status.st_nlink} names and may be somebody else's; put a copy there")


def _place(path: str, replace: bool, own: Iterable[os.stat_result]) -> Target:
    """The target at `path`, which no link leads to."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Target(path, None, replace)
    if any(os.path.samestat(status, source) for source in own):
        raise SpecError(f"{path!r} belongs to the input; choose an output in another folder")
    if not stat.S_ISREG(status.st_mode):
        raise SpecError(f"{path!r} exists and is not a regular file; choose another folder")
    if not replace:
        raise SpecError(f"{path!r} exists; choose another folder, or --force to replace it")
    return Target(path, stat.S_IMODE(status.st_mode), replace)


class _Ready(NamedTuple):
    """A data file of the output under the name `hidden`, where it waits for all others; its status, and its place."""

    hidden: str
    status: os.stat_result
    place: Target

    def publish(self) -> None:
        """Give the file its name; FileError when another run has put its own in the place of this one."""
        if not _is_at(self.status, self.hidden):
            raise FileError(f"{self.hidden!r} was replaced while the output was written; run again")
        publish(self.hidden, self.place)
        with suppress(FileNotFoundError):
            os.unlink(self.hidden)


def _hidden(place: Target) -> Target:
    """Where a data file waits: a name that the next run to the same place takes over, should this one be killed."""
    folder, name = os.path.split(place.path)
    if os.path.realpath(folder) != folder:
        raise SpecError(f"a symbolic link leads to {folder!r}; remove it, or choose another folder")
    return Target(os.path.join(folder, hidden_name(name, "data.tmp")), place.mode, True)


def _make_folders(folder: str) -> list[str]:
    """Make `folder`; those that were missing, the outermost first."""
    missing: list[str] = []
    while not os.path.isdir(folder):
        missing.insert(0, folder)
        folder = os.path.dirname(folder)
    for path in missing:
        os.mkdir(path)
    return missing


def _remove(files: list[str], folders: list[str]) -> None:
    """Remove what a failed run has made; the failure that led here is the one to report."""
    for path in files:
        with suppress(OSError):
            os.unlink(path)
    for folder in reversed(folders):
        with suppress(OSError):
            os.rmdir(folder)


def _is_at(status: os.stat_result | None, path: str) -> bool:
    """Whether the file with this status has the name `path`."""
    try:
        return status is not None and os.path.samestat(status, os.lstat(path))
    except FileNotFoundError:
        return False


def _changed(name: str) -> FileError:
    return FileError(f"{name!r:.200} was changed by another program while it was read; run again")
