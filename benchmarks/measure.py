"""How good a choice of rows is, without any training: topics are known, or taken to be."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any


def topics_covered(chosen_topics: Iterable[Hashable], all_topics: Iterable[Hashable]) -> float:
    """Return the share of topics, 0 to 1, that at least one chosen row has.

    Args:
        chosen_topics: the topic of each chosen row.
        all_topics: the topic of each row there is, at least one; how often a topic stands here does not matter.

    Raises:
        ValueError: there are no topics.
    """
    topics = set(all_topics)
    if not topics:
        raise ValueError("without topics no share of them is covered")
    return len(topics & set(chosen_topics)) / len(topics)


def expected_cover(topic_counts: Collection[int], n: int) -> float:
    """Return the share of topics that ``n`` random rows cover in the mean.

    Of N rows, c of one topic, n drawn without replacement miss the topic with probability C(N - c, n) / C(N, n),
    the hypergeometric distribution at 0. Binomials are whole numbers here, so nothing is approximated.

    Args:
        topic_counts: rows of each topic, each at least 1.
        n: rows drawn; above N all are.

    Raises:
        ValueError: there are no topics, or one without rows.
    """
    if not topic_counts or min(topic_counts) < 1:
        raise ValueError(f"every topic must have a row, but the counts are {list(topic_counts)}")
    rows = sum(topic_counts)
    drawn = min(n, rows)
    ways = math.comb(rows, drawn)
    return math.fsum(1 - math.comb(rows - count, drawn) / ways for count in topic_counts) / len(topic_counts)


def agreement(groups: Sequence[Any], topics: Sequence[Any]) -> tuple[float, float]:
    """Return how well groups agree with topics: the adjusted Rand index and the normalised mutual information.

    Both are 1 where groups and topics are the same division under other names; near 0 for groups at random.
    What is in no group (-1) counts as one group more: leave it out beforehand to measure the groups alone.

    Args:
        groups: the group of each row or centroid.
        topics: its topic, in the same order.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return float(adjusted_rand_score(topics, groups)), float(normalized_mutual_info_score(topics, groups))
