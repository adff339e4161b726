"""The messages of a chat as they stand in a record, and texts: read and checked."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from bellwether.data.records import LONGEST_ROW, kind
from bellwether.data.rows import Turn
from bellwether.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
# The role of ShareGPT whose text is a call of a tool, as JSON.
_CALLING = "function_call"
# Fields of a message that a chat template may render, beside its role and content.
RENDERED_FIELDS = ("tool_calls", "tool_call_id", "name")
_ROLE_FIELDS, _TEXT_FIELDS, _REASONING_FIELDS = (
    ("role", "from"),
    ("content", "value"),
    ("reasoning_content", "reasoning"),
)
READ_FIELDS = {*_ROLE_FIELDS, *_TEXT_FIELDS, *_REASONING_FIELDS, *RENDERED_FIELDS, "weight"}
LONGEST_CALLS = 100_000  # characters of a message's calls, or of a row's descriptions of tools, as JSON


def read_turns(messages: list[Any], what: str) -> tuple[Turn, ...]:
    """Return the messages of a chat: maybe a system message, then the user and the assistant in turn.

    Between a call of tools by the assistant and its next message stand messages of these.

    Args:
        messages: as a record holds them, whatever they are.
        what: how sentences call one of them, before its number.

    Raises:
        DataError: they are no such chat; the sentence names the message.
    """
    turns = [_turn(message, f"{what} {number}") for number, message in enumerate(messages, 1)]
    if turns and turns[0].role == "system" and is_empty(turns[0].text):
        del turns[0]
    due: tuple[str, ...] = ("user",)
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number == 1:
            continue
        if turn.role not in due:
            raise DataError(
                f"{what} {number} is of the {turn.role}, but one of the {' or the '.join(due)} is due there."
            )
        calls = "tool_calls" in turn.fields
        if is_empty(turn.text) and not calls:
            raise DataError(f"{what} {number} is empty; fill it or remove the row.")
        due = {"user": ("assistant",), "tool": ("assistant", "tool")}.get(turn.role, ("tool",) if calls else ("user",))
    if not turns or turns[-1].role != "assistant":
        raise DataError("the chat does not end with a message of the assistant; remove what follows the last one.")
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise DataError("all messages of the assistant have a weight of 0, so nothing is trained; remove the row.")
    return tuple(turns)


def _turn(message: Any, what: str) -> Turn:
    """Return one message, written as role and content, or as from and value."""
    if not isinstance(message, dict):
        raise DataError(f"{what} is {kind(message)}, but an object with role and content is wanted.")
    role = _first(message, _ROLE_FIELDS)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{what} has the role {repr(role)[:40]}; known are {', '.join(ROLES)}.")
    fields = {field: message[field] for field in RENDERED_FIELDS if message.get(field) not in (None, "", [])}
    if "tool_calls" in fields:
        fields["tool_calls"] = _calls(fields["tool_calls"], what)
    text = _first(message, _TEXT_FIELDS)
    if role == _CALLING:
        fields["tool_calls"], text = _written_calls(text, what), None
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{what} has the weight {repr(weight)[:40]}, but 0 or 1 is wanted.")
    reasoning = _first(message, _REASONING_FIELDS)
    return Turn(
        ROLES[role],
        "" if text is None and fields else _said(text, what),
        weight != 0,
        "" if reasoning is None else read_text(reasoning, f"the reasoning of {what}"),
        _as_json(fields, f"{what} has calls of tools") if fields else "",
    )


def _as_json(value: Any, what: str) -> str:
    """Return what cannot be cut as JSON, refusing what is too long to be rendered."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_CALLS:
        raise DataError(f"{what} of {len(text):,} characters, but at most {LONGEST_CALLS:,} are read; shorten them.")
    return text


def _first(message: Mapping[str, Any], fields: Iterable[str]) -> Any:
    """Return the first of some fields that holds something."""
    return next((message[field] for field in fields if message.get(field) is not None), None)


def _said(value: Any, what: str) -> str:
    """Return a message's text, which may come in parts."""
    if not isinstance(value, list):
        return read_text(value, what)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            found = repr(part.get("type"))[:40] if isinstance(part, dict) else kind(part)
            raise DataError(f"{what} has a part that is {found}, but objects of the type 'text' are all that is read.")
        texts.append(read_text(part.get("text"), f"a part of {what}"))
    return "".join(texts)


def _calls(calls: Any, what: str) -> list[dict[str, Any]]:
    """Return calls of tools, their arguments as objects, as chat templates want them."""
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{what} has tool_calls that are no list of calls with a function and its name.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise DataError(f"{what} calls {function['name']!r} with arguments that are not JSON.") from error
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _written_calls(text: Any, what: str) -> list[dict[str, Any]]:
    """Return the calls of tools in a text: one as JSON with its name and arguments, or a list of them."""
    wanted = 'JSON such as {"name": "search", "arguments": {"text": "..."}} is wanted there; mend it or remove the row.'
    try:
        found = json.loads(read_text(text, what))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} has the role {_CALLING}, but its text is not JSON; {wanted}") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"{what} has the role {_CALLING}, but its text names no tool; {wanted}")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    return _calls([{"type": "function", "function": function} for function in functions], what)


def read_tools(tools: Any) -> str:
    """Return descriptions of tools as JSON; nothing where there are none.

    Args:
        tools: a list, or the same as JSON.

    Raises:
        DataError: it is neither.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError as error:
            raise DataError("the field 'tools' is text that is not JSON.") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"the field 'tools' is {kind(tools)}, but a list of descriptions is wanted.")
    return _as_json(tools, "the field 'tools' has descriptions") if tools else ""


def read_text(value: Any, what: str) -> str:
    """Return a value that must be text that UTF-8 can hold.

    Args:
        value: of a record.
        what: how sentences call it.

    Raises:
        DataError: it is no such text.
    """
    if not isinstance(value, str):
        raise DataError(f"{what} is {kind(value)}, but text is wanted.")
    if len(value) > LONGEST_ROW:
        raise DataError(f"{what} has {len(value):,} characters, but at most {LONGEST_ROW:,} are read; shorten it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a character ({value[error.start]!r}); mend it.") from error
    return value


def is_empty(text: str) -> bool:
    """Return whether a text shows nothing: white space, and marks without width such as U+200B."""
    return not text.strip() or all(mark.isspace() or unicodedata.category(mark) == "Cf" for mark in text)
