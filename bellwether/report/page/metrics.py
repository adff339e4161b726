"""Scores on a page: what they are called, their units, and how they, their intervals and differences are written.

Shape legend: P scored rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from bellwether.exchange.scores import Scores, fraction
from bellwether.store.history import ScoredRow
from bellwether.tools.intervals import Interval, by_category, difference
from bellwether.tools.randomness import Randomness

MINUS = "\u2212"
# Resamples for an interval; fewer where there are very many rows, since all are drawn at once.
_SAMPLES, _DRAWS = 4000, 20_000_000


@dataclass(frozen=True)
class Metric:
    """A score.

    Args:
        key: its field in ``Scores`` and ``Totals``.
        name: in a sentence.
        unit: of its values, as an axis says it.
        gap: unit of a difference.
        scale: by which values are multiplied to be shown.
        digits: decimals.
        better: 1 where more is better, -1 where less is.
        most: the largest value there can be, as it is shown.
    """

    key: str
    name: str
    unit: str
    gap: str
    scale: float
    digits: int
    better: int
    most: float

    @property
    def axis(self) -> str:
        """What an axis of its values says."""
        return f"{self.name}, {self.unit}"

    def value(self, scores: Scores) -> float:
        """Return the score as it is shown, NaN where there is none."""
        value = getattr(scores, self.key)
        return math.nan if value is None else value * self.scale

    def number(self, value: float, *, sign: bool = False, digits: int | None = None) -> str:
        """Return a score, already scaled, as text without its unit.

        Args:
            value: the score.
            sign: whether it has a sign also above 0, as a difference has.
            digits: decimals; None takes the score's own.
        """
        if not math.isfinite(value):
            return "–" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
        text = f"{abs(value):.{self.digits if digits is None else digits}f}"
        negative = value < 0 and float(text) != 0
        return (MINUS if negative else "+" if sign else "") + text

    def text(self, value: float, digits: int | None = None) -> str:
        """Return a score, already scaled, with its unit where that is short."""
        return self.number(value, digits=digits) + (" %" if self.unit == "%" else "")

    def range(self, found: Interval, *, sign: bool = False, digits: int | None = None) -> str:
        """Return the ends of an interval of unscaled values."""
        return " to ".join(self.number(end * self.scale, sign=sign, digits=digits) for end in (found.low, found.high))

    def step(self, before: float, after: float, gap: float) -> tuple[float, int]:
        """Return the difference to show beside two scores, and the decimals to show all three with, so that they agree.

        Rounded one by one, 0.04 and 68.75 with 68.71 between them would be 0.0 and 68.8 with 68.7. Up to two more
        decimals are shown where those do; where they do not, the difference is that of the scores as then shown.

        Args:
            before: a score, already scaled.
            after: another one.
            gap: how much higher the second is.
        """
        if not all(map(math.isfinite, (before, after, gap))):
            return gap, self.digits
        for digits in range(self.digits, self.digits + 3):
            first, last, between = (Decimal(f"{value:.{digits}f}") for value in (before, after, gap))
            if last - first == between:
                return gap, digits
        return float(last - first), digits


EXACT = Metric("exact", "exact match", "%", "points", 100.0, 1, 1, 100.0)
ROUGE_L = Metric("rouge_l", "ROUGE-L", "%", "points", 100.0, 1, 1, 100.0)
LOSS = Metric("loss", "loss", "nats per token", "nats per token", 1.0, 3, -1, math.inf)
PREFERRED = Metric("preferred", "chosen answers preferred", "%", "points", 100.0, 1, 1, 100.0)
METRICS = (PREFERRED, EXACT, ROUGE_L, LOSS)


def spell_time(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def capital(text: str) -> str:
    """Return a text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Change:
    """What became of a score.

    Args:
        gap: macro mean of the final scores minus that of the untuned base's.
        before: the untuned base's interval by category.
        after: the final one by category.
    """

    gap: Interval
    before: Mapping[str, Interval]
    after: Mapping[str, Interval]


def changes(before: Sequence[ScoredRow], after: Sequence[ScoredRow], randomness: Randomness) -> dict[str, Change]:
    """Return what became of each score of the same rows, with intervals of 95 % over rows.

    A score that some row does not have, or that is not finite, is absent.

    Args:
        before: the rows with the untuned base's answers.
        after: the same rows with the final answers.
        randomness: of the run.
    """
    strata = [row.category for row in after]
    samples = max(500, min(_SAMPLES, _DRAWS // max(1, len(strata))))
    found = {}
    for metric in METRICS:
        values = [[fraction(row.totals, metric.key) for row in rows] for rows in (before, after)]
        if not strata or any(pair is None or not math.isfinite(pair[0]) for rows in values for pair in rows):
            continue
        first_P, last_P = (np.array([pair[0] for pair in rows if pair]) for rows in values)
        weights_P = np.array([pair[1] for pair in values[1] if pair])
        generator = randomness.numpy(f"report: intervals of {metric.key}")
        gap = difference(last_P, first_P, strata, generator, denominators_P=weights_P, samples=samples)
        parts = [
            by_category(rows_P, strata, generator, denominators_P=weights_P, samples=samples)
            for rows_P in (first_P, last_P)
        ]
        found[metric.key] = Change(gap, *parts)
    return found
