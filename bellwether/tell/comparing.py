"""How far a comparison has come, in words: what its events have told, and how long the rest of it will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bellwether.exchange.records import (
    ArmFinished,
    ArmRun,
    ArmStarted,
    ArmTold,
    ComparisonStarted,
    Event,
    Note,
    Watcher,
)
from bellwether.exchange.scores import Scores
from bellwether.tell.narrate import SPARSE, left_words, note_line, pairs, phase_line, phase_words
from bellwether.tell.status import Clock, RunStatus
from bellwether.tools.progress import Advanced
from bellwether.tools.words import clean


@dataclass
class ComparisonStatus:
    """What the events of a comparison have told so far.

    Args:
        clock: seconds that only grow.
    """

    clock: Clock = time.monotonic
    comparison: ComparisonStarted | None = None
    phase: Advanced | None = None
    started: float | None = None
    running: dict[ArmRun, RunStatus] = field(default_factory=dict)
    began: dict[ArmRun, float] = field(default_factory=dict)
    finished: dict[ArmRun, ArmFinished] = field(default_factory=dict)
    taken: dict[ArmRun, float] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Note what an event tells."""
        now = self.clock()
        self.started = now if self.started is None else self.started
        match event:
            case ComparisonStarted():
                self.comparison = event
            case Advanced():
                self.phase = event
            case ArmStarted():
                self._begin(event.run, now)
            case ArmTold():
                # From another process words may come late.
                if event.run not in self.finished:
                    self._begin(event.run, now).take(event.event)
            case ArmFinished():
                self.finished[event.run] = event
                if event.run in self.began:
                    self.taken[event.run] = now - self.began.pop(event.run)
                self.running.pop(event.run, None)

    @property
    def runs(self) -> Sequence[ArmRun]:
        """All arms under all seeds, and trials."""
        return tuple(self.comparison.expected) if self.comparison is not None else ()

    @property
    def arms(self) -> Sequence[str]:
        """The arms by name."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    @property
    def elapsed(self) -> float:
        """Seconds since this process began the comparison."""
        return 0.0 if self.started is None else self.clock() - self.started

    @property
    def remaining(self) -> float | None:
        """Estimated seconds until the last arm is done; None before it is known what there is to do."""
        if self.comparison is None:
            return None
        left = [self._left(run) for run in self.runs if run not in self.finished]
        # Side by side they end no sooner than the one that takes longest.
        return max(math.fsum(left) / self.comparison.processes, max(left, default=0.0))

    def scores(self, arm: str) -> Scores:
        """Return the means of an arm over the seeds that are finished, trials left out."""
        found = [one.scores for run, one in self.finished.items() if run.arm == arm and not run.trial]
        return Scores(sum(one.rows for one in found), *(_mean(found, name) for name in ("loss", "rouge_l", "exact")))

    def _begin(self, run: ArmRun, now: float) -> RunStatus:
        """Return the status of an arm that goes on, which may be its first word."""
        self.began.setdefault(run, now)
        return self.running.setdefault(run, RunStatus(clock=self.clock))

    def _left(self, run: ArmRun) -> float:
        """Return the estimated seconds of an arm that is not finished."""
        expected = self._expected(run)
        if run not in self.running:
            return expected
        known = any(other.arm == run.arm for other in self.taken)
        of_itself = None if known else self.running[run].remaining
        return max(0.0, expected - (self.clock() - self.began[run])) if of_itself is None else of_itself

    def _expected(self, run: ArmRun) -> float:
        """Return how long all of an arm takes: the plan's figure, times how long those before took over their own."""
        assert self.comparison is not None
        plan = self.comparison.expected
        known = [other for other in self.taken if other in plan]
        alike = [other for other in known if other.arm == run.arm] or known
        planned = math.fsum(plan[other] for other in alike)
        return plan[run] * (math.fsum(self.taken[other] for other in alike) / planned if planned else 1.0)


def comparison_lines(write: Callable[[str], None], clock: Clock = time.monotonic) -> Watcher:
    """Return a watcher that writes one line per finished arm and note, and now and then what arms are at.

    Args:
        write: takes one line without its end.
        clock: seconds that only grow.
    """
    status, last = ComparisonStatus(clock=clock), clock()

    def watcher(event: Event) -> None:
        nonlocal last
        known = status.comparison is not None
        status.take(event)
        if isinstance(event, ArmTold | ArmStarted | Advanced) and clock() - last < SPARSE:
            return
        for line in _lines(event, status, known):
            write(line)
            last = clock()

    return watcher


def _lines(event: Event, status: ComparisonStatus, known: bool) -> list[str]:
    """Return the plain lines for an event, after the status took it."""
    left = left_words(status.remaining)
    match event:
        case ComparisonStarted() if not known:
            trials = sum(bool(run.trial) for run in status.runs)
            before = f"{trials} trials and " if trials else ""
            what = f"{len(status.arms)} arms, {before}{len(status.runs) - trials} runs"
            return [f"comparison {clean(event.name)} in {clean(event.folder)}: {what}{left}"]
        case ArmFinished() if not event.before:
            count = f"{len(status.finished)}/{len(status.runs)}"
            return [f"{count} {run_words(event.run)}: {clean(event.failure) or score_words(event.scores)}{left}"]
        case ArmTold():
            return [f"  {at_words(run, one)}{left}" for run, one in list(status.running.items())[:1]]
        case Advanced():
            return [f"  {phase_words(event)}"]
        case Note():
            return [note_line(event)]
    return []


def run_words(run: ArmRun) -> str:
    """Return which arm, which seed, and what a trial tries."""
    return f"{clean(run.arm)}, seed {run.seed}" + (f", trial of {run.trial}" if run.trial else "")


def at_words(run: ArmRun, status: RunStatus) -> str:
    """Return which arm under which seed is at what."""
    if status.phase is None and status.run is not None:
        return f"{run_words(run)}: round {status.round if status.in_round else status.done} of {status.run.rounds}"
    return f"{run_words(run)}: {phase_line(status) or 'begins'}"


def score_words(scores: Scores) -> str:
    """Return mean scores, of which there may be none."""
    shown = [f"{name} {show(value)}" for name, show, value, _, _ in pairs(scores, scores) if value is not None]
    return ", ".join(shown) or "nothing scored"


def _mean(scores: Sequence[Scores], metric: str) -> float | None:
    """Return the mean of a score; None where none has it."""
    known = [value for one in scores if (value := getattr(one, metric)) is not None]
    return math.fsum(known) / len(known) if known else None
