"""The answers to scored rows: kept after every evaluation, some of them shown before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bellwether.client.score import Scored
from bellwether.runner.prepare import Prepared
from bellwether.store.history import ScoredRow, dump_rows, load_rows
from bellwether.store.run_folder import (
    RunFolder,
    write_atomic,
)


def _answers_file(folder: RunFolder, round: int) -> Path:
    return folder.path / "answers" / f"{round:04d}.jsonl"


def write_answers(folder: RunFolder, prepared: Prepared, round: int, scored: Sequence[Scored]) -> None:
    """Keep each row's category, answer and totals, one line per scored row in the order of the rows."""
    path = _answers_file(folder, round)
    path.parent.mkdir(exist_ok=True)
    kept = (
        ScoredRow(row.category, result.answer, result.totals)
        for row, result in zip(prepared.scored.rows, scored, strict=True)
    )
    write_atomic(path, dump_rows(kept))


def sample_answers(folder: RunFolder, prepared: Prepared, last: int) -> list[dict[str, Any]]:
    """Return some scored rows with the untuned base's answer and the final one, categories in turn."""
    evaluation = prepared.recipe.evaluation
    if not evaluation.generate or not prepared.scored.rows:
        return []
    before, after = (
        [row.answer for row in load_rows(_answers_file(folder, round).read_bytes())] for round in (0, last)
    )
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
