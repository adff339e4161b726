"""The one round loop, over any engine and any method.

A round: sample the cohort, survey its rows where the recipe selects some, ask it to train, check every update,
aggregate, evaluate, commit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bellwether.errors import RoundFailed, UpdateRejected
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.checks import adapter_bytes, check_tensor, check_update
from bellwether.exchange.messages import EvaluateTask, Reply, SurveyTask, Task, TrainTask, Update
from bellwether.exchange.records import (
    ClientFailed,
    ClientFinished,
    ClientRecord,
    Evaluated,
    EvaluationRecord,
    Note,
    RoundFinished,
    RoundRecord,
    RoundStarted,
    SurveyFinished,
    Watcher,
)
from bellwether.exchange.scores import Totals, add_up
from bellwether.method.average import Aggregate, State
from bellwether.method.cohort import Sampler
from bellwether.method.schedule import learning_rate
from bellwether.method.select.budget import share
from bellwether.method.survey import Surveyed, survey
from bellwether.recipe.recipe import Recipe
from bellwether.tools.functions import naming
from bellwether.tools.randomness import Randomness


class Engine(Protocol):
    """Whatever can give a task to clients and collect their replies."""

    def ask(self, cohort: Sequence[str], task: Task) -> Iterator[Reply]:
        """Give a task to every client of a cohort; yield their replies as they come."""
        ...


@dataclass(frozen=True)
class Federation:
    """A federation and its methods, as values.

    Args:
        recipe: what the recipe says.
        engine: delivers tasks to clients.
        clients: all clients, in their order.
        evaluating: the clients that hold out rows of their own.
        sample: draws the cohort of a round.
        aggregate: turns updates into the next adapter.
        score: scores an adapter on the coordinator's own held-out rows: (round, adapter) to totals by
            category and totals by group; both empty where there are no such rows.
        commit: makes the progress after a round last.
        watch: is told what happens.
    """

    recipe: Recipe
    engine: Engine
    clients: Sequence[str]
    evaluating: Sequence[str]
    sample: Sampler
    aggregate: Aggregate
    score: Callable[[int, Adapter], tuple[Mapping[str, Totals], Mapping[str, Totals]]]
    commit: Callable[[Progress], None]
    watch: Watcher


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that is needed to go on.

    Args:
        round: completed rounds.
        adapter: the adapter after them.
        state: what the aggregation rule remembers.
        rounds: records of the completed rounds.
        evaluations: records of the evaluations so far.
    """

    round: int
    adapter: Adapter
    state: State
    rounds: tuple[RoundRecord, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()


def federate(federation: Federation, progress: Progress) -> Progress:
    """Run all rounds that are left.

    Args:
        federation: the federation and its methods.
        progress: where to begin: round 0 with the initial adapter, or what an earlier run committed.

    Returns:
        The progress after the last round.

    Raises:
        RoundFailed: more rounds ended below the quorum than the recipe tolerates.
    """
    if not progress.rounds and not progress.evaluations:
        progress = _finish_round(federation, progress)
    while progress.round < federation.recipe.federation.rounds:
        progress = _finish_round(federation, run_round(federation, progress))
    return progress


def _finish_round(federation: Federation, progress: Progress) -> Progress:
    """Score the adapter where that is due, commit the round, and tell of it."""
    start = time.perf_counter()
    scores = _evaluate(federation, progress) if _is_due(progress.round, federation.recipe) else []
    progress = replace(
        progress,
        rounds=_with_seconds(progress.rounds, evaluate=time.perf_counter() - start),
        evaluations=(*progress.evaluations, *scores),
    )
    federation.commit(progress)
    if progress.rounds:
        federation.watch(RoundFinished(progress.rounds[-1]))
    for record in scores:
        federation.watch(Evaluated(record))
    return progress


def _with_seconds(rounds: tuple[RoundRecord, ...], **phases: float) -> tuple[RoundRecord, ...]:
    """Return records of rounds, with further phases in the seconds of the last one."""
    return (*rounds[:-1], *(replace(last, seconds={**last.seconds, **phases}) for last in rounds[-1:]))


def run_round(federation: Federation, progress: Progress) -> Progress:
    """Run one round and return the progress after it; a round below its quorum keeps the adapter.

    Raises:
        RoundFailed: the round is below its quorum and no more failures are tolerated, or a person's own
            sampler or aggregation rule returned what cannot be used.
    """
    recipe, round, before = federation.recipe, progress.round + 1, progress.adapter
    drawn = _sample(federation, round)
    federation.watch(RoundStarted(round, drawn))

    rounds, deadline = recipe.federation.rounds, recipe.federation.deadline
    task = TrainTask(round, before, recipe.training, rounds, recipe.seed, deadline, recipe.selection)
    start = time.perf_counter()
    surveyed = _survey(federation, drawn, task) if recipe.selection.surveys else None
    cohort, failure = drawn, None
    if surveyed is not None:
        task = replace(task, kept=surveyed.kept)
        failure = _below_quorum("surveys", len(surveyed.kept), drawn, surveyed.left_out, recipe)
        # A client of whose rows none was selected does not train, and does not count.
        cohort = tuple(client for client in drawn if surveyed.kept.get(client) and failure is None)
    asked = time.perf_counter()
    answers = _collect(federation, cohort, task, surveyed.left_out if surveyed else {})
    trained = time.perf_counter()

    nothing = surveyed is not None and failure is None and not cohort
    if failure is None and not nothing:
        failure = _below_quorum("updates", len(answers.accepted), cohort, answers.left_out, recipe)
    if nothing:
        federation.watch(Note(f"Round {round}: no row was selected, so the adapter stays as it is.", warning=True))
        adapter, state = before, progress.state
    elif failure is None:
        updates = [update for update, _ in answers.accepted]
        with naming(f"Round {round}: the aggregation rule {recipe.federation.aggregate}", RoundFailed):
            adapter, state = federation.aggregate(updates, before, progress.state)
        _check_aggregated(adapter, state, before, round)
    else:
        _tolerate(failure, round, progress.rounds, federation)
        adapter, state = before, progress.state
    seconds = {"survey": asked - start} if surveyed else {}
    seconds |= {"train": trained - asked, "aggregate": time.perf_counter() - trained}
    record = _record(drawn, task, answers, adapter, seconds, failure)
    if surveyed is not None:
        record = surveyed.added_to(record)
    return Progress(round, adapter, state, (*progress.rounds, record), progress.evaluations)


@dataclass
class _Answers:
    """What a cohort sent: accepted updates with their records, and why the others are left out."""

    accepted: list[tuple[Update, ClientRecord]]
    left_out: dict[str, str]
    bytes_up: int
    duration: float
    reached: int


def _sample(federation: Federation, round: int) -> tuple[str, ...]:
    """Return the cohort of a round, refusing what a person's own sampler must not return."""
    name = federation.recipe.federation.sampler
    with naming(f"Round {round}: the sampler {name}", RoundFailed):
        cohort = tuple(federation.sample(federation.clients, round, Randomness(federation.recipe.seed)))
    unknown = [client for client in cohort if client not in federation.clients]
    if unknown or len(set(cohort)) != len(cohort):
        what = f"{unknown[0]!r}, which is no client" if unknown else "a client twice"
        raise RoundFailed(f"Round {round}: the sampler {name} returned {what}.")
    return cohort


def _survey(federation: Federation, cohort: tuple[str, ...], task: TrainTask) -> Surveyed:
    """Ask the cohort where its rows lie, and tell of it."""
    adapter = task.adapter if task.selection.features == "model" else None
    question = SurveyTask(task.round, adapter, task.selection, task.seed)
    surveyed = survey(federation.engine.ask, cohort, question)
    federation.watch(SurveyFinished(task.round, surveyed.record))
    for client, reason in surveyed.left_out.items():
        federation.watch(ClientFailed(task.round, client, reason))
    return surveyed


def _collect(federation: Federation, cohort: tuple[str, ...], task: TrainTask, left_out: Mapping[str, str]) -> _Answers:
    """Ask a cohort to train; accept each update that passes the check, in time."""
    answers = _Answers([], dict(left_out), 0, 0.0, len(cohort))
    for reply in federation.engine.ask(cohort, task) if cohort else ():
        answers.reached -= not reply.reached
        if reply.update is not None:
            answers.bytes_up += adapter_bytes(reply.update.tensors)
        # The server waits for what comes in time; what comes later costs it no more than the deadline.
        answers.duration = max(answers.duration, min(reply.seconds, task.deadline or math.inf))
        try:
            update = _accept(reply, task, cohort, answers, federation.recipe.federation.max_rows)
        except UpdateRejected as reason:
            _leave_out(federation, answers, task.round, reply.client, str(reason))
            continue
        record = ClientRecord(
            update.client,
            update.rows,
            int(update.metrics.get("rows", update.rows)),
            int(update.metrics.get("tokens", 0)),
            float(update.metrics.get("loss", math.nan)),
            reply.seconds,
            int(update.metrics["selected"]) if "selected" in update.metrics else None,
        )
        answers.accepted.append((update, record))
        federation.watch(ClientFinished(task.round, record))
    heard = {update.client for update, _ in answers.accepted} | answers.left_out.keys()
    for client in cohort:
        if client not in heard:
            _leave_out(federation, answers, task.round, client, "it did not answer")
    return answers


def _accept(reply: Reply, task: TrainTask, cohort: Sequence[str], answers: _Answers, max_rows: int) -> Update:
    """Return a reply's update, or raise UpdateRejected with the reason to leave it out."""
    if reply.failure is not None or reply.update is None:
        raise UpdateRejected(reply.failure or "it sent no update")
    if task.deadline is not None and reply.seconds > task.deadline:
        raise UpdateRejected(f"it took {reply.seconds:.1f} s, and the deadline is {task.deadline:g} s")
    if reply.update.client != reply.client:
        raise UpdateRejected(f"its update is signed {reply.update.client!r}")
    taken = {update.client for update, _ in answers.accepted}
    check_update(reply.update, task.adapter, task.round, cohort, taken, max_rows)
    return reply.update


def _leave_out(federation: Federation, answers: _Answers, round: int, client: str, reason: str) -> None:
    """Note why a client's reply is not used."""
    answers.left_out[client] = reason
    federation.watch(ClientFailed(round, client, reason))


def _below_quorum(
    what: str, count: int, cohort: Sequence[str], left_out: Mapping[str, str], recipe: Recipe
) -> str | None:
    """Return why so many surveys or updates of a cohort are too few, or None."""
    needed = share(len(cohort), recipe.federation.quorum)
    if count >= needed:
        return None
    reasons = "; ".join(f"{client}: {reason}" for client, reason in left_out.items()) or "no client was there"
    return f"{count} of {len(cohort)} {what} can be used, and {needed} are needed ({reasons})"


def _tolerate(failure: str, round: int, rounds: Sequence[RoundRecord], federation: Federation) -> None:
    """Note a failed round, or end the run where too many have failed."""
    allowed = federation.recipe.federation.failed_rounds
    failed = 1 + sum(record.failure is not None for record in rounds)
    if failed > allowed:
        raise RoundFailed(
            f"Round {round} failed: {failure}. Lower federation.quorum, raise federation.deadline, lower "
            "training.learning_rate where values are not finite, or let the run survive failed rounds with "
            f"federation.failed_rounds (now {allowed})."
        )
    federation.watch(Note(f"Round {round} failed and keeps the adapter: {failure}.", warning=True))


def _check_aggregated(adapter: Adapter, state: State, before: Adapter, round: int) -> None:
    """Refuse an aggregate that is not an adapter like the one before, holds values that are not finite, or no state."""
    if not isinstance(state, Mapping):
        raise RoundFailed(
            f"Round {round}: the aggregation rule returned a {type(state).__name__} as its state; return a mapping."
        )
    if not isinstance(adapter, Adapter) or adapter.tensors.keys() != before.tensors.keys():
        raise RoundFailed(f"Round {round}: the aggregation rule returned no adapter with the same tensors.")
    for key, value in adapter.tensors.items():
        try:
            check_tensor(key, value, before.tensors[key])
        except UpdateRejected as reason:
            raise RoundFailed(f"Round {round}: the aggregation rule returned an adapter whose {reason}.") from None


def _record(
    cohort: tuple[str, ...],
    task: TrainTask,
    answers: _Answers,
    adapter: Adapter,
    seconds: Mapping[str, float],
    failure: str | None,
) -> RoundRecord:
    """Return the record of a round."""
    clients = tuple(record for _, record in answers.accepted)
    tokens = sum(record.tokens for record in clients)
    loss = sum(record.loss * record.tokens for record in clients) / tokens if tokens else math.nan
    return RoundRecord(
        round=task.round,
        cohort=cohort,
        clients=clients,
        left_out=dict(answers.left_out),
        learning_rate=learning_rate(task.training, task.round, task.rounds),
        loss=loss,
        rows=sum(record.rows for record in clients),
        rows_seen=sum(record.rows_seen for record in clients),
        tokens=tokens,
        bytes_down=adapter_bytes(task.adapter.tensors) * answers.reached,
        bytes_up=answers.bytes_up,
        seconds=dict(seconds),
        duration=answers.duration,
        adapter=adapter.fingerprint(),
        failure=failure,
    )


def _is_due(round: int, recipe: Recipe) -> bool:
    """Return whether an adapter is scored after this round: before the first, every n rounds, after the last."""
    every = recipe.evaluation.every
    return round in (0, recipe.federation.rounds) or (every > 0 and round % every == 0)


def _evaluate(federation: Federation, progress: Progress) -> list[EvaluationRecord]:
    """Score the adapter on the coordinator's rows and, at the clients, on those that they hold out."""
    start = time.perf_counter()
    records: list[EvaluationRecord] = []
    totals, groups = federation.score(progress.round, progress.adapter)
    if totals:
        part, seconds = federation.recipe.evaluation.part, time.perf_counter() - start
        records.append(EvaluationRecord(progress.round, part, totals, seconds, groups=_several(groups)))
    if federation.evaluating:
        records.append(_score_at_clients(federation, progress))
    return records


def _score_at_clients(federation: Federation, progress: Progress) -> EvaluationRecord:
    """Ask the clients that hold out rows to score the adapter; only their totals come back."""
    start = time.perf_counter()
    task = EvaluateTask(progress.round, progress.adapter, federation.recipe.evaluation)
    by_client: dict[str, Mapping[str, Totals]] = {}
    by_group: list[Mapping[str, Totals]] = []
    for reply in federation.engine.ask(federation.evaluating, task):
        if reply.totals is None:
            _missed(federation, progress.round, reply)
        else:
            by_client[reply.client] = reply.totals
            by_group.append(reply.groups)
    totals, groups = (
        add_up(item for totals in by_client.values() for item in totals.items()),
        _several(add_up(item for totals in by_group for item in totals.items())),
    )
    return EvaluationRecord(progress.round, "clients", totals, time.perf_counter() - start, by_client, groups)


def _missed(federation: Federation, round: int, reply: Reply) -> None:
    """Note that a client did not score its rows."""
    federation.watch(Note(f"Round {round}: {reply.client} did not score its rows: {reply.failure}.", warning=True))


def _several(groups: Mapping[str, Totals]) -> Mapping[str, Totals]:
    """Return totals by group where rows name at least two, else none: those of all rows say as much."""
    return groups if len(groups.keys() - {""}) > 1 else {}
