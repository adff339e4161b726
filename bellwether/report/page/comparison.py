"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from markupsafe import Markup

from bellwether.exchange.records import EvaluationRecord
from bellwether.exchange.scores import macro
from bellwether.report.compare_show import cells, part_cells, references, shown_metrics
from bellwether.report.compare_table import Line
from bellwether.report.page.appendix import answers_section, appendix, exchange
from bellwether.report.page.charts import Series, dots, framed, lines
from bellwether.report.page.clients import holdings, participation
from bellwether.report.page.curves import SMOOTHED, middle_curve, reach
from bellwether.report.page.effort import cost_section, gains_section
from bellwether.report.page.metrics import EXACT, LOSS, METRICS, PREFERRED, ROUGE_L, Metric, capital
from bellwether.report.page.parts import Cell, Figure, Page, Part, Section, Table, Tile, named, words
from bellwether.store.comparison import Comparison, Outcome
from bellwether.store.finished import FinishedRun
from bellwether.tools.intervals import Interval
from bellwether.tools.words import counted

_ANSWERS = 6  # arms whose answers stand side by side
_ARMS = 8  # arms in a chart that tells them apart by colour
_DOUBT = (
    "= marks a difference that cannot be told from none (p > 0.05, adjusted by Holm's method over all of the table)."
)

_ROUNDED = "Scores and differences are rounded one by one, so that the last digit of a difference may be one off."


@dataclass(frozen=True)
class Compared:
    """What a page on a comparison is made of.

    Args:
        comparison: what it gave.
        lines: of ``compare_table.make_lines``.
        gains: of ``compare_table.client_gains``.
        run: the first federated arm's run under the first seed; None where no arm is a federation.
        environment: what it ran on.
        evaluations: of each federated arm that was scored between rounds, by name: those of each seed's run.
        smooth: whether curves of many points are smoothed.
    """

    comparison: Comparison
    lines: Sequence[Line]
    gains: Sequence[Any]
    run: FinishedRun | None
    environment: Mapping[str, Any]
    evaluations: Mapping[str, Sequence[Sequence[EvaluationRecord]]] = field(default_factory=dict)
    smooth: bool = True

    @property
    def seeds(self) -> list[int]:
        """The seeds, in their order."""
        return list(dict.fromkeys(outcome.seed for outcome in self.comparison.outcomes))

    @property
    def of_arms(self) -> list[Line]:
        """The lines that are whole arms."""
        return [line for line in self.lines if line.name in self.comparison.arms]

    @property
    def reference(self) -> Line | None:
        """The line of the federation that others are compared with."""
        name = self.comparison.reference(False) or self.comparison.reference(True)
        return next((line for line in self.of_arms if line.name == name), None)

    @property
    def metric(self) -> Metric:
        """The score that speaks for the comparison: preferences, exact match where there is any, ROUGE-L, or the loss.

        Only scores count that the reference has, or without one the arms that learn; rules have scores of their own.
        """
        arms = self.comparison.arms
        models = [line for line in self.of_arms if arms[line.name].learns or arms[line.name].trains == "nobody"]
        learned = [line for line in models if arms[line.name].learns]
        known = [self.reference] if self.reference else learned or models or self.of_arms
        if any("preferred" in line.scores for line in known):
            return PREFERRED
        best = max((line.scores["exact"].mean for line in models or known if "exact" in line.scores), default=0.0)
        if best >= 0.01 and any("exact" in line.scores for line in known):
            return EXACT
        return ROUGE_L if any("rouge_l" in line.scores for line in known) else LOSS


def comparison_page(compared: Compared) -> Page:
    """Return the page of a finished comparison."""
    recipe, run = compared.comparison.recipe, compared.run
    seed = f"As the rows are dealt under seed {compared.seeds[0]}; every seed deals them anew."
    of = f"In the run of the arm {_federated(compared.comparison)!r} under seed {compared.seeds[0]}."
    return Page(
        kind="comparison",
        name=recipe.name,
        summary=_summary(compared),
        result=result_sentence(compared),
        tiles=score_tiles(compared),
        sections=[
            scores_section(compared),
            _learning(compared),
            *part_sections(compared),
            *([holdings(run.description, seed)] if run else []),
            *gains_section(compared.gains, compared.metric),
            *([participation(run.rounds, [one.client for one in run.description.clients], of)] if run else []),
            *cost_section(compared.of_arms, compared.metric),
            *_answers(compared),
            _arms(compared.comparison),
            *_trials(compared.comparison),
            *appendix(recipe, compared.environment),
        ],
    )


def _federated(comparison: Comparison) -> str | None:
    return next((name for name, arm in comparison.arms.items() if arm.trains == "federation"), None)


# What was compared, and what came out -------------------------------------------------------------


def _summary(compared: Compared) -> Markup:
    """Return what was compared, in one paragraph."""
    comparison, first = compared.comparison, compared.comparison.outcomes[0]
    seeds = ", ".join(map(str, compared.seeds))
    return Markup(
        "The recipe {} compares {} over the base model {}: {}. All are trained on one and the same split under {} "
        "({}), and answer the same {} of {}. A seed changes who holds which rows, "
        "the cohorts, the initial adapter, the order of rows and dropout."
    ).format(
        named(comparison.recipe.name),
        counted(len(comparison.arms), "arm"),
        named(comparison.recipe.model.path),
        Markup(", ").join(named(name) for name in comparison.arms),
        counted(len(compared.seeds), "seed"),
        seeds,
        counted(len(first.categories), "held-out question"),
        counted(len(set(first.categories)), "category", "categories"),
    )


def result_sentence(compared: Compared, called: Mapping[str, str] = MappingProxyType({})) -> Markup:
    """Return what came out, in one sentence with its uncertainty.

    Args:
        compared: the comparison.
        called: what arms are called there, such as ``untuned base``; others are named as arms.
    """
    metric, reference = compared.metric, compared.reference
    if reference is None or metric.key not in reference.scores:
        ranked = [line for line in compared.of_arms if metric.key in line.scores]
        best = max(ranked, key=lambda line: line.scores[metric.key].mean * metric.better)
        return Markup("The best {} has the {}: {}, with a 95 % interval of {}.").format(
            metric.name, _called(best.name, called, "arm "), *_said(best.scores[metric.key], metric)
        )
    arms = compared.comparison.arms
    others = [
        line
        for line in compared.of_arms
        if metric.key in line.gaps
        and arms[line.name].trains in ("nobody", "alone", "together")
        and arms[line.name].counts_steps == arms[reference.name].counts_steps  # else its gap is to another arm
    ]
    text = Markup("The {} has a mean {} of {} (95 % interval {})").format(
        _called(reference.name, called, "arm "), metric.name, *_said(reference.scores[metric.key], metric)
    )
    if not others:
        return text + "."
    family = sum(len(line.gaps) for line in compared.lines)
    return (
        text
        + ": "
        + Markup(", ").join(
            _against(line, _called(line.name, called, "", "the "), metric, family) for line in others[:4]
        )
        + "."
    )


def _called(name: str, called: Mapping[str, str], arm: str, other: str = "") -> Markup:
    """Return what an arm is called in a sentence, behind the first text where that is its name, else the second."""
    return Markup("{}{}").format(other, called[name]) if name in called else Markup("{}{}").format(arm, named(name))


def _said(found: Interval, metric: Metric) -> tuple[str, str]:
    return metric.text(found.mean * metric.scale), metric.range(found)


def _against(line: Line, other: Markup, metric: Metric, family: int) -> Markup:
    """Return how far the federation is from another arm, one difference of a family, as a part of a sentence."""
    gap = line.gaps[metric.key]
    if gap.p > 0.05:
        mean = metric.number(gap.mean * metric.scale, sign=True)
        # The interval is of this difference alone, and may exclude 0 though the adjusted p-value is large.
        why = "" if gap.low <= 0 <= gap.high else f" after Holm's adjustment over the table's {family:,} differences"
        return Markup("not distinguishable{} from {} ({}, {})").format(why, other, mean, metric.range(gap, sign=True))
    size = gap if gap.mean > 0 else Interval(-gap.mean, -gap.high, -gap.low, gap.p)
    return Markup("{} {} {} than {} ({})").format(
        metric.number(size.mean * metric.scale),
        metric.gap,
        "more" if gap.mean > 0 else "less",
        other,
        metric.range(size),
    )


def score_tiles(compared: Compared) -> list[Tile]:
    """Return a tile for each arm, of the score that speaks for the comparison."""
    metric = compared.metric
    return [
        Tile(line.name, metric.text(one.mean * metric.scale), f"{metric.name}, {metric.range(one)}")
        for line in compared.of_arms[:_ARMS]
        if (one := line.scores.get(metric.key)) is not None
    ]


# Scores -------------------------------------------------------------------------------------------


def scores_section(compared: Compared) -> Section:
    """Return the section with all scores, their intervals and differences."""
    parts: list[Part] = []
    for metric in dict.fromkeys((compared.metric, LOSS)):
        known = [line for line in compared.of_arms if metric.key in line.scores]
        if known:
            series = _points(metric.name, [(row, line.scores[metric.key]) for row, line in enumerate(known)], metric)
            label = f"Points with intervals: {metric.name} of {counted(len(known), 'arm')}; see the table."
            frame, note = framed([series], (0.0, metric.most))
            names = [line.name for line in known]
            chart = dots(f"score-{metric.key}", label, names, [series], metric.axis, frame=frame)
            parts.append(Figure(capital(metric.name), chart, note))
    heads, rows = cells(compared.lines)
    split = 1 + len(shown_metrics(compared.lines))
    parts.append(_table("Scores", heads[:split], [row[:split] for row in rows]))
    if len(heads) > split:
        compared_with = [row for row in rows if any(cell != "-" for cell in row[split:])]
        differences = [[row[0], *row[split:]] for row in compared_with]
        note = f"{_DOUBT} {_ROUNDED}" + references(compared.comparison)
        parts.append(_table("Differences", [heads[0], *heads[split:]], differences, note))
    lead = "Means over categories, then clients, then seeds, with 95 % intervals over seeds and questions."
    return Section("scores", "Scores", parts, lead)


def _points(name: str, found: Sequence[tuple[int, Interval]], metric: Metric, look: int = 0) -> Series:
    """Return points with intervals in the rows of a chart."""
    mean, low, high = ([getattr(one, side) * metric.scale for _, one in found] for side in ("mean", "low", "high"))
    return Series(name, [row for row, _ in found], mean, low, high, look)


def _table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", *, folded: bool = False
) -> Table:
    """Return a table whose first column is words and whose others are numbers."""
    return Table(title, heads, [[words(row[0]), *map(Cell, row[1:])] for row in rows], note, folded)


def _learning(compared: Compared) -> Section:
    """Return the learning curves: the loss of all arms that train, and scores by round of those scored in between."""
    curves: dict[str, list[Sequence[tuple[float, float]]]] = {}
    for outcome in compared.comparison.outcomes:
        if len(outcome.curve) > 1:
            curves.setdefault(outcome.arm, []).append(outcome.curve)
    of = "Medians over seeds and clients; a band holds the middle 80 % of them."
    axes = ("passes over the rows held", "loss per trained token")
    parts: list[Part] = [_curves(compared, "training", "Training loss", axes, curves, of)] if curves else []
    for metric in dict.fromkeys((compared.metric, LOSS)):
        scored = {name: [_by_round(records, metric) for records in runs] for name, runs in compared.evaluations.items()}
        known = {name: found for name, found in scored.items() if all(len(curve) > 2 for curve in found)}
        if known:
            title, axes = f"{capital(metric.name)} on held-out rows by round", ("round", metric.axis)
            seeds = sorted({len(found) for found in known.values()})
            of = f"Medians over {' or '.join(map(str, seeds))} seeds; a band holds the middle 80 % of them."
            of = of if seeds != [1] else "Of one seed."
            of = f"Means over categories, each counted alike. Round 0 is the untuned base. {of}"
            parts.append(_curves(compared, f"by-round-{metric.key}", title, axes, known, of))
    return Section("learning", "Learning curves", parts, "" if parts else "No arm has a curve of several points.")


def _by_round(records: Sequence[EvaluationRecord], metric: Metric) -> list[tuple[float, float]]:
    """Return rounds and scores of a run, where there are any that are finite."""
    found = [(float(one.round), metric.value(macro(one.categories))) for one in records if one.part != "clients"]
    return [(round, value) for round, value in found if math.isfinite(value)]


def _curves(
    compared: Compared,
    name: str,
    title: str,
    axes: tuple[str, str],
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    note: str,
) -> Figure:
    """Return the chart of curves by arm, the middle of those that an arm has several of.

    Args:
        compared: whose arms they are of.
        name: of the chart.
        title: of the figure.
        axes: what is measured, across and upwards.
        curves: places and values, by arm.
        note: what the lines are.
    """
    looks = {arm: look for look, arm in enumerate(compared.comparison.arms)}
    series = [Series(arm, *middle_curve(found), look=looks[arm]) for arm, found in curves.items()]
    ends = "; ".join(f"{one.name} from {one.y[0]:.3g} to {one.y[-1]:.3g}" for one in series)
    label = f"Curves: {title}, over {axes[0]}: {ends}"
    if compared.smooth and any(reach(len(one.x)) for one in series):
        note = f"{note} {SMOOTHED} Bands are not smoothed."
    chart = lines(name, label, series, *axes, height=330, wide=True, smooth=compared.smooth)
    return Figure(title, chart, note, wide=True)


def part_sections(compared: Compared) -> list[Section]:
    """Return the scores by category, and by group where there are several."""
    sections = []
    for part, one in (("categories", "category"), ("groups", "group")):
        names = sorted({name for line in compared.of_arms for name in getattr(line, part)})
        if names:
            sections.append(Section(part, f"Scores by {one}", _by_part(compared, part, one, names)))
    return sections


def _by_part(compared: Compared, part: str, one: str, names: Sequence[str]) -> list[Part]:
    """Return a chart of the score that speaks for the comparison, and tables of all."""
    metric, arms = compared.metric, list(compared.comparison.arms)
    series = []
    for line in compared.of_arms[:_ARMS]:
        known = getattr(line, part)
        found = [(row, known[name][metric.key]) for row, name in enumerate(names) if metric.key in known.get(name, {})]
        if found:
            series.append(_points(line.name, found, metric, arms.index(line.name)))
    label = f"Points with intervals: {metric.name} of {counted(len(series), 'arm')} by {one}; see the table."
    frame, note = framed(series, (0.0, metric.most))
    chart = dots(f"by-{part}", label, names, series, metric.axis, wide=True, frame=frame)
    shown: list[Part] = [Figure(f"{capital(metric.name)} by {one}", chart, note, wide=True)]
    for other in METRICS:
        if any(other.key in line.scores for line in compared.of_arms):
            table = _table(f"{capital(other.axis)}, by {one}", *part_cells(compared.of_arms, other.key, part))
            shown.append(Table(table.title, table.heads, table.rows, folded=other is not metric))
    return shown


# Answers, arms, trials ----------------------------------------------------------------------------


def _answers(compared: Compared) -> list[Section]:
    """Return the answers of the arms, under the first seed, to the rows that the federated run shows."""
    if compared.run is None:
        return []
    seed = compared.seeds[0]
    first: dict[str, Outcome] = {}
    for outcome in compared.comparison.outcomes:
        if outcome.seed == seed:
            first.setdefault(outcome.arm, outcome)
    shown = [(", ".join(filter(None, (name, one.client))), one) for name, one in list(first.items())[:_ANSWERS]]
    exchanges = [
        exchange(
            sample.category,
            sample.instruction,
            sample.context,
            sample.reference,
            {name: outcome.answers[sample.row] for name, outcome in shown if sample.row < len(outcome.answers)},
        )
        for sample in compared.run.samples
    ]
    lead = f"Held-out rows, categories in turn; nothing is chosen by hand. Seed {seed}."
    return answers_section(exchanges, lead)


def _arms(comparison: Comparison) -> Section:
    """Return how each arm was trained."""
    rows = []
    for name, arm in comparison.arms.items():
        rate = f"{arm.learning_rate or comparison.recipe.training.learning_rate:g}" if arm.learns else ""
        length = (
            counted(arm.passes, "pass", "passes") if arm.passes else counted(arm.steps, "step") if arm.steps else ""
        )
        if arm.learns and not length:
            length = "as the recipe's rounds"
        other = "; ".join(f"{field}={value}" for field, value in arm.set.items())
        clients = ", ".join(arm.clients or ())
        rows.append([words(text) for text in (name, arm.trains, rate, length, clients, other)])
    heads = ["arm", "who trains", "learning rate", "how long", "clients", "other fields"]
    used = [column for column in range(len(heads)) if any(row[column].text for row in rows)]
    table = Table("Arms", [heads[column] for column in used], [[row[column] for column in used] for row in rows])
    return Section("arms", "How arms were trained", [table])


def _seen(comparison: Comparison) -> str:
    """Return what trials did, and which rows they were scored on."""
    tune = comparison.recipe.compare.tune if comparison.recipe.compare is not None else None
    text = "They chose learning rate and passes of each arm; no trial saw a test row."
    if tune is None or tune.choose_by != "clients_loss":
        return text
    return f"{text} They chose by the rows that clients hold out, so that gains on these are not of unseen rows."


def _trials(comparison: Comparison) -> list[Section]:
    """Return the trials that chose learning rates and passes, where there were any."""
    if not comparison.trials:
        return []
    rows = [
        [
            one.arm,
            f"{one.learning_rate:g}",
            f"{one.passes}",
            f"{one.score:.4f}" if math.isfinite(one.score) else "diverged",
        ]
        for one in comparison.trials
    ]
    table = _table("Trials on validation rows", ["arm", "learning rate", "passes", "score"], rows, folded=True)
    return [Section("trials", "Trials", [table], _seen(comparison))]
