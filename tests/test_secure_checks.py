"""The strict check of every reply of secure aggregation against a table of forged ones, and its messages as bytes."""

from dataclasses import replace

import numpy as np
import pytest
from asking import train_task
from masking import MaskingEngine, secured
from test_federate import START, begin

from bellwether.errors import UpdateRejected
from bellwether.exchange.codec import decode_reply, decode_task, encode_reply, encode_task, kind_of
from bellwether.exchange.masks import KEY, SEALED
from bellwether.exchange.messages import (
    MASKED,
    SECRETS,
    Announced,
    AnnounceTask,
    Dealt,
    Masking,
    Reply,
    Revealed,
    ShareTask,
    UnmaskTask,
    Update,
)
from bellwether.exchange.secure_checks import (
    agreement_bytes,
    check_announced,
    check_dealt,
    check_masked,
    check_revealed,
    masked_bytes,
    secured_bytes,
    task_bytes_of,
)
from bellwether.federate import federate
from bellwether.recipe.recipe import SecureAggregation, Training
from bellwether.tools.randomness import Draws
from bellwether.tools.shamir import BYTES, PRIME

ENDLESS = 10**5000
ANNOUNCED = Announced(b"s" * KEY, b"m" * KEY, b"p" * KEY)
DEALT = Dealt({"b": b"1" * SEALED, "c": b"2" * SEALED})
SHARE = b"\0" * BYTES
REVEALED = Revealed({"a": SHARE, "b": SHARE}, {"c": SHARE})
UPDATE = Update("a", 3, {}, 5, {"loss": 1.0}, packed={MASKED: np.arange(4, dtype=np.uint64)})


def reply(part=None, **more):
    return Reply("a", 1.0, secured=part, **more)


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (None, "it sent no announcement"),
        (DEALT, "it sent Dealt in place of an announcement"),
        ([ANNOUNCED], "it sent list in place of an announcement"),
        (replace(ANNOUNCED, sealing=b"short"), "its sealing is 5 bytes, where 32 bytes are due"),
        (replace(ANNOUNCED, masking="m" * KEY), "its masking is str, where 32 bytes are due"),
        (replace(ANNOUNCED, pledge=bytearray(KEY)), "its pledge is bytearray, where 32 bytes are due"),
        (replace(ANNOUNCED, pledge=ENDLESS), "its pledge is int, where 32 bytes are due"),
    ],
)
def test_a_forged_announcement_is_refused(forged, reason):
    with pytest.raises(UpdateRejected) as refused:
        check_announced(reply(forged))
    assert str(refused.value) == reason


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (ANNOUNCED, "it sent Announced in place of a deal of shares"),
        (Dealt(None), "its sealed shares are NoneType, not a mapping of texts to arrays"),
        (Dealt({"b": b"1" * SEALED}), "its sealed shares are not those due: 1 (c) missing, none unknown"),
        (Dealt({**DEALT.shares, "a": b""}), "its sealed shares are not those due: none missing, 1 (a) unknown"),
        (Dealt({**DEALT.shares, 7: b""}), "its sealed shares are dict, not a mapping of texts to arrays"),
        (Dealt({**DEALT.shares, "c": b""}), "one of its sealed shares (c) is 0 bytes, where 148 bytes are due"),
        (Dealt({**DEALT.shares, "c": "2" * SEALED}), "one of its sealed shares (c) is str, where 148 bytes are due"),
    ],
)
def test_forged_sealed_shares_are_refused(forged, reason):
    with pytest.raises(UpdateRejected) as refused:
        check_dealt(reply(forged), {"b", "c"})
    assert str(refused.value) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": "b"}, "its update is signed 'b'"),
        ({"round": 2}, "its update belongs to round 2, not 3"),
        ({"rows": 101}, "it claims 101 rows, where 1 to 100 are believed"),
        ({"metrics": {"loss": float("nan")}}, "its 'loss' is nan, not a finite number"),
        ({"packed": {}}, "its masked values are not those due: 1 (masked) missing, none unknown"),
        ({"packed": None}, "its masked values are NoneType, not a mapping of texts to arrays"),
        ({"tensors": {"x": np.zeros(1)}}, "its tensors are not those due: none missing, 1 (x) unknown"),
        ({"arrays": {"x": np.zeros(1)}}, "its arrays are not those due: none missing, 1 (x) unknown"),
        ({"packed": {MASKED: np.zeros(4)}}, "its masked update is float64, not uint64"),
        ({"packed": {MASKED: np.zeros(4, np.int64)}}, "its masked update is int64, not uint64"),
        ({"packed": {MASKED: np.zeros(5, np.uint64)}}, "its masked update has shape (5,), not (4,)"),
        ({"packed": {MASKED: np.zeros((2, 2), np.uint64)}}, "its masked update has shape (2, 2), not (4,)"),
        ({"packed": {MASKED: [0, 1, 2, 3]}}, "its masked update is list, not uint64"),
        (
            {"packed": {MASKED: np.ma.masked_array(np.zeros(4, np.uint64))}},
            "its masked update is MaskedArray, not uint64",
        ),
    ],
)
def test_a_forged_masked_update_is_refused(changes, reason):
    with pytest.raises(UpdateRejected) as refused:
        check_masked(Reply("a", 1.0, update=replace(UPDATE, **changes)), 4, 3, 100)
    assert str(refused.value) == reason


def test_an_update_that_is_not_masked_is_refused_where_masks_are_due(tmp_path):
    engine = MaskingEngine(tmp_path)
    engine.wrong = {("train", "d"): lambda reply: [replace(reply, update=plain_update())]}
    record = federate(secured(engine=engine), begin()).rounds[0]
    assert "its tensors are not those due" in record.left_out["d"]


def plain_update():
    return Update("d", 1, dict(START.tensors), 40)


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (DEALT, "it sent Dealt in place of an opening of shares"),
        (Revealed({"a": SHARE}, {"c": SHARE}), "its shares of seeds are not those due: 1 (b) missing, none unknown"),
        (replace(REVEALED, keys={}), "its shares of keys are not those due: 1 (c) missing, none unknown"),
        (replace(REVEALED, keys={"c": SHARE, "a": SHARE}), "none missing, 1 (a) unknown"),
        (replace(REVEALED, keys=[]), "its shares of keys are list, not a mapping of texts to arrays"),
        (replace(REVEALED, keys={"c": b""}), "one of its shares of keys (c) is 0 bytes, where 66 bytes are due"),
        (replace(REVEALED, keys={"c": PRIME.to_bytes(BYTES, "big")}), "one of its shares of keys is none"),
        (replace(REVEALED, keys={"c": b"\xff" * BYTES}), "one of its shares of keys is none"),
    ],
)
def test_a_forged_opening_is_refused(forged, reason):
    with pytest.raises(UpdateRejected) as refused:
        check_revealed(reply(forged), {"a", "b"}, {"c"})
    assert reason in str(refused.value)


def test_what_is_due_passes_as_it_is():
    assert check_announced(reply(ANNOUNCED)) is ANNOUNCED
    assert check_dealt(reply(DEALT), ["b", "c"]) is DEALT
    assert check_masked(Reply("a", 1.0, update=UPDATE), 4, 3, 100) is UPDATE
    assert check_revealed(reply(REVEALED), ["a", "b"], ["c"]) is REVEALED
    with pytest.raises(UpdateRejected, match="it fell ill"):
        check_announced(reply(ANNOUNCED, failure="it fell ill"))


# Bytes --------------------------------------------------------------------------------------------


def test_the_record_counts_what_travels_and_the_plan_says_as_much(tmp_path):
    engine = MaskingEngine(tmp_path)
    record = federate(secured(engine=engine), begin()).rounds[0].secure
    # By hand, of four clients with names of one byte. Up: three keys of 32 bytes; three sealed shares of 148 with a
    # name; four shares of 66 with a name. Down: the cohort's size in 8 bytes; four times a name and three keys; three
    # sealed shares with a name; four names.
    assert record.bytes_up == 4 * (96 + 3 * 149 + 4 * 67)
    assert record.bytes_down == 4 * (8 + 4 * 97 + 3 * 149 + 4)
    assert agreement_bytes(4, 1) == (record.bytes_down, record.bytes_up)


def test_a_masked_update_takes_eight_bytes_a_value_and_its_description():
    # As JSON: [["masked", [4]]].
    assert masked_bytes(START.tensors, {}) == 8 * 4 + len('[["masked", [4]]]')


def test_bytes_of_what_is_forged_are_counted_as_far_as_there_are_any():
    assert secured_bytes(None) == secured_bytes([1]) == secured_bytes(Dealt(None)) == 0
    assert secured_bytes(Dealt({"b": b"123", 7: b"1", "c": None})) == 4
    assert task_bytes_of(UnmaskTask(1, ("a", "bc"))) == 3


# As bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        AnnounceTask(3, 4, SecureAggregation(enabled=True, threshold=0.75), Draws({SECRETS: 7})),
        ShareTask(3, {"a": ANNOUNCED, "ü b": replace(ANNOUNCED, pledge=bytes(range(KEY)))}),
        UnmaskTask(3, ("a", "b")),
    ],
)
def test_a_task_travels_as_bytes(task):
    assert decode_task(*encode_task(task)) == task


@pytest.mark.parametrize("shares", [{}, {"b": b"1" * SEALED, "c": bytes(range(SEALED))}])
def test_a_task_to_train_travels_with_its_shares(shares):
    task = train_task(START, Training(), masking=Masking(shares, 100, 2.5))
    assert decode_task(*encode_task(task)).masking == task.masking
    plain = train_task(START, Training())
    assert b"masking" not in encode_task(plain)[0]  # the bytes that they were before there were masks


@pytest.mark.parametrize(
    ("kind", "part"), [("announce", ANNOUNCED), ("share", DEALT), ("unmask", REVEALED), ("unmask", Revealed({}, {}))]
)
def test_an_answer_travels_as_bytes(kind, part):
    manifest, body = encode_reply(reply(part), kind)
    assert decode_reply(manifest, body, kind, "a", 3, 1.0) == reply(part)
    with pytest.raises(UpdateRejected, match="where train was asked"):
        decode_reply(manifest, body, "train", "a", 3, 1.0)
    with pytest.raises(UpdateRejected, match="cannot be read"):
        decode_reply(manifest, body + b"1", kind, "a", 3, 1.0)


def test_a_masked_update_travels_as_bytes():
    manifest, body = encode_reply(Reply("a", 1.0, update=UPDATE), "train")
    back = decode_reply(manifest, body, "train", "a", 3, 1.0).update
    np.testing.assert_array_equal(back.packed[MASKED], UPDATE.packed[MASKED])
    assert (back.packed[MASKED].dtype, back.tensors) == (np.uint64, {})


def test_a_name_that_is_there_twice_is_refused():
    manifest, body = encode_task(ShareTask(3, dict.fromkeys("ab", ANNOUNCED)))
    with pytest.raises(UpdateRejected, match="a name is there twice"):
        decode_task(manifest.replace(b'"a","b"', b'"a","a"'), body)
    assert kind_of(ShareTask(3, {})) == "share"
