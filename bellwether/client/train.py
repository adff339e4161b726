"""Local training: what a client does with the adapter and its own rows in one round.

The base stays frozen; A and B of the LoRA layers are trained by AdamW, whose state begins afresh in
every round, as in FedIT (Zhang et al. 2023, arXiv 2305.05644). The loss of a step is the mean
cross-entropy over all its trained tokens, over all its accumulated batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from bellwether.client.batches import collate, local_steps
from bellwether.data.rows import TokenRow
from bellwether.messages import Reply, TrainTask, Update
from bellwether.model.base import Base
from bellwether.model.forward import logits_at, response_loss
from bellwether.model.lora import DropoutMasks, LoraLayers, seeded_masks
from bellwether.randomness import Randomness
from bellwether.schedule import learning_rate


def train_cohort(
    base: Base, layers: LoraLayers, cohort: Mapping[str, Sequence[TokenRow]], task: TrainTask
) -> Iterator[Reply]:
    """Train every client of a cohort on its own rows, all from the same adapter.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it; their content is overwritten.
        cohort: token rows by client name.
        task: adapter, settings, round and seed.

    Yields:
        One reply per client, with its update and wall seconds.
    """
    for client, rows in cohort.items():
        start = time.perf_counter()
        layers.load(0, task.adapter.tensors)
        metrics = train_client(base, layers, rows, task, client)
        update = Update(client, task.round, layers.read(0), len(rows), metrics)
        yield Reply(client, time.perf_counter() - start, update=update)


def train_client(
    base: Base, layers: LoraLayers, rows: Sequence[TokenRow], task: TrainTask, client: str
) -> dict[str, float]:
    """Train the adapter in slot 0 on one client's rows.

    Args:
        base: the frozen base model.
        layers: LoRA layers that hold the adapter to start from; trained in place.
        rows: the client's token rows, at least one.
        task: settings; round and seed, from which batch order and dropout derive; the run's rounds, over
            which each step finds its learning rate.
        client: the client's name.

    Returns:
        ``loss``, the mean cross-entropy in nats per trained token as met while training; ``tokens``, the
        number of those tokens, and ``rows``, that of the rows they stand in, repetitions counted in both.
    """
    randomness = Randomness(task.seed)
    order = randomness.numpy("batch order", round=task.round, client=client)
    masks = None
    dropout = task.adapter.config.dropout
    if dropout > 0:
        generator = randomness.torch("dropout", round=task.round, client=client, device=str(base.device))
        masks = seeded_masks(dropout, [generator])
    parameters = list(layers.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=task.training.weight_decay, foreach=False)
    loss_sum, tokens, seen = torch.zeros((), dtype=torch.float64), 0, 0
    steps = local_steps([len(row) for row in rows], task.training, order)
    for place, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(task.training, task.round, task.rounds, place, len(steps))
        batches = [[rows[number] for number in batch] for batch in step]
        loss, counted = _accumulate(base, layers, batches, masks)
        if task.training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, task.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum, tokens, seen = loss_sum + loss, tokens + counted, seen + sum(map(len, batches))
    return {"loss": float(loss_sum) / max(tokens, 1), "tokens": float(tokens), "rows": float(seen)}


def _accumulate(
    base: Base, layers: LoraLayers, batches: Sequence[Sequence[TokenRow]], masks: DropoutMasks | None
) -> tuple[torch.Tensor, int]:
    """Add up the gradient of the mean loss over all tokens of a step's batches.

    Returns:
        The summed cross-entropy, and the number of tokens it was summed over.
    """
    collated = [collate(rows, base.device) for rows in batches]
    counted = sum(len(batch.targets_S) for batch in collated)
    total = torch.zeros((), dtype=torch.float64)
    for batch in collated:
        with layers.routed(None, masks):
            logits_SV = logits_at(base.model, batch.ids_NT, batch.attention_NT, batch.select_NT)
            loss = response_loss(logits_SV, batch.targets_S)
            torch.autograd.backward(loss / counted)
        total += loss.detach().cpu().double()
    return total, counted
