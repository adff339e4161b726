"""A comparison: the arms that a recipe names, trained on one and the same split over several seeds, and scored.

    bellwether compare fedit-table --out FOLDER

A seed changes the partition, the cohorts, the initial adapter, the order of rows and dropout; the held-out rows
are the same under every seed. Every finished arm is a file in the folder and is not trained again. Where the
recipe has ``compare.tune``, the arms' learning rates and numbers of passes are chosen first, on validation rows,
with equally many trials for each arm.

    ARM/seed-5/outcomes.json        what each adapter of an arm scored, row by row
    ARM/seed-5/run/                 the run folder of a federation
    trials/rate-0.008-passes-10/    the same on validation rows
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellwether.compare.arms import arm_recipe, train_arm
from bellwether.compare.folder import claimed, inputs, with_threads
from bellwether.errors import BellwetherError, RecipeError
from bellwether.exchange.records import Note, Watcher
from bellwether.exchange.scores import macro
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Arm, Compare, Recipe
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import Prepared, prepare, with_absolute_paths
from bellwether.store.comparison import (
    Comparison,
    Outcome,
    Trial,
    arm_folder,
    check_outcomes,
    is_done,
    read_outcomes,
    write_comparison,
)
from bellwether.tools.atomic import slug
from bellwether.tools.words import counted
from bellwether.tools.workers import LANGUAGE_MODELS, source_of_workers, work_off

TRIALS = "trials"
# What processes that train arms import once for all.
MODULES = ("bellwether.runner.run", "flwr_datasets.partitioner", *LANGUAGE_MODELS)


@dataclass(frozen=True)
class _Job:
    """One arm under one seed, where its outcomes go, and whether it is a trial."""

    name: str
    arm: Arm
    recipe: Recipe
    folder: Path
    trial: bool


@dataclass(frozen=True)
class _Bench:
    """What all parts of a comparison need.

    Args:
        recipe: what is compared.
        settings: its section ``compare``.
        folder: where everything goes.
        clients: number of clients by arm.
        processes: how many work side by side.
        watch: is told of every finished arm.
        opened: models and rows, which all arms share.
    """

    recipe: Recipe
    settings: Compare
    folder: Path
    clients: Mapping[str, int]
    processes: int
    watch: Watcher
    opened: Opened

    def job(self, name: str, arm: Arm, seed: int) -> _Job:
        """Return an arm under a seed."""
        changed = arm_recipe(self.recipe, name, arm, seed, self.clients[name])
        return _Job(name, arm, changed, arm_folder(self.folder, name, seed), trial=False)

    def trial(self, name: str, arm: Arm, seed: int) -> _Job:
        """Return a trial of an arm, with its learning rate and passes, under a seed."""
        changed = arm_recipe(_validating(self.recipe), name, arm, seed, self.clients[name])
        folder = self.folder / TRIALS / f"rate-{arm.learning_rate}-passes-{arm.passes}"
        return _Job(name, arm, changed, arm_folder(folder, name, seed), trial=True)


def compare(recipe: Recipe, folder: Path, *, jobs: int = 1, watch: Watcher | None = None) -> Comparison:
    """Train and score every arm of a recipe under every seed.

    Args:
        recipe: with a section ``compare``.
        folder: where everything goes; made if it does not exist; what it holds of this comparison is kept.
        jobs: processes that work side by side, each on its share of the cores.
        watch: is told of every finished arm; None is silent.

    Raises:
        RecipeError: the recipe names no arms, or an arm cannot be what it says.
        CheckpointError: the folder holds something else, is in use, or cannot be written.
        BellwetherError: an arm could not be trained, or a process was killed.
    """
    watch = watch or (lambda event: None)
    settings = _settings(recipe)
    recipe = with_threads(with_absolute_paths(recipe), folder, jobs)
    if jobs > 1:
        source_of_workers(MODULES)
    opened = Opened()
    prepared = _checked(recipe, settings, opened)
    clients = {name: len(one.clients) for name, one in prepared.items()}
    bench = _Bench(recipe, settings, folder, clients, jobs, watch, opened)
    with claimed(folder, recipe, inputs(prepared), watch):
        for text in dict.fromkeys(text for one in prepared.values() for text in one.notes):
            watch(Note(text))
        for text in dict.fromkeys(text for one in prepared.values() for text in one.warnings):
            watch(Note(text, warning=True))
        trials = _tune(bench)
        arms = _with_best(settings, trials, watch)
        work = [bench.job(name, arm, seed) for seed in settings.seeds for name, arm in arms.items()]
        outcomes = [outcome for done in _done(bench, work) for outcome in done]
        _check_finite(outcomes)
        check_outcomes(folder, outcomes)
        comparison = Comparison(recipe, arms, outcomes, tuple(trials))
        write_comparison(folder, comparison)
    return comparison


# Checks -------------------------------------------------------------------------------------------


def _settings(recipe: Recipe) -> Compare:
    """Return the section ``compare``, once its arms are known to have a folder each."""
    if recipe.compare is None:
        raise RecipeError(
            "compare is null, so there is nothing to compare; name arms and seeds there, give compare={} for the "
            "usual arms, or take the recipe fedit-table."
        )
    slugs = {TRIALS: "the trials"}
    for name in recipe.compare.arms:
        # Some systems take names for equal that differ in case.
        other = slugs.setdefault(slug(name).casefold(), repr(name))
        if other != repr(name):
            raise RecipeError(f"compare.arms: {name!r} and {other} would share a folder; rename this arm.")
    return recipe.compare


def _checked(recipe: Recipe, settings: Compare, opened: Opened) -> dict[str, Prepared]:
    """Return what each arm means under the first seed, once every arm and trial is known to be possible."""
    made: dict[str, Prepared] = {}  # arms that set nothing of their own have the same rows and model
    found: dict[str, Prepared] = {}
    for name, arm in settings.arms.items():
        # How many clients there are does not depend on how many the recipe says, only rounds and passes do.
        once, fields = arm_recipe(recipe, name, arm, settings.seeds[0], recipe.partition.clients), repr(arm.set)
        found[name] = made[fields] = made[fields] if fields in made else _prepared(once, name, arm, opened)
        arm_recipe(recipe, name, arm, settings.seeds[0], len(found[name].clients))
        _check_clients(name, arm, found[name])
    _check_scored(found)
    if settings.tune is not None:
        trials = [
            arm_recipe(_validating(recipe), name, arm, settings.tune.seeds[0], len(found[name].clients))
            for name, arm in _grid(settings)
        ]
        prepare(trials[0], opened)
    return found


def _prepared(recipe: Recipe, name: str, arm: Arm, opened: Opened) -> Prepared:
    """Return what an arm's recipe means; where it cannot stand, say which arm it is, if the fault is the arm's."""
    try:
        return prepare(recipe, opened)
    except BellwetherError as error:
        if not arm.set:
            raise
        raise type(error)(f"compare.arms.{name}: {error}") from error


def _check_scored(prepared: Mapping[str, Prepared]) -> None:
    """Refuse arms that would be scored on no rows, or on other ones than the first."""
    (first, shared), *others = prepared.items()
    if not shared.scored.rows:
        raise RecipeError(
            "no rows are held out, so arms cannot be compared; set data.test_rows_per_category or data.test_sources."
        )
    for name, one in others:
        if one is not shared and _scored_rows(one) != _scored_rows(shared):
            raise RecipeError(
                f"compare.arms.{name}.set makes other rows to score than those of {first}; compare arms on the same."
            )


def _scored_rows(prepared: Prepared) -> list[Any]:
    return [
        (one.row.instruction, one.row.context, one.row.response, one.row.turns, one.category)
        for one in prepared.scored.rows
    ]


def _check_clients(name: str, arm: Arm, prepared: Prepared) -> None:
    """Refuse clients that the data does not make."""
    unknown = [client for client in arm.clients or () if client not in prepared.clients]
    if unknown:
        known = list(prepared.clients)
        shown = ", ".join(known[:3]) + (f" to {known[-1]}" if len(known) > 3 else "")
        raise RecipeError(f"compare.arms.{name}.clients: there is no client {unknown[0]!r}; there are {shown}.")


def _check_finite(outcomes: Sequence[Outcome]) -> None:
    """Refuse scores of a training that diverged, of which there is no mean."""
    for outcome in outcomes:
        if not all(math.isfinite(row.loss) for row in (*outcome.totals, *outcome.clients.values())):
            raise RecipeError(
                f"compare.arms.{outcome.arm}: the training diverged under seed {outcome.seed} (its loss is not "
                "finite); give a smaller learning rate, and another folder with --out."
            )


# Trials -------------------------------------------------------------------------------------------


def _validating(recipe: Recipe) -> Recipe:
    return with_overrides(recipe, {"evaluation.part": "validation"})


def _grid(settings: Compare) -> list[tuple[str, Arm]]:
    """Return every arm that is tuned with every learning rate and number of passes."""
    tune = settings.tune
    if tune is None:
        return []
    return [
        (name, arm.model_copy(update={"learning_rate": rate, "passes": passes}))
        for (name, arm), rate, passes in itertools.product(settings.tuned.items(), tune.learning_rates, tune.passes)
    ]


def _tune(bench: _Bench) -> list[Trial]:
    """Try every learning rate and number of passes with every arm that is tuned, on validation rows."""
    tune, grid = bench.settings.tune, _grid(bench.settings)
    if tune is None:
        return []
    done = iter(_done(bench, [bench.trial(name, arm, seed) for name, arm in grid for seed in tune.seeds]))
    trials = []
    for name, arm in grid:
        outcomes = [outcome for _ in tune.seeds for outcome in next(done)]
        scores = [
            math.nan if outcome.failure else getattr(macro(outcome.by_category()), tune.choose_by)
            for outcome in outcomes
        ]
        trials.append(Trial(name, arm.learning_rate or 0.0, arm.passes or 0, _mean(scores, tune.choose_by)))
    return trials


def _mean(scores: Sequence[float], choose_by: str) -> float:
    """Return the mean of trial scores; the worst there can be, where one of them is no number."""
    mean = math.fsum(scores) / len(scores)
    return mean if math.isfinite(mean) else math.inf if choose_by == "loss" else -math.inf


def _with_best(settings: Compare, trials: Sequence[Trial], watch: Watcher) -> dict[str, Arm]:
    """Return the arms, each with the learning rate and passes of its best trial; of equal ones the first."""
    chosen = dict(settings.arms)
    if settings.tune is None:
        return chosen
    choose_by = settings.tune.choose_by
    best_of = min if choose_by == "loss" else max
    for name in settings.tuned:
        best = best_of((trial for trial in trials if trial.arm == name), key=lambda trial: trial.score)
        chosen[name] = chosen[name].model_copy(update={"learning_rate": best.learning_rate, "passes": best.passes})
        text = f"on validation rows {choose_by} is best ({best.score:.3f}) at learning rate {best.learning_rate:g}"
        watch(Note(f"{name}: {text} and {counted(best.passes, 'pass', 'passes')}."))
    return chosen


# Work ---------------------------------------------------------------------------------------------


def _done(bench: _Bench, work: Sequence[_Job]) -> list[list[Outcome]]:
    """Train and score what is not finished yet; return the outcomes of all jobs in their order."""
    done = {job.folder: read_outcomes(job.folder, job.name, job.recipe.seed) for job in work if is_done(job.folder)}
    left = [job for job in work if job.folder not in done]
    if done:
        bench.watch(Note(f"{len(done)} of {len(work)} are finished already."))

    def tell(job: _Job, outcomes: list[Outcome]) -> None:
        done[job.folder] = outcomes
        bench.watch(Note(f"{len(done)}/{len(work)} {job.name}, seed {job.recipe.seed}: {_shown(outcomes)}"))

    work_off(functools.partial(_do, bench.opened), left, bench.processes, tell, MODULES)
    return [done[job.folder] for job in work]


def _do(opened: Opened, job: _Job) -> list[Outcome]:
    try:
        return train_arm(job.name, job.arm, job.recipe, job.folder, job.trial, opened)
    except BellwetherError as error:
        raise type(error)(f"compare.arms.{job.name}, seed {job.recipe.seed}: {error}") from error


def _shown(outcomes: Sequence[Outcome]) -> str:
    """Return mean scores as text, or why there are none."""
    if outcomes[0].failure:
        return f"counts as the worst. {outcomes[0].failure}"
    scores = [macro(outcome.by_category()) for outcome in outcomes]
    shown = []
    for label, values in (("loss", [s.loss for s in scores]), ("exact", [s.exact for s in scores])):
        known = [value for value in values if value is not None]
        if known:
            shown.append(f"{label} {sum(known) / len(known):.3f}")
    return ", ".join(shown)
