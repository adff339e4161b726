"""From the sources of a recipe to rows: files, folders, the embedded rows, data sets on the hub."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bellwether.data.columns import USUAL_NAMES, can_group, check_client_name, find_layout, make_row, unused_fields
from bellwether.data.files import READERS, can_be_read, read_records
from bellwether.data.opening import kind_of, stem_of
from bellwether.data.records import SKIP, Problems, Record, Written
from bellwether.data.rows import Row
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.words import counted, listed

STARTER_ROWS = Path(__file__).parent / "starter"
# How files of splits are called.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_STARTER = re.compile(r"starter(?::(lowland))?(?::(train|validation|test))?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Part:
    """The records of one file or data set.

    Args:
        name: how places and messages call it.
        records: what it holds.
        client: the client's name that its file gives; empty where it gives none.
    """

    name: str
    records: Sequence[Record]
    client: str = ""


def read_rows(
    sources: Sequence[str], settings: recipe.Data, client_column: str | None = None
) -> tuple[list[Row], list[str]]:
    """Read the rows of all sources.

    Args:
        sources: files (.json, .jsonl, .csv, .tsv, .parquet, .xlsx), folders of such files, ``starter`` (or
            ``starter:validation``, ``starter:test``), ``starter:lowland`` (or ``starter:lowland:validation``,
            ``starter:lowland:test``), or names of data sets on the Hugging Face hub.
        settings: how files are written, columns, and split, configuration and revision on the hub.
        client_column: the column that names the client; None takes the stem of the file where there
            are several files or a folder.

    Returns:
        The rows in the order of the sources, and notes for the log.

    Raises:
        DataError: a source is not there, or rows of it are bad and not to be skipped; the first three are named by
            place.
    """
    problems, notes = Problems(), list[str]()
    parts = _parts(sources, settings, problems, notes)
    _check_source_columns(settings, parts)
    records = [record.values for part in parts for record in part.records]
    groups = [column for column in USUAL_NAMES["group"] if can_group(records, column)]
    unused: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    inside: collections.Counter[str] = collections.Counter()
    rows: list[Row] = []
    for part in parts:
        columns = tuple(dict.fromkeys(column for record in part.records for column in record.values))
        if not part.records:
            continue
        layout = find_layout(columns, columns_of(settings, part.name), client_column, part.name, groups)
        unused[tuple(column for column in columns if column not in layout.used)].append(part.name)
        for record in part.records:
            place = f"{part.name}:{record.line}"
            try:
                rows.append(make_row(record.values, layout, place, part.client))
                inside.update(unused_fields(record.values, layout))
            except DataError as error:
                problems.add(place, str(error))
    if settings.skip_bad_rows and rows:
        notes += problems.skipped()
    else:
        problems.check(SKIP if rows else "")
    notes += [_unused_note(columns, names) for columns, names in unused.items() if columns]
    notes += [
        f"Messages: not used: the field {field!r}, of {counted(count, 'chat')}."
        for field, count in sorted(inside.items())
    ]
    return rows, notes


def columns_of(settings: recipe.Data, name: str) -> recipe.Columns:
    """Return which column of a source holds what, as the recipe says it for this source, or for all of them.

    Args:
        settings: ``columns``, and ``source_columns``.
        name: the name of the file, or of the data set on the hub.
    """
    own = next((one for one in settings.source_columns if one.source == name), None)
    told = {} if own is None else own.model_dump(exclude_unset=True, exclude={"source"})
    return settings.columns.model_copy(update=told)


def _check_source_columns(settings: recipe.Data, parts: Sequence[Part]) -> None:
    """Refuse columns of a source that is not there; sources of validation and test rows are read by themselves."""
    known = {part.name for part in parts}
    others = {Path(source).name for source in (*settings.validation_sources, *settings.test_sources)}
    named = {one.source for one in settings.source_columns if one.source not in known | others}
    if named and not others and known - {"starter:train"}:
        raise DataError(
            f"data.source_columns names {min(named)!r}, but there is no such file among the sources; "
            f"there are {listed(sorted(known))}."
        )


def _unused_note(columns: Sequence[str], names: Sequence[str]) -> str:
    """Return the sentence that names the columns that are not read."""
    where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return f"{where}: not used: {listed([repr(column) for column in columns])}."


def _parts(sources: Sequence[str], settings: recipe.Data, problems: Problems, notes: list[str]) -> list[Part]:
    """Return all parts of the sources, with the clients that their files name."""
    paths: list[Path] = []
    parts: list[Part | Path] = []
    for source in sources:
        starter = _STARTER.fullmatch(source)
        if starter:
            parts.append(_starter(starter[1], starter[2] or "train", problems))
        elif not is_hub_name(source):
            found = list_files(Path(source).expanduser(), notes)
            parts += found
            paths += found
        else:
            parts.append(_hub(source, settings))
    whole = {_whole(path) for path in paths}
    alone = len(paths) > 1 or paths == [Path(source).expanduser() for source in sources]  # a folder names a client
    one_file = len(whole) == 1 and len(parts) == len(paths) and alone
    clients = {} if one_file else file_clients(paths)
    written = Written(settings.encoding, settings.delimiter)
    return [part if isinstance(part, Part) else _file(part, clients, problems, written) for part in parts]


def _file(path: Path, clients: Mapping[Path, str], problems: Problems, written: Written) -> Part:
    return Part(path.name, read_records(path, path.name, problems, written), clients.get(path, ""))


def whole_stem(path: Path) -> str:
    """Return a file's name without its endings, and of a part such as ``train-00000-of-00002`` that of the whole."""
    return _SHARD.sub("", stem_of(path))


def _whole(path: Path) -> tuple[Path, str, str]:
    """Return what parts of one data set have in common: their folder, the name of the whole, and its kind."""
    return path.parent, whole_stem(path), kind_of(path)


def split_folder(path: Path) -> dict[str, list[Path]]:
    """Return the files of a folder that holds a data set's splits, by split; nothing where it holds something else.

    Args:
        path: a source; a folder whose files are all named after splits, ``train`` and at least one other.
    """
    if not path.is_dir():
        return {}
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and can_be_read(entry))
    splits: dict[str, list[Path]] = collections.defaultdict(list)
    for file in files:
        splits[SPLITS.get(whole_stem(file).lower(), "")].append(file)
    return dict(splits) if "" not in splits and "train" in splits and len(splits) > 1 else {}


def _starter(language: str | None, split: str, problems: Problems) -> Part:
    """Return the embedded rows of a language (None is the first one) and split."""
    path = STARTER_ROWS / (language or "") / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: the embedded rows are not there; install bellwether anew.")
    name = ":".join(filter(None, ("starter", language, split)))
    return Part(name, read_records(path, name, problems))


def is_hub_name(source: str) -> bool:
    """Return whether a source is meant as a name on the hub, not as the embedded rows, a file or a folder."""
    if can_be_read(Path(source)) or source.startswith(("/", ".", "~")) or Path(source).exists():
        return False
    # A name without an owner is far more often a mistyped file, whose name shall not leave the machine.
    return bool(_HUB_NAME.fullmatch(source)) and not _STARTER.fullmatch(source)


def list_files(path: Path, notes: list[str]) -> list[Path]:
    """Return a file itself, or the files of a folder that can be read, sorted by name.

    Args:
        path: a file or a folder.
        notes: receives a sentence on files of the folder that are not read.

    Raises:
        DataError: there is no such file, or no file that can be read.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file; give a file, a folder, starter, or a name on the hub.")
    if path.is_file():
        if not can_be_read(path):
            raise DataError(f"{path}: files of this kind cannot be read; give one of {', '.join(READERS)}.")
        return [path]
    try:
        inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: the folder cannot be read ({error.strerror}); check its rights.") from error
    files = [entry for entry in inside if entry.is_file() and can_be_read(entry)]
    if not files:
        raise DataError(f"{path}: the folder holds no file to read; put {', '.join(READERS)} files there.")
    splits = [file.name for file in files if SPLITS.get(whole_stem(file).lower(), "train") != "train"]
    if splits and len(files) > 1:
        notes.append(
            f"{path}: {listed(splits)} {'is' if len(splits) == 1 else 'are'} dealt out for training; name "
            "it in data.test_sources or data.validation_sources if it holds rows for that."
        )
    others = [entry.name for entry in inside if entry not in files]
    if others:
        notes.append(f"{path}: not read: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}.")
    return files


def file_clients(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a client's name for every file: its stem, with its folder's name where stems are equal.

    Parts of one data set, such as ``train-00000-of-00002``, are of one client.

    Raises:
        DataError: a name is no client's name, or two files have the same.
    """
    counts = collections.Counter(stem for _, stem, _ in {_whole(path) for path in paths})
    names: dict[Path, str] = {}
    for path in paths:
        stem = whole_stem(path)
        name = stem if counts[stem] == 1 else f"{path.absolute().parent.name}-{stem}"
        try:
            check_client_name(name)
        except DataError as error:
            raise DataError(f"{path}: {error} Rename the file.") from error
        twin = next((other for other, taken in names.items() if taken == name), None)
        if twin is not None and _whole(twin) != _whole(path):
            raise DataError(f"{path}: this file and {twin} both name the client {name!r}; rename one of them.")
        names[path] = name
    return names


def _hub(name: str, settings: recipe.Data) -> Part:
    """Return a split of a data set on the Hugging Face hub."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    try:
        loaded = datasets.load_dataset(name, settings.config, split=settings.split, revision=settings.revision)
        records = [Record(number, dict(values)) for number, values in enumerate(loaded, 1)]
    except Exception as error:  # the hub's client raises whatever its layers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: there is no such file or folder here, and the split {settings.split!r} of a data set of this "
            f"name cannot be had from the Hugging Face hub ({reason}); check the name, data.split and the network."
        ) from error
    if not records:
        raise DataError(f"{name}: the split {settings.split!r} holds no rows; give another in data.split.")
    return Part(name, records)
