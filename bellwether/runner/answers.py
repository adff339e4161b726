"""The answers to scored rows: kept after every evaluation, some of them shown before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bellwether.client.score import Scored
from bellwether.errors import CheckpointError
from bellwether.exchange.records import EvaluationRecord
from bellwether.runner.prepare import Prepared
from bellwether.store.finished import answers_file, check_rows
from bellwether.store.history import ScoredRow, dump_rows, load_rows
from bellwether.tools.atomic import make_folder, write_atomic
from bellwether.tools.json_text import reading


class Answers:
    """The answers of a run: a file after every evaluation, and the first and newest of this process at hand.

    Args:
        run: the run's folder.
        prepared: whose rows are scored.
    """

    def __init__(self, run: Path, prepared: Prepared) -> None:
        self._run, self._prepared = run, prepared
        self._at_hand: dict[int, Sequence[ScoredRow]] = {}

    def keep(self, round: int, scored: Sequence[Scored]) -> None:
        """Keep each row's category, answer and totals, one line per scored row in the order of the rows."""
        pairs = zip(self._prepared.scored.rows, scored, strict=True)
        rows = tuple(ScoredRow(row.category, result.answer, result.totals) for row, result in pairs)
        path = answers_file(self._run, round)
        make_folder(path.parent)
        write_atomic(path, dump_rows(rows))
        first = {number: kept for number, kept in self._at_hand.items() if number == 0}
        self._at_hand = first | {round: rows}

    def lost(self, evaluations: Sequence[EvaluationRecord]) -> dict[int, str]:
        """Return the rounds whose answers a run's end and report need, but cannot have, each with the reason.

        Args:
            evaluations: of the rounds that a run which goes on has behind it.
        """
        lost = {}
        for record in _own(evaluations):
            if record.round in (0, self._prepared.recipe.federation.rounds):
                try:
                    self._of(record, "its rows are scored anew")
                except CheckpointError as error:
                    lost[record.round] = str(error)
        return lost

    def last(self, evaluations: Sequence[EvaluationRecord]) -> Sequence[ScoredRow]:
        """Return the scored rows of the last evaluation, read where an earlier process scored them.

        Args:
            evaluations: of a run; where the coordinator scores no rows of its own, the result is empty.

        Raises:
            CheckpointError: they cannot be read.
        """
        own = _own(evaluations)
        return self._of(own[-1], self._again) if own else ()

    def samples(self, evaluations: Sequence[EvaluationRecord]) -> list[dict[str, Any]]:
        """Return some scored rows with the untuned base's answer and the final one, categories in turn.

        Args:
            evaluations: of a finished run.

        Raises:
            CheckpointError: answers cannot be read.
        """
        settings, rows = self._prepared.recipe.evaluation, self._prepared.scored.rows
        if not settings.generate or not rows:
            return []
        own = _own(evaluations)
        before, after = (self._of(record, self._again) for record in (own[0], own[-1]))
        return [
            {
                "row": number,
                "category": rows[number].category,
                "instruction": rows[number].row.instruction,
                "context": rows[number].row.context,
                "reference": rows[number].response,
                "before": before[number].answer,
                "after": after[number].answer,
            }
            for number in in_turn([row.category for row in rows], settings.samples)
        ]

    @property
    def _again(self) -> str:
        return f"bellwether run --resume {self._run} makes it anew"

    def _of(self, record: EvaluationRecord, remedy: str) -> Sequence[ScoredRow]:
        """Return the scored rows of an evaluation with their answers, once they are known to be whole."""
        if record.round in self._at_hand:
            return self._at_hand[record.round]
        path = answers_file(self._run, record.round)
        with reading(path, remedy):
            rows = load_rows(path.read_bytes())
            check_rows(rows, record)
            if [row.category for row in rows] != [row.category for row in self._prepared.scored.rows]:
                raise ValueError("its rows are not those of the recipe")
            if any((row.answer is None) == self._prepared.recipe.evaluation.generate for row in rows):
                raise ValueError("it has not an answer to every row")
        self._at_hand[record.round] = rows
        return rows


def _own(evaluations: Sequence[EvaluationRecord]) -> list[EvaluationRecord]:
    """Return the evaluations on the coordinator's own rows."""
    return [record for record in evaluations if record.part != "clients"]


def in_turn(categories: Sequence[str], most: int) -> list[int]:
    """Return row numbers, the first row of each category, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for number, category in enumerate(categories):
        seen[category] = seen.get(category, 0) + 1
        ranked.append((seen[category], category, number))
    return [number for _, _, number in sorted(ranked)[:most]]
