"""What the command writes: sentences to stdout, complaints to stderr, tables to a console."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any


def say(text: str) -> None:
    """Write a sentence to stdout, on one line, at once."""
    line = text.replace("\n", " ")
    sys.stdout.write(f"{printable(line)}\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Write sentences to stderr, one per line."""
    for line in text.split("\n"):
        sys.stderr.write(f"bellwether: {printable(line)}\n")


def printable(text: str) -> str:
    """Return text with control characters shown as escapes, so that data cannot steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def console() -> Any:
    """Return a console for stdout."""
    from rich.console import Console

    return Console()


def at_work(what: str) -> AbstractContextManager[object]:
    """Show on a terminal what is going on, for as long as it does; elsewhere nothing."""
    status: AbstractContextManager[object] = console().status(what)
    return status
