"""The command that compares arms of tuning on one split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bellwether.cli.given import resumed_comparison, trusted_recipe
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
from bellwether.cli.say import console, say
from bellwether.errors import RecipeError

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
        recipe = trusted_recipe(words, flags, trust, "default-table", arms=True)
    else:
        recipe = resumed_comparison(resume, words or [], flags, trust)
    recipe = _of_one_seed(recipe, seed)
    if rounds is not None:
        _check_rounds(recipe)
    _compare(recipe, resume or out or Path("comparison"), jobs or 1)


def _of_one_seed(recipe: Recipe, seed: int | None) -> Recipe:
    """Return a comparison whose draws all derive from one seed; None leaves it as it is."""
    from bellwether.recipe.file import with_overrides

    if seed is None or recipe.compare is None:
        return recipe
    fields = ["compare.seeds", *(["compare.tune.seeds"] if recipe.compare.tune else [])]
    return with_overrides(recipe, {field: [seed] for field in fields})


def _check_rounds(recipe: Recipe) -> None:
    """Refuse a number of rounds where no arm counts them."""
    compare = recipe.compare
    if compare is None:
        return  # refused in words of its own
    counted = [
        name
        for name, arm in compare.arms.items()
        if arm.learns and name not in compare.tuned and arm.passes is None and arm.steps is None
    ]
    if not counted:
        field = "compare.tune.passes" if compare.tuned else "compare.arms.NAME.passes"
        raise RecipeError(
            f"command line: --rounds has no effect, since no arm of {recipe.name} counts rounds; set {field}."
        )


def _compare(recipe: Recipe, out: Path, jobs: int) -> None:
    """Compare, then write and show the tables."""
    from bellwether.arms.compare import compare
    from bellwether.arms.result import write_tables
    from bellwether.report.compare_show import terminal
    from bellwether.store.checkpoint import RECIPE
    from bellwether.tell.comparing_live import watching_comparison

    def how() -> str | None:
        words = ["compare", "--resume", out, *(["--jobs", jobs] if jobs > 1 else [])]
        return f"what is finished is kept; go on with: {command_line(words)}" if (out / RECIPE).is_file() else None

    screen = console()
    with going_on(how), watching_comparison(screen) as watcher:
        comparison = compare(recipe, out, jobs=jobs, watch=watcher)
    lines, gains = write_tables(comparison, out)
    screen.print(terminal(lines, gains, ascii_only=screen.options.ascii_only))
    say(f"Tables and outcomes are in {out}; {out / 'table.md'} has all figures.")
    report_on(out)
