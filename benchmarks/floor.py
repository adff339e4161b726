"""The floor: the least a round can take, from what must be multiplied and how fast this machine multiplies matrices.

What must be multiplied in a round, in floating-point operations (two per multiply-add), without any padding:
``operations``. How fast matrices of the setting's own shapes are multiplied in the same run: ``matrix_rate``.
Norms, softmax, rotary positions, dropout, the optimizer and everything in Python count nothing here.

Shape legend: T tokens of a row, S response positions, D hidden size, V vocabulary, I inputs and O outputs of a linear
module, R rank, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.setting import RANK, Setting

if TYPE_CHECKING:
    from benchmarks.setting import Rows

_BEFORE = {
    "o_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_proj": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "up_proj": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "down_proj": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
}

AT_A_GO = 2e9  # operations: some hundredths of a second


def operations(setting: Setting, clients: Rows) -> dict[str, float]:
    """Return the floating-point operations that a round must do, by term."""
    rows = [row for some in clients.values() for row in some]
    tokens = sum(map(len, rows))
    squares = sum(len(row) ** 2 for row in rows)
    answered = sum(int(row.response_T[1:].sum()) for row in rows)
    return {
        "frozen weights, forward": frozen_forward(setting) * tokens,
        "frozen weights, backward": frozen_backward(setting) * tokens,
        "attention": attention(setting) * squares,
        "adapters": adapters(setting) * tokens,
        "output layer": output_layer(setting) * answered,
    }


def frozen_forward(setting: Setting) -> float:
    """Return 2 · N a token: each of the N frozen weights of the decoder layers is multiplied once."""
    return 2.0 * setting.layers * sum(inputs * outputs for inputs, outputs in setting.linears.values())


def frozen_backward(setting: Setting) -> float:
    """Return 2 · N' a token: gradients flow back through each frozen weight to its inputs.

    N' leaves out, in the first layer, the weights whose inputs no adapter stands before: nothing is to be learnt there.
    """
    first = sum(inputs * outputs for name, (inputs, outputs) in setting.linears.items() if _flows(setting, name))
    every = sum(inputs * outputs for inputs, outputs in setting.linears.values())
    return 2.0 * ((setting.layers - 1) * every + first)


def attention(setting: Setting) -> float:
    """Return (2 + 4) · L · D, times T² of a row, with D the size of all heads: products of queries, keys, weights and
    values, of which causal attention needs one half, so that each costs 2 · D · T² / 2.

    Two forward; four backward, to the weights, the values, the queries and the keys, of which the first layer
    leaves out those that lead to no adapter.
    """
    q, k, v = (name in setting.targets for name in ("q_proj", "k_proj", "v_proj"))
    first = 2 + sum((v, q or k, q, k))
    return float(setting.attention * ((setting.layers - 1) * 6 + first))


def adapters(setting: Setting) -> float:
    """Return 2 · R · (3 · I + 3 · O) a token and adapted module: forward, to the gradients of A and B, to the inputs.

    Forward costs R · I + R · O multiply-adds, the gradients of B and A the same, and the way back R · O to the inner
    R values and R · I to the inputs; the last of these is not needed in the first layer before any adapter.
    """
    total = 0.0
    for name in setting.targets:
        inputs, outputs = setting.linears[name]
        total += 2.0 * RANK * setting.layers * (3 * inputs + 3 * outputs)
        total -= 0.0 if _flows(setting, name) else 2.0 * RANK * inputs
    return total


def output_layer(setting: Setting) -> float:
    """Return 2 · 2 · D · V a response position: logits, and the gradient back to the hidden state."""
    return 4.0 * setting.hidden * setting.vocabulary


def _flows(setting: Setting, name: str) -> bool:
    """Return whether a gradient must reach the inputs of a module of the first layer."""
    return any(other in setting.targets for other in _BEFORE.get(name, ()))


def rates(setting: Setting, folder: Path, clients: Rows, **work: float) -> Callable[[], Mapping[str, float]]:
    """Return what measures the matrix rate of both precisions, with so much work, as a round of its own."""

    def round() -> Mapping[str, float]:
        return {dtype: matrix_rate(setting, dtype, **work) for dtype in ("float32", "bfloat16")}

    return round


def matrix_rate(setting: Setting, dtype: str, rows: int = 1024, repeats: int = 5, at_a_go: float = AT_A_GO) -> float:
    """Return floating-point operations a second of ``torch.mm`` into a given result, the best of shapes and repeats.

    Shapes are those of the setting: rows × I times I × O of each linear module, and D × V, of a larger vocabulary than
    32,768 tokens so many.

    Args:
        setting: whose shapes are multiplied.
        dtype: precision.
        rows: of the left matrix.
        repeats: of each shape.
        at_a_go: operations that are timed at once, about.
    """
    shapes = sorted({*setting.linears.values(), (setting.hidden, min(setting.vocabulary, 2**15))})
    kind = getattr(torch, dtype)
    return max(_rate(rows, *shape, kind, setting.device, repeats, at_a_go) for shape in shapes)


def _rate(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str, repeats: int, at_a_go: float) -> float:
    left, right = torch.randn(rows, inputs, device=device), torch.randn(inputs, outputs, device=device)
    left, right = left.to(dtype), right.to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype, device=device)
    calls = max(1, int(at_a_go / (2 * rows * inputs * outputs)))
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(left, right, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * inputs * outputs * calls / best


def _wait(device: str) -> None:
    """Wait for a device that works on its own."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
