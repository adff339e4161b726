"""What a method or a sampler returned, which may be a person's own: one sentence for what cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import RoundFailed, UpdateRejected
from bellwether.exchange.adapter import Adapter, Arrays, key_a, key_b
from bellwether.exchange.checks import check_array
from bellwether.exchange.messages import Payload, Update
from bellwether.method.method import Method, State, without_values
from bellwether.tools.functions import naming


def first_state(method: Method, adapter: Adapter) -> State:
    """Return the state before the first round.

    Args:
        method: begins with it.
        adapter: the recipe's first one.

    Raises:
        RoundFailed: the method failed, or what it begins with cannot be gone on from.
    """
    who = "The method's begin"
    with naming(who, RoundFailed):
        state = method.begin(adapter)
    check_state(state, State(adapter), who, folds=method.folds)
    return state


def check_cohort(drawn: Any, clients: Sequence[str], who: str) -> tuple[str, ...]:
    """Return the cohort that a sampler drew.

    Args:
        drawn: what it returned.
        clients: all clients.
        who: the sampler and the round, which open the sentence.

    Raises:
        RoundFailed: it is no collection of names of clients, or holds one twice.
    """
    if isinstance(drawn, str) or not isinstance(drawn, Iterable):
        raise RoundFailed(f"{who} returned a {type(drawn).__name__}; return names of clients.")
    cohort, known = tuple(drawn), set(clients)
    unknown = [client for client in cohort if not isinstance(client, str) or client not in known]
    if unknown or len(set(cohort)) != len(cohort):
        what = f"{unknown[0]!r}, which is no client" if unknown else "a client twice"
        raise RoundFailed(f"{who} returned {what}.")
    return cohort


def check_payload(payload: Any, client: str, who: str) -> None:
    """Refuse what no client can begin with.

    Args:
        payload: what the method gives a client.
        client: the client's name.
        who: the method and the round, which open the sentence.

    Raises:
        RoundFailed: it is no payload with an adapter and arrays, or names tensors that the adapter has not.
    """
    if not isinstance(payload, Payload) or not isinstance(payload.adapter, Adapter):
        raise RoundFailed(f"{who} gives {client} a {type(payload).__name__}; return a Payload with an adapter.")
    unknown = {*(payload.trained or ()), *(payload.returned or ())} - payload.adapter.tensors.keys()
    if unknown:
        raise RoundFailed(f"{who} names {min(map(str, unknown))}, which the adapter that it gives {client} has not.")
    for name, value in payload.arrays.items():
        if not isinstance(value, np.ndarray):
            raise RoundFailed(f"{who} gives {client} {name} as a {type(value).__name__}; give an array.")


def served(method: Method, payload: Payload, own: Arrays) -> Adapter:
    """Return the adapter that a client serves.

    Args:
        method: says which.
        payload: what the client was sent.
        own: what it keeps of its last round that counted; empty before.

    Raises:
        RoundFailed: the method failed, or returned no adapter for the same modules.
    """
    who = "What the method lets a client serve"
    with naming(who, RoundFailed):
        adapter = method.serves(payload, own)
    if not isinstance(adapter, Adapter) or adapter.config.modules != payload.adapter.config.modules:
        raise RoundFailed(f"{who} is a {type(adapter).__name__}; return an Adapter for the modules of the payload's.")
    return adapter


def check_weights(updates: Sequence[Update], weigh: Callable[[Update], float], who: str) -> None:
    """Refuse weights that make no mean.

    Args:
        updates: what came back.
        weigh: the method's, which gets them without their values.
        who: the method and the round, which open the sentence.

    Raises:
        RoundFailed: a weight is no positive number.
    """
    for update in updates:
        weight = weigh(without_values(update))
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise RoundFailed(f"{who} weighs {update.client} by {weight!r}; return a positive number.")


def check_state(state: State, before: State, who: str, *, folds: bool) -> None:
    """Refuse a state that cannot be gone on from.

    Args:
        state: what the method closed a round with.
        before: what the round began with.
        who: the method and the round, which open the sentence.
        folds: whether the method says that it folds updates into the base.

    Raises:
        RoundFailed: its adapter is not like the one before or not finite, it remembers no mapping, or what it folds
            into the base does not fit the same modules.
    """
    if not isinstance(state, State) or not isinstance(state.adapter, Adapter):
        raise RoundFailed(f"{who} returned a {type(state).__name__}; return a State with an adapter.")
    if not isinstance(state.arrays, Mapping):
        raise RoundFailed(f"{who} returned a {type(state.arrays).__name__} as what it remembers; return a mapping.")
    if list(state.adapter.tensors) != list(before.adapter.tensors):  # their order is that of flat vectors
        raise RoundFailed(f"{who} returned no adapter with the same tensors in the same order.")
    for key, expected in before.adapter.tensors.items():
        _check_values(f"{who} returned an adapter whose", key, state.adapter.tensors[key], expected.shape, expected)
    folded, modules = state.folded, before.adapter.config.modules
    if folded is None:
        return
    if not folds:
        raise RoundFailed(f"{who} folds an update into the base; say so by Method(..., folds=True).")
    if not isinstance(folded, Adapter) or folded.config.modules != modules:
        raise RoundFailed(f"{who} folds no adapter for the same modules into the base; give one, or None.")
    rank = folded.config.rank
    for module in modules:
        for key, side in ((key_a(module), 0), (key_b(module), 1)):
            like = before.adapter.tensors[key]
            shape = tuple(rank if axis == side else size for axis, size in enumerate(like.shape))
            _check_values(f"{who} folds an adapter whose", key, folded.tensors.get(key), shape, like)


def _check_values(who: str, key: str, value: Any, shape: tuple[int, ...], like: NDArray[Any]) -> None:
    """Refuse values of another shape or precision, or that are not finite."""
    try:
        check_array(key, value, shape, like.dtype)
    except UpdateRejected as reason:
        raise RoundFailed(f"{who} {reason}.") from None
