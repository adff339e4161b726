"""The survey before a round: what the server gets, what it keeps, who then trains, and what a person is told."""

import io
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from asking import survey_tasks, train_task
from rich.console import Console
from test_federate import ROWS, START, A, AddingEngine, begin, federation

from bellwether.engine.resources import UnevenClients, rows_to_train, selected_rows
from bellwether.errors import RoundFailed, UpdateRejected
from bellwether.exchange.checks import MOST_CENTROIDS, check_survey
from bellwether.exchange.messages import Reply, Survey, SurveyTask, TrainTask
from bellwether.exchange.records import ClientFailed, Note, RunStarted, SurveyFinished
from bellwether.exchange.sizes import array_bytes
from bellwether.federate import federate
from bellwether.method.cohort import Condition
from bellwether.method.method import State
from bellwether.method.survey import survey
from bellwether.recipe.contradictions import contradictions
from bellwether.recipe.recipe import Recipe, Selection, Training
from bellwether.store.history import dump_records, load_records
from bellwether.tell.live import view
from bellwether.tell.narrate import plain_lines
from bellwether.tell.status import RunStatus
from bellwether.tell.trackers import scalars

# Two groups in the plane; a's first centroid and d's only one lie in the middle of theirs.
CENTROIDS = {
    "a": [[0, 0], [10, 11]],
    "b": [[0, 1], [10, 9]],
    "c": [[0, -1]],
    "d": [[10, 10]],
}
NONE = np.zeros((0, 2), np.float32)
ADAPTER = array_bytes(START.tensors)


class SurveyedEngine(AddingEngine):
    """Clients that send given centroids; ``answers`` replaces the replies of single clients to a survey."""

    def __init__(self, faults=None, answers=None, centroids=CENTROIDS):
        super().__init__(faults)
        self.answers, self.centroids = answers or {}, centroids

    def ask(self, tasks, deadline=None):
        if not any(isinstance(task, SurveyTask) for task in tasks.values()):
            yield from super().ask(tasks, deadline)
            return
        self.tasks.append(dict(tasks))
        for client, task in tasks.items():
            points_Cd = np.array(self.centroids.get(client, NONE), np.float32).reshape(-1, 2)
            reply = Reply(client, 0.5, survey=Survey(client, task.round, points_Cd))
            yield from self.answers.get(client, lambda reply: [reply])(reply)


CHOSEN = Selection(method="hierarchical", dimensions=2)


def away(reply):
    return [Reply(reply.client, 0.0, failure="it is away", reached=False)]


def selecting(*words, **more):
    chosen = ["selection.method=hierarchical", "selection.dimensions=2", "federation.rounds=1"]
    return federation(*chosen, *words, **more)


# Who trains ---------------------------------------------------------------------------------------


def test_only_clients_with_a_kept_centroid_train_and_only_they_count():
    engine, events = SurveyedEngine(), []
    progress = federate(selecting("federation.quorum=1", engine=engine, events=events), begin())
    trained = [tasks for tasks in engine.tasks if all(isinstance(task, TrainTask) for task in tasks.values())]
    assert [{client: task.kept for client, task in tasks.items()} for tasks in trained] == [{"a": [0], "d": [0]}]
    record = progress.rounds[0]
    # By hand: of a and d alone, (10·10 + 40·40) / 50.
    np.testing.assert_allclose(progress.adapter.tensors[A], 34.0)
    assert ([client.client for client in record.clients], dict(record.left_out)) == (["a", "d"], {})
    assert (record.cohort, record.rows, record.failure) == (tuple("abcd"), 50, None)
    assert not [event for event in events if isinstance(event, ClientFailed)]


def test_the_server_gets_four_bytes_a_dimension_and_counts_all_that_travelled():
    record = federate(selecting(engine=SurveyedEngine()), begin()).rounds[0]
    # By hand: six centroids of two numbers of four bytes; the adapter to four, two numbers, the adapter to two more.
    assert record.survey.sent == {client: len(points) * 2 * 4 for client, points in CENTROIDS.items()}
    assert record.survey.bytes_up == 6 * 2 * 4
    assert record.survey.bytes_down == 4 * ADAPTER + 2 * 4
    assert (record.bytes_up, record.bytes_down) == (48 + 2 * ADAPTER, 4 * ADAPTER + 8 + 2 * ADAPTER)
    proxy = ("selection.features=proxy", "selection.proxy=p")
    assert federate(selecting(*proxy, engine=SurveyedEngine()), begin()).rounds[0].survey.bytes_down == 8


def test_centroids_that_are_refused_have_travelled_too():
    def ask(tasks):
        bad = np.full((3, 2), np.nan, np.float32)
        yield Reply("a", 0.5, survey=Survey("a", 1, bad))
        yield Reply("b", 0.5, survey=Survey("b", 1, np.zeros((2, 2), np.float32)))

    found = survey(ask, survey_tasks("ab", START, CHOSEN), CHOSEN, 1, 2)
    assert set(found.left_out) == {"a"}
    assert found.record.sent == {"a": 3 * 2 * 4, "b": 2 * 2 * 4}


def test_nothing_that_a_survey_sends_or_writes_has_room_for_rows():
    assert [field.name for field in fields(Survey)] == ["client", "round", "centroids_Cd"]
    record = federate(selecting(engine=SurveyedEngine()), begin()).rounds[0]
    assert [field.name for field in fields(record.survey)] == ["centroids", "groups", "kept", "bytes_down", "sent"]
    assert record.survey.centroids == {c: tuple(map(tuple, points)) for c, points in CENTROIDS.items()}
    assert record.survey.groups["a"][0] == record.survey.groups["c"][0] != record.survey.groups["d"][0]
    assert load_records(dump_records([record])) == (record,)


def test_seconds_and_duration_of_a_round_hold_its_survey():
    record = federate(selecting(engine=SurveyedEngine()), begin()).rounds[0]
    assert set(record.seconds) == {"survey", "train", "aggregate", "evaluate"}
    assert record.duration == 0.5 + 1.0


def test_the_order_in_which_surveys_arrive_decides_nothing():
    alike = SurveyedEngine(centroids={client: [[0, 0], [10, 10]] for client in "abcd"})

    def backwards(tasks):
        return iter(list(alike.ask(tasks))[::-1])

    tasks = survey_tasks("abcd", START, CHOSEN)
    there, back = (survey(ask, tasks, CHOSEN, 1, 2) for ask in (alike.ask, backwards))
    # Of centroids that are the same, the first client's is kept.
    assert there.kept == back.kept == {"a": [0, 1], "b": [], "c": [], "d": []}
    assert there.record == back.record


def test_without_a_survey_nobody_is_asked_for_one_and_the_record_holds_none():
    engine = SurveyedEngine()
    record = federate(selecting("selection.method=random", "selection.rows=3", engine=engine), begin()).rounds[0]
    assert not [task for tasks in engine.tasks for task in tasks.values() if isinstance(task, SurveyTask)]
    assert (record.survey, set(record.seconds)) == (None, {"train", "aggregate", "evaluate"})


def test_rivals_of_the_same_size_are_surveyed_too():
    engine = SurveyedEngine()
    federate(selecting("selection.method=random", "selection.rows=hierarchical", engine=engine), begin())
    assert [isinstance(tasks["a"], SurveyTask) for tasks in engine.tasks] == [True, False]


# Nothing selected, and faults ---------------------------------------------------------------------


@pytest.mark.parametrize("answers", [{}, {"b": away}])
def test_where_nothing_is_selected_the_adapter_stays_and_the_round_does_not_fail(answers):
    events = []
    start = replace(begin(), state=State(START.updated({key: value + 3 for key, value in START.tensors.items()})))
    engine = SurveyedEngine(answers=answers, centroids={"a": [[0, 0]], "d": [[9, 9]]})
    progress = federate(selecting("federation.rounds=2", engine=engine, events=events), start)
    assert progress.round == 2
    np.testing.assert_array_equal(progress.adapter.tensors[A], 3.0)
    assert [(one.failure, one.clients, one.rows) for one in progress.rounds] == [(None, (), 0)] * 2
    assert {one.adapter for one in progress.rounds} == {start.adapter.fingerprint()}
    assert [dict(one.left_out) for one in progress.rounds] == [dict.fromkeys(answers, "it is away")] * 2
    said = [event.text for event in events if isinstance(event, Note) and event.warning]
    assert said == [f"Round {number}: no row was selected, so the adapter stays as it is." for number in (1, 2)]


@pytest.mark.parametrize("silent", ["abcd", "bcd"])
def test_a_survey_that_too_few_answer_is_a_failed_round_with_all_reasons(silent):
    engine = SurveyedEngine(answers=dict.fromkeys(silent, away))
    with pytest.raises(RoundFailed, match=r"Round 1 failed: [01] of 4 surveys can be used, and 2 are") as caught:
        federate(selecting(engine=engine), begin())
    assert all(f"{client}: it is away" in str(caught.value) for client in silent)
    tolerant = federate(selecting("federation.failed_rounds=1", engine=engine), begin())
    assert tolerant.rounds[0].failure is not None
    np.testing.assert_array_equal(tolerant.adapter.tensors[A], START.tensors[A])


def test_an_empty_cohort_is_a_failed_round():
    with pytest.raises(RoundFailed, match="no client was there"):
        federate(selecting(engine=SurveyedEngine(), sample=lambda sampling: []), begin())


def test_a_client_whose_survey_fails_does_not_train_and_counts_for_the_quorum_of_the_survey():
    broken = {"c": lambda reply: [Reply("c", 1.0, failure="its disk is full")]}
    events = []
    progress = federate(selecting(engine=SurveyedEngine(answers=broken), events=events), begin())
    assert dict(progress.rounds[0].left_out) == {"c": "its disk is full"}
    assert [event.client for event in events if isinstance(event, ClientFailed)] == ["c"]
    with pytest.raises(RoundFailed, match=r"3 of 4 surveys can be used, and 4 are needed \(c: its disk is full\)"):
        federate(selecting("federation.quorum=1", engine=SurveyedEngine(answers=broken)), begin())


def test_of_a_survey_that_enough_answer_only_those_count_that_are_asked_to_train():
    # Two are away and two answer, which is a quorum of four; of these one trains, which is a quorum of one.
    centroids = {"a": [[0, 0], [0, 1], [10, 10], [10, 11]], "b": [[90, 90]]}
    engine = SurveyedEngine(answers={"c": away, "d": away}, centroids=centroids)
    record = federate(selecting(engine=engine), begin()).rounds[0]
    assert record.failure is None
    assert [one.client for one in record.clients] == ["a"]
    assert set(record.left_out) == {"c", "d"}


def test_a_client_that_answers_the_survey_twice_is_heard_once_and_trains():
    def twice(reply):
        return [reply, replace(reply, survey=replace(reply.survey, centroids_Cd=reply.survey.centroids_Cd + 50))]

    once = federate(selecting(engine=SurveyedEngine()), begin())
    progress = federate(selecting(engine=SurveyedEngine(answers={"a": twice})), begin())
    assert progress.rounds[0].survey == once.rounds[0].survey
    assert (progress.rounds[0].clients, progress.rounds[0].left_out) == (once.rounds[0].clients, {})


def test_a_client_with_one_bad_survey_spoils_none_of_the_others():
    wide = {"a": lambda reply: [replace(reply, survey=Survey("a", 1, np.zeros((3, 7), np.float32)))]}
    record = federate(selecting(engine=SurveyedEngine(answers=wide)), begin()).rounds[0]
    assert dict(record.left_out) == {"a": "its centroids have 7 dimensions, where 2 are due"}
    assert set(record.survey.centroids) == set("bcd")


def good(**changes):
    return replace(Survey("a", 3, np.ones((2, 4), np.float32)), **changes)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("a", 1, failure="no power"), "no power"),
        (Reply("a", 1), "it sent no survey"),
        (Reply("a", 1, survey=good(client="b")), "its survey is signed 'b'"),
        (Reply("a", 1, survey="centroids"), "it sent str in place of a survey"),
        (Reply("a", 1, survey=good(round=2)), "belongs to round 2, not 3"),
        (Reply("a", 1, survey=good(centroids_Cd=[[1.0] * 4])), "no float32 matrix"),
        (Reply("a", 1, survey=good(centroids_Cd=np.ones((2, 4)))), "no float32 matrix"),
        (Reply("a", 1, survey=good(centroids_Cd=np.ones(4, np.float32))), "no float32 matrix"),
        (Reply("a", 1, survey=good(centroids_Cd=np.ones((2, 0), np.float32))), "no dimension"),
        (Reply("a", 1, survey=good(centroids_Cd=np.ones((MOST_CENTROIDS + 1, 4), np.float32))), "10,001 centroids"),
        (Reply("a", 1, survey=good(centroids_Cd=np.full((2, 4), np.nan, np.float32))), "not finite"),
        (Reply("a", 1, survey=good(centroids_Cd=np.full((2, 4), np.inf, np.float32))), "not finite"),
        (Reply("a", 1, survey=good(centroids_Cd=np.ones((2, 5), np.float32))), "5 dimensions, where 4 are due"),
    ],
)
def test_a_bad_survey_is_refused_with_its_reason(reply, reason):
    with pytest.raises(UpdateRejected) as caught:
        check_survey(reply, 3, 4)
    assert reason in str(caught.value)


def test_good_surveys_pass():
    survey = good()
    assert check_survey(Reply("a", 1, survey=survey), 3, 4) is survey.centroids_Cd
    empty = Reply("a", 1, survey=good(centroids_Cd=np.zeros((0, 4), np.float32)))
    assert len(check_survey(empty, 3, 9)) == 0


def test_surveys_of_clients_that_were_not_asked_or_have_answered_do_not_count():
    def ask(tasks):
        for client, at in (("a", 0.0), ("z", 5.0), ("a", 9.0)):
            yield Reply(client, 0.5, survey=Survey(client, 1, np.full((1, 2), at, np.float32)))

    found = survey(ask, survey_tasks("ab", START, CHOSEN), CHOSEN, 1, 2)
    assert found.record.centroids == {"a": ((0.0, 0.0),)}
    assert found.left_out == {"b": "it did not answer"}


def test_where_features_stay_as_they_are_their_width_is_known_and_nobody_else_decides_on_it():
    wide = {"a": lambda reply: [replace(reply, survey=Survey("a", 1, np.zeros((3, 7), np.float32)))]}
    engine = SurveyedEngine(answers=wide)  # a answers first
    record = federate(selecting("selection.space=none", engine=engine), begin()).rounds[0]
    assert dict(record.left_out) == {"a": "its centroids have 7 dimensions, where 2 are due"}


# Simulated resources ------------------------------------------------------------------------------


def test_who_is_away_answers_no_survey_and_who_drops_out_or_is_late_does_so_after_it():
    # Every kept cluster gives 30 rows: a needs 30/5 s, d 30/100 s; only a is too slow for 2 s.
    conditions = {"a": Condition(True, 5.0, False), "b": Condition(False, 5.0, False)}
    trace = lambda client, round: conditions.get(client, Condition(True, 100.0, client == "d"))  # noqa: E731
    centroids = {"a": [[0, 0]], "b": [[0, 0.5]], "c": [[0, 1], [10, 9]], "d": [[10, 10], [10, 11], [0, -1]]}
    engine = SurveyedEngine(centroids=centroids)
    uneven = UnevenClients(engine.ask, {client: [None] * 40 for client in ROWS}, trace)
    words = ("selection.rows_per_cluster=30", "federation.availability.away=0", "federation.deadline=2")
    record = federate(selecting(*words, "federation.failed_rounds=1", engine=uneven), begin()).rounds[0]
    assert list(engine.tasks[0]) == ["a", "c", "d"]
    assert record.survey.kept == {"a": (0,), "c": (), "d": (0,)}
    assert dict(record.left_out) == {
        "b": "it is away",
        "a": "it would need 6.0 s, and the deadline is 2 s",
        "d": "it dropped out in mid-round",
    }
    assert record.survey.bytes_down == 3 * ADAPTER + 2 * 4  # b was not reached


@pytest.mark.parametrize(
    ("selection", "rows"),
    [
        (Selection(), 40),
        (Selection(method="hierarchical"), 3),
        (Selection(method="hierarchical", rows_per_cluster=20), 40),
        (Selection(method="hierarchical", rows=7), 7),
        (Selection(method="random", rows=100), 40),
        (Selection(method="random", rows="hierarchical", rows_per_cluster=2), 6),
        (Selection(method="random", fraction=0.11), 5),
    ],
)
def test_simulated_work_is_that_of_the_selected_rows(selection, rows):
    assert selected_rows(40, 3, selection) == rows
    assert rows_to_train(rows, train_task(START, Training(local_epochs=2))) == 2 * rows


# What a person sees -------------------------------------------------------------------------------


def empty_round():
    return federate(selecting(engine=SurveyedEngine(centroids={})), begin()).rounds[0]


def test_lines_and_trackers_say_in_words_that_nothing_was_selected():
    lines: list[str] = []
    watch = plain_lines(lines.append, clock=lambda: 0.0)
    watch(RunStarted("n", "f", 1, 0, 4, 4))
    federate(selecting(engine=SurveyedEngine(centroids={}), events=(events := [])), begin())
    for event in events:
        watch(event)
    assert "round 1: 0 centroids (0 B) of 4 clients, 0 kept at 0 of them" in lines
    assert "round 1 of 1: no row was selected, the adapter stays as it was" in lines
    assert not [line for line in lines if "nan" in line.lower()]
    assert "train/loss" not in scalars(empty_round())
    assert "nan" not in json.dumps(scalars(empty_round())).lower()


def drawn(events, ascii_only=False):
    ticks = iter(range(1000))
    status, out = RunStatus(clock=lambda: float(next(ticks))), io.StringIO()
    for event in [RunStarted("n", "f", 1, 0, 4, 4), *events]:
        status.take(event)
    Console(file=out, width=100).print(view(status, 100, 30, ascii_only))
    return status, out.getvalue()


def test_the_live_view_tells_who_has_no_selected_row_and_counts_them_as_done():
    federate(selecting(engine=SurveyedEngine(), events=(events := [])), begin())
    told = next(number for number, event in enumerate(events) if isinstance(event, SurveyFinished))
    status, text = drawn(events[: told + 1])
    assert status.idle == {"b", "c"}
    assert text.count("no row was selected") == 2
    assert text.count("asked") == 2
    federate(selecting(engine=SurveyedEngine(centroids={}), events=(events := [])), begin())
    status, text = drawn(events)
    assert (status.losses, "nan" in text) == ([], False)


def test_the_speed_is_that_of_training_without_the_survey():
    federate(selecting(engine=SurveyedEngine(), events=(events := [])), begin())
    now = 0.0
    status = RunStatus(clock=lambda: now)
    for event in events:
        now += 100.0 if isinstance(event, SurveyFinished) else 1.0
        status.take(event)
    assert status.training == 2.0  # of two clients


# Fields that contradict each other ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "field", "text"),
    [
        ({"method": "random", "rows": 3, "fraction": 0.5}, "fraction", "both given; give one of them"),
        ({"method": "k_center"}, "rows", "is k_center, which must be told how many rows"),
        ({"method": "a.b:c"}, "rows", "is a.b:c, which must be told how many rows"),
        ({"method": "hierarchical", "rows": 3, "rows_per_cluster": 2}, "rows_per_cluster", "leave one of them out"),
        ({"method": "hierarchical", "fraction": 0.1, "rows_per_cluster": 2}, "rows_per_cluster", "leave one of them"),
        ({"method": "hierarchical", "rows": "hierarchical"}, "rows", "is for other methods; give a number or null"),
        ({"method": "hierarchical", "features": "proxy"}, "proxy", "features is proxy, and selection.proxy null"),
        ({"method": "hierarchical", "proxy": "p"}, "proxy", "features is model, and selection.proxy p"),
        (
            {"method": "hierarchical", "projection_sources": ["p"], "space": "none"},
            "projection_sources",
            "space is none; set it to shared",
        ),
        ({"method": "hierarchical", "noise": 1}, "noise", "without selection.clip_norm no amount of noise is enough"),
        (
            {"method": "hierarchical", "noise": 1, "clip_norm": 1, "space": "per_client_tsne"},
            "noise",
            "a t-SNE may move a centroid anywhere",
        ),
    ],
)
def test_fields_of_a_selection_that_cannot_stand_together_are_told_in_a_sentence(selection, field, text):
    found = contradictions(Recipe.model_validate({"selection": selection}))
    assert [location for location, _ in found] == [("selection", field)]
    assert text in found[0][1]
    assert found[0][1].endswith(".")


def test_full_needs_none_of_the_fields_of_selection():
    assert not contradictions(Recipe.model_validate({"selection": {"rows": 3, "fraction": 0.5, "noise": 1}}))
