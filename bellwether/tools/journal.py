"""Files that grow by whole lines of JSON, each of them on the disk before the next thing happens.

A process that is killed while it writes leaves a torn last line, which is cut off when the file is read again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bellwether.errors import CheckpointError, first_line
from bellwether.tools.atomic import cannot_write, sync_folder
from bellwether.tools.json_text import from_json, json_lines

T = TypeVar("T")


def append(path: Path, value: Any) -> None:
    """Append a value as one line, and force it to the disk.

    Args:
        path: the file; it is made where it does not exist.
        value: made of dataclasses, mappings, sequences, texts and numbers.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        is_new = not path.exists()
        with path.open("ab", buffering=0) as file:
            rest = memoryview(json_lines([value]))
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def read(path: Path, make: Callable[[Any], T]) -> list[T]:
    """Return what a file holds, after cutting off a last line that is torn.

    Args:
        path: the file, which only this process writes to; one that does not exist holds nothing.
        make: turns the value of a line into what it stands for.

    Raises:
        CheckpointError: a whole line is not what was written, or the file cannot be read or cut.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    except OSError as error:
        raise cannot_write(path, error) from error
    return [_made(line, f"{path}:{number}", make) for number, line in enumerate(content[:whole].splitlines(), start=1)]


def _made(line: bytes, place: str, make: Callable[[Any], T]) -> T:
    """Return what a line stands for."""
    try:
        return make(from_json(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{place}: this line is not as it was written ({first_line(error)}); restore or remove it."
        ) from error
