"""How far a run has come: what its events have told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from bellwether.exchange.records import (
    ClientFailed,
    ClientFinished,
    ClientRecord,
    Evaluated,
    EvaluationRecord,
    Event,
    Note,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    SurveyFinished,
)
from bellwether.tell.pace import Pace
from bellwether.tools.progress import Advanced

Clock = Callable[[], float]


@dataclass
class RunStatus:
    """What the events of a run have told so far.

    Args:
        clock: seconds that only grow.
    """

    clock: Clock = time.monotonic
    run: RunStarted | None = None
    round: int = 0
    cohort: tuple[str, ...] = ()
    finished: dict[str, ClientRecord] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    losses: list[float] = field(default_factory=list)
    base: dict[str, EvaluationRecord] = field(default_factory=dict)
    now: dict[str, EvaluationRecord] = field(default_factory=dict)
    in_round: bool = False
    done: int = 0
    phase: Advanced | None = None
    pace: Pace = field(default_factory=Pace)
    rows: int = 0
    tokens: int = 0
    training: float = 0.0
    started: float | None = None
    mark: float = 0.0
    over: bool = False

    def take(self, event: Event) -> None:
        """Note what an event tells."""
        now = self.clock()
        self.started = now if self.started is None else self.started
        self.pace.take(event, now)
        if not isinstance(event, Note):
            self.phase = event if isinstance(event, Advanced) else None
        match event:
            case RunStarted():
                self.run, self.done = event, event.done
            case RoundStarted():
                self.round, self.cohort, self.in_round, self.mark = event.round, event.cohort, True, now
                self.finished, self.failed, self.idle = {}, {}, frozenset()
            case SurveyFinished():
                self.idle = frozenset(client for client, kept in event.record.kept.items() if not kept)
                self.mark = now
            case ClientFinished():
                self.finished[event.record.client] = event.record
                self.rows, self.tokens = self.rows + event.record.rows_seen, self.tokens + event.record.tokens
                self._count_training(now)
            case ClientFailed():
                self.failed[event.client] = event.reason
                self._count_training(now)
            case RoundFinished():
                self.done, self.in_round = event.record.round, False
                self.failed |= event.record.left_out
                if event.record.failure is None and event.record.clients:
                    self.losses.append(event.record.loss)
            case Evaluated():
                self._evaluated(event.record)
            case RunFinished():
                self.over = True

    @property
    def elapsed(self) -> float:
        """Seconds since this process began the run."""
        return 0.0 if self.started is None else self.clock() - self.started

    @property
    def rows_per_second(self) -> float | None:
        """Rows trained per second of training, in this process; None before the first."""
        return self.rows / self.training if self.training > 0 and self.rows else None

    @property
    def remaining(self) -> float | None:
        """Estimated seconds until the run is over, evaluations to come included; None before anything is known."""
        return 0.0 if self.over else self.pace.left(self.clock())

    def _count_training(self, now: float) -> None:
        """Count the time since the round began or the client before answered."""
        self.training += now - self.mark
        self.mark = now

    def _evaluated(self, record: EvaluationRecord) -> None:
        """Keep the first and the newest scores of each part."""
        self.base.setdefault(record.part, record)
        self.now[record.part] = record
