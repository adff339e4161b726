"""Batches of token rows: their order, and their tensors.

Shape legend: R rows of a client, T tokens of a row, M tokens of all rows of a batch, S selected positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bellwether.data.rows import TokenRow
from bellwether.method.examples import example_rate
from bellwether.model.batch import Batch, pack
from bellwether.recipe.recipe import Training


def local_steps(lengths: Sequence[int], training: Training, generator: np.random.Generator) -> list[list[list[int]]]:
    """Return the optimizer steps of a client's round: per step its batches, per batch row numbers.

    Every epoch visits each row once. With ``group_by_length`` rows of like length share a batch, which
    saves padding, and the batches come in random order; otherwise rows are in random order.

    Args:
        lengths: tokens of each row, at least one row.
        training: local epochs or steps, batch size, accumulation.
        generator: the client's generator for this round's order.
    """
    wanted = training.local_steps
    steps: list[list[list[int]]] = []
    epoch = 0
    while len(steps) < wanted if wanted is not None else epoch < training.local_epochs:
        batches = _epoch_batches(np.asarray(lengths), training, generator)
        size = training.accumulation
        steps += [batches[start : start + size] for start in range(0, len(batches), size)]
        epoch += 1
    return steps[:wanted]


def _epoch_batches(lengths_R: NDArray[np.int64], training: Training, generator: np.random.Generator) -> list[list[int]]:
    """Return one epoch's batches of row numbers."""
    order_R = generator.permutation(len(lengths_R))
    if training.group_by_length:
        # The permutation before a stable sort decides among rows of equal length.
        order_R = order_R[np.argsort(lengths_R[order_R], kind="stable")]
    size = training.batch_size
    batches = [order_R[start : start + size].tolist() for start in range(0, len(order_R), size)]
    if training.group_by_length:
        batches = [batches[index] for index in generator.permutation(len(batches))]
    return batches


def poisson_steps(rows: int, training: Training, generator: np.random.Generator) -> list[list[list[int]]]:
    """Return the optimizer steps of a client's round that hides single rows: per step one batch of row numbers.

    Every row joins every step by a chance of its own (Poisson sampling, as in algorithm 1 of Abadi et al. 2016, arXiv
    1607.00133), so batches are of unlike sizes, and may be empty; like lengths do not come together, since who is in a
    batch may not depend on who else is there.

    Args:
        rows: how many the client has, at least one.
        training: local epochs or steps, batch size, accumulation.
        generator: the source of chance.
    """
    rate, steps = example_rate(rows, training)
    return [[np.flatnonzero(generator.random(rows) < rate).tolist()] for _ in range(steps)]


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches, longest rows first, so that memory is known after the first."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def collate(rows: Sequence[TokenRow], device: torch.device, *, responses: bool = False) -> Batch:
    """Put rows end to end.

    Args:
        rows: the rows of the batch.
        device: where the tensors shall be.
        responses: select response tokens (for scores) instead of trained tokens.
    """
    counted = [row.response_T if responses else row.trained_T for row in rows]
    packed = pack([row.ids_T for row in rows], device)
    # A token counts where its *next* one does; nothing stands before a row's first token to predict it from.
    select_M = np.concatenate([np.append(counted_T[1:], False) for counted_T in counted])
    select_S = torch.from_numpy(select_M.nonzero()[0]).to(device)
    return Batch(packed.lengths, packed.ids_M, packed.position_M, packed.row_M, select_S, packed.ids_M[select_S + 1])
