"""The lock by which one process alone writes to a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bellwether.errors import CheckpointError
from bellwether.tools.atomic import cannot_write

LOCK = ".lock"
OWNER = ".owner"


def acquire(path: Path, seconds: float = 0.0) -> Any:
    """Take the lock of a folder, which the system releases when this process ends in whatever way.

    Args:
        path: the folder.
        seconds: how long to wait where another process holds it.

    Raises:
        CheckpointError: another process holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock, is_new = FileLock(str(path / LOCK), timeout=seconds, thread_local=False), not (path / LOCK).exists()
    try:
        lock.acquire()
        (path / OWNER).write_text(str(os.getpid()))
    except Timeout:
        raise CheckpointError(
            f"{path} is in use by process {_owner(path)}: wait until it ends, or give another folder."
        ) from None
    except OSError as error:
        if is_new:
            with contextlib.suppress(OSError):
                (path / LOCK).unlink(missing_ok=True)
        release(path, lock)
        raise cannot_write(path / LOCK, error) from error
    return lock


def release(path: Path, lock: Any) -> None:
    """Give a run folder's lock back."""
    with contextlib.suppress(OSError):
        (path / OWNER).unlink(missing_ok=True)
    lock.release()


@contextlib.contextmanager
def held(path: Path, mark: str) -> Iterator[None]:
    """Hold a folder for oneself; it is made if it does not exist.

    Args:
        path: a folder that is new or empty, or has ``mark`` in it.
        mark: name of the file by which a command knows its own folders.

    Raises:
        CheckpointError: the folder holds something else, is in use, or cannot be written.
    """
    try:
        foreign = path.is_dir() and any(inside.name[0] != "." for inside in path.iterdir())
        if foreign and not (path / mark).exists():
            raise CheckpointError(f"{path} is not empty; give a new or empty folder with --out.")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    lock = acquire(path)
    try:
        yield
    finally:
        release(path, lock)


def _owner(path: Path) -> str:
    """Return the number of the process that holds a run folder, as far as is known."""
    try:
        return (path / OWNER).read_text() or "(unknown)"
    except OSError:
        return "(unknown)"
