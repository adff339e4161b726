"""Local training: what clients do with what they are sent and their own rows in one round.

The base stays frozen; A and B of the LoRA layers are trained in passes over a client's rows (``passes``), whose steps
are drawn before (``plans``). The method says how many passes a client goes through, what corrects its gradients, and
what it sends and keeps in the end.

Where single rows are hidden, clients are trained one by one, each row of a batch in a slot of its own (``private``).
Clients whose adapters are of unlike rank or scaling, or that train unlike parts of them, are never trained together.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bellwether.client.objective import make_objective
from bellwether.client.passes import Passed, go_through, mean_gradient, metrics
from bellwether.client.plans import Client, plan_passes, tokens_of
from bellwether.client.private import noised_gradient
from bellwether.client.sending import as_it_travels
from bellwether.data.rows import TokenRow
from bellwether.errors import NotFinite, RoundFailed, UpdateRejected, first_line
from bellwether.exchange.adapter import Arrays
from bellwether.exchange.messages import Reply, TrainTask, Update
from bellwether.method.method import Finished, Method, Trained, send_trained
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers
from bellwether.store.client_state import METHOD, keep_settled, kept_rounds, recall_state
from bellwether.tools.functions import naming

# From a client, its rows and what it is asked to the numbers of the rows that it trains on.
Choose = Callable[[str, Sequence[TokenRow], TrainTask], Sequence[int]]


def train_cohort(
    base: Base,
    layers: LoraLayers,
    cohort: Mapping[str, Sequence[TokenRow]],
    tasks: Mapping[str, TrainTask],
    method: Method,
    tokens: int | None = None,
    folders: Mapping[str, Path] = MappingProxyType({}),
    secret: bytes | None = None,
) -> Iterator[Reply]:
    """Train every client of a cohort on its own rows, as its task and the method say.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it, with as many slots as clients shall be trained together.
        cohort: token rows by client name.
        tasks: what each of them is asked; the recipe's settings are the same in all.
        method: passes, corrections, and what is sent and kept.
        tokens: how many tokens, padding included, run through the base at once where clients are trained together.
        folders: each client's own folder, for what the method keeps there.
        secret: what is drawn from where single rows are hidden; None draws from the seeds of the tasks.

    Yields:
        One reply per client, with its update and its share of the wall seconds; clients that can be trained together
        after each other.

    Raises:
        RecipeError: the task names a loss that is not there, or asks to hide rows and not by how much noise.
        RoundFailed: a person's own loss or method failed.
        CheckpointError: what a client kept was damaged, or cannot be written.
    """
    clients = [
        Client(name, rows, tasks[name], recalled(folders, name, tasks[name].settled), secret)
        for name, rows in cohort.items()
    ]
    # Slots share the base with what is folded into it, the layers' configuration, and what of an adapter is trained.
    alike: dict[Any, list[Client]] = {}
    for client in clients:
        payload = client.task.payload
        folded = payload.folded.fingerprint() if payload.folded is not None else None
        alike.setdefault((payload.adapter.config, payload.trained, folded), []).append(client)
    for group in alike.values():
        layers.fit(group[0].task.adapter.config)
        with layers.folded(group[0].task.payload.folded):
            together = 1 if group[0].task.privacy.hides_rows else layers.slots
            for start in range(0, len(group), together):
                yield from _train_together(base, layers, group[start : start + together], method, tokens, folders)


def train_chosen(
    choose: Choose,
    base: Base,
    layers: LoraLayers,
    cohort: Mapping[str, Sequence[TokenRow]],
    tasks: Mapping[str, TrainTask],
    method: Method,
    tokens: int | None = None,
    folders: Mapping[str, Path] = MappingProxyType({}),
    secret: bytes | None = None,
) -> Iterator[Reply]:
    """Train every client of a cohort on the rows that it chooses.

    Args:
        choose: chooses them; raises NotFinite where it cannot.
        base: the frozen base model.
        layers: LoRA layers over it.
        cohort: all token rows by client name.
        tasks: what each client is asked.
        method: see ``train_cohort``.
        tokens: see ``train_cohort``.
        folders: see ``train_cohort``.
        secret: see ``train_cohort``.

    Yields:
        One reply per client, those that could not choose first, the others in the order of the cohort; seconds are
        those of choosing and of training.
    """
    selected: dict[str, list[TokenRow]] = {}
    seconds: dict[str, float] = {}
    for client, rows in cohort.items():
        start = time.perf_counter()
        try:
            selected[client] = [rows[number] for number in choose(client, rows, tasks[client])]
        except NotFinite as error:
            yield Reply(client, time.perf_counter() - start, failure=first_line(error))
        seconds[client] = time.perf_counter() - start
    for reply in train_cohort(base, layers, selected, tasks, method, tokens, folders, secret):
        update, settings = reply.update, tasks[reply.client].selection
        if update is not None and settings.method != "full":
            weight = len(cohort[reply.client]) if settings.weigh_by == "all" else update.rows
            update = replace(update, rows=weight, metrics={**update.metrics, "selected": float(update.rows)})
        yield replace(reply, seconds=seconds[reply.client] + reply.seconds, update=update)


def recalled(folders: Mapping[str, Path], client: str, settled: int) -> Arrays:
    """Return what a client keeps of its last round that counted; nothing before, and where it keeps nothing of it.

    Args:
        folders: each client's own folder.
        client: its name.
        settled: that round; 0 where there was none.

    Raises:
        CheckpointError: what it kept is damaged.
    """
    found = recall_state(folders[client], METHOD, settled) if settled and client in folders else None
    return found if found is not None else {}


def _train_together(
    base: Base,
    layers: LoraLayers,
    clients: Sequence[Client],
    method: Method,
    tokens: int | None,
    folders: Mapping[str, Path],
) -> Iterator[Reply]:
    """Train some clients at the same time; yield their replies in their order."""
    start = time.perf_counter()
    objective, passes, first = make_objective(clients[0].task.training), len(method.passes), clients[0]
    hidden = first.task.privacy.hides_rows
    with layers.room(min(first.task.training.batch_size, len(first.rows))) if hidden else contextlib.nullcontext():
        planned = [plan_passes(base, layers, client, passes, objective) for client in clients]
        passed = []
        for number, part in enumerate(method.passes):
            gradient = mean_gradient(base, layers, objective, tokens)
            if hidden:
                gradient = noised_gradient(base, layers, objective, first, number)
            plans = [plans[number] for plans in planned]
            passed.append(go_through(layers, plans, part, (number, passes), objective, gradient))
    seconds = time.perf_counter() - start
    work = {client.name: sum(tokens_of(passes[client.name].plan) for passes in passed) for client in clients}
    for client in clients:
        own = [passes[client.name] for passes in passed]
        share = seconds * work[client.name] / max(1, sum(work.values()))
        reply = Reply(client.name, share, losses=own[0].losses)
        try:
            sent = as_it_travels(_finished(client, own, method, folders), client.task, folders)
            reply = replace(reply, update=sent)
        except UpdateRejected as reason:
            reply = replace(reply, failure=str(reason))
        yield reply


def _finished(client: Client, passed: Sequence[Passed], method: Method, folders: Mapping[str, Path]) -> Update:
    """Return what a client sends after its passes, once it has kept what it keeps."""
    task, rates = client.task, passed[0].plan.rates
    trained = Trained(task.payload, client.own, [one.tensors for one in passed], rates, task.draws)
    what = "What the method lets a client send"
    precision = next(iter(task.adapter.tensors.values())).dtype
    with naming(what, RoundFailed):
        finished = method.finish(trained)
        if not isinstance(finished, Finished):
            raise RoundFailed(f"{what} is a {type(finished).__name__}; return a Finished.")
        arrays = {name: np.asarray(value).astype(precision) for name, value in finished.arrays.items()}
    if finished.own is not None:
        keep_settled(folders[client.name], METHOD, task.round, finished.own, task.settled, task.certain)
    elif client.name in folders and (method.finish is not send_trained or kept_rounds(folders[client.name], METHOD)):
        keep_settled(folders[client.name], METHOD, task.round, {}, task.settled, task.certain)
    return Update(client.name, task.round, finished.tensors, len(client.rows), metrics(passed), arrays)
