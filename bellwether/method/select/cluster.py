"""Clusters of rows within one client, and the rows that stand for them.

Shape legend: N rows, R rows of one cluster, d dimensions of the space, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.method.select.space import check_finite

NOISE = -1

# Squared distances, as shares of a cluster's largest, that agree to so many digits are equal but for rounding.
_DIGITS = 9


@dataclass(frozen=True)
class Clusters:
    """Which rows belong together.

    Args:
        labels_N: the cluster of each row, 0 to C - 1, or -1 where it belongs to none.
        strengths_N: how firmly each row belongs to its cluster, 0 to 1; 0 for rows of none.
        centroids_Cd: the mean of each cluster's rows, weighted by their strengths.
    """

    labels_N: NDArray[np.int64]
    strengths_N: NDArray[np.float64]
    centroids_Cd: NDArray[np.float64]


def cluster(
    points_Nd: NDArray[np.floating[Any]], least: int, min_samples: int | None = None, whole: bool = True
) -> Clusters:
    """Cluster one client's rows by density; its level of selection in FedHDS (Qin et al. 2024, arXiv 2410.10926).

    A client of fewer rows than a cluster needs has no cluster. Where there are enough rows but HDBSCAN sees no
    two clusters among them, which is always so below twice ``least``, all rows are one cluster of strength 1
    unless ``whole`` is false: a client whose rows are all alike has a topic too. The paper leaves such a client
    without any.

    Args:
        points_Nd: the rows' points, (N, d).
        least: the fewest rows of a cluster, at least 2.
        min_samples: as in ``find_clusters``.
        whole: whether all rows are one cluster where HDBSCAN sees none.

    Raises:
        ModelError: a point is not finite.
        ValueError: ``least`` is below 2.
    """
    labels_N, strengths_N = find_clusters(points_Nd, least, min_samples)
    if whole and len(labels_N) >= least and (labels_N == NOISE).all():
        labels_N, strengths_N = np.zeros_like(labels_N), np.ones_like(strengths_N)
    return Clusters(labels_N, strengths_N, weighted_means(points_Nd, labels_N, strengths_N))


def find_clusters(
    points_Nd: NDArray[np.floating[Any]], least: int, min_samples: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Run HDBSCAN (Campello et al. 2013) with its usual choice of clusters, never one cluster of everything.

    The points are clustered in lexicographic order: equal distances are common in HDBSCAN, whose tree breaks them by
    row number, so that otherwise the order of the rows would change the clusters.

    Args:
        points_Nd: the points, (N, d).
        least: the fewest points of a cluster, at least 2.
        min_samples: how many points, itself counted, lie within a point's core distance; None takes ``least``, so
            that ``least`` points by themselves can be a cluster. The hdbscan package, which FedHDS was released with,
            does not count the point itself: ``least + 1`` here is its default, under which exactly ``least`` points
            far from all others, such as one topic of two clients, are never a cluster.

    Returns:
        The cluster of each point, or -1, and its membership strength, 0 to 1.

    Raises:
        ModelError: a point is not finite.
        ValueError: ``least`` is below 2.
    """
    from sklearn.cluster import HDBSCAN

    if least < 2:
        raise ValueError(f"a cluster has at least 2 rows, not {least}")
    check_finite(points_Nd)
    min_samples = min_samples or least
    labels_N, strengths_N = np.full(len(points_Nd), NOISE, dtype=np.int64), np.zeros(len(points_Nd))
    if len(points_Nd) < max(2 * least, min_samples):
        return labels_N, strengths_N
    order_N = np.lexsort(points_Nd.T[::-1])
    sorted_Nd = np.asarray(points_Nd, dtype=np.float64)[order_N]
    # Its default of ``copy`` warns of a change that does not concern points.
    found = HDBSCAN(min_cluster_size=least, min_samples=min_samples, copy=True).fit(sorted_Nd)
    labels_N[order_N], strengths_N[order_N] = found.labels_, found.probabilities_
    return labels_N, strengths_N


def weighted_means(
    points_Nd: NDArray[np.floating[Any]], labels_N: NDArray[np.int64], weights_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the weighted mean of each cluster's points, (C, d).

    Args:
        points_Nd: the points, (N, d).
        labels_N: each point's cluster, 0 to C - 1 without a gap, or -1.
        weights_N: each point's weight, not all 0 in any cluster.
    """
    count = int(labels_N.max(initial=NOISE)) + 1
    means_Cd = np.zeros((count, points_Nd.shape[1]))
    for number in range(count):
        members = labels_N == number
        means_Cd[number] = np.average(points_Nd[members].astype(np.float64), axis=0, weights=weights_N[members])
    return means_Cd


def nearest_first(points_Nd: NDArray[np.floating[Any]], clusters: Clusters, number: int) -> list[int]:
    """Return the row numbers of one cluster, nearest to its centroid first.

    The two rows of a pair are always equally near. Of rows as near as one another, but for rounding, the first in
    lexicographic order of their points comes first, so that no row is preferred for its place in a file and no
    client for its name; of equal points it is the first row.

    Args:
        points_Nd: the points that were clustered, (N, d).
        clusters: what ``cluster`` returned for them.
        number: the cluster, 0 to C - 1.
    """
    rows = np.flatnonzero(clusters.labels_N == number)
    members_Rd = points_Nd[rows].astype(np.float64)
    squares_R = ((members_Rd - clusters.centroids_Cd[number]) ** 2).sum(axis=1)
    near_R = np.round(squares_R / max(squares_R.max(initial=0), np.finfo(float).tiny), _DIGITS)
    return [int(row) for row in rows[np.lexsort((*members_Rd.T[::-1], near_R))]]
