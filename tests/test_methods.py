"""Methods of the server and the clients against cases worked by hand from their papers, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rounding import assert_rounded
from test_aggregate import closed

from bellwether.exchange.adapter import Adapter, AdapterConfig, flat, key_a, key_b
from bellwether.exchange.messages import Update
from bellwether.method.average import fedavg, fedprox
from bellwether.method.flexlora import flexlora
from bellwether.method.method import Closing, Known, State, Step, Trained, mean_of
from bellwether.method.products import cut, factors
from bellwether.method.scaffold import CHANGE, CONTROL, scaffold
from bellwether.method.server_optimizers import fedadagrad, fedadam, fedavgm, fedyogi
from bellwether.tools.randomness import Draws, Randomness

A, B = key_a("m"), key_b("m")


def number(value: float, other: float = 0.0) -> Adapter:
    """An adapter with one value in A and one in B."""
    tensors = {A: np.array([[value]]), B: np.array([[other]])}
    return Adapter(AdapterConfig(1, 1.0, 0.0, ("m",)), tensors)


def moved(adapter: Adapter, change: float) -> Update:
    return Update("a", 1, {A: adapter.tensors[A] + change, B: adapter.tensors[B]}, 5)


# Optimizers at the server -------------------------------------------------------------------------


def after_two_rounds(method) -> list[float]:
    """Where A is after changes of -0.2 and then +0.1, from 1."""
    state, found = method.begin(number(1.0)), []
    for change in (-0.2, 0.1):
        state = closed(method, [moved(state.adapter, change)], state)
        found.append(float(state.adapter.tensors[A][0, 0]))
    return found


@pytest.mark.parametrize(
    ("method", "byhand"),
    [
        # Hsu et al. 2019: m = -0.2, x = 0.8; m = 0.9 · -0.2 + 0.1 = -0.08, x = 0.72.
        (fedavgm(), [0.8, 0.72]),
        # Reddi et al. 2021, algorithm 2, with eta 0.1, beta1 0.9 (Adagrad 0), beta2 0.99, tau 1e-3, v_-1 = tau².
        (fedadam(learning_rate=0.1), [0.904873948, 0.870528941]),
        (fedyogi(learning_rate=0.1), [0.904875078, 0.870662231]),
        (fedadagrad(learning_rate=0.1), [0.90049875, 0.945020557]),
    ],
    ids=["fedavgm", "fedadam", "fedyogi", "fedadagrad"],
)
def test_two_rounds_of_a_server_optimizer_are_those_worked_by_hand(method, byhand):
    np.testing.assert_allclose(after_two_rounds(method), byhand, rtol=1e-8)


@pytest.mark.parametrize(("method", "eta"), [(fedavgm(0.3, 0.8), 0.3), (fedavgm(1.0, 0.0), 1.0)])
def test_fedavgm_steps_like_torchs_sgd_with_momentum_on_the_gradient_turned_round(method, eta):
    changes = np.random.default_rng(0).normal(size=6)
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    theirs = torch.optim.SGD([parameter], lr=eta, momentum=0.8 if eta == 0.3 else 0.0)
    state = method.begin(number(1.0))
    for change in changes:
        parameter.grad = torch.tensor([-change], dtype=torch.float64)
        theirs.step()
        state = closed(method, [moved(state.adapter, change)], state)
        np.testing.assert_allclose(state.adapter.tensors[A].item(), parameter.item(), rtol=1e-12)


def test_a_server_that_steps_by_the_whole_change_is_fedavg():
    updates = [replace(moved(number(1.0), change), client=client) for client, change in (("a", 0.5), ("b", -0.1))]
    ours = closed(fedavgm(1.0, 0.0), updates, State(number(1.0)))
    theirs = closed(fedavg(), updates, State(number(1.0)))
    np.testing.assert_allclose(ours.adapter.tensors[A], theirs.adapter.tensors[A], rtol=1e-14)


@pytest.mark.parametrize("method", [fedavgm(), fedadam(), fedyogi(), fedadagrad(), scaffold(), flexlora(), fedprox()])
def test_a_failed_round_changes_nothing(method):
    began = method.begin(number(1.0))
    assert closed(method, [], began, failure="1 of 4 updates can be used, and 2 are needed") is began


# SCAFFOLD -----------------------------------------------------------------------------------------


def scaffold_round(method, state, kept, gradients, rate=0.1, steps=2):
    """One round of clients with a gradient function each; the next state and what they keep."""
    (local,), updates, keeping = method.passes, [], {}
    for client, gradient in gradients.items():
        payload = method.give(state, Known(client, 1), 1)
        order, own = tuple(payload.adapter.tensors), kept.get(client, {})
        start_P = flat(payload.adapter.tensors, order)
        y_P = start_P.copy()
        for step in range(steps):
            given = Step(client, step, rate, gradient(y_P), y_P, start_P, payload.arrays, own)
            y_P = y_P - rate * local.correct(given)
        tensors = {A: y_P[:1].reshape(1, 1), B: y_P[1:].reshape(1, 1)}
        finished = method.finish(Trained(payload, own, [tensors], [rate] * steps, Draws()))
        keeping[client] = finished.own
        updates.append(Update(client, 1, finished.tensors, 7, {}, finished.arrays))
    mean = mean_of(updates, method.weigh)
    closing = Closing(1, state, 2, list(gradients), mean, (), None, Randomness(0))
    return method.close(closing), keeping


def test_two_rounds_of_scaffold_are_those_worked_by_hand():
    # f1 = ½ y², f2 = (y - 3)², from x = 1 with rate 0.1 and K = 2; B stays at its optimum 0.
    method = scaffold()
    gradients = {"one": lambda y_P: np.array([y_P[0], 0.0]), "two": lambda y_P: np.array([2 * (y_P[0] - 3), 0.0])}
    state, kept = scaffold_round(method, method.begin(number(1.0)), {}, gradients)
    np.testing.assert_allclose(state.adapter.tensors[A].item(), 1.265, rtol=1e-12)
    np.testing.assert_allclose(state.arrays[CONTROL], [-1.325, 0.0], rtol=1e-12)
    np.testing.assert_allclose([kept["one"][CONTROL][0], kept["two"][CONTROL][0]], [0.95, -3.6], rtol=1e-12)
    state, kept = scaffold_round(method, state, kept, gradients)
    np.testing.assert_allclose(state.adapter.tensors[A].item(), 1.4685, rtol=1e-12)
    np.testing.assert_allclose(state.arrays[CONTROL], [-1.0175, 0.0], rtol=1e-12)
    np.testing.assert_allclose([kept["one"][CONTROL][0], kept["two"][CONTROL][0]], [1.3155, -3.3505], rtol=1e-12)


def test_scaffold_with_zero_variates_takes_the_mean_of_all_clients_alike():
    method = scaffold()
    gradients = {"one": lambda y_P: np.array([y_P[0], 0.0]), "two": lambda y_P: np.array([2 * (y_P[0] - 3), 0.0])}
    state, _ = scaffold_round(method, method.begin(number(1.0)), {}, gradients)
    # Plain gradient descent by hand: 1 · 0.9² and 3 - 2 · 0.8²; their mean.
    np.testing.assert_allclose(state.adapter.tensors[A].item(), (0.81 + 1.72) / 2, rtol=1e-12)


def test_scaffolds_server_moves_its_variate_by_the_share_of_clients_that_answered():
    method, state = scaffold(), scaffold().begin(number(1.0))
    update = Update("a", 1, dict(state.adapter.tensors), 7, {}, {CHANGE: np.array([4.0, -2.0])})
    closing = Closing(1, state, 8, ["a"], mean_of([update], method.weigh), (), None, Randomness(0))
    np.testing.assert_allclose(method.close(closing).arrays[CONTROL], [0.5, -0.25], rtol=1e-15)


# FlexLoRA -----------------------------------------------------------------------------------------


def case() -> tuple[Adapter, list[Update], np.ndarray]:
    """Two clients of rank 1 with shares 0.75 and 0.25, and the exact mean of their products."""
    adapter = Adapter(AdapterConfig(2, 2.0, 0.0, ("m",)), {A: np.eye(2), B: np.zeros((3, 2))})
    one = Update("one", 1, {A: np.array([[1.0, 0.0]]), B: np.array([[1.0], [0.0], [2.0]]) / 2}, 75)
    two = Update("two", 1, {A: np.array([[0.0, 2.0]]), B: np.array([[0.0], [1.0], [-1.0]]) / 2}, 25)
    return adapter, [one, two], np.array([[0.75, 0.0], [0.0, 0.5], [1.5, -0.5]])  # s_i = 2 / 1


def product(adapter: Adapter) -> np.ndarray:
    return adapter.config.scaling * adapter.tensors[B] @ adapter.tensors[A]


def test_flexlora_at_full_rank_is_the_mean_of_the_products():
    adapter, updates, exact = case()
    found = closed(flexlora(), updates, State(adapter)).adapter
    np.testing.assert_allclose(product(found), exact, rtol=0, atol=1e-12)
    # The mean of A times the mean of B, as FedIT takes it, is 76.4 % off.
    mean = mean_of(updates, fedavg().weigh).tensors
    assert np.linalg.norm(exact - 2 * mean[B] @ mean[A]) / np.linalg.norm(exact) == pytest.approx(0.764, abs=5e-4)


def test_flexlora_keeps_the_largest_singular_values_that_fit_a_clients_rank():
    adapter, updates, exact = case()
    state = closed(flexlora(), updates, State(adapter))
    np.testing.assert_allclose(np.linalg.svd(product(state.adapter))[1], [1.741965, 0.527312], atol=1e-6)
    small = flexlora().give(state, Known("one", 1), 2).adapter
    assert small.config.rank == 1
    assert small.config.scaling == 2.0
    byhand = [[0.68961, -0.20407], [-0.13605, 0.04026], [1.51527, -0.44840]]
    np.testing.assert_allclose(product(small), byhand, atol=1e-5)
    assert np.linalg.norm(exact - product(small)) == pytest.approx(0.527312, abs=1e-6)


@pytest.mark.parametrize(("outputs", "inputs", "ranks"), [(40, 30, (8, 3, 5)), (12, 50, (2, 2)), (9, 9, (4, 4, 4, 4))])
def test_the_small_core_has_the_singular_values_of_the_whole_product(outputs, inputs, ranks):
    draw = np.random.default_rng(len(ranks))
    left_OK, right_KI = draw.normal(size=(outputs, sum(ranks))), draw.normal(size=(sum(ranks), inputs))
    u, sigma, vt = np.linalg.svd(left_OK @ right_KI, full_matrices=False)
    for rank in (1, 3, min(outputs, inputs, sum(ranks))):
        a_RI, b_OR = factors(left_OK, right_KI, np.zeros((rank, inputs)))
        np.testing.assert_allclose(b_OR @ a_RI, (u[:, :rank] * sigma[:rank]) @ vt[:rank], atol=1e-11)
        np.testing.assert_allclose(a_RI @ a_RI.T, np.eye(rank), atol=1e-12)
        assert all(row[np.abs(row).argmax()] > 0 for row in a_RI)


def test_where_the_product_has_few_directions_the_other_rows_can_still_learn():
    spare_RI = np.random.default_rng(0).normal(size=(3, 4))
    left_OK, right_KI = np.ones((5, 1)), np.array([[1.0, -1.0, 2.0, 0.0]])
    a_RI, b_OR = factors(left_OK, right_KI, spare_RI)
    np.testing.assert_allclose(b_OR @ a_RI, left_OK @ right_KI, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(a_RI[1:], spare_RI[1:])
    np.testing.assert_array_equal(b_OR[:, 1:], 0.0)
    nothing = factors(np.zeros((5, 2)), np.zeros((2, 4)), spare_RI)
    np.testing.assert_array_equal(nothing[0], spare_RI)
    np.testing.assert_array_equal(nothing[1], 0.0)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_client_of_full_rank_gets_the_servers_adapter_and_a_smaller_one_its_first_rows_in_its_own_scaling(rslora):
    draw = np.random.default_rng(0)
    config = AdapterConfig(4, 8.0, 0.0, ("m",), rslora=rslora)
    adapter = Adapter(config, {A: draw.normal(size=(4, 6)), B: draw.normal(size=(5, 4))})
    assert cut(adapter, 4) is adapter
    small = cut(adapter, 2)
    byhand = config.scaling * adapter.tensors[B][:, :2] @ adapter.tensors[A][:2]
    size = config.scaling * np.abs(adapter.tensors[B][:, :2]) @ np.abs(adapter.tensors[A][:2])
    # A sum of two products and three factors, here as there.
    assert_rounded(product(small), byhand, size, torch.float64, 2 * (2 + 3))


def test_flexlora_does_not_depend_on_the_order_of_replies():
    adapter, updates, _ = case()
    one, other = (closed(flexlora(), some, State(adapter)).adapter for some in (updates, updates[::-1]))
    assert one.fingerprint() == other.fingerprint()


# What all methods share ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [fedavg(), fedprox(), fedavgm(), fedadam(), fedyogi(), fedadagrad(), scaffold()])
def test_a_linear_method_never_sees_a_single_update(method):
    assert method.weigh is not None
    seen = []
    watched = replace(method, close=lambda closing: (seen.append(closing), method.close(closing))[1])
    state = watched.begin(number(1.0))
    arrays = {name: np.zeros(shape) for name, shape in method.returns(method.give(state, Known("a", 1), 1)).items()}
    closed(watched, [replace(moved(state.adapter, 0.1), arrays=arrays)], state)
    assert [closing.updates for closing in seen] == [()]


def test_what_a_server_remembers_of_a_tensor_outlasts_rounds_in_which_others_came_back():
    method, state, found = fedavgm(), State(number(0.0), {"other": 7}, number(2.0)), []
    for round in range(1, 5):
        key = B if round % 2 else A
        update = Update("a", round, {key: state.adapter.tensors[key] + 1.0}, 5)
        state = closed(method, [update], state)
        found.append(float(state.adapter.tensors[key][0, 0]))
    # Each is moved in two rounds: m = 1, then 0.9 + 1.
    np.testing.assert_allclose(found, [1.0, 1.0, 1 + 1.9, 1 + 1.9], rtol=1e-12)
    assert (state.arrays["other"], state.folded) == (7, number(2.0))


@pytest.mark.parametrize("method", [fedavg(), fedavgm(), fedadam(), scaffold(), flexlora()])
def test_what_is_folded_into_the_base_stays_and_goes_to_every_client(method):
    state = replace(method.begin(number(1.0)), folded=number(2.0))
    payload = method.give(state, Known("a", 1), 1)
    arrays = {name: np.zeros(shape) for name, shape in method.returns(payload).items()}
    after = closed(method, [replace(moved(state.adapter, 0.1), arrays=arrays)], state)
    assert (payload.folded, after.folded) == (number(2.0), number(2.0))


def test_fedprox_draws_back_by_its_distance():
    step = Step("a", 0, 0.1, np.array([1.0]), np.array([1.5]), np.array([1.0]), {}, {})
    np.testing.assert_allclose(fedprox(0.5).passes[0].correct(step), [1.25])
    # f = ½ (y - 3)², from 1 with mu 0.5 and rate 0.1: two steps by hand.
    y = np.array([1.0])
    for _ in range(2):
        y = y - 0.1 * fedprox(0.5).passes[0].correct(replace(step, gradient_P=y - 3, adapter_P=y))
    np.testing.assert_allclose(y, [1.37], rtol=1e-12)
