"""Averages of updates: FedAvg, a uniform mean, and FedAvg with FedProx's proximal term at the clients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bellwether.method.method import Correction, Method, Pass, Step, alike, by_rows, take_mean


def fedavg() -> Method:
    """Average A and B separately, each weighted by the rows a client trained on, as FedIT does.

    This is FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) on the LoRA tensors (Zhang et al.
    2023, arXiv 2305.05644, section 3). The mean of products B·A is another thing: the product of the
    means is only near it while clients stay near each other.
    """
    return Method(take_mean, weigh=by_rows)


def uniform() -> Method:
    """Average A and B separately, every client alike."""
    return Method(take_mean, weigh=alike)


def fedprox(mu: float = 0.01) -> Method:
    """FedAvg with FedProx's proximal term at the clients (Li et al. 2020, arXiv 1812.06127, algorithm 2).

    Of the paper, the term alone: clients do as much work as the recipe says, and are weighted by rows as in FedAvg.

    Args:
        mu: how strongly a client's adapter is drawn back to the one that the round began with.
    """
    return replace(fedavg(), passes=(Pass(correct=proximal(mu)),))


def proximal(mu: float) -> Correction:
    """Return the gradient of FedProx's term µ/2 ‖w - w_t‖² (Li et al. 2020, arXiv 1812.06127, equation 2).

    It draws a client's adapter w back to the one that its round began with, w_t. The norm is over the entries of A and
    B, not over their product.

    Args:
        mu: how strongly.
    """

    def correct(step: Step) -> Any:
        return step.gradient_P + mu * (step.adapter_P - step.start_P)

    return correct
