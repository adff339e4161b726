"""Base models: what is known without weights, loading, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_folder, tiny_tokenizer

from bellwether.errors import ModelError
from bellwether.model.base import load_base, open_base, weights_fingerprint
from bellwether.model.loading import pick_device, settle_attention
from bellwether.recipe.recipe import Model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_folder("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def settings(path: Path, **more) -> Model:
    return Model(path=str(path), device="cpu", **more)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_facts_without_weights_are_those_of_the_loaded_model(architecture, tmp_path):
    folder = tiny_folder(architecture, tmp_path / "m")
    facts = open_base(settings(folder)).facts
    base = load_base(settings(folder))
    assert facts == base.facts
    assert facts.architecture == type(base.model).__name__
    assert facts.parameters == sum(parameter.numel() for parameter in base.model.parameters())
    assert (facts.hidden_size, facts.layers, facts.vocabulary, facts.max_positions) == (24, 2, 300, 96)
    assert facts.weight_bytes == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    for shape in facts.linears:
        weight = base.model.get_submodule(shape.path).weight
        assert tuple(weight.shape) == (
            (shape.inputs, shape.outputs) if shape.transposed else (shape.outputs, shape.inputs)
        )
    assert base.model.get_submodule(facts.output_layer.path) is base.model.get_output_embeddings()


def test_a_loaded_base_is_frozen_and_holds_the_files_weights(llama):
    base = load_base(settings(llama))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    stored = load_file(llama / "model.safetensors")
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, stored[name])
    assert load_base(settings(llama, dtype="bfloat16")).model.dtype == torch.bfloat16
    assert base.name == str(llama.resolve())


def test_loading_leaves_global_randomness_and_threads_alone_unless_told(llama):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    load_base(settings(llama))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    try:
        load_base(settings(llama, threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_inspecting_reads_no_weights(folder):
    """Bytes behind the header may be anything as long as their number is right."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100:] = os.urandom(100)
    path.write_bytes(content)
    path.chmod(0o644)
    assert open_base(settings(folder)).facts.parameters > 0


def test_fingerprint_sees_every_weight_and_is_the_same_again(llama):
    first, second = load_base(settings(llama)), load_base(settings(llama))
    assert first.fingerprint == second.fingerprint
    for parameter in second.model.parameters():
        value = parameter.view(-1)[-1].item()
        parameter.view(-1)[-1] += 1e-6 + abs(value) * 1e-3
        assert weights_fingerprint(second.model) != first.fingerprint
        parameter.view(-1)[-1] = value
    assert weights_fingerprint(second.model) == first.fingerprint


def test_shards_are_read_and_a_missing_one_is_noticed(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for part, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / part, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = load_base(settings(folder)).fingerprint
    (folder / "model.safetensors").unlink()
    assert load_base(settings(folder)).fingerprint == whole
    assert set(open_base(settings(folder)).facts.weight_bytes) == set(parts)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-2\.safetensors is missing"):
        open_base(settings(folder))


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{\n"model_type": llama}')


def list_config(folder):
    (folder / "config.json").write_text("[]")


def unknown_architecture(folder):
    change(folder / "config.json", model_type="perceptron")


def own_code(folder):
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})


def encoder(folder):
    change(folder / "config.json", model_type="t5")


def wrong_size(folder):
    change(folder / "config.json", hidden_size=-4)


def quantised(folder):
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def header_cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')


def large_tokenizer(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"new{number}" for number in range(20)])
    tokenizer.save_pretrained(folder)


def no_end(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def large_number(folder):
    (folder / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}")


def deep_config(folder):
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000)


def list_architecture(folder):
    change(folder / "config.json", model_type=[])


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text("{}")


def new_header(folder, text):
    """Put another header before the weights."""
    raw = (folder / "model.safetensors").read_bytes()
    values = raw[8 + int.from_bytes(raw[:8], "little") :]
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + values)


def deep_header(folder):
    new_header(folder, '{"a": ' + "[" * 100_000)


def list_header(folder):
    new_header(folder, "[1]")


def header_of_endless_sizes(folder):
    new_header(folder, '{"a": {"data_offsets": [0, ' + "9" * 4300 + "]}}")


def header_with_a_name_twice(folder):
    raw = (folder / "model.safetensors").read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode().rstrip()
    entry = json.dumps(json.loads(text)["model.norm.weight"])
    new_header(folder, text[:-1] + f', "model.norm.weight": {entry}}}')


def huge_header(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # without taking room on the disk


BEFORE_LOADING = [
    (large_number, r"config\.json: the file cannot be read \(Exceeds the limit"),
    (deep_config, r"config\.json: the file cannot be read \(maximum recursion depth"),
    (list_architecture, r"model_type is \[\], an architecture that"),
    (adapter_beside, r"holds an adapter \(adapter_config\.json\).* merge it first with bellwether export"),
    (deep_header, "no whole safetensors file .its header is nested too deep"),
    (list_header, "header is no JSON object"),
    (header_of_endless_sizes, "header gives no sizes"),
    (header_with_a_name_twice, r"header names 'model\.norm\.weight' more than once"),
    (huge_header, "header is larger than 100 MB"),
    (no_config, r"holds no config\.json"),
    (broken_config, r"config\.json:2: this is not JSON"),
    (list_config, "JSON object was expected"),
    (unknown_architecture, "'perceptron', an architecture that transformers does not know"),
    (own_code, r"model\.trust_remote_code"),
    (encoder, "no causal language model"),
    (wrong_size, r"config\.json"),
    (quantised, "quantised"),
    (only_pickle, r"pytorch_model\.bin, a format that can run code"),
    (no_weights, "holds no weights"),
    (cut_off, r"has \d+ bytes, but its header promises \d+"),
    (header_cut_off, "header is cut off"),
    (empty_weights, "no whole safetensors file"),
    (no_tokenizer, "holds no tokenizer"),
    (broken_tokenizer, "tokenizer in .* cannot be read"),
    (large_tokenizer, r"tokens up to number \d+, but the model's embedding ends at 299"),
    (no_end, "no end-of-sequence token"),
]


@pytest.mark.parametrize(("damage", "message"), BEFORE_LOADING, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_cannot_be_used_is_refused_before_loading(damage, message, folder):
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_base(settings(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message):
        load_base(settings(folder))


def rewrite(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


WHILE_LOADING = [
    ({"model__norm__weight": torch.full((24,), float("nan"))}, r"model\.norm\.weight .* NaN"),
    ({"model__norm__weight": torch.full((24,), float("inf"))}, r"model\.norm\.weight .* NaN or infinity"),
    ({"model__norm__weight": None}, r"lacks model\.norm\.weight"),
    ({"model__extra__weight": torch.ones(3)}, r"unknown model\.extra\.weight"),
    ({"model__norm__weight": torch.ones(5)}, r"cannot be loaded|another shape"),
]


@pytest.mark.parametrize(("changes", "message"), WHILE_LOADING)
def test_weights_that_are_not_the_models_are_refused(changes, message, folder):
    rewrite(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_base(settings(folder))


def test_benign_leftovers_of_old_checkpoints_are_no_error(folder):
    rewrite(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3))
    load_base(settings(folder))


def test_paths_that_are_no_model_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="which is a file"):
        open_base(settings(tmp_path / "file"))
    with pytest.raises(ModelError, match="no such folder"):
        open_base(settings(tmp_path / "missing"))
    with pytest.raises(ModelError, match="which has none"):
        open_base(settings(tmp_path, revision="main"))
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"no model of that name .*cannot reach the hub"):
        open_base(Model(path="someone/some-model"))


def test_a_hub_name_is_loaded_from_the_hubs_cache(llama, monkeypatch):
    import huggingface_hub

    asked = []

    def cached(name, *, revision, allow_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    hub = Model(path="someone/some-model", revision="v1", device="cpu")
    opened = open_base(hub)
    assert opened.facts.name == "someone/some-model"
    assert load_base(hub, opened).name == "someone/some-model"
    assert asked == [("someone/some-model", "v1", False), ("someone/some-model", "v1", True)]


def test_a_tokenizer_without_padding_pads_with_its_end(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    loaded = open_base(settings(folder)).tokenizer
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert len(loaded) == len(tokenizer)


def test_attention_that_the_architecture_lacks_is_refused_with_the_remedy(tmp_path):
    folder = tiny_folder("gemma2", tmp_path / "g")
    with pytest.raises(ModelError, match="has no sdpa attention; set model.attention to auto"):
        open_base(settings(folder, attention="sdpa"))
    assert load_base(settings(folder)).model.config._attn_implementation == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ModelError, match="torch sees 0 CUDA devices"):
        pick_device("cuda:1")
    if not torch.backends.mps.is_available():
        with pytest.raises(ModelError, match="no Apple GPU"):
            pick_device("mps")
        assert pick_device("auto") == torch.device("cpu")


def test_where_torch_cannot_attend_at_once_in_a_precision_the_process_does_it_step_by_step(monkeypatch):
    def attention(*states, **how):
        raise RuntimeError("this kernel wants another processor")

    before = torch.backends.cuda.flash_sdp_enabled()
    told: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_flash_sdp", told.append)
    settle_attention(torch.float32)
    assert told == []
    with monkeypatch.context() as here:
        here.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        settle_attention(torch.bfloat16)
    assert told == [False]
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_attention_in_bfloat16_works_under_any_kernels_once_a_model_is_loaded(llama):
    """With AMX and kernels kept from AVX-512, torch alone cannot."""
    script = (
        "import sys, torch\n"
        "from bellwether.model.base import load_base\n"
        "from bellwether.recipe.recipe import Model\n"
        "base = load_base(Model(path=sys.argv[1], dtype='bfloat16', device='cpu'))\n"
        "x = torch.ones(1, 2, 200, 64, dtype=torch.bfloat16)\n"
        "print(torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).float().mean().item())\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    words = [sys.executable, "-c", script, str(llama)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == 1.0
