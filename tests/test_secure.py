"""Secure aggregation: the sum is exact, whoever falls away, and of a single update nothing is seen."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from asking import train_tasks
from masking import ANNOUNCE, SHARE, TRAIN, UNMASK, MaskingEngine, gone, secured
from test_federate import ROWS, START, A, AddingEngine, B, begin, federation

from bellwether.client.masking import take_part
from bellwether.errors import RoundFailed, UpdateRejected
from bellwether.exchange.masks import needed_of, numbers_of
from bellwether.exchange.messages import (
    MASKED,
    SECRETS,
    AnnounceTask,
    Reply,
    ShareTask,
    TrainTask,
    UnmaskTask,
    Update,
)
from bellwether.exchange.ring import as_vector, from_vector, into_ring, out_of_ring, scale_of
from bellwether.federate import Progress, federate
from bellwether.method.average import fedavg
from bellwether.method.private import Noise, client_level, known_noise
from bellwether.method.secure import agree, open_sum
from bellwether.recipe.privacy import Privacy
from bellwether.recipe.recipe import SecureAggregation, Training
from bellwether.tools.randomness import Draws
from bellwether.tools.shamir import PRIME, factors_of, secret_of, shares_of

# The step of the ring, of four clients, changes of at most 64 and a million rows, which is the recipe's default.
STEP = 1 / scale_of(64e6, 4)


class Drawing:
    """Clients whose change is drawn, a different one for each, ``size`` times as large as usual."""

    def __init__(self, size=1.0, seed=0):
        self.size, self.seed = size, seed

    def change(self, client, round):
        draw = np.random.default_rng([self.seed, ord(client), round])
        return {key: (self.size * draw.normal(size=value.shape)).astype(np.float32) for key, value in TENSORS.items()}

    def ask(self, tasks, deadline=None):
        for client, task in tasks.items():
            change = self.change(client, task.round)
            sent = task.payload.expected
            update = Update(client, task.round, {key: sent[key] + change[key] for key in sent}, ROWS[client])
            yield Reply(client, 1.0, update=update)


TENSORS = START.tensors


# The sum ------------------------------------------------------------------------------------------


def test_the_mean_is_the_plain_one_within_the_stated_error(tmp_path):
    plain = federate(federation("federation.rounds=2", engine=AddingEngine()), begin())
    masked = federate(secured("federation.rounds=2", engine=MaskingEngine(tmp_path, inner=AddingEngine())), begin())
    # Per round: the ring's own error n / (2 s W), W = 100 rows, and what float32 rounds of the new adapter.
    bound = 2 * (4 * STEP / 200 + np.finfo(np.float32).eps * 60)
    for key in (A, B):
        assert np.abs(masked.adapter.tensors[key] - plain.adapter.tensors[key]).max() <= bound
    assert [client.client for client in masked.rounds[0].clients] == list("abcd")
    assert masked.rounds[0].loss == plain.rounds[0].loss == 2.0  # what a client tells of itself is told as before
    assert masked.rounds[0].secure.opened == 4
    assert plain.rounds[0].secure is None


def test_the_sum_is_that_of_the_rounded_integers_exactly(tmp_path):
    engine = MaskingEngine(tmp_path, inner=Drawing())
    agreed, updates = before_opening(engine)
    _, sum_P = open_sum(agreed, engine.ask, updates)
    # By hand: of each client round(s · rows · change), as whole numbers of Python.
    scale, drawing = scale_of(64e6, 4), engine.inner
    expected = [0] * 4
    for client, rows in ROWS.items():
        change = drawing.change(client, 1)
        values = [float(value) for key in (A, B) for value in change[key].reshape(-1)]
        expected = [total + round(scale * (rows * value)) for total, value in zip(expected, values, strict=True)]
    assert [int(value) for value in sum_P.view(np.int64)] == expected
    assert {update.client for update in updates} == set(ROWS)


def before_opening(engine, adapter=START, round=1):
    """Run all steps but the last by hand: what was agreed on, and the masked updates."""
    tasks = train_tasks(ROWS, adapter, Training(), round=round)
    agreed = agree(engine.ask, tasks, round, secured(engine=engine).recipe)
    return agreed, [reply.update for reply in engine.ask(agreed.tasks)]


def test_arrays_beside_the_tensors_are_added_up_too(tmp_path):
    method = replace(fedavg(), returns=lambda payload: {"more": (3,)})
    told = []

    class More(Drawing):
        def ask(self, tasks, deadline=None):
            for reply in super().ask(tasks):
                more = np.array([1, -2, 0.25], np.float32) * ROWS[reply.client] / 4
                yield replace(reply, update=replace(reply.update, arrays={"more": more}))

    def close(closing):
        told.append(closing.mean)
        return closing.state

    engine = MaskingEngine(tmp_path, method=replace(method, close=close), inner=More())
    federate(secured(engine=engine), begin())
    # By hand: the rows' weighted mean of rows is (100 + 400 + 900 + 1600) / 100 = 30, of which a quarter.
    np.testing.assert_allclose(told[0].arrays["more"], [7.5, -15, 1.875], rtol=0, atol=4 * STEP / 200 + 1e-14)
    assert (told[0].weight, told[0].count) == (100, 4)


HIDDEN_REASON = (
    "its update cannot be masked: it claims too many rows, is too long, or has values that are not finite or beyond 64 "
    "(secure_aggregation.range)"
)


def test_a_client_whose_value_does_not_fit_the_ring_is_left_out_and_nobody_is_told_the_value(tmp_path):
    engine = MaskingEngine(tmp_path, inner=Large("d"))
    progress = federate(secured("federation.quorum=0.5", engine=engine), begin())
    assert progress.rounds[0].left_out["d"] == HIDDEN_REASON
    np.testing.assert_allclose(progress.adapter.tensors[A], 1400 / 60, rtol=1e-6)  # by hand, without d


class Large:
    """Clients as in ``test_federate``, of which one has a value that is too large."""

    def __init__(self, client, value=65.0):
        self.client, self.value = client, value

    def ask(self, tasks, deadline=None):
        for reply in AddingEngine().ask(tasks):
            if reply.client == self.client:
                tensors = {**reply.update.tensors, B: np.full((2, 1), self.value, np.float32)}
                reply = replace(reply, update=replace(reply.update, tensors=tensors))
            yield reply


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, ()), (9.0, ("federation.max_norm=10",)), (1.0, ("federation.max_rows=39",))]
)
def test_what_the_server_cannot_see_is_checked_at_the_client(tmp_path, value, words):
    inner = Large("d", value)
    inner.ask = spoiling(inner.ask) if words and "norm" in words[0] else inner.ask
    progress = federate(secured(*words, engine=MaskingEngine(tmp_path, inner=inner)), begin())
    # With a norm of 10 all others are too long as well.
    assert progress.rounds[0].left_out["d"] == HIDDEN_REASON


def spoiling(ask):
    """Let all other clients stay below the norm."""

    def smaller(tasks, deadline=None):
        for reply in ask(tasks):
            if reply.client != "d":
                tensors = {key: value * 0 + 1 for key, value in reply.update.tensors.items()}
                reply = replace(reply, update=replace(reply.update, tensors=tensors))
            yield reply

    return smaller


def test_the_scale_is_the_largest_with_which_no_sum_overflows():
    for clients, most in itertools.product((1, 3, 10, 200, 100_000), (1e-3, 1.0, 64e6, 1e12)):
        scale = scale_of(most, clients)
        # Exact, in Python's whole numbers: all clients at the bound stay below 2^63, and twice the scale would not.
        assert clients * (int(scale * most) + 1) < 2**63
        assert clients * 2 * scale * most + clients / 2 >= 2**63 * (1 - 1e-9)


def test_values_at_the_bound_come_back_and_those_beyond_are_refused():
    largest, most, clients = 64.0, 1e6, 7
    top_P, low_P = (into_ring(np.full(3, sign * largest), most, largest, most, clients) for sign in (1, -1))
    for part_P, sign in ((top_P, 1), (low_P, -1)):
        total_P = np.sum([part_P] * clients, axis=0, dtype=np.uint64)
        np.testing.assert_allclose(out_of_ring(total_P, scale_of(largest * most, clients)), sign * clients * 64e6)
    with pytest.raises(UpdateRejected, match="none beyond 64"):
        into_ring(np.array([np.nextafter(64.0, 65)]), 1.0, largest, most, clients)
    with pytest.raises(UpdateRejected, match="its weight is 1e\\+06"):
        into_ring(np.zeros(1), np.nextafter(1e6, 1e7), largest, most, clients)


def test_an_update_is_one_vector_and_back():
    tensors, arrays = (
        {"x": np.arange(6.0).reshape(2, 3), "y": np.ones((1, 1))},
        {"b": np.zeros(2), "a": np.full(1, 9.0)},
    )
    values_P = as_vector(tensors, arrays)
    np.testing.assert_array_equal(values_P, [0, 1, 2, 3, 4, 5, 1, 9, 0, 0])
    back = from_vector(values_P, tensors, {name: value.shape for name, value in arrays.items()})
    for found, sent in zip(back, (tensors, arrays), strict=True):
        assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in sent.items()}
    assert from_vector(as_vector({}, {}), {}, {}) == ({}, {})


# Who falls away -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [ANNOUNCE, SHARE, TRAIN, UNMASK])
def test_a_client_may_fall_away_before_any_step(tmp_path, step):
    events = []
    engine = MaskingEngine(tmp_path, {(step, "d"): gone})
    progress = federate(secured(engine=engine, events=events), begin())
    record = progress.rounds[0]
    # By hand: without d (100 + 400 + 900) / 60; with it, where its masked update has come, 30.
    expected = 30.0 if step == UNMASK else 1400 / 60
    np.testing.assert_allclose(progress.adapter.tensors[A], expected, rtol=1e-6)
    assert dict(record.left_out) == ({} if step == UNMASK else {"d": "it did not answer"})
    assert (record.secure.needed, record.secure.opened) == (3, 3)


def test_clients_may_fall_away_before_each_step_down_to_the_threshold(tmp_path):
    clients = dict(zip("abcdefg", (10, 20, 30, 40, 50, 60, 70), strict=True))
    faults = {(ANNOUNCE, "g"): gone, (SHARE, "f"): gone, (TRAIN, "a"): gone}
    engine = MaskingEngine(tmp_path, faults, inner=Rows(clients))
    whole = secured("secure_aggregation.threshold=0.51", engine=engine)
    whole = replace(whole, ranks=dict.fromkeys(clients, 1), sample=lambda sampling: tuple(clients))
    progress = federate(whole, begin())
    # By hand, of b to e: (400 + 900 + 1600 + 2500) / 140.
    np.testing.assert_allclose(progress.adapter.tensors[A], 5400 / 140, rtol=1e-6)
    record = progress.rounds[0].secure
    assert (record.needed, record.announced, record.dealt, record.opened) == (4, 6, 5, 4)


class Rows:
    """Clients that add their rows to every value."""

    def __init__(self, rows):
        self.rows = rows

    def ask(self, tasks, deadline=None):
        for client, task in tasks.items():
            tensors = {key: value + np.float32(self.rows[client]) for key, value in task.adapter.tensors.items()}
            yield Reply(client, 1.0, update=Update(client, task.round, tensors, self.rows[client]))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (ANNOUNCE, "2 of 4 clients announced keys, and 3 are needed"),
        (SHARE, "2 of 4 clients dealt shares, and 3 are needed"),
        (TRAIN, "2 of 4 clients sent masked updates, and 3 are needed"),
        (UNMASK, "2 of 4 clients opened shares, and 3 are needed"),
    ],
)
def test_below_the_threshold_the_round_fails_in_a_sentence_and_nothing_is_revealed(tmp_path, step, said):
    engine = MaskingEngine(tmp_path, {(step, "c"): gone, (step, "d"): gone})
    with pytest.raises(RoundFailed, match=said):
        federate(secured("federation.quorum=0.5", engine=engine), begin())
    if step != UNMASK:
        assert engine.seen[UNMASK] == {}
    again = MaskingEngine(tmp_path / "again", {(step, "c"): gone, (step, "d"): gone})
    progress = federate(secured("federation.quorum=0.5", "federation.failed_rounds=1", engine=again), begin())
    assert said in progress.rounds[0].failure
    np.testing.assert_array_equal(progress.adapter.tensors[A], START.tensors[A])


def test_a_client_opens_no_sum_of_fewer_updates_than_needed(tmp_path):
    engine = MaskingEngine(tmp_path)
    agreed, _ = before_opening(engine)
    reply = engine.reply("a", UnmaskTask(1, ("a", "b")))
    assert reply.failure == "2 updates are in the sum, and 3 are needed"
    assert reply.secured is None
    assert agreed.needed == 3


# What is revealed ---------------------------------------------------------------------------------


def test_of_no_other_client_both_secrets_are_revealed_and_nothing_twice(tmp_path):
    engine = MaskingEngine(tmp_path)
    before_opening(engine)
    first = engine.reply("a", UnmaskTask(1, ("a", "b", "c"))).secured
    assert (first.seeds.keys(), first.keys.keys()) == ({"a", "b", "c"}, {"d"})
    # Whatever the server says next, nobody is told the other share of b, c or d.
    for survivors in (("a", "b", "d"), ("a", "b", "c"), ("a", "b", "c", "d")):
        second = engine.reply("a", UnmaskTask(1, survivors))
        assert second.failure == "it has no masked update in this round, or has opened its shares already"


def test_a_client_masks_no_second_update_and_deals_no_second_shares(tmp_path):
    # Of two updates under the same masks, whoever has both has the difference.
    engine = MaskingEngine(tmp_path)
    agreed, _ = before_opening(engine)
    again = engine.reply("a", agreed.tasks["a"])
    assert (again.update, again.failure) == (None, "it has dealt no shares since it masked an update last")
    assert (
        engine.reply("a", ShareTask(1, agreed.announced)).failure
        == "it has announced no keys since it dealt shares last"
    )


def test_after_its_round_a_client_keeps_nothing_of_it(tmp_path):
    engine = MaskingEngine(tmp_path)
    federate(secured(engine=engine), begin())
    assert list(tmp_path.rglob("*.json")) == []


def test_two_survivor_lists_to_different_clients_open_neither_secret(tmp_path):
    # A server that tells half of the cohort that d sent an update, and the other half that it did not, has too few
    # shares of either: 2 of each, where 3 are needed.
    engine = MaskingEngine(tmp_path)
    agreed, _ = before_opening(engine)
    told = {c: engine.reply(c, UnmaskTask(1, tuple("abcd"))).secured for c in "ab"}
    told |= {c: engine.reply(c, UnmaskTask(1, tuple("abc"))).secured for c in "c"}
    assert sum("d" in one.seeds for one in told.values()) == 2 < agreed.needed
    assert sum("d" in one.keys for one in told.values()) == 1 < agreed.needed


def bits_of(values_P):
    return np.unpackbits(values_P.view(np.uint8))


def chi_square(values_P):
    """Pearson's statistic of the bytes of values against all 256 alike; of random ones its mean is 255."""
    counts = np.bincount(values_P.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


def masked_of(folder, size, round=1, values=20_000):
    """A client's masked update of many values, of its change or of none at all."""
    start = replace(START, tensors={A: np.zeros((1, values), np.float32)})

    class Big(Drawing):
        def ask(self, tasks, deadline=None):
            for client, task in tasks.items():
                tensors = {A: np.full((1, values), size, np.float32)}
                yield Reply(client, 1.0, update=Update(client, task.round, tensors, ROWS[client]))

    _, updates = before_opening(MaskingEngine(folder, inner=Big()), start, round)
    return updates[0].packed[MASKED]


def test_a_masked_update_looks_random_whatever_it_holds(tmp_path):
    # chi-square of 255 degrees of freedom: mean 255, standard deviation sqrt(510); seven of these are never met.
    bound = 255 + 7 * 510**0.5
    nothing_P, large_P = (masked_of(tmp_path / str(size), size) for size in (0.0, 63.0))
    assert chi_square(into_ring(np.full(20_000, 63.0), 10, 64, 1e6, 4)) > 100 * bound  # what it is without a mask
    for found_P in (nothing_P, large_P):
        assert chi_square(found_P) < bound


def test_masks_of_two_rounds_have_nothing_in_common(tmp_path):
    one_P, two_P = (masked_of(tmp_path / str(round), 1.0, round) for round in (1, 2))
    assert chi_square(one_P - two_P) < 255 + 7 * 510**0.5
    same = float((bits_of(one_P) == bits_of(two_P)).mean())
    assert abs(same - 0.5) < 7 * 0.5 / (64 * 20_000) ** 0.5  # of fair coins


def test_the_same_recipe_gives_the_same_bytes_and_real_secrets_do_not(tmp_path):
    task = AnnounceTask(1, 4, SecureAggregation(enabled=True), Draws({SECRETS: 5}))
    drawn = [take_part("a", task, tmp_path, real=False) for _ in range(2)]
    assert drawn[0] == drawn[1]
    real = [take_part("a", task, tmp_path, real=True) for _ in range(2)]
    assert len({one.masking for one in (*drawn, *real)}) == 3


def test_a_resumed_round_begins_all_steps_anew(tmp_path):
    committed = []
    whole = federate(secured("federation.rounds=3", engine=MaskingEngine(tmp_path), committed=committed), begin())
    broken = MaskingEngine(tmp_path / "b", {(UNMASK, "a"): stopped})
    with pytest.raises(KeyboardInterrupt):
        federate(secured("federation.rounds=3", engine=broken), committed[1])
    rest = federate(secured("federation.rounds=3", engine=MaskingEngine(tmp_path / "b")), committed[1])
    assert rest.adapter.fingerprint() == whole.adapter.fingerprint()


def stopped(reply):
    raise KeyboardInterrupt


# What others may forge ----------------------------------------------------------------------------


def forged_share(reply):
    """A share of b's seed with one bit changed."""
    share = bytearray(reply.secured.seeds["b"])
    share[-1] ^= 1
    return [replace(reply, secured=replace(reply.secured, seeds={**reply.secured.seeds, "b": bytes(share)}))]


def test_a_wrong_share_makes_the_round_fail_and_spoils_no_sum(tmp_path):
    engine = MaskingEngine(tmp_path, {(UNMASK, "a"): forged_share})
    with pytest.raises(RoundFailed, match="the shares that were opened do not give the mask of b"):
        federate(secured(engine=engine), begin())


def forged_key(reply):
    share = bytearray(reply.secured.keys["d"])
    share[-1] ^= 1
    return [replace(reply, secured=replace(reply.secured, keys={"d": bytes(share)}))]


def test_a_wrong_share_of_a_key_is_found_out_too(tmp_path):
    engine = MaskingEngine(tmp_path, {(TRAIN, "d"): gone, (UNMASK, "b"): forged_key})
    with pytest.raises(RoundFailed, match="the shares that were opened do not give the masking key of d"):
        federate(secured(engine=engine), begin())


def test_a_client_refuses_keys_as_its_own_that_it_did_not_announce(tmp_path):
    engine = MaskingEngine(tmp_path)
    agreed, _ = before_opening(engine)
    fresh = MaskingEngine(tmp_path / "fresh")
    announce = AnnounceTask(1, 4, SecureAggregation(enabled=True), Draws({SECRETS: 1}))
    fresh.reply("a", announce)
    swapped = fresh.reply("a", ShareTask(1, agreed.announced))
    assert swapped.failure == "the keys that came as its own are not those that it announced"
    own = {"a": fresh.reply("a", announce).secured, "b": agreed.announced["c"], "c": agreed.announced["c"]}
    assert fresh.reply("a", ShareTask(1, own)).failure == "two clients announced the same key"
    few = {"a": own["a"], "b": agreed.announced["b"]}
    assert fresh.reply("a", ShareTask(1, few)).failure == "2 clients announced keys, and 3 are needed"


def test_where_clients_are_hidden_and_nobody_answers_masks_or_not_the_round_is_noise(tmp_path):
    method = client_level(fedavg(), Privacy(noise=1.0), Noise(1.0, 4.0, known_noise))
    engine = MaskingEngine(tmp_path, {(TRAIN, name): gone for name in ROWS}, method=method)
    progress = federate(secured("privacy.noise=1", engine=engine), Progress(0, method.begin(START)))
    assert progress.rounds[0].failure is None
    assert progress.rounds[0].left_out.keys() == ROWS.keys()
    assert progress.adapter.fingerprint() != START.fingerprint()


def test_a_server_that_tells_of_a_smaller_cohort_than_it_asks_gets_no_shares(tmp_path):
    # With a cohort of 3 told of, two shares would open either secret of one of ten.
    engines = {f"c{number}": MaskingEngine(tmp_path / f"c{number}") for number in range(10)}
    keys = {
        name: engine.reply(name, AnnounceTask(1, 3, SecureAggregation(enabled=True), Draws({SECRETS: number}))).secured
        for number, (name, engine) in enumerate(engines.items())
    }
    refused = engines["c0"].reply("c0", ShareTask(1, keys))
    assert refused.failure == "10 clients announced keys, more than the cohort that was told of"


def test_shares_that_the_server_changed_are_not_opened(tmp_path):
    engine = MaskingEngine(tmp_path)
    agreed, _ = before_opening(engine)
    masking = agreed.tasks["a"].masking
    swapped = replace(masking, shares={**masking.shares, "b": masking.shares["c"]})
    fresh = MaskingEngine(tmp_path / "fresh")  # the same secrets, since they are drawn from the same seed
    announced = {client: fresh.reply(client, task).secured for client, task in engine.tasks[0].items()}
    for client in ROWS:
        fresh.reply(client, ShareTask(1, announced))
    fresh.reply("a", replace(agreed.tasks["a"], masking=swapped))
    told = fresh.reply("a", UnmaskTask(1, tuple("abcd")))
    assert told.failure == "the shares that came for it of b are not as that one sealed them"


def test_a_cohort_of_two_masks_nothing_and_is_refused(tmp_path):
    engine = MaskingEngine(tmp_path)
    whole = secured(engine=engine, sample=lambda sampling: ("a", "b"))
    with pytest.raises(RoundFailed, match="a cohort of 2 masks nothing, and 3 clients are needed"):
        federate(whole, begin())
    assert [type(task) for tasks in engine.tasks for task in tasks.values() if isinstance(task, TrainTask)] == []


# Shamir -------------------------------------------------------------------------------------------


def test_shares_are_those_of_a_polynomial_worked_by_hand():
    # 1234 + 166 x + 94 x², the example of the article on Shamir's scheme in Wikipedia.
    assert shares_of(1234, [166, 94], 6) == [1494, 1942, 2578, 3402, 4414, 5614]
    for numbers in itertools.combinations(range(1, 7), 3):
        shares = dict(zip(range(1, 7), shares_of(1234, [166, 94], 6), strict=True))
        assert secret_of(shares, factors_of(numbers)) == 1234


def test_fewer_shares_agree_with_every_secret():
    # Two shares of three: for each secret there is a polynomial through it and both.
    first, second = shares_of(1234, [166, 94], 2)
    for secret in (0, 1, 1234, PRIME - 1):
        # x0 = 0, 1, 2: the value at 3 of the parabola through (0, secret), (1, first), (2, second) is s - 3 f + 3 g.
        third = (secret - 3 * first + 3 * second) % PRIME
        assert secret_of({1: first, 2: second, 3: third}, factors_of([1, 2, 3])) == secret


def test_more_than_half_are_needed_whatever_is_given():
    assert [needed_of(count, 0.6) for count in (3, 4, 5, 10, 100)] == [2, 3, 3, 6, 60]
    assert [needed_of(count, 0.51) for count in (3, 4, 5, 10)] == [2, 3, 3, 6]
    assert needed_of(7, 1.0) == 7
    assert numbers_of("cab") == {"a": 1, "b": 2, "c": 3}
