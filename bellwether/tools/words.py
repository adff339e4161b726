"""Texts, seconds and bytes as they are shown to people.

Names of clients and categories come from other people's files, so ``clean`` takes from them what
could move the cursor or turn the line around.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any


def clean(text: str, ascii_only: bool = False) -> str:
    """Return a text on one line, without control, formatting and direction characters."""
    shown = "".join("?" if unicodedata.category(mark) in ("Cc", "Cf", "Cs", "Zl", "Zp") else mark for mark in text)
    return shown.encode("ascii", "backslashreplace").decode() if ascii_only else shown


def clean_lines(text: str, ascii_only: bool = False) -> str:
    """Return a text without such characters, its line breaks kept and its tabs as spaces."""
    return "\n".join(clean(line, ascii_only) for line in text.expandtabs(4).split("\n"))


def listed(names: Collection[str], most: int = 20) -> str:
    """Return names with commas between; of very many or very long ones the beginning, and how many there are more."""
    shown = [name if len(name) <= 80 else f"{name[:80]}..." for name in islice(names, most)]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, as ``1 row`` or ``2,000 rows``.

    Args:
        number: how many there are.
        noun: what there is one of.
        plural: what there are several of; None puts an s behind the noun.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


# Share of letters that two words have in common, in order, where one was probably meant as the other.
_NEAR = 0.75


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant; None where none is really near.

    Near is what differs in case, hyphens and underscores alone, or in the order of its letters; what alone has the
    word as a part, as ``local_epochs`` has ``epochs``; and what shares three quarters of its letters.
    """
    words = list(known)

    def plain(text: str) -> str:
        return re.sub("[-_ ]", "", text.lower())

    same = [one for one in words if sorted(plain(one)) == sorted(plain(word))]
    parts = [one for one in words if word.lower() in re.split("[-_]", one.lower())]
    if same or len(parts) == 1:
        return (same or parts)[0]
    shares = {one: difflib.SequenceMatcher(None, plain(one), plain(word)).ratio() for one in words}
    best = max(words, key=lambda one: shares[one], default=None)
    return best if best is not None and shares[best] >= _NEAR else None


def duration(seconds: float) -> str:
    """Return seconds as ``12 s``, ``3:07`` or ``2:03:07``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def byte_size(count: float) -> str:
    """Return a number of bytes in a unit that fits: B, kB, MB, GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def amount(count: float) -> str:
    """Return a large count in few characters: 950, 12.3 k, 4.56 M, 7.89 G (powers of 1000)."""
    if count < 9999.5:
        return f"{count:,.0f}"
    for unit in ("k", "M"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:,.3g} G"


def cut(text: str, most: int = 80) -> str:
    """Return a text of at most so many characters; of a longer one the beginning and an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut where that is long."""
    return repr(cut(value)) if isinstance(value, str) else cut(repr(value))
