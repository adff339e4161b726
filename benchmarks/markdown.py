"""Pieces of the tables of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Measured = Mapping[str, Any]


def where(measured: Measured) -> str:
    """Return the machine, the day, the versions and what else it did, in a sentence or two."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items() if version)
    beside = f" Measured beside {measured['beside']}." if "beside" in measured else ""
    tiny = "**A tiny setting to try the code: no measurement.** " if measured["quick"] else ""
    return (
        f"{tiny}{measured['processor']} ({measured['cores']} cores, {', '.join(measured['flags'])}), "
        f"{measured['system']}, Python {measured['python']}, {versions}; {measured['date']}, commit "
        f"{measured['commit']}.{beside}"
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
