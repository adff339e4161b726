"""The folder of a judgement: what it is about, the answers, and every reply of the judge, kept the moment it comes.

judgement.json   what is judged by whom: hashes of questions and models, the judge and its address
answers.jsonl    one line per model and question
verdicts.jsonl   one line per reply of the judge, word for word
result.json, result.md
.lock, .owner    held by the process that writes here
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from bellwether.ask.answerers import Answerer
from bellwether.ask.judge_api import Judge, JudgeReply
from bellwether.ask.judging import PROMPT, REMINDER, Verdict
from bellwether.errors import CheckpointError
from bellwether.model.folder import find_folder, weights_digest
from bellwether.tools import journal
from bellwether.tools.atomic import write_atomic
from bellwether.tools.json_text import KEPT, Count, Truth, from_json, reading, typed
from bellwether.tools.lock import held

JUDGEMENT = "judgement.json"
ANSWERS = "answers.jsonl"
VERDICTS = "verdicts.jsonl"
A, B = "A", "B"

Score = Annotated[float, Field(strict=True, ge=1, le=10)]
Line = TypeVar("Line")
Facts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Attempt:
    """One reply of the judge.

    Args:
        question: name of the question.
        swapped: whether the answer of B was shown first.
        repeat: counted from 1.
        attempt: counted from 1; another follows where the reply cannot be read.
        scores: of A and of B; None where the reply cannot be read.
        reply: as it came, with the tokens that it took.
    """

    __pydantic_config__ = KEPT

    question: str
    swapped: Truth
    repeat: Count
    attempt: Count
    scores: tuple[Score, Score] | None
    reply: JudgeReply


@dataclass
class JudgeFolder:
    """What the folder of a judgement holds, and what is added to it.

    Args:
        path: the folder.
        answers: answer by model, A or B, and name of the question.
        attempts: all replies of the judge.
    """

    path: Path
    answers: dict[tuple[str, str], str]
    attempts: list[Attempt]

    def keep_answer(self, model: str, question: str, text: str) -> None:
        """Keep a model's answer to a question."""
        journal.append(self.path / ANSWERS, {"model": model, "question": question, "answer": text})
        self.answers[model, question] = text

    def keep_attempt(self, attempt: Attempt) -> None:
        """Keep a reply of the judge."""
        journal.append(self.path / VERDICTS, attempt)
        self.attempts.append(attempt)


@contextlib.contextmanager
def claimed(path: Path, facts: Facts) -> Iterator[JudgeFolder]:
    """Hold a folder as the one of this judgement, and give what it holds already.

    Args:
        path: made if it does not exist.
        facts: of ``facts_of``: what the judgement rests on.

    Raises:
        CheckpointError: the folder holds something else or is in use, or cannot be written or read.
    """
    with held(path, JUDGEMENT):
        _keep_facts(path, facts)
        answers = journal.read(path / ANSWERS, lambda line: _of_line(line, _Answered))
        attempts = journal.read(path / VERDICTS, lambda line: _of_line(line, Attempt))
        yield JudgeFolder(path, {(one.model, one.question): one.answer for one in answers}, attempts)


def facts_of(questions: str, answerers: Mapping[str, Answerer], judge: Judge | None, max_new_tokens: int) -> Facts:
    """Return what the answers of a judgement rest on, and what its verdicts do, by the names of their files.

    Args:
        questions: fingerprint of the file of questions.
        answerers: the two models, as A and B.
        judge: who judges; None where nobody does yet.
        max_new_tokens: tokens after which an answer ends.
    """
    answers: dict[str, Any] = {"questions": questions, "max_new_tokens": max_new_tokens}
    models = {one.recipe.model for one in answerers.values()}
    hashes = {model: weights_digest(find_folder(model), model) for model in models}
    for name, one in answerers.items():
        model = one.recipe.model
        answers[f"base model of {name}"] = hashes[model]
        answers[f"precision of {name}"] = f"{model.dtype}, quantization {model.quantization}"
        answers[f"template of {name}"] = one.recipe.data.template
        answers[f"adapter of {name}"] = one.adapter.fingerprint() if one.adapter else None
    if judge is None:
        return {ANSWERS: answers}
    request = hashlib.sha256((PROMPT + REMINDER).encode()).hexdigest()
    asked = {"judge": judge.model, "address": judge.address, "temperature": judge.temperature, "request": request}
    return {ANSWERS: answers, VERDICTS: asked}


def verdicts(attempts: Sequence[Attempt]) -> list[Verdict]:
    """Return the verdict of the last attempt for each question, order and repeat."""
    last = {(one.question, one.swapped, one.repeat): one for one in attempts}
    return [Verdict(one.question, one.swapped, one.repeat, one.scores) for one in last.values()]


def _keep_facts(path: Path, facts: Facts) -> None:
    """Write what a judgement rests on; what the folder holds already must rest on the same."""
    file, kept = path / JUDGEMENT, dict[str, Any]()
    with reading(file, "restore it, or give another folder with --out"):
        if file.exists():
            kept = typed(from_json(file.read_bytes()), dict[str, dict[str, Any]])
        begun = [part for part in facts if (path / part).exists()]
        lacking = [part for part in begun if not kept.get(part, {}).keys() >= facts[part].keys()]
        if lacking:
            raise ValueError(f"it does not say all that {lacking[0]} rests on")
    changed = [fact for part in begun for fact, value in facts[part].items() if kept[part][fact] != value]
    if changed:
        raise CheckpointError(
            f"{path} holds a judgement with another {' and another '.join(changed)}; undo the change, or give another "
            "folder with --out."
        )
    # A judge's verdicts rest on the judge, also where answers alone are asked for now.
    if kept != {**kept, **facts}:
        write_atomic(file, (json.dumps({**kept, **facts}, indent=1) + "\n").encode())


@dataclass(frozen=True)
class _Answered:
    """A line of answers.jsonl."""

    __pydantic_config__ = KEPT

    model: Literal["A", "B"]
    question: str
    answer: str


def _of_line(line: Any, kind: type[Line]) -> Line:
    """Return what a line of a file stands for."""
    found: Line = typed(line, kind)
    return found
