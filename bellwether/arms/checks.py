"""Whether what a recipe compares can be compared: its arms, their folders, clients and scored rows, and its trials."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from bellwether.arms.arm import arm_recipe
from bellwether.data.federated import load_federated
from bellwether.errors import BellwetherError, RecipeError
from bellwether.recipe.compare import Tune
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Arm, Compare, Recipe
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import Prepared, prepare
from bellwether.tools.atomic import slug
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted

TRIALS = "trials"  # the folder of trials


def named_arms(recipe: Recipe) -> Compare:
    """Return the section ``compare``, once its arms are known to have a folder each.

    Raises:
        RecipeError: the recipe names no arms, or two that would share a folder.
    """
    if recipe.compare is None:
        table = "fedit-table" if recipe.model.path == "starter" else "own-table"
        raise RecipeError(
            "compare is null, so there is nothing to compare; name arms and seeds there, give compare={} for the "
            f"usual arms, or take the recipe {table}."
        )
    slugs = {TRIALS: "the trials"}
    for name in recipe.compare.arms:
        # Some systems take names for equal that differ in case.
        other = slugs.setdefault(slug(name).casefold(), repr(name))
        if other != repr(name):
            raise RecipeError(f"compare.arms: {name!r} and {other} would share a folder; rename this arm.")
    return recipe.compare


def check_arms(recipe: Recipe, settings: Compare, opened: Opened) -> dict[str, Prepared]:
    """Return what each arm means under the first seed, once every arm and trial is known to be possible.

    Args:
        recipe: what is compared.
        settings: its section ``compare``.
        opened: models and rows, which all arms share.

    Raises:
        BellwetherError: an arm cannot be what it says.
    """
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
        _check_choosing(settings.tune, {name: found[name] for name in settings.tuned})
        trials = [
            arm_recipe(validating(recipe), name, arm, settings.tune.seeds[0], len(found[name].clients))
            for name, arm in all_tried(settings)
        ]
        prepare(trials[0], opened)
    _check_dealt(recipe, settings, opened)
    return found


def _check_dealt(recipe: Recipe, settings: Compare, opened: Opened) -> None:
    """Refuse a comparison whose rows cannot be dealt under one of its seeds, before hours are spent on the others."""
    seeds = dict.fromkeys((*settings.seeds, *(settings.tune.seeds if settings.tune is not None else ())))
    for seed in seeds:
        of_seed = (arm_recipe(recipe, name, arm, seed, recipe.partition.clients) for name, arm in settings.arms.items())
        for one in {repr((one.data, one.partition)): one for one in of_seed}.values():
            try:
                load_federated(one.data, one.partition, Randomness(seed), opened.read)
            except BellwetherError as error:
                raise type(error)(f"compare.seeds, under seed {seed}: {error}") from error


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


def _check_choosing(tune: Tune, prepared: Mapping[str, Prepared]) -> None:
    """Refuse to choose by rows of clients where clients hold none out."""
    for name, one in prepared.items():
        if tune.choose_by == "clients_loss" and not one.held_out:
            raise RecipeError(
                f"compare.tune.choose_by is clients_loss, but no client of compare.arms.{name} holds out rows of its "
                "own; set partition.client_test_fraction, or choose by loss."
            )


def _scored_rows(prepared: Prepared) -> list[Any]:
    return [
        (one.row.instruction, one.row.context, one.row.response, one.row.turns, one.row.rejected, one.category)
        for one in prepared.scored.rows
    ]


def _check_clients(name: str, arm: Arm, prepared: Prepared) -> None:
    """Refuse clients that the data does not make."""
    unknown = [client for client in arm.clients or () if client not in prepared.clients]
    if unknown:
        known = list(prepared.clients)
        shown = ", ".join(known[:3]) + (f" to {known[-1]}" if len(known) > 3 else "")
        raise RecipeError(f"compare.arms.{name}.clients: there is no client {unknown[0]!r}; there are {shown}.")


def validating(recipe: Recipe) -> Recipe:
    """Return the recipe of trials, which never see a test row, and give no answers where the loss alone chooses."""
    tune = recipe.compare.tune if recipe.compare is not None else None
    generate = recipe.evaluation.generate and (tune is None or tune.answers)
    return with_overrides(recipe, {"evaluation.part": "validation", "evaluation.generate": generate})


def tried(settings: Compare, name: str) -> list[Arm]:
    """Return an arm with every learning rate and number of passes that its trials try; none where it has no trials."""
    if settings.tune is None or name not in settings.tuned:
        return []
    arm = settings.arms[name]
    grid = itertools.product(arm.learning_rates or settings.tune.learning_rates, settings.tune.passes or [arm.passes])
    return [arm.model_copy(update={"learning_rate": rate, "passes": passes}) for rate, passes in grid]


def all_tried(settings: Compare) -> list[tuple[str, Arm]]:
    """Return every arm that is tuned, by name, with everything that its trials try."""
    return [(name, arm) for name in settings.tuned for arm in tried(settings, name)]


def trial_words(arm: Arm) -> str:
    """Return what a trial of an arm tries, in words."""
    return f"rate {arm.learning_rate:g}, {counted(arm.passes or 0, 'pass', 'passes')}"
