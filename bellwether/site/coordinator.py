"""The coordinator of a federation: hosts Flower's SuperLink, waits for its quorum, and runs the rounds.

The run lies in the federation's folder, and its rounds are committed there; a coordinator that was killed goes on from
the last of them when it is begun again, and the sites, which have stayed, take part again. Each site is one client.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bellwether.data.rows import Federated, Row
from bellwether.data.sources import read_rows
from bellwether.engine.certificate import Certificate, check_certificate
from bellwether.engine.flower.dispatch import Dispatch
from bellwether.engine.flower.link import Link
from bellwether.engine.flower.records import Arrived
from bellwether.engine.remote import ABSENT, PARTING, Facts, Party, RemoteEngine
from bellwether.errors import FederationError, RoundFailed
from bellwether.exchange.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_files
from bellwether.exchange.records import Note, RoundRecord, Watcher
from bellwether.exchange.seal import Parcel
from bellwether.federate import Engine
from bellwether.method.cohort import Sampler, Sampling
from bellwether.method.select.budget import share
from bellwether.model.base import load_base
from bellwether.recipe.recipe import Recipe
from bellwether.recipe.secure import LEAST_COHORT
from bellwether.runner.guarantee import never_again
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import Prepared, prepare_with
from bellwether.runner.run import Result, run
from bellwether.runner.wiring import Deployment, Setting, check_copies, newest_result
from bellwether.site.facts import differing, facts_of
from bellwether.site.federation_folder import (
    CLIENTS,
    INNER,
    RECIPE,
    RUN,
    SERVER,
    SITES,
    Federation,
    invited,
    note_told,
    participants,
    read_facts,
    read_federation,
    read_recipe,
    told,
    untold,
)
from bellwether.site.invitation import check_recipe_for_sites, split_address
from bellwether.site.keys import (
    RENEW,
    SIGNING,
    SOON,
    can_renew,
    days_left,
    expires,
    read_public,
    read_signing,
    renew_certificate,
)
from bellwether.store.model_card import model_card
from bellwether.store.run_folder import ADAPTER, CHECKPOINTS, ENVIRONMENT, read_environment
from bellwether.tools.words import listed

PATIENCE = 86_400.0  # seconds in which the quorum must come
UNSCORED = (
    "Nothing will be scored: this coordinator has no rows of its own (data.test_sources), and sites hold none out "
    "(partition.client_test_fraction)."
)
EMBEDDED = ("starter", "starter:lowland")


def measured_facts(recipe: Recipe) -> dict[str, str]:
    """Return what sites must have in common with this machine, once it is known that the recipe can be run here.

    Raises:
        BellwetherError: it cannot.
    """
    check_recipe_for_sites(recipe)
    # Who will take part is not known yet; those whom the recipe names, and as many as it wants in a round.
    federation, masked = recipe.federation, recipe.secure_aggregation.enabled
    wanted = federation.cohort_size or (math.ceil(LEAST_COHORT / federation.fraction) if masked else 1)
    sites = [*(recipe.lora.ranks or ()), *(f"site-{number}" for number in range(wanted))]
    prepared = prepare_coordinator(recipe, list(dict.fromkeys(map(str, sites))), None)
    return facts_of(recipe, load_base(recipe.model, prepared.base), prepared.public)


def serve(
    folder: Path,
    *,
    listen: str = "0.0.0.0",
    quorum: int | None = None,
    deadline: float | None = 3600.0,
    watch: Watcher | None = None,
) -> Result | None:
    """Run a federation's recipe over its sites, or go on with it.

    Where all rounds are done, those get the result that have not got it yet, for as long as the quorum may take.

    Args:
        folder: the coordinator's, see ``site.federation_folder``.
        listen: the address of this machine on which the port is opened.
        quorum: sites that must be there before the first round; None takes ``federation.quorum`` of the invited.
        deadline: seconds that a site has for a task; None waits until Flower finds it gone.
        watch: is told what happens; None is silent.

    Returns:
        The run's result; None where it was there already, and all sites have it.

    Raises:
        BellwetherError: see ``bellwether.errors``.
    """
    federation, recipe = read_federation(folder), read_recipe(folder)
    check_recipe_for_sites(recipe)
    path, sites = folder / RUN, [site.name for site in participants(folder)]
    if _rounds_done(path) >= recipe.federation.rounds and (path / ADAPTER).is_dir() and not untold(folder):
        if watch is not None:
            watch(Note(f"All rounds are done, the result is in {path}, and all sites have it; nothing is left to do."))
        return None
    needed = functools.partial(_needed, folder, recipe, quorum)
    if _rounds_done(path) < recipe.federation.rounds:
        needed()  # before anything is loaded
    for sentence in check_certificates(folder, federation):
        if watch is not None:
            watch(Note(sentence, warning=True))

    def prepare(recipe: Recipe, opened: Opened | None) -> Prepared:
        return prepare_coordinator(recipe, sites, opened)

    deployment = Deployment(
        prepare,
        lambda setting: _over_link(setting, folder, federation, listen, needed, deadline),
        here=False,
        sampling=lambda sampler: _among_staying(sampler, folder),
        secret=never_again,
    )
    output = recipe.output.model_copy(update={"folder": str(path)})
    try:
        if (path / RECIPE).is_file():  # also where it was killed before it committed anything
            return run(None, resume=path, watch=watch, deployment=deployment)
        return run(recipe.model_copy(update={"output": output}), watch=watch, deployment=deployment)
    except RoundFailed as error:
        raise RoundFailed(
            f"{error} What the recipe says was settled at federation init; where sites were missing, the same command "
            "goes on once they are back."
        ) from error


def _needed(folder: Path, recipe: Recipe, quorum: int | None) -> int:
    """Return how many sites must be there before the first round, of those that are not revoked by now.

    Raises:
        FederationError: more are asked for than there are, or all are revoked.
    """
    staying = len(_staying(folder))
    if quorum is None:
        return share(staying, recipe.federation.quorum)
    if quorum > staying:
        raise FederationError(
            f"--quorum is {quorum}, and {staying} of the sites of {folder} are not revoked, so it cannot be "
            f"reached; give at most {staying}, or leave it out for federation.quorum of them."
        )
    return quorum


def _staying(folder: Path) -> list[str]:
    """Return the names of a run's sites that are not revoked.

    Raises:
        FederationError: all are.
    """
    names = [site.name for site in participants(folder) if not site.revoked]
    if not names:
        raise FederationError(
            f"All sites of {folder} are revoked; begin a federation anew by bellwether federation init."
        )
    return names


def _among_staying(sampler: Sampler, folder: Path) -> Sampler:
    """Return a sampler that draws among the sites that are not revoked by then, so that no quorum counts the others."""

    def sample(sampling: Sampling) -> Sequence[str]:
        names = _staying(folder)
        return sampler(replace(sampling, clients=names, known={name: sampling.known[name] for name in names}))

    return sample


def _rounds_done(run: Path) -> int:
    """Return the number of the last round that was committed; 0 where there is none."""
    return max((int(one.name) for one in (run / CHECKPOINTS).glob("[0-9]*")), default=0)


def check_certificates(folder: Path, federation: Federation) -> Iterator[str]:
    """Yield a sentence for each certificate that ends soon, once those of the federation's own are made anew.

    Args:
        folder: the coordinator's.
        federation: what it is of.

    Raises:
        FederationError: one has ended, or sites would refuse it.
    """
    for stem in (SERVER, INNER):
        if can_renew(folder, stem):
            renew_certificate(folder, stem)
            path = folder / f"{stem}.crt"
            yield f"{path} would have ended soon and was made anew: it ends on {expires(path):%Y-%m-%d}."
    for path in (federation.outer.chain, federation.outer.authority, folder / f"{INNER}.crt"):
        left = days_left(path)
        if left < 0:
            raise FederationError(f"The certificate {path} ended on {expires(path):%Y-%m-%d}: {RENEW}.")
        if left < SOON:
            yield f"The certificate {path} ends in {left} days, on {expires(path):%Y-%m-%d}: {RENEW}."
    check_certificate(federation.outer, split_address(federation.address)[0].strip("[]"))


def prepare_coordinator(recipe: Recipe, sites: Sequence[str], opened: Opened | None) -> Prepared:
    """Read and check what a coordinator needs: rows to score, if the recipe names any, and no row of a client.

    Args:
        recipe: the recipe; its ``data.test_sources`` or ``data.validation_sources`` are scored.
        sites: all sites, each of which is a client.
        opened: what others have opened already.

    Raises:
        BellwetherError: as ``runner.prepare.prepare``.
    """
    notes: list[str] = []

    def scored(part: str) -> list[Row]:
        named: tuple[str, ...] = getattr(recipe.data, f"{part}_sources")
        if not named and set(recipe.data.sources) <= set(EMBEDDED):
            named = tuple(f"{source}:{part}" for source in recipe.data.sources)
        rows, said = read_rows(named, recipe.data, None) if named else ((), ())
        notes.extend(said)
        return list(rows)

    own = recipe.partition.client_test_fraction > 0
    federated = Federated(
        dict.fromkeys(sites, ()),
        dict.fromkeys(sites, ()) if own else {},
        scored("validation"),
        scored("test"),
        tuple(notes),
    )
    return prepare_with(recipe, federated, opened, unscored=UNSCORED)


@contextlib.contextmanager
def _over_link(
    setting: Setting,
    folder: Path,
    federation: Federation,
    listen: str,
    needed: Callable[[], int],
    deadline: float | None,
) -> Iterator[Engine]:
    """Yield an engine over the sites that join."""
    facts: Facts = facts_of(setting.prepared.recipe, setting.base, setting.prepared.public)
    changed = differing(read_facts(folder), facts)
    if changed:
        raise FederationError(
            f"This machine works with something else than what the sites were invited to: {'; '.join(changed[:3])}; "
            "restore it, or begin a federation anew."
        )
    inner = Certificate(folder / f"{INNER}.crt", folder / f"{INNER}.key", folder / "ca.crt")
    _, port = split_address(federation.address)
    clients = folder / CLIENTS
    with Link(folder, inner, federation.outer, listen, port, clients=clients if clients.exists() else None) as link:
        roster = _Roster(folder, link)
        parties = [Party(site.name, read_public(site.key).signing, (site.name,)) for site in participants(folder)]
        with link.dispatch() as dispatch:
            engine = RemoteEngine(
                _Invited(dispatch, roster),
                parties,
                read_signing(folder / SIGNING),
                f"{federation.identifier}/{RUN}",
                facts,
                setting.watch,
                deadline,
                link.expect,
            )
            over = _rounds_done(setting.folder) >= setting.prepared.recipe.federation.rounds
            if over:
                names = listed(untold(folder)) or "nobody"
                text = f"All rounds are done. The result waits a day for those that have not got it: {names}."
                setting.watch(Note(f"{text} Ctrl-C ends this, and the same command goes on."))
            else:
                where, names = f"{federation.address}, port {port} of this machine", listed(_staying(folder))
                text = f"Waiting at {where}, for {needed()} of the sites that may come: {names}."
                setting.watch(Note(f"{text} Each says hello once it has joined; Ctrl-C ends this."))
                engine.wait(needed, PATIENCE)
            yield engine
            adapter, records = newest_result(setting.folder)
            environment = read_environment(setting.folder / ENVIRONMENT, "restore it")
            card = model_card(setting.prepared.recipe, records, len(parties), environment, sites=True)
            files = adapter_files(adapter)
            rounds = [one for one in records if isinstance(one, RoundRecord) and one.failure is None]
            counted = Counter(one.client for record in rounds for one in record.clients)

            def about(site: str) -> bytes:
                said = {"card": card, "config": files[CONFIG_FILE].decode(), "rounds": counted[site]}
                return json.dumps(said).encode()

            with contextlib.suppress(KeyboardInterrupt):  # a person need not wait for the sites to have their result
                engine.end(
                    about,
                    files[WEIGHTS_FILE],
                    PATIENCE if over else deadline or PARTING,
                    PATIENCE if over else ABSENT,
                    told(folder),
                    lambda name: note_told(folder, name),
                )
            missing = untold(folder)
            if missing:
                text = (
                    f"Without the result are still: {listed(missing)}. To give it to them, serve the federation again."
                )
                setting.watch(Note(text, warning=True))
    check_copies(setting.base, [])


class _Roster:
    """Who may connect, as the list of sites says now."""

    def __init__(self, folder: Path, link: Link) -> None:
        self._folder, self._link, self._read = folder, link, 0
        self._revoked: set[str] = set()
        self.revoked()

    def revoked(self) -> set[str]:
        """Return who is revoked, once Flower knows of every change of the list."""
        written = (self._folder / SITES).stat().st_mtime_ns
        if written != self._read:
            for site in invited(self._folder):
                if site.revoked:
                    self._link.unregister(site.name)
                    self._revoked.add(site.name)
                else:
                    self._link.register(site.name, read_public(site.key).flower)
            self._read = written
        return self._revoked


class _Invited:
    """What delivers messages to those who are not revoked."""

    def __init__(self, dispatch: Dispatch, roster: _Roster) -> None:
        self._dispatch, self._roster = dispatch, roster

    def online(self) -> Mapping[str, int]:
        """Return the numbers of the sites that are there, by name."""
        revoked = self._roster.revoked()
        return {name: node for name, node in self._dispatch.online().items() if name not in revoked}

    def revoked(self) -> set[str]:
        """Return the names of the sites that take part no more."""
        return self._roster.revoked()

    def send(self, node: int, parcel: Parcel, seconds: float, most: int) -> str | None:
        """Send a message to a site."""
        return self._dispatch.send(node, parcel, seconds, most)

    def arrived(self, messages: Sequence[str]) -> Sequence[Arrived]:
        """Return what has come of messages."""
        return self._dispatch.arrived(messages)
