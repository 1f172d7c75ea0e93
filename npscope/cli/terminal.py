"""What commands write: text that any terminal takes, and a progress bar where there is one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npscope.streaming.pruning import Progress


@contextmanager
def progress_bar(*, shown: bool, what: str = "pruning") -> Iterator[Progress | None]:
    """Context with a callback that draws a bar on standard error, or None when that is no terminal."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def print_text(text: str) -> None:
    """Write to standard output; what its encoding lacks is written as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def width() -> int | None:
    """Columns of the terminal; None when standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
