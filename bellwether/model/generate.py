"""Generation in batches, greedy or drawn, with a KV cache.

Prompts are sorted by length, so that a batch has little padding, and padded at the left, so that every
row goes on at the same column. A batch holds no more rows than whose keys, values and scores have a place in
``MOST_BYTES``. The loop itself is transformers' own.

Shape legend: N rows of a batch, T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bellwether.errors import ModelError
from bellwether.model.base import Base
from bellwether.model.folder import quiet_transformers
from bellwether.model.lora import LoraLayers
from bellwether.tools.progress import ANSWERS, advance
from bellwether.tools.randomness import Randomness

MOST_BYTES = 2 * 2**30  # of keys, values and scores of a batch, so that rows of a large model do not fill the memory
SCORES = 3  # arrays of a row's scores, in float32, that are there at once


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: the logits are divided by it; above 0.
        top_p: only the likeliest tokens that together have this probability can be drawn (Holtzman et al. 2020,
            arXiv 1904.09751); 1 leaves all.
        seed: what is drawn derives from it.
    """

    temperature: float
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    layers: LoraLayers | None = None,
    slots: Sequence[int] | None = None,
    stop: Collection[int | str] = (),
    sampling: Sampling | None = None,
    on_step: Callable[[Mapping[int, int]], None] | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt.

    Args:
        base: the base model; LoRA layers that are attached to it take part as they are routed.
        prompts: token ids, at least one token each.
        max_new_tokens: tokens after which an answer ends; fewer where the model's positions end before.
        batch_size: N at most; less where keys, values and scores of so many rows would take more than ``MOST_BYTES``.
        layers: the attached layers, needed where ``slots`` is given.
        slots: the slot of each prompt's adapter; None leaves the routing to the caller.
        stop: further token ids that end an answer, beside those of the model and its tokenizer; and texts that do.
        sampling: how tokens are drawn; None takes the likeliest.
        on_step: is told the new token of each prompt of a batch after every step, by the prompt's number; one whose
            answer has ended is left out. What it raises ends the generation.

    Returns:
        New token ids in the order of the prompts, without the one that ended the answer. A text that ended it is still
        in them, since its first token may hold the answer's last letters: ``answer_text`` leaves it out.

    Raises:
        ModelError: a prompt is empty or longer than the model's positions.
    """
    ends = _Ends(base, stop)
    answers, done = [list[int]() for _ in prompts], 0
    advance(ANSWERS, done, len(prompts), "rows")
    for numbers, allowed in _batches(base, prompts, max_new_tokens, batch_size):
        streamer = _Steps(numbers, ends, on_step) if on_step is not None else None
        with _route(base, layers, [slots[number] for number in numbers] if slots is not None else None):
            new = _continue(base, [prompts[number] for number in numbers], allowed, ends, _drawn(sampling), streamer)
        for number, ids in zip(numbers, new, strict=True):
            answers[number] = ends.cut(ids)
        done += len(numbers)
        advance(ANSWERS, done, len(prompts), "rows")
    return answers


def answer_text(ids: Sequence[int], tokenizer: Any, stop: Collection[int | str] = (), *, going_on: bool = False) -> str:
    """Return an answer as text, without what ended it and white space around it.

    Args:
        ids: its tokens, as ``generate`` returns them.
        tokenizer: the base's.
        stop: as ``generate`` got it.
        going_on: whether more tokens are to come; what may become a text that ends the answer, or a letter of several
            tokens, is then held back.
    """
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    ends = [end for end in stop if isinstance(end, str)]
    text = text[: min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))]
    if going_on:
        text = text.rstrip("\ufffd")
        begun = (size for end in ends for size in range(1, len(end)) if text.endswith(end[:size]))
        text = text[: len(text) - max(begun, default=0)]
    return text.strip()


def ended_by_text(ids: Sequence[int], tokenizer: Any, stop: Collection[int | str]) -> bool:
    """Return whether an answer came to its end by a text that ends answers; arguments as of ``answer_text``."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return any(end in text for end in stop if isinstance(end, str))


class _Ends:
    """What ends an answer: certain tokens, and texts."""

    def __init__(self, base: Base, stop: Collection[int | str]) -> None:
        self.ids = sorted({*base.stop_ids, *(end for end in stop if isinstance(end, int))})
        self._texts = [end for end in stop if isinstance(end, str)]
        self._tokenizer = base.tokenizer
        # No more tokens than bytes can take part in a text, but for the one before it.
        self._reach = max((len(text.encode()) for text in self._texts), default=0) + 1

    def closed(self, ids: Sequence[int]) -> bool:
        """Return whether new tokens end with a whole text that ends an answer, the last token taking part in it."""
        if not self._texts:
            return False
        tail = self._tokenizer.decode(ids[-self._reach :], skip_special_tokens=True)
        return any(text in tail for text in self._texts)

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens before one that ends the answer, up to one that completes such a text."""
        kept = list(itertools.takewhile(lambda token: token not in self.ids, ids))
        return next((kept[:size] for size in range(1, len(kept) + 1) if self.closed(kept[:size])), kept)

    def criteria(self, width: int) -> list[Callable[..., torch.Tensor]]:
        """Return what tells transformers, after each step, which rows have ended; prompts are ``width`` wide."""

        def ended(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            tails = input_ids[:, width:][:, -self._reach :].tolist()
            return torch.tensor([self.closed(tail) for tail in tails], device=input_ids.device)

        return [ended] if self._texts else []


class _Steps:
    """Takes what transformers streams, the prompts first and then one token per row, and tells the new tokens.

    Args:
        numbers: the prompt of each row.
        ends: what ends an answer.
        tell: what to tell.
    """

    def __init__(self, numbers: Sequence[int], ends: _Ends, tell: Callable[[Mapping[int, int]], None]):
        self._rows: dict[int, int] | None = None
        self._numbers, self._ends, self._tell = numbers, ends, tell
        self._said: list[list[int]] = [[] for _ in numbers]

    def put(self, tokens: torch.Tensor) -> None:
        """Take the prompts, or the next token of each row; what follows the end of an answer is padding."""
        if self._rows is None:
            self._rows = dict(enumerate(self._numbers))
            return
        ended = {row for row in self._rows if int(tokens[row]) in self._ends.ids or self._ends.closed(self._said[row])}
        self._rows = {row: number for row, number in self._rows.items() if row not in ended}
        for row in self._rows:
            self._said[row].append(int(tokens[row]))
        self._tell({number: int(tokens[row]) for row, number in self._rows.items()})

    def end(self) -> None:
        """Take the end, of which there is nothing to tell."""


class _Noise:
    """Adds Gumbel noise to scores, so that the likeliest is one drawn from their softmax (Maddison et al. 2014,
    arXiv 1411.0030).

    transformers draws from torch's global generator, and for each row with other numbers. Here nothing global is
    touched, and all rows of a step are drawn with the same numbers: no answer depends on its neighbours, and models
    that think alike answer alike.
    """

    def __init__(self, seed: int) -> None:
        self._generator = Randomness(seed).torch("answers")

    def __call__(self, input_ids: torch.Tensor, scores_NV: torch.Tensor) -> torch.Tensor:
        waited_V = torch.empty(scores_NV.shape[1], dtype=torch.float64).exponential_(generator=self._generator)
        noise_V = -waited_V.clamp_min_(torch.finfo(torch.float64).tiny).log()
        return scores_NV + noise_V.to(scores_NV)


def _drawn(sampling: Sampling | None) -> list[Any]:
    """Return what transformers shall do with the scores of each step, before it takes the likeliest token."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if sampling is None:
        return []
    narrowed = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return [TemperatureLogitsWarper(sampling.temperature), *narrowed, _Noise(sampling.seed)]


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
        while numbers:
            size = min(batch_size, _fitting(base, len(prompts[numbers[0]]) + allowance))
            yield numbers[:size], allowance
            del numbers[:size]


def _fitting(base: Base, tokens: int) -> int:
    """Return how many rows of so many tokens a batch may have, one at least."""
    kept = sum(shape.outputs for shape in base.facts.linears if shape.path.endswith((".k_proj", ".v_proj")))
    width = kept or 2 * base.facts.layers * base.facts.hidden_size  # where keys and values have no modules of their own
    row: int = base.model.dtype.itemsize * tokens * width + 4 * SCORES * base.facts.vocabulary
    return max(1, MOST_BYTES // row)


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


def _continue(
    base: Base,
    prompts: Sequence[Sequence[int]],
    allowed: int,
    ends: _Ends,
    processors: list[Any],
    streamer: _Steps | None,
) -> list[list[int]]:
    """Return the new tokens of one batch, padding after the end included."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

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
        eos_token_id=ends.ids,
        pad_token_id=pad,
    )
    with quiet_transformers(), _last_states_in_a_row(base.model):
        out_NT = base.model.generate(
            inputs=ids_NT,
            attention_mask=attention_NT,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(ends.criteria(width)),
            streamer=streamer,
        )
    new: list[list[int]] = out_NT[:, width:].tolist()
    return new


@contextlib.contextmanager
def _last_states_in_a_row(model: Any) -> Iterator[None]:
    """Let the output layer have the states of each row's last token side by side in memory.

    As transformers cuts them out of all tokens' states, torch makes a batch of products of them, each with a copy of
    the layer's weights: of 0.3 GB a row with Gemma 3 270M in bfloat16, where 32 rows took 11 GB and most of the time.
    """

    def gather(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0].contiguous(), *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
