"""Direct preference optimization: the loss, training and scores against the formula, PEFT and TRL."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asking import train as ask
from asking import train_task
from rounding import FLOAT64
from test_client_together import furthest, updates
from test_model_training import PREFIX, GivenMasks, MaskedDropout, OurMasks, labelled
from tiny_models import random_adapter, tiny_base, tiny_model

from bellwether.client import passes, plans
from bellwether.client.batches import local_steps
from bellwether.client.objective import make_objective, pair_losses
from bellwether.client.score import score
from bellwether.data.rows import Row, TokenRow, Turn
from bellwether.exchange.adapter import peft_config
from bellwether.exchange.scores import Totals, means
from bellwether.model import decoder
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.tools.randomness import Randomness

BETA = 0.3
TRAINING = recipe.Training(
    loss="dpo",
    beta=BETA,
    local_epochs=2,
    batch_size=2,
    accumulation=2,
    learning_rate=4e-3,
    weight_decay=0.01,
    clip_norm=0.05,
)


def pair_rows(count: int, longest: int = 24) -> list[TokenRow]:
    """Prompts of unequal lengths with two answers each, of unequal lengths, too."""
    draw = np.random.default_rng(5)

    def answered(prompt_T, row):
        ids_T = np.concatenate([prompt_T, draw.integers(3, 300, int(draw.integers(1, longest - len(prompt_T))))])
        response_T = np.arange(len(ids_T)) >= len(prompt_T)
        return TokenRow(ids_T, response_T, response_T, len(prompt_T), row)

    row = Row("i", "c", rejected=Turn("assistant", "r"))
    pairs = []
    for _ in range(count):
        prompt_T = draw.integers(3, 300, int(draw.integers(1, longest - 3)))
        chosen, rejected = (answered(prompt_T, one) for one in row.answers)
        pairs.append(replace(chosen, row=row, rejected=rejected))
    return pairs


def cohort_of(*sizes):
    rows = pair_rows(sum(sizes))
    starts = np.cumsum([0, *sizes])
    return {
        f"client-{n}": rows[begin : begin + size] for n, (begin, size) in enumerate(zip(starts, sizes, strict=False))
    }


# The loss -----------------------------------------------------------------------------------------


def test_the_loss_of_pairs_is_equation_7_worked_by_hand():
    # Three pairs, whose answers have 2, 1; 1, 3; and 1, 1 tokens.
    log_policy = [[[-1.0, -0.5], [-2.0]], [[-3.0], [-0.25, -0.5, -1.0]], [[-1.5], [-1.5]]]
    log_reference = [[-2.0, -1.25], [-2.5, -3.0], [-1.0, -1.0]]
    flat = [value for pair in log_policy for answer in pair for value in answer]
    answer_S = [number for number, answer in enumerate(a for pair in log_policy for a in pair) for _ in answer]
    loss_S = -torch.tensor(flat, dtype=torch.float64)
    figures, rows = pair_losses(0.2, loss_S, torch.tensor(answer_S), log_reference)
    # Margins: (-1.5 + 2) - (-2 + 1.25) = 1.25; (-3 + 2.5) - (-1.75 + 3) = -1.75; 0. Each times beta.
    margins = [0.25, -0.35, 0.0]
    wanted = [[math.log1p(math.exp(-margin)) for margin in margins], [1.0, 0.0, 0.5], margins]
    assert np.abs(figures.numpy() - np.array(wanted)).max() < 1e-14
    assert rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_the_loss_of_pairs_is_finite_however_far_the_answers_are_apart(margin):
    loss_S = torch.tensor([0.0, margin], dtype=torch.float64, requires_grad=True)
    figures, _ = pair_losses(1.0, loss_S, torch.tensor([0, 1]), [[0.0, 0.0]])
    figures[0].sum().backward()
    assert figures[0].item() == max(0.0, -margin)
    assert loss_S.grad.tolist() == ([0.0, 0.0] if margin > 0 else [1.0, -1.0])


def test_without_pairs_nothing_is_compared_with_the_base():
    objective = make_objective(recipe.Training())
    assert (objective.referenced, objective.token_loss, list(objective.figures)) == (False, None, ["loss"])


# Training -----------------------------------------------------------------------------------------


def peft_model(architecture, adapter, dropout, masks):
    """PEFT's modules over the model in float64, with given masks for dropout."""
    import peft

    settings = peft_config(adapter.config) | {"inference_mode": False, "base_model_name_or_path": None}
    wrapped = peft.get_peft_model(
        tiny_model(architecture, torch.float64), peft.LoraConfig(**settings), autocast_adapter_dtype=False
    ).double()
    report = peft.set_peft_model_state_dict(
        wrapped, {key: torch.from_numpy(value.copy()) for key, value in adapter.tensors.items()}
    )
    assert not report.unexpected_keys
    if dropout:
        for name, module in wrapped.named_modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = MaskedDropout(name.removeprefix(PREFIX), masks)
    return wrapped


def answer_log_probabilities(wrapped, rows):
    """Sums over the tokens of answers, from whole logits of the padded batch: chosen and rejected, in turn."""
    ids, attention, labels = labelled([answer for row in rows for answer in row.answers])
    for module in wrapped.modules():
        if isinstance(module, MaskedDropout):
            module.shape = tuple(ids.shape)
    logits = wrapped(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = logits.gather(2, targets.clamp_min(0)[:, :, None])[:, :, 0]
    return (picked * (targets != -100)).sum(1).view(-1, 2)


def train_with_peft(architecture, adapter, rows, task, steps, dropout):
    """The reference: log-probabilities of whole logits, the formula, torch's clipping and AdamW."""
    import peft

    wrapped = peft_model(architecture, adapter, dropout, GivenMasks(dropout))
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.training.learning_rate, weight_decay=task.training.weight_decay)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=3 / 5, end_factor=2 / 5, total_iters=len(steps))
    losses, margins = [], []
    for step in steps:
        pairs = sum(map(len, step))
        for batch in step:
            chosen = [rows[number] for number in batch]
            with torch.no_grad(), wrapped.disable_adapter():
                reference = answer_log_probabilities(wrapped, chosen)
            reward = BETA * (answer_log_probabilities(wrapped, chosen) - reference)
            margin = reward[:, 0] - reward[:, 1]
            loss = torch.log1p(torch.exp(-margin))
            losses += loss.tolist()
            margins += margin.tolist()
            (loss.sum() / pairs).backward()
        torch.nn.utils.clip_grad_norm_(parameters, task.training.clip_norm)
        optimizer.step()
        fall.step()
        optimizer.zero_grad()
    return {key: value.numpy() for key, value in peft.get_peft_model_state_dict(wrapped).items()}, losses, margins


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("architecture", "end_to_end"), [("llama", True), ("llama", False), ("gpt2", False)])
def test_training_on_pairs_equals_peft_with_the_formula(architecture, end_to_end, dropout, monkeypatch):
    base = tiny_base(architecture)
    monkeypatch.setattr(decoder, "fits", lambda model: end_to_end)
    start = random_adapter(base, rank=3, alpha=6.0, dropout=dropout)
    task = train_task(start, TRAINING, "client-1", round=3, rounds=5, seed=11)
    rows = pair_rows(23)
    masks = GivenMasks(dropout)
    given = SimpleNamespace(masks=lambda row_M, position_M: OurMasks(masks, row_M, position_M))
    monkeypatch.setattr(passes, "Dropout", lambda probability, seed_N: given)
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    (reply,) = ask(base, layers, {"client-1": rows}, start, TRAINING, round=3, rounds=5, seed=11)
    layers.detach()
    order = Randomness(11).numpy("batch order", round=3, client="client-1")
    steps = local_steps([row.longest for row in rows], TRAINING, order)
    assert len(steps) >= 10
    theirs, losses, margins = train_with_peft(architecture, start, rows, task, steps, dropout)
    for key, value in reply.update.tensors.items():
        assert np.abs(theirs[key] - start.tensors[key]).max() > 1e-3
        assert np.abs(value - theirs[key]).max() < FLOAT64, key
    figures = reply.update.metrics
    assert (figures["rows"], figures["tokens"]) == (2 * 23, 2 * sum(row.trained_tokens for row in rows))
    # Told in float32, as sums over 46 pairs.
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert figures["preferred"] == pytest.approx(np.mean(np.array(margins) > 0), rel=1e-6)


def whole_head(model, **more):
    """In place of TRL's output layer, which multiplies in float32: the same log-probabilities of whole logits."""
    plain = model.forward

    def forward(*given, labels=None, fused_lm_head=False, **named):
        if not fused_lm_head:
            return plain(*given, labels=labels, **named)
        logits, targets = plain(*given, **named).logits[:, :-1], labels[:, 1:]
        log = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        told = dict.fromkeys(("entropy", "mean_logits"), torch.zeros_like(log))  # what TRL logs only
        return SimpleNamespace(log_probs=-log, is_top1=torch.zeros_like(log, dtype=torch.bool), aux_loss=None, **told)

    model.forward = forward


def test_training_on_pairs_equals_trls_trainer(tmp_path, monkeypatch):
    """Several steps of TRL's own loop, with its tokens, batches in our order, accumulation, clipping and AdamW."""
    pytest.importorskip("trl", reason="trl is not installed (extra bench); the test above has the formula in torch")
    import datasets
    import peft
    import trl
    import trl.trainer.dpo_trainer
    from tiny_models import tiny_tokenizer

    from bellwether.data.prompts import resolve_template, row_prompt
    from bellwether.data.tokens import tokenise

    monkeypatch.setattr(trl.trainer.dpo_trainer, "add_fused_lm_head", whole_head)
    training = TRAINING.model_copy(update={"schedule": "constant", "local_epochs": 2, "clip_norm": 0.05})
    texts = [
        Row(f"Name colour {n}.", "Red " * (1 + n % 3) + "it is.", rejected=Turn("assistant", "No." * (1 + n % 4)))
        for n in range(12)
    ]
    tokenizer, data = tiny_tokenizer(), recipe.Data(template="alpaca", max_tokens=96)
    template = resolve_template(data, tokenizer)
    rows = list(tokenise(texts, tokenizer, data, template).rows)
    base = tiny_base("llama")
    start = random_adapter(base, rank=3, alpha=6.0, dropout=0.0)
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    (reply,) = ask(base, layers, {"client-1": rows}, start, training, seed=11)
    layers.detach()

    order = Randomness(11).numpy("batch order", round=1, client="client-1")
    steps = local_steps([row.longest for row in rows], training, order)
    flat = [texts[number] for step in steps for batch in step for number in batch]
    columns = {
        "prompt": [row_prompt(row, template, tokenizer) for row in flat],
        "chosen": [row.response for row in flat],
        "rejected": [row.rejected.text for row in flat],
    }
    settings = peft_config(start.config) | {"inference_mode": False, "base_model_name_or_path": None}
    arguments = trl.DPOConfig(
        str(tmp_path),
        beta=BETA,
        max_length=96,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip_norm,
        optim="adamw_torch",
        gradient_checkpointing=False,
        disable_dropout=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = trl.DPOTrainer(
        tiny_model("llama", torch.float64),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**settings),
    )
    trainer.model.double()
    tensors = {key: torch.from_numpy(value.copy()) for key, value in start.tensors.items()}
    assert not peft.set_peft_model_state_dict(trainer.model, tensors).unexpected_keys
    for row, theirs in zip(flat, trainer.train_dataset, strict=True):
        ours = rows[texts.index(row)]
        for answer, side in zip(ours.answers, ("chosen_ids", "rejected_ids"), strict=True):
            assert answer.ids_T.tolist() == (theirs["prompt_ids"] + theirs[side])[:96], "cut where TRL cuts"
    trainer.train()
    found = {key: value.numpy() for key, value in peft.get_peft_model_state_dict(trainer.model).items()}
    off = max(np.abs(value - found[key]).max() for key, value in reply.update.tensors.items())
    moved = max(np.abs(value - start.tensors[key]).max() for key, value in found.items())
    assert moved > 1e-3
    assert off < FLOAT64


def test_clients_with_pairs_train_together_as_one_by_one():
    base = tiny_base("llama")
    start = random_adapter(base, rank=3, dropout=0.2)
    cohort = cohort_of(9, 3, 14)
    alone = updates(base, start, cohort, slots=1, training=TRAINING)
    for slots, tokens in ((2, 90), (3, 1), (3, 10_000)):
        together = updates(base, start, cohort, slots=slots, tokens=tokens, training=TRAINING)
        assert furthest(together, alone) < FLOAT64
        for client, update in alone.items():
            assert together[client].metrics["preferred"] == pytest.approx(update.metrics["preferred"], rel=1e-5)
    assert (
        min(
            np.abs(update.tensors[key] - start.tensors[key]).max() for update in alone.values() for key in start.tensors
        )
        > 0
    )


def test_no_piece_parts_a_pair_or_holds_more_than_its_tokens():
    base = tiny_base("llama")
    start = random_adapter(base, rank=3)
    clients = [
        plans.Client(name, rows, train_task(start, TRAINING, name), {}) for name, rows in cohort_of(9, 8).items()
    ]
    planned = [plans.planned(client, 0) for client in clients]
    pieces = list(plans.pieces(planned, 0, 100))
    assert sum(map(len, pieces)) == 8, "two batches of two of each client"
    for piece in pieces:
        longest, answers = max(one.row.longest for one in piece), sum(len(one.row.answers) for one in piece)
        assert answers == 2 * len(piece)
        assert len(piece) == 1 or longest * answers <= 100


def test_one_by_one_a_client_with_pairs_is_byte_equal_to_one_that_trains_alone():
    base = tiny_base("llama", torch.float32)
    start = random_adapter(base, rank=3, dtype="float32", dropout=0.2)
    cohort = cohort_of(9, 3, 14)
    among = updates(base, start, cohort, slots=1, dtype=torch.float32, training=TRAINING)
    for client, rows in cohort.items():
        alone = updates(base, start, {client: rows}, slots=1, dtype=torch.float32, training=TRAINING)[client]
        assert all(alone.tensors[key].tobytes() == among[client].tensors[key].tobytes() for key in alone.tensors)


def test_gradient_checkpointing_changes_nothing_of_pairs():
    base = tiny_base("llama")
    start = random_adapter(base, rank=3, dropout=0.2)
    again = TRAINING.model_copy(update={"gradient_checkpointing": True})
    plain, other = (updates(base, start, cohort_of(6), slots=1, training=one) for one in (TRAINING, again))
    assert furthest(plain, other) < FLOAT64


def test_the_reference_is_computed_once_of_the_rows_that_are_used_and_without_dropout(monkeypatch):
    base = tiny_base("llama")
    start = random_adapter(base, rank=3, dropout=0.5)
    asked, plain = [], plans.answer_losses

    def watched(base, layers, rows, *more):
        asked.append([id(row) for row in rows])
        return plain(base, layers, rows, *more)

    monkeypatch.setattr(plans, "answer_losses", watched)
    cohort = cohort_of(12)
    some = TRAINING.model_copy(update={"local_steps": 2, "batch_size": 2, "accumulation": 1})
    updates(base, start, cohort, slots=1, training=some)
    updates(base, start, cohort, slots=1, training=TRAINING.model_copy(update={"local_epochs": 3}))
    assert [len(rows) for rows in asked] == [4, 12]
    assert all(len(set(rows)) == len(rows) for rows in asked)
    # Of the base alone: whatever the adapter and its dropout.
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    (client,) = [plans.Client(name, rows, train_task(start, TRAINING, name), {}) for name, rows in cohort.items()]
    (plan,) = plans.with_references(base, layers, [plans.planned(client, 0)])
    layers.detach()
    with torch.no_grad():
        wrapped = peft_model("llama", start, 0.0, None)
        with wrapped.disable_adapter():
            wanted = answer_log_probabilities(wrapped, client.rows).numpy()
    found = np.array([plan.references[number] for number in range(len(client.rows))])
    assert np.abs(found - wanted).max() < FLOAT64


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_held_out_pairs_are_scored_by_implicit_rewards_against_the_base(architecture):
    base = tiny_base(architecture)
    start = random_adapter(base, rank=3, alpha=6.0, dropout=0.2)
    rows = pair_rows(17)
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    layers.load(0, start.tensors)
    scored = score(base, layers, rows, recipe.Evaluation(generate=False, batch_size=4))
    layers.detach()
    wrapped = peft_model(architecture, start, 0.0, None).eval()
    with torch.no_grad():
        tuned = answer_log_probabilities(wrapped, rows)
        with wrapped.disable_adapter():
            gained = tuned - answer_log_probabilities(wrapped, rows)
    wanted = (gained[:, 0] > gained[:, 1]).double().tolist()
    assert 0 < sum(wanted) < len(rows)
    assert [one.totals.preferred for one in scored] == wanted
    assert all(
        (one.totals.pairs, one.totals.tokens) == (1, int(row.response_T.sum()))
        for one, row in zip(scored, rows, strict=True)
    )
    assert np.abs(np.array([one.totals.loss for one in scored]) + tuned[:, 0].numpy()).max() < 1e-9


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("gpt2", torch.float32), ("llama", torch.bfloat16)]
)
def test_the_untuned_base_prefers_as_chance_does(architecture, dtype):
    base = tiny_base(architecture, dtype)
    start = random_adapter(base, rank=3, dtype="float32")
    untuned = {key: np.zeros_like(value) if "lora_B" in key else value for key, value in start.tensors.items()}
    layers = LoraLayers(base.model, start.config)
    layers.load(0, untuned)
    scored = score(base, layers, pair_rows(9), recipe.Evaluation(generate=False, batch_size=4))
    layers.detach()
    assert means(sum((one.totals for one in scored), Totals())).preferred == 0.5


def test_rows_with_one_answer_have_no_preference():
    base = tiny_base("llama")
    start = random_adapter(base, rank=3)
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    rows = [replace(row, rejected=None) for row in pair_rows(3)]
    scored = score(base, layers, rows, recipe.Evaluation(generate=False))
    layers.detach()
    assert means(sum((one.totals for one in scored), Totals())).preferred is None
