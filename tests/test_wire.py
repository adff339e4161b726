import numpy as np
import pytest

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.checks import adapter_bytes, check_update
from bellwether.exchange.messages import Update


def adapter() -> Adapter:
    draw = np.random.default_rng(0)
    tensors = {
        key_a("m.0.q"): draw.normal(size=(2, 3)).astype(np.float32),
        key_b("m.0.q"): draw.normal(size=(4, 2)).astype(np.float32),
    }
    return Adapter(AdapterConfig(2, 4.0, 0.0, ("m.0.q",)), tensors)


def update(**changes) -> Update:
    values = {"client": "a", "round": 3, "tensors": dict(adapter().tensors), "rows": 5, "metrics": {"loss": 1.0}}
    return Update(**{**values, **changes})


def check(candidate: Update, taken=()) -> None:
    check_update(candidate, adapter(), 3, ("a", "b"), taken, 100)


def test_the_bytes_of_an_adapter_hold_four_per_value_and_its_description():
    assert 4 * (6 + 8) < adapter_bytes(adapter().tensors) < 4 * (6 + 8) + 200


def test_a_good_update_passes():
    check(update())


def changed(key, value):
    return {**adapter().tensors, key: value}


A, B = key_a("m.0.q"), key_b("m.0.q")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": "c"}, "not asked"),
        ({"round": 2}, "belongs to round 2"),
        ({"rows": 0}, "claims 0 rows"),
        ({"rows": 10**12}, "claims 1000000000000 rows"),
        ({"rows": True}, "claims True rows"),
        ({"rows": 2.0}, "claims 2.0 rows"),
        ({"tensors": {A: adapter().tensors[A]}}, "1 (base_model.model.m.0.q.lora_B.weight) missing"),
        ({"tensors": changed("x", np.zeros(1, np.float32))}, "1 (x) unknown"),
        ({"tensors": changed(A, np.zeros((1,), np.float32))}, "has shape (1,)"),
        ({"tensors": changed(A, np.zeros((4, 3), np.float32))}, "has shape (4, 3), not (2, 3)"),
        ({"tensors": changed(A, np.zeros((2, 3), np.float64))}, "is float64, not float32"),
        ({"tensors": changed(A, [[0.0] * 3] * 2)}, "is list"),
        ({"tensors": changed(B, np.full((4, 2), np.nan, np.float32))}, "8 values that are not finite"),
        ({"tensors": changed(B, np.full((4, 2), np.inf, np.float32))}, "not finite"),
        ({"metrics": {"tokens": float("inf")}}, "not a finite number"),
        ({"metrics": {"loss": "0"}}, "not a finite number"),
        ({"metrics": {"tokens": -5}}, "its 'tokens' is -5, where 0 to"),
        ({"metrics": {"rows": 1e300}}, "its 'rows' is 1e+300, where 0 to"),
    ],
)
def test_a_bad_update_is_refused_with_its_reason(changes, reason):
    with pytest.raises(UpdateRejected) as caught:
        check(update(**changes))
    assert reason in str(caught.value)


def test_a_second_update_of_one_client_is_refused():
    with pytest.raises(UpdateRejected, match="answered already"):
        check(update(), taken=("a",))
