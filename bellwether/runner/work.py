"""What training and scoring come to, counted from token rows, and in seconds on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bellwether.data.rows import TokenRow
from bellwether.exchange.records import Expected
from bellwether.recipe.recipe import Recipe
from bellwether.runner.estimate import expected_efficiency, matrix_rate, train_flops
from bellwether.runner.prepare import Prepared

if TYPE_CHECKING:
    from bellwether.model.facts import ModelFacts

# Seconds that one layer takes for one new token of a batch besides its arithmetic, as rough, on the same machine.
DECODE_SECONDS = 1.5e-3


@dataclass(frozen=True)
class Work:
    """What a cohort does in a round, on average over cohorts.

    Args:
        rows: rows trained on, repetitions counted.
        tokens: their tokens, prompts included.
        trained: those of them that count in the loss.
        square: the sum of the squared lengths of the rows.
        steps: optimizer steps of all clients.
    """

    rows: float
    tokens: float
    trained: float
    square: float
    steps: float


@dataclass(frozen=True)
class AdapterSize:
    """The adapter's modules, and its number of weights."""

    modules: Sequence[str]
    parameters: int


@dataclass(frozen=True)
class Speed:
    """How fast this machine is expected to train a model.

    Args:
        device: where.
        rate: floating-point operations per second, measured now.
        efficiency: share of it that training is expected to reach.
        devices: on how many devices clients are trained.
    """

    device: str
    rate: float
    efficiency: float
    devices: int


def work_of(clients: Sequence[Sequence[TokenRow]], cohort: int, recipe: Recipe) -> Work:
    """Return the mean work of a round, every client being as likely in the cohort as any other.

    Args:
        clients: rows of each client.
        cohort: clients of a round.
        recipe: local epochs or steps, batches, and the method, by which clients may go through several passes.
    """
    training, visits = recipe.training, _visits(recipe, cohort, len(clients))
    total = [0.0] * 5
    for rows in clients:
        batches = -(-len(rows) // training.batch_size)
        in_pass = -(-batches // training.accumulation)
        steps = training.local_steps or training.local_epochs * in_pass
        passes = steps / in_pass
        lengths = [len(answer) for row in rows for answer in row.answers]
        trained = sum(row.trained_tokens for row in rows)
        once = (len(rows), sum(lengths), trained, sum(length**2 for length in lengths), in_pass)
        total = [before + passes * more for before, more in zip(total, once, strict=True)]
    return Work(*(value * visits / len(clients) for value in total))


def _visits(recipe: Recipe, cohort: int, clients: int) -> float:
    """Return how often a client goes through its training in a round, added up over clients, on average over rounds."""
    from bellwether.method.named import make_method

    method, rounds = make_method(recipe.method, recipe.privacy), recipe.federation.rounds
    usual = cohort * len(method.passes)
    if method.last is None:
        return usual
    return ((rounds - 1) * usual + clients * len(method.last.passes)) / rounds


def adapter_size(facts: ModelFacts, recipe: Recipe) -> AdapterSize:
    """Return the size of the adapter that a recipe trains over a base."""
    from bellwether.model.lora import resolve_targets

    shapes = {shape.path: (shape.inputs, shape.outputs) for shape in facts.linears}
    modules = resolve_targets(facts, recipe.lora.target_modules, recipe.lora.rank)
    return AdapterSize(modules, sum(recipe.lora.rank * sum(shapes[path]) for path in modules))


def speed(facts: ModelFacts, recipe: Recipe, seconds: float = 0.3) -> Speed:
    """Return how fast this machine is expected to train.

    Args:
        facts: shapes of the base model.
        recipe: device, precision, threads and processes.
        seconds: how long to measure.
    """
    import torch

    from bellwether.model.loading import pick_device

    device = str(pick_device(recipe.model.device))
    rate = matrix_rate(facts, device, recipe, seconds)
    # Processes on one device, or on one CPU, share its rate.
    devices = min(recipe.engine.processes, torch.cuda.device_count()) if device.startswith("cuda") else 1
    return Speed(device, rate, expected_efficiency(facts.hidden_size), devices)


def train_seconds(flops: float, speed: Speed) -> float:
    """Return how long so many floating-point operations of training will take."""
    return flops / (speed.rate * speed.efficiency * speed.devices)


def work_flops(facts: ModelFacts, recipe: Recipe, work: Work) -> float:
    """Return the floating-point operations of a round's training, and of its reference where a loss has one."""
    flops = train_flops(facts, adapter_size(facts, recipe).parameters, work.tokens, work.square, work.trained)
    if recipe.training.loss != "dpo":
        return flops
    # Forwards alone, half of the frozen weights' share, and once for all epochs.
    epochs = recipe.training.local_epochs if recipe.training.local_steps is None else 1
    return flops + train_flops(facts, 0, work.tokens, work.square, work.trained) / (2 * epochs)


def evaluation_seconds(facts: ModelFacts, recipe: Recipe, rows: Sequence[TokenRow], speed: Speed) -> float:
    """Return the estimated seconds of one evaluation: a forward pass, and answers of full length.

    Args:
        facts: shapes of the base model.
        recipe: whether and how long to generate, and rows scored together.
        rows: what is scored.
        speed: of this machine.
    """
    rate = speed.rate * speed.efficiency
    frozen = sum(shape.inputs * shape.outputs for shape in facts.linears)
    output = facts.output_layer.inputs * facts.output_layer.outputs
    # Of two answers, both with the adapter and without.
    answers = [answer for row in rows for answer in row.answers * len(row.answers)]
    tokens, counted = sum(map(len, answers)), sum(int(answer.response_T.sum()) for answer in answers)
    forward = 2 * frozen * tokens + 2 * output * counted
    if not recipe.evaluation.generate or not rows:
        return forward / rate
    new = recipe.evaluation.max_new_tokens
    prompts = 2 * frozen * sum(row.prompt_length for row in rows)
    decoding = 2 * (frozen + output) * new * len(rows)
    batches = -(-len(rows) // recipe.evaluation.batch_size)
    return (forward + prompts + decoding) / rate + batches * new * facts.layers * DECODE_SECONDS


def evaluations(recipe: Recipe) -> int:
    """Return how often held-out rows are scored: before the first round, every n rounds, and after the last."""
    rounds, every = recipe.federation.rounds, recipe.evaluation.every
    return 2 + sum(1 for round in range(1, rounds) if every and round % every == 0)


def expected(prepared: Prepared, cohort: int) -> Expected:
    """Return how long the parts of a run are expected to take, from a short measurement.

    Args:
        prepared: the run.
        cohort: clients of a round.
    """
    facts, recipe = prepared.base.facts, prepared.recipe
    measured = speed(facts, recipe, seconds=0.1)
    work = work_of([one.rows for one in prepared.clients.values()], cohort, recipe)
    return Expected(
        train_seconds(work_flops(facts, recipe, work), measured),
        evaluation_seconds(facts, recipe, prepared.scored.rows, measured),
    )
