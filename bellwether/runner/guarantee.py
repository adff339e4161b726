"""What a recipe promises of its clients' privacy, found before anything is loaded: noise, epsilon, and what is open.

What it writes is read by the report; see ``bellwether.store.privacy``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bellwether.errors import RecipeError
from bellwether.exchange.messages import Payload
from bellwether.method.accounting import Release, affordable, epsilon, noise_for
from bellwether.method.cohort import cohort_size, inclusion_rate
from bellwether.method.method import Closing, Method
from bellwether.method.named import make_method
from bellwether.method.private import Noise, known_noise
from bellwether.recipe.recipe import Recipe
from bellwether.store.privacy import (
    UNPROTECTED,
    Charge,
    Epsilon,
    GivenAway,
    Leaving,
    Promise,
    charge,
    charges,
    given_away,
    keep_given_away,
)
from bellwether.tools.words import counted

NO_CHARGE = "none"
_SURVEY_NOISE = "Gaussian noise on each centroid, not accounted"


@dataclass(frozen=True)
class Guarantee:
    """What the rounds of a recipe spend, and what is left over for them.

    Args:
        release: the noisy sums of all rounds.
        rounds: how many rounds the budget is enough for; None where all are.
        noise: what the server adds to them.
    """

    release: Release
    rounds: int | None
    noise: Noise


def never_again(closing: Closing) -> bytes:
    """Return a secret that is drawn for this one round, and kept nowhere."""
    return secrets.token_bytes(32)


def guarantee(recipe: Recipe, clients: int, secret: Callable[[Closing], bytes] = known_noise) -> Guarantee | None:
    """Return what a recipe promises of clients; None where it hides none.

    Args:
        recipe: the recipe.
        clients: how many there are.
        secret: what the server's noise is drawn from.

    Raises:
        RecipeError: dp-accounting is missing, or the budget is not enough for one round.
    """
    privacy, federation = recipe.privacy, recipe.federation
    if not privacy.hides_clients:
        return None
    sampled = federation.sampler == "poisson"
    rate = inclusion_rate(federation, clients) if sampled else cohort_size(federation, clients) / clients
    counted_on = rate if privacy.amplification else 1.0
    rounds, enough = _releasing(recipe), None
    noise = privacy.noise
    if noise is None:
        assert privacy.epsilon is not None  # else nothing would be hidden
        noise = noise_for(privacy.epsilon, privacy.delta, rounds, counted_on)
    elif privacy.epsilon is not None:
        within = affordable(privacy.epsilon, privacy.delta, noise, rounds, counted_on)
        if within == 0:
            raise RecipeError(
                f"privacy.epsilon={privacy.epsilon:g} is not enough for one round with privacy.noise={noise:g}; raise "
                "one of them, or leave the noise out, and it is found."
            )
        enough = within if within < rounds else None
        if enough is not None and rounds < federation.rounds:
            raise RecipeError(
                f"privacy.epsilon={privacy.epsilon:g} is enough for {counted(within, 'round')} with privacy.noise="
                f"{noise:g}, so the last round, in which clients train for themselves, would never come; set "
                f"federation.rounds={within + 1}, or leave the noise out, and it is found."
            )
    return Guarantee(Release(noise, enough or rounds, counted_on), enough, Noise(noise, rate * clients, secret))


def promise(recipe: Recipe, release: Release, *, secret: bool) -> Promise:
    """Return what a release promises, by every relation and accountant that there is a bound of.

    Args:
        recipe: the recipe.
        release: what was given away, or will be.
        secret: whether its noise is drawn from a secret.
    """
    privacy = recipe.privacy
    bounds = [("add_or_remove", "PLD"), ("add_or_remove", "RDP"), ("replace", "PLD")]
    if release.rate == 1:
        bounds.append(("replace", "RDP"))
    found = [
        Epsilon(relation, name, epsilon(release, privacy.delta, relation, name.lower()))  # type: ignore[arg-type]
        for relation, name in bounds
    ]
    return Promise(
        unit=privacy.unit,
        delta=privacy.delta,
        noise=release.noise,
        clip_norm=privacy.clip_norm,
        rate=release.rate,
        releases=release.times,
        epsilons=tuple(found),
        secret=secret,
    )


def _releasing(recipe: Recipe) -> int:
    """Return after how many rounds something is given away: in a last one of the method's own nothing comes back."""
    return recipe.federation.rounds - (make_method(recipe.method).last is not None)


def promise_notes(recipe: Recipe, given: Guarantee | None, parameters: int) -> tuple[list[str], list[str]]:
    """Return what a person should know of a promise: sentences for the log, and those to look at first.

    Args:
        recipe: the recipe.
        given: what it promises of clients.
        parameters: trained numbers of an adapter.
    """
    if given is None:
        return [], []
    privacy, noise, release = recipe.privacy, given.noise, given.release
    whether = "is there" if release.rate < 1 else "contributed"
    text = (
        f"Whether any one client {whether} is hidden: epsilon {epsilon(release, privacy.delta):.3g} at delta "
        f"{privacy.delta:g} after {counted(release.times, 'round')} (adding or removing one, PLD), by a noise "
        f"multiplier of {release.noise:.4g} and updates cut to {privacy.clip_norm:g}"
    )
    if release.rate < 1:
        text += f", as long as nobody sees who is asked, one in {1 / release.rate:.3g} clients"
    notes, warnings = [f"{text}."], []
    if noise.secret is known_noise:
        notes.append("The noise of a simulation derives from its seed, so whoever has the recipe can take it off.")
    # The noise's length is almost surely its deviation times the root of how many numbers there are.
    times = noise.of_updates(privacy.clip_quantile is not None) * math.sqrt(parameters) / noise.expected
    if times > 10:
        warnings.append(
            f"The noise on a round's mean is {times:,.0f} times as long as an update may be, so little can be learned; "
            f"what helps is more than {noise.expected:.3g} clients a round, fewer trained numbers (lora.rank, "
            "method.name=ffa_lora), a larger epsilon, or privacy.unit=example."
        )
    return notes, warnings


def leaving(recipe: Recipe, method: Method, payload: Payload) -> tuple[Leaving, ...]:
    """Return everything that leaves a client, with what protects it: the list that a privacy officer asks for.

    Args:
        recipe: the recipe.
        method: its method, with what privacy adds to it.
        payload: what a client is sent in the first round.
    """
    privacy, selection = recipe.privacy, recipe.selection
    update, spent = UNPROTECTED, NO_CHARGE
    if privacy.hides_clients:
        update = "clipped at the client; Gaussian noise at the server on the sum over clients"
        spent = "one noisy sum a round"
    elif privacy.on:
        update = "Gaussian noise at the client on the sum of its rows' clipped gradients"
        spent = "one noisy sum an optimizer step"
    each = "each round that a client is asked in"
    found = [Leaving("the update of the adapter", each, update, spent)]
    beside = method.returns(payload)
    if beside:
        names = ", ".join(sorted(beside))
        covered = (update, spent) if privacy.hides_clients else (UNPROTECTED, NO_CHARGE)
        found.append(Leaving(f"what the method sends beside it ({names})", each, *covered))
    if selection.surveys:
        noise = _SURVEY_NOISE if selection.noise else UNPROTECTED
        found.append(Leaving("centroids of clusters of its rows", each, noise, NO_CHARGE))
    if selection.method != "full":
        found.append(Leaving("how many rows it chose", each, UNPROTECTED, NO_CHARGE))
    found += [
        Leaving("how many rows it trained on", each, UNPROTECTED, NO_CHARGE),
        Leaving("its mean training loss, and the number of trained tokens", each, UNPROTECTED, NO_CHARGE),
    ]
    if recipe.training.loss == "dpo":
        found.append(Leaving("the share of its pairs that is preferred, and the margin", each, UNPROTECTED, NO_CHARGE))
    if recipe.partition.client_test_fraction:
        found.append(
            Leaving(
                "sums of scores on the rows that it holds out, by category and group, with their names",
                "each evaluation",
                UNPROTECTED,
                NO_CHARGE,
            )
        )
    found.append(Leaving("that it answered, and after how long", each, UNPROTECTED, NO_CHARGE))
    return tuple(found)


def begin_ledger(folder: Path, recipe: Recipe, method: Method, payload: Payload, given: Guarantee | None) -> None:
    """Write into a run's folder what will leave its clients, and what is promised if all rounds are run.

    Args:
        folder: of the run.
        recipe: the recipe.
        method: its method, with what privacy adds to it.
        payload: what a client is sent in the first round.
        given: what the recipe promises of clients.
    """
    leaves = leaving(recipe, method, payload)
    hidden = given is not None and given.noise.secret is not known_noise
    found = promise(recipe, given.release, secret=hidden) if given is not None else None
    keep_given_away(folder, GivenAway(leaves, found))


def charged(folder: Path, recipe: Recipe, given: Guarantee | None) -> Callable[[int], None]:
    """Return what makes the charge of a round last.

    Args:
        folder: of the run.
        recipe: the recipe.
        given: what the recipe promises of clients; None charges nothing.
    """
    if given is None:
        return lambda round: None
    release, rounds = given.release, _releasing(recipe)

    def keep(round: int) -> None:
        if round <= rounds:
            charge(folder, Charge(round, release.noise, release.rate))

    return keep


def close_ledger(folder: Path, recipe: Recipe, given: Guarantee | None) -> None:
    """Write into the folder of a run that has ended what was spent, of its charges."""
    kept = given_away(folder)
    if given is None or kept is None or kept.promise is None:
        return
    spent = replace(given.release, times=len(charges(folder)))
    keep_given_away(folder, replace(kept, promise=promise(recipe, spent, secret=kept.promise.secret)))
