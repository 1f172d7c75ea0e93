"""Output of many files that appear together, or not at all.

A new folder is built beside its target and published by one rename. Files that replace those of
a folder are built inside it, in ``.NAME.npscope-partial/building``; when all are complete that
becomes ``ready``, and from then on they move to their places, now or in the next command that
looks at the folder.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from npscope.errors import FileError
from npscope.weights.output import (
    FOLDER,
    Kind,
    Target,
    check_still_there,
    claimed,
    exists,
    hidden_name,
    is_at,
    lock,
    sync_folder,
)

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


@contextmanager
def staged_folder(target: Target) -> Iterator[str]:
    """Context with the path of an empty folder that becomes `target` when the body succeeds.

    The body makes its files durable. An empty folder is replaced, anything else is not (SpecError).
    FileError when another process is building the same target.
    """
    parent, name = os.path.split(target.path)
    partial = _partial(parent, name)
    with claimed(partial, FOLDER) as fd:
        yield partial
        for folder, _, _ in os.walk(partial):
            sync_folder(folder)
        with target.named(lambda: is_at(fd, target.path)):
            check_still_there(fd, partial)
            try:
                os.rename(partial, target.path)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise exists(target.path) from None
    sync_folder(parent)


@contextmanager
def staged_inside(target: Target, name: str) -> Iterator[str]:
    """Context with the path of an empty folder whose files move into the folder `target` when the body succeeds.

    The body makes its files durable. `name` tells one user of the folder from another. FileError
    when another process is doing the same.
    """
    partial = _partial(target.path, name)
    with claimed(partial, _JOURNALLED) as fd:
        building = os.path.join(partial, "building")
        os.mkdir(building)
        yield building
        sync_folder(building)
        with target.named(lambda: os.path.lexists(_ready(partial))):
            check_still_there(fd, partial)
            os.rename(building, _ready(partial))
        sync_folder(partial)
        _move_home(partial, target.path)


def roll_forward(folder: str, name: str) -> None:
    """Finish what a `staged_inside` of the same arguments began to move, if one died doing so."""
    partial = _partial(folder, name)
    if not os.path.isdir(_ready(partial)):
        return
    fd = FOLDER.open(partial)
    try:
        lock(fd, partial)
        _move_home(partial, folder)
    finally:
        os.close(fd)


def _partial(folder: str, name: str) -> str:
    return os.path.join(folder, hidden_name(name, "partial"))


def _ready(partial: str) -> str:
    return os.path.join(partial, "ready")


def _move_home(partial: str, folder: str) -> None:
    ready = _ready(partial)
    for name in sorted(os.listdir(ready)):
        os.replace(os.path.join(ready, name), os.path.join(folder, name))
    sync_folder(folder)  # the new names are on disk before the journal is gone
    os.rmdir(ready)
    os.rmdir(partial)


def _remove_unfinished(partial: str) -> None:
    if os.path.lexists(_ready(partial)):
        raise FileError(f"{partial!r} holds finished files that are yet to move; run npscope inspect on the folder")
    shutil.rmtree(partial)


_JOURNALLED = Kind(FOLDER.create, FOLDER.open, _remove_unfinished)
