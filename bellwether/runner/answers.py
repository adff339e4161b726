"""The answers to scored rows: kept after every evaluation, some of them shown before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bellwether.client.score import Scored
from bellwether.errors import CheckpointError, first_line
from bellwether.runner.prepare import Prepared
from bellwether.store.history import ScoredRow, dump_rows, load_rows
from bellwether.store.run_folder import ANSWERS, write_atomic
from bellwether.tools.atomic import make_folder


class Answers:
    """The answers of a run: a file after every evaluation, and the first and newest of this process at hand.

    Args:
        run: the run's folder.
        prepared: whose rows are scored.
    """

    def __init__(self, run: Path, prepared: Prepared) -> None:
        self._folder, self._prepared = run / ANSWERS, prepared
        self._at_hand: dict[int, Sequence[ScoredRow]] = {}

    def keep(self, round: int, scored: Sequence[Scored]) -> None:
        """Keep each row's category, answer and totals, one line per scored row in the order of the rows."""
        pairs = zip(self._prepared.scored.rows, scored, strict=True)
        rows = tuple(ScoredRow(row.category, result.answer, result.totals) for row, result in pairs)
        make_folder(self._folder)
        write_atomic(self._file(round), dump_rows(rows))
        first = {number: kept for number, kept in self._at_hand.items() if number == 0}
        self._at_hand = first | {round: rows}

    def after(self, round: int) -> Sequence[ScoredRow]:
        """Return the scored rows after a round, read where an earlier process scored them; none where none are scored.

        Raises:
            CheckpointError: they cannot be read.
        """
        if not self._prepared.scored.rows:
            return ()
        if round not in self._at_hand:
            self._at_hand[round] = self._read(self._file(round))
        return self._at_hand[round]

    def samples(self, last: int) -> list[dict[str, Any]]:
        """Return some scored rows with the untuned base's answer and the final one, categories in turn."""
        evaluation, rows = self._prepared.recipe.evaluation, self._prepared.scored.rows
        if not evaluation.generate or not rows:
            return []
        before, after = self.after(0), self.after(last)
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
            for number in _in_turn([row.category for row in rows], evaluation.samples)
        ]

    def _file(self, round: int) -> Path:
        return self._folder / f"{round:04d}.jsonl"

    @staticmethod
    def _read(path: Path) -> Sequence[ScoredRow]:
        try:
            return load_rows(path.read_bytes())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({first_line(error)}), so this run cannot go on; begin it anew."
            ) from error


def _in_turn(categories: Sequence[str], most: int) -> list[int]:
    """Return row numbers, the first row of each category, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for number, category in enumerate(categories):
        seen[category] = seen.get(category, 0) + 1
        ranked.append((seen[category], category, number))
    return [number for _, _, number in sorted(ranked)[:most]]
