"""The learning rate of every step, against torch's own schedulers."""

import itertools

import numpy as np
import pytest
import torch

from bellwether.method.schedule import learning_rate
from bellwether.recipe.recipe import Training

PEAK, ROUNDS, STEPS = 0.1, 4, 5


def ours(rounds=ROUNDS, steps=STEPS, **training):
    settings = Training(learning_rate=PEAK, **training)
    places = itertools.product(range(1, rounds + 1), range(steps))
    return [learning_rate(settings, round, rounds, step, steps) for round, step in places]


def torchs(make, count):
    """The rates of ``count`` steps as a scheduler of torch gives them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def linear(optimizer, steps):
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=1e-300, total_iters=steps)


def cosine(optimizer, steps):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def constant(optimizer, steps):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=steps)


SCHEDULERS = {"linear": linear, "cosine": cosine, "constant": constant}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize(("rounds", "steps"), [(4, 5), (1, 20), (20, 1)])
def test_the_rate_falls_with_every_step_as_torchs_schedulers_do(schedule, rounds, steps):
    expected = torchs(lambda optimizer: SCHEDULERS[schedule](optimizer, rounds * steps), rounds * steps)
    np.testing.assert_allclose(ours(rounds, steps, schedule=schedule), expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_a_warm_up_rises_step_by_step_and_the_schedule_begins_after_it(schedule):
    def warm(optimizer):
        # 2 of 4 rounds: 10 steps of tenths of the peak.
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return torch.optim.lr_scheduler.SequentialLR(
            optimizer, [rise, SCHEDULERS[schedule](optimizer, 10)], milestones=[10]
        )

    rates = ours(schedule=schedule, warmup_rounds=2)
    np.testing.assert_allclose(rates, torchs(warm, 20), rtol=1e-9)
    assert rates[:2] == pytest.approx([0.01, 0.02])
    assert rates[9:11] == pytest.approx([PEAK, PEAK])


def test_clients_of_unequal_steps_follow_one_curve():
    settings = Training(learning_rate=PEAK, schedule="cosine")
    few = [learning_rate(settings, 2, 3, step, 4) for step in range(4)]
    many = [learning_rate(settings, 2, 3, step, 12) for step in range(12)]
    np.testing.assert_allclose(many[::3], few, rtol=1e-12)


def test_as_one_step_a_round_has_the_rate_of_its_beginning_and_while_it_warms_up_of_its_end():
    settings = Training(learning_rate=PEAK, schedule="linear", warmup_rounds=2)
    # By hand: halves of the peak, then 4/4, 3/4, 2/4, 1/4 of it.
    expected = [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]
    assert [learning_rate(settings, round, 6) for round in range(1, 7)] == pytest.approx(expected)
