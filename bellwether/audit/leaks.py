"""What single updates and released centroids give away, of what was seen of a run from the server.

Shape legend: N rows in the game, C centroids of a client, M rows of all clients that were surveyed, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bellwether.audit.game import Eavesdropper
from bellwether.audit.ranks import auc, mean_over
from bellwether.client.memory import Memory
from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.checks import check_update
from bellwether.exchange.messages import Payload
from bellwether.recipe.recipe import Recipe
from bellwether.tools.intervals import Interval
from bellwether.tools.json_text import KEPT, Amount, Count, Number

Floats = NDArray[np.float64]
Gain = Callable[[Adapter, Adapter | None], Floats]  # from an adapter and what is folded into the base to losses of rows


@dataclass(frozen=True)
class UpdateScores:
    """How far updates of a round lower the loss of rows, in nats; of rows whose client sent one.

    Args:
        owners: the client of each row.
        inside: whether the client trained on it.
        single: by its own client's update.
        summed: by what the round gave, which everybody receives.
        others: by the updates of the other clients, of each row their mean.
    """

    __pydantic_config__ = KEPT

    owners: tuple[str, ...]
    inside: tuple[bool, ...]
    single: tuple[Number, ...]
    summed: tuple[Number, ...]
    others: tuple[Number, ...]


def update_scores(
    seen: Eavesdropper, final: Adapter, recipe: Recipe, owners: Sequence[str], inside: Sequence[bool], losses: Gain
) -> UpdateScores | None:
    """Return what the updates of the first round tell of rows; None where no single one can be read.

    Args:
        seen: of the run.
        final: the run's adapter, which is what the round gave where there was but one.
        recipe: of the run.
        owners: the client of each row in the game.
        inside: whether the client trained on it.
        losses: of the rows in the game, with an adapter.
    """
    sent = {client: update for client in seen.replies if (update := readable(seen, client, recipe)) is not None}
    known = np.array([owner in sent for owner in owners])
    if not known.any():
        return None
    start = next(iter(seen.tasks.values())).payload
    before = {client: losses(seen.tasks[client].payload.adapter, start.folded) for client in sent}
    gains = {client: before[client] - losses(adapter, start.folded) for client, adapter in sent.items()}
    given = seen.after or Payload(final)
    # Adapters of unlike ranks do alike before the first round: their B is zero.
    summed = next(iter(before.values())) - losses(given.adapter, given.folded)
    numbers = np.flatnonzero(known).tolist()
    foreign = [
        float(np.mean([gain[number] for client, gain in gains.items() if client != owners[number]] or [np.nan]))
        for number in numbers
    ]
    return UpdateScores(
        owners=tuple(owners[number] for number in numbers),
        inside=tuple(bool(inside[number]) for number in numbers),
        single=tuple(float(gains[owners[number]][number]) for number in numbers),
        summed=tuple(float(summed[number]) for number in numbers),
        others=tuple(foreign),
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


def own_over_others(scores: UpdateScores) -> tuple[float, float]:
    """Return how often an update, or the sum, lowers the loss of its client's own rows more than of others' rows.

    For each client, the area under the curve of its trained rows against the trained rows of the others, as its own
    update scores its rows and the others' updates score theirs: whose row is it? The sum is the same for all clients.

    Args:
        scores: of a run.

    Returns:
        The probability that a row's own client's update lowers its loss more than the mean of the other updates does;
        and 0.5, which is what the sum gives, since it names nobody.
    """
    kept = np.array(scores.inside) & np.isfinite(scores.others)
    single, others = np.array(scores.single)[kept], np.array(scores.others)[kept]
    if not len(single):
        return float("nan"), 0.5
    wins = (single > others).mean() + (single == others).mean() / 2
    return float(wins), 0.5


# Centroids ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """How often a released centroid names a row: the one of all surveyed rows that lies nearest to it.

    Args:
        released: centroids that left the clients.
        hits: of these, those whose nearest row is one of the client's cluster behind it.
        chance: hits that a row drawn at random would have, on average over centroids.
        copies: centroids of clusters that hold one text alone.
        exact: of these, those whose nearest row is that text.
    """

    __pydantic_config__ = KEPT

    released: Count
    hits: Count
    chance: Amount
    copies: Count
    exact: Count


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


def area(scores: Sequence[float], inside: Sequence[bool], generator: np.random.Generator) -> Interval | None:
    """Return the area under the curve of one run's scores, with its interval; None where one side is missing."""
    from bellwether.audit.ranks import over_runs

    member_N = np.array(inside)
    if member_N.all() or not member_N.any():
        return None
    return over_runs(np.array(scores)[None], member_N[None], auc, generator)


__all__ = ["Named", "UpdateScores", "area", "mean_over", "named_rows", "own_over_others", "readable", "update_scores"]
