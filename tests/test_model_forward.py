"""Losses at chosen positions, end to end and as transformers has it, against full logits of each row alone."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_as_near
from tiny_models import ARCHITECTURES, END_TO_END, exact_base, padded, random_adapter, tiny_base

from bellwether.model import decoder
from bellwether.model.batch import Batch
from bellwether.model.dropout import Dropout
from bellwether.model.forward import logits_at, token_losses
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
    assert decoder.fits(base.model) == (architecture in END_TO_END)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 2 / 3,
    "original_max_position_embeddings": 10,  # the longest row is longer
    "short_factor": [1.0, 1.5],
    "long_factor": [3.0, 7.0],
}
# What a family may be told beside what its tiny model is.
VARIANTS = [
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3", {"attn_logit_softcapping": 2.0}),  # which transformers does not apply
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "attention_bias": True}),
    ("phi3", {"sliding_window": None, "tie_word_embeddings": True}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 10}),
]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("chosen", [CHOSEN, [[0], [], [6]], [list(range(10)), [0, 1, 2], list(range(7))]])
@pytest.mark.parametrize(("architecture", "changes"), [(name, {}) for name in END_TO_END] + VARIANTS)
def test_end_to_end_gives_the_losses_and_gradients_that_transformers_gives(
    architecture, changes, chosen, targets, monkeypatch
):
    base = tiny_base(architecture, **changes)
    batch = batch_of(LENGTHS, chosen)  # windows are of eight tokens at most
    fused = architecture == "phi3" and targets != "all-linear"
    found = {}
    for way in (True, False):
        monkeypatch.setattr(decoder, "fits", lambda model, way=way: way)
        layers = attached(base, slots=3, target_modules=["qkv_proj"] if fused else targets)
        losses_S = token_losses(base.model, layers, batch, [2, 0, 2])
        (losses_S * torch.arange(1, len(losses_S) + 1)).sum().backward()
        layers.detach()
        found[way] = losses_S.detach(), layers.grads_KP.clone()
    assert found[True][1].abs().max() > 1e-2
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-10, rtol=0)
    torch.testing.assert_close(found[True][1], found[False][1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_loss_of_ones_own_gets_the_logits_that_transformers_gives(architecture, monkeypatch):
    base = tiny_base(architecture)
    batch, layers, seen = batch_of(LENGTHS, CHOSEN), attached(base), {}
    for way in (True, False):
        monkeypatch.setattr(decoder, "fits", lambda model, way=way: way)
        token_losses(base.model, layers, batch, loss=lambda *given, way=way: seen.setdefault(way, given)[0].sum(1))
    layers.detach()
    for ours, theirs in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "end_to_end"), [(name, False) for name in ARCHITECTURES] + [(name, True) for name in END_TO_END]
)
def test_checkpointing_gives_the_same_gradients_and_keeps_less(architecture, end_to_end, monkeypatch):
    base = tiny_base(architecture)
    monkeypatch.setattr(decoder, "fits", lambda model: end_to_end)
    batch = batch_of(LENGTHS, CHOSEN)
    found, kept = {}, {}
    for again in (False, True):
        layers = attached(base, slots=3)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            losses_S = token_losses(
                base.model, layers, batch, [2, 0, 2], Dropout(0.2, torch.arange(3)), checkpointing=again
            )
        losses_S.square().sum().backward()
        layers.detach()
        found[again], kept[again] = layers.grads_KP.clone(), sum(sizes)
    assert found[True].abs().max() > 1e-2
    torch.testing.assert_close(found[True], found[False], atol=1e-12, rtol=1e-12)
    assert kept[True] < 0.6 * kept[False]


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ("SmolLM3Config", {}),
        ("GraniteConfig", {}),
        ("HeliumConfig", {"head_dim": 6}),
        ("LlamaConfig", {"hidden_act": "gelu"}),
        ("LlamaConfig", {"attn_implementation": "eager"}),
        ("LlamaConfig", {"is_causal": False}),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}),
        ("Gemma2Config", {"use_bidirectional_attention": True}),
        ("Gemma3TextConfig", {"hidden_activation": "gelu"}),
    ],
)
def test_models_with_the_same_parts_put_together_otherwise_run_as_transformers_has_them(config, change):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings = getattr(transformers, config)(**sizes, **heads, **change)
    assert not decoder.fits(transformers.AutoModelForCausalLM.from_config(settings).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", END_TO_END)
def test_in_fewer_bits_end_to_end_is_as_near_to_float64_as_transformers(architecture, dtype, monkeypatch):
    base = tiny_base(architecture, dtype)
    batch = batch_of(LENGTHS * 10, [list(range(length - 1)) for length in LENGTHS] * 10)
    adapter = random_adapter(base, dtype="float32")

    def losses_and_gradients(model, way, dtype=torch.float32):
        monkeypatch.setattr(decoder, "fits", lambda model: way)
        layers = LoraLayers(model, adapter.config, dtype=dtype)
        layers.load(0, adapter.tensors)
        losses_S = token_losses(model, layers, batch)
        losses_S.sum().backward()
        layers.detach()
        return losses_S.detach(), layers.grads_KP.clone()

    ours, theirs = (losses_and_gradients(base.model, way) for way in (True, False))
    exact = losses_and_gradients(exact_base(base).model, False, torch.float64)
    for found in zip(ours, theirs, exact, strict=True):
        assert_as_near(*found)


def test_the_last_layers_feed_forward_runs_at_chosen_positions_only():
    base = tiny_base("llama")
    layers = attached(base)
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
