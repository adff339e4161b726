"""Rounds of a 1B-class Llama with random weights on a GPU: clients together against one by one, and a 4-bit base.

    python -m benchmarks.gpu                        on a machine with a CUDA device; some minutes on an H200
    python -m benchmarks.gpu --device cpu --tiny    the same code on a tiny model, without the 4-bit base

It prints a table and writes it to ``benchmarks/results/gpu.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellwether.recipe.recipe import Engine
from benchmarks import report
from benchmarks.machine import describe
from benchmarks.rounds import floor_operations, time_ways
from benchmarks.setting import TINY, Setting, make_clients, make_model
from benchmarks.ways import BATCH_ONE, RATES, Way
from benchmarks.worker import fresh

if TYPE_CHECKING:
    from benchmarks.setting import Rows

BILLION = Setting(
    hidden=2048,
    layers=16,
    vocabulary=32_000,
    clients=16,
    rows=16,
    lengths=1.05,
    heads=32,
    kv_heads=8,
    feed_forward=8192,
    dtype="bfloat16",
    device="cuda",
)
FOUR_BIT = "together, batch 8, 4-bit base"
MANY = 16_384  # tokens at once, beside as many as a recipe takes where it does not say


def ways() -> dict[str, Way]:
    """Return the rows of the table."""
    make, together = "benchmarks.gpu:trained", {"tokens": Engine().tokens}
    return {
        "one by one, batch 1": Way(make, change=BATCH_ONE),
        "together, batch 1": Way(make, options=together, change=BATCH_ONE),
        "one by one, batch 8": Way(make),
        "together, batch 8": Way(make, options=together),
        f"together, batch 8, {MANY:,} tokens": Way(make, options={"tokens": MANY}),
    }


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Return what was measured, as plain values for a JSON file; a 4-bit base that fails is said, not raised."""
    with tempfile.TemporaryDirectory() as place:
        folder = fresh("the model", make_model, setting, Path(place))
        rates = {RATES: Way("benchmarks.gpu:rate")}
        rows = time_ways(setting, folder, ways() | rates, repeats)
        if setting.device != "cpu":
            four_bit = {FOUR_BIT: replace(ways()["together, batch 8"], change={"quantization": "4bit"})}
            try:
                rows |= time_ways(setting, folder, four_bit, repeats)
            except RuntimeError as error:
                rows[FOUR_BIT] = {"failure": str(error)}
    return {
        "setting": asdict(setting),
        "device": fresh("the device", device_name, setting.device),
        "repeats": repeats,
        "tokens": sum(len(row) for some in make_clients(setting).values() for row in some),
        "operations": fresh("the floor", floor_operations, setting),
        "rates": {setting.dtype: max(turn["rate"] for turn in rows.pop(RATES)["phases"])},
        "ways": rows,
    }


def trained(
    setting: Setting, folder: Path, clients: Rows, tokens: int | None = None
) -> Callable[[], Mapping[str, float]]:
    """Return a round of bellwether that tells the device's peak memory; together where a budget of tokens is given."""
    import torch

    from benchmarks.ours import ours

    cuda = setting.device != "cpu"
    round = ours(setting, folder, clients, setting.clients if tokens else 1, tokens)

    def measured() -> Mapping[str, float]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        round()
        return {"tokens": tokens or 0, "device_peak": torch.cuda.max_memory_allocated() if cuda else 0}

    return measured


def rate(setting: Setting, folder: Path, clients: Rows) -> Callable[[], Mapping[str, float]]:
    """Return what measures the matrix rate of the setting's precision on its device, as a round of its own."""
    from benchmarks.floor import matrix_rate

    rows = 1024 if setting.device == "cpu" else 16_384
    return lambda: {"rate": matrix_rate(setting, setting.dtype, rows)}


def device_name(device: str) -> str:
    """Return what a device calls itself."""
    import torch

    return "the CPU" if device == "cpu" else torch.cuda.get_device_name()


def cuda_is_there() -> bool:
    """Return whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Time rounds on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: the same code, no measurement")
    parser.add_argument("--rows", type=int, default=BILLION.rows, help="of each of the 16 clients")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder; else benchmarks/results, and none with --tiny")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not fresh("the device", cuda_is_there):
        sys.exit("torch sees no CUDA device here; run this where there is one, or try it with --device cpu --tiny.")
    setting = replace(TINY, batch=8) if given.tiny else replace(BILLION, rows=given.rows)
    measured = describe(given.tiny) | measure(replace(setting, device=given.device, dtype="bfloat16"), given.repeats)
    print(report.gpu(measured))
    if given.out or not given.tiny:
        report.write(given.out or report.RESULTS, "gpu", measured)


if __name__ == "__main__":
    main()
