"""Collecting the updates of a round: each is checked as it comes, counted, and taken or left out with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bellwether.errors import UpdateRejected
from bellwether.exchange.checks import Shapes, check_seconds, check_update, payload_bytes, update_bytes
from bellwether.exchange.messages import Payload, Reply, TrainTask, Update
from bellwether.exchange.records import ClientFailed, ClientFinished, ClientRecord, Note, Watcher
from bellwether.recipe.recipe import Federation


@dataclass
class Answers:
    """What a cohort sent.

    Args:
        accepted: updates that passed the check, with their records.
        left_out: why the others are left out, by client.
        bytes_up: bytes of all that came, also of what is refused.
        bytes_down: bytes of the tasks that came to their clients.
        duration: how long the slowest client took, in seconds by the engine's clock, at most the deadline.
    """

    accepted: list[tuple[Update, ClientRecord]]
    left_out: dict[str, str]
    bytes_up: int = 0
    bytes_down: int = 0
    duration: float = 0.0


def collect(
    replies: Iterable[Reply],
    tasks: Mapping[str, TrainTask],
    returns: Callable[[Payload], Shapes],
    limits: Federation,
    left_out: Mapping[str, str],
    watch: Watcher,
    round: int,
) -> Answers:
    """Take the updates of a round as they come, in time, once of each client that was asked.

    Args:
        replies: what the engine delivers.
        tasks: what each client of the cohort was asked.
        returns: the shapes of the arrays that the method expects back, by what a client was sent.
        limits: the recipe's section: deadline, rows and norm that are believed.
        left_out: who is left out already, and why.
        watch: is told of every client.
        round: the round, counted from 1.
    """
    deadline = limits.deadline
    answers, heard = Answers([], dict(left_out)), set[str]()
    for reply in replies:
        if reply.client not in tasks or reply.client in heard:
            again = "has answered already" if reply.client in heard else "was not asked in this round"
            watch(Note(f"Round {round}: a reply is not used, since {reply.client!r} {again}.", warning=True))
            continue
        heard.add(reply.client)
        payload = tasks[reply.client].payload
        answers.bytes_down += payload_bytes(payload) if reply.reached else 0
        answers.bytes_up += update_bytes(reply.update)
        try:
            check_seconds(reply, None)
            # The server waits for what comes in time; what comes later costs it no more than the deadline.
            answers.duration = max(answers.duration, min(reply.seconds, deadline or math.inf))
            check_seconds(reply, deadline if reply.failure is None else None)
            update = check_update(reply, payload, returns(payload), round, limits.max_rows, limits.max_norm)
        except UpdateRejected as reason:
            answers.left_out[reply.client] = str(reason)
            watch(ClientFailed(round, reply.client, str(reason)))
            continue
        record = _record(update, reply.seconds)
        answers.accepted.append((update, record))
        watch(ClientFinished(round, record))
    for client in [client for client in tasks if client not in heard]:
        answers.bytes_down += payload_bytes(tasks[client].payload)
        answers.duration = max(answers.duration, deadline or 0.0)
        answers.left_out[client] = "it did not answer"
        watch(ClientFailed(round, client, "it did not answer"))
    return answers


def _record(update: Update, seconds: float) -> ClientRecord:
    """Return the record of a client whose update is accepted."""
    figures = update.metrics
    return ClientRecord(
        update.client,
        update.rows,
        int(figures.get("rows", update.rows)),
        int(figures.get("tokens", 0)),
        float(figures.get("loss", math.nan)),
        seconds,
        int(figures["selected"]) if "selected" in figures else None,
    )
