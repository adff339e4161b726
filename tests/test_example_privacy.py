"""Differential privacy of single rows (DP-SGD): gradients of rows, what one row can change, noise, whole runs."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import forked
import numpy as np
import pytest
import torch
from asking import train, train_task
from conftest import json_lines
from rounding import FLOAT64, gamma
from test_client import random_rows, token_row
from test_preferences import pair_rows, peft_model
from test_resume import RESULTS, kill_when, newest, timeless
from tiny_models import random_adapter, tiny_base

from bellwether.client import private
from bellwether.client.batches import poisson_steps
from bellwether.client.objective import make_objective
from bellwether.client.plans import Client, Plan, planned
from bellwether.errors import RecipeError
from bellwether.exchange.messages import EXAMPLE_NOISE, Payload
from bellwether.method.examples import example_rate
from bellwether.method.named import our_methods
from bellwether.model import decoder
from bellwether.model.lora import LoraLayers
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Privacy, Training
from bellwether.tools.randomness import secret_normals

NO_NOISE = 1e-18  # of a noise multiplier that must be above zero
SECRET = bytes(range(32))


def hidden(noise=NO_NOISE, clip_norm=1e4, **more) -> Privacy:
    return Privacy(unit="example", noise=noise, clip_norm=clip_norm, **more)


@pytest.fixture(scope="module")
def exact():
    """The base in float64."""
    return tiny_base("llama")


@pytest.fixture(scope="module")
def start(exact):
    return random_adapter(exact, rank=3, alpha=6.0, dropout=0.0)


@pytest.fixture
def layers(exact, start):
    layers = LoraLayers(exact.model, start.config, dtype=torch.float64)
    yield layers
    layers.detach()


def changes(reply, start) -> np.ndarray:
    """By how much an update moves the adapter, as a vector."""
    return np.concatenate([(reply.update.tensors[key] - start.tensors[key]).ravel() for key in start.tensors])


def alone(base, layers, rows, start, training, privacy, method=None, secret=None, **more):
    """The reply of a client that trains alone."""
    from bellwether.client.train import train_cohort
    from bellwether.method.average import fedavg

    task = train_task(start, training, privacy=privacy, **more)
    (reply,) = train_cohort(base, layers, {"a": rows}, {"a": task}, method or fedavg(), secret=secret)
    return reply


# Gradients of rows --------------------------------------------------------------------------------


def mean_loss(wrapped, ids_NT, trained_NT) -> torch.Tensor:
    """The sum over rows of the mean cross-entropy of each one's trained tokens, from whole logits."""
    log_NTV = wrapped(input_ids=ids_NT).logits[:, :-1].log_softmax(-1)
    loss_NT = -log_NTV.gather(2, ids_NT[:, 1:, None])[..., 0]
    counted_NT = trained_NT[:, 1:]
    return ((loss_NT * counted_NT).sum(1) / counted_NT.sum(1)).sum()


def gradients_one_by_one(architecture, start, rows) -> np.ndarray:
    """The gradient of each row's mean cross-entropy, by PEFT, row after row."""
    wrapped = peft_model(architecture, start, 0.0, None)
    named = {
        name.replace("lora_A.default", "lora_A").replace("lora_B.default", "lora_B"): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    found = []
    for row in rows:
        wrapped.zero_grad()
        mean_loss(wrapped, torch.from_numpy(row.ids_T)[None], torch.from_numpy(row.trained_T)[None]).backward()
        found.append(np.concatenate([named[key].grad.numpy().ravel() for key in start.tensors]))
    return np.array(found)


def gradients_in_slots(base, layers, start, rows, monkeypatch, **training) -> np.ndarray:
    """The gradients of rows that a client cuts in one step that all of them join."""
    seen, ordinary = [], private.clipped
    sizes, ends = {key: start.tensors[key].size for key in layers.keys}, {}
    for key in layers.keys:
        ends[key] = sum(sizes[before] for before in ends) + sizes[key]
    places = np.concatenate([np.arange(ends[key] - sizes[key], ends[key]) for key in start.tensors])

    def watched(grads_KP, largest):
        seen.append(grads_KP.numpy().copy()[:, places])
        return ordinary(grads_KP, largest)

    monkeypatch.setattr(private, "clipped", watched)
    alone(base, layers, rows, start, Training(local_steps=1, **training), hidden())
    return np.concatenate(seen)


@pytest.mark.parametrize("batch", [(9, 1), (4, 3), (1, 9)])
@pytest.mark.parametrize(("architecture", "end_to_end"), [("llama", True), ("llama", False), ("gemma3", True)])
def test_slots_give_the_gradients_that_rows_have_one_by_one(architecture, end_to_end, batch, monkeypatch):
    monkeypatch.setattr(decoder, "fits", lambda model: end_to_end)
    base = tiny_base(architecture)
    start = random_adapter(base, rank=3, alpha=6.0, dropout=0.0)
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    rows = random_rows(9)
    sizes = {"batch_size": batch[0], "accumulation": batch[1]}
    found = gradients_in_slots(base, layers, start, rows, monkeypatch, **sizes)
    layers.detach()
    wanted = gradients_one_by_one(architecture, start, rows)
    assert np.linalg.norm(wanted, axis=1).min() > 1e-2
    assert np.abs(found - wanted).max() < FLOAT64


def test_slots_give_the_gradients_of_opacus(exact, start, layers, monkeypatch):
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed")
    rows = [token_row(row.ids_T[:6], [0, 1, 1, 0, 1, 1]) for row in random_rows(40) if len(row) >= 6][:7]
    wrapped = peft_model("llama", start, 0.0, None)
    ids = torch.from_numpy(np.array([row.ids_T for row in rows]))
    trained = torch.from_numpy(np.array([row.trained_T for row in rows]))
    sampling = opacus.GradSampleModule(wrapped, batch_first=True, loss_reduction="sum", strict=False)
    mean_loss(sampling, ids, trained).backward()
    named = {name.removeprefix("_module.").replace(".default", ""): one for name, one in sampling.named_parameters()}
    wanted = np.concatenate([named[key].grad_sample.flatten(1).numpy() for key in start.tensors], 1)
    found = gradients_in_slots(exact, layers, start, rows, monkeypatch, batch_size=7)
    assert np.abs(found - wanted).max() < FLOAT64


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_without_noise_or_clipping_steps_are_the_ordinary_ones(exact, start, layers, optimizer, clip_norm):
    # Rows with equally many trained tokens, whose mean of means is the mean over all tokens; all of them in each step.
    rows = [token_row(row.ids_T, np.arange(len(row)) >= len(row) - 3) for row in random_rows(8)]
    settings = {"local_epochs": 3, "learning_rate": 1e-2, "optimizer": optimizer, "clip_norm": clip_norm}
    ordinary = alone(exact, layers, rows, start, Training(batch_size=8, **settings), Privacy())
    found = alone(exact, layers, rows, start, Training(batch_size=2, accumulation=4, **settings), hidden())
    assert np.abs(changes(found, start) - changes(ordinary, start)).max() < FLOAT64
    assert np.abs(changes(ordinary, start)).max() > 1e-4
    assert found.losses == pytest.approx(ordinary.losses, rel=gamma(torch.float32, 1 + 8))
    assert found.update.metrics == pytest.approx(ordinary.update.metrics, rel=gamma(torch.float32, 1 + 24))


def test_pairs_of_answers_are_hidden_as_one_row(exact, start, layers):
    settings = {"loss": "dpo", "local_epochs": 2, "optimizer": "sgd", "learning_rate": 1e-2, "clip_norm": None}
    rows, size = pair_rows(6), {"batch_size": 6}
    ordinary = alone(exact, layers, rows, start, Training(**settings, **size), Privacy())
    found = alone(exact, layers, rows, start, Training(**settings, **size), hidden())
    # Without clipping a step goes along the mean gradient of all pairs.
    assert np.abs(changes(found, start) - changes(ordinary, start)).max() < FLOAT64
    assert np.abs(changes(ordinary, start)).max() > 1e-5
    # With clipping, and one step, not further than its rate times the norm.
    once = Training(**settings | {"local_epochs": 1, "learning_rate": 1.0}, **size)
    assert np.linalg.norm(changes(alone(exact, layers, rows, start, once, hidden(clip_norm=1e-3)), start)) < 1e-3


def test_what_is_frozen_is_not_trained_nor_counted_in_a_norm(exact, start, layers):
    halves = tuple(key for key in start.tensors if "lora_B" in key)
    rows, training = random_rows(6), Training(batch_size=6, optimizer="sgd", learning_rate=1.0, clip_norm=None)
    whole = alone(exact, layers, rows, Payload(start), training, hidden())
    half = alone(exact, layers, rows, Payload(start, trained=halves, returned=tuple(start.tensors)), training, hidden())
    for key, value in half.update.tensors.items():
        assert np.abs(value - (whole.update.tensors if key in halves else start.tensors)[key]).max() < FLOAT64
    # One row, cut: what is trained moves by the norm, whatever gradient the frozen half has.
    payload = Payload(start, trained=halves, returned=tuple(start.tensors))
    cut = alone(exact, layers, rows[:1], payload, training, hidden(clip_norm=1e-3))
    assert np.linalg.norm(changes(cut, start)) == pytest.approx(1e-3, rel=FLOAT64)


def test_a_methods_correction_comes_after_the_noise(exact, start, layers):
    # FedProx adds mu (w - w_start), which is zero in the first step and mu times the first change in the second.
    rows, rate, mu = random_rows(5), 0.5, 0.25
    training = Training(local_epochs=2, batch_size=5, optimizer="sgd", schedule="constant", learning_rate=rate)
    training = training.model_copy(update={"clip_norm": None})
    privacy = hidden(noise=1000, clip_norm=1e-9)  # all but nothing but noise, of the same deviation wherever it is
    plain = changes(alone(exact, layers, rows, start, training, privacy), start)
    once = changes(alone(exact, layers, rows, start, training.model_copy(update={"local_epochs": 1}), privacy), start)
    method = our_methods()["fedavg"]
    prox = replace(method.passes[0], correct=lambda step: step.gradient_P + mu * (step.adapter_P - step.start_P))
    drawn_back = changes(alone(exact, layers, rows, start, training, privacy, replace(method, passes=(prox,))), start)
    assert np.abs(drawn_back - (plain - rate * mu * once)).max() < 1e-9  # twice the rate times the norm
    assert np.abs(drawn_back - plain).max() > 1e-8


# What one row can change --------------------------------------------------------------------------


@pytest.fixture
def sum_of(exact, start):
    """The sum of the cut gradients of some rows in one step: (rows, their numbers, norm)."""
    layers = LoraLayers(exact.model, start.config, slots=4, dtype=torch.float64)
    for slot in range(4):
        layers.load(slot, start.tensors)
    objective, task = make_objective(Training()), train_task(start, Training())

    def summed(rows, batch, clip_norm):
        client = Client("a", rows, replace(task, privacy=hidden(clip_norm=clip_norm)), {})
        plan = Plan(client, [[batch]], [[[0] * len(batch)]], [1.0])
        return private.clipped_sum(exact, layers, plan, 0, objective, torch.zeros(1, 1)).numpy()

    yield summed
    layers.detach()


@pytest.mark.parametrize("neighbours", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_row_more_or_less_moves_the_sum_by_no_more_than_the_norm(sum_of, neighbours):
    draw, rows, largest = np.random.default_rng(0), random_rows(60, vocabulary=40), 0.8
    moved = []
    for _ in range(neighbours):
        batch = draw.permutation(60)[: draw.integers(1, 6)].tolist()
        moved.append(np.linalg.norm(sum_of(rows, batch, largest) - sum_of(rows, batch[1:], largest)))
    # Of sums of up to five vectors of this norm.
    assert max(moved) <= largest * (1 + FLOAT64)
    assert max(moved) == pytest.approx(largest), "some rows are cut"


def test_a_row_of_ten_times_as_many_tokens_moves_the_sum_no_further(sum_of, start):
    draw = np.random.default_rng(2)
    short = [token_row(draw.integers(3, 300, 8), [0] * 4 + [1] * 4) for _ in range(3)]
    rows = [*short, token_row(draw.integers(3, 300, 44), [0] * 4 + [1] * 40)]
    own = np.linalg.norm(gradients_one_by_one("llama", start, rows[3:])[0])
    for largest in (0.01, 1e4):
        moved = np.linalg.norm(sum_of(rows, [0, 1, 2, 3], largest) - sum_of(rows, [0, 1, 2], largest))
        # By that row's own cut gradient: what the others get does not depend on it.
        assert moved == pytest.approx(min(own, largest), rel=FLOAT64)


def test_float32_gradients_of_any_size_are_cut_to_the_norm():
    draw, largest = torch.Generator().manual_seed(0), 0.3
    sizes = torch.logspace(-30, 18, 1000)[:, None]
    grads = torch.randn(1000, 500, generator=draw) * sizes
    cut = private.clipped(grads, largest)
    # The norm in float64, one factor and 500 products rounded in float32.
    assert float(cut.double().norm(dim=1).max()) <= largest * (1 + gamma(torch.float32, 3))
    small = grads.double().norm(dim=1) < largest * 0.999
    assert torch.equal(cut[small], grads[small])
    assert small.any()
    assert not small.all()


def test_a_row_whose_gradient_is_not_finite_counts_as_none():
    grads = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
    assert private.clipped(grads, 1.0).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [0, 0], [0, 0]]


# Noise --------------------------------------------------------------------------------------------


def test_noise_is_normal_and_every_purpose_has_its_own():
    count = 200_001
    draws = [secret_normals(SECRET, purpose, count) for purpose in (b"0 0", b"0 1", b"1 0")]
    draws.append(secret_normals(SECRET[::-1], b"0 0", count))
    normal = statistics.NormalDist()
    for values in draws:
        assert len(values) == count
        # Sums of squares follow chi-square: mean n, variance 2n; six standard deviations, as for the mean.
        assert abs(np.square(values).sum() - count) < 6 * math.sqrt(2 * count)
        assert abs(values.sum()) < 6 * math.sqrt(count)
        # Dvoretzky, Kiefer and Wolfowitz: a distance above this has a probability of 1e-9.
        expected = np.array([normal.cdf(value) for value in np.sort(values)[::20]])
        place = np.arange(0, count, 20) / count
        assert np.abs(expected - place).max() < math.sqrt(math.log(2 / 1e-9) / (2 * count)) + 1 / count
        # Neighbours, and both halves of a pair, have nothing to do with each other.
        assert abs((values[1:] * values[:-1]).sum()) < 6 * math.sqrt(count)
        assert abs((values[: count // 2] * values[count // 2 + 1 :]).sum()) < 6 * math.sqrt(count)
    for one, other in ((0, 1), (0, 2), (0, 3), (1, 2)):
        assert abs((draws[one] * draws[other]).sum()) < 6 * math.sqrt(count)
    assert np.array_equal(draws[0], secret_normals(SECRET, b"0 0", count))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 4), (50, 1)])
def test_noise_has_the_deviation_that_the_recipe_says_whatever_the_batch(
    exact, start, layers, batch_size, accumulation
):
    noise, largest, rows, rate = 1.7, 0.02, random_rows(20), 0.5
    draws, privacy = 4, hidden(noise=noise, clip_norm=largest)
    settings = {"local_steps": 1, "batch_size": batch_size, "accumulation": accumulation, "optimizer": "sgd"}
    training = Training(learning_rate=rate, clip_norm=None, **settings)
    squares, count = 0.0, 0
    for seed in range(draws):
        noisy, quiet = (
            changes(alone(exact, layers, rows, start, training, one, seed=seed), start)
            for one in (privacy, hidden(clip_norm=largest))
        )
        expected = min(20, batch_size * accumulation)
        squares += np.square((noisy - quiet) / (rate * noise * largest / expected)).sum()
        count += len(noisy)
    # Chi-square of as many degrees of freedom: mean n, variance 2n.
    assert abs(squares - count) < 6 * math.sqrt(2 * count)


def test_every_step_of_every_pass_has_noise_of_its_own(exact, start, layers):
    rate, steps, rows, passes = 0.5, 3, random_rows(4), []
    training = Training(local_steps=steps, batch_size=4, optimizer="sgd", learning_rate=rate, clip_norm=None)
    training = training.model_copy(update={"schedule": "constant"})
    plain = our_methods()["fedavg"]

    def finish(trained):
        passes.extend(trained.passes)
        return plain.finish(trained)

    twice = replace(plain, passes=(plain.passes[0],) * 2, finish=finish)
    # Nothing but noise, next to which the gradients, cut to 1e-9, are a thousandth.
    alone(exact, layers, rows, start, training, hidden(noise=1000, clip_norm=1e-9), twice)
    one, other = (
        np.concatenate([(tensors[key] - start.tensors[key]).ravel() for key in start.tensors]) / (rate * 1e-6 / 4)
        for tensors in passes
    )
    # Sums of independent noise, of a variance that adds up; what the gradients add is far below six deviations.
    bound = 6 * math.sqrt(2 * len(one))
    for values in (one, other):
        assert abs(np.square(values / math.sqrt(steps)).sum() - len(one)) < bound
    assert abs((one * other).sum() / steps) < bound


def test_a_step_without_rows_is_noise_alone(exact, start, layers):
    rows, noise, largest, rate = random_rows(30), 2.0, 0.1, 0.5
    training = Training(local_steps=1, batch_size=1, optimizer="sgd", learning_rate=rate, clip_norm=None)
    privacy = hidden(noise=noise, clip_norm=largest)
    empty = next(
        seed
        for seed in range(100)
        if planned(Client("a", rows, train_task(start, training, seed=seed, privacy=privacy), {}), 0).steps == [[[]]]
    )
    reply = alone(exact, layers, rows, start, training, privacy, seed=empty)
    moved = changes(reply, start) / (rate * noise * largest)
    assert abs(np.square(moved).sum() - len(moved)) < 6 * math.sqrt(2 * len(moved))
    assert reply.losses == [0.0]
    assert (reply.update.metrics["rows"], reply.update.metrics["tokens"], reply.update.rows) == (0, 0, 30)
    quiet = alone(exact, layers, rows, start, training, hidden(clip_norm=largest), seed=empty)
    assert np.abs(changes(quiet, start)).max() < FLOAT64
    pairs = training.model_copy(update={"loss": "dpo"})
    assert alone(exact, layers, pair_rows(30), start, pairs, privacy, seed=empty).update is not None


def test_budget_without_a_noise_is_refused(exact, start, layers):
    with pytest.raises(RecipeError, match="give privacy.noise"):
        alone(exact, layers, random_rows(3), start, Training(), Privacy(unit="example", epsilon=3.0))


# Batches by chance --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "wanted"),
    [
        (100, {"batch_size": 8, "local_epochs": 2}, (0.08, 25)),
        (101, {"batch_size": 8, "local_epochs": 1}, (8 / 101, 13)),  # 12.6 batches
        (100, {"batch_size": 8, "accumulation": 5}, (0.4, 3)),  # 2.5 batches of 40
        (100, {"batch_size": 8, "local_steps": 7, "local_epochs": 9}, (0.08, 7)),
        (4, {"batch_size": 8, "local_epochs": 3}, (1.0, 3)),
        (1, {}, (1.0, 1)),
    ],
)
def test_rate_and_steps_follow_from_rows_and_batches(rows, settings, wanted):
    assert example_rate(rows, Training(**settings)) == wanted
    steps = poisson_steps(rows, Training(**settings), np.random.default_rng(0))
    assert len(steps) == wanted[1]
    assert all(len(step) == 1 for step in steps)


def test_every_row_joins_every_step_by_a_chance_of_its_own():
    rows, count = 12, 20_000
    training = Training(batch_size=3, local_steps=count)
    joined = np.zeros((count, rows))
    for step, (batch,) in enumerate(poisson_steps(rows, training, np.random.default_rng(1))):
        assert batch == sorted(set(batch))
        joined[step, batch] = 1
    # Bernoulli with p = 1/4: means, and products of every two rows and of steps that follow each other, within six
    # standard deviations.
    centred, deviation = joined - 0.25, 0.25 * 0.75
    assert np.abs(centred.sum(0)).max() < 6 * math.sqrt(count * deviation)
    products = centred.T @ centred
    assert np.abs(products - np.diag(products.diagonal())).max() < 6 * deviation * math.sqrt(count)
    assert np.abs((centred[1:] * centred[:-1]).sum(0)).max() < 6 * deviation * math.sqrt(count)
    sizes = joined.sum(1)
    assert sizes.var() == pytest.approx(rows * deviation, rel=6 * math.sqrt(2 / count) + 0.01)
    assert {0, 1, 2, 3} <= set(sizes)


# Secrets ------------------------------------------------------------------------------------------


def test_a_site_answers_the_same_question_alike_and_another_one_with_other_noise(exact, start, layers):
    rows, privacy = random_rows(6), hidden(noise=1.0)
    training = Training(batch_size=3, local_epochs=2)

    def keys(rows=rows, start=start, training=training, privacy=privacy, secret=SECRET, own=None, **more):
        client = Client("a", rows, train_task(start, training, privacy=privacy, **more), own or {}, secret)
        return client.key(EXAMPLE_NOISE), planned(client, 0).steps

    first = keys()
    assert keys() == first
    assert keys(certain=1) == first, "which old state is needed no more has no part in the answer"
    nearly = start.with_tensors({key: value + 1e-15 for key, value in start.tensors.items()})
    others = [
        keys(secret=SECRET[::-1]),
        keys(rows=rows[:-1]),
        keys(rows=[*rows[:-1], token_row(rows[-1].ids_T, ~rows[-1].trained_T)]),
        keys(start=nearly),
        keys(training=training.model_copy(update={"weight_decay": 0.1})),
        keys(privacy=hidden(noise=1.1)),
        keys(round=2),
        keys(own={"x": np.ones(2)}),
        keys(settled=1),
    ]
    assert len({first[0], *(key for key, _ in others)}) == 1 + len(others)
    assert keys(secret=None)[0] == keys(secret=None, start=nearly)[0], "a simulation draws from its seed alone"
    assert keys(secret=None)[0] != keys(secret=None, seed=1)[0]


def test_a_secret_changes_what_a_site_sends_and_its_own_seed_does_not_help(exact, start, layers):
    rows, training = random_rows(6), Training(batch_size=3)
    sent = [
        changes(alone(exact, layers, rows, start, training, hidden(noise=1.0), secret=secret), start)
        for secret in (None, SECRET, SECRET, SECRET[::-1])
    ]
    assert np.array_equal(sent[1], sent[2])
    assert not any(np.allclose(one, other) for one, other in ((sent[0], sent[1]), (sent[1], sent[3])))


def test_one_by_one_a_client_is_byte_equal_to_one_that_trains_alone():
    base = tiny_base("llama", torch.float32)
    start = random_adapter(base, rank=3, dtype="float32", dropout=0.2)
    layers = LoraLayers(base.model, start.config, slots=3)  # which have room for three clients
    cohort = {name: random_rows(7 + 2 * seed, seed) for seed, name in enumerate("abc")}
    training = Training(batch_size=3, local_epochs=2)
    among = {one.client: one for one in train(base, layers, cohort, start, training, privacy=hidden(noise=0.5))}
    assert layers.slots == 3
    for name, rows in cohort.items():
        (single,) = train(base, layers, {name: rows}, start, training, privacy=hidden(noise=0.5))
        assert all(
            value.tobytes() == among[name].update.tensors[key].tobytes() for key, value in single.update.tensors.items()
        )
    layers.detach()


# Recipes and whole runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("selection.method=perplexity", "set selection.method to full"),
        ("selection.method=random", "set selection.method to full"),
        ("engine.fuse=4", "set engine.fuse to 1"),
        ("engine.fuse=0", "set engine.fuse to 1"),
    ],
)
def test_what_does_not_go_together_with_hiding_rows_is_refused(tiny_recipe, field, sentence):
    fields = [field, "selection.rows=3"] if field.startswith("selection") else [field]
    load_recipe(tiny_recipe, [*fields, "privacy.unit=example"])
    load_recipe(tiny_recipe, [*fields, "privacy.noise=1"])
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(tiny_recipe, [*fields, "privacy.unit=example", "privacy.noise=1"])


@pytest.mark.integration
def test_a_killed_run_that_hides_rows_with_clients_that_drop_out_goes_on_to_the_same_bytes(
    bellwether, tiny_recipe, tmp_path
):
    truth, path, hold = tmp_path / "truth", tmp_path / "run", tmp_path / "hold"
    fields = ["privacy.unit=example", "privacy.noise=0.8", "privacy.clip_norm=0.1", "training.batch_size=2"]
    fields += ["federation.rounds=8", "federation.availability.drop_out=0.3", "federation.quorum=0.25"]
    fields += ["federation.failed_rounds=8", "federation.sampler=held:everybody", "evaluation.generate=false"]
    outcome = bellwether("run", tiny_recipe, *fields, "--out", truth)
    assert outcome.code == 0, outcome.err
    lines = json_lines(truth / "rounds.jsonl")
    assert any(line["left_out"] for line in lines)
    assert len({client["rows_seen"] for line in lines for client in line["clients"]}) > 1, "batches come by chance"

    hold.write_text("5")
    process = forked.start("run", tiny_recipe, *fields, "--out", path, HELD=str(hold))
    assert kill_when(process, lambda: newest(path) > 2, 0), process.communicate()
    hold.unlink()
    done = bellwether("run", "--resume", path, "--trust-code")
    assert done.code == 0, done.err
    for name in RESULTS:
        assert (path / name).read_bytes() == (truth / name).read_bytes(), name
    assert timeless(path) == timeless(truth)
    processes = tmp_path / "processes"
    outcome = bellwether("run", tiny_recipe, *fields, "engine.processes=2", "--out", processes)
    assert outcome.code == 0, outcome.err
    assert (processes / RESULTS[0]).read_bytes() == (truth / RESULTS[0]).read_bytes()
