"""The bench of mechanisms: right ones are not called broken, and each way to be wrong is caught."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bellwether.arms.audit.mechanism import Game, audit_mechanism
from bellwether.arms.audit.one_shot import gaussian_epsilon
from bellwether.method.accounting import Release, epsilon
from bellwether.method.average import fedavg
from bellwether.method.method import Finished, Method, State, alike, by_rows, send_trained
from bellwether.method.private import Noise, client_level, known_noise
from bellwether.recipe.privacy import Privacy
from bellwether.runner.guarantee import never_again

CLIP, DELTA = 0.5, 1e-5
# The deviation is twice the sensitivity; test_audit_bounds compares this with a published value.
STATED = gaussian_epsilon((0.5, 1), (0, 1), DELTA)
GAME = Game(clients=2, trials=600)
SECRET = itertools.count()


def gaussian(*, scale=2.0, weigh=alike, public=False, clips=True):
    """A reference mechanism: clients clip, the server adds noise of ``scale`` clips to the sum over a fixed number."""

    def finish(trained):
        sent, last = trained.payload.adapter.tensors, send_trained(trained).tensors
        norm = np.sqrt(sum(np.square(last[key] - sent[key]).sum() for key in sent))
        share = min(1.0, CLIP / norm) if clips and norm else 1.0
        return Finished({key: sent[key] + share * (last[key] - sent[key]) for key in sent})

    def close(closing):
        # Secret noise is another one in every trial, whatever the recipe's seed; here from a counter.
        secret = next(SECRET)
        draw = closing.randomness.numpy("noise", round=closing.round) if public else np.random.default_rng(secret)
        adapter = closing.state.adapter
        moved = {
            key: value
            + (
                (closing.mean.tensors[key] - value) * (closing.clients if weigh is by_rows else closing.mean.count)
                + draw.normal(0, scale * CLIP, value.shape)
            )
            / closing.clients
            for key, value in adapter.tensors.items()
        }
        return State(adapter.updated(moved))

    return Method(close, weigh=weigh, finish=finish)


def test_a_right_mechanism_is_not_called_broken_and_the_bound_is_near_its_epsilon():
    found = audit_mechanism(gaussian, GAME, delta=DELTA, stated=STATED)
    assert not found.broken
    assert found.lower > 0.1
    # The gap of 300 scores each is known to √(2 / 300), the deviation to 1 / √1200 of it; ε moves by less than 5 per
    # unit of their ratio.
    assert found.estimate == pytest.approx(STATED, abs=4 * 5 * np.sqrt(2 / 300 + 0.25 / 1200))


def test_right_mechanisms_are_hardly_ever_called_broken():
    # The claim is exact for two rounds: √2 times the signal of one.
    stated = gaussian_epsilon((np.sqrt(2) / 2, 1), (0, 1), DELTA)
    found = [
        audit_mechanism(gaussian, Game(clients=2, rounds=2, trials=150), delta=DELTA, stated=stated, seed=seed)
        for seed in range(10)
    ]
    assert not any(one.broken for one in found)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"scale": 0.4}, "as it is"),  # noise for another sensitivity than the clip: a fifth of what it must be
        ({"weigh": by_rows}, "as it is"),  # the canary claims a thousand rows
        ({"public": True}, "noise redrawn"),  # the recipe's seed gives the noise away
        ({"clips": False}, "as it is"),  # nothing bounds what a client sends
    ],
)
def test_a_broken_mechanism_is_caught(fault, told):
    found = audit_mechanism(lambda: gaussian(**fault), Game(trials=600), delta=DELTA, stated=STATED)
    assert found.broken
    assert found.attack == told
    assert found.lower == max(found.one_run, found.two_point)


def test_without_any_noise_every_guess_is_right():
    found = audit_mechanism(lambda: gaussian(scale=0.0), GAME, delta=DELTA, stated=STATED)
    assert found.guesses.right == found.guesses.made
    assert found.broken


def test_the_attacker_who_knows_the_seed_gains_nothing_against_secret_noise():
    secret = audit_mechanism(gaussian, GAME, delta=DELTA, stated=STATED)
    public = audit_mechanism(lambda: gaussian(public=True), GAME, delta=DELTA, stated=STATED)
    assert secret.lower < STATED < public.lower
    assert public.attack == "noise redrawn"


# bellwether's own mechanism -----------------------------------------------------------------------


def own(*, noise=2.0, secret=never_again):
    """Whole clients hidden as a run hides them, one of two in a round with a sum over two."""
    return lambda: client_level(fedavg(), Privacy(noise=2.0, clip_norm=CLIP), Noise(noise, 2.0, secret))


def test_bellwethers_own_mechanism_is_not_called_broken():
    found = audit_mechanism(own(), GAME, delta=DELTA, stated=epsilon(Release(2.0, 1), DELTA))
    assert not found.broken
    assert found.lower > 0.1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"noise": 0.4}, "as it is"),  # noise for a fifth of the sensitivity
        ({"secret": known_noise}, "noise redrawn"),  # that of a simulation, in place of a secret
    ],
)
def test_bellwethers_own_mechanism_made_wrong_is_caught(fault, told):
    found = audit_mechanism(own(**fault), GAME, delta=DELTA, stated=epsilon(Release(2.0, 1), DELTA))
    assert found.broken
    assert found.attack == told
