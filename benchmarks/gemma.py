"""Rounds on Gemma 3 270M, a real model with 262,144 tokens, beside a plain PEFT loop and Shepherd's way.

    python -m benchmarks.gemma --model gemma --data databricks-dolly-15k.jsonl
    python -m benchmarks.gemma --tiny       the same code on a tiny Gemma with random weights

``--model`` is a folder in Hugging Face format, of any model that bellwether runs end to end. One client has eight rows
of at most 512 tokens, as long as the data's are, and trains them in batches of four, in float32 and in bfloat16. It
prints a table and writes it to ``benchmarks/results/gemma.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.machine import describe
from benchmarks.rounds import floor_operations, time_ways
from benchmarks.setting import LONGEST, TINY, Setting, make_clients, write_rows
from benchmarks.ways import Rules, Way
from benchmarks.worker import fresh

DTYPES = ("float32", "bfloat16")
OURS, PLAIN, SHEPHERD, RATE = "bellwether", "plain PEFT loop", "Shepherd's way", "matrix rate"
MADE_UP = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 64,
}


def ways(dtypes: Sequence[str] = DTYPES) -> dict[str, Way]:
    """Return the rows of the table, by name and precision, and those that measure the matrix rate.

    The plain loop takes the loss on responses only and rows of like length together, as bellwether does; Shepherd's is
    as its release has it, but for the rows of a batch.
    """
    released = Rules(responses=False, accumulation=8, logging_steps=1)
    rows = {
        OURS: Way("benchmarks.ours:ours"),
        PLAIN: Way("benchmarks.rivals:plain", Rules()),
        SHEPHERD: Way("benchmarks.rivals:shepherd", released),
        RATE: Way("benchmarks.gpu:rate"),
    }
    return {named(name, dtype): replace(way, change={"dtype": dtype}) for dtype in dtypes for name, way in rows.items()}


def named(name: str, dtype: str) -> str:
    """Return the name of a way's row in a precision."""
    return f"{name}, {dtype}"


def measure(setting: Setting, folder: Path, dtypes: Sequence[str], repeats: int) -> dict[str, Any]:
    """Return what was measured, as plain values for a JSON file."""
    rows = time_ways(setting, folder, ways(dtypes), repeats)
    rates = {dtype: rows.pop(named(RATE, dtype))["phases"] for dtype in dtypes}
    (client,) = make_clients(setting).values()
    return {
        "model": folder.name,
        "setting": asdict(replace(setting, file=None)),
        "repeats": repeats,
        "tokens": sum(map(len, client)),
        "answers": sum(int(row.response_T[1:].sum()) for row in client),
        "operations": fresh("the floor", floor_operations, setting),
        "rates": {dtype: max(turn["rate"] for turn in turns) for dtype, turns in rates.items()},
        "ways": rows,
    }


def setting_of(folder: Path, file: Path, rows: int, threads: int) -> Setting:
    """Return the setting of a model's folder, as its configuration has it, and of a file of so many rows."""
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    return Setting(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        clients=1,
        rows=rows,
        batch=4,
        threads=threads,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head=config.get("head_dim"),
        feed_forward=config["intermediate_size"],
        file=str(file),
    )


def draw_rows(folder: Path, data: Path, count: int, path: Path) -> None:
    """Write so many rows of a data file that are as long as its rows are, as bellwether makes tokens of them.

    Of 100 times as many drawn rows, those below 512 tokens are put in the order of their lengths and divided equally;
    the one in the middle of each part is taken.
    """
    from transformers import AutoTokenizer

    from bellwether.data.prompts import resolve_template
    from bellwether.data.sources import read_rows
    from bellwether.data.tokens import tokenise
    from bellwether.recipe import recipe
    from bellwether.tools.randomness import Randomness

    settings, tokenizer = recipe.Data(max_tokens=LONGEST), AutoTokenizer.from_pretrained(folder)
    everything, _ = read_rows([str(data)], settings)
    order = Randomness(0).numpy("rows of a benchmark").permutation(len(everything))[: 100 * count]
    made = tokenise([everything[row] for row in order], tokenizer, settings, resolve_template(settings, tokenizer))
    fitting = sorted((row for row in made.rows if len(row) < LONGEST), key=len)
    write_rows([fitting[(2 * number + 1) * len(fitting) // (2 * count)] for number in range(count)], path)


def make_tiny(folder: Path) -> None:
    """Write a tiny Gemma 3 with random weights, a tokenizer that nobody uses, and rows."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from benchmarks.setting import write_tokenizer

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    Gemma3ForCausalLM(Gemma3TextConfig(**MADE_UP, **ids)).save_pretrained(folder)
    write_tokenizer(MADE_UP["vocab_size"], folder)
    (rows,) = make_clients(replace(TINY, clients=1, rows=8)).values()
    write_rows(rows, folder / "rows.json")


def model_and_rows(parser: argparse.ArgumentParser, given: argparse.Namespace, place: Path) -> tuple[Path, Path]:
    """Return the folder of the model that a command names, or of a tiny one made in a place, and a file of rows."""
    if given.tiny:
        fresh("the model", make_tiny, place)
        return place, place / "rows.json"
    if not (given.model and given.data):
        parser.error("give a model's folder and a data file: --model gemma --data databricks-dolly-15k.jsonl")
    fresh("the rows", draw_rows, given.model, given.data, given.rows, place / "rows")
    return given.model, place / "rows"


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemma", description="Time rounds on a real model.")
    parser.add_argument("--model", type=Path, help="a model's folder")
    parser.add_argument("--data", type=Path, help="a file of instructions and responses")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: the same code, no measurement")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of each way")
    parser.add_argument("--out", type=Path, default=None, help="folder; else benchmarks/results, and none with --tiny")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder, rows = model_and_rows(parser, given, Path(place))
        setting = setting_of(folder, rows, given.rows, given.threads)
        measured = describe(given.tiny) | measure(setting, folder, given.dtypes, given.repeats)
    print(report.gemma(measured))
    if given.out or not given.tiny:
        report.write(given.out or report.RESULTS, "gemma", measured)


if __name__ == "__main__":
    main()
