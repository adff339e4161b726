"""Local training against PEFT's LoRA with torch's AdamW, on the same batches and dropout masks."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asking import train as ask
from asking import train_task
from rounding import unit
from tiny_models import ARCHITECTURES, END_TO_END, random_adapter, tiny_base, tiny_model

from bellwether.client import passes
from bellwether.client.batches import local_steps
from bellwether.client.optimizer import StackedAdamW
from bellwether.data.rows import Row, TokenRow
from bellwether.exchange.adapter import peft_config
from bellwether.model import decoder
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.tools.randomness import Randomness

PREFIX = "base_model.model."


class GivenMasks:
    """Dropout masks that depend on module, number of its call, row and position only."""

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.calls: dict[str, int] = {}

    def drawn(self, path: str, inputs: int) -> torch.Tensor:
        """The masks of a module's next call, for more rows and positions than there are."""
        call = self.calls[path] = self.calls.get(path, 0) + 1
        seed = int.from_bytes(hashlib.sha256(f"{path}|{call}".encode()).digest()[:6], "big")
        draw = torch.rand(4, 30, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (draw >= self.probability).double() / (1 - self.probability)


class MaskedDropout(torch.nn.Module):
    """Stands where PEFT has its dropout."""

    def __init__(self, path: str, masks: GivenMasks) -> None:
        super().__init__()
        self.path, self.masks = path, masks
        self.shape: tuple[int, int] = (0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens = self.shape  # OPT has rows and tokens in one axis
        return x * self.masks.drawn(self.path, x.shape[-1])[:rows, :tokens].reshape(x.shape)


class OurMasks:
    """Stands where our own training has its dropout."""

    def __init__(self, given: GivenMasks, row_M: torch.Tensor, position_M: torch.Tensor) -> None:
        self.given, self.row_M, self.position_M = given, row_M, position_M
        self.word_M = row_M

    def __call__(self, path: str, x_MI: torch.Tensor) -> torch.Tensor:
        return self.given.drawn(path, x_MI.shape[1])[self.row_M, self.position_M]

    def at(self, index: torch.Tensor) -> OurMasks:
        return OurMasks(self.given, self.row_M[index], self.position_M[index])


def token_rows(count: int, longest: int = 24) -> list[TokenRow]:
    """Rows of unequal lengths whose prompts are not trained; some have two trained stretches, as chats do."""
    draw = np.random.default_rng(5)
    rows = []
    for number in range(count):
        length = int(draw.integers(5, longest))
        prompt = int(draw.integers(1, length - 2))
        trained_T = np.arange(length) >= prompt
        if number % 5 == 0 and prompt > 3:
            trained_T[1:3] = True
        ids_T = draw.integers(3, 300, length)
        rows.append(TokenRow(ids_T, trained_T, trained_T, prompt, Row("i", "r")))
    return rows


def train_with_peft(architecture, adapter, rows, task, steps, dropout, *, smoothing=0.0, proximal=0.0):
    """The reference: PEFT's modules, full logits, the model's padding, torch's loss, clipping and AdamW."""
    import peft

    settings = peft_config(adapter.config) | {"inference_mode": False, "base_model_name_or_path": None}
    wrapped = peft.get_peft_model(
        tiny_model(architecture, torch.float64), peft.LoraConfig(**settings), autocast_adapter_dtype=False
    ).double()
    peft_tensors = {key: torch.from_numpy(value.copy()) for key, value in adapter.tensors.items()}
    report = peft.set_peft_model_state_dict(wrapped, peft_tensors)
    assert not report.unexpected_keys
    if dropout:
        masks = GivenMasks(dropout)
        for name, module in wrapped.named_modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = MaskedDropout(name.removeprefix(PREFIX), masks)
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.training.learning_rate, weight_decay=task.training.weight_decay)
    # The third round of five: of five parts of the way down, two are behind and three ahead.
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=3 / 5, end_factor=2 / 5, total_iters=len(steps))
    begun = [parameter.detach().clone() for parameter in parameters]
    for step in steps:
        away = sum(((now - then) ** 2).sum() for now, then in zip(parameters, begun, strict=True))
        (proximal / 2 * away).backward()
        collated = [labelled([rows[number] for number in batch]) for batch in step]
        counted = sum(int((labels != -100).sum()) for _, _, labels in collated)
        for ids, attention, labels in collated:
            for module in wrapped.modules():
                if isinstance(module, MaskedDropout):
                    module.shape = tuple(ids.shape)
            logits = wrapped(input_ids=ids, attention_mask=attention).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels[:, 1:], reduction="sum", label_smoothing=smoothing
            )
            (losses / counted).backward()
        torch.nn.utils.clip_grad_norm_(parameters, task.training.clip_norm)
        optimizer.step()
        fall.step()
        optimizer.zero_grad()
    return {key: value.numpy() for key, value in peft.get_peft_model_state_dict(wrapped).items()}


def labelled(rows):
    """Rows padded at the right, as ids, attention and labels."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        values = torch.from_numpy(row.ids_T)
        ids[number, : len(row)], attention[number, : len(row)] = values, 1
        labels[number, : len(row)] = torch.where(torch.from_numpy(row.trained_T), values, -100)
    labels[:, 0] = -100
    return ids, attention, labels


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("architecture", "end_to_end"), [(name, False) for name in ARCHITECTURES] + [(name, True) for name in END_TO_END]
)
def test_local_training_equals_peft_with_adamw(architecture, end_to_end, dropout, monkeypatch):
    base = tiny_base(architecture)
    monkeypatch.setattr(decoder, "fits", lambda model: end_to_end)
    start = random_adapter(base, rank=3, alpha=6.0, dropout=dropout)
    training = recipe.Training(
        local_epochs=2, batch_size=2, accumulation=2, learning_rate=4e-3, weight_decay=0.01, clip_norm=0.5
    )
    task = train_task(start, training, "client-1", round=3, rounds=5, seed=11)
    rows = token_rows(24)
    masks = GivenMasks(dropout)
    given = SimpleNamespace(masks=lambda row_M, position_M: OurMasks(masks, row_M, position_M))
    monkeypatch.setattr(passes, "Dropout", lambda probability, seed_N: given)
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    (reply,) = ask(base, layers, {"client-1": rows}, start, training, round=3, rounds=5, seed=11)
    ours = reply.update.tensors
    layers.detach()

    order = Randomness(11).numpy("batch order", round=3, client="client-1")
    steps = local_steps([len(row) for row in rows], training, order)
    assert len(steps) >= 10
    theirs = train_with_peft(architecture, start, rows, task, steps, dropout)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert np.abs(theirs[key] - start.tensors[key]).max() > 1e-3
        deviation = np.abs((ours[key] - start.tensors[key]) - (theirs[key] - start.tensors[key])).max()
        assert deviation < 1e-10, f"{key}: {deviation}"


def test_the_base_is_not_changed_by_training():
    from bellwether.model.base import weights_fingerprint

    base = tiny_base("llama", torch.float32)
    start = random_adapter(base, dtype="float32", dropout=0.1)
    layers = LoraLayers(base.model, start.config)
    ask(base, layers, {"a": token_rows(8)}, start, recipe.Training(local_steps=3))
    layers.detach()
    assert weights_fingerprint(base.model) == base.fingerprint
    next(base.model.parameters()).view(-1)[0] += 1e-3
    assert weights_fingerprint(base.model) != base.fingerprint


def change_in_training(dtype: str, folder) -> np.ndarray:
    """Train a fixed adapter on fixed rows over a base of some precision; return what changed, as one vector."""
    from bellwether.model.base import load_base

    base = load_base(recipe.Model(path=str(folder), device="cpu", dtype=dtype))
    start = random_adapter(base, dtype="float32")
    layers = LoraLayers(base.model, start.config)
    training = recipe.Training(local_epochs=3, batch_size=4, learning_rate=1e-3, schedule="constant")
    (reply,) = ask(base, layers, {"a": token_rows(24)}, start, training)
    trained = reply.update.tensors
    layers.detach()
    assert all(value.dtype == np.float32 for value in trained.values())
    return np.concatenate([(trained[key] - start.tensors[key]).ravel() for key in sorted(trained)])


def test_training_in_bfloat16_stays_nearer_to_that_in_float32_than_with_an_adapter_in_bfloat16(tmp_path, monkeypatch):
    from tiny_models import tiny_folder

    folder, step = tiny_folder("llama", tmp_path / "model"), StackedAdamW.step
    narrow_P, wide_P = (change_in_training(dtype, folder) for dtype in ("bfloat16", "float32"))

    def step_and_round(optimizer, rates):
        step(optimizer, rates)
        optimizer.values_KP.copy_(optimizer.values_KP.bfloat16())

    monkeypatch.setattr(StackedAdamW, "step", step_and_round)
    rounded_P = change_in_training("bfloat16", folder)
    deviation, rounded = (float(np.linalg.norm(change - wide_P)) for change in (narrow_P, rounded_P))
    # Its steps are smaller than the distance of two such numbers, so an adapter in bfloat16 takes them by chance.
    assert deviation < rounded / 2
    assert deviation > unit(torch.bfloat16) / 4 * np.linalg.norm(wide_P), "the base was in float32"
