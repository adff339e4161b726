"""The answers of tuned models to open questions, greedily generated over one resident base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from bellwether.ask.answerers import Answerer
from bellwether.ask.question_files import Question
from bellwether.data.encoding import prompt_ids
from bellwether.data.prompts import check_plain, end_of_turn, resolve_template, row_prompt
from bellwether.errors import DataError
from bellwether.tools.progress import within
from bellwether.tools.words import counted

if TYPE_CHECKING:
    from bellwether.exchange.adapter import Adapter
    from bellwether.model.base import Base

Keep = Callable[[str, Question, str], None]


def answer(
    answerers: Mapping[str, Answerer], wanted: Mapping[str, Sequence[Question]], max_new_tokens: int, keep: Keep
) -> None:
    """Let models answer questions; a base that several of them share is loaded once.

    Args:
        answerers: by name.
        wanted: what each of them is still to answer, by the same names.
        max_new_tokens: tokens after which an answer ends.
        keep: is given name, question and answer, batch by batch.

    Raises:
        DataError: a question does not fit into a model, or writes out a special token of it.
        ModelError: a base cannot be loaded, or an adapter does not fit it.
    """
    from bellwether.model.base import load_base

    busy = [name for name, questions in wanted.items() if questions]
    for settings in dict.fromkeys(answerers[name].recipe.model for name in busy):
        over_it = {name: answerers[name] for name in busy if answerers[name].recipe.model == settings}
        _answer_over(load_base(settings), over_it, wanted, max_new_tokens, keep)


def _answer_over(
    base: Base,
    answerers: Mapping[str, Answerer],
    wanted: Mapping[str, Sequence[Question]],
    max_new_tokens: int,
    keep: Keep,
) -> None:
    """Let models of one base answer; a function of its own, so that the base is gone before another is loaded."""
    for name, answerer in answerers.items():
        answered = list[str]()
        with tuned(base, answerer.adapter), within(answered, len(wanted[name]), f"answers of {name}"):
            for question, text in _answers(base, answerer, wanted[name], max_new_tokens):
                keep(name, question, text)
                answered.append(question.name)


@contextlib.contextmanager
def tuned(base: Base, adapter: Adapter | None) -> Iterator[None]:
    """Let an adapter stand over a base.

    Args:
        base: the resident base.
        adapter: None leaves it untuned.
    """
    if adapter is None:
        yield
        return
    from bellwether.model.lora import LoraLayers

    layers = LoraLayers(base.model, adapter.config)
    try:
        layers.load(0, adapter.tensors)
        yield
    finally:
        layers.detach()


def _answers(
    base: Base, answerer: Answerer, questions: Sequence[Question], max_new_tokens: int
) -> Iterator[tuple[Question, str]]:
    """Yield questions with their answers, batch by batch, longest prompts first."""
    from bellwether.model.generate import answer_text, generate

    recipe, tokenizer = answerer.recipe, base.tokenizer
    template = resolve_template(recipe.data, tokenizer)
    check_plain([question.row for question in questions], tokenizer, template)
    texts = [row_prompt(one.row, template, tokenizer) for one in questions]
    prompts = {
        one.name: ids_T.tolist() for one, ids_T in zip(questions, prompt_ids(texts, tokenizer, template), strict=True)
    }
    _check_lengths(base, questions, prompts)
    # Sorted before they are cut into batches, so that each holds prompts of like length.
    ordered = sorted(questions, key=lambda one: -len(prompts[one.name]))
    stop, size = end_of_turn(template, tokenizer), recipe.evaluation.batch_size
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        for one, ids in zip(
            batch, generate(base, [prompts[one.name] for one in batch], max_new_tokens, size, stop=stop), strict=True
        ):
            yield one, answer_text(ids, tokenizer, stop)


def _check_lengths(base: Base, questions: Sequence[Question], prompts: Mapping[str, Sequence[int]]) -> None:
    """Refuse questions that leave a model no room for an answer."""
    limit = base.facts.max_positions
    for question in questions:
        length = len(prompts[question.name])
        if limit is not None and length > limit:
            raise DataError(
                f"{question.row.place}: this question takes {counted(length, 'token')}, but {base.name} has "
                f"{limit} positions; "
                "leave it out."
            )
