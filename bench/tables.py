"""Markdown from the JSON of a run: the full tables, and the section of the README, losses included."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import OURS
from bench.cold import WITHOUT_SCIPY
from npscope.cli.report import milliseconds
from npscope.clock import FAILED_ABOVE, Row

TITLES = {
    "hostile": "Hostile data: time as a multiple of that of normal data",
    "small": "64x64 arrays: microseconds",
    "cold": "Fresh processes: milliseconds",
    "size": "Sizes",
    "threads": "Threads",
}


@dataclass(frozen=True)
class Results:
    """The JSON of a run, its rows as `Row`."""

    about: dict[str, Any]
    rows: list[Row]

    def of(self, section: str) -> list[Row]:
        return [row for row in self.rows if row.section == section]


def load(path: Path) -> Results:
    about = json.loads(path.read_text())
    return Results(about, [Row(**row) for row in about.pop("rows")])


# --- documents -----------------------------------------------------------------------------------


def document(results: Results, pictures: Sequence[str]) -> str:
    """Every figure of a run."""
    parts = ["# Benchmark", heading(results), warm_table(results), notes(results), losses(results)]
    parts += [f"![{picture}]({picture})" for picture in pictures]
    for section, title in TITLES.items():
        if results.of(section):
            parts += [f"## {title}", _SECTIONS[section](results.of(section))]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Results, folder: str, name: str, pictures: Sequence[str]) -> str:
    """The section of the README: the cases that have a bar, and what was lost."""
    barred = {row.case for row in results.of("warm") if row.bar is not None and ", ord " not in row.case}
    shown = Results(results.about, [row for row in results.rows if row.case in barred])
    parts = [heading(results), warm_table(shown), notes(shown), losses(results)]
    parts += [f"![{picture}]({folder}/{picture})" for picture in pictures[:1]]
    parts += [f"All figures: [{folder}/{name}.md]({folder}/{name}.md); to repeat them: `python -m bench`."]
    return "\n\n".join(part for part in parts if part)


def rewritten(readme: str, section: str, name: str = "bench") -> str:
    """`readme` with `section` between the two marks of this name."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"the README has no {first} .. {last}")
    return f"{before}{first}\n{section}\n{last}{after}"


# --- their parts ---------------------------------------------------------------------------------


def heading(results: Results) -> str:
    about = results.about
    machine, plan = about["machine"], about["plan"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    times = about.get("arithmetic_of_threads")
    shared = f" that do {times:g} times the arithmetic of one" if times else ""
    return (
        f"{machine['cpu']}, {about['threads']} threads of {machine['cores']} cores{shared}, "
        f"{machine['ram_gib']} GiB, {machine['system']}; {versions}; commit {about['commit']}. "
        f"Arrays of {plan['mib']:g} MiB (float32). "
        "Milliseconds, medians of interleaved rounds; in brackets the floor divided by that, the floor being the time "
        "that the necessary passes over the array take in the same rounds."
    )


def warm_table(results: Results) -> str:
    rows = results.of("warm")
    if not rows:
        return ""
    names = sorted(_unique(row.contender for row in rows), key=lambda name: name != OURS)
    unable = {(entry["case"], entry["contender"]) for entry in results.about["unable"]}
    lines = []
    for case in _unique(row.case for row in rows):
        found = {row.contender: row for row in rows if row.case == case}
        full = max(found.values(), key=lambda row: row.elements)
        cells = [_cell(found.get(name), full.elements, failed=(case, name) in unable) for name in names]
        ours = found.get(OURS, full)
        verdict = [_spread(ours), _bar(ours), _verdict(ours)]
        lines.append([case, milliseconds(full.floor_ms or 0), *cells, *verdict])
    return table(["operation", "floor", *names, "spread", "bar", ""], lines)


def notes(results: Results) -> str:
    """What the marks in the table mean, where there are any."""
    rows = results.of("warm")
    if not rows:
        return ""
    largest = {row.case: max(r.elements for r in rows if r.case == row.case) for row in rows}
    parts = ["Spread: quartiles of npscope numba, of its median."]
    if any(row.elements < largest[row.case] for row in rows):
        parts.append(f"~ measured on {results.about['plan']['slow_mib']:g} MiB and scaled.")
    shown = [entry for entry in results.about["unable"] if entry["case"] in largest]
    for name in _unique(entry["contender"] for entry in shown):
        reason = next(entry["reason"] for entry in shown if entry["contender"] == name)
        parts.append(f"fails: {name} raises `{reason}`.")
    return " ".join(parts)


def losses(results: Results) -> str:
    """Bars that were missed, peers that were faster, and figures that cannot be right."""
    judged = [row for row in results.rows if row.verdict and row.bar is not None]
    met = [row for row in judged if row.verdict == "met"]  # not those that cannot be right
    missed = [f"{_label(row)} ({_measured(row)}, bar {_bar(row)})" for row in judged if row.verdict == "missed"]
    parts = []
    if judged:
        parts.append(f"Bars met: {len(met)} of {len(judged)}." + _listed(" Missed: ", missed))
    compared = [row for row in results.rows if row.section in ("warm", "small")]
    if compared:
        ahead = list(_faster_peers(compared))
        parts.append(_listed("Others are faster than npscope numba at: ", ahead) or "Nothing else was faster.")
    failed = [
        f"{_label(row)} of {_mib(row)} MiB by {row.contender} ({row.fraction})"
        for row in results.rows
        if row.verdict == "failed"
    ]
    parts.append(_listed(f"Failed measurements (above {FAILED_ABOVE} of the floor): ", failed))
    return "\n\n".join(part for part in parts if part)


def _faster_peers(rows: Sequence[Row]) -> Iterable[str]:
    """Each case at which others are faster, with how many times as fast they are."""
    for case in _unique(row.case for row in rows):
        each = {row.contender: row.median_ms / row.elements for row in rows if row.case == case}
        ours = each.get(OURS, 0.0)
        ahead = [f"{name} {ours / time:.2f} x" for name, time in each.items() if time < ours]
        if ahead:
            yield f"{case} ({', '.join(ahead)})"


def _hostile_table(rows: Sequence[Row]) -> str:
    kinds = list(_unique(row.data for row in rows))
    costs = {(row.case, row.data): "" if row.cost is None else f"{row.cost:.2f}" for row in rows}
    lines = [[case, *(costs.get((case, kind), "") for kind in kinds)] for case in _unique(row.case for row in rows)]
    return table(["operation", *kinds], lines)


def _small_table(rows: Sequence[Row]) -> str:
    names = sorted(_unique(row.contender for row in rows), key=lambda name: name != OURS)
    lines = []
    for case in _unique(row.case for row in rows):
        found = {row.contender: row for row in rows if row.case == case}
        cells = [f"{1e3 * found[name].median_ms:.3g}" if name in found else "" for name in names]
        lines.append([case, *cells, _bar(found[OURS]), _verdict(found[OURS])])
    return table(["operation", *names, "bar", ""], lines)


def _cold_table(rows: Sequence[Row]) -> str:
    bare = {row.case: milliseconds(row.median_ms) for row in rows if row.contender == WITHOUT_SCIPY}
    beside = ["without SciPy"] if bare else []
    lines = [
        [row.case, milliseconds(row.median_ms), _spread(row), *(bare.get(row.case, "") for _ in beside), _bar(row),
         _verdict(row)]
        for row in rows
        if row.contender != WITHOUT_SCIPY
    ]  # fmt: skip
    return table(["what", "ms", "spread", *beside, "bar", ""], lines)


def _curve_table(rows: Sequence[Row]) -> str:
    lines = [
        [
            row.case, _mib(row), str(row.threads), row.contender,
            milliseconds(row.floor_ms or 0), milliseconds(row.median_ms), f"{row.fraction:.2g}",
        ]
        for row in rows
    ]  # fmt: skip
    return table(["operation", "MiB", "threads", "contender", "floor", "ms", "of floor"], lines)


_SECTIONS = {
    "hostile": _hostile_table,
    "small": _small_table,
    "cold": _cold_table,
    "size": _curve_table,
    "threads": _curve_table,
}


# --- cells ---------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def _cell(row: Row | None, elements: int, *, failed: bool) -> str:
    if row is None:
        return "fails" if failed else ""
    about = "~" if row.elements < elements else ""
    return f"{about}{milliseconds(row.median_ms * elements / row.elements)} ({row.fraction:.2g})"


def _spread(row: Row) -> str:
    return f"{100 * (row.q3 - row.q1) / row.median_ms:.0f} %"


def _bar(row: Row) -> str:
    if row.bar is None:
        return ""
    unit = f"{row.bar:g} ms" if row.bar >= 1 else f"{1e3 * row.bar:g} us"
    return {"fraction": f"{row.bar:g}", "ms": unit, "added": f"+{unit}", "ratio": f"{row.bar:g} x"}[row.judged_by]


def _measured(row: Row) -> str:
    if row.cost is None:
        return f"{row.fraction:.3g}"  # a digit more than elsewhere, for 0.599 is not 0.6
    if row.judged_by == "ratio":
        return f"{row.cost:.2f} x"
    return f"{row.cost:.0f} ms" if row.cost >= 1 else f"{1e3 * row.cost:.3g} us"


def _verdict(row: Row) -> str:
    return {"failed": "failed measurement"}.get(row.verdict, row.verdict)


def _label(row: Row) -> str:
    return row.case if row.data == "normal" else f"{row.case}, {row.data}"


def _mib(row: Row) -> str:
    """The size of as many float32."""
    return f"{row.elements * 4 / 2**20:g}"


def _listed(title: str, entries: Sequence[str]) -> str:
    return title + "; ".join(entries) + "." if entries else ""


def _unique(values: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(values)
