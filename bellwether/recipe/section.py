"""What every part of the recipe is made of: a section, and the checks that fields share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from bellwether.tools.words import shown


@dataclass(frozen=True)
class OursOrOwn:
    """Takes one of our names, or ``package.module:function``, which runs a person's own code.

    Args:
        ours: our names.
    """

    ours: tuple[str, ...]

    def __call__(self, value: str) -> str:
        """Return the value, or raise ValueError."""
        module, _, function = value.partition(":")
        own = function.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if value in self.ours or own:
            return value
        raise ValueError(f"{shown(value)} is not one of {', '.join(self.ours)}, nor package.module:function")


def ours_or_own(*ours: str) -> Callable[[str], str]:
    """Return a validator that takes one of our names or ``package.module:function``."""
    return OursOrOwn(ours)


def folder_name(value: str) -> str:
    """Check what no system takes as the name of a folder."""
    if not value or "\0" in value:
        raise ValueError("this cannot be the name of a folder")
    return value


def arm_name(value: str) -> str:
    """Check what cannot stand in a line of a table."""
    if not 0 < len(value.strip()) <= 64 or not value.isprintable() or value != value.strip():
        raise ValueError("the name of an arm has 1 to 64 printable characters, and no space at its ends")
    return value


def whole_numbers(single: bool) -> Callable[[Any], Any]:
    """Return a validator that takes two whole numbers of at least 1, or a single one where that is allowed."""
    wanted = "a whole number of at least 1, or two such as [1, 3]" if single else "two of at least 1, such as [20, 60]"

    def check(value: Any) -> Any:
        several = isinstance(value, (list, tuple)) and len(value) == 2
        for number in value if several else [value]:
            if type(number) is not int or number < 1 or not (single or several):
                raise ValueError(f"give {wanted}")
        return value

    return check


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown fields, no infinite or undefined numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is wanted, which pydantic would take as 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not wanted here")
        return value
