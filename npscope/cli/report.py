"""What was done to a file, what is in one, and how fast this machine is: tables for people, JSON for programs.

Both say the same, from the same lines of plain data. Names come from files of strangers, so
nothing of them reaches a terminal that is not printable text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from npscope.cli.table import text_table

NAME_WIDTH = 100
"""Characters of a name that a table shows."""

_PIPE_WIDTH = 200  # columns of a table that no terminal limits


class Pruned(NamedTuple):
    """One tensor of a run of ``npscope prune``: what was done, or why it was `skipped`.

    `misfit`: it was meant to be pruned, but the pattern does not fit its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    pattern: str | None = None
    along: str | None = None
    blocks: int | None = None
    blocks_kept: int | None = None
    zeros_before: int | None = None
    zeros_after: int | None = None
    norm_kept: float | None = None
    skipped: str | None = None
    misfit: bool = False


class Planned(NamedTuple):
    """One tensor of a plan: what its stored `axes` mean, the `rule` that takes it, and what will be done, or why not.

    `keep` of `blocks` blocks survive, which is unknown where tensors of one `group` compete.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    rule: str
    pattern: str | None = None
    along: str | None = None
    blocks: int | None = None
    keep: int | None = None
    group: str | None = None
    skipped: str | None = None
    misfit: bool = False


class Inspected(NamedTuple):
    """One tensor of a file: its zeros and NaN where its dtype can be pruned, and what was detected in it.

    `groups` are ``{"keep": N, "of": M, "along": axis}``, `blocks` ``{"size": [rows, columns], "zero":
    how many are zero, "blocks": of how many}``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    zeros: int | None = None
    nans: int | None = None
    groups: tuple[Mapping[str, Any], ...] = ()
    blocks: tuple[Mapping[str, Any], ...] = ()


class Verified(NamedTuple):
    """One tensor or budget of a run of ``npscope verify``: whether its pattern `holds`, or why it was `skipped`.

    `offending` scopes have too many blocks in use. The first of them has the index `scope` in the
    ``[out, in, ...]`` grid of scopes and begins at `start` of the tensor as it was saved; `used` of its
    blocks are not zero. For a budget `used` is the sum over its tensors.
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...] | None
    pattern: str | None = None
    along: str | None = None
    holds: bool | None = None
    scopes: int | None = None
    offending: int | None = None
    scope: tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None
    used: int | None = None
    skipped: str | None = None
    misfit: bool = False


class Differing(NamedTuple):
    """One tensor of a run of ``npscope diff``; the counts are those of `npscope.streaming.comparison.Difference`."""

    name: str
    status: str
    dtypes: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    elements: int | None
    differing: int
    zeros: int
    nans: int
    first: tuple[int, ...] | None
    largest: float | int | None


def verified_fields(lines: Sequence[Verified]) -> dict[str, Any]:
    """The lines and their totals, ready for JSON."""
    totals = {
        "checked": sum(line.holds is not None for line in lines),
        "failed": sum(line.holds is False for line in lines),
        "skipped": sum(line.skipped is not None for line in lines),
        "misfits": sum(line.misfit for line in lines),
    }
    return {"tensors": [line._asdict() for line in lines], "totals": totals, "holds": not totals["failed"]}


def verified_table(lines: Sequence[Verified], *, width: int | None) -> str:
    """A table of the lines with a last line of totals; `width` None is for pipes and files."""
    totals = verified_fields(lines)["totals"]
    text = _table(("tensor", "dtype", "shape", "pattern", "found"), map(_verified_cells, lines), width)
    if any(line.scope is not None for line in lines):
        text += (
            "first: the index of a scope in the grid of scopes of [out, in, ...], and of its first element in the "
            "tensor as it was saved\n"
        )
    return (
        f"{text}checked {totals['checked']}, of which {totals['failed']} failed; skipped {totals['skipped']} "
        f"({totals['misfits']} could not take the pattern)\n"
    )


def _verified_cells(line: Verified) -> tuple[str, ...]:
    lead = (line.name, line.dtype or "", "" if line.shape is None else _shape(line.shape))
    if line.skipped is not None:
        return (*lead, f"skipped: {line.skipped}", "")
    pattern = line.pattern if line.along is None else f"{line.pattern}, {line.along}"
    if line.holds:
        return (*lead, pattern or "", "holds")
    if line.scope is None:
        return (*lead, pattern or "", f"FAILS: {line.used} in use")
    start = "" if line.start is None else f" at {list(line.start)}"
    where = f"{list(line.scope)}{start}: {line.used} in use"
    return (*lead, pattern or "", f"FAILS in {line.offending} of {line.scopes} scopes, first {where}")


def differing_fields(lines: Sequence[Differing]) -> dict[str, Any]:
    """The lines and their totals, ready for JSON."""
    unequal = sum(line.status != "equal" for line in lines)
    totals = {"tensors": len(lines), "equal": len(lines) - unequal, "unequal": unequal}
    return {"tensors": [line._asdict() for line in lines], "totals": totals, "equal": not unequal}


def differing_table(lines: Sequence[Differing], *, width: int | None) -> str:
    """A table of the tensors that are not equal, and a last line of totals; `width` None is for pipes and files."""
    totals = differing_fields(lines)["totals"]
    unequal = [_differing_cells(line) for line in lines if line.status != "equal"]
    text = _table(("tensor", "difference", "elements", "first at", "largest"), unequal, width) if unequal else ""
    return f"{text}{totals['equal']} of {totals['tensors']} tensors are equal\n"


def _differing_cells(line: Differing) -> tuple[str, ...]:
    if line.status != "values":
        sides = line.dtypes if line.status == "dtype" else [None if s is None else _shape(s) for s in line.shapes]
        shown = "" if None in sides else f": {sides[0]} and {sides[1]}"
        return (line.name, f"{line.status}{shown}", "", "", "")
    bits = [
        f"{count} only {what}" for count, what in ((line.zeros, "sign of zero"), (line.nans, "bits of NaN")) if count
    ]
    return (
        line.name,
        "values" + (f" ({', '.join(bits)})" if bits else ""),
        f"{line.differing} of {line.elements}",
        str(list(line.first or ())),
        "" if line.largest is None else f"{line.largest:.6g}",
    )


def as_json(fields: Mapping[str, Any]) -> str:
    """`fields` as one line of ASCII JSON; None stands where a number is undefined, never NaN."""
    return json.dumps(fields, allow_nan=False)


def pruned_fields(lines: Sequence[Pruned]) -> dict[str, Any]:
    """The lines and their totals, ready for JSON."""
    pruned = [line for line in lines if line.skipped is None]
    elements = sum(line.elements for line in pruned)
    zeros = sum(line.zeros_after or 0 for line in pruned)
    totals = {
        "tensors": len(lines),
        "pruned": len(pruned),
        "skipped": len(lines) - len(pruned),
        "misfits": sum(line.misfit for line in lines),
        "elements": elements,
        "zeros_before": sum(line.zeros_before or 0 for line in pruned),
        "zeros_after": zeros,
        "sparsity": _share(zeros, elements),
    }
    return {"tensors": [line._asdict() for line in lines], "totals": totals}


def planned_fields(lines: Sequence[Planned]) -> dict[str, Any]:
    """The lines and their totals, ready for JSON."""
    skipped = sum(line.skipped is not None for line in lines)
    totals = {
        "tensors": len(lines),
        "pruned": len(lines) - skipped,
        "skipped": skipped,
        "misfits": sum(line.misfit for line in lines),
    }
    return {"tensors": [line._asdict() for line in lines], "totals": totals}


def inspected_fields(lines: Sequence[Inspected]) -> dict[str, Any]:
    """The lines and their totals, ready for JSON."""
    counted = [line for line in lines if line.zeros is not None]
    elements = sum(line.elements for line in counted)
    zeros = sum(line.zeros or 0 for line in counted)
    totals = {
        "tensors": len(lines),
        "elements": elements,
        "zeros": zeros,
        "nans": sum(line.nans or 0 for line in counted),
        "sparsity": _share(zeros, elements),
    }
    return {
        "tensors": [line._asdict() | {"sparsity": _share(line.zeros, line.elements)} for line in lines],
        "totals": totals,
    }


def pruned_table(lines: Sequence[Pruned], *, width: int | None) -> str:
    """A table of the lines with a last line of totals; `width` None is for pipes and files."""
    totals = pruned_fields(lines)["totals"]
    header = ("tensor", "dtype", "shape", "pattern", "blocks kept", "zeros before", "after", "norm kept")
    text = _table(header, (_pruned_cells(line) for line in lines), width)
    return (
        f"{text}pruned {totals['pruned']} of {totals['tensors']} tensors "
        f"({totals['misfits']} could not take the pattern): zeros in them "
        f"{_percent(totals['zeros_before'], totals['elements'])} before, "
        f"{_percent(totals['zeros_after'], totals['elements'])} after\n"
    )


def planned_table(lines: Sequence[Planned], *, width: int | None) -> str:
    """A table of the lines with a last line of totals; `width` None is for pipes and files."""
    totals = planned_fields(lines)["totals"]
    header = ("tensor", "dtype", "shape", "axes", "rule", "plan", "blocks")
    text = _table(header, (_planned_cells(line) for line in lines), width)
    return (
        f"{text}{totals['pruned']} of {totals['tensors']} tensors to prune "
        f"({totals['misfits']} cannot take the pattern)\n"
    )


def inspected_table(lines: Sequence[Inspected], *, width: int | None) -> str:
    """A table of the lines with a last line of totals; `width` None is for pipes and files."""
    totals = inspected_fields(lines)["totals"]
    header = ("tensor", "dtype", "shape", "zeros", "NaN", "detected")
    text = _table(header, (_inspected_cells(line) for line in lines), width)
    return (
        f"{text}{totals['tensors']} tensors: {totals['elements']} elements of floats and int8, "
        f"{_percent(totals['zeros'], totals['elements'])} zero, {totals['nans']} NaN\n"
    )


def storage_line(*, now: int, bitmask: int, deflated: int) -> str:
    """What the pruned tensors take, and would take without their zeros."""
    return (
        f"their bytes: {now} now, {bitmask} as values and a bitmask ({_percent(bitmask, now)}), "
        f"about {deflated} deflated ({_percent(deflated, now)})\n"
    )


def plain_table(lines: Sequence[Mapping[str, Any]], *, width: int | None) -> str:
    """A table with a column for each key of the lines."""
    if not lines:
        return ""
    titles = [key.replace("_", " ") for key in lines[0]]
    rows = ([_shape(cell) if isinstance(cell, tuple) else str(cell) for cell in line.values()] for line in lines)
    return _table(titles, rows, width)


def bench_table(results: Mapping[str, Any], *, width: int | None) -> str:
    """Each operation beside its floor, a column for every contender, then which backend to use for what."""
    rows = results["rows"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["contender"]: row for row in rows if row["case"] == case}
        full = max(found.values(), key=lambda row: row["elements"])
        lines.append(
            (case, milliseconds(full["floor_ms"]), *(_timing(found.get(name), full["elements"]) for name in names))
        )
    table = _table(("operation", "floor ms", *(f"{name} ms (of floor)" for name in names)), lines, width)
    uses = (
        f"{group}: use {use['backend']}, "
        + ", ".join(f"{times:.2g} times as fast as {name}" for name, times in use["times_as_fast_as"].items())
        for group, use in results["use"].items()
    )
    return f"{table}~ measured on a part of the array, and scaled\n" + "".join(f"{line}\n" for line in uses)


def milliseconds(value: float) -> str:
    """A time as in a table.

    >>> milliseconds(0.01234), milliseconds(1234.5)
    ('0.0123', '1234')
    """
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def printable(text: str, limit: int | None = None) -> str:
    r"""`text` on one line, control characters, escapes and half surrogates as backslash sequences.

    >>> print(printable("a\x1b[31m b\n"))
    a\x1b[31m b\n
    """
    cut = text if limit is None or len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def _pruned_cells(line: Pruned) -> tuple[str, ...]:
    lead = (line.name, line.dtype, _shape(line.shape))
    if line.skipped is not None:
        return (*lead, f"skipped: {line.skipped}", "", "", "", "")
    return (
        *lead,
        f"{line.pattern}, {line.along}",
        f"{line.blocks_kept} of {line.blocks}",
        _percent(line.zeros_before, line.elements),
        _percent(line.zeros_after, line.elements),
        "" if line.norm_kept is None else f"{line.norm_kept:.4f}",
    )


def _planned_cells(line: Planned) -> tuple[str, ...]:
    lead = (line.name, line.dtype, _shape(line.shape), " x ".join(line.axes), line.rule)
    if line.skipped is not None:
        return (*lead, f"skipped: {line.skipped}", "")
    return (*lead, f"{line.pattern}, {line.along}", str(line.blocks))


def _inspected_cells(line: Inspected) -> tuple[str, ...]:
    lead = (line.name, line.dtype, _shape(line.shape))
    if line.zeros is None:
        return (*lead, "", "", "")
    found = [f"keep {group['keep']} of {group['of']}, {group['along']}" for group in line.groups]
    found += [
        f"{_percent(block['zero'], block['blocks'])} of blocks {_shape(block['size'])} zero" for block in line.blocks
    ]
    return (*lead, _percent(line.zeros, line.elements), str(line.nans or ""), "; ".join(found))


def _timing(row: Mapping[str, Any] | None, elements: int) -> str:
    if row is None:
        return ""
    about = "~" if row["elements"] < elements else ""
    return f"{about}{milliseconds(row['median_ms'] * elements / row['elements'])} ({row['fraction']:.2g})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None) -> str:
    return (
        text_table(header, ([printable(cell, NAME_WIDTH) for cell in row] for row in rows), width or _PIPE_WIDTH) + "\n"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _share(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole


def _percent(part: int | None, whole: int) -> str:
    share = _share(part, whole)
    # Rounded down: 100 % means all.
    return "" if share is None else f"{math.floor(share * 10000) / 100:.2f} %"
