"""Cohorts: which clients are asked in a round, and what simulated resources they have.

A sampler is a function ``sample(sampling) -> cohort``. A trace is a function
``trace(client, round) -> Condition`` that says whether a client is there, how fast it is and whether it
drops out; the sampler ``available`` looks at it, and the local engine makes it come true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bellwether.errors import RecipeError
from bellwether.exchange.records import RoundRecord
from bellwether.method.method import Known, State
from bellwether.recipe.recipe import Availability, Engine, Federation, Lora
from bellwether.tools.functions import load_function
from bellwether.tools.randomness import Randomness


@dataclass(frozen=True)
class Sampling:
    """What a sampler draws a cohort from.

    Args:
        round: the round, counted from 1.
        clients: all clients, in their order.
        known: what the server knows of each of them.
        state: what the server has after the rounds before.
        randomness: of the run.
    """

    round: int
    clients: Sequence[str]
    known: Mapping[str, Known]
    state: State
    randomness: Randomness


Sampler = Callable[[Sampling], Sequence[str]]


@dataclass(frozen=True)
class Condition:
    """A client's resources in one round.

    Args:
        available: whether the client is there at all.
        rows_per_second: its training speed.
        drops_out: whether it takes the task and never answers.
    """

    available: bool
    rows_per_second: float
    drops_out: bool


Trace = Callable[[str, int], Condition]


def what_is_known(ranks: Mapping[str, int], rounds: Sequence[RoundRecord]) -> dict[str, Known]:
    """Return what the server knows of each client without asking.

    Args:
        ranks: all clients, and the rank of each one's adapter.
        rounds: the completed rounds.
    """
    known = {client: Known(client, rank) for client, rank in ranks.items()}
    for record in rounds:
        for one in record.clients:
            settled = record.round if record.failure is None else known[one.client].settled
            loss = None if math.isnan(one.loss) else one.loss
            known[one.client] = Known(one.client, ranks[one.client], one.rows, loss, one.seconds, settled)
    return known


def clients_together(engine: Engine, cohort: int) -> int:
    """Return how many clients of a cohort are trained together in one process."""
    share = -(-cohort // engine.processes)
    return min(engine.fuse or share, share)


def cohort_size(federation: Federation, clients: int) -> int:
    """Return how many clients are asked in a round: at least one, at most all.

    With a fraction this is max(1, fraction · clients, rounded half up), as FedAvg's m = max(C·K, 1)
    (McMahan et al. 2017, arXiv 1602.05629, algorithm 1), which leaves rounding open.
    """
    if federation.cohort_size is not None:
        return min(federation.cohort_size, clients)
    return min(clients, max(1, int(np.floor(federation.fraction * clients + 0.5 + 1e-9))))


def client_ranks(lora: Lora, clients: Sequence[str], randomness: Randomness) -> dict[str, int]:
    """Return the rank of every client's adapter: as the recipe names it, or drawn once for each.

    Args:
        lora: the recipe's section.
        clients: all clients.
        randomness: of the run.

    Raises:
        RecipeError: the recipe names a client that is not there.
    """
    if isinstance(lora.ranks, tuple):
        draws = (randomness.numpy("rank", client=client) for client in clients)
        return {client: int(draw.choice(lora.ranks)) for client, draw in zip(clients, draws, strict=True)}
    named = lora.ranks or {}
    unknown = sorted(named.keys() - set(clients))
    if unknown:
        raise RecipeError(f"lora.ranks names {unknown[0]!r}, but there is no such client; see bellwether data.")
    return {client: named.get(client, lora.rank) for client in clients}


def uniform_sampler(federation: Federation) -> Sampler:
    """Return a sampler that draws clients without replacement, all alike."""

    def sample(sampling: Sampling) -> Sequence[str]:
        return _drawn(sampling, sampling.clients, cohort_size(federation, len(sampling.clients)))

    return sample


def inclusion_rate(federation: Federation, clients: int) -> float:
    """Return the probability with which the sampler ``poisson`` asks a client in a round."""
    if federation.cohort_size is not None:
        return min(1.0, federation.cohort_size / clients)
    return federation.fraction


def poisson_sampler(federation: Federation) -> Sampler:
    """Return a sampler that asks every client with the same probability, whoever else is asked.

    The size of a cohort varies, and may be none.
    """

    def sample(sampling: Sampling) -> Sequence[str]:
        drawn = sampling.randomness.numpy("cohort", round=sampling.round).random(len(sampling.clients))
        rate = inclusion_rate(federation, len(sampling.clients))
        return [client for client, number in zip(sampling.clients, drawn, strict=True) if number < rate]

    return sample


def available_sampler(federation: Federation, trace: Trace) -> Sampler:
    """Return a sampler that draws among the clients that are there in the round, all alike.

    The cohort is smaller than asked for where fewer are there, and empty where none is.
    """

    def sample(sampling: Sampling) -> Sequence[str]:
        there = [client for client in sampling.clients if trace(client, sampling.round).available]
        return _drawn(sampling, there, cohort_size(federation, len(sampling.clients)))

    return sample


def _drawn(sampling: Sampling, clients: Sequence[str], size: int) -> list[str]:
    """Return so many clients, drawn without replacement."""
    drawn = sampling.randomness.numpy("cohort", round=sampling.round).permutation(len(clients))
    return [clients[index] for index in drawn[:size]]


def make_sampler(federation: Federation, trace: Trace | None) -> Sampler:
    """Return the sampler that the recipe names."""
    if federation.sampler == "uniform":
        return uniform_sampler(federation)
    if federation.sampler == "poisson":
        return poisson_sampler(federation)
    if federation.sampler == "available":
        assert trace is not None  # the recipe refuses this sampler without availability
        return available_sampler(federation, trace)
    return load_function(federation.sampler)


def everyone_last(sample: Sampler, federation: Federation, trace: Trace | None) -> Sampler:
    """Return a sampler that asks all clients in the last round, those that are there where the recipe looks at that.

    Args:
        sample: draws the cohorts of the rounds before.
        federation: the recipe's section.
        trace: the clients' resources, where they are simulated.
    """
    every = federation.model_copy(update={"fraction": 1.0, "cohort_size": None})
    last = available_sampler(every, trace) if federation.sampler == "available" and trace else uniform_sampler(every)
    return lambda sampling: (last if sampling.round == federation.rounds else sample)(sampling)


def make_trace(
    availability: Availability, randomness: Randomness, lines: Mapping[str, list[dict[str, Any]]] | None = None
) -> Trace:
    """Return the resources of clients: drawn from the recipe's probabilities, or as the lines of a file say.

    A client's speed is drawn once, log-normal around ``rows_per_second``; whether it is away or drops
    out is drawn anew in each round. In a file, what a line says holds from its round on; a client
    without a line is there, at the median speed.

    Args:
        availability: the recipe's section.
        randomness: of the run.
        lines: of the file by client, in the order of their rounds; None where resources are drawn.
    """

    def trace(client: str, round: int) -> Condition:
        draw = randomness.numpy("availability", round=round, client=client)
        away, drops_out = draw.random() < availability.away, draw.random() < availability.drop_out
        speed = randomness.numpy("speed", client=client).standard_normal() * availability.speed_spread
        rows_per_second = availability.rows_per_second * float(np.exp(speed))
        if lines is None:
            return Condition(not away, rows_per_second, drops_out)
        known = [line for line in lines.get(client, ()) if line["round"] <= round]
        if not known:
            return Condition(True, availability.rows_per_second, drops_out)
        last = known[-1]
        return Condition(last["available"], last["rows_per_second"], drops_out)

    return trace
