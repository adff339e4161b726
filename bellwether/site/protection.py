"""What a site of a real federation does so that less of its rows can be seen in what it sends.

In a rehearsal, whose sites belong to one person, nothing of this is done: there bytes are those of the simulation.

FOLDER/noise.key    the secret that noise is drawn from, on centroids and gradients; it never leaves the site
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bellwether.errors import FederationError
from bellwether.exchange.messages import Reply
from bellwether.exchange.scores import Totals, add_up
from bellwether.site.keys import write_private
from bellwether.tools.json_text import reading

SECRET = "noise.key"
BYTES = 32  # of the secret
LEAST = 5  # held-out rows whose category or group is named
OTHER = "other"  # the name of all others


def own_secret(folder: Path) -> bytes:
    """Return the secret that a site draws noise from, which is made where there is none.

    Args:
        folder: the site's own.

    Raises:
        CheckpointError: it cannot be read or written.
        FederationError: it is not as it was written.
    """
    path = folder / SECRET
    if not path.exists():
        write_private(path, secrets.token_bytes(BYTES))
    with reading(path, "restore it"):
        secret = path.read_bytes()
    if len(secret) != BYTES:
        raise FederationError(f"{path} has {len(secret)} bytes, where {BYTES} are due; restore it, or remove it.")
    return secret


def without_small_names(reply: Reply) -> Reply:
    """Return a reply in which categories and groups of few rows have no name, since names are text of the rows."""
    if reply.totals is None:
        return reply
    return replace(reply, totals=lumped(reply.totals), groups=lumped(reply.groups))


def lumped(parts: Mapping[str, Totals]) -> Mapping[str, Totals]:
    """Return sums of scores in which those of fewer than ``LEAST`` rows are one, named ``OTHER``.

    Where that one has fewer rows itself, the smallest of the others joins it; rows without a name stay without one,
    where no other has any.

    Args:
        parts: sums by name.
    """
    if parts.keys() <= {""}:
        return parts
    by_size = sorted(parts, key=lambda name: (parts[name].rows, name))
    joined: list[str] = []
    for name in by_size:
        rows = sum(parts[one].rows for one in joined)
        if parts[name].rows < LEAST or 0 < rows < LEAST:
            joined.append(name)
    return add_up((OTHER if name in joined else name, totals) for name, totals in parts.items())
