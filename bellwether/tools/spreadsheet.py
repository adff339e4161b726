r"""Tables as CSV that are safe to open in a spreadsheet.

A spreadsheet takes a cell that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break for a formula, which may
load something from elsewhere or start a program. Names of clients and categories come from other people's files, so
such texts get an apostrophe in front; numbers stay numbers. Where the list separator is ``;`` or a tab, commas divide
nothing and quotes within a cell hold nothing together, so that a cell may also begin within a text, behind such a
separator or a line break; there an apostrophe stands too.

Nor may such a text steer the terminal that shows the file, or turn a line around: control and formatting characters
stand as their escapes, such as ``\x1b``, but for line feeds, tabs, and the joiners that some scripts need.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# The wide forms are what some spreadsheets take for the narrow ones.
_SIGNS = r"=+\-@＝＋－＠"
# Where a cell may begin with a formula: in front of the text, and behind what divides cells or lines elsewhere. Blanks
# and quotes in between are passed over, since a spreadsheet may drop them.
_FORMULA = re.compile(rf'\A(?=[\t\n{_SIGNS}])|(?<=[;\t\n])(?=([^\S\t\n]|")*[{_SIGNS}])')
# What a terminal or a reader of lines obeys instead of showing it.
_HIDDEN, _KEPT = ("Cc", "Cf", "Cs", "Zl", "Zp"), "\n\t\u200c\u200d"
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def csv_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a table as CSV in UTF-8, whose texts compute and steer nothing; all line breaks become line feeds.

    Args:
        heads: the names of the columns.
        rows: one sequence of texts and numbers per line; None makes an empty cell. Numbers that are not finite stand
            as the texts ``NaN``, ``Infinity`` and ``-Infinity``.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in (heads, *rows))
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """Return a value as the writer shall write it."""
    if isinstance(value, str):
        value = "".join(map(_shown, value.replace("\r\n", "\n").replace("\r", "\n")))  # which the writer does not quote
        return value if _NUMBER.fullmatch(value) else _FORMULA.sub("'", value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _shown(mark: str) -> str:
    """Return a character, or its escape where it would act instead of being seen."""
    hidden = unicodedata.category(mark) in _HIDDEN and mark not in _KEPT
    return mark.encode("unicode_escape").decode() if hidden else mark
