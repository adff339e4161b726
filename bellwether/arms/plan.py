"""The plan of a comparison: what all its arms, seeds and trials will need, said before any weights are loaded.

    bellwether plan default-table

Rows, steps, tokens and bytes are counted under the first seed, memory and time estimated as in the plan of a run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from bellwether.arms.arm import arm_recipe
from bellwether.arms.checks import check_arms, named_arms, tried, validating
from bellwether.data.rows import TokenRow
from bellwether.exchange.records import Expected
from bellwether.method.cohort import clients_together, cohort_size
from bellwether.recipe.recipe import Arm, Compare, Recipe
from bellwether.runner.estimate import memory_bytes
from bellwether.runner.opened import Opened
from bellwether.runner.plan import doubts, needs_table, traffic
from bellwether.runner.precision import with_precision
from bellwether.runner.prepare import Prepared, prepare
from bellwether.runner.work import (
    Speed,
    adapter_size,
    evaluation_seconds,
    evaluations,
    speed,
    train_seconds,
    work_flops,
    work_of,
)
from bellwether.tools.words import amount, byte_size, clean, counted, duration

if TYPE_CHECKING:
    from rich.console import Group

ADAPTER_WEIGHT = 4  # bytes, in float32
SCORED_ROW = 160  # bytes that a scored row takes in a file beside its answer, about


@dataclass(frozen=True)
class Needs:
    """What training and scoring take; of one arm under one seed, or of several added up.

    Args:
        runs: arms under a seed, a trial each counted as one.
        adapters: trained adapters.
        rows: rows trained on, repetitions counted.
        steps: optimizer steps.
        tokens: tokens of those rows, prompts included.
        sent: bytes between server and clients.
        scored: rows scored, those of every evaluation counted.
        disk: bytes that stay on the disk, about.
        train_seconds: estimate.
        evaluate_seconds: estimate.
    """

    runs: int = 0
    adapters: int = 0
    rows: float = 0.0
    steps: float = 0.0
    tokens: float = 0.0
    sent: float = 0.0
    scored: int = 0
    disk: float = 0.0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0

    @property
    def expected(self) -> Expected:
        """How long it takes."""
        return Expected(self.train_seconds, self.evaluate_seconds)

    def __add__(self, other: Needs) -> Needs:
        return Needs(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def times(self, count: int) -> Needs:
        """Return what so many of them need."""
        return Needs(*(count * getattr(self, one.name) for one in fields(self)))


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison will need.

    Args:
        recipe: what is compared.
        model: name, architecture and parameters of the base model of the first arm.
        arms: what each arm needs under all seeds; passes that trials choose are taken to be the most of those tried.
        trials: what the trials of each arm need; empty where there are none.
        memory: peak bytes of the arm that takes most.
        speed: of this machine.
        warnings: those about data that a person should look at first.
        notes: sentences about data and estimate.
    """

    recipe: Recipe
    model: str
    arms: Mapping[str, Needs]
    trials: Mapping[str, Needs]
    memory: int
    speed: Speed
    warnings: Sequence[str]
    notes: Sequence[str]

    @property
    def total(self) -> Needs:
        """All of it."""
        return sum([*self.arms.values(), *self.trials.values()], start=Needs())


def plan_comparison(recipe: Recipe) -> ComparisonPlan:
    """Return what a comparison will need; reads data and model configuration, no weights.

    Args:
        recipe: with a section ``compare``.

    Raises:
        RecipeError: the recipe names no arms, or an arm cannot be what it says.
        DataError: rows cannot be read, dealt out or tokenised.
        ModelError: the base model's folder cannot be used, or the adapter does not fit it.
    """
    found: list[str] = []
    recipe = with_precision(recipe, None, found.append)
    settings, opened = named_arms(recipe), Opened()
    prepared = check_arms(recipe, settings, opened)
    first = next(iter(prepared.values()))
    facts, measured = first.base.facts, speed(first.base.facts, recipe)
    once = needs(recipe, settings, prepared, opened, measured)
    trained = [one for name, one in prepared.items() if settings.arms[name].learns]
    tune = settings.tune
    return ComparisonPlan(
        recipe=recipe,
        model=f"{facts.name} ({facts.architecture}, {facts.parameters:,} parameters, frozen)",
        arms={name: once(name, longest_of(settings, name), False).times(len(settings.seeds)) for name in settings.arms},
        trials={
            name: sum((once(name, arm, True) for arm in tried(settings, name)), start=Needs()).times(len(tune.seeds))
            for name in settings.tuned
        }
        if tune is not None
        else {},
        memory=max((_memory(one) for one in trained), default=0),
        speed=measured,
        warnings=list(dict.fromkeys(text for one in prepared.values() for text in one.warnings)),
        notes=[*found, *_notes(settings, prepared, measured)],
    )


def needs(
    recipe: Recipe, settings: Compare, prepared: Mapping[str, Prepared], opened: Opened, measured: Speed
) -> Callable[[str, Arm, bool], Needs]:
    """Return what says what an arm needs under one seed: of its name, its settings, and whether it is a trial.

    Args:
        recipe: what is compared.
        settings: its section ``compare``.
        prepared: what each arm means under the first seed.
        opened: models and rows, which all arms share.
        measured: speed of this machine.
    """
    seed = settings.seeds[0]

    @functools.cache
    def of_trials(name: str) -> Prepared:
        arm, clients = tried(settings, name)[0], len(prepared[name].clients)
        return prepare(arm_recipe(validating(recipe), name, arm, seed, clients), opened)

    def once(name: str, arm: Arm, trial: bool) -> Needs:
        one = of_trials(name) if trial else prepared[name]
        whole = validating(recipe) if trial else recipe
        changed = arm_recipe(whole, name, arm, seed, len(one.clients))
        return _needs(arm, replace(one, recipe=changed), measured, trial)

    return once


def longest_of(settings: Compare, name: str) -> Arm:
    """Return an arm as it stands, or with the most passes that its trials may choose."""
    return max(tried(settings, name), key=lambda arm: arm.passes or 0, default=settings.arms[name])


def _needs(arm: Arm, prepared: Prepared, measured: Speed, trial: bool) -> Needs:
    """Return what one arm needs under one seed."""
    recipe, facts = prepared.recipe, prepared.base.facts
    clients = {name: one.rows for name, one in prepared.clients.items()}
    scored, own = list(prepared.scored.rows), {name: one.rows for name, one in prepared.held_out.items()}
    answers = sum(SCORED_ROW + len(row.response.encode()) for row in scored)
    if arm.trains in ("most frequent answer", "nearest row"):
        return Needs(runs=1, scored=len(scored), disk=answers)
    all_rows = scored + [row for rows in own.values() for row in rows]
    if not arm.learns:
        return Needs(1, scored=len(all_rows), disk=answers, evaluate_seconds=_scoring(prepared, all_rows, measured))
    size = ADAPTER_WEIGHT * adapter_size(facts, recipe).parameters
    rounds, sent, count, disk = 1, 0.0, 1, float(size)
    if arm.trains == "federation":
        cohort, rounds = cohort_size(recipe.federation, len(clients)), recipe.federation.rounds
        trainers, scorings = list(clients.values()), evaluations(recipe)
        sent = rounds * sum(traffic(facts, recipe, list(clients), cohort))
        disk += recipe.output.keep_checkpoints * size + scorings * answers
        seconds, read = scorings * _scoring(prepared, all_rows, measured), scorings * len(all_rows)
    elif arm.trains == "together":
        trainers, cohort = [[row for rows in clients.values() for row in rows]], 1
        seconds, read = _scoring(prepared, all_rows, measured), len(all_rows)
    else:
        names = list(arm.clients or clients)
        trainers, cohort, count = [clients[name] for name in names], len(names), len(names)
        held = [row for name in names for row in own.get(name, ())]
        seconds = count * _scoring(prepared, scored, measured) + _scoring(prepared, held, measured)
        disk, read = float(count * size), count * len(scored) + len(held)
    if trial and arm.trains != "federation":
        disk = 0.0
    work = work_of(trainers, cohort, recipe)
    return Needs(
        runs=1,
        adapters=count,
        rows=rounds * work.rows,
        steps=rounds * work.steps,
        tokens=rounds * work.tokens,
        sent=sent,
        scored=read,
        disk=disk + count * answers,
        train_seconds=rounds * train_seconds(work_flops(facts, recipe, work), measured),
        evaluate_seconds=seconds,
    )


def _scoring(prepared: Prepared, rows: Sequence[TokenRow], measured: Speed) -> float:
    """Return the estimated seconds of scoring rows once."""
    return evaluation_seconds(prepared.base.facts, prepared.recipe, rows, measured)


def _memory(prepared: Prepared) -> int:
    """Return the peak bytes of training an arm."""
    recipe, facts = prepared.recipe, prepared.base.facts
    adapter = adapter_size(facts, recipe)
    together = clients_together(recipe.engine, cohort_size(recipe.federation, len(prepared.clients)))
    longest = max(row.longest for one in prepared.clients.values() for row in one.rows)
    return sum(memory_bytes(facts, recipe, adapter.parameters, adapter.modules, longest, together).values())


def _notes(settings: Compare, prepared: Mapping[str, Prepared], measured: Speed) -> list[str]:
    """Return what a person should know of rows and estimates."""
    notes = list(dict.fromkeys(text for one in prepared.values() for text in one.notes))
    if settings.tuned:
        notes.append("Arms that trials choose passes for are counted with the most passes of those tried.")
    if any(one.recipe.selection.method != "full" for one in prepared.values()):
        notes.append("Where clients choose rows, rows, steps, tokens and time are given as if they trained on all.")
    return [*notes, *doubts(measured.device)]


# Tables -------------------------------------------------------------------------------------------


def comparison_plan_table(plan: ComparisonPlan) -> Group:
    """Return a plan as tables for the terminal: the whole, and every arm with its trials."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    whole = needs_table("What this comparison will need", _lines(plan))
    arms = Table(title="Of which each arm, over all its seeds", title_justify="left", box=box.SIMPLE_HEAD)
    arms.add_column("arm", overflow="fold", min_width=11)
    for head in ("runs", "rows", "steps", "sent", "time"):
        arms.add_column(head, justify="right", no_wrap=True)
    for name, one in plan.arms.items():
        arms.add_row(Text(clean(name)), *_cells(one))
        if name in plan.trials:
            arms.add_row(Text("  its trials", style="dim"), *_cells(plan.trials[name]))
    return Group(whole, arms)


def _cells(one: Needs) -> list[str]:
    """Return the figures of a line."""
    counts = [amount(value) if value else "-" for value in (one.rows, one.steps)]
    sent = byte_size(one.sent) if one.sent else "-"
    return [f"{one.runs:,}", *counts, sent, duration(math.ceil(one.expected.seconds))]


def _lines(plan: ComparisonPlan) -> list[tuple[str, str]]:
    """Return names and values of the whole."""
    settings, total = plan.recipe.compare, plan.total
    assert settings is not None
    seeds = ", ".join(map(str, settings.seeds))
    runs = " × ".join([counted(len(plan.arms), "arm"), counted(len(settings.seeds), "seed")])
    runs = f"{runs} = {counted(sum(one.runs for one in plan.arms.values()), 'run')}"
    lines = [("base model", plan.model), ("arms", runs), ("seeds", seeds)]
    if plan.trials and settings.tune is not None:
        tune = settings.tune
        arms, rates, seeds_tried = len(plan.trials), len(tune.learning_rates), len(tune.seeds)
        tried = [
            counted(arms, "arm"),
            counted(rates, "learning rate"),
            *([counted(len(tune.passes), "number of passes", "numbers of passes")] if tune.passes else []),
            counted(seeds_tried, "seed"),
        ]
        runs_tried = counted(arms * rates * len(tune.passes or [1]) * seeds_tried, "run")
        lines.append(("trials before", f"{' × '.join(tried)} = {runs_tried} on validation rows"))
    return [
        *lines,
        ("adapters", f"{total.adapters:,} trained"),
        (
            "trained in all",
            f"{total.rows:,.0f} rows, {total.tokens:,.0f} tokens, {total.steps:,.0f} optimizer steps",
        ),
        ("scored in all", f"{total.scored:,} rows"),
        ("sent in all", f"{byte_size(total.sent)} between server and clients"),
        ("disk", f"about {byte_size(total.disk)}"),
        ("memory", f"{byte_size(plan.memory)} at most, and Python and its libraries about 0.7 GB; times --jobs"),
        (
            "time, an estimate",
            f"{duration(total.expected.seconds)} one run after the other on {plan.speed.device}: "
            f"{duration(total.train_seconds)} training, {duration(total.evaluate_seconds)} scoring; "
            "--jobs works on several arms side by side",
        ),
        (
            "which rests on",
            f"{plan.speed.efficiency:.0%} of the matrix rate measured just now, {plan.speed.rate / 1e9:,.0f} GFLOP/s: "
            "a rough estimate, calibrated on one machine only",
        ),
        ("a single run", "add compare=null for the plan of bellwether run"),
        *(("warning", warning) for warning in plan.warnings),
        *(("note", note) for note in plan.notes),
    ]
