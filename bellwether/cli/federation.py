"""Commands of a real federation: its coordinator's, and the rehearsal; a site's own are in ``cli/site.py``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bellwether.cli.given import require_flower, resumed_recipe, trusted_recipe
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


FolderFlag = Annotated[Path, typer.Option("--folder", help="The coordinator's folder.")]


@federation.command("init", short_help="Make a coordinator's folder.")
def make_folder_of_federation(
    words: Words = None,
    address: Annotated[str, typer.Option("--address", help="HOST:PORT where sites reach this coordinator.")] = "",
    folder: FolderFlag = Path("federation"),
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Further host name or address for the certificate; may repeat.")
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="For how long certificates are valid.")] = 365,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", help="Your own certificate chain with its key, in PEM.")
    ] = None,
    authority: Annotated[
        Path | None, typer.Option("--authority", help="Your own authority's certificate, in PEM.")
    ] = None,
    client_authority: Annotated[
        Path | None,
        typer.Option("--client-authority", help="Authority, in PEM, of certificates that sites have to show."),
    ] = None,
    model: ModelFlag = None,
    rounds: RoundsFlag = None,
    seed: SeedFlag = None,
    device: DeviceFlag = None,
    trust: TrustFlag = False,
) -> None:
    """Make a folder with authority, certificates, keys and the recipe that sites will be asked to run."""
    require_flower()
    if not address:
        raise RecipeError("command line: say where sites reach this coordinator, such as --address example.org:8443.")
    if (certificate is None) != (authority is None):
        raise RecipeError("command line: give --certificate and --authority together, or neither.")
    recipe = trusted_recipe(words, fields_of_flags(model, None, rounds, seed, device), trust)
    from bellwether.engine.certificate import Certificate, check_certificate
    from bellwether.runner.precision import with_precision
    from bellwether.runner.prepare import with_absolute_paths
    from bellwether.site.coordinator import measured_facts
    from bellwether.site.federation_folder import make_federation_folder
    from bellwether.site.invitation import split_address
    from bellwether.site.keys import expires, read_authority

    host, _ = split_address(address)
    if folder.exists():
        raise FederationError(f"{folder} exists already; give another folder with --folder, or use this one.")
    recipe = with_precision(with_absolute_paths(recipe), None, say)
    own = (
        Certificate(certificate, certificate, authority) if certificate is not None and authority is not None else None
    )
    if own is not None:
        check_certificate(own, host.strip("[]"))
    clients = "" if client_authority is None else read_authority(client_authority)
    made = make_federation_folder(folder, recipe, measured_facts(recipe), address, name or (), days, own, clients)
    say(f"Made {folder}, which only you can read; its certificates end on {expires(made.outer.chain):%Y-%m-%d}.")
    then = f"bellwether federation invite SITE PUBLIC_KEY --folder {folder}, then bellwether federation serve"
    say(f"Next: {then} --folder {folder}")


@federation.command("invite", short_help="Invite a site.")
def invite_site(
    site: Annotated[str, typer.Argument(help="A name for the site.")],
    public_key: Annotated[str, typer.Argument(help="The word that bellwether site keygen shows there.")],
    folder: FolderFlag = Path("federation"),
    out: Annotated[Path | None, typer.Option("--out", help="File for the invitation; else SITE.invitation.")] = None,
) -> None:
    """Write an invitation for a site, whose key alone it serves."""
    require_flower()
    from bellwether.site.federation_folder import invite
    from bellwether.site.invitation import write_invitation

    path = out or Path(f"{site}.invitation")
    invitation = invite(folder, site, public_key)
    write_invitation(path, invitation)
    say(f"Wrote {path}; send it to {site}, which joins by bellwether site join {path.name} --data FILE")


@federation.command("revoke", short_help="Let a site take part no more.")
def revoke_site(
    site: Annotated[str, typer.Argument(help="The site's name.")], folder: FolderFlag = Path("federation")
) -> None:
    """Revoke a site's key for good; a federation that is being served knows at once."""
    require_flower()
    from bellwether.site.federation_folder import revoke

    revoke(folder, site)
    say(f"{site} is revoked; its key is never taken again.")


@federation.command("status", short_help="Show sites, certificates and rounds.")
def show_status(folder: FolderFlag = Path("federation")) -> None:
    """Show who is invited, until when certificates are valid, and how far the run has come."""
    require_flower()
    from bellwether.site.federation_folder import status

    for line in status(folder):
        say(line)


@federation.command("serve", short_help="Run a federation over its sites, or go on with it.")
def serve_federation(
    folder: FolderFlag = Path("federation"),
    listen: Annotated[str, typer.Option("--listen", help="Address of this machine to listen on.")] = "0.0.0.0",
    quorum: Annotated[
        int | None, typer.Option("--quorum", min=1, help="Sites to wait for; else federation.quorum of the invited.")
    ] = None,
    deadline: Annotated[float, typer.Option("--deadline", min=1, help="Seconds that a site has for a task.")] = 3600.0,
) -> None:
    """Wait for sites and run the rounds; the same command goes on with a run that was interrupted or killed."""
    require_flower()
    from bellwether.site.coordinator import serve
    from bellwether.tell.live import watching

    with watching(console()) as watcher:
        result = serve(folder, listen=listen, quorum=quorum, deadline=deadline, watch=watcher)
    if result is not None:  # else it was shown before
        show_result(result)


def show_result(result: Result) -> None:
    """Show a run's summary, and where its results are."""
    from bellwether.tell.narrate import summary

    screen = console()
    screen.print(summary([*result.rounds, *result.evaluations], ascii_only=screen.options.ascii_only))
    say(f"Adapter, scores and records are in {result.folder}.")
    report_on(result.folder)
