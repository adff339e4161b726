"""The codec of tasks and replies, and the seal around them: what travels comes back as it was, or is refused."""

import dataclasses
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_checks import CONTROL, adapter, update

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.checks import check_update
from bellwether.exchange.codec import decode_reply, decode_task, encode_reply, encode_task
from bellwether.exchange.messages import EvaluateTask, Payload, Reply, Survey, SurveyTask, TrainTask, client_draws
from bellwether.exchange.scores import Totals
from bellwether.exchange.seal import Header, check_meant, opened, sealed
from bellwether.recipe.recipe import Evaluation, Privacy, Selection, Training
from bellwether.tools.randomness import Randomness

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in (1, 2))
A, B = key_a("m.0.q"), key_b("m.0.q")
TASK = Header("task", "train", "a run", 3, "coordinator", "site-1", "a", "number", "terms")


def payload() -> Payload:
    folded = Adapter(AdapterConfig(1, 1.0, 0.0, ("m.0.q",)), {A: np.ones((1, 3)), B: np.full((4, 1), np.pi)})
    return Payload(adapter(), CONTROL, trained=(B,), returned=(A, B), folded=folded)


def tasks():
    draws = client_draws(Randomness(2**63 - 1), 3, "a")
    training = Training(learning_rate=0.1 + 0.2, local_steps=3, clip_norm=None)
    selection = Selection(method="hierarchical", clip_norm=0.5)
    privacy = Privacy(unit="example", noise=0.1 + 0.2)
    return [
        TrainTask(3, payload(), training, 20, draws, selection, kept=[1, 0], settled=2, certain=1, privacy=privacy),
        TrainTask(1, Payload(adapter()), Training(), 1, draws),
        SurveyTask(3, payload(), selection, draws),
        SurveyTask(3, None, selection, draws),
        EvaluateTask(0, payload(), Evaluation(every=2), settled=1),
    ]


def content(value):
    """Everything in a message, arrays with their bytes, in its order."""
    if dataclasses.is_dataclass(value):
        return [type(value).__name__, *(content(getattr(value, one.name)) for one in dataclasses.fields(value))]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, value.tobytes()]
    if isinstance(value, dict):
        return [(key, content(item)) for key, item in value.items()]
    return list(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("task", tasks(), ids=lambda task: type(task).__name__)
def test_a_task_comes_as_it_was_sent(task):
    assert content(decode_task(*encode_task(task))) == content(task)


def test_a_body_is_all_values_and_nothing_else():
    sent = TrainTask(1, payload(), Training(), 1, client_draws(Randomness(0), 1, "a"))
    _, body = encode_task(sent)
    # By hand: 6 + 8 values and a control of 14 in float32, 3 + 4 folded ones in float64.
    assert len(body) == 4 * (6 + 8 + 14) + 8 * (3 + 4)
    assert body.startswith(adapter().tensors[A].astype("<f4").tobytes())


def replies():
    totals = {"qa": Totals(2, 9, 1.5, 2, 0.25, 1), "": Totals()}
    points_Cd = np.arange(6, dtype=np.float32).reshape(2, 3)
    return [
        ("train", Reply("a", 1.5, update=update(arrays=CONTROL, metrics={"loss": 0.1 + 0.2, "tokens": 3.0}))),
        ("train", Reply("a", 1.5, failure="no row of it is finite")),
        ("survey", Reply("a", 1.5, survey=Survey("a", 3, points_Cd))),
        ("survey", Reply("a", 1.5, survey=Survey("a", 3, np.empty((0, 3), np.float32)))),
        ("evaluate", Reply("a", 1.5, totals=totals, groups={"dutch": Totals(2, 9, 1.5, 2, 0.25, 1)})),
    ]


@pytest.mark.parametrize(("kind", "reply"), replies())
def test_a_reply_comes_as_it_was_sent(kind, reply):
    manifest, body = encode_reply(reply, kind)
    assert content(decode_reply(manifest, body, kind, "a", 3, 1.5)) == content(reply)


def test_what_a_client_keeps_to_itself_is_not_sent():
    manifest, _ = encode_reply(
        Reply("secret name", 77.25, update=update(client="secret name"), losses=(88.5,)), "train"
    )
    assert not any(secret in manifest for secret in (b"secret", b"77.25", b"88.5"))


def test_values_that_are_not_finite_come_as_they_are_and_are_refused_by_the_check():
    broken = update(tensors={**adapter().tensors, B: np.full((4, 2), np.nan, np.float32)}, metrics={"loss": np.inf})
    reply = decode_reply(*encode_reply(Reply("a", 1.0, update=broken), "train"), "train", "a", 3, 1.0)
    with pytest.raises(UpdateRejected, match="'loss' is inf"):
        check_update(reply, Payload(adapter()), {}, 3, 100, 1e4)


def forged(**changes):
    manifest, body = encode_reply(Reply("a", 1.0, update=update()), "train")
    return json.dumps({**json.loads(manifest), **changes}).encode(), body


TENSOR = ["tensors", A, "float32", [2, 3]]
FLAT = ["tensors", A, "float32", [14]]


@pytest.mark.parametrize(
    ("manifest", "body", "reason"),
    [
        (b"\xff", b"", "not UTF-8"),
        (b"[]", b"", "not a mapping"),
        (b"[" * 200_000, b"", "nested too deep"),
        (b" " * 2**23, b"", "where 4194304 are taken"),
        (*forged(kind="evaluate"), "answers evaluate, where train was asked"),
        (*forged(kind="shell"), "kind is 'shell'"),
        (*forged(more=1), "more is unknown"),
        # An array header that claims 16 GiB in a body of 56 bytes.
        (
            *forged(arrays=[["tensors", A, "float32", [2**16, 2**16]]]),
            "claims 17179869184 bytes of arrays, and 56 came",
        ),
        (*forged(arrays=[["tensors", A, "float32", [2**53, 2**53]]]), "bytes of arrays, and 56 came"),
        (*forged(arrays=[["tensors", A, "float32", [-1, -14]]]), "arrays.0.shape.0"),
        (*forged(arrays=[["tensors", A, "float32", [1] * 40]]), "arrays.0.shape"),
        (*forged(arrays=[["tensors", A, "object", [14]]]), "arrays.0.precision"),
        (*forged(arrays=[["secrets", A, "float32", [14]]]), "arrays.0.part"),
        (*forged(arrays=[["tensors", A, "float32"]]), "part, name, precision and shape"),
        (*forged(arrays=[TENSOR, TENSOR]), "claims 48 bytes of arrays, and 56 came"),
        (*forged(arrays=[["tensors", A, "float32", [7]]] * 2), "is there twice"),
        (*forged(arrays=[["tensors", A, "float32", [0]]] * 30_000), "a list of 30000"),
        (*forged(arrays=[FLAT], fields={"rows": "1000000000000"}), "rows is '1000000000000', not a whole number"),
        (*forged(fields={"totals": {"qa": {"rows": -1}}}), "totals.qa.rows"),
        (*forged(fields={"metrics": dict.fromkeys(map(str, range(2000)), 1.0)}), "metrics"),
        (*forged(fields={"failure": "x" * 2000}), "failure"),
    ],
)
def test_a_forged_reply_is_refused_in_one_clause(manifest, body, reason):
    with pytest.raises(UpdateRejected) as refused:
        decode_reply(manifest, body, "train", "a", 3, 1.0)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rows_that_nobody_has_are_refused_as_in_the_simulation():
    manifest, body = encode_reply(Reply("a", 1.0, update=update(rows=10**12)), "train")
    with pytest.raises(UpdateRejected, match="it claims 1000000000000 rows"):
        check_update(decode_reply(manifest, body, "train", "a", 3, 1.0), Payload(adapter()), {}, 3, 100, 1e4)


def test_arrays_have_memory_of_their_own():
    one = decode_reply(*encode_reply(Reply("a", 1.0, update=update()), "train"), "train", "a", 3, 1.0)
    one.update.tensors[A][0, 0] = 7.0  # the bytes that came are as they were
    assert one.update.tensors[A].flags.owndata or one.update.tensors[A].base.flags.owndata


# The seal ----------------------------------------------------------------------------------------


def test_a_sealed_message_is_opened_by_the_senders_key():
    parcel = sealed(TASK, KEY, b"manifest", b"body")
    assert opened(parcel, KEY.public_key()) == TASK
    assert parcel.size == len(parcel.header) + 64 + len(b"manifest") + len(b"body")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"body": b"bodY"}, "not what was signed"),
        ({"manifest": b"manifes", "body": b"tbody"}, "not what was signed"),
        ({"signature": bytes(64)}, "its signature"),
        ({"signature": b""}, "its signature"),
        ({"header": b"{}"}, "its signature"),
        ({"header": b"x" * 9999}, "9999 bytes"),
    ],
)
def test_what_was_changed_on_the_way_is_refused(change, reason):
    parcel = dataclasses.replace(sealed(TASK, KEY, b"manifest", b"body"), **change)
    with pytest.raises(UpdateRejected, match=reason):
        opened(parcel, KEY.public_key())


def test_another_senders_message_is_refused():
    with pytest.raises(UpdateRejected, match="its signature"):
        opened(sealed(TASK, OTHER, b""), KEY.public_key())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run": "another"}, "its run is 'another'"),
        ({"round": 2}, "its round is '2', where '3' is due"),
        ({"number": "earlier"}, "its number is 'earlier'"),
        ({"client": "b"}, "its client is 'b'"),
        ({"kind": "evaluate"}, "its kind is 'evaluate'"),
        ({"terms": "changed"}, "its terms is 'changed'"),
        ({"way": "task"}, "its way is 'task'"),
    ],
)
def test_a_reply_counts_for_its_own_task_alone(change, reason):
    due = TASK.answered()
    check_meant(due, due)
    with pytest.raises(UpdateRejected, match=reason):
        check_meant(dataclasses.replace(due, **change), due)
