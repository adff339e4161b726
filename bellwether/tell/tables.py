"""Tables for terminals and in Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bellwether.tools.words import clean

if TYPE_CHECKING:
    from rich.table import Table


def rich_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, ascii_only: bool = False) -> Table:
    """Return a table for the terminal, in which nothing is taken for markup.

    Args:
        title: stands above it.
        heads: of the columns.
        rows: as many cells each.
        ascii_only: whether the terminal shows ASCII alone.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Text(clean(title, ascii_only))
    table = Table(title=shown, box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD, title_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell, ascii_only)) for cell in row))
    return table


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    escaped = [[_escaped(cell) for cell in row] for row in (heads, ["---"] * len(heads), *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def _escaped(cell: str) -> str:
    """Return a cell in which nothing is taken for markup, nor for the end of the cell or its line."""
    return html.escape(clean(cell), quote=False).replace("\\", "\\\\").replace("|", "\\|")
