"""One arm of a comparison under one seed: trained, scored, and kept as a file.

An arm says who trains: nobody, each client alone, everybody together, or the federation. Alone and together are
ordinary training: one optimizer from the first step to the last, its learning rate falling over all steps.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellwether.arms.rivals import most_frequent, nearest
from bellwether.errors import RecipeError, RoundFailed
from bellwether.exchange.adapter import adapter_files
from bellwether.exchange.scores import Totals, exact_match, rouge_l
from bellwether.method.cohort import clients_together, cohort_size
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Arm, Recipe, Section
from bellwether.runner.local import (
    EVERYBODY,
    Trained,
    categories_of,
    groups_of,
    scored_outcome,
    train_locally,
    without_rounds,
)
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import Prepared, prepare
from bellwether.store.checkpoint import RECIPE
from bellwether.store.chosen import read_chosen
from bellwether.store.comparison import ADAPTERS, OUTCOMES, RUN, Costs, Outcome, is_done, read_outcomes
from bellwether.store.run_folder import ADAPTER, client_folders
from bellwether.tools.atomic import make_folder, slug, write_atomic, write_folder_atomic
from bellwether.tools.json_text import plain
from bellwether.tools.progress import advance, listening, within

if TYPE_CHECKING:
    from bellwether.exchange.records import RoundRecord, Watcher


def arm_recipe(recipe: Recipe, name: str, arm: Arm, seed: int, clients: int) -> Recipe:
    """Return the recipe that an arm runs under a seed; the held-out rows are the same under every seed.

    Args:
        recipe: what is compared.
        name: of the arm.
        arm: its settings; its passes become local epochs of one round where there is no federation, and else as
            many rounds as let each client take part in so many passes on average.
        seed: the run's seed.
        clients: how many clients the data makes.

    Raises:
        RecipeError: the arm's own settings cannot stand.
    """
    place = f"compare.arms.{name}"
    _check_set(recipe, arm, place)
    overrides: dict[str, Any] = {"seed": seed, "compare": None, "output.folder": None, **arm.set}
    overrides.setdefault("data.seed", recipe.seed if recipe.data.seed is None else recipe.data.seed)
    if arm.learning_rate is not None:
        overrides["training.learning_rate"] = arm.learning_rate
    changed = with_overrides(recipe, overrides, place)
    return with_overrides(changed, _length(changed, arm, clients, place), place)


def _check_set(recipe: Recipe, arm: Arm, place: str) -> None:
    """Refuse to replace a whole section, which would reset its other fields."""
    for dotted, value in arm.set.items():
        target: Any = recipe
        for part in dotted.split("."):
            target = getattr(target, part, None)
        if isinstance(target, Section) and isinstance(value, Mapping):
            inner = next(iter(value), "FIELD")
            raise RecipeError(f"{place}.set: {dotted} is a whole section; name its fields, such as {dotted}.{inner}.")


def _length(recipe: Recipe, arm: Arm, clients: int, place: str) -> dict[str, Any]:
    """Return the fields that say how long an arm trains."""
    training, federation = recipe.training, recipe.federation
    passes_per_round = cohort_size(federation, clients) / clients * training.local_epochs
    if arm.trains == "federation":
        if arm.passes is None:
            return {}
        if training.local_steps is not None:
            raise RecipeError(
                f"{place}: passes cannot be told where training.local_steps counts steps; set federation.rounds."
            )
        return {"federation.rounds": max(1, round(arm.passes / passes_per_round))}
    if arm.steps is not None:
        return without_rounds(steps=arm.steps)
    if arm.learns and arm.passes is None and training.local_steps is not None:
        raise RecipeError(f"{place}: training.local_steps counts steps of a round; give this arm passes or steps.")
    passes = arm.passes or max(1, round(federation.rounds * passes_per_round))
    return without_rounds(passes=passes)


def train_arm(
    name: str, arm: Arm, recipe: Recipe, folder: Path, trial: bool, opened: Opened, watch: Watcher | None = None
) -> list[Outcome]:
    """Train and score an arm, unless its folder holds its outcomes already.

    Args:
        name: of the arm.
        arm: its settings.
        recipe: of ``arm_recipe``.
        folder: of this arm under this seed alone; a federation keeps its run there, and goes on with it.
        trial: a federation that a failed round ends, as where it diverges, has an outcome that says so.
        opened: what other arms of this process have opened already.
        watch: is told how far it is; None is silent.

    Returns:
        One outcome per trained adapter.

    Raises:
        BellwetherError: it cannot be trained, or its outcomes cannot be kept.
    """
    if is_done(folder):
        return read_outcomes(folder)
    make_folder(folder)
    with listening(watch):
        prepared = prepare(recipe, opened)
    try:
        if arm.trains == "federation":
            outcomes = _federated(name, prepared, folder / RUN, opened, watch)
        else:
            with listening(watch):
                outcomes = _local(name, arm, prepared, None if trial else folder)
    except RoundFailed as error:
        if not trial:
            raise
        outcomes = [Outcome(name, recipe.seed, "", (), (), (), failure=str(error))]
    write_atomic(folder / OUTCOMES, (json.dumps(plain(outcomes)) + "\n").encode())
    return outcomes


def _federated(name: str, prepared: Prepared, folder: Path, opened: Opened, watch: Watcher | None) -> list[Outcome]:
    """Run a federation in its own run folder, or go on with it."""
    from bellwether.runner.run import run

    recipe = prepared.recipe
    if (folder / RECIPE).exists():
        result = run(recipe, resume=folder, opened=opened, watch=watch)
    else:
        result = run(with_overrides(recipe, {"output.folder": str(folder)}), opened=opened, watch=watch)
    curve, cost = _course(result.folder, result.rounds, prepared)
    own = next((one.clients for one in reversed(result.evaluations) if one.part == "clients"), {})
    clients = {client: sum(parts.values(), start=Totals()) for client, parts in own.items()}
    return [
        Outcome(
            arm=name,
            seed=recipe.seed,
            client="",
            categories=categories_of(prepared),
            totals=tuple(row.totals for row in result.scored),
            answers=tuple(row.answer for row in result.scored),
            cost=cost,
            curve=curve,
            groups=groups_of(prepared),
            clients=clients,
            adapter=f"{folder.name}/{ADAPTER}",
        )
    ]


def _course(
    folder: Path, rounds: Sequence[RoundRecord], prepared: Prepared
) -> tuple[tuple[tuple[float, float], ...], Costs]:
    """Return how a federation's training loss fell over its passes, and what it cost; bases would travel in float32."""
    held = sum(len(one.rows) for one in prepared.clients.values())
    passes = [seen / held for seen in itertools.accumulate(one.rows_seen for one in rounds)]
    asked = {record.client for one in rounds for record in one.clients}
    rows = sum(len(prepared.clients[client].rows) for client in asked)
    if prepared.recipe.selection.method != "full":
        rows = sum(one.distinct for one in read_chosen(client_folders(folder, list(prepared.clients)), rounds).values())
    messages = sum(len(one.cohort) + len(one.clients) for one in rounds)
    surveys = [one.seconds["survey"] for one in rounds if "survey" in one.seconds]
    cost = {
        "rows": rows,
        "rows_of_all": held,
        "rows_seen": sum(one.rows_seen for one in rounds),
        "tokens": sum(one.tokens for one in rounds),
        "seconds": sum(one.seconds["train"] + one.seconds["aggregate"] for one in rounds),
        **({"survey_seconds": sum(surveys)} if surveys else {}),
        "bytes": sum(one.bytes_up + one.bytes_down for one in rounds),
        "bytes_of_whole_base": 4 * messages * prepared.base.facts.parameters,
    }
    # A round in which nobody trained has no loss.
    return tuple((seen, one.loss) for seen, one in zip(passes, rounds, strict=True) if math.isfinite(one.loss)), cost


def _local(name: str, arm: Arm, prepared: Prepared, folder: Path | None) -> list[Outcome]:
    """Train whoever an arm names without any exchange, and score; keep adapters where there is a folder for them."""
    from bellwether.model.base import load_base
    from bellwether.model.lora import LoraLayers, initial_adapter
    from bellwether.tools.randomness import Randomness

    recipe = prepared.recipe
    if arm.trains in ("most frequent answer", "nearest row"):
        return [_rival(name, arm, prepared)]
    base = load_base(recipe.model, prepared.base)
    initial = initial_adapter(base, recipe.lora, Randomness(recipe.seed).torch("initial adapter"))
    alone = len(arm.clients or prepared.clients) if arm.trains == "alone" else 1
    layers = LoraLayers(base.model, initial.config, clients_together(recipe.engine, alone))
    who = None if arm.trains == "together" else arm.clients or list(prepared.clients)
    trained = [Trained("", initial)] if arm.trains == "nobody" else train_locally(prepared, base, layers, initial, who)
    outcomes: list[Outcome] = []
    for number, one in enumerate(trained, start=1):
        with within(outcomes, len(trained), "adapters scored"):
            outcome = scored_outcome(name, one, prepared, base, layers)
        kept = f"{ADAPTERS}/{number}-{slug(one.client or EVERYBODY)}"
        if folder is not None and arm.learns:
            (folder / ADAPTERS).mkdir(exist_ok=True)
            write_folder_atomic(folder / kept, adapter_files(one.adapter))
            outcome = replace(outcome, adapter=kept)
        outcomes.append(outcome)
    return outcomes


def _rival(name: str, arm: Arm, prepared: Prepared) -> Outcome:
    """Answer by a trivial rule over all clients' rows; it has no loss."""
    # In an order of their own, so that the choice among equals does not depend on who holds which row.
    train = sorted(
        (row for rows in prepared.federated.clients.values() for row in rows),
        key=lambda row: (row.category, row.instruction, row.context, row.response),
    )
    test = [row.row for row in prepared.scored.rows]
    advance(f"answering by {arm.trains}")
    answer = most_frequent if arm.trains == "most frequent answer" else nearest
    answers = answer(train, test)
    totals = tuple(
        Totals(rows=1, generated=1, rouge_l=rouge_l(text, row.response), exact=int(exact_match(text, row.response)))
        for text, row in zip(answers, test, strict=True)
    )
    return Outcome(
        name, prepared.recipe.seed, "", categories_of(prepared), totals, tuple(answers), groups=groups_of(prepared)
    )
