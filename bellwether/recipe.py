"""The recipe: the typed, frozen description of a run.

Every field has a default and says its unit. A recipe is read from YAML, takes dotted overrides
(``training.batch_size=4``), reports all its mistakes at once with file and line, and is saved,
resolved, with the results. It travels downwards only: rooms receive the sections they need.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from bellwether.errors import RecipeError

Location = tuple[str | int, ...]


def _ours_or_own(*ours: str) -> Callable[[str], str]:
    """Return a validator that takes one of our names or ``package.module:function``."""

    def check(value: str) -> str:
        module, _, function = value.partition(":")
        own = function.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if value in ours or own:
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(ours)}, nor package.module:function")

    return check


def _folder_name(value: str) -> str:
    """Check what no system takes as the name of a folder."""
    if not value or "\0" in value:
        raise ValueError("this cannot be the name of a folder")
    return value


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


class Model(Section):
    """The frozen base model."""

    path: str = Field(
        "starter", min_length=1, description="'starter' (embedded), a model folder, or a name on the Hugging Face hub"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub; null takes the default branch")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of the frozen weights and of computing; adapters stay float32"
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="attention implementation; auto takes sdpa where the architecture has it, else eager"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 takes what torch finds")
    trust_remote_code: bool = Field(False, description="run Python code that the model's folder brings along")


class Columns(Section):
    """Which column of the source holds what; null finds the usual names."""

    instruction: str | None = Field(None, description="column name; null tries instruction, prompt, question")
    context: str | None = Field(None, description="column name; null tries context, input")
    response: str | None = Field(None, description="column name; null tries response, output, answer")
    category: str | None = Field(None, description="column name; null tries category")
    messages: str | None = Field(None, description="column with a chat; null tries messages, conversations")


class Data(Section):
    """Which rows there are, how they become text and tokens, and which are held out."""

    sources: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("starter",),
        min_length=1,
        description="files, folders, hub names, or 'starter' (embedded)",
    )
    split: str = Field("train", description="split to take of a data set on the hub")
    revision: str | None = Field(None, description="branch, tag or commit on the hub; null takes the default branch")
    columns: Columns = Columns()
    test_sources: tuple[str, ...] = Field(
        (), description="sources of test rows, instead of holding some of the rows out"
    )
    validation_sources: tuple[str, ...] = Field(
        (), description="sources of validation rows, instead of holding some of the rows out"
    )
    test_rows_per_category: int = Field(10, ge=0, description="rows per category held out for the test")
    validation_rows_per_category: int = Field(0, ge=0, description="rows per category held out for validation")
    unseen_categories: tuple[str, ...] = Field(
        (), description="categories that no client sees; all their rows may serve the test"
    )
    max_rows: int | None = Field(None, ge=1, description="rows taken of the sources, drawn evenly; null takes all")
    template: Literal["auto", "alpaca", "chat"] = Field(
        "auto", description="prompt format; auto takes the tokenizer's chat template, else Alpaca's"
    )
    loss_on: Literal["response", "all"] = Field("response", description="tokens that are trained")
    max_tokens: int = Field(512, ge=8, description="tokens per row, prompt and response together")


class Partition(Section):
    """How rows are dealt to clients."""

    method: Annotated[
        str,
        AfterValidator(_ours_or_own("auto", "iid", "dirichlet", "categories", "shards", "quantity", "column", "files")),
    ] = Field(
        "auto",
        description="auto, iid, dirichlet (by category), categories (k per client), shards (sorted by category), "
        "quantity (unequal sizes), column (a natural one), files (one client each), or package.module:function; "
        "auto: files where there are several, else categories where rows have one, else iid",
    )
    clients: int = Field(10, ge=1, le=100_000, description="number of clients; column and files find their own")
    alpha: float = Field(0.5, gt=0, description="Dirichlet's concentration; small is uneven (dirichlet, quantity)")
    categories_per_client: int = Field(2, ge=1, description="categories at each client (categories)")
    shards_per_client: int = Field(2, ge=1, description="shards at each client (shards)")
    column: str | None = Field(None, description="name of the column that names the client (column)")
    min_rows: int = Field(1, ge=1, description="rows that each client must get")
    client_test_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of its rows that each client holds out and scores itself"
    )


class Lora(Section):
    """The adapter that is trained."""

    rank: int = Field(8, ge=1, description="rows of A and columns of B")
    alpha: float = Field(16.0, gt=0, le=1e6, description="LoRA's alpha; the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="probability of dropping an input of an adapted layer")
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="names of the adapted modules (last part or whole path), or all-linear"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")


class Training(Section):
    """What a client does with its rows in a round."""

    local_epochs: int = Field(1, ge=1, description="passes over the client's rows per round")
    local_steps: int | None = Field(None, ge=1, description="optimizer steps per round, instead of local_epochs")
    batch_size: int = Field(8, ge=1, description="rows per batch")
    accumulation: int = Field(1, ge=1, description="batches per optimizer step")
    learning_rate: float = Field(3e-3, gt=0, description="AdamW's step size in the first round, before the schedule")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay, per step, times the learning rate")
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of a step's gradient; null does not clip")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="learning rate over rounds")
    warmup_rounds: int = Field(0, ge=0, description="rounds over which the learning rate rises to its full value")
    group_by_length: bool = Field(True, description="batches of rows of like length, in random order")


class Availability(Section):
    """Simulated resources of clients: who is away, who is slow, who drops out."""

    away: float = Field(0.0, ge=0, lt=1, description="probability that a client is away in a round")
    drop_out: float = Field(0.0, ge=0, lt=1, description="probability that a client that was asked never answers")
    rows_per_second: float = Field(50.0, gt=0, description="median training speed of a client, rows per second")
    speed_spread: float = Field(
        0.0, ge=0, le=5, description="standard deviation of the logarithm of a client's speed; 0 makes all equal"
    )
    trace: str | None = Field(
        None,
        description="JSONL file with client, round, available, rows_per_second: what holds from that round on",
    )


class Federation(Section):
    """Rounds: who takes part, how long the server waits, how updates become the next adapter."""

    rounds: int = Field(20, ge=1, description="number of rounds")
    sampler: Annotated[str, AfterValidator(_ours_or_own("uniform", "available"))] = Field(
        "uniform", description="how the cohort is drawn: uniform, available, or package.module:function"
    )
    fraction: float = Field(0.5, gt=0, le=1, description="share of the clients in a cohort; at least one is taken")
    cohort_size: int | None = Field(None, ge=1, description="clients in a cohort, instead of fraction")
    aggregate: Annotated[str, AfterValidator(_ours_or_own("fedavg", "uniform"))] = Field(
        "fedavg", description="fedavg (weighted by rows), uniform, or package.module:function"
    )
    quorum: float = Field(0.5, gt=0, le=1, description="share of the cohort whose updates a round needs")
    deadline: float | None = Field(None, gt=0, description="seconds after which replies are left out; null waits")
    failed_rounds: int = Field(
        0, ge=0, description="rounds below the quorum that a run survives, its adapter unchanged; one more ends it"
    )
    max_rows: int = Field(1_000_000, ge=1, description="rows that one update may claim; more is rejected")
    availability: Availability | None = Field(None, description="simulated resources; null: all there, all fast")


class Evaluation(Section):
    """How the adapter is scored on held-out rows, before the first round and after the last."""

    every: int = Field(5, ge=0, description="rounds between evaluations; 0 scores only before and at the end")
    generate: bool = Field(True, description="also generate answers, for ROUGE-L and exact match")
    max_new_tokens: int = Field(48, ge=1, description="tokens generated per answer")
    batch_size: int = Field(32, ge=1, description="rows scored together")
    max_rows_per_category: int | None = Field(None, ge=1, description="test rows scored per category; null scores all")
    part: Literal["test", "validation"] = Field(
        "test", description="held-out rows to score; choose settings on validation, report on test"
    )
    samples: int = Field(8, ge=0, description="scored rows whose answers before and after are shown")


class Output(Section):
    """Where results go."""

    folder: Annotated[str, AfterValidator(_folder_name)] | None = Field(
        None, description="run folder; null makes runs/NAME-N"
    )
    keep_checkpoints: int = Field(2, ge=2, description="rounds whose checkpoints are kept")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = Field(
        (), description="experiment trackers to write to as well"
    )


class Recipe(Section):
    """A whole run. ``Recipe()`` is the embedded default."""

    name: str = Field("default", description="name of the run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(0, ge=0, lt=2**63, description="the number that all draws derive from")
    model: Model = Model()
    data: Data = Data()
    partition: Partition = Partition()
    lora: Lora = Lora()
    training: Training = Training()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()


# Reading ------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """A recipe as read, before it is typed: values, and where each of them stands."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """Return where the innermost known part of a location stands, or the first field below it."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.places:
                return self.places[location[:length]]
        below = (text for known, text in self.places.items() if known[: len(location)] == location)
        return next(below, "recipe")


def load_recipe(path: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from YAML, apply overrides, and type it.

    Args:
        path: the YAML file; None starts from the defaults.
        overrides: texts such as ``training.batch_size=4``; the value is read as YAML.

    Raises:
        RecipeError: anything is wrong; all mistakes are in ``problems``, each with its place.
    """
    problems: list[str] = []
    source = _read_yaml(path, problems) if path else _Source()
    for override in overrides:
        _apply_override(source, override, problems)
    recipe = None
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        problems += _sentences(source, error)
    if recipe is not None:
        problems += [f"{source.place(location)}: {text}" for location, text in _contradictions(recipe)]
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def dump_recipe(recipe: Recipe, *, comments: bool = False) -> str:
    """Return the recipe as YAML with every field; with comments, each says its unit and meaning."""
    return "".join(_dump_section(recipe, "", comments))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return one line per field in which two recipes differ: ``field: old → new``."""
    flat_old, flat_new = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(flat_old.keys() | flat_new.keys())
    return [
        f"{key}: {flat_old.get(key)!r} → {flat_new.get(key)!r}"
        for key in keys
        if flat_old.get(key) != flat_new.get(key)
    ]


def check_recipe(recipe: Recipe) -> None:
    """Check what no single field can know, for recipes that were built in Python.

    Raises:
        RecipeError: fields contradict each other.
    """
    problems = [f"{'.'.join(map(str, location))}: {text}" for location, text in _contradictions(recipe)]
    if problems:
        raise RecipeError(problems)


def _contradictions(recipe: Recipe) -> list[tuple[Location, str]]:
    """Return location and sentence of every pair of fields that cannot stand together."""
    found: list[tuple[Location, str]] = []
    partition, federation = recipe.partition, recipe.federation
    if partition.method == "column" and not partition.column:
        found.append((("partition", "column"), "partition.method is column, so name the column in partition.column."))
    if partition.column and partition.method not in ("column",):
        found.append(
            (
                ("partition", "column"),
                f"partition.column is given, but partition.method is {partition.method}; set it to column.",
            )
        )
    known = partition.method not in ("column", "files", "auto")
    if federation.cohort_size and known and federation.cohort_size > partition.clients:
        found.append(
            (
                ("federation", "cohort_size"),
                f"federation.cohort_size is {federation.cohort_size}, but there are {partition.clients} clients; "
                f"give at most {partition.clients}.",
            )
        )
    if federation.sampler == "available" and federation.availability is None:
        found.append(
            (
                ("federation", "sampler"),
                "federation.sampler is available, but federation.availability is null; say there who is away when.",
            )
        )
    if recipe.training.warmup_rounds >= federation.rounds:
        found.append(
            (
                ("training", "warmup_rounds"),
                f"training.warmup_rounds is {recipe.training.warmup_rounds}, which leaves none of the "
                f"{federation.rounds} rounds at the full learning rate; give fewer.",
            )
        )
    return found


def _read_yaml(path: Path, problems: list[str]) -> _Source:
    """Read a YAML mapping with the line of every key; duplicate keys and bad syntax are problems."""
    source = _Source()
    try:
        text = path.read_bytes().decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        problems.append(
            f"{path}: there is no such recipe; give the path of a YAML file or one of {', '.join(shipped())}."
        )
        return source
    except OSError as error:
        problems.append(f"{path}: the recipe cannot be read ({error.strerror}).")
        return source
    except UnicodeDecodeError as error:
        problems.append(f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8.")
        return source
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problems.append(f"{path}{line}: this is not YAML ({getattr(error, 'problem', None) or error}).")
        return source
    if root is None:
        return source
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{path}:1: a recipe is a mapping of sections such as 'training:', but this is none.")
        return source
    try:
        source.values = _mapping(path, root, (), source.places, problems)
    except RecursionError:
        problems.append(f"{path}: an alias in this recipe stands for what contains it; write it out.")
    return source


def _mapping(
    path: Path, node: yaml.MappingNode, location: Location, places: dict[Location, str], problems: list[str]
) -> dict[str, Any]:
    """Turn a mapping node into a dict, noting places and duplicate keys."""
    values: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        here = (*location, key)
        if key in first:
            problems.append(
                f"{path}:{line}: {'.'.join(map(str, here))} stands twice (first in line {first[key]}); remove one."
            )
            continue
        first[key] = line
        places[here] = f"{path}:{line}"
        if isinstance(value_node, yaml.MappingNode):
            values[key] = _mapping(path, value_node, here, places, problems)
        else:
            try:
                values[key] = yaml.SafeLoader("").construct_object(value_node, deep=True)
            except (yaml.YAMLError, ValueError) as error:  # a tag that is not known, or a date that is none
                reason = getattr(error, "problem", None) or error
                problems.append(
                    f"{path}:{line}: the value of {'.'.join(map(str, here))} cannot be read ({reason}); quote it."
                )
    return values


def _apply_override(source: _Source, override: str, problems: list[str]) -> None:
    """Set one dotted field of a source."""
    dotted, separator, text = override.partition("=")
    location = tuple(dotted.strip().split("."))
    if not separator or not all(location):
        problems.append(f"command line: {override!r} is not an override; write section.field=value.")
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # a ValueError where a date is none
        problems.append(f"command line: the value of {dotted} is not YAML: {text!r}; quote it.")
        return
    target = source.values
    for depth, part in enumerate(location[:-1], start=1):
        if not isinstance(target.get(part), dict):
            target[part] = {}
            source.places[location[:depth]] = "command line"
        target = target[part]
    target[location[-1]] = value
    source.places[location] = "command line"


def _sentences(source: _Source, error: ValidationError) -> list[str]:
    """Return one sentence per mistake, though pydantic reports one for each kind of value that a field takes."""
    sentences: dict[Location, str] = {}
    for problem in error.errors():
        kinds = [part for part in problem["loc"] if isinstance(part, str) and part.startswith(("tuple[", "literal["))]
        field = problem["loc"][: problem["loc"].index(kinds[0])] if kinds else problem["loc"]
        # A list whose items are bad counts as too short as well.
        repeated = problem["type"] == "too_short" and any(known[: len(field)] == field for known in sentences)
        if not repeated and (not kinds or field not in sentences):
            location = tuple(part for part in problem["loc"] if part not in kinds)
            sentences[field] = _sentence(source, location, problem)
    return list(sentences.values())


# What pydantic says of values of a wrong kind, in words that need no Python.
_KINDS = {
    "model_type": "this is a section; set fields below it, or leave it out",
    "tuple_type": "a list is wanted, such as [one, two]",
    "too_short": "the list is empty; name at least one",
}


def _sentence(source: _Source, location: Location, problem: Mapping[str, Any]) -> str:
    """Turn one of pydantic's errors into: place, field, what is wrong, what to do."""
    dotted = ".".join(map(str, location))
    place = source.place(location)
    if problem["type"] == "extra_forbidden":
        return f"{place}: there is no field {dotted}{_nearest(location)}"
    value = "" if isinstance(problem["input"], dict) else f" is {problem['input']!r}"
    message = _KINDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    description = _description(location)
    meaning = f" ({description})" if description else ""
    return f"{place}: {dotted}{value}: {message[0].lower() + message[1:]}{meaning}."


def _section_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the section class at a location, or None."""
    section: type[BaseModel] = Recipe
    for part in location:
        info = section.model_fields.get(str(part))
        inner = _inner_section(info.annotation) if info else None
        if inner is None:
            return None
        section = inner
    return section


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in an annotation such as ``Availability | None``."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _nearest(location: Location) -> str:
    """Return a hint that names the field nearest to an unknown one, here or in another section."""
    section = _section_at(location[:-1])
    if section is None:
        return "; remove it."
    name = str(location[-1])
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    if near:
        return f"; did you mean {'.'.join(map(str, (*location[:-1], near[0])))}?"
    homes = [
        f"{home}.{name}"
        for home in Recipe.model_fields
        if (inner := _section_at((home,))) and name in inner.model_fields
    ]
    if homes:
        return f"; did you mean {homes[0]}?"
    return f"; known here: {', '.join(section.model_fields)}."


def _description(location: Location) -> str:
    """Return the description of the field at a location."""
    section = _section_at(location[:-1])
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
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n")
        yield f"{indent}{name}: {text.rstrip()}\n"


# Shipped recipes ----------------------------------------------------------------------------------

RECIPES = Path(__file__).parent / "recipes"


def shipped() -> list[str]:
    """Return the names of the recipes that come with bellwether."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the path of a recipe given as a file or as the name of a shipped one."""
    return RECIPES / f"{name}.yaml" if name in shipped() else Path(name)
