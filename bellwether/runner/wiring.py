"""From what is prepared to a federation: engine, method, scoring and commits as values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bellwether.client.score import by_category, by_group
from bellwether.engine.processes import ProcessEngine, Work, local_engine, worker_models
from bellwether.engine.resources import UnevenClients
from bellwether.errors import CheckpointError, ModelError, first_line
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_b, stacked
from bellwether.exchange.records import EvaluationRecord, Note, Record, RoundRecord, Watcher
from bellwether.exchange.scores import Totals
from bellwether.federate import Engine, Federation, Progress
from bellwether.method.cohort import (
    Sampler,
    client_ranks,
    clients_together,
    cohort_size,
    everyone_last,
    make_sampler,
)
from bellwether.method.method import Closing, Method, State
from bellwether.method.private import known_noise
from bellwether.method.returned import first_state
from bellwether.model import decoder
from bellwether.model.base import Base, weights_fingerprint
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.recipe.recipe import Recipe
from bellwether.runner.answers import Answers
from bellwether.runner.checks import survey_width
from bellwether.runner.opened import Opened
from bellwether.runner.prepare import Prepared, prepare
from bellwether.runner.scoring import score_held_out
from bellwether.store.checkpoint import read_checkpoint
from bellwether.store.run_folder import (
    CHECKPOINTS,
    Checkpoint,
    RunFolder,
    client_folders,
)
from bellwether.tools.json_text import reading
from bellwether.tools.progress import advance
from bellwether.tools.randomness import Randomness


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run's engine is made for.

    Args:
        prepared: the recipe, its rows and clients.
        base: the frozen base model.
        layers: LoRA layers over it.
        method: what clients do.
        folder: the run folder.
        watch: is told what happens.
    """

    prepared: Prepared
    base: Base
    layers: LoraLayers
    method: Method
    folder: Path
    watch: Watcher


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Where a run's clients are.

    Args:
        prepare: reads and checks what this process needs of data and model.
        engine: makes what delivers tasks to the clients.
        here: whether the clients' rows and own folders are on this machine, for the report to show.
        sampling: makes of the recipe's sampler the one that draws the cohorts.
        secret: what the server's noise is drawn from, where the recipe asks for some.
    """

    prepare: Callable[[Recipe, Opened | None], Prepared]
    engine: Callable[[Setting], contextlib.AbstractContextManager[Engine]]
    here: bool = True
    sampling: Callable[[Sampler], Sampler] = lambda sampler: sampler
    secret: Callable[[Closing], bytes] = known_noise


@contextlib.contextmanager
def make_engine(setting: Setting) -> Iterator[Engine]:
    """Yield the engine of a simulation, its clients' own folders in the run's; check the copies of the base afterwards.

    Raises:
        ModelError: one was changed.
    """
    prepared, base, engine = setting.prepared, setting.base, setting.prepared.recipe.engine
    copies: list[str] = []
    work = work_of(setting, list(prepared.clients))
    if engine.processes == 1:
        yield local_engine(base, setting.layers, work, setting.method)
    else:
        models = worker_models(prepared.recipe.model, base.device, engine.processes)
        with ProcessEngine(models, work, base.fingerprint) as workers:
            yield workers
            copies = workers.fingerprints()
    check_copies(base, copies)


def work_of(setting: Setting, clients: Sequence[str]) -> Work:
    """Return all that a process needs to serve some of the clients: their rows, and nothing of the others'.

    Args:
        setting: what the engine is made for.
        clients: their names.
    """
    prepared = setting.prepared
    folders = client_folders(setting.folder, list(prepared.clients))
    return Work(
        setting.layers.config,
        slots_of(prepared),
        {client: prepared.clients[client].rows for client in clients},
        {client: prepared.held_out[client].rows for client in clients if client in prepared.held_out},
        prepared.recipe.method,
        prepared.stop,
        prepared.recipe.engine.tokens,
        {client: folders[client] for client in clients},
        prepared.public,
        privacy=prepared.recipe.privacy,
    )


def check_copies(base: Base, copies: Sequence[str]) -> None:
    """Check that a base and its copies are still what was loaded.

    Args:
        base: this process's.
        copies: fingerprints of others'.

    Raises:
        ModelError: one was changed.
    """
    advance("checking the base")
    if any(found != base.fingerprint for found in (weights_fingerprint(base.model), *copies)):
        raise ModelError(f"The frozen base model {base.name} was changed during the run; its results cannot be used.")


SIMULATION = Deployment(prepare, make_engine)


def way_notes(base: Base, loss: str) -> list[str]:
    """Return a note where the faster way through a model, which a CPU has, or through its last step, does not fit."""
    if base.device.type != "cpu":
        return []
    if decoder.fits(base.model):
        if ":" not in loss:
            return []
        return [f"training.loss {loss} takes whole logits: the faster step of output layer and loss steps aside."]
    return [
        f"{base.facts.architecture} runs over padded rows, as transformers has it; faster are Llama, Mistral, Qwen 2, "
        "Qwen 3, Gemma 2, Gemma 3 and Phi-3, with model.attention auto."
    ]


def slots_of(prepared: Prepared) -> int:
    """Return how many clients are trained together in a process."""
    cohort = cohort_size(prepared.recipe.federation, len(prepared.clients))
    return clients_together(prepared.recipe.engine, cohort)


def first_adapter(base: Base, recipe: Recipe) -> Adapter:
    """Return the adapter that a run of a recipe starts from."""
    return initial_adapter(base, recipe.lora, Randomness(recipe.seed).torch("initial adapter"))


def where_to_begin(
    folder: RunFolder, checkpoint: Checkpoint | None, base: Base, method: Method, watch: Watcher
) -> Progress:
    """Return where to begin: the newest whole checkpoint, or a fresh adapter."""
    if checkpoint is None:
        return Progress(0, first_state(method, first_adapter(base, folder.recipe)))
    for text in checkpoint.notes:
        watch(Note(text, warning=True))
    return Progress(
        checkpoint.round,
        _state_from(folder.path, checkpoint.adapter, checkpoint.state),
        tuple(record for record in checkpoint.history if isinstance(record, RoundRecord)),
        tuple(record for record in checkpoint.history if isinstance(record, EvaluationRecord)),
    )


def make_federation(
    folder: RunFolder,
    prepared: Prepared,
    base: Base,
    layers: LoraLayers,
    engine: Engine,
    method: Method,
    answers: Answers,
    watch: Watcher,
) -> Federation:
    """Return the simulated federation of a recipe."""
    recipe, clients = prepared.recipe, list(prepared.clients)
    sample = make_sampler(recipe.federation, prepared.trace)
    if method.last is not None:
        sample = everyone_last(sample, recipe.federation, prepared.trace)
    if prepared.trace is not None:
        rows = {client: tokenised.rows for client, tokenised in prepared.clients.items()}
        engine = UnevenClients(
            engine.ask, rows, prepared.trace, lambda task: len(method.of_round(task.round, task.rounds).passes)
        )

    def commit(progress: Progress) -> None:
        folder.commit(progress.round, progress.adapter, _kept_of(progress.state), all_records(progress))

    def score_own(round: int, state: State) -> tuple[Mapping[str, Totals], Mapping[str, Totals]]:
        if not prepared.scored.rows:
            return {}, {}
        scored = score_held_out(prepared, base, layers, state.adapter, state.folded)
        answers.keep(round, scored)
        return by_category(prepared.scored.rows, scored), by_group(prepared.scored.rows, scored)

    return Federation(
        recipe=recipe,
        engine=engine,
        ranks=client_ranks(recipe.lora, clients, Randomness(recipe.seed)),
        evaluating=list(prepared.held_out),
        sample=sample,
        method=method,
        score=score_own,
        commit=commit,
        watch=watch,
        width=survey_width(recipe.selection, prepared.base.facts),
    )


def _kept_of(state: State) -> dict[str, Any]:
    """Return what a checkpoint keeps of a state beside its adapter."""
    folded = state.folded
    kept = None if folded is None else {"config": dataclasses.asdict(folded.config), "tensors": folded.tensors}
    return {"arrays": state.arrays, "folded": kept}


def _state_from(path: Path, adapter: Adapter, kept: Mapping[str, Any]) -> State:
    """Return the state behind ``_kept_of``."""
    try:
        arrays, folded = kept["arrays"], kept["folded"]
        if not isinstance(arrays, Mapping):
            raise TypeError(f"arrays is a {type(arrays).__name__}")
        update = Adapter(AdapterConfig(**folded["config"]), dict(folded["tensors"])) if folded is not None else None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The state in the newest checkpoint of {path} is not as it was written ({first_line(error)}); remove that "
            "checkpoint to go on from the one before."
        ) from error
    return State(adapter, arrays, update)


def result_of(state: State) -> Adapter:
    """Return the adapter that a run gives: the last one, with what was folded into the base before it."""
    if state.folded is None:
        return state.adapter
    parts = [state.folded, state.adapter]
    if not any(state.adapter.tensors[key_b(module)].any() for module in state.adapter.config.modules):
        parts.pop()  # an adapter that was begun anew adds nothing
    return stacked(parts)


def newest_result(path: Path) -> tuple[Adapter, Sequence[Record]]:
    """Return the adapter that a run has come to, and its records so far.

    Args:
        path: the run folder, in which a round was committed.

    Raises:
        CheckpointError: its newest checkpoint cannot be read.
    """
    _, state, history = newest_state(path)
    return result_of(state), history


def newest_state(path: Path) -> tuple[int, State, Sequence[Record]]:
    """Return the last round that a run has committed, the server's state after it, and the records so far.

    Args:
        path: the run folder.

    Raises:
        CheckpointError: there is none, or its newest checkpoint cannot be read.
    """
    newest = max((path / CHECKPOINTS).glob("[0-9]*"), key=lambda one: int(one.name), default=None)
    if newest is None:
        raise CheckpointError(f"{path / CHECKPOINTS} holds no checkpoint; restore one, or run anew.")
    with reading(newest, "restore it, or remove it to go on from the one before"):
        checkpoint = read_checkpoint(newest)
    return checkpoint.round, _state_from(path, checkpoint.adapter, checkpoint.state), checkpoint.history


def all_records(progress: Progress) -> list[RoundRecord | EvaluationRecord]:
    """Return all records of a run in the order of rounds, evaluations after their round."""
    records: list[RoundRecord | EvaluationRecord] = [*progress.rounds, *progress.evaluations]
    return sorted(records, key=lambda record: record.round)
