"""What charts have in common: the looks of series, legends below, names of rows, scales and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bellwether.report.page.draw import DASHES, INK, MARKERS, SERIES
from bellwether.report.page.parts import one_line
from bellwether.report.page.place import legend_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = 60  # names beside an axis, at most
_LABEL = 24  # letters of a name beside an axis


def look(number: int) -> dict[str, Any]:
    """Return colour, marker and dashes by number; beyond eight, colours and markers are paired anew."""
    turn, place = divmod(number, len(SERIES))
    return {
        "color": SERIES[place],
        "marker": MARKERS[(place + turn) % len(MARKERS)],
        "linestyle": DASHES[(place + 3 * turn) % len(DASHES)],
    }


def legend_name(name: str) -> str:
    """Return a name for a legend; matplotlib hides those that begin with an underscore."""
    text = one_line(name, 40)
    return f" {text}" if text.startswith("_") else text


def add_legend(figure: Figure, axes: Axes, handles: Sequence[Any] = ()) -> None:
    """Put a legend below the axes: of the given handles, or else of what is drawn there."""
    import matplotlib

    shown: list[Any] = list(handles) or axes.get_legend_handles_labels()[0]
    labels = [str(handle.get_label()) for handle in shown]
    columns = legend_columns(labels, figure.bbox.width * 10 / matplotlib.rcParams["font.size"])
    figure.legend(shown, labels, loc="outside lower left", ncols=columns, handlelength=2.6, borderpad=0)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart, the first at the top."""
    axes.set_yticks(range(len(names)), [one_line(name, _LABEL) for name in names])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(names) - 0.5, -0.5)


def fit_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical scale logarithmic where all values are above 0 and differ much."""
    known = [value for value in values if math.isfinite(value)]
    if known and min(known) > 0 and max(known) / min(known) > 10:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
        axes.yaxis.set_major_formatter("{x:g}")


def log_ticks(axis: Any) -> None:
    """Put ticks of a logarithmic axis at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(subs=()))


def whole_ticks(axis: Any, values: Sequence[float]) -> None:
    """Put ticks at whole numbers where there is room for them, or where there are no others."""
    from matplotlib.ticker import MaxNLocator

    whole = max(values, default=0) - min(values, default=0) >= 2 or all(float(value).is_integer() for value in values)
    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=whole))
    axis.grid(visible=axis.axis_name == "y")


def short_size(value: float, _: float) -> str:
    """Return a number for an axis, thousands as k, millions as M, thousand millions as G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
