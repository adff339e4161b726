"""What every page ends with: answers side by side, the recipe, the environment."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bellwether.exchange.scores import exact_match
from bellwether.recipe.file import dump_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.report.page.parts import Code, Exchange, Section, Table, words


def exchange(
    category: str, instruction: str, context: str, reference: str, answers: Mapping[str, str | None]
) -> Exchange:
    """Return a question with the answers of several models.

    Args:
        category: of the question.
        instruction: what was asked.
        context: what belongs to it; may be empty.
        reference: the answer that is wanted.
        answers: by name of the model; those that are None are left out.
    """
    shown = [(name, text, exact_match(text, reference)) for name, text in answers.items() if text is not None]
    return Exchange(category, instruction, context, reference, shown)


def answers_section(exchanges: Sequence[Exchange], lead: str) -> list[Section]:
    """Return the section with answers side by side; none where there are no answers."""
    return [Section("answers", "Answers side by side", exchanges, lead)] if exchanges else []


def appendix(recipe: Recipe, environment: Mapping[str, Any]) -> list[Section]:
    """Return the sections with the recipe and with what it ran on.

    Args:
        recipe: with every field.
        environment: names and values, which may be mappings or lists themselves.
    """
    lead = "Every field, as it was resolved. Save it as recipe.yaml to run the same again."
    lines = [[words(name), words(value)] for name, value in _flat(environment)]
    return [
        Section("recipe", "Recipe", [Code("The whole recipe", dump_recipe(recipe))], lead),
        Section("environment", "Environment", [Table("What it ran on", ["what", "value"], lines)]),
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and values of nested mappings; what is not known is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        elif isinstance(value, list):
            yield f"{prefix}{name}", shlex.join(str(item) for item in value)
        elif value is not None:
            yield f"{prefix}{name}", str(value)
