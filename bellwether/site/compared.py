"""Did joining help? The base, what the site tunes alone, and the federation, on the site's own held-out rows.

Tuning alone is the same recipe on the same rows without rounds, with as many passes over them, or steps, as the
federation's rounds made here. All of it happens after the federation ended, and none of it leaves the site.

FOLDER/comparison/inputs.json                     hashes of what it rests on; others begin it anew
FOLDER/comparison/ARM/seed-N/outcomes.json        what an arm scored, row by row
FOLDER/comparison/alone/seed-N/adapters/alone/    what the site tuned alone
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bellwether.data.rows import Tokenised
from bellwether.exchange.adapter import WEIGHTS_FILE, adapter_files, read_adapter
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Arm, Recipe
from bellwether.runner.local import Trained, scored_outcome, train_locally, without_rounds
from bellwether.runner.prepare import Prepared, prepared_fingerprint
from bellwether.site.trained import TrainedRows, row_hash
from bellwether.store.comparison import (
    ADAPTERS,
    INPUTS,
    OUTCOMES,
    Comparison,
    Outcome,
    arm_folder,
    is_done,
    read_outcomes,
)
from bellwether.store.run_folder import ADAPTER
from bellwether.tools.atomic import make_folder, remove, write_atomic, write_folder_atomic
from bellwether.tools.json_text import json_lines, plain, read_json
from bellwether.tools.randomness import Randomness
from bellwether.tools.words import counted

COMPARISON = "comparison"
BASE, ALONE, FEDERATED = "base", "alone", "federated"

NO_COMPARISON = (
    "No rows are held out here, so nothing will be compared at the end: give rows that are never trained on with "
    "--test FILE, to be told what the federation brings."
)

# Of the arms, the site's own rows are all rows that there are here.
_ARMS = {BASE: Arm(trains="nobody"), ALONE: Arm(trains="together"), FEDERATED: Arm(trains="federation")}
CALLED = {BASE: "untuned base", ALONE: "adapter tuned here alone", FEDERATED: "federation's adapter"}


@dataclass(frozen=True)
class Compared:
    """What a site's held-out rows say.

    Args:
        comparison: what each arm scored.
        notes: sentences on how long tuning alone took, rows that were trained on, and arms that are missing.
    """

    comparison: Comparison
    notes: tuple[str, ...]


def held_out_here(prepared: Prepared) -> Prepared:
    """Return what a site has, with the rows that it compares on as those that are scored.

    Args:
        prepared: its rows: those that are scored beside the federation, or else those that its client holds out.
    """
    own = [row for part in prepared.held_out.values() for row in part.rows]
    return replace(prepared, held_out={}, scored=prepared.scored if prepared.scored.rows else Tokenised(own))


def compare_here(
    folder: Path,
    prepared: Prepared,
    rounds: int,
    trained: TrainedRows,
    load: Callable[[], Base],
    tell: Callable[[str], None],
) -> Compared:
    """Return the comparison on a site's held-out rows; what of it is done already is not done again.

    Args:
        folder: the site's own, with the federation's adapter.
        prepared: of ``held_out_here``.
        rounds: in how many rounds what this site trained was counted.
        trained: the rows that it trained on in them.
        load: loads the base model, where anything is left to do.
        tell: is told of what happens, in sentences.

    Raises:
        BellwetherError: it cannot be trained or scored, or the folder cannot be read or written.
    """
    place, seed = folder / COMPARISON, prepared.recipe.seed
    length = _length(prepared.recipe, rounds)
    _begin_anew_on_other_rows(folder, prepared, length)
    arms = {name: arm for name, arm in _ARMS.items() if name != ALONE or rounds}
    left = [name for name in arms if not is_done(arm_folder(place, name, seed))]
    if left:
        base = load()
        layers = LoraLayers(base.model, initial_adapter(base, prepared.recipe.lora, _drawn(seed)).config)
        for name in left:
            rows = counted(len(prepared.scored.rows), "held-out row")
            tuned = f"An adapter is tuned on this site's rows alone, {length.words}, and"
            tell(f"{tuned if name == ALONE else f'The {CALLED[name]} is'} scored on {rows}.")
            _do(name, folder, arm_folder(place, name, seed), prepared, length, base, layers)
        layers.detach()
    outcomes = [one for name in arms for one in read_outcomes(arm_folder(place, name, seed), name, seed)]
    diverged = [one.arm for one in outcomes if not all(math.isfinite(row.loss) for row in one.totals)]
    kept = {name: arm for name, arm in arms.items() if name not in diverged}
    notes = [f"Tuned alone: {length.words}." if rounds else "This site trained in no round, so nothing is tuned alone."]
    notes += _on_trained_rows(prepared, trained)
    notes += [f"The {CALLED[name]} has no finite loss, and is left out: its training diverged." for name in diverged]
    return Compared(Comparison(prepared.recipe, kept, [one for one in outcomes if one.arm in kept], ()), tuple(notes))


def _on_trained_rows(prepared: Prepared, trained: TrainedRows) -> list[str]:
    """Return sentences on held-out rows that were trained on, and on rows that were and are here no more."""
    notes, rows = [], prepared.scored.rows
    known = {*trained.ever}
    twins = sum(row_hash(row.row) in known for row in rows)
    if twins:
        of = counted(len(rows), "held-out row")
        notes.append(
            f"{twins:,} of {of} stand among the rows that were trained on as well, and say little of new ones."
        )
    others = len(known - {*trained.now})
    if others:
        notes.append(f"The federation was also given what this site learnt of {counted(others, 'row')} it has no more.")
    return notes


@dataclass(frozen=True)
class _Length:
    """How long a site tunes alone: fields of the recipe, and words for people."""

    fields: dict[str, object]
    words: str


def _length(recipe: Recipe, rounds: int) -> _Length:
    """Return the passes, or steps, that so many rounds make."""
    training = recipe.training
    if training.local_steps is not None:
        steps = training.local_steps * rounds
        many = counted(steps, "step")
        fields = without_rounds(steps=max(1, steps))
    else:
        passes = training.local_epochs * rounds
        many = counted(passes, "pass", "passes") + " over its rows"
        fields = without_rounds(passes=max(1, passes))
    return _Length(fields, f"with {many}, as in its {counted(rounds, 'round')} of the federation")


def _begin_anew_on_other_rows(folder: Path, prepared: Prepared, length: _Length) -> None:
    """Remove a comparison that rests on something else."""
    place = folder / COMPARISON
    weights = (folder / ADAPTER / WEIGHTS_FILE).read_bytes()
    inputs = {
        "rows": prepared_fingerprint(prepared),
        "adapter": hashlib.sha256(weights).hexdigest(),
        "training": json.dumps(length.fields),
    }
    path = place / INPUTS
    if path.exists() and read_json(path, dict[str, str], "remove it, to compare anew") != inputs:
        remove(place)
    if not path.exists():
        write_atomic(make_folder(place) / INPUTS, json_lines([inputs]))


def _do(
    name: str, folder: Path, place: Path, prepared: Prepared, length: _Length, base: Base, layers: LoraLayers
) -> None:
    """Train and score an arm, and keep its outcome."""
    make_folder(place)
    trained, kept = _trained(name, folder, prepared, length, base, layers), ""
    outcome = scored_outcome(name, trained, prepared, base, layers)
    if name == ALONE:
        kept = f"{ADAPTERS}/{ALONE}"
        make_folder(place / ADAPTERS)
        write_folder_atomic(place / kept, adapter_files(trained.adapter))
    outcomes: list[Outcome] = [replace(outcome, adapter=kept)]
    write_atomic(place / OUTCOMES, (json.dumps(plain(outcomes)) + "\n").encode())


def _trained(name: str, folder: Path, prepared: Prepared, length: _Length, base: Base, layers: LoraLayers) -> Trained:
    """Return the adapter of an arm."""
    if name == FEDERATED:
        return Trained("", read_adapter(folder / ADAPTER))
    initial = initial_adapter(base, prepared.recipe.lora, _drawn(prepared.recipe.seed))
    if name == BASE:
        return Trained("", initial)
    layers.fit(initial.config)
    alone = replace(prepared, recipe=with_overrides(prepared.recipe, length.fields))
    (trained,) = train_locally(alone, base, layers, initial, None)
    return trained


def _drawn(seed: int) -> torch.Generator:
    return Randomness(seed).torch("initial adapter")
