"""The parts of a page: sections with figures, tables, texts and answers, as the template takes them.

Texts that come from data or models are plain ``str``: the template escapes them and shows their control characters.
What is ``Markup`` was made here, of literal markup around escaped texts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from markupsafe import Markup

if TYPE_CHECKING:
    from bellwether.report.page.draw import Chart

# Joiners, without which some scripts and emoji cannot be written.
_KEPT = {"\n", "\t", "\u200c", "\u200d"}
# Control and format characters, halves of characters, separators of lines.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: what it shows.
        number: whether it stands at the right, like its column's other numbers.
        heat: how dark its ground is, 0..9; None leaves it as it is.
    """

    text: str
    number: bool = True
    heat: int | None = None


@dataclass(frozen=True)
class Figure:
    """A chart with its title and a note below; a wide one takes the whole width of the page."""

    kind: ClassVar[str] = "figure"
    title: str
    chart: Chart
    note: str | Markup = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table, whose first column names its lines; a folded one is opened by a click, and in print."""

    kind: ClassVar[str] = "table"
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str | Markup = ""
    folded: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str | Markup


@dataclass(frozen=True)
class Code:
    """A text of many lines in a fixed pitch, folded."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Exchange:
    """A question with the answers of several models.

    Args:
        category: of the question.
        instruction: what was asked.
        context: what belongs to it; may be empty.
        reference: the answer that is wanted.
        answers: name of the model, its answer, and whether it equals the reference.
    """

    kind: ClassVar[str] = "exchange"
    category: str
    instruction: str
    context: str
    reference: str
    answers: Sequence[tuple[str, str, bool]]


Part = Figure | Table | Text | Code | Exchange


@dataclass(frozen=True)
class Section:
    """A part of a page that its table of contents names.

    Args:
        key: its anchor.
        title: its heading.
        parts: what is in it.
        lead: a sentence that says what is to be seen.
    """

    key: str
    title: str
    parts: Sequence[Part]
    lead: str | Markup = ""


@dataclass(frozen=True)
class Tile:
    """One figure that stands out: its name, its value, and a line below."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Args:
        kind: what it reports on, ``run``, ``comparison`` or ``site``.
        name: of the recipe, or of the site.
        summary: what was run, in one paragraph.
        result: what came out, in one sentence with its uncertainty.
        tiles: the figures that stand out.
        sections: everything else.
    """

    kind: str
    name: str
    summary: Markup
    result: Markup
    tiles: Sequence[Tile]
    sections: Sequence[Section]


def visible(text: str) -> str:
    """Return a text in which characters that are not seen, but act, are seen and do not act.

    Control characters, marks of writing direction and other format characters, halves of characters and
    noncharacters become their numbers, such as ‹U+001B›, which any font can show. Line breaks and tabs stay.
    """
    text = text.replace("\r\n", "\n")
    if text.isprintable():
        return text
    return "".join(_shown(mark) for mark in text)


def _shown(mark: str) -> str:
    """Return one character as ``visible`` shows it."""
    code = ord(mark)
    noncharacter = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    if mark in _KEPT or not (noncharacter or unicodedata.category(mark) in _HIDDEN):
        return mark
    return f"‹U+{code:04X}›"


def one_line(text: str, longest: int = 60) -> str:
    """Return a text on one line for a label, its hidden characters shown, cut where it is too long."""
    text = " ".join(visible(text).split()) or "(none)"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def named(text: str, longest: int = 80) -> Markup:
    """Return a name from elsewhere for a sentence: escaped, and its writing direction kept to itself."""
    return Markup("<bdi>{}</bdi>").format(one_line(text, longest))


def words(text: str) -> Cell:
    """Return a cell that holds words."""
    return Cell(text, number=False)
