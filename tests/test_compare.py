"""Comparisons: arms against ordinary runs, tables against sums worked by hand, folders against kills."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import TINY_RECIPE, Command, dolly_rows, write_rows
from safetensors.numpy import load_file

from bellwether.arms.arm import arm_recipe
from bellwether.arms.compare import MODULES, compare
from bellwether.data.federated import load_federated
from bellwether.errors import BellwetherError, CheckpointError, DataError, RecipeError, RoundFailed
from bellwether.exchange.records import Note
from bellwether.exchange.scores import Totals
from bellwether.recipe.file import dump_recipe, load_recipe, with_overrides
from bellwether.recipe.recipe import Arm, Recipe
from bellwether.report.compare_show import cells, comparison_files, cost_cells, gain_cells, terminal
from bellwether.report.compare_table import client_gains, make_lines
from bellwether.runner.prepare import prepare
from bellwether.store.comparison import OUTCOMES, Comparison, Outcome, read_comparison, read_outcomes
from bellwether.tools.intervals import Interval
from bellwether.tools.json_text import plain
from bellwether.tools.randomness import Randomness
from bellwether.tools.workers import post, work_off

ARMS = {
    "base": {"trains": "nobody"},
    "frequent": {"trains": "most frequent answer"},
    "nearest": {"trains": "nearest row"},
    "local": {"trains": "alone"},
    "centralized": {"trains": "together"},
    "federated": {"trains": "federation"},
}


@pytest.fixture
def tiny(tmp_path: Path, tiny_recipe: Path) -> Recipe:
    """A recipe that compares all kinds of arms under two seeds, one thread each."""
    fields = {"compare": {"seeds": [3, 4], "arms": ARMS}, "model.threads": 1, "evaluation.max_rows_per_category": 1}
    return with_overrides(load_recipe(tiny_recipe), fields)


@pytest.fixture
def sites(tmp_path: Path, tiny_llama: Path) -> Recipe:
    """Two clients by name, a and b, with 16 rows each, and test rows of their own."""
    rows = dolly_rows(("letters", "coding"), 20)
    for name, part in (("a", rows[:16]), ("b", rows[16:32]), ("everybody", rows[:32]), ("test", rows[32:])):
        write_rows(tmp_path / f"{name}.jsonl", [row | {"site": name} for row in part])
    recipe = with_overrides(
        load_recipe(None),
        {
            "model": {"path": str(tiny_llama), "device": "cpu", "threads": 1},
            "data": {"sources": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], "template": "alpaca"},
            "partition": {"method": "column", "column": "site"},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
            "training": {"learning_rate": 0.01, "batch_size": 4},
            "evaluation": {"every": 0, "max_new_tokens": 2, "max_rows_per_category": 1},
        },
    )
    return with_overrides(recipe, {"data.test_sources": [str(tmp_path / "test.jsonl")]})


def comparing(recipe: Recipe, seeds: list[int], **arms: Mapping[str, Any]) -> Recipe:
    return with_overrides(recipe, {"compare": {"seeds": seeds, "arms": arms}})


def timeless(outcomes: list[Outcome]) -> list[Outcome]:
    """Return outcomes without what a clock said."""
    return [
        dataclasses.replace(one, cost={name: value for name, value in one.cost.items() if name != "seconds"})
        for one in outcomes
    ]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What arms train without a federation, by client."""
    from bellwether.client import train

    kept: dict[str, Any] = {}
    ordinary = train.train_cohort

    def recording(*arguments: Any) -> Any:
        for reply in ordinary(*arguments):
            kept[reply.client] = {name: np.array(value) for name, value in reply.update.tensors.items()}
            yield reply

    monkeypatch.setattr(train, "train_cohort", recording)
    return kept


# Arms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trains", "client"), [("alone", "a"), ("together", "everybody")])
def test_training_alone_or_together_is_a_federation_of_one_client_with_these_rows_for_one_round(
    sites: Recipe, tmp_path: Path, updates: dict[str, Any], trains: str, client: str
) -> None:
    from bellwether import run

    recipe = comparing(sites, [7], arm={"trains": trains, "passes": 3})
    found = {one.client: one for one in compare(recipe, tmp_path / "out").outcomes}
    one_client = {
        "data.sources": [str(tmp_path / f"{client}.jsonl")],
        "federation": {"rounds": 1, "fraction": 1.0},
        "training.local_epochs": 3,
        "seed": 7,
        "output.folder": str(tmp_path / "run"),
    }
    result = run(with_overrides(sites, one_client))
    of_run = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    arm = updates[client]
    assert arm.keys() == result.adapter.tensors.keys()
    assert all(arm[key].tobytes() == np.asarray(value).tobytes() for key, value in result.adapter.tensors.items())
    assert len(of_run) == len(arm)
    answers = [json.loads(line) for line in (result.folder / "answers" / "0001.jsonl").read_text().splitlines()]
    outcome = found["" if trains == "together" else client]
    kept = zip(outcome.categories, outcome.answers, outcome.totals, strict=True)
    assert [{"category": name, "answer": answer, **plain(row)} for name, answer, row in kept] == answers


def test_equal_passes_and_equal_steps_are_what_they_say(sites: Recipe, tmp_path: Path) -> None:
    fields = {"federation": {"rounds": 4, "fraction": 0.5}}  # one of two clients in a round: two passes each
    recipe = comparing(
        with_overrides(sites, fields),
        [1],
        local={"trains": "alone"},
        few={"trains": "alone", "clients": ["b"], "passes": 3},
        centralized={"trains": "together"},
        steps={"trains": "together", "steps": 5},
        local_steps={"trains": "alone", "steps": 5},
        federated={"trains": "federation"},
        longer={"trains": "federation", "passes": 3},
    )
    outcomes = compare(recipe, tmp_path / "out").outcomes
    seen = {(one.arm, one.client): one.cost["rows_seen"] for one in outcomes}
    assert seen == {
        ("local", "a"): 2 * 16,
        ("local", "b"): 2 * 16,
        ("few", "b"): 3 * 16,
        ("centralized", ""): 2 * 32,
        ("steps", ""): 5 * 4,
        ("local_steps", "a"): 5 * 4,
        ("local_steps", "b"): 5 * 4,
        ("federated", ""): 4 * 16,
        ("longer", ""): 6 * 16,
    }
    rows = {(one.arm, one.client): one.cost["rows"] for one in outcomes}
    assert (rows["local", "a"], rows["centralized", ""], rows["federated", ""]) == (16, 32, 32)
    assert {one.own for one in outcomes if one.client} == {("coding", "letters")}
    assert {one.own for one in outcomes if not one.client} == {()}


@pytest.mark.parametrize(
    ("federation", "epochs", "clients", "passes", "rounds"),
    [
        ({"fraction": 0.5}, 1, 10, 10, 20),
        ({"fraction": 0.5}, 2, 10, 10, 10),
        ({"cohort_size": 3}, 1, 10, 6, 20),
        ({"fraction": 0.05}, 1, 100, 2, 40),
        # Of three clients half are two, as FedAvg rounds: 4 passes are 4 / (2 / 3) rounds.
        ({"fraction": 0.5}, 1, 3, 4, 6),
    ],
)
def test_passes_become_rounds_by_the_clients_that_there_are(
    federation: dict[str, Any], epochs: int, clients: int, passes: int, rounds: int
) -> None:
    recipe = with_overrides(Recipe(), {"federation": federation, "training.local_epochs": epochs})
    changed = arm_recipe(recipe, "x", Arm(trains="federation", passes=passes), 0, clients)
    assert changed.federation.rounds == rounds
    # And back: what an arm without a federation trains by default is what those rounds make.
    back = arm_recipe(changed, "x", Arm(trains="together"), 0, clients)
    assert (back.federation.rounds, back.training.local_epochs) == (1, passes)


def test_passes_hold_where_the_federation_counts_steps() -> None:
    recipe = with_overrides(Recipe(), {"training.local_steps": 7})
    changed = arm_recipe(recipe, "x", Arm(trains="alone", passes=3), 0, 10)
    assert (changed.training.local_epochs, changed.training.local_steps) == (3, None)


def test_a_seed_changes_the_partition_and_not_the_held_out_rows(tiny: Recipe) -> None:
    made = [prepare(arm_recipe(tiny, "local", Arm(trains="alone"), seed, 4)) for seed in (3, 4)]
    first, second = ([row.row.place for row in one.scored.rows] for one in made)
    assert first == second
    first, second = ([row.place for row in one.federated.clients["client-01"]] for one in made)
    assert first != second


def test_an_arm_sets_fields_of_its_own(tiny: Recipe) -> None:
    arm = Arm(trains="alone", learning_rate=0.5, set={"lora.rank": 5, "training.batch_size": 2})
    changed = arm_recipe(tiny, "x", arm, 9, 4)
    assert (changed.seed, changed.lora.rank, changed.training.batch_size) == (9, 5, 2)
    assert (changed.training.learning_rate, changed.compare) == (0.5, None)


def test_an_arm_without_a_federation_sets_what_counts_its_passes() -> None:
    fields = {"federation.rounds": 6, "federation.fraction": 1.0, "training.batch_size": 2}
    recipe = comparing(Recipe(), [0], x={"trains": "together", "set": fields})
    assert arm_recipe(recipe, "x", recipe.compare.arms["x"], 0, 10).training.local_epochs == 6


def test_the_untuned_base_is_scored_once_for_all_arms_and_seeds_and_scores_what_it_scores_alone(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellwether.client import score as scoring

    arms = {
        "base": {"trains": "nobody"},
        "federated": {"trains": "federation"},
        "rank 5": {"set": {"lora.rank": 5, "lora.target_modules": ["k_proj"]}},
        "shorter": {"trains": "nobody", "set": {"evaluation.max_new_tokens": 1}},
    }
    asked: list[bool] = []
    ordinary = scoring.score

    def recording(base: Any, layers: Any, *arguments: Any) -> Any:
        asked.append(any(value.any() for key, value in layers.read(0).items() if "lora_B" in key))
        return ordinary(base, layers, *arguments)

    monkeypatch.setattr(scoring, "score", recording)
    together = compare(comparing(tiny, [1, 2], **arms), tmp_path / "together")
    assert asked.count(False) == 2  # of the base, and of shorter answers
    assert asked.count(True) == 4  # two federations under two seeds
    for name, arm in arms.items():
        alone = compare(comparing(tiny, [2], **{name: arm}), tmp_path / f"alone {name}").outcomes
        assert timeless(alone) == timeless([one for one in together.outcomes if (one.arm, one.seed) == (name, 2)])
        if arm.get("trains") != "nobody":
            first = [
                (tmp_path / folder / name.replace(" ", "-") / "seed-2" / "run" / "answers" / "0000.jsonl").read_bytes()
                for folder in ("together", f"alone {name}")
            ]
            assert first[0] == first[1]


def test_rows_that_clients_hold_out_are_trained_by_no_arm(tiny: Recipe, tmp_path: Path) -> None:
    recipe = comparing(
        with_overrides(tiny, {"partition.client_test_fraction": 0.5}),
        [1],
        local={"trains": "alone", "passes": 1},
        centralized={"trains": "together", "passes": 1},
    )
    outcomes = compare(recipe, tmp_path / "out").outcomes
    # Of 32 rows each of four clients keeps half of its eight.
    assert [one.cost["rows_seen"] for one in outcomes] == [4, 4, 4, 4, 16]


def test_the_rivals_do_not_depend_on_who_holds_which_row(tiny: Recipe, tmp_path: Path) -> None:
    rivals = {name: ARMS[name] for name in ("frequent", "nearest")}
    found = [
        timeless(compare(comparing(recipe, [1], **rivals), tmp_path / name).outcomes)
        for name, recipe in (("iid", tiny), ("shards", with_overrides(tiny, {"partition.method": "shards"})))
    ]
    assert found[0] == found[1]
    assert all(answer for one in found[0] for answer in one.answers)


def test_a_single_run_ignores_the_comparison(
    bellwether: Command, tiny_recipe: Path, tiny_run: tuple[Path, Any], tmp_path: Path
) -> None:
    outcome = bellwether("run", tiny_recipe, "compare={seeds: [5, 6]}", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "out" / adapter).read_bytes() == (tiny_run[0] / adapter).read_bytes()


def test_a_comparison_comes_back_from_a_dumped_recipe(tmp_path: Path) -> None:
    fields = ["compare.tune={passes: [3]}", "compare.arms.twice={trains: together, set: {lora.rank: 16}}"]
    for recipe in (load_recipe("fedit-table"), load_recipe(None, fields), load_recipe(None, ["compare={}"])):
        (tmp_path / "again.yaml").write_text(dump_recipe(recipe, comments=True))
        assert load_recipe(tmp_path / "again.yaml") == recipe
        assert recipe.compare is not None
    assert list(load_recipe(None, ["compare={}"]).compare.arms) == ["base", "local", "centralized", "federated"]


# What is kept -------------------------------------------------------------------------------------


def test_every_trained_adapter_is_kept_in_pefts_format(
    sites: Recipe, tmp_path: Path, updates: dict[str, Any], tiny_llama: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    arms = {"base": ARMS["base"], "local": {"trains": "alone", "passes": 1}, "federated": ARMS["federated"]}
    recipe = comparing(with_overrides(sites, {"federation.rounds": 1}), [7], **arms)
    found = compare(recipe, tmp_path / "out").outcomes
    kept = {(one.arm, one.client): one.adapter for one in found}
    assert kept == {
        ("base", ""): "",
        ("local", "a"): "adapters/1-a",
        ("local", "b"): "adapters/2-b",
        ("federated", ""): "run/adapter",
    }
    folder = tmp_path / "out" / "local" / "seed-7" / kept["local", "b"]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(folder))
    loaded = {key: value for key, value in tuned.state_dict().items() if "lora_" in key}
    named = {key.replace(".default", ""): value.numpy() for key, value in loaded.items()}
    assert named.keys() == updates["b"].keys()
    assert all(np.array_equal(named[key], value) for key, value in updates["b"].items())


def test_a_curve_tells_the_loss_of_each_step_over_passes(sites: Recipe, tmp_path: Path) -> None:
    recipe = comparing(
        with_overrides(sites, {"federation": {"rounds": 3, "fraction": 0.5}}),
        [7],
        local={"trains": "alone", "passes": 2},
        federated={"trains": "federation"},
    )
    local, other, federated = compare(recipe, tmp_path / "out").outcomes
    # Sixteen rows in batches of four: eight steps of a quarter of a pass.
    assert [passes for passes, _ in local.curve] == [step / 4 for step in range(1, 9)]
    assert [passes for passes, _ in federated.curve] == [0.5, 1.0, 1.5]
    assert all(loss > 0 for one in (local, other, federated) for _, loss in one.curve)
    rounds = [json.loads(line) for line in (tmp_path / "out/federated/seed-7/run/rounds.jsonl").open()]
    assert [loss for _, loss in federated.curve] == [one["loss"] for one in rounds]


def test_the_losses_of_steps_weighed_by_their_tokens_are_the_loss_of_training(sites: Recipe) -> None:
    from asking import train

    from bellwether.model.base import load_base
    from bellwether.model.lora import LoraLayers, initial_adapter
    from bellwether.tools.randomness import Randomness

    prepared = prepare(sites)
    base = load_base(sites.model)
    adapter = initial_adapter(base, sites.lora, Randomness(0).torch("initial adapter"))
    layers = LoraLayers(base.model, adapter.config, slots=1)
    training = sites.training.model_copy(update={"batch_size": 16, "local_epochs": 3})  # each step is a whole pass
    (reply,) = train(base, layers, {"a": prepared.clients["a"].rows}, adapter, training)
    assert len(reply.losses) == 3
    assert sum(reply.losses) / 3 == pytest.approx(reply.update.metrics["loss"], rel=1e-5)


def test_a_finished_comparison_is_read_as_it_was_given(tiny: Recipe, tmp_path: Path) -> None:
    recipe = comparing(
        with_overrides(tiny, {"partition.client_test_fraction": 0.5}),
        [3],
        **{name: ARMS[name] for name in ("base", "local", "federated")},
    )
    found = compare(recipe, tmp_path / "out")
    assert read_comparison(tmp_path / "out") == found
    local = [one for one in found.outcomes if one.arm == "local"]
    # Each has scores on the rows that it holds out itself, the others on those of all.
    assert [list(one.clients) for one in local] == [[one.client] for one in local]
    assert [sorted(one.clients) for one in found.outcomes if one.arm != "local"] == [[o.client for o in local]] * 2
    assert all(rows.rows == 4 for one in found.outcomes for rows in one.clients.values())


def test_what_is_no_finished_comparison_or_a_broken_one_is_not_read(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no finished comparison"):
        read_comparison(tmp_path)
    compare(comparing(tiny, [3], base=ARMS["base"]), tmp_path / "out")
    (tmp_path / "out" / "comparison.json").write_text("[]")
    with pytest.raises(CheckpointError, match="The comparison in .* cannot be read"):
        read_comparison(tmp_path / "out")


# Going on -----------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.xdist_group("workers")
def test_two_processes_find_what_one_finds_and_a_second_call_trains_nothing(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = comparing(tiny, [3], **{name: ARMS[name] for name in ("base", "local", "federated")})
    one = compare(recipe, tmp_path / "one")
    two = compare(recipe, tmp_path / "two", jobs=2)
    assert timeless(two.outcomes) == timeless(one.outcomes)
    assert [(o.arm, o.seed, o.client) for o in one.outcomes][:3] == [
        ("base", 3, ""), ("local", 3, "client-01"), ("local", 3, "client-02"),
    ]  # fmt: skip

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something is trained again")

    monkeypatch.setattr("bellwether.client.train.train_cohort", never)
    monkeypatch.setattr("bellwether.runner.run.run", never)
    before = files_of(tmp_path / "one")
    told: list[Any] = []
    assert compare(recipe, tmp_path / "one", jobs=2, watch=told.append).outcomes == one.outcomes
    assert files_of(tmp_path / "one") == before
    assert [event.text for event in notes(told)] == [
        "evaluation.max_rows_per_category: 4 of 8 rows are scored.", "3 of 3 are finished already.",
    ]  # fmt: skip


def test_a_killed_comparison_goes_on_with_its_finished_arms_and_in_the_midst_of_a_federation(
    tiny: Recipe, tmp_path: Path
) -> None:
    recipe = comparing(
        with_overrides(tiny, {"federation.rounds": 8, "federation.sampler": "held:half"}),
        [3],
        base=ARMS["base"],
        federated=ARMS["federated"],
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "hold").write_text("5")  # so that it is still there, however fast it is
    folder = tmp_path / "out"
    words = [tmp_path / "recipe.yaml", "--out", folder, "--trust-code"]
    process = forked.start("compare", *words, HELD=str(tmp_path / "hold"))
    run = folder / "federated" / "seed-3" / "run"
    while process.poll() is None and not (run / "checkpoints" / "0002").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "federated" / "seed-3" / OUTCOMES).exists()
    done, begun = folder / "base" / "seed-3" / OUTCOMES, run / "answers" / "0000.jsonl"
    before = (done.stat().st_mtime_ns, begun.stat().st_mtime_ns)
    found = compare(recipe, folder)
    assert (done.stat().st_mtime_ns, begun.stat().st_mtime_ns) == before
    assert timeless(found.outcomes) == timeless(compare(recipe, tmp_path / "truth").outcomes)


def test_a_federation_that_was_killed_before_its_first_commit_begins_anew(tiny: Recipe, tmp_path: Path) -> None:
    recipe = comparing(tiny, [3], federated=ARMS["federated"])
    run = tmp_path / "out" / "federated" / "seed-3" / "run"
    truth = compare(recipe, tmp_path / "out").outcomes
    (run.parent / OUTCOMES).unlink()
    for path in sorted(run.rglob("*"), reverse=True):  # what is left of a run that was killed while it began
        if path.name not in (".lock", "checkpoints", "environment.json"):
            path.rmdir() if path.is_dir() else path.unlink()
    assert timeless(compare(recipe, tmp_path / "out").outcomes) == timeless(truth)


def test_a_comparison_keeps_its_number_of_threads_however_many_jobs_there_are(tiny: Recipe, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = comparing(with_overrides(tiny, {"model.threads": 0}), [3], base=ARMS["base"])
    kept = compare(recipe, tmp_path / "out").recipe
    assert kept.model.threads == 1
    assert compare(recipe, tmp_path / "out", jobs=3).recipe == kept
    with pytest.raises(CheckpointError, match="model.threads: 1 → 2"):
        compare(with_overrides(recipe, {"model.threads": 2}), tmp_path / "out")


def test_a_folder_of_another_recipe_other_rows_or_another_base_is_refused(
    sites: Recipe, tmp_path: Path, tiny_llama: Path
) -> None:
    import shutil

    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    recipe = comparing(with_overrides(sites, {"model.path": str(model)}), [3], base=ARMS["base"])
    compare(recipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"another recipe.*lora.rank: 2 → 4"):
        compare(with_overrides(recipe, {"lora.rank": 4}), tmp_path / "out")
    (weights,) = model.glob("*.safetensors")
    old = weights.read_bytes()
    weights.write_bytes(old[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="the base model of the arm base changed"):
        compare(recipe, tmp_path / "out")
    weights.write_bytes(old)
    write_rows(tmp_path / "a.jsonl", [row | {"site": "a"} for row in dolly_rows(("letters", "coding"), 7)])
    with pytest.raises(CheckpointError, match="the rows of the arm base changed"):
        compare(recipe, tmp_path / "out")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="else is not empty"):
        compare(recipe, tmp_path / "else")


def test_a_seed_under_which_rows_cannot_be_dealt_is_found_before_anything_is_trained(
    tiny: Recipe, tmp_path: Path
) -> None:
    uneven = with_overrides(tiny, {"partition.method": "quantity", "partition.rows_per_client": [4, 8]})

    def fits(seed: int) -> bool:
        partition = with_overrides(uneven, {"partition.rows_per_client": None}).partition
        dealt = load_federated(uneven.data, partition, Randomness(seed)).clients
        return min(len(rows) for rows in dealt.values()) >= 4

    good, bad = (next(seed for seed in range(100) if fits(seed) is wanted) for wanted in (True, False))
    asked = with_overrides(uneven, {"compare.seeds": [good, bad]})
    with pytest.raises(DataError, match=rf"compare\.seeds, under seed {bad}: partition\.rows_per_client begins at 4"):
        compare(asked, tmp_path / "comparison")
    assert not (tmp_path / "comparison").exists()


def test_a_folder_of_another_device_is_refused_and_other_versions_are_noted(tiny: Recipe, tmp_path: Path) -> None:
    recipe, told = comparing(tiny, [3], base=ARMS["base"]), list[Any]()
    compare(recipe, tmp_path / "out")
    path = tmp_path / "out" / "inputs.json"
    whole = json.loads(path.read_text())
    for fact, other in (("device", "cuda:7"), ("dtype", "bfloat16")):
        path.write_text(json.dumps({"base": whole["base"] | {fact: other}}))
        with pytest.raises(CheckpointError, match=f"the {fact} of the arm base changed"):
            compare(recipe, tmp_path / "out")
    path.write_text(json.dumps({"base": whole["base"] | {"versions": "torch 1.0"}}))
    compare(recipe, tmp_path / "out", watch=told.append)
    assert [event.warning for event in notes(told) if "Packages have other versions" in event.text] == [True]
    # Written before these were noted: it gets them.
    path.write_text(json.dumps({"base": {name: whole["base"][name] for name in ("rows", "base model")}}))
    compare(recipe, tmp_path / "out")
    assert json.loads(path.read_text()) == whole


@pytest.mark.parametrize(
    ("content", "says"), [("{", "Expecting"), ("{}", "the arm 'base' is missing"), ('{"base": 3}', "not a mapping")]
)
def test_inputs_that_are_broken_are_told_by_name(tiny: Recipe, tmp_path: Path, content: str, says: str) -> None:
    recipe = comparing(tiny, [3], base=ARMS["base"])
    compare(recipe, tmp_path / "out")
    (tmp_path / "out" / "inputs.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"inputs.json cannot be read .*{says}.*; restore it"):
        compare(recipe, tmp_path / "out")


def test_what_arms_have_to_say_of_their_rows_is_told_once(tiny: Recipe, tmp_path: Path) -> None:
    told: list[Any] = []
    arms = {"base": ARMS["base"], "smaller": {"trains": "nobody", "set": {"lora.rank": 1}}}
    compare(comparing(with_overrides(tiny, {"data.max_rows": 30}), [3], **arms), tmp_path / "out", watch=told.append)
    assert [event.text for event in notes(told)].count("data.max_rows: 30 of 40 rows are taken.") == 1


def test_what_a_person_should_look_at_is_told_once_as_a_warning(tiny: Recipe, tmp_path: Path) -> None:
    told: list[Any] = []
    few = {"trains": "nobody", "set": {"selection.method": "hierarchical", "selection.min_cluster_rows": 2}}
    compare(comparing(tiny, [3], base=ARMS["base"], few=few, again=few), tmp_path / "out", watch=told.append)
    warned = [event.text for event in notes(told) if event.warning]
    assert len(warned) == 1
    assert warned[0].startswith("selection.min_cluster_rows is 2: a centroid of fewer than 5 rows may reveal")


def test_outcomes_that_are_cut_off_are_told_by_name(tiny: Recipe, tmp_path: Path) -> None:
    recipe = comparing(tiny, [3], base=ARMS["base"])
    compare(recipe, tmp_path / "out")
    path = tmp_path / "out" / "base" / "seed-3" / OUTCOMES
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"outcomes.json cannot be read .*; remove it"):
        compare(recipe, tmp_path / "out")


def test_an_interrupt_before_anything_is_finished_says_so(
    bellwether: Command, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bellwether.arms.compare.compare", interrupted)
    outcome = bellwether("compare", tiny_recipe, "compare={}")
    assert outcome.code == 130
    assert outcome.err == ("bellwether: interrupted; nothing is left half done, and the same command begins anew.\n")


# Processes ----------------------------------------------------------------------------------------


def notes(told: list[Any]) -> list[Note]:
    return [event for event in told if isinstance(event, Note)]


def double(number: int) -> int:
    post((number, "begun"))
    if number == 13:
        raise RecipeError("13 brings bad luck; take 14.")
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


@pytest.mark.xdist_group("workers")
def test_processes_side_by_side_tell_every_piece_and_what_it_gave() -> None:
    told: list[tuple[int, int]] = []
    work_off(double, [3, 1, 2], 2, lambda work, result: told.append((work, result)), MODULES)
    assert sorted(told) == [(1, 2), (2, 4), (3, 6)]


@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("processes", [1, 2])
def test_what_pieces_post_is_heard_where_they_were_shared_out(processes: int) -> None:
    heard: list[Any] = []
    work_off(double, [3, 1, 2], processes, lambda *_: None, MODULES, heard.append)
    assert sorted(heard) == [(1, "begun"), (2, "begun"), (3, "begun")]


@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("processes", [1, 2])
def test_who_cannot_hear_ends_the_work_and_leaves_no_process_waiting(processes: int) -> None:
    def hear(message: Any) -> None:
        raise RecipeError("the hearer fails; give another.")

    with pytest.raises(RecipeError, match="the hearer fails"):
        work_off(double, [3, 1, 2], processes, lambda *_: None, MODULES, hear)


@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize(
    ("work", "says"), [([13, 1], "13 brings bad luck; take 14"), ([-1, 1], "was killed, perhaps for lack of memory")]
)
def test_what_goes_wrong_in_a_process_is_said_in_one_sentence(work: list[int], says: str) -> None:
    with pytest.raises(BellwetherError, match=says) as caught:
        work_off(double, work, 2, lambda *_: None, MODULES)
    assert "\n" not in str(caught.value)


SLEEPERS = """\
import os, sys, time
from pathlib import Path
from bellwether.tools.workers import work_off


def sleep_long(path):
    (path / str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":
    work_off(sleep_long, [Path(sys.argv[1])] * 2, 2, print)
"""


def test_no_process_outlives_one_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(SLEEPERS)
    (tmp_path / "pids").mkdir()
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "pids")])
    patience = time.monotonic() + 300
    while len(pids := {int(path.name) for path in (tmp_path / "pids").iterdir()}) < 2 and time.monotonic() < patience:
        time.sleep(0.05)
    begun = forked.family(parent.pid)
    parent.kill()
    parent.wait()
    assert len(pids) == 2
    assert pids < set(begun)
    while any(map(forked.alive, begun)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(forked.alive, begun))


# Tables -------------------------------------------------------------------------------------------


def made_up(arm: str, seed: int, losses: list[float], client: str = "", own: tuple[str, ...] = ()) -> Outcome:
    """An outcome on two rows of category x and one of y, of 2, 6 and 4 tokens; every second answer is exact."""
    totals = [
        Totals(rows=1, tokens=tokens, loss=loss, generated=1, rouge_l=loss / 10, exact=number % 2)
        for number, (tokens, loss) in enumerate(zip((2, 6, 4), losses, strict=True))
    ]
    return Outcome(arm, seed, client, ("x", "x", "y"), tuple(totals), ("a", "b", "c"), own, {})


OUTCOMES_BY_HAND = [
    made_up("local", 1, [2, 6, 8], "c1", ("x",)),
    made_up("local", 1, [4, 4, 4], "c2", ("x", "y")),
    made_up("local", 2, [2, 2, 4], "c1", ("y", "never scored")),
    made_up("local", 2, [6, 6, 8], "c2", ("y",)),
    made_up("federated", 1, [1, 3, 2]),
    made_up("federated", 2, [2, 4, 4]),
]


def by_hand(arms: dict[str, Arm], outcomes: list[Outcome]) -> Comparison:
    return Comparison(Recipe(), arms, outcomes, [])


def tables(comparison: Comparison) -> dict[str, str]:
    """The files of a comparison's result."""
    files = comparison_files(make_lines(comparison), client_gains(comparison), comparison)
    return {name: content.decode() for name, content in files.items()}


TWO = {"local": Arm(trains="alone"), "federated": Arm(trains="federation")}


def test_scores_are_means_over_clients_then_seeds_of_means_over_categories() -> None:
    lines = {line.name: line for line in make_lines(by_hand(TWO, OUTCOMES_BY_HAND))}
    # Local: x is (8/8 + 8/8)/2 and (4/8 + 12/8)/2, y is (8/4 + 4/4)/2 and (4/4 + 8/4)/2.
    assert lines["local"].categories["x"]["loss"].mean == pytest.approx(1.0)
    assert lines["local"].categories["y"]["loss"].mean == pytest.approx(1.5)
    assert lines["local"].scores["loss"].mean == pytest.approx(1.25)
    # Federated: x is 4/8 and 6/8, y is 2/4 and 4/4.
    assert lines["federated"].scores["loss"].mean == pytest.approx((0.5 + 0.5 + 0.75 + 1.0) / 4)
    # Plain means of answers: the second row of x alone is exact.
    assert lines["federated"].scores["exact"].mean == pytest.approx((1 / 2 + 0) / 2)
    assert lines["federated"].categories["x"]["rouge_l"].mean == pytest.approx((1 + 3 + 2 + 4) / 10 / 4)


def test_a_gap_is_how_much_higher_the_federated_arm_scores() -> None:
    lines = {line.name: line for line in make_lines(by_hand(TWO, OUTCOMES_BY_HAND))}
    gap = lines["local"].gaps["loss"]
    assert gap.mean == pytest.approx(0.6875 - 1.25)
    assert gap.low < gap.mean < gap.high
    assert lines["federated"].gaps == {}


def test_own_categories_are_means_over_clients_of_means_over_those_of_their_rows_that_are_scored() -> None:
    lines = {line.name: line for line in make_lines(by_hand(TWO, OUTCOMES_BY_HAND))}
    # Seed 1: c1 on x 8/8, c2 on x and y (8/8 + 4/4)/2. Seed 2: c1 on y 4/4, c2 on y 8/4.
    assert lines["local, own categories"].scores["loss"].mean == pytest.approx(((1 + 1) / 2 + (1 + 2) / 2) / 2)
    # The federated adapter there. Seed 1: x 4/8, (4/8 + 2/4)/2. Seed 2: y 4/4 twice.
    federated = ((0.5 + 0.5) / 2 + 1.0) / 2
    assert lines["federated, own categories of local"].scores["loss"].mean == pytest.approx(federated)
    assert lines["local, own categories"].gaps["loss"].mean == pytest.approx(federated - 1.25)
    assert lines["federated, own categories of local"].gaps == {}


KINDS = {
    "base": Arm(trains="nobody"),
    "local": Arm(trains="alone"),
    "local by steps": Arm(trains="alone", steps=9),
    "together by steps": Arm(trains="together", steps=9),
    "federated": Arm(trains="federation"),
    "federated by steps": Arm(trains="federation", set={"training.local_steps": 3}),
}


def of_kinds(*without: str) -> Comparison:
    """Each arm of ``KINDS`` but some, two seeds; the loss per token of an arm is its number among them, from 1."""
    outcomes = [
        made_up(arm, seed, [2.0 * number, 6.0 * number, 4.0 * number], *(("c1", ("x",)) if "local" in arm else ()))
        for number, arm in enumerate(KINDS, 1)
        for seed in (1, 2)
        if arm not in without
    ]
    return by_hand({name: arm for name, arm in KINDS.items() if name not in without}, outcomes)


def test_arms_that_count_steps_are_compared_with_the_federation_that_does() -> None:
    gaps = {line.name: line.gaps["loss"].mean for line in make_lines(of_kinds()) if line.gaps}
    assert gaps == pytest.approx(
        {
            "base": 5 - 1,
            "local": 5 - 2,
            "local by steps": 6 - 3,
            "together by steps": 6 - 4,
            "local, own categories": 5 - 2,
            "local by steps, own categories": 6 - 3,
            "together by steps, own categories of local by steps": 6 - 4,
        }
    )
    text = tables(of_kinds())["table.md"]
    assert "Arms are compared with the arm federated." in text
    assert "Arms that count steps are compared with the arm federated by steps." in text


def test_on_own_categories_steps_stand_beside_steps_and_passes_beside_passes() -> None:
    own = [line.name for line in make_lines(of_kinds()) if "own categories" in line.name]
    assert own == [
        "local, own categories",
        "federated, own categories of local",
        "local by steps, own categories",
        "together by steps, own categories of local by steps",
        "federated by steps, own categories of local by steps",
    ]


@pytest.mark.parametrize("missing", ["federated", "federated by steps"])
def test_arms_without_a_federation_of_their_kind_have_no_differences(missing: str) -> None:
    names = {line.name for line in make_lines(of_kinds(missing)) if line.gaps}
    assert names == (
        {"local by steps", "together by steps", "local by steps, own categories",
         "together by steps, own categories of local by steps"}
        if missing == "federated" else {"base", "local", "local, own categories"}
    )  # fmt: skip


def test_the_table_says_what_was_compared_and_how_arms_were_trained() -> None:
    arms = {
        "base": Arm(trains="nobody"),
        "local": Arm(trains="alone", learning_rate=0.5, passes=7),
        "steps": Arm(trains="together", steps=9),
        "together": Arm(trains="together"),
        "federated": Arm(set={"federation.rounds": 4, "training.local_steps": 3, "training.learning_rate": 0.25}),
    }
    outcomes = [made_up(arm, seed, [1, 2, 3]) for arm in arms for seed in (5, 6)]
    text = tables(by_hand(arms, outcomes))["table.md"]
    assert "Recipe default, seeds 5, 6; 3 scored rows.\n" in text
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- local: learning rate 0.5, 7 passes",
        "- steps: learning rate 0.008, 9 steps",
        "- together: learning rate 0.008, as many passes as 20 rounds make",
        "- federated: learning rate 0.25, 4 rounds of 3 steps",
    ]


def test_categories_have_intervals_of_their_own_rows() -> None:
    comparison = by_hand(TWO, OUTCOMES_BY_HAND)
    lines = make_lines(comparison)
    x, y = (lines[0].categories[category]["loss"] for category in "xy")
    assert x.low < x.mean < x.high
    # The only row of y has under both seeds the same mean over clients: nothing to be uncertain of.
    assert (y.low, y.mean, y.high) == (1.5, 1.5, 1.5)
    kept = json.loads(tables(comparison)["table.json"])["lines"]
    assert kept[0]["categories"]["x"]["loss"] == plain(x)


def test_all_differences_that_are_shown_are_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bellwether.report.compare_table.difference", lambda *_, **__: Interval(0.1, 0.0, 0.2, 0.006))
    comparison = by_hand(TWO, OUTCOMES_BY_HAND)
    lines = make_lines(comparison)
    # Two lines with three differences each: all six get 6 · 0.006.
    assert [round(gap.p, 9) for line in lines for gap in line.gaps.values()] == [0.036] * 6
    heads, rows = cells(lines)
    assert sum("federated minus it" in head for head in heads) == 3
    assert sum(cell == "10.0 [0.0, 20.0]" or cell == "0.100 [0.000, 0.200]" for row in rows for cell in row) == 6


def test_differences_that_cannot_be_told_from_none_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bellwether.report.compare_table.difference", lambda *_, **__: Interval(0.1, 0.0, 0.2, 0.01))
    comparison = by_hand(TWO, OUTCOMES_BY_HAND)  # 6 · 0.01 > 0.05
    _, rows = cells(make_lines(comparison))
    assert sum(cell.startswith("= ") for row in rows for cell in row) == 6


def test_arms_with_other_tokenizers_have_no_difference_in_loss() -> None:
    other = [
        dataclasses.replace(one, totals=tuple(dataclasses.replace(row, tokens=row.tokens + 1) for row in one.totals))
        for one in OUTCOMES_BY_HAND
        if one.arm == "federated"
    ]
    arms = {"federated": TWO["federated"], "other": Arm(trains="federation")}
    outcomes = OUTCOMES_BY_HAND[4:] + [dataclasses.replace(one, arm="other") for one in other]
    line = make_lines(by_hand(arms, outcomes))[1]
    assert line.gaps.keys() == {"rouge_l", "exact"}


def test_without_a_federation_the_table_has_no_differences() -> None:
    comparison = by_hand({"local": TWO["local"]}, OUTCOMES_BY_HAND[:4])
    heads, rows = cells(make_lines(comparison))
    assert len(heads) == 4
    assert client_gains(comparison) == []
    assert [row[0] for row in rows] == ["local", "local, own categories"]


def test_an_arm_without_answers_or_without_loss_has_dashes() -> None:
    silent = [
        dataclasses.replace(one, totals=tuple(Totals(1, row.tokens, row.loss) for row in one.totals))
        for one in OUTCOMES_BY_HAND[4:]
    ]
    files = tables(by_hand({"federated": TWO["federated"]}, silent))
    assert "| federated | 0.688 [" in files["table.md"]
    assert files["table.md"].splitlines()[2].count(" - |") == 2
    (line,) = json.loads(files["table.json"])["lines"]
    assert line["scores"].keys() == {"loss"}


def test_a_ratio_is_the_federated_score_over_that_of_the_line() -> None:
    lines = {line.name: line for line in make_lines(by_hand(TWO, OUTCOMES_BY_HAND))}
    # A tenth of the summed losses stands in for ROUGE-L. Local: x is (2+6+4+4+2+2+6+6)/10/8, y (8+4+4+8)/10/4.
    local, federated = (0.4 + 0.6) / 2, (10 / 10 / 4 + (2 + 4) / 10 / 2) / 2
    assert lines["local"].ratios["rouge_l"] == pytest.approx(federated / local)
    assert "loss" not in lines["local"].ratios
    assert lines["federated"].ratios == {}
    assert "federated / it, ROUGE-L" in tables(by_hand(TWO, OUTCOMES_BY_HAND))["table.md"]


def with_own_rows(outcome: Outcome) -> Outcome:
    """Two rows of ten tokens that each client holds out: alone 20 nats of seed 1, 10 of seed 2; federated 5 of c1."""
    if outcome.client:
        return dataclasses.replace(outcome, clients={outcome.client: Totals(2, 10, 20.0 / outcome.seed)})
    return dataclasses.replace(
        outcome, clients={client: Totals(2, 10, 5.0 * int(client[1])) for client in ("c1", "c2")}
    )


def test_what_a_client_gains_is_the_federated_score_less_its_own() -> None:
    comparison = by_hand(TWO, [with_own_rows(outcome) for outcome in OUTCOMES_BY_HAND])
    gains = {gain.client: gain for gain in client_gains(comparison)}
    assert list(gains) == ["c1", "c2"]
    # Client c1 alone: x is (2+6)/8 and (2+2)/8, y is 8/4 and 4/4; the federated model has 0.6875.
    assert gains["c1"].alone["loss"] == pytest.approx((0.75 + 1.5) / 2)
    assert gains["c1"].shared["loss"].mean == pytest.approx(0.6875 - (0.75 + 1.5) / 2)
    # On its own rows: 5/10 less 20/10 and 10/10; on those of c2 10/10 less the same.
    assert gains["c1"].own["loss"].mean == pytest.approx(0.5 - 1.5)
    assert gains["c2"].own["loss"].mean == pytest.approx(1.0 - 1.5)
    assert gains["c1"].own["loss"].low < gains["c1"].own["loss"].mean < gains["c1"].own["loss"].high
    assert "rouge_l" not in gains["c1"].own  # no answers to them
    heads, rows = gain_cells(list(gains.values()))
    assert heads[-1] == "gain on its own rows, loss"
    assert [row[0] for row in rows] == ["c1", "c2"]
    assert "clients.csv" in tables(comparison)


def test_nothing_in_a_category_or_client_is_taken_for_markup_of_the_table() -> None:
    nasty = [dataclasses.replace(one, categories=("a|b\nc", "a|b\nc", "<i>x\\|")) for one in OUTCOMES_BY_HAND]
    table = tables(by_hand(TWO, nasty))["table.md"]
    assert "| arm | &lt;i&gt;x\\\\\\| | a\\|b?c |" in table
    assert "<i>" not in table


def test_a_client_whose_own_rows_have_no_finite_loss_is_named(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = comparing(tiny, [3], base=ARMS["base"])
    ordinary = compare(recipe, tmp_path / "out").outcomes
    broken = [dataclasses.replace(one, clients={"c1": Totals(1, 1, math.inf)}) for one in ordinary]
    monkeypatch.setattr("bellwether.arms.compare._done", lambda *_: [broken])
    with pytest.raises(RecipeError, match="the training diverged under seed 3"):
        compare(recipe, tmp_path / "out")


def test_with_one_seed_a_gain_on_own_rows_has_no_interval() -> None:
    outcomes = [with_own_rows(outcome) for outcome in OUTCOMES_BY_HAND if outcome.seed == 1]
    (first, _) = client_gains(by_hand(TWO, outcomes))
    assert first.own["loss"].mean == pytest.approx(0.5 - 2.0)
    assert math.isnan(first.own["loss"].low)
    own = [row.split(",") for row in tables(by_hand(TWO, outcomes))["clients.csv"].splitlines() if "held-out" in row]
    assert own[0] == ["federated", "local", "c1", "its own held-out rows", "loss", "-1.5", "", "", ""]


def test_gains_of_all_clients_are_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bellwether.report.compare_table.difference", lambda *_, **__: Interval(0.1, 0.0, 0.2, 0.006))
    gains = client_gains(by_hand(TWO, OUTCOMES_BY_HAND))
    assert [round(gap.p, 9) for gain in gains for gap in gain.shared.values()] == [0.036] * 6


def test_scores_by_group_are_means_over_all_rows_of_the_group() -> None:
    grouped = [dataclasses.replace(outcome, groups=("en", "lo", "en")) for outcome in OUTCOMES_BY_HAND]
    comparison = by_hand(TWO, grouped)
    lines = {line.name: line for line in make_lines(comparison)}
    # Federated, English: rows of 2 and 4 tokens, (1+2)/6 and (2+4)/6; Lowland: 3/6 and 4/6.
    assert lines["federated"].groups["en"]["loss"].mean == pytest.approx((3 / 6 + 6 / 6) / 2)
    assert lines["federated"].groups["lo"]["loss"].mean == pytest.approx((3 / 6 + 4 / 6) / 2)
    assert "loss by group" in tables(comparison)["table.md"]
    assert "loss by group" not in tables(by_hand(TWO, OUTCOMES_BY_HAND))["table.md"]


def test_the_terminal_shows_scores_differences_gains_and_costs_on_eighty_columns() -> None:
    from rich.console import Console

    comparison = by_hand(TWO, OUTCOMES_BY_HAND)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(make_lines(comparison), client_gains(comparison), ascii_only=True))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    _, rows = gain_cells(client_gains(comparison))
    letters = "".join(text.split())
    for cell in itertools.chain(*(row[4:] for row in rows)):  # wrapped, but whole
        assert all(part in letters for part in cell.split())
    assert "…" not in text
    for title in ("Scores, mean", "Federated minus the arm", "What each client gains"):
        assert title in text
    assert "What an adapter cost" not in text  # none is known
    assert text.isascii()


def test_the_cost_table_has_shares_of_rows_and_what_the_whole_base_would_take() -> None:
    cost = {
        "rows": 30.0,
        "rows_of_all": 40.0,
        "rows_seen": 600.0,
        "tokens": 12345.0,
        "seconds": 2.5,
        "bytes": 2e6,
        "bytes_of_whole_base": 8e9,
    }
    outcomes = [dataclasses.replace(outcome, cost=cost) for outcome in OUTCOMES_BY_HAND[4:]]
    _, rows = cost_cells(make_lines(by_hand({"federated": TWO["federated"]}, outcomes)))
    assert rows == [["federated", "75.0", "600", "12,345", "2.5", "2.0 MB", "8.0 GB"]]


# Trials -------------------------------------------------------------------------------------------

TUNE = {"seeds": [0, 1], "learning_rates": [0.01, 0.02], "passes": [1, 2]}


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Recipe, Path]]:
    """Instead of training, make up a loss that is lowest at the rate 0.02 and one pass; keep what was asked."""
    asked: list[tuple[str, Recipe, Path]] = []

    def train(name: str, arm: Arm, recipe: Recipe, folder: Path, trial: bool, *_: Any) -> list[Outcome]:
        asked.append((name, recipe, folder))
        loss = 1.0 if (arm.learning_rate, arm.passes) == (0.02, 1) else 2.0 + recipe.seed
        if arm.learning_rate == 0.01 and arm.passes == 1:
            loss = float("nan")  # diverged
        better = float(loss > 1)  # false where it is no number
        outcome = Outcome(name, recipe.seed, "", ("x",), (Totals(1, 1, loss, 1, better, int(better)),), ("",))
        # Their mean, each client counted alike, is 7 less the loss.
        own = {"few": Totals(1, 1, 6 - loss), "many": Totals(1, 4, 4 * (8 - loss))}
        outcome = dataclasses.replace(outcome, clients=own if recipe.partition.client_test_fraction else {})
        folder.mkdir(parents=True)
        (folder / OUTCOMES).write_text(json.dumps(plain([outcome])))
        return read_outcomes(folder)

    monkeypatch.setattr("bellwether.arms.compare.train_arm", train)
    return asked


def tuning(recipe: Recipe, **tune: Any) -> Recipe:
    arms = {name: ARMS[name] for name in ("base", "local", "centralized", "federated")}
    arms["steps"] = {"trains": "together", "steps": 3}
    arms["rounds of steps"] = {"trains": "federation", "set": {"training.local_steps": 3}}
    fields = {"compare": {"seeds": [3], "arms": arms, "tune": TUNE | tune}, "data.validation_rows_per_category": 2}
    return with_overrides(recipe, fields)


@pytest.mark.parametrize(
    ("choose_by", "best"),
    [("loss", (0.02, 1)), ("exact", (0.01, 2)), ("rouge_l", (0.01, 2)), ("clients_loss", (0.01, 2))],
)
def test_the_best_trial_is_chosen_for_each_arm_and_used(
    tiny: Recipe, tmp_path: Path, trials: list[tuple[str, Recipe, Path]], choose_by: str, best: tuple[float, int]
) -> None:
    tiny = with_overrides(tiny, {"partition.client_test_fraction": 0.3 if choose_by == "clients_loss" else 0.0})
    found = compare(tuning(tiny, choose_by=choose_by), tmp_path / "out")
    for name in ("local", "centralized", "federated"):
        assert (found.arms[name].learning_rate, found.arms[name].passes) == best
        # Half of four clients take part in a round.
        recipe = next(one for arm, one, folder in trials if arm == name and "trials" not in folder.parts)
        length = recipe.federation.rounds / 2 if name == "federated" else recipe.training.local_epochs
        assert (recipe.training.learning_rate, length) == best
        assert recipe.evaluation.part == "test"
    assert (found.arms["base"], found.arms["steps"]) == (Arm(trains="nobody"), Arm(trains="together", steps=3))
    assert found.arms["rounds of steps"].passes is None
    tried = {recipe.evaluation.generate for _, recipe, folder in trials if "trials" in folder.parts}
    assert tried == {choose_by in ("exact", "rouge_l")}, "answers are given where they choose"
    by_loss = {(one.learning_rate, one.passes): one.score for one in found.trials if one.arm == "local"}
    if choose_by == "loss":
        assert by_loss == {(0.01, 1): np.inf, (0.01, 2): 2.5, (0.02, 1): 1.0, (0.02, 2): 2.5}
    if choose_by == "clients_loss":
        assert by_loss == {(0.01, 1): np.inf, (0.01, 2): 4.5, (0.02, 1): 6.0, (0.02, 2): 4.5}
    table = tables(found)["table.md"]
    assert "Trials on validation rows" in table


def test_an_arm_tries_rates_of_its_own_and_keeps_its_own_passes(
    tiny: Recipe, tmp_path: Path, trials: list[tuple[str, Recipe, Path]]
) -> None:
    arms = {"short": {"passes": 1}, "long": {"passes": 2, "learning_rates": [0.02, 0.3]}}
    fields = {"compare": {"seeds": [3], "arms": arms, "tune": TUNE | {"passes": None, "seeds": [0]}}}
    found = compare(with_overrides(tiny, fields | {"data.validation_rows_per_category": 2}), tmp_path / "out")
    # Half of four clients take part in a round.
    tried = [
        (name, recipe.training.learning_rate, recipe.federation.rounds / 2)
        for name, recipe, folder in trials
        if "trials" in folder.parts
    ]
    assert tried == [("short", 0.01, 1), ("short", 0.02, 1), ("long", 0.02, 2), ("long", 0.3, 2)]
    assert {name: arm.passes for name, arm in found.arms.items()} == {"short": 1, "long": 2}


def test_trials_do_not_choose_by_rows_of_clients_where_these_hold_none_out(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="choose_by is clients_loss, but no client of compare.arms.local holds out"):
        compare(tuning(tiny, choose_by="clients_loss"), tmp_path / "out")


def test_trials_are_equally_many_for_each_arm_and_score_no_test_row(
    tiny: Recipe, tmp_path: Path, trials: list[tuple[str, Recipe, Path]]
) -> None:
    compare(tuning(tiny), tmp_path / "out")
    tried = [(name, recipe) for name, recipe, folder in trials if "trials" in folder.parts]
    assert {name: sum(one == name for one, _ in tried) for name, _ in tried} == dict.fromkeys(
        ("local", "centralized", "federated"), 2 * 2 * 2
    )
    # Four categories, of which one row each is scored of the two that are held out.
    test = {row.row.place for row in prepare(trials[-1][1]).scored.rows}
    validation = [{row.row.place for row in prepare(recipe).scored.rows} for _, recipe in tried[::7]]
    assert all(places == validation[0] and len(places) == 4 and not places & test for places in validation)
    assert len({folder for _, _, folder in trials}) == len(trials)


def test_a_trial_whose_federation_diverges_counts_as_the_worst_and_is_not_run_again(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = {"seeds": [0], "learning_rates": [1e30, 0.01], "passes": [1]}
    fields = {
        "compare": {"seeds": [3], "arms": {"federated": ARMS["federated"]}, "tune": tune},
        "data.validation_rows_per_category": 2,
        "federation.fraction": 1.0,  # one pass is one round
    }
    recipe = with_overrides(tiny, fields)
    found = compare(recipe, tmp_path / "out")
    assert [math.isinf(trial.score) for trial in found.trials] == [True, False]
    assert found.arms["federated"].learning_rate == 0.01
    (diverged,) = read_outcomes(tmp_path / "out" / "trials" / "rate-1e+30-passes-1" / "federated" / "seed-0")
    assert diverged.failure.startswith("Round 1 failed: 0 of 4 updates can be used")
    monkeypatch.setattr("bellwether.runner.run.run", lambda *_, **__: pytest.fail("a trial is run again"))
    assert compare(recipe, tmp_path / "out").trials == found.trials


def test_a_federation_that_diverges_outside_of_trials_ends_the_comparison(tiny: Recipe, tmp_path: Path) -> None:
    wild = ARMS["federated"] | {"learning_rate": 1e30}
    with pytest.raises(RoundFailed, match=r"compare.arms.wild, seed 3: Round 1 failed"):
        compare(comparing(tiny, [3], wild=wild), tmp_path / "out")


def test_a_training_that_diverged_is_told_by_arm_and_seed(
    tiny: Recipe, tmp_path: Path, trials: list[tuple[str, Recipe, Path]]
) -> None:
    arm = {"trains": "together", "learning_rate": 0.01, "passes": 1}
    with pytest.raises(RecipeError, match=r"compare.arms.wild: the training diverged under seed 3"):
        compare(comparing(tiny, [3], wild=arm), tmp_path / "out")


# The command --------------------------------------------------------------------------------------


def test_the_command_writes_and_shows_the_table(bellwether: Command, tiny_llama: Path, dolly_like: Path) -> None:
    text = TINY_RECIPE.format(model=tiny_llama, data=dolly_like)
    Path("mine.yaml").write_text(text + "compare: {seeds: [1], arms: {a/b: {trains: nobody}, fed: {}}}\n")
    outcome = bellwether("compare", "mine.yaml", "--out", "found")
    assert (outcome.code, outcome.err) == (0, "")
    first, second, *_ = outcome.out.splitlines()
    assert first.startswith("comparison tiny in found: 2 arms, 2 runs")
    assert second.startswith("1/2 a/b, seed 1: loss ")
    scores = next(line for line in outcome.out.splitlines() if line.strip().startswith("fed ")).split()
    assert f"| fed | {' '.join(scores[1:4])} |" in Path("found/table.md").read_text()
    lines = {line["name"]: line for line in json.loads(Path("found/table.json").read_text())["lines"]}
    assert lines.keys() == {"a/b", "fed"}
    assert Path("found/a-b/seed-1/outcomes.json").exists()
    # The scores are those of the run itself.
    last = [json.loads(line) for line in Path("found/fed/seed-1/run/evaluation.jsonl").read_text().splitlines()]
    macro = next(row for row in last if row["round"] == 2 and row["category"] == "(macro)")
    assert lines["fed"]["scores"]["loss"]["mean"] == pytest.approx(macro["loss"])
    before = next(row for row in last if row["round"] == 0 and row["category"] == "(macro)")
    assert lines["a/b"]["scores"]["loss"]["mean"] == pytest.approx(before["loss"])
