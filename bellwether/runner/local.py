"""Training without a federation, to compare it with: clients alone, or all rows together; and scores, row by row.

It is ordinary training: one optimizer from the first step to the last, its learning rate falling over all steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bellwether.errors import DataError
from bellwether.exchange.scores import Totals
from bellwether.runner.prepare import Prepared
from bellwether.runner.scoring import score_held_out
from bellwether.store.comparison import Costs, Outcome
from bellwether.tools.progress import within

if TYPE_CHECKING:
    from bellwether.exchange.adapter import Adapter
    from bellwether.model.base import Base
    from bellwether.model.lora import LoraLayers

EVERYBODY = "everybody"
POINTS = 50  # of a curve, at most


def without_rounds(*, passes: int | None = None, steps: int | None = None) -> dict[str, Any]:
    """Return the fields of a recipe that is trained without rounds, by dotted name.

    Args:
        passes: over the rows.
        steps: of the optimizer, instead of passes.
    """
    alone: dict[str, Any] = {"federation.rounds": 1, "training.warmup_rounds": 0}
    if steps is not None:
        return alone | {"training.local_steps": steps}
    return alone | {"training.local_epochs": passes, "training.local_steps": None}


@dataclass(frozen=True)
class Trained:
    """An adapter, the client whose it is, empty where it is nobody's own, what it cost, and how its loss fell."""

    client: str
    adapter: Adapter
    cost: Costs = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()


def train_locally(
    prepared: Prepared, base: Base, layers: LoraLayers, initial: Adapter, clients: Sequence[str] | None
) -> list[Trained]:
    """Train clients alone, or all rows together, from the same adapter.

    Args:
        prepared: rows, and a recipe without rounds.
        base: the frozen base model.
        layers: LoRA layers over it.
        initial: the adapter to begin with.
        clients: who trains alone; None trains the rows of all clients together.

    Raises:
        DataError: a client could not train.
    """
    from bellwether.client.train import train_cohort
    from bellwether.exchange.messages import Payload, Reply, TrainTask, client_draws
    from bellwether.method.average import fedavg
    from bellwether.tools.randomness import Randomness

    recipe = prepared.recipe
    if clients is None:
        rows: dict[str, Sequence[Any]] = {EVERYBODY: [row for part in prepared.clients.values() for row in part.rows]}
    else:
        rows = {client: prepared.clients[client].rows for client in clients}
    trained, of_all = list[Trained](), sum(len(part.rows) for part in prepared.clients.values())
    randomness, replies = Randomness(recipe.seed), list[Reply]()
    tasks = {
        client: TrainTask(1, Payload(initial), recipe.training, 1, client_draws(randomness, 1, client))
        for client in rows
    }
    with within(replies, len(rows), "clients trained"):
        for reply in train_cohort(base, layers, rows, tasks, fedavg(), recipe.engine.tokens):
            replies.append(reply)
    for reply in replies:
        if reply.update is None:
            raise DataError(f"{reply.client} could not train: {reply.failure}.")
        metrics, held = reply.update.metrics, len(rows[reply.client])
        cost = {
            "rows": held,
            "rows_of_all": of_all,
            "rows_seen": metrics["rows"],
            "tokens": metrics["tokens"],
            "seconds": reply.seconds,
        }
        adapter = initial.with_tensors(reply.update.tensors)
        curve = _curve(reply.losses, metrics["rows"] / held)
        trained.append(Trained("" if clients is None else reply.client, adapter, cost, curve))
    return trained


def _curve(losses: Sequence[float], passes: float) -> tuple[tuple[float, float], ...]:
    """Return how a loss fell over a number of passes: means over stretches of its steps."""
    ends = [round(len(losses) * part / POINTS) for part in range(1, POINTS + 1)] if len(losses) > POINTS else None
    ends = ends or list(range(1, len(losses) + 1))
    return tuple(
        (passes * end / len(losses), math.fsum(losses[start:end]) / (end - start))
        for start, end in itertools.pairwise([0, *ends])
    )


def scored_outcome(name: str, trained: Trained, prepared: Prepared, base: Base, layers: LoraLayers) -> Outcome:
    """Score an adapter on the shared rows, and on those that its client, or each client, holds out.

    Args:
        name: of what was trained, which becomes the outcome's arm.
        trained: the adapter.
        prepared: rows and recipe.
        base: the frozen base model.
        layers: LoRA layers over it.
    """
    from bellwether.client.score import score

    recipe, client = prepared.recipe, trained.client
    scored = score_held_out(prepared, base, layers, trained.adapter)
    layers.fit(trained.adapter.config)
    layers.load(0, trained.adapter.tensors)
    held_out = {
        owner: score(base, layers, rows.rows, recipe.evaluation, prepared.stop)
        for owner, rows in prepared.held_out.items()
        if client in ("", owner)
    }
    return Outcome(
        arm=name,
        seed=recipe.seed,
        client=client,
        categories=categories_of(prepared),
        totals=tuple(row.totals for row in scored),
        answers=tuple(row.answer for row in scored),
        own=tuple(sorted({row.category for row in prepared.clients[client].rows})) if client else (),
        cost=trained.cost,
        curve=trained.curve,
        groups=groups_of(prepared),
        clients={owner: sum((row.totals for row in rows), start=Totals()) for owner, rows in held_out.items()},
    )


def categories_of(prepared: Prepared) -> tuple[str, ...]:
    """Return the category of each scored row."""
    return tuple(row.category for row in prepared.scored.rows)


def groups_of(prepared: Prepared) -> tuple[str, ...]:
    """Return the group of each scored row, where there are several."""
    groups = tuple(row.group for row in prepared.scored.rows)
    return groups if len(set(groups)) > 1 else ()
