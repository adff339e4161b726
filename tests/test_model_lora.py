"""LoRA layers against PEFT, and many slots against one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import FLOAT64, gamma
from tiny_models import ARCHITECTURES, padded, random_adapter, tiny_base, tiny_folder, tiny_model

from bellwether.errors import ModelError
from bellwether.exchange.adapter import adapter_files, key_a, key_b, read_adapter
from bellwether.model import lora, low_rank
from bellwether.model.base import open_base
from bellwether.model.dropout import Dropout
from bellwether.model.lora import LoraLayers, initial_adapter, low_rank_update, resolve_targets, short_names
from bellwether.recipe import recipe


def write_adapter(adapter, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in adapter_files(adapter).items():
        (folder / name).write_bytes(content)
    return folder


def peft_wrapped(model, **settings):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_our_adapter_to_the_same_logits(architecture, tmp_path):
    from peft import PeftModel

    base = tiny_base(architecture)
    adapter = random_adapter(base, dtype="float32", rslora=architecture == "qwen2")
    ids_NT, attention_NT = padded([9, 6])
    bare = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    layers = LoraLayers(base.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    with torch.no_grad():
        ours = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    layers.detach()
    peft_model = PeftModel.from_pretrained(
        tiny_model(architecture, torch.float64), write_adapter(adapter, tmp_path / "a"), autocast_adapter_dtype=False
    )
    with torch.no_grad():
        theirs = peft_model(input_ids=ids_NT, attention_mask=attention_NT).logits
    assert ours.dtype == theirs.dtype == torch.float64
    assert (ours - bare).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_means_the_modules_that_peft_adapts(architecture):
    model = tiny_model(architecture)
    ours = resolve_targets(model, "all-linear")
    wrapped = peft_wrapped(model, r=2, target_modules="all-linear", fan_in_fan_out=architecture == "gpt2")
    prefix = "base_model.model."
    theirs = [
        name.removeprefix(prefix).removesuffix(".lora_A.default")
        for name, _ in wrapped.named_modules()
        if name.endswith(".lora_A.default")
    ]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_that_peft_saved_is_read_to_the_same_logits(architecture, tmp_path):
    base = tiny_base(architecture)
    wrapped = peft_wrapped(
        tiny_model(architecture, torch.float64),
        r=2,
        lora_alpha=5,
        init_lora_weights=False,
        target_modules=["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"],
        fan_in_fan_out=architecture == "gpt2",
    ).eval()
    for name, weight in wrapped.named_parameters():
        weight.data = weight.data.float() if "lora_" in name else weight.data  # as files hold them
    wrapped.save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft")
    ids_NT, attention_NT = padded([7, 4])
    layers = LoraLayers(base.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    with torch.no_grad():
        torch.testing.assert_close(
            base.model(input_ids=ids_NT, attention_mask=attention_NT).logits,
            wrapped.double()(input_ids=ids_NT, attention_mask=attention_NT).logits,
            atol=FLOAT64,
            rtol=0,
        )
    layers.detach()


def test_an_adapter_survives_writing_and_reading(tmp_path):
    adapter = random_adapter(tiny_base("llama"), dtype="float32")
    again = read_adapter(write_adapter(adapter, tmp_path / "a"))
    assert again.fingerprint() == adapter.fingerprint()
    assert again.config == adapter.config
    assert list(again.tensors) == list(adapter.tensors)


@pytest.mark.parametrize("change", [{"rank_pattern": {"q_proj": 4}}, {"use_dora": True}, {"modules_to_save": ["x"]}])
def test_adapters_that_are_not_plain_lora_are_refused(change, tmp_path):
    import json

    folder = write_adapter(random_adapter(tiny_base("llama"), dtype="float32"), tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match="plain LoRA"):
        read_adapter(folder)


def test_an_adapter_in_bfloat16_is_refused_with_the_remedy(tmp_path):
    from safetensors.torch import save_file

    adapter = random_adapter(tiny_base("llama"), dtype="float32")
    folder = write_adapter(adapter, tmp_path / "a")
    narrow = {key: torch.from_numpy(value).bfloat16() for key, value in adapter.tensors.items()}
    save_file(narrow, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="BF16.*save it as float32"):
        read_adapter(folder)


def masks_of(seed_N, tokens):
    """Dropout masks for padded rows."""
    rows = len(seed_N)
    return Dropout(0.2, seed_N).masks(torch.arange(rows).repeat_interleave(tokens), torch.arange(tokens).repeat(rows))


@pytest.mark.parametrize(
    ("architecture", "columns"), [(name, 128) for name in ARCHITECTURES] + [("llama", 6), ("llama", 1)]
)
def test_mixed_slots_equal_separate_runs_in_logits_and_gradients(architecture, columns, monkeypatch):
    base = tiny_base(architecture)
    adapters = [random_adapter(base, seed=seed) for seed in range(3)]
    ids_NT, attention_NT = padded([9, 5, 7, 9, 3, 8])
    slots = [2, 0, 1, 0, 2, 2]
    seed_N = torch.arange(6) * 1_000_003
    together = LoraLayers(base.model, adapters[0].config, slots=3, dtype=torch.float64)
    for slot, adapter in enumerate(adapters):
        together.load(slot, adapter.tensors)
    monkeypatch.setattr(low_rank, "_COLUMNS", columns)
    with together.routed(slots, masks_of(seed_N, 9)):
        mixed = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    (mixed.square().sum((1, 2))).sum().backward()
    together.detach()

    for slot, adapter in enumerate(adapters):
        alone = LoraLayers(base.model, adapter.config, dtype=torch.float64)
        alone.load(0, adapter.tensors)
        rows = torch.tensor(slots) == slot
        with alone.routed(None, masks_of(seed_N[rows], 9)):
            logits = base.model(input_ids=ids_NT[rows], attention_mask=attention_NT[rows]).logits
        logits.square().sum().backward()
        alone.detach()
        torch.testing.assert_close(mixed[rows], logits, atol=1e-10, rtol=0)
        for stacked, single in zip(together.parameters(), alone.parameters(), strict=True):
            assert single.grad.abs().max() > 1e-3
            torch.testing.assert_close(stacked.grad[slot], single.grad[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("columns", [128, 4])
def test_layers_add_the_formula_for_each_token_in_output_and_gradients(columns, monkeypatch):
    """Several slots side by side and in turn, dropout, and some of the tokens; one by one from the definition."""
    monkeypatch.setattr(low_rank, "_COLUMNS", columns)
    base = tiny_base("llama")
    path = "model.layers.0.self_attn.q_proj"
    adapters = [random_adapter(base, dtype="float64", seed=seed, target_modules=(path,)) for seed in (1, 2, 3)]
    layers = LoraLayers(base.model, adapters[0].config, slots=3, dtype=torch.float64)
    for slot, adapter in enumerate(adapters):
        layers.load(slot, adapter.tensors)
    slots, lengths, index_S, some = [2, 0, 1, 2], [4, 7, 3, 5], torch.tensor([1, 4, 5, 10, 12, 17, 18]), [1, 3, 1, 2]
    row_M = torch.repeat_interleave(torch.tensor(lengths))
    position_M = torch.cat([torch.arange(length) for length in lengths])
    masks = Dropout(0.4, torch.tensor([5, 6, 7, 8])).masks(row_M, position_M)
    generator = torch.Generator().manual_seed(0)
    module = base.model.get_submodule(path)
    x_MI = torch.randn(19, module.in_features, dtype=torch.float64, generator=generator, requires_grad=True)
    weights_MO = torch.randn(19, module.out_features, dtype=torch.float64, generator=generator)

    with layers.routed(slots, masks, lengths):
        ours_MO = module(x_MI)
        with layers.chosen(index_S, some):
            ours_SO = module(x_MI[index_S])
    ((ours_MO * weights_MO).sum() + (ours_SO * weights_MO[index_S]).sum()).backward()
    ours = [x_MI.grad, layers.A[0].grad.clone(), layers.B[0].grad.clone()]
    layers.detach()

    x_MI.grad = None
    a_KRI, b_KOR = (parameter[0].detach().clone().requires_grad_() for parameter in (layers.A, layers.B))
    dropped_MI = x_MI * masks(path, x_MI)
    scaling = adapters[0].config.scaling
    updates = [
        low_rank_update(dropped_MI[token, None], a_KRI[slots[row]], b_KOR[slots[row]], scaling)
        for token, row in enumerate(row_M.tolist())
    ]
    expected_MO = module(x_MI) + torch.cat(updates)
    torch.testing.assert_close(ours_MO, expected_MO, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours_SO, expected_MO[index_S], atol=1e-12, rtol=1e-12)
    ((expected_MO * weights_MO).sum() + (expected_MO[index_S] * weights_MO[index_S]).sum()).backward()
    for mine, theirs in zip(ours, [x_MI.grad, a_KRI.grad, b_KOR.grad], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
        assert theirs.abs().max() > 0.1


def test_the_formula_is_that_of_the_paper_worked_by_hand():
    x_MI = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    a_RI, b_OR = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0], [0.0], [-1.0]])
    assert low_rank_update(x_MI, a_RI, b_OR, 0.5).tolist() == [[5.0, 0.0, -2.5], [-1.0, 0.0, 0.5]]


def test_merged_weights_add_the_formula():
    base = tiny_base("llama")
    path = "model.layers.0.self_attn.q_proj"
    adapter = random_adapter(base, dtype="float64", target_modules=(path,))
    layers = LoraLayers(base.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    module = base.model.get_submodule(path)
    x_MI = torch.randn(5, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with layers.merged():
            ours_MO = module(x_MI)
        layers.detach()
        update_MO = low_rank_update(x_MI, layers.A[0][0], layers.B[0][0], adapter.config.scaling)
        torch.testing.assert_close(ours_MO, module(x_MI) + update_MO, atol=1e-12, rtol=1e-12)
    assert update_MO.abs().max() > 0.1


def test_rows_are_untouched_by_adapters_in_other_slots():
    base = tiny_base("llama")
    layers = LoraLayers(base.model, random_adapter(base).config, slots=2, dtype=torch.float64)
    layers.load(1, random_adapter(base).tensors)
    ids_NT, attention_NT = padded([6, 6])
    with layers.disabled():
        bare = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    with layers.routed([0, 1]):
        mixed = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    layers.detach()
    torch.testing.assert_close(mixed[0], bare[0], atol=1e-12, rtol=0)
    assert (mixed[1] - bare[1]).abs().max() > 0.01


def test_detached_and_disabled_layers_leave_the_base_as_it_was():
    base = tiny_base("gpt2")
    ids_NT, attention_NT = padded([6, 4])
    bare = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    tree = [name for name, _ in base.model.named_modules()]
    layers = LoraLayers(base.model, random_adapter(base).config, dtype=torch.float64)
    layers.load(0, random_adapter(base).tensors)
    assert [name for name, _ in base.model.named_modules()] == tree
    with layers.disabled():
        assert torch.equal(base.model(input_ids=ids_NT, attention_mask=attention_NT).logits, bare)
    assert not torch.equal(base.model(input_ids=ids_NT, attention_mask=attention_NT).logits, bare)
    layers.detach()
    assert torch.equal(base.model(input_ids=ids_NT, attention_mask=attention_NT).logits, bare)


def test_routing_ends_with_its_context_even_after_an_error():
    base = tiny_base("llama")
    layers = LoraLayers(base.model, random_adapter(base).config, slots=2, dtype=torch.float64)
    with contextlib.suppress(ZeroDivisionError), layers.routed([1]):
        raise ZeroDivisionError
    layers.load(1, random_adapter(base).tensors)
    ids_NT, attention_NT = padded([5])
    routed_to_0 = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
    with layers.disabled():
        assert torch.equal(base.model(input_ids=ids_NT, attention_mask=attention_NT).logits, routed_to_0)
    layers.detach()


def test_only_a_and_b_are_parameters_and_reading_returns_copies():
    base = tiny_base("llama")
    adapter = random_adapter(base, dtype="float32")
    layers = LoraLayers(base.model, adapter.config, slots=2)
    layers.load(1, adapter.tensors)
    assert len(list(layers.parameters())) == 2 * len(adapter.config.modules)
    assert all(parameter.dtype == torch.float32 for parameter in layers.parameters())
    first = layers.read(1)
    assert first.keys() == adapter.tensors.keys()
    assert all(np.array_equal(first[key], adapter.tensors[key]) for key in first)
    first[next(iter(first))] += 1
    assert all(np.array_equal(value, adapter.tensors[key]) for key, value in layers.read(1).items())
    assert not any(value.any() for value in layers.read(0).values())
    layers.detach()


def test_tensors_that_do_not_fit_are_refused():
    base = tiny_base("llama")
    adapter = random_adapter(base, dtype="float32")
    layers = LoraLayers(base.model, adapter.config)
    key = next(iter(adapter.tensors))
    with pytest.raises(ModelError, match="one side only"):
        layers.load(0, {name: value for name, value in adapter.tensors.items() if name != key})
    with pytest.raises(ModelError, match="shape"):
        layers.load(0, dict(adapter.tensors) | {key: adapter.tensors[key][:1]})
    layers.detach()


def test_over_a_bfloat16_base_each_module_adds_a_float32_product_and_rounds_once():
    base = tiny_base("llama", torch.bfloat16)
    adapter = random_adapter(base, dtype="float32")
    seen = {path: [] for path in adapter.config.modules}

    def remember() -> None:
        for path, tensors in seen.items():
            hook = lambda _, args, output, tensors=tensors: tensors.extend((args[0], output))  # noqa: E731
            base.model.get_submodule(path).register_forward_hook(hook)

    remember()  # before ours, so that it sees what the frozen module gives
    layers = LoraLayers(base.model, adapter.config)
    layers.load(0, adapter.tensors)
    remember()
    ids_NT, attention_NT = padded([8, 5])
    with torch.no_grad():
        assert base.model(input_ids=ids_NT, attention_mask=attention_NT).logits.dtype == torch.bfloat16
    layers.detach()
    for path, (x_NTI, bare_NTO, _, found_NTO) in seen.items():
        a_RI, b_OR = (torch.from_numpy(adapter.tensors[key(path)]).double() for key in (key_a, key_b))
        x_NTI, bare_NTO, scaling = x_NTI.double(), bare_NTO.double(), adapter.config.scaling
        exact_NTO = bare_NTO + scaling * (x_NTI @ a_RI.T @ b_OR.T)
        size_NTO = bare_NTO.abs() + scaling * (x_NTI.abs() @ a_RI.abs().T @ b_OR.abs().T)
        # Two sums of products, the factor, the last sum, and float32 on the way to bfloat16 here.
        slack_NTO = gamma(torch.float32, len(a_RI) + a_RI.shape[1] + 3) * size_NTO
        assert ((exact_NTO - slack_NTO).bfloat16() <= found_NTO).all(), path
        assert (found_NTO <= (exact_NTO + slack_NTO).bfloat16()).all(), path


def test_over_a_bfloat16_base_an_adapter_gives_the_logits_that_it_gives_with_peft(tmp_path):
    from peft import PeftModel

    base = tiny_base("llama", torch.bfloat16)
    adapter = random_adapter(base, dtype="float32")
    wrapped = PeftModel.from_pretrained(tiny_model("llama", torch.bfloat16), write_adapter(adapter, tmp_path / "a"))
    ids_NT, attention_NT = padded([8, 5])
    for name, weight in wrapped.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        # In float64 the last bits of what is added never decide how a sum is rounded to bfloat16.
        weight.data = weight.data.double() if "lora_" in name else weight.data
    layers = LoraLayers(base.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    with torch.no_grad():
        ours = base.model(input_ids=ids_NT, attention_mask=attention_NT).logits
        layers.detach()
        theirs = wrapped(input_ids=ids_NT, attention_mask=attention_NT).logits
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_initial_adapter_changes_nothing_and_comes_from_its_generator():
    base = tiny_base("llama", torch.float32)
    first, again, other = (
        initial_adapter(base, recipe.Lora(rank=4), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    for key, value in first.tensors.items():
        assert value.dtype == np.float32
        if "lora_B" in key:
            assert not value.any()
        else:
            bound = 1 / np.sqrt(value.shape[1])
            assert 0.8 * bound < np.abs(value).max() <= bound


def test_targets_are_found_on_facts_without_weights(tmp_path):
    folder = tiny_folder("llama", tmp_path / "m")
    facts = open_base(recipe.Model(path=str(folder))).facts
    assert resolve_targets(facts, ("v_proj", "model.layers.1.self_attn.q_proj")) == (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    )
    assert short_names(facts, resolve_targets(facts, ("v_proj", "q_proj"))) == ("q_proj", "v_proj")
    only_one = resolve_targets(facts, ("model.layers.1.self_attn.q_proj",))
    assert short_names(facts, only_one) == only_one


def test_unknown_targets_name_those_that_exist():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match=r"'c_attn'.*q_proj.*down_proj"):
        resolve_targets(model, ("c_attn",))
    with pytest.raises(ModelError, match="output layer"):
        resolve_targets(model, ("lm_head",))
    with pytest.raises(ModelError, match=r"rank is 13.*k_proj is only 24 × 12.*at most 12"):
        resolve_targets(model, ("q_proj", "k_proj"), rank=13)


def test_an_adapter_of_another_model_is_refused():
    adapter = random_adapter(tiny_base("gpt2"))
    with pytest.raises(ModelError, match="does not have"):
        LoraLayers(tiny_model("llama"), adapter.config)


# Merged into the frozen weights -------------------------------------------------------------------


def merging(architecture, monkeypatch, most=None):
    """A base, layers with an adapter at it, and what gives the logits of two rows."""
    if most is not None:
        monkeypatch.setattr(lora, "MERGED", most)
    base = tiny_base(architecture)
    adapter = random_adapter(base)
    layers = LoraLayers(base.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    ids_NT, attention_NT = padded([9, 5])
    return base, layers, lambda: base.model(input_ids=ids_NT, attention_mask=attention_NT).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_adapter_gives_the_same_logits_and_the_weights_come_back(architecture, monkeypatch):
    base, layers, logits = merging(architecture, monkeypatch)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in base.model.named_parameters()}
    apart = logits()
    with layers.merged():
        merged = logits()
        assert not merged.requires_grad
    torch.testing.assert_close(merged, apart, atol=1e-10, rtol=0)
    with contextlib.suppress(ZeroDivisionError), layers.merged():
        raise ZeroDivisionError
    for name, weight in base.model.named_parameters():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])
    assert torch.equal(logits(), apart)
    layers.detach()


def test_merged_weights_are_those_of_peft(tmp_path):
    import peft

    base = tiny_base("llama")
    adapter = random_adapter(base)
    layers = LoraLayers(base.model, adapter.config, dtype=torch.float64)
    layers.load(0, adapter.tensors)
    paths = list(adapter.config.modules)
    with layers.merged():
        ours = {path: base.model.get_submodule(path).weight.clone() for path in paths}
    layers.detach()
    folder = write_adapter(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload()
    for path in paths:
        torch.testing.assert_close(ours[path], theirs.get_submodule(path).weight, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("architecture", "most"), [("llama", 0), ("gpt2", None)])
def test_large_weights_and_other_modules_than_plain_ones_are_left_as_they_are(architecture, most, monkeypatch):
    _, layers, logits = merging(architecture, monkeypatch, most)
    own = [module.weight.data_ptr() for module in layers._adapted]
    apart = logits()
    with layers.merged():
        assert [module.weight.data_ptr() for module in layers._adapted] == own
        assert torch.equal(logits(), apart)
    layers.detach()


def test_disabled_layers_are_not_merged(monkeypatch):
    _, layers, logits = merging("llama", monkeypatch)
    with layers.disabled():
        bare = logits()
        with layers.merged():
            assert torch.equal(logits(), bare)
    assert not torch.equal(logits(), bare)
    layers.detach()
