"""Local training: what clients do with the adapter and their own rows in one round.

The base stays frozen; A and B of the LoRA layers are trained by AdamW, whose state begins afresh in every round, as
in FedIT (Zhang et al. 2023, arXiv 2305.05644). The loss of a client's step is a mean over all its trained tokens, over
all its accumulated batches: of the cross-entropy, or of another loss that the recipe names (``objective``).

Several clients are trained together: their adapters stand in slots of the same LoRA layers, the rows of all their
steps run through the one base in pieces of a given number of tokens, and each keeps its own loss, gradient,
clipping, optimizer state and learning rate. A client that has taken all its steps rests while others go on. One by
one, a piece is one of the client's own batches, so that a client trains alike wherever it is.

Shape legend: K clients trained together, S selected positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bellwether.client.batches import collate, local_steps
from bellwether.client.objective import Objective, make_objective
from bellwether.client.optimizer import StackedAdamW
from bellwether.data.rows import TokenRow
from bellwether.errors import NotFinite, first_line
from bellwether.exchange.messages import Reply, TrainTask, Update
from bellwether.method.schedule import learning_rate
from bellwether.model.base import Base
from bellwether.model.dropout import Dropout
from bellwether.model.forward import token_losses
from bellwether.model.lora import LoraLayers
from bellwether.tools.randomness import Randomness

# From a client, its rows and what it is asked to the numbers of the rows that it trains on.
Choose = Callable[[str, Sequence[TokenRow], TrainTask], Sequence[int]]


@dataclass(frozen=True)
class _Plan:
    """All that a client will do in a round, drawn before it begins.

    Args:
        client: its name.
        rows: its token rows.
        steps: per optimizer step its batches, per batch row numbers.
        seeds: a number for each of these rows, from which its dropout derives.
    """

    client: str
    rows: Sequence[TokenRow]
    steps: Sequence[Sequence[Sequence[int]]]
    seeds: Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class _Used:
    """One row of one client's step, as it stands in a piece."""

    slot: int
    row: TokenRow
    seed: int


def train_cohort(
    base: Base,
    layers: LoraLayers,
    cohort: Mapping[str, Sequence[TokenRow]],
    task: TrainTask,
    tokens: int | None = None,
) -> Iterator[Reply]:
    """Train every client of a cohort on its own rows, all from the same adapter.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it, with as many slots as clients shall be trained together.
        cohort: token rows by client name.
        task: adapter, settings, round and seed.
        tokens: how many tokens, padding included, run through the base at once where clients are trained together.

    Yields:
        One reply per client, with its update and its share of the wall seconds.

    Raises:
        RecipeError: the task names a loss or a correction that is not there.
        RoundFailed: one of a person's own failed.
    """
    objective = make_objective(task.training)
    plans = [_plan(client, rows, task) for client, rows in cohort.items()]
    for start in range(0, len(plans), layers.slots):
        yield from _train_together(base, layers, plans[start : start + layers.slots], task, objective, tokens)


def train_chosen(
    choose: Choose,
    base: Base,
    layers: LoraLayers,
    cohort: Mapping[str, Sequence[TokenRow]],
    task: TrainTask,
    tokens: int | None = None,
) -> Iterator[Reply]:
    """Train every client of a cohort on the rows that it chooses.

    Args:
        choose: chooses them; raises NotFinite where it cannot.
        base: the frozen base model.
        layers: LoRA layers over it.
        cohort: all token rows by client name.
        task: what the clients are asked.
        tokens: see ``train_cohort``.

    Yields:
        One reply per client, those that could not choose first, the others in the order of the cohort; seconds are
        those of choosing and of training.
    """
    selected: dict[str, list[TokenRow]] = {}
    seconds: dict[str, float] = {}
    for client, rows in cohort.items():
        start = time.perf_counter()
        try:
            selected[client] = [rows[number] for number in choose(client, rows, task)]
        except NotFinite as error:
            yield Reply(client, time.perf_counter() - start, failure=first_line(error))
        seconds[client] = time.perf_counter() - start
    for reply in train_cohort(base, layers, selected, task, tokens):
        update = reply.update
        assert update is not None
        weight = len(cohort[reply.client]) if task.selection.weigh_by == "all" else update.rows
        if task.selection.method != "full":
            update = replace(update, rows=weight, metrics={**update.metrics, "selected": float(update.rows)})
        yield replace(reply, seconds=seconds[reply.client] + reply.seconds, update=update)


def _plan(client: str, rows: Sequence[TokenRow], task: TrainTask) -> _Plan:
    """Draw a client's steps and the numbers that its dropout derives from."""
    randomness = Randomness(task.seed)
    order = randomness.numpy("batch order", round=task.round, client=client)
    steps = local_steps([len(row) for row in rows], task.training, order)
    draws = randomness.numpy("dropout", round=task.round, client=client)
    seeds = [[draws.integers(-(2**63), 2**63, len(batch)).tolist() for batch in step] for step in steps]
    return _Plan(client, rows, steps, seeds)


def _train_together(
    base: Base,
    layers: LoraLayers,
    plans: Sequence[_Plan],
    task: TrainTask,
    objective: Objective,
    tokens: int | None,
) -> Iterator[Reply]:
    """Train some clients at the same time; yield their replies in the order of ``plans``."""
    start = time.perf_counter()
    # Those that take most steps stand first, so that those at work are always the first slots.
    busy = sorted(plans, key=lambda plan: -len(plan.steps))
    for slot in range(len(busy)):
        layers.load(slot, task.adapter.tensors)
    layers.grads_KP.zero_()
    start_P = layers.values_KP[0].clone()
    optimizer = StackedAdamW(layers.values_KP[: len(busy)], layers.grads_KP[: len(busy)], task.training.weight_decay)
    loss_K, losses = torch.zeros(len(busy), device=base.device), []
    for number in range(len(busy[0].steps)):
        active = sum(number < len(plan.steps) for plan in busy)
        counted_K = torch.tensor(
            [max(1, _trained(plan, number)) if slot < active else 1 for slot, plan in enumerate(busy)],
            device=base.device,
        )
        before_K = loss_K.clone()
        for piece in _pieces(busy[:active], number, tokens if layers.slots > 1 else None):
            loss_K += _backward(base, layers, piece, counted_K, task, objective)
        losses.append((loss_K - before_K) / counted_K)
        if objective.correct is not None:
            for slot in range(active):
                grad_P = layers.grads_KP[slot]
                grad_P.copy_(objective.correct(grad_P, layers.values_KP[slot], start_P))
        if task.training.clip_norm is not None:
            optimizer.clip(active, task.training.clip_norm)
        optimizer.step(
            [learning_rate(task.training, task.round, task.rounds, number, len(plan.steps)) for plan in busy[:active]]
        )
    by_slot = torch.stack(losses).T.tolist()
    seconds = time.perf_counter() - start
    slots = {plan.client: slot for slot, plan in enumerate(busy)}
    work = {plan.client: sum(_lengths(plan)) for plan in plans}
    for plan in plans:
        slot = slots[plan.client]
        metrics = _metrics(plan, float(loss_K[slot]))
        update = Update(plan.client, task.round, layers.read(slot), len(plan.rows), metrics)
        share = seconds * work[plan.client] / sum(work.values())
        yield Reply(plan.client, share, update=update, losses=by_slot[slot][: len(plan.steps)])


def _lengths(plan: _Plan) -> list[int]:
    """Return the tokens of every row that a client goes through, repetitions counted."""
    return [len(plan.rows[index]) for step in plan.steps for batch in step for index in batch]


def _trained(plan: _Plan, number: int) -> int:
    """Return the trained tokens of one of a client's steps."""
    return sum(plan.rows[index].trained_tokens for batch in plan.steps[number] for index in batch)


def _metrics(plan: _Plan, loss: float) -> dict[str, float]:
    """Return a client's figures.

    ``loss`` is the mean loss per trained token as met while training, in nats where it is the cross-entropy; ``tokens``
    the number of those tokens, and ``rows`` that of the rows they stand in, repetitions counted in both.
    """
    trained = [plan.rows[index].trained_tokens for step in plan.steps for batch in step for index in batch]
    return {"loss": loss / max(sum(trained), 1), "tokens": float(sum(trained)), "rows": float(len(trained))}


def _pieces(plans: Sequence[_Plan], number: int, tokens: int | None) -> Iterator[list[_Used]]:
    """Yield the rows of all clients' next steps in pieces that run through the base at once.

    Rows of like length share a piece of at most ``tokens`` tokens with its padding, or of one row; without a limit, a
    piece is one batch of one client.
    """
    batches = [
        [_Used(slot, plan.rows[index], seed) for index, seed in zip(batch, seeds, strict=True)]
        for slot, plan in enumerate(plans)
        for batch, seeds in zip(plan.steps[number], plan.seeds[number], strict=True)
    ]
    if tokens is None:
        yield from batches
        return
    piece: list[_Used] = []
    for used in sorted((used for batch in batches for used in batch), key=lambda used: -len(used.row)):
        if piece and len(piece[0].row) * (len(piece) + 1) > tokens:
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
    """Add a piece's gradients to its clients' slots; return each client's loss summed over its tokens there.

    A client's loss is a mean over ``counted_K``, the trained tokens of its whole step.
    """
    batch = collate([used.row for used in piece], base.device)
    slots = [used.slot for used in piece]
    probability, dropout = task.adapter.config.dropout, None
    if probability > 0:
        dropout = Dropout(probability, torch.tensor([used.seed for used in piece], device=base.device))
    again = task.training.gradient_checkpointing
    loss_S = token_losses(base.model, layers, batch, slots, dropout, checkpointing=again, loss=objective.loss)
    slot_S = torch.tensor(slots, device=base.device)[batch.row_M[batch.select_S]]
    loss_K = torch.zeros_like(counted_K, dtype=loss_S.dtype).index_add(0, slot_S, loss_S)
    torch.autograd.backward((loss_K / counted_K).sum())
    return loss_K.detach()
