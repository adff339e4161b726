"""Groups of centroids between clients: the server's level of selection.

Shape legend: C centroids of one client, M centroids of all clients, d dimensions of the space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import UpdateRejected
from bellwether.method.select.cluster import NOISE, Clusters, find_clusters, nearest_first, weighted_means


@dataclass(frozen=True)
class Kept:
    """What the server answers a survey with, and what it saw.

    Args:
        numbers: for every client the numbers of its own centroids that were kept, rising; empty where none was.
        groups: for every client the group of each of its centroids, or -1 where it is in none.
    """

    numbers: Mapping[str, list[int]]
    groups: Mapping[str, list[int]]


def keep(
    centroids: Mapping[str, NDArray[np.floating[Any]]],
    least: int = 2,
    lone: bool = False,
    min_samples: int | None = None,
) -> Kept:
    """Keep one centroid of every group of similar ones, as FedHDS's server does (Qin et al. 2024, arXiv 2410.10926).

    All clients' centroids are clustered together by HDBSCAN; of each group the one nearest to the group's mean,
    weighted by strength of membership, is kept. As in the paper nothing
    is kept of fewer than twice ``least`` centroids, nor where HDBSCAN sees no two groups, unless ``lone`` is set.

    Args:
        centroids: each client's centroids, (C, d), with d equal for all; C may be 0. Of equally near centroids
            ``nearest_first`` tells which is kept; the order of the clients decides among equal ones only.
        least: the fewest centroids of a group, at least 2.
        lone: whether a centroid in no group is kept as a group of its own, so that a topic which only one client
            has is not lost; the paper drops it.
        min_samples: as in ``find_clusters``; ``least + 1`` groups as FedHDS was released.

    Raises:
        UpdateRejected: a client's centroids are no finite table of the same width as the others'.
        ValueError: ``least`` is below 2.
    """
    widths = Counter(array.shape[1] for array in centroids.values() if array.ndim == 2 and len(array))
    # The width of most clients is right, so that one wrong client is named and not all others.
    dimensions = widths.most_common(1)[0][0] if widths else 0
    for client, centroids_Cd in centroids.items():
        check_centroids(client, centroids_Cd, dimensions)
    stacked_Md = np.concatenate([np.zeros((0, dimensions)), *(array for array in centroids.values() if len(array))])
    labels_M, kept = _representatives(stacked_Md, least, min_samples)
    if lone:
        alone = np.flatnonzero(labels_M == NOISE)
        labels_M[alone] = labels_M.max(initial=NOISE) + 1 + np.arange(len(alone))
        kept |= set(alone.tolist())
    return _by_client({client: len(array) for client, array in centroids.items()}, labels_M, kept)


def check_centroids(client: str, centroids_Cd: NDArray[np.floating[Any]], dimensions: int) -> None:
    """Refuse centroids that cannot be compared with those of other clients.

    Args:
        client: the client that sent them, for the message.
        centroids_Cd: what it sent; none at all is (0, anything).
        dimensions: the width d that they must have.

    Raises:
        UpdateRejected: they are no table of d columns, or a number is not finite in float32.
    """
    shape, kind = centroids_Cd.shape, centroids_Cd.dtype
    if centroids_Cd.ndim != 2 or (len(centroids_Cd) and shape[1] != dimensions):
        raise UpdateRejected(f"Client {client} sent centroids of shape {shape}, where (any, {dimensions}) is due.")
    if not np.issubdtype(kind, np.floating):
        raise UpdateRejected(f"Client {client} sent centroids of type {kind}, where floating point numbers are due.")
    # Squares of what fits float32 are finite in float64, so that one client cannot break everybody's distances.
    wrong = np.flatnonzero(~(np.abs(centroids_Cd) <= np.finfo(np.float32).max).all(axis=1))
    if wrong.size:
        raise UpdateRejected(f"Client {client} sent centroids that are not finite in float32, first number {wrong[0]}.")


def _representatives(
    stacked_Md: NDArray[np.float64], least: int, min_samples: int | None
) -> tuple[NDArray[np.int64], set[int]]:
    """Return the group of each centroid, or -1, and the one centroid that stands for each group."""
    labels_M, strengths_M = find_clusters(stacked_Md, least, min_samples)
    groups = Clusters(labels_M, strengths_M, weighted_means(stacked_Md, labels_M, strengths_M))
    return labels_M, {nearest_first(stacked_Md, groups, number)[0] for number in range(len(groups.centroids_Cd))}


def _by_client(counts: Mapping[str, int], labels_M: NDArray[np.int64], kept: set[int]) -> Kept:
    """Deal what was found for the stacked centroids back to the clients, in each client's own numbers."""
    numbers: dict[str, list[int]] = {}
    groups: dict[str, list[int]] = {}
    start = 0
    for client, count in counts.items():
        numbers[client] = [number for number in range(count) if start + number in kept]
        groups[client] = labels_M[start : start + count].tolist()
        start += count
    return Kept(numbers, groups)
