"""Commands of a site of a federation: keygen, trust, join, ledger."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bellwether.cli.given import require_flower
from bellwether.cli.say import complain, console, printable, say
from bellwether.errors import FederationError

if TYPE_CHECKING:
    from bellwether.site.terms import Terms

site = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="A site of a federation.")

FolderFlag = Annotated[Path, typer.Option("--folder", help="The site's own folder.")]


@site.command("keygen", short_help="Make a site's keys.")
def make_keys(folder: FolderFlag = Path("site")) -> None:
    """Make a site's keys, which never leave it, and show the word that the coordinator needs of them."""
    require_flower()
    from bellwether.site.keys import make_site_folder, make_site_keys

    say(make_site_keys(make_site_folder(folder)))
    complain("send this word, which is no secret, to the coordinator in a way that shows that it is yours.")


@site.command("trust", short_help="Enter the keys of another site.")
def trust_site(
    name: Annotated[str, typer.Argument(help="The name under which it takes part.")],
    word: Annotated[str, typer.Argument(help="The word that its bellwether site keygen showed.")],
    folder: FolderFlag = Path("site"),
) -> None:
    """Enter the keys of another site, got from it and not from the coordinator; masked updates need them."""
    require_flower()
    from bellwether.site.peers import add_peer

    again = add_peer(folder, name, word)
    say(f"{name} is known at {folder} by this word{', in place of another one' if again else ''}.")


@site.command("join", short_help="Take part in a federation.")
def join_federation(
    invitation: Annotated[Path, typer.Argument(help="The file that the coordinator has sent.")],
    data: Annotated[list[str], typer.Option("--data", help="File or folder with rows; may be given several times.")],
    fields: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="How files are read here, such as data.columns.response=reply or data.encoding=cp1252.",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option("--test", help="File or folder with rows to compare on at the end; they are never trained on."),
    ] = None,
    folder: FolderFlag = Path("site"),
    model: Annotated[str | None, typer.Option("--model", help="The base model's folder here.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = None,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", help="This site's own, with its key, in PEM, where the coordinator asks for it."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Agree to the terms, which are shown, without being asked.")
    ] = False,
) -> None:
    """Check data, model and disk, show the terms, take part until the federation ends, and write the site's page."""
    require_flower()
    from bellwether.site.joining import join

    def agree(terms: Terms) -> bool:
        sys.stdout.write(f"{printable(terms.text)}\n")
        sys.stdout.flush()
        return yes or _agrees()

    page = join(
        invitation,
        folder,
        data,
        agree,
        say,
        test=test or (),
        fields=fields or (),
        model=model,
        device=device,
        shown=certificate,
    )
    say(f"The page of this site, which stays here: {page}")


@site.command("ledger", short_help="Show what was asked and sent.")
def show_ledger(folder: FolderFlag = Path("site")) -> None:
    """Show everything that came and was sent: time, kind, round, bytes, protection, hash."""
    require_flower()
    from rich.table import Table

    from bellwether.site.ledger import entries
    from bellwether.tools.words import byte_size

    found = list(entries(folder))
    if not found:
        say(f"{folder} has no ledger: nothing came there, and nothing was sent.")
        return
    table = Table("time (UTC)", "way", "kind", "round", "size", "protection", "SHA-256", box=None)
    sent = 0
    for entry in found:
        sent += entry.bytes if entry.way == "reply" else 0
        time, size = entry.time[:19].replace("T", " "), byte_size(entry.bytes)
        protection = f"not done: {printable(entry.failure)}" if entry.failure else entry.protection
        table.add_row(time, entry.way, entry.kind, str(entry.round), size, protection, entry.content[:16])
    console().print(table)
    say(f"{byte_size(sent)} have left this site.")


def _agrees() -> bool:
    """Ask the person at the keyboard."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise FederationError("Nobody is there to agree to these terms; read them, and give --yes to agree.")
    sys.stderr.write("Take part on these terms? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
