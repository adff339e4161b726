"""Local training: what clients do with what they are sent and their own rows in one round.

The base stays frozen; A and B of the LoRA layers are trained by AdamW, whose state begins afresh in every round, as
in FedIT (Zhang et al. 2023, arXiv 2305.05644), or by plain SGD. The loss of a client's step is a mean over all its
trained tokens, over all its accumulated batches: of the cross-entropy, or of another loss that the recipe names
(``objective``), such as that of pairs of answers, which compares with the base as it is without any adapter. The
method says how many passes a client goes through, what corrects its gradients, and what it sends and keeps in the end.

Several clients are trained together: their adapters stand in slots of the same LoRA layers, the rows of all their
steps run through the one base in pieces of a given number of tokens, and each keeps its own loss, gradient,
clipping, optimizer state and learning rate. A client that has taken all its steps rests while others go on. One by
one, a piece is one of the client's own batches, so that a client trains alike wherever it is. Clients whose adapters
are of unlike rank or scaling, or that train unlike parts of them, are never trained together.

Shape legend: K clients trained together, S selected positions, P parameters of an adapter, X losses, F figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from bellwether.client.batches import collate, local_steps
from bellwether.client.objective import Objective, Reference, make_objective
from bellwether.client.optimizer import make_optimizer
from bellwether.client.score import answer_losses
from bellwether.client.sending import as_it_travels
from bellwether.data.rows import TokenRow
from bellwether.errors import NotFinite, RoundFailed, UpdateRejected, first_line
from bellwether.exchange.adapter import Arrays, Tensors
from bellwether.exchange.messages import Reply, TrainTask, Update
from bellwether.method.method import Finished, Method, Pass, Step, Trained, send_trained
from bellwether.method.schedule import learning_rate
from bellwether.model.base import Base
from bellwether.model.dropout import Dropout
from bellwether.model.forward import token_losses
from bellwether.model.lora import LoraLayers
from bellwether.store.client_state import METHOD, keep_settled, kept_rounds, recall_state
from bellwether.tools.functions import naming
from bellwether.tools.progress import REFERENCE, TRAINING, advance

# From a client, its rows and what it is asked to the numbers of the rows that it trains on.
Choose = Callable[[str, Sequence[TokenRow], TrainTask], Sequence[int]]


@dataclass(frozen=True)
class _Client:
    """One client of those that are trained together: its name, rows, task, and the arrays that it keeps."""

    name: str
    rows: Sequence[TokenRow]
    task: TrainTask
    own: Arrays


@dataclass(frozen=True)
class _Plan:
    """All that a client will do in a pass, drawn before it begins.

    Args:
        client: whose it is.
        steps: per optimizer step its batches, per batch row numbers.
        seeds: a number for each of these rows, from which its dropout derives; both answers of a row are dropped alike.
        rates: the learning rate of each step.
        references: by row number what the loss compares with, where it does.
    """

    client: _Client
    steps: Sequence[Sequence[Sequence[int]]]
    seeds: Sequence[Sequence[Sequence[int]]]
    rates: Sequence[float]
    references: Mapping[int, Reference] = field(default_factory=dict)

    @property
    def rows(self) -> Sequence[TokenRow]:
        """The client's rows."""
        return self.client.rows


@dataclass(frozen=True)
class _Passed:
    """What a client has after a pass: its tensors, the mean loss of each step, and figures of all it went through."""

    plan: _Plan
    tensors: Tensors
    losses: Sequence[float]
    figures: Mapping[str, float]


@dataclass(frozen=True)
class _Used:
    """One row of one client's step, as it stands in a piece."""

    slot: int
    row: TokenRow
    seed: int
    reference: Reference


def train_cohort(
    base: Base,
    layers: LoraLayers,
    cohort: Mapping[str, Sequence[TokenRow]],
    tasks: Mapping[str, TrainTask],
    method: Method,
    tokens: int | None = None,
    folders: Mapping[str, Path] = MappingProxyType({}),
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

    Yields:
        One reply per client, with its update and its share of the wall seconds; clients that can be trained together
        after each other.

    Raises:
        RecipeError: the task names a loss that is not there.
        RoundFailed: a person's own loss or method failed.
        CheckpointError: what a client kept was damaged, or cannot be written.
    """
    clients = [
        _Client(name, rows, tasks[name], recalled(folders, name, tasks[name].settled)) for name, rows in cohort.items()
    ]
    # Slots share the base with what is folded into it, the layers' configuration, and what of an adapter is trained.
    alike: dict[Any, list[_Client]] = {}
    for client in clients:
        payload = client.task.payload
        folded = payload.folded.fingerprint() if payload.folded is not None else None
        alike.setdefault((payload.adapter.config, payload.trained, folded), []).append(client)
    for group in alike.values():
        layers.fit(group[0].task.adapter.config)
        with layers.folded(group[0].task.payload.folded):
            for start in range(0, len(group), layers.slots):
                yield from _train_together(base, layers, group[start : start + layers.slots], method, tokens, folders)


def train_chosen(
    choose: Choose,
    base: Base,
    layers: LoraLayers,
    cohort: Mapping[str, Sequence[TokenRow]],
    tasks: Mapping[str, TrainTask],
    method: Method,
    tokens: int | None = None,
    folders: Mapping[str, Path] = MappingProxyType({}),
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
    for reply in train_cohort(base, layers, selected, tasks, method, tokens, folders):
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
    clients: Sequence[_Client],
    method: Method,
    tokens: int | None,
    folders: Mapping[str, Path],
) -> Iterator[Reply]:
    """Train some clients at the same time; yield their replies in their order."""
    start = time.perf_counter()
    objective = make_objective(clients[0].task.training)
    passes = len(method.passes)
    planned = [_plans(base, layers, client, passes, objective) for client in clients]
    passed = [
        _go_through(base, layers, [plans[number] for plans in planned], part, (number, passes), objective, tokens)
        for number, part in enumerate(method.passes)
    ]
    seconds = time.perf_counter() - start
    work = {client.name: sum(_work(passes[client.name].plan) for passes in passed) for client in clients}
    for client in clients:
        own = [passes[client.name] for passes in passed]
        share = seconds * work[client.name] / sum(work.values())
        reply = Reply(client.name, share, losses=own[0].losses)
        try:
            sent = as_it_travels(_finished(client, own, method, folders), client.task, folders)
            reply = replace(reply, update=sent)
        except UpdateRejected as reason:
            reply = replace(reply, failure=str(reason))
        yield reply


def _finished(client: _Client, passed: Sequence[_Passed], method: Method, folders: Mapping[str, Path]) -> Update:
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
    return Update(client.name, task.round, finished.tensors, len(client.rows), _metrics(passed), arrays)


def _plans(base: Base, layers: LoraLayers, client: _Client, passes: int, objective: Objective) -> list[_Plan]:
    """Return all that a client will do, pass by pass."""
    plans = [_planned(client, part) for part in range(passes)]
    return _with_references(base, layers, plans) if objective.referenced else plans


def _planned(client: _Client, part: int) -> _Plan:
    """Draw a client's steps and the numbers that its dropout derives from."""
    task = client.task
    steps = local_steps([row.longest for row in client.rows], task.training, task.draws.numpy("batch order", part))
    draws = task.draws.numpy("dropout", part)
    seeds = [[draws.integers(-(2**63), 2**63, len(batch)).tolist() for batch in step] for step in steps]
    rates = [learning_rate(task.training, task.round, task.rounds, n, len(steps)) for n in range(len(steps))]
    return _Plan(client, steps, seeds, rates)


def _with_references(base: Base, layers: LoraLayers, plans: Sequence[_Plan]) -> list[_Plan]:
    """Return the plans of a client's passes, with what the untuned base makes of all rows that they use.

    It is computed once for all passes and epochs of a task, without dropout and without gradients, in batches of as
    many rows as are trained at once, for each client by itself, so that it does not depend on who trains beside it.
    """
    client = plans[0].client
    used = sorted({number for plan in plans for step in plan.steps for batch in step for number in batch})
    rows = [client.rows[number] for number in used]
    with layers.disabled():
        losses = answer_losses(base, layers, rows, client.task.training.batch_size, REFERENCE)
    references = {number: [-loss for loss in losses_of_row] for number, losses_of_row in zip(used, losses, strict=True)}
    return [replace(plan, references=references) for plan in plans]


def _go_through(
    base: Base,
    layers: LoraLayers,
    plans: Sequence[_Plan],
    training_pass: Pass,
    place: tuple[int, int],
    objective: Objective,
    tokens: int | None,
) -> dict[str, _Passed]:
    """Let clients go through one pass at the same time, whose place among all is given; return what each has then."""
    number, passes = place
    # Those that take most steps stand first, so that those at work are always the first slots.
    busy = sorted(plans, key=lambda plan: -len(plan.steps))
    training = busy[0].client.task.training
    for slot, plan in enumerate(busy):
        with naming("What the method lets a client begin with", RoundFailed):
            layers.load(slot, training_pass.begin(plan.client.task.payload, plan.client.own))
    layers.grads_KP.zero_()
    correct = _corrections(layers, busy, training_pass)
    trained_P = layers.where(busy[0].client.task.payload.trained)
    values_KP, grads_KP = layers.values_KP[: len(busy)], layers.grads_KP[: len(busy)]
    optimizer = make_optimizer(training, values_KP, grads_KP, trained_P)
    figures_FK, losses = torch.zeros(len(objective.figures), len(busy), device=base.device), []
    for step in range(len(busy[0].steps)):
        active = sum(step < len(plan.steps) for plan in busy)
        counted_K = torch.tensor(
            [max(1, _counted(plan, step, objective)) if slot < active else 1 for slot, plan in enumerate(busy)],
            device=base.device,
        )
        before_K = figures_FK[0].clone()
        for piece in _pieces(busy[:active], step, tokens if layers.slots > 1 else None):
            figures_FK += _backward(base, layers, piece, counted_K, busy[0].client.task, objective)
        losses.append((figures_FK[0] - before_K) / counted_K)
        if correct is not None:
            for slot in range(active):
                correct(slot, step)
        if training.clip_norm is not None:
            optimizer.clip(active, training.clip_norm)
        optimizer.step([plan.rates[step] for plan in busy[:active]])
        steps = len(busy[0].steps)
        advance(TRAINING, number * steps + step + 1, passes * steps, "steps", len(busy))
    by_slot = torch.stack(losses).T.tolist()
    return {
        plan.client.name: _Passed(
            plan,
            layers.read(slot),
            by_slot[slot][: len(plan.steps)],
            _means(figures_FK[:, slot].tolist(), plan, objective),
        )
        for slot, plan in enumerate(busy)
    }


def _means(sums_F: Sequence[float], plan: _Plan, objective: Objective) -> dict[str, float]:
    """Return the mean of each figure over all losses of a pass, as met."""
    count = sum(_counted(plan, step, objective) for step in range(len(plan.steps)))
    return {name: total / max(count, 1) for name, total in zip(objective.figures, sums_F, strict=True)}


def _corrections(layers: LoraLayers, plans: Sequence[_Plan], training_pass: Pass) -> Callable[[int, int], None] | None:
    """Return what corrects the gradient in a slot in a step, in place; None where nothing does."""
    if training_pass.correct is None:
        return None
    like_P = layers.values_KP[0]
    start_KP = torch.stack([_flat(layers, plan.client.task.adapter.tensors) for plan in plans])
    sent = [_as_tensors(plan.client.task.payload.arrays, like_P) for plan in plans]
    own = [_as_tensors(plan.client.own, like_P) for plan in plans]
    function = training_pass.correct

    def correct(slot: int, number: int) -> None:
        plan, grad_P, adapter_P = plans[slot], layers.grads_KP[slot], layers.values_KP[slot]
        step = Step(
            plan.client.name, number, plan.rates[number], grad_P, adapter_P, start_KP[slot], sent[slot], own[slot]
        )
        what = "The method's correction of a gradient"
        with naming(what, RoundFailed):
            found = function(step)
        if not isinstance(found, torch.Tensor) or found.shape != grad_P.shape:
            shape = (
                f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            )
            raise RoundFailed(f"{what} returned {shape}; return a gradient as long as the adapter, ({len(grad_P)},).")
        grad_P.copy_(found)

    return correct


def _flat(layers: LoraLayers, tensors: Tensors) -> torch.Tensor:
    """Return an adapter as the vector that it is in a slot."""
    return torch.cat([torch.from_numpy(tensors[key]).reshape(-1) for key in layers.keys]).to(layers.values_KP)


def _as_tensors(arrays: Arrays, like_P: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return copies of arrays as tensors, where and as precise as the adapter is."""
    return {name: torch.tensor(value).to(like_P) for name, value in arrays.items()}


def _work(plan: _Plan) -> int:
    """Return the tokens of all rows that a client goes through, repetitions counted."""
    return sum(plan.rows[index].tokens for step in plan.steps for batch in step for index in batch)


def _counted(plan: _Plan, number: int, objective: Objective) -> int:
    """Return over how many losses the mean of one of a client's steps is."""
    return sum(objective.count(plan.rows[index]) for batch in plan.steps[number] for index in batch)


def _metrics(passed: Sequence[_Passed]) -> dict[str, float]:
    """Return a client's figures.

    ``loss`` is the mean loss per trained token, or per pair of answers, as met in the first pass, in nats where it is
    the cross-entropy; of pairs there are also ``preferred`` and ``margin`` (see ``objective.pair_losses``); ``tokens``
    is the number of trained tokens in all passes, and ``rows`` that of the rows they stand in, repetitions counted in
    both.
    """
    trained = [
        [one.plan.rows[index].trained_tokens for step in one.plan.steps for batch in step for index in batch]
        for one in passed
    ]
    return {
        **passed[0].figures,
        "tokens": float(sum(map(sum, trained))),
        "rows": float(sum(map(len, trained))),
    }


def _pieces(plans: Sequence[_Plan], number: int, tokens: int | None) -> Iterator[list[_Used]]:
    """Yield the rows of all clients' next steps in pieces that run through the base at once.

    Rows of like length share a piece of at most ``tokens`` tokens with its padding, or of one row; without a limit, a
    piece is one batch of one client. Both answers of a row are in the same piece.
    """
    batches = [
        [
            _Used(slot, plan.rows[index], seed, plan.references.get(index, ()))
            for index, seed in zip(batch, seeds, strict=True)
        ]
        for slot, plan in enumerate(plans)
        for batch, seeds in zip(plan.steps[number], plan.seeds[number], strict=True)
    ]
    if tokens is None:
        yield from batches
        return
    piece: list[_Used] = []
    for used in sorted((used for batch in batches for used in batch), key=lambda used: -used.row.longest):
        answers = sum(len(one.row.answers) for one in (*piece, used))
        if piece and piece[0].row.longest * answers > tokens:
            yield sorted(piece, key=lambda used: used.slot)  # so that few slots stand beside each other
            piece = []
        piece.append(used)
    yield sorted(piece, key=lambda used: used.slot)


def _backward(
    base: Base,
    layers: LoraLayers,
    piece: Sequence[_Used],
    counted_K: torch.Tensor,
    task: TrainTask,
    objective: Objective,
) -> torch.Tensor:
    """Add a piece's gradients to its clients' slots; return each client's figures_FK summed over its losses there.

    A client's loss is a mean over ``counted_K``, the trained tokens, or pairs, of its whole step.
    """
    answers = [(used, answer) for used in piece for answer in used.row.answers]
    batch = collate([answer for _, answer in answers], base.device)
    slots = [used.slot for used, _ in answers]
    probability, dropout = task.adapter.config.dropout, None
    if probability > 0:
        dropout = Dropout(probability, torch.tensor([used.seed for used, _ in answers], device=base.device))
    again = task.training.gradient_checkpointing
    loss_S = token_losses(base.model, layers, batch, slots, dropout, checkpointing=again, loss=objective.token_loss)
    answer_S = batch.row_M[batch.select_S]
    figures_FX, row_X = objective.losses(loss_S, answer_S, [used.reference for used in piece])
    slot_X = torch.tensor([used.slot for used in piece], device=base.device)[row_X]
    figures_FK = figures_FX.new_zeros(len(figures_FX), len(counted_K)).index_add(1, slot_X, figures_FX)
    torch.autograd.backward((figures_FK[0] / counted_K).sum())
    return figures_FK.detach()
