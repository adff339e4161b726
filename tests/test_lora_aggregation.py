"""Ways to average LoRA adapters and to keep one's own, against cases worked by hand and the true mean of products."""

import numpy as np
import pytest
import torch
from rounding import gamma
from test_aggregate import closed
from test_methods import A, B, case, number, product

from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b, stacked
from bellwether.exchange.messages import Update
from bellwether.method.exact import fedex_lora, flora
from bellwether.method.halves import ffa_lora, rolora
from bellwether.method.method import Known, State, Step, Trained
from bellwether.method.personal import ditto, fedsa_lora
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


@pytest.mark.parametrize("make", [flora, fedex_lora, ffa_lora, rolora, fedsa_lora, ditto])
def test_a_round_without_updates_changes_nothing(make):
    state = State(number(1.0), {"kept": 1})
    assert closed(make(), [], state, failure="1 of 4 updates can be used, and 2 are needed") is state


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
    for begun in (one.begin(later, finished.own), method.serves(later, finished.own)):
        assert (begun[A].item(), begun[B].item()) == (3.0, 5.0)
    assert method.serves(later, {})[B].item() == 0.0


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
    assert method.serves(later, finished.own)[A] == pytest.approx(1.37)
