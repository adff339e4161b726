"""What choosing rows is worth on tasks that nobody trained on: one table over comparisons of several unseen categories.

    python -m benchmarks.unseen benchmarks/unseen/starter.yaml --categories open_qa closed_qa --out FOLDER --jobs 2

compares the arms of a recipe once for each category, which then reaches no client, and scores the rows of that
category alone; without ``--categories`` all scored rows count, as where the test is of other tasks. What is finished in
FOLDER is not done again. With ``--results benchmarks/results`` the figures are kept, and go into the README's tables.

Seeds are those of the recipe, prompts the rows of all unseen categories; intervals are those of ``bellwether compare``.

Shape legend: S seeds, P prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether import load_recipe
from bellwether.arms import Outcome
from bellwether.compare import compare
from bellwether.comparison import Comparison
from bellwether.evaluate.intervals import difference, holm, interval
from bellwether.evaluate.scores import Totals, macro
from bellwether.recipe_file import with_overrides
from bellwether.records import Event, Note
from benchmarks import machine, report

Floats = NDArray[np.float64]
Score = Callable[[Totals], float]

# Sums of a row, and whether they are divided by its tokens.
SCORES: Mapping[str, tuple[Score, bool]] = {
    "loss": (lambda totals: totals.loss, True),
    "rouge_l": (lambda totals: totals.rouge_l, False),
    "exact": (lambda totals: float(totals.exact), False),
}
COSTS = ("rows", "rows_of_all", "rows_seen", "tokens", "survey_seconds", "seconds", "bytes")


def measure(comparisons: Sequence[Comparison], against: str) -> dict[str, Any]:
    """Return the figures of every arm, as plain values.

    Args:
        comparisons: of the same arms and seeds, each with other unseen categories.
        against: the arm that the others are compared with.

    Returns:
        By arm: each score with its interval on the unseen rows (ROUGE-L and exact matches where answers were
        generated), and how much higher it is than that of ``against``
        (p-values adjusted by Holm's method over the arms); the macro loss on categories that were trained on; the
        training loss of the last round; means of the costs.
    """
    names = list(comparisons[0].arms)
    first = [(one, _outcomes(one, names[0])[0]) for one in comparisons]
    strata = [name for comparison, one in first for name in _counted(comparison, one.categories).values()]
    tokens_P = _matrix(comparisons, names[0], lambda totals: float(totals.tokens))[0]
    found: dict[str, Any] = {name: {"scores": {}, "gaps": {}} for name in names}
    answered = _matrix(comparisons, names[0], lambda totals: float(totals.generated)).all()
    for which, (score, by_token) in SCORES.items():
        if not (by_token or answered):
            continue
        weights_P = tokens_P if by_token else None
        reference_SP = _matrix(comparisons, against, score)
        gaps = {}
        for name in names:
            values_SP, draws = _matrix(comparisons, name, score), np.random.default_rng(0)
            found[name]["scores"][which] = asdict(interval(values_SP, strata, draws, denominators_P=weights_P))
            if name != against:
                gaps[name] = difference(values_SP, reference_SP, strata, draws, denominators_P=weights_P)
        for (name, gap), p in zip(gaps.items(), holm([gap.p for gap in gaps.values()]), strict=True):
            found[name]["gaps"][which] = {**asdict(gap), "p": p}
    for name in names:
        outcomes = [one for comparison in comparisons for one in _outcomes(comparison, name)]
        last = [one.curve[-1][1] for one in outcomes if one.curve]
        found[name]["seen_loss"] = _mean(_seen_loss(comparisons, name))
        found[name]["training_loss"] = _mean(last)
        found[name]["costs"] = {cost: _mean([one.cost[cost] for one in outcomes if cost in one.cost]) for cost in COSTS}
    return {"arms": found, "against": against, "prompts": len(strata), "strata": sorted(set(strata))}


def _unseen(comparison: Comparison) -> tuple[str, ...]:
    """Return the categories that no client had; none where the test is of other tasks altogether."""
    return comparison.recipe.data.unseen_categories


def _outcomes(comparison: Comparison, arm: str) -> list[Outcome]:
    """Return an arm's outcomes, one a seed, by seed."""
    return sorted((one for one in comparison.outcomes if one.arm == arm), key=lambda one: one.seed)


def _counted(comparison: Comparison, categories: Sequence[str]) -> dict[int, str]:
    """Return which of the scored rows count, by their number, with their categories."""
    unseen = _unseen(comparison)
    return {number: name for number, name in enumerate(categories) if name in unseen or not unseen}


def _totals(comparison: Comparison, arm: str) -> list[list[Totals]]:
    """Return, by seed, the totals of an arm's unseen rows."""
    return [[one.totals[n] for n in _counted(comparison, one.categories)] for one in _outcomes(comparison, arm)]


def _matrix(comparisons: Sequence[Comparison], arm: str, score: Score) -> Floats:
    """Return an arm's score_SP on unseen rows, comparison after comparison."""
    parts = [np.array([[score(totals) for totals in rows] for rows in _totals(one, arm)]) for one in comparisons]
    return np.concatenate(parts, axis=1)


def _seen_loss(comparisons: Sequence[Comparison], arm: str) -> list[float]:
    """Return an arm's macro loss on held-out rows of categories that clients had, of each outcome."""
    found = []
    for comparison in comparisons:
        for one in _outcomes(comparison, arm):
            seen = {name: totals for name, totals in one.by_category().items() if name not in _unseen(comparison)}
            loss = macro(seen).loss if seen and _unseen(comparison) else None
            found += [loss] if loss is not None else []
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.nanmean(values)) if len(values) and not np.isnan(values).all() else None


def compared(path: str, categories: Sequence[str], overrides: Sequence[str], out: Path, jobs: int) -> list[Comparison]:
    """Run what is not yet done of a recipe's comparison, once for each category that shall be unseen."""
    recipe = load_recipe(path, overrides)
    if not categories:
        return [compare(recipe, out, jobs=jobs, watch=_say)]
    changed = {name: with_overrides(recipe, {"data.unseen_categories": [name]}) for name in categories}
    return [compare(one, out / name, jobs=jobs, watch=_say) for name, one in changed.items()]


def _say(event: Event) -> None:
    """Print what a comparison tells."""
    if isinstance(event, Note):
        print(event.text, file=sys.stderr, flush=True)


def main() -> None:
    """Compare, measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unseen", description="Measure choosing rows.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--categories", nargs="+", default=(), help="unseen in turn; none: all scored rows are")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparisons")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--against", default="random", help="the arm that others are compared with")
    parser.add_argument("--results", type=Path, help="folder of the figures; none: only print them")
    given = parser.parse_args()
    comparisons = compared(given.recipe, given.categories, given.overrides, given.out, given.jobs)
    recipe = comparisons[0].recipe
    assert recipe.compare is not None
    about = {"name": recipe.name, "seeds": list(recipe.compare.seeds), "part": recipe.evaluation.part}
    measured = {**machine.describe(quick=False), **about, **measure(comparisons, given.against)}
    print(report.unseen(measured))
    if given.results:
        report.write(given.results, f"unseen-{recipe.name}", measured)


if __name__ == "__main__":
    main()
