"""How many processes and threads a machine takes where a recipe leaves that to it."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from bellwether.recipe.file import load_recipe
from bellwether.runner import processors
from bellwether.runner.prepare import prepare
from bellwether.runner.processors import Share, product_rates, with_processes

SMALL = ["engine.processes=0", "federation.rounds=2000", "evaluation.every=0"]


@pytest.fixture
def machine(monkeypatch):
    """Be a machine of four threads that does so many products a second in each way of sharing."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(processors, "_training_seconds", lambda prepared, *_: float(prepared.recipe.federation.rounds))

    def with_rates(alone, one, several):
        def rates(prepared, shares):
            by_count = several if isinstance(several, dict) else {2: 0.6 * several, 3: several, 4: several}
            return {
                share: by_count[share.processes] if share.processes > 1 else alone if share.threads > 1 else one
                for share in shares
            }

        monkeypatch.setattr(processors, "product_rates", rates)

    return with_rates


def chosen(*fields):
    said = []
    recipe = with_processes(prepare(load_recipe(None, [*SMALL, *fields])), said.append).recipe
    return recipe.engine.processes, recipe.model.threads, " ".join(said)


@pytest.mark.parametrize(
    ("rates", "processes", "threads"),
    [
        ((1.0, 0.9, 3.0), 4, 4),
        ((1.0, 1.5, 3.0), 4, 4),
        ((1.0, 0.9, 1.5), 1, 4),
        ((1.0, 0.9, 0.8), 1, 4),
        ((1.0, 1.5, 1.4), 1, 1),
        ((1.0, 0.9, {4: 1.5, 2: 2.0}), 2, 4),
    ],
)
def test_the_fastest_way_of_sharing_the_cores_is_taken(machine, rates, processes, threads):
    machine(*rates)
    assert chosen()[:2] == (processes, threads)


def test_processes_that_save_less_than_they_take_to_begin_are_not_taken(machine):
    machine(1.0, 0.9, 3.0)
    processes, threads, said = chosen("federation.rounds=1", "training.local_steps=1")
    assert (processes, threads) == (1, 4)
    assert "1.9 times as fast in 4 processes as in one of 4 threads, which does not save the 15 s that" in said


def test_no_more_processes_are_taken_than_a_round_has_clients_or_copies_of_the_base_fit(machine, monkeypatch):
    machine(1.0, 0.9, 3.0)
    assert chosen("federation.cohort_size=3")[0] == 3
    monkeypatch.setattr(processors, "memory", lambda: 2**40)
    assert chosen()[0] == 4
    # Three processes of which one runs the rounds, each with its libraries, the base and what it trains.
    monkeypatch.setattr(processors, "memory", lambda: 2 * int(3.5 * processors.LIBRARIES))
    assert chosen()[0] == 2
    monkeypatch.setattr(processors, "memory", lambda: 2**30)
    assert chosen()[:2] == (1, 4)


def test_a_containers_limit_of_memory_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(processors, "LIMITS", (str(limit),))
    machine = processors.memory()
    assert machine > 2**30
    for text, wanted in (("max\n", machine), ("1073741824\n", 2**30), (f"{2**63}\n", machine)):
        limit.write_text(text)
        assert processors.memory() == wanted


def test_products_have_as_many_tokens_as_clients_train_at_once(monkeypatch):
    seen = {}

    def multiplied(pair):
        seen.setdefault(pair[1].data_ptr(), len(pair[0]))
        return 1.0

    monkeypatch.setattr(processors, "_multiplied", multiplied)
    fields = ["engine.tokens=250", "federation.cohort_size=4", "training.batch_size=4"]
    together = prepare(load_recipe(None, [*fields, "engine.fuse=0"]))
    product_rates(together, [Share(1, 2), Share(2, 2)])
    assert list(seen.values()) == [250, 250, 250], "three processes with weights of their own"
    seen.clear()
    product_rates(prepare(load_recipe(None, fields)), [Share(1, 2)])
    lengths = [len(row) for one in together.clients.values() for row in one.rows]
    assert list(seen.values()) == [4 * sum(lengths) // len(lengths)]


def test_a_number_of_processes_that_is_named_is_taken_and_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(processors, "product_rates", None)
    prepared = prepare(load_recipe(None, ["engine.processes=2"]))
    assert with_processes(prepared, print) is prepared


def test_this_machine_is_measured_and_keeps_its_threads():
    before = torch.get_num_threads()
    shares = [Share(1, 2), Share(1, 1), Share(2, 2)]
    rates = product_rates(prepare(load_recipe(None)), shares)
    assert list(rates) == shares
    assert all(0 < rate < 1e9 for rate in rates.values())
    assert torch.get_num_threads() == before


@pytest.mark.integration
def test_what_was_found_stands_in_the_runs_recipe_and_is_gone_on_with(bellwether, monkeypatch):
    rates = {Share(1, 2): 1.0, Share(1, 1): 1.0, Share(2, 2): 2.0}
    monkeypatch.setattr(processors, "product_rates", lambda prepared, shares: {one: rates[one] for one in shares})
    monkeypatch.setattr(processors, "START", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    words = ["evaluation.max_rows_per_category=1", "evaluation.generate=false", "training.local_steps=1"]
    begun = bellwether("run", "engine.processes=0", *words, "--rounds", 1, "--out", "out")
    assert begun.code == 0, begun.err
    assert "engine.processes 0 takes 2 processes with 2 threads in all: a round is 1.7 times" in begun.out
    kept = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert (kept["engine"]["processes"], kept["model"]["threads"]) == (2, 2)
    assert json.loads(Path("out/environment.json").read_text())["threads"] == 2
    assert bellwether("run", "--resume", "out", "engine.processes=0", *words, "--rounds", 1).code == 0
    named = ["engine.processes=2", "model.threads=2", *words]
    assert bellwether("run", *named, "--rounds", 1, "--out", "named").code == 0
    adapters = [Path(folder, "adapter", "adapter_model.safetensors").read_bytes() for folder in ("out", "named")]
    assert adapters[0] == adapters[1]
