"""Values made of dataclasses, mappings, sequences and numbers as JSON, and as lines of it; and back, typed and checked.

Whatever a damaged file holds, reading it ends in a value of the wanted type, or in a ``ValueError`` of one line that
says what is wrong where; ``reading`` makes of that the sentence for a person, with the file and what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from bellwether.errors import BellwetherError, CheckpointError, first_line
from bellwether.tools.words import clean

T = TypeVar("T")

DEEPEST = 100  # levels of nesting that are read
_LARGEST = 1e100  # of losses
_SHOWN = 40  # characters of a wrong value, or of the way to it, that a sentence repeats


# Writing ------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return a value made of dataclasses, mappings, sequences and numbers as JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def json_lines(values: Iterable[Any]) -> bytes:
    """Return one line of JSON per value, in UTF-8; lone surrogates stay escaped."""
    lines = (json.dumps(plain(value), ensure_ascii=False, allow_nan=False) for value in values)
    # str.splitlines also splits at these, which JSON leaves bare; readers must see one line per value.
    breaks = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
    return "".join(f"{line.translate(breaks)}\n" for line in lines).encode("utf-8", "backslashreplace")


# Types of what is read ----------------------------------------------------------------------------


def _number(value: Any) -> Any:
    """Return a number as ``plain`` wrote it, which may be no finite one; anything else is left to be refused."""
    return float(value) if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") else value


def _believable(loss: float) -> float:
    """Return a loss, refusing a finite one whose square is not."""
    if abs(loss) > _LARGEST and math.isfinite(loss):
        raise ValueError("larger than any loss")
    return loss


Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Truth = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True), BeforeValidator(_number)]  # finite or not
Loss = Annotated[Number, AfterValidator(_believable)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), BeforeValidator(_number)]

# For ``__pydantic_config__`` of what is kept: a name that is not known is a damaged one.
KEPT = ConfigDict(extra="forbid")


# Reading ------------------------------------------------------------------------------------------


def from_json(data: bytes) -> Any:
    """Return the value behind JSON in UTF-8.

    Raises:
        ValueError: it is none, or nested deeper than ``DEEPEST``.
    """
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # the digits that Python reads are limited
        raise ValueError("a number has too many digits") from error
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse what is nested so deep that a function which calls itself might not follow.

    Args:
        value: of JSON's own types.

    Raises:
        ValueError: it is nested deeper than ``DEEPEST``.
    """
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError("nested too deep")
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]


def from_json_lines(data: bytes, make: Callable[[Any], T]) -> list[T]:
    """Return what lines of JSON stand for.

    Args:
        data: the lines, in UTF-8.
        make: turns the value of a line into what it stands for; raises ValueError where it cannot.

    Raises:
        ValueError: a line is not JSON, or stands for nothing; its number is told.
    """
    lines = data.split(b"\n")
    return [_of_line(line, number, make) for number, line in enumerate(lines[: None if lines[-1] else -1], start=1)]


def _of_line(line: bytes, number: int, make: Callable[[Any], T]) -> T:
    try:
        return make(from_json(line))
    except ValueError as error:
        raise ValueError(f"line {number}: {first_line(error)}") from error


def typed(value: Any, kind: Any) -> Any:
    """Return a value of JSON as a type.

    Args:
        value: of ``from_json``.
        kind: the type: a dataclass, a mapping, a sequence; numbers in it as ``Count``, ``Number`` and their like.

    Raises:
        ValueError: it is none of that type; the sentence says which part of it.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(_told(error)) from error


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


# What pydantic says of values of a wrong kind, in words that need no Python.
_KINDS = {
    "missing": "missing",
    "extra_forbidden": "unknown",
    "unexpected_keyword_argument": "unknown",
    "dict_type": "not a mapping",
    "mapping_type": "not a mapping",
    "dataclass_type": "not a mapping",
    "list_type": "not a list",
    "tuple_type": "not a list",
    "sequence_type": "not a list",
    "string_type": "not a text",
    "int_type": "not a whole number",
    "float_type": "not a number",
    "finite_number": "not a finite number",
    "bool_type": "neither true nor false",
    "too_short": "too few",
}


def _told(error: ValidationError) -> str:
    """Return the first thing that is wrong with a value, and where in it."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    message = problem["msg"].removeprefix("Value error, ")
    what = _KINDS.get(problem["type"], message[:1].lower() + message[1:])
    subject = f"{_cut(place)} is" if place else "it is"
    if what in ("missing", "unknown"):
        return f"{subject} {what}"
    return f"{subject} {_cut(_brief(problem['input']))}, {what}"


def _brief(value: Any) -> str:
    """Return a value of JSON in short; of a large one not all is written out."""
    if isinstance(value, dict | list):
        return ("a mapping" if isinstance(value, dict) else "a list") + f" of {len(value)}"
    return repr(value[: 2 * _SHOWN] if isinstance(value, str) else value)


def _cut(text: str) -> str:
    text = clean(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@contextlib.contextmanager
def reading(place: Path | str, remedy: str) -> Iterator[None]:
    """Turn whatever is wrong with a file that is read into one sentence.

    Args:
        place: the file, as it begins the sentence.
        remedy: what a person can do, as it ends the sentence.

    Raises:
        CheckpointError: the file cannot be read, or does not hold what it should.
    """
    try:
        yield
    except (OSError, ValueError, BellwetherError) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else first_line(error)
        raise CheckpointError(f"{place} cannot be read ({reason}); {remedy}.") from error


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """Return what a JSON file holds.

    Args:
        path: the file.
        kind: its type, see ``typed``.
        remedy: what a person can do where it cannot be read.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    with reading(path, remedy):
        return typed(from_json(path.read_bytes()), kind)
