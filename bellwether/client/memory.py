"""What a client remembers of its rows, from a survey to the training of the same round and to later surveys.

The report of a simulation, which deals the rows out, draws it.

Shape legend: N rows of the client, C clusters, d dimensions of the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.method.select.cluster import Clusters
from bellwether.store.client_state import SURVEY, damaged, forget_state, keep_state, kept_rounds, recall_state

# The newest surveys, and those that a run needs anew where it goes back to a checkpoint before; what is missing is
# computed anew.
KEPT = 3


@dataclass(frozen=True)
class Memory:
    """Where a client's rows lie, and their clusters.

    Args:
        key: a hash of all that the points depend on, but for the adapter.
        computed: the round whose adapter the points were computed with.
        points_Nd: where the rows lie in the space.
        surveyed: the round of the survey that the clusters were made for; 0 where there was none with these points.
        clusters: the clusters of that survey.
        released: the numbers of the clusters whose centroids left the client, in the order in which they did.
    """

    key: str
    computed: int
    points_Nd: NDArray[Any]
    surveyed: int = 0
    clusters: Clusters | None = None
    released: tuple[int, ...] = ()


def remember(client: Path, memory: Memory) -> None:
    """Write what a client remembers, and forget what was computed long before.

    Args:
        client: its folder.
        memory: what it remembers.

    Raises:
        CheckpointError: it cannot be written.
    """
    arrays: dict[str, Any] = {"key": memory.key, "computed": memory.computed, "points": memory.points_Nd}
    clusters = memory.clusters
    if clusters is not None:
        arrays |= {"surveyed": memory.surveyed, "released": np.array(memory.released, np.int64)}
        arrays |= {"labels": clusters.labels_N, "strengths": clusters.strengths_N, "centroids": clusters.centroids_Cd}
    keep_state(client, SURVEY, memory.computed, arrays)
    older = [round for round in kept_rounds(client, SURVEY) if round <= memory.computed]
    forget_state(client, SURVEY, older[:-KEPT])


def recall(client: Path, round: int) -> Memory | None:
    """Return what a client remembers in a round, of this or the last round before it; None where there is nothing.

    Args:
        client: its folder.
        round: the round.

    Raises:
        CheckpointError: the file is not as ``remember`` wrote it.
    """
    computed = max((kept for kept in kept_rounds(client, SURVEY) if kept <= round), default=0)
    arrays = recall_state(client, SURVEY, computed)
    if arrays is None:
        return None
    try:
        memory = Memory(str(arrays["key"]), int(arrays["computed"]), arrays["points"])
        _check_finite(memory.points_Nd)
        if "surveyed" not in arrays:
            return memory
        clusters = Clusters(arrays["labels"], arrays["strengths"], arrays["centroids"])
        released = tuple(int(number) for number in arrays["released"])
        _check_clusters(memory.points_Nd, clusters, released)
        return Memory(memory.key, memory.computed, memory.points_Nd, int(arrays["surveyed"]), clusters, released)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise damaged(client / SURVEY / f"{computed:04d}.npz", error) from error


def _check_finite(points_Nd: NDArray[Any]) -> None:
    if points_Nd.ndim != 2 or points_Nd.dtype.kind != "f" or not np.isfinite(points_Nd).all():
        raise ValueError("its points are no matrix of finite numbers")


def _check_clusters(points_Nd: NDArray[Any], clusters: Clusters, released: Sequence[int]) -> None:
    """Refuse clusters that are not those of the points."""
    labels_N, count = clusters.labels_N, len(clusters.centroids_Cd)
    shapes = (labels_N.shape, clusters.strengths_N.shape, clusters.centroids_Cd.shape[1:])
    if shapes != (points_Nd.shape[:1], points_Nd.shape[:1], points_Nd.shape[1:]) or labels_N.dtype.kind != "i":
        raise ValueError("its clusters are not those of its points")
    if not all(-1 <= label < count for label in labels_N.tolist()) or not all(0 <= one < count for one in released):
        raise ValueError("it names clusters that are not there")
