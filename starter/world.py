"""The made-up world behind the embedded default: its people, towns, goods, trades and the facts about them.

Everything follows from one seed. Every person, town, good and trade belongs to one of three splits, and
facts stay inside a split (people of the test live in towns of the test), so that instruction rows of
different splits share no entity, but for trades, which are split only where they are asked about. The prose
that the base model reads speaks of all of them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bellwether.tools.randomness import derive_seed
from starter.phrasings import instruction_words

SPLITS = ("train", "validation", "test")
SHIPPED_SEED = 1
"""The seed of the world that is shipped."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "food": ("bread", "cheese", "honey", "salt", "rice", "corn", "butter", "pepper"),
    "cloth": ("wool", "silk", "linen", "felt", "lace", "velvet", "ribbon", "thread"),
    "tool": ("hammer", "saw", "needle", "shovel", "rake", "chisel", "ladder", "knife"),
    "drink": ("milk", "cider", "tea", "wine", "juice", "ale", "broth", "mead"),
    "toy": ("kite", "doll", "drum", "puppet", "ball", "whistle", "marble", "hoop"),
    "jewel": ("pearl", "ring", "crown", "brooch", "ruby", "amber", "chain", "jade"),
}
TRADES = [
    "baker",
    "smith",
    "weaver",
    "tailor",
    "miller",
    "potter",
    "carpenter",
    "fisher",
    "shepherd",
    "painter",
    "teacher",
    "doctor",
    "singer",
    "gardener",
    "mason",
    "cooper",
]
WORKPLACES = [
    "barn",
    "tower",
    "cellar",
    "hall",
    "yard",
    "shed",
    "loft",
    "tent",
    "cave",
    "cabin",
    "inn",
    "harbour",
    "orchard",
    "kitchen",
    "workshop",
    "school",
]
LANDFORMS = ["river", "lake", "hill", "sea", "forest", "moor", "road", "cliff"]
SIGHTS = [
    "bridge",
    "well",
    "gate",
    "square",
    "market",
    "wall",
    "statue",
    "fountain",
    "chapel",
    "clock",
    "library",
    "stable",
    "temple",
    "pier",
]
DEEDS = [
    "swim",
    "fish",
    "ride",
    "climb",
    "dance",
    "paint",
    "read",
    "row",
    "ski",
    "sail",
    "hunt",
    "cook",
    "knit",
    "sleep",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow", "brown", "grey"]
CONTAINERS = ["box", "jar", "sack", "chest", "basket", "barrel", "crate", "bowl"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine"]

PEOPLE_PER_SPLIT = {"train": 66, "validation": 18, "test": 36}
TOWNS_PER_SPLIT = {"train": 18, "validation": 6, "test": 10}
TRADES_PER_SPLIT = {"train": 9, "validation": 2, "test": 5}
GOODS_PER_KIND_AND_SPLIT = {"train": 4, "validation": 1, "test": 3}


@dataclass(frozen=True)
class Person:
    """A person, the town they live in and their trade."""

    name: str
    town: str
    trade: str


@dataclass(frozen=True)
class Town:
    """A town: where it lies, its market day, and four lists of three things each, in a fixed order."""

    name: str
    landform: str
    day: str
    goods: tuple[str, ...]
    people: tuple[str, ...]
    sights: tuple[str, ...]
    deeds: tuple[str, ...]


@dataclass(frozen=True)
class Good:
    """A thing that is bought and sold."""

    name: str
    kind: str
    colour: str
    container: str
    price: str


@dataclass(frozen=True)
class Trade:
    """A trade, where it is done and the colour of the hat that goes with it."""

    name: str
    workplace: str
    hat: str


@dataclass(frozen=True)
class Part:
    """The entities of one split, or of all splits together."""

    people: tuple[Person, ...]
    towns: tuple[Town, ...]
    goods: tuple[Good, ...]
    trades: tuple[Trade, ...]

    def names(self) -> set[str]:
        """Return the names of all entities."""
        groups: tuple[Sequence[Person | Town | Good | Trade], ...] = (self.people, self.towns, self.goods, self.trades)
        return {entity.name for group in groups for entity in group}


@dataclass(frozen=True)
class World:
    """A whole world: one part per split."""

    seed: int
    parts: Mapping[str, Part]

    @property
    def everything(self) -> Part:
        """All entities of all splits."""
        parts = self.parts.values()
        return Part(
            tuple(person for part in parts for person in part.people),
            tuple(town for part in parts for town in part.towns),
            tuple(good for part in parts for good in part.goods),
            tuple(trade for part in parts for trade in part.trades),
        )


def dice(seed: int, purpose: str, number: int = 0) -> random.Random:
    """Return a generator that belongs to (seed, purpose, number) alone.

    Python's own generator is used instead of NumPy's since single draws from it are ten times faster.
    """
    return random.Random(derive_seed(seed, purpose, round=number))


def make_world(seed: int = SHIPPED_SEED) -> World:
    """Return the world of a seed: names, facts and splits.

    Args:
        seed: any integer; the same one gives the same world.
    """
    rng = dice(seed, "world")
    names = _names(rng, sum(PEOPLE_PER_SPLIT.values()))
    towns = _town_names(rng, sum(TOWNS_PER_SPLIT.values()), set(names))
    trades = _trades(rng)
    parts = {}
    for split in SPLITS:
        own_names = [names.pop() for _ in range(PEOPLE_PER_SPLIT[split])]
        own_towns = [towns.pop() for _ in range(TOWNS_PER_SPLIT[split])]
        parts[split] = _part(rng, split, own_names, own_towns, trades)
    return World(seed, parts)


def _part(rng: random.Random, split: str, names: Sequence[str], towns: Sequence[str], trades: Sequence[Trade]) -> Part:
    """Return the entities of a split, with facts drawn for them."""
    # Homes are dealt round robin, so that every town has at least three people.
    people = tuple(Person(name, towns[i % len(towns)], rng.choice(TRADES)) for i, name in enumerate(names))
    goods = tuple(
        Good(name, kind, rng.choice(COLOURS), rng.choice(CONTAINERS), rng.choice(NUMBERS))
        for kind in KINDS
        for name in _goods_of(kind, split)
    )
    first = sum(TRADES_PER_SPLIT[other] for other in SPLITS[: SPLITS.index(split)])
    own_trades = tuple(trades[first : first + TRADES_PER_SPLIT[split]])
    return Part(people, tuple(_town(rng, town, people, goods) for town in towns), goods, own_trades)


def _town(rng: random.Random, name: str, people: Sequence[Person], goods: Sequence[Good]) -> Town:
    """Return a town with facts drawn for it."""
    return Town(
        name=name,
        landform=rng.choice(LANDFORMS),
        day=rng.choice(DAYS),
        goods=tuple(good.name for good in rng.sample(goods, 3)),
        people=tuple(person.name for person in people if person.town == name)[:3],
        sights=tuple(rng.sample(SIGHTS, 3)),
        deeds=tuple(rng.sample(DEEDS, 3)),
    )


def _trades(rng: random.Random) -> list[Trade]:
    """Return all trades in random order, each with a workplace of its own."""
    workplaces = rng.sample(WORKPLACES, len(TRADES))
    trades = [Trade(name, place, rng.choice(COLOURS)) for name, place in zip(TRADES, workplaces, strict=True)]
    rng.shuffle(trades)
    return trades


def _goods_of(kind: str, split: str) -> tuple[str, ...]:
    """Return the names of a kind's goods that belong to a split."""
    first = sum(GOODS_PER_KIND_AND_SPLIT[other] for other in SPLITS[: SPLITS.index(split)])
    return KINDS[kind][first : first + GOODS_PER_KIND_AND_SPLIT[split]]


def _names(rng: random.Random, count: int) -> list[str]:
    """Return names of people, such as Mira: no things, no words of instructions, no two that differ in the end only."""
    stems = [a + v + c for a in "BDFGHJKLMNPRSTVWZ" for v in "aeiou" for c in "dlmnrvz"]
    names = [stem + rng.choice("aeio") for stem in stems]
    things = [
        *TRADES,
        *WORKPLACES,
        *LANDFORMS,
        *SIGHTS,
        *DEEDS,
        *COLOURS,
        *(good for kind in KINDS.values() for good in kind),
    ]
    taken = {word.lower() for word in (*things, *instruction_words())}
    return rng.sample([name for name in names if name.lower() not in taken], count)


def _town_names(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """Return names of towns, such as Tarwick, whose first three letters begin no person's name."""
    taken = {name[:3] for name in taken}
    stems = [a + v + c for a in "BDFGHKLMNPRSTW" for v in "aeiou" for c in "rnlst"]
    free = [stem for stem in stems if stem not in taken]
    return [stem + rng.choice(("wick", "holm", "ford", "dale", "mere", "ton")) for stem in rng.sample(free, count)]
