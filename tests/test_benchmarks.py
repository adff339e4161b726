"""The benchmark's ways train what they claim, its floor counts what must be done, its tables hold what was measured.

Everything runs on a tiny setting, most of it in this process; nothing here is timed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import io
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rounding import FLOAT64, unit
from scipy.stats import hypergeom
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from tiny_models import exact_base, in_float64, tiny_tokenizer

ROOT = Path(__file__).parents[1]
# Timed at a go where no figure is shown; multiplying in bfloat16 takes seconds where a CPU only imitates it.
FEW_OPERATIONS = 1e6
TRL = importlib.util.find_spec("trl") is not None
SHORT = [
    "federation.rounds=1",
    "training.local_steps=1",
    "evaluation.max_rows_per_category=1",
    "evaluation.max_new_tokens=2",
    "data.max_rows=120",
]


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def setting():
    from benchmarks.setting import TINY

    return TINY


@pytest.fixture(scope="module")
def clients(setting):
    from benchmarks.setting import make_clients

    return make_clients(setting)


@pytest.fixture(scope="module")
def folder(setting, tmp_path_factory):
    from benchmarks.setting import make_model

    return make_model(setting, tmp_path_factory.mktemp("model"))


@pytest.fixture
def in_process(monkeypatch):
    """Let what has a process of its own happen here, and spare the collection of garbage before each training."""
    from benchmarks import floor, gemma, gpu, growth, phases, rounds, survey, worker

    class Here:
        def __init__(self, name, job):
            self.job = job

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def build(self):
            self.train = worker.built(self.job, worker.find(self.job.make))
            return {"import": 0.0, "build": 0.0}

        def round(self):
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                told = self.train()
            return worker.Turn(time.perf_counter() - start, dict(told or {}), worker.peak_memory())

    monkeypatch.setattr(rounds, "Worker", Here)
    for module in (gemma, gpu, growth, phases, rounds, survey):
        monkeypatch.setattr(module, "fresh", lambda name, function, *arguments: function(*arguments))
    monkeypatch.setattr(gc, "collect", lambda *arguments: 0)
    monkeypatch.setattr(floor, "matrix_rate", functools.partial(floor.matrix_rate, at_a_go=FEW_OPERATIONS))


# The floor ----------------------------------------------------------------------------------------


def test_the_floor_of_one_layer_is_the_one_worked_out_by_hand(setting):
    from benchmarks import floor

    one = replace(setting, hidden=32, layers=1, vocabulary=64)  # q, k, v, o: 32 × 32; feed-forward: 96 wide
    assert floor.frozen_forward(one) == 2 * (4 * 32 * 32 + 3 * 32 * 96)
    assert floor.frozen_backward(one) == 2 * (32 * 32 + 3 * 32 * 96), "nothing flows back through q, k and v"
    assert floor.attention(one) == 32 * (2 + 3), "the keys have no adapter"
    assert floor.adapters(one) == 2 * (2 * 8 * (32 + 3 * 32 + 32)), "no gradient to the inputs of q and v"
    assert floor.output_layer(one) == 2 * 2 * 32 * 64


def operations_counted(setting, folder, rows):
    """What torch counts for plain transformers with PEFT, row by row."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from benchmarks import rivals

    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").requires_grad_(False)
    model = rivals.with_adapter(base, setting, dropout=0.0)
    with FlopCounterMode(display=False) as counter:
        for row in rows:
            keep = torch.from_numpy(row.response_T[1:].nonzero()[0])
            model(input_ids=torch.from_numpy(row.ids_T)[None], logits_to_keep=keep).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "down_proj"), ("up_proj",)])
def test_the_floor_is_what_torch_counts_for_plain_transformers_with_peft(setting, folder, clients, targets):
    from benchmarks import floor

    adapted, rows = replace(setting, targets=targets), clients["client-000"]
    counted = floor.operations(adapted, {"client-000": rows})
    # Eager attention multiplies the upper half as well.
    assert operations_counted(adapted, folder, rows) == sum(counted.values()) + counted["attention"]


def test_the_floor_of_a_gemma_is_what_torch_counts(tmp_path):
    from benchmarks import floor, gemma
    from benchmarks.setting import make_clients

    gemma.make_tiny(tmp_path)
    setting = gemma.setting_of(tmp_path, tmp_path / "rows.json", 8, 1)
    clients = make_clients(setting)
    (rows,) = clients.values()
    assert len(rows) == 8
    counted = floor.operations(setting, clients)
    assert operations_counted(setting, tmp_path, rows) == sum(counted.values()) + counted["attention"]


def test_the_matrix_rate_is_that_of_the_fastest_shape(setting):
    from benchmarks.floor import matrix_rate

    assert 1e8 < matrix_rate(setting, "float32", rows=64, repeats=1) < 1e15


# The ways -----------------------------------------------------------------------------------------


def test_rows_are_the_same_for_every_way_and_every_run(setting, clients):
    from benchmarks import rivals
    from benchmarks.setting import make_clients

    again = make_clients(setting)
    assert [row.ids_T.tolist() for rows in clients.values() for row in rows] == [
        row.ids_T.tolist() for rows in again.values() for row in rows
    ]
    row = clients["client-000"][0]
    assert [label != -100 for label in rivals.labels(row, True)] == row.response_T.tolist()
    assert rivals.labels(row, False) == row.ids_T.tolist()


def test_adapters_are_averaged_by_rows():
    from benchmarks.rivals import average

    states = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([5.0])}]
    assert average(states, [3, 1])["a"].tolist() == [2.0]


def test_every_rival_trains_every_client(setting, folder, in_process, monkeypatch):
    from benchmarks import rivals, ways, worker

    sent = []
    monkeypatch.setattr(rivals, "average", lambda states, sizes: sent.append((states, sizes)) or states[0])
    rows = {f"{table} {name}": way for table, make in ways.TABLES.items() for name, way in make(2).items()}
    rows = {name: way for name, way in rows.items() if way.bare and (TRL or way.make.endswith(("shepherd", "fedhds")))}
    assert len(rows) == (14 if TRL else 4)
    for name, way in rows.items():
        job = way.job(setting, folder)
        phases = worker.built(job, worker.find(job.make))()
        states, sizes = sent.pop()
        assert sizes == [3, 3]
        for state in states:
            learnt = [value for key, value in state.items() if "lora_B" in key]
            assert len(learnt) == 4, name
            assert all(bool(value.any()) for value in learnt), name
        assert phases[ways.STEP] > 0, name
        assert set(phases) <= set(ways.PHASES), name


def test_a_bare_loop_sees_the_very_batches_of_its_rival(setting, folder, clients):
    from benchmarks import rivals, ways

    def batches(rival, rules):
        round = rivals.bare(setting, folder, clients, rules, rival)
        cells = dict(zip(round.__code__.co_freevars, round.__closure__, strict=True))
        return [batch for some in cells["batches"].cell_contents.values() for batch in some]

    released = ways.released(2)
    of_shepherd = batches("shepherd", released["shepherd"].rules)
    assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in of_shepherd)
    assert all(torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1) for batch in of_shepherd)
    responses = sum(int(row.response_T.sum()) for rows in clients.values() for row in rows)
    if TRL:
        of_openfedllm = batches("openfedllm", released["openfedllm"].rules)
        assert sum(int((batch["labels"] != -100).sum()) for batch in of_openfedllm) == responses
    of_fedhds = batches("fedhds", ways.equal(2)["fedhds, batch 1"].rules)
    assert sum(int((batch["labels"] != -100).sum()) for batch in of_fedhds) == responses


def test_with_equal_work_nobody_checkpoints_and_all_train_on_responses():
    from benchmarks import ways

    rules = [way.rules for way in ways.equal(10).values() if way.rules]
    assert all(rule.responses and rule.grouped and not rule.checkpointing and rule.accumulation == 1 for rule in rules)
    released = ways.released(10)
    assert [name for name, way in released.items() if way.bare and way.rules.checkpointing] == [
        "openfedllm",
        "flowertune",
    ]
    assert all(way.bare in released for way in released.values() if way.bare)


# Processes ----------------------------------------------------------------------------------------


def test_processes_take_turns_and_report_for_themselves(setting, folder):
    from benchmarks.rounds import time_ways
    from benchmarks.ways import OURS, RATES, bellwether, matrix_rate

    rate = replace(matrix_rate()[RATES], options={"at_a_go": FEW_OPERATIONS})
    rows = time_ways(setting, folder, {OURS: bellwether(2)[OURS], RATES: rate}, 2)
    assert list(rows) == [OURS, RATES]
    for row in rows.values():
        assert len(row["seconds"]) == len(row["phases"]) == 2
        assert min(*row["seconds"], row["first"], row["import"]) > 0
    assert rows[OURS]["peak"] > rows[RATES]["peak"] > 50 * 2**20


def test_what_fails_in_a_process_is_told_with_the_name_of_the_way():
    from benchmarks.worker import find, fresh

    with pytest.raises(RuntimeError, match=r"^shepherd: AttributeError: module 'benchmarks.setting' has no"):
        fresh("shepherd", find, "benchmarks.setting:nothing")
    with pytest.raises(RuntimeError, match=r"^The process of fedhds ended before it answered"):
        fresh("fedhds", os._exit, 1)


# Phases -------------------------------------------------------------------------------------------


def test_time_inside_a_phase_that_has_its_own_counts_there_alone(monkeypatch):
    from benchmarks import clock as module

    now = iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    clock = module.Clock()
    with clock.during("outer"), clock.during("inner"):
        pass
    assert clock.seconds == {"outer": 1.0 + 2.0, "inner": 3.0}


def test_the_phases_of_a_run_add_up_to_it(monkeypatch):
    from bellwether.cli import main as command
    from benchmarks import clock, phases

    read, run, around = [], command.main, []

    def reading():
        read.append(time.process_time())  # which other processes do not move
        return read[-1]

    def timed(arguments):
        around.append(time.process_time())
        try:
            run(arguments)
        finally:
            around.append(time.process_time())

    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=reading))
    monkeypatch.setattr(command, "main", timed)
    seconds = phases.default_run([*SHORT, "partition.clients=2", "partition.rows_per_client=null"])
    assert tuple(seconds) == phases.PHASES
    assert read[0] <= around[0] < around[1] <= read[-1], "the whole command is inside"
    assert sum(seconds.values()) == pytest.approx(read[-1] - read[0], abs=FLOAT64)
    assert all(seconds[phase] > 0 for phase in phases.PHASES if phase != phases.IMPORT)
    assert seconds[phases.STEP] > seconds[phases.SERVER]


def test_a_round_is_mostly_forward_and_backward(setting, monkeypatch):
    from benchmarks import clock, phases

    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=time.process_time))
    split = phases.rounds_split(replace(setting, hidden=128, lengths=1.0), 1)
    assert {phases.STEP, phases.TRAIN, phases.OPTIMIZER, phases.AVERAGE, phases.SLOTS} == set(split)
    assert 0 < phases.outside(split) < 0.5


def test_starting_is_split_into_imports_and_work(monkeypatch):
    from benchmarks import startup

    command = startup.measure(1, ["import bellwether"])["commands"]["import bellwether"]
    assert command["imports"] > 0
    assert len(command["seconds"]) == 1
    # By hand, of what Python says of two modules, one inside the other: microseconds of each without the other.
    lines = ("self [us] | cumulative | imported package", "1500 | 1500 |   a", "300 | 1800 | b")
    said = "".join(f"import time: {line}\n" for line in lines)
    monkeypatch.setattr(startup, "_run", lambda arguments: said if "importtime" in arguments else "")
    now = iter([2.0, 2.5])
    monkeypatch.setattr(startup, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    command = startup.measure(1, ["import bellwether"])["commands"]["import bellwether"]
    assert command == {"seconds": [0.5], "imports": 0.0018, "work": 0.5 - 0.0018}


# The survey ---------------------------------------------------------------------------------------


def test_the_released_way_makes_the_features_that_bellwether_makes(setting, folder, clients, monkeypatch):
    import numpy as np

    from bellwether.model import base as base_module
    from bellwether.model import lora
    from bellwether.model.features import pooled_states
    from benchmarks import rivals, survey

    load = base_module.load_base
    monkeypatch.setattr(base_module, "load_base", lambda settings: exact_base(load(settings)))
    monkeypatch.setattr(lora, "LoraLayers", functools.partial(lora.LoraLayers, dtype=torch.float64))
    model = rivals.with_adapter(in_float64(rivals.load(folder)), setting).eval()
    base, layers = survey._attached(setting, folder)  # both adapters have B = 0 still
    rows = [row.ids_T for row in clients["client-000"]]
    with torch.no_grad():
        theirs = np.stack([survey._last_states(model, torch.from_numpy(ids_T)[None]) for ids_T in rows])
    ours = pooled_states(base, layers, rows, pooling="last")
    assert ours.dtype == np.float64
    np.testing.assert_allclose(theirs, ours, rtol=unit(torch.float32), atol=FLOAT64)  # theirs are float32 in the end


def test_the_bare_forward_pass_sees_every_token_and_no_output_layer(setting, folder, clients, monkeypatch):
    from transformers import LlamaForCausalLM, LlamaModel

    from benchmarks import survey

    seen = []
    forward = LlamaModel.forward
    once = survey.bare(setting, folder, clients)  # a base is tried with its output layer when it is loaded
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: pytest.fail("the output layer ran"))
    monkeypatch.setattr(
        LlamaModel, "forward", lambda self, **given: (seen.append(given["input_ids"]), forward(self, **given))[1]
    )
    once()
    lengths = [len(row) for rows in clients.values() for row in rows]
    assert sum(int((ids_NT != 0).sum()) for ids_NT in seen) == sum(lengths), "rows hold no token 0, which pads"
    assert len(seen) == len(clients), "the short rows of a client fit into one batch"


def test_the_survey_can_be_measured_and_shown(in_process, tmp_path, capsys):
    from benchmarks.__main__ import main
    from benchmarks.report import read, render

    main(["--quick", "--only", "survey", "--threads", "1", "--out", str(tmp_path)])
    results = read(tmp_path)
    assert set(results) == {"survey"}
    (made,) = results["survey"]["features"]
    assert len(made["ways"]) == 8
    assert [one["features"] for one in results["survey"]["memory"]] == [3 * 96 * 4, 6 * 96 * 4]
    assert all(min(one["product"]) < min(one["tsne"]) for one in results["survey"]["reduction"])
    assert all(one["agreement"] == 1 for one in results["survey"]["clustering"])
    shown = capsys.readouterr().out
    assert shown.strip() == render(results).strip()
    ratio = made["ways"]["released, float32"]["seconds"][0] / made["ways"]["bellwether, bfloat16"]["seconds"][0]
    assert f"| {ratio:.2f} | " in shown.split("| bellwether, bfloat16 |")[1].split("\n")[0]


# What is shown ------------------------------------------------------------------------------------


def test_everything_can_be_measured_and_shown(in_process, tmp_path, capsys):
    from benchmarks.__main__ import main
    from benchmarks.report import NOTHING, read, render

    names = "shepherd;openfedllm" if TRL else "shepherd"
    main(["--quick", "--only", "rounds", "growth", "--ways", names, "--threads", "1", "--out", str(tmp_path)])
    results = read(tmp_path)
    assert set(results) == {"growth", "rounds-32-equal", "rounds-32-released"}
    released = results["rounds-32-released"]["ways"]
    assert set(released) == {
        "bellwether",
        *(name for one in names.split(";") for name in (one, f"bare loop of {one}")),
    }
    shown = capsys.readouterr().out
    assert shown.strip() == render(results).strip()
    median = statistics.median(released["shepherd"]["seconds"])
    assert f"| shepherd | {median:.2f} (" in shown
    assert "**A tiny setting" in shown
    assert NOTHING not in shown
    assert (tmp_path / "rounds.png").stat().st_size > 10_000
    assert (tmp_path / "rounds.svg").read_text().startswith("<?xml")


def test_the_figures_in_the_readme_are_those_of_the_json_files():
    from benchmarks import choosing, report

    results = report.read(report.RESULTS)
    assert report.block() == report.render(results), "write it anew: python -m benchmarks.report"
    assert report.block(report.SELECTION) == choosing.chosen(results), "write it anew: python -m benchmarks.report"
    assert report.block(report.BRIEF) == choosing.brief(results), "write it anew: python -m benchmarks.report"
    assert not any(measured["quick"] for measured in results.values())


def test_the_gpu_command_runs_on_a_cpu_with_a_tiny_model(in_process, tmp_path, capsys):
    from benchmarks import gpu

    gpu.main(["--device", "cpu", "--tiny", "--repeats", "1", "--out", str(tmp_path)])
    measured = json.loads((tmp_path / "gpu.json").read_text())
    assert list(measured["ways"]) == list(gpu.ways())
    assert measured["ways"]["together, batch 8"]["phases"][0]["tokens"] >= 512
    assert "| together, batch 8 | " in capsys.readouterr().out


def test_the_command_for_a_real_model_runs_with_a_tiny_one(in_process, tmp_path, capsys):
    from benchmarks import gemma, report

    gemma.main(["--tiny", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)])
    measured = json.loads((tmp_path / "gemma.json").read_text())
    assert list(measured["ways"]) == [
        gemma.named(way, dtype) for dtype in gemma.DTYPES for way in (gemma.OURS, gemma.PLAIN, gemma.SHEPHERD)
    ]
    assert measured["tokens"] > measured["answers"] > 0
    (ours, plain, *_) = (row["seconds"][0] for row in measured["ways"].values())
    shown = capsys.readouterr().out
    assert shown.strip() == report.gemma(measured).strip()
    assert f" | {plain / ours:.2f} | " in shown.split("| bellwether, float32 |")[1].split("\n")[0]


def test_the_command_for_answers_runs_with_a_tiny_model_and_all_ways_answer_alike(in_process, tmp_path, capsys):
    from benchmarks import generation, report

    generation.main(["--tiny", "--new", "5", "--threads", "1", "--out", str(tmp_path)])
    measured = json.loads((tmp_path / "generation.json").read_text())
    assert list(measured["ways"]) == [generation.OURS, generation.PLAIN, generation.STATIC]
    assert {(way["tokens"], way["equal"]) for way in measured["ways"].values()} == {(5 * 8, 8)}
    assert capsys.readouterr().out.strip() == report.generation(measured).strip()


def test_rows_of_a_data_file_are_drawn_once_as_bellwether_makes_tokens_of_them(tmp_path):
    from benchmarks import gemma
    from benchmarks.setting import read_rows

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"instruction": "Say {n}.", "response": "It is {n}."}}\n' for n in range(40)))
    for name in "ab":
        gemma.draw_rows(tmp_path, data, 3, tmp_path / name)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    for row in read_rows(tmp_path / "a"):
        asked, _, said = tokenizer.decode(row.ids_T).partition("### Response:")
        number = asked.split("Say ")[1].split(".")[0]
        assert said.strip() == f"It is {number}.</s>"
        assert tokenizer.decode(row.ids_T[row.response_T]) == f"It is {number}.</s>"


def test_the_gpu_command_says_where_no_cuda_is(monkeypatch):
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "fresh", lambda *arguments: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device here; run this where there is one"):
        gpu.main([])


def test_the_model_for_a_gpu_is_of_the_1b_class():
    from benchmarks.gpu import BILLION
    from benchmarks.setting import make_clients

    weights = BILLION.layers * sum(inputs * outputs for inputs, outputs in BILLION.linears.values())
    assert 1e9 < weights + 2 * BILLION.hidden * BILLION.vocabulary < 1.3e9
    lengths = [len(row) for rows in make_clients(BILLION).values() for row in rows]
    assert 135 < statistics.mean(lengths) < 165


# The coreset --------------------------------------------------------------------------------------


def test_a_coreset_is_measured_as_the_files_of_a_run_with_the_same_survey_say(tmp_path):
    from bellwether import load_recipe, run
    from benchmarks import coreset

    words = ["selection.method=hierarchical", "selection.min_cluster_rows=3", "partition.clients=4", "seed=3"]
    words += ["selection.keep_lone=true", "federation.rounds=1", "federation.fraction=1", "evaluation.generate=false"]
    found = coreset.measure(load_recipe("default", words), tmp_path)
    result = run(load_recipe("default", [*words, f"output.folder={tmp_path / 'run'}"]))

    survey = json.loads((result.folder / "rounds.jsonl").read_text())["survey"]
    groups, topics, chosen, wrong, everything = [], [], [], [], []
    for folder in sorted((result.folder / "clients").iterdir()):
        client = folder.name.partition("-")[2]
        categories = np.array(json.loads((folder / "rows.json").read_text()))
        everything += list(categories)
        memory = np.load(folder / "survey" / "0001.npz")
        names = {n: statistics.mode(categories[memory["labels"] == n]) for n in memory["released"]}
        groups += survey["groups"][client]
        topics += names.values()
        path = folder / "selected" / "0001.json"
        for row in json.loads(path.read_text())["rows"] if path.exists() else ():
            chosen.append(categories[row])
            wrong.append(categories[row] != names[memory["labels"][row]])
    several = [number for number, group in enumerate(groups) if groups.count(group) > 1]
    of_groups, of_topics = [groups[number] for number in several], [topics[number] for number in several]
    assert len(several) > 4
    assert found == pytest.approx(
        {
            "centroids": len(groups),
            "kept": sum(map(len, survey["kept"].values())),
            "rows": len(chosen),
            "grouped": len(several) / len(groups),
            "ari": adjusted_rand_score(of_topics, of_groups),
            "nmi": normalized_mutual_info_score(of_topics, of_groups),
            "wrong topic": sum(wrong) / len(wrong),
            "topics": len(set(chosen)) / len(set(everything)),
            # Of as many drawn at random, without replacement, a topic is missed as the hypergeometric has it.
            "topics of random rows": statistics.mean(
                1 - hypergeom.pmf(0, len(everything), everything.count(topic), len(chosen)) for topic in set(everything)
            ),
        }
    )


def test_the_topic_of_a_cluster_is_that_of_most_of_its_rows():
    from benchmarks.coreset import main_topic

    assert main_topic(["a", "b", "b", "c", "c", "c"], np.array([0, 0, 0, 1, -1, -1]), 0) == "b"
    assert main_topic(["a", "b", "b", "c", "c", "c"], np.array([0, 0, 0, 1, -1, -1]), 1) == "c"


def test_groups_are_measured_without_centroids_that_are_alone():
    from benchmarks.coreset import grouped

    share, ari, nmi = grouped([0, 0, 1, 1, -1, -1, 2], ["a", "a", "b", "b", "a", "b", "c"])
    assert (share, ari, nmi) == (4 / 7, 1, 1)
    # Two pairs of which one is wrong: of six pairs of centroids, one is together in both divisions.
    share, ari, _ = grouped([0, 0, 1, 1], ["a", "a", "a", "b"])
    assert share == 1
    assert ari == pytest.approx(0)
    assert np.isnan(grouped([-1, -1], ["a", "b"])[1])
    assert np.isnan(grouped([], [])[0])
