"""The exact mean of the clients' products, which no one adapter of their rank can hold, folded into the base.

With client i's rank r_i, scaling s_i and share of rows p_i, and M = Σ p_i s_i B_i A_i:

    FLoRA           W ← W + M                   every round begins with a new A and a B of zero
    FedEx-LoRA      W ← W + M - s B̄ Ā           every round begins with Ā = Σ p_i A_i and B̄ = Σ p_i B_i

FLoRA: Wang et al. 2024, arXiv 2409.05976. FedEx-LoRA: Singhal et al. 2024, arXiv 2410.09432.
Both ways base and adapter together are, in the next round, what the mean of the clients' was. The sum of all that was
folded so far travels as factors to every client in every round, since one that was away has missed some of it; in the
papers clients keep it, and what came in a round travels alone. Clients are weighted by rows: FedEx-LoRA's release
weighs all alike. After many rounds the rank of what is folded is that of the weights, so both are for models whose
adapted weights have a place in memory once more.

Shape legend: R rank, I inputs, O outputs, K sum of ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import Adapter, key_a, key_b
from bellwether.method.flexlora import of_its_rank
from bellwether.method.method import Closing, Method, State, by_rows, mean_of
from bellwether.method.products import Product, added, mean_product
from bellwether.tools.randomness import Randomness


def flora() -> Method:
    """Return FLoRA; clients may have unlike ranks."""
    return Method(_fold_all, give=of_its_rank, mixed_ranks=True, folds=True, begins_anew=True)


def fedex_lora() -> Method:
    """Return FedEx-LoRA."""
    return Method(_fold_the_rest, folds=True)


def _fold_all(closing: Closing) -> State:
    """Fold the mean of products, and begin anew."""
    state = closing.state
    if not closing.updates:
        return state
    more = {module: mean_product(module, closing.updates, state.adapter) for module in state.adapter.config.modules}
    begun = _anew(state.adapter, closing.randomness, closing.round)
    return replace(state, adapter=begun, folded=added(state.folded, more, state.adapter))


def _anew(adapter: Adapter, randomness: Randomness, round: int) -> Adapter:
    """Return an adapter with a new A, drawn evenly below 1 / √I as PEFT draws it, and a B of zero."""
    draws = randomness.numpy("new adapter", round=round)
    tensors: dict[str, NDArray[Any]] = {}
    for module in adapter.config.modules:
        a_RI, b_OR = adapter.tensors[key_a(module)], adapter.tensors[key_b(module)]
        bound = 1 / np.sqrt(a_RI.shape[1])
        tensors |= {key_a(module): draws.uniform(-bound, bound, a_RI.shape), key_b(module): np.zeros_like(b_OR)}
    return adapter.updated(tensors)


def _fold_the_rest(closing: Closing) -> State:
    """Take the means of A and of B, and fold what their product lacks."""
    state = closing.state
    if not closing.updates:
        return state
    adapter = state.adapter.updated(mean_of(closing.updates, by_rows).tensors)
    more = {module: _lacking(module, closing, adapter) for module in adapter.config.modules}
    return replace(state, adapter=adapter, folded=added(state.folded, more, adapter))


def _lacking(module: str, closing: Closing, adapter: Adapter) -> Product:
    """Return the mean of products less the product of means, Σ p_i s (B_i - B̄) (A_i - Ā)."""
    left_OK, right_KI = mean_product(module, closing.updates, adapter)
    a_RI, b_OR = (adapter.tensors[key(module)].astype(np.float64) for key in (key_a, key_b))
    total, scaling = sum(map(by_rows, closing.updates)), adapter.config.scaling
    means_OK = np.concatenate([by_rows(update) / total * scaling * b_OR for update in closing.updates], axis=1)
    return Product(left_OK - means_OK, right_KI - np.tile(a_RI, (len(closing.updates), 1)))
