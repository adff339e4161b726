"""How much privacy noisy sums spend: from noise, sampling and repetition to epsilon, and back.

The accounting is dp-accounting's: privacy loss distributions (PLD, Doroshenko et al. 2022, arXiv 2207.04380), the
tighter, and Rényi differential privacy (RDP, Mironov 2017, arXiv 1702.07476) beside it. Epsilon always belongs to a
relation, which says what of the data an observer cannot tell:

- ``add_or_remove``: whether one (a client, or a row) is there at all. Where cohorts are of a fixed size, it is whether
  the one that was asked contributed anything (zero-out), which has the same epsilon.
- ``replace``: which of two it is. It is the stronger promise, and of a sum of clipped values it has twice the
  sensitivity.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bellwether.errors import RecipeError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Relation = Literal["add_or_remove", "replace"]
Accountant = Literal["pld", "rdp"]

CLOSE = 1e-3  # how near to the least noise the one that is found is, relative
COARSE = 1e-3  # steps of privacy loss while it is looked for; they are rounded up, so that the noise is never too small


@dataclass(frozen=True)
class Release:
    """Sums of clipped values with Gaussian noise, one after the other.

    Args:
        noise: the noise's standard deviation over the largest norm of one value.
        times: how many sums.
        rate: probability that any one is in a sum, drawn by Poisson sampling that nobody sees; 1 where everyone may be.
    """

    noise: float
    times: int
    rate: float = 1.0


@functools.lru_cache(maxsize=4096)
def epsilon(
    release: Release, delta: float, relation: Relation = "add_or_remove", accountant: Accountant = "pld"
) -> float:
    """Return the epsilon of a release at delta; 0 of none.

    Args:
        release: what is given away.
        delta: probability with which epsilon may not hold.
        relation: what of the data cannot be told; RDP knows ``replace`` only where nothing is sampled.
        accountant: whose bound.

    Raises:
        RecipeError: dp-accounting is not installed.
    """
    if release.times == 0:
        return 0.0
    library = _library()
    relations = library.NeighboringRelation
    if accountant == "rdp":
        if relation == "replace":
            if release.rate < 1:
                raise ValueError("RDP has no bound for replacing one where a sum is sampled")
            # A replaced value moves the sum by twice the norm.
            release = replace(release, noise=release.noise / 2)
        made: Any = library.rdp.RdpAccountant(neighboring_relation=relations.ADD_OR_REMOVE_ONE)
    else:
        kind = relations.REPLACE_ONE if relation == "replace" else relations.ADD_OR_REMOVE_ONE
        made = library.pld.PLDAccountant(kind)
    with _without_warnings():
        made.compose(_event(release))
        return float(made.get_epsilon(delta))


@functools.lru_cache(maxsize=256)
def noise_for(budget: float, delta: float, times: int, rate: float = 1.0) -> float:
    """Return the least noise multiplier with which so many sums stay within epsilon, by PLD, for ``add_or_remove``.

    Args:
        budget: the largest epsilon.
        delta: probability with which it may not hold.
        times: see ``Release``.
        rate: see ``Release``.

    Raises:
        RecipeError: dp-accounting is not installed, or no noise is enough.
    """
    library = _library()
    from dp_accounting.mechanism_calibration import NoBracketIntervalFoundError

    relation = library.NeighboringRelation.ADD_OR_REMOVE_ONE

    def found(accountant: Any, bracket: Any, tolerance: float) -> float:
        with _without_warnings():
            return float(
                library.calibrate_dp_mechanism(
                    accountant, lambda noise: _event(Release(noise, times, rate)), budget, delta, bracket, tol=tolerance
                )
            )

    try:
        # RDP is quick and hardly ever below PLD, so the search for the least noise begins at what it finds enough.
        enough = found(lambda: library.rdp.RdpAccountant(neighboring_relation=relation), None, 1e-3)
        bracket = library.LowerEndpointAndGuess(enough / 2, enough)
        return found(lambda: library.pld.PLDAccountant(relation, COARSE), bracket, CLOSE * enough)
    except NoBracketIntervalFoundError:
        raise RecipeError(
            f"privacy.epsilon={budget:g} at privacy.delta={delta:g} cannot be kept over {times} releases by any noise "
            "that leaves something; raise one of them, or lower federation.rounds."
        ) from None


def affordable(budget: float, delta: float, noise: float, rounds: int, rate: float = 1.0) -> int:
    """Return how many of so many rounds a budget is enough for, by PLD, for ``add_or_remove``.

    Args:
        budget: the largest epsilon.
        delta: probability with which it may not hold.
        noise: see ``Release``.
        rounds: the most that are wanted.
        rate: see ``Release``.
    """

    def within(times: int) -> bool:
        return epsilon(Release(noise, times, rate), delta) <= budget

    if within(rounds):
        return rounds
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def _event(release: Release) -> DpEvent:
    library = _library()
    one = library.GaussianDpEvent(release.noise)
    if release.rate < 1:
        one = library.PoissonSampledDpEvent(release.rate, one)
    return library.SelfComposedDpEvent(one, release.times)


def _library() -> Any:
    """Return dp-accounting, which takes a second to import and which few runs need."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise RecipeError(
            "privacy.epsilon and privacy.noise are accounted with dp-accounting, which is not installed; install it "
            "with: pip install 'bellwether[privacy]'."
        ) from error
    return dp_accounting


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the warnings that single orders of RDP do not converge; they are left out of the bound."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
