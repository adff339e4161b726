"""Work that is done by several processes side by side, none of which outlives the one that began them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import TypeVar

from bellwether.errors import BellwetherError

Work = TypeVar("Work")
Found = TypeVar("Found")


def work_off(
    do: Callable[[Work], Found], work: Sequence[Work], processes: int, tell: Callable[[Work, Found], None]
) -> None:
    """Do pieces of work, side by side where that is wanted.

    Args:
        do: does one piece; a function of a module, where there are several processes.
        work: the pieces.
        processes: how many are done at once; with 1 everything is done in this process.
        tell: is called in this process with every piece that is done and what it gave, in the order in which they end.

    Raises:
        BellwetherError: a process was killed, or what ``do`` raised; the other processes are ended then.
    """
    if processes == 1 or len(work) < 2:
        for piece in work:
            tell(piece, do(piece))
        return
    others = set(multiprocessing.active_children())
    # A fresh interpreter per worker: torch does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(work)), mp_context=context, initializer=begin_worker
    ) as pool:
        try:
            with interrupts_held():
                futures = {pool.submit(do, piece): piece for piece in work}
            for future in concurrent.futures.as_completed(futures):
                tell(futures[future], future.result())
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, concurrent.futures.BrokenExecutor):
                raise BellwetherError(
                    f"one of {processes} processes was killed, perhaps for lack of memory; what is finished is kept: "
                    "run the command again, with a smaller --jobs."
                ) from error
            raise


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold interrupts back while processes are started: these never hear them, this one hears them afterwards."""
    resource_tracker.ensure_running()  # which else begins with the first of them, and lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """Leave interrupts to the parent, and end when it ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
