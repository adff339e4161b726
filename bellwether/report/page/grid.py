"""A grid of coloured cells, of as many rows and columns as there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bellwether.report.page.axes import ROWS, add_legend, legend_name, look, name_rows, whole_ticks
from bellwether.report.page.draw import Chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Tint:
    """Cells of a grid that look alike.

    Args:
        name: in the legend; empty where it is not in it.
        cells: row and column of each.
        look: number of its colour.
        strength: how dark it is, 0..1.
        hollow: draw its frame only.
    """

    name: str
    cells: Sequence[tuple[int, int]]
    look: int = 0
    strength: float = 1.0
    hollow: bool = False


def grid(
    name: str,
    label: str,
    rows: Sequence[str],
    columns: int,
    tints: Sequence[Tint],
    axis: tuple[str, str],
    *,
    first: int = 1,
    wide: bool = True,
) -> Chart:
    """Return a grid of coloured cells.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        rows: names of the rows from the top down; more than can be named stand without names.
        columns: their number.
        tints: which cells have which colour.
        axis: what columns and rows are.
        first: number of the first column.
        wide: whether it takes the width of two.
    """
    named = len(rows) <= ROWS
    high = 14.0 * len(rows) if named else min(420.0, max(200.0, 4.0 * len(rows)))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles = [handle for tint in tints if (handle := _add_tint(axes, tint, first)) is not None]
        axes.set_xlim(first - 0.5, first + columns - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False)
        if named:
            name_rows(axes, rows)
        else:
            axes.set_yticks([])
        whole_ticks(axes.xaxis, [first, first + columns - 1])
        axes.set(xlabel=axis[0], ylabel=axis[1])
        axes.spines[["left", "bottom"]].set_visible(False)
        if handles:
            add_legend(figure, axes, handles)

    return Chart(name, label, high + 50, draw, [tint.name for tint in tints if tint.name], wide)


def _add_tint(axes: Any, tint: Tint, first: int) -> Any:
    """Draw the cells of a tint; return what stands for it in the legend, None where it has no name."""
    from matplotlib.patches import Patch, PathPatch

    colour = look(tint.look)["color"]
    style: dict[str, Any] = {
        "facecolor": "none" if tint.hollow else colour,
        "edgecolor": colour if tint.hollow else "none",
    }
    style |= {"linewidth": 1.2 if tint.hollow else 0, "alpha": tint.strength}
    if tint.cells:
        axes.add_patch(PathPatch(_squares(tint.cells, first, 0.2 if tint.hollow else 0.07), **style))
    return Patch(label=legend_name(tint.name), **style) if tint.name else None


def _squares(cells: Sequence[tuple[int, int]], first: int, gap: float) -> Any:
    """Return one path around many cells of a grid, whose first column stands at a number."""
    from matplotlib.path import Path

    reach = 0.5 - gap
    corners = ((-reach, -reach), (reach, -reach), (reach, reach), (-reach, reach), (-reach, -reach))
    points = [(first + column + x, row + y) for row, column in cells for x, y in corners]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(cells)
    return Path(points, codes)
