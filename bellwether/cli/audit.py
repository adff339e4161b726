"""The command that attacks a recipe's privacy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bellwether.cli.given import trusted_recipe
from bellwether.cli.going_on import command_line, going_on
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

if TYPE_CHECKING:
    from bellwether.store.audit import Audit

Runs = Annotated[int, typer.Option("--runs", min=1, help="Runs of each game, with coins of their own.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Training rows that coins decide of, at most.")]
Canaries = Annotated[int, typer.Option("--canaries", min=0, help="Secrets to plant.")]
Clients = Annotated[
    bool | None,
    typer.Option(
        "--clients/--no-clients",
        help="Let coins decide of whole clients, too; else where the recipe hides these.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for what is found; an audit in it goes on.")]


def audit_privacy(
    words: Words = None,
    out: Out = Path("audit"),
    runs: Runs = 8,
    rows: Rows = 400,
    canaries: Canaries = 12,
    clients: Clients = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust: TrustFlag = False,
) -> None:
    """Attack a recipe's privacy in the simulation, without its protection and as it is; say what an attacker gets."""
    recipe = trusted_recipe(words, fields_of_flags(model, data, rounds, seed, device), trust)
    from bellwether.arms.audit.audit import audit
    from bellwether.arms.audit.game import Settings
    from bellwether.tell.auditing import watching_audit

    hidden = recipe.privacy.on and recipe.privacy.unit == "client"
    settings = Settings(runs, rows, canaries, clients=hidden if clients is None else clients)
    again = command_line(["audit", *(words or []), "--out", out])
    with going_on(lambda: f"finished runs are kept; go on with: {again}"), watching_audit(console()) as watcher:
        found = audit(recipe, out, settings, watch=watcher)
    _tell(found, out)


def _tell(found: Audit, out: Path) -> None:
    """Write the pages, and say what was found."""
    from bellwether.report.page.audit import audit_page, page_markdown
    from bellwether.tools.atomic import write_atomic

    for text in found.verdicts:
        say(text[:1].upper() + text[1:])
    write_atomic(out / "audit.md", page_markdown(audit_page(found)).encode())
    say(f"Figures are in {out / 'audit.json'}; {out / 'audit.md'} has the tables.")
    report_on(out)
