"""A run: a recipe becomes data, clients, an engine and methods; rounds are run; results are written.

This is also the Python interface:

    from bellwether import load_recipe, run
    result = run(load_recipe("default", ["seed=1"]))
    print(result.before.rouge_l, result.after.rouge_l, result.folder)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bellwether.engine.processes import expect_workers
from bellwether.errors import CheckpointError
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.records import (
    Evaluated,
    EvaluationRecord,
    Event,
    Note,
    RoundRecord,
    RunFinished,
    RunStarted,
    Watcher,
)
from bellwether.exchange.scores import Scores, Totals, macro
from bellwether.federate import Federation, Progress, federate, is_due
from bellwether.method.cohort import cohort_size
from bellwether.method.method import Known, Method
from bellwether.method.named import make_method
from bellwether.method.returned import first_state
from bellwether.model.base import Base, load_base
from bellwether.model.lora import LoraLayers
from bellwether.recipe.file import load_recipe, with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.runner.answers import Answers
from bellwether.runner.describe import describe
from bellwether.runner.guarantee import (
    Guarantee,
    begin_ledger,
    charged,
    close_ledger,
    guarantee,
    promise_notes,
    settled,
    within_budget,
)
from bellwether.runner.opened import Opened
from bellwether.runner.precision import with_precision
from bellwether.runner.prepare import Prepared, prepared_fingerprint, proxy_facts, with_absolute_paths
from bellwether.runner.processors import as_begun, with_processes
from bellwether.runner.scoring import score_served
from bellwether.runner.wiring import (
    SIMULATION,
    Deployment,
    Setting,
    all_records,
    first_adapter,
    make_federation,
    result_of,
    slots_of,
    way_notes,
    where_to_begin,
)
from bellwether.runner.work import expected
from bellwether.store.chosen import keep_categories
from bellwether.store.client_state import forgotten
from bellwether.store.history import ScoredRow
from bellwether.store.holdings import dump_description
from bellwether.store.model_card import model_card
from bellwether.store.run_folder import (
    CLIENTS,
    LOG,
    Checkpoint,
    RunFolder,
    check_new,
    client_folders,
    describe_environment,
    next_folder,
    write_atomic,
)
from bellwether.tell.narrate import tell_all, write_log
from bellwether.tell.trackers import open_trackers
from bellwether.tools.progress import listening
from bellwether.tools.words import clean


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        folder: the run folder.
        adapter: the final adapter.
        rounds: one record per round.
        evaluations: one record per evaluation and part.
        scored: the coordinator's scored rows with the final adapter's answers; empty where it has none.
    """

    folder: Path
    adapter: Adapter
    rounds: Sequence[RoundRecord]
    evaluations: Sequence[EvaluationRecord]
    scored: Sequence[ScoredRow]

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
    opened: Opened | None = None,
    deployment: Deployment = SIMULATION,
) -> Result:
    """Run a recipe, or go on with a run.

    Code that the recipe names is run without a question: see ``recipe.consent.code_in``, which lists it.

    Args:
        recipe: what to run, None runs the shipped ``default``; with ``resume``, it must equal the folder's
            own, or be None.
        resume: a run folder to go on with.
        watch: is told what happens; None is silent.
        opened: what other runs of this process have opened already; None opens everything anew.
        deployment: where the clients are; else they are simulated in this process and its workers.

    Returns:
        The result, which is also in the run folder.

    Raises:
        BellwetherError: see ``bellwether.errors``; the message is fit to be shown to a person.
    """
    watch = watch or _silent
    with listening(watch):
        if resume is not None:
            return _resume(Path(resume), recipe, watch, opened, deployment)
        return _begin(recipe or load_recipe("default"), watch, opened, deployment)


def _silent(event: Event) -> None:
    """Tell nobody."""


def _begin(recipe: Recipe, watch: Watcher, opened: Opened | None, deployment: Deployment) -> Result:
    """Run a recipe from its start; the folder is made once everything that can be checked is checked."""
    path = Path(recipe.output.folder) if recipe.output.folder else next_folder(recipe.name)
    check_new(path)
    recipe = with_precision(with_absolute_paths(recipe), None, lambda text: watch(Note(text)))
    if recipe.engine.processes == 0 and not deployment.here:
        recipe = with_overrides(recipe, {"engine.processes": 1})  # nobody is trained here
    expect_workers(recipe.engine.processes)
    prepared = with_processes(deployment.prepare(recipe, opened), lambda text: watch(Note(text)))
    if recipe.engine.processes == 0:
        recipe = prepared.recipe
        expect_workers(recipe.engine.processes)
    base = load_base(recipe.model, prepared.base)
    if recipe.output.folder is None:
        path = next_folder(recipe.name)  # another run may have begun in the meantime
    with RunFolder.create(path, prepared.recipe, _environment(prepared, base)) as folder:
        try:
            with write_log(folder.path / LOG) as log:
                return _run_in(folder, None, prepared, base, watch, log, deployment)
        except BaseException:
            folder.discard()
            raise


def _resume(path: Path, recipe: Recipe | None, watch: Watcher, opened: Opened | None, deployment: Deployment) -> Result:
    """Go on with the run in a folder, under the conditions under which it began."""
    if recipe is not None:
        recipe = as_begun(with_precision(recipe, path, lambda text: watch(Note(text))), path)
    with (
        RunFolder.reopen(path, with_absolute_paths(recipe) if recipe else None) as folder,
        write_log(folder.path / LOG) as log,
    ):
        then, checkpoint = folder.environment, folder.latest()
        expect_workers(folder.recipe.engine.processes)
        prepared = deployment.prepare(folder.recipe, opened)
        _check_unchanged(path, then, {"data": prepared_fingerprint(prepared)})
        # The number of threads decides the order of sums, and with it the last bits.
        threads = {"threads": int(then.get("threads", 0))}
        base = load_base(folder.recipe.model.model_copy(update=threads), prepared.base)
        now = _environment(prepared, base)
        facts = ("base", "device", "dtype", "proxy")
        _check_unchanged(path, then, {fact: now[fact] for fact in facts if fact in now})
        if then.get("versions") != now["versions"]:
            changed = "Packages have other versions than when the run began: its last bits may differ."
            tell_all([watch, log])(Note(changed, warning=True))
        return _run_in(folder, checkpoint, prepared, base, watch, log, deployment)


def _check_unchanged(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose circumstances are other ones now."""
    for fact, value in now.items():
        if then.get(fact) != value:
            raise CheckpointError(
                f"The run in {path} cannot go on, because its {fact} is another one now ({value}) than "
                f"when it began ({clean(str(then.get(fact))):.80}); restore it, or begin a new run."
            )


def _environment(prepared: Prepared, base: Base) -> dict[str, Any]:
    """Return what is written of the machine, and what a resumed run must find again."""
    import torch

    return describe_environment(
        device=str(base.device),
        device_name=torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else None,
        threads=torch.get_num_threads(),
        dtype=prepared.recipe.model.dtype,
        data=prepared_fingerprint(prepared),
        base=base.fingerprint,
        **proxy_facts(prepared.recipe.selection),
    )


def _run_in(
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    prepared: Prepared,
    base: Base,
    watch: Watcher,
    log: Watcher,
    deployment: Deployment,
) -> Result:
    """Run what is left of a run, told to the caller, to the folder's log and to the recipe's trackers."""
    start = time.perf_counter()
    recipe, clients = folder.recipe, len(prepared.clients)
    rows = {client: len(tokenised.rows) for client, tokenised in prepared.clients.items()}
    given = guarantee(recipe, rows, deployment.secret)
    method = make_method(recipe.method, recipe.privacy, given.noise if given else None)
    progress = where_to_begin(folder, checkpoint, base, method, tell_all([watch, log]))
    with open_trackers(recipe, folder.path, tell_all([watch, log]), progress.round) as trackers:
        tell = tell_all([watch, log, trackers])
        size = cohort_size(recipe.federation, clients)
        # How long rows that are elsewhere will take, nobody here can tell.
        told = deployment.here and watch is not _silent
        rounds = given.ends if given and given.ends else recipe.federation.rounds
        planned = expected(prepared, size) if told else None
        scored = tuple(
            round for round in range(progress.round + 1, rounds + 1) if is_due(round, rounds, recipe.evaluation.every)
        )
        tell(RunStarted(recipe.name, str(folder.path), rounds, progress.round, clients, size, scored, planned))
        # Trackers have the earlier scores already; who watches, or writes the log, compares with the base's.
        for record in progress.evaluations:
            tell_all([watch, log])(Evaluated(record))
        with listening(tell_all([watch, log])):
            result = _federate(folder, prepared, base, method, progress, tell, deployment, given)
        tell(RunFinished(time.perf_counter() - start))
    return result


def _federate(
    folder: RunFolder,
    prepared: Prepared,
    base: Base,
    method: Method,
    progress: Progress,
    watch: Watcher,
    deployment: Deployment,
    given: Guarantee | None,
) -> Result:
    """Run the rounds that are left, check that the base is unchanged, and write the results."""
    recipe, first = folder.recipe, first_adapter(base, folder.recipe)
    write_atomic(folder.path / CLIENTS, dump_description(describe(prepared.federated, prepared.clients)))
    own, chooses = client_folders(folder.path, list(prepared.clients)), recipe.selection.method != "full"
    if chooses and deployment.here:
        keep_categories(own, {client: tokenised.rows for client, tokenised in prepared.clients.items()})
    layers = LoraLayers(base.model, progress.adapter.config, slots_of(prepared) if recipe.engine.processes == 1 else 1)
    answers = Answers(folder.path, prepared)
    payload = method.give(progress.state, Known("", progress.state.adapter.config.rank), max(1, progress.round))
    begin_ledger(folder.path, recipe, method, payload, given)
    with deployment.engine(Setting(prepared, base, layers, method, folder.path, watch)) as engine:
        federation = make_federation(folder, prepared, base, layers, engine, method, answers, watch)
        if deployment.here and prepared.scored.rows:
            score = functools.partial(score_served, prepared, base, layers, method, own)
            federation = replace(federation, score_served=score)
        federation = replace(
            federation,
            sample=deployment.sampling(federation.sample),
            charge=charged(folder.path, given),
            affordable=within_budget(folder.path, recipe, given, progress.round),
            recipe=recipe.model_copy(update={"privacy": settled(recipe, given)}),
        )
        hidden, doubts = promise_notes(recipe, given, sum(value.size for value in payload.expected.values()))
        for text in (*prepared.notes, *hidden, *way_notes(base, recipe.training.loss)):
            watch(Note(text))
        for text in (*prepared.warnings, *doubts):
            watch(Note(text, warning=True))
        if deployment.here:
            _tell_forgotten(forgotten(own, progress.rounds, chooses), watch)
        _restore_answers(federation, progress, answers.lost(progress.evaluations), first)
        progress = federate(federation, progress)
    layers.detach()
    close_ledger(folder.path, recipe, given, progress.round)
    card = model_card(
        recipe, all_records(progress), len(federation.ranks), folder.environment, sites=not deployment.here
    )
    adapter = result_of(progress.state)
    folder.finish(adapter, card, all_records(progress), answers.samples(progress.evaluations))
    last = answers.last(progress.evaluations)
    return Result(folder.path, adapter, progress.rounds, progress.evaluations, last)


def _tell_forgotten(gone: Sequence[Path], watch: Watcher) -> None:
    """Tell of files of clients that a run goes on without."""
    if gone:
        several = "" if len(gone) == 1 else f" and {len(gone) - 1} more such files are"
        text = f"{gone[0]}{several or ' is'} gone: without what a client kept, it may choose other rows, or send other "
        watch(Note(f"{text}updates, than it would have.", warning=True))


def _restore_answers(federation: Federation, progress: Progress, lost: Mapping[int, str], first: Adapter) -> None:
    """Score anew, before anything is trained, what a run that goes on has lost of the answers that its end needs."""
    for round, sentence in lost.items():
        federation.watch(Note(sentence, warning=True))
        federation.score(round, first_state(federation.method, first) if round == 0 else progress.state)
