"""A bench for mechanisms: many rounds of a method over made-up updates, and an attacker who knows all but one thing.

    audit_mechanism(lambda: noisy_mean(noise=1.0), Game(clients=8), delta=1e-5, stated=4.38)

The method's own ``give``, ``finish`` and ``close`` are called, and the mean that a linear one gets is made as the round
loop makes it. In each trial a fair coin says whether one more client, the canary, takes part; it would send a random
direction, longer than any mechanism should let through. The attacker knows every other update, the direction, and the
recipe's seed. It says how much of the direction it finds in what the rounds give, as they are, or after it has redrawn
the noise from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bellwether.arms.audit.bounds import SHARES, Guesses, best_bound, two_point_bound
from bellwether.arms.audit.one_shot import gaussian_epsilon, random_directions
from bellwether.exchange.adapter import Adapter, AdapterConfig, flat, key_a, key_b
from bellwether.exchange.messages import Update, client_draws
from bellwether.method.method import Closing, Known, Method, State, Trained, mean_of
from bellwether.tools.randomness import Randomness

Floats = NDArray[np.float64]

_MODULE = "model.layers.0.self_attn.q_proj"
CANARY = "canary"


@dataclass(frozen=True)
class Game:
    """What is played.

    Args:
        clients: honest clients, whose updates change nothing.
        rounds: rounds of each trial; the canary takes part in all or none.
        norm: of the canary's change, before the method's ``finish`` cuts it.
        rows: rows that the canary claims, where the others claim one each; a mechanism that weighs clients by their
            rows gives it more than its share.
        size: inputs and outputs of the one adapted layer, of rank 1, so that there are 2 · size parameters.
        trials: how often it is played, with a coin, a direction and a seed each.
    """

    clients: int = 8
    rounds: int = 1
    norm: float = 100.0
    rows: int = 1000
    size: int = 16
    trials: int = 1000


@dataclass(frozen=True)
class MechanismAudit:
    """What the attacker found.

    Args:
        lower: lower bound of epsilon, which holds with the confidence asked for: the larger one of the two forms.
        one_run: that of guesses (Steinke et al. 2023), with the better one of the two attacks.
        two_point: that of error rates (Nasr et al. 2021), likewise.
        estimate: epsilon of telling two Gaussians apart (Andrew et al. 2023): an estimate, and no bound.
        guesses: behind ``one_run``.
        attack: which attack found more: ``as it is``, or ``noise redrawn``.
        stated: the epsilon that the mechanism claims.
    """

    lower: float
    one_run: float
    two_point: float
    estimate: float
    guesses: Guesses
    attack: str
    stated: float

    @property
    def broken(self) -> bool:
        """Whether the mechanism cannot be as private as it claims."""
        return self.lower > self.stated


def audit_mechanism(
    make: Callable[[], Method], game: Game, *, delta: float, stated: float, confidence: float = 0.95, seed: int = 0
) -> MechanismAudit:
    """Play a game against a mechanism, and return what epsilon it has at least.

    Args:
        make: makes the method anew for each trial, with whatever secret it draws.
        game: what is played.
        delta: of the mechanism's claim, 0..1.
        stated: the epsilon of its claim, for all rounds of a trial.
        confidence: with which the true epsilon is at least ``lower``.
        seed: of coins, directions, and the recipes' seeds.

    Returns:
        Bounds, estimate, and whether the claim is refuted.
    """
    present_M, scores = _played(make, game, seed)
    # Two attacks of two forms each: what the confidence leaves is divided among the four.
    each = 1 - (1 - confidence) / 4
    found = []
    for attack, scores_M in scores.items():
        one_run, guesses = best_bound(scores_M, present_M, delta, each, SHARES)
        two_point = _by_rates(scores_M, present_M, delta, each)
        estimate = _estimate(scores_M, present_M, delta)
        found.append(
            MechanismAudit(max(one_run, two_point), one_run, two_point, estimate, guesses, attack, float(stated))
        )
    return max(found, key=lambda one: one.lower)


def _played(make: Callable[[], Method], game: Game, seed: int) -> tuple[NDArray[np.bool_], dict[str, Floats]]:
    """Return the coins of all trials, and the score that each attack gives each trial."""
    draw = Randomness(seed).numpy("mechanism audit")
    present_M = draw.random(game.trials) < 0.5
    directions_MP = random_directions(game.trials, 2 * game.size, draw)
    seeds_M = draw.integers(0, 2**31, game.trials)
    seen, redrawn = np.empty(game.trials), np.empty(game.trials)
    for trial, (present, direction_P) in enumerate(zip(present_M, directions_MP, strict=True)):
        public = int(seeds_M[trial])
        without = _rounds(make(), game, public, None)
        given = _rounds(make(), game, public, direction_P if present else None)
        # Without the canary honest updates change nothing, so that all that is seen is noise, and perhaps the canary.
        seen[trial] = given.sum(0) @ direction_P
        redrawn[trial] = (given - without).sum(0) @ direction_P
    return present_M, {"as it is": seen, "noise redrawn": redrawn}


def _rounds(method: Method, game: Game, seed: int, direction_P: Floats | None) -> Floats:
    """Return what each round of a trial adds to the model, as changes_RP."""
    state = method.begin(_first_adapter(game.size))
    order, changes = list(state.adapter.tensors), []
    for number in range(1, game.rounds + 1):
        here = method.of_round(number, game.rounds)
        updates = _updates(here, state, game, number, direction_P)
        after = _closed(here, state, updates, number, seed, game)
        changes.append(flat(after.adapter.tensors, order) - flat(state.adapter.tensors, order))
        state = after
    return np.array(changes, np.float64)


def _first_adapter(size: int) -> Adapter:
    """Return an adapter of one module in float64, so that a round's change is not rounded away."""
    config = AdapterConfig(1, 1.0, 0.0, (_MODULE,))
    return Adapter(config, {key_a(_MODULE): np.zeros((1, size)), key_b(_MODULE): np.zeros((size, 1))})


def _updates(method: Method, state: State, game: Game, round: int, direction_P: Floats | None) -> list[Update]:
    """Return the updates of a round: honest ones that change nothing, and perhaps the canary's."""
    updates = [_update(method, state, client, 1, round, np.zeros(2 * game.size)) for client in _honest(game)]
    if direction_P is not None:
        updates.append(_update(method, state, CANARY, game.rows, round, game.norm * direction_P))
    return updates


def _honest(game: Game) -> list[str]:
    """Return the names of the clients that are always there."""
    return [f"client-{number:02}" for number in range(game.clients)]


def _update(method: Method, state: State, client: str, rows: int, round: int, change_P: Floats) -> Update:
    """Return what a client sends whose training changes its adapter so."""
    payload = method.give(state, Known(client, 1), round)
    parts = np.split(change_P, np.cumsum([value.size for value in payload.adapter.tensors.values()])[:-1])
    trained = {
        key: value + part.reshape(value.shape)
        for (key, value), part in zip(payload.adapter.tensors.items(), parts, strict=True)
    }
    draws = client_draws(Randomness(0), round, client)
    finished = method.finish(Trained(payload, {}, [trained], [0.0], draws))
    metrics = {"loss": 1.0, "tokens": 1.0, "rows": float(rows)}
    return Update(client, round, finished.tensors, rows, metrics, finished.arrays)


def _closed(method: Method, state: State, updates: Sequence[Update], round: int, seed: int, game: Game) -> State:
    """Close a round as the round loop does, over whoever came of all clients and the canary."""
    ordered = sorted(updates, key=lambda update: update.client)
    linear = method.weigh is not None
    closing = Closing(
        round=round,
        state=state,
        clients=game.clients + 1,
        cohort=[*_honest(game), CANARY],
        mean=mean_of(ordered, method.weigh) if method.weigh is not None else None,
        updates=() if linear else ordered,
        failure=None,
        randomness=Randomness(Randomness(seed).seed_for("server")),
    )
    return method.close(closing)


def _by_rates(scores_M: Floats, present_M: NDArray[np.bool_], delta: float, confidence: float) -> float:
    """Return the bound by error rates: the threshold is chosen on the first half of the trials, and used on the other.

    Among the thresholds that are tried, the one whose bound on the first half is largest is taken.
    """
    half = len(scores_M) // 2
    tried = np.unique(np.quantile(scores_M[:half], np.linspace(0.02, 0.98, 49)))

    def bound(threshold: float, part: slice) -> float:
        said, present = scores_M[part] > threshold, present_M[part]
        hits, alarms = int((said & present).sum()), int((said & ~present).sum())
        return two_point_bound(hits, int(present.sum()), alarms, int((~present).sum()), delta, confidence)

    best = max(tried, key=lambda threshold: bound(threshold, slice(half)))
    return bound(float(best), slice(half, None))


def _estimate(scores_M: Floats, present_M: NDArray[np.bool_], delta: float) -> float:
    """Return the epsilon of telling the scores with the canary from those without, as Gaussians of one deviation.

    Andrew et al. fit each its own deviation, which far out, where a small delta looks, makes much of little.
    """
    inside, outside = scores_M[present_M], scores_M[~present_M]
    gap = float(inside.mean() - outside.mean())
    deviation = float(np.sqrt((inside.var() * len(inside) + outside.var() * len(outside)) / (len(scores_M) - 2)))
    # Scores that do not vary, as where noise is taken away whole, are told apart always, or never.
    deviation = max(deviation, 1e-9 * abs(gap), 1e-12)
    return gaussian_epsilon((gap, deviation), (0.0, deviation), delta)
