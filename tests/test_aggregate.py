from dataclasses import replace

import numpy as np
import pytest

from bellwether.errors import RecipeError
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.messages import Update
from bellwether.method.average import fedavg, uniform
from bellwether.method.method import Closing, State, mean_of
from bellwether.method.named import make_method
from bellwether.recipe.method import OwnMethod
from bellwether.tools.randomness import Randomness

A, B = key_a("q"), key_b("q")
START = Adapter(AdapterConfig(1, 1.0, 0.0, ("q",)), {A: np.zeros((1, 2), np.float32), B: np.zeros((2, 1), np.float32)})


def update(client: str, a: list[float], b: list[float], rows: int) -> Update:
    return Update(client, 1, {A: np.array([a], np.float32), B: np.array([b], np.float32).T}, rows)


UPDATES = [update("x", [1.0, 2.0], [4.0, 0.0], 10), update("y", [3.0, -2.0], [0.0, 8.0], 30)]


def closed(method, updates, state=None, clients=2, failure=None, round=1):
    """Close a round as the loop does; the state after it."""
    began = state or State(START)
    mean = mean_of(updates, method.weigh) if updates and method.weigh else None
    apart = () if method.weigh else sorted(updates, key=lambda update: update.client)
    cohort = [update.client for update in updates]
    return method.close(Closing(round, began, clients, cohort, mean, apart, failure, Randomness(0)))


def test_fedavg_weighs_a_and_b_separately_by_rows():
    # By hand: weights 1/4 and 3/4.
    state = closed(fedavg(), UPDATES, State(START, {"kept": 1}))
    adapter = state.adapter
    np.testing.assert_allclose(adapter.tensors[A], [[2.5, -1.0]])
    np.testing.assert_allclose(adapter.tensors[B], [[1.0], [6.0]])
    assert state.arrays == {"kept": 1}
    assert adapter.tensors[A].dtype == np.float32


def test_the_weight_of_an_update_is_taken_without_its_values():
    seen = []

    def weigh(update):
        seen.append((update.client, update.rows, dict(update.tensors), dict(update.arrays)))
        return update.rows

    closed(replace(fedavg(), weigh=weigh), UPDATES)
    assert seen == [(update.client, update.rows, {}, {}) for update in UPDATES]


def test_uniform_gives_every_client_the_same_weight():
    adapter = closed(uniform(), UPDATES).adapter
    np.testing.assert_allclose(adapter.tensors[A], [[2.0, 0.0]])
    np.testing.assert_allclose(adapter.tensors[B], [[2.0], [4.0]])


def test_the_mean_does_not_depend_on_the_order_of_replies():
    draw = np.random.default_rng(0)
    updates = [
        Update(f"c{n}", 1, {A: draw.normal(size=(1, 2)).astype(np.float32), B: np.ones((2, 1), np.float32)}, 1 + n)
        for n in range(9)
    ]
    one = closed(fedavg(), updates).adapter
    other = closed(fedavg(), updates[::-1]).adapter
    assert one.fingerprint() == other.fingerprint()


def test_equal_updates_give_that_update():
    adapter = closed(fedavg(), [UPDATES[0], UPDATES[0]]).adapter
    assert adapter.tensors[A].tobytes() == UPDATES[0].tensors[A].tobytes()


def test_a_round_in_which_nothing_came_leaves_all_as_it_was():
    before = State(START, {"kept": 1})
    assert closed(fedavg(), [], before, failure="nobody answered") is before


def test_a_persons_own_method_is_loaded_by_name_and_called_with_its_parameters(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "from bellwether.method.method import Method, State\n"
        "def keep(marks=1):\n"
        "    return Method(lambda closing: State(closing.state.adapter, {'marks': marks}))\n"
        "def number():\n    return 3\n"
        "def still(*, on=False, name='a', **more):\n"
        "    return Method(lambda closing: closing.state, passes=() if on else more.get('passes', Method.passes))\n"
        "def picky(on=False, name='a'):\n    return still(on=on)\n"
        "def needy(needs='x'):\n    return Method(lambda closing: closing.state, needs={needs: 1})\n"
        "def broken(*rest):\n    return Method(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = closed(make_method(OwnMethod(name="my_rules:keep", parameters={"marks": 5})), UPDATES)
    assert (kept.adapter, kept.arrays) == (START, {"marks": 5})
    for name, parameters, said in (
        ("my_rules:missing", {}, "has no function missing"),
        ("no_such_module_of_mine:rule", {}, "cannot be imported"),
        ("my_rules:number", {}, "method.name my_rules:number returned a int; return a Method"),
        ("my_rules:keep", {"marks": "many"}, "parameters.marks is 'many', but my_rules:keep takes a number"),
        ("my_rules:picky", {"on": "false"}, "parameters.on is 'false', but my_rules:picky takes true or false there"),
        ("my_rules:picky", {"on": 1}, "parameters.on is 1, but my_rules:picky takes true or false there"),
        ("my_rules:picky", {"name": 7}, "parameters.name is 7, but my_rules:picky takes a text there"),
        ("my_rules:picky", {"on": True}, "my_rules:picky returned a Method whose passes are .*; give at least one"),
        ("my_rules:still", {"passes": "x"}, "my_rules:still returned a Method whose passes are .*; give at least one"),
        ("my_rules:needy", {}, "my_rules:needy needs training.x, which is no field of a recipe"),
        ("my_rules:broken", {}, "my_rules:broken returned a Method whose close is no function"),
        (
            "my_rules:keep",
            {"points": 1},
            "parameters.points is given, but my_rules:keep takes no such one; known: marks.",
        ),
    ):
        with pytest.raises(RecipeError, match=said):
            make_method(OwnMethod(name=name, parameters=parameters))
