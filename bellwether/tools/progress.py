"""How far a long piece of work is, told from deep inside to whoever listens around it; nobody has to.

What tells is far below what shows, and both would otherwise need an argument in every function between them:

    with listening(print):
        advance("tokenising", 200, 1000, "rows")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

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
        within: what this is a part of, and how far that is, such as ``3 of 10 adapters scored``; often nothing.
    """

    phase: str
    done: int = 0
    total: int = 0
    unit: str = ""
    clients: int = 1
    within: str = ""


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
def within(part: Callable[[], str]) -> Iterator[None]:
    """Let the listener around this hear what the work inside is a part of.

    Args:
        part: says it, and how far it is, whenever something is heard.
    """
    outer = _listener.get()
    with listening(None if outer is None else lambda told: outer(replace(told, within=part()))):
        yield


def advance(phase: str, done: int = 0, total: int = 0, unit: str = "", clients: int = 1) -> None:
    """Tell the listener, where there is one, how far a phase has come; arguments as in ``Advanced``."""
    listener = _listener.get()
    if listener is not None:
        listener(Advanced(phase, done, total, unit, clients))
