"""Where the parts of a chart stand: its width, its legend below, its axes in what ticks and names leave.

Matplotlib's own constrained layout gives the same places, but measures all letters several times, which took more than
half of the time of a chart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bellwether.report.page.parts import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 390.0  # of a chart beside another; letters are ten high
_LETTER = 6.2  # the width of a letter, about
_PAD = 3.0  # points around everything
_NEAR = 12.0  # points by which axes may differ from those whose ticks were measured


def extent(wide: bool) -> float:
    """Return the width of a chart."""
    return 2 * WIDTH + 24 if wide else WIDTH


def legend_columns(names: Sequence[str], width: float) -> int:
    """Return how many names of a legend fit side by side."""
    longest = max((len(one_line(name, 40)) for name in names), default=1)
    return max(1, min(len(names), int((width - 10) // (longest * _LETTER + 42))))


def legend_height(names: Sequence[str], width: float) -> float:
    """Return the room that a legend takes below a chart."""
    return 17.0 * math.ceil(len(names) / legend_columns(names, width)) + 8 if len(names) > 1 else 0.0


def place(figure: Figure) -> None:
    """Give a figure's axes the room that their ticks, their names and the legend below leave.

    Args:
        figure: with one pair of axes, or none; legends stand at its lower left.
    """
    if not figure.axes:
        return
    from matplotlib.backends.backend_svg import RendererSVG
    from matplotlib.transforms import Bbox

    (axes,), (width, height) = figure.axes, figure.bbox.size
    measure: Any = RendererSVG(width, height, io.StringIO(), image_dpi=72)  # type: ignore[no-untyped-call]
    below = sum(legend.get_window_extent(measure).height + 2 * _PAD for legend in figure.legends)
    room = Bbox.from_extents(_PAD, _PAD + below, width - _PAD, height - _PAD)
    inner = Bbox.from_extents(room.x0 + 40, room.y0 + 35, room.x1, room.y1)
    for _ in range(3):  # where ticks are depends on the room
        axes.set_position(inner.transformed(figure.transFigure.inverted()))
        measured, outer = inner, _outer(axes, inner, measure)
        inner = Bbox.from_extents(*(room.extents + inner.extents - outer.extents))
        if max(abs(inner.width - measured.width), abs(inner.height - measured.height)) < _NEAR:
            break
    axes.set_position(inner.transformed(figure.transFigure.inverted()))
    # Said rather than left to matplotlib, which would measure all ticks again for it.
    x, y = axes.xaxis.label, axes.yaxis.label
    axes.xaxis.set_label_coords(0.5, x.get_position()[1] * measured.height / inner.height)
    axes.yaxis.set_label_coords(y.get_position()[0] * measured.width / inner.width, 0.5)


def _outer(axes: Any, inner: Any, measure: Any) -> Any:
    """Return what axes take with their ticks and names, in points; the names are put beside the ticks.

    Args:
        axes: the axes.
        inner: their own box.
        measure: the renderer that measures letters.
    """
    from matplotlib.transforms import Bbox

    boxes = [inner]
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_visible(False)
        axis.set_label_coords(0.5, 0.5)
        ticks = axis.get_tightbbox(measure) or inner
        axis.label.set_visible(True)
        boxes.append(ticks)
        size = axis.label.get_window_extent(measure)
        if axis is axes.xaxis:
            y = min(ticks.y0, inner.y0) - axis.labelpad
            axis.set_label_coords(0.5, (y - inner.y0) / inner.height)
            named = Bbox.from_extents(inner.x0, y - size.height, inner.x0, y)
        else:
            x = min(ticks.x0, inner.x0) - axis.labelpad
            axis.set_label_coords((x - inner.x0) / inner.width, 0.5)
            named = Bbox.from_extents(x - size.width, inner.y0, x, inner.y0)
        if axis.get_label_text():
            boxes.append(named)
    return Bbox.union(boxes)
