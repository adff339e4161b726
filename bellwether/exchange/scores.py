"""Scores of answers: texts and sums in, numbers out.

Loss and perplexity are per response token. ROUGE-L is the F measure of Lin (2004) as the
``rouge-score`` package computes it, with stemming. An exact match ignores white space at the ends and
between words, and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bellwether.tools.json_text import KEPT, Amount, Count, Loss


@dataclass(frozen=True)
class Totals:
    """Sums over scored rows, which add up over batches, clients and categories.

    Args:
        rows: scored rows.
        tokens: response tokens of those rows.
        loss: cross-entropy summed over those tokens, in nats.
        generated: rows for which an answer was generated.
        rouge_l: ROUGE-L F1, each in 0..1, summed over generated answers.
        exact: generated answers that equal the reference.
    """

    __pydantic_config__ = KEPT

    rows: Count = 0
    tokens: Count = 0
    loss: Loss = 0.0
    generated: Count = 0
    rouge_l: Amount = 0.0
    exact: Count = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.generated + other.generated,
            self.rouge_l + other.rouge_l,
            self.exact + other.exact,
        )


@dataclass(frozen=True)
class Scores:
    """Means over scored rows; None where no row counts.

    Args:
        rows: scored rows.
        loss: cross-entropy, in nats per response token.
        rouge_l: ROUGE-L F1, 0..1.
        exact: share of answers that equal the reference, 0..1.
    """

    rows: int
    loss: float | None
    rouge_l: float | None
    exact: float | None

    @property
    def perplexity(self) -> float | None:
        """The exponential of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


def fraction(totals: Totals, metric: str) -> tuple[float, float] | None:
    """Return numerator and denominator of a score, None where there is none.

    Args:
        totals: of scored rows.
        metric: ``loss``, ``rouge_l`` or ``exact``.
    """
    if metric == "loss":
        return (totals.loss, float(totals.tokens)) if totals.tokens else None
    return (float(getattr(totals, metric)), float(totals.generated)) if totals.generated else None


def add_up(parts: Iterable[tuple[str, Totals]]) -> dict[str, Totals]:
    """Return the sums of totals that have the same name, such as a category, in alphabetical order."""
    sums: dict[str, Totals] = {}
    for name, totals in parts:
        sums[name] = sums.get(name, Totals()) + totals
    return dict(sorted(sums.items()))


def means(totals: Totals) -> Scores:
    """Return the means behind totals."""
    return Scores(
        rows=totals.rows,
        loss=totals.loss / totals.tokens if totals.tokens else None,
        rouge_l=totals.rouge_l / totals.generated if totals.generated else None,
        exact=totals.exact / totals.generated if totals.generated else None,
    )


def macro(categories: Mapping[str, Totals]) -> Scores:
    """Return the unweighted mean of the categories' means, so that no large category hides a small one."""
    scores = [means(totals) for totals in categories.values()]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Scores(
        rows=sum(score.rows for score in scores),
        loss=mean([score.loss for score in scores]),
        rouge_l=mean([score.rouge_l for score in scores]),
        exact=mean([score.exact for score in scores]),
    )


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F1 of an answer, 0..1."""
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


def exact_match(answer: str, reference: str) -> bool:
    """Return whether an answer equals the reference, white space aside."""
    return answer.split() == reference.split()


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
