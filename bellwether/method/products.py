"""Products of LoRA's factors, s B A, without ever making a matrix as large as the weight they change.

Several products are one product of stacked factors; two QR decompositions bring it to a small core, whose singular
values are those of the whole.

Shape legend: R rank of an adapter, r of a client's, K sum of ranks, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import Adapter, key_a, key_b, scaling_of
from bellwether.exchange.messages import Update
from bellwether.method.method import by_rows

Values = NDArray[np.float64]


class Product(NamedTuple):
    """The two factors of a product, in float64, the scaling taken up by the left one."""

    left_OK: Values
    right_KI: Values


def mean_product(module: str, updates: Sequence[Update], like: Adapter) -> Product:
    """Return Σ p_i s_i B_i A_i of a module as stacked factors, with client i's share of rows p_i and scaling s_i.

    Args:
        module: path of the adapted module.
        updates: of the clients, at least one; their ranks may differ.
        like: the server's adapter, whose configuration gives the scalings.
    """
    total = sum(map(by_rows, updates))
    left, right = [], []
    for update in updates:
        a_rI, b_Or = (update.tensors[key(module)].astype(np.float64) for key in (key_a, key_b))
        left.append(by_rows(update) / total * scaling_of(like.config, len(a_rI)) * b_Or)
        right.append(a_rI)
    return Product(np.concatenate(left, axis=1), np.concatenate(right))


def factors(left_OK: Values, right_KI: Values, spare_RI: Values) -> tuple[Values, Values]:
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
        adapter: of the server.
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


def added(before: Adapter | None, more: Mapping[str, Product], like: Adapter) -> Adapter:
    """Return an update of the weights that adds products to those of an earlier one.

    Ranks add up until no module's product can have so many directions; from then on the sum is brought to that rank,
    which takes nothing from it.

    Args:
        before: the earlier update; None adds to nothing.
        more: by module, all of the same K.
        like: an adapter for the same modules, whose precision the result has.

    Returns:
        An adapter of the summed rank, or of the largest that a module's product can have, in a scaling of 1.
    """
    most = max(min(len(product.left_OK), product.right_KI.shape[1]) for product in more.values())
    stacked_rank = len(next(iter(more.values())).right_KI) + (0 if before is None else before.config.rank)
    rank = min(most, stacked_rank)
    tensors: dict[str, NDArray[Any]] = {}
    for module, product in more.items():
        left_OK, right_KI = _joined(before, module, product)
        if stacked_rank > rank:
            right_KI, left_OK = factors(left_OK, right_KI, np.zeros((rank, right_KI.shape[1])))
        dtype = like.tensors[key_b(module)].dtype
        tensors |= {key_a(module): right_KI.astype(dtype), key_b(module): left_OK.astype(dtype)}
    return Adapter(replace(like.config, rank=rank, alpha=float(rank), rslora=False), tensors)


def _joined(before: Adapter | None, module: str, product: Product) -> Product:
    if before is None:
        return product
    a_RI, b_OR = (before.tensors[key(module)].astype(np.float64) for key in (key_a, key_b))
    left_OK = np.concatenate([before.config.scaling * b_OR, product.left_OK], axis=1)
    return Product(left_OK, np.concatenate([a_RI, product.right_KI]))
