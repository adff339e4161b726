"""Gradients that hide single rows: differentially private stochastic gradient descent (DP-SGD).

Abadi et al. 2016, "Deep Learning with Differential Privacy", arXiv 1607.00133, algorithm 1: every row joins a step by a
chance of its own (``batches.poisson_steps``), each row's gradient is cut to a norm of C, and the step goes along

    (sum of g_i · min(1, C / ‖g_i‖) + N(0, (z C)² I)) / B

with the noise multiplier z and the expected batch B, whatever the size of this one; also of an empty one, whose step is
noise alone. One row more or less moves the sum by C at most, so what an optimizer, a method's correction of the
gradient or ``training.clip_norm`` make of it afterwards tells no more than the noised sum does.

For that a row's loss is the mean over its own trained tokens. A mean over all tokens of a batch, as without privacy,
would let a row change the share of all others. A pair of answers has one loss anyway. A person's own loss must look at
one row at a time, as it must everywhere.

The LoRA layers give gradients of single rows: the client's adapter stands in all their slots, each row of a piece in a
slot of its own. What a client tells beside its adapter (its loss, the numbers of its rows and tokens) is not noised.

Shape legend: K slots, P parameters of an adapter, F figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bellwether.client.objective import Objective
from bellwether.client.passes import Gradient, backward
from bellwether.client.plans import Client, Plan, Used
from bellwether.errors import RecipeError
from bellwether.exchange.messages import EXAMPLE_NOISE
from bellwether.method.examples import expected_batch
from bellwether.model.base import Base
from bellwether.model.lora import LoraLayers
from bellwether.tools.randomness import secret_normals


def noised_gradient(base: Base, layers: LoraLayers, objective: Objective, client: Client, part: int) -> Gradient:
    """Return what gives the gradients of a client's steps in slot 0, each row's cut, with noise on their sum.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it; as many rows run through the base at once as they have slots.
        objective: what is minimised.
        client: the one client that is trained.
        part: its pass, from 0 on.

    Raises:
        RecipeError: the task says how well rows shall be hidden, and not by how much noise.
    """
    privacy, key = client.task.privacy, client.key(EXAMPLE_NOISE)
    if privacy.noise is None:
        raise RecipeError("privacy.noise is null, and no noise was found for privacy.epsilon; give privacy.noise.")
    deviation, batch = privacy.noise * privacy.clip_norm, expected_batch(len(client.rows), client.task.training)

    def gradient(plans: Sequence[Plan], step: int, counted_K: torch.Tensor, figures_FK: torch.Tensor) -> None:
        (plan,) = plans
        layers.values_KP[1:] = layers.values_KP[0]
        sum_P = clipped_sum(base, layers, plan, step, objective, figures_FK)
        noise_P = deviation * secret_normals(key, f"{part} {step}".encode(), len(sum_P))
        layers.grads_KP[0] = (sum_P + torch.from_numpy(noise_P).to(sum_P)) / batch

    return gradient


def clipped_sum(
    base: Base, layers: LoraLayers, plan: Plan, step: int, objective: Objective, figures_FK: torch.Tensor
) -> torch.Tensor:
    """Return sum_P of the gradients of a step's rows, each cut to ``privacy.clip_norm``; slots are clear afterwards.

    Args:
        base: the frozen base model.
        layers: LoRA layers over it, the client's adapter in all slots.
        plan: the client's.
        step: its number, from 0 on.
        objective: what is minimised.
        figures_FK: sums of figures, to which those of the step are added.
    """
    task = plan.client.task
    trained_P, sum_P = layers.where(task.payload.trained), torch.zeros_like(layers.grads_KP[0])
    for piece in _pieces(plan, step, layers.slots):
        counted_K = torch.tensor([max(1, objective.count(used.row)) for used in piece], device=base.device)
        figures_FK += backward(base, layers, piece, counted_K, task, objective).sum(1, keepdim=True)
        grads_KP = layers.grads_KP[: len(piece)]
        if trained_P is not None:
            grads_KP.mul_(trained_P)
        sum_P += clipped(grads_KP, task.privacy.clip_norm).sum(0)
        layers.grads_KP.zero_()
    return sum_P


def clipped(grads_KP: torch.Tensor, largest: float) -> torch.Tensor:
    """Return gradients scaled down to a norm of at most ``largest`` each, but for rounding.

    One that is not finite, or whose norm is not, becomes zero: no row may spoil the sum.

    Args:
        grads_KP: a gradient of each row.
        largest: the norm, C.
    """
    # In float32 the norm of a million values might be off by more than noise can hide; Apple's GPUs have no other.
    wide = torch.float32 if grads_KP.device.type == "mps" else torch.float64
    norm_K1 = torch.linalg.vector_norm(grads_KP, dim=1, keepdim=True, dtype=wide)
    cut_KP = grads_KP * (largest / norm_K1).clamp(max=1.0).to(grads_KP)
    return torch.where(norm_K1.isfinite(), cut_KP, 0.0)


def _pieces(plan: Plan, step: int, slots: int) -> Iterator[list[Used]]:
    """Yield the rows of a step in pieces of so many, each in a slot of its own."""
    (batch,), (seeds,) = plan.steps[step], plan.seeds[step]
    for start in range(0, len(batch), slots):
        drawn = zip(batch[start : start + slots], seeds[start : start + slots], strict=True)
        yield [
            Used(slot, plan.rows[index], seed, plan.references.get(index, ()))
            for slot, (index, seed) in enumerate(drawn)
        ]
