"""Commands of a real federation: rehearse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bellwether.cli.given import resumed_recipe, trusted_recipe
from bellwether.cli.look import report_on
from bellwether.cli.options import (
    DataFlag,
    DeviceFlag,
    ModelFlag,
    RoundsFlag,
    SeedFlag,
    TrustFlag,
    Words,
    fields_of_flags,
)
from bellwether.cli.say import console, say
from bellwether.errors import FederationError, RecipeError

if TYPE_CHECKING:
    from bellwether.runner.run import Result

federation = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="A federation across sites, on Flower."
)


@federation.command("rehearse", short_help="Run a recipe with sites that are processes of this machine.")
def rehearse_federation(
    words: Words = None,
    sites: Annotated[int, typer.Option("--sites", min=1, max=64, help="Sites, each a process of its own.")] = 3,
    model: ModelFlag = None,
    data: DataFlag = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; else runs/NAME-N.")] = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", min=1, help="Seconds that a site has for a task; else none.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run folder of a rehearsal to go on with.")] = None,
    trust: TrustFlag = False,
) -> None:
    """Run a recipe with a coordinator and sites as real processes over TLS, all on this machine."""
    require_flower()
    flags = fields_of_flags(model, data, rounds, seed, device, out)
    if resume is not None and out is not None:
        raise RecipeError("command line: a run goes on in its own folder; give --resume or --out, not both.")
    recipe = (
        trusted_recipe(words, flags, trust) if resume is None else resumed_recipe(resume, words or [], flags, trust)
    )
    from bellwether.site.rehearse import rehearse
    from bellwether.tell.live import watching

    screen = console()
    with watching(screen) as watcher:
        result = rehearse(recipe, sites, deadline=deadline, resume=resume, watch=watcher)
    show_result(result)


def show_result(result: Result) -> None:
    """Show a run's summary, and where its results are."""
    from bellwether.tell.narrate import summary

    screen = console()
    screen.print(summary([*result.rounds, *result.evaluations], ascii_only=screen.options.ascii_only))
    say(f"Adapter, scores and records are in {result.folder}.")
    report_on(result.folder)


def require_flower() -> None:
    """Refuse to go on where Flower is not installed, or another version of it than is relied upon.

    Raises:
        FederationError: it is not.
    """
    import importlib.metadata

    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise FederationError(
            "A federation across sites needs Flower, which is not installed here: run pip install -c constraints.txt "
            "-e '.[federation]' in bellwether's folder."
        ) from None
    if not found.startswith("1.42."):
        raise FederationError(
            f"A federation across sites needs Flower 1.42, and {found} is installed here: run pip install -c "
            "constraints.txt -e '.[federation]' in bellwether's folder."
        )
