"""The report of the CuPy benchmark: its table, the CPU beside the GPU for the README, and a picture of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables import OURS, Results, table
from npscope.cli.report import milliseconds

BOTH = {
    "1x4 norms": "block_norms 1x4",
    "1x16 norms": "block_norms 1x16",
    "4x4 norms": "block_norms 4x4",
    "16x1 norms": "block_norms 16x1",
    "16x16 norms": "block_norms 16x16",
    "32x32 norms": "block_norms 32x32",
    "2:4": "2:4",
    "4:8": "4:8",
    "8:16": "8:16",
    "rows of 1024, half": "rows of 1024, half",
    "4x4 tiles, global half": "4x4 global half",
    "1x1, global half": "1x1 global half",
    "k-th of all": "kth_largest, k half",
    "soft 1x1": "soft_threshold 1x1",
    "soft 4x4": "soft_threshold 4x4",
    "soft 4x4, conditioned": "soft_threshold 4x4 conditioned",
}
"""Cases that both benchmarks have: CPU name -> GPU name."""

HOSTILE_RATIO = 3.0
SMALL_US = 60.0


def is_cuda(about: dict[str, Any]) -> bool:
    """Whether the JSON of a run is that of ``python -m bench.cuda``."""
    return "in_place_ms" in about


def load(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    return results


# --- the document --------------------------------------------------------------------------------


def document(results: dict[str, Any], pictures: list[str]) -> str:
    """Every figure of a run."""
    parts = ["# The CuPy backend on a card", heading(results), warm_table(results), hostile_table(results)]
    parts += [small_line(results), verdict(results)]
    parts += [f"![{picture}]({picture})" for picture in pictures]
    parts.append("`python -m bench.cuda --out bench/results/cuda.json` repeats it.")
    return "\n\n".join(parts) + "\n"


def heading(results: dict[str, Any]) -> str:
    torch = f", torch {results['torch']}" if results.get("torch") else ""
    return (
        f"{results['device']}, CuPy {results['cupy']}, NumPy {results['numpy']}{torch}, commit "
        f"{results['commit'][:12]}; 16384 x 16384 elements, medians of 9 rounds in milliseconds by device events, data "
        f"restored before each. Floors are made of an in-place pass ({results['in_place_ms']:.3f} ms) and a read "
        f"({results['read_ms']:.3f} ms) of 1 GiB, measured in the same run with plain float4 kernels. The other "
        "columns are what a user of that library would write."
    )


def warm_table(results: dict[str, Any]) -> str:
    rows = [row for row in results["rows"] if row["data"] == "normal"]
    peers = list(dict.fromkeys(name for row in rows for name in row.get("peers", {})))
    lines = [
        [
            row["name"], row["dtype"], f"{row['floor_ms']:.3f}", f"{row['median_ms']:.3f}", f"{row['fraction']:.2f}",
            f"{row['bar']:.2f}", "met" if _met(row) else "missed",
            *(f"{row['peers'][name]:.2f}" if name in row.get("peers", {}) else "" for name in peers),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["operation", "dtype", "floor", "npscope cupy", "of floor", "bar", "", *peers], lines)


def hostile_table(results: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(row["data"] for row in results["rows"] if row["data"] != "normal"))
    names = dict.fromkeys(row["name"] for row in results["rows"] if row["data"] != "normal")
    ratios = {(row["name"], row["data"]): _ratio(results, row) for row in results["rows"]}
    lines = [[name, *(f"{ratios[name, kind]:.2f}" for kind in kinds)] for name in names]
    return f"Hostile data, as a multiple of the time of normal data (bar {HOSTILE_RATIO:g}):\n\n" + table(
        ["operation", *kinds], lines
    )


def small_line(results: dict[str, Any]) -> str:
    calls = ", ".join(f"{name} {us:g}" for name, us in results["small_calls_us"].items())
    return f"A call on a 64x64 array, in microseconds (bar {SMALL_US:g}): {calls}."


def verdict(results: dict[str, Any]) -> str:
    missed = [f"{row['name']} {row['dtype']} ({row['fraction']:.2f}, bar {row['bar']:.2f})" for row in _judged(results)]
    slow = [row for row in results["rows"] if row["data"] != "normal" and _ratio(results, row) > HOSTILE_RATIO]
    missed += [f"{row['name']}, {row['data']} ({_ratio(results, row):.2f} x)" for row in slow]
    missed += [f"{name} of 64x64 ({us:g} us)" for name, us in results["small_calls_us"].items() if us > SMALL_US]
    total = len(results["rows"]) + len(results["small_calls_us"])
    text = f"Bars met: {total - len(missed)} of {total}."
    return text + (f" Missed: {'; '.join(missed)}." if missed else "")


def _judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["data"] == "normal" and not _met(row)]


def _met(row: dict[str, Any]) -> bool:
    return bool(row["fraction"] >= row["bar"])


def _ratio(results: dict[str, Any], row: dict[str, Any]) -> float:
    normal = next(
        other
        for other in results["rows"]
        if (other["name"], other["dtype"], other["data"]) == (row["name"], row["dtype"], "normal")
    )
    return float(row["median_ms"] / normal["median_ms"])


# --- the CPU beside it ---------------------------------------------------------------------------


def side_by_side(cpu: Results, gpu: dict[str, Any], folder: str, pictures: list[str]) -> str:
    """The section of the README."""
    pairs = _pairs(cpu, gpu)
    lines = []
    for name, host, card in pairs:
        per_gib = host.median_ms * card["elements"] / host.elements
        on_card = f"{card['median_ms']:.3f} ({card['fraction']:.2f})"
        lines.append(
            [
                name, f"{milliseconds(per_gib)} ({host.fraction:.2f})", on_card,
                f"{per_gib / card['median_ms']:.0f} x",
                *(f"{card['peers'][peer]:.2f}" if peer in card.get("peers", {}) else "" for peer in ("cupy", "torch")),
            ]
        )  # fmt: skip
    about = cpu.about
    header = ["operation", f"numba, {about['threads']} cores", "cupy, one card", "card / cores", "CuPy idiom", "torch"]
    parts = [
        "Both backends, milliseconds for 1 GiB of float32; in brackets the floor divided by that. "
        f"{about['machine']['cpu']}, {about['threads']} threads, commit {about['commit']} "
        f"(measured on {about['plan']['mib']:g} MiB and scaled); "
        f"{gpu['device']}, CuPy {gpu['cupy']}, commit {gpu['commit'][:12]}. The last two columns ran on the card. A "
        "fraction above 1 means fewer bytes moved than its floor allows for.",
        table(header, lines),
        verdict(gpu) + f" All figures: [{folder}/cuda.md]({folder}/cuda.md).",
        *(f"![{picture}]({folder}/{picture})" for picture in pictures),
    ]
    return "\n\n".join(parts)


def _pairs(cpu: Results, gpu: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    hosts = {row.case: row for row in cpu.of("warm") if row.contender == OURS}
    cards = {row["name"]: row for row in gpu["rows"] if (row["data"], row["dtype"]) == ("normal", "float32")}
    return [(name, hosts[name], cards[other]) for name, other in BOTH.items() if name in hosts and other in cards]


def draw(cpu: Results | None, gpu: dict[str, Any], folder: Path) -> list[str]:
    """The fractions of the floor that both backends reach, and the peers on the card; needs Matplotlib."""
    from matplotlib.figure import Figure

    pairs = _pairs(cpu, gpu) if cpu else [(row["name"], None, row) for row in gpu["rows"] if row.get("peers")]
    figure = Figure(figsize=(9, 1.5 + 0.34 * len(pairs)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(pairs))
    if cpu:
        axes.barh([i - 0.2 for i in places], [host.fraction for _, host, _ in pairs], 0.38, label="npscope numba")
    axes.barh([i + 0.2 for i in places], [card["fraction"] for *_, card in pairs], 0.38, label="npscope cupy")
    for number, peer in enumerate(("cupy", "torch")):
        found = [
            (i, card["floor_ms"] / card["peers"][peer]) for i, (*_, card) in enumerate(pairs) if peer in card["peers"]
        ]
        name = {"cupy": "CuPy idiom, same card", "torch": "torch, same card"}[peer]
        axes.plot([x for _, x in found], [i + 0.2 for i, _ in found], "ox"[number], color=f"C{2 + number}", label=name)
    axes.plot(
        [card["bar"] for *_, card in pairs], [i + 0.2 for i in places], "k|", markersize=9, label="bar of the card"
    )
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(list(places), [name for name, *_ in pairs], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("fraction of the floor's speed")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    name = "cpu-and-gpu.png"
    figure.savefig(folder / name, dpi=110)
    return [name]
