"""Steps with a backward pass of their own against autograd on the same formulas."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bellwether.model import kernels


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turned(x_MHD, cos_MD, sin_MD):
    half = x_MHD.shape[-1] // 2
    swapped = torch.cat([-x_MHD[..., half:], x_MHD[..., :half]], -1)
    return x_MHD * cos_MD[:, None] + swapped * sin_MD[:, None]


ANGLES = torch.cat([drawn(7, 3, seed=8)] * 2, -1)
NORM, GATE, UP, DOWN = drawn(6, seed=1), drawn(10, 6, seed=2), drawn(10, 6, seed=3), drawn(6, 10, seed=4)
VOCABULARY, BIAS, TARGETS = drawn(50, 6, seed=5), drawn(50, seed=6), torch.tensor([3, 49, 0, 7, 7, 21, 8])

CASES = {
    "norm": (
        drawn(7, 6),
        lambda x: kernels.rms_norm(x, NORM, 1e-5),
        lambda x: torch.nn.functional.rms_norm(x, (6,), NORM, 1e-5),
    ),
    "rotation": (
        drawn(7, 2, 6),
        lambda x: kernels.rotate(x, ANGLES.cos(), ANGLES.sin()),
        lambda x: turned(x, ANGLES.cos(), ANGLES.sin()),
    ),
    "rotation of a part of each head": (
        drawn(7, 2, 10),
        lambda x: kernels.rotate(x, ANGLES.cos(), 2 * ANGLES.sin()),
        lambda x: torch.cat([turned(x[..., :6], ANGLES.cos(), 2 * ANGLES.sin()), x[..., 6:]], -1),
    ),
    "feed-forward with GELU": (
        drawn(7, 6),
        lambda x: kernels.gated_mlp(x, GATE, UP, DOWN, kernels.GELU),
        lambda x: (torch.nn.functional.gelu(x @ GATE.T, approximate="tanh") * (x @ UP.T)) @ DOWN.T,
    ),
    "feed-forward": (
        drawn(7, 6),
        lambda x: kernels.gated_mlp(x, GATE, UP, DOWN),
        lambda x: (torch.nn.functional.silu(x @ GATE.T) * (x @ UP.T)) @ DOWN.T,
    ),
    "cross-entropy": (
        drawn(7, 6) * 5,
        lambda x: kernels.cross_entropy(x, VOCABULARY, None, TARGETS),
        lambda x: torch.nn.functional.cross_entropy(x @ VOCABULARY.T, TARGETS, reduction="none"),
    ),
    "cross-entropy with bias": (
        drawn(7, 6) * 5,
        lambda x: kernels.cross_entropy(x, VOCABULARY, BIAS, TARGETS),
        lambda x: torch.nn.functional.cross_entropy(x @ VOCABULARY.T + BIAS, TARGETS, reduction="none"),
    ),
    "cross-entropy with a soft cap": (
        drawn(7, 6),
        lambda x: kernels.cross_entropy(x, VOCABULARY, BIAS, TARGETS, 2.0),
        lambda x: torch.nn.functional.cross_entropy(
            ((x @ VOCABULARY.T + BIAS) / 2.0).tanh() * 2.0, TARGETS, reduction="none"
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_autograd(case):
    start, ours, theirs = CASES[case]
    found = []
    for step in (ours, theirs):
        x = start.clone().requires_grad_()
        y = step(x)
        (y * drawn(*y.shape, seed=7)).sum().backward()
        found.append((y.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("size", [6, 32, 64, 80])
@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_in_bfloat16_is_the_same_for_narrow_and_for_wide_heads(size, sign, monkeypatch):
    angles = torch.cat([drawn(7, 1, size // 2, seed=8)] * 2, -1)
    x, cos, sin = (value.to(torch.bfloat16) for value in (drawn(7, 2, size), angles.cos(), angles.sin()))
    found = []
    for numbers in (0, 1000):
        monkeypatch.setattr(kernels, "_VECTOR", numbers)
        found.append(kernels._turned(x, cos, sin, sign))
    assert torch.equal(*found)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("numbers", "tokens"), [(1, 1), (16, 1), (16 * 13, 13), (50 * 16, 50), (50 * 16, 64)])
def test_cross_entropy_in_parts_is_that_of_the_whole(numbers, tokens, cap, monkeypatch):
    monkeypatch.setattr(kernels, "_LOGITS", numbers)
    monkeypatch.setattr(kernels, "_TOKENS", tokens)
    x, targets = drawn(45, 6).requires_grad_(), torch.arange(45)
    y = kernels.cross_entropy(x, VOCABULARY, BIAS, targets, cap)
    y.square().sum().backward()
    ours, x.grad = x.grad, None
    logits = x @ VOCABULARY.T + BIAS
    logits = logits if cap is None else (logits / cap).tanh() * cap
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    whole.square().sum().backward()
    torch.testing.assert_close(y, whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours, x.grad, atol=1e-11, rtol=1e-11)


def test_cross_entropy_never_holds_more_than_a_part_of_the_logits(monkeypatch):
    monkeypatch.setattr(kernels, "_LOGITS", 64)
    monkeypatch.setattr(kernels, "_TOKENS", 8)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    x, targets = drawn(45, 6), torch.arange(45)
    with Sizes():
        kernels.cross_entropy(x, VOCABULARY, BIAS, targets)
    assert max(sizes) == 45 * 6  # the gradient; all logits would be 45 × 50


def test_cross_entropy_of_large_logits_stays_finite():
    x = torch.tensor([[400.0, -400.0]], dtype=torch.float32, requires_grad=True)
    loss = kernels.cross_entropy(x, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None, torch.tensor([1]))
    loss.sum().backward()
    assert loss.tolist() == [800.0]
    assert x.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(("wanted", "products"), [(True, 2), (False, 1)])
def test_the_output_layer_is_multiplied_once_more_only_where_a_gradient_is_wanted(wanted, products):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(wanted):
        kernels.cross_entropy(drawn(7, 6).requires_grad_(), VOCABULARY, None, TARGETS)
    assert counter.get_total_flops() == products * 2 * 7 * 6 * 50
