"""How many tokens run through the base at once when clients are trained together: what is fastest here, measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from bellwether.client.train import train_cohort
from bellwether.data.rows import TokenRow
from bellwether.exchange.messages import TrainTask
from bellwether.method.average import fedavg
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers

Rows = Mapping[str, Sequence[TokenRow]]

LEAST, MOST = 512, 2**20


def fastest_tokens(
    base: Base, layers: LoraLayers, cohort: Mapping[str, Sequence[TokenRow]], tasks: Mapping[str, TrainTask]
) -> int:
    """Return the budget of tokens at which a step of a cohort takes the least time.

    Budgets are doubled from 512 on, until a step of all clients runs through the base in one piece, does not fit into
    memory, or has become slower twice.

    Args:
        base: the frozen base model.
        layers: LoRA layers with a slot for each client of the cohort; their content is overwritten.
        cohort: token rows by client.
        tasks: what each of them will do; one step of it is taken.
    """
    training = next(iter(tasks.values())).training
    once = {
        client: replace(task, training=training.model_copy(update={"local_steps": 1})) for client, task in tasks.items()
    }
    rows = [sorted((len(row) for row in some), reverse=True) for some in cohort.values()]
    size = training.batch_size * training.accumulation
    whole = max(map(max, rows)) * sum(min(size, len(some)) for some in rows)
    best, least, slower, tokens = LEAST, float("inf"), 0, LEAST
    while tokens <= MOST and slower < 2:
        try:
            seconds = min(_seconds(base, layers, cohort, once, tokens) for _ in range(2))
        except torch.OutOfMemoryError:
            break
        best, slower = (tokens, 0) if seconds < least else (best, slower + 1)
        least = min(least, seconds)
        if tokens >= whole:
            break
        tokens *= 2
    return best


def _seconds(
    base: Base,
    layers: LoraLayers,
    cohort: Mapping[str, Sequence[TokenRow]],
    tasks: Mapping[str, TrainTask],
    tokens: int,
) -> float:
    """Return how long one step of a cohort takes."""
    start = time.perf_counter()
    for _ in train_cohort(base, layers, cohort, tasks, fedavg(), tokens):  # reading the adapters waits for the device
        pass
    return time.perf_counter() - start
