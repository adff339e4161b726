"""A finished comparison: what its arms scored, as its folder keeps it.

comparison.json              the arms, with what was chosen for them, and the trials
ARM/seed-5/outcomes.json     what each adapter of an arm scored
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bellwether.errors import BellwetherError, CheckpointError, first_line
from bellwether.exchange.scores import Totals, add_up
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Arm, Recipe
from bellwether.store.checkpoint import RECIPE
from bellwether.tools.atomic import slug, write_atomic
from bellwether.tools.json_text import plain

FILE = "comparison.json"
OUTCOMES, INPUTS = "outcomes.json", "inputs.json"
RUN, ADAPTERS = "run", "adapters"  # of an arm under a seed

Costs = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What one adapter scored on the held-out rows.

    Args:
        arm: the arm's name.
        seed: the run's seed.
        client: whose adapter it is; empty where an arm makes only one.
        categories: of the scored rows, in their order.
        totals: of each row.
        answers: to each row; None where none was generated.
        own: the categories of the client's training rows; empty where an arm makes only one adapter.
        cost: rows used for training (where clients choose rows, those that were ever chosen), and held by all clients
            of the arm; rows and tokens seen; seconds of training, and of surveys where there are any; bytes sent, and
            those that sending the whole base instead would take.
        curve: how the training loss fell: passes over the rows held so far, and loss per token.
        groups: of the scored rows (language or domain), in their order; empty where rows name fewer than two.
        clients: totals of the rows that clients hold out of their own, by client; of a client's own adapter only its
            own.
        adapter: folder of the adapter, seen from the arm's; empty where none is kept.
        failure: why a trial has no scores and counts as the worst; empty where it has some.
    """

    arm: str
    seed: int
    client: str
    categories: tuple[str, ...]
    totals: tuple[Totals, ...]
    answers: tuple[str | None, ...]
    own: tuple[str, ...] = ()
    cost: Costs = field(default_factory=dict)
    curve: tuple[tuple[float, float], ...] = ()
    groups: tuple[str, ...] = ()
    clients: Mapping[str, Totals] = field(default_factory=dict)
    adapter: str = ""
    failure: str = ""

    def by_category(self) -> dict[str, Totals]:
        """Return totals by category."""
        return add_up(zip(self.categories, self.totals, strict=True))


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


def is_done(folder: Path) -> bool:
    """Return whether an arm's folder holds its outcomes."""
    return (folder / OUTCOMES).exists()


def read_outcomes(folder: Path) -> list[Outcome]:
    """Return the outcomes that an arm's folder holds.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        return [_read_outcome(one) for one in json.loads((folder / OUTCOMES).read_bytes())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / OUTCOMES} cannot be read ({first_line(error)}); remove it, and this arm is trained anew."
        ) from error


def _read_outcome(one: Mapping[str, Any]) -> Outcome:
    """Return the outcome behind its JSON, in which a loss that is no number stands as a text."""
    totals = tuple(_read_totals(row) for row in one["totals"])
    lists = {name: tuple(one[name]) for name in ("categories", "answers", "own", "groups")}
    curve = tuple((float(passes), float(loss)) for passes, loss in one["curve"])
    clients = {client: _read_totals(row) for client, row in one["clients"].items()}
    return Outcome(**{**one, **lists, "totals": totals, "curve": curve, "clients": clients})


def _read_totals(row: Mapping[str, Any]) -> Totals:
    return Totals(**{**row, "loss": float(row["loss"])})
