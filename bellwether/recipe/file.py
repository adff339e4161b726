"""Recipes as files: reading them with overrides, naming every mistake with its place, writing, the shipped ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bellwether.errors import RecipeError
from bellwether.recipe.contradictions import contradictions
from bellwether.recipe.method import METHODS, OwnMethod
from bellwether.recipe.plain import DEEPEST, MOST_BYTES, Location, NotPlain, Unreadable, compose, dotted, plain_value
from bellwether.recipe.recipe import Recipe
from bellwether.tools.words import cut, nearest, shown


@dataclass
class _Source:
    """A recipe as read, before it is typed: values, where each of them stands, and where the others come from."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Location, str] = field(default_factory=dict)
    origin: str = "recipe"

    def place(self, location: Location) -> str:
        """Return where the innermost known part of a location stands, or the first field below it."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        below = (text for known, text in self.places.items() if known[: len(location)] == location)
        return next(below, self.origin)


def load_recipe(path: Path | str | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from YAML, apply overrides, and type it.

    Args:
        path: the YAML file; a text may also name a shipped recipe, such as ``"default"``; None starts from
            the defaults of all fields.
        overrides: texts such as ``training.batch_size=4``; the value is read as YAML.

    Raises:
        RecipeError: anything is wrong; all mistakes are in ``problems``, each with its place.
    """
    problems: list[str] = []
    path = find_recipe(path) if isinstance(path, str) else path
    source = _read_yaml(path, problems) if path else _Source()
    # A method's name first: it leaves the fields of another method behind, and the other overrides are of its own.
    for override in sorted(overrides, key=lambda text: not text.startswith("method.name")):
        _apply_override(source, override, problems)
    return _validated(source, problems)


def _validated(source: _Source, problems: list[str]) -> Recipe:
    """Return the recipe of a source, or raise all its problems at once."""
    problems += [_to_choose(source, location) for location in _marked(source.values)]
    recipe = None
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        problems += _sentences(source, error)
    if recipe is not None:
        problems += [f"{source.place(location)}: {text}" for location, text in contradictions(recipe)]
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any], place: str = "override") -> Recipe:
    """Return a recipe with other values in some of its fields.

    Args:
        recipe: the recipe.
        overrides: values by dotted field, such as ``{"training.batch_size": 4}``.
        place: where they stand, which opens the sentence of every mistake.

    Raises:
        RecipeError: all mistakes at once.
    """
    source = _Source(recipe.model_dump(mode="json"), origin=place)
    for name, value in sorted(overrides.items(), key=lambda item: item[0] != "method.name"):
        _set(source, tuple(name.split(".")), value, place)
    return _validated(source, [])


def dump_recipe(recipe: Recipe, *, comments: bool = False) -> str:
    """Return the recipe as YAML with every field; with comments, each says its unit and meaning."""
    return "".join(_dump_section(recipe, "", comments))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return one line per field in which two recipes differ: ``field: old → new``."""
    flat_old, flat_new = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return [
        f"{key}: {shown(flat_old.get(key))} → {shown(flat_new.get(key))}"
        for key in keys
        if flat_old.get(key) != flat_new.get(key)
    ]


def changed_fields(old: Recipe, new: Recipe) -> dict[str, Any]:
    """Return the dotted fields of a recipe that are others than in the old one, with their values."""
    flat_old, flat_new = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return {field: value for field, value in flat_new.items() if field not in flat_old or flat_old[field] != value}


def _read_yaml(path: Path, problems: list[str]) -> _Source:
    """Read a YAML mapping with the line of every key; what cannot be read is a problem."""
    source = _Source()
    if path.suffix.lower() in (".jsonl", ".json", ".csv", ".parquet"):
        problems.append(f"{path}: this is a data file, not a recipe; give it with --data, or to bellwether init.")
        return source
    try:
        root = compose(_read_text(path))
        if isinstance(root, yaml.MappingNode):
            source.values = plain_value(root, (), lambda line: f"{path}:{line}", source.places, problems)
        elif root is not None:
            problems.append(f"{path}:1: a recipe is a mapping of sections such as 'training:', but this is none.")
    except RecipeError as error:
        problems += error.problems
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(_unreadable(path, error))
    return source


def _read_text(path: Path) -> str:
    """Return the text of a recipe's file."""
    with path.open("rb") as file:  # which may be a pipe, so that its size is known only by reading
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise RecipeError(f"{path}: this has more than {MOST_BYTES} bytes, which no recipe needs; give another file.")
    return content.decode("utf-8-sig")


# Stands in place of a value that a person must choose, as in Hydra's configurations.
CHOOSE = "???"
_FLAGS = {("model", "path"): "--model", ("data", "sources"): "--data"}


def _marked(value: Any, location: Location = ()) -> Iterable[Location]:
    """Yield where values stand that are still to be chosen."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if inner == CHOOSE:
            yield (*location, key)
        else:
            yield from _marked(inner, (*location, key))


def _to_choose(source: _Source, location: Location) -> str:
    """Return the sentence on a value that is still to be chosen."""
    field = tuple(part for part in location if isinstance(part, str))
    flag = f", or give {_FLAGS[field]}" if field in _FLAGS else ""
    meaning = _description(field, "fedavg")
    return f"{source.place(location)}: {dotted(field)} is to be chosen; put it in place of {CHOOSE}{flag} ({meaning})."


def _unreadable(path: Path, error: Exception) -> str:
    """Return the sentence for a recipe that cannot be read at all."""
    if isinstance(error, FileNotFoundError):
        near = nearest(str(path), shipped())
        meant = f"did you mean {near}? Give" if near else "give"
        return f"{path}: there is no such recipe; {meant} the path of a YAML file or one of {', '.join(shipped())}."
    if isinstance(error, OSError):
        return f"{path}: the recipe cannot be read ({error.strerror}); give another one."
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8."
    if isinstance(error, yaml.reader.ReaderError):
        return f"{path}: character {error.position} cannot stand in YAML; remove it."
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = str(getattr(error, "problem", None) or error)
    return (
        f"{place}: {problem}"
        if isinstance(error, NotPlain)
        else f"{place}: this is not YAML ({cut(problem)}); {_remedy(error)}."
    )


def _remedy(error: Exception) -> str:
    """Return what to do about text that is not YAML."""
    open_mark = "found '?'" in str(getattr(error, "problem", ""))
    return f"put a value in place of {CHOOSE}" if open_mark else "mend it"


def _apply_override(source: _Source, override: str, problems: list[str]) -> None:
    """Set one dotted field of a source."""
    name, separator, text = override.partition("=")
    location = tuple(name.strip().split("."))
    if not separator or not all(location) or len(location) > DEEPEST:
        problems.append(f"command line: {shown(override)} is not an override; write section.field=value.")
        return
    try:
        node = compose(text)
        value = None if node is None else plain_value(node, location, lambda _: "command line", {}, problems)
    except NotPlain as error:
        problems.append(f"command line: {dotted(location)}: {error.problem}")
        return
    except (yaml.YAMLError, Unreadable):
        problems.append(f"command line: the value of {dotted(location)} is not YAML: {shown(text)}; quote it.")
        return
    _set(source, location, value, "command line")


def _set(source: _Source, location: tuple[str, ...], value: Any, place: str) -> None:
    """Set one field of a source, making the sections above it where they are not there."""
    target = source.values
    method = target.get("method")
    if location == ("method", "name") and isinstance(method, dict) and method.get("name", "fedavg") != value:
        method.clear()
    for depth, part in enumerate(location[:-1], start=1):
        if not isinstance(target.get(part), dict):
            target[part] = {}
            source.places[location[:depth]] = place
        target = target[part]
    target[location[-1]] = value
    source.places[location] = place


def _sentences(source: _Source, error: ValidationError) -> list[str]:
    """Return one sentence per mistake, though pydantic reports one for each kind of value that a field takes."""
    sentences: dict[Location, str] = {}
    for problem in error.errors():
        kinds = [part for part in problem["loc"] if isinstance(part, str) and part.startswith(("tuple[", "literal["))]
        field = problem["loc"][: problem["loc"].index(kinds[0])] if kinds else problem["loc"]
        # A list whose items are bad counts as too short as well.
        repeated = problem["type"] == "too_short" and any(known[: len(field)] == field for known in sentences)
        if not repeated and (not kinds or field not in sentences):
            location = _without_tag(tuple(part for part in problem["loc"] if part not in (*kinds, "[key]")))
            sentences[field] = _sentence(source, location, problem)
    return list(sentences.values())


def _without_tag(location: Location) -> Location:
    """Return a location without the name of the method that pydantic puts behind the field ``method``."""
    return location[:1] + location[2:] if location[:1] == ("method",) else location


# What pydantic says of values of a wrong kind, in words that need no Python.
_KINDS = {
    "model_type": "this is a section; set fields below it, or leave it out",
    "tuple_type": "a list is wanted, such as [one, two]",
    "dict_type": "a mapping is wanted, such as {one: 1, two: 2}",
    "too_short": "this is empty; name at least one",
}


def _sentence(source: _Source, location: Location, problem: Mapping[str, Any]) -> str:
    """Turn one of pydantic's errors into: place, field, what is wrong, what to do."""
    place = source.place(location)
    method = str(problem["loc"][1]) if problem["loc"][:1] == ("method",) and len(problem["loc"]) > 1 else "fedavg"
    if problem["type"] == "extra_forbidden":
        return f"{place}: there is no field {dotted(location)}{_nearest(location, method)}"
    value = "" if isinstance(problem["input"], dict) else f" is {shown(problem['input'])}"
    message = _KINDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    description = _description(location, method)
    meaning = f" ({description})" if description else ""
    return f"{place}: {dotted(location)}{value}: {message[0].lower() + message[1:]}{meaning}."


def _section_at(location: Sequence[str | int], method: str = "fedavg") -> type[BaseModel] | None:
    """Return the section class at a location, or None; that of the field ``method`` depends on the method's name."""
    section: type[BaseModel] = Recipe
    parts = iter([part for part in location if isinstance(part, str)])  # items of a list are all alike
    for part in parts:
        info = section.model_fields.get(part)
        inner = _inner_section(info.annotation) if info else None
        if section is Recipe and part == "method":
            inner = METHODS.get(method, OwnMethod)
        if info is None or inner is None:
            return None
        section = inner
        if get_origin(info.annotation) is Mapping:
            next(parts, None)  # the name of one of several sections
    return section


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in an annotation such as ``Availability | None``."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _nearest(location: Location, method: str) -> str:
    """Return a hint that names the field nearest to an unknown one, here or in another section."""
    section = _section_at(location[:-1], method)
    if section is None:
        return "; remove it."
    name = cut(str(location[-1]))
    near = nearest(name, section.model_fields)
    if near:
        return f"; did you mean {'.'.join(map(str, (*location[:-1], near)))}?"
    homes = {home: inner.model_fields for home in Recipe.model_fields if (inner := _section_at((home,)))}
    elsewhere = [f"{home}.{name}" for home, fields in homes.items() if name in fields]
    elsewhere += [f"{home}.{near}" for home, fields in homes.items() if (near := nearest(name, fields))]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(section.model_fields)}."


def _description(location: Location, method: str) -> str:
    """Return the description of the field at a location."""
    section = _section_at(location[:-1], method)
    info = section.model_fields.get(str(location[-1])) if section else None
    return (info.description or "") if info else ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and leaf values of nested mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _WrittenOut(yaml.SafeDumper):
    """Writes a value again wherever it is used, since recipes are read without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return that no value is written as an alias."""
        return True


def _dump_section(section: BaseModel, indent: str, comments: bool) -> Iterable[str]:
    """Yield the YAML lines of a section."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:\n"
            yield from _dump_section(value, indent + "  ", comments)
            continue
        if comments and info.description:
            yield f"{indent}# {info.description}\n"
        plain = section.model_dump(mode="json", include={name})[name]
        style: dict[str, Any] = {"default_flow_style": True, "width": 10_000, "allow_unicode": True}
        text = yaml.dump(plain, Dumper=_WrittenOut, sort_keys=False, **style).removesuffix("...\n")
        yield f"{indent}{name}: {text.rstrip()}\n"


# Shipped recipes ----------------------------------------------------------------------------------

RECIPES = Path(__file__).parent / "shipped"


def shipped() -> list[str]:
    """Return the names of the recipes that come with bellwether."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def first_sentence(name: str) -> str:
    """Return what a shipped recipe says of itself first, below the command that runs it."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), (RECIPES / f"{name}.yaml").read_text().splitlines())
    text = " ".join(line.lstrip("# ") for line in list(lines)[2:])
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", text)[0]


def find_recipe(name: str) -> Path:
    """Return the path of a recipe given as a file or as the name of a shipped one."""
    return RECIPES / f"{name}.yaml" if name in shipped() else Path(name)
