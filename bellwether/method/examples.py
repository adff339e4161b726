"""Steps that hide single rows: how likely a row is in one, and how many there are; what an accountant counts."""

from __future__ import annotations

from bellwether.recipe.recipe import Training


def expected_batch(rows: int, training: Training) -> int:
    """Return how many rows a step has on average, by which the noised sum of their gradients is divided.

    Args:
        rows: how many the client has, at least one.
        training: batch size and accumulation.
    """
    return min(rows, training.batch_size * training.accumulation)


def example_rate(rows: int, training: Training) -> tuple[float, int]:
    """Return the chance of a client's row to be in a step, and the steps of one pass of a round.

    A pass thus is the Gaussian mechanism on Poisson samples of this rate, composed so many times; a method of several
    passes goes through each of them. The number of a client's rows is taken as known to everybody.

    Args:
        rows: how many the client has, at least one.
        training: local epochs or steps, batch size, accumulation.
    """
    batch = expected_batch(rows, training)
    return batch / rows, training.local_steps or -(-training.local_epochs * rows // batch)
