"""One pass of local training: optimizer steps over clients' rows, from what they begin with to what they have then.

A and B are stepped by AdamW, whose state begins afresh in every round, as in FedIT (Zhang et al. 2023, arXiv
2305.05644), or by plain SGD. The loss of a client's step is a mean over all its trained tokens, over all its
accumulated batches: of the cross-entropy, or of another loss that the recipe names (``objective``), such as that of
pairs of answers, which compares with the base as it is without any adapter.

Several clients are trained together: their adapters stand in slots of the same LoRA layers, the rows of all their
steps run through the one base in pieces of a given number of tokens, and each keeps its own loss, gradient,
clipping, optimizer state and learning rate. A client that has taken all its steps rests while others go on. One by
one, a piece is one of the client's own batches, so that a client trains alike wherever it is.

Shape legend: K clients trained together, S selected positions, P parameters of an adapter, X losses, F figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bellwether.client.batches import collate
from bellwether.client.objective import Objective
from bellwether.client.optimizer import make_optimizer
from bellwether.client.plans import Plan, Used, counted, pieces
from bellwether.errors import RoundFailed
from bellwether.exchange.adapter import Arrays, Tensors
from bellwether.exchange.messages import TrainTask
from bellwether.method.method import Pass, Step
from bellwether.model.base import Base
from bellwether.model.dropout import Dropout
from bellwether.model.forward import token_losses
from bellwether.model.lora import LoraLayers
from bellwether.tools.functions import naming
from bellwether.tools.progress import TRAINING, advance

# Of the clients at work, in the order of their slots, a step's number, over how many losses each one's mean is, and the
# sums of figures so far: brings the gradients of the step into the slots, which are clear, and adds to the sums.
Gradient = Callable[[Sequence[Plan], int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Passed:
    """What a client has after a pass: its tensors, the mean loss of each step, and figures of all it went through."""

    plan: Plan
    tensors: Tensors
    losses: Sequence[float]
    figures: Mapping[str, float]


def go_through(
    layers: LoraLayers,
    plans: Sequence[Plan],
    training_pass: Pass,
    place: tuple[int, int],
    objective: Objective,
    gradient: Gradient,
) -> dict[str, Passed]:
    """Let clients go through one pass at the same time.

    Args:
        layers: LoRA layers over the base, with a slot for each client.
        plans: what each of them does.
        training_pass: where they begin, and what corrects their gradients.
        place: the pass, from 0 on, and how many there are.
        objective: what is minimised.
        gradient: gives the gradients of a step.

    Returns:
        What each client has then, by name.

    Raises:
        RoundFailed: a person's own method failed.
    """
    number, passes = place
    # Those that take most steps stand first, so that those at work are always the first slots.
    busy = sorted(plans, key=lambda plan: -len(plan.steps))
    training, device = busy[0].client.task.training, layers.values_KP.device
    for slot, plan in enumerate(busy):
        with naming("What the method lets a client begin with", RoundFailed):
            layers.load(slot, training_pass.begin(plan.client.task.payload, plan.client.own))
    layers.grads_KP.zero_()
    correct = _corrections(layers, busy, training_pass)
    trained_P = layers.where(busy[0].client.task.payload.trained)
    values_KP, grads_KP = layers.values_KP[: len(busy)], layers.grads_KP[: len(busy)]
    optimizer = make_optimizer(training, values_KP, grads_KP, trained_P)
    figures_FK, losses = torch.zeros(len(objective.figures), len(busy), device=device), []
    for step in range(len(busy[0].steps)):
        active = sum(step < len(plan.steps) for plan in busy)
        counted_K = torch.tensor(
            [max(1, counted(plan, step, objective)) if slot < active else 1 for slot, plan in enumerate(busy)],
            device=device,
        )
        before_K = figures_FK[0].clone()
        gradient(busy[:active], step, counted_K, figures_FK)
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
        plan.client.name: Passed(
            plan,
            layers.read(slot),
            by_slot[slot][: len(plan.steps)],
            _means(figures_FK[:, slot].tolist(), plan, objective),
        )
        for slot, plan in enumerate(busy)
    }


def mean_gradient(base: Base, layers: LoraLayers, objective: Objective, tokens: int | None) -> Gradient:
    """Return what gives the gradient of the mean over all losses of a step.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it.
        objective: what is minimised.
        tokens: how many tokens, padding included, run through the base at once where the layers have several slots.
    """

    def gradient(plans: Sequence[Plan], step: int, counted_K: torch.Tensor, figures_FK: torch.Tensor) -> None:
        for piece in pieces(plans, step, tokens if layers.slots > 1 else None):
            figures_FK += backward(base, layers, piece, counted_K, plans[0].client.task, objective)

    return gradient


def _means(sums_F: Sequence[float], plan: Plan, objective: Objective) -> dict[str, float]:
    """Return the mean of each figure over all losses of a pass, as met."""
    count = sum(counted(plan, step, objective) for step in range(len(plan.steps)))
    return {name: total / max(count, 1) for name, total in zip(objective.figures, sums_F, strict=True)}


def _corrections(layers: LoraLayers, plans: Sequence[Plan], training_pass: Pass) -> Callable[[int, int], None] | None:
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


def metrics(passed: Sequence[Passed]) -> dict[str, float]:
    """Return a client's figures.

    ``loss`` is the mean loss per trained token, or per pair of answers, as met in the first pass, in nats where it is
    the cross-entropy; of pairs there are also ``preferred`` and ``margin`` (see ``objective.pair_losses``); ``tokens``
    is the number of trained tokens in all passes, and ``rows`` that of the rows they stand in, repetitions counted in
    both.

    Args:
        passed: what it has after each pass.
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


def backward(
    base: Base,
    layers: LoraLayers,
    piece: Sequence[Used],
    counted_K: torch.Tensor,
    task: TrainTask,
    objective: Objective,
) -> torch.Tensor:
    """Add a piece's gradients to its slots; return figures_FK summed over the losses of each slot there.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it.
        piece: rows, each in its slot.
        counted_K: over how many losses the mean of each slot is: trained tokens, or pairs, of a client's whole step.
        task: of any of the clients, whose settings are the same.
        objective: what is minimised.
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
