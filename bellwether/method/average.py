"""Averages of updates.

An aggregation rule is a function ``aggregate(updates, adapter, state) -> adapter, state``. ``state`` is
what the rule must remember between rounds: a mapping of names to arrays and plain values, empty at the
start, saved with the round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bellwether.exchange.adapter import Adapter
from bellwether.exchange.messages import Update
from bellwether.tools.functions import load_function

State = Mapping[str, Any]
Aggregate = Callable[[Sequence[Update], Adapter, State], tuple[Adapter, State]]


def fedavg(updates: Sequence[Update], adapter: Adapter, state: State) -> tuple[Adapter, State]:
    """Average A and B separately, each weighted by the rows a client trained on, as FedIT does.

    This is FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) on the LoRA tensors (Zhang et al.
    2023, arXiv 2305.05644, section 3). The mean of products B·A is another thing: the product of the
    means is only near it while clients stay near each other.

    Args:
        updates: checked updates of one round, at least one.
        adapter: the adapter that the clients started from.
        state: not used, returned as it is.
    """
    return adapter.with_tensors(weighted_mean(updates, [update.rows for update in updates])), state


def uniform(updates: Sequence[Update], adapter: Adapter, state: State) -> tuple[Adapter, State]:
    """Average A and B separately, every client alike; arguments as in ``fedavg``."""
    return adapter.with_tensors(weighted_mean(updates, [1] * len(updates))), state


def weighted_mean(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weighted mean of the updates' tensors, summed in float64 in the order of client names.

    Args:
        updates: updates with equal keys and shapes, at least one.
        weights: one positive number per update; only their ratios matter.
    """
    # A fixed order makes the result independent of who answered first.
    order = sorted(range(len(updates)), key=lambda index: updates[index].client)
    total = float(sum(weights))
    mean: dict[str, np.ndarray[Any, Any]] = {}
    for key, first in updates[0].tensors.items():
        value = sum((weights[index] / total) * updates[index].tensors[key].astype(np.float64) for index in order)
        mean[key] = np.asarray(value).astype(first.dtype)
    return mean


def make_aggregate(name: str) -> Aggregate:
    """Return the rule that a recipe names: ``fedavg``, ``uniform``, or the person's own function."""
    ours: dict[str, Aggregate] = {"fedavg": fedavg, "uniform": uniform}
    return ours[name] if name in ours else load_function(name)
