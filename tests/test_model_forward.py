"""Losses at chosen positions, end to end and as transformers has it, against full logits of each row alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, END_TO_END, padded, random_adapter, tiny_base

from bellwether.model import decoder, forward
from bellwether.model.forward import Batch, logits_at, runs_end_to_end, token_losses
from bellwether.model.lora import LoraLayers

LENGTHS = [11, 4, 8]
CHOSEN = [[2, 5, 9], [2], [3, 4, 5, 6]]


def batch_of(lengths, chosen, seed=0):
    """Rows end to end, with the numbers of the positions whose next token counts."""
    ids_NT, attention_NT = padded(lengths, seed)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    numbers = [int(start) + t for start, row in zip(starts, chosen, strict=True) for t in row]
    select_S = torch.tensor(numbers, dtype=torch.int64)
    ids_M = ids_NT[attention_NT.bool()]
    return Batch(
        lengths=lengths,
        ids_M=ids_M,
        position_M=torch.cat([torch.arange(length) for length in lengths]),
        row_M=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        select_S=select_S,
        targets_S=ids_M[select_S + 1],
    )


def attached(base, slots=1, **lora):
    """LoRA layers with a random adapter in the last slot."""
    adapter = random_adapter(base, **lora)
    layers = LoraLayers(base.model, adapter.config, slots=slots, dtype=torch.float64)
    layers.load(slots - 1, adapter.tensors)
    return layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_equal_those_of_each_rows_full_logits(architecture):
    base = tiny_base(architecture)
    layers = attached(base, slots=2)
    batch = batch_of(LENGTHS, CHOSEN)
    slots = [1, 0, 1]
    wanted = []
    for row, (ids, slot) in enumerate(zip(batch.ids_M.split(LENGTHS), slots, strict=True)):
        with layers.routed([slot]):
            logits_TV = base.model(input_ids=ids[None]).logits[0]
        wanted += [torch.logsumexp(logits_TV[t], 0) - logits_TV[t, ids[t + 1]] for t in CHOSEN[row]]
    losses_S = token_losses(base.model, layers, batch, slots)
    layers.detach()
    assert losses_S.dtype == torch.float64
    torch.testing.assert_close(losses_S, torch.stack(wanted), atol=1e-10, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_own_decoder_runs_those_models_it_is_built_for(architecture):
    base = tiny_base(architecture)
    layers = attached(base)
    assert runs_end_to_end(base.model, layers) == (architecture in (*END_TO_END, "mistral"))
    layers.detach()


def test_rows_longer_than_the_window_run_as_transformers_has_it():
    base = tiny_base("mistral")  # with a window of eight tokens
    layers = attached(base)
    fitting, longer = batch_of([8, 5], [[6], [2, 3]]), batch_of([9, 5], [[6], [2, 3]])
    assert runs_end_to_end(base.model, layers, fitting)
    assert not runs_end_to_end(base.model, layers, longer)
    layers.detach()


@pytest.mark.parametrize("chosen", [CHOSEN, [[0], [], [6]], [list(range(10)), [0, 1, 2], list(range(7))]])
@pytest.mark.parametrize("architecture", [*END_TO_END, "mistral"])
def test_end_to_end_gives_the_losses_and_gradients_that_transformers_gives(architecture, chosen, monkeypatch):
    base = tiny_base(architecture)
    base.model.config.sliding_window = None
    batch = batch_of(LENGTHS, chosen)
    found = {}
    for way in (True, False):
        monkeypatch.setattr(forward, "runs_end_to_end", lambda *given, way=way: way)
        layers = attached(base, slots=3)
        losses_S = token_losses(base.model, layers, batch, [2, 0, 2])
        (losses_S * torch.arange(1, len(losses_S) + 1)).sum().backward()
        layers.detach()
        found[way] = losses_S.detach(), layers.grads_KP.clone()
    assert found[True][1].abs().max() > 1e-2
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-10, rtol=0)
    torch.testing.assert_close(found[True][1], found[False][1], atol=1e-10, rtol=1e-10)


def test_a_model_with_the_same_parts_put_together_otherwise_is_noticed(monkeypatch):
    base = tiny_base("llama")
    for layer in base.model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()  # the parts have their usual names
    everywhere = attached(base)
    assert runs_end_to_end(base.model, everywhere)  # adapted modules are called one by one, and so is the activation
    everywhere.detach()
    layers = attached(base, target_modules=("q_proj", "v_proj"))
    batch = batch_of(LENGTHS, CHOSEN)
    assert decoder.fits(base.model)
    assert not runs_end_to_end(base.model, layers)
    losses_S = token_losses(base.model, layers, batch)
    monkeypatch.setattr(forward, "runs_end_to_end", lambda *given: False)
    assert torch.equal(losses_S, token_losses(base.model, layers, batch))
    layers.detach()


def test_the_last_layers_feed_forward_runs_at_chosen_positions_only():
    base = tiny_base("llama")
    layers = attached(base)
    assert runs_end_to_end(base.model, layers)
    seen = []
    for layer in base.model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    token_losses(base.model, layers, batch_of(LENGTHS, CHOSEN))
    layers.detach()
    assert seen == [23, 8]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_output_layer_runs_at_chosen_positions_only(architecture):
    base = tiny_base(architecture)
    ids_NT, _ = padded([9, 9])
    seen = []
    handle = base.model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(out.shape))
    logits_at(base.model, ids_NT, torch.tensor([7, 16]))
    handle.remove()
    assert seen == [(2, 300)]
    # The choice ends with the call.
    assert base.model(input_ids=ids_NT).logits.shape == (2, 9, 300)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_are_in_float32_at_least_and_may_be_none(architecture):
    base = tiny_base(architecture, torch.bfloat16)
    adapter = random_adapter(base, dtype="float32")
    layers = LoraLayers(base.model, adapter.config)
    layers.load(0, adapter.tensors)
    losses_S = token_losses(base.model, layers, batch_of(LENGTHS, CHOSEN))
    assert losses_S.dtype == torch.float32
    assert token_losses(base.model, layers, batch_of([4, 3], [[], []])).tolist() == []
    layers.detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_beyond_an_attention_window_leaves_gradients_finite(architecture):
    base = tiny_base(architecture)
    layers = attached(base)
    batch = batch_of([40, 3], [[30], [1]])  # the window of those that have one is eight tokens
    token_losses(base.model, layers, batch).sum().backward()
    layers.detach()
    assert torch.isfinite(layers.grads_KP).all()
    assert layers.grads_KP.abs().max() > 0
