"""What a simulation's clients keep of the rows that they chose, each in its own part of the run folder.

NAME/rows.json    the category of each of its rows

Beside it stands what the client itself remembers, see ``bellwether.store.client_state``.

A simulation deals the rows out, so its report may show all this; of a client elsewhere the server has none of it.

Shape legend: N rows of the client, d dimensions of the space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.data.rows import TokenRow
from bellwether.errors import CheckpointError
from bellwether.exchange.records import RoundRecord
from bellwether.store.client_state import SELECTED, SURVEY, damaged, kept_rounds, recall_state, selected_rows
from bellwether.tools.atomic import make_folder, write_atomic
from bellwether.tools.json_text import read_json, reading
from bellwether.tools.words import counted

ROWS = "rows.json"

_REMEDY = "restore it, or run anew"


@dataclass(frozen=True)
class Chosen:
    """What one client chose of its rows.

    Args:
        categories: of each of its rows, in their order.
        rounds: the numbers of the rows that it trained on, by round; only rounds in which its update was used.
        points_Nd: where its rows lay in the last round that was surveyed; None where it was not asked then.
    """

    categories: Sequence[str]
    rounds: Mapping[int, Sequence[int]]
    points_Nd: NDArray[np.floating[Any]] | None = None

    @property
    def distinct(self) -> int:
        """How many of its rows it trained on in any round."""
        return len({number for numbers in self.rounds.values() for number in numbers})


def keep_categories(folders: Mapping[str, Path], clients: Mapping[str, Sequence[TokenRow]]) -> None:
    """Write the categories of each client's rows to its own folder.

    Args:
        folders: each client's own, by its name.
        clients: the rows that they train on, by name.

    Raises:
        CheckpointError: it cannot be written.
    """
    for client, folder in folders.items():
        categories = [row.category for row in clients[client]]
        write_atomic(make_folder(folder) / ROWS, (json.dumps(categories) + "\n").encode())


def last_survey(rounds: Sequence[RoundRecord]) -> RoundRecord | None:
    """Return the record of the last round that was surveyed; None where none was."""
    return next((record for record in reversed(rounds) if record.survey is not None), None)


def read_chosen(folders: Mapping[str, Path], rounds: Sequence[RoundRecord]) -> dict[str, Chosen]:
    """Return what clients chose, by name; those whose folder is not there are absent.

    Args:
        folders: each client's own, by its name.
        rounds: one record per round.

    Raises:
        CheckpointError: a file cannot be read.
    """
    surveyed = last_survey(rounds)
    asked = surveyed.round if surveyed is not None else None
    used: dict[str, list[int]] = {client: [] for client in folders}
    for record in rounds:
        for one in record.clients:
            used[one.client].append(record.round)
    return {
        client: _read_client(folder, used[client], asked)
        for client, folder in folders.items()
        if (folder / ROWS).is_file()
    }


def _read_client(folder: Path, used: Sequence[int], asked: int | None) -> Chosen:
    """Return what one client chose in the rounds in which it was used, and where its rows lay in the one asked for."""
    categories: list[str] = read_json(folder / ROWS, list[str], _REMEDY)
    rounds = {}
    for round in used:
        path = folder / SELECTED / f"{round:04d}.json"
        with reading(path, _REMEDY):
            rounds[round] = selected_rows(path)
            if any(number >= len(categories) for number in rounds[round]):
                raise ValueError(f"it names rows beyond the client's {len(categories)}")
    points_Nd = None if asked is None else _points(folder, asked, len(categories))
    return Chosen(categories, rounds, points_Nd)


def _points(folder: Path, asked: int, rows: int) -> NDArray[np.floating[Any]] | None:
    """Return the points that were clustered in a round; None where the last round was another."""
    computed = max((kept for kept in kept_rounds(folder, SURVEY) if kept <= asked), default=0)
    arrays = recall_state(folder, SURVEY, computed)
    if arrays is None:
        return None
    path = folder / SURVEY / f"{computed:04d}.npz"
    try:
        if int(arrays.get("surveyed", 0)) != asked:
            return None
        points_Nd = arrays["points"]
        whole = points_Nd.dtype.kind == "f" and bool(np.isfinite(points_Nd).all())
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise damaged(path, error) from error
    if not whole or points_Nd.ndim != 2 or len(points_Nd) != rows:
        raise CheckpointError(
            f"{path} has points of shape {points_Nd.shape}, and the client has {counted(rows, 'row')}; restore it."
        )
    return points_Nd
