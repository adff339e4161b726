"""Steps of a decoder with a frozen base, each with its own backward pass.

What autograd would do with the same formulas, but with fewer passes over memory: no gradient of a weight is prepared,
products that are wanted twice are kept once, and logits are never all there at the same time.

Shape legend: M tokens of all rows, S selected positions, H heads, D hidden size or size of a head, F size of the
feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Logits are held for so many numbers at a time: 4 MiB in float32, which stays near a processor core.
_LOGITS = 2**20
_VECTOR = 32  # numbers in bfloat16 that a processor with AVX-512 handles at once


def rms_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + epsilon) · weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).

    Computed in float32 at least, as transformers does.

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
        cos_MD: cosines of the angles of each token; both halves are the same.
        sin_MD: sines.
    """
    result: torch.Tensor = _Rotate.apply(x_MHD, cos_MD[:, None], sin_MD[:, None])  # type: ignore[no-untyped-call]
    return result


def gated_mlp(x_MD: torch.Tensor, gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    """Return (silu(x gate) · (x up)) down, for frozen weights (Shazeer 2020, arXiv 2002.05202, equation 6: SwiGLU)."""
    result: torch.Tensor = _GatedMLP.apply(x_MD, gate_FD, up_FD, down_DF)  # type: ignore[no-untyped-call]
    return result


def cross_entropy(
    hidden_SD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_S: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy at each position, in nats, with the frozen output layer applied in parts.

    The gradient with respect to the hidden states is found together with the loss, as in Liger Kernel (Hsu et al. 2024,
    arXiv 2410.10989, section 3.2), so that a part's logits are needed once only. Computed in float32 at least.

    Args:
        hidden_SD: what the output layer gets.
        weight_VD: its weight.
        bias_V: its bias, or None.
        targets_S: the tokens to predict.
    """
    result: torch.Tensor = _CrossEntropy.apply(hidden_SD, weight_VD, bias_V, targets_S, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
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
        normed: torch.Tensor = (x_wide * scale).to(x.dtype).mul_(weight)
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
    half = x.shape[-1] // 2
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
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gated_MF, wide_MF = x @ gate.T, x @ up.T
        ctx.save_for_backward(gated_MF, wide_MF, gate, up, down)
        return torch.nn.functional.silu(gated_MF).mul_(wide_MF) @ down.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gated_MF, wide_MF, gate, up, down = ctx.saved_tensors
        grad_MF = grad @ down
        grad_x = (torch.nn.functional.silu(gated_MF).mul_(grad_MF)) @ up
        grad_x.addmm_(torch.ops.aten.silu_backward(grad_MF.mul_(wide_MF), gated_MF), gate)
        return grad_x, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        with_gradient: bool,
    ) -> torch.Tensor:
        kind = torch.float64 if hidden_SD.dtype == torch.float64 else torch.float32
        loss_S = torch.empty(len(hidden_SD), dtype=kind, device=hidden_SD.device)
        grad_SD = torch.empty_like(hidden_SD) if with_gradient else None
        size = max(16, _LOGITS // len(weight_VD))
        for start in range(0, len(hidden_SD), size):
            part = slice(start, start + size)
            target_S1 = targets_S[part, None]
            logits_SV = wide(torch.nn.functional.linear(hidden_SD[part], weight_VD, bias_V))
            logits_SV.sub_(logits_SV.amax(1, keepdim=True))
            wanted_S1 = logits_SV.gather(1, target_S1)
            whole_S1 = logits_SV.exp_().sum(1, keepdim=True)
            loss_S[part] = (whole_S1.log() - wanted_S1)[:, 0]
            if grad_SD is not None:
                # A loss's gradient with respect to its logits is their probabilities less the truth; dividing after the
                # product saves a pass over all logits.
                mean_SD = wide(logits_SV.to(weight_VD.dtype) @ weight_VD).div_(whole_S1)
                grad_SD[part] = mean_SD.sub_(weight_VD[targets_S[part]])
        ctx.grad_SD = grad_SD
        return loss_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (ctx.grad_SD * grad_S[:, None]).to(ctx.grad_SD.dtype), None, None, None, None
