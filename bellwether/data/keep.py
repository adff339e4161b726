"""How many of its dealt rows a client keeps: clients of unequal size from partitions of equal ones."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from bellwether.data.rows import Row
from bellwether.errors import DataError
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted


def keep_some(
    dealt: Mapping[str, Sequence[Row]], least: int, most: int, randomness: Randomness, notes: list[str]
) -> dict[str, list[Row]]:
    """Let each client keep some of its rows, in their order; the others are used by nobody.

    Args:
        dealt: each client's rows.
        least: the smallest number of rows to keep.
        most: the largest; a client that was dealt fewer than its number keeps all.
        randomness: draws number and rows from (seed, client), every number from least to most alike.
        notes: receives a sentence on the rows that are not used.

    Raises:
        DataError: a client was dealt fewer than the smallest number.
    """
    small = {client: len(rows) for client, rows in dealt.items() if len(rows) < least}
    if small:
        client, rows = min(small.items(), key=lambda item: item[1])
        raise DataError(
            f"partition.rows_per_client begins at {counted(least, 'row')}, but {len(small)} of "
            f"{counted(len(dealt), 'client')} are dealt "
            f"fewer: {client} gets {rows}; begin at {rows} or lower, or take fewer clients."
        )
    kept: dict[str, list[Row]] = {}
    for client, own in dealt.items():
        generator = randomness.numpy("rows kept", client=client)
        count = min(len(own), int(generator.integers(least, most, endpoint=True)))
        kept[client] = [own[index] for index in draw_rows([row.category for row in own], count, generator)]
    total, used = sum(map(len, dealt.values())), sum(map(len, kept.values()))
    if used < total:
        notes.append(
            f"partition.rows_per_client: {total - used} of {total} dealt rows are used by nobody, since each client "
            f"keeps {least} to {most}."
        )
    return kept


def draw_rows(categories: Sequence[str], count: int, generator: np.random.Generator) -> list[int]:
    """Return the indices of so many rows, drawn evenly, in rising order; no category is lost where there is room.

    A category that was not drawn gets one row, in the place of the last drawn one whose category has several.

    Args:
        categories: the category of each row.
        count: how many rows to draw.
        generator: draws them.
    """
    order = [int(index) for index in generator.permutation(len(categories))]
    drawn, left = order[:count], order[count:]
    held = collections.Counter(categories[index] for index in drawn)
    for index in left:
        spare = [place for place, other in enumerate(drawn) if held[categories[other]] > 1]
        if spare and not held[categories[index]]:
            held[categories[drawn[spare[-1]]]] -= 1
            held[categories[index]] += 1
            drawn[spare[-1]] = index
    return sorted(drawn)
