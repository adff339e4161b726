"""The facts of the world as sentences: what the prose states, and what instructions ask for.

A bar stands before the part of a sentence that follows from the world and the words before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starter.scenes import join
from starter.world import Good, Part, Person, Town, Trade

Entity = Person | Town | Good | Trade


@dataclass(frozen=True)
class Relation:
    """One kind of fact: whose it is (``people``, ``towns``, ``goods`` or ``trades``) and how it is stated."""

    group: str
    state: Callable[[Any], str]


def _lives(person: Person) -> str:
    return f"{person.name} lives in| {person.town}."


def _works(person: Person) -> str:
    return f"{person.name} works as a| {person.trade}."


def _lies(town: Town) -> str:
    return f"{town.name} lies by the| {town.landform}."


def _market(town: Town) -> str:
    return f"{town.name} has its market on| {town.day}."


def _buy(town: Town) -> str:
    return f"In {town.name} you can buy| {join(town.goods)}."


def _meet(town: Town) -> str:
    return f"In {town.name} you can meet| {join(town.people)}."


def _see(town: Town) -> str:
    return f"In {town.name} you can see the| {join(town.sights)}."


def _learn(town: Town) -> str:
    return f"In {town.name} you can learn to| {join(town.deeds)}."


def _kind(good: Good) -> str:
    return f"The kind of the {good.name} is| {good.kind}."


def _colour(good: Good) -> str:
    return f"The colour of the {good.name} is| {good.colour}."


def _container(good: Good) -> str:
    return f"The {good.name} is kept in a| {good.container}."


def _price(good: Good) -> str:
    return f"The price of the {good.name} is| {good.price} coins."


def _workplace(trade: Trade) -> str:
    return f"The {trade.name} works in the| {trade.workplace}."


def _hat(trade: Trade) -> str:
    return f"The {trade.name} wears a| {trade.hat} hat."


RELATIONS: Mapping[str, Relation] = {
    "lives": Relation("people", _lives),
    "works": Relation("people", _works),
    "lies": Relation("towns", _lies),
    "market": Relation("towns", _market),
    "buy": Relation("towns", _buy),
    "meet": Relation("towns", _meet),
    "see": Relation("towns", _see),
    "learn": Relation("towns", _learn),
    "kind": Relation("goods", _kind),
    "colour": Relation("goods", _colour),
    "container": Relation("goods", _container),
    "price": Relation("goods", _price),
    "workplace": Relation("trades", _workplace),
    "hat": Relation("trades", _hat),
}


def entities(part: Part, relation: str) -> Sequence[Entity]:
    """Return the entities of a part that have a relation."""
    groups: Mapping[str, Sequence[Entity]] = {
        "people": part.people,
        "towns": part.towns,
        "goods": part.goods,
        "trades": part.trades,
    }
    return groups[RELATIONS[relation].group]


def statements(part: Part) -> list[str]:
    """Return every fact of a part as a sentence."""
    return [relation.state(entity) for name, relation in RELATIONS.items() for entity in entities(part, name)]


def plain(sentence: str) -> str:
    """Return a sentence without its bar."""
    return sentence.replace("|", "")
