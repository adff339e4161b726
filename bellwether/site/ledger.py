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
from bellwether.tools.json_text import KEPT, Count, from_json_lines, reading, typed

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
        self._answered = set[str]()
        self._asked: dict[tuple[str, str, int, str], dict[str, None]] = {}
        for entry in read(self._path, _entry):
            self._count(entry)

    def answered(self, number: str) -> bool:
        """Return whether a task was answered already, also before this process began."""
        return number in self._answered

    def place(self, header: Header, content: str) -> int:
        """Return how many other tasks of a federation, kind, round and client came before a task first did.

        The run within the federation does not count, since its name is the coordinator's to choose; nor does whether a
        task was done, since a failure tells something, too.

        Args:
            header: the task's, which was noted.
            content: see ``Entry``.
        """
        return list(self._asked[_asked(header)]).index(content)

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
        self._count(entry)

    def _count(self, entry: Entry) -> None:
        if entry.way == "reply":
            self._answered.add(entry.number)
        else:
            self._asked.setdefault(_asked(entry), {})[entry.content] = None


def federation_of(run: str) -> str:
    """Return the federation that a run's identifier begins with."""
    return run.partition("/")[0]


def entries(folder: Path) -> Iterator[Entry]:
    """Yield all that a site's ledger holds, the oldest first, but for a last line that is still being written.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / LEDGER
    if path.exists():
        with reading(path, "restore it, or remove the line"):
            content = path.read_bytes()
            found = from_json_lines(content[: content.rfind(b"\n") + 1], _entry)
        yield from found


def _asked(message: Header | Entry) -> tuple[str, str, int, str]:
    return federation_of(message.run), message.kind, message.round, message.client


def _entry(value: object) -> Entry:
    entry: Entry = typed(value, Entry)
    return entry
