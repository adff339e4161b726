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
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bellwether.arms.arm import arm_recipe, train_arm
from bellwether.arms.checks import TRIALS, all_tried, check_arms, named_arms, trial_words, validating
from bellwether.arms.folder import claimed, inputs, with_threads
from bellwether.arms.plan import longest_of, needs
from bellwether.errors import BellwetherError, RecipeError
from bellwether.exchange.records import (
    ArmFinished,
    ArmRun,
    ArmStarted,
    ArmTold,
    ComparisonStarted,
    Event,
    Note,
    Watcher,
)
from bellwether.exchange.scores import Scores, macro
from bellwether.recipe.compare import Tune
from bellwether.recipe.recipe import Arm, Compare, Recipe
from bellwether.runner.opened import Opened
from bellwether.runner.precision import with_precision
from bellwether.runner.prepare import Prepared, with_absolute_paths
from bellwether.runner.work import speed
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
from bellwether.tell.telling import now_and_then
from bellwether.tools.progress import listening
from bellwether.tools.words import counted
from bellwether.tools.workers import LANGUAGE_MODELS, post, source_of_workers, work_off

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

    @property
    def run(self) -> ArmRun:
        """What those who watch know it by."""
        return ArmRun(self.name, self.recipe.seed, trial_words(self.arm) if self.trial else "")


@dataclass(frozen=True)
class _Bench:
    """What all parts of a comparison need.

    Args:
        recipe: what is compared.
        settings: its section ``compare``.
        folder: where everything goes.
        clients: number of clients by arm.
        processes: how many work side by side.
        watch: is told of every arm, in whatever thread; None is silent.
        opened: models and rows, which all arms share.
    """

    recipe: Recipe
    settings: Compare
    folder: Path
    clients: Mapping[str, int]
    processes: int
    watch: Watcher | None
    opened: Opened

    def tell(self, event: Event) -> None:
        """Tell who watches, where somebody does."""
        if self.watch is not None:
            self.watch(event)

    def job(self, name: str, arm: Arm, seed: int) -> _Job:
        """Return an arm under a seed."""
        changed = arm_recipe(self.recipe, name, arm, seed, self.clients[name])
        return _Job(name, arm, changed, arm_folder(self.folder, name, seed), trial=False)

    def trial(self, name: str, arm: Arm, seed: int) -> _Job:
        """Return a trial of an arm, with its learning rate and passes, under a seed."""
        changed = arm_recipe(validating(self.recipe), name, arm, seed, self.clients[name])
        folder = self.folder / TRIALS / f"rate-{arm.learning_rate}-passes-{arm.passes}"
        return _Job(name, arm, changed, arm_folder(folder, name, seed), trial=True)


def compare(recipe: Recipe, folder: Path, *, jobs: int = 1, watch: Watcher | None = None) -> Comparison:
    """Train and score every arm of a recipe under every seed.

    Args:
        recipe: with a section ``compare``.
        folder: where everything goes; made if it does not exist; what it holds of this comparison is kept.
        jobs: processes that work side by side, each on its share of the cores.
        watch: is told of every arm, what it is at, and what it gave, one word after the other; None is silent.

    Raises:
        RecipeError: the recipe names no arms, or an arm cannot be what it says.
        CheckpointError: the folder holds something else, is in use, or cannot be written.
        BellwetherError: an arm could not be trained, or a process was killed.
    """
    settings = named_arms(recipe)
    recipe = with_precision(recipe, folder, lambda text: watch(Note(text)) if watch is not None else None)
    recipe = with_threads(with_absolute_paths(recipe), folder, jobs)
    if jobs > 1:
        source_of_workers(MODULES)
    opened = Opened()
    with listening(watch):
        prepared = check_arms(recipe, settings, opened)
    clients = {name: len(one.clients) for name, one in prepared.items()}
    bench = _Bench(recipe, settings, folder, clients, jobs, _in_turn(watch) if watch is not None else None, opened)
    with claimed(folder, recipe, inputs(prepared), bench.tell):
        for text in dict.fromkeys(text for one in prepared.values() for text in one.notes):
            bench.tell(Note(text))
        for text in dict.fromkeys(text for one in prepared.values() for text in one.warnings):
            bench.tell(Note(text, warning=True))
        expect = _expecting(bench, prepared) if watch is not None else None
        if expect is not None:
            expect({name: longest_of(settings, name) for name in settings.arms})
        trials = _tune(bench)
        arms = _with_best(settings, trials, bench.tell)
        if expect is not None and trials:
            expect(arms)
        work = [bench.job(name, arm, seed) for seed in settings.seeds for name, arm in arms.items()]
        outcomes = [outcome for done in _done(bench, work) for outcome in done]
        _check_finite(outcomes)
        check_outcomes(folder, outcomes)
        comparison = Comparison(recipe, arms, outcomes, tuple(trials))
        write_comparison(folder, comparison)
    return comparison


def _in_turn(watch: Watcher) -> Watcher:
    """Return a watcher that hears one event after the other, from whatever thread they come."""
    guard = threading.Lock()

    def watcher(event: Event) -> None:
        with guard:
            watch(event)

    return watcher


def _expecting(bench: _Bench, prepared: Mapping[str, Prepared]) -> Callable[[Mapping[str, Arm]], None]:
    """Return what tells how long all trials and arms will take, of the arms as they are known so far."""
    recipe, settings = bench.recipe, bench.settings
    measured = speed(next(iter(prepared.values())).base.facts, recipe, seconds=0.1)
    once = needs(recipe, settings, prepared, bench.opened, measured)
    tune = settings.tune
    trials = {
        ArmRun(name, seed, trial_words(arm)): once(name, arm, True).expected
        for name, arm in all_tried(settings)
        for seed in (tune.seeds if tune is not None else ())
    }

    def expect(arms: Mapping[str, Arm]) -> None:
        expected = {name: once(name, arm, False).expected for name, arm in arms.items()}
        finals = {ArmRun(name, seed): expected[name] for seed in settings.seeds for name in arms}
        bench.tell(ComparisonStarted(recipe.name, str(bench.folder), bench.processes, trials | finals))

    return expect


# Checks -------------------------------------------------------------------------------------------


def _check_finite(outcomes: Sequence[Outcome]) -> None:
    """Refuse scores of a training that diverged, of which there is no mean."""
    for outcome in outcomes:
        if not all(math.isfinite(row.loss) for row in (*outcome.totals, *outcome.clients.values())):
            raise RecipeError(
                f"compare.arms.{outcome.arm}: the training diverged under seed {outcome.seed} (its loss is not "
                "finite); give a smaller learning rate, and another folder with --out."
            )


# Trials -------------------------------------------------------------------------------------------


def _tune(bench: _Bench) -> list[Trial]:
    """Try every learning rate and number of passes with every arm that is tuned, on validation rows."""
    tune, grid = bench.settings.tune, all_tried(bench.settings)
    if tune is None:
        return []
    done = iter(_done(bench, [bench.trial(name, arm, seed) for name, arm in grid for seed in tune.seeds]))
    trials = []
    for name, arm in grid:
        outcomes = [outcome for _ in tune.seeds for outcome in next(done)]
        scores = [score for outcome in outcomes for score in _scores(outcome, tune.choose_by)]
        trials.append(Trial(name, arm.learning_rate or 0.0, arm.passes or 0, _mean(scores, tune)))
    return trials


def _scores(outcome: Outcome, choose_by: str) -> list[float]:
    """Return the scores of a trial that chooses: one of its adapter, or one of each client; NaN where it failed."""
    if outcome.failure:
        return [math.nan]
    if choose_by == "clients_loss":
        return [totals.loss / totals.tokens for totals in outcome.clients.values() if totals.tokens]
    return [getattr(macro(outcome.by_category()), choose_by)]


def _mean(scores: Sequence[float], tune: Tune) -> float:
    """Return the mean of trial scores; the worst there can be, where one of them is no number."""
    mean = math.fsum(scores) / len(scores) if scores else math.nan
    return mean if math.isfinite(mean) else math.inf if tune.less_is_better else -math.inf


def _with_best(settings: Compare, trials: Sequence[Trial], watch: Watcher) -> dict[str, Arm]:
    """Return the arms, each with the learning rate and passes of its best trial; of equal ones the first."""
    chosen = dict(settings.arms)
    if settings.tune is None:
        return chosen
    choose_by = settings.tune.choose_by
    best_of = min if settings.tune.less_is_better else max
    for name in settings.tuned:
        best = best_of((trial for trial in trials if trial.arm == name), key=lambda trial: trial.score)
        chosen[name] = chosen[name].model_copy(update={"learning_rate": best.learning_rate, "passes": best.passes})
        rows = "the rows that clients hold out" if choose_by == "clients_loss" else "validation rows"
        text = f"on {rows} {choose_by} is best ({best.score:.3f}) at learning rate {best.learning_rate:g}"
        watch(Note(f"{name}: {text} and {counted(best.passes, 'pass', 'passes')}."))
    return chosen


# Work ---------------------------------------------------------------------------------------------


def _done(bench: _Bench, work: Sequence[_Job]) -> list[list[Outcome]]:
    """Train and score what is not finished yet; return the outcomes of all jobs in their order."""
    done = {job.folder: read_outcomes(job.folder, job.name, job.recipe.seed) for job in work if is_done(job.folder)}
    left = [job for job in work if job.folder not in done]
    for job in work:
        if job.folder in done:
            bench.tell(_finished(job, done[job.folder], before=True))
    if done:
        bench.tell(Note(f"{len(done)} of {len(work)} are finished already."))

    def tell(job: _Job, outcomes: list[Outcome]) -> None:
        done[job.folder] = outcomes
        bench.tell(_finished(job, outcomes))

    do = functools.partial(_do, bench.opened, bench.watch is not None)
    work_off(do, left, bench.processes, tell, MODULES, bench.watch)
    return [done[job.folder] for job in work]


def _do(opened: Opened, telling: bool, job: _Job) -> list[Outcome]:
    """Train and score one arm under one seed, and post what it tells where somebody watches."""
    watch = None
    if telling:
        post(ArmStarted(job.run))
        watch = now_and_then(lambda event: post(ArmTold(job.run, event)))
    try:
        return train_arm(job.name, job.arm, job.recipe, job.folder, job.trial, opened, watch)
    except BellwetherError as error:
        raise type(error)(f"compare.arms.{job.name}, seed {job.recipe.seed}: {error}") from error


def _finished(job: _Job, outcomes: Sequence[Outcome], before: bool = False) -> ArmFinished:
    """Return what is told of an arm that is finished under a seed."""
    failure = outcomes[0].failure
    if failure:
        return ArmFinished(job.run, Scores(0, None, None, None), before, f"counts as the worst. {failure}")
    scores = [macro(outcome.by_category()) for outcome in outcomes]
    rows = sum(one.rows for one in scores)
    means = (_mean_of(scores, name) for name in ("loss", "rouge_l", "exact", "preferred"))
    return ArmFinished(job.run, Scores(rows, *means), before)


def _mean_of(scores: Sequence[Scores], metric: str) -> float | None:
    """Return the mean of a score over adapters; None where none has it."""
    known = [value for one in scores if (value := getattr(one, metric)) is not None]
    return math.fsum(known) / len(known) if known else None
