"""A partition by a person's own ``package.module:function``: called, and checked for what it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bellwether.data.columns import check_client_name
from bellwether.data.rows import Row
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.functions import load_function, naming
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted


def by_own_function(
    function: str, rows: Sequence[Row], settings: recipe.Partition, randomness: Randomness, notes: list[str]
) -> dict[str, list[Row]]:
    """Deal rows by a person's own function.

    Args:
        function: ``package.module:function``, which takes rows, settings and randomness.
        rows: the training rows.
        settings: the section of the recipe.
        randomness: what the function may draw from.
        notes: receives a sentence on rows that were dealt to no client.

    Raises:
        DataError: the function cannot be had or fails, or what it made is no partition.
    """
    deal_rows = load_function(function)
    with naming(f"partition.method {function}", DataError):
        dealt = deal_rows(rows, settings, randomness)
    return _checked(dealt, rows, function, notes)


def _checked(dealt: Any, rows: Sequence[Row], function: str, notes: list[str]) -> dict[str, list[Row]]:
    """Check what an own function made: names, no strange rows, none twice; note what it left out."""
    if not isinstance(dealt, dict) or not dealt:
        raise DataError(f"{function}: it returned {type(dealt).__name__}, but a dict of client to rows is wanted.")
    left = {id(row) for row in rows}
    for client, own in dealt.items():
        if not isinstance(own, (list, tuple)):
            raise DataError(f"{function}: {client!r} got {type(own).__name__}, but a list of rows is wanted.")
        try:
            check_client_name(client)
        except (DataError, AttributeError) as error:
            raise DataError(f"{function}: {client!r} is no client's name: {error}") from error
        for row in own:
            if id(row) not in left:
                raise DataError(f"{function}: {client} got a row twice, or one that was not given; deal each row once.")
            left.remove(id(row))
    if left:
        notes.append(f"{function}: {len(left)} of {counted(len(rows), 'row')} were dealt to no client.")
    return {client: list(own) for client, own in dealt.items()}
