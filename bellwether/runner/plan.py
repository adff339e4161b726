"""The plan: what a run will need, said before any weights are loaded.

    bellwether plan recipe.yaml

Parameters, tokens and bytes are counted exactly; memory and time are estimated, see ``bellwether.runner.estimate``.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bellwether.data.rows import TokenRow
from bellwether.recipe.recipe import Recipe
from bellwether.runner.estimate import expected_efficiency, matrix_rate, memory_bytes, train_flops
from bellwether.tools.words import byte_size, clean, counted, duration

if TYPE_CHECKING:
    from rich.table import Table

    from bellwether.model.facts import ModelFacts

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
        warnings: those that a person should look at first.
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
    warnings: Sequence[str]


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
        warnings=prepared.warnings,
        notes=[*prepared.notes, *_selected(recipe), *_unreached(facts), *_doubts(timing.device)],
    )


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
        libraries = f"in {counted(plan.processes + 1, 'process', 'processes')} in all, each with {libraries}"
    return [
        ("base model", f"{plan.model} ({plan.architecture}, {counted(plan.base_parameters, 'parameter')}, frozen)"),
        ("adapter", f"{counted(plan.adapter_parameters, 'parameter')} ({share:.2%} of the base)"),
        ("rounds", f"{plan.rounds:,}, each with {plan.cohort} of {counted(plan.clients, 'client')}"),
        (
            "per round, on average",
            f"{counted(round(plan.rows_per_round), 'row')}, {counted(round(plan.tokens_per_round), 'token')}, "
            f"of which {plan.trained_per_round:,.0f} count in the loss",
        ),
        ("in total", f"{plan.rounds * plan.tokens_per_round:,.0f} tokens"),
        ("evaluations", f"{plan.evaluations} of {counted(plan.scored_rows, 'held-out row')}"),
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
        *(("warning", warning) for warning in plan.warnings),
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
    from bellwether.method.returned import first_state
    from bellwether.model.lora import initial_adapter
    from bellwether.tools.randomness import Randomness

    method, randomness = make_method(recipe.method), Randomness(recipe.seed)
    state = first_state(method, initial_adapter(facts, recipe.lora, randomness.torch("initial adapter")))
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
    from bellwether.method.named import make_method

    training, in_turn = recipe.training, len(make_method(recipe.method).passes)
    total = _Work(0.0, 0.0, 0.0, 0.0)
    for rows in clients:
        passes = float(training.local_epochs)
        if training.local_steps is not None:
            batches = -(-len(rows) // training.batch_size)
            passes = training.local_steps / -(-batches // training.accumulation)
        passes *= in_turn
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


def _unreached(facts: ModelFacts) -> list[str]:
    """Return what a person should know of weights that no adapter reaches."""
    if not facts.stacked:
        return []
    share = 100 * facts.stacked / facts.parameters
    return [f"{share:.0f} % of the base's weights stand in stacked arrays, such as experts, and stay as they are."]


def _doubts(device: str) -> list[str]:
    """Return what a person should know of the time estimate on this device."""
    if device == "cpu":
        return []
    return [f"The estimate's efficiency was calibrated on a CPU; on {device} take it as a rough guess."]
