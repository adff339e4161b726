"""A finished comparison: what its arms scored, as its folder keeps it.

comparison.json              the arms, with what was chosen for them, and the trials
ARM/seed-5/outcomes.json     what each adapter of an arm scored
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bellwether.arms import Outcome, read_outcomes
from bellwether.atomic import slug, write_atomic
from bellwether.checkpoint import RECIPE
from bellwether.errors import BellwetherError, CheckpointError, first_line
from bellwether.history import plain
from bellwether.recipe import Arm, Recipe
from bellwether.recipe_file import load_recipe

FILE = "comparison.json"


@dataclass(frozen=True)
class Trial:
    """How an arm did on validation rows, over seeds and clients, with one learning rate and number of passes.

    Args:
        arm: the arm's name.
        learning_rate: AdamW's step size.
        passes: passes over each client's rows.
        score: the macro score that chooses; infinitely bad where the training diverged.
    """

    arm: str
    learning_rate: float
    passes: int
    score: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave.

    Args:
        recipe: what was compared.
        arms: the arms, with what was chosen for them.
        outcomes: one per arm, seed and adapter.
        trials: all trials, where there were any.
    """

    recipe: Recipe
    arms: Mapping[str, Arm]
    outcomes: Sequence[Outcome]
    trials: Sequence[Trial]

    def reference(self, counts_steps: bool) -> str | None:
        """Return the arm that others are compared with: the first federation that counts steps, or passes, as they do.

        Args:
            counts_steps: of the arms that are compared (``Arm.counts_steps``).
        """
        kind = ("federation", counts_steps)
        return next((name for name, arm in self.arms.items() if (arm.trains, arm.counts_steps) == kind), None)


def arm_folder(folder: Path, name: str, seed: int) -> Path:
    """Return where a comparison keeps an arm under a seed.

    Args:
        folder: of the comparison.
        name: of the arm.
        seed: of the run.
    """
    return folder / slug(name) / f"seed-{seed}"


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write what a folder needs beside recipe and outcomes to be read as a finished comparison.

    Args:
        folder: of the comparison.
        comparison: what it gave.
    """
    arms = {name: arm.model_dump(mode="json") for name, arm in comparison.arms.items()}
    content = (json.dumps({"arms": arms, "trials": plain(comparison.trials)}, indent=1) + "\n").encode()
    if not is_comparison(folder) or (folder / FILE).read_bytes() != content:
        write_atomic(folder / FILE, content)


def is_comparison(folder: Path) -> bool:
    """Return whether a folder holds a finished comparison."""
    return (folder / FILE).is_file()


def read_comparison(folder: Path) -> Comparison:
    """Return the finished comparison that a folder holds.

    Args:
        folder: that ``bellwether compare`` wrote.

    Raises:
        CheckpointError: it holds none, or one that cannot be read.
    """
    if not is_comparison(folder):
        raise CheckpointError(f"{folder} holds no finished comparison; go on with bellwether compare --out {folder}.")
    try:
        recipe = load_recipe(folder / RECIPE)
        kept = json.loads((folder / FILE).read_bytes())
        arms = {name: Arm.model_validate(arm) for name, arm in kept["arms"].items()}
        trials = [Trial(**{**trial, "score": float(trial["score"])}) for trial in kept["trials"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, BellwetherError) as error:
        reason = first_line(error)
        raise CheckpointError(f"The comparison in {folder} cannot be read ({reason}); compare again.") from error
    seeds = recipe.compare.seeds if recipe.compare else ()
    outcomes = [one for seed in seeds for name in arms for one in read_outcomes(arm_folder(folder, name, seed))]
    return Comparison(recipe, arms, outcomes, trials)
