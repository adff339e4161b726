"""Instruction rows over the world, in Dolly's eight categories, split into training, validation and test.

    python -m starter.instructions --out FOLDER

writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``, and in the folder ``lowland`` the same rows told
in the second language. Entities and phrasings of the three do not overlap. Every response is one sentence or two
of the kind that the prose holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from starter import scenes
from starter.facts import RELATIONS, Entity, entities, plain
from starter.language import FIRST, LANGUAGES, SECOND, translate
from starter.phrasings import CATEGORIES, PHRASINGS
from starter.prose import lowland_dictionary
from starter.scenes import Event, Scene
from starter.world import SHIPPED_SEED, SPLITS, Part, World, dice, make_world

ROWS_PER_CATEGORY: Mapping[str, int] = {"train": 90, "validation": 20, "test": 40}

Row = dict[str, str]
Draw = Callable[[random.Random, Part], tuple[dict[str, str], str, str]]


def make_rows(world: World, split: str, language: str = FIRST) -> list[Row]:
    """Return the rows of a split, categories one after another.

    Args:
        world: the world that the rows are about.
        split: train, validation or test.
        language: english or lowland; the rows are the same ones, told in the one or the other.
    """
    rng = dice(world.seed, f"rows {split}")
    rows = [row for category in CATEGORIES for row in _category_rows(rng, world.parts[split], split, category)]
    if language == FIRST:
        return rows
    dictionary = lowland_dictionary(world)
    told = ("instruction", "context", "response")
    return [row | {name: translate(row[name], dictionary) for name in told} | {"language": SECOND} for row in rows]


def _category_rows(rng: random.Random, part: Part, split: str, category: str) -> list[Row]:
    """Return rows of a category, its tasks and their phrasings equally often, no instance twice before all once."""
    rows: list[Row] = []
    decks = {task: _deck(rng, part, task) for task in CATEGORIES[category]}
    turns = 0
    while len(rows) < ROWS_PER_CATEGORY[split]:
        task = CATEGORIES[category][turns % len(decks)]
        phrasings = PHRASINGS[task][split]
        slots, context, response = decks[task]()
        instruction = phrasings[turns // len(decks) % len(phrasings)].format(**slots)
        row = {"instruction": instruction, "context": context, "response": response, "category": category}
        row["language"] = FIRST
        turns += 1
        if row not in rows:
            rows.append(row)
    return rows


def _deck(rng: random.Random, part: Part, task: str) -> Callable[[], tuple[dict[str, str], str, str]]:
    """Return a function that draws instances of a task: slots of the phrasing, context, response."""
    if task in RELATIONS:
        return _fact_deck(rng, part, task)
    return lambda: SCENE_TASKS[task](rng, part)


def _fact_deck(rng: random.Random, part: Part, task: str) -> Callable[[], tuple[dict[str, str], str, str]]:
    """Return a function that draws facts, each entity once before any comes again."""
    pile: list[Entity] = []

    def draw() -> tuple[dict[str, str], str, str]:
        if not pile:
            pile.extend(entities(part, task))
            rng.shuffle(pile)
        entity = pile.pop()
        return {"name": entity.name}, "", plain(RELATIONS[task].state(entity))

    return draw


def _about_event(answer: Callable[[Event], str]) -> Draw:
    """Return a drawer of questions about one event of a scene."""

    def draw(rng: random.Random, part: Part) -> tuple[dict[str, str], str, str]:
        scene = scenes.draw_scene(rng, part, rng.choice((2, 2, 3)))
        event = rng.choice(scene.events)
        verb = event.verb
        slots = {
            "person": event.person,
            "good": event.good,
            "base": verb.base,
            "past": verb.past,
            "participle": verb.participle,
        }
        return slots, scenes.tell(rng, scene, rng.choice((0, 0, 1))), plain(answer(event))

    return draw


def _about_scene(answer: Callable[[Scene], str], fillers: Sequence[int]) -> Draw:
    """Return a drawer of tasks about a whole scene, told with some sentences that say nothing."""

    def draw(rng: random.Random, part: Part) -> tuple[dict[str, str], str, str]:
        scene = scenes.draw_scene(rng, part, rng.choice((2, 2, 3)))
        return {}, scenes.tell(rng, scene, rng.choice(fillers)), plain(answer(scene))

    return draw


def _letter(rng: random.Random, part: Part) -> tuple[dict[str, str], str, str]:
    sender, receiver = (person.name for person in rng.sample(part.people, 2))
    good, town = rng.choice(part.goods).name, rng.choice(part.towns).name
    slots = {"sender": sender, "receiver": receiver, "good": good, "town": town}
    return slots, "", scenes.letter(sender, receiver, good, town)


def _song(rng: random.Random, part: Part) -> tuple[dict[str, str], str, str]:
    singer = rng.choice(part.people).name
    good, town = rng.choice(part.goods).name, rng.choice(part.towns).name
    return {"singer": singer, "good": good, "town": town}, "", scenes.song(singer, good, town)


SCENE_TASKS: Mapping[str, Draw] = {
    "who": _about_event(scenes.who),
    "what": _about_event(scenes.what),
    "where": _about_event(scenes.where),
    "where_good": _about_event(scenes.where_good),
    "people": _about_scene(scenes.people, (0, 0, 1)),
    "goods": _about_scene(scenes.goods, (0, 0, 1)),
    "towns": _about_scene(scenes.towns, (0, 0, 1)),
    "summary": _about_scene(scenes.summary, (1, 2)),
    "mood": _about_scene(scenes.mood, (0, 0, 1)),
    "letter": _letter,
    "song": _song,
}


def write_rows(world: World, folder: Path) -> list[Path]:
    """Write the rows of all splits and languages as JSONL and return the files.

    Args:
        world: the world that the rows are about.
        folder: where the files go; made if it does not exist.
    """
    paths = []
    for language in LANGUAGES:
        place = folder if language == FIRST else folder / language
        place.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            path = place / f"{split}.jsonl"
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(world, split, language)]
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text("".join(lines), encoding="utf-8")
            os.replace(unfinished, path)
            paths.append(path)
    return paths


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the instruction rows of the embedded default.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train, validation and test.jsonl")
    parser.add_argument("--seed", type=int, default=SHIPPED_SEED, help="seed of the world")
    arguments = parser.parse_args()
    for path in write_rows(make_world(arguments.seed), arguments.out):
        print(path)


if __name__ == "__main__":
    main()
