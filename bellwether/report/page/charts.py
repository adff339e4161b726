"""The kinds of charts that a report has: each takes names and numbers.

Names are cut to what a label holds, and their hidden characters are shown (``parts.one_line``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bellwether.report.page.axes import (
    ROWS,
    add_legend,
    fit_scale,
    legend_name,
    log_ticks,
    look,
    name_rows,
    short_size,
    whole_ticks,
)
from bellwether.report.page.curves import reach, smoothed
from bellwether.report.page.draw import INK, MUTED, PAPER, SERIES, Chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKED = 30  # points of a line that are still marked one by one


@dataclass(frozen=True)
class Series:
    """Points that belong together, in the order of ``x``.

    Args:
        name: in the legend.
        x: places.
        y: values.
        low: lower ends of intervals, or of a band; empty where there are none.
        high: upper ends.
        look: number of its colour, marker and dashes.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    look: int = 0


def lines(
    name: str,
    label: str,
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    height: float = 240,
    wide: bool = False,
    smooth: bool = False,
) -> Chart:
    """Return curves, with bands where series have them; the scale is logarithmic where values differ much.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        series: the curves.
        x: what the horizontal axis measures, with its unit.
        y: what the vertical axis measures, with its unit.
        height: of the chart.
        wide: whether it takes the width of two.
        smooth: whether lines of many points are those of ``curves.smoothed``, with what was measured behind.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for one in series:
            style = look(one.look)
            step = max(1, len(one.x) // 12)
            soft = smooth and reach(len(one.x)) > 0
            if soft:
                faint = {"linestyle": "none", "markersize": 3.5, "markeredgewidth": 0, "alpha": 0.4}
                axes.plot(one.x, one.y, **style | faint)
            few = not soft and len(one.x) <= _MARKED and len(series) < 3
            step *= 2 if soft else 1  # so that what was measured is seen between
            every = 1 if few else (step // 2, step)
            axes.plot(one.x, smoothed(one.y) if soft else one.y, label=legend_name(one.name), markevery=every, **style)
            if len(one.low):
                axes.fill_between(one.x, one.low, one.high, color=style["color"], alpha=0.16, linewidth=0)
        fit_scale(axes, [value for one in series for value in (*one.y, *one.low)])
        whole_ticks(axes.xaxis, [value for one in series for value in one.x])
        axes.set(xlabel=x, ylabel=y)
        axes.margins(x=0.02)
        if len(series) > 1:
            add_legend(figure, axes)

    return Chart(name, label, height, draw, [one.name for one in series], wide)


def bars(
    name: str,
    label: str,
    names: Sequence[str],
    series: Sequence[Series],
    x: str,
    *,
    frame: tuple[float, float] | None = None,
) -> Chart:
    """Return lying bars, for every name one of each series; ``x`` of a series is not looked at.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        names: what the bars are of, from the top down.
        series: one value per name each.
        x: what the horizontal axis measures, with its unit.
        frame: ends of the horizontal axis, at which intervals are cut; None shows all.
    """
    thick = 0.8 / len(series)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, one in enumerate(series):
            places = [row - 0.4 + (number + 0.5) * thick for row in range(len(names))]
            colour = look(one.look)["color"]
            # The first is hollow, so that bars can be told apart without their colours.
            hollow = number == 0 and len(series) > 1
            style = {"facecolor": (colour, 0.25 if hollow else 0.9), "edgecolor": colour, "linewidth": float(hollow)}
            axes.barh(places, one.y, thick * 0.86, label=legend_name(one.name), **style)
            if len(one.low):
                ends = _ends(one)
                axes.errorbar(one.y, places, xerr=ends, fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5)
        name_rows(axes, names)
        if frame is not None:
            axes.set_xlim(frame)
        axes.set_xlim(left=None if any(value < 0 for one in series for value in one.y) else 0)
        axes.set_xlabel(x)
        if len(series) > 1:
            add_legend(figure, axes)

    return Chart(name, label, 50 + len(names) * max(18, 13 * len(series)), draw, [one.name for one in series])


def dots(
    name: str,
    label: str,
    names: Sequence[str],
    series: Sequence[Series],
    x: str,
    *,
    zero: bool = False,
    wide: bool = False,
    frame: tuple[float, float] | None = None,
) -> Chart:
    """Return points with their intervals, for every name one of each series whose ``x`` has its number.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        names: what the points are of, from the top down; more than can be named stand as a line without names.
        series: for each point the number of its name in ``x``, and its value in ``y``.
        x: what the horizontal axis measures, with its unit.
        zero: mark where nothing is gained.
        wide: whether it takes the width of two.
        frame: ends of the horizontal axis, at which intervals are cut; None shows all.
    """
    named = len(names) <= ROWS
    row = (max(17, 8 * len(series) + 6)) if named else 320 / len(names)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if zero:
            axes.axvline(0, color=MUTED, linewidth=1)
        for number, one in enumerate(series):
            shift = (number - (len(series) - 1) / 2) * 0.72 / len(series)
            _add_dots(axes, one, shift, small=not named)
        if named:
            name_rows(axes, names)
        else:
            axes.set_yticks([])
            axes.set_ylim(len(names), -1)
        axes.set_xlabel(x)
        if frame is not None:
            axes.set_xlim(frame)
        if len(series) > 1:
            add_legend(figure, axes)

    return Chart(name, label, 50 + len(names) * row, draw, [one.name for one in series], wide)


def _add_dots(axes: Any, one: Series, shift: float, *, small: bool) -> None:
    """Draw a series' points with their intervals, beside the rows whose numbers are in ``x``."""
    style = look(one.look) | {"linestyle": "none", "markersize": 2 if small else 5, "markeredgewidth": 0}
    if len(one.low):
        style |= {"xerr": _ends(one), "elinewidth": 0.5 if small else 1.2}
    axes.errorbar(one.y, [row + shift for row in one.x], label=legend_name(one.name), **style)


def scatter(
    name: str,
    label: str,
    series: Sequence[Series],
    x: str,
    y: str,
    marks: Sequence[tuple[str, float, int]] = (),
    frame: tuple[float, float] | None = None,
) -> Chart:
    """Return points with upright intervals over a logarithmic axis.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        series: one of each kind of point.
        x: what the horizontal axis measures, with its unit; all its values are above 0.
        y: what the vertical axis measures, with its unit.
        marks: upright lines: their name, place, and number of colour.
        frame: ends of the vertical axis, at which intervals are cut; None shows all.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        # Set before anything is drawn: an axis over arms that cost the same would have no length.
        places = [*(place for one in series for place in one.x), *(place for _, place, _ in marks)]
        beside = (max(places) / min(places)) ** 0.12 if max(places) > min(places) else 2
        axes.set_xlim(min(places) / beside, max(places) * beside)
        for one in series:
            style = look(one.look) | {"linestyle": "none"}
            axes.errorbar(
                one.x, one.y, yerr=_ends(one), label=legend_name(one.name), markersize=8, elinewidth=1.3, **style
            )
        for text, place, number in marks:
            colour = look(number)["color"]
            axes.axvline(place, color=colour, linestyle=(0, (4, 3)), linewidth=1.3, label=legend_name(text))
        axes.margins(y=0.12)
        axes.set(xlabel=x, ylabel=y)
        log_ticks(axes.xaxis)
        axes.xaxis.set_major_formatter(short_size)
        if frame is not None:
            axes.set_ylim(frame)
        add_legend(figure, axes)

    return Chart(name, label, 260, draw, [*(one.name for one in series), *(text for text, _, _ in marks)])


def stacks(name: str, label: str, x: Sequence[float], series: Sequence[Series], axis: tuple[str, str]) -> Chart:
    """Return upright stacked bars over ``x``, or a stacked area where there are very many.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        x: places.
        series: the parts of the stacks, from the bottom up; one value for each of ``x``.
        axis: what the horizontal and the vertical axis measure, with their units.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        reached = [0.0] * len(x)
        for number, one in enumerate(series):
            top = [below + value for below, value in zip(reached, one.y, strict=True)]
            style = {"facecolor": look(one.look)["color"], "alpha": 0.9, "label": legend_name(one.name)}
            if len(x) <= 120:
                style |= {"hatch": ("", "////", "....", "xxxx")[number % 4], "edgecolor": PAPER, "linewidth": 0.3}
                axes.bar(x, one.y, 0.86, bottom=reached, **style)
            else:
                axes.fill_between(x, reached, top, linewidth=0, step="mid", **style)
            reached = top
        whole_ticks(axes.xaxis, x)
        axes.yaxis.set_major_formatter(short_size)
        axes.set(xlabel=axis[0], ylabel=axis[1])
        axes.margins(x=0.02)
        add_legend(figure, axes)

    return Chart(name, label, 220, draw, [one.name for one in series])


def histogram(name: str, label: str, values: Sequence[float], x: str, y: str, *, zero: bool = False) -> Chart:
    """Return how often values fall where.

    Args:
        name: of the chart, unlike others of the page.
        label: what it shows, for those who cannot see it.
        values: all values.
        x: what is measured, with its unit.
        y: what is counted.
        zero: mark where nothing is gained.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        whole = all(value == round(value) for value in values) and max(values) - min(values) < 30
        edges = [edge - 0.5 for edge in range(round(min(values)), round(max(values)) + 2)]
        steps = edges if whole else max(5, min(30, round(2 * len(values) ** 0.5)))
        axes.hist(values, bins=steps, facecolor=SERIES[0], edgecolor=PAPER, linewidth=0.8, alpha=0.9)
        if zero:
            axes.axvline(0, color=MUTED, linewidth=1.2)
        whole_ticks(axes.yaxis, [0, len(values)])
        whole_ticks(axes.xaxis, [0, 9 if whole else 0])
        axes.set(xlabel=x, ylabel=y)

    return Chart(name, label, 220, draw)


def framed(
    series: Sequence[Series], bounds: tuple[float, float], *, zero: bool = False
) -> tuple[tuple[float, float] | None, str]:
    """Return the ends of an axis that shows all points well though some intervals are very long, and a note on that.

    Args:
        series: points with their intervals.
        bounds: between which all true values lie.
        zero: whether 0 is to be seen.

    Returns:
        The ends, None where all intervals have room; and a sentence that says where some are cut.
    """
    values = [value for one in series for value in one.y] + ([0.0] if zero else [])
    ends = [value for one in series for value in (*one.low, *one.high)]
    if not ends:
        return None, ""
    reach = 1.2 * (max(values) - min(values)) or math.inf
    least, most = max(bounds[0], min(values) - reach), min(bounds[1], max(values) + reach)
    if least <= min(ends) and max(ends) <= most:
        return None, ""
    low, high = max(least, min(*ends, *values)), min(most, max(*ends, *values))
    room = 0.03 * (high - low)
    return (low - room, high + room), "Intervals are cut at the frame; tables have their ends."


def _ends(series: Series) -> list[list[float]]:
    """Return how far intervals reach below and above their values; a mean may lie a little outside."""
    below = [max(0.0, value - low) for value, low in zip(series.y, series.low, strict=True)]
    return [below, [max(0.0, high - value) for value, high in zip(series.y, series.high, strict=True)]]
