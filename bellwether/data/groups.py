"""Rows by language or domain, where clients hold rows of one only."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bellwether.data.rows import Row
from bellwether.errors import DataError
from bellwether.tools.words import counted


def split_groups(rows: Sequence[Row], clients_per_group: Mapping[str, int]) -> dict[str, list[Row]]:
    """Return the rows of each group, in the order in which the groups are named.

    Files name no clients of these rows, since the partition makes its own.

    Args:
        rows: rows that name their group.
        clients_per_group: the groups that get clients, which must be those of the rows.

    Raises:
        DataError: a group has no rows, or rows have a group that gets no clients; says which there are.
    """
    sizes = collections.Counter(row.group for row in rows)
    if rows and set(sizes) == {""}:
        raise DataError(
            "partition.clients_per_group is given, but no row names a group; name the column in data.columns.group, "
            "or leave clients_per_group out."
        )
    there = ", ".join(f"{group or '(none)'} with {counted(sizes[group], 'row')}" for group in sorted(sizes)) or "none"
    for group in clients_per_group:
        if group not in sizes:
            raise DataError(
                f"partition.clients_per_group names {group!r}, but no row to deal is of that group; there are {there}."
            )
    for group in sorted(sizes.keys() - clients_per_group.keys()):
        which, remedy = (f"are of the group {group!r}", "give it clients") if group else ("name none", "name theirs")
        raise DataError(
            f"partition.clients_per_group names {', '.join(clients_per_group)}, but "
            f"{counted(sizes[group], 'row')} {which}; "
            f"{remedy}, or leave these rows out (there are {there})."
        )
    return {group: [replace(row, client="") for row in rows if row.group == group] for group in clients_per_group}
