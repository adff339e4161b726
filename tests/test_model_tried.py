"""Models are accepted because they were tried: tiny ones that look ahead, that leave modules aside, with experts."""

import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    RobertaConfig,
)

from bellwether.errors import ModelError
from bellwether.model.base import load_base, open_base
from bellwether.model.folder import quiet_transformers
from bellwether.model.lora import LoraLayers, initial_adapter, resolve_targets
from bellwether.model.tried import check_causal
from bellwether.recipe import recipe

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def folder(path, config, **more):
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(**{**SIZES, **more}))
        model.save_pretrained(path)
        tiny_tokenizer(300).save_pretrained(path)
    return recipe.Model(path=str(path), device="cpu")


@pytest.mark.parametrize("config", [RobertaConfig, BertConfig])
def test_a_model_that_looks_ahead_is_refused(tmp_path, config):
    with pytest.raises(ModelError, match="looks ahead: a later token changes what it says of earlier ones"):
        load_base(folder(tmp_path, config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal_models_pass(tmp_path, dtype):
    settings = folder(tmp_path / "llama", LlamaConfig).model_copy(update={"dtype": dtype})
    assert load_base(settings).facts.stacked == 0
    experts = folder(tmp_path / "mixtral", MixtralConfig, num_local_experts=4).model_copy(update={"dtype": dtype})
    assert load_base(experts).facts.stacked > 0


def test_a_model_that_computes_what_is_not_finite_is_refused(tmp_path):
    model = load_base(folder(tmp_path, LlamaConfig)).model
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    with pytest.raises(ModelError, match="computes values that are not finite for ordinary tokens"):
        check_causal(model, "x", 300)


def test_modules_whose_weight_is_used_without_calling_them_are_left_out(tmp_path):
    settings = folder(tmp_path, MambaConfig, state_size=4, time_step_rank=2)
    base = load_base(settings)
    modules = resolve_targets(base.facts, "all-linear")
    assert modules
    assert not [path for path in modules if path.endswith("dt_proj")]
    with pytest.raises(ModelError, match="dt_proj"):
        resolve_targets(base.facts, ("dt_proj",))
    # What is left is reached: with another B the logits move, module by module.
    adapter = initial_adapter(base, recipe.Lora(rank=2, target_modules="all-linear"), torch.Generator().manual_seed(0))
    layers = LoraLayers(base.model, adapter.config)
    ids_1T = torch.arange(3, 11)[None]

    def logits():
        layers.load(0, tensors)
        with torch.no_grad(), layers.routed(None):
            return base.model(input_ids=ids_1T).logits

    tensors = dict(adapter.tensors)
    before = logits()
    for key in [key for key in tensors if "lora_B" in key]:
        tensors = {**adapter.tensors, key: adapter.tensors[key] + 1.0}
        assert not torch.equal(logits(), before), key


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (MixtralConfig, {"num_local_experts": 4}),
        (Qwen2MoeConfig, {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    ],
)
def test_all_linear_modules_of_a_mixture_are_those_of_peft_and_experts_are_counted(tmp_path, config, more):
    import peft

    facts = open_base(folder(tmp_path, config, **more)).facts
    rank = 4  # above the width of a gate of one output
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    # PEFT can also adapt arrays that are no modules, which is not done here.
    adapted = {
        name.removeprefix("base_model.model.")
        for name, part in theirs.named_modules()
        if hasattr(part, "lora_A") and isinstance(part.get_base_layer(), torch.nn.Linear)
    }
    assert set(resolve_targets(facts, "all-linear", rank)) == adapted
    experts = [value for name, value in model.named_parameters() if "experts" in name and value.dim() == 3]
    assert facts.stacked == sum(value.numel() for value in experts) > 0


def test_the_plan_says_which_share_no_adapter_reaches(tmp_path):
    from bellwether.recipe.file import load_recipe
    from bellwether.runner.plan import plan

    settings = folder(tmp_path, MixtralConfig, num_local_experts=4)
    words = [f"model.path={settings.path}", "model.device=cpu", "data.max_tokens=512", "lora.target_modules=all-linear"]
    made = plan(load_recipe(None, words))
    assert any("of the base's weights stand in stacked arrays, such as experts" in note for note in made.notes)


def test_a_model_that_fails_when_it_is_tried_is_one_sentence(tmp_path):
    settings = folder(tmp_path, MixtralConfig, num_local_experts=4)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 9'))
    with pytest.raises(ModelError, match=r"fails on ordinary tokens \(.*\); check its config.json"):
        load_base(settings)
