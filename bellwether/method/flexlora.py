"""FlexLoRA: clients of unlike ranks, whose products are averaged and dealt out again by their singular values.

Bai et al. 2024, arXiv 2402.11505, section 3: with client i's rank r_i, scaling s_i and share of rows p_i,

    M = Σ p_i s_i B_i A_i = U Σ V^T,      client i gets    B = U_r Σ_r / s_i,    A = V_r^T    of its own rank r

The server keeps the largest singular values up to the recipe's ``lora.rank``, beyond which no client's rank may go.
Left open by the paper: every row of A gets the sign that makes its largest entry positive, and where M has fewer
directions than the rank, the other rows of A stay as they were, with a B of zero, so that they can still learn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import key_a, key_b
from bellwether.exchange.messages import Payload
from bellwether.method.method import Closing, Known, Method, State
from bellwether.method.products import cut, factors, mean_product


def flexlora() -> Method:
    """Return FlexLoRA; clients are weighted by their rows."""
    return Method(_close, give=of_its_rank, mixed_ranks=True, begins_anew=True)


def of_its_rank(state: State, client: Known, round: int) -> Payload:
    """Send a client the first directions of the adapter, as many as its rank."""
    return Payload(cut(state.adapter, client.rank), folded=state.folded)


def _close(closing: Closing) -> State:
    """Make the next adapter of the mean of products, module by module."""
    if not closing.updates:
        return closing.state
    before = closing.state.adapter
    tensors: dict[str, NDArray[Any]] = {}
    for module in before.config.modules:
        mean = mean_product(module, closing.updates, before)
        a_RI, b_OR = factors(*mean, before.tensors[key_a(module)].astype(np.float64))
        tensors |= {key_a(module): a_RI, key_b(module): b_OR / before.config.scaling}
    return replace(closing.state, adapter=before.updated(tensors))
