"""A run: a recipe becomes data, clients, an engine and methods; rounds are run; results are written.

This is also the Python interface:

    from bellwether import load_recipe, run
    result = run(load_recipe("default", ["seed=1"]))
    print(result.before.rouge_l, result.after.rouge_l, result.folder)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bellwether.client.score import Scored, by_category, by_group, score
from bellwether.engine.calibrate import fastest_tokens
from bellwether.engine.local import LocalEngine
from bellwether.engine.processes import ProcessEngine, Work, threads_each, worker_models
from bellwether.engine.resources import UnevenClients
from bellwether.errors import CheckpointError, ModelError
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.messages import TrainTask
from bellwether.exchange.records import Evaluated, EvaluationRecord, Note, RoundRecord, RunFinished, RunStarted, Watcher
from bellwether.exchange.scores import Scores, Totals, macro
from bellwether.federate import Engine, Federation, Progress, federate
from bellwether.method.average import make_aggregate
from bellwether.method.cohort import clients_together, cohort_size, make_sampler
from bellwether.model.base import Base, fingerprint, load_base
from bellwether.model.forward import runs_end_to_end
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.runner.describe import describe
from bellwether.runner.prepare import Prepared, prepare, proxy_facts, trace_of, with_absolute_paths
from bellwether.runner.prepare import fingerprint as data_fingerprint
from bellwether.store.chosen import keep_categories
from bellwether.store.history import ScoredRow, dump_rows, load_rows
from bellwether.store.holdings import dump_description
from bellwether.store.model_card import model_card
from bellwether.store.run_folder import (
    CLIENTS,
    LOG,
    RunFolder,
    check_new,
    client_folders,
    describe_environment,
    next_folder,
    write_atomic,
)
from bellwether.tell.narrate import tell_all, write_log
from bellwether.tell.trackers import open_trackers
from bellwether.tools.randomness import Randomness


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        folder: the run folder.
        adapter: the final adapter.
        rounds: one record per round.
        evaluations: one record per evaluation and part.
    """

    folder: Path
    adapter: Adapter
    rounds: Sequence[RoundRecord]
    evaluations: Sequence[EvaluationRecord]

    @property
    def before(self) -> Scores:
        """Macro scores of the untuned base; without rows to score, its fields are None."""
        return macro(self._scored()[0])

    @property
    def after(self) -> Scores:
        """Macro scores of the final adapter; without rows to score, its fields are None."""
        return macro(self._scored()[-1])

    def _scored(self) -> list[Mapping[str, Totals]]:
        """Return the totals of evaluations on the coordinator's own rows, or else of those at the clients."""
        own = [record for record in self.evaluations if record.part != "clients"]
        return [record.categories for record in own or self.evaluations] or [{}]


def run(
    recipe: Recipe | None = None,
    *,
    resume: Path | None = None,
    watch: Watcher | None = None,
) -> Result:
    """Run a recipe, or go on with a run.

    Args:
        recipe: what to run, None runs the shipped ``default``; with ``resume``, it must equal the folder's
            own, or be None.
        resume: a run folder to go on with.
        watch: is told what happens; None is silent.

    Returns:
        The result, which is also in the run folder.

    Raises:
        BellwetherError: see ``bellwether.errors``; the message is fit to be shown to a person.
    """
    watch = watch or (lambda event: None)
    return (
        _resume(Path(resume), recipe, watch) if resume is not None else _begin(recipe or load_recipe("default"), watch)
    )


def _begin(recipe: Recipe, watch: Watcher) -> Result:
    """Run a recipe from its start; the folder is made once everything that can be checked is checked."""
    path = Path(recipe.output.folder) if recipe.output.folder else next_folder(recipe.name)
    check_new(path)
    recipe = with_absolute_paths(recipe)
    prepared = prepare(recipe)
    base = load_base(recipe.model)
    prepared = _with_tokens(prepared, base)
    if recipe.output.folder is None:
        path = next_folder(recipe.name)  # another run may have begun in the meantime
    with RunFolder.create(path, prepared.recipe, _environment(prepared, base)) as folder:
        try:
            with write_log(folder.path / LOG) as log:
                return _run_in(folder, prepared, base, watch, log)
        except BaseException:
            folder.discard()
            raise


def _resume(path: Path, recipe: Recipe | None, watch: Watcher) -> Result:
    """Go on with the run in a folder, under the conditions under which it began."""
    with (
        RunFolder.reopen(path, with_absolute_paths(recipe) if recipe else None) as folder,
        write_log(folder.path / LOG) as log,
    ):
        then = folder.environment
        prepared = prepare(folder.recipe)
        _check_unchanged(path, then, {"data": data_fingerprint(prepared)})
        # The number of threads decides the order of sums, and with it the last bits.
        base = load_base(folder.recipe.model.model_copy(update={"threads": int(then.get("threads", 0))}))
        now = _environment(prepared, base)
        facts = ("base", "device", "dtype", "proxy")
        _check_unchanged(path, then, {fact: now[fact] for fact in facts if fact in now})
        if then.get("versions") != now["versions"]:
            changed = "Packages have other versions than when the run began: its last bits may differ."
            tell_all([watch, log])(Note(changed, warning=True))
        return _run_in(folder, prepared, base, watch, log)


def _check_unchanged(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose circumstances are other ones now."""
    for fact, value in now.items():
        if then.get(fact) != value:
            raise CheckpointError(
                f"The run in {path} cannot go on, because its {fact} is another one now ({value}) than "
                f"when it began ({then.get(fact)}); restore it, or begin a new run."
            )


def _environment(prepared: Prepared, base: Base) -> dict[str, Any]:
    """Return what is written of the machine, and what a resumed run must find again."""
    import torch

    return describe_environment(
        device=str(base.device),
        device_name=torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else None,
        threads=torch.get_num_threads(),
        dtype=prepared.recipe.model.dtype,
        data=data_fingerprint(prepared),
        base=base.fingerprint,
        **proxy_facts(prepared.recipe.selection),
    )


def _run_in(folder: RunFolder, prepared: Prepared, base: Base, watch: Watcher, log: Watcher) -> Result:
    """Run what is left of a run, told to the caller, to the folder's log and to the recipe's trackers."""
    start = time.perf_counter()
    recipe, clients = folder.recipe, len(prepared.clients)
    progress = _progress(folder, base, tell_all([watch, log]))
    with open_trackers(recipe, folder.path, tell_all([watch, log]), progress.round) as trackers:
        tell = tell_all([watch, log, trackers])
        size = cohort_size(recipe.federation, clients)
        tell(RunStarted(recipe.name, str(folder.path), recipe.federation.rounds, progress.round, clients, size))
        # Trackers have the earlier scores already; who watches, or writes the log, compares with the base's.
        for record in progress.evaluations:
            tell_all([watch, log])(Evaluated(record))
        result = _federate(folder, prepared, base, progress, tell)
        tell(RunFinished(time.perf_counter() - start))
    return result


def _federate(folder: RunFolder, prepared: Prepared, base: Base, progress: Progress, watch: Watcher) -> Result:
    """Run the rounds that are left, check that the base is unchanged, and write the results."""
    recipe = folder.recipe
    write_atomic(folder.path / CLIENTS, dump_description(describe(prepared.federated, prepared.clients)))
    if recipe.selection.method != "full":
        rows = {client: tokenised.rows for client, tokenised in prepared.clients.items()}
        keep_categories(client_folders(folder.path, list(rows)), rows)
    layers = LoraLayers(base.model, progress.adapter.config, _slots(prepared) if recipe.engine.processes == 1 else 1)
    with _engine(prepared, base, layers, folder.path) as engine:
        federation = _federation(folder, prepared, base, layers, engine, watch)
        for text in (*prepared.notes, *_way_notes(base, recipe.training.loss)):
            watch(Note(text))
        for text in prepared.warnings:
            watch(Note(text, warning=True))
        progress = federate(federation, progress)
    layers.detach()
    card = model_card(recipe, _records(progress), len(federation.clients), folder.environment)
    folder.finish(progress.adapter, card, _records(progress), _samples(folder, prepared, progress))
    return Result(folder.path, progress.adapter, progress.rounds, progress.evaluations)


@contextlib.contextmanager
def _engine(prepared: Prepared, base: Base, layers: LoraLayers, folder: Path) -> Iterator[Engine]:
    """Yield the engine of a recipe, its clients' own folders in the run's; check the copies of the base afterwards.

    Raises:
        ModelError: one was changed.
    """
    model, engine = prepared.recipe.model, prepared.recipe.engine
    rows = {client: tokenised.rows for client, tokenised in prepared.clients.items()}
    held_out = {client: tokenised.rows for client, tokenised in prepared.held_out.items()}
    folders = client_folders(folder, list(prepared.clients))
    copies: list[str] = []
    if engine.processes == 1:
        yield LocalEngine(base, layers, rows, held_out, prepared.stop, engine.tokens, folders, prepared.public)
    else:
        work = Work(
            layers.config, _slots(prepared), rows, held_out, prepared.stop, engine.tokens, folders, prepared.public
        )
        models = worker_models(model, base.device, engine.processes)
        with ProcessEngine(models, work, base.fingerprint) as workers:
            yield workers
            copies = workers.fingerprints()
    if any(found != base.fingerprint for found in (fingerprint(base.model), *copies)):
        raise ModelError(f"The frozen base model {base.name} was changed during the run; its results cannot be used.")


def _way_notes(base: Base, loss: str) -> list[str]:
    """Return a note where the faster way through a model, which a CPU has, or through its last step, does not fit."""
    if base.device.type != "cpu":
        return []
    if runs_end_to_end(base.model):
        if loss == "cross_entropy":
            return []
        return [f"training.loss {loss} takes whole logits: the faster step of output layer and loss steps aside."]
    return [
        f"{base.facts.architecture} runs over padded rows, as transformers has it; faster are models built like Llama, "
        "with model.attention auto or sdpa."
    ]


def _slots(prepared: Prepared) -> int:
    """Return how many clients are trained together in a process."""
    cohort = cohort_size(prepared.recipe.federation, len(prepared.clients))
    return clients_together(prepared.recipe.engine, cohort)


def _with_tokens(prepared: Prepared, base: Base) -> Prepared:
    """Return what is prepared with a measured budget of tokens, where clients are trained together without one."""
    recipe, clients = prepared.recipe, prepared.clients
    slots = _slots(prepared)
    if slots == 1 or recipe.engine.tokens is not None:
        return prepared
    adapter = initial_adapter(base, recipe.lora, Randomness(recipe.seed).torch("initial adapter"))
    layers = LoraLayers(base.model, adapter.config, slots)
    cohort = {client: tokenised.rows for client, tokenised in list(clients.items())[:slots]}
    with threads_each(recipe.engine.processes):
        tokens = fastest_tokens(base, layers, cohort, TrainTask(1, adapter, recipe.training, 1, recipe.seed))
    layers.detach()
    engine = recipe.engine.model_copy(update={"tokens": tokens})
    return replace(prepared, recipe=recipe.model_copy(update={"engine": engine}))


def _progress(folder: RunFolder, base: Base, watch: Watcher) -> Progress:
    """Return where to begin: the newest whole checkpoint, or a fresh adapter."""
    checkpoint = folder.latest()
    if checkpoint is None:
        generator = Randomness(folder.recipe.seed).torch("initial adapter")
        return Progress(0, initial_adapter(base, folder.recipe.lora, generator), {})
    for text in checkpoint.notes:
        watch(Note(text, warning=True))
    return Progress(
        checkpoint.round,
        checkpoint.adapter,
        checkpoint.state,
        tuple(record for record in checkpoint.history if isinstance(record, RoundRecord)),
        tuple(record for record in checkpoint.history if isinstance(record, EvaluationRecord)),
    )


def _federation(
    folder: RunFolder, prepared: Prepared, base: Base, layers: LoraLayers, engine: Engine, watch: Watcher
) -> Federation:
    """Return the simulated federation of a recipe."""
    recipe, clients = prepared.recipe, list(prepared.clients)
    trace = trace_of(recipe, clients)
    if trace is not None:
        rows = {client: tokenised.rows for client, tokenised in prepared.clients.items()}
        engine = UnevenClients(engine.ask, rows, trace)

    def commit(progress: Progress) -> None:
        folder.commit(progress.round, progress.adapter, progress.state, _records(progress))

    def score_own(round: int, adapter: Adapter) -> tuple[Mapping[str, Totals], Mapping[str, Totals]]:
        if not prepared.scored.rows:
            return {}, {}
        layers.load(0, adapter.tensors)
        scored = score(base, layers, prepared.scored.rows, recipe.evaluation, prepared.stop)
        _write_answers(folder, prepared, round, scored)
        return by_category(prepared.scored.rows, scored), by_group(prepared.scored.rows, scored)

    return Federation(
        recipe=recipe,
        engine=engine,
        clients=clients,
        evaluating=list(prepared.held_out),
        sample=make_sampler(recipe.federation, trace),
        aggregate=make_aggregate(recipe.federation.aggregate),
        score=score_own,
        commit=commit,
        watch=watch,
    )


def _records(progress: Progress) -> list[RoundRecord | EvaluationRecord]:
    """Return all records of a run in the order of rounds, evaluations after their round."""
    records: list[RoundRecord | EvaluationRecord] = [*progress.rounds, *progress.evaluations]
    return sorted(records, key=lambda record: record.round)


# Answers ------------------------------------------------------------------------------------------


def _answers_file(folder: RunFolder, round: int) -> Path:
    return folder.path / "answers" / f"{round:04d}.jsonl"


def _write_answers(folder: RunFolder, prepared: Prepared, round: int, scored: Sequence[Scored]) -> None:
    """Keep each row's category, answer and totals, one line per scored row in the order of the rows."""
    path = _answers_file(folder, round)
    path.parent.mkdir(exist_ok=True)
    kept = (
        ScoredRow(row.category, result.answer, result.totals)
        for row, result in zip(prepared.scored.rows, scored, strict=True)
    )
    write_atomic(path, dump_rows(kept))


def _samples(folder: RunFolder, prepared: Prepared, progress: Progress) -> list[dict[str, Any]]:
    """Return some scored rows with the untuned base's answer and the final one, categories in turn."""
    evaluation = prepared.recipe.evaluation
    if not evaluation.generate or not prepared.scored.rows:
        return []
    before, after = (
        [row.answer for row in load_rows(_answers_file(folder, round).read_bytes())] for round in (0, progress.round)
    )
    chosen = _in_turn([row.category for row in prepared.scored.rows], evaluation.samples)
    rows = prepared.scored.rows
    return [
        {
            "row": number,
            "category": rows[number].category,
            "instruction": rows[number].row.instruction,
            "context": rows[number].row.context,
            "reference": rows[number].response,
            "before": before[number],
            "after": after[number],
        }
        for number in chosen
    ]


def _in_turn(categories: Sequence[str], most: int) -> list[int]:
    """Return row numbers, the first row of each category, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for number, category in enumerate(categories):
        seen[category] = seen.get(category, 0) + 1
        ranked.append((seen[category], category, number))
    return [number for _, _, number in sorted(ranked)[:most]]
