"""Whose word it is that code is run: what a recipe names, and what of that a person typed themselves.

A recipe may name functions (``package.module:function``), and may let a model's folder run code that it brings along.
On a command line that is the person's own word. In a file or folder it is the word of whoever wrote that, and the
person at the keyboard is asked before any of it is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bellwether.recipe.file import with_overrides
from bellwether.recipe.plain import Location
from bellwether.recipe.recipe import Recipe
from bellwether.recipe.section import OursOrOwn
from bellwether.tools.functions import file_of

TRUST, PATH = "model.trust_remote_code", "model.path"


@dataclass(frozen=True)
class Code:
    """Python code that a recipe would run.

    Args:
        field: of the recipe, that names it.
        name: ``package.module:function``, or the model that brings it along.
        said_at: where in the recipe that is said; all of it takes part.
    """

    field: str
    name: str
    said_at: tuple[Location, ...] = ()

    @property
    def described(self) -> str:
        """What would be run, and from where, for a person to judge."""
        if self.field == TRUST:
            path = Path(self.name).absolute() if Path(self.name).exists() else self.name
            return f"the code that the model {path} brings along ({self.field})"
        return f"{self.name} from {file_of(self.name) or 'a module that is not found here'} ({self.field})"


def code_in(recipe: Recipe, *, arms: bool = False) -> list[Code]:
    """Return the code that a recipe would run, other than bellwether's own; nothing is imported.

    Args:
        recipe: the recipe.
        arms: whether the arms of its comparison count, too.

    Raises:
        RecipeError: an arm sets what cannot be set.
    """
    found = list(_named(recipe, {}))
    for name, arm in (recipe.compare.arms if arms and recipe.compare else {}).items():
        changed = with_overrides(recipe, {"compare": None, **arm.set}, f"compare.arms.{name}")
        found += _named(changed, {field: ("compare", "arms", name, "set", field) for field in arm.set})
    return list(dict.fromkeys(found))


def model_code(recipe: Recipe) -> list[Code]:
    """Return the code that loading a recipe's base model would run."""
    return [code for code in code_in(recipe) if code.field == TRUST]


def not_typed(codes: Iterable[Code], overrides: Iterable[str]) -> list[Code]:
    """Return the code that is not a person's own word, each once.

    Args:
        codes: of ``code_in``.
        overrides: what the person typed, such as ``method.name=my_methods:remembering``.
    """
    codes = list(codes)
    typed = [tuple(override.partition("=")[0].strip().split(".")) for override in overrides]
    own = {(code.field, code.name) for code in codes if all(_is_within(place, typed) for place in code.said_at)}
    others = {(code.field, code.name): code for code in codes if (code.field, code.name) not in own}
    return list(others.values())


def _is_within(place: Location, typed: Sequence[Location]) -> bool:
    """Return whether a place in the recipe, or a section around it, is among those that a person typed."""
    return any(place[: len(one)] == one for one in typed)


def _named(recipe: Recipe, arm: Mapping[str, Location]) -> Iterator[Code]:
    """Yield the code that a recipe names; ``arm`` holds the places of the fields that an arm has set."""
    for field, name in _functions(recipe, ""):
        yield Code(field, name, (_place(field, arm) or tuple(field.split(".")),))
    if recipe.model.trust_remote_code:
        trust, path = _place(TRUST, arm) or tuple(TRUST.split(".")), _place(PATH, arm)
        yield Code(TRUST, recipe.model.path, (trust, path) if path else (trust,))


def _place(field: str, arm: Mapping[str, Location]) -> Location | None:
    """Return where an arm sets a field, or a section around it; None where it does not."""
    return next((place for name, place in arm.items() if f"{field}.".startswith(f"{name}.")), None)


def _functions(section: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield dotted field and name of every function that is a person's own."""
    for name, info in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _functions(value, f"{prefix}{name}.")
        elif ":" in str(value) and any(isinstance(getattr(mark, "func", None), OursOrOwn) for mark in info.metadata):
            yield f"{prefix}{name}", value
