"""What the current model makes of whole rows: the hidden states of its layers, pooled per row.

Rows run in batches of like length that hold about so many tokens, and each layer's hidden states are pooled as soon as
they are there, so that memory grows with the number of rows by the pooled vectors alone. The output layer never runs.

Shape legend: N rows, M tokens of the rows of a batch, P positions of a batch, padding among them, S selected positions,
D hidden size, F values of a row: D for each layer that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bellwether.errors import ModelError
from bellwether.model import decoder
from bellwether.model.base import Base
from bellwether.model.batch import Packed, pack, padded
from bellwether.model.forward import run_padded
from bellwether.model.kernels import wide
from bellwether.model.lora import LoraLayers
from bellwether.tools.progress import advance

Pooling = Literal["last", "mean"]
TOKENS = 2048  # that run through a model at once


def pooled_states(
    base: Base,
    layers: LoraLayers,
    rows: Sequence[NDArray[np.int64]],
    *,
    pooling: Pooling,
    chosen: Sequence[int] | None = None,
    tokens: int = TOKENS,
) -> NDArray[Any]:
    """Return the hidden states of the model with the adapter in slot 0, pooled per row and joined over layers.

    Nothing is dropped and no gradient is prepared.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it that hold the adapter.
        rows: token ids of prompt and response of each row, at least one each.
        pooling: ``last`` takes the state at a row's last token, ``mean`` the mean over its tokens.
        chosen: numbers of hidden states, as ``state_numbers`` takes them.
        tokens: how many tokens run through the model at once, padding among them; a longer row runs alone.

    Returns:
        features_NF in the order of ``rows``; float32, or float64 where the model is.

    Raises:
        ModelError: as ``state_numbers``; the model's layers cannot be found.
    """
    numbers = state_numbers(base.facts.layers, chosen)
    features_NF = np.empty((0, len(numbers) * base.facts.hidden_size), np.float32)
    # Not inference mode: tables that a model makes anew for a longer row, and keeps, could not be trained with later.
    done = 0
    with layers.merged():
        for members in by_tokens([len(ids_T) for ids_T in rows], tokens):
            batch = pack([rows[member] for member in members], base.device)
            pooled = _run(base.model, layers, batch, pooling, set(numbers))
            part_NF = torch.cat([pooled[number] for number in numbers], dim=1).cpu().numpy()
            if not len(features_NF):
                features_NF = np.empty((len(rows), part_NF.shape[1]), part_NF.dtype)
            features_NF[members] = part_NF
            done += len(members)
            advance("computing features", done, len(rows), "rows")
    return features_NF


def state_numbers(layers: int, chosen: Sequence[int] | None) -> tuple[int, ...]:
    """Return the numbers of hidden states as transformers counts them: 0 is the embedding, L the last, normed state.

    Args:
        layers: L, of the model.
        chosen: numbers, negative ones from the end; None takes all, 0 to L.

    Raises:
        ModelError: none is given, a number is none of the model's, or one is given twice.
    """
    if chosen is None:
        return tuple(range(layers + 1))
    for number in chosen:
        if not -layers - 1 <= number <= layers:
            raise ModelError(
                f"selection.layers names {number}, but the model has the hidden states 0 (its embedding) to {layers} "
                "(its last); give some of these, or negative numbers to count from the last, -1."
            )
    numbers = tuple(number % (layers + 1) for number in chosen)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ModelError(
            f"selection.layers is {list(chosen)}, of the hidden states 0 to {layers}; name each that is wanted once, "
            "or leave the field out to take all."
        )
    return numbers


def by_tokens(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of like length, longest rows first, so that memory is known after the first.

    Args:
        lengths: tokens of each row.
        tokens: what a batch holds at most when its rows are padded to the longest; a longer row stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        size = max(1, tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def _run(
    model: Any, layers: LoraLayers, batch: Packed, pooling: Pooling, wanted: Collection[int]
) -> dict[int, torch.Tensor]:
    """Return the wanted hidden states of a batch, pooled, by number."""
    run = _end_to_end if decoder.fits(model) else _as_transformers
    return run(model, layers, batch, pooling, wanted)


def _end_to_end(
    model: Any, layers: LoraLayers, batch: Packed, pooling: Pooling, wanted: Collection[int]
) -> dict[int, torch.Tensor]:
    """Return pooled states of rows that run through our own decoder, no further than they are wanted."""
    place_M = torch.arange(len(batch.ids_M), device=batch.ids_M.device)
    pool, last_S = pooler(batch, place_M, pooling), _ends(batch, place_M) if pooling == "last" else None
    pooled: dict[int, torch.Tensor] = {}
    with layers.routed(None, None, batch.lengths):
        for number, hidden_MD in enumerate(decoder.layer_states(model, layers, batch, last_S)):
            if number in wanted:
                # The decoder has chosen among the positions of its last state itself.
                chosen = last_S is not None and number == len(model.get_decoder().layers)
                pooled[number] = wide(hidden_MD) if chosen else pool(hidden_MD)
            if number == max(wanted):
                break
    return pooled


def _as_transformers(
    model: Any, layers: LoraLayers, batch: Packed, pooling: Pooling, wanted: Collection[int]
) -> dict[int, torch.Tensor]:
    """Return pooled states of rows padded at the right, taken where transformers' own layers give them."""
    ids_NT, place_M = padded(batch)
    pool, inner = pooler(batch, place_M, pooling), model.get_decoder()
    pooled: dict[int, torch.Tensor] = {}

    def take(number: int, hidden: Any) -> None:
        if number in wanted:
            pooled[number] = pool(hidden[0] if isinstance(hidden, tuple) else hidden)

    first, *more = _blocks(model, inner)
    handles = [first.register_forward_pre_hook(lambda module, args: take(0, args[0]))]
    for number, block in enumerate([first, *more][:-1], start=1):
        handles.append(block.register_forward_hook(lambda module, args, output, number=number: take(number, output)))
    try:
        with layers.routed(None, None, [ids_NT.shape[1]] * len(ids_NT)):
            take(len(more) + 1, run_padded(inner, ids_NT).last_hidden_state)
    finally:
        for handle in handles:
            handle.remove()
    return pooled


def _blocks(model: Any, inner: Any) -> list[torch.nn.Module]:
    """Return the layers of a decoder, each of which hands its hidden states to the next.

    Raises:
        ModelError: they cannot be told.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [list(part) for part in inner.children() if isinstance(part, torch.nn.ModuleList) and len(part) == count]
    if len(found) != 1:
        raise ModelError(
            f"The layers of {type(model).__name__} cannot be found, so it gives no hidden states; take another base "
            "model, or set selection.features to proxy."
        )
    return found[0]


def pooler(batch: Packed, place_M: torch.Tensor, pooling: Pooling) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what pools hidden states per row.

    Args:
        batch: the rows.
        place_M: at which position each of their tokens stands in what is pooled.
        pooling: ``last`` or ``mean``.

    Returns:
        A function of hidden states, as (P, D) or (N, T, D), that gives pooled_ND in float32 at least.
    """
    if pooling == "last":
        last_N = _ends(batch, place_M)
        return lambda hidden: wide(hidden.reshape(-1, hidden.shape[-1])[last_N])

    def mean(hidden: torch.Tensor) -> torch.Tensor:
        hidden_PD = wide(hidden.reshape(-1, hidden.shape[-1]))
        # A product with a matrix, since adding up row by row takes as long as a layer of a small model.
        share_NP = hidden_PD.new_zeros(len(batch.lengths), len(hidden_PD))
        share_NP[batch.row_M, place_M] = (1.0 / hidden_PD.new_tensor(batch.lengths))[batch.row_M]
        return share_NP @ hidden_PD

    return mean


def _ends(batch: Packed, place_M: torch.Tensor) -> torch.Tensor:
    """Return the positions of the rows' last tokens."""
    return place_M[torch.tensor(np.cumsum(batch.lengths) - 1, device=place_M.device)]
