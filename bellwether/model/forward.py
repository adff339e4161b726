"""From token ids to the loss at chosen positions, with the adapters of each row.

There are two ways. On a CPU, a decoder built like Llama's runs over the rows end to end, without padding, in steps of
our own (``decoder``, ``kernels``); whether that gives the same losses is tried out on each model before it is used.
Every other model runs as transformers has it, over rows padded at the right. In both, what the output layer gets is
chosen before it: with a vocabulary of V it costs D·V multiply-adds a position, and prompts need none of it.

Shape legend: N rows, T tokens of the longest row, M tokens of all rows, S selected positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bellwether.errors import ModelError
from bellwether.model import decoder
from bellwether.model.dropout import Dropout
from bellwether.model.kernels import cross_entropy
from bellwether.model.lora import LoraLayers


@dataclass(frozen=True)
class Batch:
    """Rows end to end, and the positions at which a loss is taken.

    Args:
        lengths: tokens of each row, at least one.
        ids_M: token ids, row after row.
        position_M: each token's position in its row.
        row_M: each token's row.
        select_S: numbers of the tokens, of M, whose *next* token counts, in rising order.
        targets_S: those next tokens.
    """

    lengths: Sequence[int]
    ids_M: torch.Tensor
    position_M: torch.Tensor
    row_M: torch.Tensor
    select_S: torch.Tensor
    targets_S: torch.Tensor


def token_losses(
    model: Any,
    layers: LoraLayers,
    batch: Batch,
    slots: Sequence[int] | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Return the cross-entropy at each selected position, in nats.

    Computed in float32 at least: bfloat16 would lose most of the digits.

    Args:
        model: a transformers causal language model.
        layers: the LoRA layers over it.
        batch: rows and positions.
        slots: the slot of each row's adapter; None puts all rows into slot 0.
        dropout: what is dropped from the inputs of A; None drops nothing.

    Returns:
        loss_S, through which gradients reach the adapters.

    Raises:
        ModelError: the model has no output layer, or a module's rows cannot be told apart.
    """
    if runs_end_to_end(model, layers, batch):
        masks = dropout.masks(batch.row_M, batch.position_M) if dropout is not None else None
        with layers.routed(slots, masks, batch.lengths):
            hidden_SD = decoder.hidden_states(model, layers, batch)
            output = model.get_output_embeddings()
            return cross_entropy(hidden_SD, output.weight, output.bias, batch.targets_S)
    return _losses_as_transformers(model, layers, batch, slots, dropout)


# Whether losses come out the same end to end; found once for each set of layers, since adapted modules run otherwise.
_SAME: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


def runs_end_to_end(model: Any, layers: LoraLayers, batch: Batch | None = None) -> bool:
    """Return whether rows run through a model end to end, without padding.

    Args:
        model: a transformers causal language model.
        layers: the LoRA layers over it.
        batch: rows, which must fit into the model's window of attention, if it has one; None asks for short rows.
    """
    window = decoder.window(model)
    if batch is not None and window is not None and max(batch.lengths) > window:
        return False
    if layers not in _SAME:
        _SAME[layers] = decoder.fits(model) and _same_losses(model, layers)
    return _SAME[layers]


@torch.no_grad()
def _same_losses(model: Any, layers: LoraLayers) -> bool:
    """Return whether both ways give the same losses on two short rows."""
    device = next(model.parameters()).device
    vocabulary = len(model.get_input_embeddings().weight)
    ids_M = torch.arange(1, 12, device=device) * 7919 % vocabulary
    lengths = (7, 4)
    position_M = torch.cat([torch.arange(length, device=device) for length in lengths])
    row_M = torch.tensor([0] * 7 + [1] * 4, device=device)
    select_S = torch.tensor([2, 4, 5, 7, 9], device=device)
    batch = Batch(lengths, ids_M, position_M, row_M, select_S, ids_M[select_S + 1])
    theirs_S = _losses_as_transformers(model, layers, batch, None, None)
    with layers.routed(None, None, lengths):
        hidden_SD = decoder.hidden_states(model, layers, batch)
        output = model.get_output_embeddings()
        ours_S = cross_entropy(hidden_SD, output.weight, output.bias, batch.targets_S)
    near = 0.1 if model.dtype == torch.bfloat16 else 1e-3
    return bool(torch.allclose(ours_S, theirs_S, rtol=near, atol=near))


def _losses_as_transformers(
    model: Any, layers: LoraLayers, batch: Batch, slots: Sequence[int] | None, dropout: Dropout | None
) -> torch.Tensor:
    """Return the losses of rows that are padded at the right."""
    count, longest = len(batch.lengths), max(batch.lengths)
    device = batch.ids_M.device
    place_M = batch.row_M * longest + batch.position_M
    ids_NT = torch.zeros(count * longest, dtype=torch.int64, device=device).index_copy_(0, place_M, batch.ids_M)
    masks = None
    if dropout is not None:
        row_M = torch.arange(count, device=device).repeat_interleave(longest)
        masks = dropout.masks(row_M, torch.arange(longest, device=device).repeat(count))
    with layers.routed(slots, masks):
        logits_SV = logits_at(model, ids_NT.view(count, longest), place_M[batch.select_S])
    wide_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    return torch.nn.functional.cross_entropy(wide_SV, batch.targets_S, reduction="none")


def logits_at(model: Any, ids_NT: torch.Tensor, select_S: torch.Tensor) -> torch.Tensor:
    """Return the logits at selected positions of a batch that is padded at the right.

    What the model does with its logits afterwards (Gemma's soft cap) still happens.

    Args:
        model: a transformers causal language model.
        ids_NT: token ids.
        select_S: numbers of positions, counted row after row; logits at position t predict token t + 1.

    Returns:
        logits_SV, in the order of ``select_S``.

    Raises:
        ModelError: the model has no output layer.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"{type(model).__name__} has no output layer; give a causal language model.")

    def choose(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].reshape(-1, args[0].shape[-1])[select_S], *args[1:])

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
