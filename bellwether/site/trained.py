"""What a site keeps of one federation: its client's folder, and which rows it trained on.

FOLDER/clients/FEDERATION/NAME/        what its client keeps from round to round
FOLDER/clients/FEDERATION/rows.json    hashes of the rows that it trains on, and of all that it has trained on

FEDERATION stands for the first digits of the federation's identifier, so that nothing of one is used in another.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bellwether.data.rows import Row
from bellwether.errors import FederationError
from bellwether.site.ledger import entries
from bellwether.store.run_folder import OWN
from bellwether.tools.atomic import make_folder, slug, write_atomic
from bellwether.tools.json_text import json_lines, plain, read_json
from bellwether.tools.words import counted

ROWS = "rows.json"


@dataclass(frozen=True)
class TrainedRows:
    """Hashes of the rows that a site trained on in a federation.

    Args:
        now: of those that it trains on, sorted; a row that stands there twice is twice in it.
        ever: of these, and of those that it trained on before its files changed, sorted, each once.
    """

    now: tuple[str, ...]
    ever: tuple[str, ...]


def kept_for(folder: Path, federation: str) -> Path:
    """Return where a site keeps what belongs to one federation.

    Args:
        folder: the site's own.
        federation: the federation's identifier.
    """
    return folder / OWN / slug(federation[:12])


def row_hash(row: Row) -> str:
    """Return a hash of what a row says, the same wherever it stands."""
    said = [row.instruction, row.context, row.response, plain(row.turns)]
    if row.rejected is not None:
        said.append(plain(row.rejected))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def note_trained(folder: Path, federation: str, rows: Iterable[Row]) -> int:
    """Note which rows a site trains on from now on.

    Args:
        folder: the site's own.
        federation: the federation's identifier.
        rows: all of them.

    Returns:
        How many others it has trained on before in this federation.

    Raises:
        CheckpointError: what was noted before cannot be read, or the note cannot be written.
    """
    now = sorted(map(row_hash, rows))
    path = kept_for(folder, federation) / ROWS
    # Where no training was asked for yet, what was noted was never trained on.
    begun = any(entry.kind == "train" and entry.run.startswith(f"{federation}/") for entry in entries(folder))
    before = read_trained(folder, federation).ever if begun and path.exists() else ()
    make_folder(path.parent)
    write_atomic(path, json_lines([TrainedRows(tuple(now), tuple(sorted({*before, *now})))]))
    return len(set(before) - set(now))


def read_trained(folder: Path, federation: str) -> TrainedRows:
    """Return which rows a site trained on.

    Raises:
        CheckpointError: it was not noted, or cannot be read.
    """
    found: TrainedRows = read_json(kept_for(folder, federation) / ROWS, TrainedRows, "restore it")
    return found


def check_same_rows(trained: TrainedRows, rows: Iterable[Row]) -> None:
    """Refuse rows other than those that a site trained on.

    Args:
        trained: hashes of those.
        rows: of the files that are named now.

    Raises:
        FederationError: they are others.
    """
    now, then = Counter(map(row_hash, rows)), Counter(trained.now)
    if now != then:
        new, gone = (now - then).total(), (then - now).total()
        raise FederationError(
            f"--data names other rows than those that were trained on in this federation ({counted(new, 'row')} more "
            f"and {counted(gone, 'row')} less), so that what is tuned here alone would not be its equal; give the "
            "same files."
        )
