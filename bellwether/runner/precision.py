"""Which precision a machine computes in, where a recipe leaves that to it.

Processors without units for bfloat16 multiply slower in it than in float32, others many times as fast. What was found
stands in the recipe of the run from then on, so that going on with it, or with a comparison, computes in the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from bellwether.errors import CheckpointError, RecipeError
from bellwether.method.named import make_method
from bellwether.recipe.file import load_recipe, with_overrides
from bellwether.recipe.method import MethodSection
from bellwether.recipe.recipe import Model, Recipe
from bellwether.runner.estimate import product_rate
from bellwether.store.checkpoint import RECIPE

WORTH = 1.5  # times as fast, from which on bfloat16 is taken: norms, attention and sums stay in float32 all the same
TRIES = 3  # of which the best counts, since other processes make some slow
TOKENS, WIDTH = 256, 1024  # of the products that are timed


def with_precision(recipe: Recipe, folder: Path | None, tell: Callable[[str], None]) -> Recipe:
    """Return a recipe that says in which precision it computes.

    Args:
        recipe: whose ``model.dtype`` may be ``auto``.
        folder: where it was begun, or will be; what was found there before stands. None looks nowhere.
        tell: is told what was found, in a sentence.

    Raises:
        CheckpointError: the recipe in the folder cannot be read.
        ModelError: the device that the recipe names is not there.
        RecipeError: a person's own method is not there.
    """
    if recipe.model.dtype != "auto":
        return recipe
    if folder is not None and (folder / RECIPE).exists():
        return with_overrides(recipe, {"model.dtype": kept_recipe(folder).model.dtype})
    folding = [section.name for section in _methods(recipe) if make_method(section).folds]
    if folding:
        tell(f"model.dtype auto takes float32, since the method {folding[0]} folds updates into the base.")
        return with_overrides(recipe, {"model.dtype": "float32"})
    times = speed_up(recipe.model)
    dtype = "bfloat16" if times >= WORTH else "float32"
    text = f"model.dtype auto takes {dtype}: products are {times:.1f} times as fast in bfloat16 as in float32 here"
    tell(f"{text}, and {WORTH:g} times is what it is taken for.")
    return with_overrides(recipe, {"model.dtype": dtype})


def _methods(recipe: Recipe) -> Iterator[MethodSection]:
    """Yield the method of a recipe, and of a comparison those of its arms."""
    yield recipe.method
    for name, arm in (recipe.compare.arms if recipe.compare else {}).items():
        fields = {field: value for field, value in arm.set.items() if field.startswith("method.")}
        if fields:
            yield with_overrides(recipe, fields, f"compare.arms.{name}").method


def kept_recipe(folder: Path) -> Recipe:
    """Return the recipe in the folder of a run or a comparison, with what was found when that began.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return load_recipe(folder / RECIPE)
    except RecipeError as error:
        text = f"{folder / RECIPE} cannot be read; restore it, or give another folder. {error}"
        raise CheckpointError(text) from error


def speed_up(settings: Model) -> float:
    """Return how many times as fast as in float32 this machine multiplies matrices in bfloat16, measured now.

    Args:
        settings: device and threads.

    Raises:
        ModelError: the device is not there.
    """
    best = {"float32": 0.0, "bfloat16": 0.0}
    for _ in range(TRIES):
        for dtype, rate in best.items():
            measured = product_rate(dtype, settings, TOKENS, WIDTH, WIDTH, seconds=0.05)
            best[dtype] = max(rate, measured)
    return best["bfloat16"] / best["float32"]
