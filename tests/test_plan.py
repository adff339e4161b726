"""The plan against what a run really does."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_adapter, tiny_base, tiny_folder

from bellwether.exchange.sizes import array_bytes
from bellwether.model.base import load_base
from bellwether.model.lora import initial_adapter
from bellwether.recipe import recipe
from bellwether.recipe.file import load_recipe
from bellwether.runner.estimate import expected_efficiency, matrix_rate, memory_bytes, train_flops
from bellwether.runner.plan import plan, plan_table


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> recipe.Recipe:
    """Six clients' worth of rows on a tiny Llama, two clients in a round."""
    folder = tmp_path_factory.mktemp("plan")
    rows = [
        {"instruction": f"Add {n}.", "context": "", "response": "x" * (1 + n % 7), "category": "abc"[n % 3]}
        for n in range(60)
    ]
    path = Path(folder / "rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe.Recipe(
        model=recipe.Model(path=str(tiny_folder("llama", folder / "model")), device="cpu", threads=1),
        data=recipe.Data(sources=(str(path),), max_tokens=96, test_rows_per_category=2),
        partition=recipe.Partition(method="iid", clients=6),
        lora=recipe.Lora(rank=2),
        training=recipe.Training(batch_size=4, local_epochs=3),
        federation=recipe.Federation(rounds=7, fraction=1 / 3),
        evaluation=recipe.Evaluation(every=3),
    )


def test_counts_are_those_of_the_run(small):
    made = plan(small)
    base = load_base(small.model)
    adapter = initial_adapter(base, small.lora, torch.Generator().manual_seed(0))
    assert made.base_parameters == sum(parameter.numel() for parameter in base.model.parameters())
    assert made.adapter_parameters == sum(value.size for value in adapter.tensors.values())
    assert (made.clients, made.cohort, made.rounds) == (6, 2, 7)
    assert made.bytes_up == made.bytes_down == 2 * array_bytes(adapter.tensors)
    assert made.scored_rows == 6
    assert made.evaluations == 4  # before, after rounds 3 and 6, at the end
    # 54 training rows, three epochs, a third of the clients.
    assert made.rows_per_round == pytest.approx(54 * 3 / 3)


def test_counts_are_those_that_a_run_records(small, tmp_path):
    """Every client in every round, so that the mean over cohorts is what each round does."""
    from conftest import json_lines
    from safetensors.numpy import load_file

    from bellwether.runner.run import run

    whole = small.model_copy(
        update={
            "federation": small.federation.model_copy(update={"rounds": 2, "fraction": 1.0}),
            "evaluation": recipe.Evaluation(every=1, generate=False),
            "output": recipe.Output(folder=str(tmp_path / "run")),
        }
    )
    made = plan(whole)
    run(whole)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert made.adapter_parameters == sum(value.size for value in tensors.values())
    rounds = json_lines(tmp_path / "run" / "rounds.jsonl")
    assert len(rounds) == made.rounds
    for record in rounds:
        assert len(record["cohort"]) == made.cohort
        assert (record["bytes_down"], record["bytes_up"]) == (made.bytes_down, made.bytes_up)
        assert record["tokens"] == made.trained_per_round
        assert record["rows"] * whole.training.local_epochs == made.rows_per_round
    evaluations = json_lines(tmp_path / "run" / "evaluation.jsonl")
    assert len({record["round"] for record in evaluations}) == made.evaluations


def test_a_last_round_in_which_all_clients_tune_and_send_nothing_counts_in_the_means(small, tmp_path):
    from conftest import json_lines

    from bellwether.recipe.method import FedAvg
    from bellwether.runner.run import run

    whole = small.model_copy(
        update={
            "method": FedAvg(fine_tune=True),
            "federation": small.federation.model_copy(update={"rounds": 3}),
            "evaluation": recipe.Evaluation(every=0, generate=False),
            "output": recipe.Output(folder=str(tmp_path / "run")),
        }
    )
    made = plan(whole)
    run(whole)
    rounds = json_lines(tmp_path / "run" / "rounds.jsonl")
    assert [len(record["cohort"]) for record in rounds] == [2, 2, 6]
    for way in ("bytes_down", "bytes_up"):  # the mean is rounded to a whole byte
        assert abs(3 * getattr(made, way) - sum(record[way] for record in rounds)) <= 2
    usual = plan(whole.model_copy(update={"method": FedAvg()}))
    assert made.tokens_per_round == pytest.approx(usual.tokens_per_round * (2 + 2 + 6) / 6)
    assert any("In round 3, the last one, 6 clients train for themselves" in note for note in made.notes)


def test_of_a_method_that_folds_the_weights_are_counted_twice_and_what_goes_down_is_told(small):
    from bellwether.recipe.method import Flora

    made, plain = plan(small.model_copy(update={"method": Flora()})), plan(small)
    linears = load_base(small.model).facts.linears
    adapted = sum(shape.inputs * shape.outputs for shape in linears)  # all-linear
    assert made.memory["weights with what is folded"] == 4 * adapted
    assert made.memory.keys() - plain.memory.keys() == {"weights with what is folded"}
    (said,) = [note for note in made.notes if "folds" in note]
    assert "The method flora folds updates into the base: their sum goes down to each client as well" in said
    assert not [note for note in plain.notes if "folds" in note]


def test_every_pass_of_a_method_is_work(small, monkeypatch):
    from bellwether.method import named
    from bellwether.method.average import fedavg
    from bellwether.method.method import Pass

    once = plan(small)
    monkeypatch.setattr(
        named, "make_method", lambda section, privacy=None: dataclasses.replace(fedavg(), passes=(Pass(), Pass()))
    )
    twice = plan(small)
    assert (twice.rows_per_round, twice.trained_per_round) == (2 * once.rows_per_round, 2 * once.trained_per_round)
    assert twice.bytes_up == once.bytes_up


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize(("dropout", "copies"), [(0.0, 1), (0.1, 2)])
def test_memory_over_padded_rows_is_that_of_a_computation_by_hand(dtype, width, dropout, copies, small):
    """Hidden size 24, keys and values 12, inner size 40, two layers, vocabulary 300, batches of four."""
    from bellwether.model.base import open_base

    settings = small.model_copy(
        update={
            "model": small.model.model_copy(update={"dtype": dtype, "attention": "eager"}),
            "lora": recipe.Lora(rank=2, dropout=dropout, target_modules=("q_proj", "down_proj")),
        }
    )
    modules = [f"model.layers.{layer}.{path}" for layer in (0, 1) for path in ("self_attn.q_proj", "mlp.down_proj")]
    adapter = 2 * 2 * (24 + 24 + 40 + 24)
    made = memory_bytes(open_base(settings.model).facts, settings, adapter, modules, longest=50)
    # q and o 24 to 24, k and v 24 to 12, gate and up 24 to 40, down 40 to 24: 184 inputs and 176 outputs.
    linear = 184 + 176
    weights = 2 * 300 * 24 + 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40 + 2 * 24) + 24
    per_token = 2 * (width * linear + 4 * copies * (24 + 40) + width * 10 * 24)
    assert made == {
        "base weights": width * weights,
        "adapter and optimizer": (4 + 4 + 8) * adapter,
        "activations": 4 * 50 * per_token,
        "logits": 4 * 50 * 300 * 3 * 4,
    }
    plain = settings.model_copy(update={"training": settings.training.model_copy(update={"optimizer": "sgd"})})
    found = memory_bytes(open_base(settings.model).facts, plain, adapter, modules, longest=50)
    assert found == {**made, "adapter and optimizer": (4 + 4) * adapter}


def test_memory_of_rows_end_to_end_is_that_of_a_computation_by_hand(small):
    """Hidden size 24, queries 24, keys and values 12, inner size 40, two layers, vocabulary 300, batches of four."""
    from bellwether.model.base import open_base

    settings = small.model_copy(update={"lora": recipe.Lora(rank=2, dropout=0.0, target_modules=("q_proj",))})
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    made = memory_bytes(open_base(settings.model).facts, settings, 192, modules, longest=50)
    norms, queries_and_keys, by_head, gates, adapted = 4 * 24, 24 + 12, 4 * 24, 2 * 40, 24
    per_token = 2 * 4 * (norms + queries_and_keys + by_head + gates + adapted)
    assert made["activations"] == 4 * 50 * per_token
    assert made["logits"] == 3 * 2**20 * 4 + 4 * 50 * 24 * 4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"], ids=["q and v", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_memory_of_rows_end_to_end_is_near_what_autograd_keeps(architecture, dtype, targets, dropout):
    from bellwether.model.batch import Batch, pack
    from bellwether.model.dropout import Dropout
    from bellwether.model.forward import token_losses
    from bellwether.model.lora import LoraLayers

    windows = {"sliding_window": 64} if architecture == "gemma3" else {}
    base = tiny_base(architecture, getattr(torch, dtype), **windows)
    lora = recipe.Lora(rank=3, dropout=dropout, target_modules=targets)
    adapter = random_adapter(base, dtype="float32", dropout=dropout, target_modules=targets)
    layers = LoraLayers(base.model, adapter.config)
    layers.load(0, adapter.tensors)
    rows = pack([np.arange(3, 43)] * 4, torch.device("cpu"))
    select_S = torch.arange(160)[torch.arange(160) % 40 != 39]
    batch = Batch(**vars(rows), select_S=select_S, targets_S=rows.ids_M[select_S + 1])
    own = [*base.model.parameters(), *base.model.buffers(), layers.values_KP]
    known, kept = {one.untyped_storage().data_ptr() for one in own}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_losses(base.model, layers, batch, None, Dropout(dropout, torch.arange(4)) if dropout else None)
    layers.detach()
    settings = load_recipe(None, [f"model.dtype={dtype}", "training.batch_size=4"]).model_copy(update={"lora": lora})
    made = memory_bytes(base.facts, settings, 0, adapter.config.modules, longest=40)
    # Four norms and those of queries and keys are counted, of which Llama has two and none.
    assert 0.85 < made["activations"] / sum(size for _, size in kept.values()) < 1.4


@pytest.mark.parametrize(("budget", "tokens"), [(2048, 3 * 4 * 50), (300, 300), (20, 50)])
def test_clients_together_take_memory_for_their_budget_but_never_for_more_than_a_step_or_less_than_a_row(
    budget, tokens, small
):
    from bellwether.model.base import open_base

    facts, settings = open_base(small.model).facts, small.model_copy(update={"engine": recipe.Engine(tokens=budget)})
    made = memory_bytes(facts, settings, 100, [], longest=50, together=3)
    alone = memory_bytes(facts, settings, 100, [], longest=50)
    assert made["activations"] == alone["activations"] * tokens / (4 * 50)
    assert made["adapter and optimizer"] == 3 * alone["adapter and optimizer"]


def test_each_of_several_processes_takes_memory_and_the_one_that_evaluates_a_base(small):
    two = plan(small.model_copy(update={"engine": recipe.Engine(processes=2)}))
    copies = {"base weights": 3, "adapter and optimizer": 2, "activations": 2, "logits": 2}
    assert two.memory == {part: copies[part] * size for part, size in plan(small).memory.items()}


def test_a_base_in_eight_bits_takes_less_memory(small):
    """By hand: 184 inputs and 176 outputs of seven linear layers, twice, the largest of them 24 x 40."""
    few = plan(small.model_copy(update={"model": small.model.model_copy(update={"quantization": "8bit"})}))
    linear = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40)
    rest = 2 * 300 * 24 + 2 * 2 * 24 + 24
    assert few.memory["base weights"] == linear + 4 * 2 * 176 + 4 * (rest + 24 * 40)


def test_tokens_are_those_of_the_rows(small):
    from bellwether.runner.prepare import prepare

    rows = [row for tokenised in prepare(small).clients.values() for row in tokenised.rows]
    made = plan(small)
    assert made.tokens_per_round == pytest.approx(sum(len(row.ids_T) for row in rows))
    assert made.trained_per_round == pytest.approx(sum(int(row.trained_T[1:].sum()) for row in rows))


def test_local_steps_set_the_rows_of_a_round(small):
    training = small.training.model_copy(update={"local_steps": 6})
    # Nine rows a client in batches of four make three steps an epoch, so six steps are two epochs.
    assert plan(small.model_copy(update={"training": training})).rows_per_round == pytest.approx(54 * 2 / 3)


def test_flops_are_those_that_torch_counts(small):
    """Forward and backward of one row, all positions in the loss, against torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    from bellwether.client.batches import collate
    from bellwether.data.rows import Row, TokenRow
    from bellwether.model.forward import token_losses
    from bellwether.model.lora import LoraLayers

    base = load_base(small.model.model_copy(update={"attention": "eager"}))
    adapter = initial_adapter(base, small.lora, torch.Generator().manual_seed(0))
    layers = LoraLayers(base.model, adapter.config)
    layers.load(0, adapter.tensors)
    everywhere_T = np.ones(41, dtype=bool)
    row = TokenRow(np.arange(3, 44), everywhere_T, everywhere_T, 1, Row("", ""))
    with FlopCounterMode(display=False) as counter:
        token_losses(base.model, layers, collate([row], base.device)).sum().backward()
    layers.detach()
    weights = sum(value.size for value in adapter.tensors.values())
    # The count holds every layer alike; torch spares the inputs of the first.
    assert counter.get_total_flops() == pytest.approx(train_flops(base.facts, weights, 40, 40**2, 40), rel=0.15)


def test_nothing_is_loaded(small, monkeypatch):
    from bellwether.model import base

    monkeypatch.setattr(base, "load_weights", lambda *a: pytest.fail("weights were loaded"))
    plan(small)


def test_the_estimate_is_finite_and_the_table_shows_units(small):
    from rich.console import Console

    made = plan(small)
    assert made.train_seconds > 0
    assert math.isfinite(made.train_seconds + made.evaluate_seconds)
    assert made.matrix_rate > 1e8
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(plan_table(made))
    text = console.export_text()
    for part in ("2 of 6 clients", "23,736 parameters", "GFLOP/s", "kB down", "activations", "held-out rows", "rough"):
        assert part in text


def test_efficiency_grows_with_size_and_stays_within_what_was_measured():
    values = [expected_efficiency(size) for size in (1, 64, 100, 128, 300, 512, 8192)]
    assert values == sorted(values)
    assert 0 < values[0] == values[1]
    assert values[-1] == values[-2] < 1


def test_measuring_leaves_the_number_of_threads_alone(small):
    from bellwether.model.base import open_base

    threads = torch.get_num_threads()
    matrix_rate(open_base(small.model).facts, "cpu", small, seconds=0.01)
    assert torch.get_num_threads() == threads
