"""How much text a tokenizer is given: all of it at once can take more than two hundred bytes a character.

A text that may keep a number of tokens keeps no more than its first ``CHARACTERS_PER_TOKEN`` times as many characters,
ten times what ordinary text has in them; so nothing behind those is worth tokenising.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

CHARACTERS_PER_TOKEN = 64

# Texts per call of a tokenizer, and their characters: enough to use its threads, few enough to hold their offsets.
_TEXTS = 1024
_CHARACTERS = 1_000_000


def portions(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield the slices of a list of texts that are tokenised at once.

    Args:
        lengths: characters of each text; one that is longer than a portion may be makes one by itself.
    """
    start = total = 0
    for number, length in enumerate(lengths):
        if number > start and (number - start >= _TEXTS or total + length > _CHARACTERS):
            yield slice(start, number)
            start, total = number, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))
