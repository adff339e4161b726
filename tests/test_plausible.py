"""Configurations that cannot be meant: refused at once, and by name, before a model is built or weights are read."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_folder

from bellwether.errors import ModelError
from bellwether.model.base import load_base, open_base
from bellwether.model.export import export
from bellwether.model.folder import quiet_transformers, stored_shapes, weight_files
from bellwether.model.proxy import load_proxy
from bellwether.recipe.recipe import Model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_folder("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def settings(path: Path) -> Model:
    return Model(path=str(path), device="cpu")


def change(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path) -> str:
    """Return the one sentence that every way to open a base says at once."""
    started, said = time.monotonic(), set()
    for opened in (open_base, load_base):
        with pytest.raises(ModelError) as caught:
            opened(settings(folder))
        said.add(str(caught.value))
    assert time.monotonic() - started < 5
    [text] = said
    assert text.isprintable()
    return text


HUGE = 10**12
LAYERS = "but a whole number from 0 to 1,000 is wanted; repair the model's folder."
SIZES = "but a whole number from 0 to 100,000,000 is wanted; repair the model's folder."
PARTS = "but a whole number from 0 to 10,000 is wanted; repair the model's folder."


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**9}, f"num_hidden_layers is 1000000000, {LAYERS}"),
        ({"num_hidden_layers": -1}, f"num_hidden_layers is -1, {LAYERS}"),
        ({"num_hidden_layers": "2"}, f"num_hidden_layers is '2', {LAYERS}"),
        ({"num_hidden_layers": 2.0}, f"num_hidden_layers is 2.0, {LAYERS}"),
        ({"num_hidden_layers": True}, f"num_hidden_layers is True, {LAYERS}"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000000"),
        ({"hidden_size": HUGE}, f"hidden_size is 1000000000000, {SIZES}"),
        ({"hidden_size": "x" * 1000}, f"hidden_size is '{'x' * 39}, {SIZES}"),
        ({"vocab_size": HUGE}, f"vocab_size is 1000000000000, {SIZES}"),
        ({"intermediate_size": -HUGE}, f"intermediate_size is -1000000000000, {SIZES}"),
        ({"head_dim": HUGE}, f"head_dim is 1000000000000, {SIZES}"),
        ({"num_attention_heads": HUGE}, f"num_attention_heads is 1000000000000, {SIZES}"),
        ({"num_key_value_heads": 1e12}, f"num_key_value_heads is 1000000000000.0, {SIZES}"),
        ({"max_position_embeddings": -1}, f"max_position_embeddings is -1, {SIZES}"),
        ({"text_config": {"deeper": [{"n_layer": HUGE}]}}, f"n_layer is 1000000000000, {LAYERS}"),
        ({"attention_types": [[["global", "local"], 10**9]]}, f"attention_types is 1000000000, {PARTS}"),
        ({"num_local_experts": 1e400}, f"num_local_experts is inf, {PARTS}"),
        # Numbers of a size that a model can have, but not this one.
        ({"num_hidden_layers": 999}, "is 999, but the weight files hold 21 tensors, less than one for each; give the"),
        (
            {"hidden_size": 100_000_000},
            "The weight lm_head.weight has another shape in {folder}/model.safetensors (300 by 24) than config.json "
            "asks for (300 by 100000000), and so have 20 more; give the config.json and the weights of one model.",
        ),
        ({"vocab_size": 100_000_000}, "(300 by 24) than config.json asks for (100000000 by 24), and so have 1 more"),
        ({"num_hidden_layers": None}, "config.json cannot be used: Validation error for field 'num_hidden_layers': Ty"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_number_that_cannot_be_meant_is_named_at_once(changes, says, folder):
    change(folder, **changes)
    assert says.replace("{folder}", str(folder)) in refused(folder)


def test_a_million_layers_are_refused_where_only_the_tokenizer_is_wanted(folder):
    change(folder, num_hidden_layers=1_000_000)
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000,"):
        open_base(settings(folder))


def reshape(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    """Store a weight in another shape."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_of_another_shape_is_named_with_both_shapes_file_and_remedy(folder):
    reshape(folder, "model.layers.1.mlp.up_proj.weight", (40, 25))
    assert refused(folder) == (
        f"The weight model.layers.1.mlp.up_proj.weight has another shape in {folder}/model.safetensors (40 by 25) than "
        "config.json asks for (40 by 24); give the config.json and the weights of one model."
    )


def test_of_shards_the_one_with_the_wrong_weight_is_named(folder):
    tensors = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(7)}
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": list(tensors)[:5], "model-2.safetensors": list(tensors)[5:]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    [where] = [name for name, keys in parts.items() if "model.norm.weight" in keys]
    assert f"The weight model.norm.weight has another shape in {folder / where} (7) than config.json" in refused(folder)


def test_export_names_a_weight_of_another_shape_too(folder, tmp_path):
    from tiny_models import random_adapter, tiny_base

    from bellwether.exchange.adapter import adapter_files

    (tmp_path / "adapter").mkdir()
    for name, content in adapter_files(random_adapter(tiny_base("llama"), dtype="float32")).items():
        (tmp_path / "adapter" / name).write_bytes(content)
    reshape(folder, "model.norm.weight", (5,))
    with pytest.raises(ModelError, match=r"The weight model\.norm\.weight has another shape in .*model\.safetensors"):
        export(tmp_path / "adapter", tmp_path / "out", str(folder))
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_another_shape_is_refused_before_its_weights_are_loaded(tmp_path):
    from test_model_proxy import encoder_folder

    folder = encoder_folder(tmp_path / "bert")
    change(folder, vocab_size=50_000_000)
    with pytest.raises(ModelError, match=r"The weight embeddings\.word_embeddings\.weight has another shape in "):
        load_proxy(settings(folder))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_stored_without_the_models_prefix_are_compared_and_loaded_too(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(architecture, tmp_path / "model")
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder)
        body = getattr(model, model.base_model_prefix)
        # As it is often stored for models whose output layer is the embedding (GPT-2).
        if model.config.tie_word_embeddings:
            body.save_pretrained(folder)
    assert load_base(settings(folder)).facts == open_base(settings(folder))
    name = next(name for name, (_, shape) in stored_shapes(folder).items() if len(shape) == 1)
    reshape(folder, name, (5,))
    assert f"The weight {name} has another shape" in refused(folder)


def test_tables_that_dwarf_the_weights_are_refused(tmp_path):
    import transformers
    from tiny_models import tiny_tokenizer

    config = transformers.GPTJConfig(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    with quiet_transformers():
        transformers.GPTJForCausalLM(config).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
    load_base(settings(tmp_path))
    change(tmp_path, n_positions=90_000_000)
    assert "config.json makes a model with 2.9 GB of tables beside 65.2 kB of weights; one of its" in refused(tmp_path)


# Models on the hub whose weights are not here ----------------------------------------------------


@pytest.fixture
def on_hub(folder, monkeypatch):
    """A hub model in shards of which only the small files are here, as a function that changes its configuration."""
    import huggingface_hub

    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-1.safetensors", "model.norm.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = [huggingface_hub.hf_api.RepoSibling(rfilename=f"model-{n}.safetensors", size=n * 1000) for n in (1, 2)]
    about = type("About", (), {"siblings": shards})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: about)
    return lambda **values: change(folder, **values)


HUB = Model(path="owner/name", device="cpu")


def test_a_hub_model_whose_shards_are_not_here_is_inspected(on_hub, llama):
    from dataclasses import replace

    facts = open_base(HUB)
    assert facts.weight_bytes == {"model-1.safetensors": 1000, "model-2.safetensors": 2000}
    here = open_base(settings(llama))
    assert facts == replace(here, name="owner/name", weight_bytes=facts.weight_bytes)


def test_a_hub_model_of_a_billion_layers_is_refused_without_its_weights(on_hub):
    on_hub(num_hidden_layers=10**9)
    with pytest.raises(ModelError, match=r"num_hidden_layers is 1000000000, but a whole number from 0 to 1,000"):
        open_base(HUB)


def test_a_folder_that_lacks_a_shard_is_no_hub_model(on_hub, folder):
    from bellwether.model.folder import find_folder

    with pytest.raises(ModelError, match=r"model-1\.safetensors is missing, though model\.safetensors\.index\.json"):
        weight_files(find_folder(settings(folder), weights=True), settings(folder))
