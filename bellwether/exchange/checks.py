"""What an adapter or update takes on the way, and the one strict check before aggregation.

All tensors count as one flat array with a description: with Flower the number of tensors, not their
size, decides how long a message takes. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Adapter, Tensors
from bellwether.exchange.messages import Reply, SurveyTask, Update

COUNTED = ("rows", "tokens", "selected")  # figures of an update that count something
MOST_COUNTED = 2**40
MOST_CENTROIDS = 10_000  # of one client; more would make the server cluster for hours


def adapter_bytes(tensors: Tensors) -> int:
    """Return the bytes that tensors take on the way: their values in float32, and key and shape of each."""
    description = json.dumps([(key, tensors[key].shape) for key in sorted(tensors)]).encode()
    return sum(4 * int(value.size) for value in tensors.values()) + len(description)


def check_update(
    update: Update, adapter: Adapter, round: int, cohort: Collection[str], taken: Collection[str], max_rows: int
) -> None:
    """Refuse an update that must not be aggregated.

    Args:
        update: what the client sent.
        adapter: the adapter that was sent out.
        round: the round that is being aggregated.
        cohort: the clients that were asked in this round.
        taken: the clients whose updates were accepted already.
        max_rows: rows that one update may claim.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    if update.client not in cohort:
        raise UpdateRejected("the client was not asked in this round")
    if update.client in taken:
        raise UpdateRejected("the client has answered already")
    if update.round != round:
        raise UpdateRejected(f"it belongs to round {update.round}, not {round}")
    if isinstance(update.rows, bool) or not isinstance(update.rows, int) or not 1 <= update.rows <= max_rows:
        raise UpdateRejected(f"it claims {update.rows!r} rows, where 1 to {max_rows} are believed")
    for name, figure in update.metrics.items():
        if not isinstance(figure, int | float) or not math.isfinite(figure):
            raise UpdateRejected(f"its {name[:40]!r} is {figure!r}, not a finite number")
        if name in COUNTED and not 0 <= figure <= MOST_COUNTED:
            raise UpdateRejected(f"its {name!r} is {figure!r}, where 0 to {MOST_COUNTED} are believed")
    missing, unknown = adapter.tensors.keys() - update.tensors.keys(), update.tensors.keys() - adapter.tensors.keys()
    if missing or unknown:
        raise UpdateRejected(f"its tensors are not the adapter's: {_some(missing)} missing, {_some(unknown)} unknown")
    for key, expected in adapter.tensors.items():
        check_tensor(key, update.tensors[key], expected)


def check_survey(
    reply: Reply, task: SurveyTask, cohort: Collection[str], taken: Collection[str], width: int | None
) -> NDArray[Any]:
    """Refuse a survey that must not be clustered; return its centroids_Cd.

    Args:
        reply: what the client sent.
        task: what it was asked.
        cohort: the clients that were asked in this round.
        taken: the clients whose surveys were accepted already.
        width: how many dimensions are due; None where no client has a centroid.

    Raises:
        UpdateRejected: the reason, as one clause; the caller adds round and client.
    """
    survey = reply.survey
    if reply.client not in cohort:
        raise UpdateRejected("the client was not asked in this round")
    if reply.client in taken:
        raise UpdateRejected("the client has answered already")
    if reply.failure is not None or survey is None:
        raise UpdateRejected(reply.failure or "it sent no survey")
    if survey.client != reply.client:
        raise UpdateRejected(f"its survey is signed {survey.client!r}")
    if survey.round != task.round:
        raise UpdateRejected(f"its survey belongs to round {survey.round}, not {task.round}")
    points_Cd = survey.centroids_Cd
    if not isinstance(points_Cd, np.ndarray) or points_Cd.ndim != 2 or points_Cd.dtype != np.float32:
        raise UpdateRejected("its centroids are no float32 matrix")
    if not points_Cd.shape[1]:
        raise UpdateRejected("its centroids have no dimension")
    if len(points_Cd) > MOST_CENTROIDS:
        raise UpdateRejected(f"it sent {len(points_Cd)} centroids, where {MOST_CENTROIDS} are taken")
    if not np.isfinite(points_Cd).all():
        raise UpdateRejected("a centroid holds values that are not finite")
    if len(points_Cd) and points_Cd.shape[1] != width:
        raise UpdateRejected(f"its centroids have {points_Cd.shape[1]} dimensions, where {width} are due")
    return points_Cd


def check_tensor(key: str, value: NDArray[Any], expected: NDArray[Any]) -> None:
    """Refuse a tensor of another kind, shape (which includes the rank) or with values that are not finite."""
    if not isinstance(value, np.ndarray) or value.dtype != expected.dtype:
        raise UpdateRejected(f"{key} is {getattr(value, 'dtype', type(value).__name__)}, not {expected.dtype}")
    if value.shape != expected.shape:
        raise UpdateRejected(f"{key} has shape {value.shape}, not {expected.shape}")
    if not np.isfinite(value).all():
        raise UpdateRejected(f"{key} holds {int((~np.isfinite(value)).sum())} values that are not finite")


def _some(keys: Collection[str]) -> str:
    """Return up to two keys, and how many there are."""
    shown = sorted(str(key)[:120] for key in keys)[:2]
    return f"{len(keys)} ({', '.join(shown)}{', …' if len(keys) > 2 else ''})" if keys else "none"
