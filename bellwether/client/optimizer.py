"""Optimizers over several adapters at once, each with its own learning rate and its own clipping.

Slots are stepped from the first on: those of clients that have finished stand last and stay as they are. Where only
some of an adapter's values are trained, nothing moves the others: no gradient, no clipping by it, no decay.

Shape legend: K slots, P parameters of an adapter.
"""

from __future__ import annotations

import torch

from bellwether.recipe.recipe import Training

BETAS = 0.9, 0.999  # decay of AdamW's two moments
EPSILON = 1e-8  # added to the root of the second


class StackedOptimizer:
    """What all optimizers share: the values, their gradients, and how these are clipped.

    Args:
        values_KP: the parameters, changed in place.
        grads_KP: their gradients.
        weight_decay: decay of the parameters.
        trained_P: which values are trained; None trains all.
    """

    def __init__(
        self,
        values_KP: torch.Tensor,
        grads_KP: torch.Tensor,
        weight_decay: float = 0.0,
        trained_P: torch.Tensor | None = None,
    ) -> None:
        self.values_KP, self.grads_KP = values_KP, grads_KP
        self.weight_decay, self.trained_P = weight_decay, trained_P

    def clip(self, active: int, largest: float) -> None:
        """Scale each active slot's gradient, of what is trained, down to a norm of at most ``largest``."""
        grads_KP = self._of_trained(self.grads_KP[:active])
        norm_K = torch.linalg.vector_norm(grads_KP, dim=1)
        grads_KP.mul_((largest / (norm_K + 1e-6)).clamp_(max=1.0)[:, None])

    def step(self, learning_rates: list[float]) -> None:
        """Step the first slots, as many as there are learning rates, and clear all gradients."""
        active, values_KP = len(learning_rates), self.values_KP[: len(learning_rates)]
        rate_K1 = torch.tensor(learning_rates, dtype=values_KP.dtype, device=values_KP.device)[:, None]
        self._step(values_KP, self._of_trained(self.grads_KP[:active]), rate_K1)
        self.grads_KP.zero_()

    def _step(self, values_KP: torch.Tensor, grads_KP: torch.Tensor, rate_K1: torch.Tensor) -> None:
        """Step some slots along their gradients."""
        raise NotImplementedError

    def _of_trained(self, some_KP: torch.Tensor) -> torch.Tensor:
        """Return gradients, those of what is not trained set to zero, in place."""
        return some_KP if self.trained_P is None else some_KP.mul_(self.trained_P)

    def _decayed(self, values_KP: torch.Tensor) -> torch.Tensor:
        """Return the values that decay: those that are trained, and zero for the others."""
        return values_KP if self.trained_P is None else values_KP * self.trained_P


class StackedAdamW(StackedOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on stacked adapters.

    Args:
        values_KP: the parameters, changed in place.
        grads_KP: their gradients.
        weight_decay: decoupled decay, per step, times the learning rate.
        trained_P: which values are trained; None trains all.
    """

    def __init__(
        self,
        values_KP: torch.Tensor,
        grads_KP: torch.Tensor,
        weight_decay: float = 0.0,
        trained_P: torch.Tensor | None = None,
    ) -> None:
        super().__init__(values_KP, grads_KP, weight_decay, trained_P)
        self._first_KP = torch.zeros_like(values_KP)
        self._second_KP = torch.zeros_like(values_KP)
        self._steps = 0

    def _step(self, values_KP: torch.Tensor, grads_KP: torch.Tensor, rate_K1: torch.Tensor) -> None:
        first_KP, second_KP = self._first_KP[: len(values_KP)], self._second_KP[: len(values_KP)]
        self._steps += 1
        (beta1, beta2), steps = BETAS, self._steps
        if self.weight_decay and self.trained_P is None:
            values_KP.mul_(1 - rate_K1 * self.weight_decay)
        elif self.weight_decay:
            values_KP.sub_(self._decayed(values_KP) * (rate_K1 * self.weight_decay))
        first_KP.lerp_(grads_KP, 1 - beta1)
        second_KP.mul_(beta2).addcmul_(grads_KP, grads_KP, value=1 - beta2)
        root_KP = second_KP.sqrt().div_((1 - beta2**steps) ** 0.5).add_(EPSILON)
        values_KP.sub_(first_KP.div(root_KP).mul_(rate_K1 / (1 - beta1**steps)))


class StackedSGD(StackedOptimizer):
    """Plain stochastic gradient descent on stacked adapters: no momentum; decay is added to the gradient, as torch's.

    Arguments as in ``StackedOptimizer``.
    """

    def _step(self, values_KP: torch.Tensor, grads_KP: torch.Tensor, rate_K1: torch.Tensor) -> None:
        if self.weight_decay:
            grads_KP.add_(self._decayed(values_KP), alpha=self.weight_decay)
        values_KP.sub_(grads_KP.mul_(rate_K1))


def make_optimizer(
    training: Training, values_KP: torch.Tensor, grads_KP: torch.Tensor, trained_P: torch.Tensor | None
) -> StackedOptimizer:
    """Return the optimizer that a recipe names.

    Args:
        training: the recipe's training section.
        values_KP: the parameters, changed in place.
        grads_KP: their gradients.
        trained_P: which values are trained; None trains all.
    """
    kind: type[StackedOptimizer] = StackedAdamW if training.optimizer == "adamw" else StackedSGD
    return kind(values_KP, grads_KP, training.weight_decay, trained_P)
