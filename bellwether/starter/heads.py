"""A start for a small Llama from which copying out of the context is learnt at once.

Copying needs two attention heads that work together, one that writes into each position which token came
before it, and one in the next layer that finds the position whose forerunner equals the current token and
brings its token back (an induction head). From random weights a small model needs very long to find both;
here layer 0 starts with two heads of the first kind and layer 1 with two of the second, roughly, and training
does the rest.

Shape legend: V vocabulary, D width of the model, H width of a head, F = H / 2 rotary frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONSTANT = 0.3  # the first coordinate of every embedding, on which heads without content can rest
SPREAD = 0.05  # standard deviation of the others
PEAK = 25.0  # attention logit of the looked-for position


def seed_copying(model: Any, generator: torch.Generator) -> None:
    """Start a model's embedding and the first two heads of layers 0 and 1 for copying, in place.

    Args:
        model: a LlamaForCausalLM in float32, freshly initialised, with two layers and two heads at least.
        generator: where the random projections come from.
    """
    embedding_VD = model.model.embed_tokens.weight
    width, head = model.config.hidden_size, model.config.head_dim
    rms = (CONSTANT**2 / width + SPREAD**2) ** 0.5
    with torch.no_grad():
        embedding_VD.normal_(0.0, SPREAD, generator=generator)
        embedding_VD[:, 0] = CONSTANT
        frame_DD = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        for number in range(2):
            rows = slice(number * head, (number + 1) * head)
            read_HD = frame_DD[rows]
            _previous_token(model, rows, read_HD, CONSTANT / rms)
            _match_and_copy(model, rows, read_HD, generator)


def _previous_token(model: Any, rows: slice, read_HD: Tensor, constant: float) -> None:
    """Make a head of layer 0 look one position back and write what it reads into a space of its own."""
    attention = model.model.layers[0].self_attn
    head = read_HD.shape[0]
    angle_F = model.model.rotary_emb.inv_freq.float()
    # Only fast frequencies tell neighbours apart.
    used_F = (torch.arange(head // 2) < head // 5).float()
    size = (PEAK * head**0.5 / used_F.sum()).sqrt() / constant
    query_H = torch.cat([used_F, torch.zeros_like(used_F)]) * size
    # Turned one step ahead, so that the product with the rotated query is largest one position back.
    key_H = torch.cat([used_F * angle_F.cos(), used_F * angle_F.sin()]) * size
    for projection, values_H in ((attention.q_proj, query_H), (attention.k_proj, key_H)):
        projection.weight[rows] = 0.0
        projection.weight[rows, 0] = values_H
    attention.v_proj.weight[rows] = read_HD
    # What is written lies apart from what was read: coordinates shifted by half the width.
    attention.o_proj.weight[:, rows] = _apart(read_HD).T * SPREAD * 2


def _match_and_copy(model: Any, rows: slice, read_HD: Tensor, generator: torch.Generator) -> None:
    """Make a head of layer 1 find what followed the current token before, and bring it back."""
    attention = model.model.layers[1].self_attn
    head = read_HD.shape[0]
    # Only slow frequencies keep their direction over the length of a text.
    slow_H = (torch.arange(head) % (head // 2) >= head // 4).float()
    mix_HH = torch.linalg.qr(torch.randn(head, head, generator=generator))[0] * slow_H[:, None] * 2.2
    attention.q_proj.weight[rows] = mix_HH @ read_HD
    attention.k_proj.weight[rows] = mix_HH @ _apart(read_HD)
    attention.v_proj.weight[rows] = read_HD
    attention.o_proj.weight[:, rows] = read_HD.T * SPREAD * 2


def _apart(read_HD: Tensor) -> Tensor:
    """Return an orthonormal frame that hardly overlaps with a given one."""
    return torch.roll(read_HD.flip(0), shifts=read_HD.shape[1] // 2, dims=1)
