"""Draw the README's plots from the tables of ``measured.md``, as SVG that needs no script and no font of its own.

    python docs/plots.py

A plot shows every arm's mean as a dot, its 95 % interval as a line, and the mean in figures. It stands on a ground of
its own, light or dark as the reader's system is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent
PAGE, IMAGES = DOCS / "measured.md", DOCS / "images"

WIDTH, LABELS, RIGHT = 560, 214, 62  # of the picture, and of what stands left and right of the axis, in pixels
LINE, HEAD, FOOT = 30, 52, 34  # heights of a line, of the title above the lines, and of the ticks below them
STYLE = """\
text { font: 15px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
.title { font-weight: 600; } .tick { font-size: 12px; fill: #59636e; } .ours { font-weight: 600; }
.ground { fill: #ffffff; stroke: #d1d9e0; } .grid { stroke: #d1d9e0; }
.interval { stroke: #59636e; stroke-width: 2.5; } .mean { fill: #59636e; }
.ours.interval { stroke: #0b62b0; } .ours.mean, text.ours { fill: #0b62b0; }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc; } .tick { fill: #b1bac4; }
.ground { fill: #0d1117; stroke: #3d444d; } .grid { stroke: #3d444d; }
.interval { stroke: #b1bac4; } .mean { fill: #b1bac4; }
.ours.interval { stroke: #6cb6ff; } .ours.mean, text.ours { fill: #6cb6ff; }
}
"""


@dataclass(frozen=True)
class Panel:
    """One axis with a line for each arm.

    Args:
        title: what is scored, with its unit.
        column: the head of the table's column that holds it.
        arms: from the names of the table's lines to what the plot calls them.
        ours: the name of the line that stands out.
        ticks: values at which the axis is marked; it begins with the first and ends with the last.
    """

    title: str
    column: str
    arms: Mapping[str, str]
    ours: str
    ticks: Sequence[float]

    @property
    def height(self) -> int:
        """Its height in pixels."""
        return HEAD + LINE * len(self.arms) + FOOT


SHARES = (0, 25, 50, 75, 100)
FEW = {
    "base, untuned": "untuned base",
    "all rows": "all rows",
    "all rows, as few steps as below": "all rows, few steps",
    "rows chosen as by FedHDS": "few rows, by FedHDS",
    "as many random rows": "few rows, at random",
}
PLOTS = {
    "federating.svg": [
        Panel(
            "Exact match on all eight categories, %",
            "exact match, %",
            {
                "base": "untuned base",
                "nearest row": "nearest training row",
                "local": "a client alone",
                "federated": "federated",
                "centralized": "all rows in one place",
            },
            "federated",
            SHARES,
        )
    ],
    "own-categories.svg": [
        Panel(
            "Exact match on a client's own categories, %",
            "exact match, %",
            {
                "local, own categories": "that client alone",
                "federated, own categories of local": "federated",
                "centralized, own categories of local": "all rows in one place",
            },
            "federated, own categories of local",
            SHARES,
        )
    ],
    "few-rows.svg": [
        Panel(
            "Loss on categories nobody trained on (less is better)", "loss", FEW, "rows chosen as by FedHDS", (0, 1, 2)
        ),
        Panel(
            "ROUGE-L on them, % (more is better)", "ROUGE-L, %", FEW, "rows chosen as by FedHDS", (0, 10, 20, 30, 40)
        ),
    ],
}


def tables(page: str) -> dict[str, dict[str, str]]:
    """Return the lines of a page's tables by their first cell, each as its cells by the head of their column.

    Of two columns with one head the first is taken, and of two lines with one name: later tables repeat names of arms.
    """
    lines: dict[str, dict[str, str]] = {}
    for table in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE):
        head, _, *rest = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        for cells in rest:
            lines.setdefault(cells[0], dict(reversed(list(zip(head, cells, strict=True)))))
    return lines


def interval(cell: str) -> tuple[float, float, float]:
    """Return mean, low and high of a cell such as ``0.241 (0.198 to 0.287)``."""
    found = re.fullmatch(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)", cell)
    if found is None:
        raise ValueError(f"{cell!r} is no mean with an interval")
    mean, low, high = map(float, found.groups())
    return mean, low, high


def draw(panels: Sequence[Panel], lines: Mapping[str, Mapping[str, str]]) -> str:
    """Return a plot as SVG, its panels one below the other."""
    height = sum(panel.height for panel in panels)
    parts, top = [], 0
    for panel in panels:
        parts += _panel(panel, lines, top)
        top += panel.height
    told = "; ".join(_told(panel, lines) for panel in panels)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img">\n<title>{html.escape(told)}</title>\n<style>\n{STYLE}</style>\n'
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>\n{body}\n</svg>\n'
    )


def _told(panel: Panel, lines: Mapping[str, Mapping[str, str]]) -> str:
    """Return a panel in words, for those who do not see it."""
    return f"{panel.title}: " + ", ".join(f"{label} {lines[arm][panel.column]}" for arm, label in panel.arms.items())


def _panel(panel: Panel, lines: Mapping[str, Mapping[str, str]], top: int) -> list[str]:
    """Return the elements of a panel."""
    first, last = panel.ticks[0], panel.ticks[-1]
    widest = max(last, *(interval(lines[arm][panel.column])[2] for arm in panel.arms))

    def x(value: float) -> str:
        return f"{LABELS + (WIDTH - LABELS - RIGHT) * (value - first) / (widest - first):.1f}"

    start, end = top + HEAD - 8, top + HEAD + LINE * len(panel.arms)
    parts = [f'<text class="title" x="16" y="{top + 28}">{html.escape(panel.title)}</text>']
    for tick in panel.ticks:
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{start}" y2="{end}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x(tick)}" y="{end + 18}">{tick:g}</text>')
    for number, (arm, label) in enumerate(panel.arms.items()):
        cell = lines[arm][panel.column]
        mean, low, high = interval(cell)
        y, ours = top + HEAD + LINE * number + LINE // 2 - 4, "ours " if arm == panel.ours else ""
        parts += [
            f'<text class="{ours}label" x="16" y="{y + 5}">{html.escape(label)}</text>',
            f'<line class="{ours}interval" x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}"/>',
            f'<circle class="{ours}mean" cx="{x(mean)}" cy="{y}" r="5"/>',
            f'<text class="{ours}value" text-anchor="end" x="{WIDTH - 14}" y="{y + 5}">{cell.split()[0]}</text>',
        ]
    return parts


def main() -> None:
    """Draw all plots."""
    lines = tables(PAGE.read_text(encoding="utf-8"))
    for name, panels in PLOTS.items():
        (IMAGES / name).write_text(draw(panels, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
