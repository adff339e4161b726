"""Trivial rivals, which know the training rows and no model: texts in, answers out.

A tuned model that does not beat them has learnt less than a table of its rows would tell.

Shape legend: R training rows, N test rows of a block, W words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

# Test rows compared at once, so that memory does not grow with their number.
_BLOCK = 256


class Example(Protocol):
    """What a rival sees of a row; ``bellwether.data.rows.Row`` is one."""

    @property
    def instruction(self) -> str:
        """What is asked."""

    @property
    def context(self) -> str:
        """Text that the instruction speaks of; may be empty."""

    @property
    def category(self) -> str:
        """The kind of instruction; may be empty."""

    @property
    def response(self) -> str:
        """The wanted answer."""


def most_frequent(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Answer with the response that is most frequent in a row's category.

    Args:
        train: training rows, at least one.
        test: test rows, of which only the category is looked at.

    Returns:
        One answer per test row: of equally frequent responses the first in order, and where no training row
        has the category, the most frequent of all.

    Raises:
        ValueError: there are no training rows.
    """
    _check(train)
    overall = Counter(row.response for row in train)
    counts: dict[str, Counter[str]] = {}
    for row in train:
        counts.setdefault(row.category, Counter())[row.response] += 1
    # Counters keep the order of first sight among equals.
    return [counts.get(row.category, overall).most_common(1)[0][0] for row in test]


def nearest(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Answer with the response of the training row that asks the most similar thing, by the cosine of TF-IDF vectors.

    Words are runs of letters and digits, single ones included, in lower case; frequencies of documents are
    smoothed, as scikit-learn does by default.

    Args:
        train: training rows, at least one.
        test: test rows, of which only instruction and context are looked at.

    Returns:
        One answer per test row: of equally near rows the first, which is the first of all for a text without
        any word of the training rows.

    Raises:
        ValueError: there are no training rows.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    _check(train)
    vectoriser = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
    words = vectoriser.build_analyzer()
    if not any(words(_text(row)) for row in train):
        return [train[0].response] * len(test)
    train_RW = vectoriser.fit_transform([_text(row) for row in train])
    answers: list[str] = []
    for start in range(0, len(test), _BLOCK):
        block_NW = vectoriser.transform([_text(row) for row in test[start : start + _BLOCK]])
        # Rounding keeps the last bits from deciding between equally near rows.
        cosine_NR = np.round((block_NW @ train_RW.T).toarray(), 12)
        answers += [train[number].response for number in cosine_NR.argmax(axis=1)]
    return answers


def _text(row: Example) -> str:
    """Return all that is asked, as one text."""
    return f"{row.instruction}\n{row.context}"


def _check(train: Sequence[Example]) -> None:
    """Refuse to answer from nothing."""
    if not train:
        raise ValueError("There are no training rows to answer from; give at least one.")
