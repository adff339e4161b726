"""Whole runs whose updates and adapters travel in few bytes: resumed after a kill, over processes, by every method."""

import random

import forked
import pytest
from conftest import json_lines
from test_resume import RESULTS, kill_when, newest, timeless

from bellwether.exchange.records import RoundFinished
from bellwether.recipe.file import load_recipe
from bellwether.runner.plan import plan
from bellwether.runner.run import run

pytestmark = pytest.mark.integration

DROPPING = ["federation.availability.drop_out=0.3", "federation.quorum=0.25", "federation.failed_rounds=24"]
SHORT = ["federation.fraction=1", "training.local_steps=2", "evaluation.generate=false"]


def test_a_killed_run_with_clients_that_drop_out_goes_on_to_the_same_bytes(bellwether, tiny_recipe, tmp_path):
    truth, path, hold, draw = tmp_path / "truth", tmp_path / "run", tmp_path / "hold", random.Random(4)
    fields = ["federation.rounds=16", "compression.up=8bit", "compression.down=8bit", *SHORT, *DROPPING]
    fields += ["federation.sampler=held:everybody"]
    outcome = bellwether("run", tiny_recipe, *fields, "--out", truth)
    assert outcome.code == 0, outcome.err
    assert any(line["left_out"] for line in json_lines(truth / "rounds.jsonl"))

    hold.write_text("6")
    process = forked.start("run", tiny_recipe, *fields, "--out", path, HELD=str(hold))
    assert kill_when(process, lambda: newest(path) > 2, draw.uniform(0, 0.3)), process.communicate()
    hold.write_text(str(newest(path) + 8))
    process = forked.start("run", "--resume", path, "--trust-code", HELD=str(hold))
    before = newest(path)
    assert kill_when(process, lambda: newest(path) > before, draw.uniform(0, 0.3)), process.communicate()
    hold.unlink()
    done = bellwether("run", "--resume", path, "--trust-code")
    assert done.code == 0, done.err
    for name in RESULTS:
        assert (path / name).read_bytes() == (truth / name).read_bytes(), name
    assert timeless(path) == timeless(truth)
    # What is left unsent is that of a client's last round that counted, and of those that can be gone back to.
    for client in (path / "clients").iterdir():
        kept = [file.name for file in sorted((client / "unsent").iterdir())]
        assert kept == [file.name for file in sorted((truth / "clients" / client.name / "unsent").iterdir())]
        for name in kept:
            parts = ("clients", client.name, "unsent", name)
            assert path.joinpath(*parts).read_bytes() == truth.joinpath(*parts).read_bytes()


class Stopped(Exception):
    pass


METHODS = {
    "scaffold": ["training.optimizer=sgd", "training.schedule=constant", "training.clip_norm=null"],
    "ffa_lora": [],
    "rolora": DROPPING,
    "fedex_lora": DROPPING,
    "flexlora": ["lora.ranks=[1, 2]", "compression.error_feedback=false", "compression.down=none"],
    "flora": ["lora.ranks=[1, 2]", "compression.error_feedback=false", "compression.down=none"],
    "fedsa_lora": ["partition.client_test_fraction=0.25"],
    "ditto": ["partition.client_test_fraction=0.25"],
    "fedadam": [],
    "hetlora": ["lora.ranks=[1, 2]", *DROPPING],
    "feddpa": ["partition.client_test_fraction=0.25"],
    "fedavg": ["method.fine_tune=true", "partition.client_test_fraction=0.25"],
}


@pytest.mark.parametrize(
    ("method", "up", "down", "processes"),
    [
        *((method, "4bit", "4bit", 1) for method in METHODS),
        pytest.param("rolora", "top_k", "8bit", 2, marks=pytest.mark.xdist_group("workers")),
    ],
)
def test_every_method_goes_on_to_the_same_bytes(tiny_recipe, tmp_path, method, up, down, processes):
    fields = [f"method.name={method}", f"compression.up={up}", f"compression.down={down}", *SHORT, *METHODS[method]]
    fields += ["federation.rounds=4"]
    truth = run(load_recipe(tiny_recipe, [*fields, f"output.folder={tmp_path / 'truth'}"]))

    def watch(event):
        if isinstance(event, RoundFinished) and event.record.round == 2:
            raise Stopped

    fields += [f"engine.processes={processes}", f"output.folder={tmp_path / 'run'}"]
    with pytest.raises(Stopped):
        run(load_recipe(tiny_recipe, fields), watch=watch)
    found = run(resume=tmp_path / "run")
    assert found.adapter.fingerprint() == truth.adapter.fingerprint()
    if "method.fine_tune=true" in fields:  # nothing comes back of the last round, and what was left stays left
        left = [client / "unsent" for client in (tmp_path / "run" / "clients").iterdir()]
        assert left
        assert all((folder / "0004.npz").exists() for folder in left)
    for way in ("bytes_up", "bytes_down"):
        assert [getattr(one, way) for one in found.rounds] == [getattr(one, way) for one in truth.rounds]


def test_bytes_of_rounds_are_those_that_the_plan_counts(tiny_recipe, tmp_path):
    whole = [*SHORT, "federation.rounds=2"]
    sizes = {}
    for up, down in (("none", "none"), ("8bit", "8bit"), ("4bit", "4bit"), ("top_k", "none")):
        recipe = load_recipe(tiny_recipe, [*whole, f"compression.up={up}", f"compression.down={down}"])
        made = plan(recipe)
        found = run(load_recipe(tiny_recipe, [*whole, f"compression.up={up}", f"compression.down={down}"]))
        for record in found.rounds:
            assert (record.bytes_up, record.bytes_down) == (made.bytes_up, made.bytes_down)
        sizes[up] = made.bytes_up
        assert found.rounds[-1].loss < found.rounds[0].loss * 1.5
    assert sizes["none"] > 3.5 * sizes["8bit"] > 3.5 * 1.5 * sizes["4bit"]
    assert sizes["4bit"] > sizes["top_k"]


@pytest.mark.parametrize("fuse", [1, 0])
def test_clients_trained_together_send_as_many_bytes(tiny_recipe, tmp_path, fuse):
    fields = [*SHORT, "federation.rounds=2", "compression.up=4bit", "compression.down=8bit"]
    found = run(load_recipe(tiny_recipe, [*fields, f"engine.fuse={fuse}", f"output.folder={tmp_path / str(fuse)}"]))
    alone = run(load_recipe(tiny_recipe, [*fields, f"output.folder={tmp_path / 'alone'}"]))
    assert [one.bytes_up for one in found.rounds] == [one.bytes_up for one in alone.rounds]
    assert found.rounds[-1].loss == pytest.approx(alone.rounds[-1].loss, rel=0.05)
