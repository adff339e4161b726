"""Scores of an adapter on a run's held-out rows; those of the untuned base are found once for all arms and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bellwether.exchange.adapter import Adapter, key_b
from bellwether.runner.prepare import Prepared

if TYPE_CHECKING:
    from bellwether.client.score import Scored
    from bellwether.model.base import Base
    from bellwether.model.lora import LoraLayers


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
