"""The strict check of every kind of reply: what a client may send, and a table of forged ones."""

import json

import numpy as np
import pytest
from test_federate import AddingEngine, begin, federation

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.checks import check_scores, check_seconds, check_update
from bellwether.exchange.messages import Payload, Reply, Update
from bellwether.exchange.records import Note
from bellwether.exchange.scores import Totals
from bellwether.exchange.sizes import array_bytes, update_bytes
from bellwether.federate import federate

A, B = key_a("m.0.q"), key_b("m.0.q")
BIG = 10**400
ENDLESS = 10**5000  # of more digits than Python writes
HIDDEN = np.ma.masked_array(np.full((2, 3), np.nan, np.float32), mask=True)


def adapter() -> Adapter:
    draw = np.random.default_rng(0)
    tensors = {A: draw.normal(size=(2, 3)).astype(np.float32), B: draw.normal(size=(4, 2)).astype(np.float32)}
    return Adapter(AdapterConfig(2, 4.0, 0.0, ("m.0.q",)), tensors)


CONTROL = {"control": np.zeros(14, np.float32)}


def update(**changes) -> Update:
    values = {"client": "a", "round": 3, "tensors": dict(adapter().tensors), "rows": 5, "metrics": {"loss": 1.0}}
    return Update(**{**values, **changes})


def check(candidate, *, returns=None, payload=None, failure=None):
    reply = Reply("a", 1.0, update=candidate, failure=failure)
    return check_update(reply, payload or Payload(adapter()), returns or {}, 3, 100, 1e4)


def changed(key, value):
    return {**adapter().tensors, key: value}


def test_bytes_are_those_of_all_values_and_of_their_description():
    # By hand: 14 values of four bytes, and the description as JSON.
    description = json.dumps([(A, (2, 3)), (B, (4, 2))]).encode()
    assert array_bytes(adapter().tensors) == 4 * 14 + len(description)
    with_more = update(arrays=CONTROL)
    assert update_bytes(with_more) - update_bytes(update()) == 4 * 14 + len(b', ["control", [14]]')


def test_a_good_update_passes_as_it_is():
    good = update(arrays=CONTROL, metrics={"loss": 1.0, "tokens": 12.0, "rows": 7.0, "selected": 5.0, "own": -3})
    assert check(good, returns={"control": (14,)}) is good


def test_only_the_tensors_that_shall_come_back_do():
    half = Payload(adapter(), trained=(B,))
    assert check(update(tensors={B: adapter().tensors[B]}), payload=half).tensors.keys() == {B}
    with pytest.raises(UpdateRejected, match="lora_A.weight\\) unknown"):
        check(update(), payload=half)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": "b"}, "its update is signed 'b'"),
        ({"client": ["a"] * 9**6}, "its update is signed ["),
        ({"round": 2}, "belongs to round 2"),
        ({"round": True}, "belongs to round True"),
        ({"client": np.array(["a"])}, "its update is signed array"),
        ({"client": np.array(["a", "b"])}, "its update is signed array"),
        ({"client": (ENDLESS,)}, "its update is signed a tuple that cannot be written"),
        ({"round": np.array([3])}, "belongs to round array"),
        ({"round": np.array([3, 4])}, "belongs to round array"),
        ({"round": 3.0}, "belongs to round 3.0"),
        ({"round": [ENDLESS]}, "belongs to round a list that cannot be written"),
        ({"rows": [ENDLESS]}, "claims a list that cannot be written rows"),
        ({"rows": 0}, "claims 0 rows"),
        ({"rows": -1}, "claims -1 rows"),
        ({"rows": 10**12}, "claims 1000000000000 rows"),
        ({"rows": BIG}, "claims a number of 1329 bits rows"),
        ({"rows": True}, "claims True rows"),
        ({"rows": 2.0}, "claims 2.0 rows"),
        ({"rows": "5"}, "claims '5' rows"),
        ({"tensors": None}, "its tensors are NoneType, not a mapping"),
        ({"tensors": [1, 2]}, "its tensors are list, not a mapping"),
        ({"tensors": "tensors"}, "its tensors are str, not a mapping"),
        ({"tensors": {A: adapter().tensors[A]}}, "1 (base_model.model.m.0.q.lora_B.weight) missing"),
        ({"tensors": {**adapter().tensors, 7: 1}}, "its tensors are dict, not a mapping of texts to arrays"),
        ({"tensors": {**adapter().tensors, ENDLESS: np.zeros(1, np.float32)}}, "not a mapping of texts to arrays"),
        ({"tensors": changed(A, HIDDEN)}, "is MaskedArray, not float32"),
        ({"metrics": {"loss": [ENDLESS]}}, "its 'loss' is a list that cannot be written"),
        ({"metrics": {(ENDLESS,): 1.0}}, "it names a figure a tuple that cannot be written"),
        ({"metrics": {"tokens": 5}}, "it tells of trained tokens and not of their loss"),
        ({"tensors": changed("x", np.zeros(1, np.float32))}, "1 (x) unknown"),
        ({"tensors": changed(A, np.zeros((1,), np.float32))}, "has shape (1,)"),
        ({"tensors": changed(A, np.zeros((4, 3), np.float32))}, "has shape (4, 3), not (2, 3)"),
        ({"tensors": changed(A, np.zeros((2, 3), np.float64))}, "is float64, not float32"),
        ({"tensors": changed(A, np.zeros((2, 3), object))}, "is object, not float32"),
        ({"tensors": changed(A, [[0.0] * 3] * 2)}, "is list"),
        ({"tensors": changed(A, None)}, "is NoneType"),
        ({"tensors": changed(A, "zeros")}, "is str"),
        ({"tensors": changed(B, np.full((4, 2), np.nan, np.float32))}, "8 values that are not finite"),
        ({"tensors": changed(B, np.full((4, 2), np.inf, np.float32))}, "not finite"),
        ({"tensors": changed(B, np.full((4, 2), 3e38, np.float32))}, "its change has a norm of 8.49e+38"),
        (
            {"arrays": {"extra": np.zeros(2_000_000, np.float32)}},
            "its arrays are not those due: none missing, 1 (extra)",
        ),
        ({"arrays": None}, "its arrays are NoneType"),
        ({"metrics": None}, "its figures are no mapping"),
        ({"metrics": {f"f{n}": 1.0 for n in range(99)}}, "no mapping of at most 32 names"),
        ({"metrics": {"x" * 10_000: 1.0}}, "it names a figure 'x"),
        ({"metrics": {3: 1.0}}, "it names a figure 3"),
        ({"metrics": {"tokens": float("inf")}}, "not a finite number"),
        ({"metrics": {"loss": float("nan")}}, "not a finite number"),
        ({"metrics": {"loss": "0"}}, "not a finite number"),
        ({"metrics": {"loss": True}}, "not a finite number"),
        ({"metrics": {"loss": BIG}}, "its 'loss' is a number of 1329 bits, not a finite number"),
        ({"metrics": {"loss": 1e308}}, "its 'loss' is 1e+308, where -1000000 to 1000000 are believed"),
        ({"metrics": {"tokens": -1}}, "its 'tokens' is -1, where 0 to"),
        ({"metrics": {"tokens": 1e300}}, "its 'tokens' is 1e+300"),
        ({"metrics": {"rows": -2.0}}, "its 'rows' is -2.0"),
        ({"metrics": {"selected": 101}}, "its 'selected' is 101, where 0 to 100"),
    ],
)
def test_a_forged_update_is_refused_with_its_reason(changes, reason):
    with pytest.raises(UpdateRejected) as caught:
        check(update(**changes))
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400
    assert isinstance(update_bytes(update(**changes)), int)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "its arrays are not those due: 1 (control) missing"),
        ({"control": np.zeros(13, np.float32)}, "control has shape (13,), not (14,)"),
        ({"control": np.zeros(14)}, "control is float64, not float32"),
        ({"control": np.full(14, np.nan, np.float32)}, "control holds 14 values that are not finite"),
        ({"control": np.full(14, 1e6, np.float32)}, "control has a norm of 3.74e+06"),
    ],
)
def test_arrays_beside_the_adapter_are_checked_like_it(arrays, reason):
    with pytest.raises(UpdateRejected) as caught:
        check(update(arrays=arrays), returns={"control": (14,)})
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("sent", "failure", "reason"),
    [
        (None, None, "it sent no update"),
        ("update", None, "it sent str in place of an update"),
        (None, "the\ndisk " + "x" * 9999, "the disk xxx"),
        (None, [ENDLESS], "a list that cannot be written"),
    ],
)
def test_what_is_no_update_is_refused(sent, failure, reason):
    with pytest.raises(UpdateRejected) as caught:
        check(sent, failure=failure)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, "1", None, True, BIG])
def test_no_time_is_no_time(seconds):
    with pytest.raises(UpdateRejected, match="seconds are no time"):
        check_seconds(Reply("a", seconds), 10.0)


def scores(**changes):
    return Reply("a", 1.0, **{"totals": {"x": Totals(4, 40, 80.0, 4, 2.0, 1)}, **changes})


def test_good_scores_pass():
    groups = {"en": Totals(3, 30, 60.0, 3, 1.5, 1), "fr": Totals(1, 10, 20.0, 1, 0.5, 0)}
    totals, kept = check_scores(scores(groups=groups), 100)
    assert (totals["x"].rows, kept) == (4, groups)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"totals": None}, "it sent no scores"),
        ({"totals": None, "failure": "no power"}, "no power"),
        ({"totals": [1]}, "its scores are no mapping"),
        ({"totals": {f"c{n}": Totals() for n in range(1001)}}, "at most 1000 names of category"),
        ({"totals": {"x" * 201: Totals()}}, "it names a category 'x"),
        ({"totals": {3: Totals()}}, "it names a category 3"),
        ({"totals": {"x": 4}}, "the category 'x' has int in place of totals"),
        ({"totals": {"x": Totals(rows=10**12)}}, "claims 1000000000000 rows in the category 'x'"),
        ({"totals": {"x": Totals(rows=-1)}}, "claims -1 rows"),
        ({"totals": {"x": Totals(rows=60), "y": Totals(rows=60)}}, "claims 120 scored rows, where 100 are believed"),
        ({"totals": {"x": Totals(1, True)}}, "claims True tokens"),
        ({"totals": {"x": Totals(1, 10, float("nan"))}}, "has a loss of nan in all"),
        ({"totals": {"x": Totals(1, 10, BIG)}}, "has a loss of a number of 1329 bits in all"),
        ({"totals": {"x": Totals(1, 10, 1e308)}}, "has a loss of 1e+308 in all"),
        ({"totals": {"x": Totals(1, 10, -1.0)}}, "has a loss of -1.0 in all"),
        ({"totals": {"x": Totals(1, 10, 1.0, 2)}}, "has more answers than rows"),
        ({"totals": {"x": Totals(4, 10, 1.0, 1, 1.0, 4)}}, "or more right ones than answers"),
        ({"totals": {"x": Totals(0, 2**40, 2.0**40)}}, "has 1,099,511,627,776 tokens in 0 rows"),
        ({"totals": {"x": Totals([ENDLESS])}}, "claims a list that cannot be written rows"),
        ({"totals": None, "failure": ENDLESS}, "a number of 16610 bits"),
        ({"totals": {"x": Totals(1, 10, 1.0, 1, 7.0)}}, "has a rouge_l of 7.0 in all"),
        ({"groups": {"en": Totals(rows=3)}}, "its groups have 3 rows together, and its categories 4"),
        ({"groups": {"en": Totals(rows=4), "en2": Totals(rows=4)}}, "its groups have 8 rows together"),
        ({"groups": 7}, "no mapping of at most 1000 names of group"),
    ],
)
def test_forged_scores_are_refused_with_their_reason(changes, reason):
    with pytest.raises(UpdateRejected) as caught:
        check_scores(scores(**changes), 100)
    assert reason in str(caught.value)


# In the round loop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forged",
    [
        {"tensors": [1.0]},
        {"tensors": None},
        {"metrics": {"loss": BIG}},
        {"metrics": {"loss": 1e308, "tokens": 1}},
        {"metrics": {"tokens": -(10**9)}},
        {"rows": BIG},
        {"client": np.array(["d", "d"])},
        {"metrics": {"tokens": 7}},
        {"arrays": {"extra": np.full(2_000_000, np.nan, np.float32)}},
    ],
    ids=str,
)
def test_a_forged_reply_never_ends_a_run_and_never_reaches_the_method(forged):
    def forge(reply):
        values = {"client": "d", "round": 1, "tensors": reply.update.tensors, "rows": 40}
        return [Reply("d", 1.0, update=Update(**{**values, **forged}))]

    progress = federate(federation("federation.rounds=1", engine=AddingEngine({(1, "d"): forge})), begin())
    (record,) = progress.rounds
    assert list(record.left_out) == ["d"]
    # By hand, without d: (100 + 400 + 900) / 60.
    assert all(np.allclose(value, 1400 / 60) for value in progress.adapter.tensors.values())
    assert np.isfinite(record.loss)


def test_a_clients_own_time_cannot_pass_the_deadline_as_no_number():
    def forge(reply):
        return [Reply("d", float("nan"), update=reply.update)]

    words = ("federation.rounds=1", "federation.availability.away=0", "federation.deadline=5")
    (record,) = federate(federation(*words, engine=AddingEngine({(1, "d"): forge})), begin()).rounds
    assert record.left_out == {"d": "its nan seconds are no time"}


def test_who_never_answers_costs_the_deadline_and_no_more():
    words = ("federation.rounds=1", "federation.availability.away=0", "federation.deadline=5")
    (record,) = federate(federation(*words, engine=AddingEngine({(1, "d"): lambda reply: []})), begin()).rounds
    assert record.duration == 5.0


def test_a_second_update_of_a_client_is_told_and_its_first_one_stays_accepted():
    events = []
    engine = AddingEngine({(1, "d"): lambda reply: [reply, reply]})
    (record,) = federate(federation("federation.rounds=1", engine=engine, events=events), begin()).rounds
    assert [one.client for one in record.clients] == ["a", "b", "c", "d"]
    assert record.left_out == {}
    assert [event.text for event in events if isinstance(event, Note)] == [
        "Round 1: a reply is not used, since 'd' has answered already."
    ]


def test_an_update_of_a_client_that_was_not_asked_is_told_and_not_used():
    events = []
    engine = AddingEngine({(1, "d"): lambda reply: [reply, Reply("z", 1.0, update=reply.update)]})
    (record,) = federate(federation("federation.rounds=1", engine=engine, events=events), begin()).rounds
    assert record.left_out == {}
    assert [event.text for event in events if isinstance(event, Note)] == [
        "Round 1: a reply is not used, since 'z' was not asked in this round."
    ]


def test_forged_scores_of_a_client_are_told_and_left_out():
    class Scoring(AddingEngine):
        def ask(self, tasks, deadline=None):
            for reply in super().ask(tasks, deadline):
                forged = reply.totals is not None and reply.client == "c"
                yield Reply("c", 0.1, totals={"x": Totals(rows=10**12)}) if forged else reply

    events = []
    ours = federation("federation.rounds=1", engine=Scoring(), evaluating=["a", "c"], events=events)
    own = [record for record in federate(ours, begin()).evaluations if record.part == "clients"]
    assert [set(record.clients) for record in own] == [{"a"}, {"a"}]
    assert any(
        "c did not score its rows: it claims 1000000000000 rows" in event.text
        for event in events
        if isinstance(event, Note)
    )
