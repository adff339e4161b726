"""How much memory and time training will take: formulas, and how fast this machine multiplies.

Memory follows the formula in ``memory_bytes``. Time is the arithmetic that must be done (see ``train_flops``) over the
matrix rate of this machine, measured in a fraction of a second, times a rough efficiency; see ``EFFICIENCY`` for where
that comes from.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bellwether.recipe.recipe import Model, Recipe

if TYPE_CHECKING:
    import torch

    from bellwether.model.facts import ModelFacts

# Share of the measured matrix rate that local training reached, by the model's hidden size; between
# these it is interpolated, beyond them the nearest holds. The factors are rough: they were calibrated on one
# busy machine with two cores (one thread, Llama models of 4 to 8 layers, batch size 8, rows of about 40 tokens,
# LoRA of rank 8 with dropout on all linear modules, float32), and validated on no other, on no GPU and
# with no more threads. What is missing goes into dropout masks, norms, softmax, padding and, at small
# sizes, Python between the operations.
_LOGITS = 3 * 4 * 2**20  # bytes of the parts of logits that are there at a time, with what is made of them

EFFICIENCY: Mapping[int, float] = {64: 0.06, 128: 0.16, 256: 0.24, 512: 0.4}


def train_flops(facts: ModelFacts, adapter: int, tokens: float, square: float, trained: float) -> float:
    """Return the floating-point operations of training: two per multiply-add.

    Per token the frozen linear weights cost 2N forwards and 2N backwards (to their input only), the
    adapter 6 a weight, attention 12·D·T a layer, and the output layer 4·D·V where the loss is taken.

    Args:
        facts: shapes of the base model.
        adapter: weights of the adapter.
        tokens: tokens that pass through the model.
        square: the sum of the squared lengths of their rows.
        trained: tokens that count in the loss.
    """
    frozen = sum(shape.inputs * shape.outputs for shape in facts.linears)
    output = facts.output_layer.inputs * facts.output_layer.outputs
    attention = 12 * facts.hidden_size * facts.layers * square
    return (4 * frozen + 6 * adapter) * tokens + attention + 4 * output * trained


def memory_bytes(
    facts: ModelFacts, recipe: Recipe, adapter: int, modules: Sequence[str], longest: int, together: int = 1
) -> dict[str, int]:
    """Return the peak memory of training in bytes, by part.

    Weights take 4 or 2 bytes each by ``model.dtype``, or less (see ``weight_bytes``). An adapter weight takes 16: its
    value, its gradient and AdamW's two moments, in float32; with plain SGD 8. The largest batch is ``batch_size``
    rows of the longest length, each with both answers where a loss compares them.

    Over padded rows each token keeps, for the backward pass, inputs and outputs of linear modules, and the float32
    inputs of the adapted ones, twice with dropout (the mask too), ten times the hidden size a layer for norms, rotation
    and attention; and each position of the loss three float32 rows of the vocabulary (every position is taken to be
    one). Measured growth of the process in training was 0.98 to 1.22 times this at hidden sizes of 64 to 512.

    Where rows run end to end (``model.decoder``), each token keeps in a layer the float32 inputs of its norms (four, as
    Gemma has; others have two) and of those of queries and keys (which some have), queries, keys, values and what
    attention gives in float32, all by head, gates and what they gate, or all of the feed-forward layer where an adapter
    stands in it, and the float32 inputs of adapted modules as above; and the loss keeps a gradient of the hidden
    size, beside parts of the logits of a fixed size.

    Where the method folds updates into the base, the adapted weights are there a second time.

    With gradient checkpointing it is one layer's part of all this at a time, and each layer's input. Each of several
    processes takes all this, and the one that evaluates a base as well.

    Args:
        facts: shapes of the base model.
        recipe: precision, dropout and batch size.
        adapter: weights of the adapter.
        modules: paths of the adapted modules.
        longest: tokens of the longest row.
        together: clients trained together in a process, each with an adapter, whose rows share ``engine.tokens``.
    """
    from bellwether.method.named import make_method
    from bellwether.model.quantized import weight_bytes

    width, whole = 2 if recipe.model.dtype == "bfloat16" else 4, _runs_end_to_end(facts, recipe)
    adapted = {shape.path: shape for shape in facts.linears if shape.path in set(modules)}
    per_token = (_kept_end_to_end if whole else _kept_padded)(facts, width, list(adapted))
    copies = 2 if recipe.lora.dropout else 1
    per_token += sum(4 * copies * shape.inputs for shape in adapted.values())
    if recipe.training.gradient_checkpointing:
        per_token = per_token // facts.layers + facts.layers * facts.hidden_size * width
    longest *= 2 if recipe.training.loss == "dpo" else 1  # both answers of a row are there at once
    tokens = recipe.training.batch_size * longest
    if together > 1:
        tokens = max(longest, min(recipe.engine.tokens, together * recipe.training.accumulation * tokens))
    processes = recipe.engine.processes
    per_weight = 8 if recipe.training.optimizer == "sgd" else 16
    bases = processes if processes == 1 else processes + 1
    folded = sum(shape.inputs * shape.outputs for shape in adapted.values()) if make_method(recipe.method).folds else 0
    changed = {"weights with what is folded": bases * folded * width} if folded else {}
    return {
        **changed,
        "base weights": bases * weight_bytes(facts, width, recipe.model.quantization),
        "adapter and optimizer": processes * per_weight * adapter * together,
        "activations": processes * tokens * per_token,
        "logits": processes
        * (_LOGITS + tokens * 4 * facts.hidden_size if whole else tokens * facts.vocabulary * 4 * 3),
    }


def _runs_end_to_end(facts: ModelFacts, recipe: Recipe) -> bool:
    """Return whether rows will run through a model without padding, as a rule of its architecture."""
    from bellwether.model.decoder import knows
    from bellwether.model.loading import pick_device

    settings = recipe.model
    usual = settings.attention != "eager" and settings.quantization == "none" and ":" not in recipe.training.loss
    return usual and knows(facts.architecture) and pick_device(settings.device).type == "cpu"


def _kept_padded(facts: ModelFacts, width: int, adapted: Sequence[str]) -> int:
    """Return the bytes that each token keeps for the backward pass as transformers computes, without adapters."""
    linear = sum(width * (shape.inputs + shape.outputs) for shape in facts.linears)
    return linear + facts.layers * 10 * facts.hidden_size * width


def _kept_end_to_end(facts: ModelFacts, width: int, adapted: Sequence[str]) -> int:
    """Return the bytes that each token keeps for the backward pass of ``model.decoder``, without adapters."""
    kept = facts.layers * 4 * 4 * facts.hidden_size
    for shape in facts.linears:
        layer, _, name = shape.path.rpartition(".")
        if name == "o_proj":
            kept += 4 * 4 * shape.inputs
        elif name in ("q_proj", "k_proj"):
            kept += 4 * shape.outputs
        elif name == "down_proj":
            plain = not any(path.startswith(f"{layer}.") for path in adapted)
            kept += width * shape.inputs * (2 if plain else 5)
    return kept


def matrix_rate(facts: ModelFacts, device: str, recipe: Recipe, seconds: float = 0.3) -> float:
    """Return the floating-point operations per second of matrix products of the model's size, measured here.

    Args:
        facts: the mean linear module of the base gives the size.
        device: where to measure.
        recipe: precision and number of threads.
        seconds: how long to measure.
    """
    typical = sorted(facts.linears, key=lambda shape: shape.inputs * shape.outputs)[len(facts.linears) // 2]
    settings = recipe.model.model_copy(update={"device": device})
    return product_rate(settings.dtype, settings, 1024, typical.inputs, typical.outputs, seconds)


def product_rate(dtype: str, settings: Model, tokens: int, inputs: int, outputs: int, seconds: float = 0.3) -> float:
    """Return the floating-point operations per second of matrix products of one size, measured here.

    Args:
        dtype: the precision: float32 or bfloat16.
        settings: device and number of threads.
        tokens: rows of the matrix that is multiplied.
        inputs: its columns.
        outputs: rows of the weights.
        seconds: how long to measure.

    Raises:
        ModelError: the device is not there.
    """
    import torch

    from bellwether.model.loading import DTYPES, pick_device

    device, threads = pick_device(settings.device), torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        x_MI = torch.ones(tokens, inputs, dtype=DTYPES[dtype], device=device)
        w_OI = torch.ones(outputs, inputs, dtype=DTYPES[dtype], device=device)
        return _rate(x_MI, w_OI, seconds)
    finally:
        torch.set_num_threads(threads)


def expected_efficiency(hidden_size: int) -> float:
    """Return the share of the matrix rate to expect at a hidden size, from ``EFFICIENCY``."""
    sizes = sorted(EFFICIENCY)
    if hidden_size <= sizes[0]:
        return EFFICIENCY[sizes[0]]
    for low, high in itertools.pairwise(sizes):
        if hidden_size <= high:
            part = (hidden_size - low) / (high - low)
            return EFFICIENCY[low] + part * (EFFICIENCY[high] - EFFICIENCY[low])
    return EFFICIENCY[sizes[-1]]


def _rate(x_MI: torch.Tensor, w_OI: torch.Tensor, seconds: float) -> float:
    """Time products of one shape until the seconds are over."""
    import torch

    def once() -> None:
        torch.nn.functional.linear(x_MI, w_OI)
        if x_MI.device.type == "cuda":
            torch.cuda.synchronize()
        elif x_MI.device.type == "mps":
            torch.mps.synchronize()

    for _ in range(3):
        once()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    # The median: other processes make some of the products slow.
    flops = 2 * x_MI.shape[0] * x_MI.shape[1] * w_OI.shape[0]
    return flops / sorted(times)[len(times) // 2]
