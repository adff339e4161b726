"""Greedy generation in batches, with a KV cache.

Prompts are sorted by length, so that a batch has little padding, and padded at the left, so that every
row goes on at the same column. The loop itself is transformers' own.

Shape legend: N rows of a batch, T tokens.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence

import torch

from bellwether.errors import ModelError
from bellwether.model.base import Base
from bellwether.model.folder import quiet_transformers
from bellwether.model.lora import LoraLayers


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    layers: LoraLayers | None = None,
    slots: Sequence[int] | None = None,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """Return the greedy continuation of each prompt.

    Args:
        base: the base model; LoRA layers that are attached to it take part as they are routed.
        prompts: token ids, at least one token each.
        max_new_tokens: tokens after which an answer ends; fewer where the model's positions end before.
        batch_size: N at most.
        layers: the attached layers, needed where ``slots`` is given.
        slots: the slot of each prompt's adapter; None leaves the routing to the caller.
        stop: further token ids that end an answer, beside those of the model and its tokenizer.

    Returns:
        New token ids in the order of the prompts, without the one that ended the answer.

    Raises:
        ModelError: a prompt is empty or longer than the model's positions.
    """
    ends = {*base.stop_ids, *stop}
    answers: list[list[int]] = [[] for _ in prompts]
    for numbers, allowed in _batches(base, prompts, max_new_tokens, batch_size):
        with _route(base, layers, [slots[number] for number in numbers] if slots is not None else None):
            new = _continue(base, [prompts[number] for number in numbers], allowed, ends)
        for number, ids in zip(numbers, new, strict=True):
            answers[number] = list(itertools.takewhile(lambda token: token not in ends, ids))
    return answers


def _batches(
    base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Yield prompt numbers, longest first, with the new tokens that all prompts of the batch may have.

    Prompts of different allowance never share a batch, so that no answer depends on its neighbours.
    """
    allowed = [_allowance(base, prompt, max_new_tokens) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    for allowance, group in itertools.groupby(order, key=lambda number: allowed[number]):
        numbers = list(group)
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size], allowance


def _allowance(base: Base, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens may follow a prompt."""
    limit = base.facts.max_positions
    if not prompt or (limit is not None and len(prompt) > limit):
        raise ModelError(
            f"A prompt has {len(prompt)} tokens, but {base.name} goes on from 1 to {limit or 'any number'}; "
            "lower data.max_tokens."
        )
    # The last new token is never fed back, so it needs no position.
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt) + 1)


def _route(
    base: Base, layers: LoraLayers | None, slots: Sequence[int] | None
) -> contextlib.AbstractContextManager[None]:
    """Return the context that routes a batch's rows to their slots."""
    if slots is None:
        return contextlib.nullcontext()
    if layers is None:
        raise ValueError("slots are given without the layers that hold them")
    return layers.routed(slots)


def _continue(base: Base, prompts: Sequence[Sequence[int]], allowed: int, ends: set[int]) -> list[list[int]]:
    """Return the new tokens of one batch, padding after the end included."""
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    pad = int(base.tokenizer.pad_token_id)
    ids_NT = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=base.device)
    attention_NT = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device
    )
    settings = GenerationConfig(
        max_new_tokens=allowed,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    with quiet_transformers():
        out_NT = base.model.generate(inputs=ids_NT, attention_mask=attention_NT, generation_config=settings)
    new: list[list[int]] = out_NT[:, width:].tolist()
    return new
