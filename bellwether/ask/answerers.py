"""Who can be asked: the untuned base and every adapter that a finished folder holds.

A folder is that of a run, of a comparison, of an adapter in PEFT's format, or of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bellwether.errors import CheckpointError, ModelError, RecipeError
from bellwether.exchange.adapter import CONFIG_FILE, Adapter, read_adapter
from bellwether.model.gguf import is_gguf
from bellwether.recipe.file import load_recipe, with_overrides
from bellwether.recipe.recipe import Model, Recipe
from bellwether.store.checkpoint import RECIPE
from bellwether.store.comparison import Comparison, arm_folder, is_comparison, read_comparison
from bellwether.store.run_folder import ADAPTER

BASE, FEDERATED = "base", "federated"


@dataclass(frozen=True)
class Answerer:
    """A model that can be asked.

    Args:
        name: such as ``base``, ``federated`` or ``local, client-03``.
        recipe: says how its base is loaded and how prompts are made.
        adapter: what stands over the base; None is the untuned base.
        arm: the arm of a comparison that made it; else empty.
        client: the client that trained it alone; else empty.
    """

    name: str
    recipe: Recipe
    adapter: Adapter | None
    arm: str = ""
    client: str = ""


def find_answerer(text: str, *, seed: int | None = None, model: str | None = None) -> Answerer:
    """Return one answerer.

    Args:
        text: a folder, or ``FOLDER:NAME`` for one of those that it holds; of a folder alone the federated one, or the
            only one beside the base, or else the base.
        seed: of a comparison, the seed whose adapters are meant; None takes the first.
        model: path or hub name of the base; None takes the one that the folder names.

    Raises:
        CheckpointError: there is nothing finished in the folder.
        ModelError: an adapter cannot be read.
        RecipeError: the folder holds nothing of that name, or several that could be meant.
    """
    folder, name = _split(text)
    found = {one.name: one for one in find_answerers(Path(folder), seed=seed, model=model)}
    if not name:
        tuned = [other for other in found if other != BASE]
        name = FEDERATED if FEDERATED in found else tuned[0] if len(tuned) == 1 else "" if tuned else BASE
    if name in found:
        return found[name]
    known = ", ".join(map(repr, found))
    if name:
        raise RecipeError(f"{folder} holds no {name!r}; it has {known}.")
    raise RecipeError(f"{text} holds several models; name one, as in {text!r}:NAME, of {known}.")


def _split(text: str) -> tuple[str, str]:
    """Return folder and name of ``FOLDER:NAME``; both may hold colons, the folder is the shortest that exists."""
    parts = text.split(":")
    whole = Path(text).exists()
    for count in range(1, len(parts)):
        folder = ":".join(parts[:count])
        if not whole and folder and Path(folder).exists():
            return folder, ":".join(parts[count:])
    return text, ""


def find_answerers(folder: Path, *, seed: int | None = None, model: str | None = None) -> list[Answerer]:
    """Return all that can be asked of a folder, the untuned base first, each under a name of its own.

    Args:
        folder: of a finished run or comparison, of an adapter, or of a model.
        seed: of a comparison, the seed whose adapters are meant; None takes the first.
        model: path or hub name of the base; None takes the one that the folder names.

    Raises:
        CheckpointError: there is nothing finished in the folder.
        ModelError: an adapter cannot be read, or does not name its base.
        RecipeError: the comparison does not have the seed, or a seed or model is given that has no effect.
    """
    compared = is_comparison(folder)
    if seed is not None and not compared:
        raise RecipeError(
            f"{folder} holds no comparison, so there is no seed {seed} of it to choose; leave the seed out."
        )
    found = _of_comparison(folder, seed) if compared else _of_one(folder, model)
    return found if model is None else [moved(one, path=model, revision=None) for one in found]


def moved(answerer: Answerer, **changes: str | None) -> Answerer:
    """Return an answerer whose base is loaded otherwise.

    Args:
        answerer: whose.
        changes: fields of the recipe's section ``model`` that are others.

    Raises:
        RecipeError: a field cannot have this value.
    """
    fields = {f"model.{field}": value for field, value in changes.items()}
    return replace(answerer, recipe=with_overrides(answerer.recipe, fields))


def _of_one(folder: Path, model: str | None) -> list[Answerer]:
    """Return what can be asked of the folder of a run, an adapter or a model."""
    if (folder / RECIPE).is_file():
        if not (folder / ADAPTER).is_dir():
            raise CheckpointError(f"What is in {folder} is not finished; go on with it first.")
        recipe = load_recipe(folder / RECIPE)
        return [Answerer(BASE, recipe, None), Answerer(FEDERATED, recipe, read_adapter(folder / ADAPTER))]
    if (folder / CONFIG_FILE).is_file():
        adapter, name = read_adapter(folder), folder.absolute().name
        path = model or adapter.config.base_model
        if not path:
            raise ModelError(f"The adapter in {folder} does not name its base model; give it with --model.")
        recipe = Recipe(model=Model(path=path))
        return [Answerer(BASE, recipe, None), Answerer(_tuned(name), recipe, adapter)]
    if (folder / "config.json").is_file() or (folder.is_file() and is_gguf(folder)):
        if model is not None:
            raise RecipeError(f"{folder} is a model itself, so the model {model} has no effect; leave one of them out.")
        return [Answerer(BASE, Recipe(model=Model(path=str(folder))), None)]
    raise CheckpointError(f"{folder} holds no run, comparison, adapter or model; give a folder with one of them.")


def _tuned(name: str) -> str:
    """Return the name of what is tuned; that of the untuned base is taken."""
    return f"{name} (tuned)" if name == BASE else name


def _of_comparison(folder: Path, seed: int | None) -> list[Answerer]:
    """Return what can be asked of a comparison under a seed."""
    comparison = read_comparison(folder)
    return [Answerer(BASE, comparison.recipe, None), *_compared(folder, comparison, seed)]


def _compared(folder: Path, comparison: Comparison, seed: int | None) -> Iterator[Answerer]:
    """Yield the adapters of all arms of a comparison under a seed."""
    seeds = list(dict.fromkeys(outcome.seed for outcome in comparison.outcomes))
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise RecipeError(f"The comparison in {folder} has no seed {seed}; it has {', '.join(map(str, seeds))}.")
    for outcome in comparison.outcomes:
        if outcome.seed == seed and outcome.adapter:
            recipe = with_overrides(comparison.recipe, {"compare": None, **comparison.arms[outcome.arm].set})
            adapter = read_adapter(arm_folder(folder, outcome.arm, seed) / outcome.adapter)
            name = _tuned(", ".join(filter(None, (outcome.arm, outcome.client))))
            yield Answerer(name, recipe, adapter, outcome.arm, outcome.client)
