"""An audit: attacks that try to break a federation's privacy, on a person's own recipe, in the simulation.

    bellwether audit default --out FOLDER

Where the recipe is protected, everything is done twice: without the protection, and as it is, with the same coins and
seeds. Every finished run is a file in the folder and is not run again (``bellwether.store.audit`` lists the files).

Shape legend: S runs, N rows in the game, K canaries or clients.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.arms.audit.bounds import SHARES, best_bound, chance
from bellwether.arms.audit.game import Settings, make_world
from bellwether.arms.audit.ranks import auc, exposure, lira, mean_over, over_runs, tpr_at
from bellwether.arms.audit.runs import Bench, ClientsSeen, RowsSeen, make_bench, seen_clients, seen_rows
from bellwether.arms.audit.verdict import verdicts
from bellwether.errors import CheckpointError, RecipeError
from bellwether.exchange.records import Event, Note, Watcher
from bellwether.recipe.file import differences, dump_recipe, load_recipe, with_overrides
from bellwether.recipe.privacy import Privacy
from bellwether.recipe.recipe import Recipe
from bellwether.runner.opened import Opened
from bellwether.runner.precision import with_precision
from bellwether.runner.prepare import prepare, with_absolute_paths
from bellwether.store.audit import (
    LIRA,
    LOSS,
    SINGLE,
    SUMMED,
    Audit,
    Epsilon,
    Exposed,
    Membership,
    Side,
    some,
    write_audit,
)
from bellwether.store.checkpoint import RECIPE
from bellwether.tools.atomic import make_folder, write_atomic
from bellwether.tools.intervals import Interval
from bellwether.tools.json_text import read_json
from bellwether.tools.lock import held
from bellwether.tools.progress import listening
from bellwether.tools.randomness import Randomness

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SETTINGS = "settings.json"
AS_IT_IS, BARE = "as it is", "without protection"
CONFIDENCE = 0.95
_SHOWN = 400  # gains of rows that a page draws, of each kind

# What takes each protection away.
_BARE: Mapping[str, Any] = {
    **{f"privacy.{name}": info.default for name, info in Privacy.model_fields.items()},
    "secure_aggregation.enabled": False,
    "selection.noise": 0.0,
}


def audit(recipe: Recipe, folder: Path, settings: Settings | None = None, *, watch: Watcher | None = None) -> Audit:
    """Attack a recipe, and say what an attacker gets.

    Args:
        recipe: what is audited.
        folder: where everything goes; made if it does not exist; what it holds of this audit is kept.
        settings: how much is done; None takes the usual amount.
        watch: is told what happens; None is silent.

    Returns:
        What was found, which is also in the folder.

    Raises:
        RecipeError: the settings cannot stand.
        CheckpointError: the folder holds something else, is in use, or cannot be written.
        BellwetherError: a run failed.
    """
    settings = settings or Settings()
    _check(settings)
    tell = watch or _silent
    recipe = with_overrides(recipe, {"compare": None, "output.folder": None})
    recipe = with_absolute_paths(with_precision(recipe, folder, lambda text: tell(Note(text))))
    make_folder(folder)
    with held(folder, RECIPE), listening(tell):
        _claim(folder, recipe, settings)
        opened = Opened()
        prepared = prepare(recipe, opened)
        for text in prepared.warnings:
            tell(Note(text, warning=True))
        bench = make_bench(make_world(prepared, settings), settings, opened, _quiet(tell))
        sides = [_side(bench, name, one, folder, tell) for name, one in versions(recipe).items()]
        found = Audit(
            recipe=recipe.name,
            model=recipe.model.path,
            seed=recipe.seed,
            runs=settings.runs,
            rows=len(bench.world.rows),
            clients=len(prepared.clients),
            canaries=settings.canaries,
            candidates=settings.candidates,
            chance=chance(settings.candidates),
            confidence=CONFIDENCE,
            sides=tuple(sides),
            verdicts=(),
        )
        found = dataclasses.replace(found, verdicts=tuple(verdicts(found)))
        write_audit(folder, found)
    return found


def _silent(event: Event) -> None:
    """Tell nobody."""


def _quiet(tell: Watcher) -> Watcher:
    """Return what hears runs, whose notes, the same in each of them, it keeps to itself."""

    def watch(event: Event) -> None:
        if not isinstance(event, Note):
            tell(event)

    return watch


def _check(settings: Settings) -> None:
    """Refuse amounts with which nothing can be said."""
    from bellwether.arms.audit.canaries import MOST

    if settings.runs < 1 or settings.rows < 1 or settings.canaries < 0:
        raise RecipeError(
            f"An audit of {settings.runs} runs, {settings.rows} rows and {settings.canaries} canaries says nothing; "
            "give at least one run and one row."
        )
    if not 2 <= settings.candidates <= MOST or not settings.repeats or min(settings.repeats) < 1:
        raise RecipeError(
            f"{settings.candidates} candidates and repeats {list(settings.repeats)} cannot be; give 2 to {MOST} "
            "candidates, and repeats of at least one."
        )


def _claim(folder: Path, recipe: Recipe, settings: Settings) -> None:
    """Write what is audited, or check that it is the same as when the audit began; more runs may be asked for."""
    amounts = dataclasses.asdict(settings) | {"repeats": list(settings.repeats)}
    kept = {name: value for name, value in amounts.items() if name not in ("runs", "clients")}
    if (folder / SETTINGS).exists():
        try:
            changed = differences(load_recipe(folder / RECIPE), recipe)
        except RecipeError as error:
            raise CheckpointError(
                f"{folder / RECIPE} cannot be read; give another folder with --out. {error}"
            ) from error
        then = read_json(folder / SETTINGS, dict[str, Any], "restore it, or give another folder with --out")
        changed = [
            *changed,
            *(f"{name}: {then.get(name)} -> {value}" for name, value in kept.items() if then.get(name) != value),
        ]
        if changed:
            raise CheckpointError(
                f"{folder} holds an audit of something else; undo the change, or give another folder with --out. "
                f"Changed: {'; '.join(changed)}."
            )
        return
    write_atomic(folder / RECIPE, dump_recipe(recipe).encode())
    write_atomic(folder / SETTINGS, (json.dumps(kept, indent=1) + "\n").encode())


def protections(recipe: Recipe) -> tuple[str, ...]:
    """Return what protects a recipe's clients, in words."""
    privacy, found = recipe.privacy, []
    if privacy.on:
        level = "whole clients" if privacy.unit == "client" else "single rows"
        budget = f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else f"noise {privacy.noise:g}"
        found.append(f"differential privacy of {level} ({budget}, delta {privacy.delta:g})")
    if recipe.secure_aggregation.enabled:
        found.append("secure aggregation, which shows the server sums of updates alone")
    if recipe.selection.surveys and recipe.selection.noise:
        found.append(f"noise on centroids ({recipe.selection.noise:g})")
    return tuple(found)


def versions(recipe: Recipe) -> dict[str, Recipe]:
    """Return what is attacked: the recipe without its protection, where it has some, and as it is."""
    if not protections(recipe):
        return {AS_IT_IS: recipe}
    return {BARE: with_overrides(recipe, dict(_BARE)), AS_IT_IS: recipe}


def _side(bench: Bench, name: str, recipe: Recipe, folder: Path, tell: Watcher) -> Side:
    """Return what the attacks find against one version of the recipe."""
    place, runs = folder / name.replace(" ", "-"), bench.settings.runs

    def all_of(game: str, seen: Callable[..., Any]) -> Iterator[Any]:
        for number in range(runs):
            tell(Note(f"{name}, game of {game}: run {number + 1} of {runs}."))
            yield seen(bench, recipe, number, place / f"{game}-{number + 1}")

    rows = list(all_of("rows", seen_rows))
    clients = list(all_of("clients", seen_clients)) if bench.settings.clients else []
    return summed_up(bench, name, recipe, rows, clients)


def summed_up(
    bench: Bench, name: str, recipe: Recipe, rows: Sequence[RowsSeen], clients: Sequence[ClientsSeen]
) -> Side:
    """Return what the attacks find in what was seen of all runs of one version of the recipe.

    Args:
        bench: what all runs need.
        name: of the version.
        recipe: the version.
        rows: of each run of the game of rows.
        clients: of each run of the game of clients; there may be none.
    """
    draw = Randomness(recipe.seed).numpy("intervals of an audit")
    inside_SN, gains_SN = np.array([one.rows_in for one in rows]), np.array([one.gains for one in rows])
    owner, owner_chance = _owner(rows[0], draw)
    told = [*(one.epsilon for one in rows), *(one.epsilon for one in clients)]
    stated = [epsilon for epsilon in told if epsilon is not None]
    return Side(
        name=name,
        protections=protections(recipe),
        unit=recipe.privacy.unit,
        stated=max(stated, default=None),
        delta=recipe.privacy.delta,
        exposed=_exposed(bench, rows, draw),
        memberships=_memberships(rows[0], gains_SN, inside_SN, draw),
        owner=owner,
        owner_chance=owner_chance,
        epsilons=_epsilons(bench, rows, clients, recipe.privacy.delta),
        named=rows[0].named,
        gains_in=some(gains_SN[inside_SN].tolist(), _SHOWN),
        gains_out=some(gains_SN[~inside_SN].tolist(), _SHOWN),
    )


def _exposed(bench: Bench, rows: Sequence[RowsSeen], draw: np.random.Generator) -> tuple[Exposed, ...]:
    """Return how exposed secrets are, by how often they stand there."""
    repeats_K = np.array([canary.repeats for canary in bench.world.canaries])
    inside_SK, exposures_SK = np.array([one.canaries_in for one in rows]), np.array([one.exposures for one in rows])
    base_K = np.array([exposure(losses_R, 0) for losses_R in bench.secrets_KR])

    def mean(values: Floats) -> Interval | None:
        return mean_over(values, draw) if len(values) else None

    found = []
    for repeats in sorted(set(repeats_K.tolist())):
        here = repeats_K == repeats
        inside, values = inside_SK[:, here], exposures_SK[:, here]
        found.append(Exposed(repeats, mean(values[inside]), mean(values[~inside]), mean_over(base_K[here], draw)))
    return tuple(found)


def _memberships(
    first: RowsSeen, gains_SN: Floats, inside_SN: Bools, draw: np.random.Generator
) -> tuple[Membership, ...]:
    """Return how well each attack tells trained rows from those left out."""
    attacks = {LOSS: (gains_SN, inside_SN)}
    ratios_SN = lira(gains_SN, inside_SN)
    if np.isfinite(ratios_SN).any():
        kept = [_two_sided(ratios_N, inside_N) for ratios_N, inside_N in zip(ratios_SN, inside_SN, strict=True)]
        attacks[LIRA] = ratios_SN[kept], inside_SN[kept]
    if first.updates is not None:
        inside = np.array(first.updates.inside)[None]
        attacks[SINGLE] = np.array(first.updates.single)[None], inside
        attacks[SUMMED] = np.array(first.updates.summed)[None], inside
    found = []
    for attack, (scores, inside) in attacks.items():
        if len(scores) and any(_two_sided(*one) for one in zip(scores, inside, strict=True)):
            area, tpr = over_runs(scores, inside, auc, draw), over_runs(scores, inside, tpr_at, draw)
            found.append(Membership(attack, attack in (LOSS, LIRA), area, tpr))
    return tuple(found)


def _two_sided(scores_N: Floats, inside_N: Bools) -> bool:
    """Return whether there are scores of both kinds of rows."""
    known = inside_N[np.isfinite(scores_N)]
    return bool(known.any() and not known.all())


def _owner(first: RowsSeen, draw: np.random.Generator) -> tuple[Interval | None, float]:
    """Return of what share of trained rows the own client's update tells most, and the share by chance."""
    updates = first.updates
    if updates is None or not any(updates.inside) or updates.senders < 2:
        return None, 0.0
    named = np.array(updates.named)[np.array(updates.inside)]
    return mean_over(named, draw), 1 / updates.senders


def _epsilons(
    bench: Bench, rows: Sequence[RowsSeen], clients: Sequence[ClientsSeen], delta: float
) -> tuple[Epsilon, ...]:
    """Return the lower bounds of both games.

    Planted secrets that stand there once are rows like others, and more telling ones: both kinds are tried, and what
    the confidence leaves is halved.
    """
    half = 1 - (1 - CONFIDENCE) / 2
    once_K = np.array([canary.repeats == 1 for canary in bench.world.canaries], bool)
    parts = [(_relative([one.gains for one in rows]), np.array([one.rows_in for one in rows]))]
    if once_K.any():
        scores = _relative([one.canary_gains for one in rows])[:, once_K]
        parts.append((scores, np.array([one.canaries_in for one in rows])[:, once_K]))
    found = [_bound("rows", parts, delta, half)]
    if clients:
        scores = _relative([one.gains for one in clients])
        found.append(_bound("clients", [(scores, np.array([one.clients_in for one in clients]))], delta, CONFIDENCE))
    return tuple(found)


def _relative(gains: Sequence[Sequence[float]]) -> Floats:
    """Return gains less their mean over runs, so that one threshold suits all rows; coins are not looked at."""
    gains_SN = np.array(gains, np.float64)
    centred: Floats = gains_SN - gains_SN.mean(0) if len(gains_SN) > 1 else gains_SN
    return centred


def _bound(game: str, parts: Sequence[tuple[Floats, Bools]], delta: float, confidence: float) -> Epsilon:
    """Return the largest bound of the parts of a game."""
    bounds = [best_bound(scores.ravel(), inside.ravel(), delta, confidence, SHARES) for scores, inside in parts]
    lower, guesses = max(bounds, key=lambda one: one[0])
    return Epsilon(game, guesses.bits, guesses.made, guesses.right, lower)
