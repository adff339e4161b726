"""Records of one file, with the line each of them stands in: JSON, JSONL, CSV, Parquet, XLSX.

A file comes from somewhere else, so what it may ask of memory is bounded: a row by ``LONGEST_ROW`` and
``MOST_COLUMNS``, a Parquet file by what it says when it is unpacked. JSONL, CSV and Parquet are read piece by piece.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bellwether.data.opening import BLOCK, kind_of, not_decoded, open_bytes, open_text
from bellwether.data.records import (
    LONGEST_ROW,
    MOST_COLUMNS,
    NOTHING_SAID,
    Problems,
    Record,
    Written,
    checked_header,
    fits,
    kind,
    too_long,
    too_wide,
)
from bellwether.data.tables import parquet, workbook
from bellwether.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
# The line that Excel reads, and people write for it, before the header.
_SEPARATOR = re.compile(r'"?sep=([^"\w\r\n])"?[\r\n]*', re.IGNORECASE)


def read_records(path: Path, name: str, problems: Problems, written: Written = NOTHING_SAID) -> list[Record]:
    """Read all records of a file; records that cannot be read go to ``problems``.

    Args:
        path: a file whose kind is one of the keys of ``READERS``, packed or not.
        name: how messages call it.
        problems: collects what is wrong with single records.
        written: what the recipe says of files.

    Raises:
        DataError: the file as a whole cannot be read, or is empty.
    """
    before = len(problems)
    try:
        if _is_blank(path):
            raise DataError(f"{path}: the file is empty; give a file with at least one row.")
        records = list(READERS[kind_of(path)](path, name, problems, written))
    except UnicodeDecodeError as error:
        raise not_decoded(path, name, written.encoding) from error
    except UnicodeError as error:  # such as UTF-16 without its mark
        raise DataError(
            f"{name}: the file is not {written.encoding} ({error}); name another in data.encoding."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}); check its name and rights.") from error
    if not records and len(problems) == before:
        raise DataError(f"{path}: the file holds no rows; give a file with at least one row.")
    return records


def can_be_read(path: Path) -> bool:
    """Return whether there is a reader for files of this name."""
    return kind_of(path) in READERS


def _is_blank(path: Path) -> bool:
    """Return whether a file holds nothing but white space."""
    with open_bytes(path) as file:
        return not any(block.strip() for block in iter(lambda: file.read(BLOCK), b""))


def _lines(file: TextIO) -> Iterator[tuple[str, int]]:
    """Yield lines with their lengths; of one that is too long, only the beginning is there."""
    while line := file.readline(LONGEST_ROW + 1):
        length, last = len(line), line
        while length > LONGEST_ROW and not last.endswith("\n") and (last := file.readline(BLOCK)):
            length += len(last)
        yield line, length


def _jsonl(path: Path, name: str, problems: Problems, written: Written) -> Iterator[Record]:
    with open_text(path, "", written.encoding) as file:
        start = next((block for block in iter(lambda: file.read(BLOCK), "") if block.strip()), "").lstrip()
    if start.startswith("[") and _is_list(start):  # of objects, whatever it is called
        yield from _json(path, name, problems, written)
        return
    # Only \n ends a line: U+2028 and its like may stand inside JSON strings.
    with open_text(path, "\n", written.encoding) as file:
        for number, (line, length) in enumerate(_lines(file), 1):
            if length > LONGEST_ROW:
                problems.add(f"{name}:{number}", too_long(length))
            elif line.strip():
                yield from _line_record(line.removesuffix("\n"), number, name, problems)


def _is_list(start: str) -> bool:
    """Return whether the beginning of a file is that of a JSON list of objects, and not a line that holds a list."""
    return start[1:].lstrip().startswith("{")


def _line_record(line: str, number: int, name: str, problems: Problems) -> Iterator[Record]:
    """Yield the record of a line, or note why there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        problems.add(f"{name}:{number}", f"this line is not JSON ({_reason(error)}); mend or remove it.")
    else:
        yield from _object(value, number, name, problems, "a line holds one object")


def _object(value: Any, line: int, name: str, problems: Problems, wanted: str) -> Iterator[Record]:
    """Yield a JSON value as a record, or note that it is none."""
    if not isinstance(value, dict):
        problems.add(f"{name}:{line}", f"{wanted}, but this is {kind(value)}; write {{...}}.")
    elif len(value) > MOST_COLUMNS:
        problems.add(f"{name}:{line}", too_wide(len(value)))
    else:
        yield Record(line, value)


def _reason(error: ValueError | RecursionError) -> str:
    """Return why JSON cannot be read; beside mistakes, Python limits nesting and the digits of a number."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def _json(path: Path, name: str, problems: Problems, written: Written) -> Iterator[Record]:
    """Read a list of objects one by one, so that the line of each is known."""
    decoder = json.JSONDecoder()
    with open_text(path, "", written.encoding) as file:
        text = file.read()
    position = _skip(text, 0)
    if not text.startswith("[", position):
        raise DataError(f"{name}:1: a .json file holds a list of objects; write [{{...}}, ...] or name it .jsonl.")
    position, line, counted = _skip(text, position + 1), 1, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{error.lineno}: this is not JSON ({error.msg}); mend the file.") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{line}: this object cannot be read ({_reason(error)}); mend it.") from error
        if end - position > LONGEST_ROW:
            problems.add(f"{name}:{line}", too_long(end - position))
        else:
            yield from _object(value, line, name, problems, "the list holds objects")
        position = _next_element(text, _skip(text, end), name)


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


def _csv(path: Path, name: str, problems: Problems, written: Written) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_ROW)
    header: list[str] = []
    said = _said_delimiter(path, written)
    before = 0 if said is None else 1
    start = before + 1
    delimiter = written.delimiter or said or ("\t" if kind_of(path) == ".tsv" else _delimiter(path, written))
    with open_text(path, "", written.encoding) as file:
        lines = itertools.islice(_csv_lines(file, name), before, None)
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        try:
            for cells in reader:
                line, start = start, before + reader.line_num + 1
                if not any(map(str.strip, cells)):  # as spreadsheets leave them behind the last row
                    continue
                if not header:
                    header = checked_header(cells, f"{name}:{line}")
                elif fits(cells, header, f"{name}:{line}", problems):
                    yield Record(line, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            if "field limit" in str(error):
                raise DataError(
                    f"{name}:{start}: a field has more than {LONGEST_ROW:,} characters, more than are read; "
                    "shorten it, or close its quote."
                ) from error
            raise DataError(f"{name}:{start}: this is not CSV ({error}); mend the file.") from error


def _said_delimiter(path: Path, written: Written) -> str | None:
    """Return what a first line such as ``sep=;`` says that divides fields; None where there is no such line."""
    with open_text(path, "", written.encoding) as file:
        found = _SEPARATOR.fullmatch(file.readline(10))
    return found[1] if found else None


def _delimiter(path: Path, written: Written) -> str:
    """Return what divides the header of a CSV file into most fields; a comma where nothing does."""
    with open_text(path, "", written.encoding) as file:
        first = next((line for line, _ in _lines(file) if line.strip()), "")

    def fields(delimiter: str) -> int:
        try:
            return len(next(csv.reader([first], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=fields)


def _csv_lines(file: TextIO, name: str) -> Iterator[str]:
    """Yield the lines of a CSV file, of which none can be left out, since a quote may be open there."""
    for number, (line, length) in enumerate(_lines(file), 1):
        if length > LONGEST_ROW:
            raise DataError(f"{name}:{number}: {too_long(length)}")
        yield line


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": parquet, ".xlsx": workbook}
