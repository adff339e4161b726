"""From a record's columns to a row: Dolly's, Alpaca's, chats, or a mapping of the recipe."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bellwether.data.files import LONGEST_ROW, kind
from bellwether.data.rows import Row, Turn
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.words import listed

USUAL_NAMES = {
    "instruction": ("instruction", "prompt", "question"),
    "context": ("context", "input"),
    "response": ("response", "output", "answer"),
    "category": ("category",),
    "messages": ("messages", "conversations"),
    "group": ("language", "domain"),
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
LONGEST_CLIENT_NAME = 100
LONGEST_LABEL = 1_000

# A column of a usual name holds something else than groups where its texts are longer or more than these.
LONGEST_GROUP = 64
MOST_GROUPS = 20


@dataclass(frozen=True)
class Layout:
    """Which column of a source holds what; None where there is none.

    A layout names either ``messages``, or ``instruction`` and, but for questions without answers, ``response``.
    """

    instruction: str | None = None
    context: str | None = None
    response: str | None = None
    category: str | None = None
    messages: str | None = None
    client: str | None = None
    group: str | None = None

    @property
    def used(self) -> set[str]:
        """The columns that are read."""
        return {column for column in vars(self).values() if column is not None}


def find_layout(
    columns: Collection[str],
    settings: recipe.Columns,
    client: str | None,
    name: str,
    groups: Collection[str],
    *,
    answered: bool = True,
) -> Layout:
    """Return which column holds what.

    Args:
        columns: the names of all columns of the source.
        settings: names given by the recipe, which go before the usual ones.
        client: the column that names the client; None where none does.
        name: how messages call the source.
        groups: those of the usual names of a group's column that serve, in their order.
        answered: whether instructions need a response; where they do not, none is read.

    Raises:
        DataError: a column that is named, or needed, is not there.
    """
    named_roles = settings.model_dump().items()
    given = {role: column for role, column in named_roles if column is not None and (role, column) != ("group", "")}
    usual_names: dict[str, Collection[str]] = {**USUAL_NAMES, "group": groups if settings.group is None else ()}
    named = [(f"data.columns.{role}", column) for role, column in given.items()] + [("partition.column", client)]
    for field, column in named:
        if column is not None and column not in columns:
            raise DataError(f"{name}: there is no column {column!r} ({field}); there are {listed(columns)}.")
    found = {
        role: given.get(role) or next((usual for usual in usuals if usual in columns), None)
        for role, usuals in usual_names.items()
    }
    plain = found["instruction"] is not None and (found["response"] is not None or not answered)
    if found["messages"] is not None and ("messages" in given or not plain):
        return Layout(category=found["category"], messages=found["messages"], client=client, group=found["group"])
    if not plain:
        missing = "instruction" if found["instruction"] is None else "response"
        raise DataError(
            f"{name}: no column holds the {missing} (there are {listed(columns) or 'none'}); "
            f"name it in data.columns.{missing}, or name a column of chats in data.columns.messages."
        )
    return Layout(
        instruction=found["instruction"],
        context=found["context"],
        response=found["response"] if answered else None,
        category=found["category"],
        client=client,
        group=found["group"],
    )


def can_group(records: Iterable[Mapping[str, Any]], column: str) -> bool:
    """Return whether a column that is called like one of groups holds them: few short texts or whole numbers."""
    values = [record.get(column) for record in records]
    return all(map(_is_label, values)) and len({value for value in values if value is not None}) <= MOST_GROUPS


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_GROUP and value.strip().isprintable()
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def make_row(values: Mapping[str, Any], layout: Layout, place: str, client: str = "") -> Row:
    """Return the row in a record.

    Args:
        values: the record.
        layout: which column holds what.
        place: where the record stands.
        client: the client's name where no column names it.

    Raises:
        DataError: a field is missing, empty or of a wrong type; the sentence does not name the place.
    """
    category = _label(values, layout.category) if layout.category else ""
    group = _label(values, layout.group) if layout.group else ""
    if layout.client:
        client = _label(values, layout.client)
        check_client_name(client)
    if layout.messages:
        turns = _turns(values, layout.messages)
        return Row(turns[-2].text, turns[-1].text, "", category, turns, client, place, group)
    assert layout.instruction
    return Row(
        instruction=_needed(values, layout.instruction),
        response=_needed(values, layout.response) if layout.response else "",
        context=_optional(values, layout.context) if layout.context else "",
        category=category,
        client=client,
        place=place,
        group=group,
    )


def check_client_name(name: str) -> None:
    """Check that a client's name can be shown and be part of a path.

    Raises:
        DataError: it cannot.
    """
    if not name.strip():
        raise DataError("the client's name is empty; every row needs one.")
    if len(name) > LONGEST_CLIENT_NAME:
        raise DataError(f"the client's name has {len(name)} characters; give at most {LONGEST_CLIENT_NAME}.")
    if name in (".", "..") or "/" in name or "\\" in name:
        raise DataError(f"the client's name {name!r} has parts of a path; use letters, digits, '-', '_' and '.'.")
    if not name.isprintable() or name != name.strip():
        raise DataError(f"the client's name {name!r} has control characters or outer white space; remove them.")


def _needed(values: Mapping[str, Any], column: str) -> str:
    """Return a text that must be there."""
    if column not in values:
        raise DataError(f"the field {column!r} is missing; every row needs one.")
    text = _string(values[column], f"the field {column!r}")
    if not text.strip():
        raise DataError(f"the field {column!r} is empty; fill it or remove the row.")
    return text


def _optional(values: Mapping[str, Any], column: str) -> str:
    """Return a text that may be absent or null."""
    value = values.get(column)
    return "" if value is None else _string(value, f"the field {column!r}")


def _label(values: Mapping[str, Any], column: str) -> str:
    """Return a category, a group or a client's name, which may be a whole number."""
    value = values.get(column)
    whole = isinstance(value, int) and not isinstance(value, bool)
    label = str(value) if whole else _optional(values, column).strip()
    if len(label) > LONGEST_LABEL:
        raise DataError(
            f"the field {column!r} has {len(label):,} characters, but a name of at most {LONGEST_LABEL:,} is wanted."
        )
    return label


def _string(value: Any, what: str) -> str:
    """Return a value that must be text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {kind(value)}, but text is wanted.")
    if len(value) > LONGEST_ROW:
        raise DataError(f"{what} has {len(value):,} characters, but at most {LONGEST_ROW:,} are read; shorten it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a character ({value[error.start]!r}); mend it.") from error
    return value


def _turns(values: Mapping[str, Any], column: str) -> tuple[Turn, ...]:
    """Return the messages of a chat: maybe a system message, then user and assistant in turn."""
    messages = values.get(column)
    if messages == []:
        raise DataError(f"the field {column!r} is empty, but a list of messages is wanted; fill it or remove the row.")
    if not isinstance(messages, list):
        raise DataError(f"the field {column!r} is {kind(messages)}, but a list of messages is wanted.")
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    if turns[0].role == "system" and not turns[0].text.strip():
        del turns[0]
    wanted = "user"
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number == 1:
            continue
        if turn.role != wanted:
            raise DataError(f"message {number} is of the {turn.role}, but one of the {wanted} is due there.")
        if not turn.text.strip():
            raise DataError(f"message {number} is empty; fill it or remove the row.")
        wanted = "assistant" if wanted == "user" else "user"
    if not turns or turns[-1].role != "assistant":
        raise DataError("the chat does not end with a message of the assistant; remove what follows the last one.")
    return tuple(turns)


def _turn(message: Any, number: int) -> Turn:
    """Return one message, written as role and content, or as from and value."""
    if not isinstance(message, dict):
        raise DataError(f"message {number} is {kind(message)}, but an object with role and content is wanted.")
    role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"message {number} has the role {repr(role)[:40]}; known are {', '.join(ROLES)}.")
    return Turn(ROLES[role], _string(text, f"message {number}"))
