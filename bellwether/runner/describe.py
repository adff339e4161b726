"""What each client holds, summed up.

Label skew is the total variation distance between a client's shares of the categories and those of
all clients together, ``½ Σ_c |p_c − q_c|``: 0 where a client is like the whole, towards 1 where it
has what hardly anybody else has.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bellwether.data.rows import Federated, Row, Tokenised
from bellwether.store.holdings import ClientSummary, Description

if TYPE_CHECKING:
    pass


def describe(federated: Federated, tokenised: Mapping[str, Tokenised] | None = None) -> Description:
    """Sum up what each client holds.

    Args:
        federated: the rows as dealt.
        tokenised: the clients' training rows as tokens, by client; None leaves lengths unknown.
    """
    pooled = collections.Counter(row.category for rows in federated.clients.values() for row in rows)
    clients = [
        _summary(
            client,
            rows,
            len(federated.held_out.get(client, ())),
            pooled,
            tokenised[client] if tokenised is not None else None,
        )
        for client, rows in federated.clients.items()
    ]
    return Description(
        clients,
        dict(sorted(pooled.items(), key=lambda item: (-item[1], item[0]))),
        len(federated.validation),
        len(federated.test),
        tokenised is not None,
        tuple(federated.notes),
        federated.doubled,
    )


def label_skew(own: Mapping[str, int], pooled: Mapping[str, int]) -> float:
    """Return the total variation distance between two distributions over categories, given as counts."""
    own_total, pooled_total = sum(own.values()), sum(pooled.values())
    if not own_total or not pooled_total:
        return 0.0
    keys = own.keys() | pooled.keys()
    # A set has another order in every process; this sum has the same last digit in any.
    return 0.5 * math.fsum(abs(own.get(key, 0) / own_total - pooled.get(key, 0) / pooled_total) for key in keys)


def _summary(
    client: str, rows: Sequence[Row], held_out: int, pooled: Mapping[str, int], tokenised: Tokenised | None
) -> ClientSummary:
    own = collections.Counter(row.category for row in rows)
    groups = collections.Counter(row.group for row in rows)
    skew = label_skew(own, pooled)
    if tokenised is None:
        return ClientSummary(client, len(rows), held_out, own, skew, groups=groups)
    lengths = [len(row) for row in tokenised.rows]
    return ClientSummary(
        client,
        len(rows),
        held_out,
        own,
        skew,
        float(np.median(lengths)) if lengths else None,
        max(lengths, default=None),
        tokenised.shortened,
        tokenised.cut,
        tokenised.left_out + len(tokenised.bad),
        groups,
    )
