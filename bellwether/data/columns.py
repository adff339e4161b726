"""From a record's columns to a row: Dolly's, Alpaca's, chats, preferences, or a mapping of the recipe."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bellwether.data.messages import READ_FIELDS, is_empty, read_text, read_tools, read_turns
from bellwether.data.records import kind
from bellwether.data.rows import Row, Turn
from bellwether.errors import DataError
from bellwether.recipe import recipe
from bellwether.tools.words import listed

USUAL_NAMES = {
    "instruction": ("instruction", "prompt", "question"),
    "context": ("context", "input"),
    "response": ("response", "output", "answer", "completion"),
    "category": ("category",),
    "messages": ("messages", "conversations"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "group": ("language", "domain"),
}
LONGEST_CLIENT_NAME = 100
LONGEST_LABEL = 1_000

# A column of a usual name holds something else than groups where its texts are longer or more than these.
LONGEST_GROUP = 64
MOST_GROUPS = 20


@dataclass(frozen=True)
class Layout:
    """Which column of a source holds what; None where there is none.

    A layout names ``messages``; or ``chosen`` and ``rejected``, with ``instruction`` where they are not whole chats; or
    ``instruction`` and, but for questions without answers, ``response``.
    """

    instruction: str | None = None
    context: str | None = None
    response: str | None = None
    category: str | None = None
    messages: str | None = None
    client: str | None = None
    group: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None

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
    given = {role: column for role, column in named_roles if column}
    none = {role for role, column in named_roles if column == ""}  # said to be nowhere
    usual_names: dict[str, Collection[str]] = {**USUAL_NAMES, "group": groups if settings.group is None else ()}
    named = [(f"data.columns.{role}", column) for role, column in given.items()] + [("partition.column", client)]
    for field, column in named:
        if column is not None and column not in columns:
            raise DataError(f"{name}: there is no column {column!r} ({field}); there are {listed(columns)}.")
    _check_roles(given)
    # A column that is named for one thing is none of the others.
    free = [column for column in columns if column not in given.values()]
    found = {
        role: given.get(role) or next((usual for usual in usuals if usual in free and role not in none), None)
        for role, usuals in usual_names.items()
    }
    plain = found["instruction"] is not None and (found["response"] is not None or not answered)
    # What can be read as one answer is, unless the recipe names the two: files of preferences often have both forms.
    told = given.keys() & {"chosen", "rejected"}
    if told or (found["chosen"] and found["rejected"] and not plain and found["messages"] is None):
        return _pair_layout(found, client, name, columns)
    if found["messages"] is not None and ("messages" in given or not plain):
        tools = "tools" if "tools" in free else None
        return Layout(
            category=found["category"], messages=found["messages"], client=client, group=found["group"], tools=tools
        )
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


def _pair_layout(found: Mapping[str, str | None], client: str | None, name: str, columns: Collection[str]) -> Layout:
    """Return the layout of preference rows, refusing one answer without the other."""
    missing = next((role for role in ("chosen", "rejected") if found[role] is None), None)
    if missing is not None:
        raise DataError(
            f"{name}: no column holds the {missing} answers (there are {listed(columns)}); name it in "
            f"data.columns.{missing}."
        )
    roles = ("instruction", "context", "category", "group", "chosen", "rejected")
    return Layout(client=client, **{role: found[role] for role in roles})


def _check_roles(given: Mapping[str, str]) -> None:
    """Refuse a column that is named for two things."""
    for role, column in given.items():
        twin = next((other for other, taken in given.items() if taken == column and other != role), None)
        if twin is not None:
            raise DataError(
                f"data.columns.{role} and data.columns.{twin} both name the column {column!r}; it holds one thing."
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
    if layout.chosen:
        return replace(_pair(values, layout), category=category, client=client, place=place, group=group)
    said = _messages(values, layout)
    if said is not None:
        tools = read_tools(values.get(layout.tools)) if layout.tools else ""
        return replace(
            _chat(read_turns(*said)), category=category, client=client, place=place, group=group, tools=tools
        )
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


def _chat(turns: tuple[Turn, ...]) -> Row:
    """Return the row of a chat."""
    asked = next(turn for turn in reversed(turns) if turn.role == "user")
    return Row(asked.text, turns[-1].text, turns=turns)


def _pair(values: Mapping[str, Any], layout: Layout) -> Row:
    """Return the row of a prompt and two answers, which are texts, messages behind a prompt, or whole chats."""
    assert layout.chosen
    assert layout.rejected
    asked = values.get(layout.instruction) if layout.instruction else None
    sides = layout.chosen, layout.rejected
    several = [isinstance(values.get(side), list) for side in sides]
    if any(several):
        if not all(several):
            raise DataError(f"of {sides[0]!r} and {sides[1]!r} one is a list of messages, and the other is not.")
        # A list of messages stands before both answers; a text beside whole chats repeats what they begin with.
        before = asked if isinstance(asked, list) else []
        chosen, rejected = (read_turns([*before, *values[side]], f"{side!r}, message") for side in sides)
        _check_pair(chosen, rejected, sides)
        row = replace(_chat(chosen), rejected=rejected[-1])
    else:
        if layout.instruction is None:
            raise DataError(
                f"the field {layout.chosen!r} is no whole chat, so the prompt must stand beside it; name its column in "
                "data.columns.instruction."
            )
        row = Row(
            instruction=_needed(values, layout.instruction),
            response=_needed(values, layout.chosen),
            context=_optional(values, layout.context) if layout.context else "",
            rejected=Turn("assistant", _needed(values, layout.rejected)),
        )
    alike = row.turns[-1] == row.rejected if row.turns else row.rejected == Turn("assistant", row.response)
    if alike:
        raise DataError(f"{sides[0]!r} and {sides[1]!r} are equal, so neither is the better one; remove the row.")
    return row


def _check_pair(chosen: Sequence[Turn], rejected: Sequence[Turn], sides: tuple[str, str]) -> None:
    """Refuse two chats that differ before their last message, or whose last message is not to be trained."""
    if chosen[:-1] != rejected[:-1]:
        number = next((n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False), 1) if one != other), 1)
        raise DataError(
            f"{sides[0]!r} and {sides[1]!r} differ from message {number} on, but only the last answer may differ; mend "
            "or remove the row."
        )
    if not (chosen[-1].trained and rejected[-1].trained):
        raise DataError("the last message has a weight of 0, but it is what is preferred or rejected; remove the row.")


def unused_fields(values: Mapping[str, Any], layout: Layout) -> set[str]:
    """Return the names of fields inside a record's messages that hold something and are not read."""
    messages = values.get(layout.messages) if layout.messages else None
    kept = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    return {
        str(field)
        for message in kept
        for field, value in message.items()
        if field not in READ_FIELDS and value not in (None, "", [], {})
    }


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
    text = read_text(values[column], f"the field {column!r}")
    if is_empty(text):
        raise DataError(f"the field {column!r} is empty; fill it or remove the row.")
    return text


def _optional(values: Mapping[str, Any], column: str) -> str:
    """Return a text that may be absent or null."""
    value = values.get(column)
    return "" if value is None else read_text(value, f"the field {column!r}")


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


def _messages(values: Mapping[str, Any], layout: Layout) -> tuple[list[Any], str] | None:
    """Return the messages of a chat, and how sentences call them; None where the row is a plain instruction."""
    if layout.messages:
        messages = values.get(layout.messages)
        if messages == []:
            raise DataError(
                f"the field {layout.messages!r} is empty, but a list of messages is wanted; fill it or remove the row."
            )
        if not isinstance(messages, list):
            raise DataError(f"the field {layout.messages!r} is {kind(messages)}, but a list of messages is wanted.")
        return messages, "message"
    parts = [values.get(column) for column in (layout.instruction, layout.response) if column]
    if not all(isinstance(part, list) for part in parts):
        return None
    return [message for part in parts for message in part or ()], "message"
