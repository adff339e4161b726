"""Tiny random models with a tokenizer, one per supported architecture, made on the spot."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt")
END_TO_END = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")  # those that our own decoder runs
POSITIONS = 96

_TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName three colours of the rainbow.\n\n### Response:\nRed, green and blue.",
    "### Input:\nThe quick brown fox jumps over the lazy dog, again and again; numbers 0123456789.",
]
_COMMON = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}


def tiny_tokenizer(vocabulary: int = 300) -> Any:
    """A byte-level BPE tokenizer with beginning, end and padding.

    Four tokens below ``vocabulary`` are left for those that transformers adds of itself (Qwen 2).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 4,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=POSITIONS
    )


def tiny_config(architecture: str, vocabulary: int = 300, **changes: Any) -> Any:
    """The configuration of a tiny model, with some fields changed."""
    import transformers

    ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    no_kv = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
    # Gemma 3's layers are of two kinds in turn, as Gemma 2's are; the caps are near the numbers that they bound.
    gemma = {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 8, "final_logit_softcapping": 5.0}
    partial = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2 / 3}}
    opt = {
        "hidden_size": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 24,
    }
    makers = {
        "llama": (transformers.LlamaConfig, _COMMON),
        "mistral": (transformers.MistralConfig, _COMMON | {"sliding_window": 8}),
        "qwen2": (transformers.Qwen2Config, _COMMON | {"tie_word_embeddings": True}),
        "qwen3": (transformers.Qwen3Config, _COMMON | {"head_dim": 6}),
        "gemma2": (transformers.Gemma2Config, _COMMON | gemma | {"attn_logit_softcapping": 2.0}),
        "gemma3": (transformers.Gemma3TextConfig, _COMMON | gemma | {"sliding_window_pattern": 2}),
        "phi3": (transformers.Phi3Config, _COMMON | partial | {"sliding_window": 8}),
        "gpt2": (transformers.GPT2Config, {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
        "gpt_neox": (transformers.GPTNeoXConfig, no_kv),
        "opt": (transformers.OPTConfig, opt | {"max_position_embeddings": POSITIONS}),
    }
    kind, fields = makers[architecture]
    return kind(**copy.deepcopy(ids | fields | changes))


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float32, vocabulary: int = 300, config: Any | None = None
) -> Any:
    """A random model in evaluation mode; every weight differs from its usual start, norms and biases too."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config or tiny_config(architecture, vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model = model.eval().requires_grad_(False)
    return in_float64(model) if dtype == torch.float64 else model.to(dtype)


def in_float64(model: Any) -> Any:
    """Turn a model of transformers into one that computes in float64 throughout, in place; returns it.

    Whatever a model's precision, transformers takes norms, angles of positions and some softmaxes in float32, which
    would drown a proof in float64 and differ from processor to processor.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("float64", _attention_in_float64)
    AttentionMaskInterface.register("float64", eager_mask)
    model.double()
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = functools.partial(_norm_in_float64, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = functools.partial(_angles_in_float64, module)
    if model.config._attn_implementation == "eager":
        model.config._attn_implementation = "float64"
    return model


def _norm_in_float64(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm; Gemma's keeps its scale's distance from 1."""
    gemma = type(norm).__name__.startswith("Gemma")
    epsilon, scale = (norm.eps, 1 + norm.weight) if gemma else (norm.variance_epsilon, norm.weight)
    return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def _angles_in_float64(
    rotary: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions; Gemma 3 has two kinds of layer."""
    kinds = {"layer_type": layer_type} if layer_type else {}
    type(rotary).forward(rotary, x, position_ids, **kinds)  # which takes other frequencies for long rows (Phi-3)
    prefix = f"{layer_type}_" if layer_type else ""
    angles = position_ids[..., None].double() * getattr(rotary, f"{prefix}inv_freq")
    both, factor = torch.cat((angles, angles), -1), getattr(rotary, f"{prefix}attention_scaling")
    return both.cos() * factor, both.sin() * factor


def _attention_in_float64(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Plain attention over (rows, heads, tokens, size), with Gemma 2's cap on its scores."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


def tiny_folder(architecture: str, folder: Path, vocabulary: int = 300) -> Path:
    """Save a tiny model and its tokenizer in Hugging Face format; returns the folder."""
    from bellwether.model.folder import quiet_transformers

    with quiet_transformers():
        tiny_model(architecture, vocabulary=vocabulary).save_pretrained(folder)
        tiny_tokenizer(vocabulary).save_pretrained(folder)
    return folder


def tiny_base(architecture: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A loaded base of a tiny model, without files; fields of its configuration may be changed."""
    from bellwether.model.base import Base, linear_shapes, output_shape, weights_fingerprint
    from bellwether.model.facts import ModelFacts

    model = tiny_model(architecture, dtype, config=tiny_config(architecture, **changes))
    facts = ModelFacts(
        name=f"tiny-{architecture}",
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden_size=24,
        layers=2,
        vocabulary=300,
        max_positions=POSITIONS,
        linears=linear_shapes(model),
        output_layer=output_shape(model),
        weight_bytes={},
    )
    device = torch.device("cpu")
    return Base(model, tiny_tokenizer(), device, facts.name, weights_fingerprint(model), facts, stop_ids=(2,))


def exact_base(base: Any) -> Any:
    """A base with the same weights in float64."""
    return dataclasses.replace(base, model=in_float64(copy.deepcopy(base.model)))


def let_runs_compute_in_float64(monkeypatch: Any) -> None:
    """Have the runs of a test hold base and adapters in float64."""
    from bellwether.model.base import weights_fingerprint
    from bellwether.runner import run, wiring

    load, initial = run.load_base, wiring.initial_adapter

    def exact(*given: Any) -> Any:
        base = exact_base(load(*given))
        return dataclasses.replace(base, fingerprint=weights_fingerprint(base.model))

    def wide(*given: Any) -> Any:
        adapter = initial(*given)
        return adapter.with_tensors({key: value.astype("float64") for key, value in adapter.tensors.items()})

    monkeypatch.setattr(run, "load_base", exact)
    monkeypatch.setattr(wiring, "initial_adapter", wide)
    monkeypatch.setattr(run, "LoraLayers", functools.partial(run.LoraLayers, dtype=torch.float64))


def random_adapter(base: Any, rank: int = 3, seed: int = 0, dtype: str = "float64", **lora: Any) -> Any:
    """An adapter of all linear modules whose B is not zero."""
    import numpy as np

    from bellwether.model.lora import initial_adapter
    from bellwether.recipe import recipe

    adapter = initial_adapter(base, recipe.Lora(rank=rank, **lora), torch.Generator().manual_seed(seed))
    draw = np.random.default_rng(seed)
    return adapter.with_tensors(
        {
            key: (value if "lora_A" in key else 0.1 * draw.standard_normal(value.shape)).astype(dtype)
            for key, value in adapter.tensors.items()
        }
    )


def padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and the attention mask of rows of these lengths, padded at the right."""
    generator = torch.Generator().manual_seed(seed)
    ids_NT = torch.randint(3, 300, (len(lengths), max(lengths)), generator=generator)
    attention_NT = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return ids_NT * attention_NT, attention_NT.long()
