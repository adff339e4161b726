"""A cohort that several processes train: the same bytes as one process, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import held
import numpy as np
import pytest
import torch
from asking import evaluate_tasks, train_tasks
from test_model_training import token_rows
from test_resume import RESULTS, newest, timeless
from tiny_models import random_adapter, tiny_folder

from bellwether.engine import processes
from bellwether.engine.local import LocalEngine
from bellwether.engine.processes import ProcessEngine, Work, split, worker_models
from bellwether.engine.resources import UnevenClients
from bellwether.errors import BellwetherError, ModelError, RoundFailed
from bellwether.exchange.messages import TrainTask
from bellwether.method.average import fedavg
from bellwether.method.cohort import Condition, clients_together
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.recipe.contradictions import contradictions
from bellwether.recipe.method import FedAvg

SIZES = {"a": 9, "b": 3, "c": 14, "d": 5, "e": 8}


def dealt() -> dict[str, list]:
    """Rows of five clients."""
    starts = np.cumsum([0, *SIZES.values()])
    rows = token_rows(sum(SIZES.values()))
    return {client: rows[start : start + size] for (client, size), start in zip(SIZES.items(), starts, strict=False)}


class Both:
    """The same federation in this process and in two others."""

    def __init__(self, folder: Path) -> None:
        self.settings = recipe.Model(path=str(folder), device="cpu")
        self.base = load_base(self.settings)
        self.adapter = random_adapter(self.base, rank=2, dtype="float32", dropout=0.1)
        self.work = Work(self.adapter.config, 1, dealt(), {"b": token_rows(4), "d": token_rows(3)}, FedAvg())
        self.models = worker_models(self.settings, self.base.device, 2)
        layers = LoraLayers(self.base.model, self.adapter.config)
        self.local = LocalEngine(self.base, layers, self.work.rows, self.work.held_out, fedavg())

    def tasks(self, clients, round: int = 1, **training) -> dict[str, TrainTask]:
        settings = recipe.Training(batch_size=4, **training)
        return train_tasks(clients, self.adapter, settings, round=round, rounds=3, seed=5)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Both:
    return Both(tiny_folder("llama", tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def workers(both):
    with ProcessEngine(both.models, both.work, both.base.fingerprint) as engine:
        yield engine
    assert not multiprocessing.active_children()


def same(one, other) -> bool:
    """Whether two replies hold the same update, bit for bit."""
    ours, theirs = one.update, other.update
    alike = (one.client, ours.rows, ours.metrics) == (other.client, theirs.rows, theirs.metrics)
    return alike and all(ours.tensors[key].tobytes() == value.tobytes() for key, value in theirs.tensors.items())


def test_updates_are_byte_equal_to_those_of_one_process_and_come_in_the_cohorts_order(both, workers):
    torch.set_num_threads(1)  # as many as each of the two has
    for round, cohort in ((1, ["d", "a", "c", "e"]), (2, ["b"])):
        tasks = both.tasks(cohort, round)
        ours, theirs = list(workers.ask(tasks)), list(both.local.ask(tasks))
        assert [reply.client for reply in ours] == cohort
        assert all(same(*pair) for pair in zip(ours, theirs, strict=True))


def test_clients_score_their_held_out_rows_alike(both, workers):
    tasks = evaluate_tasks("db", both.adapter, recipe.Evaluation(max_new_tokens=3))
    ours, theirs = list(workers.ask(tasks)), list(both.local.ask(tasks))
    assert [(reply.client, reply.totals) for reply in ours] == [(reply.client, reply.totals) for reply in theirs]


def test_simulated_resources_stand_over_several_processes_too(both, workers):
    def trace(client: str, round: int) -> Condition:
        return Condition(client != "c", 10.0, False)

    replies = list(UnevenClients(workers.ask, both.work.rows, trace).ask(both.tasks("acb")))
    assert [(reply.client, reply.failure) for reply in replies] == [("c", "it is away"), ("a", None), ("b", None)]
    assert [reply.seconds for reply in replies] == [0.0, 0.9, 0.3]


def test_the_workers_bases_are_unchanged_and_known(both, workers):
    assert workers.fingerprints() == [both.base.fingerprint] * 2


def test_a_killed_worker_is_one_sentence_and_the_others_end_too(both):
    before = multiprocessing.active_children()
    with ProcessEngine(both.models, both.work, both.base.fingerprint) as engine:
        list(engine.ask(both.tasks("a")))
        second = max(set(multiprocessing.active_children()) - set(before), key=lambda process: process.pid)
        threading.Timer(0.3, os.kill, (second.pid, signal.SIGKILL)).start()
        with pytest.raises(RoundFailed, match=r"Worker process 2 of 2 was killed by signal 9, .* --resume") as caught:
            list(engine.ask(both.tasks(SIZES, local_epochs=10_000)))  # takes hours
    assert "\n" not in str(caught.value)
    assert set(multiprocessing.active_children()) == set(before)


def test_a_workers_own_error_reaches_the_caller_as_it_is(both):
    broken = [both.settings.model_copy(update={"path": "/no/such/model"})]
    with (
        ProcessEngine(broken, both.work, both.base.fingerprint) as engine,
        pytest.raises(ModelError, match="there is no such folder"),
    ):
        list(engine.ask(both.tasks("a")))


# Who does what ------------------------------------------------------------------------------------


def test_shares_are_of_like_cost_and_number_and_depend_on_nothing_else():
    # By hand: 14 and 9, then 8 to the 9, 5 to the 14, and 3 to the share with 17 instead of 19.
    assert split({"a": 9.0, "b": 3.0, "c": 14.0, "d": 5.0, "e": 8.0}, 2) == [["c", "d"], ["a", "e", "b"]]
    assert split({"a": 9.0, "b": 1.0, "c": 1.0, "d": 1.0}, 2) == [["a", "d"], ["b", "c"]]  # the second is full
    assert split({"a": 1.0}, 3) == [["a"], [], []]
    assert [len(share) for share in split(dict.fromkeys("abcdefgh", 1.0), 3)] == [3, 3, 2]


def test_workers_take_cuda_devices_in_turn_and_share_the_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = worker_models(recipe.Model(), torch.device("cuda"), 3)
    assert [model.device for model in cuda] == ["cuda:0", "cuda:1", "cuda:0"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        two = worker_models(recipe.Model(), torch.device("cpu"), 2)
        assert [(model.device, model.threads) for model in two] == [("cpu", 2)] * 2
        assert worker_models(recipe.Model(), torch.device("cpu"), 8)[7].threads == 1
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(threads)


def test_a_process_trains_at_most_its_share_together():
    assert clients_together(recipe.Engine(fuse=0, processes=2), 5) == 3
    assert clients_together(recipe.Engine(fuse=2, processes=2), 5) == 2
    assert clients_together(recipe.Engine(fuse=4), 5) == 4


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"model": recipe.Model(device="cuda:1")}, "model.device is cuda:1, one device; set it to cuda"),
        ({"compare": recipe.Compare()}, "a comparison runs its arms side by side instead (--jobs); set it to 1"),
    ],
)
def test_fields_that_leave_processes_nothing_to_do_are_refused(more, text):
    found = contradictions(recipe.Recipe(engine=recipe.Engine(processes=2), **more))
    assert [location for location, _ in found] == [("engine", "processes")]
    assert text in found[0][1]


def test_more_processes_than_clients_in_a_round_are_refused(bellwether, tiny_recipe):
    outcome = bellwether("run", tiny_recipe, "engine.processes=3")
    assert (outcome.code, "engine.processes is 3, but a round asks 2 clients" in outcome.err) == (2, True)


# In a run -----------------------------------------------------------------------------------------


def test_what_fails_in_a_worker_without_being_expected_is_told_in_one_sentence(monkeypatch):
    parent, worker = multiprocessing.Pipe()
    monkeypatch.setattr(
        processes, "begin_worker", lambda environment: None
    )  # it would make this process deaf to interrupts
    parent.send((recipe.Model(), "no work"))
    monkeypatch.setattr(processes, "load_base", lambda model: 1 / 0)
    processes._serve(worker, {})
    told = parent.recv()
    assert isinstance(told, BellwetherError)
    assert str(told) == "A worker process failed: ZeroDivisionError: division by zero"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds child processes by /proc")
def test_an_interrupted_run_leaves_no_process_and_goes_on_to_the_bytes_of_one_process(
    bellwether, tiny_recipe, tmp_path
):
    words = ["federation.rounds=12", "federation.fraction=1", "evaluation.generate=false", "lora.dropout=0.1"]
    words.append("federation.sampler=held:everybody")
    outcome = bellwether("run", tiny_recipe, *words, "--out", tmp_path / "truth")
    assert outcome.code == 0, outcome.err

    command = [sys.executable, "-m", "bellwether", "run", tiny_recipe, *words, "engine.processes=2"]
    (tmp_path / "hold").write_text("10")  # so that it is still there, however fast it is
    process = subprocess.Popen(
        [*map(str, command), "--out", str(tmp_path / "run")],
        env=held.environment(tmp_path / "hold"),
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and newest(tmp_path / "run") < 2:
        time.sleep(0.01)
    started = forked.family(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    # The two workers, what they are forks of, and what tidies up after processes: the last two end by themselves.
    assert len(started) == 4
    patience = time.monotonic() + 60
    while any(map(forked.alive, started)) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not any(map(forked.alive, started))

    outcome = bellwether("run", "--resume", tmp_path / "run", "--trust-code")
    assert outcome.code == 0, outcome.err
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "truth" / name).read_bytes(), name
    assert timeless(tmp_path / "run") == timeless(tmp_path / "truth")
