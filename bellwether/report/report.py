"""The report: what a finished run or comparison gave, as one HTML file that needs no network and no script.

bellwether report FOLDER

from bellwether.report.report import report
path = report(result.folder)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bellwether.errors import CheckpointError, first_line
from bellwether.report.compare_table import ClientGain, Line, client_gains, make_lines
from bellwether.report.page.parts import Page
from bellwether.store.comparison import INPUTS, RUN, Comparison, arm_folder, is_comparison, read_comparison
from bellwether.store.finished import FinishedRun, is_run, read_run
from bellwether.tools.atomic import write_atomic

REPORT = "report.html"
TABLE = "table.json"


def report(folder: Path, out: Path | None = None) -> Path:
    """Write the report on a finished run or comparison; the same folder gives the same bytes.

    Args:
        folder: that ``bellwether run`` or ``bellwether compare`` wrote.
        out: the file to write; None writes ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        CheckpointError: the folder holds nothing finished, or something that cannot be read, or the file cannot be
            written.
    """
    from bellwether.report.page.render import render

    folder = Path(folder)
    path = Path(out) if out is not None else folder / REPORT
    write_atomic(path, render(_page(folder)))
    return path


def _page(folder: Path) -> Page:
    """Return the page of what a folder holds."""
    if is_comparison(folder) or (folder / INPUTS).is_file():
        return _comparison_page(folder)
    if is_run(folder):
        from bellwether.report.page.run import run_page

        return run_page(read_run(folder))
    raise CheckpointError(f"{folder} holds no run and no comparison; give a folder that bellwether wrote.")


def _comparison_page(folder: Path) -> Page:
    """Return the page of a comparison."""
    from bellwether.report.page.comparison import Compared, comparison_page

    comparison = read_comparison(folder)
    run = _first_run(folder, comparison)
    environment = run.environment if run is not None else _inputs(folder / INPUTS)
    lines, gains = _figures(folder / TABLE, comparison)
    return comparison_page(Compared(comparison, lines, gains, run, environment))


def _figures(path: Path, comparison: Comparison) -> tuple[Sequence[Line], Sequence[ClientGain]]:
    """Return lines and gains as ``bellwether compare`` left them; where it did not, as in Python, they are made."""
    if not path.is_file():
        return make_lines(comparison), client_gains(comparison)
    try:
        kept = json.loads(path.read_bytes())
        lines = TypeAdapter(list[Line]).validate_python(kept["lines"])
        gains = TypeAdapter(list[ClientGain]).validate_python(kept["clients"])
        if not comparison.arms.keys() <= {line.name for line in lines}:
            raise ValueError("it lacks an arm")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); remove it, and compare again.") from error
    return lines, gains


def _first_run(folder: Path, comparison: Comparison) -> FinishedRun | None:
    """Return the first federated arm's run under the first seed; None where no arm is a federation."""
    names = [name for name, arm in comparison.arms.items() if arm.trains == "federation"]
    return read_run(arm_folder(folder, names[0], comparison.outcomes[0].seed) / RUN) if names else None


def _inputs(path: Path) -> Mapping[str, Any]:
    """Return what a comparison rests on beside its recipe, by arm."""
    try:
        return {str(name): dict(facts) for name, facts in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); restore it, or compare anew.") from error
