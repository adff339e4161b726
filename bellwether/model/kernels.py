"""Steps of a decoder with a frozen base, each with its own backward pass.

What autograd would do with the same formulas, but with fewer passes over memory: no gradient of a weight is prepared,
products that are wanted twice are kept once, and logits are never all there at the same time.

Shape legend: M tokens of all rows, S selected positions, H heads, D hidden size or size of a head, F size of the
feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

# So many logits are held at a time, of so many tokens at most: 4 MiB in float32, which stays near a processor core, and
# with a vocabulary of 262,144 tokens its weights pass through once for 512 positions, both products taken of each part.
_LOGITS = 2**20
_TOKENS = 2**11
_VECTOR = 32  # numbers in bfloat16 that a processor with AVX-512 handles at once


def rms_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + epsilon) · weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    Computed in float32 at least, as transformers does, but scaled in the precision of the scales: Llama's are in the
    model's, Gemma's in float32 at least.

    Args:
        x_MD: input; further axes may stand before the last.
        weight_D: frozen scales.
        epsilon: added to the mean of the squares.
    """
    result: torch.Tensor = _RMSNorm.apply(x_MD, weight_D, epsilon)  # type: ignore[no-untyped-call]
    return result


def rotate(x_MHD: torch.Tensor, cos_MD: torch.Tensor, sin_MD: torch.Tensor) -> torch.Tensor:
    """Return queries or keys turned by their positions (Su et al. 2021, arXiv 2104.09864, equation 34).

    The halves of a head are the two coordinates, as in transformers, instead of neighbours.

    Args:
        x_MHD: queries or keys.
        cos_MD: cosines of the angles of each token; both halves are the same. Where a head has more values than angles,
            the rest of it stays as it is.
        sin_MD: sines.
    """
    result: torch.Tensor = _Rotate.apply(x_MHD, cos_MD[:, None], sin_MD[:, None])  # type: ignore[no-untyped-call]
    return result


class Activation(NamedTuple):
    """An activation.

    Args:
        value: of its input.
        gradient: from the gradient of its output, and its input, to the gradient of its input.
    """

    value: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SILU = Activation(torch.nn.functional.silu, torch.ops.aten.silu_backward)
GELU = Activation(
    partial(torch.nn.functional.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
)


def gated_mlp(
    x_MD: torch.Tensor,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
    down_DF: torch.Tensor,
    activation: Activation = SILU,
) -> torch.Tensor:
    """Return (activation(x gate) · (x up)) down, for frozen weights (Shazeer 2020, arXiv 2002.05202, equation 6)."""
    result: torch.Tensor = _GatedMLP.apply(x_MD, gate_FD, up_FD, down_DF, activation)  # type: ignore[no-untyped-call]
    return result


def capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return cap · tanh(x / cap), a soft cap (Gemma Team 2024, arXiv 2408.00118, section 2); without one, x."""
    return x if cap is None else (x / cap).tanh() * cap


def cross_entropy(
    hidden_SD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_S: torch.Tensor,
    cap: float | None = None,
) -> torch.Tensor:
    """Return the cross-entropy at each position, in nats, with the frozen output layer applied in parts.

    The gradient with respect to the hidden states is found together with the loss, as in Liger Kernel (Hsu et al. 2024,
    arXiv 2410.10989, section 3.2), so that a part's logits are needed once only. Parts are of some positions and some
    tokens of the vocabulary, and the sum over the vocabulary is kept as it comes, as in Cut Cross-Entropy (Wijmans et
    al. 2024, arXiv 2411.09009): beside its arguments and results it holds 2^20 logits at a time, twice with a soft cap,
    and D float32 numbers for each of 512 positions or more. Computed in float32 at least.

    Args:
        hidden_SD: what the output layer gets.
        weight_VD: its weight.
        bias_V: its bias, or None.
        targets_S: the tokens to predict.
        cap: of the soft cap on logits; None for none.
    """
    with_gradient = torch.is_grad_enabled()
    result: torch.Tensor = _CrossEntropy.apply(hidden_SD, weight_VD, bias_V, targets_S, cap, with_gradient)  # type: ignore[no-untyped-call]
    return result


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return values in float32, or in float64 where they are that already: losses and norms need the digits."""
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x_wide = wide(x)
        scale = (
            torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        )
        ctx.save_for_backward(x_wide, weight, scale)
        normed: torch.Tensor = (x_wide * scale).to(weight.dtype).mul_(weight).to(x.dtype)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_wide, weight, scale = ctx.saved_tensors
        scaled = wide(grad * weight)
        along = (
            torch.linalg.vecdot(scaled, x_wide)[..., None].mul_(scale).mul_(scale).mul_(scale).div_(-x_wide.shape[-1])
        )
        return scaled.mul_(scale).addcmul_(x_wide, along).to(grad.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Return x turned forwards (sign 1) or back (-1)."""
    angles = cos.shape[-1]
    if angles < x.shape[-1]:
        return torch.cat((_turned(x[..., :angles], cos, sin, sign), x[..., angles:]), dim=-1)
    half = angles // 2
    turned = x * cos
    if x.dtype == torch.bfloat16 and half < _VECTOR:
        # Half a head is less than a processor's vector of such numbers: number by number takes twice as long as a copy.
        signed = torch.cat((sin[..., :half], -sin[..., half:]), dim=-1).mul_(-sign)
        return turned.addcmul_(torch.cat((x[..., half:], x[..., :half]), dim=-1), signed)
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        gated_MF, wide_MF = x @ gate.T, x @ up.T
        ctx.save_for_backward(gated_MF, wide_MF, gate, up, down)
        ctx.activation = activation
        return activation.value(gated_MF).mul_(wide_MF) @ down.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gated_MF, wide_MF, gate, up, down = ctx.saved_tensors
        grad_MF = grad @ down
        grad_x = (ctx.activation.value(gated_MF).mul_(grad_MF)) @ up
        grad_x.addmm_(ctx.activation.gradient(grad_MF.mul_(wide_MF), gated_MF), gate)
        return grad_x, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        cap: float | None,
        with_gradient: bool,
    ) -> torch.Tensor:
        kind = torch.float64 if hidden_SD.dtype == torch.float64 else torch.float32
        loss_S = torch.empty(len(hidden_SD), dtype=kind, device=hidden_SD.device)
        grad_SD = torch.empty_like(hidden_SD) if with_gradient else None
        size = max(1, _LOGITS // min(_TOKENS, len(weight_VD)))
        for start in range(0, len(hidden_SD), size):
            part = slice(start, start + size)
            loss_S[part], found_SD = _part_entropy(
                hidden_SD[part], weight_VD, bias_V, targets_S[part], cap, with_gradient
            )
            if grad_SD is not None and found_SD is not None:
                grad_SD[part] = found_SD
        ctx.grad_SD = grad_SD
        return loss_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (ctx.grad_SD * grad_S[:, None]).to(ctx.grad_SD.dtype), None, None, None, None, None


def _part_entropy(
    hidden_SD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_S: torch.Tensor,
    cap: float | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the losses of some positions, and the gradients with respect to their hidden states where wanted."""
    start_S1 = wide(hidden_SD.new_zeros(len(hidden_SD), 1))
    # Over the vocabulary so far: the largest logit, the sum of exp(logit - largest), the same of each token's weights.
    most_S1, whole_S1, sum_SD = start_S1 - float("inf"), start_S1.clone(), wide(torch.zeros_like(hidden_SD))
    wanted_S1, slope_S1 = start_S1.clone(), start_S1 + 1
    for first in range(0, len(weight_VD), _TOKENS):
        tokens = slice(first, first + _TOKENS)
        weight_WD, bias_W = weight_VD[tokens], None if bias_V is None else bias_V[tokens]
        logit_SW = wide(torch.nn.functional.linear(hidden_SD, weight_WD, bias_W))
        if cap is not None:
            tanh_SW = logit_SW.div_(cap).tanh_()
            logit_SW = tanh_SW * cap
        place_S1 = targets_S[:, None] - first
        here_S1 = (place_S1 >= 0) & (place_S1 < len(weight_WD))
        place_S1 = place_S1.clamp(0, len(weight_WD) - 1)
        wanted_S1 = torch.where(here_S1, logit_SW.gather(1, place_S1), wanted_S1)
        before_S1, most_S1 = most_S1, torch.maximum(most_S1, logit_SW.amax(1, keepdim=True))
        shrunk_S1 = (before_S1 - most_S1).exp_()
        share_SW = logit_SW.sub_(most_S1).exp_()
        whole_S1.mul_(shrunk_S1).add_(share_SW.sum(1, keepdim=True))
        if not with_gradient:
            continue
        if cap is not None:
            slope_SW = tanh_SW.square_().neg_().add_(1)
            slope_S1 = torch.where(here_S1, slope_SW.gather(1, place_S1), slope_S1)
            share_SW.mul_(slope_SW)
        sum_SD.mul_(shrunk_S1).add_(share_SW.to(weight_VD.dtype) @ weight_WD)
    loss_S = (whole_S1.log() + most_S1 - wanted_S1)[:, 0]
    if not with_gradient:
        return loss_S, None
    # A loss's gradient with respect to its logits is their probabilities less the truth; dividing after the product
    # saves a pass over all logits.
    return loss_S, sum_SD.div_(whole_S1).addcmul_(slope_S1, wide(weight_VD[targets_S]), value=-1)
