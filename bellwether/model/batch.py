"""Token rows end to end, and padded.

Shape legend: N rows, T tokens of the longest row, M tokens of all rows, S selected positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packed:
    """Rows end to end.

    Args:
        lengths: tokens of each row, at least one.
        ids_M: token ids, row after row.
        position_M: each token's position in its row.
        row_M: each token's row.
    """

    lengths: Sequence[int]
    ids_M: torch.Tensor
    position_M: torch.Tensor
    row_M: torch.Tensor


@dataclass(frozen=True)
class Batch(Packed):
    """Rows end to end, and the positions at which a loss is taken.

    Args:
        select_S: numbers of the tokens, of M, whose *next* token counts, in rising order.
        targets_S: those next tokens.
    """

    select_S: torch.Tensor
    targets_S: torch.Tensor


def pack(rows: Sequence[NDArray[np.int64]], device: torch.device) -> Packed:
    """Put the token ids of rows end to end.

    Args:
        rows: token ids of each row, at least one.
        device: where the tensors shall be.
    """
    lengths = [len(ids_T) for ids_T in rows]
    arrays = (
        np.concatenate(rows),
        np.concatenate([np.arange(length) for length in lengths]),
        np.repeat(np.arange(len(rows)), lengths),
    )
    return Packed(lengths, *(torch.from_numpy(array).to(device) for array in arrays))


def padded(batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of packed rows padded at the right, and where among them each token stands.

    Returns:
        ids_NT, and place_M, the number of each token's position, counted row after row.
    """
    count, longest = len(batch.lengths), max(batch.lengths)
    place_M = batch.row_M * longest + batch.position_M
    blank = torch.zeros(count * longest, dtype=torch.int64, device=batch.ids_M.device)
    return blank.index_copy_(0, place_M, batch.ids_M).view(count, longest), place_M
