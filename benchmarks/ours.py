"""Rounds as bellwether trains them, on the same setting as the other ways."""

from __future__ import annotations

from pathlib import Path

from bellwether.aggregate.average import make_aggregate
from bellwether.client.train import train_cohort
from bellwether.messages import TrainTask
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.randomness import Randomness
from bellwether.recipe import Lora, Model, Training
from benchmarks.setting import Setting
from benchmarks.ways import RATE, Round, Rows


def ours(setting: Setting, folder: Path, clients: Rows, together: int = 1, tokens: int | None = None) -> Round:
    """Return a round of bellwether, so many clients trained together, so many tokens run through the base at once."""
    base = load_base(Model(path=str(folder), device="cpu", threads=setting.threads))
    lora = Lora(rank=8, alpha=16, dropout=0.05, target_modules=setting.targets)
    held = [initial_adapter(base, lora, Randomness(0).torch("adapter of a benchmark")), 0]
    layers = LoraLayers(base.model, held[0].config, slots=together)
    training = Training(batch_size=setting.batch, learning_rate=RATE, schedule="constant")
    fedavg = make_aggregate("fedavg")

    def round() -> None:
        held[1] += 1
        task = TrainTask(held[1], held[0], training, held[1], 0)
        updates = [reply.update for reply in train_cohort(base, layers, clients, task, tokens)]
        held[0], _ = fedavg(updates, held[0], {})

    return round
