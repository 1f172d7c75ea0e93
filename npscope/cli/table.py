"""Columns of text, folded to a width.

rich.table takes fifteen times as long, 0.3 ms a line, and files have thousands of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_GAP = "   "


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> str:
    """Lines of a table, none wider than `width` columns of a terminal unless that leaves less than two for each.

    Cells are printable text without line breaks. The widest columns are narrowed first, and their
    cells folded, between words where these fit.

    >>> print(text_table(("name", "found"), [("a", "keep 2 of 4"), ("long", "")], 15), end="")
    name   found
    ---------------
    a      keep 2
           of 4
    long
    """
    cells = [header, *rows]
    widths = [max(map(_columns, column)) for column in zip(*cells, strict=True)]
    most = None if width is None else max(width - len(_GAP) * (len(widths) - 1), 2 * len(widths))
    while most is not None and sum(widths) > most:
        widths[widths.index(max(widths))] -= 1
    title, *lines = ("".join(_lines(row, widths)) for row in cells)
    rule = "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))
    return f"{title}{rule}\n{''.join(lines)}"


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    """The cells of one row side by side, on as many lines as the highest takes."""
    folded = [_folded(cell, size) for cell, size in zip(row, widths, strict=True)]
    for at in range(max(map(len, folded))):
        texts = [lines[at] if at < len(lines) else "" for lines in folded]
        padded = [text + " " * (size - _columns(text)) for text, size in zip(texts, widths, strict=True)]
        yield _GAP.join(padded).rstrip() + "\n"


def _folded(cell: str, width: int) -> list[str]:
    """A cell on lines of at most `width` columns, which end between words where these fit."""
    if _columns(cell) <= width:
        return [cell]
    lines: list[str] = []
    for word in re.findall(" *[^ ]+", cell):
        if lines and _columns(lines[-1] + word) <= width:
            lines[-1] += word
        else:
            lines.append("")
            for character in word.lstrip(" "):
                if lines[-1] and _columns(lines[-1] + character) > width:
                    lines.append("")
                lines[-1] += character
    return lines


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
