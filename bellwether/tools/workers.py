"""Work that is done by several processes side by side, none of which outlives the one that began them."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.synchronize import Lock
from typing import Any, TypeVar

from bellwether.errors import BellwetherError
from bellwether.tools.words import counted

# Of what loads and scores language models, what takes longest to import.
LANGUAGE_MODELS = (
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "rouge_score.rouge_scorer",
)

Work = TypeVar("Work")
Found = TypeVar("Found")
Post = Callable[[Any], None]

_heard_by: ContextVar[Post | None] = ContextVar("heard by", default=None)  # what the work that goes on posts


def work_off(
    do: Callable[[Work], Found],
    work: Sequence[Work],
    processes: int,
    tell: Callable[[Work, Found], None],
    modules: Sequence[str] = (),
    hear: Callable[[Any], None] | None = None,
) -> None:
    """Do pieces of work, side by side where that is wanted.

    Args:
        do: does one piece; a function of a module, where there are several processes.
        work: the pieces.
        processes: how many are done at once; with 1 everything is done in this process.
        tell: is called in this process with every piece that is done and what it gave, in the order in which they end.
        modules: what takes long to import and every process needs.
        hear: is called in this process, beside ``tell``, with what pieces post while they are done.

    Raises:
        BellwetherError: a process was killed, or what ``do`` raised; the other processes are ended then.
    """
    if processes == 1 or len(work) < 2:
        with _posting_to(hear):
            for piece in work:
                tell(piece, do(piece))
        return
    others, context = set(multiprocessing.active_children()), source_of_workers(modules)
    with (
        _mailbox(context, hear) as slot,
        concurrent.futures.ProcessPoolExecutor(
            min(processes, len(work)), context, begin_worker, (dict(os.environ), slot)
        ) as pool,
    ):
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
                    f"one of {counted(processes, 'process', 'processes')} was killed, perhaps for lack of "
                    "memory; what is finished is kept: "
                    "run the command again, with a smaller --jobs."
                ) from error
            raise


def post(message: Any) -> None:
    """Let the process that shared out the work hear something of the piece that is done here."""
    hear = _heard_by.get()
    if hear is not None:
        hear(message)


@contextlib.contextmanager
def _posting_to(hear: Post | None) -> Iterator[None]:
    """Let what is posted in this process be heard in it."""
    token = _heard_by.set(hear)
    try:
        yield
    finally:
        _heard_by.reset(token)


class _Slot:
    """Where every worker posts, one at a time."""

    def __init__(self, writer: Connection, lock: Lock) -> None:
        self._writer, self._lock = writer, lock

    def __call__(self, message: Any) -> None:
        with self._lock:
            self._writer.send(message)


@contextlib.contextmanager
def _mailbox(context: ForkServerContext | SpawnContext, hear: Post | None) -> Iterator[_Slot | None]:
    """Yield where workers post what this process hears; leave it once they have ended."""
    if hear is None:
        yield None
        return
    reader, writer = context.Pipe(duplex=False)
    failures: list[Exception] = []

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            # Until the last worker is gone.
            while True:
                message = reader.recv()
                try:
                    hear(message)
                except Exception as failure:  # workers would wait for ever if nobody read on
                    failures.append(failure)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield _Slot(writer, context.Lock())
    finally:
        writer.close()
        listener.join(10)  # seconds; it ends with the last worker
    if failures:
        raise failures[0]


def source_of_workers(modules: Sequence[str]) -> ForkServerContext | SpawnContext:
    """Return what workers come from, which begins to get ready with the first call, and must not be waited for.

    torch does not survive the fork of a process that has computed with it. So workers are forks of a process that has
    imported these modules and does nothing else; where forks are not sound, each is a fresh process.

    Args:
        modules: what takes long to import and every worker needs; only those of the first call are imported once for
            all.
    """
    fresh = multiprocessing.get_context("spawn")
    if sys.platform != "linux":
        return fresh
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    try:
        with _modules_from_where_ours_are(), interrupts_held():
            forkserver.ensure_running()
    except OSError:  # such as where the name of the folder of temporary files is too long for a socket
        return fresh
    atexit.unregister(_end_source)
    atexit.register(_end_source, os.getpid())
    return context


def _end_source(owner: int) -> None:
    """End what workers come from, which else, where it still imports, goes on to the end of that."""
    from multiprocessing import forkserver

    source = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if source is not None and os.getpid() == owner:
        with contextlib.suppress(OSError):
            os.kill(source, signal.SIGTERM)


@contextlib.contextmanager
def _modules_from_where_ours_are() -> Iterator[None]:
    """Let a process that begins meanwhile look for modules where this one does, and not in the current folder."""
    before = dict(os.environ)
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in map(str, sys.path))
    try:
        yield
    finally:
        _take_over(before)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold interrupts back while processes are started: these never hear them, this one hears them afterwards."""
    resource_tracker.ensure_running()  # which else begins with the first of them, and lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(environment: Mapping[str, str], post: Post | None = None) -> None:
    """Leave interrupts to the parent, take over its environment, and end when it ends, however it does.

    Args:
        environment: the parent's.
        post: takes what pieces post.
    """
    _heard_by.set(post)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _take_over(environment)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _take_over(environment: Mapping[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
