"""A finished run, as its folder keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bellwether.errors import CheckpointError
from bellwether.exchange.records import EvaluationRecord, Record, RoundRecord, SurveyRecord
from bellwether.exchange.scores import Totals, add_up
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.store.checkpoint import HISTORY, RECIPE, read_history
from bellwether.store.chosen import Chosen, read_chosen
from bellwether.store.history import ScoredRow, load_rows
from bellwether.store.holdings import Description, load_description
from bellwether.store.privacy import GivenAway, given_away
from bellwether.store.run_folder import (
    ADAPTER,
    ANSWERS,
    CHECKPOINTS,
    CLIENTS,
    ENVIRONMENT,
    SAMPLES,
    client_folders,
    read_environment,
)
from bellwether.tools.json_text import KEPT, Count, from_json_lines, reading, typed
from bellwether.tools.words import counted

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

    __pydantic_config__ = KEPT

    row: Count
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
        given_away: what leaves the clients and what is promised of it; None where the folder does not say.
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
    given_away: GivenAway | None = None

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
    with reading(folder / RECIPE, "restore it, or run anew"):
        recipe = load_recipe(folder / RECIPE)
    again = f"bellwether run --resume {folder} makes it anew"
    description = _read(folder / CLIENTS, again, load_description)
    given = given_away(folder)
    records = _records(folder, _rounds(recipe, given), description)
    evaluations = [record for record in records if isinstance(record, EvaluationRecord)]
    before, after = _scored_rows(folder, [record for record in evaluations if record.part != "clients"], again)
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    chooses = recipe.selection.method != "full"
    clients = [client.client for client in description.clients]
    return FinishedRun(
        recipe=recipe,
        environment=read_environment(folder / ENVIRONMENT, "restore it, or run anew"),
        description=description,
        rounds=rounds,
        evaluations=evaluations,
        before=before,
        after=after,
        samples=_read(folder / SAMPLES, again, lambda data: from_json_lines(data, lambda line: typed(line, Sample))),
        chosen=read_chosen(client_folders(folder, clients), rounds) if chooses else {},
        given_away=given,
    )


def read_evaluations(folder: Path) -> list[EvaluationRecord]:
    """Return the evaluations of the finished run that a folder holds, and nothing else of it.

    Args:
        folder: that ``bellwether run`` wrote.

    Raises:
        CheckpointError: they cannot be read.
    """
    with reading(folder / RECIPE, "restore it, or run anew"):
        recipe = load_recipe(folder / RECIPE)
    rounds = _rounds(recipe, given_away(folder))
    description = _read(folder / CLIENTS, f"bellwether run --resume {folder} makes it anew", load_description)
    return [one for one in _records(folder, rounds, description) if isinstance(one, EvaluationRecord)]


def _rounds(recipe: Recipe, given: GivenAway | None) -> int:
    """Return how many rounds a finished run has: the recipe's, or those that its budget of privacy was enough for."""
    return recipe.federation.rounds if given is None or given.rounds is None else given.rounds


def _records(folder: Path, rounds: int, description: Description) -> Sequence[Record]:
    """Return all records of a run, which its last checkpoint holds."""
    checkpoints = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    if not checkpoints:
        raise CheckpointError(f"{folder / CHECKPOINTS} holds no checkpoint, where a run's records are; restore one.")
    newest = max(checkpoints, key=lambda path: int(path.name))
    path, again = newest / HISTORY, f"bellwether run --resume {folder} goes on from the checkpoint before"
    with reading(path, again):
        records = read_history(newest)
        _check_told(records, {client.client for client in description.clients})
    last = max((record.round for record in records), default=0)
    if last != rounds:
        raise CheckpointError(f"{path} ends with round {last} of {rounds}; restore the last checkpoint, or run anew.")
    return records


def _check_told(records: Sequence[Record], clients: Set[str]) -> None:
    """Refuse records of which one part names what another does not have."""
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    if [record.round for record in rounds] != list(range(1, len(rounds) + 1)):
        raise ValueError("its rounds do not follow one another")
    for record in rounds:
        cohort = set(record.cohort)
        if not cohort | record.left_out.keys() <= clients:
            raise ValueError(f"round {record.round} names clients of whom {CLIENTS} says nothing")
        if not {one.client for one in record.clients} <= cohort:
            raise ValueError(f"round {record.round} was trained by clients that were not asked")
        if record.survey is not None:
            _check_survey(record.survey, cohort)


def _check_survey(survey: SurveyRecord, cohort: Set[str]) -> None:
    """Refuse a survey whose parts do not belong together."""
    sent = {client: len(points) for client, points in survey.centroids.items()}
    if not sent.keys() <= cohort or not {*survey.kept, *survey.groups} <= cohort:
        raise ValueError("a survey names clients that were not asked")
    if len({len(point) for points in survey.centroids.values() for point in points}) > 1:
        raise ValueError("the centroids of a survey have not all as many dimensions")
    if any(number >= sent.get(client, 0) for client, numbers in survey.kept.items() for number in numbers):
        raise ValueError("a survey kept centroids that are not there")


def _scored_rows(
    folder: Path, scored: Sequence[EvaluationRecord], again: str
) -> tuple[Sequence[ScoredRow], Sequence[ScoredRow]]:
    """Return the scored rows with the answers after the first and the last of these evaluations."""
    if not scored:
        return (), ()
    first, last = (answers_file(folder, record.round) for record in (scored[0], scored[-1]))
    before, after = _read(first, again, load_rows), _read(last, again, load_rows)
    if [row.category for row in before] != [row.category for row in after]:
        raise CheckpointError(
            f"{last} has {counted(len(after), 'row')}, and {first} {len(before)}, not the same ones; {again}, "
            "or restore both."
        )
    for path, record, rows in ((first, scored[0], before), (last, scored[-1], after)):
        with reading(path, again):
            check_rows(rows, record)
    return before, after


def answers_file(folder: Path, round: int) -> Path:
    """Return where a run keeps the answers to scored rows.

    Args:
        folder: of the run.
        round: the round whose adapter was scored.
    """
    return folder / ANSWERS / f"{round:04d}.jsonl"


def check_rows(rows: Sequence[ScoredRow], record: EvaluationRecord) -> None:
    """Refuse scored rows that are not those of an evaluation.

    Args:
        rows: of ``load_rows``.
        record: what became of them.

    Raises:
        ValueError: they add up to something else.
    """
    # Not their scores: rows that were scored anew may differ in the last bits.
    found = add_up((row.category, row.totals) for row in rows)
    if _counts(found) != _counts(record.categories):
        raise ValueError(f"its rows are not those that were scored after round {record.round}")


def _counts(categories: Mapping[str, Totals]) -> dict[str, tuple[int, int, int]]:
    return {name: (totals.rows, totals.tokens, totals.generated) for name, totals in categories.items()}


def _read(path: Path, remedy: str, read: Callable[[bytes], Read]) -> Read:
    """Return what a file of a run holds."""
    with reading(path, remedy):
        return read(path.read_bytes())
