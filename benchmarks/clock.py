"""A clock that splits time into phases: what runs inside a phase and has a phase of its own counts there alone."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock


class Clock:
    """Exclusive seconds by phase; two readings of the time for each phase that is entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @property
    def phase(self) -> str | None:
        """The phase that time counts to at the moment."""
        return self._open[-1] if self._open else None

    def enter(self, phase: str) -> None:
        """Begin a phase inside the one that is open."""
        self._charge()
        self._open.append(phase)

    def leave(self) -> None:
        """End the phase that was entered last."""
        self._charge()
        self._open.pop()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what runs inside to a phase."""
        self.enter(phase)
        try:
            yield
        finally:
            self.leave()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls count to a phase."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        return wrapper

    def timed_steps(self, phase_of: Callable[..., str], function: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
        """Return a generator function whose own steps count to a phase, those of its consumer not."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
            phase, steps = phase_of(*args, **kwargs), function(*args, **kwargs)
            while True:
                with self.during(phase):
                    try:
                        item = next(steps)
                    except StopIteration:
                        return
                yield item

        return wrapper

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@contextlib.contextmanager
def patched(clock: Clock, functions: Mapping[tuple[Any, str], str]) -> Iterator[None]:
    """Count calls of functions, each given as its owner and name, to phases while inside.

    Class methods keep working, since a method that is looked up on its class is bound already.
    """
    with contextlib.ExitStack() as stack:
        for (owner, name), phase in functions.items():
            stack.enter_context(mock.patch.object(owner, name, clock.timed(phase, getattr(owner, name))))
        yield
