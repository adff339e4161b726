"""Talking to what was tuned: one question, answered side by side by the untuned base and by adapters over it.

    talk = open_talk(Path("runs/default-1"))
    for answers in talk.answer(make_question("Name three colours."), talk.names, AnswerSettings()):
        print([answer.text for answer in answers])

The base is loaded once. Those who are asked stand in the slots of one set of LoRA layers, the base as a slot
of zeros, and answer in one batch. Instruction tuning is single turn, so every question stands alone.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bellwether.ask.answerers import BASE, FEDERATED, Answerer, find_answerers, moved
from bellwether.ask.questions import AnswerSettings, Question, check_names, check_settings, make_question
from bellwether.data.encoding import prompt_ids
from bellwether.data.federated import load_federated
from bellwether.data.prompts import Template, end_of_turn, resolve_template, written_special
from bellwether.data.prompts import prompt as render_prompt
from bellwether.data.rows import Row
from bellwether.errors import BellwetherError, DataError, first_line
from bellwether.exchange.adapter import Adapter, side_by_side
from bellwether.model.base import Base, load_base
from bellwether.model.generate import Sampling, answer_text, ended_by_text, generate
from bellwether.model.lora import LoraLayers
from bellwether.recipe.recipe import Recipe
from bellwether.store.checkpoint import RECIPE
from bellwether.tools.randomness import Randomness
from bellwether.tools.version import VERSION
from bellwether.tools.words import counted

# Answers that stand side by side at first, and examples of each category.
SHOWN, EXAMPLES = 4, 3


@dataclass(frozen=True)
class Answer:
    """What one of those who are asked has said so far.

    Args:
        name: who.
        text: what.
        tokens: how many tokens that took.
        ended: whether it came to its end, and was neither cut nor stopped.
    """

    name: str
    text: str = ""
    tokens: int = 0
    ended: bool = False


def tokens_said(answer: Answer) -> str:
    """Return how long a finished answer is, and whether it came to its end by itself.

    Args:
        answer: the answer.
    """
    return f"{counted(answer.tokens, 'token')}{'' if answer.ended else ', cut'}"


@dataclass(frozen=True)
class Exchange:
    """A question with its answers.

    Args:
        question: what was asked.
        settings: how the answers were made.
        answers: of those who were asked, in their order.
    """

    question: Question
    settings: AnswerSettings
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Talk:
    """A resident base, and those who answer over it.

    Args:
        folder: where the adapters come from.
        base: the base model.
        answerers: who can be asked, by name.
        templates: how each one's prompts are made.
        notes: sentences for whoever asks.
    """

    folder: Path
    base: Base
    answerers: dict[str, Answerer]
    templates: dict[str, Template]
    notes: Sequence[str] = ()
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def names(self) -> list[str]:
        """The names of all who can be asked."""
        return list(self.answerers)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the untuned base."""
        return self.answerers[BASE].recipe

    @property
    def base_name(self) -> str:
        """The base's name in short: of a folder, its last part."""
        path = Path(self.recipe.model.path)
        return path.name if path.is_absolute() else str(path)

    def answer(self, question: Question, names: Sequence[str], settings: AnswerSettings) -> Generator[list[Answer]]:
        """Ask, and yield what each has said so far, in the order of the names, until all have ended.

        One question is answered at a time; others wait. Closing the iterator stops the answers.

        Args:
            question: as ``make_question`` returns it.
            names: who shall answer.
            settings: how.

        Raises:
            RecipeError: nobody of that name is here, or a setting is out of its range.
            DataError: the question cannot be put to the base.
        """
        check_settings(settings)
        check_names(names, self.names)
        prompts = [self.prompt(name, question) for name in names]
        return self._listen(names, prompts, settings)

    def prompt(self, name: str, question: Question) -> list[int]:
        """Return the ids of the prompt that somebody gets, made as in training.

        Args:
            name: who.
            question: what is asked.

        Raises:
            DataError: the question writes out a special token, is too long, or does not fit the chat template.
        """
        tokenizer, template, limit = self.base.tokenizer, self.templates[name], self.base.facts.max_positions
        special = written_special([question.instruction, question.context], tokenizer, template)
        if special is not None:
            raise DataError(f"the question has {special!r}, which the tokenizer takes for a special token; change it.")
        text = render_prompt(question.instruction, question.context, template, tokenizer)
        ids: list[int] = prompt_ids([text], tokenizer, template)[0].tolist()
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"the question takes {counted(len(ids), 'token')} with its prompt, but {self.base.name} has "
                f"{limit} positions; "
                "shorten the instruction or its context."
            )
        return ids

    def _listen(
        self, names: Sequence[str], prompts: Sequence[Sequence[int]], settings: AnswerSettings
    ) -> Generator[list[Answer]]:
        """Let a thread generate, and yield the answers whenever there is more of them."""
        steps, stopped = queue.SimpleQueue[_Step | BaseException | None](), threading.Event()
        tokenizer = self.base.tokenizer
        said = [_Said(name, tokenizer, end_of_turn(self.templates[name], tokenizer)) for name in names]
        work = (names, prompts, settings, steps, stopped)
        thread = threading.Thread(target=self._speak, args=work, daemon=True)
        thread.start()
        try:
            going_on = True
            while going_on:
                # Whoever listens more slowly than the model speaks hears several tokens at once.
                for step in [steps.get(), *_waiting(steps)]:
                    if isinstance(step, BaseException):
                        raise step
                    going_on = step is not None
                    for number, token in (step or {}).items():
                        said[number].take(token)
                yield [one.answer(final=not going_on) for one in said]
        finally:
            stopped.set()
            thread.join()  # a thread that is still within torch when the program ends would abort it

    def _speak(
        self,
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        settings: AnswerSettings,
        steps: queue.SimpleQueue[_Step | BaseException | None],
        stopped: threading.Event,
    ) -> None:
        """Generate all answers and hand over each step; one batch for each template, which decides what ends one."""
        drawn = Sampling(settings.temperature, settings.top_p, settings.seed) if settings.temperature else None
        try:
            with self._turn:
                for template in dict.fromkeys(self.templates[name] for name in names):
                    numbers = [number for number, name in enumerate(names) if self.templates[name] == template]
                    adapters = [self.answerers[names[number]].adapter for number in numbers]
                    with _attached(self.base, adapters) as layers:
                        generate(
                            self.base,
                            [prompts[number] for number in numbers],
                            settings.max_new_tokens,
                            len(numbers),
                            layers=layers,
                            slots=range(len(numbers)) if layers else None,
                            stop=end_of_turn(template, self.base.tokenizer),
                            sampling=drawn,
                            on_step=_handing_over(numbers, steps, stopped),
                        )
            steps.put(None)
        except _Stopped:
            steps.put(None)
        except BaseException as error:  # told to whoever listens
            steps.put(error)


# The new token of each answer by its number; None where it has ended.
_Step = dict[int, int | None]


class _Stopped(Exception):
    """Nobody listens any more."""


class _Said:
    """What one of those who are asked has said so far, as tokens."""

    def __init__(self, name: str, tokenizer: Any, stop: Sequence[int | str]) -> None:
        self._name, self._tokenizer, self._stop = name, tokenizer, stop
        self._ids: list[int] = []
        self._ended = False

    def take(self, token: int | None) -> None:
        """Take the next token, or the end."""
        if token is None:
            self._ended = True
        else:
            self._ids.append(token)

    def answer(self, final: bool) -> Answer:
        """Return it as text."""
        going_on = not final and not self._ended
        text = answer_text(self._ids, self._tokenizer, self._stop, going_on=going_on)
        ended = self._ended or ended_by_text(self._ids, self._tokenizer, self._stop)
        return Answer(self._name, text, len(self._ids), ended)


def _handing_over(
    numbers: Sequence[int], steps: queue.SimpleQueue[_Step | BaseException | None], stopped: threading.Event
) -> Callable[[Mapping[int, int]], None]:
    """Return what hands over the steps of some of the answers."""

    def on_step(tokens: Mapping[int, int]) -> None:
        if stopped.is_set():
            raise _Stopped
        steps.put({number: tokens.get(row) for row, number in enumerate(numbers)})

    return on_step


def _waiting(steps: queue.SimpleQueue[_Step | BaseException | None]) -> Iterator[_Step | BaseException | None]:
    """Yield what stands in a queue, without waiting for more."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield steps.get_nowait()


@contextlib.contextmanager
def _attached(base: Base, adapters: Sequence[Adapter | None]) -> Iterator[LoraLayers | None]:
    """Yield LoRA layers over the base with the adapters in their slots; None where there is nothing but the base."""
    if all(adapter is None for adapter in adapters):
        yield None
        return
    config, tensors = side_by_side(adapters)
    layers = LoraLayers(base.model, config, len(adapters))
    try:
        for slot, values in enumerate(tensors):
            layers.load(slot, values)
        yield layers
    finally:
        layers.detach()


# Opening ------------------------------------------------------------------------------------------


def open_talk(folder: Path, *, seed: int | None = None, model: str | None = None, device: str | None = None) -> Talk:
    """Load the base of a folder once, with everybody who can be asked over it.

    Args:
        folder: of a finished run or comparison, of an adapter, or of a model.
        seed: of a comparison, the seed whose adapters are meant; None takes the first.
        model: path or hub name of the base; None takes the one that the folder names.
        device: where the base shall be; None takes what the recipe says.

    Raises:
        BellwetherError: the folder holds nothing that can be asked, or the base or an adapter cannot be used.
    """
    found = find_answerers(folder, seed=seed, model=model)
    if device is not None:
        found = [moved(one, device=device) for one in found]
    settings = found[0].recipe.model
    kept = [one for one in found if one.recipe.model == settings]
    gone = [one.name for one in found if one.recipe.model != settings]
    notes = [f"Left out, since they stand over another base or load it otherwise: {', '.join(gone)}."] if gone else []
    base = load_base(settings)
    for one in kept:
        with _attached(base, [one.adapter]):  # whatever does not fit is found now
            pass
    templates = {one.name: resolve_template(one.recipe.data, base.tokenizer) for one in kept}
    return Talk(folder, base, {one.name: one for one in kept}, templates, notes)


def first_asked(found: Iterable[Answerer]) -> list[str]:
    """Return the names of those who answer at first: one of each arm, the federated one among them, four at most.

    Args:
        found: all who can be asked.
    """
    arms: dict[str, str] = {}
    for one in found:
        arms.setdefault(one.arm or one.name, one.name)
    chosen = list(arms.values())
    must = [name for name in (BASE, FEDERATED) if name in chosen]
    others = [name for name in chosen if name not in must]
    return [name for name in chosen if name in (*must, *others[: SHOWN - len(must)])]


# Examples -----------------------------------------------------------------------------------------


def find_examples(talk: Talk) -> tuple[list[Row], str]:
    """Return held-out rows to ask, a few of each category, and a sentence that says why there are none, if so.

    Args:
        talk: says which recipe's rows; an adapter or a model alone names none.
    """
    recipe = talk.recipe
    if not (talk.folder / RECIPE).is_file():
        return [], f"There are no examples, since {talk.folder} does not name the data."
    try:
        federated = load_federated(recipe.data, recipe.partition, Randomness(recipe.seed))
    except (BellwetherError, OSError) as error:
        return [], f"There are no examples, since the data cannot be read: {first_line(error)}."
    held_out = federated.test if recipe.evaluation.part == "test" else federated.validation
    chosen: dict[str, list[Row]] = {}
    for row in held_out:
        if len(rows := chosen.setdefault(row.category, [])) < EXAMPLES and _can_be_asked(row, talk):
            rows.append(row)
    rows = [row for category in sorted(chosen) for row in chosen[category]]
    return rows, "" if rows else "There are no examples, since no rows are held out that can be asked."


def _can_be_asked(row: Row, talk: Talk) -> bool:
    """Return whether a row is a single question that the base can take."""
    try:
        make_question(row.instruction, row.context)
        talk.prompt(BASE, Question(row.instruction, row.context))
    except DataError:
        return False
    return len(row.turns) <= 2


# Keeping ------------------------------------------------------------------------------------------


def conversation(talk: Talk, exchanges: Sequence[Exchange]) -> str:
    """Return what was asked and answered as JSON.

    Args:
        talk: who answered.
        exchanges: in their order.
    """
    asked = {answer.name for exchange in exchanges for answer in exchange.answers}
    kept = {
        "made_by": f"bellwether {VERSION}",
        "folder": str(talk.folder),
        "base": {"name": talk.base.name, "sha256": talk.base.fingerprint},
        "templates": {
            name: "alpaca" if talk.templates[name] is None else "chat" for name in talk.names if name in asked
        },
        "exchanges": [asdict(exchange) for exchange in exchanges],
    }
    return json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
