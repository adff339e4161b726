"""YAML as recipes use it: plain scalars, lists and mappings, each written out where it stands.

Tags would make other objects, and aliases let a few lines stand for gigabytes: they are refused before anything is made
of them, and so is what no recipe needs, very many values and deep nesting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from bellwether.tools.words import cut, shown

Location = tuple[str | int, ...]

MOST_BYTES, MOST_VALUES, MOST_DIGITS, DEEPEST = 1_000_000, 20_000, 300, 20
_USUAL = "tag:yaml.org,2002:"  # what stands as !! in a text


class NotPlain(yaml.MarkedYAMLError):
    """A text holds something that recipes do not take; ``problem`` is a sentence on it, without its place."""


class Unreadable(Exception):
    """A plain value is none, such as a date in a month that there is not; the message is the reason."""


class _PlainLoader(yaml.SafeLoader):
    """Composes nodes of plain values, and stops at the first thing that is none."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node: a key, a value, or an item."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._values += 1
        self._depth += 1
        problem = _foreign(event) or _excess(self._values, self._depth)
        if problem:
            raise NotPlain(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node.tag == f"{_USUAL}merge":
            problem = "'<<' would take in another mapping; write its fields out."
            raise NotPlain(problem=problem, problem_mark=node.start_mark)
        return node


def _foreign(event: Any) -> str | None:
    """Return a sentence on an alias, an anchor or a tag; None where an event has none of them."""
    if isinstance(event, yaml.AliasEvent):
        return f"{shown(f'*{event.anchor}')} repeats a value from elsewhere; write it out."
    if event.anchor is not None:
        return f"{shown(f'&{event.anchor}')} names a value to be repeated; remove it, and write every value out."
    if event.tag is not None:
        return f"{shown(event.tag.replace(_USUAL, '!!'))} is a tag, and values are plain here; remove or quote it."
    return None


def _excess(values: int, depth: int) -> str | None:
    """Return a sentence on what is beyond all recipes; None where there is room."""
    if depth > DEEPEST:
        return f"this is nested more than {DEEPEST} deep; write it flatter."
    if values > MOST_VALUES:
        return f"there are more than {MOST_VALUES} values; give fewer, such as a folder instead of its files."
    return None


def compose(text: str) -> yaml.Node | None:
    """Return what a text holds as a tree of nodes, which know their lines; None where it is empty.

    Args:
        text: YAML.

    Raises:
        NotPlain: it holds something that recipes do not take.
        yaml.YAMLError: it is no YAML.
    """
    return _PlainLoader(text).get_single_node()


def plain_value(
    node: yaml.Node, location: Location, where: Callable[[int], str], places: dict[Location, str], problems: list[str]
) -> Any:
    """Return the value of a node; the keys of mappings are texts.

    Args:
        node: of ``compose``.
        location: of the node in the recipe.
        where: says in words where a line is.
        places: receives where each key stands, by location.
        problems: receives a sentence on every key that stands twice or has a value that cannot be read, which is left
            out.

    Raises:
        Unreadable: the value itself, or an item of it, is none.
    """
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, location, where, places, problems)
    if isinstance(node, yaml.SequenceNode):
        return [plain_value(item, (*location, n), where, places, problems) for n, item in enumerate(node.value)]
    return _scalar(node)


def _mapping(
    node: yaml.MappingNode,
    location: Location,
    where: Callable[[int], str],
    places: dict[Location, str],
    problems: list[str],
) -> dict[str, Any]:
    """Return a mapping as a dict, and note its mistakes."""
    values: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{where(line)}: a key is a single word, but this is a list or mapping; quote it.")
            continue
        key = str(key_node.value)
        here = (*location, key)
        if key in first:
            problems.append(f"{where(line)}: {dotted(here)} stands twice (first in line {first[key]}); remove one.")
            continue
        first[key] = line
        places[here] = where(line)
        try:
            values[key] = plain_value(value_node, here, where, places, problems)
        except Unreadable as error:
            problems.append(f"{where(line)}: the value of {dotted(here)} cannot be read ({error}); quote it.")
    return values


def _scalar(node: yaml.Node) -> Any:
    """Return the value of a single word or text."""
    if node.tag in (f"{_USUAL}int", f"{_USUAL}float") and len(node.value) > MOST_DIGITS:
        raise Unreadable("a number has too many digits")
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.YAMLError, ValueError) as error:  # a sign without meaning, such as =, or a date that is none
        raise Unreadable(cut(getattr(error, "problem", None) or str(error))) from error


def dotted(location: Location) -> str:
    """Return a location in dots, on one line, its parts not too long: a key may be any text."""
    return ".".join(cut(str(part).replace("\n", "\\n")) for part in location)
