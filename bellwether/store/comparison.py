"""A finished comparison: what its arms scored, as its folder keeps it.

comparison.json              the arms, with what was chosen for them, and the trials
ARM/seed-5/outcomes.json     what each adapter of an arm scored
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from bellwether.errors import CheckpointError
from bellwether.exchange.scores import Totals, add_up
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Arm, Recipe
from bellwether.store.checkpoint import RECIPE
from bellwether.tools.atomic import slug, write_atomic
from bellwether.tools.json_text import KEPT, Amount, Count, Number, from_json, plain, read_json, reading, typed

FILE = "comparison.json"
OUTCOMES, INPUTS = "outcomes.json", "inputs.json"
RUN, ADAPTERS = "run", "adapters"  # of an arm under a seed

_COUNTED = ("rows", "rows_of_all", "rows_seen", "tokens", "seconds")  # in all costs


def _whole_costs(costs: Mapping[str, float]) -> Mapping[str, float]:
    """Return costs, refusing those of which a share of the rows cannot be told."""
    if costs and not (costs.keys() >= set(_COUNTED) and costs["rows_of_all"] > 0):
        raise ValueError(f"not all of {', '.join(_COUNTED)}")
    return costs


def _inside(path: str) -> str:
    """Return a path, refusing one that does not lead to a folder below."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or not path.isprintable():
        raise ValueError("no folder of the arm")
    return path


Costs = Annotated[Mapping[str, Amount], AfterValidator(_whole_costs)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


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

    __pydantic_config__ = KEPT

    arm: str
    seed: Seed
    client: str
    categories: tuple[str, ...]
    totals: tuple[Totals, ...]
    answers: tuple[str | None, ...]
    own: tuple[str, ...] = ()
    cost: Costs = field(default_factory=dict)
    curve: tuple[tuple[Amount, Number], ...] = ()
    groups: tuple[str, ...] = ()
    clients: Mapping[str, Totals] = field(default_factory=dict)
    adapter: Annotated[str, AfterValidator(_inside), Field(max_length=300)] = ""
    failure: str = ""

    def by_category(self) -> dict[str, Totals]:
        """Return totals by category."""
        return add_up(zip(self.categories, self.totals, strict=True))


@dataclass(frozen=True)
class Trial:
    """How an arm did on validation rows, over seeds and clients, with one learning rate and number of passes.

    Args:
        arm: the arm's name.
        learning_rate: the optimizer's step size.
        passes: passes over each client's rows.
        score: the macro score that chooses; infinitely bad where the training diverged.
    """

    __pydantic_config__ = KEPT

    arm: str
    learning_rate: Amount
    passes: Count
    score: Number


@dataclass(frozen=True)
class _Kept:
    """What ``comparison.json`` holds."""

    arms: Mapping[str, Arm]
    trials: tuple[Trial, ...]


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
    with reading(folder / RECIPE, "restore it, or compare anew in another folder"):
        recipe = load_recipe(folder / RECIPE)
    kept = _read_kept(folder, recipe)
    seeds = recipe.compare.seeds if recipe.compare else ()
    outcomes = [
        one for seed in seeds for name in kept.arms for one in read_outcomes(arm_folder(folder, name, seed), name, seed)
    ]
    check_outcomes(folder, outcomes)
    return Comparison(recipe, kept.arms, outcomes, kept.trials)


def _read_kept(folder: Path, recipe: Recipe) -> _Kept:
    """Return the arms and trials of the comparison of a recipe."""
    remedy = f"go on with bellwether compare --out {folder}, which writes it anew"
    with reading(f"The comparison in {folder / FILE}", remedy):
        kept: _Kept = typed(from_json((folder / FILE).read_bytes()), _Kept)
        arms = recipe.compare.arms if recipe.compare else {}
        if {name: arm.trains for name, arm in arms.items()} != {name: arm.trains for name, arm in kept.arms.items()}:
            raise ValueError(f"its arms are not those of {RECIPE}")
        unknown = [trial.arm for trial in kept.trials if trial.arm not in arms]
        if unknown:
            raise ValueError(f"it has trials of an arm {unknown[0]!r:.40}, which is not there")
    return kept


def is_done(folder: Path) -> bool:
    """Return whether an arm's folder holds its outcomes."""
    return (folder / OUTCOMES).exists()


def read_outcomes(folder: Path, arm: str | None = None, seed: int | None = None) -> list[Outcome]:
    """Return the outcomes that an arm's folder holds.

    Args:
        folder: of an arm under a seed.
        arm: whose outcomes they must be; None takes any.
        seed: under which they must have come; None takes any.

    Raises:
        CheckpointError: they cannot be read, or are others.
    """
    outcomes: list[Outcome] = read_json(folder / OUTCOMES, Annotated[list[Outcome], Field(min_length=1)], _REMEDY)
    with reading(folder / OUTCOMES, _REMEDY):
        for one in outcomes:
            if arm not in (None, one.arm) or seed not in (None, one.seed):
                raise ValueError(f"it is of the arm {one.arm!r:.40} under seed {one.seed}")
            if not len(one.totals) == len(one.answers) == len(one.categories) or len(one.groups) not in (
                0,
                len(one.totals),
            ):
                raise ValueError("it has not as many totals as answers, categories and groups")
    return outcomes


def check_outcomes(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Refuse outcomes that cannot stand beside one another.

    Args:
        folder: of the comparison.
        outcomes: of all its arms and seeds.

    Raises:
        CheckpointError: there are none, or one of them has no finite scores, or those of other rows than the first.
    """
    if not outcomes:
        raise CheckpointError(f"{folder / RECIPE} compares nothing; restore it, or compare anew in another folder.")
    for one in outcomes:
        with reading(arm_folder(folder, one.arm, one.seed) / OUTCOMES, _REMEDY):
            if not all(math.isfinite(row.loss) for row in (*one.totals, *one.clients.values())):
                raise ValueError("its losses are not finite")
            if not one.totals or one.categories != outcomes[0].categories:
                raise ValueError(f"its rows are not those of the arm {outcomes[0].arm!r} under seed {outcomes[0].seed}")


_REMEDY = "remove it, and this arm is trained anew"
