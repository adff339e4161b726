r"""The one place that renders prompts, for training, for evaluation and for serving.

A rendered row is text with the character spans of its responses. Two formats are known: Alpaca's
(Taori et al. 2023), and the chat template that a tokenizer brings along.

    prompt_end
        │
    ...### Response:\n│The answer.│          one span; whoever tokenises it appends the end of sequence
    ...<|assistant|>  │The answer.<|end|>│   a span takes in what ends the turn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bellwether.data.files import Problems
from bellwether.data.rows import Row, Turn
from bellwether.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["alpaca", "chat"]

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Args:
        text: the whole row.
        response_spans: start and end, in characters of ``text``, of every response that can be trained.
        prompt_end: where the last response starts; generation starts from ``text[:prompt_end]``.
        closed: whether the text itself ends the last turn, so that no end of sequence must follow.
    """

    text: str
    response_spans: tuple[tuple[int, int], ...]
    prompt_end: int
    closed: bool


def resolve_template(template: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template to use: ``auto`` takes the tokenizer's chat template where it has one.

    Raises:
        DataError: the chat template is wanted, but the tokenizer has none.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise DataError("data.template is chat, but the tokenizer has no chat template; set it to alpaca or auto.")
    return "chat" if template == "chat" or (template == "auto" and has_chat) else "alpaca"


def render(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Return a row as text, with the spans of its responses.

    Raises:
        DataError: the chat template cannot render the row.
    """
    if template == "alpaca":
        return _render_alpaca(row, tokenizer)
    try:
        return _render_chat(chat_turns(row), tokenizer)
    except DataError as error:
        raise DataError(f"{row.place or 'row'}: {error}") from error


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
    if template == "alpaca":
        return _alpaca_prompt(history, instruction, context, tokenizer)[0]
    return _apply([*history, Turn("user", _user_text(instruction, context))], tokenizer, prompted=True)


def chat_turns(row: Row) -> tuple[Turn, ...]:
    """Return a row's messages; a plain instruction becomes a user's message that ends with its context."""
    if row.turns:
        return row.turns
    return Turn("user", _user_text(row.instruction, row.context)), Turn("assistant", row.response)


def check_plain(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that no row's own text writes out a special token, which would become that token.

    Args:
        rows: the rows.
        tokenizer: names its special tokens.

    Raises:
        DataError: rows do; says where, and which token.
    """
    specials, problems = sorted(_special_texts(tokenizer)), Problems()
    for row in rows:
        texts = [turn.text for turn in row.turns] or [row.instruction, row.context, row.response]
        found = _first_written(texts, specials)
        if found is not None:
            problems.add(
                row.place or "row",
                f"its text has {found!r}, which the tokenizer takes for a special token; write it otherwise, "
                "or remove the row.",
            )
    problems.check()


def written_special(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a special token that one of the texts writes out, and which it would become; None where there is none."""
    return _first_written(texts, sorted(_special_texts(tokenizer)))


def _first_written(texts: Sequence[str], specials: Sequence[str]) -> str | None:
    return next((special for special in specials if any(special in text for text in texts)), None)


def end_of_turn(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens at which generation stops: end of sequence, and the template's end of turn."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if template == "chat":
        rendered = _render_chat((Turn("user", "a"), Turn("assistant", "b")), tokenizer)
        if rendered.closed:
            last = tokenizer(rendered.text, add_special_tokens=False)["input_ids"][-1]
            ends += [last] if last not in ends else []
    return ends


def _user_text(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context else instruction


# Alpaca -------------------------------------------------------------------------------------------


def _render_alpaca(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    history = row.turns[:-2] if row.turns else ()
    text, spans = _alpaca_prompt(history, row.instruction, row.context, tokenizer)
    end = len(text) + len(row.response)
    return Rendered(text + row.response, (*spans, (len(text), end)), len(text), closed=False)


def _alpaca_prompt(
    history: Sequence[Turn], instruction: str, context: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Return the prompt, and the spans of the responses in its history.

    The format knows one exchange only; further ones repeat its sections. A response of the history
    ends with the end of sequence, as it does when it is the last one.
    """
    text = f"{_WITH_INPUT if context else _WITHOUT_INPUT}\n\n"
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


# Chat templates -----------------------------------------------------------------------------------


def _render_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render a chat and find its responses by rendering the chat up to each of them.

    Some templates show an earlier response in another form once further turns follow (they drop its
    reasoning, for instance). Such a response is not trained, since nobody would generate it so; the
    last one always is.
    """
    whole = _apply(turns, tokenizer)
    text = _without_tail(whole, tokenizer)
    spans = []
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        if turn.role != "assistant":
            continue
        start_text = _apply(turns[:number], tokenizer, prompted=True)
        end_text = text if last else _without_tail(_apply(turns[: number + 1], tokenizer), tokenizer)
        if whole.startswith(start_text) and whole.startswith(end_text) and len(start_text) < len(end_text):
            spans.append((len(start_text), len(end_text)))
        elif last:
            raise DataError(
                "the chat template renders a prompt for generation that is not the beginning of the whole chat, "
                "so the response cannot be told from the prompt; set data.template to alpaca."
            )
    return Rendered(text, tuple(spans), spans[-1][0], closed=_ends_with_special(text, tokenizer))


def _without_tail(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Drop the white space that a template puts behind the token that ends a turn."""
    stripped = text.rstrip()
    return stripped if _ends_with_special(stripped, tokenizer) else text


def _ends_with_special(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return text.endswith(tuple(_special_texts(tokenizer)))


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of all special tokens, those included that no attribute of the tokenizer names."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [text for text in {*added, *tokenizer.all_special_tokens} if text]


def _apply(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, prompted: bool = False) -> str:
    """Render turns with the tokenizer's chat template.

    Templates of models that reason write an empty thought before an answer that has none. They are asked
    not to think, so that this stands in the prompt for generation too, and is no part of the response.
    Other templates do not know the name.
    """
    import jinja2

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompted, enable_thinking=False
            )
        )
    except jinja2.TemplateError as error:
        raise DataError(
            f"the tokenizer's chat template refuses this chat ({error}); set data.template to alpaca."
        ) from error
