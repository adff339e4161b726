"""Dealing rows to clients, by the partitioners of flwr-datasets or by what the rows say themselves."""

from __future__ import annotations

import collections
import heapq
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bellwether.data.categories import choose_categories, share_categories
from bellwether.data.groups import split_groups
from bellwether.data.keep import keep_some
from bellwether.data.own_partition import by_own_function
from bellwether.data.rows import Row
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.randomness import Randomness, derive_seed
from bellwether.tools.words import counted

Dealt = dict[str, list[Row]]
Indices = list[list[int]]


def deal(
    rows: Sequence[Row], settings: recipe.Partition, randomness: Randomness, notes: list[str] | None = None
) -> Dealt:
    """Deal rows to clients; an own ``package.module:function`` takes the first three arguments.

    Args:
        rows: the training rows.
        settings: how to deal.
        randomness: which client gets which rows; the same seed deals the same.
        notes: receives sentences for the log: what auto chose, what was moved or is not used.

    Returns:
        Each client's rows, by name: ``client-01`` and so on, or as column and files name them.

    Raises:
        DataError: the partition cannot be made; says what could be.
    """
    notes = [] if notes is None else notes
    if settings.copies > 1:
        rows = [*rows] * settings.copies
        notes.append(
            f"partition.copies: the {counted(len(rows) // settings.copies, 'training row')} are dealt "
            f"{settings.copies:,} times, so the same row stands at several clients."
        )
    if settings.clients_per_group is not None:
        dealt = _by_group(rows, settings, settings.clients_per_group, randomness, notes)
    else:
        dealt = _by_method(rows, settings, randomness, notes)
    if settings.rows_per_client is not None:
        dealt = keep_some(dealt, *settings.rows_per_client, randomness, notes)
    return dealt


def _by_method(rows: Sequence[Row], settings: recipe.Partition, randomness: Randomness, notes: list[str]) -> Dealt:
    """Deal rows, whatever their group."""
    method = _resolved(rows, settings, notes)
    if ":" in method:
        dealt = by_own_function(method, rows, settings, randomness, notes)
    elif method in ("column", "files"):
        dealt = _by_name(rows, method)
    else:
        dealt = _by_partitioner(rows, method, settings, randomness, notes)
    _check_sizes(dealt, settings, method)
    return dealt


def _resolved(rows: Sequence[Row], settings: recipe.Partition, notes: list[str]) -> str:
    """Return the method, with auto resolved and noted."""
    if not rows:
        raise DataError("there is no row to deal to clients; hold fewer rows out (data.test_rows_per_category).")
    if settings.method != "auto":
        return settings.method
    if names_clients(rows):
        method, reason = "files", "there are several files"
    else:
        method, reason = _by_category(rows, settings)
    notes.append(f"partition.method: auto is {method}, since {reason}.")
    return method


def names_clients(rows: Sequence[Row]) -> bool:
    """Return whether every row names its client, and there are several."""
    clients = {row.client for row in rows}
    return len(clients) > 1 and "" not in clients


def _by_category(rows: Sequence[Row], settings: recipe.Partition) -> tuple[str, str]:
    """Return the method for rows that name no clients, and why.

    Categories are dealt only where that reaches all rows and every client gets enough, whatever the seed:
    the first category of each client is taken in turn, so no category is left over when there are as many
    clients; and all clients might share one category.
    """
    sizes = collections.Counter(row.category for row in rows)
    if len(sizes) < 2:
        return "iid", "rows name fewer than two categories"
    if len(sizes) < _range(settings)[1]:
        return "iid", f"there are {counted(len(sizes), 'category', 'categories')}"
    if len(sizes) > settings.clients:
        return (
            "dirichlet",
            f"{counted(len(sizes), 'category', 'categories')} are more than "
            f"{counted(settings.clients, 'client')} would surely take up",
        )
    smallest = min(sizes, key=lambda category: sizes[category])
    if sizes[smallest] < settings.clients * settings.min_rows:
        return "dirichlet", (
            f"the category {smallest!r} has {counted(sizes[smallest], 'row')}, too few to be shared by "
            f"{counted(settings.clients, 'client')}"
        )
    return "categories", f"rows have {counted(len(sizes), 'category', 'categories')}"


def _check_sizes(dealt: Mapping[str, Sequence[Row]], settings: recipe.Partition, method: str) -> None:
    """Check that each client has enough rows."""
    small = {client: len(rows) for client, rows in dealt.items() if len(rows) < settings.min_rows}
    if not small:
        return
    client, least = min(small.items(), key=lambda item: item[1])
    remedy = "leave out its rows" if method in ("column", "files") else "take fewer clients"
    raise DataError(
        f"partition.method {method} gives {len(small)} of {counted(len(dealt), 'client')} fewer than "
        f"{counted(settings.min_rows, 'row')} "
        f"(partition.min_rows): {client} gets {least}; {remedy}" + (f", or set min_rows to {least}." if least else ".")
    )


# Groups -------------------------------------------------------------------------------------------


def _by_group(
    rows: Sequence[Row],
    settings: recipe.Partition,
    clients_per_group: Mapping[str, int],
    randomness: Randomness,
    notes: list[str],
) -> Dealt:
    """Deal the rows of each group to clients of its own, with draws of its own; clients count on over groups."""
    parts: list[list[Row]] = []
    for group, own in split_groups(rows, clients_per_group).items():
        of_group = settings.model_copy(update={"clients": clients_per_group[group]})
        said: list[str] = []
        try:
            dealt = _by_method(own, of_group, Randomness(derive_seed(randomness.seed, f"group {group}")), said)
        except DataError as error:
            raise DataError(f"the group {group!r}: {error}") from error
        parts += dealt.values()
        notes += [f"{group}: {note}" for note in said]
    return _numbered(parts)


# What the rows say --------------------------------------------------------------------------------


def _by_name(rows: Sequence[Row], method: str) -> Dealt:
    """Give each client the rows that name it, in their order; clients are sorted by name."""
    named: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        if not row.client:
            what = "partition.column" if method == "column" else "one file per client"
            raise DataError(f"{row.place or 'a row'}: names no client, but partition.method is {method}; give {what}.")
        named[row.client].append(row)
    return {client: named[client] for client in sorted(named)}


# Partitioners -------------------------------------------------------------------------------------


def _by_partitioner(
    rows: Sequence[Row], method: str, settings: recipe.Partition, randomness: Randomness, notes: list[str]
) -> Dealt:
    """Deal shuffled rows with one of the partitioners."""
    if len(rows) < settings.clients * settings.min_rows:
        raise DataError(
            f"{counted(len(rows), 'row')} cannot give {counted(settings.clients, 'client')} "
            f"{counted(settings.min_rows, 'row')} each (partition.clients, partition.min_rows); give "
            f"{counted(len(rows) // settings.min_rows, 'client')} or fewer."
        )
    if method not in ("iid", "quantity") and not any(row.category for row in rows):
        raise DataError(
            f"partition.method is {method}, but no row names a category; name the column in data.columns.category, "
            "or set the method to iid or quantity."
        )
    order = [int(index) for index in randomness.numpy("order of rows").permutation(len(rows))]
    names = sorted({row.category for row in rows})
    numbers = {category: number for number, category in enumerate(names)}
    labels = [numbers[rows[index].category] for index in order]
    parts = _METHODS[method](labels, names, settings, randomness, notes)
    return _numbered([[rows[order[index]] for index in part] for part in parts])


def _numbered(parts: Sequence[list[Row]]) -> Dealt:
    """Name clients by number."""
    width = max(2, len(str(len(parts))))
    return {f"client-{number:0{width}}": part for number, part in enumerate(parts, 1)}


def _range(settings: recipe.Partition) -> tuple[int, int]:
    """Return the least and the largest number of categories at a client."""
    number = settings.categories_per_client
    return (number, number) if isinstance(number, int) else number


def _run(partitioner: Any, labels: Sequence[int]) -> Indices:
    """Let a partitioner of flwr-datasets deal positions."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"label": list(labels), "index": list(range(len(labels)))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one warning for each of its attempts
        return [list(partitioner.load_partition(n)["index"]) for n in range(partitioner.num_partitions)]


def _partitioners() -> Any:
    """Import flwr-datasets' partitioners, without their telemetry."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    from flwr_datasets import partitioner

    return partitioner


def _iid(
    labels: Sequence[int], names: Sequence[str], settings: recipe.Partition, randomness: Randomness, notes: list[str]
) -> Indices:
    return _run(_partitioners().IidPartitioner(settings.clients), labels)


def _dirichlet(
    labels: Sequence[int], names: Sequence[str], settings: recipe.Partition, randomness: Randomness, notes: list[str]
) -> Indices:
    """Deal each category by its own draw from a Dirichlet distribution (Yurochkin et al. 2019, section 4).

    The partitioner draws anew until each client has ``min_rows``, and gives up after some attempts.
    Then clients that have too few are filled up with random rows of those that have most, which is
    noted.
    """

    def partitioner(least: int) -> Any:
        return _partitioners().DirichletPartitioner(
            settings.clients,
            partition_by="label",
            alpha=settings.alpha,
            min_partition_size=least,
            seed=randomness.small_seed("dirichlet partition"),
        )

    try:
        return _run(partitioner(settings.min_rows), labels)
    except ValueError:
        parts = _run(partitioner(0), labels)
    moved = fill_up(parts, settings.min_rows, randomness.numpy("filling up clients"))
    notes.append(
        f"partition.method dirichlet: no draw gave every client {counted(settings.min_rows, 'row')}, "
        f"so {moved} of {counted(len(labels), 'row')} were moved from the largest clients to the smallest."
    )
    return parts


def fill_up(parts: Indices, least: int, generator: np.random.Generator) -> int:
    """Move random entries of the largest parts to those with fewer than ``least``; return how many moved.

    Args:
        parts: changed in place; together they hold at least ``least`` entries per part.
        least: what each part shall have.
        generator: which entries go.
    """
    largest = [(-len(part), number) for number, part in enumerate(parts)]
    heapq.heapify(largest)
    moved = 0
    for part in parts:
        while len(part) < least:
            size, donor = heapq.heappop(largest)
            taken = int(generator.integers(-size))
            part.append(parts[donor].pop(taken))
            heapq.heappush(largest, (size + 1, donor))
            moved += 1
    return moved


def _categories(
    labels: Sequence[int], names: Sequence[str], settings: recipe.Partition, randomness: Randomness, notes: list[str]
) -> Indices:
    """Give each client k categories: the first in turn, the others at random (Li et al. 2022, section III)."""
    least, most = _range(settings)
    if most > len(names):
        raise DataError(
            f"partition.categories_per_client is {_words(settings)}, but the rows have "
            f"{counted(len(names), 'category', 'categories')}; "
            f"give at most {len(names)}."
        )
    if isinstance(settings.categories_per_client, int):
        parts = _equally_many(labels, settings.clients, most, randomness)
    else:
        generator = randomness.numpy("categories of clients")
        parts = share_categories(labels, choose_categories(settings.clients, len(names), least, most, generator))
    if parts is None:
        raise DataError(_scarce(labels, names, settings))
    unused = sorted({names[label] for label in labels} - {names[labels[i]] for part in parts for i in part})
    if unused:
        left = sum(names[label] in unused for label in labels)
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more categories" if len(unused) > 5 else "")
        notes.append(
            f"partition.method categories: {left} of {counted(len(labels), 'row')} fell to no client, those of {shown}."
        )
    return parts


def _equally_many(labels: Sequence[int], clients: int, categories: int, randomness: Randomness) -> Indices | None:
    """Give each client equally many categories; None where one has too few rows to be shared."""
    partitioner = _partitioners().PathologicalPartitioner(
        clients,
        partition_by="label",
        num_classes_per_partition=categories,
        class_assignment_mode="first-deterministic",
        seed=randomness.small_seed("categories of clients"),
    )
    try:
        return _run(partitioner, labels)
    except ValueError:
        return None


def _words(settings: recipe.Partition) -> str:
    """Return the number of categories at a client in words."""
    least, most = _range(settings)
    return f"{least} to {most}" if least < most else str(most)


def _scarce(labels: Sequence[int], names: Sequence[str], settings: recipe.Partition) -> str:
    """Return the sentence on the category that is too small to be shared."""
    label, rows = min(collections.Counter(labels).items(), key=lambda item: item[1])
    return (
        f"partition.method categories deals {_words(settings)} of "
        f"{counted(len(names), 'category', 'categories')} to each of "
        f"{counted(settings.clients, 'client')}, but the category {names[label]!r} has only "
        f"{counted(rows, 'row')} to share; "
        f"take {counted(max(1, rows), 'client')} or fewer, put small categories together, or set "
        "partition.method to dirichlet."
    )


def _shards(
    labels: Sequence[int], names: Sequence[str], settings: recipe.Partition, randomness: Randomness, notes: list[str]
) -> Indices:
    """Cut the rows, sorted by category, in equal shards and deal k to each client (McMahan et al. 2017).

    The partitioner drops the rows that are left when all shards are equal. They are taken out evenly
    before, and each goes to the client that has the row before it; the very first to that of the row
    behind it.
    """
    shards = settings.clients * settings.shards_per_client
    if shards > len(labels):
        raise DataError(
            f"{counted(len(labels), 'row')} cannot be cut in {shards} shards (partition.clients × "
            "partition.shards_per_client); "
            f"take {counted(len(labels) // settings.shards_per_client, 'client')} or fewer."
        )
    by_category = np.argsort(labels, kind="stable")
    spare = len(labels) % shards
    extra = {int((number + 1) * len(labels) // (spare + 1)) - 1 for number in range(spare)}
    main = [int(index) for position, index in enumerate(by_category) if position not in extra]
    partitioner = _partitioners().ShardPartitioner(
        settings.clients,
        partition_by="label",
        num_shards_per_partition=settings.shards_per_client,
        seed=randomness.small_seed("shards of clients"),
    )
    parts = [[main[index] for index in part] for part in _run(partitioner, [labels[index] for index in main])]
    owner = {index: part for part in parts for index in part}
    for position in sorted(extra):
        neighbour, index = int(by_category[position - 1 if position else 1]), int(by_category[position])
        owner[index] = owner[neighbour]
        owner[index].append(index)
    return parts


def _quantity(
    labels: Sequence[int], names: Sequence[str], settings: recipe.Partition, randomness: Randomness, notes: list[str]
) -> Indices:
    """Deal unequal numbers of rows, drawn from a Dirichlet distribution above ``min_rows`` each."""
    free = len(labels) - settings.clients * settings.min_rows
    generator = randomness.numpy("sizes of clients")
    shares = generator.dirichlet(np.full(settings.clients, settings.alpha))
    borders = np.floor(np.cumsum(shares) * free + 0.5).astype(int)
    borders[-1] = free
    sizes = settings.min_rows + np.diff(borders, prepend=0)
    return _run(_partitioners().SizePartitioner([int(size) for size in sizes]), labels)


_METHODS: dict[str, Callable[..., Indices]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "categories": _categories,
    "shards": _shards,
    "quantity": _quantity,
}
