"""Collecting the updates of a round: each is checked as it comes, counted, and taken or left out with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.checks import Shapes, check_seconds, check_update
from bellwether.exchange.messages import Payload, Reply, TrainTask, Update
from bellwether.exchange.records import ClientFailed, ClientFinished, ClientRecord, Note, RoundRecord, Watcher
from bellwether.exchange.ring import size_of
from bellwether.exchange.secure_checks import check_masked
from bellwether.exchange.sizes import payload_bytes, task_bytes, update_bytes
from bellwether.recipe.recipe import Federation


class Collection:
    """The updates of a round: each is taken once, of a client that was asked, in time, and as it should be.

    Args:
        tasks: what each client of the cohort was asked, with what it receives.
        payloads: what each was sent, as the server has it exactly.
        returns: the shapes of the arrays that the method expects back of each client beside its tensors, by name.
        bounds: the largest norm of the change of each client's tensors that the method takes.
        limits: the recipe's section: deadline, rows and norm that are believed.
        left_out: who is left out already, and why.
        watch: is told of every client.
        round: the round, counted from 1.

    Attributes:
        accepted: updates that passed the check, with their records.
        left_out: why the others are left out, by client.
        bytes_up: bytes of all that came, also of what is refused.
        bytes_down: bytes of the tasks that came to their clients.
        duration: how long the slowest client took, in seconds by the engine's clock, at most the deadline.
    """

    def __init__(
        self,
        tasks: Mapping[str, TrainTask],
        payloads: Mapping[str, Payload],
        returns: Mapping[str, Shapes],
        bounds: Mapping[str, float],
        limits: Federation,
        left_out: Mapping[str, str],
        watch: Watcher,
        round: int,
    ) -> None:
        self._tasks, self._payloads, self._returns, self._bounds = tasks, payloads, returns, bounds
        self._limits, self._watch, self._round = limits, watch, round
        self._heard: set[str] = set()
        self.accepted: list[tuple[Update, ClientRecord]] = []
        self.left_out = dict(left_out)
        self.bytes_up = self.bytes_down = 0
        self.duration = 0.0

    def take(self, reply: Reply) -> None:
        """Take a reply's update, or leave its client out with the reason."""
        client = reply.client
        if client not in self._tasks or client in self._heard:
            again = "has answered already" if client in self._heard else "was not asked in this round"
            text = f"Round {self._round}: a reply is not used, since {client!r} {again}."
            self._watch(Note(text, warning=True))
            return
        self._heard.add(client)
        self.bytes_down += task_bytes(self._tasks[client], reply)
        self.bytes_up += update_bytes(reply.update) if reply.bytes_up is None else reply.bytes_up
        try:
            update = self._checked(reply)
        except UpdateRejected as reason:
            self._leave_out(client, str(reason))
            return
        record = _record(update, reply.seconds)
        self.accepted.append((update, record))
        self._watch(ClientFinished(self._round, record))

    def close(self) -> None:
        """Leave out who did not answer; the server has waited for them until the deadline."""
        for client in [client for client in self._tasks if client not in self._heard]:
            self.bytes_down += payload_bytes(self._tasks[client].payload)
            self.duration = max(self.duration, self._limits.deadline or 0.0)
            self._leave_out(client, "it did not answer")

    def record(
        self,
        cohort: tuple[str, ...],
        learning_rate: float,
        adapter: Adapter,
        seconds: Mapping[str, float],
        failure: str | None,
    ) -> RoundRecord:
        """Return the record of the round.

        Args:
            cohort: the clients that were drawn, whether they trained or not.
            learning_rate: that the round began with.
            adapter: after it.
            seconds: by phase.
            failure: why nothing was used; None where the round went well.
        """
        clients = tuple(record for _, record in self.accepted)
        tokens = sum(record.tokens for record in clients)
        # Of pairs it is a mean over pairs, else over tokens.
        by_rows = any(record.preferred is not None for record in clients)
        loss = _weighted([(record.loss, record.rows_seen if by_rows else record.tokens) for record in clients])
        return RoundRecord(
            round=self._round,
            cohort=cohort,
            clients=clients,
            left_out=dict(self.left_out),
            learning_rate=learning_rate,
            loss=math.nan if loss is None else loss,
            rows=sum(record.rows for record in clients),
            rows_seen=sum(record.rows_seen for record in clients),
            tokens=tokens,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            seconds=dict(seconds),
            duration=self.duration,
            adapter=adapter.fingerprint(),
            failure=failure,
            preferred=_weighted([(record.preferred, record.rows_seen) for record in clients]),
            margin=_weighted([(record.margin, record.rows_seen) for record in clients]),
        )

    def _checked(self, reply: Reply) -> Update:
        """Return a reply's update, once its time and everything in it is believed."""
        deadline, payload = self._limits.deadline, self._payloads[reply.client]
        check_seconds(reply, None)
        # The server waits for what comes in time; what comes later costs it no more than the deadline.
        self.duration = max(self.duration, min(reply.seconds, deadline or math.inf))
        check_seconds(reply, deadline if reply.failure is None else None)
        limits = self._limits
        task, due = self._tasks[reply.client], self._returns[reply.client]
        if task.masking is not None:
            return check_masked(reply, size_of(payload.expected, due), self._round, limits.max_rows)
        most, bound = (limits.max_rows, limits.max_norm), self._bounds[reply.client]
        return check_update(reply, payload, due, self._round, *most, task.compression, task.payload, bound)

    def _leave_out(self, client: str, reason: str) -> None:
        self.left_out[client] = reason
        self._watch(ClientFailed(self._round, client, reason))


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
        *(float(figures[name]) if name in figures else None for name in ("preferred", "margin")),
    )


def _weighted(figures: Sequence[tuple[float | None, int]]) -> float | None:
    """Return the mean of a figure that clients tell, each weighted by a number; None where nobody tells it."""
    known = [(figure, count) for figure, count in figures if figure is not None and count]
    total = sum(count for _, count in known)
    return sum(figure * count for figure, count in known) / total if total else None
