"""Which categories each client holds, where their number differs from client to client."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np


def choose_categories(
    clients: int, categories: int, least: int, most: int, generator: np.random.Generator
) -> list[list[int]]:
    """Return each client's categories: the first in turn, the others at random of those that the fewest hold.

    So no category is shared by many clients while another has few, and small clients still get rows.

    Args:
        clients: number of clients.
        categories: number of categories.
        least: the smallest number of categories at a client.
        most: the largest, at most ``categories``; every number from least to most is as likely.
        generator: draws the numbers and the other categories.
    """
    chosen = [[client % categories] for client in range(clients)]
    holders = collections.Counter(first for (first,) in chosen)
    for own in chosen:
        number = int(generator.integers(least, most, endpoint=True))
        # Shuffled afresh for each client, so that categories with equally many holders come in random order.
        others = [int(category) for category in generator.permutation(categories) if category not in own]
        own += sorted(others, key=lambda category: holders[category])[: number - 1]
        holders.update(own[1:])
    return chosen


def share_categories(labels: Sequence[int], chosen: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """Deal each category in equal parts to the clients that hold it.

    Args:
        labels: the category of each row.
        chosen: the categories of each client.

    Returns:
        The positions of each client's rows, in rising order; None where a category has fewer rows than clients
        that hold it.
    """
    parts: list[list[int]] = [[] for _ in chosen]
    for category in sorted(set(labels)):
        positions = [position for position, label in enumerate(labels) if label == category]
        holders = [part for part, own in zip(parts, chosen, strict=True) if category in own]
        if len(positions) < len(holders):
            return None
        for number, holder in enumerate(holders):
            holder += positions[number :: len(holders)]
    return [sorted(part) for part in parts]
