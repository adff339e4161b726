"""How far a long piece of work is, told from deep inside to whoever listens around it; nobody has to.

What tells is far below what shows, and both would otherwise need an argument in every function between them:

    with listening(print):
        advance("tokenising", 200, 1000, "rows")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

# Phases that are told of in one place and timed in another.
TRAINING = "training"
LOSSES, ANSWERS = "computing losses", "writing answers"
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
    """

    phase: str
    done: int = 0
    total: int = 0
    unit: str = ""
    clients: int = 1


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


def advance(phase: str, done: int = 0, total: int = 0, unit: str = "", clients: int = 1) -> None:
    """Tell the listener, where there is one, how far a phase has come; arguments as in ``Advanced``."""
    listener = _listener.get()
    if listener is not None:
        listener(Advanced(phase, done, total, unit, clients))
