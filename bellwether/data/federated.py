"""All rows of a run: read, held out by category, dealt to clients."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bellwether.data.partition import deal, names_clients
from bellwether.data.rows import Federated, Row, Turn
from bellwether.data.sources import is_hub_name, read_rows, split_folder
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted, listed

# From sources, how to read them and the column that names clients, to rows and notes; as ``read_rows``.
Read = Callable[[Sequence[str], recipe.Data, str | None], tuple[Sequence[Row], Sequence[str]]]

# Sources of embedded rows, which bring validation and test rows of the same language along.
_EMBEDDED = {"starter", "starter:lowland"}


@dataclass(frozen=True)
class _Split:
    """Rows for training, and those held out of them."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def load_federated(
    data: recipe.Data, partition: recipe.Partition, randomness: Randomness, read: Read = read_rows
) -> Federated:
    """Read the sources, hold rows out for validation and test, and deal the others to clients.

    Rows of ``data.unseen_categories`` reach no client; as many of each as of any other category serve
    test and validation. The embedded rows bring validation and test rows of their language.

    Args:
        data: sources, columns and what is held out.
        partition: how rows are dealt, and what each client holds out itself.
        randomness: draws which rows.
        read: reads rows of sources, as ``read_rows`` does.

    Raises:
        DataError: a source is bad, the partition cannot be made, or a client is left with no row.
    """
    said_of_splits: list[str] = []
    data = with_splits(data, said_of_splits)
    _check_hub_settings(data)
    whole, said = read(data.sources, data, partition.column if partition.method == "column" else None)
    rows, notes = list(whole), [*said_of_splits, *said]
    embedded = _EMBEDDED.issuperset(data.sources) and not data.test_sources and not data.validation_sources
    languages = tuple(dict.fromkeys(data.sources)) if embedded else ()
    validation, test = (
        _separate(data.validation_sources or tuple(f"{source}:validation" for source in languages), data, notes, read),
        _separate(data.test_sources or tuple(f"{source}:test" for source in languages), data, notes, read),
    )
    _note_unused_counts(data, validation, test, notes)
    rows, partition = _auto_resolved(rows, partition, notes)
    named = rows if partition.method in ("column", "files") else []
    drawn = randomness if data.seed is None else Randomness(data.seed)
    rows = _sample(rows, data.max_rows, drawn, notes)
    _check_natural_clients(named, {row.client for row in rows}, data, "data.max_rows takes none of its rows")
    split = _hold_out(rows, data, drawn, notes, validation, test)
    doubled = _doubled(split, notes)
    dealt = deal(split.train, partition, randomness, notes)
    gone = _check_natural_clients(named, set(dealt), data, "all of its rows are held out")
    if gone:
        notes.append(
            f"{counted(len(gone), 'client')} with rows of unseen categories only, who take no part: {', '.join(gone)}."
        )
    clients, held_out = _hold_out_at_clients(dealt, partition.client_test_fraction, randomness)
    _note_duplicates_at_clients(clients, held_out, notes)
    return Federated(clients, held_out, split.validation, split.test, tuple(notes), doubled)


def with_splits(data: recipe.Data, notes: list[str]) -> recipe.Data:
    """Return settings in which a folder of files that are named after splits serves as these.

    Args:
        data: the recipe's section.
        notes: receives a sentence on each such folder.
    """
    sources: list[str] = []
    held_out: dict[str, list[str]] = {"validation": list(data.validation_sources), "test": list(data.test_sources)}
    for source in data.sources:
        splits = split_folder(Path(source).expanduser())
        if not splits:
            sources.append(source)
            continue
        sources += map(str, splits.pop("train"))
        for split, files in sorted(splits.items()):
            given = bool(getattr(data, f"{split}_sources"))
            if not given:
                held_out[split] += map(str, files)
            served = f"are not read, since data.{split}_sources names others" if given else f"serve as {split} rows"
            notes.append(f"{source}: the rows of {listed([file.name for file in files])} {served}.")
    return data.model_copy(
        update={
            "sources": tuple(sources),
            "validation_sources": tuple(held_out["validation"]),
            "test_sources": tuple(held_out["test"]),
        }
    )


def rows_fingerprint(federated: Federated) -> str:
    """Return the SHA-256 of all rows as they are dealt; equal when a run would see the same data."""
    digest = hashlib.sha256()

    def add(part: str, rows: Sequence[Row]) -> None:
        digest.update(json.dumps([part, len(rows)]).encode())
        for row in rows:
            turns = [[turn.role, turn.text, *_beside(turn)] for turn in row.turns]
            parts: list[object] = [row.instruction, row.context, row.response, row.category, row.group, turns]
            parts += [row.tools] if row.tools else []
            parts += [["rejected", row.rejected.text, *_beside(row.rejected)]] if row.rejected is not None else []
            digest.update(json.dumps(parts).encode())

    for client, rows in federated.clients.items():
        add(f"client {client}", rows)
    for client, rows in federated.held_out.items():
        add(f"held out {client}", rows)
    add("validation", federated.validation)
    add("test", federated.test)
    return digest.hexdigest()


def _beside(turn: Turn) -> list[object]:
    """Return what a turn holds beside its text, nothing where it holds no more."""
    more = [turn.trained, turn.reasoning, turn.fields]
    return more if more != [True, "", ""] else []


def _separate(sources: Sequence[str], data: recipe.Data, notes: list[str], read: Read) -> list[Row] | None:
    """Return the rows of separate sources; None where there are none."""
    if not sources:
        return None
    rows, more = read(sources, data, None)
    notes += more
    return list(rows)


def _check_hub_settings(data: recipe.Data) -> None:
    """Refuse a split or a revision where no source is on the hub."""
    if any(is_hub_name(source) for source in (*data.sources, *data.validation_sources, *data.test_sources)):
        return
    for name in ("split", "revision"):
        value = getattr(data, name)
        if value != getattr(recipe.Data(), name):
            raise DataError(
                f"data.{name} is {value!r}, but no source is a data set on the Hugging Face hub; leave it out."
            )


def _note_unused_counts(
    data: recipe.Data, validation: list[Row] | None, test: list[Row] | None, notes: list[str]
) -> None:
    """Note numbers of rows to hold out that were set, but have no effect since these rows come from elsewhere."""
    for part, rows in (("test", test), ("validation", validation)):
        name = f"{part}_rows_per_category"
        if rows is not None and getattr(data, name) != getattr(recipe.Data(), name):
            notes.append(
                f"data.{name} has no effect, since all {counted(len(rows), f'{part} row')} come from a source "
                "of their own."
            )


def _auto_resolved(
    rows: list[Row], partition: recipe.Partition, notes: list[str]
) -> tuple[list[Row], recipe.Partition]:
    """Decide whether auto takes files as clients, on all rows, before any of them is taken away."""
    if partition.method != "auto":
        return rows, partition
    if names_clients(rows) and partition.clients_per_group is None:
        notes.append("partition.method: auto is files, since there are several files.")
        return rows, partition.model_copy(update={"method": "files"})
    # Then files are no clients, also if those that remain would all name one.
    return [replace(row, client="") for row in rows], partition


def _sample(rows: list[Row], most: int | None, randomness: Randomness, notes: list[str]) -> list[Row]:
    """Return at most so many rows, each as likely as any other, in their order."""
    if most is None or most >= len(rows):
        return rows
    chosen = randomness.numpy("rows taken").choice(len(rows), most, replace=False)
    notes.append(f"data.max_rows: {most} of {counted(len(rows), 'row')} are taken.")
    return [rows[index] for index in sorted(chosen)]


def _hold_out(
    rows: Sequence[Row],
    data: recipe.Data,
    randomness: Randomness,
    notes: list[str],
    validation: list[Row] | None,
    test: list[Row] | None,
) -> _Split:
    """Draw test and validation rows of every category, where they do not come from elsewhere."""
    by_category: dict[str, list[int]] = collections.defaultdict(list)
    for index, row in enumerate(rows):
        by_category[row.category].append(index)
    unknown = [name for name in data.unseen_categories if name not in by_category]
    if unknown:
        raise DataError(
            f"data.unseen_categories: no row is of the category {unknown[0]!r}; "
            f"there are {', '.join(filter(None, sorted(by_category))) or 'none'}."
        )
    chosen = _Chosen(
        0 if test is not None else data.test_rows_per_category,
        0 if validation is not None else data.validation_rows_per_category,
    )
    scarce: dict[str, list[str]] = collections.defaultdict(list)
    for category, indices in sorted(by_category.items()):
        order = randomness.numpy(f"rows held out of {category}").permutation(len(indices))
        unseen = category in data.unseen_categories
        if not chosen.draw([indices[position] for position in order], unseen):
            reason = "unseen categories have no more" if unseen else "at least half of a category stays for training"
            scarce[reason].append(f"{category or 'rows without category'} ({counted(len(indices), 'row')})")
    _note_held_out(chosen, scarce, notes)
    gone = chosen.test | chosen.validation | chosen.unseen
    split = _Split(
        [row for index, row in enumerate(rows) if index not in gone],
        validation if validation is not None else [rows[index] for index in sorted(chosen.validation)],
        test if test is not None else [rows[index] for index in sorted(chosen.test)],
    )
    if chosen.unseen:
        scored = sum(row.category in data.unseen_categories for row in split.test)
        spared = len(chosen.unseen & chosen.validation)
        notes.append(
            f"data.unseen_categories: {counted(len(chosen.unseen), 'row')} of "
            f"{', '.join(data.unseen_categories)} reach no "
            f"client; {scored} {'of them serve the test' if test is None else 'rows of the test are of these'}"
            f"{f', {spared} others validation' if spared else ''}."
        )
    return split


class _Chosen:
    """Indices of rows that no client gets."""

    def __init__(self, test_rows: int, validation_rows: int) -> None:
        self.test_rows, self.validation_rows = test_rows, validation_rows
        self.test: set[int] = set()
        self.validation: set[int] = set()
        self.unseen: set[int] = set()

    def draw(self, shuffled: Sequence[int], unseen: bool) -> bool:
        """Take rows of one category; return whether there were as many as wanted.

        At least half of a category stays for training, since a category that is only tested is what
        ``unseen_categories`` is for.
        """
        available = len(shuffled) if unseen else len(shuffled) // 2
        test_rows = min(self.test_rows, available)
        validation_rows = min(self.validation_rows, available - test_rows)
        self.test.update(shuffled[:test_rows])
        self.validation.update(shuffled[test_rows : test_rows + validation_rows])
        if unseen:
            self.unseen.update(shuffled)
        return (test_rows, validation_rows) == (self.test_rows, self.validation_rows)


def _note_held_out(chosen: _Chosen, scarce: Mapping[str, Sequence[str]], notes: list[str]) -> None:
    """Note scarce categories, by the reason why no more is held out of them; refuse a test that would be empty."""
    if chosen.test_rows and not chosen.test:
        raise DataError(
            "no row can be held out for the test, since no category has two rows; "
            "give data.test_sources, or set data.test_rows_per_category to 0."
        )
    for reason, names in scarce.items():
        notes.append(f"fewer rows than wanted are held out, since {reason}: {', '.join(names)}.")


def _doubled(split: _Split, notes: list[str]) -> dict[str, int]:
    """Return, and note, how many held-out rows of each part stand among the training rows as well."""
    known, found = {_content(row) for row in split.train}, {}
    for name, rows in (("test", split.test), ("validation", split.validation)):
        twins = sum(_content(row) in known for row in rows)
        if twins:
            found[name] = twins
            notes.append(f"{twins} of {counted(len(rows), f'{name} row')} stand among the training rows as well.")
    return found


def _note_duplicates_at_clients(
    clients: Mapping[str, Sequence[Row]], held_out: Mapping[str, Sequence[Row]], notes: list[str]
) -> None:
    """Note how many rows that clients hold out stand among their own training rows as well."""
    twins = 0
    for client, rows in held_out.items():
        known = {_content(row) for row in clients[client]}
        twins += sum(_content(row) in known for row in rows)
    if twins:
        total = sum(map(len, held_out.values()))
        notes.append(
            f"{twins} of {counted(total, 'row')} that clients hold out stand among their own training rows as well."
        )


def _content(row: Row) -> tuple[object, ...]:
    return row.instruction, row.context, row.response, row.turns, row.rejected


def _check_natural_clients(rows: Sequence[Row], left: set[str], data: recipe.Data, reason: str) -> list[str]:
    """Check that the clients that rows name are left; return those that are not, of unseen categories only."""
    gone = {row.client for row in rows} - left
    seen = {row.client for row in rows if row.category not in data.unseen_categories}
    if gone & seen:
        raise DataError(
            f"the client {min(gone & seen)!r} is left with no row, since {reason}; "
            f"{'raise it' if 'max_rows' in reason else 'hold fewer rows out'}, or leave the client out."
        )
    return sorted(gone)


def _hold_out_at_clients(
    dealt: Mapping[str, list[Row]], fraction: float, randomness: Randomness
) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return what each client trains on, and what it holds out; at least one row stays for training."""
    clients: dict[str, list[Row]] = {}
    held_out: dict[str, list[Row]] = {}
    for client, rows in dealt.items():
        if not rows:
            raise DataError(f"the client {client!r} is left with no row; hold fewer rows out, or take fewer clients.")
        count = min(round(fraction * len(rows)), len(rows) - 1)
        chosen = set(randomness.numpy("rows held out", client=client).permutation(len(rows))[:count].tolist())
        clients[client] = [row for index, row in enumerate(rows) if index not in chosen]
        if chosen:
            held_out[client] = [rows[index] for index in sorted(chosen)]
    return clients, held_out
