"""Bases in 4 and 8 bits against NF4 as its paper makes it, against PEFT, and as part of runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import train as ask
from rounding import assert_as_near, gamma
from safetensors.torch import load_file, save_file
from test_model_training import token_rows
from tiny_models import ARCHITECTURES, in_float64, padded, random_adapter, tiny_config, tiny_folder, tiny_tokenizer

from bellwether.errors import ModelError
from bellwether.exchange.adapter import adapter_files
from bellwether.model.base import load_base, open_base, weights_fingerprint
from bellwether.model.export import export
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.model.quantized import weight_bytes
from bellwether.recipe import recipe
from bellwether.recipe.file import dump_recipe

pytest.importorskip("bitsandbytes")


def settings(folder: Path, quantization: str = "none", **more) -> recipe.Model:
    return recipe.Model(path=str(folder), device="cpu", quantization=quantization, **more)


def logits(model) -> torch.Tensor:
    ids_NT, attention_NT = padded([9, 6])
    with torch.no_grad():
        return model(input_ids=ids_NT, attention_mask=attention_NT).logits[:, :6].double()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the second."""
    return float((one - other).pow(2).mean().sqrt() / other.pow(2).mean().sqrt())


def wide_folder(architecture: str, folder: Path) -> Path:
    """A tiny model whose layers have multiples of 64 inputs, as those of real models have."""
    from transformers import AutoModelForCausalLM

    from bellwether.model.folder import quiet_transformers

    config = tiny_config(architecture)
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "ffn_dim": 128, "word_embed_proj_dim": 64}
    for name, value in wide.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    draw = torch.Generator().manual_seed(7)
    with quiet_transformers(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return wide_folder("llama", tmp_path_factory.mktemp("models") / "llama")


# What is loaded -----------------------------------------------------------------------------------


def normal_float_4() -> torch.Tensor:
    """The sixteen levels of NF4: quantiles of the normal distribution, made as QLoRA's released code makes them."""
    from scipy.stats import norm

    positive = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0.0, *negative])
    return torch.tensor(levels / levels.max(), dtype=torch.float32)


def rounded_to_nf4(weight_OI: torch.Tensor) -> torch.Tensor:
    """Weights rounded to the nearest level, in blocks of 64 with their largest size as scale, not quantised itself."""
    levels = normal_float_4()
    flat = weight_OI.reshape(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = levels[((flat / scale)[..., None] - levels).abs().argmin(-1)] * scale
    return nearest.view(weight_OI.shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_bits_are_nf4_in_every_linear_layer_but_the_output(architecture, tmp_path):
    folder = wide_folder(architecture, tmp_path / "m")
    base, rounded = load_base(settings(folder, "4bit")), load_base(settings(folder))
    untouched = logits(rounded.model)
    for shape in rounded.facts.linears:
        weight = rounded.model.get_submodule(shape.path).weight
        weight.copy_(rounded_to_nf4(weight.T).T if shape.transposed else rounded_to_nf4(weight))
    # The scales are quantised too (double quantisation), which moves them by about half a percent.
    assert apart(logits(base.model), logits(rounded.model)) < 0.03
    assert apart(logits(base.model), untouched) > 0.1
    assert type(base.model.get_output_embeddings()) is torch.nn.Linear
    assert base.facts == rounded.facts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eight_bits_are_near_float_in_every_linear_layer_but_the_output(architecture, tmp_path):
    folder = wide_folder(architecture, tmp_path / "m")
    base, plain = load_base(settings(folder, "8bit")), load_base(settings(folder))
    assert 1e-3 < apart(logits(base.model), logits(plain.model)) < 0.05
    for shape in base.facts.linears:
        weight = base.model.get_submodule(shape.path).weight
        assert (weight.dtype, tuple(weight.shape)) == (torch.int8, (shape.outputs, shape.inputs))
    assert type(base.model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_fingerprint_is_that_of_the_stored_bits_and_using_the_base_leaves_it_alone(quantization, llama):
    base, again = load_base(settings(llama, quantization)), load_base(settings(llama, quantization))
    assert base.fingerprint == again.fingerprint
    assert len({base.fingerprint, load_base(settings(llama)).fingerprint}) == 2
    logits(base.model)
    x_NTD = torch.randn(2, 5, 64, requires_grad=True)
    base.model(inputs_embeds=x_NTD).logits.sum().backward()
    assert x_NTD.grad.abs().sum() > 0
    assert weights_fingerprint(base.model) == base.fingerprint
    module = again.model.get_submodule(again.facts.linears[0].path)
    module.weight.data.view(-1)[3] ^= 1
    assert weights_fingerprint(again.model) != base.fingerprint


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_planned_bytes_are_those_that_the_loaded_base_holds(quantization, llama):
    base = load_base(settings(llama, quantization))
    tables = ("quant_map", "quant_state.bitsandbytes__nf4")  # of a fixed size per layer
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in base.model.state_dict().items()
        if not name.endswith(tables)
    )
    largest = 4 * 64 * 128
    assert weight_bytes(base.facts, 4, quantization) - largest == pytest.approx(stored, rel=1e-3)


# Adapters over it ---------------------------------------------------------------------------------


def in_float64_of(base, folder: Path):
    """The weights that a quantised base stands for, in a base that computes in float64."""
    from bitsandbytes.functional import dequantize_4bit

    exact, stored = load_base(settings(folder)), base.model.state_dict()
    for shape in base.facts.linears:
        weight = base.model.get_submodule(shape.path).weight
        if weight.dtype == torch.int8:
            value_OI = weight.double() * stored[f"{shape.path}.SCB"][:, None].double() / 127
        else:
            value_OI = dequantize_4bit(weight.data, weight.quant_state)
        exact.model.get_submodule(shape.path).weight.copy_(value_OI.T if shape.transposed else value_OI)
    return dataclasses.replace(exact, model=in_float64(exact.model))


def assert_near(found: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, quantization: str) -> None:
    """Assert that two ways over a quantised base agree, given what its weights make of inputs in float64.

    In four bits weights alone are rounded, and both ways are near to the exact one. In eight, inputs are rounded too,
    up or down as last bits have it: two ways whose roundings had nothing in common would be apart by the square root of
    two times as much as each of them is from the exact one.
    """
    if quantization == "4bit":
        assert_as_near(found, reference, exact)
    else:
        assert apart(found, reference) < 1.5 * apart(reference, exact) < 0.5


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_adds_what_it_adds_with_peft(architecture, quantization, tmp_path):
    from peft import PeftModel

    folder = wide_folder(architecture, tmp_path / "m")
    base = load_base(settings(folder, quantization))
    adapter = random_adapter(base, dtype="float32")
    (tmp_path / "adapter").mkdir()
    for name, content in adapter_files(adapter).items():
        (tmp_path / "adapter" / name).write_bytes(content)
    bare = logits(base.model)
    found = {}
    for kind, dtype in ((base, torch.float32), (in_float64_of(base, folder), torch.float64)):
        layers = LoraLayers(kind.model, adapter.config, dtype=dtype)
        layers.load(0, adapter.tensors)
        found[dtype] = logits(kind.model)
        layers.detach()
    ours, exact = found[torch.float32], found[torch.float64]
    theirs = logits(PeftModel.from_pretrained(load_base(settings(folder, quantization)).model, tmp_path / "adapter"))
    assert_near(ours, theirs, exact, quantization)
    assert apart(ours, bare) > 0.05


def train(base, slots: int, epochs: int = 4, dtype: torch.dtype = torch.float32):
    """Train three clients for some epochs; return the adapter they start from, and their replies."""
    lora = recipe.Lora(rank=4, dropout=0.1)
    adapter = initial_adapter(base, lora, torch.Generator().manual_seed(0))
    layers = LoraLayers(base.model, adapter.config, slots, dtype)
    rows = token_rows(24)
    cohort = {"a": rows[:12], "b": rows[12:15], "c": rows[15:]}
    training = recipe.Training(local_epochs=epochs, batch_size=4, learning_rate=5e-3, schedule="constant")
    replies = ask(base, layers, cohort, adapter, training, 100)
    layers.detach()
    return adapter, {reply.client: reply for reply in replies}


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_clients_learn_over_it_and_together_they_stay_near_one_by_one(quantization, llama):
    base = load_base(settings(llama, quantization))
    start, alone = train(base, 1)
    _, together = train(base, 3)
    _, exact = train(in_float64_of(base, llama), 1, dtype=torch.float64)

    def change(reply) -> torch.Tensor:
        values = [torch.from_numpy(value - start.tensors[key]) for key, value in reply.update.tensors.items()]
        assert all(value.abs().max() > 1e-3 for value in values)
        return torch.cat([value.flatten() for value in values])

    for client in alone:
        assert_near(*(change(replies[client]) for replies in (together, alone, exact)), quantization)
    by_step = [[loss for reply in replies.values() for loss in reply.losses] for replies in (together, alone, exact)]
    losses = torch.tensor(by_step, dtype=torch.float64)
    if quantization == "4bit":
        # In each of two layers seven sums over 64 or 128 inputs and some over positions, then the loss and its sums.
        torch.testing.assert_close(losses[0], losses[1], rtol=gamma(torch.float32, 2 * 7 * 96 + 500), atol=0)
    else:
        assert_near(*losses, quantization)
    # The mean loss over all steps falls as training goes on.
    longer = train(base, 1, epochs=12)[1]["a"].update.metrics["loss"]
    assert longer < 0.9 * alone["a"].update.metrics["loss"]
    assert weights_fingerprint(base.model) == base.fingerprint


# In a run -----------------------------------------------------------------------------------------


def test_a_run_over_four_bits_has_an_adapter_that_merges_into_the_float_weights(
    bellwether, tiny_recipe, llama, tmp_path
):
    fields = [f"model.path={llama}", "model.quantization=4bit"]
    outcome = bellwether("run", tiny_recipe, *fields, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert not outcome.err
    export(tmp_path / "run", tmp_path / "merged")
    export(tmp_path / "run" / "adapter", tmp_path / "plain")
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    assert merged.keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) and value.is_floating_point() for key, value in merged.items())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization: 4bit" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_the_recipe_takes_three_kinds_only():
    assert "quantization: 8bit" in dump_recipe(recipe.Recipe(model=recipe.Model(quantization="8bit")))
    with pytest.raises(ValueError, match="quantization"):
        recipe.Model(quantization="2bit")


def test_without_bitsandbytes_and_on_mps_it_is_refused_before_anything_is_loaded(llama, monkeypatch):
    from bellwether.model import quantized

    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    for use in (open_base, load_base):
        with pytest.raises(ModelError, match=r"4bit, for which bitsandbytes is not installed.*\[quant\]"):
            use(settings(llama, "4bit"))
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ModelError, match="8bit, which is not done on mps; set model.device to cpu"):
        open_base(recipe.Model(path=str(llama), device="mps", quantization="8bit"))


def test_layers_that_the_cpu_kernel_computes_wrongly_are_refused(tmp_path):
    folder = tiny_folder("llama", tmp_path / "m")
    for use in (open_base, load_base):
        with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj has 24 inputs, .* multiple of 64"):
            use(settings(folder, "4bit"))


def test_weights_that_are_not_finite_are_refused_though_few_bits_would_hide_them(tmp_path):
    folder = wide_folder("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight .* NaN"):
        load_base(settings(folder, "4bit"))
