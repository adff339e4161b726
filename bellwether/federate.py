"""The one round loop, over any engine and any method.

A round: sample the cohort, survey its rows where the recipe selects some, give each client its task, check what comes
back, let the method close the round, evaluate, commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bellwether.errors import RoundFailed, UpdateRejected
from bellwether.exchange.adapter import Adapter
from bellwether.exchange.checks import check_scores
from bellwether.exchange.collect import Collection
from bellwether.exchange.compress import DOWN, compress_payload
from bellwether.exchange.messages import (
    EvaluateTask,
    Payload,
    Reply,
    SurveyTask,
    Task,
    TrainTask,
    Update,
    client_draws,
)
from bellwether.exchange.records import (
    ClientFailed,
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
from bellwether.method.cohort import Sampler, Sampling, what_is_known
from bellwether.method.method import Closing, Known, Mean, Method, State, mean_of, serve_sent
from bellwether.method.returned import check_cohort, check_payload, check_state, check_weights
from bellwether.method.schedule import learning_rate
from bellwether.method.secure import Agreed, agree, mean_of_sum, open_sum
from bellwether.method.select.budget import share
from bellwether.method.survey import Surveyed, survey
from bellwether.recipe.recipe import Recipe
from bellwether.tools.functions import naming
from bellwether.tools.progress import AT_CLIENTS, advance
from bellwether.tools.randomness import Randomness


class Engine(Protocol):
    """Whatever can give clients their tasks and collect their replies."""

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Give every client its task; yield the replies as they come.

        Args:
            tasks: what each client is asked, in the order of the cohort.
            deadline: seconds, by the engine's own clock, after which it waits for nobody any more; None waits.
        """
        ...


@dataclass(frozen=True)
class Federation:
    """A federation and its method, as values.

    Args:
        recipe: what the recipe says.
        engine: delivers tasks to clients.
        ranks: all clients, in their order, and the rank of each one's adapter.
        evaluating: the clients that hold out rows of their own.
        sample: draws the cohort of a round.
        method: says what clients are sent and do, and closes rounds.
        score: scores a state on the coordinator's own held-out rows: (round, state) to totals by category and totals
            by group; both empty where there are no such rows.
        commit: makes the progress after a round last.
        watch: is told what happens.
        width: dimensions of the space of a survey; not used where there is none.
        score_served: scores what a client serves on the coordinator's rows, to totals by category; None where that is
            not to be had, since clients are elsewhere.
        charge: makes what a round spends of a budget of privacy last, before anybody is asked.
        affordable: how many rounds that budget is enough for; None is enough for all.
    """

    recipe: Recipe
    engine: Engine
    ranks: Mapping[str, int]
    evaluating: Sequence[str]
    sample: Sampler
    method: Method
    score: Callable[[int, State], tuple[Mapping[str, Totals], Mapping[str, Totals]]]
    commit: Callable[[Progress], None]
    watch: Watcher
    width: int = 0
    score_served: Callable[[Progress, Known], Mapping[str, Totals]] | None = None
    charge: Callable[[int], None] = lambda round: None
    affordable: int | None = None

    @property
    def rounds(self) -> int:
        """How many rounds are run: all of the recipe's, or those that its budget of privacy is enough for."""
        planned = self.recipe.federation.rounds
        return planned if self.affordable is None else min(planned, self.affordable)


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that is needed to go on.

    Args:
        round: completed rounds.
        state: the server's state after them.
        rounds: records of the completed rounds.
        evaluations: records of the evaluations so far.
    """

    round: int
    state: State
    rounds: tuple[RoundRecord, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()

    @property
    def adapter(self) -> Adapter:
        """The global adapter after the completed rounds."""
        return self.state.adapter


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
    while progress.round < federation.rounds:
        progress = _finish_round(federation, run_round(federation, progress))
    if federation.rounds < federation.recipe.federation.rounds:
        text = f"The budget of privacy.epsilon is spent after round {progress.round}, so the run ends here."
        federation.watch(Note(text, warning=True))
    return progress


def _finish_round(federation: Federation, progress: Progress) -> Progress:
    """Score the adapter where that is due, commit the round, and tell of it."""
    start = time.perf_counter()
    due = is_due(progress.round, federation.rounds, federation.recipe.evaluation.every)
    scores = _evaluate(federation, progress) if due else []
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
    """Run one round and return the progress after it; a failed round keeps the adapter, unless the method says else.

    Raises:
        RoundFailed: the round is below its quorum and no more failures are tolerated, or a person's own
            sampler or method returned what cannot be used.
    """
    recipe, round = federation.recipe, progress.round + 1
    federation = replace(federation, method=federation.method.of_round(round, recipe.federation.rounds))
    known = what_is_known(federation.ranks, progress.rounds)
    drawn = _sample(federation, progress, known)
    federation.watch(RoundStarted(round, drawn))
    federation.charge(round)

    start = time.perf_counter()
    oldest = progress.rounds[: max(0, round - recipe.output.keep_checkpoints)]
    certain = what_is_known(federation.ranks, oldest)
    payloads = {client: _payload(federation, progress.state, known[client], round) for client in drawn}
    tasks = {client: _task(recipe, round, payloads[client], known[client], certain[client]) for client in drawn}
    surveyed = _survey(federation, round, tasks) if recipe.selection.surveys else None
    failure = None
    if surveyed is not None:
        failure = _below_quorum("surveys", len(surveyed.kept), drawn, surveyed.left_out, recipe)
        # A client of whose rows none was selected does not train, and does not count.
        kept = surveyed.kept if failure is None else {}
        tasks = {client: replace(task, kept=kept[client]) for client, task in tasks.items() if kept.get(client)}
    asked, training = time.perf_counter(), tuple(tasks)
    missing = dict(surveyed.left_out) if surveyed else {}
    agreed = None
    if recipe.secure_aggregation.enabled and tasks:
        agreed = _agree(federation, round, tasks)
        failure, tasks, missing = agreed.failure, dict(agreed.tasks), {**missing, **agreed.left_out}
    due = {client: _returns(federation, task) for client, task in tasks.items()}
    bounds = {client: _bound(federation, round, payload) for client, payload in payloads.items()}
    answers = Collection(tasks, payloads, due, bounds, recipe.federation, missing, federation.watch, round)
    for reply in federation.engine.ask(tasks, recipe.federation.deadline) if tasks else ():
        answers.take(reply)
    answers.close()
    trained = time.perf_counter()

    if surveyed is not None and failure is None and not tasks:
        federation.watch(Note(f"Round {round}: no row was selected, so the adapter stays as it is.", warning=True))
    elif not drawn and recipe.federation.sampler == "poisson":
        federation.watch(Note(f"Round {round}: no client was drawn, as it can be with the sampler poisson."))
    elif failure is None and not recipe.privacy.hides_clients:
        # Where clients are hidden, whether a round counts must not tell who was there: noise is added to whatever came.
        failure = _below_quorum("updates", len(answers.accepted), training, answers.left_out, recipe)
    mean = None
    if agreed is not None and failure is None and answers.accepted:
        agreed, mean = _open(federation, agreed, [update for update, _ in answers.accepted], payloads, due)
        failure = agreed.failure
    if failure is not None:
        _tolerate(failure, round, progress.rounds, federation)
    updates = [update for update, _ in answers.accepted] if failure is None else []
    state = _close(federation, progress, drawn, updates, failure, mean)
    seconds = {"survey": asked - start} if surveyed else {}
    seconds |= {"train": trained - asked, "aggregate": time.perf_counter() - trained}
    rate = learning_rate(recipe.training, round, recipe.federation.rounds)
    record = answers.record(drawn, rate, state.adapter, seconds, failure)
    for part in (surveyed, agreed):
        record = record if part is None else part.added_to(record)
    return Progress(round, state, (*progress.rounds, record), progress.evaluations)


def _sample(federation: Federation, progress: Progress, known: Mapping[str, Known]) -> tuple[str, ...]:
    """Return the cohort of a round, refusing what a person's own sampler must not return."""
    name, round = federation.recipe.federation.sampler, progress.round + 1
    clients = tuple(federation.ranks)
    sampling = Sampling(round, clients, known, progress.state, Randomness(federation.recipe.seed))
    with naming(f"Round {round}: the sampler {name}", RoundFailed):
        drawn = federation.sample(sampling)
        return check_cohort(drawn, clients, f"Round {round}: the sampler {name}")


def _task(recipe: Recipe, round: int, payload: Payload, client: Known, certain: Known) -> TrainTask:
    """Return what one client is asked in a round, with what it receives of its payload, and nothing of another's."""
    randomness, name = Randomness(recipe.seed), client.client
    received = compress_payload(payload, recipe.compression.down, randomness.numpy(DOWN, round=round, client=name))
    draws = client_draws(randomness, round, name)
    task = TrainTask(round, received, recipe.training, recipe.federation.rounds, draws, recipe.selection)
    task = replace(task, compression=recipe.compression, privacy=recipe.privacy)
    return replace(task, settled=client.settled, certain=certain.settled)


def _payload(federation: Federation, state: State, client: Known, round: int) -> Payload:
    """Return what the method sends one client."""
    who = f"Round {round}: the method {federation.recipe.method.name}"
    with naming(who, RoundFailed):
        payload = federation.method.give(state, client, round)
    check_payload(payload, client.client, who)
    return payload


def _returns(federation: Federation, task: TrainTask) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the arrays that the method expects back of a client beside its tensors."""
    who = f"Round {task.round}: what the method {federation.recipe.method.name} expects back"
    with naming(who, RoundFailed):
        return {str(name): tuple(shape) for name, shape in federation.method.returns(task.payload).items()}


def _bound(federation: Federation, round: int, payload: Payload) -> float:
    """Return the largest norm of a client's change that the method takes."""
    with naming(f"Round {round}: the bound of the method {federation.recipe.method.name}", RoundFailed):
        return float(federation.method.bound(payload))


def _survey(federation: Federation, round: int, tasks: Mapping[str, TrainTask]) -> Surveyed:
    """Ask the cohort where its rows lie, and tell of it."""
    recipe = federation.recipe
    settings, deadline = recipe.selection, recipe.federation.deadline
    questions = {
        client: SurveyTask(round, task.payload if settings.features == "model" else None, settings, task.draws)
        for client, task in tasks.items()
    }
    surveyed = survey(
        lambda asked: _counted("surveying rows", federation.engine.ask(asked, deadline), len(asked)),
        questions,
        settings,
        round,
        federation.width,
    )
    federation.watch(SurveyFinished(round, surveyed.record))
    for client, reason in surveyed.left_out.items():
        federation.watch(ClientFailed(round, client, reason))
    return surveyed


def _agree(federation: Federation, round: int, tasks: Mapping[str, TrainTask]) -> Agreed:
    """Let the cohort agree on how it masks its updates, and tell of those that do not take part."""
    agreed = agree(_asking(federation), tasks, round, federation.recipe)
    for client, reason in agreed.left_out.items():
        federation.watch(ClientFailed(round, client, reason))
    return agreed


def _open(
    federation: Federation,
    agreed: Agreed,
    updates: Sequence[Update],
    payloads: Mapping[str, Payload],
    due: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> tuple[Agreed, Mean | None]:
    """Let the cohort take the masks off the sum of its updates; return the mean, or why there is none."""
    agreed, sum_P = open_sum(agreed, _asking(federation), updates)
    weigh = federation.method.weigh
    if sum_P is None or weigh is None:
        return agreed, None
    with naming(f"Round {updates[0].round}: the method {federation.recipe.method.name}", RoundFailed):
        return agreed, mean_of_sum(sum_P, agreed, updates, weigh, payloads, due[updates[0].client])


def _asking(federation: Federation) -> Callable[[Mapping[str, Task]], Iterator[Reply]]:
    """Return what gives clients tasks of secure aggregation, and tells how many have answered."""
    deadline = federation.recipe.federation.deadline
    return lambda tasks: _counted("securing the sum", federation.engine.ask(tasks, deadline), len(tasks))


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
    federation.watch(Note(f"Round {round} failed, so no update of it is used: {failure}.", warning=True))


def _close(
    federation: Federation,
    progress: Progress,
    cohort: tuple[str, ...],
    updates: Sequence[Update],
    failure: str | None,
    mean: Mean | None,
) -> State:
    """Let the method close the round, failed and empty ones too; refuse a state that cannot be gone on from.

    The mean is given where nobody but the clients knows the updates.
    """
    recipe, method, round = federation.recipe, federation.method, progress.round + 1
    randomness = Randomness(Randomness(recipe.seed).seed_for("server"))
    name = f"the method {recipe.method.name}"
    with naming(f"Round {round}: {name}", RoundFailed):
        if method.weigh is not None:
            check_weights(updates, method.weigh, f"Round {round}: {name}")
        if mean is None and updates and method.weigh is not None:
            mean = mean_of(updates, method.weigh)
        apart = sorted(updates, key=lambda update: update.client) if method.weigh is None else ()
        clients = len(federation.ranks)
        state = method.close(Closing(round, progress.state, clients, cohort, mean, apart, failure, randomness))
    check_state(state, progress.state, f"Round {round}: {name}", folds=federation.method.folds)
    return state


def is_due(round: int, rounds: int, every: int) -> bool:
    """Return whether an adapter is scored after this round: before the first, every n rounds, after the last."""
    return round in (0, rounds) or (every > 0 and round % every == 0)


def _evaluate(federation: Federation, progress: Progress) -> list[EvaluationRecord]:
    """Score the adapter on the coordinator's rows and, at the clients, on those that they hold out."""
    start = time.perf_counter()
    records: list[EvaluationRecord] = []
    totals, groups = federation.score(progress.round, progress.state)
    if totals:
        part, seconds = federation.recipe.evaluation.part, time.perf_counter() - start
        records.append(EvaluationRecord(progress.round, part, totals, seconds, groups=_several(groups)))
    if federation.evaluating:
        records.append(_score_at_clients(federation, progress))
    return records


def _score_at_clients(federation: Federation, progress: Progress) -> EvaluationRecord:
    """Ask the clients that hold out rows to score the adapter that each serves; only their totals come back.

    After the last round they score what all share as well, where it is another one: who gains by serving one's own?
    And how well does that do on rows of everybody's kind?
    """
    start = time.perf_counter()
    by_client, by_group = _ask_scores(federation, progress)
    own = federation.method.serves is not serve_sent and progress.round == federation.rounds
    shared = _ask_scores(federation, progress, shared=True)[0] if own else {}
    elsewhere: dict[str, Mapping[str, Totals]] = {}
    if own and federation.score_served is not None:
        known = what_is_known(federation.ranks, progress.rounds)
        for number, client in enumerate(by_client):
            advance("scoring what clients serve", number, len(by_client), "clients")
            elsewhere[client] = federation.score_served(progress, known[client])
    return EvaluationRecord(
        round=progress.round,
        part="clients",
        categories=add_up(item for totals in by_client.values() for item in totals.items()),
        seconds=time.perf_counter() - start,
        clients=by_client,
        groups=_several(add_up(item for totals in by_group for item in totals.items())),
        shared=shared,
        elsewhere=elsewhere,
    )


def _ask_scores(
    federation: Federation, progress: Progress, *, shared: bool = False
) -> tuple[Mapping[str, Mapping[str, Totals]], Sequence[Mapping[str, Totals]]]:
    """Return totals by category of each client that answers, and by group; of what it serves, or of what all share."""
    recipe = federation.recipe
    known = what_is_known(federation.ranks, progress.rounds)
    tasks: dict[str, Task] = {}
    for client in federation.evaluating:
        payload = _payload(federation, progress.state, known[client], progress.round)
        tasks[client] = EvaluateTask(progress.round, payload, recipe.evaluation, known[client].settled, shared)
    by_client: dict[str, Mapping[str, Totals]] = {}
    by_group: list[Mapping[str, Totals]] = []
    missed = dict.fromkeys(tasks, "it did not answer")
    for reply in _counted(AT_CLIENTS, federation.engine.ask(tasks, recipe.federation.deadline), len(tasks)):
        if reply.client not in tasks or reply.client in by_client:  # what came first counts
            continue
        try:
            totals, groups = check_scores(reply, recipe.federation.max_rows)
        except UpdateRejected as reason:
            missed[reply.client] = str(reason)
            continue
        by_client[reply.client] = totals
        by_group.append(groups)
        missed.pop(reply.client)
    for client, why in missed.items():
        text = f"Round {progress.round}: {client} did not score its rows: {why}."
        federation.watch(Note(text, warning=True))
    return by_client, by_group


def _counted(phase: str, replies: Iterator[Reply], asked: int) -> Iterator[Reply]:
    """Yield replies as they come, and tell how many clients have answered."""
    advance(phase, 0, asked, "clients")
    for number, reply in enumerate(replies, start=1):
        advance(phase, min(number, asked), asked, "clients")
        yield reply


def _several(groups: Mapping[str, Totals]) -> Mapping[str, Totals]:
    """Return totals by group where rows name at least two, else none: those of all rows say as much."""
    return groups if len(groups.keys() - {""}) > 1 else {}
