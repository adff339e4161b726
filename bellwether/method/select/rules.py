"""Other ways to choose rows under the same budget, each by one client from its own rows.

Every rule returns row numbers, rising; a budget above the number of rows takes them all.

Shape legend: N rows, d dimensions or features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import DataError
from bellwether.method.select.space import check_finite
from bellwether.tools.words import counted


def random_rows(
    count: int, rows: int, generator: np.random.Generator, used: Mapping[int, int] | None = None
) -> list[int]:
    """Choose rows at random, every set of so many rows equally likely among those that were chosen least often.

    Args:
        count: rows there are.
        rows: rows to choose.
        generator: the source of the draw.
        used: how often rows were chosen before, by their number; those chosen least often come first. None: never.
    """
    order_N = generator.permutation(count)
    times_N = np.array([(used or {}).get(int(row), 0) for row in order_N])
    return _rising(order_N[np.argsort(times_N, kind="stable")][:rows])


def k_center(points_ND: NDArray[np.floating[Any]], rows: int, generator: np.random.Generator) -> list[int]:
    """Choose rows that cover the others: each next one is the farthest from all that are chosen.

    This is the greedy algorithm of Sener & Savarese 2018 (arXiv 1708.00489, algorithm 1), whose largest distance
    from a row to its nearest centre is at most twice the least possible, wherever it starts. Theirs starts from
    rows that are labelled already; here the first centre is drawn at random.

    Args:
        points_ND: the rows' points or features, (N, D).
        rows: rows to choose.
        generator: the source of the first centre.

    Raises:
        ModelError: a point is not finite.
    """
    check_finite(points_ND)
    count = len(points_ND)
    if rows >= count:
        return list(range(count))
    exact_ND = np.asarray(points_ND, dtype=np.float64)
    chosen: list[int] = []
    squares_N = np.full(count, np.inf)
    following = int(generator.integers(count))
    while len(chosen) < rows:
        chosen.append(following)
        squares_N = np.minimum(squares_N, ((exact_ND - exact_ND[following]) ** 2).sum(axis=1))
        # Where rows are repeated all distances can be 0, and a chosen row must not be chosen again.
        squares_N[chosen] = -1.0
        following = int(squares_N.argmax())
    return sorted(chosen)


def middle_loss(losses_N: NDArray[np.floating[Any]], rows: int) -> list[int]:
    """Choose the rows in the middle of the order by loss: neither those the model knows nor the oddest.

    Marion et al. 2023 (arXiv 2309.04564) keep the middle percentiles of perplexity. Perplexity rises with the mean
    loss, so the order, and with it the choice, is the same. Of equal losses the earlier row counts as the
    smaller, and where the middle cannot be met exactly the rows lie one place towards the smaller losses.

    Args:
        losses_N: each row's mean loss, (N,), in nats per response token.
        rows: rows to choose.

    Raises:
        DataError: a loss is not finite.
    """
    wrong = np.flatnonzero(~np.isfinite(losses_N))
    if wrong.size:
        raise DataError(
            f"The loss of {wrong.size} of {counted(len(losses_N), 'row')} is not finite, first of row "
            f"{wrong[0]} (from 0), "
            "so they have no place in the order by loss: see whether these rows have a response."
        )
    order_N = np.argsort(losses_N, kind="stable")
    start = max(0, len(losses_N) - rows) // 2
    return _rising(order_N[start : start + rows])


def longest(lengths_N: NDArray[np.integer[Any]], rows: int) -> list[int]:
    """Choose the rows with the longest responses, as Zhao et al. 2024 (arXiv 2402.04833); of equal ones the earlier.

    Args:
        lengths_N: length of each row's response, (N,), in tokens.
        rows: rows to choose.
    """
    return _rising(np.argsort(-np.asarray(lengths_N, dtype=np.int64), kind="stable")[:rows])


def _rising(rows_N: NDArray[np.integer[Any]]) -> list[int]:
    """Return row numbers as a rising list of plain integers."""
    return [int(row) for row in np.sort(rows_N)]
