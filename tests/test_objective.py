"""Other losses and corrections of gradients: a proximal term, and a person's own functions."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from asking import train, train_task
from test_client_together import cohort_of, furthest, updates
from test_model_training import token_rows, train_with_peft
from tiny_models import random_adapter, tiny_base

from bellwether.client.batches import local_steps
from bellwether.errors import RoundFailed
from bellwether.method.average import fedavg, fedprox
from bellwether.method.method import Pass
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.tools.randomness import Randomness

OWN = '''
import torch


def smoothed(logits_SV, targets_S, row_S):
    return torch.nn.functional.cross_entropy(logits_SV, targets_S, label_smoothing=0.1, reduction="none")


def per_row(logits_SV, targets_S, row_S):
    """Every row counts alike, however long it is."""
    loss_S = torch.nn.functional.cross_entropy(logits_SV, targets_S, reduction="none")
    return loss_S / torch.bincount(row_S)[row_S]


def mean(logits_SV, targets_S, row_S):
    return torch.nn.functional.cross_entropy(logits_SV, targets_S)


def broken(*given):
    raise ZeroDivisionError("oh")
'''


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A module of somebody's own in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_objective.py").write_text(OWN)
    yield
    sys.modules.pop("own_objective", None)


def correcting(correct):
    return replace(fedavg(), passes=(Pass(correct=correct),))


def training_of(**fields):
    settings = {"local_epochs": 2, "batch_size": 2, "accumulation": 2, "learning_rate": 4e-3, "clip_norm": 0.5}
    return recipe.Training(weight_decay=0.01, **{**settings, **fields})


@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({"loss": "own_objective:smoothed"}, {"smoothing": 0.1}),
        ({}, {"proximal": 0.7}),
    ],
    ids=["label smoothing", "proximal term"],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_another_objective_equals_peft_trained_with_it(architecture, fields, reference):
    base = tiny_base(architecture)
    start = random_adapter(base, rank=3, alpha=6.0, dropout=0.0)
    training, method = training_of(**fields), fedprox(0.7) if "proximal" in reference else fedavg()
    task = train_task(start, training, "client-1", round=3, rounds=5, seed=11)
    rows = token_rows(24)
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    (reply,) = train(base, layers, {"client-1": rows}, start, training, None, method, round=3, rounds=5, seed=11)
    layers.detach()
    order = Randomness(11).numpy("batch order", round=3, client="client-1")
    steps = local_steps([len(row) for row in rows], task.training, order)
    theirs = train_with_peft(architecture, start, rows, task, steps, 0.0, **reference)
    plain = train_with_peft(architecture, start, rows, task, steps, 0.0)
    for key, value in reply.update.tensors.items():
        assert np.abs(value - theirs[key]).max() < 1e-10
    assert max(np.abs(theirs[key] - plain[key]).max() for key in plain) > 1e-5, "the objective makes no difference"


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"loss": "own_objective:smoothed"}, fedavg()),
        ({"loss": "own_objective:per_row"}, fedavg()),
        ({}, fedprox(0.7)),
        ({"clip_norm": None}, correcting(lambda step: 2 * step.gradient_P)),
    ],
    ids=["smoothed", "per row", "proximal", "doubled"],
)
def test_clients_with_another_objective_train_together_as_one_by_one(fields, method):
    base = tiny_base("llama")
    start = random_adapter(base, rank=3, dropout=0.2)
    cohort = cohort_of(9, 3, 14)
    settings = {"training": training_of(**fields), "method": method}
    alone = updates(base, start, cohort, slots=1, **settings)
    assert furthest(updates(base, start, cohort, slots=3, tokens=70, **settings), alone) < 1e-10
    assert furthest(updates(base, start, cohort, slots=1, training=training_of(clip_norm=None)), alone) > 1e-6


@pytest.mark.parametrize(
    ("fields", "method", "said"),
    [
        (
            {"loss": "own_objective:mean"},
            fedavg(),
            r"training.loss own_objective:mean returned a tensor of shape \(\); return one ",
        ),
        (
            {"loss": "own_objective:broken"},
            fedavg(),
            r"training.loss own_objective:broken failed at .*own_objective.py:20 ",
        ),
        ({}, correcting(lambda step: 1.0), "The method's correction of a gradient returned float; return a gradient"),
        ({}, correcting(lambda step: 1 / 0), r"The method's correction of a gradient failed .*ZeroDivisionError"),
    ],
)
def test_what_ones_own_objective_must_not_return_is_said_in_a_sentence(fields, method, said):
    base = tiny_base("llama")
    with pytest.raises(RoundFailed, match=said):
        updates(base, random_adapter(base), cohort_of(4), slots=1, training=training_of(**fields), method=method)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_with_ones_own_loss_says_that_the_faster_step_steps_aside(bellwether, processes):
    run = bellwether(
        "run",
        "federation.rounds=1",
        "training.local_steps=1",
        "evaluation.max_rows_per_category=1",
        "evaluation.generate=false",
        "training.loss=own_objective:smoothed",
        f"engine.processes={processes}",
        "--out",
        f"out-{processes}",
    )
    assert run.code == 0
    assert "training.loss own_objective:smoothed takes whole logits" in run.out


def test_an_unknown_loss_is_refused_with_the_names_there_are(bellwether):
    run = bellwether("run", "training.loss=hinge")
    assert run.code == 2
    assert "'hinge' is not one of cross_entropy, dpo, nor package.module:function" in run.err
