"""The report: what a finished run, comparison or audit gave, as one HTML file that needs no network and no script.

bellwether report FOLDER
bellwether report FOLDER --figures

from bellwether.report.report import report
path = report(result.folder)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellwether.errors import CheckpointError
from bellwether.exchange.records import EvaluationRecord
from bellwether.recipe.file import with_overrides
from bellwether.report.compare_table import ClientGain, Line, client_gains, make_lines
from bellwether.report.page.parts import Page
from bellwether.store.audit import is_audit, read_audit
from bellwether.store.comparison import INPUTS, RUN, Comparison, arm_folder, is_comparison, read_comparison
from bellwether.store.finished import FinishedRun, is_run, read_evaluations, read_run
from bellwether.tools.atomic import make_folder, write_atomic
from bellwether.tools.json_text import from_json, read_json, reading, typed

REPORT = "report.html"
TABLE = "table.json"
FIGURES = "figures"


def report(folder: Path, out: Path | None = None, *, figures: bool = False, smooth: bool = True) -> Path:
    """Write the report on a finished run, comparison or audit; the same folder gives the same bytes.

    Args:
        folder: that ``bellwether run``, ``bellwether compare`` or ``bellwether audit`` wrote.
        out: the file to write; None writes ``report.html`` in the folder.
        figures: whether to write, to the folder ``figures`` beside it, every chart as SVG and PDF and every table as
            LaTeX as well.
        smooth: whether curves of many points are smoothed.

    Returns:
        The file.

    Raises:
        CheckpointError: the folder holds nothing finished, or something that cannot be read, or the file cannot be
            written.
    """
    from bellwether.report.page.render import render
    from bellwether.report.paper import page_files

    folder = Path(folder)
    path = Path(out) if out is not None else folder / REPORT
    page = _page(folder, smooth)
    write_atomic(path, render(page))
    if figures:
        beside = make_folder(path.parent / FIGURES)
        for name, content in page_files(page).items():
            write_atomic(beside / name, content)
    return path


def _page(folder: Path, smooth: bool = True) -> Page:
    """Return the page of what a folder holds."""
    if is_audit(folder):
        from bellwether.report.page.audit import audit_page

        return audit_page(read_audit(folder))
    if is_comparison(folder) or (folder / INPUTS).is_file():
        return _comparison_page(folder, smooth)
    if is_run(folder):
        from bellwether.report.page.run import run_page

        return run_page(read_run(folder), smooth=smooth)
    raise CheckpointError(f"{folder} holds no run, comparison or audit; give a folder that bellwether wrote.")


def _comparison_page(folder: Path, smooth: bool) -> Page:
    """Return the page of a comparison."""
    from bellwether.report.page.comparison import Compared, comparison_page

    comparison = read_comparison(folder)
    run = _first_run(folder, comparison)
    environment = run.environment if run is not None else _inputs(folder / INPUTS)
    lines, gains = _figures(folder / TABLE, comparison)
    evaluations = _evaluations(folder, comparison)
    return comparison_page(Compared(comparison, lines, gains, run, environment, evaluations, smooth))


def _figures(path: Path, comparison: Comparison) -> tuple[Sequence[Line], Sequence[ClientGain]]:
    """Return lines and gains as ``bellwether compare`` left them; where it did not, as in Python, they are made."""
    if not path.is_file():
        return make_lines(comparison), client_gains(comparison)
    with reading(path, "remove it, and compare again"):
        kept: _Figures = typed(from_json(path.read_bytes()), _Figures)
        _check_figures(kept, comparison)
    return kept.lines, kept.clients


@dataclass(frozen=True)
class _Figures:
    """What ``table.json`` holds."""

    lines: Sequence[Line]
    clients: Sequence[ClientGain]


def _check_figures(kept: _Figures, comparison: Comparison) -> None:
    """Refuse figures of which something is lacking, or is no number where there always is one."""
    if not comparison.arms.keys() <= {line.name for line in kept.lines if line.scores}:
        raise ValueError("it lacks an arm")
    of_lines = [
        interval
        for line in kept.lines
        for figures in (line.scores, line.gaps, *line.categories.values(), *line.groups.values())
        for interval in figures.values()
    ]
    if not all(math.isfinite(end) for one in of_lines for end in (one.low, one.high, one.p)):
        raise ValueError("an interval has ends that are not finite")
    for gain in kept.clients:
        if not {gain.arm, gain.reference} <= comparison.arms.keys() or not gain.shared.keys() <= gain.alone.keys():
            raise ValueError(f"the gains of {gain.client!r:.40} are not whole")
        if any(math.isinf(end) for one in (*gain.shared.values(), *gain.own.values()) for end in (one.low, one.high)):
            raise ValueError("an interval has ends that are not finite")


def _first_run(folder: Path, comparison: Comparison) -> FinishedRun | None:
    """Return the first federated arm's run under the first seed; None where no arm is a federation."""
    names = [name for name, arm in comparison.arms.items() if arm.trains == "federation"]
    return read_run(arm_folder(folder, names[0], comparison.outcomes[0].seed) / RUN) if names else None


def _evaluations(folder: Path, comparison: Comparison) -> dict[str, list[list[EvaluationRecord]]]:
    """Return the evaluations of federated arms by arm and seed; arms that were scored before and after alone have none.

    Where a person has removed the run of a seed, the others speak.
    """
    seeds = dict.fromkeys(outcome.seed for outcome in comparison.outcomes)
    found: dict[str, list[list[EvaluationRecord]]] = {}
    for name, arm in comparison.arms.items():
        if arm.trains == "federation" and with_overrides(comparison.recipe, arm.set).evaluation.every:
            runs = [arm_folder(folder, name, seed) / RUN for seed in seeds]
            found[name] = [read_evaluations(run) for run in runs if is_run(run)]
    return {name: runs for name, runs in found.items() if runs}


def _inputs(path: Path) -> Mapping[str, Any]:
    """Return what a comparison rests on beside its recipe, by arm."""
    found: dict[str, dict[str, str]] = read_json(path, dict[str, dict[str, str]], "restore it, or compare anew")
    return found
