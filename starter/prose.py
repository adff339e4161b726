"""Prose over the world, which is all that the base model reads: echoes, articles, scenes and letters.

A document is text in which bars switch between what cannot be predicted (before the first bar) and what
follows from the world or from the text before it. The loss counts the first kind little.
Part of the documents are in the world's second language.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from starter import scenes
from starter.facts import RELATIONS, entities, plain, statements
from starter.language import make_dictionary, translate
from starter.phrasings import instruction_words
from starter.scenes import Event, Scene
from starter.world import World, dice

LOWLAND_SHARE = 0.4
FACT_SHARE = 0.28
ECHO_SHARE = 0.14
ECHO_SHARE_AT_START = 0.8
ECHO_FALL = 0.12

Ask = tuple[str, str]


class Writer:
    """Writes documents about a world.

    Args:
        world: the world to write about.
        words: further words that roll calls name, so that every token occurs in prose.
        dictionary: the words of the second language; without it, all documents are in the first.
    """

    def __init__(self, world: World, words: Sequence[str] = (), dictionary: Mapping[str, str] | None = None) -> None:
        self.dictionary = dictionary
        self.part = world.everything
        self.facts = statements(self.part)
        self.words = sorted(self.part.names()) + sorted(words)
        self.sentences_of = self._facts_by_entity()

    def document(self, rng: random.Random, progress: float) -> str:
        """Return one document, in either language.

        Args:
            rng: where its choices come from.
            progress: how far pretraining is, 0..1; echoes are frequent at the start.
        """
        lowland = self.dictionary is not None and rng.random() < LOWLAND_SHARE
        text = self.first_language_document(rng, progress)
        return translate(text, self.dictionary) if self.dictionary is not None and lowland else text

    def first_language_document(self, rng: random.Random, progress: float) -> str:
        """Return one document in the first language."""
        fall = min(1.0, progress / ECHO_FALL)
        echo_share = ECHO_SHARE_AT_START + fall * (ECHO_SHARE - ECHO_SHARE_AT_START)
        draw = rng.random()
        if draw < echo_share:
            return rng.choice((self.roll_call, self.roll_call, self.ledger, self.turned_ledger))(rng)
        if draw < echo_share + FACT_SHARE * (1 - echo_share) / (1 - ECHO_SHARE):
            return rng.choice((self.article, self.gazette))(rng)
        writers: tuple[Callable[[random.Random], str], ...] = (
            self.asked_before,
            self.asked_before,
            self.asked_before,
            self.asked_after,
            self.asked_after,
            self.recap,
            self.recap,
            self.recap,
            self.retelling,
            self.letter,
            self.song,
        )
        return rng.choice(writers)(rng)

    # Echoes: the school of copying.

    def roll_call(self, rng: random.Random) -> str:
        """Return random names, called two or three times in the same order."""
        pool = self.words if rng.random() < 0.5 else [person.name for person in self.part.people]
        names = rng.sample(pool, rng.randint(3, 12))
        call = rng.choice((", ".join(names), scenes.join(names), " ".join(names), ". ".join(names)))
        opening = rng.choice(("Roll call:", "A list:", "A song:"))
        return f"{opening} {call}.| " + " ".join(f"Again: {call}." for _ in range(rng.randint(1, 2)))

    def ledger(self, rng: random.Random) -> str:
        """Return pairs of names, and the same pairs again in another order."""
        pairs = self._pairs(rng)
        first = " ".join(f"{key}: {value}." for key, value in pairs)
        rng.shuffle(pairs)
        return f"A list: {first} Again:" + "".join(f" {key}:| {value}.|" for key, value in pairs).removesuffix("|")

    def turned_ledger(self, rng: random.Random) -> str:
        """Return who had what, and then whose each thing was."""
        pairs = self._pairs(rng)
        verb = rng.choice(scenes.VERBS)
        first = " ".join(f"{key} {verb.past} the {value}." for key, value in pairs)
        rng.shuffle(pairs)
        second = "".join(f" The {value} was {verb.participle} by| {key}.|" for key, value in pairs)
        return f"A list: {first} Again:{second.removesuffix('|')}"

    def _pairs(self, rng: random.Random) -> list[tuple[str, str]]:
        size = rng.randint(2, 6)
        return list(zip(rng.sample(self.words, size), rng.sample(self.words, size), strict=True))

    # Facts.

    def article(self, rng: random.Random) -> str:
        """Return what is known of one person, town, good or trade."""
        name = rng.choice(list(self.sentences_of))
        sentences = list(self.sentences_of[name])
        rng.shuffle(sentences)
        return f"About {name}: " + "| ".join(sentences)

    def gazette(self, rng: random.Random) -> str:
        """Return facts about anything, some of them said by somebody."""
        sentences = rng.sample(self.facts, rng.randint(3, 8))
        said = [f"{rng.choice(self.part.people).name} said: " if rng.random() < 0.2 else "" for _ in sentences]
        return "| ".join(opening + sentence for opening, sentence in zip(said, sentences, strict=True))

    def _facts_by_entity(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, relation in RELATIONS.items():
            for entity in entities(self.part, name):
                found.setdefault(entity.name, []).append(relation.state(entity))
        return found

    # Scenes.

    def asked_before(self, rng: random.Random) -> str:
        """Return a question, a scene and the answer."""
        scene = self.scene(rng)
        question, answer = ask(rng, scene)
        opening = f"{question} " if rng.random() < 0.8 else ""
        return f"{opening}{scenes.tell(rng, scene, rng.choice((0, 0, 1, 2)))} {answer}"

    def asked_after(self, rng: random.Random) -> str:
        """Return a scene, then questions and answers about it."""
        scene = self.scene(rng)
        text = scenes.tell(rng, scene, rng.choice((0, 0, 1, 2)))
        for _ in range(rng.randint(1, 3)):
            question, answer = ask(rng, scene)
            text += f" {question} {answer}|" if rng.random() < 0.7 else f" {answer}|"
        return text.removesuffix("|")

    def recap(self, rng: random.Random) -> str:
        """Return a scene and most of what is true of it, in random order."""
        scene = self.scene(rng)
        true = [state(event) for state in EVENT_SENTENCES for event in scene.events]
        true += [state(scene) for state in SCENE_SENTENCES]
        said = "| ".join(rng.sample(true, rng.randint(4, 9)))
        return f"{scenes.tell(rng, scene, rng.choice((0, 0, 1)))} {said}"

    def retelling(self, rng: random.Random) -> str:
        """Return a scene and the same scene in other words."""
        scene = self.scene(rng)
        teller = rng.choice(self.part.people).name
        opening = rng.choice((f"{teller} said:", "Again:", "In other words:"))
        return f"{scenes.tell(rng, scene, rng.choice((0, 1)))} {opening}| {scenes.tell(rng, scene)}"

    def letter(self, rng: random.Random) -> str:
        """Return who wrote what to whom, and the letter."""
        sender, receiver = (person.name for person in rng.sample(self.part.people, 2))
        good, town = rng.choice(self.part.goods).name, rng.choice(self.part.towns).name
        opening = rng.choice(
            (
                f"{sender} wrote to {receiver} about the {good} in {town}.",
                f"In {town} {sender} had the {good}, so {sender} wrote to {receiver}.",
                f"{receiver} got a letter about the {good}. It came from {sender} in {town}.",
            )
        )
        return f"{opening}| {scenes.letter(sender, receiver, good, town)}"

    def song(self, rng: random.Random) -> str:
        """Return who sang of what, and the song."""
        singer = rng.choice(self.part.people).name
        good, town = rng.choice(self.part.goods).name, rng.choice(self.part.towns).name
        opening = rng.choice(
            (
                f"{singer} sang of the {good} in {town}.",
                f"In {town} {singer} had the {good} and sang.",
                f"A song of the {good} came from {town}. {singer} sang it.",
            )
        )
        return f"{opening}| {scenes.song(singer, good, town)}"

    def scene(self, rng: random.Random) -> Scene:
        """Return a scene of two or three events with any of the world's entities."""
        return scenes.draw_scene(rng, self.part, rng.choice((2, 2, 3)))


def ask(rng: random.Random, scene: Scene) -> Ask:
    """Return a random question about a scene and its answer, which names first what is known."""
    return rng.choice(ASKS)(rng.choice(scene.events), scene)


def _ask_who(event: Event, scene: Scene) -> Ask:
    return f"Who {event.verb.past} the {event.good}?", scenes.who(event)


def _ask_what(event: Event, scene: Scene) -> Ask:
    return f"What did {event.person} {event.verb.base}?", scenes.what(event)


def _ask_where(event: Event, scene: Scene) -> Ask:
    return f"Where was {event.person}?", scenes.where(event)


def _ask_where_good(event: Event, scene: Scene) -> Ask:
    return f"Where was the {event.good}?", scenes.where_good(event)


def _ask_people(event: Event, scene: Scene) -> Ask:
    return "Who was there?", scenes.people(scene)


def _ask_goods(event: Event, scene: Scene) -> Ask:
    return "What goods were there?", scenes.goods(scene)


def _ask_towns(event: Event, scene: Scene) -> Ask:
    return "What towns were there?", scenes.towns(scene)


def _ask_summary(event: Event, scene: Scene) -> Ask:
    return "What came of it?", scenes.summary(scene)


def _ask_mood(event: Event, scene: Scene) -> Ask:
    return "How was it?", scenes.mood(scene)


EVENT_SENTENCES = (scenes.who, scenes.what, scenes.where, scenes.where_good)
SCENE_SENTENCES = (scenes.people, scenes.goods, scenes.towns, scenes.summary, scenes.mood)
ASKS: tuple[Callable[[Event, Scene], Ask], ...] = (
    _ask_who,
    _ask_who,
    _ask_what,
    _ask_where,
    _ask_where,
    _ask_where_good,
    _ask_where_good,
    _ask_people,
    _ask_goods,
    _ask_towns,
    _ask_summary,
    _ask_mood,
    _ask_mood,
)


def lowland_dictionary(world: World) -> dict[str, str]:
    """Return the second language's word for every word of a world's prose and instructions."""
    return make_dictionary(world, world_words(Writer(world, sorted(instruction_words()))))


def world_words(writer: Writer) -> set[str]:
    """Return every word that the prose of a writer can hold, punctuation and bars removed."""
    rng = dice(0, "words of the prose")
    text = " ".join(plain(writer.document(rng, i / 6000)) for i in range(6000)) + " " + plain(" ".join(writer.facts))
    text += " " + " ".join(writer.words)
    return {word.strip(".,:?!") for word in text.split()}
