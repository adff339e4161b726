"""The folder of a comparison: whose it is, and that what it holds was made of the same recipe, rows and weights.

recipe.yaml     what is compared, with the number of threads
inputs.json     hashes of rows and weights, device, precision and versions of packages, by arm
.lock, .owner   held by the process that writes here
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bellwether.errors import CheckpointError, RecipeError
from bellwether.exchange.records import Note, Watcher
from bellwether.recipe.file import differences, dump_recipe, load_recipe, with_overrides
from bellwether.recipe.recipe import Model, Recipe
from bellwether.runner.prepare import Prepared, prepared_fingerprint, proxy_facts
from bellwether.store.checkpoint import RECIPE
from bellwether.store.comparison import INPUTS
from bellwether.store.run_folder import describe_environment
from bellwether.tools.atomic import write_atomic
from bellwether.tools.json_text import from_json, reading, typed
from bellwether.tools.lock import held

if TYPE_CHECKING:
    from bellwether.model.base import OpenedBase

VERSIONS = "versions"

Inputs = Mapping[str, Mapping[str, str]]


def with_threads(recipe: Recipe, folder: Path, jobs: int) -> Recipe:
    """Return a recipe that says how many threads each process takes, on which the last bits depend.

    Args:
        recipe: what is compared; its own number of threads stands.
        folder: a comparison that was begun in it goes on with its number, however many jobs there are.
        jobs: processes that share the cores.

    Raises:
        CheckpointError: the recipe in the folder cannot be read.
    """
    import torch

    kept = folder / RECIPE
    begun = _kept(kept).model.threads if kept.exists() else None  # also where it is not asked for: before it is held
    if recipe.model.threads:
        return recipe
    return with_overrides(recipe, {"model.threads": begun or max(1, torch.get_num_threads() // jobs)})


def _kept(path: Path) -> Recipe:
    try:
        return load_recipe(path)
    except RecipeError as error:
        raise CheckpointError(f"{path} cannot be read; give another folder with --out. {error}") from error


def inputs(prepared: Mapping[str, Prepared]) -> Inputs:
    """Return what an arm rests on beside the recipe: hashes of its rows and base model, device and packages."""
    models = {one.recipe.model: one.base for one in prepared.values()}
    of_models = {settings: _of_model(settings, base) for settings, base in models.items()}
    return {
        name: {"rows": prepared_fingerprint(one), **of_models[one.recipe.model], **proxy_facts(one.recipe.selection)}
        for name, one in prepared.items()
    }


def _of_model(settings: Model, base: OpenedBase) -> dict[str, str]:
    """Return what scores of a model rest on beside the rows."""
    from bellwether.model.folder import weights_digest
    from bellwether.model.loading import pick_device

    versions = describe_environment()["versions"].items()
    return {
        "base model": weights_digest(base.folder, settings),
        "device": str(pick_device(settings.device)),
        "dtype": settings.dtype,
        VERSIONS: ", ".join(f"{package} {version}" for package, version in versions),
    }


@contextlib.contextmanager
def claimed(folder: Path, recipe: Recipe, parts: Inputs, watch: Watcher) -> Iterator[None]:
    """Hold the folder as this comparison's own.

    Args:
        folder: made if it does not exist.
        recipe: what is compared, with its number of threads.
        parts: of ``inputs``.
        watch: is told where packages have other versions than when the comparison began.

    Raises:
        CheckpointError: the folder holds something else, is in use, or cannot be written.
    """
    with held(folder, RECIPE):
        _keep_recipe(folder, recipe)
        _keep_inputs(folder, parts, watch)
        yield


def _keep_recipe(folder: Path, recipe: Recipe) -> None:
    """Write what is compared, or check that it is the same as when the comparison began."""
    if (folder / RECIPE).exists():
        changed = differences(_kept(folder / RECIPE), recipe)
        if changed:
            raise CheckpointError(
                f"{folder} holds a comparison of another recipe; undo the change, or give another folder with --out. "
                f"Changed: {'; '.join(changed)}."
            )
    else:
        write_atomic(folder / RECIPE, dump_recipe(recipe).encode())


def _keep_inputs(folder: Path, parts: Inputs, watch: Watcher) -> None:
    """Write what a comparison rests on, or check that it is the same as when it began; packages may be others."""
    path = folder / INPUTS
    then = _kept_inputs(path, parts) if path.exists() else parts
    for name, facts in parts.items():
        for fact, value in facts.items():
            if fact != VERSIONS and then[name][fact] != value:
                raise CheckpointError(
                    f"{folder} cannot go on, because the {fact} of the arm {name} changed since it began; restore "
                    "what was there, or give another folder with --out."
                )
    if any(then[name][VERSIONS] != facts[VERSIONS] for name, facts in parts.items()):
        changed = "Packages have other versions than when the comparison began: arms may differ in their last bits."
        watch(Note(changed, warning=True))
    content = (json.dumps(then, indent=1) + "\n").encode()
    if not path.exists() or path.read_bytes() != content:
        write_atomic(path, content)


def _kept_inputs(path: Path, parts: Inputs) -> Inputs:
    """Read what a comparison rested on when it began; a fact that was not noted then is taken as it is now."""
    with reading(path, "restore it, or give another folder"):
        kept = typed(from_json(path.read_bytes()), dict[str, dict[str, str]])
        missing = next((name for name in parts if name not in kept), None)
        if missing is not None:
            raise ValueError(f"the arm {missing!r} is missing")
        return {name: {**facts, **kept[name]} for name, facts in parts.items()}
