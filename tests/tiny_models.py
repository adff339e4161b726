"""Tiny random models with a tokenizer, one per supported architecture, made on the spot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt")
# Those that our own decoder runs; the window of the tiny Mistral is shorter than most rows, so it stands in both.
END_TO_END = ("llama", "qwen2", "qwen3")
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


def tiny_config(architecture: str, vocabulary: int = 300) -> Any:
    """The configuration of a tiny model."""
    import transformers

    ids = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    no_kv = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
    gemma = {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 8, "final_logit_softcapping": 5.0}
    makers = {
        "llama": lambda: transformers.LlamaConfig(**ids, **_COMMON),
        "mistral": lambda: transformers.MistralConfig(**ids, **_COMMON, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**ids, **_COMMON, tie_word_embeddings=True),
        "qwen3": lambda: transformers.Qwen3Config(**ids, **_COMMON, head_dim=6),
        "gemma2": lambda: transformers.Gemma2Config(**ids, **_COMMON, **gemma),
        "gemma3": lambda: transformers.Gemma3TextConfig(**ids, **_COMMON, **gemma, sliding_window_pattern=2),
        "phi3": lambda: transformers.Phi3Config(**ids, **_COMMON),
        "gpt2": lambda: transformers.GPT2Config(**ids, n_embd=24, n_layer=2, n_head=4, n_positions=POSITIONS),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**ids, **no_kv),
        "opt": lambda: transformers.OPTConfig(
            **ids,
            hidden_size=24,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            word_embed_proj_dim=24,
        ),
    }
    return makers[architecture]()


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, vocabulary: int = 300) -> Any:
    """A random model in evaluation mode; every weight differs from its usual start, norms and biases too."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model = model.to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = functools.partial(_norm_in_its_precision, module)
    return model


def _norm_in_its_precision(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without the float32 that transformers puts between, which would drown a proof in float64."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def tiny_folder(architecture: str, folder: Path, vocabulary: int = 300) -> Path:
    """Save a tiny model and its tokenizer in Hugging Face format; returns the folder."""
    from bellwether.model.folder import quiet_transformers

    with quiet_transformers():
        tiny_model(architecture, vocabulary=vocabulary).save_pretrained(folder)
        tiny_tokenizer(vocabulary).save_pretrained(folder)
    return folder


def tiny_base(architecture: str, dtype: torch.dtype = torch.float64) -> Any:
    """A loaded base of a tiny model, without files."""
    from bellwether.model.base import Base, linear_shapes, output_shape, weights_fingerprint
    from bellwether.model.facts import ModelFacts

    model = tiny_model(architecture, dtype)
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
