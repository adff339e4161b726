"""The forward pass with logits at chosen positions only, and the loss over them.

With a vocabulary of V the output layer costs D·V multiply-adds a position, and prompts need none of
it. So the rows of hidden states are chosen before that layer, whatever the architecture: what the model
does with its logits afterwards (Gemma's soft cap) still happens.

Shape legend: N rows, T tokens, D hidden size, S selected positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from bellwether.errors import ModelError


def logits_at(model: Any, ids_NT: torch.Tensor, select_NT: torch.Tensor) -> torch.Tensor:
    """Return the logits at selected positions of a batch that is padded at the right.

    Args:
        model: a transformers causal language model.
        ids_NT: token ids.
        select_NT: true where logits are wanted; those at position t predict token t + 1.

    Returns:
        logits_SV, row after row, positions in rising order.

    Raises:
        ModelError: the model has no output layer.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"{type(model).__name__} has no output layer; give a causal language model.")

    def choose(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][select_NT], *args[1:])

    handle = output.register_forward_pre_hook(choose)
    try:
        positions_1T = torch.arange(ids_NT.shape[1], device=ids_NT.device)[None]
        # No mask of padding: it stands at the right, where a causal model cannot see it. With one, a position whose
        # whole attention window is padding would have nothing to attend to and become NaN (Gemma 2).
        result = model(input_ids=ids_NT, position_ids=positions_1T, use_cache=False)
    finally:
        handle.remove()
    logits_SV: torch.Tensor = result.logits
    return logits_SV


def token_losses(logits_SV: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy at each selected position, in nats.

    Computed in float32 at least: bfloat16 would lose most of the digits.

    Args:
        logits_SV: logits.
        targets_S: the token that follows each selected position.
    """
    wide_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    return torch.nn.functional.cross_entropy(wide_SV, targets_S, reduction="none")
