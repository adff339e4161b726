"""FlexLoRA: clients of unlike ranks, whose products are averaged and dealt out again by their singular values.

Bai et al. 2024, arXiv 2402.11505, section 3: with client i's rank r_i, scaling s_i and share of rows p_i,

    M = Σ p_i s_i B_i A_i = U Σ V^T,      client i gets    B = U_r Σ_r / s_i,    A = V_r^T    of its own rank r

The factors are stacked and brought to a small core by two QR decompositions, so that no matrix as large as the weight
is ever made. The server keeps the largest singular values up to the recipe's ``lora.rank``, beyond which no client's
rank may go. Left open by the paper: every row of A gets the sign that makes its largest entry positive, and where M has
fewer directions than the rank, the other rows of A stay as they were, with a B of zero, so that they can still learn.

Shape legend: R rank of the server's adapter, r of a client's, K sum of the clients' ranks, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import Adapter, key_a, key_b, scaling_of
from bellwether.exchange.messages import Payload, Update
from bellwether.method.method import Closing, Known, Method, State, by_rows


def flexlora() -> Method:
    """Return FlexLoRA; clients are weighted by their rows."""
    return Method(_close, give=_of_its_rank, mixed_ranks=True)


def _of_its_rank(state: State, client: Known, round: int) -> Payload:
    """Send a client the first directions of the adapter, as many as its rank."""
    return Payload(cut(state.adapter, client.rank), folded=state.folded)


def _close(closing: Closing) -> State:
    """Make the next adapter of the mean of products, module by module."""
    if not closing.updates:
        return closing.state
    before = closing.state.adapter
    tensors: dict[str, NDArray[Any]] = {}
    for module in before.config.modules:
        stacked_OK, stacked_KI = _stack(module, closing.updates, before)
        a_RI, b_OR = factors(stacked_OK, stacked_KI, before.tensors[key_a(module)].astype(np.float64))
        tensors |= {key_a(module): a_RI, key_b(module): b_OR / before.config.scaling}
    return replace(closing.state, adapter=before.updated(tensors))


def _stack(module: str, updates: Sequence[Update], like: Adapter) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the clients' p_i s_i B_i side by side, and their A_i one above the other, in float64."""
    total = sum(map(by_rows, updates))
    left, right = [], []
    for update in updates:
        a_rI, b_Or = (update.tensors[key(module)].astype(np.float64) for key in (key_a, key_b))
        left.append(by_rows(update) / total * scaling_of(like.config, len(a_rI)) * b_Or)
        right.append(a_rI)
    return np.concatenate(left, axis=1), np.concatenate(right)


def factors(
    left_OK: NDArray[np.float64], right_KI: NDArray[np.float64], spare_RI: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the best approximation of a product in the rank of ``spare_RI``, as V^T and U Σ.

    Args:
        left_OK: the left factor.
        right_KI: the right factor.
        spare_RI: rows that stand where the product has fewer directions.

    Returns:
        a_RI and b_OR, whose product b_OR a_RI has the R largest singular values of left_OK right_KI.
    """
    q_OK, r_KK = np.linalg.qr(left_OK)
    p_IK, s_KK = np.linalg.qr(right_KI.T)
    u_KK, sigma_K, vt_KK = np.linalg.svd(r_KK @ s_KK.T, full_matrices=False)
    # Singular values that are nothing but rounding are no directions.
    least = sigma_K[0] * np.finfo(np.float64).eps * max(left_OK.shape[0], right_KI.shape[1])
    count = min(len(spare_RI), int((sigma_K > least).sum()))
    a_RI, b_OR = spare_RI.copy(), np.zeros((len(left_OK), len(spare_RI)))
    rows_cI, columns_Oc = vt_KK[:count] @ p_IK.T, q_OK @ (u_KK[:, :count] * sigma_K[:count])
    largest_c = rows_cI[np.arange(count), np.abs(rows_cI).argmax(axis=1)]
    a_RI[:count], b_OR[:, :count] = rows_cI * np.sign(largest_c)[:, None], columns_Oc * np.sign(largest_c)
    return a_RI, b_OR


def cut(adapter: Adapter, rank: int) -> Adapter:
    """Return an adapter's first rows of A and columns of B, in the scaling of the smaller rank.

    Args:
        adapter: of the server; its rows stand in the order of their singular values.
        rank: at most the adapter's.
    """
    if rank == adapter.config.rank:
        return adapter
    factor = adapter.config.scaling / scaling_of(adapter.config, rank)
    tensors: dict[str, NDArray[Any]] = {}
    for module in adapter.config.modules:
        a_RI, b_OR = adapter.tensors[key_a(module)], adapter.tensors[key_b(module)]
        tensors |= {key_a(module): a_RI[:rank], key_b(module): (b_OR[:, :rank] * factor).astype(b_OR.dtype)}
    return Adapter(replace(adapter.config, rank=rank), tensors)
