"""Epsilon by canaries that send a random direction: how far the aggregate gives away who was there.

Andrew et al. 2023 (arXiv 2307.10025): a client that sends a random direction of the largest norm is as easy to find
as any; in many dimensions the cosine of a direction that was not sent with the aggregate is normal with mean 0 and
variance 1 / P, and directions of several canaries hardly disturb each other, so that one run has as many trials as
canaries.

Shape legend: P parameters, K canaries, R rounds.
"""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_LARGEST = 100.0
_STEPS = 60


def random_directions(count: int, size: int, generator: np.random.Generator) -> Floats:
    """Return random directions_KP of norm 1, uniform on the sphere."""
    drawn_KP = generator.normal(size=(count, size))
    found: Floats = drawn_KP / np.linalg.norm(drawn_KP, axis=1, keepdims=True)
    return found


def cosines(directions_KP: ArrayLike, aggregates_RP: ArrayLike) -> Floats:
    """Return the largest cosine of each canary's direction with any of the aggregates.

    Algorithm 2 of Andrew et al. looks at all rounds, since whoever sees them sees more than the final model, and takes
    the largest; with one aggregate it is algorithm 1, on the final model's change alone.

    Args:
        directions_KP: of norm 1.
        aggregates_RP: what each round added to the model, or the sum of it all alone.
    """
    aggregates = np.atleast_2d(np.asarray(aggregates_RP, np.float64))
    norms = np.linalg.norm(aggregates, axis=1)
    kept = norms > 0
    if not kept.any():
        return np.zeros(len(np.asarray(directions_KP)))
    found: Floats = (np.asarray(directions_KP, np.float64) @ (aggregates[kept] / norms[kept, None]).T).max(1)
    return found


def estimated_epsilon(present_K: ArrayLike, absent: tuple[float, float], delta: float) -> float:
    """Return the epsilon of telling two Gaussians apart: an estimate, and no bound.

    Equation 2 of Andrew et al.: the canaries' cosines are taken to be normal with their own mean and standard
    deviation, and those of directions that nobody sent with the given one; the estimate is the smallest epsilon for
    which the two are (epsilon, delta)-indistinguishable, both ways.

    Args:
        present_K: the cosines of canaries that took part, at least two.
        absent: mean and standard deviation of the cosine of a direction that nobody sent; 0 and P ** -0.5 for one
            aggregate.
        delta: 0..1.
    """
    values = np.asarray(present_K, np.float64)
    present = float(values.mean()), float(values.std(ddof=1))
    if present[1] == 0:
        return 0.0 if present[0] == absent[0] else math.inf
    return gaussian_epsilon(present, absent, delta)


def gaussian_epsilon(first: tuple[float, float], second: tuple[float, float], delta: float) -> float:
    """Return the smallest epsilon for which two Gaussians are (epsilon, delta)-indistinguishable, both ways.

    Args:
        first: mean and standard deviation, above 0.
        second: likewise.
        delta: 0..1.
    """

    def apart(epsilon: float) -> bool:
        return max(hockey_stick(first, second, epsilon), hockey_stick(second, first, epsilon)) > delta

    if not apart(0.0):
        return 0.0
    if apart(_LARGEST):
        return math.inf
    low, high = 0.0, _LARGEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if apart(middle) else (low, middle)
    return high


def hockey_stick(first: tuple[float, float], second: tuple[float, float], epsilon: float) -> float:
    """Return the hockey-stick divergence of two Gaussians: the integral of max(0, p - e^ε q).

    p exceeds e^ε q where a quadratic is positive: between its roots or beyond them.

    Args:
        first: mean and standard deviation of p.
        second: of q.
        epsilon: at least 0.
    """
    (m1, s1), (m2, s2) = first, second
    # log p - log q - ε = a x² + b x + c
    a = 1 / (2 * s2**2) - 1 / (2 * s1**2)
    b = m1 / s1**2 - m2 / s2**2
    c = m2**2 / (2 * s2**2) - m1**2 / (2 * s1**2) + math.log(s2 / s1) - epsilon
    roots = _roots(a, b, c)
    edges = [-math.inf, *roots, math.inf]
    p, q, total = NormalDist(m1, s1), NormalDist(m2, s2), 0.0
    for low, high in itertools.pairwise(edges):
        inside = _between(low, high)
        if a * inside**2 + b * inside + c > 0:
            total += _mass(p, low, high) - math.exp(epsilon) * _mass(q, low, high)
    return max(0.0, total)


def _roots(a: float, b: float, c: float) -> list[float]:
    """Return the real roots of a x² + b x + c, rising; of none or all numbers, nothing."""
    if a == 0:
        return [] if b == 0 else [-c / b]
    under = b**2 - 4 * a * c
    if under <= 0:
        return []
    # The root that does not cancel, and the other from their product.
    far = -(b + math.copysign(math.sqrt(under), b)) / 2
    return sorted((far / a, c / far)) if far else [0.0]


def _between(low: float, high: float) -> float:
    """Return a number inside an interval that may have no end."""
    if math.isinf(low) and math.isinf(high):
        return 0.0
    if math.isinf(low):
        return high - 1 - abs(high)
    return low + 1 + abs(low) if math.isinf(high) else (low + high) / 2


def _mass(normal: NormalDist, low: float, high: float) -> float:
    """Return how much of a Gaussian lies in an interval; its tails are taken on the side where they are small."""
    if low > normal.mean:  # by symmetry, where the two parts do not come near 1
        low, high = 2 * normal.mean - high, 2 * normal.mean - low
    above = 1.0 if math.isinf(high) else normal.cdf(high)
    return above - (0.0 if math.isinf(low) else normal.cdf(low))
