"""Traces of simulated resources, as files: which client is there from which round on, and how fast it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bellwether.errors import DataError


def read_trace(path: Path, clients: Sequence[str]) -> Mapping[str, list[dict[str, Any]]]:
    """Return the lines of a trace file by client, in the order of their rounds.

    Args:
        path: a JSONL file with client, round, available and rows_per_second in each line.
        clients: the names that may stand in it.

    Raises:
        DataError: the file is missing, broken, or names an unknown client.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the trace cannot be read ({error}); see federation.availability.trace.") from error
    by_client: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            entry = _trace_line(f"{path}:{number}", line, clients)
            by_client.setdefault(entry["client"], []).append(entry)
    return {client: sorted(entries, key=lambda entry: entry["round"]) for client, entries in by_client.items()}


def _trace_line(place: str, line: str, clients: Sequence[str]) -> dict[str, Any]:
    """Return one checked line of a trace file."""
    try:
        entry = json.loads(line)
        client, round = entry["client"], entry["round"]
        available, speed = entry["available"], entry["rows_per_second"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{place}: a line of a trace has client, round, available and rows_per_second as a JSON object, "
            f"but this one does not ({repr(error)[:200]})."
        ) from error
    if client not in clients:
        raise DataError(f"{place}: there is no client {repr(client)[:100]}; there are {', '.join(clients[:5])}, ….")
    if (
        type(round) is not int
        or type(available) is not bool
        or not isinstance(speed, int | float)
        or not 0 < speed < 1e9
    ):
        raise DataError(f"{place}: round is a whole number, available true or false, rows_per_second above 0.")
    return {"client": client, "round": round, "available": available, "rows_per_second": float(speed)}
