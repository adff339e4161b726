"""The picture of a space of two dimensions: rows as dots, chosen ones ringed, centroids as larger marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bellwether.report.page.axes import add_legend, legend_name, look
from bellwether.report.page.charts import Series
from bellwether.report.page.draw import INK, MUTED, PAPER, Chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 460.0
_DOTS = (5.5, 4.0)  # the size of a row's mark: where rows are few, and where they are many
_FEW = 500
_MARKERS = ("o", "s", "^", "P", "v", "X", "<", ">")  # of rows; diamonds and stars are centroids
# Marks that are told from dots, and from one another, by shape and size.
_SENT = {"marker": "D", "markersize": 8.5, "color": MUTED, "markeredgecolor": PAPER, "markeredgewidth": 1.2}
_KEPT = {"marker": "*", "markersize": 18, "color": INK, "markeredgecolor": PAPER, "markeredgewidth": 1.2}
_RING = {"marker": "o", "markersize": 10.5, "color": INK, "markerfacecolor": "none", "markeredgewidth": 1.3}


@dataclass(frozen=True)
class Space:
    """What lies where.

    Args:
        dots: the rows, one series of each kind.
        rings: the rows that were chosen.
        sent: the centroids that were sent and not kept.
        kept: those that were kept.
    """

    dots: Sequence[Series]
    rings: Series
    sent: Series
    kept: Series


def space(name: str, label: str, shown: Space, axis: tuple[str, str]) -> Chart:
    """Return the picture of a space; both axes have one scale, so that distances are those of the plane.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        shown: what lies where.
        axis: what the horizontal and the upright axis are.
    """
    marks = [(one, style) for one, style in ((shown.sent, _SENT), (shown.kept, _KEPT), (shown.rings, _RING)) if one.x]
    names = [one.name for one in (*shown.dots, *(one for one, _ in marks))]

    size = _DOTS[sum(len(one.x) for one in shown.dots) > _FEW]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for one in shown.dots:
            style = look(one.look) | {
                "marker": _MARKERS[one.look % len(_MARKERS)],
                "markersize": size,
                "markeredgewidth": 0,
                "alpha": 0.75,
            }
            _plot(axes, one, style)
        for one, style in marks:
            _plot(axes, one, style)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xlabel=axis[0], ylabel=axis[1], xticks=[], yticks=[])
        axes.margins(0.04)
        add_legend(figure, axes)

    return Chart(name, label, _HEIGHT, draw, names, wide=True)


def _plot(axes: Any, one: Series, style: dict[str, Any]) -> None:
    """Draw the points of a series."""
    axes.plot(one.x, one.y, label=legend_name(one.name), **(style | {"linestyle": "none"}))
