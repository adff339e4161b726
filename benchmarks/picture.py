"""The picture of the results: seconds a round per way with the floor as a line, and how bellwether's rounds grow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import ways
from benchmarks.setting import Setting

OURS_COLOUR, RIVAL_COLOUR, FLOOR_COLOUR = "#1f6f8b", "#c0c6cc", "#b3261e"
AXES = {"clients": "clients in a round", "rows": "rows a client", "hidden": "hidden size", "lengths": "length of rows"}


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw ``rounds.png`` and ``rounds.svg``; return their paths, none where there is nothing to draw."""
    from matplotlib.figure import Figure

    tables = [value for name, value in results.items() if name.startswith("rounds-") and value["table"] == "released"]
    tables.sort(key=lambda measured: measured["setting"]["hidden"])
    panels = len(tables) + ("growth" in results)
    if not tables:
        return []
    columns, lines = min(2, panels), -(-panels // 2)
    figure = Figure(figsize=(7.5 * columns, 5 * lines), layout="constrained", facecolor="white")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[panels:]:
        axis.set_axis_off()
    for axis, measured in zip(axes, tables, strict=False):
        _bars(axis, measured)
    if "growth" in results:
        _growth(axes[panels - 1], results["growth"])
    paths = [folder / "rounds.png", folder / "rounds.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _bars(axis: Any, measured: Any) -> None:
    """Draw a bar per way, the bare loops left out, and the floor."""
    bare = {row["bare"] for row in measured["ways"].values()}
    rows = {name: row for name, row in measured["ways"].items() if name not in bare}
    medians = [statistics.median(row["seconds"]) for row in rows.values()]
    colours = [OURS_COLOUR if name.startswith(ways.OURS) else RIVAL_COLOUR for name in rows]
    bars = axis.barh(list(rows), medians, color=colours)
    axis.bar_label(bars, [f"{seconds:.3g} s" for seconds in medians], padding=3, fontsize=9)
    floor = sum(measured["operations"].values()) / measured["rates"]["float32"]
    axis.axvline(floor, color=FLOOR_COLOUR, linewidth=1.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(medians))
    axis.set_xlabel(f"seconds a round; the line is the floor in float32, {floor:.3g} s")
    axis.set_title(f"As released, hidden {measured['setting']['hidden']}")
    axis.spines[["top", "right"]].set_visible(False)


def _growth(axis: Any, measured: Any) -> None:
    """Draw a line per axis of growth, each against the value that it has in the tables."""
    for name, label in AXES.items():
        points = [point for point in measured["points"] if point["axis"] == name]
        if points:
            multiples = [point["value"] / getattr(Setting(), name) for point in points]
            medians = [statistics.median(point["seconds"]) for point in points]
            least, most = points[0]["value"], points[-1]["value"]
            axis.plot(multiples, medians, marker="o", label=f"{label}, {least:g} to {most:g}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("times the value of the tables")
    axis.set_ylabel("seconds a round")
    axis.set_title("How bellwether's rounds grow")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
