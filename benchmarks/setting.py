"""What every way of training is measured on: a model with random weights, and clients with made-up rows.

Rows are token ids, so that no way pays for reading or tokenising text. Their lengths follow those of instruction
data: prompts of about 60 tokens and responses of about 60, both log-normal, together at most 512.

Shape legend: T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bellwether.data.rows import Row, TokenRow
from bellwether.randomness import Randomness

LONGEST = 512


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        hidden: width of the model; heads are of 32, the feed-forward layer 3 times as wide.
        layers: of the model.
        vocabulary: tokens.
        clients: in a round.
        rows: per client.
        targets: names of the adapted modules.
        batch: rows of a batch at a client.
        threads: CPU threads.
    """

    hidden: int = 128
    layers: int = 4
    vocabulary: int = 4096
    clients: int = 10
    rows: int = 50
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    batch: int = 8
    threads: int = 2


def make_model(setting: Setting, folder: Path) -> Path:
    """Write a Llama with random weights and a tokenizer that nobody uses, and return its folder."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.hidden // 32,
        num_key_value_heads=setting.hidden // 32,
        max_position_embeddings=LONGEST,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    generator = Randomness(0).torch("weights of a benchmark")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.02, generator=generator)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, setting.vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    return folder


def make_clients(setting: Setting) -> dict[str, list[TokenRow]]:
    """Return the token rows of every client."""
    clients = {}
    for number in range(setting.clients):
        client = f"client-{number:03}"
        generator = Randomness(0).numpy("rows of a benchmark", client=client)
        clients[client] = [_row(generator, setting.vocabulary) for _ in range(setting.rows)]
    return clients


def _row(generator: np.random.Generator, vocabulary: int) -> TokenRow:
    prompt, response = (int(np.clip(generator.lognormal(np.log(60), 0.6), 8, LONGEST // 2)) for _ in range(2))
    ids_T = generator.integers(3, vocabulary, prompt + response)
    response_T = np.arange(prompt + response) >= prompt
    return TokenRow(ids_T, response_T, response_T, prompt, Row("", ""))
