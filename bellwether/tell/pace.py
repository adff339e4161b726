"""How long what is left of a run will take: from what the run measured itself, and from the plan until then."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bellwether.exchange.records import (
    ClientFailed,
    ClientFinished,
    Evaluated,
    Event,
    RoundFinished,
    RoundStarted,
    RunStarted,
)
from bellwether.tools.progress import ANSWERS, AT_CLIENTS, LOSSES, TRAINING, Advanced

RECENT = 10  # rounds that the pace is the mean of
_OWN, _CLIENTS = "own rows", "clients"


@dataclass
class Stage:
    """What a run is at: a round's training, or the scoring of one of its parts.

    Args:
        name: ``training``, or the part that is scored.
        began: when it began, in seconds of the clock.
        marked: when it was last known how far it is.
        done: how far it was then, 0 to 1.
    """

    name: str
    began: float
    marked: float
    done: float = 0.0

    def reach(self, done: float, now: float) -> None:
        """Note how far it is; it never goes back."""
        if done > self.done:
            self.done, self.marked = min(1.0, done), now

    def left(self, expected: float | None, now: float) -> float | None:
        """Return the seconds that are left; None where nothing is known.

        What was measured counts the more, the further the stage is.

        Args:
            expected: how long all of it was expected to take.
            now: seconds of the clock.
        """
        taken = self.marked - self.began
        if expected is None:
            if not self.done or not taken:
                return None
            expected = taken / self.done
        rest = 1.0 - self.done
        return max(0.0, rest * (taken + rest * expected) - (now - self.marked))


@dataclass
class Pace:
    """Takes a run's events and says how long the rest of it will take, evaluations to come among it."""

    run: RunStarted | None = None
    done: int = 0
    trained: bool = False
    stage: Stage | None = None
    since: float = 0.0
    cohort: int = 1
    answered: int = 0
    rounds: list[float] = field(default_factory=list)
    evaluations: dict[str, float] = field(default_factory=dict)

    def take(self, event: Event, now: float) -> None:
        """Note what an event says of time."""
        match event:
            case RunStarted():
                self.run, self.done, self.since = event, event.done, now
            case RoundStarted():
                self.stage, self.trained = Stage(TRAINING, now, now), False
                self.cohort, self.answered = max(1, len(event.cohort)), 0
            case ClientFinished() | ClientFailed():
                self.answered += 1
                self._reach(TRAINING, self.answered / self.cohort, now)
            case Advanced():
                self._advanced(event, now)
            case RoundFinished():
                self._end_training(now)
                self.done, self.trained, self.stage, self.since = event.record.round, False, None, now
            case Evaluated():
                self.evaluations[_CLIENTS if event.record.part == "clients" else _OWN] = event.record.seconds
                if self.stage is not None and self.stage.name != TRAINING:
                    self.stage, self.since = None, now

    def left(self, now: float) -> float | None:
        """Return the seconds until the run is over; None where nothing is known yet."""
        if self.run is None:
            return None
        stage, expected = self.stage, self.run.expected
        round = math.fsum(self.rounds[-RECENT:]) / len(self.rounds[-RECENT:]) if self.rounds else None
        round = round if round is not None or expected is None else expected.training
        evaluations = dict(self.evaluations)
        if expected is not None:
            evaluations.setdefault(_OWN, expected.evaluation)
        now_left = 0.0
        if stage is not None:
            known = round if stage.name == TRAINING else evaluations.get(stage.name)
            found = stage.left(known, now)
            if stage.name == TRAINING and round is None and found is not None:
                round = (stage.marked - stage.began) / stage.done
            now_left = found or 0.0
            if stage.name == _OWN:
                now_left += evaluations.get(_CLIENTS, 0.0)
        waiting = self.run.rounds - self.done - (self.trained or (stage is not None and stage.name == TRAINING))
        if round is None and waiting:
            return None
        due = sum(number > self.done for number in self.run.scored)
        due -= self.trained and stage is not None
        later = waiting * (round or 0.0) + due * math.fsum(evaluations.values())
        # Between two stages the next one has begun, but for its first word.
        return now_left + later if stage is not None else max(0.0, later - (now - self.since))

    def _advanced(self, event: Advanced, now: float) -> None:
        """Note how far a phase is, which may be the first word of a stage."""
        part = event.done / event.total if event.total else 0.0
        if event.phase == TRAINING:
            self._reach(TRAINING, (self.answered + event.clients * part) / self.cohort, now)
        elif event.phase == AT_CLIENTS:
            self._begin(_CLIENTS, now)
            self._reach(_CLIENTS, part, now)
        elif event.phase in (LOSSES, ANSWERS):
            if self.stage is None or self.stage.name == TRAINING:
                self._begin(_OWN, now)
            if event.phase == ANSWERS:  # losses take little of it
                self._reach(_OWN, part, now)

    def _begin(self, name: str, now: float) -> None:
        """Begin the scoring of a part, and with it end what was before."""
        if self.stage is None or self.stage.name != name:
            self._end_training(now)
            self.stage = Stage(name, now, now)

    def _reach(self, name: str, done: float, now: float) -> None:
        """Note how far the stage is, where it is this one."""
        if self.stage is not None and self.stage.name == name:
            self.stage.reach(done, now)

    def _end_training(self, now: float) -> None:
        """Count the training of a round, where it is what was done so far."""
        if self.stage is not None and self.stage.name == TRAINING:
            self.rounds.append(now - self.stage.began)
            self.trained = True
