"""AdamW over several adapters at once, each with its own learning rate and its own clipping.

Shape legend: K slots, P parameters of an adapter.
"""

from __future__ import annotations

import torch


class StackedAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) on stacked adapters.

    Slots are stepped from the first on: those of clients that have finished stand last and stay as they are.

    Args:
        values_KP: the parameters, changed in place.
        grads_KP: their gradients.
        weight_decay: decoupled decay, per step, times the learning rate.
        betas: decay of the two moments.
        epsilon: added to the root of the second moment.
    """

    def __init__(
        self,
        values_KP: torch.Tensor,
        grads_KP: torch.Tensor,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        self.values_KP, self.grads_KP = values_KP, grads_KP
        self.weight_decay, self.betas, self.epsilon = weight_decay, betas, epsilon
        self._first_KP = torch.zeros_like(values_KP)
        self._second_KP = torch.zeros_like(values_KP)
        self._steps = 0

    def clip(self, active: int, largest: float) -> None:
        """Scale each active slot's gradient down to a norm of at most ``largest``."""
        grads_KP = self.grads_KP[:active]
        norm_K = torch.linalg.vector_norm(grads_KP, dim=1)
        grads_KP.mul_((largest / (norm_K + 1e-6)).clamp_(max=1.0)[:, None])

    def step(self, learning_rates: list[float]) -> None:
        """Step the first slots, as many as there are learning rates, and clear all gradients."""
        active = len(learning_rates)
        values_KP, grads_KP = self.values_KP[:active], self.grads_KP[:active]
        first_KP, second_KP = self._first_KP[:active], self._second_KP[:active]
        rate_K1 = torch.tensor(learning_rates, dtype=values_KP.dtype, device=values_KP.device)[:, None]
        self._steps += 1
        (beta1, beta2), steps = self.betas, self._steps
        if self.weight_decay:
            values_KP.mul_(1 - rate_K1 * self.weight_decay)
        first_KP.lerp_(grads_KP, 1 - beta1)
        second_KP.mul_(beta2).addcmul_(grads_KP, grads_KP, value=1 - beta2)
        root_KP = second_KP.sqrt().div_((1 - beta2**steps) ** 0.5).add_(self.epsilon)
        values_KP.sub_(first_KP.div(root_KP).mul_(rate_K1 / (1 - beta1**steps)))
        self.grads_KP.zero_()
