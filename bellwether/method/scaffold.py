"""SCAFFOLD: control variates, at the server and at every client, that take client drift out of local steps.

Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1 with option II, on A and B of the LoRA layers:

    y_i ← y_i - η_l (g_i(y_i) - c_i + c)        K steps at client i from x
    c_i⁺ = c_i - c + (x - y_i) / (K η_l)
    x ← x + η_g / |S| Σ_S (y_i - x)             c ← c + 1 / N Σ_S (c_i⁺ - c_i)

Every client is weighted alike, as in the paper. It holds for plain SGD with a constant rate; K may differ between
clients. A client that has lost its c_i begins again with zero.

Shape legend: P parameters of an adapter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import Adapter, Arrays, flat
from bellwether.exchange.messages import Payload
from bellwether.method.method import Closing, Finished, Known, Method, Pass, State, Step, Trained, alike

CONTROL, CHANGE = "control", "control change"


def scaffold(learning_rate: float = 1.0) -> Method:
    """Return SCAFFOLD.

    Args:
        learning_rate: η_g, the server's.
    """

    def close(closing: Closing) -> State:
        mean, state = closing.mean, closing.state
        if mean is None:
            return state
        before = state.adapter.tensors
        moved = {key: before[key] + learning_rate * (value - before[key]) for key, value in mean.tensors.items()}
        control_P = state.arrays[CONTROL] + mean.count / closing.clients * mean.arrays[CHANGE]
        return replace(state, adapter=state.adapter.updated(moved), arrays={**state.arrays, CONTROL: control_P})

    return Method(
        close,
        weigh=alike,
        begin=lambda adapter: State(adapter, {CONTROL: np.zeros(_size(adapter))}),
        give=_with_control,
        passes=(Pass(correct=lambda step: step.gradient_P - _own(step) + step.sent[CONTROL]),),
        finish=_change_control,
        returns=lambda payload: {CHANGE: payload.arrays[CONTROL].shape},
        needs={"optimizer": "sgd", "schedule": "constant", "warmup_rounds": 0, "clip_norm": None},
    )


def _size(adapter: Adapter) -> int:
    return sum(value.size for value in adapter.tensors.values())


def _with_control(state: State, client: Known, round: int) -> Payload:
    """Send the adapter, and c in its precision."""
    precision = next(iter(state.adapter.tensors.values())).dtype
    return Payload(state.adapter, {CONTROL: state.arrays[CONTROL].astype(precision)}, folded=state.folded)


def _own(step: Step) -> Any:
    """Return the client's c_i, which is zero at first."""
    return step.own.get(CONTROL, 0.0)


def _change_control(trained: Trained) -> Finished:
    """Send y_i and c_i⁺ - c_i, and keep c_i⁺."""
    payload, (last,) = trained.payload, trained.passes
    order = tuple(payload.adapter.tensors)
    sent_P: NDArray[Any] = payload.arrays[CONTROL]
    own_P: NDArray[Any] = trained.own.get(CONTROL, np.zeros_like(sent_P))
    moved_P = flat(payload.adapter.tensors, order) - flat(last, order)
    # With a constant rate this sum is K η_l.
    change_P = (moved_P / sum(trained.rates) - sent_P).astype(sent_P.dtype)
    own: Arrays = {CONTROL: own_P + change_P}
    return Finished({key: last[key] for key in payload.expected}, {CHANGE: change_P}, own)
