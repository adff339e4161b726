"""A language model judges the answers of two models to open questions, as FedIT does with GPT-4.

    bellwether judge table:local,client-03 table:federated --questions FILE --judge MODEL

Both models answer every question once, greedily, with the prompt template of their training; the judge sees each pair
of answers in both orders. Answers and replies are kept the moment they come, and the same command goes on with the
rest. ``evaluate/judging.py`` says what the judge is asked, and how this differs from the paper's evaluation.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bellwether.ask.answerers import Answerer, moved
from bellwether.ask.answers import answer
from bellwether.ask.judge_api import Judge, JudgeReply, ask, check, connect
from bellwether.ask.judge_folder import A, Attempt, B, JudgeFolder, claimed, facts_of, verdicts
from bellwether.ask.judging import Scores, Tally, judge_prompt, parse_scores, tally
from bellwether.ask.question_files import Question, choose, read_questions
from bellwether.errors import JudgeRefused
from bellwether.exchange.records import Note, Watcher
from bellwether.tools.progress import listening
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted

if TYPE_CHECKING:
    import openai

ATTEMPTS = 3  # replies for one verdict, of which the first that can be read counts
SEED = 0  # of the intervals' resamples


@dataclass(frozen=True)
class JudgeSettings:
    """How models are judged.

    Args:
        judge: who judges; None where answers alone are wanted (``keep_answers``).
        repeats: verdicts on each pair of answers in each order.
        categories: those of which questions are taken; none stands for all.
        limit: how many questions are taken at most, of all categories in turn; None takes all.
        max_new_tokens: tokens after which an answer ends.
        jobs: requests to the judge side by side.
        device: where models answer; None leaves it to their recipes.
    """

    judge: Judge | None
    repeats: int = 1
    categories: tuple[str, ...] = ()
    limit: int | None = None
    max_new_tokens: int = 512
    jobs: int = 1
    device: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What a judge found.

    Args:
        settings: how models were judged.
        judge: who judged.
        questions: name of the file of questions.
        tally: what the verdicts come to.
        judges: names of the judge as its server says them.
        replies: how many replies there were, those that could not be read among them.
        prompt_tokens: tokens of the requests; None where the server did not count all of them.
        reply_tokens: tokens of the replies, thoughts included; None where the server did not count all of them.
    """

    settings: JudgeSettings
    judge: Judge
    questions: str
    tally: Tally
    judges: Sequence[str]
    replies: int
    prompt_tokens: int | None
    reply_tokens: int | None


@dataclass(frozen=True)
class _Place:
    """One verdict that is wanted."""

    question: Question
    swapped: bool
    repeat: int

    @property
    def key(self) -> tuple[str, bool, int]:
        return self.question.name, self.swapped, self.repeat


def judge(
    a: Answerer, b: Answerer, questions: Path, settings: JudgeSettings, folder: Path, *, watch: Watcher | None = None
) -> Judgement:
    """Let a judge score the answers of two models to open questions.

    Args:
        a: the first model, the baseline of the ratio.
        b: the second model.
        questions: file of questions, in Vicuna's format or as rows of instructions.
        settings: how models are judged.
        folder: where everything goes; made if it does not exist; what it holds of this judgement is not done again.
        watch: is told how far it has come; None is silent.

    Raises:
        CheckpointError: the folder holds something else, is in use, or cannot be written.
        DataError: questions cannot be read, or do not fit into a model.
        JudgeError: the judge cannot be asked, or refuses.
        ModelError: a model cannot be loaded.
    """
    watch, judge = watch or (lambda event: None), settings.judge
    assert judge is not None, "answers alone are kept by keep_answers"
    answerers = {A: _on(a, settings.device), B: _on(b, settings.device)}
    chosen, fingerprint = _chosen(questions, settings, watch)
    facts = facts_of(fingerprint, answerers, judge, settings.max_new_tokens)
    with claimed(folder, facts) as kept:
        wanted = _wanted(chosen, settings.repeats)
        missing = _missing(wanted, kept.attempts)
        if missing:
            # First of all: answers take time, and would be of no use without a judge.
            asyncio.run(check(judge))
            with listening(watch):
                _answer(answerers, chosen, settings, kept, watch)
            asyncio.run(_ask_all(missing, judge, settings.jobs, kept, watch))
        keys = {place.key for place in wanted}
        counted = [one for one in kept.attempts if (one.question, one.swapped, one.repeat) in keys]
    categories = {question.name: question.row.category for question in chosen}
    return Judgement(
        settings=settings,
        judge=judge,
        questions=questions.name,
        tally=tally(verdicts(counted), categories, Randomness(SEED).numpy("intervals of a judgement")),
        judges=sorted({one.reply.model for one in counted if one.reply.model}),  # a refusal names none
        replies=len(counted),
        prompt_tokens=_total([one.reply.prompt_tokens for one in counted]),
        reply_tokens=_total([one.reply.reply_tokens for one in counted]),
    )


def keep_answers(
    a: Answerer, b: Answerer, questions: Path, settings: JudgeSettings, folder: Path, *, watch: Watcher | None = None
) -> int:
    """Let two models answer open questions, and keep the answers for a judge who comes later.

    Args:
        a: see ``judge``.
        b: see ``judge``.
        questions: see ``judge``.
        settings: which questions, and how models answer.
        folder: see ``judge``, which goes on with what is kept here.
        watch: see ``judge``.

    Returns:
        How many questions both have answered.

    Raises:
        CheckpointError: see ``judge``.
        DataError: see ``judge``.
        ModelError: see ``judge``.
    """
    watch = watch or (lambda event: None)
    answerers = {A: _on(a, settings.device), B: _on(b, settings.device)}
    chosen, fingerprint = _chosen(questions, settings, watch)
    with claimed(folder, facts_of(fingerprint, answerers, None, settings.max_new_tokens)) as kept, listening(watch):
        _answer(answerers, chosen, settings, kept, watch)
    return len(chosen)


def _chosen(questions: Path, settings: JudgeSettings, watch: Watcher) -> tuple[Sequence[Question], str]:
    """Return the questions that are asked, and the fingerprint of their file."""
    found = read_questions(questions)
    for note in found.notes:
        watch(Note(note))
    return choose(found.questions, settings.categories, settings.limit), found.fingerprint


def _on(answerer: Answerer, device: str | None) -> Answerer:
    """Return an answerer on another device."""
    return answerer if device is None else moved(answerer, device=device)


def _wanted(questions: Sequence[Question], repeats: int) -> list[_Place]:
    """Return all verdicts that are wanted, both orders of a pair of answers one after the other."""
    return [
        _Place(question, swapped, repeat)
        for repeat, question, swapped in itertools.product(range(1, repeats + 1), questions, (False, True))
    ]


def _missing(wanted: Sequence[_Place], attempts: Sequence[Attempt]) -> dict[_Place, int]:
    """Return the verdicts that are still to be asked for, each with the number of replies that could not be read."""
    replies: dict[tuple[str, bool, int], list[Scores | None]] = {}
    for one in attempts:
        replies.setdefault((one.question, one.swapped, one.repeat), []).append(one.scores)
    return {
        place: len(before)
        for place in wanted
        if len(before := replies.get(place.key, [])) < ATTEMPTS and not any(before)
    }


def _answer(
    answerers: Mapping[str, Answerer],
    questions: Sequence[Question],
    settings: JudgeSettings,
    kept: JudgeFolder,
    watch: Watcher,
) -> None:
    """Let both models answer what they have not answered yet."""
    wanted = {
        name: [question for question in questions if (name, question.name) not in kept.answers] for name in answerers
    }
    for name, missing in wanted.items():
        if missing:
            watch(Note(f"{name} answers {len(missing)} of {counted(len(questions), 'question')}."))
    answer(
        answerers,
        wanted,
        settings.max_new_tokens,
        lambda name, question, text: kept.keep_answer(name, question.name, text),
    )


async def _ask_all(missing: Mapping[_Place, int], judge: Judge, jobs: int, kept: JudgeFolder, watch: Watcher) -> None:
    """Ask for all verdicts that are missing, several side by side; the first failure ends it."""
    gate, done = asyncio.Semaphore(jobs), itertools.count(1)
    async with connect(judge) as client:

        async def work(place: _Place) -> None:
            async with gate:
                scores = await _ask(client, place, missing[place], judge, kept)
            watch(Note(_told(place, scores, f"verdict {next(done)} of {len(missing)}")))

        try:
            async with asyncio.TaskGroup() as group:
                for place in missing:
                    group.create_task(work(place))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures


async def _ask(
    client: openai.AsyncOpenAI, place: _Place, before: int, judge: Judge, kept: JudgeFolder
) -> Scores | None:
    """Ask for one verdict until a reply can be read, or there were replies enough; keep every reply."""
    name, swapped = place.question.name, place.swapped
    first, second = (kept.answers[model, name] for model in ((B, A) if swapped else (A, B)))
    for number in range(before + 1, ATTEMPTS + 1):
        try:
            reply = await ask(client, judge, judge_prompt(place.question.text, first, second, reminded=number > 1))
            scores = parse_scores(reply.text)
        except JudgeRefused as refusal:
            if not kept.attempts:  # nothing was ever answered, so all requests may be wrong
                raise
            reply, scores = JudgeReply(refusal.said, model="", prompt_tokens=None, reply_tokens=None), None
        if scores and swapped:
            scores = scores[1], scores[0]
        kept.keep_attempt(Attempt(name, swapped, place.repeat, number, scores, reply))
        if scores:
            return scores
    return None


def _told(place: _Place, scores: Scores | None, count: str) -> str:
    """Return the line that tells of a verdict."""
    order = "B first" if place.swapped else "A first"
    found = f"A {scores[0]:g}, B {scores[1]:g}" if scores else f"no reply of {ATTEMPTS} could be read"
    return f"{count}: question {place.question.name}, {order}: {found}"


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum of counts; None where one is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
