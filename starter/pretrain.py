"""Make the embedded base model from the world's prose alone.

    python -m starter.pretrain --out FOLDER [--tokens N] [--seed S] [--threads N]

Started again with the same folder, it goes on where it was stopped and ends with the same weights. The folder
becomes a plain Hugging Face model folder with a card (README.md) and the probes over tokens (probes.jsonl).
Its checkpoint, pretraining.pt, is no part of the model and is not shipped.

Shape legend: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bellwether.errors import CheckpointError
from bellwether.tools.randomness import Randomness
from starter.card import card
from starter.heads import seed_lookup
from starter.phrasings import instruction_words
from starter.probes import make_probes, run_probes
from starter.prose import Writer, lowland_dictionary, world_words
from starter.tokenizer import POSITIONS, Encoder, build_tokenizer
from starter.world import SHIPPED_SEED, World, dice, make_world

CHECKPOINT = "pretraining.pt"


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides the weights.

    Args:
        seed: of the world, the weights and the prose.
        tokens: how many are read in all.
        rows: rows of a batch.
        length: tokens of a row.
        learning_rate: peak of AdamW's step size; rises over ``warmup`` steps, falls by a cosine to a fiftieth.
        warmup: steps.
        weight_decay: AdamW's, on matrices.
        low: loss weight of what cannot be predicted.
        hidden, layers, heads, mlp: sizes of the model.
        rope_theta: base of the rotary frequencies.
        bfloat16: whether to compute in bf16 (weights and optimizer stay in fp32).
        seeded_heads: whether the first two layers start with heads that look things up (``heads.py``).
        probe_every: steps between probes and checkpoints.
    """

    seed: int = SHIPPED_SEED
    tokens: int = 8_000_000
    rows: int = 16
    length: int = 192
    learning_rate: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.01
    low: float = 0.2
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    rope_theta: float = 1000.0
    bfloat16: bool = True
    seeded_heads: bool = True
    probe_every: int = 250

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return max(1, self.tokens // (self.rows * self.length))


def pretrain(settings: Pretraining, folder: Path) -> dict[str, float]:
    """Pretrain a base, or go on where it was stopped, and write it; return its last probes.

    Args:
        settings: what decides the weights.
        folder: where model, tokenizer, card, probes and checkpoint go.

    Raises:
        CheckpointError: the folder holds a checkpoint of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer, encoder = make_prose(make_world(settings.seed))
    model = make_model(settings, encoder)
    optimizer = make_optimizer(settings, model)
    done, seconds, log = _restore(settings, folder, model, optimizer)
    probes = make_probes(make_world(settings.seed))
    while done < settings.steps:
        start, first = time.perf_counter(), done
        losses = []
        while done < settings.steps and (done == first or done % settings.probe_every):
            losses.append(train_step(settings, model, optimizer, writer, encoder, done))
            done += 1
        seconds += time.perf_counter() - start
        shares = run_probes(model, encoder, probes)
        log.append({"tokens": done * settings.rows * settings.length, "loss": sum(losses) / len(losses), **shares})
        _report(log[-1], seconds)
        _save_checkpoint(settings, folder, model, optimizer, {"done": done, "seconds": seconds, "log": log})
    return _write_base(settings, folder, model, encoder, seconds, log)


def make_prose(world: World) -> tuple[Writer, Encoder]:
    """Return the writer of a world's prose in both languages and the encoder of its words.

    The words of the instructions are named in roll calls, so that no token that a prompt holds is unread;
    the prose never shows how they are used.
    """
    extra = sorted(instruction_words())
    dictionary = lowland_dictionary(world)
    words = world_words(Writer(world, extra)) | set(dictionary.values())
    return Writer(world, extra, dictionary), Encoder(build_tokenizer(words))


def make_model(settings: Pretraining, encoder: Encoder) -> Any:
    """Return a freshly initialised model in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=encoder.bos,
        eos_token_id=encoder.eos,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )
    generator = Randomness(settings.seed).torch("starter weights")
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # a sixth faster than SDPA at this size on a CPU
    _initialise(model, generator)
    if settings.seeded_heads:
        seed_lookup(model, generator)
    return model


def make_optimizer(settings: Pretraining, model: Any) -> torch.optim.Optimizer:
    """Return AdamW with decay on matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def make_batch(settings: Pretraining, writer: Writer, encoder: Encoder, step: int) -> tuple[Tensor, Tensor]:
    """Return the tokens and loss weights of a step, which belong to (seed, step) alone.

    Returns:
        ids_BT and weights_BT, where T is one more than the length of a row.
    """
    rng = dice(settings.seed, "prose", step)
    progress, length = step / settings.steps, settings.length + 1
    ids_rows, weight_rows = [], []
    for _ in range(settings.rows):
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            more_ids, more_weights = encoder.document(writer.document(rng, progress), settings.low, 1.0)
            ids += more_ids
            weights += more_weights
        ids_rows.append(ids[:length])
        weight_rows.append(weights[:length])
    return torch.tensor(ids_rows), torch.tensor(weight_rows)


def train_step(
    settings: Pretraining, model: Any, optimizer: torch.optim.Optimizer, writer: Writer, encoder: Encoder, step: int
) -> float:
    """Take one optimizer step and return its weighted loss, in nats per token."""
    ids_BT, weights_BT = make_batch(settings, writer, encoder, step)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * _schedule(settings, step)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
        logits_BTV = model(ids_BT[:, :-1], use_cache=False).logits
    losses_N = torch.nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
    )
    weights_N = weights_BT[:, 1:].flatten()
    loss = (losses_N * weights_N).sum() / weights_N.sum()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def weights_hash(path: Path) -> str:
    """Return the SHA-256 of a weights file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _schedule(settings: Pretraining, step: int) -> float:
    """Return the share of the peak learning rate at a step."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    part = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part))


def _initialise(model: Any, generator: torch.Generator) -> None:
    """Draw all matrices from our own generator, since transformers draws from the global one."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.02, generator=generator)


def _settings_that_decide(settings: Pretraining) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name != "probe_every"}


def _restore(
    settings: Pretraining, folder: Path, model: Any, optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[dict[str, float]]]:
    """Load the checkpoint of a folder, if there is one; return steps done, seconds and the log."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, 0.0, []
    held = torch.load(path, weights_only=True)
    if held["settings"] != _settings_that_decide(settings):
        raise CheckpointError(
            f"{path} was written with other settings ({held['settings']}): "
            "use another folder, or delete the checkpoint to begin again."
        )
    model.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    return held["done"], held["seconds"], held["log"]


def _save_checkpoint(
    settings: Pretraining, folder: Path, model: Any, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Write the checkpoint beside the old one and put it in its place at once."""
    unfinished = folder / f"{CHECKPOINT}.unfinished"
    held = {"settings": _settings_that_decide(settings), "model": model.state_dict()}
    torch.save({**held, "optimizer": optimizer.state_dict(), **progress}, unfinished)
    os.replace(unfinished, folder / CHECKPOINT)


def _write_base(
    settings: Pretraining, folder: Path, model: Any, encoder: Encoder, seconds: float, log: list[dict[str, float]]
) -> dict[str, float]:
    """Write model, tokenizer, probes and card; return the probes of what was written."""
    model.to(torch.bfloat16).save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # transformers leaves it readable to its owner only
    # Probed as it is shipped: rounded to bf16, computed in fp32.
    shares = run_probes(model.float(), encoder, make_probes(make_world(settings.seed)))
    (folder / "probes.jsonl").write_text("".join(json.dumps(_rounded(line)) + "\n" for line in log))
    parameters = sum(weight.numel() for weight in model.parameters())
    facts = {
        "parameters": parameters,
        "vocabulary": len(encoder.tokenizer),
        "steps": settings.steps,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "weights_sha256": weights_hash(folder / "model.safetensors"),
        "probes": _rounded(shares),
    }
    (folder / "README.md").write_text(card(asdict(settings), facts))
    return shares


def _rounded(line: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in line.items()}


def _report(line: Mapping[str, float], seconds: float) -> None:
    shares = "  ".join(f"{name} {value:.2f}" for name, value in line.items() if name not in ("tokens", "loss"))
    print(f"{line['tokens'] / 1e6:6.2f} M tokens  {seconds:5.0f} s  loss {line['loss']:.3f}  {shares}", flush=True)


def settings_of(words: Sequence[str] | None = None) -> tuple[Pretraining, Path, int]:
    """Return what a command line asks for: settings, folder and threads; None reads the process's own."""
    defaults = Pretraining()
    parser = argparse.ArgumentParser(description="Pretrain the embedded base from the world's prose.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="tokens read in all")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of world, weights and prose")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number changes the last bits")
    parser.add_argument("--ordinary-start", action="store_true", help="start the first heads at random, too")
    parser.add_argument("--probe-every", type=int, default=defaults.probe_every, help="steps between checkpoints")
    given = parser.parse_args(words)
    settings = Pretraining(
        seed=given.seed, tokens=given.tokens, seeded_heads=not given.ordinary_start, probe_every=given.probe_every
    )
    return settings, given.out, given.threads


def main() -> None:
    """Run the command."""
    settings, folder, threads = settings_of()
    torch.set_num_threads(threads)
    pretrain(settings, folder)


if __name__ == "__main__":
    main()
