"""A rehearsal: coordinator and sites as real processes of one machine, over TLS on loopback, from one's own recipe.

The recipe's clients are dealt out as in a simulation, and the sites take them in turn; so a rehearsal of any recipe
ends with the adapter that its simulation ends with, byte for byte, where clients are trained one by one. (In a
federation of several machines every site is one client.) A site's process gets the rows of its own clients alone.

RUN/federation/             keys and certificates of the rehearsal, Flower's database and log
RUN/federation/site-1/      a site's keys, its ledger, its log
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bellwether.engine.certificate import Certificate
from bellwether.engine.flower.dispatch import Dispatch
from bellwether.engine.flower.inbox import Inbox
from bellwether.engine.flower.link import Link
from bellwether.engine.flower.records import Arrived
from bellwether.engine.processes import Work
from bellwether.engine.remote import Party, RemoteEngine
from bellwether.errors import BellwetherError, FederationError, RecipeError, first_line
from bellwether.exchange.records import Note, Watcher
from bellwether.exchange.seal import Parcel
from bellwether.federate import Engine
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers
from bellwether.recipe.recipe import Model, Recipe
from bellwether.runner.prepare import prepare
from bellwether.runner.run import Result, run
from bellwether.runner.wiring import Deployment, Setting, check_copies, work_of
from bellwether.site.facts import facts_of
from bellwether.site.keys import (
    FLOWER,
    SIGNING,
    make_authority,
    make_certificate,
    make_signing,
    make_site_keys,
    public_word,
    read_public,
    read_signing,
    write_private,
)
from bellwether.site.ledger import Ledger
from bellwether.site.resident import Resident, holdings_of
from bellwether.tools.atomic import TEMPORARY, remove
from bellwether.tools.workers import LANGUAGE_MODELS, begin_worker, interrupts_held, source_of_workers

FOLDER = "federation"
LOG = "site.log"
MODULES = (__name__, *LANGUAGE_MODELS)

DAYS = 30  # that certificates of a rehearsal are valid
START = 600.0  # seconds in which all sites must be there
STARTS = 3  # times that a site's process is begun without having answered anything in between


def rehearse(
    recipe: Recipe | None,
    sites: int,
    *,
    deadline: float | None = None,
    resume: Path | None = None,
    watch: Watcher | None = None,
) -> Result:
    """Run a recipe, or go on with one, with sites that are processes of their own.

    Args:
        recipe: what to run; with ``resume`` as for ``runner.run.run``.
        sites: how many sites.
        deadline: seconds that a site has for a task; None waits until Flower finds it gone.
        resume: the run folder of a rehearsal to go on with.
        watch: is told what happens; None is silent.

    Raises:
        BellwetherError: see ``bellwether.errors``.
    """
    if recipe is not None and recipe.federation.availability is not None:
        raise RecipeError(
            "federation.availability simulates clients that are away or slow, and the sites of a rehearsal are real; "
            "set federation.availability=null."
        )
    source_of_workers(MODULES)  # which gets ready while the rows are read
    deployment = Deployment(prepare, lambda setting: _over_sites(setting, sites, deadline))
    return run(recipe, resume=resume, watch=watch, deployment=deployment)


@contextlib.contextmanager
def _over_sites(setting: Setting, count: int, deadline: float | None) -> Iterator[Engine]:
    """Yield an engine over sites that are processes of this machine."""
    clients = list(setting.prepared.clients)
    if not 1 <= count <= len(clients):
        raise RecipeError(f"--sites is {count}, but the recipe has {len(clients)} clients; give 1 to {len(clients)}.")
    folder = _folder_of_sites(setting.folder / FOLDER, count)
    names = [f"site-{number + 1}" for number in range(count)]
    shares = {name: tuple(clients[number::count]) for number, name in enumerate(names)}
    inner, outer = (
        Certificate(folder / f"{n}.crt", folder / f"{n}.key", folder / "ca.crt") for n in ("inner", "outer")
    )
    federation = (folder / "identifier").read_text()
    with Link(folder, inner, outer, "127.0.0.1", 0, alone=True) as link:
        parties = []
        for name in names:
            keys = read_public(public_word(folder / name))
            link.register(name, keys.flower)
            parties.append(Party(name, keys.signing, shares[name]))
        peers = {client: one.key.public_bytes_raw() for one in parties for client in one.clients}
        jobs = [_job(setting, folder, name, shares[name], link.port, peers) for name in names]
        with link.dispatch() as dispatch, _Processes(jobs, setting.watch) as processes:
            engine = RemoteEngine(
                _Watched(dispatch, processes),
                parties,
                read_signing(folder / SIGNING),
                f"{federation}/rehearsal",
                facts_of(setting.prepared.recipe, setting.base, setting.prepared.public),
                setting.watch,
                deadline,
                link.expect,
                absent=START,  # a site's process that has ended is begun again, or the rehearsal ends
            )
            engine.wait(lambda: count, START)
            yield engine
            processes.leave()
            engine.end(seconds=60.0, absent=0.0)  # whoever has ended is not begun again
    check_copies(setting.base, [])


def _folder_of_sites(folder: Path, count: int) -> Path:
    """Return the folder of keys and certificates, which is made as a whole where it is missing."""
    if folder.is_dir():
        found = len(list(folder.glob("site-*")))
        if found != count:
            raise FederationError(f"{folder} belongs to {found} sites, and --sites is {count}; give --sites {found}.")
        return folder
    made = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    remove(made)
    made.mkdir(mode=0o700)
    make_authority(made, "bellwether rehearsal", DAYS)
    for stem in ("inner", "outer"):
        make_certificate(made, stem, ["127.0.0.1", "localhost"], DAYS)
    make_signing(made / SIGNING)
    write_private(made / "identifier", secrets.token_hex(16).encode())
    for number in range(count):
        (made / f"site-{number + 1}").mkdir(mode=0o700)
        make_site_keys(made / f"site-{number + 1}")
    os.rename(made, folder)
    return folder


@dataclass(frozen=True)
class _Job:
    """All that a site's process gets."""

    name: str
    folder: Path
    authority: Path
    coordinator: bytes
    federation: str
    address: str
    recipe: Recipe
    model: Model
    work: Work
    peers: Mapping[str, bytes]


def _job(
    setting: Setting, folder: Path, name: str, clients: Sequence[str], port: int, peers: Mapping[str, bytes]
) -> _Job:
    recipe = setting.prepared.recipe
    # As many threads as a simulation would have here, since their number decides the last bits.
    model = recipe.model.model_copy(update={"threads": torch.get_num_threads(), "device": str(setting.base.device)})
    return _Job(
        name,
        folder / name,
        folder / "ca.crt",
        read_signing(folder / SIGNING).public_key().public_bytes_raw(),
        (folder / "identifier").read_text(),
        f"127.0.0.1:{port}",
        recipe,
        model,
        work_of(setting, clients),
        peers,
    )


class _Processes:
    """The sites' processes, of which one that ends is begun again.

    Args:
        jobs: what each gets.
        watch: is told of those that ended, from the thread that reads ``tell``.
    """

    def __init__(self, jobs: Sequence[_Job], watch: Watcher) -> None:
        self._jobs, self._watch = {job.name: job for job in jobs}, watch
        self._starts = dict.fromkeys(self._jobs, 0)
        self._said: list[str] = []
        self._over = threading.Event()
        self.given_up = ""
        self._running: dict[str, multiprocessing.process.BaseProcess] = {}

    def __enter__(self) -> _Processes:
        for name in self._jobs:
            self._start(name)
        threading.Thread(target=self._supervise, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()
        for process in self._running.values():
            process.join(0 if any(error) else 30)  # seconds
            process.terminate()
            process.join(10)  # seconds
            process.kill()
            process.join()

    def leave(self) -> None:
        """Let those that end stay ended."""
        self._over.set()

    def answered(self) -> None:
        """Know that the sites answer."""
        self._starts = dict.fromkeys(self._starts, 0)

    def tell(self) -> None:
        """Tell of what has happened since this was called last.

        Raises:
            FederationError: a site ends whenever it is begun.
        """
        while self._said:
            self._watch(Note(self._said.pop(0), warning=True))
        if self.given_up:
            raise FederationError(self.given_up)

    def _start(self, name: str) -> None:
        self._starts[name] += 1
        context = source_of_workers(MODULES)
        process = context.Process(target=_be_site, args=(self._jobs[name], dict(os.environ)))
        with interrupts_held():
            process.start()
        self._running[name] = process

    def _supervise(self) -> None:
        while not self._over.wait(0.2):  # seconds
            for name, process in list(self._running.items()):
                if process.is_alive() or self._over.is_set() or self.given_up:
                    continue
                code = process.exitcode or 0
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                if self._starts[name] >= STARTS:
                    log = self._jobs[name].folder / LOG
                    self.given_up = f"The process of {name} {how} whenever it was begun: {_last_line(log)}"
                else:
                    self._said.append(f"The process of {name} {how}; it is begun again.")
                    self._start(name)


class _Watched:
    """What delivers messages, and looks after the sites' processes meanwhile."""

    def __init__(self, dispatch: Dispatch, processes: _Processes) -> None:
        self._dispatch, self._processes = dispatch, processes

    def online(self) -> Mapping[str, int]:
        """Return the numbers of the sites that are there, by name."""
        self._processes.tell()
        return self._dispatch.online()

    def revoked(self) -> tuple[str, ...]:
        """Return the names of the sites that take part no more: none."""
        return ()

    def send(self, node: int, parcel: Parcel, seconds: float, most: int) -> str | None:
        """Send a message to a site."""
        return self._dispatch.send(node, parcel, seconds, most)

    def arrived(self, messages: Sequence[str]) -> Sequence[Arrived]:
        """Return what has come of messages."""
        self._processes.tell()
        arrived = self._dispatch.arrived(messages)
        if any(one.parcel is not None for one in arrived):
            self._processes.answered()
        return arrived


def _be_site(job: _Job, environment: Mapping[str, str]) -> None:
    """Be a site's process, until the coordinator says that the run has ended."""
    begin_worker(environment)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    with (job.folder / LOG).open("a", encoding="utf-8", buffering=1) as log:

        def tell(text: str) -> None:
            log.write(f"{text}\n")

        tell(f"Process {os.getpid()} begins.")
        try:
            base = load_base(job.model)
            layers = LoraLayers(base.model, job.work.config)
            holdings = holdings_of(job.name, job.recipe, base, layers, job.work)
            resident = Resident(
                holdings,
                read_signing(job.folder / SIGNING),
                Ed25519PublicKey.from_public_bytes(job.coordinator),
                job.federation,
                Ledger(job.folder),
                lambda header, task: None,  # it is one's own machine
                tell,
                peers={name: Ed25519PublicKey.from_public_bytes(key) for name, key in job.peers.items()},
            )
            with Inbox(job.folder, job.folder / FLOWER, job.address, job.authority) as inbox:
                resident.serve(inbox)
        except BellwetherError as error:
            tell(first_line(error))
            raise SystemExit(1) from None


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return lines[-1] if lines else f"see {log.parent}."
