"""Batches of token rows: their order, and their padded tensors.

Shape legend: N rows of a batch, T tokens of the longest of them, S selected positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bellwether.data.rows import TokenRow
from bellwether.recipe import Training


@dataclass(frozen=True)
class Batch:
    """Padded rows and the positions at which a loss is taken.

    Args:
        ids_NT: token ids, padded at the right.
        select_NT: true where the *next* token counts.
        targets_S: those next tokens, row after row.
    """

    ids_NT: torch.Tensor
    select_NT: torch.Tensor
    targets_S: torch.Tensor


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


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches, longest rows first, so that memory is known after the first."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def collate(rows: Sequence[TokenRow], device: torch.device, *, responses: bool = False) -> Batch:
    """Pad rows to the longest of them.

    Args:
        rows: the rows of the batch.
        device: where the tensors shall be.
        responses: select response tokens (for scores) instead of trained tokens.
    """
    longest = max(len(row) for row in rows)
    ids_NT = np.zeros((len(rows), longest), dtype=np.int64)
    select_NT = np.zeros((len(rows), longest), dtype=np.bool_)
    targets: list[NDArray[np.int64]] = []
    for number, row in enumerate(rows):
        counted_T = (row.response_T if responses else row.trained_T).copy()
        counted_T[0] = False  # nothing stands before the first token to predict it from
        ids_NT[number, : len(row)] = row.ids_T
        select_NT[number, : len(row) - 1] = counted_T[1:]
        targets.append(row.ids_T[counted_T])
    return Batch(
        torch.from_numpy(ids_NT).to(device),
        torch.from_numpy(select_NT).to(device),
        torch.from_numpy(np.concatenate(targets)).to(device),
    )
