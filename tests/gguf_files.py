"""GGUF files of tiny Llamas, written on the spot as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

# Of our names of tensors, those of GGUF.
_RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of tokens


def gguf_llama(hidden: int = 32) -> Any:
    """A random Llama whose rows fill whole blocks of 32 weights, with several layers and another angle base."""
    from tiny_models import tiny_model
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return tiny_model("llama", config=config)


def write_gguf(
    path: Path, model: Any, tokenizer: Any | None, kind: str = "F32", pre: str | None = "gpt-2", **more: Any
) -> Path:
    """Write a Llama as a GGUF file.

    Args:
        path: the file.
        model: the model.
        tokenizer: byte-level BPE; None leaves it out.
        kind: of its matrices: F32, F16 or Q8_0; vectors are always in float32.
        pre: how its tokenizer says that it splits texts; None leaves it out.
        more: further tensors (arrays) and metadata (texts).
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size, pre)
    for name, weight in model.state_dict().items():
        _add_tensor(writer, _gguf_name(name), _permuted(name, weight, config).numpy(), kind)
    for name, value in more.items():
        if isinstance(value, str):
            writer.add_string(name.replace("__", "."), value)
        else:
            _add_tensor(writer, name.replace("__", "."), value, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any, size: int, pre: str | None) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = set(tokenizer.all_special_tokens)
    unused = [f"[PAD{number}]" for number in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*(CONTROL if token in special else NORMAL for token in tokens), *[5] * len(unused)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensor(writer: Any, name: str, values: np.ndarray[Any, Any], kind: str) -> None:
    import gguf

    if values.ndim == 1 or kind == "F32":
        writer.add_tensor(name, values.astype(np.float32))
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        quantized = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), quantized), raw_dtype=quantized)


def _gguf_name(name: str) -> str:
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def _permuted(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp turns neighbours where transformers turns halves: rows of queries and keys stand in another order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    number = next((count for part, count in heads.items() if part in name), None)
    if number is None:
        return weight
    return weight.reshape(number, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
