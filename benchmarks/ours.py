"""Rounds as bellwether trains them, on the same setting as the other ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bellwether.engine.local import LocalEngine
from bellwether.engine.processes import ProcessEngine, Work, worker_models
from bellwether.exchange.messages import Payload, TrainTask, client_draws
from bellwether.method.average import fedavg
from bellwether.method.method import by_rows, mean_of
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers, initial_adapter
from bellwether.recipe.method import FedAvg
from bellwether.recipe.recipe import Lora, Model, Training
from bellwether.tools.randomness import Randomness
from benchmarks.setting import ALPHA, DROPOUT, RANK, RATE, Setting

if TYPE_CHECKING:
    from benchmarks.setting import Rows


def ours(
    setting: Setting,
    folder: Path,
    clients: Rows,
    together: int = 1,
    tokens: int | None = None,
    processes: int = 1,
) -> Callable[[], None]:
    """Return a round of bellwether, so many clients trained together, so many tokens run through the base at once."""
    model = model_of(setting, folder)
    base = load_base(model)
    held = [initial_adapter(base, lora_of(setting), Randomness(0).torch("adapter of a benchmark")), 0]
    training = training_of(setting)
    randomness = Randomness(0)
    engine: LocalEngine | ProcessEngine
    if processes == 1:
        engine = LocalEngine(
            base, LoraLayers(base.model, held[0].config, slots=together), clients, {}, fedavg(), (), tokens
        )
    else:
        work = Work(held[0].config, together, clients, {}, FedAvg(), (), tokens)
        engine = ProcessEngine(worker_models(model, base.device, processes), work, base.fingerprint)

    def round() -> None:
        held[1] += 1
        tasks = {
            client: TrainTask(held[1], Payload(held[0]), training, held[1], client_draws(randomness, held[1], client))
            for client in clients
        }
        updates = [reply.update for reply in engine.ask(tasks)]
        held[0] = held[0].updated(mean_of(updates, by_rows).tensors)

    return round


def model_of(setting: Setting, folder: Path) -> Model:
    """Return how a recipe names the setting's base model."""
    quantization = {"quantization": setting.quantization} if setting.quantization else {}
    return Model(path=str(folder), device=setting.device, dtype=setting.dtype, threads=setting.threads, **quantization)


def lora_of(setting: Setting) -> Lora:
    """Return how a recipe names the setting's adapter."""
    return Lora(rank=RANK, alpha=ALPHA, dropout=DROPOUT, target_modules=setting.targets)


def training_of(setting: Setting) -> Training:
    """Return how a recipe names what the setting's clients do."""
    return Training(batch_size=setting.batch, learning_rate=RATE, schedule="constant")
