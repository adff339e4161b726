"""Scenes: a few random events in the world, told in several ways, and sentences that are true of them.

All sentences about a scene name first what is known and then what follows from it ("The wool was sold by
Mira."), because a small model learns to look things up forwards only. The same sentences serve as recaps in
prose and as responses to instructions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from starter.world import DAYS, Part

FILLERS = (
    "It rained all day.",
    "The wind was cold.",
    "The sun was out.",
    "Birds sang in the trees.",
    "Nobody said much.",
    "The night was long.",
    "Snow fell on the roofs.",
    "A dog slept in the shade.",
)


@dataclass(frozen=True)
class Verb:
    """What can be done with a good: base form, past, participle, and the mood it gives a tale."""

    base: str
    past: str
    participle: str
    mood: str


VERBS = (
    Verb("sell", "sold", "sold", "calm"),
    Verb("buy", "bought", "bought", "calm"),
    Verb("carry", "carried", "carried", "calm"),
    Verb("wash", "washed", "washed", "calm"),
    Verb("show", "showed", "shown", "calm"),
    Verb("weigh", "weighed", "weighed", "calm"),
    Verb("find", "found", "found", "happy"),
    Verb("win", "won", "won", "happy"),
    Verb("lose", "lost", "lost", "sad"),
    Verb("break", "broke", "broken", "sad"),
)
MOODS = ("happy", "sad", "calm")


@dataclass(frozen=True)
class Event:
    """Somebody did something with a good in a town."""

    person: str
    verb: Verb
    good: str
    town: str


@dataclass(frozen=True)
class Scene:
    """Events with no person, verb, good or town in common, and one mood."""

    events: tuple[Event, ...]
    mood: str


def draw_scene(rng: random.Random, part: Part, size: int) -> Scene:
    """Return a random scene of ``size`` events with entities of a part."""
    mood = rng.choice(MOODS)
    verbs = rng.sample([verb for verb in VERBS if verb.mood == "calm"], size)
    if mood != "calm":
        verbs[rng.randrange(size)] = rng.choice([verb for verb in VERBS if verb.mood == mood])
    events = zip(
        rng.sample(part.people, size), verbs, rng.sample(part.goods, size), rng.sample(part.towns, size), strict=True
    )
    return Scene(tuple(Event(person.name, verb, good.name, town.name) for person, verb, good, town in events), mood)


def tell(rng: random.Random, scene: Scene, fillers: int = 0) -> str:
    """Return a scene as prose, each event in one of three ways, with some sentences that say nothing."""
    sentences = [_tell_event(rng, event) for event in scene.events]
    for filler in rng.sample(FILLERS, fillers):
        sentences.insert(rng.randrange(len(sentences) + 1), filler)
    return " ".join(sentences)


def _tell_event(rng: random.Random, event: Event) -> str:
    """Return an event as a sentence: town, person, good, so that at the good all else of the event is known."""
    opening = rng.choice(("In", "Not far from", "At the market of", f"On {rng.choice(DAYS)} in"))
    return f"{opening} {event.town} {event.person} {event.verb.past} the {event.good}."


# Sentences that are true of a scene; a bar stands before what a reader can know only from the scene.


def who(event: Event) -> str:
    """Say who did it."""
    return f"The {event.good} was {event.verb.participle} by| {event.person}."


def what(event: Event) -> str:
    """Say what the person dealt with."""
    return f"{event.person} {event.verb.past} the| {event.good}."


def where(event: Event) -> str:
    """Say where the person was."""
    return f"{event.person} was in| {event.town}."


def where_good(event: Event) -> str:
    """Say where the good was."""
    return f"The {event.good} was in| {event.town}."


def join(items: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def people(scene: Scene) -> str:
    """List the people in the order of the telling."""
    return "The people were| " + join([event.person for event in scene.events]) + "."


def goods(scene: Scene) -> str:
    """List the goods in the order of the telling."""
    return "The goods were| " + join([event.good for event in scene.events]) + "."


def towns(scene: Scene) -> str:
    """List the towns in the order of the telling."""
    return "The towns were| " + join([event.town for event in scene.events]) + "."


def summary(scene: Scene) -> str:
    """Say who did what, without towns and weather."""
    return "In short,| " + join([f"{e.person} {e.verb.past} the {e.good}" for e in scene.events]) + "."


def mood(scene: Scene) -> str:
    """Say what mood the scene has."""
    return f"The tale is| {scene.mood}."


def letter(sender: str, receiver: str, good: str, town: str) -> str:
    """Return a letter that offers a good."""
    return f"Dear {receiver}, I have the {good} for you. Come to {town} soon. Your friend {sender}."


def song(singer: str, good: str, town: str) -> str:
    """Return a song about a good."""
    return f"Sing, {singer}, sing of the {good}. Sing in {town} till the {good} is gone."
