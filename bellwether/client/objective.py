"""What a client's steps minimise: a value, so that a person can bring their own.

Shape legend: S selected positions, V vocabulary.
"""

from __future__ import annotations

import torch

from bellwether.errors import RoundFailed
from bellwether.model.forward import TokenLoss
from bellwether.recipe.recipe import Training
from bellwether.tools.functions import load_function, naming


def make_loss(training: Training) -> TokenLoss | None:
    """Return the loss at selected positions that a recipe names; None is the cross-entropy.

    The cross-entropy is never computed from whole logits. Of a person's own loss, errors and the result's shape are
    told in one sentence.

    Args:
        training: the recipe's training section.

    Raises:
        RecipeError: a person's own function is not there.
    """
    if training.loss == "cross_entropy":
        return None
    name, function = f"training.loss {training.loss}", load_function(training.loss)

    def loss(logits_SV: torch.Tensor, targets_S: torch.Tensor, row_S: torch.Tensor) -> torch.Tensor:
        with naming(name, RoundFailed):
            found = function(logits_SV, targets_S, row_S)
        if isinstance(found, torch.Tensor) and found.shape == targets_S.shape:
            return found
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise RoundFailed(f"{name} returned {shape}; return one loss for each position, {tuple(targets_S.shape)}.")

    return loss
