"""Ways to average LoRA adapters and to keep one's own, against cases worked by hand and the true mean of products."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rounding import gamma
from test_aggregate import closed
from test_methods import A, B, case, number, product

from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b, stacked
from bellwether.exchange.messages import Payload, Update
from bellwether.method.average import fedavg
from bellwether.method.exact import fedex_lora, flora
from bellwether.method.halves import ffa_lora, rolora
from bellwether.method.hetlora import hetlora, product_norm
from bellwether.method.method import Known, State, Step, Trained
from bellwether.method.personal import ditto, feddpa, fedsa_lora, fine_tuned
from bellwether.method.returned import first_state
from bellwether.method.scaffold import scaffold
from bellwether.runner.wiring import result_of
from bellwether.tools.randomness import Draws

MODULES, SHAPES = ("q", "v"), {"q": (9, 7), "v": (5, 9)}  # inputs, outputs


def products(adapter: Adapter) -> dict[str, np.ndarray]:
    """s B A of every module."""
    return {
        module: adapter.config.scaling * adapter.tensors[key_b(module)] @ adapter.tensors[key_a(module)]
        for module in adapter.config.modules
    }


def whole(state: State) -> Adapter:
    """The adapter with what was folded before it."""
    return state.adapter if state.folded is None else stacked([state.folded, state.adapter])


def drawn(seed: int, ranks=(4, 4, 4), *, rslora: bool = False):
    """A server's adapter of rank 4, clients' updates of some ranks, and the true mean of their products."""
    draw = np.random.default_rng(seed)

    def tensors(rank):
        return {
            key(module): draw.normal(size=shape)
            for module, (inputs, outputs) in SHAPES.items()
            for key, shape in ((key_a, (rank, inputs)), (key_b, (outputs, rank)))
        }

    config = AdapterConfig(4, 6.0, 0.0, MODULES, rslora=rslora)
    updates = [Update(f"c{n}", 1, tensors(rank), int(draw.integers(1, 99))) for n, rank in enumerate(ranks)]
    total = sum(update.rows for update in updates)
    exact = {
        module: sum(
            update.rows / total * 6.0 / (rank**0.5 if rslora else rank)
            * update.tensors[key_b(module)] @ update.tensors[key_a(module)]
            for update, rank in zip(updates, ranks, strict=True)
        )
        for module in MODULES
    }  # fmt: skip
    return Adapter(config, tensors(4)), updates, exact


def assert_equal(found, wanted):
    """Whether products of every module are the same to ten digits."""
    for module in MODULES:
        np.testing.assert_allclose(found[module], wanted[module], rtol=0, atol=1e-10 * np.abs(wanted[module]).max())


# The exact mean ------------------------------------------------------------------------------------


def test_flora_folds_the_mean_of_products_and_begins_with_a_new_a_and_a_b_of_zero():
    adapter, updates, exact = case()
    state = closed(flora(), updates, State(adapter))
    np.testing.assert_allclose(product(state.folded), exact, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(state.adapter.tensors[B], 0.0)
    new_RI = state.adapter.tensors[A]
    assert np.abs(new_RI).max() < 1 / np.sqrt(2)
    assert len({*new_RI.ravel(), *adapter.tensors[A].ravel()}) == 6, "drawn anew"
    again, later = (closed(flora(), updates, State(adapter), round=round) for round in (1, 2))
    np.testing.assert_array_equal(again.adapter.tensors[A], new_RI)
    assert not (later.adapter.tensors[A] == new_RI).any()


def test_fedex_lora_folds_what_the_means_lack():
    _, updates, exact = case()
    adapter = Adapter(AdapterConfig(1, 2.0, 0.0, ("m",)), {A: np.zeros((1, 2)), B: np.zeros((3, 1))})
    state = closed(fedex_lora(), updates, State(adapter))
    # By hand, of rank 1 with a scaling of 2: the mean of A is [.75 .5], of 2 B (.75, .25, 1.25).
    residual = [[0.1875, -0.375], [-0.1875, 0.375], [0.5625, -1.125]]
    np.testing.assert_allclose(state.adapter.tensors[A], [[0.75, 0.5]], rtol=1e-15)
    assert np.linalg.norm(residual) == pytest.approx(1.39054, abs=5e-6)
    np.testing.assert_allclose(product(whole(state)), exact, rtol=0, atol=1e-12)
    np.testing.assert_allclose(product(state.folded), residual, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("make", "ranks"), [(flora, (4, 4, 4)), (flora, (1, 4, 2, 3)), (fedex_lora, (4, 4, 4))])
def test_what_all_begin_with_is_the_true_mean_of_the_clients_products(make, ranks, rslora):
    adapter, updates, exact = drawn(len(ranks), ranks, rslora=rslora)
    state = closed(make(), updates, State(adapter))
    assert_equal(products(whole(state)), exact)
    turned = closed(make(), updates[::-1], State(adapter))
    assert_equal(products(whole(turned)), exact)
    # FedIT's means are another thing.
    if set(ranks) == {4}:
        mean = adapter.updated(
            {key: np.average([u.tensors[key] for u in updates], axis=0, weights=[u.rows for u in updates])
             for key in adapter.tensors}
        )  # fmt: skip
        assert np.linalg.norm(products(mean)["q"] - exact["q"]) > 0.1 * np.linalg.norm(exact["q"])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("make", "ranks", "rank"), [(flora, (4, 4), 7), (fedex_lora, (4, 4), 7), (flora, (1, 1), 6), (flora, (2, 1), 7)]
)
def test_what_is_folded_round_by_round_adds_up_and_no_rank_grows_beyond_the_weights(make, ranks, rank, dtype):
    adapter, _, _ = drawn(0)
    adapter = adapter.with_tensors({key: value.astype(dtype) for key, value in adapter.tensors.items()})
    state, largest = State(adapter), 0.0
    for round in range(3):
        # What the clients begin with, less the adapter that they change: their mean takes its place.
        base = {module: value - products(state.adapter)[module] for module, value in products(whole(state)).items()}
        _, updates, exact = drawn(round + 1, ranks)
        state = closed(make(), updates, state, round=round + 1)
        for module in MODULES:
            largest = max(largest, np.abs(exact[module]).max())
            # Sums of at most 12 products of stored values, in three rounds.
            near = gamma(torch.float64 if dtype == np.float64 else torch.float32, 3 * 40) * 40 * largest
            found = products(whole(state))[module]
            np.testing.assert_allclose(found, base[module] + exact[module], rtol=0, atol=near)
    assert state.folded.config.rank == rank, "of weights with 9 inputs and 7 outputs"
    assert state.folded.config.scaling == 1.0
    assert state.folded.tensors[key_a("q")].dtype == dtype


def test_an_adapter_that_was_begun_anew_is_no_part_of_the_result():
    adapter, updates, _ = case()
    state = closed(flora(), updates, State(adapter))
    assert result_of(state).config.rank == state.folded.config.rank == 2
    np.testing.assert_allclose(product(result_of(state)), product(state.folded), rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", [flora, fedex_lora, ffa_lora, rolora, hetlora, fedsa_lora, ditto, feddpa])
def test_a_round_without_updates_changes_nothing(make):
    state = State(number(1.0), {"kept": 1})
    assert closed(make(), [], state, failure="1 of 4 updates can be used, and 2 are needed") is state


# Unlike ranks, filled up with zeros ---------------------------------------------------------------


def two_ranks():
    """A server's adapter of rank 2, and two clients' of ranks 2 and 1, each in its own scaling, alpha / rank."""
    server = Adapter(AdapterConfig(2, 2.0, 0.0, ("m",)), {A: np.full((2, 2), 7.0), B: np.full((3, 2), 7.0)})
    first = {A: np.eye(2), B: np.array([[1.0, 0.0], [0.0, 0.5], [2.0, 0.0]])}
    # Scaled by 2 / 1 at its client, this is B = (0, 1, -1) in the server's scaling of 2 / 2.
    second = {A: np.array([[0.0, 2.0]]), B: np.array([[0.0], [0.5], [-0.5]])}
    return server, [Update("one", 1, first, 75), Update("two", 1, second, 25)]


def test_hetlora_weighs_clients_by_the_norms_of_their_products_where_the_recipe_says_so():
    server, updates = two_ranks()
    norms = [product_norm(update, server.config) for update in updates]
    np.testing.assert_allclose(norms, [21**0.5 / 2, 8**0.5], rtol=1e-14)
    after = closed(hetlora(norm_weights=True), updates, State(server)).adapter
    np.testing.assert_allclose(after.tensors[A], [[0.447542, 1.104916], [0, 0.447542]], rtol=0, atol=5e-7)
    expected = [[0.447542, 0], [0.552458, 0.223771], [0.342626, 0]]
    np.testing.assert_allclose(after.tensors[B], expected, rtol=0, atol=5e-7)


def test_hetlora_weighs_clients_by_rows_unless_told_otherwise_so_that_no_large_values_buy_influence():
    server, updates = two_ranks()
    after = closed(hetlora(), updates, State(server)).adapter
    np.testing.assert_allclose(after.tensors[A], [[0.75, 0.5], [0, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(after.tensors[B], [[0.75, 0], [0.25, 0.375], [1.25, 0]], rtol=1e-15)
    louder = replace(updates[1], tensors={A: updates[1].tensors[A], B: 100 * updates[1].tensors[B]})
    for norm_weights, share in ((False, 0.25), (True, 0.9)):
        found = closed(hetlora(norm_weights), [updates[0], louder], State(server)).adapter.tensors[A][0, 1] / 2
        assert (found > share) if norm_weights else found == pytest.approx(share)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_hetlora_sends_at_any_rank_comes_back_untouched_where_nobody_trains(rslora):
    adapter, _, _ = drawn(3, rslora=rslora)
    method, state = hetlora(), State(adapter)
    sent = [method.give(state, Known(f"c{rank}", rank), 1).adapter for rank in (2, 2)]
    for one in sent:  # the first directions of the server's product, in the scaling of the smaller rank
        for module, product_OI in products(one).items():
            a_RI, b_OR = (adapter.tensors[key(module)] for key in (key_a, key_b))
            np.testing.assert_allclose(product_OI, adapter.config.scaling * b_OR[:, :2] @ a_RI[:2], rtol=1e-12)
    after = closed(method, [Update(f"c{n}", 1, one.tensors, 5) for n, one in enumerate(sent)], state).adapter
    for key, value in adapter.tensors.items():  # also rows 3 and 4, which no client of the round has
        np.testing.assert_allclose(after.tensors[key], value, rtol=1e-14)


@pytest.mark.parametrize("norm_weights", [False, True])
def test_hetlora_does_not_depend_on_the_order_of_clients_and_is_fedavg_where_all_have_one_rank(norm_weights):
    adapter, updates, _ = drawn(1, (1, 4, 2))
    method = hetlora(norm_weights)
    there, back = (closed(method, order, State(adapter)).adapter for order in (updates, updates[::-1]))
    for key, value in there.tensors.items():
        np.testing.assert_array_equal(back.tensors[key], value)
    _, same, _ = drawn(2)
    one = [replace(update, tensors=same[0].tensors) for update in same]
    for found in (closed(method, one, State(adapter)).adapter, closed(fedavg(), one, State(adapter)).adapter):
        for key, value in same[0].tensors.items():
            np.testing.assert_allclose(found.tensors[key], value, rtol=1e-14)


def test_hetlora_counts_rows_where_every_product_is_zero():
    adapter, updates, _ = drawn(1, (1, 4, 2))
    still = [
        replace(one, tensors={key: value * ("lora_A" in key) for key, value in one.tensors.items()}) for one in updates
    ]
    by_norm, by_row = (closed(hetlora(norms), still, State(adapter)).adapter for norms in (True, False))
    for key, value in by_row.tensors.items():
        np.testing.assert_array_equal(by_norm.tensors[key], value)


# Halves -------------------------------------------------------------------------------------------


def test_ffa_lora_averages_b_under_the_a_that_all_have():
    first = Adapter(AdapterConfig(1, 1.0, 0.0, ("m",)), {A: np.array([[1.0, 1.0]]), B: np.zeros((3, 1))})
    payload = ffa_lora().give(State(first), Known("one", 1), 2)
    assert payload.trained == (B,)
    assert list(payload.expected) == [B]
    values = {"one": ([1.0, 0.0, 2.0], 75), "two": ([0.0, 1.0, -1.0], 25)}
    updates = [Update(name, 1, {B: np.array([value]).T}, rows) for name, (value, rows) in values.items()]
    state = closed(ffa_lora(), updates, State(first))
    np.testing.assert_allclose(product(state.adapter), [[0.75, 0.75], [0.25, 0.25], [1.25, 1.25]], rtol=1e-15)


def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones_and_each_mean_is_that_of_the_products():
    adapter, _, _ = drawn(0)
    state, method = State(adapter), rolora()
    for round, half in ((1, key_b), (2, key_a), (3, key_b)):
        payload = method.give(state, Known("one", 4), round)
        assert payload.trained == tuple(half(module) for module in MODULES)
        _, updates, _ = drawn(round)
        sent = [Update(u.client, round, {key: u.tensors[key] for key in payload.expected}, u.rows) for u in updates]
        clients = [state.adapter.updated(one.tensors) for one in sent]
        total = sum(one.rows for one in sent)
        exact = {
            module: sum(one.rows / total * products(client)[module] for one, client in zip(sent, clients, strict=True))
            for module in MODULES
        }
        state = closed(method, sent, state)
        assert_equal(products(state.adapter), exact)


# Personalisation ----------------------------------------------------------------------------------


def test_fedsa_lora_sends_a_and_keeps_b_which_the_client_goes_on_from_and_serves():
    method, state = fedsa_lora(), State(number(1.0, 0.0))
    payload = method.give(state, Known("one", 1), 1)
    assert list(payload.expected) == [A]
    trained = {A: np.array([[3.0]]), B: np.array([[5.0]])}
    finished = method.finish(Trained(payload, {}, [trained], [0.1], Draws()))
    assert finished.tensors == {A: trained[A]}
    assert finished.own == {B: trained[B]}
    state = closed(method, [Update("one", 1, finished.tensors, 4)], state)
    np.testing.assert_array_equal(state.adapter.tensors[B], 0.0)
    later = method.give(state, Known("one", 1), 2)
    (one,) = method.passes
    for begun in (one.begin(later, finished.own), method.serves(later, finished.own).tensors):
        assert (begun[A].item(), begun[B].item()) == (3.0, 5.0)
    assert method.serves(later, {}).tensors[B].item() == 0.0


def test_two_rounds_of_dittos_own_adapter_are_those_worked_by_hand():
    # F(v) = ½ (v - 3)², lambda 0.5, rate 0.1: two steps from v = x = 1, then one from there to x = 2.
    method = ditto(pull=0.5)
    shared, personal = method.passes

    def steps(begun, start, count):
        v_P = begun
        for step in range(count):
            given = Step("one", step, 0.1, v_P - 3, v_P, start, {}, {})
            v_P = v_P - 0.1 * personal.correct(given)
        return v_P

    assert shared.correct is None
    payload = method.give(State(number(1.0)), Known("one", 1), 1)
    begun = personal.begin(payload, {})[A].ravel()
    v_P = steps(begun, np.array([1.0]), 2)
    np.testing.assert_allclose(v_P, [1.37], rtol=1e-12)
    x = {A: np.array([[2.0]]), B: np.array([[0.0]])}
    own = {A: v_P.reshape(1, 1), B: np.array([[0.0]])}
    finished = method.finish(Trained(payload, {}, [x, own], [0.1], Draws()))
    assert finished.tensors[A] == 2.0
    assert finished.own[A] == pytest.approx(1.37)
    later = method.give(State(number(2.0)), Known("one", 1), 2)
    assert shared.begin(later, finished.own)[A] == 2.0
    again = personal.begin(later, finished.own)[A].ravel()
    np.testing.assert_allclose(steps(again, np.array([2.0]), 1), [1.5645], rtol=1e-12)
    assert method.serves(later, finished.own).tensors[A] == pytest.approx(1.37)


def test_feddpa_serves_the_weighted_sum_of_both_products_as_one_adapter_of_twice_the_rank():
    shared, updates, _ = drawn(0)
    method, payload = feddpa(mix=0.25), Payload(shared)
    local = updates[0].tensors
    finished = method.finish(Trained(payload, {}, [updates[1].tensors, local], [0.1], Draws()))
    assert finished.tensors == updates[1].tensors
    served = method.serves(payload, finished.own)
    assert served.config.rank == 8
    both = products(shared), products(shared.with_tensors(local))
    assert_equal(products(served), {module: 0.75 * both[0][module] + 0.25 * both[1][module] for module in MODULES})
    assert method.serves(payload, {}) is shared
    assert method.last is None


def test_feddpa_f_trains_the_local_adapter_in_the_last_round_from_the_shared_one():
    shared, updates, _ = drawn(0)
    method, state = feddpa(variant="F"), State(shared)
    assert method.of_round(2, 3) is method
    last = method.of_round(3, 3)
    payload = last.give(state, Known("one", 4), 3)
    assert payload.expected == {}
    (one,) = last.passes
    assert one.begin(payload, {}) == shared.tensors
    finished = last.finish(Trained(payload, {}, [updates[0].tensors], [0.1], Draws()))
    assert finished.tensors == {}
    both = products(shared), products(shared.with_tensors(updates[0].tensors))
    served = method.serves(payload, finished.own)
    assert_equal(products(served), {module: 0.5 * both[0][module] + 0.5 * both[1][module] for module in MODULES})
    assert closed(last, [Update("one", 3, {}, 4)], state) is state


@pytest.mark.parametrize("make", [fedavg, fedsa_lora, ditto, scaffold, flora, rolora])
def test_a_fine_tuned_method_is_itself_until_the_last_round_and_then_keeps_what_each_client_tuned(make):
    shared, updates, _ = drawn(0)
    inner = make()
    method = fine_tuned(inner)
    state = first_state(inner, shared)
    before = inner.give(state, Known("one", 4), 1)
    assert method.of_round(1, 2) is method
    assert (method.give, method.passes, method.close) == (inner.give, inner.passes, inner.close)
    last = method.of_round(2, 2)
    payload = last.give(state, Known("one", 4), 2)
    assert (payload.returned, payload.trained, payload.arrays.keys()) == ((), None, before.arrays.keys())
    mine = {key: value + 1 for key, value in shared.tensors.items()}  # what Ditto or FedSA-LoRA have kept before
    for own in ({}, mine):
        assert last.passes[0].begin(payload, own) == inner.serves(payload, own).tensors
        assert method.serves(payload, own).tensors == inner.serves(payload, own).tensors
    finished = last.finish(Trained(payload, mine, [updates[0].tensors], [0.1], Draws()))
    assert method.serves(payload, finished.own).tensors == updates[0].tensors
    assert closed(last, [Update("one", 2, {}, 4)], state) is state
