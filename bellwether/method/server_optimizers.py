"""Optimizers at the server: the mean change of a round, Δ, is a gradient with its sign turned.

FedAvgM (Hsu et al. 2019, arXiv 1909.06335, section 4.3) and FedAdagrad, FedYogi and FedAdam (Reddi et al. 2021,
arXiv 2003.00295, algorithm 2), on A and B of the LoRA layers, entry by entry. Clients are weighted by their rows.

    x ← x + η m / (√v + τ)        m ← β₁ m + (1 - β₁) Δ

and v by Adam's, Yogi's or Adagrad's rule, beginning with τ², without a correction of bias, as in the paper. (Flower's
FedAdam begins with v = 0 and corrects the bias, so that its steps differ.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.method.method import Closing, Method, State, by_rows

Values = NDArray[np.float64]
# From what is remembered of a tensor, by name, and its change Δ to what is remembered now, and the step to take.
Rule = Callable[[Mapping[str, Values], Values], tuple[dict[str, Values], Values]]


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9) -> Method:
    """FedAvg with momentum at the server: m ← β m + Δ, x ← x + η m.

    Args:
        learning_rate: η.
        momentum: β.
    """

    def rule(memory: Mapping[str, Values], change: Values) -> tuple[dict[str, Values], Values]:
        m = momentum * memory.get("m", np.zeros_like(change)) + change
        return {"m": m}, learning_rate * m

    return _stepping(rule)


def fedadam(learning_rate: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedAdam: v ← β₂ v + (1 - β₂) Δ².

    Args:
        learning_rate: η.
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        tau: τ, the degree of adaptivity.
    """
    return _stepping(_adaptive(learning_rate, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square))


def fedyogi(learning_rate: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedYogi: v ← v - (1 - β₂) Δ² sign(v - Δ²); arguments as in ``fedadam``."""
    return _stepping(
        _adaptive(learning_rate, beta1, tau, lambda v, square: v - (1 - beta2) * square * np.sign(v - square))
    )


def fedadagrad(learning_rate: float = 1e-2, beta1: float = 0.0, tau: float = 1e-3) -> Method:
    """FedAdagrad: v ← v + Δ²; arguments as in ``fedadam``."""
    return _stepping(_adaptive(learning_rate, beta1, tau, lambda v, square: v + square))


def _adaptive(learning_rate: float, beta1: float, tau: float, second: Callable[[Values, Values], Values]) -> Rule:
    """Return the rule that the adaptive optimizers share, with their own second moment."""

    def rule(memory: Mapping[str, Values], change: Values) -> tuple[dict[str, Values], Values]:
        m = beta1 * memory.get("m", np.zeros_like(change)) + (1 - beta1) * change
        v = second(memory.get("v", np.full_like(change, tau**2)), change**2)
        return {"m": m, "v": v}, learning_rate * m / (np.sqrt(v) + tau)

    return rule


def _stepping(rule: Rule) -> Method:
    """Return the method whose server steps by a rule, tensor by tensor, and remembers in float64."""

    def close(closing: Closing) -> State:
        if closing.mean is None:
            return closing.state
        adapter, arrays = closing.state.adapter, closing.state.arrays
        memory: dict[str, Any] = {}
        moved: dict[str, Values] = {}
        for key, mean in closing.mean.tensors.items():
            before = adapter.tensors[key].astype(np.float64)
            memory[key], step = rule(arrays.get(key, {}), mean - before)
            moved[key] = before + step
        return replace(closing.state, adapter=adapter.updated(moved), arrays={**arrays, **memory})

    return Method(close, weigh=by_rows)
