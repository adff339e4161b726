"""What a client remembers of its rows, from a survey to the training of the same round and to later surveys.

It stands in the client's own folder, since another process may train it than surveyed it. The report of a simulation,
which deals the rows out, draws it.

NAME/survey/0003.npz       where its rows lie by the model of round 3, and their clusters in the last survey with it
NAME/selected/0003.json    the numbers of the rows that it trained on in round 3

Shape legend: N rows of the client, d dimensions of the space.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.atomic import make_folder, write_atomic
from bellwether.errors import CheckpointError, first_line
from bellwether.select.cluster import Clusters

SURVEY, SELECTED = "survey", "selected"

# Of files of points: that of the round, and those that earlier rounds need anew where the last checkpoint is damaged.
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
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    folder = make_folder(client / SURVEY)
    write_atomic(folder / f"{memory.computed:04d}.npz", buffer.getvalue())
    for path in _files(client)[:-KEPT]:
        path.unlink(missing_ok=True)


def recall(client: Path, round: int) -> Memory | None:
    """Return what a client remembers in a round, of this or the last round before it; None where there is nothing.

    Args:
        client: its folder.
        round: the round; what later ones left, before a run went back to an earlier checkpoint, is not looked at.

    Raises:
        CheckpointError: the file is not as ``remember`` wrote it.
    """
    path = next((path for path in reversed(_files(client)) if int(path.stem) <= round), None)
    return None if path is None else _read(path)


def _files(client: Path) -> list[Path]:
    """Return a client's files of points by the round whose model they were computed with."""
    return sorted((client / SURVEY).glob("[0-9]*.npz"), key=lambda path: int(path.stem))


def _read(path: Path) -> Memory:
    """Return what stands in a file of points."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            memory = Memory(str(arrays["key"]), int(arrays["computed"]), arrays["points"])
            if "surveyed" not in arrays:
                return memory
            clusters = Clusters(arrays["labels"], arrays["strengths"], arrays["centroids"])
            released = tuple(int(number) for number in arrays["released"])
            return Memory(memory.key, memory.computed, memory.points_Nd, int(arrays["surveyed"]), clusters, released)
    except Exception as error:  # whatever a damaged archive makes of zipfile and NumPy
        raise CheckpointError(
            f"{path} is not as it was written ({type(error).__name__}: {first_line(error)}); remove it, and its client "
            "computes its features anew, by the adapter of the round that it is asked in."
        ) from error
