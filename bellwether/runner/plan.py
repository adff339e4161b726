"""The plan: what a run will need, said before any weights are loaded.

    bellwether plan recipe.yaml

Parameters, tokens and bytes are counted exactly; memory and time are estimated, see ``bellwether.runner.estimate``.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bellwether.recipe.recipe import Recipe
from bellwether.runner.estimate import memory_bytes
from bellwether.runner.work import (
    adapter_size,
    evaluation_seconds,
    evaluations,
    speed,
    train_seconds,
    work_flops,
    work_of,
)
from bellwether.tools.words import byte_size, clean, counted, duration

if TYPE_CHECKING:
    from rich.table import Table

    from bellwether.model.facts import ModelFacts


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


def plan(recipe: Recipe) -> Plan:
    """Return what a run of a recipe will need; reads data and model configuration, no weights.

    Raises:
        RecipeError: fields of the recipe contradict each other or the data.
        DataError: rows cannot be read, dealt out or tokenised.
        ModelError: the base model's folder cannot be used, or the adapter does not fit it.
    """
    from bellwether.method.cohort import clients_together, cohort_size
    from bellwether.runner.precision import with_precision
    from bellwether.runner.prepare import prepare
    from bellwether.runner.processors import with_processes

    found: list[str] = []
    recipe = with_precision(recipe, None, found.append)
    prepared = with_processes(prepare(recipe), found.append)
    recipe = prepared.recipe
    facts, rounds = prepared.base.facts, recipe.federation.rounds
    cohort = cohort_size(recipe.federation, len(prepared.clients))
    rows = [tokenised.rows for tokenised in prepared.clients.values()]
    adapter, work, measured = adapter_size(facts, recipe), work_of(rows, cohort, recipe), speed(facts, recipe)
    flops = work_flops(facts, recipe, work)
    down, up = traffic(facts, recipe, list(prepared.clients), cohort)
    longest = max(row.longest for client in rows for row in client)
    counts = {client: len(tokenised.rows) for client, tokenised in prepared.clients.items()}
    hidden, doubted = _hidden(recipe, counts, adapter.parameters)
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
        evaluations=evaluations(recipe),
        bytes_down=down,
        bytes_up=up,
        memory=memory_bytes(
            facts, recipe, adapter.parameters, adapter.modules, longest, clients_together(recipe.engine, cohort)
        ),
        flops_per_round=flops,
        matrix_rate=measured.rate,
        efficiency=measured.efficiency,
        train_seconds=rounds * train_seconds(flops, measured),
        evaluate_seconds=evaluations(recipe) * evaluation_seconds(facts, recipe, prepared.scored.rows, measured),
        device=measured.device,
        warnings=[*prepared.warnings, *doubted],
        notes=[
            *(*found, *prepared.notes, *_selected(recipe), *_secured(recipe)),
            *(
                *hidden,
                *_last_round(recipe, len(prepared.clients)),
                *_folded(facts, recipe, adapter.modules),
                *_unreached(facts),
                *doubts(measured.device),
            ),
        ],
    )


def plan_table(plan: Plan) -> Table:
    """Return a plan as a table for the terminal."""
    return needs_table("What this run will need", _lines(plan))


def needs_table(title: str, lines: Sequence[tuple[str, str]]) -> Table:
    """Return names and values under a title, as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in lines:
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


def traffic(facts: ModelFacts, recipe: Recipe, clients: Sequence[str], cohort: int) -> tuple[int, int]:
    """Return the bytes of a round, down and up, of a cohort of clients of average rank, as the method sends them.

    Where the last round is another one, it is the mean over all rounds.
    """
    from bellwether.exchange.compress import DOWN, compress_payload
    from bellwether.exchange.secure_checks import agreement_bytes, masked_bytes
    from bellwether.exchange.sizes import due_bytes, payload_bytes
    from bellwether.method.cohort import client_ranks
    from bellwether.method.method import Known
    from bellwether.method.named import make_method
    from bellwether.method.returned import first_state
    from bellwether.model.lora import initial_adapter
    from bellwether.tools.randomness import Randomness

    method, randomness = make_method(recipe.method, recipe.privacy), Randomness(recipe.seed)
    state = first_state(method, initial_adapter(facts, recipe.lora, randomness.torch("initial adapter")))
    ranks = collections.Counter(client_ranks(recipe.lora, clients, randomness).values())
    rounds = recipe.federation.rounds
    kinds = [(method, cohort, rounds)]
    if method.last is not None:
        kinds = [(method, cohort, rounds - 1), (method.last, len(clients), 1)]
    down = up = 0.0
    for (one, asked, times), (rank, count) in itertools.product(kinds, ranks.items()):
        payload, share = one.give(state, Known("", rank), 1), asked * count / len(clients) * times / rounds
        received = compress_payload(payload, recipe.compression.down, randomness.numpy(DOWN))
        down += share * payload_bytes(received)
        due = one.returns(payload)
        masked = recipe.secure_aggregation.enabled
        up += share * (
            masked_bytes(payload.expected, due) if masked else due_bytes(payload.expected, due, recipe.compression)
        )
    for _, asked, times in kinds if recipe.secure_aggregation.enabled else ():
        more = agreement_bytes(asked, sum(len(client.encode()) for client in clients) / len(clients))
        down, up = down + more[0] * times / rounds, up + more[1] * times / rounds
    return round(down), round(up)


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


def _secured(recipe: Recipe) -> list[str]:
    """Return what a person should know of bytes where updates are masked."""
    if not recipe.secure_aggregation.enabled:
        return []
    return [
        "Updates are masked (secure_aggregation.enabled): a value takes 8 bytes up in place of 4, and keys and shares "
        "travel between the clients of a cohort, which is counted; drawing masks takes time, which is not."
    ]


def _last_round(recipe: Recipe, clients: int) -> list[str]:
    """Return what a person should know where the last round is another one."""
    from bellwether.method.named import make_method

    if make_method(recipe.method, recipe.privacy).last is None:
        return []
    return [
        f"In round {recipe.federation.rounds}, the last one, {counted(clients, 'client')} train for themselves and "
        "send nothing back; rows, tokens and bytes of a round are means that count it."
    ]


def _hidden(recipe: Recipe, rows: Mapping[str, int], parameters: int) -> tuple[list[str], list[str]]:
    """Return what a person should know where clients or rows are hidden by noise."""
    from bellwether.runner.guarantee import guarantee, promise_notes

    return promise_notes(recipe, guarantee(recipe, rows), parameters)


def _folded(facts: ModelFacts, recipe: Recipe, modules: Sequence[str]) -> list[str]:
    """Return what a person should know of bytes where a method folds updates into the base."""
    from bellwether.method.named import make_method

    if not make_method(recipe.method, recipe.privacy).folds:
        return []
    shapes = [shape for shape in facts.linears if shape.path in set(modules)]
    rank = max(min(shape.inputs, shape.outputs) for shape in shapes)
    most = byte_size(4 * rank * sum(shape.inputs + shape.outputs for shape in shapes))
    return [
        f"The method {recipe.method.name} folds updates into the base: their sum goes down to each client as well, is "
        f"not counted here, and grows with the rounds, to at most {most}."
    ]


def _unreached(facts: ModelFacts) -> list[str]:
    """Return what a person should know of weights that no adapter reaches."""
    if not facts.stacked:
        return []
    share = 100 * facts.stacked / facts.parameters
    return [f"{share:.0f} % of the base's weights stand in stacked arrays, such as experts, and stay as they are."]


def doubts(device: str) -> list[str]:
    """Return what a person should know of the time estimate on this device."""
    if device == "cpu":
        return []
    return [f"The estimate's efficiency was calibrated on a CPU; on {device} take it as a rough guess."]
