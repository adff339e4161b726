"""The answers to scored rows: kept after every evaluation, some of them shown before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bellwether.client.score import Scored
from bellwether.errors import CheckpointError
from bellwether.federate import Progress
from bellwether.runner.prepare import Prepared
from bellwether.store.finished import answers_file, check_rows
from bellwether.store.history import ScoredRow, dump_rows, load_rows
from bellwether.store.run_folder import RunFolder, write_atomic
from bellwether.tools.json_text import reading


def write_answers(folder: RunFolder, prepared: Prepared, round: int, scored: Sequence[Scored]) -> None:
    """Keep each row's category, answer and totals, one line per scored row in the order of the rows."""
    path = answers_file(folder.path, round)
    path.parent.mkdir(exist_ok=True)
    kept = (
        ScoredRow(row.category, result.answer, result.totals)
        for row, result in zip(prepared.scored.rows, scored, strict=True)
    )
    write_atomic(path, dump_rows(kept))


def lost_answers(folder: RunFolder, prepared: Prepared, progress: Progress) -> dict[int, str]:
    """Return the rounds whose answers a run's end and report need, but cannot have, each with a sentence that says why.

    Args:
        folder: of a run that goes on.
        prepared: its rows.
        progress: how far it came.
    """
    lost = {}
    for record in progress.evaluations:
        if record.round in (0, prepared.recipe.federation.rounds) and record.part != "clients":
            path = answers_file(folder.path, record.round)
            try:
                with reading(path, "its rows are scored anew"):
                    check_rows(_rows(path, prepared), record)
            except CheckpointError as error:
                lost[record.round] = str(error)
    return lost


def _rows(path: Path, prepared: Prepared) -> Sequence[ScoredRow]:
    """Return the scored rows of an evaluation with their answers, once they are known to be those of the recipe."""
    rows = load_rows(path.read_bytes())
    if [row.category for row in rows] != [row.category for row in prepared.scored.rows]:
        raise ValueError("its rows are not those of the recipe")
    if any((row.answer is None) == prepared.recipe.evaluation.generate for row in rows):
        raise ValueError("it has not an answer to every row")
    return rows


def _answers(folder: RunFolder, prepared: Prepared, round: int) -> list[str | None]:
    """Return the answers after a round."""
    path = answers_file(folder.path, round)
    with reading(path, f"bellwether run --resume {folder.path} makes it anew"):
        return [row.answer for row in _rows(path, prepared)]


def sample_answers(folder: RunFolder, prepared: Prepared) -> list[dict[str, Any]]:
    """Return some scored rows with the untuned base's answer and the final one, categories in turn."""
    evaluation = prepared.recipe.evaluation
    if not evaluation.generate or not prepared.scored.rows:
        return []
    before, after = (_answers(folder, prepared, round) for round in (0, prepared.recipe.federation.rounds))
    chosen = _in_turn([row.category for row in prepared.scored.rows], evaluation.samples)
    rows = prepared.scored.rows
    return [
        {
            "row": number,
            "category": rows[number].category,
            "instruction": rows[number].row.instruction,
            "context": rows[number].row.context,
            "reference": rows[number].response,
            "before": before[number],
            "after": after[number],
        }
        for number in chosen
    ]


def _in_turn(categories: Sequence[str], most: int) -> list[int]:
    """Return row numbers, the first row of each category, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for number, category in enumerate(categories):
        seen[category] = seen.get(category, 0) + 1
        ranked.append((seen[category], category, number))
    return [number for _, _, number in sorted(ranked)[:most]]
