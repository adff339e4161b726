"""Waits between two looks for something that may come at any time."""

from __future__ import annotations

SLOWER = 1.2  # times as long as the last wait is the next


class Pauses:
    """Waits that are short after something came, and longer and longer while nothing does.

    Args:
        soonest: seconds of the first wait.
        latest: seconds of the longest.
    """

    def __init__(self, soonest: float, latest: float) -> None:
        self._soonest, self._latest = soonest, latest
        self._next = soonest

    def next(self) -> float:
        """Return for how many seconds to wait now."""
        seconds, self._next = self._next, min(self._latest, self._next * SLOWER)
        return seconds

    def begin(self) -> None:
        """Begin with the shortest again, since something has come."""
        self._next = self._soonest
