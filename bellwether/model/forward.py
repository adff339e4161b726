"""From token ids to the loss at chosen positions, with the adapters of each row.

There are two ways. On a CPU, a decoder of the families that ``decoder`` names runs over the rows end to end, without
padding, in steps of our own (``decoder``, ``kernels``). Every other model runs as transformers has it, over rows padded
at the right. In both, what the output layer gets is chosen before it: with a vocabulary of V it costs D·V multiply-adds
a position, and prompts need none of it.

Shape legend: N rows, T tokens of the longest row, M tokens of all rows, S selected positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bellwether.errors import ModelError
from bellwether.model import decoder
from bellwether.model.batch import Batch, padded
from bellwether.model.dropout import Dropout
from bellwether.model.kernels import capped, cross_entropy, wide
from bellwether.model.lora import LoraLayers

# From logits_SV, targets_S and the number of each position's row to loss_S. Rows are always whole, but which of them
# share a call depends on what fits, so a loss may look at several positions of a row, never at several rows.
TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def token_losses(
    model: Any,
    layers: LoraLayers,
    batch: Batch,
    slots: Sequence[int] | None = None,
    dropout: Dropout | None = None,
    *,
    checkpointing: bool = False,
    loss: TokenLoss | None = None,
) -> torch.Tensor:
    """Return the loss at each selected position: cross-entropy in nats, where no other is given.

    Computed in float32 at least: bfloat16 would lose most of the digits.

    Args:
        model: a transformers causal language model.
        layers: the LoRA layers over it.
        batch: rows and positions.
        slots: the slot of each row's adapter; None puts all rows into slot 0.
        dropout: what is dropped from the inputs of A; None drops nothing.
        checkpointing: compute each layer again in the backward pass instead of keeping what it needs there.
        loss: another loss; it gets all logits at once, while the cross-entropy is computed in parts.

    Returns:
        loss_S, through which gradients reach the adapters.

    Raises:
        ModelError: the model has no output layer, a module's rows cannot be told apart, or no layers can be computed
            again.
    """
    if decoder.fits(model):
        masks = dropout.masks(batch.row_M, batch.position_M) if dropout is not None else None
        with layers.routed(slots, masks, batch.lengths):
            hidden_SD = decoder.hidden_states(model, layers, batch, checkpointing)
            output, cap = model.get_output_embeddings(), decoder.logit_cap(model)
            if loss is None:
                return cross_entropy(hidden_SD, output.weight, output.bias, batch.targets_S, cap)
            logits_SV = capped(wide(output(hidden_SD)), cap)
            return loss(logits_SV, batch.targets_S, batch.row_M[batch.select_S])
    with _recomputing(model, layers) if checkpointing else contextlib.nullcontext():
        return _losses_as_transformers(model, layers, batch, slots, dropout, loss)


@contextlib.contextmanager
def _recomputing(model: Any, layers: LoraLayers) -> Iterator[None]:
    """Let a model of transformers compute its layers again in the backward pass of what runs inside."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layers that can be computed again; set training.gradient_checkpointing to "
            "false."
        )
    try:
        for module in found:
            module.forward = functools.partial(_recomputed, layers, module.forward)
        yield
    finally:
        for module in found:
            del module.forward  # the class's own stands behind it


def _recomputed(layers: LoraLayers, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return layers.recomputed(functools.partial(forward, **named), *arguments)


def _losses_as_transformers(
    model: Any,
    layers: LoraLayers,
    batch: Batch,
    slots: Sequence[int] | None,
    dropout: Dropout | None,
    loss: TokenLoss | None,
) -> torch.Tensor:
    """Return the losses of rows that are padded at the right."""
    ids_NT, place_M = padded(batch)
    count, longest = ids_NT.shape
    device = ids_NT.device
    masks = None
    if dropout is not None:
        row_M = torch.arange(count, device=device).repeat_interleave(longest)
        masks = dropout.masks(row_M, torch.arange(longest, device=device).repeat(count))
    with layers.routed(slots, masks, [longest] * count):
        logits_SV = logits_at(model, ids_NT, place_M[batch.select_S])
    if loss is None:
        return torch.nn.functional.cross_entropy(wide(logits_SV), batch.targets_S, reduction="none")
    return loss(wide(logits_SV), batch.targets_S, batch.row_M[batch.select_S])


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
        result = run_padded(model, ids_NT)
    finally:
        handle.remove()
    logits_SV: torch.Tensor = result.logits
    return logits_SV


def run_padded(model: Any, ids_NT: torch.Tensor) -> Any:
    """Return what a causal model of transformers, or the decoder in it, gives for rows that are padded at the right."""
    positions_1T = torch.arange(ids_NT.shape[1], device=ids_NT.device)[None]
    # No mask of padding: it stands at the right, where a causal model cannot see it. With one, a position whose
    # whole attention window is padding would have nothing to attend to and become NaN (Gemma 2).
    return model(input_ids=ids_NT, position_ids=positions_1T, use_cache=False)
