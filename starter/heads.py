"""A start for a small Llama from which looking things up in the context is learnt at once.

Looking up needs attention heads of two layers that work together: in the first, heads that write into each
position which tokens came shortly before it; in the second, heads that find a position by one of those tokens
and bring another one back. From random weights a small model needs very long to find both at once. Here layer 0
starts with heads that look one, two, three and four positions back, and layer 1 with heads that look up, all
roughly; training does the rest.

    heads of layer 1    look for                   bring back
    0 and 1             what followed this token   that token ("A B ... A" - "B"; induction)
    2                   the token three before     what came three before it ("A sold the B ... B was sold by" - "A")
    3                   the token two before       what came just before it ("in A B sold ... B was in" - "A")

The coordinates of the residual stream start divided, so that the heads do not blur each other: the first is a
constant, the others of the lower half tell tokens apart, and the upper half holds what layer 0 looked back to.

Shape legend: V vocabulary, D width of the model, H width of a head, F = H / 2 rotary frequencies, S = D / 2
coordinates of a half, P coordinates of the upper half that belong to one offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONSTANT = 0.3  # the first coordinate of every embedding, on which heads without content can rest
SPREAD = 0.07  # standard deviation of the coordinates that tell tokens apart
PEAK = 25.0  # attention logit of the position that a head looks back to
MATCH = 2.2  # size of the projections that are compared
SHARES = {1: (0.0, 0.375), 2: (0.375, 0.59375), 3: (0.59375, 0.8125), 4: (0.8125, 1.0)}  # of a half, by offset


def seed_lookup(model: Any, generator: torch.Generator) -> None:
    """Start a model's embedding and the heads of layers 0 and 1 for looking things up, in place.

    Args:
        model: a LlamaForCausalLM in float32, freshly initialised, with two layers and four heads at least.
        generator: where the random projections come from.
    """
    embedding_VD = model.model.embed_tokens.weight
    half = model.config.hidden_size // 2
    with torch.no_grad():
        embedding_VD[:, :half].normal_(0.0, SPREAD, generator=generator)
        embedding_VD[:, 0] = CONSTANT
        constant = CONSTANT / float(embedding_VD.pow(2).mean().sqrt())
        frame_SS = torch.linalg.qr(torch.randn(half, half, generator=generator))[0]
        for head, offset in enumerate(SHARES):
            _look_back(model, head, offset, frame_SS, constant)
        reads = {offset: _reads(offset, frame_SS) for offset in SHARES}
        own_SD = torch.cat([frame_SS, torch.zeros_like(frame_SS)], dim=1)
        for head in (0, 1):
            copied_PD = own_SD[head * half // 2 : (head + 1) * half // 2]
            _look_up(model, head, reads[1][0], reads[1][1], (copied_PD, copied_PD), generator)
        _look_up(model, 2, reads[3][1], reads[3][0], (reads[3][1], reads[3][0]), generator)
        _look_up(model, 3, reads[2][1], reads[2][0], (reads[1][1], reads[1][0]), generator)


def _reads(offset: int, frame_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Return projections that read, of a position, the token itself and the token ``offset`` before, alike."""
    half = len(frame_SS)
    start, stop = (round(share * half) for share in SHARES[offset])
    own_PD = torch.cat([frame_SS[start:stop], torch.zeros(stop - start, half)], dim=1)
    before_PD = torch.zeros(stop - start, 2 * half)
    before_PD[:, half + start : half + stop] = torch.eye(stop - start)
    return own_PD, before_PD


def _look_back(model: Any, head: int, offset: int, frame_SS: Tensor, constant: float) -> None:
    """Make a head of layer 0 look ``offset`` positions back and write what it reads to coordinates of its own."""
    attention = model.model.layers[0].self_attn
    width = model.config.head_dim
    own_PD, before_PD = _reads(offset, frame_SS)
    angle_F = model.model.rotary_emb.inv_freq.float()
    # Only fast frequencies tell neighbours apart.
    used_F = (torch.arange(width // 2) < width // 5).float()
    scale = (PEAK * width**0.5 / used_F.sum()).sqrt() / constant
    query_H = torch.cat([used_F, torch.zeros_like(used_F)]) * scale
    # Turned ahead, so that the product with the rotated query is largest ``offset`` positions back.
    key_H = torch.cat([used_F * (offset * angle_F).cos(), used_F * (offset * angle_F).sin()]) * scale
    rest_D = torch.eye(2 * len(frame_SS))[0]
    _set_head(attention, head, torch.outer(query_H, rest_D), torch.outer(key_H, rest_D), own_PD, before_PD * SPREAD)


def _look_up(
    model: Any, head: int, query_PD: Tensor, key_PD: Tensor, moved: tuple[Tensor, Tensor], generator: torch.Generator
) -> None:
    """Make a head of layer 1 find the position whose key equals the query, and move something from there."""
    width = model.config.head_dim
    # Only slow frequencies keep their direction over the length of a text.
    slow_H = (torch.arange(width) % (width // 2) >= width // 4).float()
    mix_HH = torch.linalg.qr(torch.randn(width, width, generator=generator))[0] * slow_H[:, None] * MATCH
    mix_HP = mix_HH[:, : len(query_PD)]
    query_HD, key_HD = mix_HP @ query_PD[:width], mix_HP @ key_PD[:width]
    _set_head(model.model.layers[1].self_attn, head, query_HD, key_HD, moved[0], moved[1] * SPREAD)


def _set_head(attention: Any, head: int, query_HD: Tensor, key_HD: Tensor, value_PD: Tensor, output_PD: Tensor) -> None:
    """Set the four projections of one head; rows that are not given become zero."""
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    for projection, given in ((attention.q_proj, query_HD), (attention.k_proj, key_HD), (attention.v_proj, value_PD)):
        projection.weight[rows] = 0.0
        projection.weight[rows.start : rows.start + len(given)] = given
    attention.o_proj.weight[:, rows] = 0.0
    attention.o_proj.weight[:, rows.start : rows.start + len(output_PD)] = output_PD.T
