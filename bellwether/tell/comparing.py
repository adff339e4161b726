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
    RunStarted,
    Watcher,
)
from bellwether.exchange.scores import Scores
from bellwether.tell.narrate import SPARSE, left_words, note_line, pairs, phase_line, phase_words
from bellwether.tell.pace import Stage
from bellwether.tell.status import Clock, RunStatus
from bellwether.tools.progress import ANSWERS, TRAINING, Advanced
from bellwether.tools.words import clean, counted, duration


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
    stages: dict[ArmRun, Stage] = field(default_factory=dict)
    finished: dict[ArmRun, ArmFinished] = field(default_factory=dict)
    taken: dict[ArmRun, float] = field(default_factory=dict)
    before: dict[ArmRun, float] = field(default_factory=dict)  # share that an earlier process had done

    def take(self, event: Event) -> None:
        """Note what an event tells."""
        now = self.clock()
        self.started = now if self.started is None else self.started
        match event:
            case ComparisonStarted():
                self.comparison = event
            case Advanced():
                self.phase = event
            # From another process words may come late.
            case ArmStarted():
                if event.run not in self.finished:
                    self._begin(event.run, now)
            case ArmTold():
                if event.run not in self.finished:
                    status = self._begin(event.run, now)
                    status.take(event.event)
                    if isinstance(event.event, RunStarted):
                        self.before[event.run] = event.event.done / event.event.rounds
                    self.stages[event.run].reach(self._share(event.run, status), now)
            case ArmFinished():
                self.finished[event.run] = event
                if event.run in self.stages:
                    self.taken[event.run] = now - self.stages.pop(event.run).began
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
        names = ("loss", "rouge_l", "exact", "preferred")
        return Scores(sum(one.rows for one in found), *(_mean(found, name) for name in names))

    def _begin(self, run: ArmRun, now: float) -> RunStatus:
        """Return the status of an arm that goes on, which may be its first word."""
        self.stages.setdefault(run, Stage(run.arm, now, now))
        return self.running.setdefault(run, RunStatus(clock=self.clock))

    def _share(self, run: ArmRun, status: RunStatus) -> float:
        """Return how much of what this process does of an arm is done, in time as the plan has it, 0 to 1."""
        if status.run is not None:
            answered = len(status.finished) / len(status.cohort) if status.in_round and status.cohort else 0.0
            rounds = max(1, status.run.rounds - status.run.done)
            return (status.done - status.run.done + answered) / rounds
        planned = self.comparison.expected.get(run) if self.comparison is not None else None
        if planned is None or status.phase is None or not planned.seconds:
            return 0.0
        if status.phase.phase == TRAINING:
            return status.phase.share * planned.training / planned.seconds
        if status.phase.phase == ANSWERS:
            return (planned.training + status.phase.share * planned.evaluation) / planned.seconds
        return 0.0

    def _left(self, run: ArmRun) -> float:
        """Return the estimated seconds of an arm that is not finished."""
        assert self.comparison is not None
        expected = self._slowness(run.arm) * self._planned()[run]
        stage = self.stages.get(run)
        return expected if stage is None else stage.left(expected, self.clock()) or 0.0

    def _planned(self) -> dict[ArmRun, float]:
        """Return the seconds by the plan of what this process does of every arm."""
        assert self.comparison is not None
        return {run: one.seconds * (1.0 - self.before.get(run, 0.0)) for run, one in self.comparison.expected.items()}

    def _slowness(self, arm: str) -> float:
        """Return how many times longer than planned an arm takes: as it did before, or else as all others do.

        Of all of them little may be done yet, most of it loading; so the plan counts as one more of average length.
        """
        plan = self._planned()
        taken = {run: (seconds, plan[run]) for run, seconds in self.taken.items() if run in plan}
        alike = [pair for run, pair in taken.items() if run.arm == arm]
        if sum(planned for _, planned in alike):
            return math.fsum(seconds for seconds, _ in alike) / math.fsum(planned for _, planned in alike)
        going = [(one.marked - one.began, one.done * plan[run]) for run, one in self.stages.items() if run in plan]
        average = math.fsum(plan.values()) / len(plan) or 1.0
        known = [(average, average), *taken.values(), *going]
        return math.fsum(seconds for seconds, _ in known) / math.fsum(planned for _, planned in known)


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
            before = f"{counted(trials, 'trial')} and " if trials else ""
            what = f"{counted(len(status.arms), 'arm')}, {before}{counted(len(status.runs) - trials, 'run')}"
            planned = math.fsum(one.seconds for one in event.expected.values()) / event.processes
            said = f"{what}, by the plan about {duration(planned)}"
            return [f"comparison {clean(event.name)} in {clean(event.folder)}: {said}"]
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
    if status.phase is None and status.run is not None and not status.in_round:
        return f"{run_words(run)}: round {status.done} of {status.run.rounds}"
    return f"{run_words(run)}: {phase_line(status) or 'begins'}"


def score_words(scores: Scores) -> str:
    """Return mean scores, of which there may be none."""
    shown = [f"{name} {show(value)}" for name, show, value, _, _ in pairs(scores, scores) if value is not None]
    return ", ".join(shown) or "nothing scored"


def _mean(scores: Sequence[Scores], metric: str) -> float | None:
    """Return the mean of a score; None where none has it."""
    known = [value for one in scores if (value := getattr(one, metric)) is not None]
    return math.fsum(known) / len(known) if known else None
