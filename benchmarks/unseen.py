"""What choosing rows is worth on tasks that nobody trained on: one table over comparisons of several unseen categories.

    python -m benchmarks.unseen benchmarks/recipes/unseen-starter.yaml --categories open_qa closed_qa --out FOLDER

compares the arms of a recipe once for each category, which then reaches no client, and scores the rows of that
category alone; without ``--categories`` all scored rows count, as where the test is of other tasks. What is finished in
FOLDER is not done again. Every arm is compared with ``--against``, or with the one that ``--pairs`` names for it. With
``--results benchmarks/results`` the figures are kept, and go into the README's tables.

Seeds are those of the recipe, prompts the rows of all unseen categories; intervals are those of ``bellwether compare``,
and like those they speak of other seeds and other rows of the same categories.

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
from bellwether.arms.arm import arm_recipe
from bellwether.arms.compare import compare
from bellwether.client.score import score
from bellwether.data.rows import TokenRow
from bellwether.errors import BellwetherError, RecipeError
from bellwether.exchange.adapter import AdapterConfig, read_adapter
from bellwether.exchange.scores import Totals, macro
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Arm, Compare, Evaluation, Recipe
from bellwether.runner.prepare import prepare
from bellwether.store.comparison import Comparison, Outcome, arm_folder
from bellwether.tell.comparing import comparison_lines
from bellwether.tools.intervals import difference, holm, interval
from bellwether.tools.randomness import Randomness
from benchmarks import choosing, machine, report

Floats = NDArray[np.float64]
Score = Callable[[Totals], float]

# Sums of a row, and whether they are divided by its tokens.
SCORES: Mapping[str, tuple[Score, bool]] = {
    "loss": (lambda totals: totals.loss, True),
    "rouge_l": (lambda totals: totals.rouge_l, False),
    "exact": (lambda totals: float(totals.exact), False),
}
COSTS = ("rows", "rows_of_all", "rows_seen", "tokens", "survey_seconds", "seconds", "bytes")

TRAINED = 400  # rows at most on which an adapter's loss on training rows is taken


def measure(comparisons: Sequence[Comparison], against: str, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Return the figures of every arm, as plain values.

    Args:
        comparisons: of the same arms and seeds, each with other unseen categories.
        against: the arm that the others are compared with.
        pairs: arms that are compared with another one, by name.

    Returns:
        By arm: each score with its interval on the unseen rows (ROUGE-L and exact matches where answers were
        generated), and how much higher it is than that of the arm that it is compared with (p-values adjusted by
        Holm's method over the arms); the macro loss on held-out rows of categories that clients had; means of the
        costs. An arm that others are compared with is compared with none.
    """
    names = list(comparisons[0].arms)
    references = {name: pairs.get(name, against) for name in names if name not in (against, *pairs.values())}
    first = [(one, _outcomes(one, names[0])[0]) for one in comparisons]
    strata = [name for comparison, one in first for name in _counted(comparison, one.categories).values()]
    tokens_P = _matrix(comparisons, names[0], lambda totals: float(totals.tokens))[0]
    found: dict[str, Any] = {name: {"against": references.get(name), "scores": {}, "gaps": {}} for name in names}
    answered = _matrix(comparisons, names[0], lambda totals: float(totals.generated)).all()
    for which, (value, by_token) in SCORES.items():
        if not (by_token or answered):
            continue
        weights_P = tokens_P if by_token else None
        gaps = {}
        for name in names:
            values_SP, draws = _matrix(comparisons, name, value), Randomness(0).numpy("intervals")
            found[name]["scores"][which] = asdict(interval(values_SP, strata, draws, denominators_P=weights_P))
            if name in references:
                reference_SP = _matrix(comparisons, references[name], value)
                gaps[name] = difference(values_SP, reference_SP, strata, draws, denominators_P=weights_P)
        for (name, gap), p in zip(gaps.items(), holm([gap.p for gap in gaps.values()]), strict=True):
            found[name]["gaps"][which] = {**asdict(gap), "p": p}
    for name in names:
        outcomes = [one for comparison in comparisons for one in _outcomes(comparison, name)]
        found[name]["seen_loss"] = _mean(_seen_loss(comparisons, name))
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


def _matrix(comparisons: Sequence[Comparison], arm: str, value: Score) -> Floats:
    """Return an arm's value_SP on unseen rows, comparison after comparison."""
    parts = [np.array([[value(totals) for totals in rows] for rows in _totals(one, arm)]) for one in comparisons]
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


def training_losses(
    comparisons: Sequence[Comparison], folders: Sequence[Path], count: int = TRAINED
) -> dict[str, float | None]:
    """Return each arm's loss on training rows, those of all clients, chosen or not: the mean over its adapters.

    Args:
        comparisons: of arms that train at most one adapter a seed.
        folders: where each of them is.
        count: rows at most.
    """
    found: dict[str, list[float]] = {name: [] for name in comparisons[0].arms}
    base = load_base(comparisons[0].recipe.model)
    for comparison, folder in zip(comparisons, folders, strict=True):
        rows = {one.seed: _training_rows(comparison, one.seed, count) for one in comparison.outcomes}
        for one in comparison.outcomes:
            read = read_adapter(arm_folder(folder, one.arm, one.seed) / one.adapter) if one.adapter else None
            layers = LoraLayers(base.model, read.config if read else AdapterConfig(1, 1, 0.0, ()))
            layers.load(0, read.tensors if read else {})
            scored = score(base, layers, rows[one.seed], Evaluation(generate=False))
            layers.detach()
            totals = sum((each.totals for each in scored), start=Totals())
            found[one.arm].append(totals.loss / totals.tokens)
    return {name: _mean(losses) for name, losses in found.items()}


def _training_rows(comparison: Comparison, seed: int, count: int) -> list[TokenRow]:
    """Return some rows of the clients under a seed, each as likely as any other."""
    recipe = arm_recipe(comparison.recipe, "", Arm(trains="nobody"), seed, comparison.recipe.partition.clients)
    rows = [row for tokenised in prepare(recipe).clients.values() for row in tokenised.rows]
    order = Randomness(seed).numpy("rows whose training loss is taken").permutation(len(rows))
    return [rows[number] for number in order[:count]]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def plans(recipe: Recipe, categories: Sequence[str], out: Path) -> dict[Path, Recipe]:
    """Return the recipe of each comparison, one for each category that shall be unseen, by its folder."""
    if not categories:
        return {out: recipe}
    return {out / name: with_overrides(recipe, {"data.unseen_categories": [name]}) for name in categories}


def _checked(recipe: Recipe, against: str, pairs: Mapping[str, str]) -> Compare:
    """Return the section ``compare``, once its arms are known to make one adapter a seed at most."""
    arms = {} if recipe.compare is None else recipe.compare.arms
    missing = [name for name in (against, *pairs, *pairs.values()) if name not in arms]
    if recipe.compare is None or missing:
        raise RecipeError(f"compare.arms names no {missing[0]!r}, which is to be compared; see --against and --pairs.")
    alone = [name for name, arm in recipe.compare.arms.items() if arm.trains == "alone"]
    if alone:
        raise RecipeError(f"compare.arms.{alone[0]} trains clients alone, each an adapter of its own; leave it out.")
    return recipe.compare


def _say(line: str) -> None:
    """Print a line of what a comparison tells."""
    print(line, file=sys.stderr, flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what a command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unseen", description="Measure choosing rows.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--categories", nargs="+", default=(), help="unseen in turn; none: all scored rows are")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparisons")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--against", default="random", help="the arm that others are compared with")
    parser.add_argument("--pairs", nargs="+", default=(), metavar="ARM=OTHER", help="arms compared with another one")
    parser.add_argument("--training-rows", type=int, default=TRAINED, help="rows on which the training loss is taken")
    parser.add_argument("--results", type=Path, help="folder of the figures; none: only print them")
    given = parser.parse_intermixed_args(words)
    if wrong := [pair for pair in given.pairs if "=" not in pair]:
        parser.error(f"--pairs: {wrong[0]!r} is not ARM=OTHER")
    given.pairs = dict(pair.split("=", 1) for pair in given.pairs)
    return given


def main(words: Sequence[str] | None = None) -> None:
    """Compare, measure, and write what was found."""
    given = parse(words)
    try:
        _measure(given)
    except BellwetherError as error:
        raise SystemExit(f"benchmarks.unseen: {error}") from None


def _measure(given: argparse.Namespace) -> None:
    """Do what the command line says."""
    recipe = load_recipe(given.recipe, given.overrides)
    settings = _checked(recipe, given.against, given.pairs)
    planned = plans(recipe, given.categories, given.out)
    comparisons = [
        compare(one, folder, jobs=given.jobs, watch=comparison_lines(_say)) for folder, one in planned.items()
    ]
    measured = {
        **machine.describe(quick=False),
        "name": recipe.name,
        "seeds": list(settings.seeds),
        "part": recipe.evaluation.part,
        "jobs": given.jobs,
        **measure(comparisons, given.against, given.pairs),
        "training_loss": training_losses(comparisons, list(planned), given.training_rows),
    }
    print(choosing.unseen(measured))
    if given.results:
        report.write(given.results, f"unseen-{recipe.name}", measured)


if __name__ == "__main__":
    main()
