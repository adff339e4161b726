"""A second language for the same world: other words, the same names of people and towns, the same order.

Every word of the first language ("english") has one made-up word in the second ("lowland"), drawn from the
world's seed, so that the same world can be told in both and clients can differ in language alone. Grammar is
shared: what this language can show is heterogeneity of words, not of syntax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from starter.world import World, dice

FIRST, SECOND = "english", "lowland"
LANGUAGES = (FIRST, SECOND)

_WORD = re.compile(r"[A-Za-z]+")
_CONSONANTS, _VOWELS = "bdgklmnprstvz", "aeiou"


def make_dictionary(world: World, words: Iterable[str]) -> dict[str, str]:
    """Return the lowland word of every word.

    Words that differ in the capital letter alone ("The", "the") stay so. Names of people and towns are the same
    in both languages and have no entry.

    Args:
        world: whose names and seed are taken.
        words: words of the first language; their order does not matter.
    """
    part = world.everything
    names = {person.name for person in part.people} | {town.name for town in part.towns}
    known = {word for word in words if _WORD.fullmatch(word)} - names
    taken = {word.lower() for word in known | names}
    rng = dice(world.seed, "lowland words")
    coined = [a + v + b + w for a in _CONSONANTS for v in _VOWELS for b in _CONSONANTS for w in _VOWELS]
    free = iter([word for word in rng.sample(coined, len(coined)) if word not in taken])
    made = {word: next(free) for word in sorted({word.lower() for word in known})}
    return {word: made[word.lower()].capitalize() if word[0].isupper() else made[word] for word in sorted(known)}


def translate(text: str, dictionary: Mapping[str, str]) -> str:
    """Return a text in the second language; names, punctuation and bars stay.

    Args:
        text: a text of the first language.
        dictionary: of ``make_dictionary``; words that it does not hold stay as they are.
    """
    return _WORD.sub(lambda found: dictionary.get(found[0], found[0]), text)
