import numpy as np
import pytest

from bellwether.errors import RecipeError
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.messages import Update
from bellwether.method.average import fedavg, make_aggregate, uniform

A, B = key_a("q"), key_b("q")
START = Adapter(AdapterConfig(1, 1.0, 0.0, ("q",)), {A: np.zeros((1, 2), np.float32), B: np.zeros((2, 1), np.float32)})


def update(client: str, a: list[float], b: list[float], rows: int) -> Update:
    return Update(client, 1, {A: np.array([a], np.float32), B: np.array([b], np.float32).T}, rows)


UPDATES = [update("x", [1.0, 2.0], [4.0, 0.0], 10), update("y", [3.0, -2.0], [0.0, 8.0], 30)]


def test_fedavg_weighs_a_and_b_separately_by_rows():
    # By hand: weights 1/4 and 3/4.
    adapter, state = fedavg(UPDATES, START, {"kept": 1})
    np.testing.assert_allclose(adapter.tensors[A], [[2.5, -1.0]])
    np.testing.assert_allclose(adapter.tensors[B], [[1.0], [6.0]])
    assert state == {"kept": 1}
    assert adapter.tensors[A].dtype == np.float32


def test_uniform_gives_every_client_the_same_weight():
    adapter, _ = uniform(UPDATES, START, {})
    np.testing.assert_allclose(adapter.tensors[A], [[2.0, 0.0]])
    np.testing.assert_allclose(adapter.tensors[B], [[2.0], [4.0]])


def test_the_mean_does_not_depend_on_the_order_of_replies():
    draw = np.random.default_rng(0)
    updates = [
        Update(f"c{n}", 1, {A: draw.normal(size=(1, 2)).astype(np.float32), B: np.ones((2, 1), np.float32)}, 1 + n)
        for n in range(9)
    ]
    one, _ = fedavg(updates, START, {})
    other, _ = fedavg(updates[::-1], START, {})
    assert one.fingerprint() == other.fingerprint()


def test_equal_updates_give_that_update():
    adapter, _ = fedavg([UPDATES[0], UPDATES[0]], START, {})
    assert adapter.tensors[A].tobytes() == UPDATES[0].tensors[A].tobytes()


def test_a_persons_own_rule_is_loaded_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text("def keep(updates, adapter, state):\n    return adapter, state\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_aggregate("my_rules:keep")(UPDATES, START, {}) == (START, {})
    with pytest.raises(RecipeError, match="has no function missing"):
        make_aggregate("my_rules:missing")
    with pytest.raises(RecipeError, match="cannot be imported"):
        make_aggregate("no_such_module_of_mine:rule")
