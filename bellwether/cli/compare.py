"""The command that compares arms of tuning on one split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bellwether.cli.given import trusted_recipe
from bellwether.cli.look import report_on
from bellwether.cli.options import DataFlag, ModelFlag, TrustFlag, Words, fields_of_flags
from bellwether.cli.say import console, say


def compare_arms(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; a comparison in it goes on.")] = Path(
        "comparison"
    ),
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes side by side, each on its share of cores.")] = 1,
    trust: TrustFlag = False,
) -> None:
    """Train the arms that a recipe names on one split, over several seeds, and show how they compare."""
    recipe = trusted_recipe(words, fields_of_flags(model, data), trust, "default-table", arms=True)
    from bellwether.arms.compare import compare
    from bellwether.arms.result import write_tables
    from bellwether.report.compare_show import terminal
    from bellwether.tell.comparing_live import watching_comparison

    screen = console()
    with watching_comparison(screen) as watcher:
        comparison = compare(recipe, out, jobs=jobs, watch=watcher)
    lines, gains = write_tables(comparison, out)
    screen.print(terminal(lines, gains, ascii_only=screen.options.ascii_only))
    say(f"Tables and outcomes are in {out}; {out / 'table.md'} has all figures.")
    report_on(out)
