"""Ways to train the clients of a round one after another, as other systems do, written afresh with today's libraries.

Each way takes a setting, the model's folder and the clients' rows, and gives a function that trains one round:
every client from the same adapter, one pass over its rows, then the weighted mean of the adapters.

- ``shepherd``: a Hugging Face Trainer per client, batches grouped by length, loss on all tokens, the adapter
  saved to disk by the client and read by the server (Zhang et al. 2023, arXiv 2305.05644, its release).
- ``openfedllm``: TRL's SFTTrainer per client, rows in random order, loss on responses (Ye et al. 2024, arXiv
  2402.06954, its release).
- ``fedhds``: batches of one row, the model deep-copied for each client, Adam (Qin et al. 2024, arXiv 2410.10926,
  its release).
- ``flowertune``: the model loaded anew for each message, then TRL's SFTTrainer (Flower's FlowerTune baseline).
- ``bare``: nothing but forward, backward and step over padded batches; what a way at this batch size could reach.

With ``equal`` all ways take the loss on responses only, and batches grouped by length where they have more than a row.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bellwether.data.rows import TokenRow
from benchmarks.setting import Setting

Rows = Mapping[str, Sequence[TokenRow]]
Round = Callable[[], None]
RATE = 3e-4


def load(folder: Path) -> Any:
    """Return the frozen model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.requires_grad_(False)
    return model


def with_adapter(model: Any, setting: Setting, targets: Sequence[str] | None = None) -> Any:
    """Return the model with PEFT's LoRA layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=list(targets or setting.targets), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def average(states: Sequence[Mapping[str, torch.Tensor]], sizes: Sequence[int]) -> dict[str, torch.Tensor]:
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


def shepherd(setting: Setting, folder: Path, clients: Rows, equal: bool) -> Round:
    """Return a round as Shepherd's release does it."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = with_adapter(load(folder), setting)
    tokenizer = _tokenizer(folder)
    sets = {client: dataset(rows, equal) for client, rows in clients.items()}
    place = tempfile.mkdtemp()
    held = {"adapter": _copied(get_peft_model_state_dict(model))}

    def round() -> None:
        for client, data in sets.items():
            set_peft_model_state_dict(model, held["adapter"])
            arguments = TrainingArguments(
                output_dir=place,
                per_device_train_batch_size=setting.batch,
                num_train_epochs=1,
                learning_rate=RATE,
                train_sampling_strategy="group_by_length",
                optim="adamw_torch",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True)
            Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
            torch.save(get_peft_model_state_dict(model), Path(place) / f"{client}.bin")
        states = [torch.load(Path(place) / f"{client}.bin", weights_only=True) for client in sets]
        held["adapter"] = average(states, [len(rows) for rows in clients.values()])

    return round


def openfedllm(setting: Setting, folder: Path, clients: Rows, equal: bool) -> Round:
    """Return a round as OpenFedLLM's release does it."""
    model = with_adapter(load(folder), setting)
    return _with_trl(setting, folder, clients, equal, lambda: model)


def flowertune(setting: Setting, folder: Path, clients: Rows, equal: bool) -> Round:
    """Return a round as FlowerTune's baseline does it."""
    return _with_trl(setting, folder, clients, equal, lambda: with_adapter(load(folder), setting))


def _with_trl(setting: Setting, folder: Path, clients: Rows, equal: bool, get_model: Callable[[], Any]) -> Round:
    """Return a round with TRL's trainer per client, on the model that is got for each of them."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    sets = {client: dataset(rows, True) for client, rows in clients.items()}
    held = {"adapter": _copied(get_peft_model_state_dict(get_model()))}

    def round() -> None:
        states = []
        for data in sets.values():
            model = get_model()
            set_peft_model_state_dict(model, held["adapter"])
            _fine_tune(model, setting, folder, data, equal)
            states.append(_copied(get_peft_model_state_dict(model)))
        held["adapter"] = average(states, [len(rows) for rows in clients.values()])

    return round


def _copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}


def _fine_tune(model: Any, setting: Setting, folder: Path, data: Any, equal: bool) -> None:
    """Train with TRL's trainer."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=setting.batch,
        num_train_epochs=1,
        learning_rate=RATE,
        train_sampling_strategy="group_by_length" if equal else "random",
        max_length=512,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=_tokenizer(folder)).train()


def fedhds(setting: Setting, folder: Path, clients: Rows, equal: bool) -> Round:
    """Return a round as FedHDS's release trains, on the rows that it is given."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = with_adapter(load(folder), setting)
    held = {"adapter": get_peft_model_state_dict(model)}

    def round() -> None:
        states = []
        for rows in clients.values():
            own = copy.deepcopy(model)
            set_peft_model_state_dict(own, held["adapter"])
            _loop(own, [[row] for row in rows], torch.optim.Adam)
            states.append(get_peft_model_state_dict(own))
        held["adapter"] = average(states, [len(rows) for rows in clients.values()])

    return round


def bare(setting: Setting, folder: Path, clients: Rows, equal: bool) -> Round:
    """Return a round with nothing but forward, backward and step."""
    model = with_adapter(load(folder), setting)
    batches = {
        client: [list(rows[start : start + setting.batch]) for start in range(0, len(rows), setting.batch)]
        for client, rows in (
            (client, sorted(rows, key=len) if equal else list(rows)) for client, rows in clients.items()
        )
    }

    def round() -> None:
        for some in batches.values():
            _loop(model, some, torch.optim.AdamW)

    return round


def _loop(model: Any, batches: Sequence[Sequence[TokenRow]], optimizer_of: Any) -> None:
    """Train on batches, with the loss on responses."""
    model.train()
    optimizer = optimizer_of([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
    for batch in batches:
        longest = max(map(len, batch))
        ids_NT = torch.zeros(len(batch), longest, dtype=torch.int64)
        attention_NT, labels_NT = torch.zeros_like(ids_NT), torch.full_like(ids_NT, -100)
        for number, row in enumerate(batch):
            ids_NT[number, : len(row)] = torch.from_numpy(row.ids_T)
            attention_NT[number, : len(row)] = 1
            labels_NT[number, : len(row)] = torch.tensor(labels(row, True))
        loss = model(input_ids=ids_NT, attention_mask=attention_NT, labels=labels_NT).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
