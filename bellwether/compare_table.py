"""The table of a comparison: every arm's scores with their intervals, and how far a federated arm is above them.

Each score is macro: the mean over categories. An arm that makes an adapter for each client is the mean over its
clients. Intervals are of 95 %, over seeds and prompts (``bellwether.evaluate.intervals``); p-values of the
differences are adjusted by Holm's method over all those shown. Arms that count optimizer steps are compared with a
federation that does, the others with one that does not.

Shape legend: S seeds, P prompts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bellwether.arms import Outcome
from bellwether.comparison import Comparison
from bellwether.evaluate.intervals import Interval, by_category, difference, holm, interval
from bellwether.evaluate.scores import Totals
from bellwether.history import plain
from bellwether.randomness import Randomness
from bellwether.recipe import Arm, Recipe
from bellwether.recipe_file import with_overrides

Floats = NDArray[np.float64]

METRICS = ("loss", "rouge_l", "exact")
OWN = "own categories"
SAMPLES_BY_CATEGORY = 2000  # resamples; of these intervals there are many


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        name: of the arm, and of what it is scored on where that is not everything.
        scores: interval by metric; a metric that the arm does not have is absent.
        gaps: how much higher the arm that is referred to scores, by metric, with adjusted p-values.
        categories: interval by category and metric.
        cost: mean over seeds and adapters of what it cost.
    """

    name: str
    scores: Mapping[str, Interval]
    gaps: Mapping[str, Interval]
    categories: Mapping[str, Mapping[str, Interval]]
    cost: Mapping[str, float]


@dataclass(frozen=True)
class _Scored:
    """An arm's rows under all seeds, for one metric, clients averaged within a seed."""

    numerators_SP: Floats
    denominators_P: Floats


# An outcome, and the categories on which it counts; None for all.
_Counted = tuple[Outcome, Sequence[str] | None]


def make_lines(comparison: Comparison) -> list[Line]:
    """Return one line per arm, and further ones on the own categories of clients that train alone.

    The arms that others are compared with are those of ``comparison.reference``.
    """
    by_arm: dict[str, list[Outcome]] = {name: [] for name in comparison.arms}
    for outcome in comparison.outcomes:
        by_arm[outcome.arm].append(outcome)
    strata, randomness = comparison.outcomes[0].categories, Randomness(comparison.recipe.seed)

    def line(name: str, counted: Sequence[_Counted], referred: Sequence[_Counted]) -> Line:
        return _line(name, counted, referred, strata, randomness)

    lines, on_own = [], []
    for name, arm in comparison.arms.items():
        reference = comparison.reference(arm.counts_steps)
        counted = _everywhere(by_arm[name])
        main = line(name, counted, _everywhere(by_arm[reference]) if reference not in (None, name) else [])
        categories = _by_category(name, counted, strata, randomness)
        lines.append(replace(main, categories=categories, cost=_cost(by_arm[name])))
        if arm.trains != "alone":
            continue
        referred = _on_own(by_arm[name], by_arm[reference]) if reference is not None else []
        on_own.append(line(f"{name}, {OWN}", [(owner, owner.own) for owner in by_arm[name]], referred))
        for other in _shared(comparison.arms, arm.counts_steps):
            counted = _on_own(by_arm[name], by_arm[other])
            on_own.append(line(f"{other}, {OWN} of {name}", counted, referred if other != reference else []))
    return _adjusted(lines + on_own)


def _shared(arms: Mapping[str, Arm], counts_steps: bool) -> list[str]:
    """Return the arms that make one adapter for all clients, of those that count steps, or of the others."""
    return [
        name
        for name, arm in arms.items()
        if arm.trains in ("together", "federation") and arm.counts_steps == counts_steps
    ]


def _everywhere(outcomes: Sequence[Outcome]) -> list[_Counted]:
    return [(outcome, None) for outcome in outcomes]


def _on_own(owners: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[_Counted]:
    """Return an arm's adapters of each seed, once for each client, on the client's own categories."""
    of_seed = {outcome.seed: outcome for outcome in outcomes}
    return [(of_seed[owner.seed], owner.own) for owner in owners]


def _line(
    name: str,
    counted: Sequence[_Counted],
    referred: Sequence[_Counted],
    strata: Sequence[str],
    randomness: Randomness,
) -> Line:
    """Return a line: scores, and how much higher those of what is referred to are."""
    scores, gaps = {}, {}
    for metric in METRICS:
        found, other = _scored(counted, metric, strata), _scored(referred, metric, strata)
        if found is None:
            continue
        generator = randomness.numpy(f"interval of {metric} of {name}")
        scores[metric] = interval(found.numerators_SP, strata, generator, denominators_P=found.denominators_P)
        # Losses per token of different tokenizers have no difference.
        if other is not None and np.array_equal(other.denominators_P, found.denominators_P):
            gaps[metric] = difference(
                other.numerators_SP, found.numerators_SP, strata, generator, denominators_P=found.denominators_P
            )
    return Line(name, scores, gaps, {}, {})


def _scored(counted: Sequence[_Counted], metric: str, strata: Sequence[str]) -> _Scored | None:
    """Return scores whose macro mean is the mean over adapters of the macro means over the categories that count.

    None where the arm has no such score.
    """
    known = set(strata)
    rows: dict[int, list[Floats]] = {}
    denominators_P = None
    for outcome, categories in counted:
        pairs = [_values(totals, metric) for totals in outcome.totals]
        if any(pair is None for pair in pairs):
            return None
        values = np.array(pairs, dtype=np.float64)
        denominators_P = values[:, 1]
        mine = known if categories is None else known.intersection(categories)
        if mine:  # else nothing of what the client has is scored
            weights_P = np.isin(strata, list(mine)) * len(known) / len(mine)
            rows.setdefault(outcome.seed, []).append(values[:, 0] * weights_P)
    if denominators_P is None or not rows:
        return None
    return _Scored(np.stack([np.mean(rows[seed], axis=0) for seed in sorted(rows)]), denominators_P)


def _values(totals: Totals, metric: str) -> tuple[float, float] | None:
    """Return numerator and denominator of a row's score; None where the arm has no such score."""
    if metric == "loss":
        return (totals.loss, float(totals.tokens)) if totals.tokens else None
    return (float(getattr(totals, metric)), 1.0) if totals.generated else None


def _by_category(
    name: str, counted: Sequence[_Counted], strata: Sequence[str], randomness: Randomness
) -> dict[str, dict[str, Interval]]:
    """Return intervals by category and metric."""
    found: dict[str, dict[str, Interval]] = {category: {} for category in sorted(set(strata))}
    for metric in METRICS:
        scored = _scored(counted, metric, strata)
        if scored is None:
            continue
        generator = randomness.numpy(f"intervals by category of {metric} of {name}")
        for category, one in by_category(
            scored.numerators_SP,
            strata,
            generator,
            denominators_P=scored.denominators_P,
            samples=SAMPLES_BY_CATEGORY,
        ).items():
            found[category][metric] = one
    return found


def _cost(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the mean cost per adapter."""
    names = dict.fromkeys(itertools.chain.from_iterable(outcome.cost for outcome in outcomes))
    return {name: float(np.mean([outcome.cost.get(name, 0.0) for outcome in outcomes])) for name in names}


def _adjusted(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with p-values adjusted over all differences shown."""
    places = [(number, metric) for number, line in enumerate(lines) for metric in line.gaps]
    values = holm([lines[number].gaps[metric].p for number, metric in places])
    adjusted = [dict(line.gaps) for line in lines]
    for (number, metric), p in zip(places, values, strict=True):
        adjusted[number][metric] = replace(adjusted[number][metric], p=p)
    return [replace(line, gaps=gaps) for line, gaps in zip(lines, adjusted, strict=True)]


# Showing ------------------------------------------------------------------------------------------

_HEADS = {"loss": "loss", "rouge_l": "ROUGE-L %", "exact": "exact %"}
_SCALE = {"loss": 1.0, "rouge_l": 100.0, "exact": 100.0}
_LEGEND = (
    "Means over seeds, with intervals of 95 %. A difference marked with = cannot be told from none (p > 0.05, adjusted "
    "by Holm's method)."
)


def _shown(found: Interval | None, metric: str) -> str:
    """Return an interval as text: the mean, and its ends in brackets."""
    if found is None:
        return "-"
    mean, low, high = (value * _SCALE[metric] for value in (found.mean, found.low, found.high))
    digits = 3 if metric == "loss" else 1
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _gap(found: Interval | None, metric: str) -> str:
    """Return a difference as text, marked with = where it cannot be told from nothing at 5 %."""
    return "-" if found is None else ("= " if found.p > 0.05 else "") + _shown(found, metric)


def cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of the main table; without any difference it has no columns for them.

    Args:
        lines: of ``make_lines``.
    """
    compared = METRICS if any(line.gaps for line in lines) else ()
    heads = ["arm", *_HEADS.values(), *(f"federated minus it, {_HEADS[metric]}" for metric in compared)]
    rows = [
        [
            line.name,
            *(_shown(line.scores.get(metric), metric) for metric in METRICS),
            *(_gap(line.gaps.get(metric), metric) for metric in compared),
        ]
        for line in lines
    ]
    return heads, rows


def category_cells(lines: Sequence[Line], metric: str) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of a table by category."""
    categories = sorted({category for line in lines for category in line.categories})

    def show(values: Mapping[str, Interval]) -> str:
        return f"{values[metric].mean * _SCALE[metric]:.{2 if metric == 'loss' else 1}f}" if metric in values else "-"

    rows = [[line.name, *(show(line.categories[c]) for c in categories)] for line in lines if line.categories]
    return ["arm", *categories], rows


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (heads, ["---"] * len(heads), *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def describe(lines: Sequence[Line], comparison: Comparison) -> dict[str, str]:
    """Return the files of a comparison's result by name: the tables for people, and all figures as JSON."""
    text = markdown(*cells(lines)) + f"\n{_LEGEND}{_references(comparison)}\n\n{_made_of(comparison)}"
    for metric in METRICS:
        text += f"\n{_HEADS[metric]} by category\n\n" + markdown(*category_cells(lines, metric))
    if comparison.trials:
        rows = [[t.arm, f"{t.learning_rate:g}", str(t.passes), f"{t.score:.4f}"] for t in comparison.trials]
        text += "\nTrials on validation rows\n\n" + markdown(["arm", "learning rate", "passes", "score"], rows)
    return {"table.md": text, "table.json": json.dumps(plain(lines), indent=1) + "\n"}


def _references(comparison: Comparison) -> str:
    """Return the sentences that name the arms that others are compared with; empty where there are none."""
    names = [(comparison.reference(counts_steps), counts_steps) for counts_steps in (False, True)]
    arms = ("Arms", "Arms that count steps")
    return "".join(f" {arms[steps]} are compared with the arm {name}." for name, steps in names if name is not None)


def _made_of(comparison: Comparison) -> str:
    """Return lines that name recipe, seeds and rows, and how each arm was trained."""
    recipe, rows = comparison.recipe, len(comparison.outcomes[0].categories)
    seeds = ", ".join(map(str, dict.fromkeys(outcome.seed for outcome in comparison.outcomes)))
    text = f"Recipe {recipe.name}, seeds {seeds}; {rows} scored rows.\n\n"
    return text + "".join(
        f"- {name}: {_training(arm, recipe)}\n" for name, arm in comparison.arms.items() if arm.learns
    )


def _training(arm: Arm, recipe: Recipe) -> str:
    """Return an arm's learning rate and how long it trains, as text."""
    changed = with_overrides(recipe, arm.set)
    rounds, steps = changed.federation.rounds, changed.training.local_steps
    if arm.passes is not None:
        length = f"{arm.passes} passes"
    elif arm.steps is not None:
        length = f"{arm.steps} steps"
    elif arm.trains == "federation":
        length = f"{rounds} rounds" + (f" of {steps} steps" if steps else "")
    else:
        length = f"as many passes as {rounds} rounds make"
    return f"learning rate {arm.learning_rate or changed.training.learning_rate:g}, {length}"
