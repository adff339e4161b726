"""A comparison's tables as texts: for the terminal, as Markdown, LaTeX, CSV and JSON.

table.md                            for people
table.tex, differences.tex          for papers
table.csv, clients.csv, cost.csv    for spreadsheets, all figures in full
scores.csv                          every arm's scores under each seed
table.json                          the same for programs
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Arm, Recipe
from bellwether.report.compare_table import METRICS, ClientGain, Line
from bellwether.report.paper import comparison_tables, scores_by_seed
from bellwether.store.comparison import Comparison
from bellwether.tell.tables import markdown, rich_table
from bellwether.tools.intervals import Interval
from bellwether.tools.json_text import plain
from bellwether.tools.spreadsheet import csv_table
from bellwether.tools.words import byte_size, counted

if TYPE_CHECKING:
    from rich.console import Group

SHOWN_CLIENTS = 12  # in a terminal; the files have them all
RELATED = ("rouge_l", "exact")

_NAMES = {"loss": "loss", "rouge_l": "ROUGE-L", "exact": "exact", "preferred": "preferred"}
_HEADS = {"loss": "loss", "rouge_l": "ROUGE-L %", "exact": "exact %", "preferred": "preferred %"}
_SCALE = {"loss": 1.0, "rouge_l": 100.0, "exact": 100.0, "preferred": 100.0}
_LEGEND = (
    "Means over seeds, with intervals of 95 %. A difference marked with = cannot be told from none (p > 0.05, adjusted "
    "by Holm's method)."
)
_DIFFERENCES = "Federated minus the arm (= cannot be told from none)"
_COST = (
    "What an adapter of each arm cost, mean over seeds: share of the rows of the arm's clients that were used (where "
    "rows are chosen, of those ever chosen), rows and tokens trained, seconds of training, and of surveys where there "
    "are any, bytes sent, and those of whole bases in float32 instead"
)
_SURVEY = "survey, s"
_COST_HEADS = ("arm", "rows used, %", "rows seen", "tokens", "seconds", _SURVEY, "sent", "whole base")
_FIGURE_HEADS = ("line", "what", "of", "metric", "mean", "low", "high", "p")
_GAIN_HEADS = ("arm", "minus", "client", "rows", "metric", "gain", "low", "high", "p")


def _shown(found: Interval | None, metric: str) -> str:
    """Return an interval as text: the mean, and its ends in brackets."""
    if found is None:
        return "-"
    mean, low, high = (_number(value, metric) for value in (found.mean, found.low, found.high))
    return mean if math.isnan(found.low) else f"{mean} [{low}, {high}]"


def _number(value: float, metric: str) -> str:
    """Return a score as text."""
    return f"{value * _SCALE[metric]:.{3 if metric == 'loss' else 1}f}"


def _gap(found: Interval | None, metric: str) -> str:
    """Return a difference as text, marked with = where it cannot be told from nothing at 5 %."""
    return "-" if found is None else ("= " if found.p > 0.05 else "") + _shown(found, metric)


def shown_metrics(lines: Sequence[Line]) -> Sequence[str]:
    """Return the scores that tables have columns for: those of preferences only where rows have two answers.

    Args:
        lines: of ``make_lines``.
    """
    return [metric for metric in METRICS if metric != "preferred" or any(metric in line.scores for line in lines)]


def cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of the main table; without any difference it has no columns for them.

    Args:
        lines: of ``make_lines``.
    """
    shown = shown_metrics(lines)
    compared = shown if any(line.gaps for line in lines) else ()
    related = RELATED if any(line.ratios for line in lines) else ()
    heads = [
        "arm",
        *(_HEADS[metric] for metric in shown),
        *(f"federated minus it, {_HEADS[metric]}" for metric in compared),
        *(f"federated / it, {_NAMES[metric]}" for metric in related),
    ]
    rows = [
        [
            line.name,
            *(_shown(line.scores.get(metric), metric) for metric in shown),
            *(_gap(line.gaps.get(metric), metric) for metric in compared),
            *(f"{line.ratios[metric]:.3f}" if metric in line.ratios else "-" for metric in related),
        ]
        for line in lines
    ]
    return heads, rows


def part_cells(lines: Sequence[Line], metric: str, part: str = "categories") -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of a table by category, or by group.

    Args:
        lines: of ``make_lines``.
        metric: one of ``METRICS``.
        part: ``categories`` or ``groups``.
    """
    names = sorted({name for line in lines for name in getattr(line, part)})

    def show(values: Mapping[str, Interval]) -> str:
        return f"{values[metric].mean * _SCALE[metric]:.{2 if metric == 'loss' else 1}f}" if metric in values else "-"

    rows = [
        [line.name, *(show(getattr(line, part).get(name, {})) for name in names)]
        for line in lines
        if getattr(line, part)
    ]
    return ["arm", *names], rows


def cost_cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of what an adapter of each arm cost.

    Args:
        lines: of ``make_lines``.
    """
    rows, surveyed = [], any("survey_seconds" in line.cost for line in lines)
    for line in lines:
        cost = line.cost
        if cost:
            survey = [f"{cost['survey_seconds']:.1f}" if "survey_seconds" in cost else "-"] if surveyed else []
            sent = byte_size(cost["bytes"]) if "bytes" in cost else "-"
            whole = byte_size(cost["bytes_of_whole_base"]) if "bytes_of_whole_base" in cost else "-"
            share = f"{100 * cost['rows'] / cost['rows_of_all']:.1f}"
            figures = (f"{cost[name]:,.0f}" for name in ("rows_seen", "tokens"))
            rows.append([line.name, share, *figures, f"{cost['seconds']:.1f}", *survey, sent, whole])
    return [head for head in _COST_HEADS if surveyed or head != _SURVEY], rows


def gain_cells(gains: Sequence[ClientGain]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells of what each client gains.

    Args:
        gains: of ``client_gains``.
    """
    shared, own = (
        [m for m in METRICS if any(m in getattr(gain, part) for gain in gains)] for part in ("shared", "own")
    )
    heads = [
        "client",
        *(f"alone, {_HEADS[metric]}" for metric in shared),
        *(f"gain, {_HEADS[metric]}" for metric in shared),
        *(f"gain on its own rows, {_HEADS[metric]}" for metric in own),
    ]
    rows = [
        [
            gain.client,
            *(_number(gain.alone[metric], metric) for metric in shared),
            *(_gap(gain.shared.get(metric), metric) for metric in shared),
            *(_gap(gain.own.get(metric), metric) for metric in own),
        ]
        for gain in gains
    ]
    return heads, rows


def terminal(lines: Sequence[Line], gains: Sequence[ClientGain], *, ascii_only: bool = False) -> Group:
    """Return the tables as a terminal shows them: scores, differences, gains and costs apart, since lines are narrow.

    Args:
        lines: of ``make_lines``.
        gains: of ``client_gains``.
        ascii_only: whether the terminal shows ASCII alone.
    """
    from rich.console import Group

    heads, rows = cells(lines)
    scores = 1 + len(shown_metrics(lines))
    ends = 2 * scores - 1  # ratios are in the files
    compared = [row for row in rows if any(cell != "-" for cell in row[scores:ends])]
    tables = [("Scores, mean [95 % interval]", heads[:scores], [row[:scores] for row in rows])]
    if compared:
        short = [head.removeprefix("federated minus it, ") for head in heads[scores:ends]]
        tables.append((_DIFFERENCES, ["arm", *short], [[row[0], *row[scores:ends]] for row in compared]))
    if gains:
        heads, rows = gain_cells(gains[:SHOWN_CLIENTS])
        shown = [number for number, head in enumerate(heads) if not head.startswith("alone, ")]
        columns = [[row[number] for number in shown] for row in (heads, *rows)]
        tables.append(("What each client gains by the federated model", columns[0], columns[1:]))
    if any(line.cost for line in lines):
        tables.append(("What an adapter cost", *cost_cells(lines)))
    return Group(*(rich_table(*table, ascii_only=ascii_only) for table in tables))


def comparison_files(lines: Sequence[Line], gains: Sequence[ClientGain], comparison: Comparison) -> dict[str, bytes]:
    """Return the files of a comparison's result by name: the tables for people, and all figures for machines.

    Args:
        lines: of ``make_lines``.
        gains: of ``client_gains``.
        comparison: what it gave.
    """
    files = {
        "table.md": "\n".join(_sections(lines, gains, comparison)).encode(),
        "table.json": (json.dumps(plain({"lines": lines, "clients": gains}), indent=1) + "\n").encode(),
        **comparison_tables(lines, comparison),
        "table.csv": csv_table(_FIGURE_HEADS, _figures(lines)),
        "scores.csv": scores_by_seed(comparison),
        "cost.csv": csv_table(
            ("arm", "cost", "value"), ((one.name, *item) for one in lines for item in one.cost.items())
        ),
    }
    if gains:
        files["clients.csv"] = csv_table(_GAIN_HEADS, _gain_figures(gains))
    return files


def _sections(lines: Sequence[Line], gains: Sequence[ClientGain], comparison: Comparison) -> Iterator[str]:
    """Yield the parts of the Markdown file."""
    yield f"{markdown(*cells(lines))}\n{_LEGEND}{references(comparison)}\n\n{_made_of(comparison)}"
    for part, title in (("groups", "group"), ("categories", "category")):
        if any(getattr(line, part) for line in lines):
            for metric in shown_metrics(lines):
                yield f"{_HEADS[metric]} by {title}\n\n" + markdown(*part_cells(lines, metric, part))
    if gains:
        yield f"{_gains(gains)}\n\n" + markdown(*gain_cells(gains))
    if any(line.cost for line in lines):
        yield f"{_COST}\n\n" + markdown(*cost_cells(lines))
    if comparison.trials:
        rows = [[t.arm, f"{t.learning_rate:g}", str(t.passes), f"{t.score:.4f}"] for t in comparison.trials]
        yield "Trials on validation rows\n\n" + markdown(["arm", "learning rate", "passes", "score"], rows)


def _gains(gains: Sequence[ClientGain]) -> str:
    """Return what the table of gains shows."""
    first = gains[0]
    return (
        f"What each client gains: the arm {first.reference} minus the client's own model of the arm {first.arm}, on "
        "the shared test rows, and on the rows that the client holds out of its own, where it does."
    )


def _figures(lines: Sequence[Line]) -> Iterator[tuple[Any, ...]]:
    """Yield all scores and differences of the tables, one a line."""
    for line in lines:
        for metric, found in line.scores.items():
            yield line.name, "score", "", metric, found.mean, found.low, found.high, ""
        for metric, found in line.gaps.items():
            yield line.name, "federated minus it", "", metric, found.mean, found.low, found.high, found.p
        for metric, ratio in line.ratios.items():
            yield line.name, "federated over it", "", metric, ratio, "", "", ""
        for part, values in (("category", line.categories), ("group", line.groups)):
            for name, scores in values.items():
                for metric, found in scores.items():
                    yield line.name, part, name, metric, found.mean, found.low, found.high, ""


def _gain_figures(gains: Sequence[ClientGain]) -> Iterator[tuple[Any, ...]]:
    """Yield all gains of clients, one a line."""
    for gain in gains:
        for rows, found in (("shared test rows", gain.shared), ("its own held-out rows", gain.own)):
            for metric, one in found.items():
                p = "" if math.isnan(one.p) else one.p
                yield gain.reference, gain.arm, gain.client, rows, metric, one.mean, *_ends(one), p


def _ends(found: Interval) -> tuple[float | str, float | str]:
    """Return the ends of an interval; empty where they are no numbers."""
    return ("", "") if math.isnan(found.low) else (found.low, found.high)


def references(comparison: Comparison) -> str:
    """Return the sentences that name the arms that others are compared with, a blank in front; empty without any.

    Args:
        comparison: what it gave.
    """
    names = [(comparison.reference(counts_steps), counts_steps) for counts_steps in (False, True)]
    arms = ("Arms", "Arms that count steps")
    return "".join(f" {arms[steps]} are compared with the arm {name}." for name, steps in names if name is not None)


def _made_of(comparison: Comparison) -> str:
    """Return lines that name recipe, seeds and rows, and how each arm was trained."""
    recipe, rows = comparison.recipe, len(comparison.outcomes[0].categories)
    seeds = ", ".join(map(str, dict.fromkeys(outcome.seed for outcome in comparison.outcomes)))
    text = f"Recipe {recipe.name}, seeds {seeds}; {counted(rows, 'scored row')}.\n\n"
    return text + "".join(
        f"- {name}: {_training(arm, recipe)}\n" for name, arm in comparison.arms.items() if arm.learns
    )


def _training(arm: Arm, recipe: Recipe) -> str:
    """Return an arm's learning rate and how long it trains, as text."""
    changed = with_overrides(recipe, arm.set)
    rounds, steps = changed.federation.rounds, changed.training.local_steps
    if arm.passes is not None:
        length = counted(arm.passes, "pass", "passes")
    elif arm.steps is not None:
        length = counted(arm.steps, "step")
    elif arm.trains == "federation":
        length = counted(rounds, "round") + (f" of {counted(steps, 'step')}" if steps else "")
    else:
        length = f"as many passes as {counted(rounds, 'round')} {'makes' if rounds == 1 else 'make'}"
    return f"learning rate {arm.learning_rate or changed.training.learning_rate:g}, {length}"
