"""A decoder built like Llama's, over rows end to end: no padding, and frozen steps with a backward pass of their own.

The last layer is computed at selected positions only, but for its keys and values: nothing else looks at the others.

Llama, Mistral, Qwen 2 and Qwen 3 are built so. Linear modules are called as transformers has made them, LoRA hooks
included, so an adapter may stand at any of them; norms, and gated layers without adapters, run as our own steps.

Shape legend: M tokens of all rows, S selected positions, T tokens of a row, D hidden size or size of a head, H heads,
G heads of keys and values.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bellwether.model.kernels import gated_mlp, rms_norm, rotate, wide
from bellwether.model.lora import LoraLayers

if TYPE_CHECKING:
    from bellwether.model.batch import Batch, Packed

# Only these: others have parts of the same names and put them together in another way.
_BUILT_SO = {
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer",
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
}


def fits(model: Any) -> bool:
    """Return whether ``hidden_states`` is made for a model: one of these layers, on a CPU, with torch's attention."""
    plain = type(model.get_output_embeddings()) is torch.nn.Linear
    if not plain or model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    if getattr(model.config, "hidden_act", None) not in ("silu", "swish"):
        return False
    kinds = {type(layer) for layer in getattr(model.get_decoder(), "layers", [])}
    return bool(kinds) and all(f"{kind.__module__}.{kind.__name__}" in _BUILT_SO for kind in kinds)


def window(model: Any) -> int | None:
    """Return how many tokens back attention reaches; None where it reaches all."""
    found = getattr(model.config, "sliding_window", None)
    return int(found) if found else None


def hidden_states(model: Any, layers: LoraLayers, batch: Batch, checkpointing: bool = False) -> torch.Tensor:
    """Return what the output layer gets, as hidden_SD, at the selected positions.

    Args:
        model: a model that ``fits``.
        layers: the LoRA layers over it, routed for the batch.
        batch: rows that fit into the model's window.
        checkpointing: compute each layer again in the backward pass instead of keeping what it needs there.
    """
    steps = layer_states(model, layers, batch, batch.select_S, checkpointing)
    hidden_SD: torch.Tensor = deque(steps, maxlen=1).pop()
    return hidden_SD


def layer_states(
    model: Any, layers: LoraLayers, batch: Packed, select_S: torch.Tensor | None, checkpointing: bool = False
) -> Iterator[torch.Tensor]:
    """Yield the hidden states that transformers numbers 0 to L: the embedding, and each layer's, the last one normed.

    Args:
        model: a model that ``fits``.
        layers: the LoRA layers over it, routed for the batch for as long as states are asked for.
        batch: rows that fit into the model's window.
        select_S: at which positions the last state is wanted, in rising order; None wants all.
        checkpointing: compute each layer again in the backward pass instead of keeping what it needs there.

    Yields:
        hidden_MD, and hidden_SD at last.
    """
    inner = model.get_decoder()
    hidden_MD = inner.embed_tokens(batch.ids_M)
    cos_1MD, sin_1MD = inner.rotary_emb(hidden_MD[None], batch.position_M[None])
    angles = cos_1MD[0], sin_1MD[0]
    *most, last = inner.layers
    for layer, chosen_S in (*((layer, None) for layer in most), (last, select_S)):
        yield hidden_MD
        arguments = layer, layers, hidden_MD, angles, batch, chosen_S
        hidden_MD = layers.recomputed(_layer, *arguments) if checkpointing else _layer(*arguments)
    yield _norm(inner.norm, hidden_MD)


def _layer(
    layer: Any,
    layers: LoraLayers,
    hidden_MD: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    batch: Packed,
    select_S: torch.Tensor | None,
) -> torch.Tensor:
    """Return what a layer gives, at selected positions where these are given."""
    attention = layer.self_attn
    x_MD = _norm(layer.input_layernorm, hidden_MD)
    key_MGD = rotate(_heads(attention, "k", x_MD), *angles)
    value_MGD = _heads(attention, "v", x_MD)
    lengths = list(batch.lengths)
    with contextlib.ExitStack() as stack:
        if select_S is not None:
            lengths = torch.bincount(batch.row_M[select_S], minlength=len(lengths)).tolist()
            stack.enter_context(layers.chosen(select_S, lengths))
            hidden_MD, x_MD = hidden_MD.index_select(0, select_S), x_MD.index_select(0, select_S)
            angles = angles[0][select_S], angles[1][select_S]
        query_MHD = rotate(_heads(attention, "q", x_MD), *angles)
        mixed_MD = _attend(attention, query_MHD, key_MGD, value_MGD, lengths, batch, select_S)
        hidden_MD = hidden_MD + attention.o_proj(mixed_MD)
        return hidden_MD + _feed_forward(layer.mlp, _norm(layer.post_attention_layernorm, hidden_MD))


def _heads(attention: Any, which: str, x_MD: torch.Tensor) -> torch.Tensor:
    """Return queries, keys or values by head."""
    wide_MO = getattr(attention, f"{which}_proj")(x_MD)
    heads = wide_MO.view(len(x_MD), wide_MO.shape[1] // attention.head_dim, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return heads if norm is None else _norm(norm, heads)


def _attend(
    attention: Any,
    query_MHD: torch.Tensor,
    key_MGD: torch.Tensor,
    value_MGD: torch.Tensor,
    counts: list[int],
    batch: Packed,
    select_S: torch.Tensor | None,
) -> torch.Tensor:
    """Return the values that each query attends to, row by row; a query sees its row up to its own position.

    Where a gradient is wanted, attention is never computed in bfloat16: on a CPU torch's backward pass of it then took
    5 to 9 times as long as in float32, and a process 0.7 to 0.8 GB more. Forward alone it takes 0.6 to 0.8 of the time.
    """
    brought = wide if torch.is_grad_enabled() else _as_it_is
    groups = query_MHD.shape[1] // key_MGD.shape[1]
    if groups > 1:
        key_MGD, value_MGD = (x.repeat_interleave(groups, dim=1) for x in (key_MGD, value_MGD))
    lengths = list(batch.lengths)
    queries, keys, values = (
        torch.split(brought(x), sizes) for x, sizes in ((query_MHD, counts), (key_MGD, lengths), (value_MGD, lengths))
    )
    seen = [None] * len(counts) if select_S is None else _seen(torch.split(batch.position_M[select_S], counts), lengths)
    mixed = [_attend_row(*row, attention.scaling) for row in zip(queries, keys, values, seen, strict=True)]
    return torch.cat(mixed).flatten(1).to(query_MHD.dtype)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _seen(positions: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return for each row which of its tokens its selected queries see."""
    return [
        position_T[:, None] >= torch.arange(length, device=position_T.device)
        for position_T, length in zip(positions, lengths, strict=True)
    ]


def _attend_row(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    seen_TT: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Return what the queries of a row attend to, of all that stands before them or of what they are said to see."""
    query_1HTD, key_1HTD, value_1HTD = (x.transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD))
    mixed_1HTD = torch.nn.functional.scaled_dot_product_attention(
        query_1HTD, key_1HTD, value_1HTD, attn_mask=seen_TT, is_causal=seen_TT is None, scale=scaling
    )
    return mixed_1HTD[0].transpose(0, 1)


def _feed_forward(mlp: Any, x_MD: torch.Tensor) -> torch.Tensor:
    """Return what a feed-forward layer gives, in one step where its modules are plain and no adapter stands at them."""
    modules = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if all(map(_is_plain, modules)):
        return gated_mlp(x_MD, *(module.weight for module in modules))
    whole: torch.Tensor = mlp(x_MD)
    return whole


def _is_plain(module: Any) -> bool:
    """Return whether a module is a product with a matrix and nothing else: no bias, no adapter, not quantised."""
    return not module._forward_hooks and module.bias is None and type(module) is torch.nn.Linear


def _norm(norm: Any, x_MD: torch.Tensor) -> torch.Tensor:
    return rms_norm(x_MD, norm.weight, norm.variance_epsilon)
