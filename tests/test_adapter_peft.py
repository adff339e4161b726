"""Adapters that PEFT itself wrote: plain ones to the same logits, and everything else refused by its name."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import in_float64, padded, tiny_base, tiny_model

from bellwether.errors import ModelError
from bellwether.exchange.adapter import _BESIDE, _READ, CONFIG_FILE, read_adapter
from bellwether.model.lora import LoraLayers

PLAIN = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


def wrapped(**changes: Any) -> Any:
    """Return the tiny Llama under PEFT, in evaluation mode, with every trained number moved away from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**PLAIN | changes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    ids_NT, attention_NT = padded([7, 4])
    with torch.no_grad():
        return model(input_ids=ids_NT, attention_mask=attention_NT).logits


def our_logits(folder: Path) -> torch.Tensor:
    """Return the logits of the tiny Llama under an adapter as it is read here."""
    base, adapter = tiny_base("llama"), read_adapter(folder)
    layers = LoraLayers(base.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    try:
        return logits(base.model)
    finally:
        layers.detach()


def change(folder: Path, **values: Any) -> Path:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_adapter(folder)
    text = str(caught.value)
    assert text.startswith(f"The adapter in {folder} cannot be read: ")
    assert text.isprintable()
    return text.removeprefix(f"The adapter in {folder} cannot be read: ")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A plain adapter of PEFT's, to be spoilt."""
    wrapped().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.9},
        {"task_type": None},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.1\..*_proj"},
        {"target_modules": ["up_proj", "self_attn.k_proj", "model.layers.0.mlp.down_proj"]},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": r".*\.0\..*"},
    ],
    ids=str,
)
def test_a_plain_adapter_of_pefts_gives_its_logits(changes, tmp_path):
    model = wrapped(**changes)
    model.save_pretrained(tmp_path)
    expected = logits(in_float64(model.base_model.model))
    assert (expected - logits(tiny_model("llama"))).abs().max() > 0.05
    torch.testing.assert_close(our_logits(tmp_path), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "adapter_config.json sets 'use_dora' to True; only those can be used."),
        ({"lora_bias": True}, "adapter_config.json sets 'lora_bias' to True;"),
        ({"bias": "lora_only"}, "bias in adapter_config.json is 'lora_only';"),
        ({"rank_pattern": {"v_proj": 4}}, "sets 'rank_pattern' to {'v_proj': 4};"),
        ({"alpha_pattern": {"v_proj": 4}}, "sets 'alpha_pattern' to {'v_proj': 4};"),
        ({"modules_to_save": ["lm_head"]}, "sets 'modules_to_save' to ['lm_head'];"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "sets 'layer_replication' to [[0, 2], [1, 2]];"),
        ({"trainable_token_indices": [1, 2]}, "sets 'trainable_token_indices' to [1, 2];"),
        ({"alora_invocation_tokens": [5]}, "sets 'alora_invocation_tokens' to [5];"),
        ({"target_modules": ["embed_tokens"]}, "its tensors are not pairs of A and B;"),
        # These take from the base what they put into A and B, so that the base on disk is another.
        ({"init_lora_weights": "pissa"}, "init_lora_weights in adapter_config.json is 'pissa';"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights in adapter_config.json is 'pissa_niter_4';"),
        ({"init_lora_weights": "olora"}, "init_lora_weights in adapter_config.json is 'olora';"),
    ],
    ids=str,
)
def test_what_peft_computes_otherwise_than_plain_lora_is_refused_by_its_name(changes, says, tmp_path):
    wrapped(**changes).save_pretrained(tmp_path)
    text = refused(tmp_path)
    assert text.startswith("it is not a plain LoRA adapter, since ")
    assert says in text


def test_an_adapter_whose_base_peft_would_change_first_has_other_logits_there(tmp_path):
    # Why PiSSA's are refused: with the base as it is on disk, its A and B compute something else.
    model = wrapped(init_lora_weights="pissa")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        our_logits(tmp_path)
    change(tmp_path, init_lora_weights=True)
    assert (our_logits(tmp_path) - logits(model)).abs().max() > 0.05


def test_every_setting_of_pefts_is_known_and_whatever_else_is_set_is_refused(folder):
    stored = json.loads((folder / CONFIG_FILE).read_text())
    unread = sorted((FIELDS | {"a_setting_to_come"}) - _READ - _BESIDE)
    assert {"use_dora", "use_qalora", "layer_replication", "target_parameters", "lora_bias"} < set(unread)
    for name in unread:
        assert not stored.get(name), "what PEFT writes of itself into a plain adapter is no reason to refuse it"
        for value in (True, "x", [1], {"a": 1}, 7):
            change(folder, **{name: value})
            assert f"adapter_config.json sets {name!r} to {value!r};" in refused(folder)
        for value in (None, False, "", [], {}):
            read_adapter(change(folder, **{name: value}))


def test_settings_of_how_an_adapter_was_begun_do_not_matter(folder):
    expected = our_logits(folder)
    for name in sorted(_BESIDE):
        change(folder, **{name: {"a": 1}})
    assert torch.equal(our_logits(folder), expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_rslora": "false"}, "use_rslora in adapter_config.json is 'false', but true or false is wanted."),
        ({"use_rslora": 1}, "use_rslora in adapter_config.json is 1, but true or false is wanted."),
        ({"fan_in_fan_out": "true"}, "fan_in_fan_out in adapter_config.json is 'true', but true or false is wanted."),
        ({"peft_type": "LOHA"}, "peft_type in adapter_config.json is 'LOHA'"),
        ({"peft_type": ["LORA"]}, "peft_type in adapter_config.json is ['LORA']"),
        ({"task_type": "SEQ_CLS"}, "task_type in adapter_config.json is 'SEQ_CLS'"),
        ({"task_type": True}, "task_type in adapter_config.json is True"),
        ({"bias": "all"}, "bias in adapter_config.json is 'all'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights in adapter_config.json is 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights in adapter_config.json is 'loftq'"),
        ({"init_lora_weights": 1}, "init_lora_weights in adapter_config.json is 1"),
        ({"use_qalora": True}, "adapter_config.json sets 'use_qalora' to True"),
        ({"lora_dropout": 5}, "lora_dropout in adapter_config.json is 5, but a probability below 1 is wanted."),
        ({"lora_dropout": 1.0}, "lora_dropout in adapter_config.json is 1, but a probability below 1 is wanted."),
        ({"lora_dropout": -0.1}, "lora_dropout in adapter_config.json is -0.1, but a probability below 1 is wanted."),
        ({"lora_dropout": True}, "lora_dropout in adapter_config.json is True, but a finite number is wanted."),
        ({"r": 2.0}, "r in adapter_config.json is 2.0, but a whole number is wanted."),
        ({"r": 0}, "are not of rank 0, which"),
        ({"r": -2}, "are not of rank -2, which"),
        ({"lora_alpha": math.inf}, "lora_alpha in adapter_config.json is inf, but a finite number is wanted."),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path in adapter_config.json is 5, but text is wanted."),
        ({"target_modules": 5}, "target_modules in adapter_config.json is 5, but names of modules are wanted."),
        (
            {"target_modules": ["q_proj", "proj"]},
            "it holds tensors for model.layers.0.self_attn.v_proj, which target_modules in adapter_config.json leaves",
        ),
        (
            {"exclude_modules": ["layers.1.self_attn.v_proj"]},
            "it holds tensors for model.layers.1.self_attn.v_proj, which exclude_modules in adapter_config.json leaves",
        ),
        (
            {"layers_to_transform": [1]},
            "it holds tensors for model.layers.0.self_attn.q_proj, which layers_to_transform in adapter_config.json",
        ),
        ({"layers_to_transform": 1}, "it holds tensors for model.layers.0.self_attn.q_proj, which layers_to_transform"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform in adapter_config.json is ['0'], but whole numbers are"),
        ({"layers_to_transform": True}, "layers_to_transform in adapter_config.json is True, but whole numbers are"),
    ],
    ids=str,
)
def test_a_setting_of_a_wrong_type_or_value_is_refused_by_its_name(changes, says, folder):
    assert says in refused(change(folder, **changes))
