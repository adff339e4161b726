"""The engine of several processes: a cohort is split among workers, each a local engine over its own copy of the base.

What a client trains does not depend on the worker that trains it, where clients train one by one. Rows are sent once,
at the start; then only tasks and replies travel, as pickles over pipes to processes that this one started.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bellwether.data.rows import TokenRow
from bellwether.engine.local import LocalEngine
from bellwether.engine.resources import rows_to_train
from bellwether.errors import BellwetherError, ModelError, RoundFailed, first_line
from bellwether.exchange.adapter import AdapterConfig
from bellwether.exchange.messages import EvaluateTask, Reply, Task, TrainTask
from bellwether.method.method import Method
from bellwether.method.named import make_method
from bellwether.model.base import Base, load_base, weights_fingerprint
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.recipe.method import MethodSection
from bellwether.recipe.privacy import Privacy
from bellwether.tools.workers import LANGUAGE_MODELS, begin_worker, interrupts_held, source_of_workers

# What workers import once for all.
MODULES = (__name__, *LANGUAGE_MODELS)

Rows = Mapping[str, Sequence[TokenRow]]


@dataclass(frozen=True)
class Work:
    """What a process gets at its start that serves clients.

    Args:
        config: the adapter's configuration.
        slots: clients that a worker trains together.
        rows: training rows by client.
        held_out: rows that clients hold out of their own, by client; may be empty.
        method: the recipe's section of the method, of which every worker makes its own.
        stop: token ids and texts that end an answer beside the model's own.
        tokens: tokens that run through a base at once where the layers have several slots.
        folders: each client's own folder, for what it remembers of its rows and keeps for the method.
        public: rows of public text that the space of a selection is fitted on.
        secret: what noise on centroids and gradients is drawn from, where clients are a site's; None draws it from a
            task's seed, as everywhere where nothing is protected from the server.
        privacy: the recipe's section of differential privacy, of which every worker makes its own method.
    """

    config: AdapterConfig
    slots: int
    rows: Rows
    held_out: Rows
    method: MethodSection
    stop: Collection[int | str] = ()
    tokens: int | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    public: Sequence[TokenRow] = ()
    secret: bytes | None = field(default=None, repr=False)
    privacy: Privacy = field(default_factory=Privacy)


def local_engine(base: Base, layers: LoraLayers, work: Work, method: Method) -> LocalEngine:
    """Return the engine of one process.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it.
        work: rows, folders, and how clients are served.
        method: that of ``work``.
    """
    rows = (work.rows, work.held_out)
    return LocalEngine(base, layers, *rows, method, work.stop, work.tokens, work.folders, work.public, work.secret)


class ProcessEngine:
    """Delivers tasks to simulated clients that several processes train; leave its context to end these.

    Args:
        models: for each worker how it loads the base, see ``worker_models``.
        work: what all of them get.
        fingerprint: the base's hash, which each worker's copy must have.
    """

    def __init__(self, models: Sequence[recipe.Model], work: Work, fingerprint: str) -> None:
        self._work, self._fingerprint = work, fingerprint
        self._workers: list[_Worker] = []
        try:
            for number in range(len(models)):
                self._workers.append(_Worker(f"{number + 1} of {len(models)}"))
            # A worker reads this, and loads the base, while this process goes on.
            for worker, model in zip(self._workers, models, strict=True):
                worker.send((model, work))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ProcessEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Give every client its task; must be read to its end.

        Args:
            tasks: what each client is asked, all of one kind.
            deadline: has no effect, since clients wait for each other here: ``UnevenClients`` has their clock.

        Yields:
            One reply per client, in the order of the tasks.

        Raises:
            RoundFailed: a worker ended.
            BellwetherError: a worker could not begin, or what it raised.
        """
        for worker in self._workers:
            worker.wait_until_ready(self._fingerprint)
        costs = {client: _cost(self._rows(task)[client], task) for client, task in tasks.items()}
        shares = split(costs, len(self._workers))
        busy = {worker: len(share) for worker, share in zip(self._workers, shares, strict=True) if share}
        for worker, share in zip(self._workers, shares, strict=True):
            if share:
                # Only what its own clients are asked; in their order.
                worker.send({client: tasks[client] for client in share})
        arrived: dict[str, Reply] = {}
        waiting = list(tasks)[::-1]
        for reply in _replies(busy):
            arrived[reply.client] = reply
            while waiting and waiting[-1] in arrived:
                yield arrived.pop(waiting.pop())

    def _rows(self, task: Task) -> Rows:
        """Return the rows that a task is about, by client."""
        return self._work.held_out if isinstance(task, EvaluateTask) else self._work.rows

    def fingerprints(self) -> list[str]:
        """Return the hash that each worker's copy of the base has now."""
        for worker in self._workers:
            worker.wait_until_ready(self._fingerprint)
            worker.send(None)
        return [str(worker.receive()) for worker in self._workers]

    def close(self) -> None:
        """End all workers; they hold nothing that is worth waiting for."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(10)  # seconds
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers.clear()


def expect_workers(processes: int) -> None:
    """Let what several workers come from get ready, which takes seconds, while this process goes on."""
    if processes > 1:
        source_of_workers(MODULES)


def worker_models(settings: recipe.Model, device: torch.device, processes: int) -> list[recipe.Model]:
    """Return how each worker loads the base: on CUDA devices in turn, with its share of the threads.

    Args:
        settings: how the recipe loads it.
        device: where this process has it.
        processes: how many workers there are.
    """
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    devices = [f"cuda:{number % count}" if count else str(device) for number in range(processes)]
    threads = max(1, torch.get_num_threads() // processes)
    return [settings.model_copy(update={"device": name, "threads": threads}) for name in devices]


def split(costs: Mapping[str, float], parts: int) -> list[list[str]]:
    """Split clients into shares of like cost and of as many clients, but for one.

    The most expensive client first, each goes to the share that costs least so far and is not full. The shares depend
    on nothing but names' order and costs, so that clients which train together do so in a resumed run, too.

    Args:
        costs: by client, in any unit.
        parts: how many shares; some are empty where there are fewer clients.
    """
    most = -(-len(costs) // parts)
    shares: list[list[str]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for client in sorted(costs, key=lambda client: -costs[client]):
        number = min((number for number in range(parts) if len(shares[number]) < most), key=lambda n: sums[n])
        shares[number].append(client)
        sums[number] += costs[client]
    return shares


def _cost(rows: Sequence[TokenRow], task: Task) -> float:
    """Return about how many tokens a client will go through."""
    tokens = float(sum(len(answer) for row in rows for answer in row.answers))
    return tokens * rows_to_train(len(rows), task) / len(rows) if isinstance(task, TrainTask) else tokens


def _replies(busy: dict[_Worker, int]) -> Iterator[Reply]:
    """Yield replies as they come, from each worker as many as it owes."""
    while busy:
        ready = wait([worker.connection for worker in busy])
        for worker in [worker for worker in busy if worker.connection in ready]:
            yield worker.receive()
            busy[worker] -= 1
            if not busy[worker]:
                del busy[worker]


class _Worker:
    """A worker process as its parent sees it.

    Args:
        name: which of how many it is.
    """

    def __init__(self, name: str) -> None:
        context = source_of_workers(MODULES)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=True)
        self._name, self._ready = name, False
        with interrupts_held():
            self.process.start()
        theirs.close()  # so that the worker holds its only copy, and its end ends the pipe

    def wait_until_ready(self, fingerprint: str) -> None:
        """Wait, the first time, until the worker has loaded the base, and check that it is the same one."""
        if not self._ready and self.receive() != fingerprint:
            raise ModelError(
                f"Worker process {self._name} loaded another base model than this process; its files were changed "
                "meanwhile: begin a new run."
            )
        self._ready = True

    def send(self, message: Any) -> None:
        """Send a message, or raise what has become of the worker."""
        try:
            self.connection.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> Any:
        """Return the next answer, or raise the worker's error, or what has become of it."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, BellwetherError):
            raise answer
        return answer

    def _ended(self) -> BellwetherError:
        """Return the error for a worker that is no more."""
        self.process.join(10)  # seconds; its end of the pipe is closed already
        code = self.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if not self._ready:
            return BellwetherError(
                f"Worker process {self._name} {how} before it was ready: each needs memory for a base of its own, see "
                "engine.processes; and a script that calls bellwether.run needs if __name__ == '__main__' around it."
            )
        return RoundFailed(
            f"Worker process {self._name} {how}, perhaps for lack of memory; finished rounds are kept: go on with "
            "bellwether run --resume, or begin anew with a smaller engine.processes."
        )


def _serve(parent: Connection, environment: Mapping[str, str]) -> None:
    """Be a worker: load the base, then do tasks until the parent ends."""
    begin_worker(environment)
    try:
        model, work = parent.recv()
        base = load_base(model)
        layers = LoraLayers(base.model, work.config, work.slots)
        engine = local_engine(base, layers, work, make_method(work.method, work.privacy))
        parent.send(base.fingerprint)
        while True:
            asked = parent.recv()
            if asked is None:
                parent.send(weights_fingerprint(base.model))
                continue
            for reply in engine.ask(asked):
                parent.send(reply)
    except BellwetherError as error:
        parent.send(error)
    except (EOFError, OSError):  # the parent is gone
        return
    except Exception as error:  # whatever it is, the parent must hear of it, in one sentence
        parent.send(BellwetherError(f"A worker process failed: {type(error).__name__}: {first_line(error)}"))
