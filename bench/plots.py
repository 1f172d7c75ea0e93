"""Pictures from the rows of a run: roofline bars, size curve, thread curve, backends side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.tables import OURS, Results
from npscope.clock import Row


def draw(results: Results, folder: Path, name: str) -> list[str]:
    """Write every picture that `results` has rows for as ``NAME-*.png``; their file names. Needs Matplotlib."""
    from matplotlib.figure import Figure

    written = []
    for kind, (section, plot) in _PLOTS.items():
        rows = results.of(section)
        if not rows:
            continue
        cases = list(dict.fromkeys(row.case for row in rows))
        tall = kind in ("roofline", "backends")
        figure = Figure(figsize=(9, 1.5 + 0.25 * len(cases)) if tall else (7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        plot(axes, rows, cases)
        if not tall:
            axes.legend(fontsize="small")
        figure.savefig(folder / f"{name}-{kind}.png", dpi=110)
        written.append(f"{name}-{kind}.png")
    return written


def _roofline(axes: Any, rows: list[Row], cases: list[str]) -> None:
    ours = {row.case: row for row in rows if row.contender == OURS}
    axes.barh(cases, [ours[case].fraction if case in ours else 0 for case in cases], color="C0", label=OURS)
    best: dict[str, float] = {}
    for row in rows:
        if row.fraction is not None and not row.contender.startswith("npscope"):
            best[row.case] = max(row.fraction, best.get(row.case, 0.0))
    if best:
        axes.plot([*best.values()], [*best], "C1o", markersize=4, label="best other library")
    bars = [row for row in ours.values() if row.bar is not None]
    axes.plot([row.bar for row in bars], [row.case for row in bars], "k|", markersize=10, label="bar")
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_xlabel("fraction of the floor's speed")
    _from_the_top(axes)


def _backends(axes: Any, rows: list[Row], cases: list[str]) -> None:
    full = {case: max(row.elements for row in rows if row.case == case) for case in cases}
    for name in dict.fromkeys(row.contender for row in rows):
        found = [row for row in rows if row.contender == name]
        times = [row.median_ms * full[row.case] / row.elements for row in found]
        axes.plot(times, [row.case for row in found], "o", markersize=5, label=name)
    floors = {row.case: row.floor_ms for row in rows if row.elements == full[row.case]}
    axes.plot([floors[case] for case in cases], cases, "k|", markersize=10, label="floor")
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    _from_the_top(axes)


def _from_the_top(axes: Any) -> None:
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _sizes(axes: Any, rows: list[Row], cases: list[str]) -> None:
    for number, case in enumerate(cases):
        for name, line in ((OURS, "o-"), ("numpy", "x:")):
            found = [row for row in rows if row.case == case and row.contender == name]
            mib = [row.elements * 4 / 2**20 for row in found]
            axes.plot(mib, [row.fraction for row in found], line, color=f"C{number}", label=f"{case}, {name}")
    sizes = sorted({row.elements * 4 / 2**20 for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{1024 * s:g} KiB" if s < 1 else f"{s:g} MiB" for s in sizes], rotation=45)
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    axes.set_ylabel("fraction of the floor's speed")


def _threads(axes: Any, rows: list[Row], cases: list[str]) -> None:
    for number, case in enumerate(cases):
        found = [row for row in rows if row.case == case]
        counts = [row.threads for row in found]
        axes.plot(counts, [row.median_ms for row in found], "o-", color=f"C{number}", label=case)
        axes.plot(counts, [row.floor_ms for row in found], "x:", color=f"C{number}", label=f"{case}, floor")
    axes.set_yscale("log")
    axes.set_xlabel("threads")
    axes.set_ylabel("milliseconds")


Plot = Callable[[Any, list[Row], list[str]], None]

_PLOTS: dict[str, tuple[str, Plot]] = {
    "roofline": ("warm", _roofline),
    "backends": ("warm", _backends),
    "sizes": ("size", _sizes),
    "threads": ("threads", _threads),
}
