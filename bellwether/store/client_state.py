"""A client's own state: named arrays by round, in the client's own folder, which never leave it.

Another process may serve the client next time, and a round may have to be run again, so what a round leaves is a file
of that round; a later round names the one that it goes on from.

NAME/survey/0003.npz       where the client's rows lie by the model of round 3, see ``bellwether.client.memory``
NAME/selected/0003.json    the numbers of the rows that it trained on in round 3, see ``bellwether.client.choose``
NAME/method/0003.npz       what the method keeps at the client after round 3, such as SCAFFOLD's control variate
NAME/unsent/0003.npz       what compression left out of its update of round 3, to be added to its next one
NAME/secure/0003.json      its secrets of secure aggregation while round 3 goes on, see ``bellwether.client.masking``
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import CheckpointError, first_line
from bellwether.exchange.records import RoundRecord
from bellwether.tools.atomic import make_folder, write_atomic
from bellwether.tools.json_text import Count, from_json, typed

SURVEY, SELECTED, METHOD, UNSENT, SECURE = "survey", "selected", "method", "unsent", "secure"
SETTLED = (METHOD, UNSENT)  # what a client goes on from, of its last round that counted

Arrays = Mapping[str, NDArray[Any]]


def keep_state(client: Path, name: str, round: int, arrays: Arrays) -> None:
    """Write what a client keeps of a round.

    Args:
        client: the client's own folder, made where it is missing.
        name: what it is, such as ``METHOD``.
        round: the round that leaves it.
        arrays: named arrays.

    Raises:
        CheckpointError: it cannot be written.
    """
    buffer = io.BytesIO()
    # NumPy's own archive, but that no name can be taken for an argument of its writer.
    with zipfile.ZipFile(buffer, "w") as archive:
        for key, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
    make_folder(client / name)
    write_atomic(state_file(client, name, round), buffer.getvalue())


def keep_settled(client: Path, name: str, round: int, arrays: Arrays, settled: int, certain: int) -> None:
    """Write what a client keeps of a round, and forget what no round can go on from any more.

    Args:
        client: the client's own folder.
        name: what it is.
        round: the round that leaves it.
        arrays: named arrays; where there are none, an empty file tells that none is lost.
        settled: the last round before in which an update of this client counted.
        certain: the last such round at the oldest checkpoint that the run can still go back to.

    Raises:
        CheckpointError: it cannot be written.
    """
    keep_state(client, name, round, arrays)
    never_counted = range(settled + 1, round)
    forget_state(client, name, [one for one in kept_rounds(client, name) if one < certain or one in never_counted])


def state_file(client: Path, name: str, round: int) -> Path:
    """Return the file of what a client keeps of a round."""
    return client / name / f"{round:04d}.npz"


def kept_rounds(client: Path, name: str) -> list[int]:
    """Return the rounds of which a client keeps something of a name, the oldest first."""
    return [int(path.stem) for path in _files(client, name)]


def forget_state(client: Path, name: str, rounds: Collection[int]) -> None:
    """Delete what a client keeps of a name of some rounds."""
    for path in [path for path in _files(client, name) if int(path.stem) in rounds]:
        path.unlink(missing_ok=True)


def recall_state(client: Path, name: str, round: int) -> Arrays | None:
    """Return what a client kept of a round, and of that one alone; None where there is nothing.

    Args:
        client: the client's own folder.
        name: what it is.
        round: the round.

    Raises:
        CheckpointError: the file is not as ``keep_state`` wrote it.
    """
    path = next((path for path in _files(client, name) if int(path.stem) == round), None)
    if path is None:
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return dict(stored)
    except Exception as error:  # whatever a damaged archive makes of zipfile and NumPy
        raise damaged(path, error) from error


def selected_rows(path: Path) -> list[int]:
    """Return the numbers of the rows that a client trained on in a round.

    Args:
        path: the file of the round.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    kept = typed(from_json(path.read_bytes()), dict[str, Any])
    rows: list[int] = typed(kept.get("rows"), list[Count])
    return rows


def selected_files(client: Path) -> list[Path]:
    """Return the files of a client that ``selected_rows`` reads, the oldest round first."""
    return _files(client, SELECTED, "json")


def forgotten(folders: Mapping[str, Path], rounds: Sequence[RoundRecord], chooses: bool) -> list[Path]:
    """Return the files that clients left in rounds that counted, and that are gone.

    Args:
        folders: each client's own, by its name.
        rounds: the rounds so far.
        chooses: whether clients choose the rows that they train on.
    """
    settled: dict[str, int] = {}
    left = []
    for record in rounds:
        for client in (one.client for one in record.clients if one.client in folders):
            if record.failure is None:
                settled[client] = record.round
            if chooses:
                left.append(folders[client] / SELECTED / f"{record.round:04d}.json")
    for name in SETTLED:
        if any((folder / name).is_dir() for folder in folders.values()):
            left += [state_file(folders[client], name, round) for client, round in settled.items()]
    return [path for path in left if not path.exists()]


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file of a client's state that is not as it was written."""
    return CheckpointError(
        f"{path} is not as it was written ({type(error).__name__}: {first_line(error)}); remove it, and its client "
        "begins without it, or restore it."
    )


def _files(client: Path, name: str, suffix: str = "npz") -> list[Path]:
    """Return a client's files of one kind, the oldest round first; what else lies there is not looked at."""
    paths = [path for path in (client / name).glob(f"*.{suffix}") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem))
