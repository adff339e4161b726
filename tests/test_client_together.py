"""Clients trained together against the same clients one by one, and masks that belong to rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from asking import train
from rounding import FLOAT64, assert_as_near, gamma
from test_model_training import token_rows
from tiny_models import ARCHITECTURES, exact_base, let_runs_compute_in_float64, random_adapter, tiny_base

from bellwether.client.optimizer import StackedAdamW
from bellwether.model.dropout import Dropout
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe

TRAINING = recipe.Training(
    local_epochs=2, batch_size=2, accumulation=2, learning_rate=4e-3, weight_decay=0.01, clip_norm=0.5
)


def updates(base, start, cohort, *, slots, tokens=None, training=TRAINING, dtype=torch.float64, method=None):
    """Train a cohort; return tensors and figures by client."""
    layers = LoraLayers(base.model, start.config, slots=slots, dtype=dtype)
    replies = train(base, layers, cohort, start, training, tokens, method, round=3, rounds=5, seed=11)
    layers.detach()
    assert [reply.client for reply in replies] == list(cohort)
    return {reply.client: reply.update for reply in replies}


def cohort_of(*sizes):
    """Clients with different rows and different numbers of them."""
    rows = token_rows(sum(sizes))
    starts = np.cumsum([0, *sizes])
    return {
        f"client-{n}": rows[start : start + size] for n, (start, size) in enumerate(zip(starts, sizes, strict=False))
    }


def furthest(ours, theirs):
    """The largest deviation of any value of any client."""
    return max(
        float(np.abs(ours[client].tensors[key] - update.tensors[key]).max())
        for client, update in theirs.items()
        for key in update.tensors
    )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_together_equals_one_by_one(architecture, dropout):
    base = tiny_base(architecture)
    start = random_adapter(base, rank=3, alpha=6.0, dropout=dropout)
    cohort = cohort_of(10, 12, 3)  # five or six, six and two steps
    alone = updates(base, start, cohort, slots=1)
    together = updates(base, start, cohort, slots=3, tokens=70)
    for client, update in alone.items():
        change = max(np.abs(update.tensors[key] - start.tensors[key]).max() for key in update.tensors)
        assert change > 1e-3
        assert all(together[client].metrics[name] == update.metrics[name] for name in ("tokens", "rows"))
        # Losses are added up in float32: at most one piece for each row, here as there.
        near = gamma(torch.float32, 2 * int(update.metrics["rows"]))
        assert together[client].metrics["loss"] == pytest.approx(update.metrics["loss"], rel=near)
    assert furthest(together, alone) < FLOAT64


@pytest.mark.parametrize(("slots", "tokens"), [(2, 70), (3, 1), (3, 10_000), (5, 70)])
def test_any_group_and_any_budget_give_the_same_updates(slots, tokens):
    base = tiny_base("llama")
    start = random_adapter(base, rank=3, dropout=0.2)
    cohort = cohort_of(9, 3, 14)
    alone = updates(base, start, cohort, slots=1)
    assert furthest(updates(base, start, cohort, slots=slots, tokens=tokens), alone) < 1e-10


def test_one_by_one_a_client_is_byte_equal_to_one_that_trains_alone():
    base = tiny_base("llama", torch.float32)
    start = random_adapter(base, rank=3, dtype="float32", dropout=0.2)
    cohort = cohort_of(9, 3, 14)
    among = updates(base, start, cohort, slots=1, dtype=torch.float32)
    for client, rows in cohort.items():
        alone = updates(base, start, {client: rows}, slots=1, dtype=torch.float32)[client]
        assert all(alone.tensors[key].tobytes() == among[client].tensors[key].tobytes() for key in alone.tensors)


def test_the_order_of_the_cohort_does_not_matter():
    base = tiny_base("llama")
    start = random_adapter(base, rank=3, dropout=0.2)
    cohort = cohort_of(9, 3, 14)
    turned = dict(reversed(cohort.items()))
    ours, theirs = (updates(base, start, some, slots=3, tokens=70) for some in (cohort, turned))
    assert furthest(ours, theirs) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_fewer_bits_together_is_as_near_to_float64_as_one_by_one(dtype):
    """On the change of the adapter, as docs/rounds.md states it."""
    base = tiny_base("llama", dtype)
    start = random_adapter(base, rank=3, dtype="float32", dropout=0.2)
    cohort = cohort_of(9, 3, 14)
    alone = updates(base, start, cohort, slots=1, dtype=torch.float32)
    together = updates(base, start, cohort, slots=3, tokens=70, dtype=torch.float32)
    exact = updates(exact_base(base), start, cohort, slots=1)

    def change(found, client):
        return np.concatenate([(value - start.tensors[key]).ravel() for key, value in found[client].tensors.items()])

    for client in cohort:
        ours, theirs, wanted = (change(found, client) for found in (together, alone, exact))
        assert_as_near(ours, theirs, wanted)
        assert (ours != theirs).any(), "they ran through the base in other pieces"
        if dtype == torch.bfloat16:
            # Sums are held in float32, so their order seldom decides to which side they are rounded in the end.
            assert np.linalg.norm(ours - theirs) < np.linalg.norm(theirs - wanted) / 2


def test_stacked_adamw_equals_torchs_for_each_slot():
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 40, generator=draw, dtype=torch.float64)
    values, grads = start.clone(), torch.zeros_like(start)
    ours = StackedAdamW(values, grads, weight_decay=0.1)
    singles = [torch.nn.Parameter(row.clone()) for row in start]
    theirs = [torch.optim.AdamW([single], lr=1.0, weight_decay=0.1) for single in singles]
    for step in range(12):
        rates = [0.01, 0.02, 0.03][: 3 if step < 7 else 2]  # the third has finished after seven steps
        new = torch.randn(3, 40, generator=draw, dtype=torch.float64)
        grads.copy_(new)
        ours.clip(len(rates), 5.0)
        ours.step(rates)
        assert not grads.any()
        for slot, rate in enumerate(rates):
            singles[slot].grad = new[slot].clone()
            torch.nn.utils.clip_grad_norm_([singles[slot]], 5.0)
            theirs[slot].param_groups[0]["lr"] = rate
            theirs[slot].step()
    # Sums of 40 squares and fewer than 20 other operations a step, on numbers that stay below 4.
    near = 4 * gamma(torch.float64, 12 * (40 + 20))
    for slot, single in enumerate(singles):
        assert single.abs().max() < 4
        torch.testing.assert_close(values[slot], single.detach(), atol=near, rtol=0)


# Dropout ------------------------------------------------------------------------------------------


def row_masks(probability, seed_N, path, x_NTI):
    """Masks of rows of equal length."""
    rows, tokens, inputs = x_NTI.shape
    row_M, position_M = torch.arange(rows).repeat_interleave(tokens), torch.arange(tokens).repeat(rows)
    return Dropout(probability, seed_N).masks(row_M, position_M)(path, x_NTI.view(-1, inputs)).view(x_NTI.shape)


def test_a_rows_mask_depends_on_nothing_but_row_module_and_position():
    seeds = torch.tensor([5, -(2**62), 17])
    wide = row_masks(0.3, seeds, "layers.0.up", torch.zeros(3, 9, 10))
    again = row_masks(0.3, seeds[[2, 0]], "layers.0.up", torch.zeros(2, 6, 10))
    assert torch.equal(again, wide[[2, 0], :6])
    others = [
        row_masks(0.3, seeds, "layers.1.up", torch.zeros(3, 9, 10)),
        row_masks(0.3, seeds + 1, "layers.0.up", torch.zeros(3, 9, 10)),
    ]
    assert all(0.2 < (other != wide).float().mean() < 0.6 for other in others)


def test_the_masks_of_some_tokens_are_those_of_all_tokens_there():
    dropout = Dropout(0.3, torch.tensor([5, 6]))
    masks = dropout.masks(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1]))
    index_S = torch.tensor([1, 4])
    assert torch.equal(masks.at(index_S)("m", torch.zeros(2, 33)), masks("m", torch.zeros(5, 33))[index_S])


def test_a_probability_next_to_one_keeps_something_at_its_weight():
    mask_NTI = row_masks(0.999999, torch.tensor([3]), "m", torch.ones(1, 1, 2**20))
    kept = mask_NTI[mask_NTI > 0]
    assert kept.unique().tolist() == [65536.0]
    assert 4 <= len(kept) <= 36  # sixteen of a million, give or take five standard deviations


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 2), (6, 5, 4), (1, 2, 1001)])
def test_masks_have_the_shape_of_their_input_and_drop_nothing_at_zero(shape):
    seeds = torch.arange(shape[0])
    assert row_masks(0.5, seeds, "m", torch.ones(shape)).shape == shape
    assert row_masks(0.0, seeds, "m", torch.ones(shape)).unique().tolist() == [1.0]


def test_masks_drop_the_stated_share_independently_and_keep_the_mean():
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,), generator=torch.Generator().manual_seed(0))
    mask_NTI = row_masks(0.1, seeds, "a.b", torch.zeros(64, 50, 102, dtype=torch.float64))
    kept = (mask_NTI > 0).double()
    # The probability is taken in steps of 1/65536, so the weight is that of one half a step away at most.
    assert mask_NTI.unique().tolist() == [0.0, pytest.approx(1 / 0.9, rel=0.5 / 65536 / 0.9)]
    assert float(kept.mean()) == pytest.approx(0.9, abs=4 * (0.09 / kept.numel()) ** 0.5)
    # Neighbours along every axis, and features four apart, which share no word but its place, are uncorrelated.
    centred = kept - kept.mean()
    spread = float(centred.var())
    for axis, apart in ((0, 1), (1, 1), (2, 1), (2, 2), (2, 3), (2, 4)):
        length = kept.shape[axis] - apart
        product = (centred.narrow(axis, 0, length) * centred.narrow(axis, apart, length)).mean() / spread
        assert abs(float(product)) < 5 / kept.numel() ** 0.5
    # No feature, position or row is dropped more often than chance allows.
    for axes in ((0, 1), (0, 2), (1, 2)):
        share = kept.mean(axes)
        trials = kept.numel() / share.numel()
        assert float((share - 0.9).abs().max()) < 5 * (0.09 / trials) ** 0.5


# In a run -----------------------------------------------------------------------------------------


def test_a_run_writes_its_budget_to_its_recipe_and_goes_on_with_no_other(bellwether, tiny_recipe, tmp_path):
    from bellwether.recipe.file import load_recipe

    words = ["engine.fuse=0", "federation.fraction=1", "federation.rounds=2"]
    outcome = bellwether("run", tiny_recipe, *words, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    budget = load_recipe(tmp_path / "run" / "recipe.yaml").engine.tokens
    assert budget >= 512

    again = bellwether("run", tiny_recipe, *words, "--out", tmp_path / "run", "--resume", tmp_path / "run")
    assert again.code == 2  # --out and --resume
    again = bellwether("run", "--resume", tmp_path / "run", *words[1:])
    assert again.code == 0, again.err
    other = bellwether("run", "--resume", tmp_path / "run", f"engine.tokens={2 * budget}")
    assert (other.code, "engine.tokens" in other.err) == (2, True)


def adapter_of_a_run(bellwether, tiny_recipe, folder, *fields):
    """The adapter that two rounds end with."""
    from safetensors.numpy import load_file

    outcome = bellwether("run", tiny_recipe, *fields, "federation.rounds=2", "--out", folder)
    assert outcome.code == 0, outcome.err
    return load_file(folder / "adapter" / "adapter_model.safetensors")


TOGETHER = ("engine.fuse=0", "engine.tokens=200")


def test_the_same_budget_gives_the_same_bytes(bellwether, tiny_recipe, tmp_path):
    one, again = (adapter_of_a_run(bellwether, tiny_recipe, tmp_path / name, *TOGETHER) for name in ("one", "again"))
    assert all(value.tobytes() == again[key].tobytes() and value.dtype == np.float32 for key, value in one.items())


def test_runs_together_and_one_by_one_end_with_the_same_adapter(bellwether, tiny_recipe, tmp_path, monkeypatch):
    let_runs_compute_in_float64(monkeypatch)
    together = adapter_of_a_run(bellwether, tiny_recipe, tmp_path / "together", *TOGETHER)
    for key, value in adapter_of_a_run(bellwether, tiny_recipe, tmp_path / "alone").items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(together[key], value, rtol=0, atol=FLOAT64)
