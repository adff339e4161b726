"""The plan: what a run will need, said before any weights are loaded.

    bellwether plan recipe.yaml

Parameters, tokens and bytes are counted exactly; memory follows the formula in ``memory_bytes``. Time is
the arithmetic that must be done (see ``train_flops``) over the matrix rate of this machine, measured in
a fraction of a second, times a rough efficiency; see ``EFFICIENCY`` for where that comes from.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bellwether.data.rows import TokenRow
from bellwether.recipe.recipe import Recipe
from bellwether.tools.words import byte_size, clean, duration

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from bellwether.model.facts import ModelFacts

# Share of the measured matrix rate that local training reached, by the model's hidden size; between
# these it is interpolated, beyond them the nearest holds. The factors are rough: they were calibrated on one
# busy machine with two cores (one thread, Llama models of 4 to 8 layers, batch size 8, rows of about 40 tokens,
# LoRA of rank 8 with dropout on all linear modules, float32), and validated on no other, on no GPU and
# with no more threads. What is missing goes into dropout masks, norms, softmax, padding and, at small
# sizes, Python between the operations.
EFFICIENCY: Mapping[int, float] = {64: 0.06, 128: 0.16, 256: 0.24, 512: 0.4}
# Seconds that one layer takes for one new token of a batch besides its arithmetic, as rough, on the same machine.
DECODE_SECONDS = 1.5e-3


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Args:
        model: name of the base model.
        architecture: class of the base model.
        base_parameters: weights of the base, which stay frozen.
        adapter_parameters: trained weights.
        clients: number of clients.
        cohort: clients per round.
        rounds: number of rounds.
        processes: how many processes a cohort is split among.
        rows_per_round: rows a cohort trains on in a round, over local epochs; the mean over cohorts.
        tokens_per_round: tokens of those rows, prompts included.
        trained_per_round: those of them that count in the loss.
        scored_rows: held-out rows that are scored in each evaluation.
        evaluations: how often they are scored.
        bytes_down: bytes from the server to a round's cohort.
        bytes_up: bytes from a round's cohort to the server.
        memory: peak bytes by part, of all processes together; beside them Python and its libraries take about 0.7 GB
            in each.
        flops_per_round: floating-point operations of a round's training.
        matrix_rate: floating-point operations per second, measured here.
        efficiency: share of that rate that training is expected to reach.
        train_seconds: estimate for all rounds.
        evaluate_seconds: estimate for all evaluations.
        device: where the rate was measured.
        notes: sentences about data and estimate.
    """

    model: str
    architecture: str
    base_parameters: int
    adapter_parameters: int
    clients: int
    cohort: int
    rounds: int
    processes: int
    rows_per_round: float
    tokens_per_round: float
    trained_per_round: float
    scored_rows: int
    evaluations: int
    bytes_down: int
    bytes_up: int
    memory: Mapping[str, int]
    flops_per_round: float
    matrix_rate: float
    efficiency: float
    train_seconds: float
    evaluate_seconds: float
    device: str
    notes: Sequence[str]


@dataclass(frozen=True)
class _Work:
    """What a cohort does in a round, on average over cohorts."""

    rows: float
    tokens: float
    trained: float
    square: float


@dataclass(frozen=True)
class _Adapter:
    """The adapter's modules, and its number of weights."""

    modules: Sequence[str]
    parameters: int


@dataclass(frozen=True)
class _Time:
    """What the estimate of time rests on; names as in ``Plan``, and on how many devices clients are trained."""

    device: str
    flops: float
    rate: float
    efficiency: float
    devices: int
    evaluate_seconds: float


def plan(recipe: Recipe) -> Plan:
    """Return what a run of a recipe will need; reads data and model configuration, no weights.

    Raises:
        RecipeError: fields of the recipe contradict each other or the data.
        DataError: rows cannot be read, dealt out or tokenised.
        ModelError: the base model's folder cannot be used, or the adapter does not fit it.
    """
    from bellwether.method.cohort import clients_together, cohort_size
    from bellwether.runner.prepare import prepare

    prepared = prepare(recipe)
    facts, rounds = prepared.base.facts, recipe.federation.rounds
    cohort = cohort_size(recipe.federation, len(prepared.clients))
    rows = [tokenised.rows for tokenised in prepared.clients.values()]
    adapter = _adapter(facts, recipe)
    work = _work(rows, cohort, recipe)
    timing = _time(facts, recipe, work, adapter.parameters, prepared.scored.rows)
    down, up = _traffic(facts, recipe, list(prepared.clients), cohort)
    longest = max(len(row) for client in rows for row in client)
    return Plan(
        model=facts.name,
        architecture=facts.architecture,
        base_parameters=facts.parameters,
        adapter_parameters=adapter.parameters,
        clients=len(prepared.clients),
        cohort=cohort,
        rounds=rounds,
        processes=recipe.engine.processes,
        rows_per_round=work.rows,
        tokens_per_round=work.tokens,
        trained_per_round=work.trained,
        scored_rows=len(prepared.scored.rows),
        evaluations=_evaluations(recipe),
        bytes_down=down,
        bytes_up=up,
        memory=memory_bytes(
            facts, recipe, adapter.parameters, adapter.modules, longest, clients_together(recipe.engine, cohort)
        ),
        flops_per_round=timing.flops,
        matrix_rate=timing.rate,
        efficiency=timing.efficiency,
        train_seconds=rounds * timing.flops / (timing.rate * timing.efficiency * timing.devices),
        evaluate_seconds=timing.evaluate_seconds,
        device=timing.device,
        notes=[*prepared.notes, *prepared.warnings, *_selected(recipe), *_doubts(timing.device)],
    )


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
    value, its gradient and AdamW's two moments, in float32. For the largest batch (``batch_size`` rows of the longest
    length) each token keeps, for the backward pass, the inputs and outputs of all linear modules, and
    the float32 inputs of the adapted ones, twice with dropout (the mask too), ten times the hidden size
    a layer for norms, rotation and attention (with gradient checkpointing one layer's part of all this at a time, and
    each layer's input); and each position of the loss three float32 rows of the vocabulary (every position is taken to
    be one). Measured growth of the process in training over padded rows was 0.98 to 1.22 times this at hidden sizes of
    64 to 512; it was not measured for rows end to end, nor with gradient checkpointing. Each of several processes takes
    all this, and the one that evaluates a base as well.

    Args:
        facts: shapes of the base model.
        recipe: precision, dropout and batch size.
        adapter: weights of the adapter.
        modules: paths of the adapted modules.
        longest: tokens of the longest row.
        together: clients trained together in a process, each with an adapter, whose rows share ``engine.tokens``.
    """
    from bellwether.model.quantized import weight_bytes

    width = 2 if recipe.model.dtype == "bfloat16" else 4
    adapted = set(modules)
    per_token = sum(width * (shape.inputs + shape.outputs) for shape in facts.linears)
    copies = 2 if recipe.lora.dropout else 1
    per_token += sum(4 * copies * shape.inputs for shape in facts.linears if shape.path in adapted)
    per_token += facts.layers * 10 * facts.hidden_size * width
    if recipe.training.gradient_checkpointing:
        per_token = per_token // facts.layers + facts.layers * facts.hidden_size * width
    tokens = recipe.training.batch_size * longest
    if together > 1:
        tokens = max(longest, min(recipe.engine.tokens, together * recipe.training.accumulation * tokens))
    processes = recipe.engine.processes
    bases = processes if processes == 1 else processes + 1
    return {
        "base weights": bases * weight_bytes(facts, width, recipe.model.quantization),
        "adapter and optimizer": processes * 16 * adapter * together,
        "activations": processes * tokens * per_token,
        "logits": processes * tokens * facts.vocabulary * 4 * 3,
    }


def matrix_rate(facts: ModelFacts, device: str, recipe: Recipe, seconds: float = 0.3) -> float:
    """Return the floating-point operations per second of matrix products of the model's size, measured here.

    Args:
        facts: the mean linear module of the base gives the size.
        device: where to measure.
        recipe: precision and number of threads.
        seconds: how long to measure.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.model.threads or threads)
    try:
        typical = sorted(facts.linears, key=lambda shape: shape.inputs * shape.outputs)[len(facts.linears) // 2]
        dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
        x_MI = torch.ones(1024, typical.inputs, dtype=dtype, device=device)
        w_OI = torch.ones(typical.outputs, typical.inputs, dtype=dtype, device=device)
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


def plan_table(plan: Plan) -> Table:
    """Return a plan as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What this run will need", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in _lines(plan):
        table.add_row(name, Text(clean(value)))
    return table


def _lines(plan: Plan) -> list[tuple[str, str]]:
    total, share = sum(plan.memory.values()), plan.adapter_parameters / plan.base_parameters
    parts = ", ".join(f"{name} {byte_size(size)}" for name, size in plan.memory.items())
    libraries = "Python and its libraries about 0.7 GB"
    if plan.processes > 1:
        libraries = f"in {plan.processes + 1} processes in all, each with {libraries}"
    return [
        ("base model", f"{plan.model} ({plan.architecture}, {plan.base_parameters:,} parameters, frozen)"),
        ("adapter", f"{plan.adapter_parameters:,} parameters ({share:.2%} of the base)"),
        ("rounds", f"{plan.rounds}, each with {plan.cohort} of {plan.clients} clients"),
        (
            "per round, on average",
            f"{plan.rows_per_round:,.0f} rows, {plan.tokens_per_round:,.0f} tokens, "
            f"of which {plan.trained_per_round:,.0f} count in the loss",
        ),
        ("in total", f"{plan.rounds * plan.tokens_per_round:,.0f} tokens"),
        ("evaluations", f"{plan.evaluations} of {plan.scored_rows:,} held-out rows"),
        (
            "sent per round",
            f"{byte_size(plan.bytes_down)} down and {byte_size(plan.bytes_up)} up; "
            f"{byte_size(plan.rounds * (plan.bytes_down + plan.bytes_up))} in total",
        ),
        ("memory", f"{byte_size(total)}: {parts}; {libraries} more"),
        (
            "time, an estimate",
            f"{duration(plan.train_seconds)} training, {duration(plan.evaluate_seconds)} evaluation on {plan.device}",
        ),
        (
            "which rests on",
            f"{plan.flops_per_round / 1e9:,.1f} GFLOP per round at {plan.efficiency:.0%} of the matrix rate measured "
            f"just now, {plan.matrix_rate / 1e9:,.0f} GFLOP/s: a rough estimate, calibrated on one machine only",
        ),
        *(("note", note) for note in plan.notes),
    ]


def _adapter(facts: ModelFacts, recipe: Recipe) -> _Adapter:
    from bellwether.model.lora import resolve_targets

    shapes = {shape.path: (shape.inputs, shape.outputs) for shape in facts.linears}
    modules = resolve_targets(facts, recipe.lora.target_modules, recipe.lora.rank)
    parameters = sum(recipe.lora.rank * sum(shapes[path]) for path in modules)
    return _Adapter(modules, parameters)


def _traffic(facts: ModelFacts, recipe: Recipe, clients: Sequence[str], cohort: int) -> tuple[int, int]:
    """Return the bytes of a round, down and up, of a cohort of clients of average rank, as the method sends them."""
    import numpy as np

    from bellwether.exchange.checks import array_bytes, payload_bytes
    from bellwether.method.cohort import client_ranks
    from bellwether.method.method import Known
    from bellwether.method.named import make_method
    from bellwether.model.lora import initial_adapter
    from bellwether.tools.randomness import Randomness

    method, randomness = make_method(recipe.method), Randomness(recipe.seed)
    state = method.begin(initial_adapter(facts, recipe.lora, randomness.torch("initial adapter")))
    ranks = collections.Counter(client_ranks(recipe.lora, clients, randomness).values())
    down = up = 0.0
    for rank, count in ranks.items():
        payload = method.give(state, Known("", rank), 1)
        arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in method.returns(payload).items()}
        down += count * payload_bytes(payload)
        up += count * array_bytes({**payload.expected, **arrays})
    return round(cohort * down / len(clients)), round(cohort * up / len(clients))


def _time(facts: ModelFacts, recipe: Recipe, work: _Work, adapter: int, scored: Sequence[TokenRow]) -> _Time:
    """Return the arithmetic of a round and how fast this machine is expected to do it."""
    import torch

    from bellwether.model.loading import pick_device

    device = str(pick_device(recipe.model.device))
    flops = train_flops(facts, adapter, work.tokens, work.square, work.trained)
    rate, efficiency = matrix_rate(facts, device, recipe), expected_efficiency(facts.hidden_size)
    evaluation = _evaluation_seconds(facts, recipe, scored, rate * efficiency)
    # Processes on one device, or on one CPU, share its rate.
    devices = min(recipe.engine.processes, torch.cuda.device_count()) if device.startswith("cuda") else 1
    return _Time(device, flops, rate, efficiency, devices, _evaluations(recipe) * evaluation)


def _work(clients: Sequence[Sequence[TokenRow]], cohort: int, recipe: Recipe) -> _Work:
    """Return the mean work of a round, every client being as likely in the cohort as any other."""
    training = recipe.training
    total = _Work(0.0, 0.0, 0.0, 0.0)
    for rows in clients:
        passes = float(training.local_epochs)
        if training.local_steps is not None:
            batches = -(-len(rows) // training.batch_size)
            passes = training.local_steps / -(-batches // training.accumulation)
        total = _Work(
            total.rows + passes * len(rows),
            total.tokens + passes * sum(len(row) for row in rows),
            total.trained + passes * sum(int(row.trained_T[1:].sum()) for row in rows),
            total.square + passes * sum(len(row) ** 2 for row in rows),
        )
    share = cohort / len(clients)
    return _Work(total.rows * share, total.tokens * share, total.trained * share, total.square * share)


def _evaluations(recipe: Recipe) -> int:
    """Return how often held-out rows are scored: before the first round, every n rounds, and after the last."""
    rounds, every = recipe.federation.rounds, recipe.evaluation.every
    between = sum(1 for round in range(1, rounds) if every and round % every == 0)
    return 2 + between


def _evaluation_seconds(facts: ModelFacts, recipe: Recipe, rows: Sequence[TokenRow], rate: float) -> float:
    """Return the estimated seconds of one evaluation: a forward pass, and answers of full length."""
    frozen = sum(shape.inputs * shape.outputs for shape in facts.linears)
    output = facts.output_layer.inputs * facts.output_layer.outputs
    forward = 2 * frozen * sum(len(row) for row in rows) + 2 * output * sum(int(row.response_T.sum()) for row in rows)
    if not recipe.evaluation.generate or not rows:
        return forward / rate
    new = recipe.evaluation.max_new_tokens
    prompts = 2 * frozen * sum(row.prompt_length for row in rows)
    decoding = 2 * (frozen + output) * new * len(rows)
    batches = -(-len(rows) // recipe.evaluation.batch_size)
    return (forward + prompts + decoding) / rate + batches * new * facts.layers * DECODE_SECONDS


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


def _selected(recipe: Recipe) -> list[str]:
    """Return what a person should know of rows, bytes and time where clients train on some of their rows."""
    selection = recipe.selection
    if selection.method == "full":
        return []
    text = (
        f"Rows are selected (selection.method {selection.method}), but rows, tokens and training time are given as if"
    )
    notes = [f"{text} clients trained on all of theirs, so they are upper bounds; choosing the rows comes on top."]
    if selection.surveys:
        again = ", and the adapter once more down" if selection.features == "model" else ""
        notes.append(f"A survey comes before each round: clients also send centroids, 4 bytes a dimension{again}.")
    return notes


def _doubts(device: str) -> list[str]:
    """Return what a person should know of the time estimate on this device."""
    if device == "cpu":
        return []
    return [f"The estimate's efficiency was calibrated on a CPU; on {device} take it as a rough guess."]
