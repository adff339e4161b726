"""The coordinator's folder: keys, certificates, the recipe that sites agree to, and who is invited.

FOLDER/recipe.yaml        what all sites are asked to run
FOLDER/facts.json         hashes and versions that sites must have in common with the coordinator
FOLDER/federation.json    its identifier and address
FOLDER/ca.crt, ca.key     the federation's own authority; server.* and inner.* are signed by it
FOLDER/clients.crt        the authority of the certificates that sites have to show, where they have to
FOLDER/signing.key        signs what the coordinator sends
FOLDER/sites.json         who is invited and who is revoked
FOLDER/participants.json  the run's clients, from the first serving on
FOLDER/told.json          the sites that have said that they have the result
FOLDER/run/               the run: see ``store.run_folder``

The folder, and everything secret in it, can be read by its owner alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bellwether.engine.certificate import Certificate
from bellwether.errors import FederationError
from bellwether.exchange.records import RoundRecord
from bellwether.recipe.file import dump_recipe, load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.site.invitation import SITE_NAME, Invitation, for_sites, split_address
from bellwether.site.keys import (
    AUTHORITY_DAYS,
    RENEW,
    SIGNING,
    SOON,
    can_renew,
    days_left,
    expires,
    have_in_common,
    make_authority,
    make_certificate,
    make_signing,
    public_hex,
    read_authority,
    read_public,
    read_signing,
)
from bellwether.tools.atomic import TEMPORARY, cannot_write, remove, write_atomic
from bellwether.tools.json_text import KEPT, from_json_lines, json_lines, read_json, reading, typed
from bellwether.tools.lock import acquire, release

FEDERATION, RECIPE, FACTS, RUN = "federation.json", "recipe.yaml", "facts.json", "run"
SITES, PARTICIPANTS, TOLD = "sites.json", "participants.json", "told.json"
SERVER, INNER, CLIENTS = "server", "inner", "clients.crt"
TURN = 10.0  # seconds that a command waits while another one changes who takes part
_REMEDY = "restore it, or begin a federation anew by bellwether federation init"


@dataclass(frozen=True)
class Federation:
    """What a federation is.

    Args:
        identifier: drawn for it; all its runs' identifiers begin so.
        address: where sites reach it, as ``HOST:PORT``.
        certificate: the file of the outer port's certificate.
        key: the file of its key.
        authority: the file of the authority by which sites know it. All three are names in the folder, or elsewhere.
    """

    __pydantic_config__ = KEPT

    identifier: str
    address: str
    certificate: str
    key: str
    authority: str

    @property
    def outer(self) -> Certificate:
        """The certificate of the outer port."""
        return Certificate(Path(self.certificate), Path(self.key), Path(self.authority))


@dataclass(frozen=True)
class Invited:
    """A site that was invited: its name, its public keys in one word, and whether it was revoked since."""

    __pydantic_config__ = KEPT

    name: str
    key: str
    revoked: bool = False


def make_federation_folder(
    folder: Path,
    recipe: Recipe,
    facts: Mapping[str, str],
    address: str,
    names: Sequence[str] = (),
    days: int = 365,
    own: Certificate | None = None,
    clients: str = "",
) -> Federation:
    """Make a coordinator's folder, as a whole or not at all.

    Args:
        folder: it must not exist.
        recipe: what sites are asked to run.
        facts: see ``site.facts``.
        address: where sites reach the coordinator, as ``HOST:PORT``.
        names: further host names and addresses for the certificate.
        days: how long certificates are valid; their authority lasts longer, and signs new ones when they end.
        own: an enterprise's certificate for the outer port; None makes one.
        clients: the certificate of the authority, in PEM, that signs what sites have to show; empty asks for nothing.

    Raises:
        FederationError: the folder exists, or the address is none.
        CheckpointError: it cannot be written.
    """
    host, _ = split_address(address)
    if folder.exists():
        raise FederationError(f"{folder} exists already; give another folder with --folder, or use this one.")
    made = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    remove(made)
    try:
        made.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise cannot_write(made, error) from error
    try:
        make_authority(made, "bellwether federation", max(days, AUTHORITY_DAYS))
        make_certificate(made, INNER, ["127.0.0.1"], days)
        make_certificate(made, SERVER, list(dict.fromkeys([host.strip("[]"), *names])), days)
        make_signing(made / SIGNING)
        # Names alone of what lies in the folder, which can be moved then.
        paths = [f"{SERVER}.crt", f"{SERVER}.key", "ca.crt"]
        if own is not None:
            paths = [str(path.absolute()) for path in (own.chain, own.key, own.authority)]
        federation = Federation(secrets.token_hex(16), address, *paths)
        write_atomic(made / FEDERATION, json_lines([federation]))
        write_atomic(made / FACTS, json_lines([facts]))
        write_atomic(made / RECIPE, dump_recipe(recipe).encode())
        write_atomic(made / SITES, json_lines([[]]))
        if clients:
            write_atomic(made / CLIENTS, clients.encode())
        os.rename(made, folder)
    except BaseException:
        remove(made)
        raise
    return read_federation(folder)


def read_federation(folder: Path) -> Federation:
    """Return what a coordinator's folder is of.

    Raises:
        FederationError: it is none.
        CheckpointError: it cannot be read.
    """
    if not (folder / FEDERATION).is_file():
        raise FederationError(
            f"{folder} is no folder of a federation; make one by bellwether federation init, or name it with --folder."
        )
    read: Federation = read_json(folder / FEDERATION, Federation, _REMEDY)
    certificate, key, authority = (str(folder / path) for path in (read.certificate, read.key, read.authority))
    return replace(read, certificate=certificate, key=key, authority=authority)


def read_recipe(folder: Path) -> Recipe:
    """Return what a federation runs."""
    return load_recipe(folder / RECIPE)


def read_facts(folder: Path) -> dict[str, str]:
    """Return what sites must have in common with the coordinator."""
    facts: dict[str, str] = read_json(folder / FACTS, dict[str, str], _REMEDY)
    return facts


def invited(folder: Path) -> list[Invited]:
    """Return all sites, in the order in which they were invited; of a name that has had several keys, the last.

    Raises:
        CheckpointError: the list cannot be read.
    """
    return list({site.name: site for site in _ever_invited(folder)}.values())


def _ever_invited(folder: Path) -> list[Invited]:
    """Return all sites with every key that any of them has had, since a revoked one is never taken again."""
    sites: list[Invited] = read_json(folder / SITES, list[Invited], _REMEDY)
    return sites


def invite(folder: Path, name: str, key: str) -> Invitation:
    """Invite a site, and return its invitation; a site that is invited already gets the same one again.

    Args:
        folder: the coordinator's.
        name: the site's name, which is its client's, too.
        key: its public keys, as ``bellwether site keygen`` shows them.

    Raises:
        FederationError: the name or the key cannot be taken.
        CheckpointError: another command has been changing the list for too long, or it cannot be written.
    """
    federation = read_federation(folder)
    if not SITE_NAME.fullmatch(name):
        raise FederationError(
            f"{name[:40]!r} is no name for a site: give 1 to 64 letters, digits, dots, dashes and underscores, first "
            "of all a letter or digit."
        )
    read_public(key)
    with _changing(folder):
        sites = _ever_invited(folder)
        for site in sites:
            if have_in_common(site.key, key) and (site.revoked or site.name != name):
                why = "was revoked" if site.revoked else f"is that of {site.name}"
                raise FederationError(f"The key of {name} {why}; let the site make new ones (bellwether site keygen).")
            if site.name == name and site.key != key and not site.revoked:
                raise FederationError(f"{name} is invited with another key; revoke it first, or give another name.")
        if Invited(name, key) not in sites:
            if (folder / PARTICIPANTS).exists():
                raise FederationError(
                    f"{name} cannot be invited any more, since {folder} is served to others already; invite all sites "
                    "before that (they may join later), or begin a federation anew."
                )
            write_atomic(folder / SITES, json_lines([[*sites, Invited(name, key)]]))
    return Invitation(
        federation.identifier,
        name,
        key,
        federation.address,
        read_authority(Path(federation.authority)),
        public_hex(read_signing(folder / SIGNING).public_key()),
        dump_recipe(for_sites(read_recipe(folder))),
        read_facts(folder),
        read_authority(folder / CLIENTS) if (folder / CLIENTS).exists() else "",
    )


def revoke(folder: Path, name: str) -> None:
    """Revoke a site: it takes no part from now on, also where the federation is being served.

    Raises:
        FederationError: no such site is invited.
        CheckpointError: another command has been changing the list for too long, or it cannot be written.
    """
    read_federation(folder)
    with _changing(folder):
        sites = _ever_invited(folder)
        if not any(site.name == name and not site.revoked for site in sites):
            known = ", ".join(site.name for site in sites if not site.revoked) or "nobody"
            raise FederationError(f"{name[:80]!r} is not invited, so it cannot be revoked; invited are: {known}.")
        changed = [replace(site, revoked=True) if site.name == name else site for site in sites]
        write_atomic(folder / SITES, json_lines([changed]))


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Let one command after the other read and change who takes part, so that no change is lost.

    Raises:
        CheckpointError: another one takes too long, or the folder cannot be written.
    """
    lock = acquire(folder, TURN)  # serving holds that of the run's folder
    try:
        yield
    finally:
        release(folder, lock)


def _settle(folder: Path) -> None:
    """Write down who is a run's client, where another command has not done so meanwhile."""
    with _changing(folder):
        names = [site.name for site in invited(folder) if not site.revoked]
        if not names:
            raise FederationError(f"Nobody is invited to {folder}; invite sites by bellwether federation invite.")
        if not (folder / PARTICIPANTS).exists():
            write_atomic(folder / PARTICIPANTS, json_lines([names]))


def participants(folder: Path) -> list[Invited]:
    """Return the sites that are a run's clients; who they are is settled when this is first asked.

    Raises:
        FederationError: nobody is invited.
        CheckpointError: the list cannot be read or written.
    """
    path = folder / PARTICIPANTS
    if not path.exists():
        _settle(folder)
    settled: list[str] = read_json(path, list[str], _REMEDY)
    by_name = {site.name: site for site in invited(folder)}
    return [by_name[name] for name in settled]


def told(folder: Path) -> list[str]:
    """Return the names of the sites that have said that they have the result.

    Raises:
        CheckpointError: the list cannot be read.
    """
    path = folder / TOLD
    names: list[str] = read_json(path, list[str], "remove it, to wait for all sites again") if path.exists() else []
    return names


def note_told(folder: Path, name: str) -> None:
    """Write down that a site has the result.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_atomic(folder / TOLD, json_lines([[*told(folder), name]]))


def untold(folder: Path) -> list[str]:
    """Return the names of the run's sites that are not revoked and have not said that they have the result.

    Raises:
        FederationError: nobody is invited.
        CheckpointError: a list cannot be read.
    """
    known = set(told(folder))
    return [site.name for site in participants(folder) if not site.revoked and site.name not in known]


def round_records(run: Path) -> list[RoundRecord]:
    """Return the records of a run's rounds so far.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = run / "rounds.jsonl"
    if not path.exists():
        return []
    with reading(path, "restore it; the newest checkpoint of the run has it, too"):
        return from_json_lines(path.read_bytes(), lambda line: typed(line, RoundRecord))


def status(folder: Path) -> Iterator[str]:
    """Yield sentences on a federation: its address, its certificates, its sites, its rounds.

    Raises:
        BellwetherError: the folder cannot be read.
    """
    federation = read_federation(folder)
    yield f"Federation {federation.identifier[:12]} at {federation.address}."
    for what, path in (("certificate", federation.outer.chain), ("authority", federation.outer.authority)):
        left = days_left(path)
        when = f"{'ENDS' if left < SOON else 'ends'} in {left} days" if left >= 0 else "HAS ENDED"
        remedy = f": {_remedy(folder, path)}" if left < SOON else ""
        yield f"Its {what} {when}, on {expires(path):%Y-%m-%d}{remedy}."
    records = round_records(folder / RUN)
    heard = {one.client: record.round for record in records for one in record.clients}
    for site in invited(folder):
        last = f"last took part in round {heard[site.name]}" if site.name in heard else "has not taken part yet"
        yield f"{site.name}: {'revoked' if site.revoked else 'invited'}, {last}."
    rounds = read_recipe(folder).federation.rounds
    failed = sum(record.failure is not None for record in records)
    yield f"{len(records)} of {rounds} rounds are done" + (f", {failed} of them failed." if failed else ".")


def _remedy(folder: Path, path: Path) -> str:
    """Return what is to be done about a certificate that ends soon."""
    own = path == folder / f"{SERVER}.crt" and can_renew(folder, SERVER)
    return "bellwether federation serve makes it anew when it is next begun" if own else RENEW
