"""What an audit says while it goes on: a line for each run, and on a terminal one that tells how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bellwether.exchange.records import Event, Note, RoundFinished, RunStarted, Watcher
from bellwether.tell.narrate import note_line, phase_words
from bellwether.tools.progress import Advanced

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def watching_audit(console: Console) -> Iterator[Watcher]:
    """Show an audit: a line for each run and note, and on a terminal a live one below.

    Args:
        console: where to.

    Yields:
        The watcher to hand to the audit.
    """
    from rich.text import Text

    rounds, at = 0, "begins"
    with console.status(Text("begins")) as status:

        def watcher(event: Event) -> None:
            nonlocal rounds, at
            match event:
                case Note():
                    shown = note_line(event).encode(console.encoding, "backslashreplace").decode(console.encoding)
                    console.print(Text(shown), soft_wrap=True, highlight=False)
                case RunStarted():
                    rounds, at = event.rounds, f"round 1 of {event.rounds}"
                case RoundFinished():
                    at = f"round {min(event.record.round + 1, rounds)} of {rounds}"
            phase = f": {phase_words(event)}" if isinstance(event, Advanced) else ""
            status.update(Text(f"{at}{phase}"))

        yield watcher
