"""What a comparison's page says of gains per client, and of quality against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from bellwether.report.compare_show import cost_cells, gain_cells
from bellwether.report.compare_table import ClientGain, Line
from bellwether.report.page.charts import Series, dots, framed, scatter
from bellwether.report.page.metrics import LOSS, Metric, capital
from bellwether.report.page.parts import Cell, Figure, Part, Section, Table, named, words
from bellwether.tools.intervals import Interval
from bellwether.tools.words import counted

_FOLDED = 12  # clients whose table is still open
_OWN = "gain on its own rows"  # how heads of such columns begin
_DOUBT = "= marks a gain that cannot be told from none (p > 0.05, adjusted by Holm's method)."
_MARKS = 4  # arms whose whole base has a line of its own


def gains_section(gains: Sequence[ClientGain], metric: Metric) -> list[Section]:
    """Return the section on what each client gains by the federation; none where no client trains alone.

    Args:
        gains: of ``compare_table.client_gains``.
        metric: the score that speaks for the comparison.
    """
    if not gains:
        return []
    parts: list[Part] = [_gain_figure(gains, one) for one in dict.fromkeys((metric, LOSS)) if _known(gains, one)]
    heads, rows = gain_cells(gains)
    shared = [0, *(column for column, head in enumerate(heads) if column and not head.startswith(_OWN))]
    own = [0, *(column for column, head in enumerate(heads) if head.startswith(_OWN))]
    for title, columns in (("Gains on shared test rows", shared), ("Gains on rows that the client holds out", own)):
        if len(columns) > 1:
            table = [[words(row[0]), *(Cell(row[column]) for column in columns[1:])] for row in rows]
            parts.append(Table(title, [heads[column] for column in columns], table, _DOUBT, len(rows) > _FOLDED))
    lead = Markup(
        "Did joining help? The score of the federated model (arm {}) minus that of the model that a client trains "
        "alone (arm {})."
    ).format(named(gains[0].reference), named(gains[0].arm))
    return [Section("gains", "Gain per client", parts, lead)]


def _known(gains: Sequence[ClientGain], metric: Metric) -> list[ClientGain]:
    """Return the gains that a score has, the largest first."""
    known = [gain for gain in gains if metric.key in gain.shared]
    return sorted(known, key=lambda gain: -gain.shared[metric.key].mean * metric.better)


def _gain_figure(gains: Sequence[ClientGain], metric: Metric) -> Figure:
    """Return the chart of what clients gain in a score."""
    known = _known(gains, metric)
    series = [
        _gain_points("shared test rows", [(row, one.shared[metric.key]) for row, one in enumerate(known)], metric, 0)
    ]
    own = [(row, one.own[metric.key]) for row, one in enumerate(known) if metric.key in one.own]
    if own:
        series.append(_gain_points("rows that the client holds out", own, metric, 1))
    better = sum(one.shared[metric.key].mean * metric.better > 0 for one in known)
    sure = sum(one.shared[metric.key].p <= 0.05 for one in known if one.shared[metric.key].mean * metric.better > 0)
    title = f"Gain in {metric.name}" if metric.better > 0 else f"Change of the {metric.name} (less is better)"
    label = f"Points with intervals: {title} of {counted(len(known), 'client')}; see the table."
    frame, cut = framed(series, (-metric.most, metric.most), zero=True)
    names = [one.client for one in known]
    chart = dots(f"gain-{metric.key}", label, names, series, metric.gap, zero=True, frame=frame)
    of_them = f"{better:,} of {counted(len(known), 'client')} {'is' if better == 1 else 'are'} better off"
    note = f"On shared test rows {of_them}, {sure:,} of them with p ≤ 0.05."
    return Figure(title, chart, f"{note} {cut}".strip())


def _gain_points(name: str, found: Sequence[tuple[int, Interval]], metric: Metric, look: int) -> Series:
    """Return the points of gains, with intervals where all are known."""
    rows, mean = [row for row, _ in found], [one.mean * metric.scale for _, one in found]
    if any(math.isnan(one.low) for _, one in found):
        return Series(name, rows, mean, look=look)
    low, high = ([getattr(one, side) * metric.scale for _, one in found] for side in ("low", "high"))
    return Series(name, rows, mean, low, high, look)


def cost_section(lines: Sequence[Line], metric: Metric) -> list[Section]:
    """Return the section on what arms cost, and on quality against cost where at least two arms have that cost.

    Args:
        lines: of whole arms.
        metric: the score that speaks for the comparison.
    """
    costly = [line for line in lines if line.cost]
    if not costly:
        return []
    parts: list[Part] = []
    for key, title in (("bytes", "bytes sent"), ("tokens", "tokens trained")):
        known = [(look, line) for look, line in enumerate(lines) if line.cost.get(key) and metric.key in line.scores]
        if len(known) > 1:
            series = [_cost_point(line, key, metric, look) for look, line in known]
            marks = _whole_bases(known) if key == "bytes" else []
            label = f"Points with intervals: {metric.name} over {title}, {counted(len(known), 'arm')}; see the table."
            frame, cut = framed(series, (0.0, metric.most))
            axis = f"{title} (mean over seeds, logarithmic)"
            chart = scatter(f"cost-{key}", label, series, axis, metric.axis, marks, frame)
            parts.append(Figure(f"{capital(metric.name)} against {title}", chart, f"{_NOTES[key]} {cut}".strip()))
    heads, rows = cost_cells(costly)
    table = [[words(row[0]), *map(Cell, row[1:])] for row in rows]
    parts.append(Table("What an adapter of each arm cost, mean over seeds", heads, table))
    lead = "Seconds are of this machine; whole base: what would be sent if all weights travelled, in float32."
    return [Section("cost", "Cost", parts, lead)]


_NOTES = {
    "bytes": "Arms that send nothing are not shown. The broken line: what sending the whole base instead would take.",
    "tokens": "Of an arm that trains clients alone: mean of a client.",
}


def _cost_point(line: Line, key: str, metric: Metric, look: int) -> Series:
    """Return an arm's point over what it cost."""
    one = line.scores[metric.key]
    mean, low, high = (value * metric.scale for value in (one.mean, one.low, one.high))
    return Series(line.name, [line.cost[key]], [mean], [low], [high], look)


def _whole_bases(known: Sequence[tuple[int, Line]]) -> list[tuple[str, float, int]]:
    """Return lines for what sending the whole base would take: one for each value, of some arms where they differ."""
    found: dict[float, tuple[str, float, int]] = {}
    for look, line in known:
        size = line.cost.get("bytes_of_whole_base")
        if size:
            found.setdefault(size, (f"whole base: {line.name}", size, look))
    if len(found) == 1:
        return [("whole base", size, look) for _, size, look in found.values()]
    return list(found.values())[:_MARKS]
