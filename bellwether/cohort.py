"""Cohorts: which clients are asked in a round, and what simulated resources they have.

A sampler is a function ``sample(clients, round, randomness) -> cohort``. A trace is a function
``trace(client, round) -> Condition`` that says whether a client is there, how fast it is and whether it
drops out; the sampler ``available`` looks at it, and the local engine makes it come true.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bellwether.errors import DataError
from bellwether.functions import load_function
from bellwether.randomness import Randomness
from bellwether.recipe import Availability, Engine, Federation

Sampler = Callable[[Sequence[str], int, Randomness], Sequence[str]]


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


def uniform_sampler(federation: Federation) -> Sampler:
    """Return a sampler that draws clients without replacement, all alike."""

    def sample(clients: Sequence[str], round: int, randomness: Randomness) -> Sequence[str]:
        drawn = randomness.numpy("cohort", round=round).permutation(len(clients))
        return [clients[index] for index in drawn[: cohort_size(federation, len(clients))]]

    return sample


def available_sampler(federation: Federation, trace: Trace) -> Sampler:
    """Return a sampler that draws among the clients that are there in the round, all alike.

    The cohort is smaller than asked for where fewer are there, and empty where none is.
    """

    def sample(clients: Sequence[str], round: int, randomness: Randomness) -> Sequence[str]:
        there = [client for client in clients if trace(client, round).available]
        drawn = randomness.numpy("cohort", round=round).permutation(len(there))
        return [there[index] for index in drawn[: cohort_size(federation, len(clients))]]

    return sample


def make_sampler(federation: Federation, trace: Trace | None) -> Sampler:
    """Return the sampler that the recipe names."""
    if federation.sampler == "uniform":
        return uniform_sampler(federation)
    if federation.sampler == "available":
        assert trace is not None  # the recipe refuses this sampler without availability
        return available_sampler(federation, trace)
    return load_function(federation.sampler)


def make_trace(availability: Availability, clients: Sequence[str], randomness: Randomness) -> Trace:
    """Return the resources of clients: drawn from the recipe's probabilities, or read from its file.

    A client's speed is drawn once, log-normal around ``rows_per_second``; whether it is away or drops
    out is drawn anew in each round. In a file, what a line says holds from its round on; a client
    without a line is there, at the median speed.

    Raises:
        DataError: the trace file is missing, broken, or names an unknown client.
    """
    lines = _read_trace(Path(availability.trace), clients) if availability.trace else None

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


def _read_trace(path: Path, clients: Sequence[str]) -> Mapping[str, list[dict[str, Any]]]:
    """Return the lines of a trace file by client, in the order of their rounds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the trace cannot be read ({error}); see federation.availability.trace.") from error
    by_client: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            entry = _trace_line(f"{path}:{number}", line, clients)
            by_client.setdefault(entry["client"], []).append(entry)
    return {client: sorted(entries, key=lambda entry: entry["round"]) for client, entries in by_client.items()}


def _trace_line(place: str, line: str, clients: Sequence[str]) -> dict[str, Any]:
    """Return one checked line of a trace file."""
    try:
        entry = json.loads(line)
        client, round = entry["client"], entry["round"]
        available, speed = entry["available"], entry["rows_per_second"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place}: a line of a trace has client, round, available and rows_per_second as a JSON object, "
            f"but this one does not ({error!r})."
        ) from error
    if client not in clients:
        raise DataError(f"{place}: there is no client {client!r}; there are {', '.join(clients[:5])}, ….")
    if (
        type(round) is not int
        or type(available) is not bool
        or not isinstance(speed, int | float)
        or not 0 < speed < 1e9
    ):
        raise DataError(f"{place}: round is a whole number, available true or false, rows_per_second above 0.")
    return {"client": client, "round": round, "available": available, "rows_per_second": float(speed)}
