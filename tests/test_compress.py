"""Communication compression between client and server: error feedback, exact tensors at the server, forged bodies."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import gamma
from test_checks import CONTROL, A, B, adapter, update
from test_codec import content
from test_federate import ROWS, AddingEngine, begin, federation

from bellwether.client.sending import as_it_travels
from bellwether.errors import CheckpointError, RecipeError, UpdateRejected
from bellwether.exchange.adapter import flat
from bellwether.exchange.checks import check_update
from bellwether.exchange.codec import decode_reply, decode_task, encode_reply, encode_task
from bellwether.exchange.compress import compress_payload, compress_update
from bellwether.exchange.messages import Payload, Reply, SurveyTask, TrainTask, client_draws
from bellwether.exchange.packing import pack, unpack
from bellwether.exchange.sizes import array_bytes, due_bytes, payload_bytes, update_bytes
from bellwether.federate import federate
from bellwether.method.method import State
from bellwether.method.named import make_method
from bellwether.recipe.file import load_recipe
from bellwether.recipe.method import METHODS
from bellwether.recipe.recipe import Compression, Recipe, Training
from bellwether.runner.checks import check_methods
from bellwether.store.client_state import UNSENT, forgotten, keep_state, kept_rounds, recall_state
from bellwether.tools.randomness import Randomness

UP = ("8bit", "4bit", "top_k")


def draws(round=3, client="a"):
    return client_draws(Randomness(0), round, client)


def task(payload=None, *, settled=0, certain=0, round=3, **compression):
    asked = TrainTask(round, payload or Payload(adapter()), Training(), 20, draws(round))
    return replace(asked, settled=settled, certain=certain, compression=Compression(**compression))


def moved(by=1e-3, seed=1, **changes):
    """An update whose tensors are those that were sent and a change."""
    draw = np.random.default_rng(seed)
    tensors = {key: value + np.float32(by) * draw.normal(size=value.shape) for key, value in adapter().tensors.items()}
    return update(tensors={key: value.astype(np.float32) for key, value in tensors.items()}, **changes)


def received(sent, compression, payload, at_client):
    """What the server makes of an update that travelled."""
    reply = decode_reply(*encode_reply(Reply("a", 1.0, update=sent), "train"), "train", "a", 3, 1.0)
    return check_update(reply, payload, {}, 3, 100, 1e4, compression, at_client)


# Error feedback ----------------------------------------------------------------------------------


def test_error_feedback_by_hand():
    """Two values in 4 bits, of which the first sets a step of 1: what is not sent of the second comes later."""
    settings, sent_total, left = Compression(up="4bit"), 0.0, {}
    shape, draw = adapter().tensors[A].shape, np.random.default_rng(7)
    for round in range(1, 41):
        change = np.zeros(shape, np.float64)
        change[0, 0], change[0, 1] = 7.0, 0.25
        tensors = {A: adapter().tensors[A].astype(np.float64) + change, B: adapter().tensors[B].astype(np.float64)}
        exact = Payload(replace(adapter(), tensors={A: tensors[A] - change, B: tensors[B]}))
        packed, left = compress_update(update(tensors=tensors), exact, settings, left, draw)
        values_P = unpack(packed.packed, "4bit", 14, np.dtype(np.float64))
        assert values_P[0] == pytest.approx(7.0, abs=1e-12 * 40)
        sent_total += values_P[1]
        # Σ sent = Σ changes - e, and |e| is below one step.
        assert sent_total + left[A][0, 1] == pytest.approx(0.25 * round, abs=1e-12 * 40)
        assert abs(left[A][0, 1]) < 1 + 1e-9
    assert sent_total == pytest.approx(10, abs=1)


@pytest.mark.parametrize("kind", UP)
def test_what_is_sent_over_rounds_and_what_is_left_add_up_to_all_changes(tmp_path, kind):
    compression, rounds, folder = {"up": kind, "keep": 0.2}, 12, tmp_path / "a"
    sent_P = np.zeros(14)
    true_P, largest = np.zeros(14), 0.0
    order = tuple(adapter().tensors)
    for round in range(1, rounds + 1):
        asked = task(round=round, settled=round - 1, **compression)
        one = moved(seed=round, round=round)
        travelled = as_it_travels(one, asked, {"a": folder})
        assert travelled.tensors == {}
        arrived_P = unpack(travelled.packed, kind, 14, np.dtype(np.float32)).astype(np.float64)
        change_P = flat(one.tensors, order).astype(np.float64) - flat(adapter().tensors, order)
        sent_P, true_P, largest = sent_P + arrived_P, true_P + change_P, max(largest, np.abs(change_P).max())
    left_P = flat(recall_state(folder, UNSENT, rounds), order)
    # Each round computes d, a product and e in float32, of numbers no larger than all changes together.
    bound = rounds * gamma(torch.float32, 4) * rounds * largest
    np.testing.assert_allclose(sent_P + left_P, true_P, rtol=0, atol=bound)
    assert np.abs(left_P).max() > 20 * bound  # something is left, so that this says something


def test_without_error_feedback_nothing_is_kept(tmp_path):
    as_it_travels(moved(), task(up="top_k", error_feedback=False), {"a": tmp_path})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("settled", "same_as"), [(0, None), (1, 1), (2, 2)])
def test_a_client_adds_what_its_last_update_that_counted_left(tmp_path, settled, same_as):
    for round in (1, 2):
        rest = {key: np.full_like(value, round / 100) for key, value in adapter().tensors.items()}
        keep_state(tmp_path, UNSENT, round, rest)
    sent = as_it_travels(moved(), task(up="8bit", settled=settled), {"a": tmp_path})
    left = {} if same_as is None else {key: np.float32(same_as / 100) for key in adapter().tensors}
    by_hand, _ = compress_update(
        moved(), Payload(adapter()), Compression(up="8bit"), left, draws().numpy("compression")
    )
    assert content(sent) == content(by_hand)
    assert kept_rounds(tmp_path, UNSENT) == [*range(1, settled + 1), 3]  # what never counted is gone


def test_what_is_left_of_a_half_waits_until_that_half_is_trained_again(tmp_path):
    half = Payload(adapter(), trained=(B,))
    keep_state(tmp_path, UNSENT, 2, {A: np.full((2, 3), 0.5, np.float32)})
    only_b = replace(moved(), tensors={B: moved().tensors[B]})
    as_it_travels(only_b, task(half, up="top_k", keep=0.2, settled=2), {"a": tmp_path})
    left = recall_state(tmp_path, UNSENT, 3)
    assert left.keys() == {A, B}
    np.testing.assert_array_equal(left[A], np.full((2, 3), 0.5, np.float32))
    assert left[B].any()


@pytest.mark.parametrize("bad", [np.zeros((3, 3), np.float32), np.full((2, 3), np.nan, np.float32), np.zeros((2, 3))])
def test_what_was_left_and_is_damaged_is_told(tmp_path, bad):
    keep_state(tmp_path, UNSENT, 2, {A: bad})
    with pytest.raises(CheckpointError, match=r"unsent.0002\.npz is not as it was written"):
        as_it_travels(moved(), task(up="8bit", settled=2), {"a": tmp_path})


def test_a_client_that_diverged_is_left_out_with_the_reason_that_the_server_would_give(tmp_path):
    broken = update(tensors={**adapter().tensors, B: np.full((4, 2), np.nan, np.float32)})
    with pytest.raises(UpdateRejected, match="lora_B.weight holds 8 values that are not finite"):
        as_it_travels(broken, task(up="8bit"), {"a": tmp_path})
    assert kept_rounds(tmp_path, UNSENT) == []


def test_what_a_client_left_unsent_and_lost_is_told_when_a_run_goes_on(tmp_path):
    from types import SimpleNamespace

    keep_state(tmp_path, UNSENT, 1, {})
    records = [SimpleNamespace(round=2, clients=[SimpleNamespace(client="a")], failure=None)]
    assert forgotten({"a": tmp_path}, records, chooses=False) == [tmp_path / UNSENT / "0002.npz"]


# The server --------------------------------------------------------------------------------------


@pytest.mark.parametrize("down", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("up", ["none", *UP])
def test_the_server_adds_the_change_to_its_own_exact_tensors(tmp_path, up, down):
    compression, exact = Compression(up=up, down=down, keep=0.5), Payload(adapter())
    at_client = compress_payload(exact, down, np.random.default_rng(0))
    noisy = at_client.adapter.tensors
    change = {key: np.full_like(value, 0.25) for key, value in noisy.items()}
    trained = update(tensors={key: noisy[key] + change[key] for key in noisy})
    asked = replace(task(at_client), compression=compression)
    found = received(as_it_travels(trained, asked, {"a": tmp_path}), compression, exact, at_client)
    # All changes alike, so that each is exactly the largest, but for float32's last digits; of which half may be sent.
    moved = np.concatenate([(found.tensors[key] - value).ravel() for key, value in exact.adapter.tensors.items()])
    sent = np.abs(moved) > 0.125
    assert sent.sum() == (len(moved) // 2 if up == "top_k" else len(moved))
    np.testing.assert_allclose(moved[sent], 0.25, rtol=0, atol=0.25 / 7 * 2**-9 + 4e-6)
    assert not moved[~sent].any()


class Compressing(AddingEngine):
    """Clients whose updates travel by the codec as the recipe says, each with a folder of its own."""

    def __init__(self, folder: Path, change=0.0, faults=None):
        super().__init__(faults)
        self.folder, self.change = folder, np.float32(change)

    def ask(self, tasks, deadline=None):
        for reply in super().ask({c: decode_task(*encode_task(one)) for c, one in tasks.items()}, deadline):
            if reply.update is None or reply.client not in tasks:
                yield reply
                continue
            asked, own = decode_task(*encode_task(tasks[reply.client])), reply.update
            tensors = {key: value + self.change for key, value in asked.adapter.tensors.items()}
            own = replace(own, tensors={key: value.astype(np.float32) for key, value in tensors.items()})
            sent = as_it_travels(own, asked, {reply.client: self.folder / reply.client})
            way = encode_reply(replace(reply, update=sent), "train")
            yield decode_reply(*way, "train", reply.client, asked.round, 1.0)


@pytest.mark.parametrize("up", ["none", *UP])
def test_what_the_way_down_rounds_does_not_add_up(tmp_path, up):
    """Clients that change nothing leave the server's adapter as it is, byte for byte, however roughly they get it."""
    start = State(adapter())
    words = ("federation.rounds=9", "compression.down=4bit", f"compression.up={up}")
    engine = Compressing(tmp_path)
    end = federate(federation(*words, engine=engine), replace(begin(), state=start))
    assert end.adapter.fingerprint() == start.adapter.fingerprint()


@pytest.mark.parametrize("up", UP)
def test_rounds_add_the_weighted_mean_of_the_changes_but_for_what_is_left(tmp_path, up):
    words = ("federation.rounds=9", f"compression.up={up}", "compression.down=8bit")
    words += ("compression.keep=0.5",) if up == "top_k" else ()
    start, change = State(adapter()), 0.01
    federated = federation(*words, engine=Compressing(tmp_path, change))
    end = federate(federated, replace(begin(), state=start))
    weights = {client: rows / sum(ROWS.values()) for client, rows in ROWS.items()}
    for key, value in start.adapter.tensors.items():
        left = sum(weights[client] * recall_state(tmp_path / client, UNSENT, 9)[key] for client in ROWS)
        # Up to a few float32 roundings of a number around 1 in each of nine rounds.
        expected = value + 9 * 0.01 - left
        np.testing.assert_allclose(end.adapter.tensors[key], expected, rtol=0, atol=9 * gamma(torch.float32, 6) * 4)


def test_a_round_that_did_not_count_leaves_what_was_left_before(tmp_path):
    lost = {(2, "a"): lambda reply: [Reply("a", 1.0, failure="it is gone")]}
    words = ("federation.rounds=3", "compression.up=4bit")
    engine = Compressing(tmp_path, 0.01, lost)
    federate(federation(*words, engine=engine), replace(begin(), state=State(adapter())))
    assert kept_rounds(tmp_path / "a", UNSENT) == [1, 3]
    assert kept_rounds(tmp_path / "b", UNSENT) == [1, 2, 3]


def test_going_on_from_a_commit_gives_the_same_as_never_stopping(tmp_path):
    committed, words = [], ("federation.rounds=4", "compression.up=4bit", "compression.down=4bit")
    change, start = 0.01, replace(begin(), state=State(adapter()))
    whole = federate(federation(*words, committed=committed, engine=Compressing(tmp_path, change)), start)
    rest = federate(federation(*words, engine=Compressing(tmp_path, change)), committed[2])
    assert rest.adapter.fingerprint() == whole.adapter.fingerprint()


def test_a_recipe_without_compression_draws_and_sends_as_before():
    """Of the default recipe nothing is packed, and the draws of other purposes are those that they were."""
    payload = Payload(adapter())
    assert compress_payload(payload, "none", np.random.default_rng(0)) is payload
    assert as_it_travels(one := moved(), task(), {}) is one
    seeds = Randomness(0)
    for purpose in ("batch order", "dropout", "selection", "method"):
        assert draws().seeds[purpose] == seeds.seed_for(purpose, round=3, client="a")


def test_clients_and_rounds_round_by_draws_of_their_own(tmp_path):
    engine = Compressing(tmp_path)  # who change nothing, so that the same is sent again
    words = ("compression.down=4bit", "federation.rounds=2")
    draw = np.random.default_rng(0)
    tensors = {A: draw.normal(size=(2, 300)).astype(np.float32), B: draw.normal(size=(400, 2)).astype(np.float32)}
    federate(federation(*words, engine=engine), replace(begin(), state=State(replace(adapter(), tensors=tensors))))
    trained = [one for tasks in engine.tasks for one in tasks.values() if isinstance(one, TrainTask)]
    assert len({one.payload.packed.arrays["codes"].tobytes() for one in trained}) == len(trained)


# What travels whole ------------------------------------------------------------------------------


def test_what_a_client_does_not_train_comes_whole():
    half = compress_payload(Payload(adapter(), trained=(B,)), "4bit", np.random.default_rng(0))
    np.testing.assert_array_equal(half.adapter.tensors[A], adapter().tensors[A])
    assert (half.adapter.tensors[B] != adapter().tensors[B]).any()
    assert list(half.adapter.tensors) == [A, B]
    assert half.whole.keys() == {A}


def test_arrays_and_folded_updates_of_a_method_come_whole():
    payload = Payload(adapter(), CONTROL, folded=adapter())
    sent = compress_payload(payload, "4bit", np.random.default_rng(0))
    assert sent.arrays is payload.arrays
    assert sent.folded is payload.folded
    beside = array_bytes(adapter().tensors) + array_bytes(sent.packed.arrays)
    assert payload_bytes(sent) == beside + array_bytes(CONTROL)


@pytest.mark.parametrize("name", METHODS)
def test_error_feedback_is_refused_where_every_round_begins_anew(name):
    needs = make_method(METHODS[name]()).needs
    for error_feedback in (True, False):
        for up in ("none", "4bit"):
            recipe = Recipe(
                method=METHODS[name](),
                training=Training(**needs),
                compression=Compression(up=up, error_feedback=error_feedback),
            )
            if name in ("flora", "flexlora") and error_feedback and up != "none":
                with pytest.raises(RecipeError, match=r"set\s+compression.error_feedback=false"):
                    check_methods(recipe, ["a"], None)
            else:
                check_methods(recipe, ["a"], None)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("compression.up=2bit", "compression.up"),
        ("compression.down=top_k", "compression.down"),
        ("compression.keep=0", "compression.keep"),
        ("compression.keep=1.5", "compression.keep"),
        ("compression.error_feedback=3", "compression.error_feedback"),
        ("compression.block=64", "compression.block"),
    ],
)
def test_a_recipe_names_what_is_wrong_with_its_compression(field, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, [field])


# Bytes -------------------------------------------------------------------------------------------


def described(arrays):
    return len(json.dumps([(name, arrays[name].shape) for name in sorted(arrays)]).encode())


@pytest.mark.parametrize("up", UP)
def test_bytes_up_are_those_of_the_codecs_body_and_what_is_planned(tmp_path, up):
    sent = as_it_travels(moved(), task(up=up), {"a": tmp_path})
    _, body = encode_reply(Reply("a", 1.0, update=sent), "train")
    assert update_bytes(sent) == len(body) + described(sent.packed)
    assert update_bytes(sent) == due_bytes(adapter().tensors, {}, Compression(up=up))
    with_more = replace(sent, arrays=CONTROL)
    assert update_bytes(with_more) == due_bytes(adapter().tensors, {"control": (14,)}, Compression(up=up))


@pytest.mark.parametrize("trained", [None, (B,)])
@pytest.mark.parametrize("down", ["8bit", "4bit"])
def test_bytes_down_are_those_of_the_codecs_body(down, trained):
    sent = compress_payload(Payload(adapter(), trained=trained), down, np.random.default_rng(0))
    _, body = encode_task(task(sent))
    described_in_all = described(sent.packed.arrays) + described(sent.whole)
    assert payload_bytes(sent) == len(body) + described_in_all


def packed_tasks():
    whole, half = Payload(adapter(), CONTROL, folded=adapter()), Payload(adapter(), trained=(B,), returned=(A, B))
    made = [compress_payload(one, kind, np.random.default_rng(1)) for one in (whole, half) for kind in ("8bit", "4bit")]
    return [task(one, up="top_k", keep=0.3) for one in made] + [SurveyTask(3, made[0], Recipe().selection, draws())]


@pytest.mark.parametrize("sent", packed_tasks())
def test_a_packed_task_comes_as_it_was_sent(sent):
    assert content(decode_task(*encode_task(sent))) == content(sent)


# Forged ------------------------------------------------------------------------------------------


def forged(kind, name, change):
    packed = {
        **compress_update(moved(), Payload(adapter()), Compression(up=kind, keep=0.2), {}, draws().numpy("method"))[
            0
        ].packed
    }
    value = change(packed[name].copy())
    if value is None:
        del packed[name]
    else:
        packed[name] = value
    return packed


def at(place, value):
    def change(array):
        array[place] = value
        return array

    return change


FORGED = [
    ("8bit", "codes", lambda codes: codes[:-1], "its packed codes has shape (13,), not (14,)"),
    ("8bit", "codes", lambda codes: codes.reshape(2, 7), "its packed codes has shape (2, 7), not (14,)"),
    ("8bit", "codes", lambda codes: codes.astype(np.float32), "its packed codes is float32, not uint8"),
    ("8bit", "codes", lambda codes: codes.tolist(), "its packed codes is list, not uint8"),
    ("8bit", "codes", at(0, 255), "a code of what it packed is none that rounding gives"),
    ("8bit", "codes", lambda codes: None, "1 (codes) missing"),
    ("8bit", "scales", at(0, np.nan), "its packed scales holds 1 values that are not finite"),
    ("8bit", "scales", at(0, np.inf), "its packed scales holds 1 values that are not finite"),
    ("8bit", "scales", at(0, 1.5), "a scale of what it packed is not from 0 to 1"),
    ("8bit", "scales", at(0, -0.5), "a scale of what it packed is not from 0 to 1"),
    ("8bit", "scales", lambda scales: np.append(scales, scales), "its packed scales has shape (2,), not (1,)"),
    ("8bit", "largest", at(0, -1), "the largest entry of what it packed is negative"),
    ("8bit", "largest", at(0, np.nan), "its packed largest holds 1 values that are not finite"),
    ("8bit", "largest", at(0, 3e38), "its change has a norm of"),
    ("4bit", "codes", at(0, 255), "a code of what it packed is none that rounding gives"),
    ("4bit", "codes", lambda codes: np.append(codes, codes), "its packed codes has shape (14,), not (7,)"),
    ("top_k", "values", at(0, 1.5), "what it packed has entries above the largest"),
    ("top_k", "values", at(0, np.nan), "its packed values holds 1 values that are not finite"),
    ("top_k", "values", lambda values: values[:-1], "its packed values has shape (2,), not (3,)"),
    ("top_k", "bitmap", at(0, 255), "the bitmap of what it packed does not mark as many entries as came"),
    ("top_k", "bitmap", lambda bits: np.array([0, 128 + 64 + 32], np.uint8), "does not mark as many entries as came"),
    ("top_k", "bitmap", lambda bits: bits.astype(np.uint32), "its packed bitmap is uint32, not uint8"),
]


@pytest.mark.parametrize(("kind", "name", "change", "reason"), FORGED)
def test_a_forged_change_is_refused_in_one_clause(kind, name, change, reason):
    sent = replace(moved(), tensors={}, packed=forged(kind, name, change))
    assert isinstance(update_bytes(sent), int)
    with pytest.raises(UpdateRejected) as refused:
        check_update(Reply("a", 1.0, update=sent), Payload(adapter()), {}, 3, 100, 1e4, Compression(up=kind, keep=0.2))
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def indices(*numbers):
    """Four of many entries, with the indices that somebody claims."""
    packed = pack(np.arange(1000, dtype=np.float32), "top_k", np.random.default_rng(0), 0.004)
    return {**packed, "indices": np.array(numbers, np.uint32)}


@pytest.mark.parametrize("numbers", [(1, 1, 2, 3), (3, 2, 5, 6), (1, 2, 3, 1000), (1, 2, 3, 2**32 - 1)])
def test_indices_that_do_not_rise_within_the_vector_are_refused(numbers):
    from bellwether.exchange.checks import check_packed

    check_packed(indices(0, 1, 2, 999), "top_k", 1000, 0.004)
    with pytest.raises(UpdateRejected, match="the indices of what it packed do not rise within 0 to 999"):
        check_packed(indices(*numbers), "top_k", 1000, 0.004)


@pytest.mark.parametrize(
    ("sent", "agreed", "reason"),
    [
        (moved(), "8bit", "its whole tensors are not those due: none missing, 2"),
        (replace(moved(), packed={"codes": np.zeros(14, np.uint8)}), "none", "its packed arrays are not those due"),
        (replace(moved(), tensors={}), "4bit", "its packed arrays are not those due: 3"),
        (replace(moved(), tensors={}, packed=None), "4bit", "its packed arrays are NoneType, not a mapping"),
        (replace(moved(), tensors={}, packed=[1]), "4bit", "its packed arrays are list, not a mapping"),
        (replace(moved(), tensors={}, packed=forged("8bit", "codes", lambda c: c)), "4bit", "shape (14,), not (7,)"),
    ],
)
def test_an_update_comes_as_was_agreed(sent, agreed, reason):
    with pytest.raises(UpdateRejected) as refused:
        check_update(Reply("a", 1.0, update=sent), Payload(adapter()), {}, 3, 100, 1e4, Compression(up=agreed))
    assert reason in str(refused.value)


def forged_task(**changes):
    sent = compress_payload(Payload(adapter()), "4bit", np.random.default_rng(0))
    manifest, body = encode_task(task(sent))
    head = json.loads(manifest)
    head["fields"]["payload"]["packed"] |= changes
    return json.dumps(head).encode(), body


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # 2^60 values are claimed of a body of seven bytes of codes.
        ({"shapes": {A: [2**30, 2**30], B: [4, 2]}}, "its packed scales has shape (1,), not"),
        ({"shapes": {A: [2, 3], B: [4, 3]}}, "its packed codes has shape (7,), not (9,)"),
        ({"shapes": {A: [2, 3], B: None}}, "its packed tensors are not those that it names"),
        ({"keys": [A]}, "its packed tensors are not those that it names"),
        ({"keys": [A, A]}, "its packed tensors are not those that it names"),
        ({"kind": "8bit"}, "its packed codes has shape (7,), not (14,)"),
        ({"kind": "top_k"}, "packed.kind"),
        ({"shapes": {A: [-2, -3], B: [4, 2]}}, "packed.shapes"),
    ],
)
def test_a_forged_packed_task_is_refused_before_memory_is_taken(changes, reason):
    with pytest.raises(UpdateRejected) as refused:
        decode_task(*forged_task(**changes))
    assert reason in str(refused.value)
