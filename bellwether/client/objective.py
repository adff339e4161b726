"""What a client's steps minimise, and what corrects their gradients: values, so that a method can bring its own.

Shape legend: S selected positions, V vocabulary, P parameters of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bellwether.errors import RoundFailed
from bellwether.functions import load_function, naming
from bellwether.model.forward import TokenLoss
from bellwether.recipe import Training

# From a client's gradient, its adapter and the one that its round began with, all flat and of length P, to the gradient
# that is clipped and stepped along. Every client's is corrected by itself.
Correction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """What local training minimises.

    Args:
        loss: the loss at selected positions; None is the cross-entropy, which is never computed from whole logits.
        correct: what corrects each client's gradient; None corrects nothing.
    """

    loss: TokenLoss | None = None
    correct: Correction | None = None


def make_objective(training: Training) -> Objective:
    """Return the objective that a recipe names.

    Args:
        training: the recipe's training section.

    Raises:
        RecipeError: a person's own function is not there.
    """
    loss = None if training.loss == "cross_entropy" else _own_loss(training.loss)
    if training.correction == "none":
        return Objective(loss)
    ours = training.correction == "proximal"
    return Objective(loss, proximal(training.proximal) if ours else _own_correction(training.correction))


def proximal(mu: float) -> Correction:
    """Return the gradient of FedProx's term µ/2 ‖w - w_t‖² (Li et al. 2020, arXiv 1812.06127, equation 2).

    It draws a client's adapter w back to the one that its round began with, w_t. The norm is over the entries of A and
    B, not over their product.

    Args:
        mu: how strongly.
    """

    def correct(gradient_P: torch.Tensor, adapter_P: torch.Tensor, start_P: torch.Tensor) -> torch.Tensor:
        return gradient_P + mu * (adapter_P - start_P)

    return correct


def _own_loss(name: str) -> TokenLoss:
    """Return a person's own loss, its errors and its result's shape told in one sentence."""
    function = load_function(name)

    def loss(logits_SV: torch.Tensor, targets_S: torch.Tensor, row_S: torch.Tensor) -> torch.Tensor:
        with naming(f"training.loss {name}", RoundFailed):
            loss_S: torch.Tensor = function(logits_SV, targets_S, row_S)
        _check(f"training.loss {name}", loss_S, targets_S, "one loss for each position")
        return loss_S

    return loss


def _own_correction(name: str) -> Correction:
    """Return a person's own correction, its errors and its result's shape told in one sentence."""
    function = load_function(name)

    def correct(gradient_P: torch.Tensor, adapter_P: torch.Tensor, start_P: torch.Tensor) -> torch.Tensor:
        with naming(f"training.correction {name}", RoundFailed):
            corrected_P: torch.Tensor = function(gradient_P, adapter_P, start_P)
        _check(f"training.correction {name}", corrected_P, gradient_P, "a gradient as long as the adapter")
        return corrected_P

    return correct


def _check(what: str, found: object, like: torch.Tensor, wanted: str) -> None:
    """Refuse what is no tensor of the right shape, which torch would broadcast in silence."""
    if not isinstance(found, torch.Tensor) or found.shape != like.shape:
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise RoundFailed(f"{what} returned {shape}; return {wanted}, {tuple(like.shape)}.")
