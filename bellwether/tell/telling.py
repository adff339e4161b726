"""What one process tells another of the work that goes on in it: enough to watch it, and not more."""

from __future__ import annotations

import time
from dataclasses import replace

from bellwether.exchange.records import Event, Note, RoundFinished, SurveyFinished, Watcher
from bellwether.tell.status import Clock
from bellwether.tools.progress import Advanced

OFTEN = 0.2  # seconds between two words on how far the same phase is


def now_and_then(watch: Watcher, clock: Clock = time.monotonic) -> Watcher:
    """Return a watcher that hears everything but tells another one little enough to be sent to another process.

    Notes and surveys are kept back, rounds lose theirs, and a phase that goes on is told of a few times a second.

    Args:
        watch: is told.
        clock: seconds that only grow.
    """
    phase, last = ("", 0), 0.0

    def watcher(event: Event) -> None:
        nonlocal phase, last
        if isinstance(event, Note | SurveyFinished):
            return
        if isinstance(event, Advanced):
            if (event.phase, event.whole_done) == phase and event.done < event.total and clock() - last < OFTEN:
                return
            phase, last = (event.phase, event.whole_done), clock()
        watch(replace(event, record=replace(event.record, survey=None)) if isinstance(event, RoundFinished) else event)

    return watcher
