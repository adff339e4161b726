"""A finished run, as its folder keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from bellwether.errors import BellwetherError, CheckpointError, first_line
from bellwether.exchange.records import EvaluationRecord, Record, RoundRecord
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.store.checkpoint import HISTORY, RECIPE
from bellwether.store.chosen import Chosen, read_chosen
from bellwether.store.history import ScoredRow, load_records, load_rows
from bellwether.store.holdings import Description, load_description
from bellwether.store.run_folder import ADAPTER, ANSWERS, CHECKPOINTS, CLIENTS, ENVIRONMENT, SAMPLES, client_folders

Read = TypeVar("Read")


@dataclass(frozen=True)
class Sample:
    """One of the scored rows whose answers a run shows.

    Args:
        row: its number among the scored rows, from 0.
        category: of the row.
        instruction: what was asked.
        context: what belongs to it; may be empty.
        reference: the answer that is wanted.
        before: the untuned base's.
        after: the final one.
    """

    row: int
    category: str
    instruction: str
    context: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class FinishedRun:
    """What the folder of a finished run keeps.

    Args:
        recipe: the resolved recipe.
        environment: versions, device and command, as ``environment.json`` has them.
        description: what each client holds.
        rounds: one record per round.
        evaluations: one record per evaluation and part, in the order of rounds.
        before: the scored rows with the untuned base's answers; empty where nothing was scored.
        after: the same rows with the final answers.
        samples: some rows with their answers.
        chosen: what clients chose of their rows, by name; empty where none choose, or what they keep is not there.
    """

    recipe: Recipe
    environment: Mapping[str, Any]
    description: Description
    rounds: Sequence[RoundRecord]
    evaluations: Sequence[EvaluationRecord]
    before: Sequence[ScoredRow]
    after: Sequence[ScoredRow]
    samples: Sequence[Sample]
    chosen: Mapping[str, Chosen] = field(default_factory=dict)

    def scored(self, part: str) -> list[EvaluationRecord]:
        """Return the evaluations of a part, the untuned base's first."""
        return [record for record in self.evaluations if record.part == part]


def is_run(folder: Path) -> bool:
    """Return whether a run was begun in a folder."""
    return (folder / RECIPE).is_file() and (folder / CHECKPOINTS).is_dir()


def read_run(folder: Path) -> FinishedRun:
    """Return the finished run that a folder holds.

    Args:
        folder: that ``bellwether run`` wrote.

    Raises:
        CheckpointError: it holds none, one that is not finished, or one that cannot be read.
    """
    if not is_run(folder):
        raise CheckpointError(f"{folder} holds no run; give the folder of a finished one.")
    if not (folder / ADAPTER).is_dir():
        raise CheckpointError(f"The run in {folder} is not finished; go on with bellwether run --resume {folder}.")
    recipe = _read(folder / RECIPE, lambda _: load_recipe(folder / RECIPE))
    records = _records(folder, recipe.federation.rounds)
    evaluations = [record for record in records if isinstance(record, EvaluationRecord)]
    before, after = _scored_rows(folder, [record.round for record in evaluations if record.part != "clients"])
    description = _read(folder / CLIENTS, load_description)
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    chooses = recipe.selection.method != "full"
    clients = [client.client for client in description.clients]
    return FinishedRun(
        recipe=recipe,
        environment=_read(folder / ENVIRONMENT, TypeAdapter(dict[str, Any]).validate_json),
        description=description,
        rounds=rounds,
        evaluations=evaluations,
        before=before,
        after=after,
        samples=_read(folder / SAMPLES, _samples),
        chosen=read_chosen(client_folders(folder, clients), rounds) if chooses else {},
    )


def _records(folder: Path, rounds: int) -> Sequence[Record]:
    """Return all records of a run, which its last checkpoint holds."""
    checkpoints = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    if not checkpoints:
        raise CheckpointError(f"{folder / CHECKPOINTS} holds no checkpoint, where a run's records are; restore one.")
    path = max(checkpoints, key=lambda path: int(path.name)) / HISTORY
    records = _read(path, load_records)
    last = max((record.round for record in records), default=0)
    if last != rounds:
        raise CheckpointError(f"{path} ends with round {last} of {rounds}; restore the last checkpoint, or run anew.")
    return records


def _scored_rows(folder: Path, rounds: Sequence[int]) -> tuple[Sequence[ScoredRow], Sequence[ScoredRow]]:
    """Return the scored rows with the answers after the first and the last of these rounds."""
    if not rounds:
        return (), ()
    first, last = (folder / ANSWERS / f"{number:04d}.jsonl" for number in (min(rounds), max(rounds)))
    before, after = _read(first, load_rows), _read(last, load_rows)
    if [row.category for row in before] != [row.category for row in after]:
        raise CheckpointError(
            f"{last} has {len(after)} rows, and {first} {len(before)}, not the same ones; restore both, or run anew."
        )
    return before, after


def _samples(data: bytes) -> list[Sample]:
    """Return the samples behind lines of JSON."""
    return [Sample(**json.loads(line)) for line in data.decode().splitlines()]


def _read(path: Path, read: Callable[[bytes], Read]) -> Read:
    """Return what a file of a run holds."""
    try:
        return read(path.read_bytes())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, BellwetherError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); restore it, or run anew.") from error
