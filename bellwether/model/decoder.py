"""A decoder built like Llama's, over rows end to end: no padding, and frozen steps with a backward pass of their own.

The last layer is computed at selected positions only, but for its keys and values: nothing else looks at the others.

Llama, Mistral, Qwen 2, Qwen 3, Gemma 2, Gemma 3 (text) and Phi-3 are built so; what a family does in a way of its own
is in ``_FAMILIES``, and in which modules its layers have. Linear modules are called as transformers has made them, LoRA
hooks included, so an adapter may stand at any of them; norms, and gated layers without adapters, run as our own steps.

Shape legend: M tokens of all rows, S selected positions, T tokens of a row, D hidden size or size of a head, H heads,
G heads of keys and values, O outputs of a linear module.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bellwether.model.kernels import GELU, SILU, Activation, capped, gated_mlp, rms_norm, rotate, wide
from bellwether.model.lora import LoraLayers

if TYPE_CHECKING:
    from bellwether.model.batch import Batch, Packed

Angles = tuple[torch.Tensor, torch.Tensor]

_ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU}


def _endless(attention: Any) -> None:
    """Every layer reaches back to the first token."""


def _everywhere(attention: Any) -> int | None:
    """Every layer reaches as far back as the configuration says."""
    found: int | None = attention.config.sliding_window
    return found


def _by_layer(attention: Any) -> int | None:
    """Layers of one kind have a window, the others none."""
    return _everywhere(attention) if attention.layer_type == "sliding_attention" else None


@dataclass(frozen=True)
class _Family:
    """What the models of a family do in a way of their own.

    Args:
        window: how many tokens a layer's attention reaches back, itself among them; None where it reaches all.
        activation: the configuration's name for the gates' activation.
        score_cap: its name for the soft cap on attention's scores, where the family has one.
        logit_cap: its name for the soft cap on logits.
    """

    window: Callable[[Any], int | None]
    activation: str = "hidden_act"
    score_cap: str | None = None
    logit_cap: str | None = None


# Only these: others have parts of the same names and put them together in another way. Gemma 3 names a cap on scores in
# its configuration, too, but transformers does not apply it.
_GATES, _CAP = "hidden_activation", "final_logit_softcapping"
_FAMILIES = {
    "transformers.models.llama.modeling_llama.Llama": _Family(_endless),
    "transformers.models.mistral.modeling_mistral.Mistral": _Family(_everywhere),
    "transformers.models.qwen2.modeling_qwen2.Qwen2": _Family(_by_layer),
    "transformers.models.qwen3.modeling_qwen3.Qwen3": _Family(_by_layer),
    "transformers.models.gemma2.modeling_gemma2.Gemma2": _Family(_by_layer, _GATES, "attn_logit_softcapping", _CAP),
    "transformers.models.gemma3.modeling_gemma3.Gemma3": _Family(_by_layer, _GATES, None, _CAP),
    "transformers.models.phi3.modeling_phi3.Phi3": _Family(_everywhere),
}


def fits(model: Any) -> bool:
    """Return whether ``hidden_states`` is made for a model: one of these families, on a CPU, with usual attention.

    Usual is torch's attention, or, for a family that transformers does not run with it, whatever it is run with.
    """
    prefix = _path(type(model)).removesuffix("ForCausalLM")
    layers = getattr(model.get_decoder(), "layers", [])
    if prefix not in _FAMILIES or {_path(type(layer)) for layer in layers} != {f"{prefix}DecoderLayer"}:
        return False
    if model.device.type != "cpu" or type(model.get_output_embeddings()) is not torch.nn.Linear:
        return False
    config = model.config
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return False
    usual = config._attn_implementation == "sdpa" or not model._supports_sdpa
    return usual and getattr(config, _FAMILIES[prefix].activation) in _ACTIVATIONS


def knows(architecture: str) -> bool:
    """Return whether models of a class, such as ``LlamaForCausalLM``, run end to end on a CPU as a rule."""
    return any(f"{path.rpartition('.')[2]}ForCausalLM" == architecture for path in _FAMILIES)


def logit_cap(model: Any) -> float | None:
    """Return the soft cap on the logits of a model that ``fits``, None where it has none."""
    return _value(model.config, _family(model).logit_cap)


def _family(model: Any) -> _Family:
    return _FAMILIES[_path(type(model)).removesuffix("ForCausalLM")]


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _value(config: Any, name: str | None) -> float | None:
    """Return a number of a configuration; None where the family has no name for it."""
    found: float | None = getattr(config, name) if name else None
    return found


def hidden_states(model: Any, layers: LoraLayers, batch: Batch, checkpointing: bool = False) -> torch.Tensor:
    """Return what the output layer gets, as hidden_SD, at the selected positions.

    Args:
        model: a model that ``fits``.
        layers: the LoRA layers over it, routed for the batch.
        batch: rows end to end.
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
        batch: rows end to end.
        select_S: at which positions the last state is wanted, in rising order; None wants all.
        checkpointing: compute each layer again in the backward pass instead of keeping what it needs there.

    Yields:
        hidden_MD, and hidden_SD at last.
    """
    inner, family = model.get_decoder(), _family(model)
    hidden_MD = inner.embed_tokens(batch.ids_M)
    angles = _angles(inner, hidden_MD, batch)
    chosen = [None] * (len(inner.layers) - 1) + [select_S]
    for layer, turns, chosen_S in zip(inner.layers, angles, chosen, strict=True):
        yield hidden_MD
        arguments = layer, family, layers, hidden_MD, turns, batch, chosen_S
        hidden_MD = layers.recomputed(_layer, *arguments) if checkpointing else _layer(*arguments)
    yield _norm(inner.norm, hidden_MD)


def _angles(inner: Any, hidden_MD: torch.Tensor, batch: Packed) -> list[Angles]:
    """Return for each layer the cosines and sines of its rotary positions; where layers are of two kinds, by kind."""
    rotary = inner.rotary_emb
    kinds = [layer.self_attn.layer_type if isinstance(rotary.rope_type, dict) else None for layer in inner.layers]
    found: dict[str | None, Angles] = {}
    for kind in dict.fromkeys(kinds):
        named = {"layer_type": kind} if kind else {}
        cos_1MD, sin_1MD = rotary(hidden_MD[None], batch.position_M[None], **named)
        found[kind] = cos_1MD[0], sin_1MD[0]
    return [found[kind] for kind in kinds]


def _layer(
    layer: Any,
    family: _Family,
    layers: LoraLayers,
    hidden_MD: torch.Tensor,
    angles: Angles,
    batch: Packed,
    select_S: torch.Tensor | None,
) -> torch.Tensor:
    """Return what a layer gives, at selected positions where these are given."""
    attention = layer.self_attn
    x_MD = _norm(layer.input_layernorm, hidden_MD)
    query_MO, key_MO, value_MO = _projected(attention, x_MD)
    key_MGD = rotate(_heads(attention, key_MO, "k_norm"), *angles)
    value_MGD = _heads(attention, value_MO)
    lengths = list(batch.lengths)
    with contextlib.ExitStack() as stack:
        if select_S is not None:
            lengths = torch.bincount(batch.row_M[select_S], minlength=len(lengths)).tolist()
            stack.enter_context(layers.chosen(select_S, lengths))
            hidden_MD, x_MD = hidden_MD.index_select(0, select_S), x_MD.index_select(0, select_S)
            query_MO = query_MO.index_select(0, select_S) if query_MO is not None else None
            angles = angles[0][select_S], angles[1][select_S]
        query_MO = attention.q_proj(x_MD) if query_MO is None else query_MO
        query_MHD = rotate(_heads(attention, query_MO, "q_norm"), *angles)
        mixed_MD = _attend(attention, family, query_MHD, key_MGD, value_MGD, lengths, batch, select_S)
        attended_MD, activation = attention.o_proj(mixed_MD), _ACTIVATIONS[getattr(attention.config, family.activation)]
        if not hasattr(layer, "pre_feedforward_layernorm"):
            hidden_MD = hidden_MD + attended_MD
            x_MD = _norm(layer.post_attention_layernorm, hidden_MD)
            return hidden_MD + _feed_forward(layer.mlp, x_MD, activation)
        # Gemma's four norms: what attention and feed-forward layer give is normed, too.
        hidden_MD = hidden_MD + _norm(layer.post_attention_layernorm, attended_MD)
        given_MD = _feed_forward(layer.mlp, _norm(layer.pre_feedforward_layernorm, hidden_MD), activation)
        return hidden_MD + _norm(layer.post_feedforward_layernorm, given_MD)


def _projected(attention: Any, x_MD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values; None for queries that have a module of their own, for which some may do."""
    if not hasattr(attention, "qkv_proj"):
        return None, attention.k_proj(x_MD), attention.v_proj(x_MD)
    kv = attention.num_key_value_heads * attention.head_dim
    query_MO, key_MO, value_MO = attention.qkv_proj(x_MD).tensor_split((-2 * kv, -kv), dim=1)
    return query_MO, key_MO, value_MO


def _heads(attention: Any, wide_MO: torch.Tensor, norm: str = "") -> torch.Tensor:
    """Return queries, keys or values by head, normed where the family does so."""
    heads = wide_MO.view(len(wide_MO), wide_MO.shape[1] // attention.head_dim, attention.head_dim)
    return _norm(getattr(attention, norm), heads) if hasattr(attention, norm) else heads


def _attend(
    attention: Any,
    family: _Family,
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
    rows = zip(
        torch.split(brought(query_MHD), counts),
        torch.split(brought(key_MGD), lengths),
        torch.split(brought(value_MGD), lengths),
        torch.split(batch.position_M if select_S is None else batch.position_M[select_S], counts),
        strict=True,
    )
    window, cap = family.window(attention), _value(attention.config, family.score_cap)
    mixed = []
    for query_THD, key_THD, value_THD, position_T in rows:
        short = window is None or len(key_THD) <= window
        plain = short and select_S is None and cap is None
        seen_TT = None if plain else _seen(position_T, len(key_THD), None if short else window)
        mixed.append(_attend_row(query_THD, key_THD, value_THD, seen_TT, attention.scaling, cap))
    return torch.cat(mixed).flatten(1).to(query_MHD.dtype)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _seen(position_T: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """Return which of a row's tokens queries at some of its positions see: none ahead, and none before the window."""
    back_TT = position_T[:, None] - torch.arange(length, device=position_T.device)
    return back_TT >= 0 if window is None else (back_TT >= 0) & (back_TT < window)


def _attend_row(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    seen_TT: torch.Tensor | None,
    scaling: float,
    cap: float | None,
) -> torch.Tensor:
    """Return what the queries of a row attend to, of all that stands before them or of what they are said to see."""
    query_1HTD, key_1HTD, value_1HTD = (x.transpose(0, 1)[None] for x in (query_THD, key_THD, value_THD))
    if cap is None:
        mixed_1HTD = torch.nn.functional.scaled_dot_product_attention(
            query_1HTD, key_1HTD, value_1HTD, attn_mask=seen_TT, is_causal=seen_TT is None, scale=scaling
        )
    else:
        assert seen_TT is not None
        score_1HTT = capped(query_1HTD @ key_1HTD.transpose(2, 3) * scaling, cap)
        mixed_1HTD = score_1HTT.masked_fill(~seen_TT, float("-inf")).softmax(-1) @ value_1HTD
    return mixed_1HTD[0].transpose(0, 1)


def _feed_forward(mlp: Any, x_MD: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return what a feed-forward layer gives, in one step where its modules are plain and no adapter stands at them."""
    fused = hasattr(mlp, "gate_up_proj")
    modules = [mlp.gate_up_proj, mlp.down_proj] if fused else [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if all(map(_is_plain, modules)):
        *before, down_DF = (module.weight for module in modules)
        gate_FD, up_FD = before[0].chunk(2) if fused else before
        return gated_mlp(x_MD, gate_FD, up_FD, down_DF, activation)
    whole: torch.Tensor = mlp(x_MD)
    return whole


def _is_plain(module: Any) -> bool:
    """Return whether a module is a product with a matrix and nothing else: no bias, no adapter, not quantised."""
    return not module._forward_hooks and module.bias is None and type(module) is torch.nn.Linear


def _norm(norm: Any, x_MD: torch.Tensor) -> torch.Tensor:
    """Return normed values; Gemma's norms keep the distance of their scales from 1, and add it in float32 at least."""
    if hasattr(norm, "eps"):
        return rms_norm(x_MD, 1.0 + wide(norm.weight), norm.eps)
    return rms_norm(x_MD, norm.weight, norm.variance_epsilon)
