"""How far a long piece of work is, told from deep inside to whoever listens around it; nobody has to.

What tells is far below what shows, and both would otherwise need an argument in every function between them:

    with listening(print):
        advance("tokenising", 200, 1000, "rows")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass, replace

# Phases that are told of in one place and timed in another.
TRAINING = "training"
LOSSES, ANSWERS = "computing losses", "writing answers"
REFERENCE = "computing losses of the untuned base"
AT_CLIENTS = "scoring at clients"


@dataclass(frozen=True)
class Advanced:
    """A long piece of work has come so far.

    Args:
        phase: what is done, such as ``writing answers``.
        done: how much of it is done.
        total: how much there is; 0 where nobody can tell.
        unit: what is counted, such as ``rows``.
        clients: how many clients of a cohort do it at the same time.
        whole_done: how many parts of a larger whole are done, where this is one of them.
        whole_total: of how many.
        whole_unit: what they are, such as ``adapters scored``.
    """

    phase: str
    done: int = 0
    total: int = 0
    unit: str = ""
    clients: int = 1
    whole_done: int = 0
    whole_total: int = 1
    whole_unit: str = ""

    @property
    def share(self) -> float:
        """How much of the whole is done, 0 to 1."""
        part = self.clients * self.done / self.total if self.total else 0.0
        return min(1.0, (self.whole_done + part) / self.whole_total)


Listener = Callable[[Advanced], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Let a listener hear, in place of any around it, how far what is done inside has come.

    Args:
        listener: is called in the thread that does the work; None hears nothing.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def within(done: Sized, total: int, unit: str) -> Iterator[None]:
    """Let the listener around this hear what whole the work inside is a part of.

    Args:
        done: grows by one with every part that is done.
        total: how many parts there are.
        unit: what they are.
    """
    outer = _listener.get()

    def told(event: Advanced) -> None:
        assert outer is not None
        outer(replace(event, whole_done=len(done), whole_total=total, whole_unit=unit))

    with listening(told if outer is not None else None):
        yield


def advance(phase: str, done: int = 0, total: int = 0, unit: str = "", clients: int = 1) -> None:
    """Tell the listener, where there is one, how far a phase has come; arguments as in ``Advanced``."""
    listener = _listener.get()
    if listener is not None:
        listener(Advanced(phase, done, total, unit, clients))
