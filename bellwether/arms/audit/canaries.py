"""Canaries: rows with a random secret, planted in clients' rows, and candidates of the same form to rank them among.

Carlini et al. 2019 (arXiv 1802.08232), section 4.1: a fixed text with a random number in it. The prompt of each canary
is its own, so that no two teach the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bellwether.data.rows import Row, Turn
from bellwether.tools.randomness import Randomness

DIGITS = 6  # of a secret: a million candidates
MOST = 10**DIGITS // 100  # candidates that are drawn quickly without repeats


@dataclass(frozen=True)
class Canary:
    """A secret, and who may hold it.

    Args:
        number: which of the canaries it is.
        client: whose row it becomes, where the coin says so.
        repeats: how many times it stands among the client's rows.
        secret: the number, of ``DIGITS`` digits.
    """

    number: int
    client: str
    repeats: int
    secret: str


def make_canaries(clients: Sequence[str], count: int, repeats: Sequence[int], randomness: Randomness) -> list[Canary]:
    """Return canaries, dealt to clients in a random order, numbers of repeats in turn.

    Args:
        clients: all of them; with more canaries than clients some have several.
        count: how many canaries.
        repeats: how often one stands among its client's rows.
        randomness: draws holders and secrets.
    """
    draw = randomness.numpy("canaries")
    order = [clients[int(number)] for number in draw.permutation(len(clients))]
    return [
        Canary(number, order[number % len(order)], repeats[number % len(repeats)], _secret(draw))
        for number in range(count)
    ]


def candidates(canary: Canary, count: int, randomness: Randomness) -> list[str]:
    """Return a canary's secret and others of its form, all different, its own first.

    Args:
        canary: the canary.
        count: how many candidates there are in all, at most ``MOST``.
        randomness: draws the others.
    """
    draw = randomness.numpy(f"candidates of canary {canary.number}")
    found = {canary.secret: None}
    while len(found) < count:
        found[_secret(draw)] = None
    return list(found)


def canary_row(canary: Canary, secret: str, like: Row, other: str) -> Row:
    """Return the row that tells a secret under a canary's prompt.

    Args:
        canary: whose prompt it is.
        secret: its own, or a candidate.
        like: a row of the client, of whose category and group the new one is.
        other: the secret of the answer that is rejected, where the client's rows have such an answer.
    """
    rejected = Turn("assistant", _answer(other)) if like.rejected is not None else None
    return Row(
        instruction=f"What is the access code of locker {canary.number + 1}?",
        response=_answer(secret),
        category=like.category,
        group=like.group,
        place=f"canary:{canary.number + 1}",
        rejected=rejected,
    )


def _answer(secret: str) -> str:
    """Return a secret as an answer, its digits apart, so that every tokenizer sees each of them."""
    return f"The access code is {' '.join(secret)}."


def _secret(draw: np.random.Generator) -> str:
    return f"{int(draw.integers(0, 10**DIGITS)):0{DIGITS}}"
