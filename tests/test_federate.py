from dataclasses import replace

import numpy as np
import pytest
import torch
from rounding import gamma

from bellwether.errors import RoundFailed
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.messages import EvaluateTask, Reply, Update
from bellwether.exchange.records import ClientFailed, Evaluated, RoundFinished, RoundStarted
from bellwether.exchange.scores import Totals
from bellwether.federate import Federation, Progress, federate
from bellwether.method.average import fedavg
from bellwether.method.method import Method, State, by_rows
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.tools.randomness import Randomness

A, B = key_a("q"), key_b("q")
START = Adapter(AdapterConfig(1, 1.0, 0.0, ("q",)), {A: np.zeros((1, 2), np.float32), B: np.zeros((2, 1), np.float32)})
ROWS = {"a": 10, "b": 20, "c": 30, "d": 40}


class AddingEngine:
    """Clients that add their number of rows to every value; ``faults`` replaces single replies."""

    def __init__(self, faults=None):
        self.faults = faults or {}
        self.tasks = []

    def ask(self, tasks, deadline=None):
        self.tasks.append(dict(tasks))
        for client, task in tasks.items():
            if isinstance(task, EvaluateTask):
                totals = {"x": Totals(rows=1, tokens=2, loss=4.0)}
                groups = {"north" if client in "ab" else "south": Totals(rows=1, tokens=2, loss=ROWS[client])}
                yield Reply(client, 0.1, totals=totals, groups=groups)
                continue
            tensors = {key: value + np.float32(ROWS[client]) for key, value in task.adapter.tensors.items()}
            reply = Reply(
                client, 1.0, update=Update(client, task.round, tensors, ROWS[client], {"loss": 2, "tokens": 7})
            )
            fault = self.faults.get((task.round, client), lambda reply: [reply])
            yield from fault(reply)


def federation(
    *overrides, engine=None, sample=None, method=None, committed=None, events=None, evaluating=(), groups=()
):
    recipe = load_recipe(None, ["federation.rounds=3", "federation.fraction=1", *overrides])
    return Federation(
        recipe=recipe,
        engine=engine or AddingEngine(),
        ranks=dict.fromkeys(ROWS, 1),
        evaluating=evaluating,
        sample=sample or (lambda sampling: sampling.clients),
        method=method or fedavg(),
        score=lambda round, state: ({"x": Totals(rows=1, tokens=1, loss=float(round))}, dict(groups)),
        commit=(committed if committed is not None else []).append,
        watch=(events if events is not None else []).append,
        width=2,
    )


def begin() -> Progress:
    return Progress(0, State(START))


def test_rounds_add_the_weighted_mean_of_the_clients_changes():
    progress = federate(federation(), begin())
    # By hand: each round adds (10·10 + 20·20 + 30·30 + 40·40) / 100 = 30.
    assert progress.round == 3
    np.testing.assert_allclose(progress.adapter.tensors[A], 90.0)
    assert [record.rows for record in progress.rounds] == [100, 100, 100]
    assert [record.tokens for record in progress.rounds] == [28, 28, 28]


def test_every_round_is_committed_after_its_evaluation():
    committed = []
    federate(federation("evaluation.every=2", committed=committed), begin())
    assert [progress.round for progress in committed] == [0, 1, 2, 3]
    assert [[record.round for record in progress.evaluations] for progress in committed] == [
        [0],
        [0],
        [0, 2],
        [0, 2, 3],
    ]


def test_going_on_from_a_commit_gives_the_same_as_never_stopping():
    committed = []
    whole = federate(federation(committed=committed), begin())
    rest = federate(federation(), committed[1])
    assert rest.adapter.fingerprint() == whole.adapter.fingerprint()
    assert [record.round for record in rest.rounds] == [1, 2, 3]


def test_events_tell_the_round_in_its_order():
    events = []
    federate(federation("federation.rounds=1", events=events), begin())
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Evaluated", "RoundStarted", *["ClientFinished"] * 4, "RoundFinished", "Evaluated"]
    assert isinstance(events[1], RoundStarted)
    assert isinstance(events[-2], RoundFinished)
    assert isinstance(events[0], Evaluated)


def spoiled(reply):
    tensors = {**reply.update.tensors, B: np.full((2, 1), np.nan, np.float32)}
    return [Reply(reply.client, 1.0, update=Update(reply.client, reply.update.round, tensors, 40))]


def twice(reply):
    return [reply, reply]


def impostor(reply):
    update = reply.update
    return [Reply(reply.client, 1.0, update=Update("b", update.round, update.tensors, update.rows))]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (spoiled, "not finite"),
        (impostor, "signed 'b'"),
        (lambda reply: [], "did not answer"),
        (lambda reply: [Reply(reply.client, 1.0, failure="the disk is on fire")], "on fire"),
        (lambda reply: [Reply(reply.client, 9.0, update=reply.update)], "it took 9.0 s, and the deadline is 5 s"),
    ],
)
def test_an_update_that_cannot_be_used_is_left_out_with_its_reason(fault, reason):
    events = []
    engine = AddingEngine({(1, "d"): fault})
    progress = federate(
        federation(
            "federation.rounds=1",
            "federation.availability.away=0",
            "federation.deadline=5",
            engine=engine,
            events=events,
        ),
        begin(),
    )
    # By hand, without d: (100 + 400 + 900) / 60.
    np.testing.assert_allclose(progress.adapter.tensors[A], 1400 / 60, rtol=gamma(torch.float32, 1))
    assert reason in progress.rounds[0].left_out["d"]
    assert any(isinstance(event, ClientFailed) and event.client == "d" for event in events)


def test_a_reply_that_comes_twice_counts_once():
    engine = AddingEngine({(1, "d"): twice})
    progress = federate(federation("federation.rounds=1", engine=engine), begin())
    np.testing.assert_allclose(progress.adapter.tensors[A], 30.0)


def test_a_round_below_its_quorum_fails_with_all_reasons():
    silent = dict.fromkeys([(2, "a"), (2, "b"), (2, "c")], lambda reply: [Reply(reply.client, 1, failure="no power")])
    committed = []
    with pytest.raises(RoundFailed) as caught:
        federate(federation(engine=AddingEngine(silent), committed=committed), begin())
    for text in ("Round 2 failed: 1 of 4", "2 are needed", "a: no power", "b: no power", "c: no power"):
        assert text in str(caught.value)
    assert [progress.round for progress in committed] == [0, 1]


def test_a_tolerated_failed_round_keeps_the_adapter():
    silent = {(2, client): (lambda reply: []) for client in ROWS}
    progress = federate(federation("federation.failed_rounds=1", engine=AddingEngine(silent)), begin())
    assert progress.rounds[1].failure is not None
    assert progress.rounds[1].adapter == progress.rounds[0].adapter
    np.testing.assert_allclose(progress.adapter.tensors[A], 60.0)


def test_an_empty_cohort_is_a_failed_round_and_never_a_zero_adapter():
    with pytest.raises(RoundFailed, match="no client was there"):
        federate(federation(sample=lambda sampling: []), begin())


@pytest.mark.parametrize(
    ("cohort", "what"),
    [
        (["a", "z"], "'z', which is no client"),
        (["a", "a"], "a client twice"),
        (None, "returned a NoneType; return names of clients"),
        ("a", "returned a str; return names of clients"),
    ],
)
def test_a_sampler_that_returns_nonsense_is_refused(cohort, what):
    with pytest.raises(RoundFailed, match=what):
        federate(federation(sample=lambda sampling: cohort), begin())


def closing(close):
    return Method(close, weigh=by_rows)


def changed(change):
    def close(closing):
        adapter = closing.state.adapter
        return State(adapter.with_tensors({key: change(value) for key, value in adapter.tensors.items()}))

    return close


@pytest.mark.parametrize(
    "rule",
    [
        changed(lambda value: value * np.nan),
        changed(lambda value: value[:, :1]),
        changed(lambda value: value.astype(np.float64)),
        lambda closing: State(closing.state.adapter.with_tensors({})),
        lambda closing: State(None),
        lambda closing: None,
    ],
)
def test_a_method_that_returns_no_like_adapter_is_refused(rule):
    with pytest.raises(RoundFailed, match="the method fedavg returned"):
        federate(federation(method=closing(rule)), begin())


def test_the_state_of_a_method_is_handed_from_round_to_round():
    def counting(closing):
        return State(closing.state.adapter, {"rounds": closing.state.arrays.get("rounds", 0) + 1})

    assert federate(federation(method=closing(counting)), begin()).state.arrays == {"rounds": 3}


def test_clients_score_their_own_rows_through_the_engine_and_only_totals_come_back():
    engine = AddingEngine()
    progress = federate(federation("federation.rounds=1", engine=engine, evaluating=["a", "c"]), begin())
    asked = [list(tasks) for tasks in engine.tasks if any(isinstance(task, EvaluateTask) for task in tasks.values())]
    assert asked == [["a", "c"], ["a", "c"]]
    own = [record for record in progress.evaluations if record.part == "clients"]
    assert own[-1].categories["x"] == Totals(rows=2, tokens=4, loss=8.0)
    assert set(own[-1].clients) == {"a", "c"}


def test_totals_of_clients_that_hold_one_group_each_are_added_up_by_group():
    progress = federate(federation("federation.rounds=1", evaluating=["a", "b", "c"]), begin())
    own = [record for record in progress.evaluations if record.part == "clients"][-1]
    assert own.groups == {"north": Totals(rows=2, tokens=4, loss=10 + 20), "south": Totals(rows=1, tokens=2, loss=30)}


@pytest.mark.parametrize(
    ("groups", "kept"),
    [
        ({"en": Totals(1), "fr": Totals(2)}, {"en": Totals(1), "fr": Totals(2)}),
        ({"": Totals(3), "en": Totals(1), "fr": Totals(2)}, {"": Totals(3), "en": Totals(1), "fr": Totals(2)}),
        ({"en": Totals(5)}, {}),
        ({"": Totals(3), "en": Totals(1)}, {}),
        ({}, {}),
    ],
)
def test_scores_by_group_are_kept_where_rows_name_several(groups, kept):
    progress = federate(federation("federation.rounds=1", groups=groups), begin())
    assert [record.groups for record in progress.evaluations] == [kept, kept]


def test_clients_of_one_group_have_no_scores_by_group():
    progress = federate(federation("federation.rounds=1", evaluating=["a", "b"]), begin())
    assert [record.groups for record in progress.evaluations if record.part == "clients"] == [{}, {}]


def test_the_task_carries_the_runs_rounds_and_own_draws_and_the_record_the_rate_at_the_rounds_beginning():
    engine = AddingEngine()
    fields = ("seed=9", "training.learning_rate=0.4", "federation.rounds=2")
    progress = federate(federation(*fields, engine=engine), begin())
    tasks = [tasks["a"] for tasks in engine.tasks]
    assert [(task.round, task.rounds) for task in tasks] == [(1, 2), (2, 2)]
    assert [record.learning_rate for record in progress.rounds] == [0.4, 0.2]
    drawn = Randomness(9).numpy("batch order", round=2, client="a").random()
    assert tasks[1].draws.numpy("batch order").random() == drawn
    assert Recipe().training.batch_size == tasks[0].training.batch_size


def test_an_error_in_a_persons_own_function_is_one_sentence_that_names_its_place():
    def broken(closing):
        return 1 / 0

    with pytest.raises(RoundFailed) as caught:
        federate(federation(method=closing(broken)), begin())
    assert "Round 1: the method fedavg" in str(caught.value)
    assert "test_federate.py:" in str(caught.value)
    assert "ZeroDivisionError: division by zero" in str(caught.value)


@pytest.mark.parametrize(
    ("quorum", "clients", "needed"),
    [(0.14, 50, 7), (0.28, 25, 7), (0.55, 100, 55), (0.07, 100, 7), (0.5, 5, 3), (0.01, 5, 1)],
)
def test_a_quorum_needs_its_share_of_the_cohort_and_not_one_more(monkeypatch, quorum, clients, needed):
    names = [f"c{number}" for number in range(clients)]
    for silent, fails in ((clients - needed, False), (clients - needed + 1, True)):
        faults = {(1, name): (lambda reply: []) for name in names[:silent]}
        engine = AddingEngine(faults)
        ours = federation(f"federation.quorum={quorum}", "federation.rounds=1", engine=engine)
        ours = replace(ours, ranks=dict.fromkeys(names, 1))
        for name in names:
            monkeypatch.setitem(ROWS, name, 1)
        if fails:
            with pytest.raises(RoundFailed, match=f"{needed} are needed"):
                federate(ours, begin())
        else:
            assert federate(ours, begin()).rounds[0].failure is None


def test_a_method_that_remembers_no_mapping_is_refused_before_anything_is_committed():
    committed = []
    forgetful = closing(lambda closing: State(closing.state.adapter, None))
    with pytest.raises(RoundFailed, match="returned a NoneType as what it remembers"):
        federate(federation(method=forgetful, committed=committed), begin())
    assert [progress.round for progress in committed] == [0]


def test_a_rounds_seconds_are_told_by_phase():
    progress = federate(federation(), begin())
    assert all(set(record.seconds) == {"train", "aggregate", "evaluate"} for record in progress.rounds)
    assert all(value >= 0 for record in progress.rounds for value in record.seconds.values())


def test_bytes_are_sent_down_only_to_clients_that_the_task_reached():
    def away(reply):
        return [Reply(reply.client, 0.0, failure="it is away", reached=False)]

    all_there = federate(federation("federation.rounds=1"), begin()).rounds[0]
    one_away = federate(federation("federation.rounds=1", engine=AddingEngine({(1, "d"): away})), begin()).rounds[0]
    assert one_away.bytes_down == all_there.bytes_down * 3 // 4
    assert one_away.bytes_up == all_there.bytes_up * 3 // 4


def test_a_rounds_loss_of_pairs_is_the_mean_over_pairs_whatever_their_lengths():
    told = {"a": (0.1, 1000, 10), "b": (0.7, 100, 10), "c": (0.4, 50, 20), "d": (0.4, 50, 20)}

    def telling(client):
        loss, tokens, rows = told[client]
        figures = {"loss": loss, "tokens": tokens, "rows": rows, "preferred": 0.5, "margin": 0.0}
        return lambda reply: [replace(reply, update=replace(reply.update, metrics=figures))]

    engine = AddingEngine({(1, client): telling(client) for client in told})
    (record,) = federate(federation("federation.rounds=1", engine=engine), begin()).rounds
    asked = [told[one.client] for one in record.clients]
    assert record.loss == pytest.approx(sum(loss * rows for loss, _, rows in asked) / sum(rows for *_, rows in asked))
