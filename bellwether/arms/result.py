"""Comparisons from Python: the same arms, tables and page as ``bellwether compare``.

from bellwether import compare
result = compare("default-table", folder="compared")
print(result.scores[0], result.differences[0], result.page)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bellwether.exchange.records import Watcher
from bellwether.exchange.scores import macro
from bellwether.recipe.compare import Arm
from bellwether.recipe.file import changed_fields, find_recipe, load_recipe, with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.report.compare_show import comparison_files
from bellwether.report.compare_table import ClientGain, Line, client_gains, make_lines
from bellwether.report.report import report
from bellwether.store.comparison import RUN, Comparison, Outcome, Trial, arm_folder
from bellwether.store.finished import read_run
from bellwether.tools.atomic import write_atomic
from bellwether.tools.intervals import Interval

Row = dict[str, Any]


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison gave; its tables are lists of dicts, one a row, ready for pandas or a CSV file.

    Scores are means over categories and seeds: loss in nats per token, ``rouge_l`` and ``exact`` in 0..1, each with the
    ends ``low`` and ``high`` of its interval of 95 % over seeds and questions.

    Args:
        folder: where all of it is.
        page: the report as a page, an HTML file without scripts.
        comparison: recipe, arms and trials, and what every adapter scored, row by row.
        lines: the lines of the table, with their intervals as ``bellwether.tools.intervals.Interval``.
        gains: what each client gains by the federation, where an arm trains clients alone.
    """

    folder: Path
    page: Path
    comparison: Comparison
    lines: Sequence[Line]
    gains: Sequence[ClientGain]

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """One per arm, seed and adapter."""
        return self.comparison.outcomes

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials on validation rows, where there were any."""
        return self.comparison.trials

    @property
    def scores(self) -> list[Row]:
        """Rows of ``arm``, ``metric``, ``mean``, ``low`` and ``high``."""
        return [
            {"arm": line.name, "metric": metric, **_ends(found)}
            for line in self.lines
            for metric, found in line.scores.items()
        ]

    @property
    def differences(self) -> list[Row]:
        """How much higher the federated arm scores than each other one: as ``scores``, with the adjusted ``p``."""
        return [
            {"arm": line.name, "metric": metric, **_ends(found), "p": found.p}
            for line in self.lines
            for metric, found in line.gaps.items()
        ]

    @property
    def categories(self) -> list[Row]:
        """As ``scores``, with a ``category`` in each row."""
        return [
            {"arm": line.name, "category": category, "metric": metric, **_ends(found)}
            for line in self.lines
            for category, scores in line.categories.items()
            for metric, found in scores.items()
        ]

    @property
    def costs(self) -> list[Row]:
        """What an adapter of each arm cost, mean over seeds: ``rows_seen``, ``tokens``, ``seconds``, ``bytes`` ..."""
        return [{"arm": line.name, **line.cost} for line in self.lines if line.cost]

    @functools.cached_property
    def rounds(self) -> list[Row]:
        """Scores after each evaluated round of each federated arm, on the rows that its recipe scores.

        Rows of ``arm``, ``seed``, ``round``, ``part``, ``rows``, ``loss``, ``rouge_l`` and ``exact``. The part is
        ``validation`` where the recipe says ``evaluation.part: validation``, else ``test``; ``clients`` are rows that
        clients hold out themselves.

        Raises:
            CheckpointError: what a run keeps cannot be read.
        """
        federated = [name for name, arm in self.comparison.arms.items() if arm.trains == "federation"]
        seeds = dict.fromkeys(outcome.seed for outcome in self.outcomes)
        return [
            {"arm": name, "seed": seed, "round": record.round, "part": record.part, **asdict(macro(record.categories))}
            for name in federated
            for seed in seeds
            for record in read_run(arm_folder(self.folder, name, seed) / RUN).evaluations
        ]

    def open(self) -> None:
        """Open the page in a web browser."""
        import webbrowser

        webbrowser.open(self.page.absolute().as_uri())


def compare(
    recipe: Recipe | str | Path | None = None,
    arms: Mapping[str, Recipe | Arm | Mapping[str, Any]] | None = None,
    *,
    folder: Path | str = "comparison",
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    watch: Watcher | None = None,
) -> ComparisonResult:
    """Train and score arms on one split under several seeds, and write tables and page, as ``bellwether compare`` does.

    Code that the recipe or an arm names is run without a question: see ``recipe.consent.code_in``, which lists it.

    Args:
        recipe: what is compared, or the name or file of a recipe; None takes the shipped ``default-table``.
        arms: arms by name, instead of the recipe's: ``Arm``, or its fields as a mapping, or a recipe, which makes a
            federation that differs from ``recipe`` in the same fields; None takes the recipe's own.
        folder: where everything goes; a comparison in it goes on.
        seeds: seeds of the runs, instead of the recipe's.
        jobs: processes that work side by side; a script needs ``if __name__ == "__main__"`` around more than one.
        watch: is told of every arm; None is silent.

    Raises:
        BellwetherError: see ``bellwether.errors``; the message is fit to be shown to a person.
    """
    from bellwether.arms import compare as comparing

    asked, folder = _asked(recipe, arms, seeds), Path(folder)
    comparison = comparing.compare(asked, folder, jobs=jobs, watch=watch)
    lines, gains = write_tables(comparison, folder)
    return ComparisonResult(folder, report(folder), comparison, lines, gains)


def write_tables(comparison: Comparison, folder: Path) -> tuple[Sequence[Line], Sequence[ClientGain]]:
    """Write the tables of a finished comparison, and return their lines and what each client gains.

    Args:
        comparison: what ``bellwether.arms.compare`` gave.
        folder: where it is.

    Raises:
        CheckpointError: a file cannot be written.
    """
    lines, gains = make_lines(comparison), client_gains(comparison)
    for name, content in comparison_files(lines, gains, comparison).items():
        write_atomic(folder / name, content)
    return lines, gains


def _asked(
    recipe: Recipe | str | Path | None,
    arms: Mapping[str, Recipe | Arm | Mapping[str, Any]] | None,
    seeds: Sequence[int] | None,
) -> Recipe:
    """Return the recipe that compares what is asked for."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(find_recipe(str(recipe or "default-table")))
    overrides: dict[str, Any] = {}
    if arms is not None:
        overrides["compare.arms"] = {name: _arm(recipe, name, arm) for name, arm in arms.items()}
    if seeds is not None:
        overrides["compare.seeds"] = list(seeds)
    if overrides and recipe.compare is None:
        recipe = with_overrides(recipe, {"compare": {}})
    return with_overrides(recipe, overrides, "compare") if overrides else recipe


def _arm(recipe: Recipe, name: str, arm: Recipe | Arm | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of an arm."""
    if isinstance(arm, Arm):
        return arm.model_dump(mode="json")
    if not isinstance(arm, Recipe):
        return dict(arm)
    changed = changed_fields(recipe, arm)
    ignored = ("name", "seed", "compare", "output")
    return {
        "trains": "federation",
        "set": {field: value for field, value in changed.items() if field.partition(".")[0] not in ignored},
    }


def _ends(found: Interval) -> Row:
    """Return the mean of an interval and its ends."""
    return {"mean": found.mean, "low": found.low, "high": found.high}
