"""Logits at chosen positions against full logits."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, padded, random_adapter, tiny_base

from bellwether.model.forward import logits_at, token_losses
from bellwether.model.lora import LoraLayers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chosen_logits_equal_those_of_each_row_alone(architecture):
    base = tiny_base(architecture)
    lengths = [11, 4, 8]
    ids_NT, attention_NT = padded(lengths)
    select_NT = torch.zeros_like(ids_NT, dtype=torch.bool)
    select_NT[0, [2, 5, 10]], select_NT[1, 3], select_NT[2, 4:8] = True, True, True
    chosen = logits_at(base.model, ids_NT, select_NT)
    alone = [base.model(input_ids=ids_NT[n : n + 1, :length]).logits[0] for n, length in enumerate(lengths)]
    wanted = torch.cat([logits[select_NT[n, : lengths[n]]] for n, logits in enumerate(alone)])
    assert chosen.shape == (8, 300)
    torch.testing.assert_close(chosen, wanted, atol=1e-10, rtol=0)
    # The choice ends with the call.
    full = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    assert full.shape == (3, 11, 300)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_output_layer_runs_at_chosen_positions_only(architecture):
    base = tiny_base(architecture)
    ids_NT, _ = padded([9, 9])
    select_NT = torch.zeros_like(ids_NT, dtype=torch.bool)
    select_NT[:, 7] = True
    seen = []
    handle = base.model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    logits_at(base.model, ids_NT, select_NT)
    handle.remove()
    assert seen == [(2, 300)]


def test_losses_are_the_cross_entropies_in_float32_at_least():
    logits_SV = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets_S = torch.arange(7)
    by_hand = [torch.logsumexp(row, 0) - row[target] for row, target in zip(logits_SV, targets_S, strict=True)]
    losses_S = token_losses(logits_SV, targets_S)
    assert losses_S.dtype == torch.float64
    torch.testing.assert_close(losses_S, torch.stack(by_hand), atol=1e-12, rtol=0)
    assert token_losses(logits_SV.bfloat16(), targets_S).dtype == torch.float32
    assert token_losses(logits_SV[:0], targets_S[:0]).tolist() == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_beyond_an_attention_window_leaves_gradients_finite(architecture):
    base = tiny_base(architecture)
    ids_NT, _ = padded([40, 3])  # the window of those that have one is eight tokens
    select_NT = torch.zeros_like(ids_NT, dtype=torch.bool)
    select_NT[0, 30], select_NT[1, 1] = True, True
    layers = LoraLayers(base.model, random_adapter(base).config, dtype=torch.float64)
    layers.load(0, random_adapter(base).tensors)
    logits_at(base.model, ids_NT, select_NT).sum().backward()
    layers.detach()
    assert torch.isfinite(layers.grads_KP).all()
    assert layers.grads_KP.abs().max() > 0
