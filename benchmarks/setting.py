"""What every way of training is measured on: a model with random weights, and clients with made-up rows.

Rows are token ids, so that no way pays for reading or tokenising text. Their lengths follow those of instruction
data: prompts of about 60 tokens and responses of about 60, both log-normal, together at most 512. Or both are real:
a model's folder that is there, and rows from a file (``benchmarks.gemma``).

Nothing heavy is imported here at the top, since each process times its imports.

Shape legend: T tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bellwether.data.rows import TokenRow

    Rows = Mapping[str, Sequence[TokenRow]]

LONGEST = 512
RANK, ALPHA, DROPOUT = 8, 16, 0.05
RATE = 3e-4


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        hidden: width of the model.
        layers: of the model.
        vocabulary: tokens.
        clients: in a round.
        rows: per client.
        targets: names of the adapted modules.
        batch: rows of a batch at a client.
        threads: CPU threads.
        lengths: factor on the lengths of rows, and on the longest.
        heads: of attention; None takes one per 32 of the width.
        kv_heads: of keys and values; None takes as many as heads.
        head: size of a head; None takes the width over the heads.
        feed_forward: width of the feed-forward layer; None takes 3 times that of the model.
        dtype: precision of the frozen weights, float32 or bfloat16.
        device: cpu or cuda.
        quantization: of the frozen weights, such as 4bit; None for none.
        file: of rows for a single client, as ``write_rows`` writes it; None makes them up.
    """

    hidden: int = 128
    layers: int = 4
    vocabulary: int = 4096
    clients: int = 10
    rows: int = 50
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    batch: int = 8
    threads: int = 2
    lengths: float = 1.0
    heads: int | None = None
    kv_heads: int | None = None
    head: int | None = None
    feed_forward: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    quantization: str | None = None
    file: str | None = None

    @property
    def attention(self) -> int:
        """Heads of attention times their size."""
        heads = self.heads or self.hidden // 32
        return heads * (self.head or self.hidden // heads)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear modules of a layer, in the order in which they are run."""
        heads = self.heads or self.hidden // 32
        kv = self.attention // heads * (self.kv_heads or heads)
        wide = self.feed_forward or 3 * self.hidden
        return {
            "q_proj": (self.hidden, self.attention),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (self.attention, self.hidden),
            "gate_proj": (self.hidden, wide),
            "up_proj": (self.hidden, wide),
            "down_proj": (wide, self.hidden),
        }


TINY = Setting(hidden=32, layers=2, vocabulary=64, clients=2, rows=3, batch=2, threads=1, lengths=0.2)


def make_model(setting: Setting, folder: Path) -> Path:
    """Write a Llama with random weights and a tokenizer that nobody uses, and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bellwether.tools.randomness import Randomness

    heads = setting.heads or setting.hidden // 32
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.linears["up_proj"][1],
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=setting.kv_heads or heads,
        head_dim=setting.attention // heads,
        max_position_embeddings=_longest(setting),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype=setting.dtype,
    )
    with torch.device("meta"):  # a large model is not drawn twice
        model = LlamaForCausalLM(config).to(getattr(torch, setting.dtype))
    model.to_empty(device="cpu")
    generator = Randomness(0).torch("weights of a benchmark")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.02, generator=generator)
            else:
                weight.fill_(1.0)
    model.save_pretrained(folder)
    write_tokenizer(setting.vocabulary, folder)
    return folder


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write a tokenizer of words w3, w4, and so on."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )


def make_clients(setting: Setting) -> dict[str, list[TokenRow]]:
    """Return the token rows of every client."""
    from bellwether.tools.randomness import Randomness

    if setting.file:
        return {"client-000": read_rows(Path(setting.file))}
    clients = {}
    for number in range(setting.clients):
        client = f"client-{number:03}"
        generator = Randomness(0).numpy("rows of a benchmark", client=client)
        clients[client] = [_row(generator, setting) for _ in range(setting.rows)]
    return clients


def write_rows(rows: Sequence[TokenRow], path: Path) -> None:
    """Write the tokens of rows to a JSON file, each row's ids and how many of them are its prompt's."""
    path.write_text(json.dumps([[row.ids_T.tolist(), row.prompt_length] for row in rows]))


def read_rows(path: Path) -> list[TokenRow]:
    """Return the rows of a file that ``write_rows`` wrote."""
    import numpy as np

    return [_made_of(np.array(ids), prompt) for ids, prompt in json.loads(path.read_text())]


def _longest(setting: Setting) -> int:
    """Return the tokens that a row may have."""
    return int(LONGEST * max(1.0, setting.lengths))


def _row(generator: np.random.Generator, setting: Setting) -> TokenRow:
    import numpy as np

    middle, most = np.log(60 * setting.lengths), _longest(setting) // 2
    prompt, response = (int(np.clip(generator.lognormal(middle, 0.6), 8, most)) for _ in range(2))
    return _made_of(generator.integers(3, setting.vocabulary, prompt + response), prompt)


def _made_of(ids_T: NDArray[np.int64], prompt: int) -> TokenRow:
    import numpy as np

    from bellwether.data.rows import Row, TokenRow

    response_T = np.arange(len(ids_T)) >= prompt
    return TokenRow(ids_T, response_T, response_T, prompt, Row("", ""))
