"""Records of files that hold tables in a form of their own: Parquet, and the first sheet of a workbook."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bellwether.data.opening import UNPACKED, UNPACKED_PER_BYTE, kind_of
from bellwether.data.records import MOST_COLUMNS, Problems, Record, Written, checked_header, fits, too_wide
from bellwether.errors import DataError
from bellwether.tools.words import byte_size

_BATCH = 64  # rows of it that are unpacked at once, at most

# Bytes of Python's objects, roughly and beside their content.
_OBJECT = 60


def parquet(path: Path, name: str, problems: Problems, written: Written) -> Iterator[Record]:
    """Read the rows of a Parquet file, piece by piece."""
    import pyarrow
    import pyarrow.parquet

    if kind_of(path) != path.suffix.lower():
        raise DataError(f"{name}: a Parquet file is packed in itself; unpack the {path.suffix} around it.")
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if len(table.schema_arrow) > MOST_COLUMNS:
                raise DataError(f"{name}: {too_wide(len(table.schema_arrow))}")
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


def workbook(path: Path, name: str, problems: Problems, written: Written) -> Iterator[Record]:
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
        if not any(map(str.strip, cells)):
            continue
        if not header:
            header = checked_header(cells, f"{name}:{line}")
        elif fits(cells, header, f"{name}:{line}", problems):
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
