"""From guesses to epsilon: how private a mechanism can be at most, given how often an attacker was right.

A game has m secret bits: each says whether something (a row, a client) took part, drawn by a fair coin. The attacker
guesses some of the bits of what the mechanism gave, and abstains from the others. The more guesses are right, the
larger epsilon must be; what is returned is a lower bound that holds with a stated confidence, whatever the attack.

Several runs with coins of their own are one mechanism with the bits of all of them, and each bit touches one run
alone, so the bits of all runs are counted together.

Shape legend: M secret bits of a game, K possible counts of right guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

SHARES = (1.0, 0.5, 0.25, 0.1)  # of the bits that are guessed; each that is tried costs confidence
_LARGEST = 60.0  # an epsilon beyond which no double tells two mechanisms apart
_STEPS = 60  # halvings, after which an interval of 60 is as narrow as a double can be near it


@dataclass(frozen=True)
class Guesses:
    """What an attacker got right.

    Args:
        bits: secret bits of the game, m.
        made: guesses made, r; the others are abstentions.
        right: right guesses, v.
    """

    bits: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.bits:
            raise ValueError(f"{self.right} right of {self.made} guesses of {self.bits} bits; none may exceed the next")


def log_pmf(trials: int, probability: float) -> Floats:
    """Return the logarithm of the probability of each count, 0 to ``trials``, of a binomial distribution.

    Args:
        trials: how many independent trials, n.
        probability: of success in each, above 0 and below 1.
    """
    count_K = np.arange(trials + 1)
    factorial_K = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    chosen_K = factorial_K[-1] - factorial_K - factorial_K[::-1]
    found: Floats = chosen_K + count_K * math.log(probability) + (trials - count_K) * math.log1p(-probability)
    return found


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return the largest probability with which an (epsilon, delta)-private mechanism lets so many guesses be right.

    Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), theorem 5.2, as their appendix D computes it:

        p = β + 2 m δ α,   β = P[X >= v],   α = max over i = 1..v of P[v > X >= v - i] / i,

    with X binomial of r trials, each right with probability e^ε / (e^ε + 1).

    Args:
        guesses: bits m, guesses r, of which v are right.
        epsilon: of the hypothesis, at least 0.
        delta: of the hypothesis, 0..1.
    """
    right = guesses.right
    pmf_K = np.exp(log_pmf(guesses.made, 1 / (1 + math.exp(-epsilon))))
    beta = float(pmf_K[right:].sum())
    below_K = np.cumsum(pmf_K[:right][::-1])
    alpha = float((below_K / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * guesses.bits * delta * alpha)


def one_run_bound(guesses: Guesses, delta: float, confidence: float = 0.95) -> float:
    """Return the largest epsilon that so many right guesses refute; 0 where they refute none.

    Args:
        guesses: bits, guesses, and right ones.
        delta: that is granted to the mechanism, 0..1.
        confidence: with which the true epsilon is at least what is returned.
    """
    return _refuted(lambda epsilon: p_value(guesses, epsilon, delta) < 1 - confidence)


def _refuted(refutes: Callable[[float], bool]) -> float:
    """Return where on the line of epsilons refuting ends, by halving; 0 where it never begins."""
    if not refutes(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if refutes(middle) else (low, middle)
    return low


def clopper_pearson(successes: int, trials: int, level: float) -> tuple[float, float]:
    """Return one-sided bounds of a binomial probability, each of which holds with probability ``level``.

    Clopper and Pearson 1934: the lower bound is the p with P[X >= k] = 1 - level, the upper with P[X <= k] = 1 - level.

    Args:
        successes: k.
        trials: n, at least 1.
        level: 0..1, of each bound alone.
    """
    alpha = 1 - level
    low = 0.0 if successes == 0 else _solved(lambda p: _tail(trials, p, successes, trials) - alpha)
    high = 1.0 if successes == trials else _solved(lambda p: alpha - _tail(trials, p, 0, successes))
    return low, high


def _tail(trials: int, probability: float, first: int, last: int) -> float:
    """Return the probability of a count from first to last."""
    return float(np.exp(log_pmf(trials, probability)[first : last + 1]).sum())


def _solved(rising: Callable[[float], float]) -> float:
    """Return where a function that rises over 0..1 is 0, by halving."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def two_point_bound(
    hits: int, present: int, false_alarms: int, absent: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the lower bound of epsilon that the rates of an attack's two errors give; 0 where they give none.

    An (ε, δ)-private mechanism has TPR <= e^ε FPR + δ and TNR <= e^ε FNR + δ (Kairouz et al. 2015, arXiv 1311.0776), so
    ε >= max(ln((TPR - δ) / FPR), ln((TNR - δ) / FNR)), here with each rate at the end of its Clopper-Pearson interval
    that is least favourable (Jagielski et al. 2020, arXiv 2006.07709; Nasr et al. 2021, arXiv 2101.04535). Both ratios
    rest on the same two ends, so each may fail with half of what the confidence leaves. The trials must be independent,
    and the attack's threshold chosen on others.

    Args:
        hits: trials with the secret present in which the attack says so.
        present: trials with it present.
        false_alarms: trials with it absent in which the attack says it was present.
        absent: trials with it absent.
        delta: that is granted to the mechanism, 0..1.
        confidence: with which the true epsilon is at least what is returned.
    """
    if not present or not absent:
        return 0.0
    level = 1 - (1 - confidence) / 2
    tpr, _ = clopper_pearson(hits, present, level)
    _, fpr = clopper_pearson(false_alarms, absent, level)
    ratios = ((tpr - delta) / fpr, (1 - fpr - delta) / (1 - tpr))
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0))


def best_bound(
    scores_M: ArrayLike,
    present_M: ArrayLike,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[float] = SHARES,
) -> tuple[float, Guesses]:
    """Return the largest lower bound that scores of secret bits give, and the guesses behind it.

    Of each share of the bits, the half with the highest scores is guessed to be present, and the half with the lowest
    to be absent. So many shares are tried that what the confidence leaves is divided among them (Bonferroni).

    Args:
        scores_M: the higher, the more it seems that what the bit stands for took part; made without knowing the bits.
        present_M: the secret bits.
        delta: that is granted to the mechanism, 0..1.
        confidence: with which the true epsilon is at least what is returned.
        shares: of the bits that are guessed, each above 0 and at most 1.

    Raises:
        ValueError: there are not as many scores as bits, or none, or one is not finite.
    """
    scores, present = np.asarray(scores_M, np.float64), np.asarray(present_M, bool)
    if scores.shape != present.shape or scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{scores.shape} scores for {present.shape} bits; give one finite score for each bit.")
    each = 1 - (1 - confidence) / len(shares)
    order = np.argsort(scores, kind="stable")
    found = []
    for share in shares:
        half = max(1, math.floor(share * len(scores) / 2))
        low, high = order[:half], order[max(half, len(order) - half) :]
        guesses = Guesses(len(scores), len(low) + len(high), int((~present[low]).sum() + present[high].sum()))
        found.append((one_run_bound(guesses, delta, each), guesses))
    return max(found, key=lambda one: one[0])


def chance(count: int) -> float:
    """Return the exposure that a secret has on average that was never seen, among so many candidates.

    Its rank is uniform on 1..count, so that is log2(n) - log2(n!) / n; 1.44 for many.
    """
    return math.log2(count) - math.lgamma(count + 1) / math.log(2) / count
