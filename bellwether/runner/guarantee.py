"""What a recipe promises of its clients' privacy, found before anything is loaded: noise, epsilon, and what is open.

What it writes is read by the report; see ``bellwether.store.privacy``.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bellwether.errors import RecipeError
from bellwether.exchange.messages import Payload
from bellwether.method.accounting import Release, affordable, epsilon, noise_for
from bellwether.method.cohort import cohort_size, inclusion_rate
from bellwether.method.examples import example_rate
from bellwether.method.method import Closing, Method
from bellwether.method.named import make_method
from bellwether.method.private import Noise, known_noise
from bellwether.recipe.privacy import Privacy
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
NEAR = 0.9  # of the largest epsilon by RDP, above which a client may be the one with the largest by PLD
_SURVEY_NOISE = "Gaussian noise on each centroid, not accounted"


@dataclass(frozen=True)
class Guarantee:
    """What the rounds of a recipe spend, and how many of them its budget is enough for.

    Args:
        one: the noisy sums of one round; of rows, those of the client whose rows have the largest epsilon.
        rounds: in how many rounds something is given away, within the budget.
        ends: the round after which the budget is spent; None where it is enough for all.
        secret: whether the noise is drawn from a secret; a simulation's is not.
        noise: what the server adds, where clients are hidden.
        client: whose rows have the largest epsilon; empty where clients are hidden.
    """

    one: Release
    rounds: int
    ends: int | None
    secret: bool
    noise: Noise | None = None
    client: str = ""

    @property
    def release(self) -> Release:
        """The noisy sums of all rounds."""
        return replace(self.one, times=self.one.times * self.rounds)


def never_again(closing: Closing) -> bytes:
    """Return a secret that is drawn for this one round, and kept nowhere."""
    return secrets.token_bytes(32)


def guarantee(
    recipe: Recipe, rows: Mapping[str, int], secret: Callable[[Closing], bytes] = known_noise
) -> Guarantee | None:
    """Return what a recipe promises; None where that is nothing, and where nobody here knows the rows that it hides.

    Args:
        recipe: the recipe.
        rows: how many each client trains on; 0 where that is not known here.
        secret: what the server's noise is drawn from.

    Raises:
        RecipeError: dp-accounting is missing, or the budget is not enough for one round.
    """
    privacy, federation = recipe.privacy, recipe.federation
    if privacy.hides_rows:
        return _of_rows(recipe, rows) if all(rows.values()) else None
    if not privacy.hides_clients:
        return None
    clients = len(rows)
    sampled = federation.sampler == "poisson"
    rate = inclusion_rate(federation, clients) if sampled else cohort_size(federation, clients) / clients
    one = Release(privacy.noise or math.nan, 1, rate if privacy.amplification else 1.0)
    if privacy.noise is None:
        one = replace(one, noise=_found(recipe, one))
    noise = Noise(one.noise, rate * clients, secret)
    return Guarantee(one, *_within(recipe, one), secret=secret is not known_noise, noise=noise)


def _of_rows(recipe: Recipe, rows: Mapping[str, int]) -> Guarantee:
    """Return what a recipe promises of single rows, which each client hides by itself.

    The client whose rows have the largest epsilon, one with few rows, stands for all; that not all clients are asked in
    every round is not counted on.
    """
    passes = len(make_method(recipe.method).passes)
    noise = recipe.privacy.noise

    def release(client: str, noise: float) -> Release:
        rate, steps = example_rate(rows[client], recipe.training)
        return Release(noise, steps * passes, rate)

    def hardest(noise: float) -> str:
        """Return the client over all rounds, by PLD among those that come near by RDP, which is quick."""
        one_of_size = {count: client for client, count in rows.items()}.values()
        rounds, delta = _releasing(recipe), recipe.privacy.delta
        spent = {client: release(client, noise) for client in one_of_size}
        whole = {client: replace(one, times=one.times * rounds) for client, one in spent.items()}
        roughly = {client: epsilon(one, delta, accountant="rdp") for client, one in whole.items()}
        near = [client for client, about in roughly.items() if about >= NEAR * max(roughly.values())]
        return max(near, key=lambda client: epsilon(whole[client], delta))

    if noise is None:
        noise, found = 0.0, _found(recipe, release(hardest(1.0), 1.0))
        while found > noise:  # with another noise another client may show more
            noise = found
            found = _found(recipe, release(hardest(noise), noise))
    client = hardest(noise)
    one = release(client, noise)
    return Guarantee(one, *_within(recipe, one), secret=False, client=client)


def _found(recipe: Recipe, one: Release) -> float:
    """Return the noise that keeps the budget over all rounds, of which each gives away so much."""
    privacy = recipe.privacy
    assert privacy.epsilon is not None  # else nothing would be hidden
    return noise_for(privacy.epsilon, privacy.delta, one.times * _releasing(recipe), one.rate)


def _within(recipe: Recipe, one: Release) -> tuple[int, int | None]:
    """Return in how many rounds something is given away, and after which the budget is spent, if it is.

    Raises:
        RecipeError: it is not enough for one round, or not for a last round of the method's own.
    """
    privacy, planned, rounds = recipe.privacy, recipe.federation.rounds, _releasing(recipe)
    if privacy.noise is None or privacy.epsilon is None:
        return rounds, None
    within = affordable(privacy.epsilon, privacy.delta, one.noise, rounds * one.times, one.rate) // one.times
    if within == 0:
        raise RecipeError(
            f"privacy.epsilon={privacy.epsilon:g} is not enough for one round with privacy.noise={one.noise:g}; raise "
            "one of them, or leave the noise out, and it is found."
        )
    if within < rounds < planned:
        raise RecipeError(
            f"privacy.epsilon={privacy.epsilon:g} is enough for {counted(within, 'round')} with privacy.noise="
            f"{one.noise:g}, so the last round, in which clients train for themselves, would never come; set "
            f"federation.rounds={within + 1}, or leave the noise out, and it is found."
        )
    return within, within if within < rounds else None


def settled(recipe: Recipe, given: Guarantee | None) -> Privacy:
    """Return the recipe's section with the noise that was found; as it is where it promises nothing.

    Args:
        recipe: the recipe.
        given: what it promises.
    """
    if given is None:
        return recipe.privacy
    return recipe.privacy.model_copy(update={"noise": given.one.noise})


def promise(recipe: Recipe, given: Guarantee, rounds: int) -> Promise:
    """Return what is promised of so many rounds, by every relation and accountant that there is a bound of.

    Args:
        recipe: the recipe.
        given: what it promises.
        rounds: in which something was given away, or will be.
    """
    release = replace(given.one, times=given.one.times * rounds)
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
        secret=given.secret,
        client=given.client,
    )


def _releasing(recipe: Recipe) -> int:
    """Return after how many rounds something is given away: in a last one of the method's own nothing comes back."""
    return recipe.federation.rounds - (make_method(recipe.method).last is not None)


def promise_notes(recipe: Recipe, given: Guarantee | None, parameters: int) -> tuple[list[str], list[str]]:
    """Return what a person should know of a promise: sentences for the log, and those to look at first.

    Args:
        recipe: the recipe.
        given: what it promises.
        parameters: trained numbers of an adapter.
    """
    if given is None:
        return [], []
    privacy, noise, release = recipe.privacy, given.noise, given.release
    whether = f"Whether any one row is at a client, such as at {given.client}, where they show most,"
    if noise is not None:
        whether = f"Whether any one client {'is there' if release.rate < 1 else 'contributed'}"
    cut = "updates" if noise is not None else "gradients"
    text = (
        f"{whether} is hidden: epsilon {epsilon(release, privacy.delta):.3g} at delta {privacy.delta:g} after "
        f"{counted(given.rounds, 'round')} (adding or removing one, PLD), by a noise multiplier of "
        f"{release.noise:.4g} and {cut} cut to {privacy.clip_norm:g}"
    )
    if noise is not None and release.rate < 1:
        text += f", as long as nobody sees who is asked, one in {1 / release.rate:.3g} clients"
    notes = [f"{text}."]
    if not given.secret:
        notes.append("The noise of a simulation derives from its seed, so whoever has the recipe can take it off.")
    if noise is None:
        return notes, []
    # The noise's length is almost surely its deviation times the root of how many numbers there are.
    times = noise.of_updates(privacy.clip_quantile is not None) * math.sqrt(parameters) / noise.expected
    if times <= 10:
        return notes, []
    return notes, [
        f"The noise on a round's mean is {times:,.0f} times as long as an update may be, so little can be learned; "
        f"what helps is more than {noise.expected:.3g} clients a round, fewer trained numbers (lora.rank, "
        "method.name=ffa_lora), a larger epsilon, or privacy.unit=example."
    ]


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
    if recipe.secure_aggregation.enabled:
        masked = "masked, so that the server sees the sum of all alone"
        update = masked if update == UNPROTECTED else f"{update}; {masked}"
    each = "each round that a client is asked in"
    found = [Leaving("the update of the adapter", each, update, spent)]
    beside, bare = method.returns(payload), (UNPROTECTED, NO_CHARGE)
    if beside:
        names = ", ".join(sorted(beside))
        covered = (update, spent) if privacy.hides_clients or recipe.secure_aggregation.enabled else bare
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
        given: what the recipe promises.
    """
    leaves = leaving(recipe, method, payload)
    found = promise(recipe, given, given.rounds) if given is not None else None
    keep_given_away(folder, GivenAway(leaves, found))


def charged(folder: Path, given: Guarantee | None) -> Callable[[int], None]:
    """Return what makes the charge of a round last.

    Args:
        folder: of the run.
        given: what the recipe promises; None charges nothing.
    """
    if given is None:
        return lambda round: None
    one, rounds = given.one, given.rounds

    def keep(round: int) -> None:
        if round <= rounds:
            # The noise of a secret is another one each time, so that a round that is asked again is seen twice.
            charge(folder, Charge(round, one.noise, one.rate, one.times), again=given.secret)

    return keep


def within_budget(folder: Path, recipe: Recipe, given: Guarantee | None, round: int) -> int | None:
    """Return after which round the budget is spent, counting what rounds spent that were asked more than once.

    Args:
        folder: of the run.
        recipe: the recipe.
        given: what it promises.
        round: the last that was finished.

    Returns:
        The round; None where the budget is enough for all.
    """
    if given is None or recipe.privacy.epsilon is None:
        return None
    twice = len(charges(folder)) - round
    return given.ends if twice <= 0 else max(round, given.rounds - twice)


def close_ledger(folder: Path, recipe: Recipe, given: Guarantee | None, rounds: int) -> None:
    """Write into the folder of a run that has ended what was spent, of its charges.

    Args:
        folder: of the run.
        recipe: the recipe.
        given: what it promises.
        rounds: how many there were.
    """
    kept = given_away(folder)
    if kept is None:
        return
    promised = promise(recipe, given, len(charges(folder))) if given is not None else None
    keep_given_away(folder, replace(kept, promise=promised, rounds=rounds))
