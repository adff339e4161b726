"""Scoring rows with an adapter: loss per response token, generated answers, ROUGE-L, exact match."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bellwether.client.batches import by_length, collate
from bellwether.data.chat import without_reasoning
from bellwether.data.rows import TokenRow
from bellwether.exchange.scores import Totals, add_up, exact_match, rouge_l
from bellwether.model.base import Base
from bellwether.model.forward import token_losses
from bellwether.model.generate import answer_text, generate
from bellwether.model.lora import LoraLayers
from bellwether.recipe.recipe import Evaluation
from bellwether.tools.progress import LOSSES, REFERENCE, advance


@dataclass(frozen=True)
class Scored:
    """One scored row: its totals, and the generated answer, None where none was asked for."""

    totals: Totals
    answer: str | None


def score(
    base: Base, layers: LoraLayers, rows: Sequence[TokenRow], evaluation: Evaluation, stop: Collection[int | str] = ()
) -> list[Scored]:
    """Score rows with the adapter in slot 0.

    Args:
        base: the frozen base model.
        layers: LoRA layers that hold the adapter.
        rows: token rows; the loss is taken on their response tokens, whatever was trained.
        evaluation: batch size, and whether and how long to generate.
        stop: token ids and texts that end an answer beside the model's own, such as a chat template's end of turn.

    Returns:
        One result per row, in the order of ``rows``.
    """
    losses = answer_losses(base, layers, rows, evaluation.batch_size)
    references = losses
    if any(row.rejected is not None for row in rows):
        with layers.disabled():
            references = answer_losses(base, layers, rows, evaluation.batch_size, REFERENCE)
    answers = _answers(base, layers, rows, evaluation, stop) if evaluation.generate else [None] * len(rows)
    return [_scored(*of_row) for of_row in zip(rows, losses, references, answers, strict=True)]


def by_category(rows: Sequence[TokenRow], scored: Sequence[Scored]) -> Mapping[str, Totals]:
    """Return totals by category, in alphabetical order; rows without one stand under ''."""
    return add_up((row.category, result.totals) for row, result in zip(rows, scored, strict=True))


def by_group(rows: Sequence[TokenRow], scored: Sequence[Scored]) -> Mapping[str, Totals]:
    """Return totals by group (language or domain), in alphabetical order; rows without one stand under ''."""
    return add_up((row.group, result.totals) for row, result in zip(rows, scored, strict=True))


def _scored(row: TokenRow, losses: Sequence[float], references: Sequence[float], answer: str | None) -> Scored:
    """Return a row's totals from the summed losses of its answers, those of the untuned base where it has two, and
    what was generated, of which its reasoning is left out.
    """
    totals = Totals(rows=1, tokens=int(row.response_T[1:].sum()), loss=losses[0])
    if row.rejected is not None:
        # Of implicit rewards, log π − log π_ref, the difference, over β.
        margin = (losses[1] - references[1]) - (losses[0] - references[0])
        totals = replace(totals, pairs=1, preferred=0.5 if margin == 0 else float(margin > 0))
    if answer is None:
        return Scored(totals, None)
    said, wanted = without_reasoning(answer), without_reasoning(row.response)
    similarity, exact = rouge_l(said, wanted), int(exact_match(said, wanted))
    return Scored(replace(totals, generated=1, rouge_l=similarity, exact=exact), answer)


def answer_losses(
    base: Base, layers: LoraLayers, rows: Sequence[TokenRow], size: int, phase: str = LOSSES
) -> list[list[float]]:
    """Return of each row the cross-entropy summed over the response tokens of each of its answers, in nats.

    Arguments as in ``row_losses``; the answers of ``size`` rows run through the base at once.
    """
    answers = max((len(row.answers) for row in rows), default=1)
    flat = iter(row_losses(base, layers, [one for row in rows for one in row.answers], answers * size, phase))
    return [[next(flat) for _ in row.answers] for row in rows]


@torch.no_grad()
def row_losses(base: Base, layers: LoraLayers, rows: Sequence[TokenRow], size: int, phase: str = LOSSES) -> list[float]:
    """Return each row's cross-entropy summed over its response tokens, in nats.

    Args:
        base: the frozen base model.
        layers: LoRA layers that hold the adapter in slot 0.
        rows: the rows.
        size: rows that run through the base at once.
        phase: what those who watch are told that this is.
    """
    losses, done = [0.0] * len(rows), 0
    advance(phase, done, len(rows), "rows")
    for numbers in by_length([len(row) for row in rows], size):
        batch = collate([rows[number] for number in numbers], base.device, responses=True)
        loss_S = token_losses(base.model, layers, batch)
        # The row of each selected position adds the positions' losses up per row.
        row_S = batch.row_M[batch.select_S]
        loss_N = torch.zeros(len(numbers), dtype=loss_S.dtype, device=loss_S.device).index_add_(0, row_S, loss_S)
        for number, loss in zip(numbers, loss_N.tolist(), strict=True):
            losses[number] = loss
        done += len(numbers)
        advance(phase, done, len(rows), "rows")
    return losses


def _answers(
    base: Base, layers: LoraLayers, rows: Sequence[TokenRow], evaluation: Evaluation, stop: Collection[int | str]
) -> list[str]:
    """Return the greedy answer to each row's prompt."""
    prompts = [row.ids_T[: row.prompt_length].tolist() for row in rows]
    with layers.routed(None):
        answers = generate(base, prompts, evaluation.max_new_tokens, evaluation.batch_size, stop=stop)
    return [answer_text(ids, base.tokenizer, stop) for ids in answers]
