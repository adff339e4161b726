"""Open questions to ask models: Vicuna's format, or rows of instructions, whose responses are not read.

{"question_id": 7, "category": "writing", "turns": ["Write a letter to ..."]}       Vicuna's
{"instruction": "Write a letter to ...", "category": "writing"}                     a row as for training
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellwether.ask.questions import check_length
from bellwether.data.columns import USUAL_NAMES, find_layout, make_row
from bellwether.data.files import READERS, can_be_read, read_records
from bellwether.data.records import Problems, Record
from bellwether.data.rows import Row
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.words import counted, listed


@dataclass(frozen=True)
class Question:
    """One open question.

    Args:
        name: its ``question_id``, or else the number of its line; no two of a file are equal.
        row: what is asked; for a chat, its last user message after the turns before it.
    """

    name: str
    row: Row

    @property
    def text(self) -> str:
        """The question as one text, with its context, or with the chat before it."""
        if self.row.turns:
            return "\n\n".join(f"{turn.role}: {turn.text}" for turn in self.row.turns[:-1])
        return "\n\n".join(filter(None, (self.row.instruction, self.row.context)))


@dataclass(frozen=True)
class Questions:
    """The questions of a file.

    Args:
        questions: in the order of the file.
        fingerprint: SHA-256 of the file, as 64 hexadecimal digits.
        notes: sentences for the log.
    """

    questions: Sequence[Question]
    fingerprint: str
    notes: Sequence[str]


def read_questions(path: Path) -> Questions:
    """Read the questions of a file.

    Args:
        path: .json, .jsonl, .csv or .parquet.

    Raises:
        DataError: the file is not there or cannot be read, questions of it are bad, or two have the same name.
    """
    if not can_be_read(path) or not path.is_file():
        raise DataError(f"{path}: there is no such file of questions; give one of {', '.join(READERS)}.")
    problems = Problems()
    records = read_records(path, path.name, problems)
    several = sum(isinstance(turns := record.values.get("turns"), list) and len(turns) > 1 for record in records)
    questions = _questions(records, path.name, problems)
    problems.check()
    notes = (
        [f"{path.name}: {counted(several, 'question')} of several turns; only the first is asked."] if several else []
    )
    return Questions(questions, hashlib.sha256(path.read_bytes()).hexdigest(), notes)


def choose(questions: Sequence[Question], categories: Collection[str] = (), limit: int | None = None) -> list[Question]:
    """Return some of the questions, in their order.

    Args:
        questions: all of them.
        categories: those of which questions are taken; none stands for all.
        limit: how many are taken at most, of all categories in turn; None takes all.

    Raises:
        DataError: no question is of one of the categories.
    """
    known = list(dict.fromkeys(question.row.category for question in questions))
    unknown = [category for category in categories if category not in known]
    if unknown:
        raise DataError(f"no question is of the category {unknown[0]!r}; there are {', '.join(map(repr, known))}.")
    wanted = [category for category in known if not categories or category in categories]
    columns = [[question for question in questions if question.row.category == category] for category in wanted]
    in_turn = [question for rank in itertools.zip_longest(*columns) for question in rank if question is not None]
    taken = {question.name for question in in_turn[:limit]}
    return [question for question in questions if question.name in taken]


def _questions(records: Sequence[Record], name: str, problems: Problems) -> list[Question]:
    """Return the questions in records; what is wrong with single ones goes to ``problems``."""
    values = [_instruction(record.values) for record in records]
    columns = tuple(dict.fromkeys(column for one in values for column in one))
    if not set(columns) & {*USUAL_NAMES["instruction"], *USUAL_NAMES["messages"]}:
        raise DataError(
            f"{name}: no column holds questions (there are {listed(columns) or 'none'}); call it instruction, "
            "or give Vicuna's format, with question_id and turns."
        )
    layout = find_layout(columns, recipe.Columns(), None, name, (), answered=False)
    questions: dict[str, Question] = {}
    for record, one in zip(records, values, strict=True):
        place, number = f"{name}:{record.line}", str(one.get("question_id", record.line))
        try:
            question = Question(number, make_row(one, layout, place))
            check_length(question.text, "question")
        except DataError as error:
            problems.add(place, str(error))
            continue
        if number in questions:
            problems.add(place, f"question_id {number!r} stands at {questions[number].row.place} too; give another.")
        questions[number] = question
    return list(questions.values())


def _instruction(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with Vicuna's ``turns``, or ``text`` in its older form, as an instruction."""
    if "question_id" in values and "instruction" not in values:
        turns = values.get("turns")
        if isinstance(turns, list) and turns:
            return {**values, "instruction": turns[0]}
        if "text" in values:
            return {**values, "instruction": values["text"]}
    return dict(values)
