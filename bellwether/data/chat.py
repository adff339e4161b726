r"""Chats as a tokenizer's chat template renders them, with the spans of all answers.

    prompt_end of the last answer
        │
    ...<|assistant|>\nThe answer.<|end|>\n<|user|>\n...   a span takes in what ends the turn

Where an answer stands is found by rendering the chat up to it, and with marks in place of its text; what ends a turn,
by rendering a chat of marks. Rendering depends on the recipe, the chat and the tokenizer alone: the date that some
templates print is the recipe's, its names are English, and the recipe says whether answers show their reasoning.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bellwether.data.rows import Turn
from bellwether.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<think>", "</think>"

# Stand for texts in probes: nothing that a template looks for, trims or changes.
_MARK = "\u2042{}\u2042"
_MONTHS = (
    "January February March April May June July August September October November December".split()  # noqa: SIM905
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
_CALL = {"id": "call_0", "type": "function", "function": {"name": _MARK.format("call"), "arguments": {}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": _MARK.format("tool"),
        "description": "d",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


@dataclass(frozen=True)
class ChatFormat:
    """How chats are rendered with a tokenizer's template.

    Args:
        date: the date that templates print which print today's.
        reasoning: whether answers show their reasoning.
        end: the text that ends a turn of the assistant before further turns; empty where nothing does.
        last_end: the text that ends it at the end of a chat; empty where nothing does.
        marks: texts of the template that no message may write out.
        shows_calls: whether it renders calls of tools.
        shows_tools: whether it renders descriptions of tools.
    """

    date: datetime.date
    reasoning: bool
    end: str = ""
    last_end: str = ""
    marks: tuple[str, ...] = ()
    shows_calls: bool = False
    shows_tools: bool = False


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Args:
        text: the whole row.
        response_spans: start and end, in characters of ``text``, of every response that can be told from what stands
            around it.
        prompt_end: where the last response starts; generation starts from ``text[:prompt_end]``.
        closed: whether the text itself ends the last turn, so that no end of sequence must follow.
        untrained: numbers of the spans that are shown, but not trained.
        remarks: what a person should know of the rendering, as clauses.
    """

    text: str
    response_spans: tuple[tuple[int, int], ...]
    prompt_end: int
    closed: bool
    untrained: frozenset[int] = frozenset()
    remarks: tuple[str, ...] = ()


def chat_format(tokenizer: PreTrainedTokenizerBase, date: datetime.date, reasoning: bool) -> ChatFormat:
    """Return how a tokenizer's chat template renders chats, found out by trying it.

    Args:
        tokenizer: with a chat template.
        date: what templates print that print today's date.
        reasoning: whether answers show their reasoning.

    Raises:
        DataError: the template cannot be rendered at all, or several have names and none is the default.
    """
    named = getattr(tokenizer, "chat_template", None)
    if isinstance(named, Mapping) and "default" not in named:
        names = ", ".join(sorted(map(str, named)))
        raise DataError(
            f"the tokenizer has chat templates of several names ({names}) and none that is called default; "
            "leave one in its folder, or set data.template to alpaca."
        )
    plain = ChatFormat(date, reasoning)
    first, answer, second, last = (Turn(role, _MARK.format(n)) for n, role in enumerate(("user", "assistant") * 2))
    both = _tried([first, answer, second, last], tokenizer, plain)
    if both is None:
        whole = _apply([first, last], tokenizer, plain)  # says why, where even this cannot be rendered
        behind = between = whole.partition(last.text)[2]
    else:
        whole, behind = both, both.partition(last.text)[2]
        between = both.partition(answer.text)[2].partition(second.text)[0]
    added = added_tokens(tokenizer)
    end, last_end = _first_of(added, between), _first_of(added, behind)
    if not last_end:  # nothing but plain text marks it
        end = last_end = between[: _alike(between, behind)].rstrip()
    elif end != last_end and not behind.lstrip().startswith(end or "\0"):
        end = ""  # what follows the first answer is the beginning of the next turn, not the end of this one
    written = [token for token in added if token in whole and token not in (OPEN, CLOSE)]
    marks = dict.fromkeys([*special_texts(tokenizer), *written, *filter(None, (end, last_end))])
    calling = [first, Turn("assistant", answer.text, fields=_fields({"tool_calls": [_CALL]}))]
    return replace(
        plain,
        end=end,
        last_end=last_end,
        marks=tuple(sorted(marks)),
        shows_calls=_CALL["function"]["name"] in (_tried(calling, tokenizer, plain) or ""),  # type: ignore[index]
        shows_tools=_TOOL["function"]["name"] in (_tried([first], tokenizer, plain, tools=[_TOOL]) or ""),  # type: ignore[index]
    )


def render_chat(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, format: ChatFormat, tools: str = ""
) -> Rendered:
    """Render a chat that ends with the assistant, and find its answers.

    Args:
        turns: its messages.
        tokenizer: brings the template.
        format: as ``chat_format`` found it.
        tools: descriptions of tools, as JSON; empty where there are none.

    Raises:
        DataError: the template refuses the chat or cannot render what a message holds, or the last answer cannot be
            told from the prompt.
    """
    remarks = _remarks(turns, format, tools)
    known = json.loads(tools) if tools and format.shows_tools else None
    whole = _apply(turns, tokenizer, format, tools=known)
    spans: list[tuple[int, int]] = []
    untrained = set[int]()
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        last = number == len(turns) - 1
        if last and not whole.startswith(prompt := _apply(turns[:number], tokenizer, format, known, prompted=True)):
            whole = _continued(prompt, turn, format)
            spans.append((len(prompt), len(whole)))
        else:
            span = _span(whole, turns, number, tokenizer, format, known)
            if span is None:
                remarks.append("earlier answers cannot be told from what the chat template writes around them")
                continue
            spans.append(span)
        if not turn.trained:
            untrained.add(len(spans) - 1)
        if turn.reasoning and format.reasoning and turn.reasoning.strip() not in whole[slice(*spans[-1])]:
            remarks.append("earlier answers stand without their reasoning, as the chat template shows them")
    start, end = spans[-1]
    closed = bool(format.last_end) and whole[start:end].endswith(format.last_end)
    return Rendered(whole[:end], tuple(spans), start, closed, frozenset(untrained), tuple(dict.fromkeys(remarks)))


def chat_prompt(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, format: ChatFormat) -> str:
    """Return the text from which an answer to a chat is generated."""
    return _apply(turns, tokenizer, format, prompted=True)


def without_reasoning(text: str) -> str:
    """Return an answer without the reasoning before it."""
    return text.rpartition(CLOSE)[2].strip() if CLOSE in text else text


# Where answers stand ------------------------------------------------------------------------------


def _span(
    whole: str,
    turns: Sequence[Turn],
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    format: ChatFormat,
    tools: list[Any] | None,
) -> tuple[int, int] | None:
    """Return where an answer stands with what ends it; None where that cannot be told."""
    mark = _MARK.format("answer")
    marked = _apply(_with_text(turns, number, mark), tokenizer, format, tools)
    before, found, behind = marked.partition(mark)
    prompt = _apply(turns[:number], tokenizer, format, tools, prompted=True)
    if whole.startswith(prompt):
        start = len(prompt)
    elif found and whole.startswith(before):
        start = len(before)
    else:
        return None
    text_end = len(whole) - len(behind) if found and whole.endswith(behind) else start
    text_end = max(start, text_end)
    limit = len(whole)
    if number < len(turns) - 1:
        following = _apply(_with_text(turns, number + 1, mark), tokenizer, format, tools).partition(mark)[0]
        limit = _alike(whole, following)
    end = format.last_end if number == len(turns) - 1 else format.end
    if not end:
        return (start, text_end) if text_end > start else None
    # A turn that calls a tool may end with another mark than one that does not.
    ends = [(place, mark) for mark in format.marks if (place := whole.find(mark, text_end, limit)) >= 0]
    place, mark = next((found for found in ends if found[1] == end), min(ends, default=(text_end, "")))
    return (start, place + len(mark)) if place + len(mark) > start else None


def _alike(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    if one.startswith(other):
        return len(other)
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _with_text(turns: Sequence[Turn], number: int, text: str) -> list[Turn]:
    """Return turns of which one has another text."""
    return [replace(turn, text=text) if n == number else turn for n, turn in enumerate(turns)]


def _continued(prompt: str, turn: Turn, format: ChatFormat) -> str:
    """Return prompt and answer where the prompt for generation opens the reasoning, and the template drops it.

    Raises:
        DataError: the prompt does something else.
    """
    reasons = CLOSE in turn.text and not format.reasoning
    if reasons or turn.fields or not prompt.rstrip().endswith(OPEN):
        how = "to train its reasoning, set data.reasoning to true" if reasons else "set data.template to alpaca"
        raise DataError(
            "the chat template renders a prompt for generation that is not the beginning of the whole chat, "
            f"so the response cannot be told from the prompt; {how}."
        )
    text = content(turn, format)
    thought, _, answer = text.rpartition(CLOSE)
    thought = thought.strip().removeprefix(OPEN).strip()
    return f"{prompt}{thought}\n{CLOSE}\n\n{answer.strip()}{format.last_end}"


# Rendering ----------------------------------------------------------------------------------------


def content(turn: Turn, format: ChatFormat) -> str:
    """Return a turn's text as the template gets it, with its reasoning where that shall be shown."""
    if turn.reasoning and format.reasoning:
        return f"{OPEN}\n{turn.reasoning.strip()}\n{CLOSE}\n\n{turn.text}"
    return turn.text


def _remarks(turns: Sequence[Turn], format: ChatFormat, tools: str) -> list[str]:
    """Return what is not shown of a chat.

    Raises:
        DataError: what is not shown are calls of tools, without which the answer is another one.
    """
    remarks = []
    for number, turn in enumerate(turns, 1):
        if (turn.role == "tool" or "tool_calls" in turn.fields) and not format.shows_calls:
            raise DataError(
                f"message {number} calls a tool or answers for one, which this chat template cannot render; "
                "remove the row, or take a model whose template can."
            )
        if turn.reasoning and not format.reasoning:
            remarks.append("reasoning_content is not used; data.reasoning true trains it")
    if tools and not format.shows_tools:
        remarks.append("descriptions of tools are not used, since the chat template does not render them")
    return remarks


def _apply(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    format: ChatFormat,
    tools: list[Any] | None = None,
    *,
    prompted: bool = False,
) -> str:
    """Render turns with the tokenizer's chat template.

    Templates of models that reason write an empty thought before an answer that has none. They are asked not to think
    where reasoning is not shown, so that this stands in the prompt for generation too, and is no part of the response.
    Other templates do not know the name.
    """
    import jinja2

    messages = [_message(turn, format) for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=dated(tokenizer.get_chat_template(tools=tools), format.date),
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompted,
                enable_thinking=format.reasoning,
            )
        )
    except jinja2.TemplateError as error:
        raise DataError(
            f"the tokenizer's chat template refuses this chat ({error}); set data.template to alpaca."
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # whatever a template's own code does
        raise DataError(
            f"the tokenizer's chat template cannot render this chat ({type(error).__name__}: {error}); "
            "set data.template to alpaca."
        ) from error


def _tried(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, format: ChatFormat, tools: list[Any] | None = None
) -> str | None:
    """Return rendered turns, None where the template refuses them."""
    try:
        return _apply(turns, tokenizer, format, tools)
    except DataError:
        return None


def _message(turn: Turn, format: ChatFormat) -> dict[str, Any]:
    """Return a turn as templates take it; arguments of calls are objects, as their documentation wants them."""
    fields = json.loads(turn.fields) if turn.fields else {}
    return {"role": turn.role, "content": content(turn, format), **fields}


def _fields(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)


def dated(source: str, date: datetime.date) -> str:
    """Return a template in which what prints today's date prints another one, in English whatever the locale."""
    if "strftime_now" not in source:
        return source
    texts = {
        "%Y": f"{date.year}",
        "%y": f"{date.year % 100:02}",
        "%m": f"{date.month:02}",
        "%B": _MONTHS[date.month - 1],
        "%b": _MONTHS[date.month - 1][:3],
        "%d": f"{date.day:02}",
        "%-d": f"{date.day}",
        "%e": f"{date.day:2}",
        "%A": _DAYS[date.weekday()],
        "%a": _DAYS[date.weekday()][:3],
        "%H": "00",
        "%M": "00",
        "%S": "00",
    }
    replaced = "".join(f" | replace({json.dumps(code)}, {json.dumps(text)})" for code, text in texts.items())
    # A macro of the same name goes before the function; the empty text keeps the line break that may follow.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}{{{{ '' }}}}{source}"


def _first_of(tokens: Sequence[str], text: str) -> str:
    """Return the longest of some tokens that a text begins with, white space aside; empty where there is none."""
    text = text.lstrip()
    return max((token for token in tokens if text.startswith(token)), key=len, default="")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of all tokens that were added to the vocabulary as a whole, marked special or not."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [text for text in dict.fromkeys([*added, *tokenizer.all_special_tokens]) if text.strip()]


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of all special tokens, those included that no attribute of the tokenizer names."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [text for text in {*added, *tokenizer.all_special_tokens} if text]
