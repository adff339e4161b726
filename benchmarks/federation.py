"""What a round over sites costs beside training, at so many sites and bytes, next to Flower with its own strategy.

Everything is real but the training: processes, TLS on loopback, keys, signatures, ledgers, checks and the mean; a
client "trains" by adding noise to what it was sent.

python -m benchmarks.federation --sites 2 8 16 --megabytes 0.4 7 40
python -m benchmarks.federation --kills                 16 sites × 20 rounds, a fifth killed in each round
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import itertools
import multiprocessing.process
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bellwether.engine.certificate import Certificate
from bellwether.engine.flower.inbox import Inbox
from bellwether.engine.flower.link import Link
from bellwether.engine.remote import Party, RemoteEngine
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.messages import Reply, Task, TrainTask, Update
from bellwether.exchange.records import Event, RoundRecord
from bellwether.federate import Federation, Progress, federate
from bellwether.method.average import fedavg
from bellwether.method.cohort import uniform_sampler
from bellwether.method.returned import first_state
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Recipe
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
)
from bellwether.site.ledger import Ledger
from bellwether.site.resident import Holdings, Resident
from bellwether.tools.workers import begin_worker, source_of_workers
from benchmarks import report
from benchmarks.machine import describe

MODULES, RANK = 32, 8  # LoRA's two factors of so many modules: 64 tensors
FACTS = {"benchmark": "federation"}
FEDERATION = "benchmark"
DEADLINE = 600.0  # seconds
PATIENCE = 240.0  # seconds that a round of Flower's own may take
HERE = "127.0.0.1"
APP = Path(__file__).parent / "flower_app"
RESULT = "federation"


def config_of(megabytes: float) -> tuple[AdapterConfig, dict[str, tuple[int, int]]]:
    """Return the configuration of an adapter of so many megabytes in float32, and its modules' inputs and outputs."""
    width = round(megabytes * 1e6 / 4 / MODULES / RANK / 2)
    modules = tuple(f"model.layers.{number}.self_attn.q_proj" for number in range(MODULES))
    return AdapterConfig(RANK, 16, 0.0, modules), dict.fromkeys(modules, (width, width))


def recipe_of(rounds: int, quorum: float) -> Recipe:
    """Return the recipe of a federation in which every site takes part in every round, and nothing is scored."""
    words = [f"federation.rounds={rounds}", "federation.fraction=1", f"federation.quorum={quorum}"]
    return load_recipe("default", [*words, "federation.failed_rounds=20", "evaluation.every=1000000"])


class Echo:
    """An engine whose clients send back what they got, changed, after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Yield each client's reply."""
        for client, task in tasks.items():
            assert isinstance(task, TrainTask)
            time.sleep(self._seconds)
            generator = np.random.default_rng()
            tensors = {
                key: value + generator.random(value.shape, np.float32) / 1000
                for key, value in task.adapter.tensors.items()
            }
            metrics = {"loss": 1.0, "tokens": 1000, "rows": 100, "selected": 100}
            yield Reply(client, self._seconds, update=Update(client, task.round, tensors, 100, metrics))


@dataclass(frozen=True)
class Job:
    """What a site's process gets."""

    name: str
    folder: Path
    port: int
    megabytes: float
    recipe: Recipe
    seconds: float
    host: str = HERE
    network: str = ""  # the network namespace that the site is in; its coordinator's where it is empty


def be_site(job: Job, environment: Mapping[str, str]) -> None:
    """Be a site's process until the end."""
    begin_worker(environment)
    if job.network:
        enter(job.network)
    folder = job.folder / job.name
    config, shapes = config_of(job.megabytes)
    folders = {job.name: folder / job.name}
    holdings = Holdings(job.name, (job.name,), job.recipe, Echo(job.seconds), FACTS, config, shapes, folders)
    coordinator = read_signing(job.folder / SIGNING).public_key()
    with (folder / "site.log").open("a", buffering=1) as log:
        key = read_signing(folder / SIGNING)
        resident = Resident(
            holdings,
            key,
            coordinator,
            FEDERATION,
            Ledger(folder),
            lambda header, task: None,
            lambda text: print(text, file=log),
        )
        with Inbox(folder, folder / FLOWER, f"{job.host}:{job.port}", job.folder / "ca.crt") as inbox:
            resident.serve(inbox)


def enter(network: str) -> None:
    """Move this process to a network namespace."""
    with open(f"/run/netns/{network}") as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {network}")


class Sites:
    """The sites' processes, of which one that was killed is begun again."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._over = jobs, threading.Event()
        self.running: dict[str, multiprocessing.process.BaseProcess] = {}

    def __enter__(self) -> Sites:
        for job in self._jobs:
            self._start(job)
        threading.Thread(target=self._supervise, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for process in self.running.values():
            process.join(30)
            process.kill()
            process.join()

    def leave(self) -> None:
        """Let those that end stay ended."""
        self._over.set()

    def _start(self, job: Job) -> None:
        process = source_of_workers((__name__,)).Process(target=be_site, args=(job, dict(os.environ)))
        process.start()
        self.running[job.name] = process

    def _supervise(self) -> None:
        while not self._over.wait(0.2):
            for job in self._jobs:
                if not self.running[job.name].is_alive() and not self._over.is_set():
                    if self.running[job.name].exitcode != -signal.SIGKILL:
                        sys.stderr.write(f"{job.name} ended by itself; see its site.log.\n")
                        os._exit(1)
                    self._start(job)


@contextlib.contextmanager
def over_sites(
    folder: Path,
    sites: int,
    megabytes: float,
    recipe: Recipe,
    seconds: float,
    deadline: float,
    host: str = HERE,
    network: str = "",
) -> Iterator[tuple[RemoteEngine, Sites]]:
    """Yield an engine over so many sites that have said hello, and their processes."""
    names = [f"site-{number + 1}" for number in range(sites)]
    make_authority(folder, "a benchmark", 2)
    for stem in ("inner", "outer"):
        make_certificate(folder, stem, [HERE, host], 2)
    make_signing(folder / SIGNING)
    certificates = [
        Certificate(folder / f"{n}.crt", folder / f"{n}.key", folder / "ca.crt") for n in ("inner", "outer")
    ]
    with Link(folder, *certificates, host, 0) as link:
        parties = []
        for name in names:
            (folder / name).mkdir()
            make_site_keys(folder / name)
            keys = read_public(public_word(folder / name))
            link.register(name, keys.flower)
            parties.append(Party(name, keys.signing, (name,)))
        jobs = [Job(name, folder, link.port, megabytes, recipe, seconds, host, network) for name in names]
        with link.dispatch() as dispatch, Sites(jobs) as processes:
            engine = RemoteEngine(
                Unwatched(dispatch),
                parties,
                read_signing(folder / SIGNING),
                f"{FEDERATION}/run",
                FACTS,
                silent,
                deadline,
                link.expect,
            )
            engine.wait(lambda: sites, 600)
            yield engine, processes
            processes.leave()
            engine.end()


class Unwatched:
    """What delivers messages, with nobody revoked."""

    def __init__(self, dispatch: Any) -> None:
        self.online, self.send, self.arrived = dispatch.online, dispatch.send, dispatch.arrived

    def revoked(self) -> tuple[str, ...]:
        """Return nobody."""
        return ()


def silent(event: Event) -> None:
    """Tell nobody."""


def ours(sites: int, megabytes: float, rounds: int) -> dict[str, Any]:
    """Return the seconds of rounds, the bytes of one, and what memory each kind of process takes."""
    recipe = recipe_of(rounds, 1.0)
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        with over_sites(Path(place), sites, megabytes, recipe, 0.0, DEADLINE) as (engine, processes):
            ready = time.perf_counter() - begun
            done = run_rounds(engine, recipe, megabytes, sites, lambda round: None)
            memory = proportional(processes)
            moved = engine.bytes_up + engine.bytes_down
    return {
        "start": ready,
        "seconds": [sum(record.seconds.values()) for record in done.rounds],
        "cohorts": [len(record.clients) for record in done.rounds],
        "bytes": moved / rounds,
        "memory": memory,
    }


def run_rounds(engine: RemoteEngine, recipe: Recipe, megabytes: float, sites: int, begins: Any) -> Progress:
    """Run all rounds of FedAvg over an engine."""
    config, shapes = config_of(megabytes)
    generator = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for module, (inputs, outputs) in shapes.items():
        tensors[key_a(module)] = generator.standard_normal((RANK, inputs)).astype(np.float32)
        tensors[key_b(module)] = np.zeros((outputs, RANK), np.float32)
    ranks = {f"site-{number + 1}": RANK for number in range(sites)}

    def watch(event: Event) -> None:
        if type(event).__name__ == "RoundStarted":
            begins(event)

    federation = Federation(
        recipe,
        engine,
        ranks,
        (),
        uniform_sampler(recipe.federation),
        fedavg(),
        lambda round, state: ({}, {}),
        lambda progress: None,
        watch,
    )
    return federate(federation, Progress(0, first_state(fedavg(), Adapter(config, tensors))))


def proportional(processes: Sites) -> dict[str, float]:
    """Return MiB of memory by kind of process, shared pages counted in part; of sites the median."""
    residents = [process.pid or 0 for process in processes.running.values()]
    nodes = [child for pid in residents for child in children(pid)]
    memory = {"coordinator": share(os.getpid()), "site": statistics.median(map(share, residents))}
    return memory | {"SuperNode": statistics.median(map(share, nodes))}


def children(pid: int) -> list[int]:
    """Return the processes that a process began."""
    with contextlib.suppress(OSError):
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    return []


def share(pid: int) -> float:
    """Return a process's memory, in MiB, pages that it shares counted in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def plain(sites: int, megabytes: float, rounds: int, tensors: int) -> dict[str, Any]:
    """Return the seconds of rounds of Flower's own strategy, with its own processes as they come.

    Where Flower ends its run before, or ends no round for ``PATIENCE``, ``ended`` says what it wrote last of an error.
    """
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        make_authority(folder, "a benchmark", 2)
        make_certificate(folder, "outer", ["127.0.0.1"], 2)
        port = free_port()
        words = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "outer.crt", "--ssl-keyfile", "outer.key"]
        words += ["--enable-supernode-auth", "--disable-runtime-dependency-installation", "--database", "state.db"]
        stack.enter_context(process(folder, "flower-superlink", *words, "--host", "127.0.0.1", "--port", port))
        control = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}",
            False,
            (folder / "ca.crt").read_bytes(),
            [RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        for number in range(sites):
            own = folder / f"site-{number + 1}"
            own.mkdir()
            make_site_keys(own)
            key = read_public(public_word(own)).flower
            tried(lambda key=key, own=own: control.RegisterNode(RegisterNodeRequest(public_key=key, name=own.name)))
        for number in range(sites):
            own = folder / f"site-{number + 1}"
            words = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", "ca.crt"]
            words += ["--auth-supernode-private-key", str(own / FLOWER), "--host", "127.0.0.1", "--port", free_port()]
            stack.enter_context(process(folder, "flower-supernode", *words, home=own))
        content, times = build_fab_from_disk(APP), folder / "times"
        settings = {
            "sites": sites,
            "rounds": rounds,
            "megabytes": float(megabytes),
            "tensors": tensors,
            "times": str(times),
        }
        shipped = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        control.StartRun(StartRunRequest(fab=shipped, override_config=user_config_to_proto(settings)))
        ended, last = 0, time.monotonic()
        while True:
            over = tried(lambda: finished(control))
            said = [float(line) for line in times.read_text().splitlines()] if times.exists() else []
            seconds = [after - before for before, after in itertools.pairwise(said)]
            if len(said) == rounds + 1:
                return {"seconds": seconds}
            if len(said) > ended:
                ended, last = len(said), time.monotonic()
            if over or time.monotonic() > last + PATIENCE:
                return {"seconds": seconds, "ended": last_error(folder / "flower-superlink.log")}
            time.sleep(2)


def finished(control: Any) -> bool:
    """Return whether Flower has ended its one run, in whatever way."""
    from flwr.proto.control_pb2 import ListRunsRequest

    (run,) = control.ListRuns(ListRunsRequest()).run_dict.values()
    return bool(run.status.status == "finished")


def last_error(log: Path) -> str:
    """Return what Flower's server wrote of the last exception that it did not expect."""
    found = [line for line in log.read_text(errors="replace").splitlines() if "UnexpectedError" in line]
    return found[-1].rpartition("] ")[2] if found else "no error in its log"


@contextlib.contextmanager
def process(folder: Path, command: str, *words: object, home: Path | None = None) -> Iterator[None]:
    """Run one of Flower's commands, and end it with all that it began."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(home or folder)}
    quiet["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    path = Path(sys.executable).parent
    environment = {**os.environ, **quiet, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    with (folder / f"{command}.log").open("ab") as log:
        begun = subprocess.Popen(
            [str(path / command), *map(str, words)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(begun.pid, signal.SIGKILL)
        begun.wait()


def tried(ask: Any) -> Any:
    """Return what a server answers that takes a while to begin."""
    end = time.monotonic() + 120
    while True:
        try:
            return ask()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def free_port() -> int:
    """Return a port of loopback that nothing listens on now."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def kills(sites: int, rounds: int, megabytes: float) -> dict[str, Any]:
    """Return what comes of rounds in each of which a fifth of the sites is killed, and begun again, in mid-training."""
    recipe, draw, killed = recipe_of(rounds, 0.5), random.Random(0), []
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        with over_sites(Path(place), sites, megabytes, recipe, 3.0, 90.0) as (engine, processes):
            ready = time.perf_counter() - begun

            def begins(event: Any) -> None:
                victims = draw.sample(sorted(processes.running), round(sites / 5))
                killed.append(victims)

                def strike() -> None:
                    for name in victims:
                        os.kill(processes.running[name].pid or 0, signal.SIGKILL)

                timer = threading.Timer(2.0 + draw.random() * 3, strike)
                timer.daemon = True
                timer.start()

            done = run_rounds(engine, recipe, megabytes, sites, begins)
            whole = time.perf_counter() - begun - ready
            memory = proportional(processes)
    return {
        "start": ready,
        "whole": whole,
        "killed": killed,
        "memory": memory,
        "rounds": [summary(record) for record in done.rounds],
    }


def summary(record: RoundRecord) -> dict[str, Any]:
    """Return who took part in a round, who was left out and why, and how long it took."""
    return {
        "cohort": len(record.cohort),
        "took part": len(record.clients),
        "failure": record.failure,
        "left out": dict(record.left_out),
        "seconds": sum(record.seconds.values()),
    }


def main() -> None:
    """Measure, and write or print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federation", description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=(2, 8, 16))
    parser.add_argument("--megabytes", type=float, nargs="+", default=(0.4, 7, 40))
    parser.add_argument("--rounds", type=int, help="4, of which the first is not counted; 20 with --kills")
    parser.add_argument("--plain", choices=("none", "flat", "tensors"), nargs="+", default=("flat",))
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    given = parser.parse_args()
    if given.kills:
        found = kills(max(given.sites), given.rounds or 20, min(given.megabytes))
        report.write(given.out, f"{RESULT}-kills", describe(False) | found)
        return
    points, rounds = [], given.rounds or 4
    for sites in given.sites:
        for megabytes in given.megabytes:
            point: dict[str, Any] = {"sites": sites, "megabytes": megabytes}
            point["ours"] = ours(sites, megabytes, rounds)
            for name, tensors in (("flat", 1), ("tensors", 2 * MODULES)):
                if name in given.plain:
                    point[name] = plain(sites, megabytes, rounds, tensors)
            sys.stderr.write(f"{point}\n")
            points.append(point)
            report.write(given.out, RESULT, describe(False) | {"rounds": rounds, "points": points})


if __name__ == "__main__":
    main()
