"""A real run that is killed and goes on ends with the same adapter, byte for byte, as one that was not."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import held
import pytest
from conftest import json_lines

from bellwether.exchange.records import RoundFinished
from bellwether.recipe.file import load_recipe
from bellwether.runner.run import run

ROUNDS = 24
FIELDS = [f"federation.rounds={ROUNDS}", "evaluation.every=6", "training.schedule=cosine", "lora.dropout=0.1"]
RESULTS = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "evaluation.csv", "samples.jsonl")


def newest(path: Path) -> int:
    """Return the newest round that is committed, or -1."""
    return max((int(entry.name) for entry in (path / "checkpoints").glob("[0-9]*")), default=-1)


def kill_when(process: forked.Forked, ready, wait: float) -> bool:
    """Kill a process some seconds after something holds; return whether it was still running."""
    while process.poll() is None and not ready():
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    return process.wait() == -signal.SIGKILL


def timeless(path: Path) -> list[dict]:
    """Return the lines of ``rounds.jsonl`` without what a clock said."""
    lines = json_lines(path / "rounds.jsonl")
    for line in lines:
        del line["seconds"], line["duration"]
        for client in line["clients"]:
            del client["seconds"]
    return lines


def test_a_killed_run_goes_on_to_the_same_bytes(bellwether, tiny_recipe, tmp_path):
    truth, path, hold, draw = tmp_path / "truth", tmp_path / "run", tmp_path / "hold", random.Random(3)
    outcome = bellwether("run", tiny_recipe, *FIELDS, "federation.sampler=held:half", "--out", truth)
    assert outcome.code == 0, outcome.err

    # Killed once as soon as there is a run, before anything is committed, and then at random moments; however fast it
    # is, it comes no further than seven rounds meanwhile.
    hold.write_text("7")
    words = [tiny_recipe, *FIELDS, "federation.sampler=held:half", "--out", path]
    process = forked.start("run", *words, HELD=str(hold))
    assert kill_when(process, (path / "recipe.yaml").exists, 0), process.communicate()
    for _ in range(2):
        before = newest(path)
        hold.write_text(str(before + 8))
        process = forked.start("run", "--resume", path, "--trust-code", HELD=str(hold))
        killed = kill_when(process, lambda before=before: newest(path) > before, draw.uniform(0, 0.3))
        assert killed, process.communicate()

    hold.unlink()
    fresh = [sys.executable, "-m", "bellwether", "run", "--resume", str(path), "--trust-code"]
    done = subprocess.run(fresh, env=held.environment(hold), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in RESULTS:
        assert (path / name).read_bytes() == (truth / name).read_bytes(), name
    assert timeless(path) == timeless(truth)
    assert len(timeless(path)) == ROUNDS


def test_a_finished_run_goes_on_to_itself(bellwether, tiny_run, tmp_path):
    path = Path(shutil.copytree(tiny_run[0], tmp_path / "run"))
    outcome = bellwether("run", "--resume", path)
    assert outcome.code == 0, outcome.err
    for name in RESULTS:
        assert (path / name).read_bytes() == (tiny_run[0] / name).read_bytes(), name


def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_ends_the_same(bellwether, tiny_run, tmp_path):
    path = Path(shutil.copytree(tiny_run[0], tmp_path / "run"))
    newest_file = path / "checkpoints" / f"{newest(path):04d}" / "adapter_model.safetensors"
    newest_file.write_bytes(newest_file.read_bytes()[:-1])
    shutil.rmtree(path / "adapter")
    outcome = bellwether("run", "--resume", path)
    assert outcome.code == 0, outcome.err
    assert "is corrupt and was left out" in outcome.out.replace("\n", " ")
    for name in RESULTS:
        assert (path / name).read_bytes() == (tiny_run[0] / name).read_bytes(), name


def test_a_changed_recipe_is_refused_with_the_difference(bellwether, tiny_run, tmp_path):
    path = Path(shutil.copytree(tiny_run[0], tmp_path / "run"))
    outcome = bellwether("run", "--resume", path, "--seed", 5)
    assert outcome.code == 2
    assert "seed: 0 → 5" in outcome.err


MOMENTUM = """
from bellwether.method.method import Method, State, alike


def moving(momentum):
    def close(closing):
        adapter, mean = closing.state.adapter, closing.mean.tensors
        velocity = {
            key: momentum * closing.state.arrays.get(key, 0.0) + (mean[key] - adapter.tensors[key]) for key in mean
        }
        return State(adapter.updated({key: adapter.tensors[key] + velocity[key] for key in mean}), velocity)

    return Method(close, weigh=alike)
"""


class Stopped(Exception):
    pass


def stopped_after(rounds, recipe, path, *fields):
    """Begin a run and stop it by an error after some rounds, as a power cut would."""

    def watch(event):
        if isinstance(event, RoundFinished) and event.record.round == rounds:
            raise Stopped

    with pytest.raises(Stopped):
        run(load_recipe(recipe, [*FIELDS, f"output.folder={path}", *STATEFUL, *fields]), watch=watch)


STATEFUL = ["federation.rounds=4", "method.name=my_rule:moving", "method.parameters.momentum=0.5"]


@pytest.fixture
def my_rule(tmp_path, monkeypatch):
    (tmp_path / "my_rule.py").write_text(MOMENTUM)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_rule_with_a_state_goes_on_with_it(bellwether, tiny_recipe, tmp_path, my_rule):
    outcome = bellwether("run", tiny_recipe, *FIELDS, *STATEFUL, "--out", tmp_path / "truth")
    assert outcome.code == 0, outcome.err
    stopped_after(2, tiny_recipe, tmp_path / "run")
    assert newest(tmp_path / "run") == 2
    outcome = bellwether("run", "--resume", tmp_path / "run", "--trust-code")
    assert outcome.code == 0, outcome.err
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "truth" / name).read_bytes(), name
    # The log compares with the untuned base, also after going on.
    last = [
        [
            line.split(" ", 1)[1]
            for line in (tmp_path / folder / "log.txt").read_text().splitlines()
            if "test after" in line
        ]
        for folder in ("run", "truth")
    ]
    assert last[0][-1] == last[1][-1]


DROPPING = ["federation.availability.drop_out=0.3", "federation.quorum=0.25"]
HOLDING_OUT = ["partition.client_test_fraction=0.25"]
METHODS = {
    "scaffold": ["training.optimizer=sgd", "training.schedule=constant", "training.clip_norm=null"],
    "fedadam": [],
    "flexlora": ["lora.ranks=[1, 2]", "partition.client_test_fraction=0.25"],
    "rolora": DROPPING,
    "flora": ["lora.ranks=[1, 2]", *DROPPING],
    "fedex_lora": DROPPING,
    "hetlora": ["lora.ranks=[1, 2]", "method.norm_weights=true", *DROPPING],
    "fedsa_lora": HOLDING_OUT,
    "ditto": [*HOLDING_OUT, *DROPPING],
    "feddpa": [*HOLDING_OUT, *DROPPING],
    "feddpa, F": [*HOLDING_OUT, *DROPPING, "method.variant=F"],
    "fedavg, tuned": [*HOLDING_OUT, *DROPPING, "method.fine_tune=true"],
    "flora, tuned": [*HOLDING_OUT, *DROPPING, "lora.ranks=[1, 2]", "method.fine_tune=true"],
}
KEEPING = ("scaffold", "fedsa_lora", "ditto", "feddpa", "feddpa, F", "fedavg, tuned", "flora, tuned")


@pytest.mark.parametrize(
    ("method", "processes"),
    [
        ("scaffold", 1),
        pytest.param("scaffold", 2, marks=pytest.mark.xdist_group("workers")),
        ("fedadam", 1),
        *((method, 1) for method in METHODS if method not in ("scaffold", "fedadam")),
    ],
)
def test_a_method_with_states_of_server_and_clients_goes_on_to_the_same_bytes(tiny_recipe, tmp_path, method, processes):
    fields = [*FIELDS, "federation.rounds=4", f"method.name={method.partition(',')[0]}", *METHODS[method]]
    fields += ["federation.fraction=1", "training.local_steps=2", "evaluation.generate=false"]
    truth = run(load_recipe(tiny_recipe, [*fields, f"output.folder={tmp_path / 'truth'}"]))

    def watch(event):
        if isinstance(event, RoundFinished) and event.record.round == 2:
            raise Stopped

    fields += [f"engine.processes={processes}", f"output.folder={tmp_path / 'run'}"]
    with pytest.raises(Stopped):
        run(load_recipe(tiny_recipe, fields), watch=watch)
    assert newest(tmp_path / "run") == 2
    found = run(resume=tmp_path / "run")
    assert found.adapter.fingerprint() == truth.adapter.fingerprint()
    if DROPPING[0] in METHODS[method]:
        assert any(len(record.clients) < 4 for record in found.rounds), "somebody dropped out"
    assert [record.bytes_up for record in found.rounds] == [record.bytes_up for record in truth.rounds]
    kept = sorted(path.parts[-3] for path in (tmp_path / "run").glob("clients/*/method/0004.npz"))
    assert len(kept) == (len(found.rounds[-1].clients) if method in KEEPING else 0)
    own = [(record.clients, record.shared) for record in found.evaluations if record.part == "clients"]
    assert own == [(record.clients, record.shared) for record in truth.evaluations if record.part == "clients"]
    assert bool(own and own[-1][1]) == (method in KEEPING[1:])
    if method in ("feddpa, F", "fedavg, tuned", "flora, tuned"):
        assert len(found.rounds[-1].cohort) == 4
        assert found.rounds[-1].bytes_up == 0
        assert found.rounds[-1].adapter == found.rounds[-2].adapter
        assert any(own[-1][0][client] != own[-1][1][client] for client in own[-1][0]), "they serve what they tuned"


def test_a_changed_chat_template_or_tokenizer_is_refused(bellwether, tiny_recipe, tiny_llama, tmp_path, my_rule):
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tiny_recipe.write_text(tiny_recipe.read_text().replace(str(tiny_llama), str(model)))
    stopped_after(1, tiny_recipe, tmp_path / "run", "data.template=auto")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    outcome = bellwether("run", "--resume", tmp_path / "run", "--trust-code")
    assert outcome.code == 2
    assert "its data is another one now" in outcome.err


def test_a_run_goes_on_in_its_own_folder_only(bellwether, tiny_run, tmp_path):
    outcome = bellwether("run", "--resume", tiny_run[0], "--out", tmp_path / "other")
    assert outcome.code == 2
    assert "give --resume or --out, not both" in outcome.err
