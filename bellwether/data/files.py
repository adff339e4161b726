"""Records of one file, with the line each of them stands in: JSON, JSONL, CSV, Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellwether.errors import DataError


@dataclass(frozen=True)
class Record:
    """One raw record of a file.

    Args:
        line: its line, counted from 1; for Parquet its row, for a hub data set its index plus one.
        values: column name to value; absent columns are absent.
    """

    line: int
    values: dict[str, Any]


class Problems:
    """Sentences about bad rows; shows the first three and the count."""

    SHOWN = 3

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def add(self, place: str, sentence: str) -> None:
        """Note what is wrong with the row at a place."""
        self.sentences.append(f"{place}: {sentence}")

    def check(self) -> None:
        """Raise a DataError when there are any."""
        if not self.sentences:
            return
        more = len(self.sentences) - self.SHOWN
        tail = [f"... and {more} more; {len(self.sentences)} rows are bad in all."] if more > 0 else []
        raise DataError("\n".join(self.sentences[: self.SHOWN] + tail))


def read_records(path: Path, name: str, problems: Problems) -> list[Record]:
    """Read all records of a file; records that cannot be read go to ``problems``.

    Args:
        path: a file that ends in one of the keys of ``READERS``.
        name: how messages call it.
        problems: collects what is wrong with single records.

    Raises:
        DataError: the file as a whole cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}); check its name and rights.") from error
    if not content.strip():
        raise DataError(f"{path}: the file is empty; give a file with at least one row.")
    records = list(READERS[path.suffix.lower()](content, name, problems))
    if not records and not problems.sentences:
        raise DataError(f"{path}: the file holds no rows; give a file with at least one row.")
    return records


def _text(content: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset is one of the file, so the three bytes of a mark count too.
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, offset) + 1
        raise DataError(f"{name}:{line}: byte {offset} is not UTF-8; save the file as UTF-8.") from error


def _jsonl(content: bytes, name: str, problems: Problems) -> Iterator[Record]:
    # Only \n ends a line: U+2028 and its like may stand inside JSON strings.
    for number, line in enumerate(_text(content, name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"{name}:{number}", f"this line is not JSON ({_reason(error)}); mend or remove it.")
            continue
        if isinstance(value, dict):
            yield Record(number, value)
        else:
            problems.add(f"{name}:{number}", f"a line holds one object, but this is {kind(value)}; write {{...}}.")


def _reason(error: ValueError | RecursionError) -> str:
    """Return why JSON cannot be read; beside mistakes, Python limits nesting and the digits of a number."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def _json(content: bytes, name: str, problems: Problems) -> Iterator[Record]:
    """Read a list of objects one by one, so that the line of each is known."""
    text, decoder = _text(content, name), json.JSONDecoder()
    position = _skip(text, 0)
    if not text.startswith("[", position):
        raise DataError(f"{name}:1: a .json file holds a list of objects; write [{{...}}, ...] or name it .jsonl.")
    position, line, counted = _skip(text, position + 1), 1, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{error.lineno}: this is not JSON ({error.msg}); mend the file.") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{line}: this object cannot be read ({_reason(error)}); mend it.") from error
        if isinstance(value, dict):
            yield Record(line, value)
        else:
            problems.add(f"{name}:{line}", f"the list holds objects, but this is {kind(value)}; write {{...}}.")
        position = _next_element(text, _skip(text, position), name)


def _next_element(text: str, position: int, name: str) -> int:
    """Return where the next element, or the closing bracket, begins."""
    if text.startswith(",", position):
        following = _skip(text, position + 1)
        if not text.startswith("]", following):
            return following
    elif text.startswith("]", position):
        return position
    line = text.count("\n", 0, position) + 1
    raise DataError(f"{name}:{line}: this is not JSON (a comma and an object, or ] is wanted here); mend the file.")


def _skip(text: str, position: int) -> int:
    """Return the first position that holds no white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(content: bytes, name: str, problems: Problems) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_text(content, name), newline=""), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _checked_header(cells, f"{name}:{line}")
            elif len(cells) == len(header):
                yield Record(line, dict(zip(header, cells, strict=True)))
            else:
                problems.add(
                    f"{name}:{line}",
                    f"this row has {len(cells)} fields, but the header names {len(header)}; quote fields with commas.",
                )
    except csv.Error as error:
        raise DataError(f"{name}:{start}: this is not CSV ({error}); mend the file.") from error


def _checked_header(cells: list[str], place: str) -> list[str]:
    """Return the column names of a CSV file."""
    if len(set(cells)) < len(cells) or not all(cell.strip() for cell in cells):
        raise DataError(f"{place}: the header names a column twice or not at all: {', '.join(cells)}; rename them.")
    return cells


def _parquet(content: bytes, name: str, problems: Problems) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: this is not a Parquet file that can be read ({reason}); write it anew.") from error
    for number, row in enumerate(rows, 1):
        yield Record(number, row)


def kind(value: Any) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
