"""What a command leaves behind where a person interrupts it, and the command that goes on with it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence

_MARK = "how bellwether goes on"


def command_line(words: Sequence[object]) -> str:
    """Return a command as it is typed in a shell."""
    return shlex.join(["bellwether", *map(str, words)])


@contextlib.contextmanager
def going_on(how: Callable[[], str | None]) -> Iterator[None]:
    """Let an interrupt within say how to go on.

    Args:
        how: is asked then; None where nothing is to be gone on with.
    """
    try:
        yield
    except BaseException as error:  # an interrupt, or what a library has made of one
        text = how()
        if text is not None:
            error.__dict__[_MARK] = text
        raise


def told(error: BaseException | None) -> str | None:
    """Return what was said of going on where an error, or one that it came of, arose."""
    while error is not None:
        if _MARK in error.__dict__:
            return str(error.__dict__[_MARK])
        error = error.__cause__ or error.__context__
    return None
