"""The command that compares arms of tuning on one split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bellwether.cli.given import OWN_TABLE, check_rounds, of_one_seed, resumed_comparison, trusted_recipe
from bellwether.cli.going_on import command_line, going_on
from bellwether.cli.look import report_on
from bellwether.cli.options import (
    DataFlag,
    DeviceFlag,
    JobsFlag,
    ModelFlag,
    OutFlag,
    ResumeFlag,
    RoundsFlag,
    SeedFlag,
    TrustFlag,
    Words,
    check_folder_flags,
    fields_of_flags,
)
from bellwether.cli.say import at_work, console, say

if TYPE_CHECKING:
    from bellwether.recipe.recipe import Recipe


def compare_arms(
    words: Words = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: OutFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    jobs: JobsFlag = None,
    resume: ResumeFlag = None,
    trust: TrustFlag = False,
) -> None:
    """Train the arms that a recipe names on one split, over several seeds, and show how they compare.

    A comparison that --out names goes on, too. With --seed it has that one seed.
    """
    flags = fields_of_flags(model, data, rounds, seed, device)
    check_folder_flags(out, resume)
    if resume is None:
        recipe = trusted_recipe(words, flags, trust, "default-table", OWN_TABLE, arms=True)
    else:
        recipe = resumed_comparison(resume, words or [], flags, trust)
    recipe = of_one_seed(recipe, seed)
    check_rounds(recipe, rounds)
    _compare(recipe, resume or out or Path("comparison"), jobs or 1)


def _compare(recipe: Recipe, out: Path, jobs: int) -> None:
    """Compare, then write and show the tables."""
    from bellwether.arms.compare import compare
    from bellwether.arms.result import write_tables
    from bellwether.exchange.records import ComparisonStarted, Event
    from bellwether.report.compare_show import terminal
    from bellwether.tell.comparing_live import watching_comparison
    from bellwether.tell.narrate import tell_all

    screen, folder = console(), list[Path]()

    def begun(event: Event) -> None:
        if isinstance(event, ComparisonStarted):
            folder[:] = [out]

    def how() -> str | None:
        # Before it has begun, what lies in the folder may be another comparison.
        words = ["compare", "--resume", *folder, *(["--jobs", jobs] if jobs > 1 else [])]
        return f"what is finished is kept; go on with: {command_line(words)}" if folder else None

    with going_on(how), watching_comparison(screen) as watcher:
        comparison = compare(recipe, out, jobs=jobs, watch=tell_all([begun, watcher]))
    with at_work("working out intervals"):
        lines, gains = write_tables(comparison, out)
    screen.print(terminal(lines, gains, ascii_only=screen.options.ascii_only))
    say(f"Tables and outcomes are in {out}; {out / 'table.md'} has all figures.")
    report_on(out)
