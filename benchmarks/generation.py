"""Answers of a real model: bellwether's batches beside transformers' ``generate``, one prompt at a time.

    python -m benchmarks.generation --model gemma --data databricks-dolly-15k.jsonl
    python -m benchmarks.generation --tiny       the same code on a tiny Gemma with random weights

``--model`` is a folder in Hugging Face format. Prompts are those of a data file's rows, as long as the data's are; each
is answered greedily, in a process of its own for each way, the first prompt once before the clock starts. It prints a
table and writes it to ``benchmarks/results/generation.json``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gemma import model_and_rows
from benchmarks.machine import describe
from benchmarks.setting import read_rows
from benchmarks.worker import fresh, peak_memory

OURS, PLAIN, STATIC = "bellwether, batches", "generate, one by one", "generate, one by one, static cache"
Prompts = Sequence[Sequence[int]]
Answers = list[list[int]]


def answer(way: str, folder: Path, rows: Path, new: int, batch: int, dtype: str, threads: int) -> dict[str, Any]:
    """Return the seconds that answers to all prompts took in a way, the answers, and the peak of memory."""
    prompts = [row.ids_T[: row.prompt_length].tolist() for row in read_rows(rows)]
    make = {OURS: _ours, PLAIN: _transformers, STATIC: _static}[way]
    run = make(folder, new, batch, dtype, threads)
    run(prompts[:1])
    begun = time.perf_counter()
    answers = run(prompts)
    return {"seconds": time.perf_counter() - begun, "answers": answers, "peak": peak_memory()}


def _ours(folder: Path, new: int, batch: int, dtype: str, threads: int) -> Callable[[Prompts], Answers]:
    from bellwether.model.base import load_base
    from bellwether.model.generate import generate
    from bellwether.recipe import recipe

    settings = recipe.Model(path=str(folder), device="cpu", dtype=dtype, threads=threads)
    base = replace(load_base(settings), stop_ids=())
    return lambda prompts: generate(base, prompts, new, batch)


def _transformers(
    folder: Path, new: int, batch: int, dtype: str, threads: int, cache: str | None = None
) -> Callable[[Prompts], Answers]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"cache_implementation": cache} if cache else {}

    def run(prompts: Prompts) -> Answers:
        found = [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :] for prompt in prompts]
        return [ids.tolist() for ids in found]

    return run


def _static(folder: Path, new: int, batch: int, dtype: str, threads: int) -> Callable[[Prompts], Answers]:
    return _transformers(folder, new, batch, dtype, threads, "static")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description="Time a real model's answers.")
    parser.add_argument("--model", type=Path, help="a model's folder")
    parser.add_argument("--data", type=Path, help="a file of instructions and responses")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: the same code, no measurement")
    parser.add_argument("--rows", type=int, default=32, help="prompts")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer, which ends at none before")
    parser.add_argument("--batch", type=int, default=32, help="prompts that bellwether answers together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None, help="folder; else benchmarks/results, and none with --tiny")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder, rows = model_and_rows(parser, given, Path(place))
        settings = rows, given.new, given.batch, given.dtype, given.threads
        found = {way: fresh(way, answer, way, folder, *settings) for way in (OURS, PLAIN, STATIC)}
    wanted = found[PLAIN]["answers"]
    for one in found.values():
        answers = one.pop("answers")
        one["tokens"] = sum(map(len, answers))
        one["equal"] = sum(ours == theirs for ours, theirs in zip(answers, wanted, strict=True))
    measured = describe(given.tiny) | {
        "model": "tiny" if given.tiny else given.model.name,
        "prompts": len(wanted),
        "new": given.new,
        "batch": given.batch,
        "dtype": given.dtype,
        "threads": given.threads,
        "ways": found,
    }
    print(report.generation(measured))
    if given.out or not given.tiny:
        report.write(given.out or report.RESULTS, "generation", measured)


if __name__ == "__main__":
    main()
