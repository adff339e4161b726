"""HetLoRA: clients of unlike ranks, whose factors are filled up with zeros to the server's rank and averaged.

Cho et al. 2024, arXiv 2401.06432. With client i's rank r_i and weight p_i, and A_i, B_i filled up with zero rows and
columns:

    Ā = Σ p_i A_i,    B̄ = Σ p_i B_i,    client i gets the first r_i rows of Ā and columns of B̄

As everywhere where A and B are averaged apart, B̄ Ā is not the mean of the products B_i A_i.

Weights: in the paper p_i is proportional to the norm of client i's product, so that sparser updates count less
(``norm_weights``). Whoever sends large values gets a large weight so, up to the norm at which the server refuses an
update (``federation.max_norm``); therefore clients are weighted by rows unless a recipe says otherwise.

Deviations. The scaling s_i is alpha / r_i, another one at each rank: B is brought to the scaling of whoever holds it,
so that what a client gets are the server's own directions, no louder, and what it sends comes back as it was trained;
norms are those of s_i B_i A_i over all modules. A row that no client of the round has stays as it was: zeros would end
it for ever. Clients do not prune their own ranks while they train, which the paper has as well: a client's rank is what
the recipe says.

Shape legend: R rank of the server's adapter, r of a client's, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import AdapterConfig, key_a, key_b, scaling_of
from bellwether.exchange.messages import Update
from bellwether.method.flexlora import of_its_rank
from bellwether.method.method import Closing, Method, State, by_rows


def hetlora(norm_weights: bool = False) -> Method:
    """Return HetLoRA; clients may have unlike ranks.

    Args:
        norm_weights: whether clients are weighted by the norms of their products, as in the paper, instead of by rows.
    """

    def close(closing: Closing) -> State:
        if not closing.updates:
            return closing.state
        config = closing.state.adapter.config
        weights = [product_norm(one, config) if norm_weights else by_rows(one) for one in closing.updates]
        if not any(weights):  # all products are zero, and of no weights is there a mean
            weights = [by_rows(one) for one in closing.updates]
        return _padded_mean(closing, np.array(weights) / sum(weights))

    return Method(close, give=of_its_rank, mixed_ranks=True)


def product_norm(update: Update, config: AdapterConfig) -> float:
    """Return ‖s B A‖ over all modules, Frobenius, of ‖B A‖² = tr(B^T B A A^T) without ever making B A.

    Args:
        update: of one client, of any rank.
        config: the server's, for modules and scalings.
    """
    square = 0.0
    for module in config.modules:
        a_rI, b_Or = (update.tensors[key(module)].astype(np.float64) for key in (key_a, key_b))
        square += scaling_of(config, len(a_rI)) ** 2 * float(((b_Or.T @ b_Or) * (a_rI @ a_rI.T)).sum())
    return float(np.sqrt(max(square, 0.0)))


def _padded_mean(closing: Closing, shares: NDArray[np.float64]) -> State:
    """Return the state after a round: the mean of the factors, filled up with zeros, by the clients' shares."""
    before = closing.state.adapter
    tensors: dict[str, NDArray[Any]] = {}
    for module in before.config.modules:
        a_RI, b_OR = (before.tensors[key(module)].astype(np.float64) for key in (key_a, key_b))
        reached = max(len(one.tensors[key_a(module)]) for one in closing.updates)
        a_RI[:reached], b_OR[:, :reached] = 0.0, 0.0
        for share, one in zip(shares, closing.updates, strict=True):
            a_rI, b_Or = (one.tensors[key(module)].astype(np.float64) for key in (key_a, key_b))
            rank = len(a_rI)
            a_RI[:rank] += share * a_rI
            b_OR[:, :rank] += share * scaling_of(before.config, rank) / before.config.scaling * b_Or
        tensors |= {key_a(module): a_RI, key_b(module): b_OR}
    return replace(closing.state, adapter=before.updated(tensors))
