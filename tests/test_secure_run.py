"""Whole runs with secure aggregation: linear methods, drop-outs, several processes, going on, and what is refused."""

import json

import numpy as np
import pytest
from conftest import json_lines

from bellwether.errors import RecipeError, RoundFailed
from bellwether.exchange.records import RoundFinished
from bellwether.method.named import our_methods
from bellwether.recipe.file import load_recipe
from bellwether.runner.plan import plan
from bellwether.runner.run import run

pytestmark = pytest.mark.integration

WHOLE = ["federation.fraction=1", "training.local_steps=2", "evaluation.generate=false", "federation.rounds=2"]
MASKED = "secure_aggregation.enabled=true"
NEEDS = {"scaffold": ["training.optimizer=sgd", "training.schedule=constant", "training.clip_norm=null"]}
LINEAR = [name for name, method in our_methods().items() if method.weigh is not None]


def ran(recipe, folder, *fields, **more):
    return run(load_recipe(recipe, [*WHOLE, *fields, f"output.folder={folder}"]), **more)


@pytest.mark.parametrize("method", LINEAR)
def test_every_linear_method_comes_to_the_same_adapter(tiny_recipe, tmp_path, method):
    fields = [f"method.name={method}", *NEEDS.get(method, []), "federation.rounds=1"]
    plain, masked = (ran(tiny_recipe, tmp_path / str(more), *fields, *more) for more in ([], [MASKED]))
    # What float32 rounds of a value, once for the mean and once for the new adapter, and of FedAdam's kind the same of
    # a change that is divided by at least its tau, 1e-3.
    for key, value in plain.adapter.tensors.items():
        bound = 4 * np.finfo(np.float32).eps * max(1.0, float(np.abs(value).max()))
        assert np.abs(masked.adapter.tensors[key] - value).max() <= bound
    assert masked.rounds[0].secure.opened == 4
    assert [part.loss for part in masked.rounds[0].clients] == [part.loss for part in plain.rounds[0].clients]


def test_it_goes_on_to_the_same_bytes_over_processes_too(tiny_recipe, tmp_path):
    fields = [
        MASKED,
        "federation.rounds=3",
        "compression.down=8bit",
        "selection.method=random",
        "selection.fraction=0.5",
    ]
    truth = ran(tiny_recipe, tmp_path / "truth", *fields)

    def watch(event):
        if isinstance(event, RoundFinished) and event.record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(tiny_recipe, tmp_path / "run", *fields, "engine.processes=2", watch=watch)
    found = run(resume=tmp_path / "run")
    assert found.adapter.fingerprint() == truth.adapter.fingerprint()
    assert [one.secure for one in found.rounds] == [one.secure for one in truth.rounds]


def test_clients_that_are_away_or_drop_out_are_left_out_of_the_sum(tiny_recipe, tmp_path):
    fields = ["partition.clients=8", "federation.availability={away: 0.15, drop_out: 0.15}", "federation.rounds=6"]
    fields += ["federation.failed_rounds=6", "federation.quorum=0.5"]
    plain, masked = (ran(tiny_recipe, tmp_path / str(more), *fields, *more) for more in ([], [MASKED]))
    assert [sorted(one.left_out) for one in masked.rounds] == [sorted(one.left_out) for one in plain.rounds]
    counted = [one for one in masked.rounds if one.failure is None]
    assert any(one.secure.dealt > len(one.clients) for one in counted)  # who dropped out had dealt shares
    assert any(one.secure.announced < 8 for one in counted)


def test_bytes_of_rounds_are_those_that_the_plan_counts(tiny_recipe, tmp_path):
    made = plan(load_recipe(tiny_recipe, [*WHOLE, MASKED]))
    found = ran(tiny_recipe, tmp_path / "run", MASKED)
    plain = ran(tiny_recipe, tmp_path / "plain")
    for record in found.rounds:
        assert (record.bytes_up, record.bytes_down) == (made.bytes_up, made.bytes_down)
    assert any("Updates are masked" in note for note in made.notes)
    # By hand: 8 bytes in place of 4 for each of the adapter's values, and what is agreed on beside.
    values = sum(value.size for value in found.adapter.tensors.values())
    assert found.rounds[0].bytes_up - plain.rounds[0].bytes_up > 4 * 4 * values
    assert all("secure" in line for line in json_lines(tmp_path / "run" / "rounds.jsonl"))
    assert json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[0])["secure"]["opened"] == 4


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["method.name=flora"], "but the method flora needs each of them"),
        (["method.name=hetlora"], "but the method hetlora needs each of them"),
        (["federation.fraction=0.5"], "secure_aggregation.enabled hides nothing where a round asks 2 clients"),
    ],
)
def test_what_cannot_be_masked_is_refused_before_anything_is_loaded(tiny_recipe, tmp_path, fields, reason):
    with pytest.raises(RecipeError, match=reason):
        ran(tiny_recipe, tmp_path / "run", MASKED, *fields)
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_outgrows_the_range_fails_in_a_sentence(tiny_recipe, tmp_path):
    with pytest.raises(RoundFailed, match="beyond 1e-06 \\(secure_aggregation.range\\)"):
        ran(tiny_recipe, tmp_path / "run", MASKED, "secure_aggregation.range=1e-6")
