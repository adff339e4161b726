"""Raw records of files, the bounds of what one may ask of memory, and sentences about bad ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bellwether.errors import DataError
from bellwether.tools.words import counted, listed

LONGEST_ROW = 10_000_000  # characters, as the row stands in its file
MOST_COLUMNS = 1_000
INDEX = "Unnamed: 0"  # pandas' name for a column without one


@dataclass(frozen=True)
class Record:
    """One raw record of a file.

    Args:
        line: its line, counted from 1; for Parquet its row, for a hub data set its index plus one.
        values: column name to value; absent columns are absent.
    """

    line: int
    values: dict[str, Any]


# What one may do about bad rows beside mending them, whatever the command.
SKIP = "Set data.skip_bad_rows=true to leave bad rows out (init: --skip-bad-rows)."


class Problems:
    """Sentences about bad rows, in the order of files and lines; shows the first three and the count."""

    SHOWN = 3

    def __init__(self) -> None:
        self._found: list[tuple[str, int, str]] = []

    def __len__(self) -> int:
        return len(self._found)

    @property
    def sentences(self) -> list[str]:
        """All of them, in their order, each with its place."""
        files = {name: place for place, name in enumerate(dict.fromkeys(name for name, _, _ in self._found))}
        ordered = sorted(self._found, key=lambda found: (files[found[0]], found[1]))
        return [f"{name}:{line}: {sentence}" if line else f"{name}: {sentence}" for name, line, sentence in ordered]

    def add(self, place: str, sentence: str) -> None:
        """Note what is wrong with the row at a place, such as ``dolly.jsonl:17``."""
        name, _, line = place.rpartition(":")
        self._found.append((name, int(line), sentence) if line.isdecimal() and name else (place, 0, sentence))

    def check(self, remedy: str = "") -> None:
        """Raise a DataError when there are any, which ends with a remedy for all of them, such as ``SKIP``."""
        sentences = self.sentences
        if not sentences:
            return
        more = len(sentences) - self.SHOWN
        tail = [f"... and {more} more; {counted(len(sentences), 'row')} are bad in all."] if more > 0 else []
        raise DataError(" ".join(filter(None, ("\n".join(sentences[: self.SHOWN] + tail), remedy))))

    def skipped(self, what: str = "Bad rows") -> list[str]:
        """Return the sentence on bad rows that are skipped, or none."""
        sentences = self.sentences
        if not sentences:
            return []
        several = f", and {len(sentences) - 1} more" if len(sentences) > 1 else ""
        first = sentences[0].removesuffix(".")
        return [f"{what} are skipped, as data.skip_bad_rows says: {len(sentences)} in all ({first}{several})."]


@dataclass(frozen=True)
class Written:
    """How files are written, where that cannot be seen from them.

    Args:
        encoding: of text files; None finds it out, see ``bellwether.data.opening``.
        delimiter: what stands between the fields of a CSV file; None takes what divides its header into most.
    """

    encoding: str | None = None
    delimiter: str | None = None


NOTHING_SAID = Written()


def too_long(length: int) -> str:
    """Return the sentence for a row of too many characters."""
    return f"this row has {length:,} characters, but at most {LONGEST_ROW:,} are read; shorten or remove it."


def too_wide(columns: int) -> str:
    """Return the sentence for too many columns."""
    return f"there are {columns:,} columns, but at most {MOST_COLUMNS:,} are read; leave out those that are not used."


def fits(cells: Sequence[str], header: Sequence[str], place: str, problems: Problems) -> bool:
    """Return whether a CSV row can be taken, noting why not."""
    if len(cells) != len(header):
        problems.add(
            place, f"this row has {len(cells)} fields, but the header names {len(header)}; quote fields with commas."
        )
        return False
    length = sum(map(len, cells))
    if length > LONGEST_ROW:
        problems.add(place, too_long(length))
    return length <= LONGEST_ROW


def checked_header(cells: list[str], place: str) -> list[str]:
    """Return the column names of a CSV file."""
    if len(cells) > MOST_COLUMNS:
        raise DataError(f"{place}: {too_wide(len(cells))}")
    if not cells[0].strip() and INDEX not in cells:  # as pandas writes its index
        cells = [INDEX, *cells[1:]]
    if len(set(cells)) < len(cells) or not all(cell.strip() for cell in cells):
        raise DataError(f"{place}: the header names a column twice or not at all: {listed(cells)}; rename them.")
    return cells


def kind(value: Any) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
