"""What a client's steps minimise: a value, so that a person can bring their own.

A loss is taken at each trained token, or, of preference rows, at each pair of answers (direct preference optimization,
Rafailov et al. 2023, arXiv 2305.18290); a step's is the mean over all of them.

Shape legend: S selected positions, V vocabulary, R rows of a piece, N answers of these rows, X losses, F figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bellwether.data.rows import TokenRow
from bellwether.errors import RoundFailed
from bellwether.model.forward import TokenLoss
from bellwether.recipe.recipe import Training
from bellwether.tools.functions import load_function, naming

# log π_ref of a row's answers, the chosen one first; nothing where the loss knows no reference.
Reference = Sequence[float]


@dataclass(frozen=True)
class Objective:
    """What is minimised over a step's rows.

    Args:
        token_loss: the loss at each trained position; None is the cross-entropy.
        losses: from the loss at each position, the number of the answer that it stands in, and the reference of each
            row to figures_FX, the first of which are the losses, and the row of each.
        count: over how many losses of one row a step's mean is.
        figures: names of the figures, ``loss`` first; a client tells their means.
        referenced: whether the loss compares with the frozen base.
    """

    token_loss: TokenLoss | None
    losses: Callable[[torch.Tensor, torch.Tensor, Sequence[Reference]], tuple[torch.Tensor, torch.Tensor]]
    count: Callable[[TokenRow], int]
    figures: Sequence[str] = ("loss",)
    referenced: bool = False


def make_objective(training: Training) -> Objective:
    """Return the objective that a recipe names.

    Args:
        training: the recipe's training section.

    Raises:
        RecipeError: a person's own function is not there.
    """
    if training.loss == "dpo":
        losses = functools.partial(pair_losses, training.beta)
        return Objective(None, losses, lambda row: 1, ("loss", "preferred", "margin"), referenced=True)
    return Objective(_token_loss(training), _at_tokens, lambda row: row.trained_tokens)


def pair_losses(
    beta: float, loss_S: torch.Tensor, answer_S: torch.Tensor, references: Sequence[Reference]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the DPO loss of each pair: equation 7 of Rafailov et al. (2023, arXiv 2305.18290).

        −log σ(β [(log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected))])

    Log-probabilities are sums over the tokens of an answer, end of sequence included, not means. Implicit rewards are
    β (log π − log π_ref).

    Args:
        beta: how strongly the model is held to the reference.
        loss_S: the cross-entropy at each position of an answer, −log π, in nats.
        answer_S: the number of the answer that each position stands in: 2R for the chosen one of row R, 2R + 1 for its
            rejected one.
        references: log π_ref of both answers of each row.

    Returns:
        figures_3R: the loss of each pair; whether its chosen answer has the higher implicit reward, 0.5 where both are
        equal; and by how much. And the row of each, 0 to R − 1.
    """
    reference_R2 = torch.tensor([list(one) for one in references], dtype=loss_S.dtype, device=loss_S.device)
    log_N = torch.zeros(2 * len(references), dtype=loss_S.dtype, device=loss_S.device).index_add(0, answer_S, -loss_S)
    reward_R2 = beta * (log_N.view(-1, 2) - reference_R2)
    margin_R = reward_R2[:, 0] - reward_R2[:, 1]
    figures_3R = torch.stack([-torch.nn.functional.logsigmoid(margin_R), preferred(margin_R), margin_R])
    return figures_3R, torch.arange(len(references), device=loss_S.device)


def preferred(margin_R: torch.Tensor) -> torch.Tensor:
    """Return 1 where the chosen answer is ahead of the rejected one, 0 where it is behind, 0.5 where they are equal.

    So the base, which is its own reference, prefers the chosen answers as chance does.

    Args:
        margin_R: by how much it is ahead.
    """
    return (torch.sign(margin_R.detach()) + 1) / 2


def _at_tokens(
    loss_S: torch.Tensor, answer_S: torch.Tensor, references: Sequence[Reference]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token, and its row, which has one answer."""
    return loss_S[None], answer_S


def _token_loss(training: Training) -> TokenLoss | None:
    """Return the loss at selected positions that a recipe names; None is the cross-entropy.

    The cross-entropy is never computed from whole logits. Of a person's own loss, errors and the result's shape are
    told in one sentence.
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
