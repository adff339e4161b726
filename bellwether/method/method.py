"""A method as one value: what the server sends each client, what clients do, and how a round is closed.

    def half_way():
        def close(closing):
            if closing.mean is None:
                return closing.state
            adapter = closing.state.adapter
            moved = {key: (adapter.tensors[key] + mean) / 2 for key, mean in closing.mean.tensors.items()}
            return State(adapter.updated(moved))

        return Method(close, weigh=by_rows)

The round loop calls ``begin`` once, then in every round ``give`` for each client of the cohort and ``close`` at the
end; clients go through ``passes`` and ``finish``. A method that leaves a part out takes FedAvg's. Methods see arrays,
never files, engines or models; a correction gets torch's tensors and needs nothing of torch but their operators.

Shape legend: P parameters of an adapter, in the order of the model, A before B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import Adapter, Arrays, Tensors
from bellwether.exchange.messages import Payload, Update
from bellwether.tools.randomness import Draws, Randomness


@dataclass(frozen=True)
class State:
    """What the server has after a round: committed with it, and all that the next round goes on from.

    Args:
        adapter: the global adapter.
        arrays: what the method remembers: nested mappings of texts to arrays and plain values.
        folded: an update of the frozen weights as factors, folded into the base by everybody; None where there is none.
    """

    adapter: Adapter
    arrays: Mapping[str, Any] = field(default_factory=dict)
    folded: Adapter | None = None


@dataclass(frozen=True)
class Known:
    """What the server knows of a client without asking.

    Args:
        client: its name.
        rank: LoRA's rank that the recipe gives it.
        rows: rows it last told to train on; None before its first update.
        loss: mean loss per token of its last update; None before.
        seconds: how long it took for its last update; None before.
        settled: the last round in which its update counted; 0 where none did.
    """

    client: str
    rank: int
    rows: int | None = None
    loss: float | None = None
    seconds: float | None = None
    settled: int = 0


@dataclass(frozen=True)
class Step:
    """One optimizer step of one client, as a correction of its gradient sees it.

    Args:
        client: the client's name.
        number: the step in its pass, from 0 on.
        rate: the step's learning rate.
        gradient_P: the gradient of its loss.
        adapter_P: its adapter before the step.
        start_P: the adapter that the round began with.
        sent: the arrays that the server sent, as tensors.
        own: the arrays that the client keeps, as tensors.
    """

    client: str
    number: int
    rate: float
    gradient_P: Any
    adapter_P: Any
    start_P: Any
    sent: Mapping[str, Any]
    own: Mapping[str, Any]


Correction = Callable[[Step], Any]


@dataclass(frozen=True)
class Trained:
    """What a client has after its passes.

    Args:
        payload: what it was sent.
        own: the arrays that it kept of its last round that counted; empty before.
        passes: the tensors after each pass.
        rates: the learning rate of each step of the first pass.
        draws: what the client may draw, for the purpose ``method``.
    """

    payload: Payload
    own: Arrays
    passes: Sequence[Tensors]
    rates: Sequence[float]
    draws: Draws


@dataclass(frozen=True)
class Finished:
    """What a client makes of its training.

    Args:
        tensors: those that it sends, under the keys that the payload expects.
        arrays: what it sends beside them.
        own: what it keeps, which never leaves it; None keeps nothing.
    """

    tensors: Tensors
    arrays: Arrays = field(default_factory=dict)
    own: Arrays | None = None


@dataclass(frozen=True)
class Mean:
    """The weighted mean of the updates of a round, in float64.

    Args:
        tensors: under the adapter's keys.
        arrays: under the method's own names.
        weight: the sum of the weights.
        count: how many updates there are.
    """

    tensors: Tensors
    arrays: Arrays
    weight: float
    count: int


@dataclass(frozen=True)
class Closing:
    """A round as the server closes it, failed and empty ones too.

    Args:
        round: the round, counted from 1.
        state: what the round began with.
        clients: how many clients the federation has.
        cohort: those that were drawn, whether they trained or not.
        mean: of what came back; None where the method is not linear, and where nothing may be used.
        updates: what came back of each client, in the order of their names, where the method is not linear.
        failure: why nothing may be used; None where the round went well. An empty round without a failure is one in
            which no client had a row to train on.
        randomness: the server's own. Who knows the run's seed, which stands in its recipe, knows all its draws: noise
            that shall hide something must not come from it.
    """

    round: int
    state: State
    clients: int
    cohort: Sequence[str]
    mean: Mean | None
    updates: Sequence[Update]
    failure: str | None
    randomness: Randomness


def by_rows(update: Update) -> float:
    """Weigh an update by the rows behind it, as FedAvg does."""
    return float(update.rows)


def alike(update: Update) -> float:
    """Weigh every update alike."""
    return 1.0


def as_it_is(adapter: Adapter) -> State:
    """Begin with the recipe's adapter, and remember nothing."""
    return State(adapter)


def whole_adapter(state: State, client: Known, round: int) -> Payload:
    """Send every client the global adapter, all of it to be trained."""
    return Payload(state.adapter, folded=state.folded)


def as_sent(payload: Payload, own: Arrays) -> Tensors:
    """Begin a pass with the adapter that the server sent."""
    return payload.adapter.tensors


def serve_sent(payload: Payload, own: Arrays) -> Adapter:
    """Serve the adapter that the server sent."""
    return payload.adapter


def nothing_beside(payload: Payload) -> Mapping[str, tuple[int, ...]]:
    """Expect nothing beside the tensors."""
    return {}


def unbounded(payload: Payload) -> float:
    """Take updates of every length."""
    return math.inf


def send_trained(trained: Trained) -> Finished:
    """Send the tensors of the last pass that the payload expects back, and keep nothing."""
    last = trained.passes[-1]
    return Finished({key: last[key] for key in trained.payload.expected})


@dataclass(frozen=True)
class Pass:
    """One pass of local training: optimizer steps over a client's rows from some adapter.

    Args:
        begin: from what was sent and what the client keeps to the tensors that the pass begins with.
        correct: what corrects each gradient before it is clipped; None corrects nothing.
    """

    begin: Callable[[Payload, Arrays], Tensors] = as_sent
    correct: Correction | None = None


@dataclass(frozen=True)
class Method:
    """A method of federated learning.

    Args:
        close: closes a round: the next state.
        weigh: the weight of an update in the mean that ``close`` gets, of its client, rows and figures, without its
            values. A method with weights is linear in the updates: it sees their mean only, and so works on a sum of
            masked ones. None gets the updates themselves.
        begin: the state before the first round, of the recipe's first adapter.
        give: what one client is sent: (state, client, round) to its payload.
        passes: what a client goes through in a round, in this order, each a training over its rows.
        finish: what a client makes of it: what it sends and what it keeps.
        returns: shapes of the arrays that come back beside the tensors, by name: (payload) to shapes.
        bound: the largest norm of an update's change that the method takes: (payload) to norm; whatever it says, the
            recipe's federation.max_norm holds.
        serves: the adapter that a client serves, of what it is sent and what it keeps; for its evaluation, and to be
            exported. Its rank may be another than that of what was sent.
        needs: fields of the recipe's training section, and the only values with which the method is right.
        mixed_ranks: whether clients may have adapters of unlike ranks.
        folds: whether it folds updates into the base, which must be of plain floats then.
        begins_anew: whether rounds begin with other factors than the last one ended with, so that what compression left
            out of an update cannot be added to a later one, and clients must train with the very factors of the server.
        last: the method of the run's last round, in which all clients are asked, whatever the sampler; None has no
            such round. Its state is that of the rounds before; who serves what is asked of the method itself.
    """

    close: Callable[[Closing], State]
    weigh: Callable[[Update], float] | None = None
    begin: Callable[[Adapter], State] = as_it_is
    give: Callable[[State, Known, int], Payload] = whole_adapter
    passes: Sequence[Pass] = (Pass(),)
    finish: Callable[[Trained], Finished] = send_trained
    returns: Callable[[Payload], Mapping[str, tuple[int, ...]]] = nothing_beside
    bound: Callable[[Payload], float] = unbounded
    serves: Callable[[Payload, Arrays], Adapter] = serve_sent
    needs: Mapping[str, Any] = field(default_factory=dict)
    mixed_ranks: bool = False
    folds: bool = False
    begins_anew: bool = False
    last: Method | None = None

    def of_round(self, round: int, rounds: int) -> Method:
        """Return the method of a round: this one, or that of the last of all rounds."""
        return self.last if self.last is not None and round == rounds else self


def without_values(update: Update) -> Update:
    """Return what a linear method may know of a single update: who sent it, its rows and its figures."""
    return replace(update, tensors={}, arrays={})


def mean_of(updates: Sequence[Update], weigh: Callable[[Update], float]) -> Mean:
    """Return the weighted mean of updates, summed in float64 in the order of client names.

    Args:
        updates: updates with equal keys and shapes, at least one.
        weigh: gives each a positive number, of all but its values; only their ratios matter.
    """
    # A fixed order makes the result independent of who answered first.
    ordered = sorted(updates, key=lambda update: update.client)
    weights = [weigh(without_values(update)) for update in ordered]
    total = float(sum(weights))

    def mean(key: str, parts: Sequence[Arrays]) -> NDArray[np.float64]:
        terms = ((weight / total) * part[key].astype(np.float64) for weight, part in zip(weights, parts, strict=True))
        return np.asarray(sum(terms))

    tensors, arrays = [update.tensors for update in ordered], [update.arrays for update in ordered]
    return Mean(
        {key: mean(key, tensors) for key in tensors[0]},
        {key: mean(key, arrays) for key in arrays[0]},
        total,
        len(ordered),
    )


def take_mean(closing: Closing) -> State:
    """Take the mean of what came back as the next adapter; without one, nothing changes."""
    if closing.mean is None:
        return closing.state
    return replace(closing.state, adapter=closing.state.adapter.updated(closing.mean.tensors))
