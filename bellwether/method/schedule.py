"""The learning rate of every optimizer step of a run."""

from __future__ import annotations

import math

from bellwether.recipe.recipe import Training


def learning_rate(training: Training, round: int, rounds: int, step: int = 0, steps: int = 1) -> float:
    """Return the learning rate of one optimizer step.

    A step stands at ``round - 1 + step / steps`` of the run's ``rounds``, however many steps a client
    takes in a round. Over ``warmup_rounds`` the rate rises linearly, already in the first step, and is
    full in the last one of the last warm-up round. Then it stays, or falls from the full rate linearly or
    as half a cosine (without restarts: Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5), so that
    a step after the last one of the run would have rate 0.

    A run of one round is thus ordinary training with a schedule over all its steps.

    Args:
        training: the recipe's training section: the full rate, schedule and warm-up.
        round: the round, 1..rounds.
        rounds: rounds of the run, more than ``warmup_rounds``.
        step: the client's optimizer step in this round, 0..steps - 1.
        steps: the client's optimizer steps in this round. As one step, the default, a round has the rate of
            its beginning, and while it warms up that of its end.
    """
    warmup = training.warmup_rounds
    if round <= warmup:
        return training.learning_rate * (round - 1 + (step + 1) / steps) / warmup
    done = (round - 1 - warmup + step / steps) / (rounds - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return training.learning_rate * factor[training.schedule]
