r"""The one place that renders prompts, for training, for evaluation and for serving.

A rendered row is text with the character spans of its responses. Two formats are known: Alpaca's
(Taori et al. 2023), and the chat template that a tokenizer brings along (``bellwether.data.chat``).

    prompt_end
        │
    ...### Response:\n│The answer.│          one span; whoever tokenises it appends the end of sequence
    ...<|assistant|>  │The answer.<|end|>│   a span takes in what ends the turn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bellwether.data.chat import (
    ChatFormat,
    Rendered,
    added_tokens,
    chat_format,
    chat_prompt,
    render_chat,
    special_texts,
)
from bellwether.data.records import Problems
from bellwether.data.rows import Row, Turn
from bellwether.errors import DataError
from bellwether.recipe import recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Alpaca's is None.
Template = ChatFormat | None

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


def resolve_template(settings: recipe.Data, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the format of prompts: ``auto`` takes the tokenizer's chat template where it has one.

    Args:
        settings: ``template``, ``date`` and ``reasoning``.
        tokenizer: may bring a chat template.

    Raises:
        DataError: the chat template is wanted, but the tokenizer has none, or it cannot be rendered.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if settings.template == "chat" and not has_chat:
        raise DataError("data.template is chat, but the tokenizer has no chat template; set it to alpaca or auto.")
    if settings.template == "alpaca" or not has_chat:
        return None
    return chat_format(tokenizer, settings.date, settings.reasoning)


def render(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Return a row as text, with the spans of its responses.

    Raises:
        DataError: the format cannot render the row.
    """
    try:
        return render_unplaced(row, template, tokenizer)
    except DataError as error:
        raise DataError(f"{row.place or 'row'}: {error}") from error


def render_unplaced(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Return what ``render`` does; errors do not name the row's place, for who lists them by it."""
    if template is None:
        return _render_alpaca(row, tokenizer)
    return render_chat(chat_turns(row), tokenizer, template, row.tools)


def prompt(
    instruction: str,
    context: str,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    history: Sequence[Turn] = (),
) -> str:
    """Return the text that generation starts from; equals ``text[:prompt_end]`` of the rendered row.

    Args:
        instruction: what is asked now.
        context: text that the instruction speaks of; may be empty.
        template: a template as ``resolve_template`` returns it.
        tokenizer: brings the chat template and the end of sequence.
        history: earlier turns, maybe with a system message first.
    """
    if template is None:
        return _alpaca_prompt(history, instruction, context, tokenizer)[0]
    return chat_prompt([*history, Turn("user", _user_text(instruction, context))], tokenizer, template)


def row_prompt(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text from which a row's last answer is generated, as ``prompt`` does for a question.

    Raises:
        DataError: the format cannot render the row.
    """
    if template is None or not row.turns:
        return prompt(row.instruction, row.context, template, tokenizer, row.turns[:-2])
    rendered = render(row, template, tokenizer)
    return rendered.text[: rendered.prompt_end]


def chat_turns(row: Row) -> tuple[Turn, ...]:
    """Return a row's messages; a plain instruction becomes a user's message that ends with its context."""
    if row.turns:
        return row.turns
    return Turn("user", _user_text(row.instruction, row.context)), Turn("assistant", row.response)


def check_plain(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Check that no row's own text writes out a special token or a mark of the template, which would become that.

    Args:
        rows: the rows.
        tokenizer: names its special tokens.
        template: names the marks that it writes.

    Raises:
        DataError: rows do; says where, and which token.
    """
    marks, problems = forbidden_marks(tokenizer, template), Problems()
    for row in rows:
        wrong = not_plain(row, marks)
        if wrong:
            problems.add(row.place or "row", wrong)
    problems.check()


def not_plain(row: Row, marks: Sequence[str]) -> str:
    """Return what is wrong with a row that writes out one of the ``forbidden_marks``; nothing where none does."""
    found = _first_written(row_texts(row), marks)
    if found is None:
        return ""
    return (
        f"its text has {found!r}, which the tokenizer takes for a special token; write it otherwise, or remove the row."
    )


def forbidden_marks(tokenizer: PreTrainedTokenizerBase, template: Template) -> Sequence[str]:
    """Return the texts that nobody's own text may write out: special tokens, and the marks of a chat template."""
    return template.marks if template is not None else sorted(special_texts(tokenizer))


def row_texts(row: Row) -> list[str]:
    """Return all texts of a row that its rendering shows."""
    turns = row.turns if row.rejected is None else (*row.turns, row.rejected)
    said = [text for turn in turns for text in (turn.text, turn.reasoning, turn.fields) if text]
    return said + ([row.tools] if row.turns else [row.instruction, row.context, row.response])


def written_special(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: Template) -> str | None:
    """Return a mark that one of the texts writes out, and which it would become; None where there is none."""
    return _first_written(texts, forbidden_marks(tokenizer, template))


def _first_written(texts: Sequence[str], marks: Sequence[str]) -> str | None:
    return next((mark for mark in marks if any(mark in text for text in texts)), None)


def end_of_turn(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int | str]:
    """Return at what generation stops: at end of sequence, and at the template's end of turn.

    Returns:
        Ids of tokens, and texts.
    """
    ends: list[int | str] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for text in () if template is None else dict.fromkeys(filter(None, (template.end, template.last_end))):
        end = _stop_of(text, tokenizer)
        if end not in ends:
            ends.append(end)
    return ends


def _stop_of(end: str, tokenizer: PreTrainedTokenizerBase) -> int | str:
    """Return at what generation stops that ends a turn: a token of its own, else the text before the first of those.

    Other tokens depend on the text around them, and tokens of their own may have no text in an answer.
    """
    tokens = (text for text in added_tokens(tokenizer) if text in end)
    own = min(tokens, key=lambda text: (end.index(text), -len(text)), default=None)
    before = end if own is None else end[: end.index(own)].rstrip()
    return before or int(tokenizer.convert_tokens_to_ids(own))


def _user_text(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context else instruction


# Alpaca -------------------------------------------------------------------------------------------


def _render_alpaca(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    calls = next((n for n, turn in enumerate(row.turns, 1) if turn.role == "tool" or turn.fields), 0)
    if calls:
        raise DataError(
            f"message {calls} calls a tool or answers for one, which Alpaca's format cannot render; remove the row, or "
            "take a model with a chat template."
        )
    history = row.turns[:-2] if row.turns else ()
    text, spans = _alpaca_prompt(history, row.instruction, row.context, tokenizer)
    end = len(text) + len(row.response)
    answers = [turn for turn in row.turns if turn.role == "assistant"]
    remarks = []
    if any(turn.reasoning for turn in answers):
        remarks.append("reasoning_content is not used, since Alpaca's format has no place for it")
    if row.tools:
        remarks.append("descriptions of tools are not used, since Alpaca's format has no place for them")
    untrained = frozenset(number for number, turn in enumerate(answers) if not turn.trained)
    spans_of_all = (*spans, (len(text), end))
    return Rendered(text + row.response, spans_of_all, len(text), False, untrained, tuple(remarks))


def _alpaca_prompt(
    history: Sequence[Turn], instruction: str, context: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Return the prompt, and the spans of the responses in its history.

    The format knows one exchange only; further ones repeat its sections. A response of the history
    ends with the end of sequence, as it does when it is the last one.
    """
    text = f"{WITH_INPUT if context else WITHOUT_INPUT}\n\n"
    spans = []
    for turn in history:
        if turn.role == "system":
            text = f"{turn.text}\n\n{text}"
        elif turn.role == "user":
            text += _alpaca_sections(turn.text, "")
        else:
            start = len(text)
            text += turn.text + (tokenizer.eos_token or "")
            spans.append((start, len(text)))
            text += "\n\n"
    return text + _alpaca_sections(instruction, context), spans


def _alpaca_sections(instruction: str, context: str) -> str:
    given = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"
