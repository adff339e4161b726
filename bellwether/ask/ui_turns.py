"""One question after the other: a thread makes the answers, whoever asked hears of them while they are made.

    with Turns() as turns:
        turn = turns.begin(work)        # work(turn) runs in the thread, and calls turn.tell
        async for kind, data in turn.news(): ...

A talk must not be driven by two threads at once; here one thread drives it, and whoever comes meanwhile waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MOST_WAITING = 4  # questions, beside the one that is being answered
LAST = ("end", "problem")  # after one of these nothing more is told


class Turn:
    """A question on its way, between the thread that tells and the one that listens.

    What is told anew under a kind takes the place of what nobody has heard yet: whoever listens slowly hears less
    often, and holds up nobody.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._unheard: dict[str, Any] = {}
        self._news = asyncio.Event()
        self._left = threading.Event()
        self.job: Future[None] | None = None

    def tell(self, kind: str, data: Any) -> None:
        """Tell something, from the thread.

        Args:
            kind: what it is.
            data: what is to be said, fit for JSON.
        """
        with contextlib.suppress(RuntimeError):  # the server has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._put, kind, data)

    def _put(self, kind: str, data: Any) -> None:
        self._unheard[kind] = data
        self._news.set()

    @property
    def left(self) -> bool:
        """Whether nobody listens any more, so that the thread shall stop."""
        return self._left.is_set()

    def stop(self) -> None:
        """Let the thread stop; it may be called from any thread."""
        self._left.set()

    def leave(self) -> None:
        """Listen no more: answers that are being made are stopped, others never begin."""
        self.stop()
        self._news.set()
        if self.job is not None:
            self.job.cancel()

    async def news(self) -> AsyncIterator[tuple[str, Any]]:
        """Yield what is told, until the last of it or until somebody leaves."""
        while not self.left:
            await self._news.wait()
            self._news.clear()
            unheard, self._unheard = self._unheard, {}
            for kind, data in unheard.items():
                yield kind, data
                if kind in LAST:
                    return


class Turns:
    """The thread that makes answers, and those who wait for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "answers")
        self._turns: list[Turn] = []

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        for turn in self._turns:
            turn.stop()
        self._thread.shutdown(cancel_futures=True)

    @property
    def ahead(self) -> int:
        """How many questions are being answered or wait."""
        self._turns = [turn for turn in self._turns if turn.job and not turn.job.done()]
        return len(self._turns)

    def begin(self, work: Callable[[Turn], None]) -> Turn | None:
        """Return the turn of a question, which is answered when those ahead are; None where too many wait already.

        Args:
            work: makes the answers, in the thread, and ends by telling the last.
        """
        ahead = self.ahead
        if ahead > MOST_WAITING:
            return None
        turn = Turn()
        if ahead:
            turn.tell("waiting", ahead)
        turn.job = self._thread.submit(work, turn)
        self._turns.append(turn)
        return turn
