"""Commands on what is finished: its report, and a model with the adapter merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bellwether.cli.given import agree_to_folder
from bellwether.cli.options import ModelFlag, TrustFlag
from bellwether.cli.say import at_work, say
from bellwether.errors import CheckpointError

if TYPE_CHECKING:
    from bellwether.exchange.adapter import Adapter


def write_report(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run or comparison.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; else report.html in the folder.")] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Write charts as SVG and PDF, and tables as LaTeX, to figures/ beside it.")
    ] = False,
    smooth: Annotated[
        bool, typer.Option("--smooth/--no-smooth", help="Smooth curves of many points, with what was measured behind.")
    ] = True,
) -> None:
    """Write what a finished run or comparison gave as one HTML file, which needs no network and no script."""
    from bellwether.report.report import FIGURES, report

    with at_work("drawing the report"):
        path = report(folder, out, figures=figures, smooth=smooth)
    say(f"Report: {path}")
    if figures:
        say(f"Charts and tables for a paper: {path.parent / FIGURES}")


def report_on(folder: Path) -> None:
    """Write the report on what was just finished in a folder, and say where it is.

    Raises:
        CheckpointError: it cannot be written; what is finished stays as it is.
    """
    from bellwether.report.report import report

    try:
        with at_work("drawing the report"):
            path = report(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"Results are in {folder}, but their report is not; bellwether report {folder}. {error}"
        ) from error
    say(f"Report: {path}")


def _served_by(folder: Path, client: str) -> Adapter:
    """Return what a client serves: of a run, or of a site, whose folder needs what sites are installed with."""
    from bellwether.store.finished import is_run
    from bellwether.store.run_folder import ADAPTER, JOINED

    if is_run(folder):
        from bellwether.runner.served import served_by

        return served_by(folder, client)
    # Looked at here, since the room of sites wants the packages that they are installed with.
    if not (folder / ADAPTER / JOINED).exists():
        raise CheckpointError(
            f"{folder} holds neither a finished run nor a site with the result of its federation; give one of them, or "
            "leave --client out."
        )
    from bellwether.cli.given import require_flower

    require_flower()
    from bellwether.site.served import served

    return served(folder, client)


def export_model(
    folder: Annotated[Path, typer.Argument(help="Run folder, or a folder with an adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    model: ModelFlag = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter as it is, with the tokenizer beside it.")
    ] = False,
    client: Annotated[
        str | None,
        typer.Option("--client", help="Of a run or a site, the adapter that this client serves, where it has its own."),
    ] = None,
    trust: TrustFlag = False,
) -> None:
    """Merge an adapter into its base model and write a plain Hugging Face model folder, with its chat template."""
    agree_to_folder(folder, trust, model)
    from bellwether.runner.export import export_run

    own = _served_by(folder, client) if client is not None else None
    export_run(folder, out, model, merge=not adapter, own=own)
    say(f"Wrote {out}.")
