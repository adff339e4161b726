"""What is asked, and how answers shall be made; both come from a person, and are checked.

question = make_question("Name three colours.")
check_settings(AnswerSettings(temperature=0.7))
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from bellwether.data.rows import Row
from bellwether.errors import DataError, RecipeError

LONGEST_QUESTION = 1_000_000  # characters of an instruction, and of its context


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        instruction: the instruction.
        context: text that it speaks of; may be empty.
        reference: the answer that the data gives, where the question is one of its rows; else empty.
    """

    instruction: str
    context: str = ""
    reference: str = ""


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made.

    Args:
        temperature: the logits are divided by it before a token is drawn; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability can be drawn; 1 leaves all.
        max_new_tokens: tokens after which an answer is cut.
        seed: what is drawn derives from it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


def make_question(instruction: str, context: str = "", row: Row | None = None) -> Question:
    """Return what somebody asks, checked and without white space around it.

    Args:
        instruction: as it was typed.
        context: as it was typed; may be empty.
        row: a row of the data, which is asked as it stands if it is what was typed.

    Raises:
        DataError: the instruction is empty, or a text is too long or holds a control character.
    """
    instruction, context = _plain(instruction, "instruction"), _plain(context, "context")
    if not instruction:
        raise DataError("the instruction is empty; write what the models shall do.")
    if row is not None and (instruction, context) == (row.instruction.strip(), row.context.strip()):
        return Question(row.instruction, row.context, row.response)
    return Question(instruction, context)


def _plain(text: str, what: str) -> str:
    """Return a text without white space around it, once it is known to hold no control characters but line breaks."""
    check_length(text, what)
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    for mark in text:
        if unicodedata.category(mark) in ("Cc", "Cs") and mark not in "\n\t":
            raise DataError(f"the {what} holds the control character U+{ord(mark):04X}; remove it.")
    return text


def check_length(text: str, what: str) -> None:
    """Check that a text can be put to a model at all, before it is tokenised.

    Args:
        text: the text.
        what: how messages call it.

    Raises:
        DataError: it is too long.
    """
    if len(text) > LONGEST_QUESTION:
        raise DataError(f"the {what} has {len(text):,} characters; give at most {LONGEST_QUESTION:,}.")


def check_settings(settings: AnswerSettings) -> None:
    """Check that settings make sense.

    Raises:
        RecipeError: one is out of its range.
    """
    if not 0 <= settings.temperature <= 100:
        raise RecipeError(f"temperature is {settings.temperature:g}; give a number from 0 (greedy) to 100.")
    if not 0 < settings.top_p <= 1:
        raise RecipeError(f"top-p is {settings.top_p:g}; give a number above 0 and at most 1.")
    if settings.max_new_tokens < 1:
        raise RecipeError(f"max-new-tokens is {settings.max_new_tokens}; give at least 1.")
    if not 0 <= settings.seed < 2**63:
        raise RecipeError(f"seed is {settings.seed}; give a whole number from 0 to 2^63 - 1.")


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Check that somebody is asked, and only who is here.

    Raises:
        RecipeError: nobody is asked, or somebody who is not here.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RecipeError(f"nobody here is called {unknown[0]!r}; there are {', '.join(map(repr, known))}.")
    if not names:
        raise RecipeError("nobody is asked; choose who shall answer.")
