"""What a client's steps minimise, and what corrects their gradients: values, so that a method can bring its own.

Shape legend: S selected positions, V vocabulary, P parameters of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bellwether.errors import RoundFailed
from bellwether.model.forward import TokenLoss
from bellwether.recipe.recipe import Training
from bellwether.tools.functions import load_function, naming

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
    loss, correct = None, None
    if training.loss != "cross_entropy":
        loss = _own("training.loss", training.loss, 1, "one loss for each position")
    if training.correction == "proximal":
        correct = proximal(training.proximal)
    elif training.correction != "none":
        correct = _own("training.correction", training.correction, 0, "a gradient as long as the adapter")
    return Objective(loss, correct)


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


def _own(field: str, name: str, like: int, wanted: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
    """Return a person's own loss or correction, its errors and its result's shape told in one sentence.

    Args:
        field: the recipe's field that names it.
        name: ``package.module:function``.
        like: which of its three arguments has the shape that its result must have; torch would broadcast in silence.
        wanted: what it shall return.
    """
    function = load_function(name)

    def checked(*given: torch.Tensor) -> torch.Tensor:
        with naming(f"{field} {name}", RoundFailed):
            found = function(*given)
        if isinstance(found, torch.Tensor) and found.shape == given[like].shape:
            return found
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise RoundFailed(f"{field} {name} returned {shape}; return {wanted}, {tuple(given[like].shape)}.")

    return checked
