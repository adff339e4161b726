"""How certain a score is: bootstrap intervals over seeds and prompts, p-values, Holm's adjustment.

A score is measured under several seeds, every time on the same prompts, so seeds and prompts are
crossed: both are samples of what one wants to speak of. The score of a seed is the unweighted mean over
categories of a ratio of sums (nats over tokens for the loss; for ROUGE-L and exact match the plain mean
over prompts), and the statistic is its mean over seeds.

The deviations come from a bootstrap with two levels: seeds are drawn with replacement, and, the same
for all seeds, prompts within their category (Owen 2007, "The pigeonhole bootstrap", arXiv 0712.1111).
Their percentiles alone are wrong with few seeds: too narrow where seeds differ, since five values vary
less around their own mean than around the true one and say little about their spread; too wide where
seed and prompt interact, since the bootstrap then counts that variance up to three times. So the
deviations are brought to the variance of crossed samples, V = V_seeds + V_prompts - V_both (Cameron,
Gelbach and Miller 2011, "Robust inference with multiway clustering", section 2), and each is divided
by the square root of a draw of chi-squared/df, which gives normal deviations Student's tails, with the
degrees of freedom of V by Satterthwaite (1946).

Shape legend: S seeds, P prompts, C categories, B resamples, N any rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bellwether.tools.json_text import KEPT, Finite, Number
from bellwether.tools.words import counted

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its interval.

    Args:
        mean: the statistic itself.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided p-value of the hypothesis that the true value is 0; of use for differences.
    """

    __pydantic_config__ = KEPT

    mean: Finite
    low: Number
    high: Number
    p: Number


def interval(
    numerators_SP: ArrayLike,
    strata_P: Sequence[str],
    generator: np.random.Generator,
    *,
    denominators_P: ArrayLike | None = None,
    samples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Return the macro mean of a score over seeds and prompts, with its interval.

    Coverage of 95 % intervals, measured on 600 synthetic cases each (8 categories of 40 prompts; normal
    scores of several mixtures of seed, prompt and noise variance, ratios, and 0 or 1): 0.92 to 0.99 with 5
    seeds or 10, on the high side where neither seeds nor prompts differ beyond noise. Of the percentiles
    alone: 0.85 to 1.00 with 5 seeds. With 2 seeds 0.92 to 0.98, at up to five times the width.

    With one seed the interval speaks of prompts alone; a category of one prompt adds no uncertainty.

    Args:
        numerators_SP: each prompt's score under each seed: summed nats for the loss, else the score.
        strata_P: each prompt's category.
        generator: draws the resamples.
        denominators_P: each prompt's weight in its category, positive: response tokens for the loss; None
            gives every prompt the weight 1.
        samples: number of resamples.
        level: probability with which intervals shall hold the true value, 0..1.

    Raises:
        ValueError: shapes do not fit, values are not finite, denominators are not positive, or there are none.
    """
    scores = _Scores.of(numerators_SP, strata_P, denominators_P)
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples is {samples} and level is {level}; give at least one sample and a level in 0..1.")
    mean = float(scores.ratios_SC.mean())
    draws_B = mean + _deviations(scores, generator, samples)
    low, high = np.quantile(draws_B, [(1 - level) / 2, (1 + level) / 2])
    # The statistic itself counts as one draw more (Davison and Hinkley 1997, chapter 4): p is never 0.
    beyond = 1 + min(int((draws_B <= 0).sum()), int((draws_B >= 0).sum()))
    return Interval(mean, float(low), float(high), min(1.0, 2 * beyond / (samples + 1)))


def difference(
    first_SP: ArrayLike,
    second_SP: ArrayLike,
    strata_P: Sequence[str],
    generator: np.random.Generator,
    *,
    denominators_P: ArrayLike | None = None,
    samples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Return how much higher the first of two arms scores, paired by seed and prompt.

    Both arms meet the same resampled seeds and prompts; since the statistic is linear in the numerators,
    that is the interval of their difference. Arguments as in ``interval``, and ``second_SP`` like
    ``first_SP``; an arm without seeds, such as the untuned base, may have one row or repeat it.
    """
    first_SP, second_SP = np.atleast_2d(np.asarray(first_SP, float)), np.atleast_2d(np.asarray(second_SP, float))
    if first_SP.shape[1] != second_SP.shape[1] or len({len(first_SP), len(second_SP)} - {1}) > 1:
        raise ValueError(f"The arms have shapes {first_SP.shape} and {second_SP.shape}; give equal seeds and prompts.")
    return interval(
        first_SP - second_SP, strata_P, generator, denominators_P=denominators_P, samples=samples, level=level
    )


def by_category(
    numerators_SP: ArrayLike,
    strata_P: Sequence[str],
    generator: np.random.Generator,
    *,
    denominators_P: ArrayLike | None = None,
    samples: int = 10_000,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Return the interval of each category alone, in alphabetical order; arguments as in ``interval``.

    For differences by category give the difference of two arms' numerators.
    """
    scores = _Scores.of(numerators_SP, strata_P, denominators_P)
    found: dict[str, Interval] = {}
    for number, name in enumerate(scores.categories):
        here_P = scores.category_P == number
        found[name] = interval(
            scores.numerators_SP[:, here_P],
            [name] * int(here_P.sum()),
            generator,
            denominators_P=scores.denominators_P[here_P],
            samples=samples,
            level=level,
        )
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the order given (Holm 1979).

    Rejecting where an adjusted value is at most alpha keeps the probability of any false rejection below
    alpha, however the tests depend on each other.

    Args:
        p_values: p-values of a family of tests, 0..1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class _Scores:
    """Checked scores, and each seed's ratio in each category."""

    numerators_SP: Floats
    denominators_P: Floats
    categories: list[str]
    category_P: NDArray[np.intp]
    sizes_C: Floats
    ratios_SC: Floats

    @staticmethod
    def of(numerators_SP: ArrayLike, strata_P: Sequence[str], denominators_P: ArrayLike | None) -> _Scores:
        """Check arrays and sum them up by category."""
        values_SP = np.atleast_2d(np.asarray(numerators_SP, dtype=np.float64))
        prompts = values_SP.shape[1]
        weights_P = np.ones(prompts) if denominators_P is None else np.asarray(denominators_P, dtype=np.float64)
        if values_SP.ndim != 2 or not values_SP.size or weights_P.shape != (prompts,) or len(strata_P) != prompts:
            raise ValueError(
                f"There are scores of shape {values_SP.shape}, denominators of shape {weights_P.shape} and "
                f"{counted(len(strata_P), 'category', 'categories')}; give seeds by prompts, and one of the "
                "others for each prompt."
            )
        if not np.isfinite(values_SP).all() or not (np.isfinite(weights_P) & (weights_P > 0)).all():
            raise ValueError("Scores must be finite, and denominators finite and positive.")
        names, category_P, sizes_C = np.unique(
            np.array(strata_P, dtype=object), return_inverse=True, return_counts=True
        )
        ratios_SC = _sums(values_SP, category_P) / _sums(weights_P[None], category_P)
        return _Scores(values_SP, weights_P, names.tolist(), category_P, sizes_C.astype(np.float64), ratios_SC)


def _sums(values_NP: Floats, category_P: NDArray[np.intp]) -> Floats:
    """Return sums by category, of shape (N, C)."""
    member_PC = np.eye(category_P.max() + 1)[category_P]
    return np.asarray(values_NP @ member_PC)


def _deviations(scores: _Scores, generator: np.random.Generator, samples: int) -> Floats:
    """Return draws of how far the statistic may be from the truth, with the variance and tails of crossed samples."""
    plain_B = _resample(scores, generator, samples)
    spread, (variance, freedom) = float(plain_B.std()), _variance(scores)
    if not spread or not variance:
        return np.zeros(samples)
    tails_B: Floats = np.sqrt(freedom / generator.chisquare(freedom, samples))
    return plain_B * tails_B * (math.sqrt(variance) / spread)


def _resample(scores: _Scores, generator: np.random.Generator, samples: int) -> Floats:
    """Return the statistic's deviations in resamples of seeds, and of prompts within their categories."""
    seeds, prompts = scores.numerators_SP.shape
    share_BS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), samples) / seeds
    times_BP = np.empty((samples, prompts))
    for number, size in enumerate(scores.sizes_C.astype(int)):
        times_BP[:, scores.category_P == number] = generator.multinomial(size, np.full(size, 1 / size), samples)
    above_BC = _sums((share_BS @ scores.numerators_SP) * times_BP, scores.category_P)
    below_BC = _sums(times_BP * scores.denominators_P, scores.category_P)
    return np.asarray((above_BC / below_BC).mean(axis=1) - scores.ratios_SC.mean())


def _variance(scores: _Scores) -> tuple[float, float]:
    """Return the statistic's variance over crossed seeds and prompts, and its degrees of freedom.

    A prompt acts on its category's ratio through its residual, to first order. Where the sum of the three
    parts falls below one of the first two, that one holds, since the truth is below neither.
    """
    seeds = len(scores.numerators_SP)
    total_C = _sums(scores.denominators_P[None], scores.category_P)[0]
    residual_SP = scores.numerators_SP - scores.ratios_SC[:, scores.category_P] * scores.denominators_P
    effect_SP = residual_SP / (len(total_C) * total_C)[scores.category_P]
    unbiased_P = (scores.sizes_C / np.maximum(scores.sizes_C - 1, 1))[scores.category_P]
    effect_P = effect_SP.mean(axis=0)
    of_seeds = float(scores.ratios_SC.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    of_prompts = float((unbiased_P * effect_P**2).sum())
    of_both = float((unbiased_P * (effect_SP - effect_P) ** 2).sum()) / (seeds * max(seeds - 1, 1))
    variance = max(of_seeds + of_prompts - of_both, of_seeds, of_prompts)
    free_seeds, free_prompts = max(seeds - 1, 1), max(float((scores.sizes_C - 1).sum()), 1.0)
    doubt = of_seeds**2 / free_seeds + of_prompts**2 / free_prompts
    return variance, variance**2 / doubt if doubt else 1.0
