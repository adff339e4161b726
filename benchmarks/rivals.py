"""Other ways to train the clients of a round one after another, written afresh with today's libraries.

Each way takes a setting, the model's folder, the clients' rows and rules, and gives a function that trains one round:
every client from the same adapter, one pass over its rows, then the weighted mean of the adapters. That function
returns how its seconds were spent, by phase.

- ``shepherd``: a Hugging Face Trainer per client, batches grouped by length, the adapter saved to disk by the client
  and read by the server (Zhang et al. 2023, arXiv 2305.05644, its release).
- ``openfedllm``: TRL's SFTTrainer per client, the adapter deep-copied (Ye et al. 2024, arXiv 2402.06954, its release).
- ``flowertune``: the model loaded anew for each message, then TRL's SFTTrainer (Flower's FlowerTune baseline).
- ``fedhds``: batches of one row, the model deep-copied for each client, Adam (Qin et al. 2024, arXiv 2410.10926,
  its release).
- ``bare``: nothing but forward, backward and step over the very batches of one of these.
- ``plain``: the same over padded batches as anyone would make them.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from bellwether.model.memory import keep_freed_memory
from benchmarks.clock import Clock
from benchmarks.setting import ALPHA, DROPOUT, LONGEST, RANK, RATE, Setting
from benchmarks.ways import ADAPTERS, BUILDING, DATA, GARBAGE, LOADING, REST, STEP, Rules

if TYPE_CHECKING:
    from bellwether.data.rows import TokenRow
    from benchmarks.setting import Rows

Round = Callable[[], Mapping[str, float]]
State = dict[str, torch.Tensor]
MakeTrainer = Callable[[Any, Any], Any]


def load(folder: Path, dtype: str = "float32") -> Any:
    """Return the frozen model, without a cache of keys and values, which the releases turn off for training."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def with_adapter(model: Any, setting: Setting, dropout: float = DROPOUT) -> Any:
    """Return the model with PEFT's LoRA layers."""
    from peft import LoraConfig, get_peft_model

    targets = list(setting.targets)
    return get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"),
    )


def average(states: Sequence[Mapping[str, torch.Tensor]], sizes: Sequence[int]) -> State:
    """Return the mean of adapters, weighted by rows."""
    whole = sum(sizes)
    return {
        key: sum(state[key] * (size / whole) for state, size in zip(states, sizes, strict=True)) for key in states[0]
    }


def labels(row: TokenRow, responses: bool) -> list[int]:
    """Return a row's labels: all tokens, or those of its response."""
    if not responses:
        return list(map(int, row.ids_T))
    return [int(token) if counted else -100 for token, counted in zip(row.ids_T, row.response_T, strict=True)]


def dataset(rows: Sequence[TokenRow], responses: bool) -> Any:
    """Return rows as a data set of token ids."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"input_ids": row.ids_T.tolist(), "attention_mask": [1] * len(row), "labels": labels(row, responses)}
            for row in rows
        ]
    )


# With a trainer per client ------------------------------------------------------------------------


def shepherd(setting: Setting, folder: Path, clients: Rows, rules: Rules) -> Round:
    """Return a round as Shepherd's release does it."""
    model, place = with_adapter(load(folder, setting.dtype), setting), Path(tempfile.mkdtemp())

    def keep(client: str, state: State) -> Callable[[], State]:
        torch.save(state, place / f"{client}.bin")
        return lambda: torch.load(place / f"{client}.bin", weights_only=True)

    return _rounds(clients, rules, lambda: model, shepherd_trainer(setting, folder, rules), keep)


def openfedllm(setting: Setting, folder: Path, clients: Rows, rules: Rules) -> Round:
    """Return a round as OpenFedLLM's release does it."""
    model = with_adapter(load(folder, setting.dtype), setting)
    return _rounds(clients, rules, lambda: model, trl_trainer(setting, folder, rules), _deep_copied)


def flowertune(setting: Setting, folder: Path, clients: Rows, rules: Rules) -> Round:
    """Return a round as FlowerTune's baseline does it."""
    return _rounds(
        clients,
        rules,
        lambda: with_adapter(load(folder, setting.dtype), setting),
        trl_trainer(setting, folder, rules),
        _deep_copied,
    )


def _deep_copied(client: str, state: State) -> Callable[[], State]:
    copied = copy.deepcopy(state)
    return lambda: copied


def _rounds(
    clients: Rows,
    rules: Rules,
    get_model: Callable[[], Any],
    make_trainer: MakeTrainer,
    keep: Callable[[str, State], Callable[[], State]],
) -> Round:
    """Return a round with a trainer per client, on the model that is got for each of them."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    sets = {client: dataset(rows, rules.responses) for client, rows in clients.items()}
    held = {"adapter": copy.deepcopy(get_peft_model_state_dict(get_model()))}

    def round() -> Mapping[str, float]:
        clock = Clock()
        with clock.during(ADAPTERS):
            kept = []
            for client, data in sets.items():
                with clock.during(LOADING):
                    model = get_model()
                set_peft_model_state_dict(model, held["adapter"])
                _train(clock, make_trainer, model, data)
                kept.append(keep(client, get_peft_model_state_dict(model)))
            held["adapter"] = average([fetch() for fetch in kept], [len(rows) for rows in clients.values()])
        return clock.seconds

    return round


def _train(clock: Clock, make_trainer: MakeTrainer, model: Any, data: Any) -> None:
    """Train a client, with the trainer's own methods timed; each costs two readings of the time a step."""
    with clock.during(BUILDING):
        trainer = make_trainer(model, data)
    trainer.get_train_dataloader = clock.timed(DATA, trainer.get_train_dataloader)
    trainer.get_batch_samples = clock.timed(DATA, trainer.get_batch_samples)
    trainer.training_step = clock.timed(STEP, trainer.training_step)
    with clock.during(REST), mock.patch.object(gc, "collect", clock.timed(GARBAGE, gc.collect)):
        trainer.train()
    # TRL puts a forward of its own around the model's, and the next trainer would put another one around that.
    vars(model.get_base_model()).pop("forward", None)


def shepherd_trainer(setting: Setting, folder: Path, rules: Rules) -> MakeTrainer:
    """Return what makes a trainer with the arguments of Shepherd's release."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    collator = DataCollatorForSeq2Seq(_tokenizer(folder), pad_to_multiple_of=8, return_tensors="pt", padding=True)

    def make(model: Any, data: Any) -> Any:
        arguments = TrainingArguments(**_arguments(setting, rules), optim="adamw_torch", logging_steps=1)
        return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)

    return make


def trl_trainer(setting: Setting, folder: Path, rules: Rules) -> MakeTrainer:
    """Return what makes TRL's trainer with the arguments that OpenFedLLM's and FlowerTune's releases set."""
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    class WithModelsLoss(SFTTrainer):
        """TRL's trainer with the loss that the model computes, as the TRL of the releases had it."""

        compute_loss = Trainer.compute_loss

    tokenizer, kind = _tokenizer(folder), WithModelsLoss if rules.models_loss else SFTTrainer

    def make(model: Any, data: Any) -> Any:
        arguments = SFTConfig(
            **_arguments(setting, rules),
            lr_scheduler_type="constant",
            logging_steps=rules.logging_steps,
            max_length=int(LONGEST * max(1.0, setting.lengths)),
            dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokens already
        )
        return kind(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)

    return make


def _arguments(setting: Setting, rules: Rules) -> dict[str, Any]:
    """Return the trainers' arguments that are alike; what would slow down and no release asks for is off."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": rules.accumulation,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "train_sampling_strategy": "group_by_length" if rules.grouped else "random",
        "gradient_checkpointing": rules.checkpointing,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# Without one --------------------------------------------------------------------------------------


def fedhds(setting: Setting, folder: Path, clients: Rows, rules: Rules) -> Round:
    """Return a round as FedHDS's release trains, on the rows that it is given."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = with_adapter(load(folder, setting.dtype), setting)
    held = {"adapter": get_peft_model_state_dict(model)}

    def round() -> Mapping[str, float]:
        clock = Clock()
        with clock.during(ADAPTERS):
            states = []
            for rows in clients.values():
                with clock.during(LOADING):
                    own = copy.deepcopy(model)
                set_peft_model_state_dict(own, held["adapter"])
                _loop(own, _batches(clock, rows, 1, rules), torch.optim.Adam, clock=clock)
                states.append(get_peft_model_state_dict(own))
            held["adapter"] = average(states, [len(rows) for rows in clients.values()])
        return clock.seconds

    return round


def bare(setting: Setting, folder: Path, clients: Rows, rules: Rules, rival: str, keep_memory: bool = False) -> Round:
    """Return a round of forward, backward and step alone, over batches made before as a rival makes its own.

    Order of rows, padding, loss positions, accumulation and checkpointing are the rival's: what is fed to the model
    is what the rival's own data loader yields. With ``keep_memory`` the C library keeps freed memory, as it does where
    bellwether trains.
    """
    if keep_memory:
        keep_freed_memory()
    makers = {"shepherd": shepherd_trainer, "openfedllm": trl_trainer, "flowertune": trl_trainer}
    if rival in makers:
        other, make = with_adapter(load(folder, setting.dtype), setting), makers[rival](setting, folder, rules)
        batches = {
            client: [dict(batch) for batch in make(other, dataset(rows, rules.responses)).get_train_dataloader()]
            for client, rows in clients.items()
        }
        del other  # the trainer has put a forward of its own around the model's
    else:
        batches = {client: list(_batches(Clock(), rows, setting.batch, rules)) for client, rows in clients.items()}
    model = with_adapter(load(folder, setting.dtype), setting)
    if rules.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()

    def round() -> Mapping[str, float]:
        clock = Clock()
        for some in batches.values():
            _loop(model, some, torch.optim.AdamW, rules.accumulation, clock=clock)
        return clock.seconds

    return round


def plain(setting: Setting, folder: Path, clients: Rows, rules: Rules) -> Round:
    """Return a round of PEFT in a loop of one's own, without any trainer."""
    return bare(setting, folder, clients, rules, "plain")


def _batches(clock: Clock, rows: Sequence[TokenRow], size: int, rules: Rules) -> Iterable[dict[str, torch.Tensor]]:
    """Yield padded batches, rows in their order, or of like length where the rules say so."""
    rows = sorted(rows, key=len, reverse=True) if rules.grouped else rows
    for start in range(0, len(rows), size):
        with clock.during(DATA):
            batch = padded(rows[start : start + size], rules.responses)
        yield batch


def padded(rows: Sequence[TokenRow], responses: bool) -> dict[str, torch.Tensor]:
    """Return rows as a batch, padded at the right to the longest of them."""
    ids_NT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    attention_NT, labels_NT = torch.zeros_like(ids_NT), torch.full_like(ids_NT, -100)
    for number, row in enumerate(rows):
        ids_NT[number, : len(row)] = torch.from_numpy(row.ids_T)
        attention_NT[number, : len(row)] = 1
        labels_NT[number, : len(row)] = torch.tensor(labels(row, responses))
    return {"input_ids": ids_NT, "attention_mask": attention_NT, "labels": labels_NT}


def _loop(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    optimizer_of: Any,
    accumulation: int = 1,
    *,
    clock: Clock,
) -> None:
    """Train on batches."""
    with clock.during(REST):
        model.train()
        optimizer = optimizer_of([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
        number = 0
        for number, batch in enumerate(batches, start=1):
            with clock.during(STEP):
                torch.autograd.backward(model(**batch).loss / accumulation)
            if number % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
        if number % accumulation:
            optimizer.step()
            optimizer.zero_grad()
