"""What a client makes of its update before it leaves: few bytes, and beside them what it keeps to send next time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bellwether.exchange.adapter import Tensors
from bellwether.exchange.checks import check_tensors
from bellwether.exchange.compress import UP, compress_update
from bellwether.exchange.messages import TrainTask, Update
from bellwether.store.client_state import UNSENT, damaged, keep_settled, recall_state, state_file


def as_it_travels(update: Update, task: TrainTask, folders: Mapping[str, Path]) -> Update:
    """Return an update as the recipe's compression lets it travel, once the client has kept what is left of it.

    Args:
        update: a client's, with whole tensors.
        task: what it was asked.
        folders: each client's own folder, by its name.

    Raises:
        UpdateRejected: it would be refused whole, too: tensors are missing, of another shape, or not finite.
        CheckpointError: what was left before is damaged, or what is left now cannot be written.
    """
    settings, expected = task.compression, task.payload.expected
    if settings.up == "none":
        return update
    check_tensors(update.tensors, expected)
    feedback, draw = settings.error_feedback, task.draws.numpy(UP)
    before = _left_before(folders[update.client], task.settled, expected) if feedback else {}
    # Where nothing is to come back, what was left stays left.
    sent, left = compress_update(update, task.payload, settings, before, draw) if expected else (update, before)
    if feedback:
        keep_settled(folders[update.client], UNSENT, task.round, left, task.settled, task.certain)
    return sent


def _left_before(folder: Path, settled: int, expected: Tensors) -> Tensors:
    """Return what a client's last update that counted left unsent; nothing before it, and where that is lost."""
    left = (recall_state(folder, UNSENT, settled) if settled else None) or {}
    for key, value in left.items():
        like = expected.get(key, value)
        if value.dtype != like.dtype or value.shape != like.shape or not np.isfinite(value).all():
            error = ValueError(f"{key} is not finite, or of another shape than the adapter's")
            raise damaged(state_file(folder, UNSENT, settled), error)
    return left
