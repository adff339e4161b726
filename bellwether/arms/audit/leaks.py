"""What single updates and released centroids give away, of what was seen of a run from the server.

Shape legend: N rows in the game, C centroids of a client, M rows of all clients that were surveyed, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bellwether.arms.audit.game import Eavesdropper
from bellwether.client.memory import Memory
from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.checks import check_update
from bellwether.exchange.messages import Payload
from bellwether.recipe.recipe import Recipe
from bellwether.store.audit import Named
from bellwether.tools.json_text import KEPT, Count, Number

Floats = NDArray[np.float64]
Losses = Callable[[Adapter, Adapter | None], Floats]


@dataclass(frozen=True)
class UpdateScores:
    """How far updates of a round lower the loss of rows, in nats; of rows whose client sent one.

    Args:
        senders: clients whose update can be read by itself.
        inside: whether each row was trained on by its client.
        single: by its own client's update.
        summed: by what the round gave, which everybody receives.
        named: whether no other client's update lowers its loss as much as its own client's.
    """

    __pydantic_config__ = KEPT

    senders: Count
    inside: tuple[bool, ...]
    single: tuple[Number, ...]
    summed: tuple[Number, ...]
    named: tuple[bool, ...]


def update_scores(
    seen: Eavesdropper, final: Adapter, recipe: Recipe, owners: Sequence[str], inside: Sequence[bool], losses: Losses
) -> UpdateScores | None:
    """Return what the updates of the first round tell of rows; None where no single one can be read.

    Args:
        seen: of the run.
        final: the run's adapter, which is what the round gave where there was but one.
        recipe: of the run.
        owners: the client of each row in the game.
        inside: whether the client trained on it.
        losses: of the rows in the game, with an adapter and what is folded into the base.
    """
    sent = {client: adapter for client in seen.replies if (adapter := readable(seen, client, recipe)) is not None}
    numbers = [number for number, owner in enumerate(owners) if owner in sent]
    if not numbers:
        return None
    start = next(iter(seen.tasks.values())).payload
    before_N = losses(start.adapter, start.folded)
    gains = {client: before_N - losses(adapter, start.folded) for client, adapter in sent.items()}
    given = seen.after or Payload(final)
    summed_N = before_N - losses(given.adapter, given.folded)
    most_N = np.max(list(gains.values()), axis=0)
    return UpdateScores(
        senders=len(sent),
        inside=tuple(bool(inside[number]) for number in numbers),
        single=tuple(float(gains[owners[number]][number]) for number in numbers),
        summed=tuple(float(summed_N[number]) for number in numbers),
        named=tuple(bool(gains[owners[number]][number] == most_N[number]) for number in numbers),
    )


def readable(seen: Eavesdropper, client: str, recipe: Recipe) -> Adapter | None:
    """Return the adapter that a client's update stands for; None where the server cannot read it alone.

    Args:
        seen: of the run.
        client: the client.
        recipe: of the run.
    """
    task, reply = seen.tasks[client], seen.replies[client]
    arrays = reply.update.arrays if reply.update is not None else {}
    shapes = {name: np.asarray(value).shape for name, value in arrays.items()}
    limits = recipe.federation
    try:
        update = check_update(
            reply, task.payload, shapes, task.round, limits.max_rows, limits.max_norm, task.compression, task.payload
        )
    except UpdateRejected:
        return None
    return task.payload.adapter.updated(update.tensors)


# Centroids ----------------------------------------------------------------------------------------


def named_rows(
    released: Mapping[str, NDArray[np.float32]], memories: Mapping[str, Memory], texts: Mapping[str, Sequence[object]]
) -> Named:
    """Return how often centroids name rows.

    The attacker has the rows of all clients that were surveyed as candidates, and where each lies in the shared space.

    Args:
        released: centroids_Cd of each client, as they left it.
        memories: what each client remembers: where its rows lie, and which cluster each belongs to.
        texts: the text of each row, by client.
    """
    names = list(released)
    owner_M = np.concatenate([[number] * len(memories[name].points_Nd) for number, name in enumerate(names)])
    points_Md = np.concatenate([memories[name].points_Nd for name in names]).astype(np.float64)
    text_M = [text for name in names for text in texts[name]]
    labels_M = np.concatenate([_labels(memories[name]) for name in names])
    hits = copies = exact = count = 0
    chance = 0.0
    for number, name in enumerate(names):
        for centroid_d, cluster in zip(released[name], memories[name].released, strict=True):
            nearest = int(np.square(points_Md - centroid_d).sum(1).argmin())
            inside_M = (owner_M == number) & (labels_M == cluster)
            count += 1
            hits += bool(inside_M[nearest])
            chance += float(inside_M.mean())
            own = {text_M[index] for index in np.flatnonzero(inside_M)}
            copies += len(own) == 1
            exact += len(own) == 1 and text_M[nearest] in own
    return Named(count, hits, chance / max(count, 1), copies, exact)


def _labels(memory: Memory) -> NDArray[np.int64]:
    assert memory.clusters is not None
    return memory.clusters.labels_N.astype(np.int64)
