"""A site's ledger: one line for everything that it was asked and that it sent, each on the disk before it is sent.

ledger.jsonl    time (UTC), way, kind, run, round, client, number of the task, bytes, hash of the content, protection,
                failure
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bellwether.exchange.seal import Header, Parcel
from bellwether.tools.journal import append, read
from bellwether.tools.json_text import KEPT, Count, from_json, typed

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Entry:
    """One message.

    Args:
        time: when, in UTC.
        way: ``task`` for what came, ``reply`` for what was sent.
        kind: what was asked.
        run: the run's identifier.
        round: the round.
        client: the client that was asked.
        number: the task's own.
        bytes: how many bytes travelled.
        content: the SHA-256 of everything in the message.
        protection: what was done to it before it was sent, such as noise; ``none`` where nothing was.
        failure: why a task was not done, which is all that was sent then; empty where it was done.
    """

    __pydantic_config__ = KEPT

    time: str
    way: str
    kind: str
    run: str
    round: Count
    client: str
    number: str
    bytes: Count
    content: str
    protection: str = "none"
    failure: str = ""


class Ledger:
    """A site's ledger on its own disk.

    Args:
        folder: the site's own.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER
        self._answered = {entry.number for entry in read(self._path, _entry) if entry.way == "reply"}

    def answered(self, number: str) -> bool:
        """Return whether a task was answered already, also before this process began."""
        return number in self._answered

    def note(self, header: Header, parcel: Parcel, protection: str = "none", failure: str = "") -> None:
        """Write a message down.

        Args:
            header: what it is for.
            parcel: the message.
            protection: what was done to it.
            failure: why the task was not done; empty where it was.

        Raises:
            CheckpointError: it cannot be written.
        """
        content = str(json.loads(parcel.header).get("content", ""))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        entry = Entry(
            now,
            header.way,
            header.kind,
            header.run,
            header.round,
            header.client,
            header.number,
            parcel.size,
            content,
            protection,
            failure,
        )
        append(self._path, entry)
        if header.way == "reply":
            self._answered.add(header.number)


def entries(folder: Path) -> Iterator[Entry]:
    """Yield all that a site's ledger holds, the oldest first.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / LEDGER
    yield from (_entry(from_json(line)) for line in path.read_bytes().splitlines()) if path.exists() else ()


def _entry(value: object) -> Entry:
    entry: Entry = typed(value, Entry)
    return entry
