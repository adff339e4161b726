"""How well scores tell members from others: exposure, area under the curve, true positives at few false ones, LiRA.

Shape legend: N rows, S runs, B resamples, R candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bellwether.tools.intervals import Interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000


def exposure(losses_R: ArrayLike, secret: int) -> float:
    """Return how exposed a secret is among candidates of its form, in bits.

    log2 |R| - log2 rank, where the rank counts candidates by rising loss from 1 on (Carlini et al. 2019, arXiv
    1802.08232, definition 3). Here R is a sample of the candidates instead of all of them, so that the exposure is at
    most log2 |R|; of equal losses the secret is taken to come in the middle.

    Args:
        losses_R: the loss of each candidate, the secret among them.
        secret: its number.
    """
    losses = np.asarray(losses_R, np.float64)
    own = losses[secret]
    rank = 1 + int((losses < own).sum()) + (int((losses == own).sum()) - 1) / 2
    return math.log2(len(losses)) - math.log2(rank)


def auc(scores_N: Floats, member_N: Bools, weights_BN: Floats | None = None) -> Floats:
    """Return the probability that a member scores above one that is none, equal scores counting half.

    Args:
        scores_N: the higher, the more it seems to be a member.
        member_N: whether it is.
        weights_BN: how often each row counts, for each resample; None counts every row once.

    Returns:
        One value for each resample; NaN where there are no members, or nothing else.
    """
    weights = np.ones((1, len(scores_N))) if weights_BN is None else weights_BN
    _, place_N = np.unique(scores_N, return_inverse=True)
    steps = int(place_N.max(initial=-1)) + 1
    into = np.zeros((len(scores_N), steps))
    into[np.arange(len(scores_N)), place_N] = 1.0
    inside, outside = (weights * member_N) @ into, (weights * ~member_N) @ into
    below = np.cumsum(outside, axis=1) - outside / 2
    with np.errstate(invalid="ignore"):
        found: Floats = (inside * below).sum(1) / (inside.sum(1) * outside.sum(1))
    return found


def tpr_at(scores_N: Floats, member_N: Bools, weights_BN: Floats | None = None, fpr: float = 0.01) -> Floats:
    """Return the largest share of members that a threshold catches with at most a share of false alarms.

    Args:
        scores_N: the higher, the more it seems to be a member.
        member_N: whether it is.
        weights_BN: how often each row counts, for each resample; None counts every row once.
        fpr: share of those that are no members, above 0 and below 1.

    Returns:
        One value for each resample; NaN where there are no members, or nothing else.
    """
    weights = np.ones((1, len(scores_N))) if weights_BN is None else weights_BN
    order = np.argsort(-scores_N, kind="stable")
    ordered, member = scores_N[order], member_N[order]
    caught, alarms = np.cumsum(weights[:, order] * member, 1), np.cumsum(weights[:, order] * ~member, 1)
    with np.errstate(invalid="ignore"):
        tpr, false = caught / caught[:, -1:], alarms / alarms[:, -1:]
    # A threshold takes all of those that score alike.
    last = np.append(ordered[1:] != ordered[:-1], True)
    # Shares are sums over counts: what equals the share must not fall behind it by rounding.
    allowed = (false <= fpr + 1e-12) & last
    found: Floats = np.where(allowed, tpr, 0.0).max(1)
    return np.where(np.isnan(tpr[:, -1]) | np.isnan(false[:, -1]), np.nan, found)


Statistic = Callable[[Floats, Bools, Floats | None], Floats]


def over_runs(
    scores_SN: Floats,
    member_SN: Bools,
    statistic: Statistic,
    generator: np.random.Generator,
    *,
    samples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """Return the mean over runs of what a statistic says of each, with its interval.

    Rows are met by all runs, so rows are drawn with replacement, the same for all runs, and runs too (Owen 2007, arXiv
    0712.1111, which errs on the wide side). The ends are percentiles; the p-value is not looked for.

    Args:
        scores_SN: of each row in each run; NaN leaves it out there.
        member_SN: whether the row was trained on in the run.
        statistic: of scores, membership and weights, such as ``auc``.
        generator: draws the resamples.
        samples: how many.
        level: probability with which the interval shall hold the true value, 0..1.
    """
    runs, rows = scores_SN.shape
    weights_BN = generator.multinomial(rows, np.full(rows, 1 / rows), samples).astype(np.float64)
    share_BS = generator.multinomial(runs, np.full(runs, 1 / runs), samples) / runs
    point, drawn = [], []
    for scores_N, member_N in zip(scores_SN, member_SN, strict=True):
        known = np.isfinite(scores_N)
        point.append(statistic(scores_N[known], member_N[known], None)[0])
        drawn.append(statistic(scores_N[known], member_N[known], weights_BN[:, known]))
    drawn_BS = np.stack(drawn, axis=1)
    # A resample in which a run has no members, or nothing else, says nothing of that run.
    share_BS = share_BS * np.isfinite(drawn_BS)
    with np.errstate(invalid="ignore"):
        means_B = np.where(np.isfinite(drawn_BS), drawn_BS, 0.0) * share_BS
        means_B = means_B.sum(1) / share_BS.sum(1)
    known_B = means_B[np.isfinite(means_B)]
    low, high = np.quantile(known_B, [(1 - level) / 2, (1 + level) / 2]) if len(known_B) else (math.nan, math.nan)
    return Interval(float(np.nanmean(point)), float(low), float(high), math.nan)


def mean_over(values_N: ArrayLike, generator: np.random.Generator, *, level: float = 0.95) -> Interval:
    """Return a mean with its interval, by drawing the values with replacement.

    Args:
        values_N: at least one value.
        generator: draws the resamples.
        level: probability with which the interval shall hold the true value, 0..1.
    """
    values = np.asarray(values_N, np.float64)
    drawn = values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), math.nan)


def lira(scores_SN: Floats, member_SN: Bools) -> Floats:
    """Return the log-likelihood ratio of membership of each row in each run, judged by all other runs.

    Carlini et al. 2022 (arXiv 2112.03570), algorithm 1: a Gaussian of the row's scores where it was trained on, one
    where it was not, log p_in - log p_out. Each run is the target once, and the others are its shadows. With few
    shadows the Gaussians of all rows share a variance, one for in and one for out, as the paper does with few. Its
    score is the logit of the confidence; here it is whatever is given, such as the base's loss less the adapter's.

    Args:
        scores_SN: of each row in each run.
        member_SN: whether the row was trained on in the run.

    Returns:
        One ratio for each row and run; NaN where the other runs all have the row in, or all out.
    """
    ratios_SN = np.full(scores_SN.shape, np.nan)
    for run in range(len(scores_SN)):
        others = np.arange(len(scores_SN)) != run
        shadows, inside = scores_SN[others], member_SN[others]
        density = []
        for here in (inside, ~inside):
            count_N = here.sum(0)
            with np.errstate(invalid="ignore"):
                mean_N = np.where(here, shadows, 0.0).sum(0) / count_N
            residual = np.where(here, shadows - mean_N, 0.0)
            freedom = int((count_N - 1).clip(min=0).sum())
            # No row has two such runs, so nothing is known of how they vary.
            variance = float(np.nansum(residual**2)) / freedom if freedom else np.nan
            variance = max(variance, float(np.finfo(np.float32).tiny))
            # The mean of few shadows is itself in doubt: a new score differs from it by a variance of 1 + 1 / n of it.
            with np.errstate(divide="ignore", invalid="ignore"):
                spread_N = variance * (1 + 1 / count_N)
                density.append(-0.5 * ((scores_SN[run] - mean_N) ** 2 / spread_N + np.log(spread_N)))
        ratios_SN[run] = density[0] - density[1]
    return ratios_SN
