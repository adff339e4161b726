"""What a process has opened and read already, so that nothing is opened twice."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from bellwether.data.prompts import Template
from bellwether.data.rows import Row, Tokenised
from bellwether.data.sources import read_rows
from bellwether.data.tokens import Fitted, tokenise
from bellwether.recipe.recipe import Data, Model, Recipe

if TYPE_CHECKING:
    from bellwether.model.base import OpenedBase


class Opened:
    """Base models, rows of sources, their tokens, and scores of untuned bases, each found when it is first asked for.

    One lives as long as a run, or as a comparison, whose arms and seeds deal the same rows out in other ways. What it
    holds does not travel: whatever a worker process is sent, it opens for itself, once.
    """

    def __init__(self) -> None:
        self.base = functools.cache(_open_base)
        self.read = functools.cache(read_rows)
        self.untuned: dict[Hashable, Sequence[Any]] = {}
        self._tokens: dict[tuple[Model, Data], dict[Row, Fitted]] = collections.defaultdict(dict)

    def tokenise(self, rows: Sequence[Row], recipe: Recipe, template: Template) -> Tokenised:
        """Return rows as tokens, as ``data.tokens.tokenise`` does."""
        known = self._tokens[recipe.model, recipe.data]
        return tokenise(rows, self.base(recipe.model).tokenizer, recipe.data, template, known)

    def __reduce__(self) -> tuple[Callable[[], Opened], tuple[()]]:
        return _of_this_process, ()


@functools.cache
def _of_this_process() -> Opened:
    """Return what a worker process has opened, which lives as long as the process."""
    return Opened()


def _open_base(settings: Model) -> OpenedBase:
    """Import torch and transformers only once the rows are known to be good."""
    from bellwether.model.base import open_base

    return open_base(settings)
