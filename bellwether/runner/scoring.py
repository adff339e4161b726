"""Scores of an adapter on a run's held-out rows; those of the untuned base are found once for all arms and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bellwether.exchange.adapter import Adapter, key_b
from bellwether.exchange.scores import Totals
from bellwether.federate import Progress
from bellwether.method.method import Known, Method
from bellwether.method.returned import served
from bellwether.runner.prepare import Prepared

if TYPE_CHECKING:
    from bellwether.client.score import Scored
    from bellwether.model.base import Base
    from bellwether.model.lora import LoraLayers


def score_served(
    prepared: Prepared,
    base: Base,
    layers: LoraLayers,
    method: Method,
    folders: Mapping[str, Path],
    progress: Progress,
    client: Known,
) -> Mapping[str, Totals]:
    """Return the totals by category, without answers, of what a client serves, on the coordinator's held-out rows.

    Args:
        prepared: rows and recipe.
        base: the frozen base model.
        layers: LoRA layers over it.
        method: says what clients serve.
        folders: each client's own folder.
        progress: after the last round.
        client: what the server knows of it.
    """
    from bellwether.client.score import by_category, score
    from bellwether.client.train import recalled

    payload = method.give(progress.state, client, progress.round)
    adapter = served(method, payload, recalled(folders, client.client, client.settled))
    layers.fit(adapter.config)
    layers.load(0, adapter.tensors)
    settings = prepared.recipe.evaluation.model_copy(update={"generate": False})
    with layers.folded(payload.folded):
        scored = score(base, layers, prepared.scored.rows, settings, prepared.stop)
    return by_category(prepared.scored.rows, scored)


def score_held_out(
    prepared: Prepared, base: Base, layers: LoraLayers, adapter: Adapter, folded: Adapter | None = None
) -> Sequence[Scored]:
    """Score the coordinator's held-out rows.

    An adapter whose B is zero leaves the base as it is, whatever its A and its rank, so what was found for one such
    adapter is taken for all of them that score the same rows in the same way.

    Args:
        prepared: rows and recipe.
        base: the frozen base model.
        layers: LoRA layers over it.
        adapter: what is scored.
        folded: an update that is folded into the base; None where there is none.

    Returns:
        One result per row, in the order of ``prepared.scored``.
    """
    from bellwether.client.score import score

    recipe, rows = prepared.recipe, prepared.scored.rows
    untuned = folded is None and not any(adapter.tensors[key_b(module)].any() for module in adapter.config.modules)
    key = recipe.model, recipe.data, recipe.evaluation, tuple(row.row for row in rows)
    if untuned and key in prepared.untuned:
        return prepared.untuned[key]
    layers.fit(adapter.config)
    layers.load(0, adapter.tensors)
    with layers.folded(folded):
        scored = score(base, layers, rows, recipe.evaluation, prepared.stop)
    if untuned:
        prepared.untuned[key] = scored
    return scored
