"""How many rows are taken of the clusters that were kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

from bellwether.recipe.recipe import Selection


def share(count: int, fraction: float) -> int:
    """Return how many of so many rows a share of them is: rounded up, and at least one."""
    # The small number undoes the error of a product such as 0.55 · 100, which is a little above 55.
    return max(1, math.ceil(fraction * count - 1e-9))


def budget(count: int, selection: Selection) -> int | None:
    """Return how many of a client's rows a recipe asks for; None where that is left to its clusters.

    Args:
        count: how many rows the client has.
        selection: the recipe's selection section.
    """
    if selection.fraction is not None:
        return share(count, selection.fraction)
    return min(count, selection.rows) if isinstance(selection.rows, int) else None


def deal(candidates: Sequence[Sequence[int]], rows: int | None, per_cluster: int) -> list[int]:
    """Take rows of a client's kept clusters, as evenly as their sizes allow.

    Args:
        candidates: the row numbers of each kept cluster, in the order of preference. A row that several name
            belongs to the first of them.
        rows: how many rows to take in all: the first of each cluster in turn, then the second of each, and so on
            until there are so many or none are left. None takes the same number of every cluster.
        per_cluster: how many rows to take of each cluster, or all where it has fewer; only where ``rows`` is None.

    Returns:
        The row numbers, rising, none twice.
    """
    seen: set[int] = set()
    own: list[list[int]] = []
    for cluster in candidates:
        own.append([row for row in dict.fromkeys(cluster) if row not in seen])
        seen.update(own[-1])
    if rows is None:
        return sorted(row for cluster in own for row in cluster[:per_cluster])
    in_turn = [row for turn in zip_longest(*own) for row in turn if row is not None]
    return sorted(in_turn[:rows])
