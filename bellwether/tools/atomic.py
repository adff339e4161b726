"""Files and folders that appear whole or not at all.

Everything is written beside its target under a temporary name, forced to the disk, and renamed. A
process that is killed at any moment, or a disk that runs full, leaves the target as it was; what is
left under a temporary name is swept away by ``remove_leftovers``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from bellwether.errors import CheckpointError

TEMPORARY = ".tmp-"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds its old content or all of the new one, even after a crash.

    Args:
        path: the file; its folder must exist.
        data: the whole content.

    Raises:
        CheckpointError: it cannot be written; the old file is as it was.
    """
    with _making(path) as temporary:
        _write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_folder_atomic(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files so that it appears with all of them or not at all.

    An older folder of that name is moved aside before and deleted after; no file is mixed.

    Args:
        path: the folder; its parent must exist.
        files: content by file name.

    Raises:
        CheckpointError: it cannot be written.
    """
    aside = path.with_name(f"{TEMPORARY}old-{path.name}")
    with _making(path) as temporary:
        os.mkdir(temporary)
        for name, data in files.items():
            _write_synced(temporary / name, data)
        sync_folder(temporary)
        if path.exists():
            remove(aside)
            os.rename(path, aside)
        os.rename(temporary, path)
        sync_folder(path.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there and can be removed.

    A folder is renamed first, so that no half-deleted one can be taken for a whole one.
    """
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            doomed = path if path.name.startswith(TEMPORARY) else path.with_name(f"{TEMPORARY}old-{path.name}")
            if doomed != path:
                os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left under temporary names in a folder."""
    for path in list(folder.glob(f"{TEMPORARY}*")):
        remove(path)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, where the system can do that."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """Return a folder, which is made where it is missing.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """Return the error to raise for an operating system's refusal to write."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return CheckpointError(
            f"{path} cannot be written, because the disk is full: free some space, "
            "then run the command again (a run goes on from its last committed round with --resume)."
        )
    reason = error.strerror or type(error).__name__
    return CheckpointError(f"{path} cannot be written ({reason}): give a folder in which this user may write.")


@contextlib.contextmanager
def _making(path: Path) -> Iterator[Path]:
    """Yield the temporary name for a target; clean up behind and translate the system's errors."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    remove(temporary)
    try:
        yield temporary
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def _write_synced(path: Path, data: bytes) -> None:
    """Write a new file and force it to the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def slug(name: str) -> str:
    """Return a person's name for something as the name of a file or folder; different names may give the same."""
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "unnamed"
