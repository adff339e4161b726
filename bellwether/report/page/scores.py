"""What a page says of a run's scores: learning curves, categories, gains of clients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bellwether.exchange.records import EvaluationRecord
from bellwether.exchange.scores import Scores, Totals, macro, means
from bellwether.report.page.charts import Series, bars, framed, histogram, lines
from bellwether.report.page.curves import SMOOTHED, reach
from bellwether.report.page.metrics import EXACT, LOSS, METRICS, PREFERRED, ROUGE_L, Change, Metric, capital
from bellwether.report.page.parts import Cell, Figure, Part, Section, Table, words
from bellwether.store.finished import FinishedRun
from bellwether.tools.words import counted

BASE, TUNED = "untuned base", "after the last round"
OWN = "clients"  # the part that clients score themselves
_SHOWN = 40  # categories or clients with a line of their own in a chart
_CURVES = "Held-out rows: means over categories, each counted alike. Round 0 is the untuned base."

Changes = Mapping[str, Change]


def main_scores(run: FinishedRun) -> list[EvaluationRecord]:
    """Return the evaluations that count: on rows that no client holds, or else on those that clients hold out."""
    return [record for record in run.evaluations if record.part != OWN] or run.scored(OWN)


def headline(before: Scores, after: Scores) -> Metric:
    """Return the score that speaks for a run: preferences, or exact match where there is any, else ROUGE-L, or loss."""
    if after.preferred is not None:
        return PREFERRED
    if max(before.exact or 0.0, after.exact or 0.0) >= 0.01:
        return EXACT
    return ROUGE_L if after.rouge_l is not None else LOSS


def _charted(run: FinishedRun) -> list[Metric]:
    """Return the scores that have charts: the one that speaks for the run, and the loss; tables have all."""
    before, after = (macro(record.categories) for record in (main_scores(run)[0], main_scores(run)[-1]))
    return list(dict.fromkeys((headline(before, after), LOSS)))


def learning(run: FinishedRun, smooth: bool) -> Section:
    """Return the section with the learning curves.

    Args:
        run: whose losses and scores they are.
        smooth: whether curves of many points are smoothed.
    """
    good = [record for record in run.rounds if record.failure is None and math.isfinite(record.loss)]
    trained = Series("training, clients of the round", [one.round for one in good], [one.loss for one in good])
    # Of pairs it is another loss than that of held-out answers.
    pairs, held_out = run.recipe.training.loss == "dpo", list(_curves(run, [LOSS]))
    losses = held_out if pairs else [*([trained] if good else []), *held_out]
    answers = list(_curves(run, [PREFERRED, EXACT, ROUGE_L]))
    failed = sum(record.failure is not None for record in run.rounds)
    lead = f"{failed} of {counted(len(run.rounds), 'round')} failed and left the adapter as it was." if failed else ""
    parts = [
        _curve_figure("Training loss", [trained] if pairs and good else [], "nats per pair", smooth),
        _curve_figure("Loss", losses, LOSS.unit, smooth),
        _curve_figure("Answers to held-out rows", answers, EXACT.unit, smooth),
    ]
    return Section("learning", "Learning curves", [part for part in parts if part is not None], lead)


def _curve_figure(title: str, curves: Sequence[Series], unit: str, smooth: bool) -> Figure | None:
    """Return the chart of curves, None where there are none."""
    if not curves:
        return None
    label = f"{title} by round: " + "; ".join(f"{one.name} from {one.y[0]:.3g} to {one.y[-1]:.3g}" for one in curves)
    shown = [Series(one.name, one.x, one.y, look=look) for look, one in enumerate(curves)]
    note = f"{_CURVES} {SMOOTHED}" if smooth and any(reach(len(one.x)) for one in shown) else _CURVES
    chart = lines(f"by-round-{title.split()[0].lower()}", label, shown, "round", unit, smooth=smooth)
    return Figure(title, chart, note)


def _curves(run: FinishedRun, metrics: Sequence[Metric]) -> Iterator[Series]:
    """Yield how scores went over the evaluations of each part."""
    for part in dict.fromkeys(record.part for record in run.evaluations):
        for metric in metrics:
            values = [(record.round, metric.value(macro(record.categories))) for record in run.scored(part)]
            known = [(round, value) for round, value in values if math.isfinite(value)]
            rows = "clients' own rows" if part == OWN else f"{part} rows"
            if known:
                name = f"{metric.name}, {rows}" if len(metrics) > 1 else rows
                yield Series(name, [round for round, _ in known], [value for _, value in known])


def categories(run: FinishedRun, found: Changes) -> list[Section]:
    """Return the section with scores by category, and by group where there are several; none where nothing was scored.

    Args:
        run: whose scores they are.
        found: what became of each score, with intervals.
    """
    scored = main_scores(run)
    if not scored:
        return []
    first, last = scored[0], scored[-1]
    names = sorted(last.categories)
    largest = sorted(sorted(names, key=lambda name: -last.categories[name].rows)[:_SHOWN])
    parts: list[Part] = []
    for metric in _charted(run):
        series = [
            _bars_of(label, look, largest, record, metric, values)
            for label, look, record, values in (
                (BASE, 7, first, found[metric.key].before if metric.key in found else {}),
                (TUNED, 0, last, found[metric.key].after if metric.key in found else {}),
            )
        ]
        if all(math.isfinite(value) for one in series for value in one.y):
            label = f"Bars of {metric.name} by category, untuned base and after the last round; see the table."
            frame, _ = framed(series, (0.0, metric.most), zero=True)
            chart = bars(f"category-{metric.key}", label, largest, series, metric.axis, frame=frame)
            parts.append(Figure(capital(metric.name), chart, "Intervals are cut at the frame." if frame else ""))
    parts.append(_score_table("Scores by category", "category", first.categories, last.categories, len(names) > 24))
    if last.groups:
        parts.append(_score_table("Scores by group, over all rows of each", "group", first.groups, last.groups, False))
    left = len(names) - len(largest)
    lead = "Whiskers are 95 % intervals over questions." if found else ""
    lead += (
        f" Charts show the {counted(len(largest), 'category', 'categories')} with the most rows of {len(names)}."
        if left
        else ""
    )
    return [Section("categories", "Scores by category", parts, lead.strip())]


def _bars_of(
    label: str, look: int, names: Sequence[str], record: EvaluationRecord, metric: Metric, found: Mapping[str, object]
) -> Series:
    """Return one bar per category, with intervals where all are known."""
    values = [metric.value(means(record.categories.get(name, Totals()))) for name in names]
    ends = [found.get(name) for name in names]
    if any(end is None for end in ends):
        return Series(label, [], values, look=look)
    low, high = ([getattr(end, side) * metric.scale for end in ends] for side in ("low", "high"))
    return Series(label, [], values, low, high, look)


def _score_table(
    title: str, first: str, before: Mapping[str, Totals], after: Mapping[str, Totals], folded: bool
) -> Table:
    """Return a table of scores before and after, by name."""
    metrics = [metric for metric in METRICS if not math.isnan(metric.value(macro(after)))]
    heads = [first, "rows", *(f"{metric.axis}{side}" for metric in metrics for side in (", base", ", tuned"))]
    lines = []
    for name in sorted({*before, *after}):
        old, new = (means(totals.get(name, Totals())) for totals in (before, after))
        scores = [Cell(metric.number(metric.value(one))) for metric in metrics for one in (old, new)]
        lines.append([words(name or "(none)"), Cell(f"{new.rows:,}"), *scores])
    return Table(title, heads, lines, folded=folded)


def gains(run: FinishedRun) -> list[Section]:
    """Return the section on what each client gains on the rows that it holds out; none where no client does.

    Args:
        run: whose clients they are.
    """
    scored = run.scored(OWN)
    names = [client for client in (scored[-1].clients if scored else {}) if client in scored[0].clients]
    if not names:
        return []
    before, after = (
        {client: _mean_of(record.clients[client]) for client in names} for record in (scored[0], scored[-1])
    )
    shared = {client: _mean_of(scored[-1].shared[client]) for client in names if client in scored[-1].shared}
    stages = {", base": before, **({", shared": shared, ", own": after} if shared else {", tuned": after})}
    parts: list[Part] = []
    for metric in _charted(run):
        gained = _gains(metric, before, after)
        if gained:
            parts.append(_gain_figure(metric, gained, _gains(metric, before, shared)))
    paired = any(one.preferred is not None for one in after.values())
    metrics = [metric for metric in METRICS if metric is not PREFERRED or paired]
    heads = ["client", "rows", *(f"{metric.axis}{side}" for metric in metrics for side in stages)]
    losses = {client: macro(totals).loss for client, totals in scored[-1].elsewhere.items()}
    elsewhere = {client: loss for client, loss in losses.items() if loss is not None}
    if elsewhere:
        heads.append(f"loss, own, on the {run.recipe.evaluation.part} rows")
    table = [
        [
            words(client),
            Cell(f"{after[client].rows:,}"),
            *(
                Cell(metric.number(metric.value(one[client])) if client in one else "–")
                for metric in metrics
                for one in stages.values()
            ),
            *([Cell(f"{elsewhere[client]:.3f}" if client in elsewhere else "–")] if elsewhere else []),
        ]
        for client in names
    ]
    parts.append(Table("Scores of each client's own held-out rows", heads, table, folded=len(names) > 12))
    tuned = "the adapter that all share, and the one that the client serves, each" if shared else "the tuned model"
    lead = (
        f"On the rows that clients hold out of their own: {tuned} minus the untuned base. A client holds few "
        "such rows, and only totals leave it, so there are no intervals."
    )
    if elsewhere:
        lead += _elsewhere(run, elsewhere)
    return [Section("gains", "Gain per client", parts, lead)]


def _elsewhere(run: FinishedRun, losses: Mapping[str, float]) -> str:
    """Return how well what clients serve does on rows of everybody's kind, as a sentence after others."""
    part, low, high = run.recipe.evaluation.part, min(losses.values()), max(losses.values())
    common = macro(run.scored(part)[-1].categories).loss or math.nan
    return (
        f" On the {part} rows, which are of everybody's kind, what clients serve has a loss of "
        f"{sum(losses.values()) / len(losses):.3f} in the mean of {counted(len(losses), 'client')} ({low:.3f} to "
        f"{high:.3f}), and what all share of {common:.3f} (means of categories)."
    )


def _mean_of(categories: Mapping[str, Totals]) -> Scores:
    """Return a client's scores over all its rows, each counted alike."""
    return means(sum(categories.values(), start=Totals()))


def _gains(metric: Metric, before: Mapping[str, Scores], after: Mapping[str, Scores]) -> dict[str, float]:
    """Return what clients gain in a score, where both are known."""
    gained = {client: metric.value(after[client]) - metric.value(before[client]) for client in after}
    return {client: gain for client, gain in gained.items() if math.isfinite(gain)}


def _gain_figure(metric: Metric, gains: Mapping[str, float], shared: Mapping[str, float]) -> Figure:
    """Return the chart of what clients gain in a score, the largest gain first.

    Args:
        metric: the score.
        gains: by what each client serves, over the untuned base.
        shared: by what all share, where clients serve adapters of their own.
    """
    order = sorted(gains, key=lambda client: -gains[client] * metric.better)
    title = f"Gain in {metric.name}" if metric.better > 0 else f"Change of the {metric.name} (less is better)"
    label = f"{title} of {counted(len(gains), 'client')}, {gains[order[-1]]:.3g} to {gains[order[0]]:.3g} {metric.gap}."
    note = _better_off(metric, gains)
    if shared:
        own = {client: gains[client] - shared[client] for client in order if client in shared}
        note = f"With an adapter of its own: {note} {_better_off(metric, own, ' than with what all share')}"
    if len(order) > _SHOWN:
        chart = histogram(f"gain-{metric.key}", label, list(gains.values()), metric.gap, "clients", zero=True)
    else:
        series = [Series("its own" if shared else "gain", [], [gains[client] for client in order])]
        if shared:
            series.insert(0, Series("what all share", [], [shared.get(client, 0.0) for client in order], look=7))
        chart = bars(f"gain-{metric.key}", label, order, series, metric.gap)
    return Figure(title, chart, note)


def _better_off(metric: Metric, gains: Mapping[str, float], than: str = "") -> str:
    """Return how many clients are better off, and how many worse, in a sentence."""
    better, worse = (sum(gain * metric.better * sign > 0 for gain in gains.values()) for sign in (1, -1))
    lost = f", and {worse:,} worse" if worse else ""
    return f"{better:,} of {counted(len(gains), 'client')} {'is' if better == 1 else 'are'} better off{than}{lost}."
