"""What a person's own files hold: their columns, what each of them is for, and rows where that is known.

Look here for what ``bellwether init`` sees; what it writes of it is in ``bellwether.runner.init``.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellwether.data.columns import USUAL_NAMES, check_client_name
from bellwether.data.federated import with_splits
from bellwether.data.files import read_records
from bellwether.data.records import SKIP, Problems, Written
from bellwether.data.rows import Row
from bellwether.data.sources import file_clients, list_files, read_rows
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.recipe.file import CHOOSE
from bellwether.tools.words import listed

# Names that people give to columns beside the usual ones, which need no mapping.
_OTHER_NAMES = {
    "instruction": ("query", "task", "user", "ask"),
    "context": ("passage", "text", "document", "background"),
    "response": ("completion", "target", "reply", "assistant", "label"),
    "category": ("type", "topic", "label", "class", "task"),
    "messages": ("chat", "dialog", "dialogue", "conversation", "turns"),
    "chosen": (),
    "rejected": (),
    "group": ("lang",),
}
ROLES = tuple(_OTHER_NAMES)
_MOST_CLIENTS = 1000


@dataclass(frozen=True)
class Column:
    """A column of a file: how many rows fill it, and the value of the first that does."""

    filled: int
    example: Any


@dataclass(frozen=True)
class SeenFile:
    """One file.

    Args:
        name: of the file, without its folder.
        columns: its columns.
        mapping: the column of each role that the recipe must name; ``''`` is none, and ``CHOOSE`` is to be chosen.
    """

    name: str
    columns: Mapping[str, Column]
    mapping: Mapping[str, str]

    def column_of(self, role: str) -> str | None:
        """Return the column of a role, None where there is none, or it is still to be chosen."""
        named = self.mapping.get(role)
        if named is not None:
            return named if named in self.columns else None
        return next((name for name in USUAL_NAMES[role] if name in self.columns), None)


@dataclass(frozen=True)
class Seen:
    """What the files hold.

    Args:
        sources: the paths as given.
        files: the files that are trained on, or serve the test or validation.
        held_out: names of those files that serve the test or validation.
        rows: how many rows there are to train on.
        read: these rows; None where columns are still to be chosen.
        sizes: number of rows by client, where several files name them; else nothing.
        categories: number of rows by category.
        groups: number of rows by language or domain.
        notes: what reading them had to say.
        client_columns: columns that may name clients, with how many clients.
        data: how the files are read: ``encoding``, ``delimiter`` and ``skip_bad_rows``.
        bad: how many rows to train on are bad, and left out.
    """

    sources: Sequence[str]
    files: Sequence[SeenFile]
    held_out: Sequence[str]
    rows: int
    read: Sequence[Row] | None
    sizes: Mapping[str, int]
    categories: collections.Counter[str]
    groups: collections.Counter[str]
    notes: Sequence[str]
    client_columns: Mapping[str, int]
    data: recipe.Data
    bad: int

    @property
    def columns(self) -> recipe.Data:
        """The section ``data`` that names the columns of all files."""
        return columns_section(self.files)

    @property
    def to_choose(self) -> list[str]:
        """The roles that a person must still choose a column for."""
        return [role for role in ROLES if any(file.mapping.get(role) == CHOOSE for file in self.files)]


def columns_section(files: Sequence[SeenFile]) -> recipe.Data:
    """Return a section that names the columns of all files, for each by itself where they are not alike."""
    open_columns = {tuple(file.columns) for file in files if CHOOSE in file.mapping.values()}
    if len(open_columns) < 2 and all(file.mapping == files[0].mapping for file in files):
        return recipe.Data(columns=recipe.Columns(**files[0].mapping))
    own = [recipe.SourceColumns(source=file.name, **file.mapping) for file in files if file.mapping]
    return recipe.Data(source_columns=tuple(own))


def look(sources: Sequence[str], chosen: Mapping[str, Sequence[str]], reading: recipe.Data) -> Seen:
    """Look at files.

    Args:
        sources: files or folders.
        chosen: by role, columns that a person has chosen: ``COLUMN`` for all files that have it, ``FILE=COLUMN`` for
            one of them, and ``''`` for none.
        reading: how files are read: ``encoding``, ``delimiter`` and ``skip_bad_rows``.

    Raises:
        DataError: a file cannot be read, a row is bad and not to be skipped, or a chosen column is not there.
    """
    notes: list[str] = []
    data = with_splits(reading.model_copy(update={"sources": tuple(sources)}), notes)
    written = Written(data.encoding, data.delimiter)
    problems, train = Problems(), _files(data.sources)
    aside = _files((*data.validation_sources, *data.test_sources))

    def values_of(path: Path) -> list[Mapping[str, Any]]:
        return [one.values for one in read_records(path, path.name, problems, written)]

    records = {path: values_of(path) for path in train}
    values = [value for path in train for value in records[path]]
    if not values:
        problems.check()
    bad = len(problems)
    records |= {path: values_of(path) for path in aside if path not in records}
    files = _seen_files(records, chosen)
    complete = not any(CHOOSE in file.mapping.values() for file in files)
    read: Sequence[Row] | None = None
    if complete:
        read, said = read_rows(data.sources, data.model_copy(update=_columns_of(files)))
        notes += said
        bad += len(values) - len(read)
    if not data.skip_bad_rows:
        problems.check(SKIP)
    elif read is None:
        notes += problems.skipped()
    by_path = dict(zip(records, files, strict=True))
    clients = file_clients(train) if len(train) > 1 else {}
    sizes = collections.Counter[str]()
    for path in train:
        sizes[clients.get(path, "")] += len(records[path])
    if read is not None:
        sizes = collections.Counter(row.client for row in read)
    categories = _labels("category", train, records, by_path)
    if read is not None:
        categories = collections.Counter(row.category for row in read if row.category)
    used = {file.column_of(role) for file in files for role in ROLES}
    return Seen(
        sources=sources,
        files=files,
        held_out=[path.name for path in aside],
        rows=len(values if read is None else read),
        read=read,
        sizes=sizes if len(sizes) > 1 else {},
        categories=categories,
        groups=collections.Counter(row.group for row in read or () if row.group),
        notes=notes,
        client_columns={
            column: count
            for column in dict.fromkeys(column for path in train for column in by_path[path].columns)
            if column not in used and (count := _distinct([value.get(column) for value in values]))
        },
        data=data,
        bad=bad,
    )


def _files(sources: Sequence[str]) -> list[Path]:
    return [path for source in sources for path in list_files(Path(source).expanduser(), [])]


def _columns_of(files: Sequence[SeenFile]) -> dict[str, Any]:
    section = columns_section(files)
    return {"columns": section.columns, "source_columns": section.source_columns}


def _seen_files(
    records: Mapping[Path, Sequence[Mapping[str, Any]]], chosen: Mapping[str, Sequence[str]]
) -> list[SeenFile]:
    """Return the files with the columns of each, and which of them must be named."""
    columns = {path: _columns(rows) for path, rows in records.items()}
    named: dict[str, dict[str, Column]] = {}
    for path, found in columns.items():  # of several files of one name, what any of them has
        named.setdefault(path.name, {}).update(found)
    _check_chosen(chosen, named)
    return [
        SeenFile(path.name, found, _mapping(list(found), _chosen_for(path.name, found, chosen)))
        for path, found in columns.items()
    ]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the columns of some records, in the order in which they come."""
    found: dict[str, Column] = {}
    for values in rows:
        for name, value in values.items():
            before = found.setdefault(name, Column(0, None))
            if value not in (None, ""):
                found[name] = Column(before.filled + 1, before.example if before.filled else value)
    return found


# Columns ------------------------------------------------------------------------------------------


def _parted(text: str, files: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the file and the column that a person chose; no file where the column is meant for all."""
    file, separator, column = text.partition("=")
    return (file, column) if separator and file in files else (None, text)


def _check_chosen(chosen: Mapping[str, Sequence[str]], columns: Mapping[str, Mapping[str, Column]]) -> None:
    """Refuse chosen columns that are not there."""
    for role, texts in chosen.items():
        for text in texts:
            file, column = _parted(text, columns)
            there = [name for name in ([file] if file else columns) if not column or column in columns[name]]
            if not there:
                known = dict.fromkeys(known for name in ([file] if file else columns) for known in columns[name])
                where = file or (next(iter(columns)) if len(columns) == 1 else "none of the files")
                no = "has no" if file or len(columns) == 1 else "has a"
                raise DataError(f"--{role}: {where} {no} column {column!r}; there are {listed(known)}.")


def _chosen_for(name: str, columns: Mapping[str, Column], chosen: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the columns that a person chose for one file; what names the file goes before what does not."""
    found: dict[str, str] = {}
    for role, texts in chosen.items():
        parted = [_parted(text, {name: None}) for text in texts]
        own = [column for file, column in parted if file == name]
        for_all = [column for file, column in parted if file is None and (not column or column in columns)]
        if own or for_all:
            found[role] = (own or for_all)[-1]
    return found


def _mapping(columns: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Return which columns of a file must be named: those that are chosen, and those that are called otherwise."""
    free = [column for column in columns if column not in chosen.values()]
    found = {**chosen, **_guessed(free, chosen)}
    plain = {role for role, usual in USUAL_NAMES.items() if any(name in free for name in usual)}
    has = {role for role in ROLES if found.get(role, role in plain)}
    if "context" in has and "instruction" not in has and "response" in has and "context" not in chosen:
        # What is called an input, beside no instruction, is one.
        usual = next((name for name in USUAL_NAMES["context"] if name in free), "")
        found["instruction"] = found.pop("context", usual)
        has.add("instruction")
    if {"instruction", "response"} <= has and "messages" not in chosen:
        found.pop("messages", None)
    elif {"chosen", "rejected"} <= has and "messages" not in has:
        found.pop("response", None)
    elif "messages" in has:
        beside = {*chosen, "messages", "category", "group"}
        found = {role: column for role, column in found.items() if role in beside}
    else:
        if "context" not in chosen:
            found.pop("context", None)  # a guess that might as well be what is to be chosen
        found |= {role: CHOOSE for role in ("instruction", "response") if role not in has}
    return {role: found[role] for role in ROLES if role in found}


def _guessed(free: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Return columns that are called otherwise than usual, by the roles that nobody chose a column for."""
    lowered = {column.lower().strip(): column for column in reversed(free)}
    found: dict[str, str] = {}
    for role, usual in USUAL_NAMES.items():
        if role in chosen or any(name in free for name in usual):
            continue
        for name in (*usual, *_OTHER_NAMES[role]):
            if name in lowered and lowered[name] not in found.values():
                found[role] = lowered[name]
                break
    return found


def _labels(
    role: str,
    paths: Sequence[Path],
    records: Mapping[Path, Sequence[Mapping[str, Any]]],
    files: Mapping[Path, SeenFile],
) -> collections.Counter[str]:
    """Count the labels of a role that rows have."""

    def found() -> Iterator[str]:
        for path in paths:
            column = files[path].column_of(role)
            for values in records[path] if column else ():
                value = values.get(column or "")
                if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
                    yield str(value).strip()

    return collections.Counter(found())


def _distinct(values: Sequence[object]) -> int:
    """Return how many clients a column would name; 0 where it is no column for that."""
    if not all(isinstance(value, (str, int)) and not isinstance(value, bool) for value in values):
        return 0
    names = {str(value).strip() for value in values}
    if not 2 <= len(names) <= min(_MOST_CLIENTS, len(values) // 5):
        return 0
    try:
        for name in names:
            check_client_name(name)
    except DataError:
        return 0
    return len(names)
