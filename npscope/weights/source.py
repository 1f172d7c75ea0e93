"""A file that is read at offsets, and must stay as it was while that lasts.

Values are read with `preadv`: a mapped file that someone truncates kills the process.
"""

from __future__ import annotations

import copy
import errno
import os
import stat

from npscope.errors import FileError, FormatError

_CANNOT_COPY = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV}
"""How a kernel or file system says that it does not copy between these two files."""

# O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class Source:
    """A regular file with the status that it had when opened.

    It may be closed at any time: the next read opens it again and finds it unchanged, or fails.
    So a thousand of them need few descriptors. FormatError when it is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        self._fd = os.open(self.path, _FLAGS)
        try:
            self.status = os.fstat(self._fd)
            if not stat.S_ISREG(self.status.st_mode):
                raise FormatError("this is not a regular file; needed is a file of weights")
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.status.st_size

    def fill(self, into: memoryview, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on; FileError when the file ends before."""
        if self._fd < 0:
            self._reopen()
        rest = into.cast("B")
        while rest:
            # A single read returns at most 2 GiB, and less when a signal comes in between.
            got = os.preadv(self._fd, [rest], offset)
            if not got:
                raise FileError(f"{self.path!r} ends at byte {offset}; it was truncated while it was read")
            rest, offset = rest[got:], offset + got

    def copy_to(self, fd: int, offset: int, nbytes: int) -> int:
        """Append the bytes from `offset` on to the file `fd` without taking them through memory of this process.

        Returns how many of `nbytes` were copied; the file system may not know how.
        """
        if self._fd < 0:
            self._reopen()
        done = 0
        while hasattr(os, "copy_file_range") and done < nbytes:
            try:
                got = os.copy_file_range(self._fd, fd, nbytes - done, offset + done)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                break
            if not got:
                break
            done += got
        return done

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        """The `nbytes` bytes from `offset` on."""
        found = bytearray(nbytes)
        self.fill(memoryview(found), offset)
        return bytes(found)

    def check_unchanged(self) -> None:
        """FileError when another file has its name, or size or modification time are others than at opening."""
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            raise self._changed() from None
        self._compare(now)

    def close(self) -> None:
        """Give the descriptor back; once is enough, twice does no harm."""
        if self._fd >= 0:
            closing, self._fd = self._fd, -1
            os.close(closing)

    def twin(self) -> Source:
        """The same file once more, with a descriptor of its own that is opened at the first read."""
        other = copy.copy(self)
        other._fd = -1
        return other

    def _reopen(self) -> None:
        self._fd = os.open(self.path, _FLAGS)
        self._compare(os.fstat(self._fd))

    def _compare(self, now: os.stat_result) -> None:
        then = self.status
        same = os.path.samestat(then, now) and (then.st_size, then.st_mtime_ns) == (now.st_size, now.st_mtime_ns)
        if not same:
            raise self._changed()

    def _changed(self) -> FileError:
        return FileError(f"{self.path!r} was changed by another program while it was read; run again")
