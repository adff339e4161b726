"""Pooled hidden states against transformers' own, one row at a time, and against PEFT."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from rounding import FLOAT64, assert_as_near
from tiny_models import ARCHITECTURES, END_TO_END, exact_base, random_adapter, tiny_base

from bellwether.errors import ModelError
from bellwether.model import decoder
from bellwether.model.features import by_tokens, pooled_states, state_numbers
from bellwether.model.lora import LoraLayers

LENGTHS = [5, 21, 1, 13, 21, 8]  # the windows of those that have one are eight tokens


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    return [draw.integers(3, 300, length) for length in LENGTHS]


def attached(base, dtype=torch.float64):
    """LoRA layers with a random adapter in slot 0 and none in slot 1."""
    adapter = random_adapter(base, dtype=str(dtype).removeprefix("torch."))
    layers = LoraLayers(base.model, adapter.config, slots=2, dtype=dtype)
    layers.load(0, adapter.tensors)
    return layers


def alone(model, rows, pooling):
    """All hidden states as transformers gives them for one row at a time, pooled and joined."""
    found = []
    for ids_T in rows:
        with torch.no_grad():
            states = model(input_ids=torch.from_numpy(ids_T)[None], output_hidden_states=True).hidden_states
        found.append(torch.cat([state[0, -1] if pooling == "last" else state[0].mean(0) for state in states]))
    return torch.stack(found)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pooled_states_are_those_that_transformers_gives_each_row_alone(architecture, pooling, rows):
    base = tiny_base(architecture)
    layers = attached(base)
    with layers.routed(None):
        wanted = alone(base.model, rows, pooling).numpy()
    features_NF = pooled_states(base, layers, rows, pooling=pooling, tokens=44)
    layers.detach()
    assert features_NF.dtype == np.float64
    assert features_NF.shape == (6, 3 * 24)
    np.testing.assert_allclose(features_NF, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_adapter_acts_as_in_peft(architecture, rows):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    base = tiny_base(architecture)
    layers = attached(base)
    features_NF = pooled_states(base, layers, rows, pooling="mean")
    adapter, config = layers.read(0), layers.config
    layers.detach()
    own = get_peft_model(
        tiny_base(architecture).model,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(config.target_modules),
            fan_in_fan_out=config.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
        autocast_adapter_dtype=False,
    )
    set_peft_model_state_dict(own, {key: torch.from_numpy(value) for key, value in adapter.items()})
    with_adapter = alone(own.eval(), rows, "mean").numpy()
    np.testing.assert_allclose(features_NF, with_adapter, rtol=0, atol=FLOAT64)
    with own.disable_adapter():
        assert np.abs(features_NF - alone(own, rows, "mean").numpy()).max() > 1e-2, "the adapter changes something"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_features_do_not_depend_on_batches_and_stand_in_the_order_of_rows(architecture, tokens, rows):
    base = tiny_base(architecture)
    layers = attached(base)
    features_NF = pooled_states(base, layers, rows, pooling="last", tokens=tokens)
    turned_NF = pooled_states(base, layers, rows[::-1], pooling="last", tokens=44)
    layers.detach()
    np.testing.assert_allclose(features_NF, turned_NF[::-1], rtol=0, atol=1e-12)
    assert np.abs(np.diff(features_NF[:, 24:], axis=0)).max(axis=1).min() > 1e-2, "rows differ"


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (-1, 0), (1, -3)])
def test_chosen_layers_stand_in_the_order_in_which_they_are_named(architecture, chosen, rows):
    base = tiny_base(architecture)
    layers = attached(base)
    whole_N3D = pooled_states(base, layers, rows, pooling="last").reshape(6, 3, 24)
    features_NF = pooled_states(base, layers, rows, pooling="last", chosen=chosen)
    layers.detach()
    np.testing.assert_array_equal(features_NF, whole_N3D[:, list(chosen)].reshape(6, -1))


def test_layers_beyond_the_last_wanted_one_do_not_run(rows):
    base = tiny_base("llama")
    layers = attached(base)
    base.model.model.layers[1].mlp.forward = lambda x: pytest.fail("the second layer ran")
    pooled_states(base, layers, rows, pooling="mean", chosen=[1])
    layers.detach()


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ([0, 5], "selection.layers names 5, but the model has the hidden states 0 (its embedding) to 4"),
        ([-6], "selection.layers names -6, but"),
        ([], "selection.layers is [], of the hidden states 0 to 4; name each that is wanted once"),
        ([4, -1], "selection.layers is [4, -1], of"),
    ],
)
def test_wrong_layers_are_refused_in_one_sentence(chosen, said):
    with pytest.raises(ModelError) as refused:
        state_numbers(4, chosen)
    assert str(refused.value).startswith(said)


def test_a_model_whose_layers_cannot_be_found_is_refused(rows):
    base = tiny_base("gpt2")
    layers = attached(base)
    base.model.transformer.add_module("more", torch.nn.ModuleList([torch.nn.Identity()] * 2))
    with pytest.raises(ModelError, match="^The layers of GPT2LMHeadModel cannot be found, so it gives no hidden"):
        pooled_states(base, layers, rows, pooling="last")
    layers.detach()


def test_batches_hold_as_many_rows_of_like_length_as_fit():
    assert list(by_tokens([3, 9, 4, 3, 30, 4], 12)) == [[4], [1], [2, 5, 0], [3]]
    assert list(by_tokens([], 12)) == []


def test_no_rows_give_no_features():
    base = tiny_base("llama")
    layers = attached(base)
    assert pooled_states(base, layers, [], pooling="last", chosen=[0, 1]).shape == (0, 48)
    layers.detach()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("architecture", [*END_TO_END, "gpt2"])
def test_in_bfloat16_features_are_float32_and_as_near_to_float64_as_those_of_transformers(architecture, pooling, rows):
    base = tiny_base(architecture, torch.bfloat16)
    layers = attached(base, torch.float32)
    few = pooled_states(base, layers, rows, pooling=pooling)
    with layers.routed(None):
        theirs = alone(base.model, rows, pooling)
    layers.detach()
    exact = exact_base(base)
    layers = attached(exact)
    wanted = pooled_states(exact, layers, rows, pooling=pooling)
    layers.detach()
    assert few.dtype == np.float32
    assert_as_near(few, theirs, wanted)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_hidden_states_go_when_they_are_pooled_and_the_output_layer_never_runs(
    architecture, pooling, rows, monkeypatch
):
    base = tiny_base(architecture)
    layers = attached(base)
    base.model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the output layer ran"))
    seen, alive = [], []

    def remember(module, args, output):
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(output))

    if architecture == "gpt2":
        for block in base.model.transformer.h:
            block.register_forward_hook(remember)
    else:
        given = decoder._layer
        monkeypatch.setattr(decoder, "_layer", lambda *all: (out := given(*all), remember(None, None, out))[0])
    pooled_states(base, layers, rows * 5, pooling=pooling, tokens=44)
    layers.detach()
    assert len(seen) == 20
    assert max(alive) == 1, "a layer's own input, and nothing of any other layer or batch"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_no_gradient_is_prepared_and_no_hook_stays(architecture, rows, monkeypatch):
    base = tiny_base(architecture)
    layers = attached(base)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pooled_states(base, layers, rows, pooling="last")
    layers.detach()
    assert not kept
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in base.model.modules())
