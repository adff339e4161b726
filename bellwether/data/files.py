"""Records of one file, with the line each of them stands in: JSON, JSONL, CSV, Parquet, XLSX.

A file comes from somewhere else, so what it may ask of memory is bounded: a row by ``LONGEST_ROW`` and
``MOST_COLUMNS``, a Parquet file by what it says when it is unpacked. JSONL, CSV and Parquet are read piece by piece.
"""

from __future__ import annotations

import contextlib
import csv
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from bellwether.data.opening import BLOCK, UNPACKED, UNPACKED_PER_BYTE, kind_of, not_decoded, open_bytes, open_text
from bellwether.errors import DataError
from bellwether.tools.words import byte_size, counted, listed

LONGEST_ROW = 10_000_000  # characters, as the row stands in its file
MOST_COLUMNS = 1_000
DELIMITERS = (",", ";", "\t", "|")
INDEX = "Unnamed: 0"  # pandas' name for a column without one

_BATCH = 64  # rows of it that are unpacked at once, at most

# Bytes of Python's objects, roughly and beside their content.
_OBJECT = 60


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

    def check(self) -> None:
        """Raise a DataError when there are any."""
        sentences = self.sentences
        if not sentences:
            return
        more = len(sentences) - self.SHOWN
        tail = [f"... and {more} more; {counted(len(sentences), 'row')} are bad in all."] if more > 0 else []
        raise DataError("\n".join(sentences[: self.SHOWN] + tail))


@dataclass(frozen=True)
class Written:
    """How files are written, where that cannot be seen from them.

    Args:
        encoding: of text files; None finds it out, see ``bellwether.data.opening``.
        delimiter: what stands between the fields of a CSV file; None takes what divides its header into most.
    """

    encoding: str | None = None
    delimiter: str | None = None


def read_records(path: Path, name: str, problems: Problems, written: Written = Written()) -> list[Record]:
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


def _too_long(length: int) -> str:
    """Return the sentence for a row of too many characters."""
    return f"this row has {length:,} characters, but at most {LONGEST_ROW:,} are read; shorten or remove it."


def _too_wide(columns: int) -> str:
    """Return the sentence for too many columns."""
    return f"there are {columns:,} columns, but at most {MOST_COLUMNS:,} are read; leave out those that are not used."


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
                problems.add(f"{name}:{number}", _too_long(length))
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
        problems.add(f"{name}:{line}", _too_wide(len(value)))
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
            problems.add(f"{name}:{line}", _too_long(end - position))
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
    start = 1
    delimiter = written.delimiter or ("\t" if kind_of(path) == ".tsv" else _delimiter(path, written))
    with open_text(path, "", written.encoding) as file:
        reader = csv.reader(_csv_lines(file, name), strict=True, delimiter=delimiter)
        try:
            for cells in reader:
                line, start = start, reader.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = _checked_header(cells, f"{name}:{line}")
                elif _fits(cells, header, f"{name}:{line}", problems):
                    yield Record(line, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            if "field limit" in str(error):
                raise DataError(
                    f"{name}:{start}: a field has more than {LONGEST_ROW:,} characters, more than are read; "
                    "shorten it, or close its quote."
                ) from error
            raise DataError(f"{name}:{start}: this is not CSV ({error}); mend the file.") from error


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
            raise DataError(f"{name}:{number}: {_too_long(length)}")
        yield line


def _fits(cells: Sequence[str], header: Sequence[str], place: str, problems: Problems) -> bool:
    """Return whether a CSV row can be taken, noting why not."""
    if len(cells) != len(header):
        problems.add(
            place, f"this row has {len(cells)} fields, but the header names {len(header)}; quote fields with commas."
        )
        return False
    length = sum(map(len, cells))
    if length > LONGEST_ROW:
        problems.add(place, _too_long(length))
    return length <= LONGEST_ROW


def _checked_header(cells: list[str], place: str) -> list[str]:
    """Return the column names of a CSV file."""
    if len(cells) > MOST_COLUMNS:
        raise DataError(f"{place}: {_too_wide(len(cells))}")
    if not cells[0].strip() and INDEX not in cells:  # as pandas writes its index
        cells = [INDEX, *cells[1:]]
    if len(set(cells)) < len(cells) or not all(cell.strip() for cell in cells):
        raise DataError(f"{place}: the header names a column twice or not at all: {listed(cells)}; rename them.")
    return cells


def _parquet(path: Path, name: str, problems: Problems, written: Written) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    if kind_of(path) != path.suffix.lower():
        raise DataError(f"{name}: a Parquet file is packed in itself; unpack the {path.suffix} around it.")
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if len(table.schema_arrow) > MOST_COLUMNS:
                raise DataError(f"{name}: {_too_wide(len(table.schema_arrow))}")
            most = max(UNPACKED, UNPACKED_PER_BYTE * path.stat().st_size)
            yield from _unpacked(table.iter_batches(batch_size=_batch_size(table.metadata)), name, most)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{name}: this is not a Parquet file that can be read ({reason}); write it anew."
            ) from error


def _batch_size(metadata: Any) -> int:
    """Return how many rows are unpacked at once, such that no column of them can take more than a file may.

    A value may be stored once and named by many rows, but none is larger than what is stored of its column.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    stored = [group.column(number).total_uncompressed_size for group in groups for number in range(group.num_columns)]
    return max(1, min(_BATCH, UNPACKED // max(stored, default=1)))


def _unpacked(batches: Iterable[Any], name: str, most: int) -> Iterator[Record]:
    """Yield the rows of batches, as long as they do not take far more memory than the file promises."""
    number = size = 0
    for batch in batches:
        for row in batch.to_pylist():
            number, size = number + 1, size + _size(row)
            if size > most:
                raise DataError(
                    f"{name}:{number}: the rows up to here take more than {byte_size(most)} when they are unpacked, "
                    "far more than the file itself; give a part of them."
                )
            yield Record(number, row)


def _xlsx(path: Path, name: str, problems: Problems, written: Written) -> Iterator[Record]:
    """Read the first sheet of a workbook; numbers become text as they are shown without a format."""
    try:
        import python_calamine
    except ImportError as error:
        raise DataError(
            f"{name}: .xlsx files need the package python-calamine; install bellwether with its extra 'files', or save "
            "the sheet as CSV."
        ) from error
    _check_workbook(path, name)
    try:
        with contextlib.closing(python_calamine.CalamineWorkbook.from_path(str(path))) as book:
            rows = book.get_sheet_by_index(0).to_python(skip_empty_area=False)
    except (python_calamine.CalamineError, ValueError, IndexError) as error:
        raise DataError(f"{name}: this is not a workbook that can be read ({error}); save it anew.") from error
    header: list[str] = []
    for line, values in enumerate(rows, 1):
        cells = [_cell(value) for value in values]
        if not any(cells):
            continue
        if not header:
            header = _checked_header(cells, f"{name}:{line}")
        elif _fits(cells, header, f"{name}:{line}", problems):
            yield Record(line, dict(zip(header, cells, strict=True)))


def _check_workbook(path: Path, name: str) -> None:
    """Refuse a workbook whose parts are far larger than the file."""
    try:
        with zipfile.ZipFile(path) as book:
            size = sum(part.file_size for part in book.infolist())
    except zipfile.BadZipFile as error:
        raise DataError(f"{name}: this is not a workbook that can be read ({error}); save it anew.") from error
    most = max(UNPACKED, UNPACKED_PER_BYTE * path.stat().st_size)
    if size > most:
        raise DataError(
            f"{name}: the workbook holds more than {byte_size(most)} when it is unpacked; give a part of it."
        )


def _cell(value: Any) -> str:
    """Return a cell of a workbook as text."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _size(value: Any) -> int:
    """Return roughly how many bytes a value takes."""
    if isinstance(value, dict):
        return _OBJECT * (4 + len(value)) + sum(map(_size, value.values()))
    if isinstance(value, list):
        nested = value and isinstance(value[0], str | bytes | list | dict)
        return _OBJECT * (1 + len(value)) + (sum(map(_size, value)) if nested else 0)
    return _OBJECT + (len(value) if isinstance(value, str | bytes) else 0)


def kind(value: Any) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".xlsx": _xlsx}
