"""Time rounds of bellwether beside other ways to train the same clients, one after another in turn.

    python -m benchmarks.rounds [--hidden 128] [--layers 4] [--repeats 3] [--table equal] [--ways "shepherd;bare loop"]

It prints two tables: as released (each way with its own order of rows and loss positions) and equal work (loss on
responses, batches grouped by length). Loading and imports are not part of a round, except where a way loads the model
in every round. Each way goes once before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import ways
from benchmarks.ours import ours
from benchmarks.setting import Setting, make_clients, make_model

Make = Callable[[Setting, Path, ways.Rows, bool], ways.Round]

# A way's name in the table: how to make it, and its batch where that is its own.
WAYS: dict[str, tuple[Make, int | None]] = {
    "bellwether": (lambda setting, folder, clients, equal: ours(setting, folder, clients), None),
    "bellwether, batch 1": (lambda setting, folder, clients, equal: ours(setting, folder, clients), 1),
    "bellwether together, batch 1": (
        lambda setting, folder, clients, equal: ours(setting, folder, clients, setting.clients, 1024),
        1,
    ),
    "shepherd": (ways.shepherd, None),
    "openfedllm": (ways.openfedllm, None),
    "flowertune": (ways.flowertune, None),
    "fedhds, batch 1": (ways.fedhds, 1),
    "bare loop": (ways.bare, None),
    "bare loop, batch 1": (ways.bare, 1),
}


def time_ways(setting: Setting, equal: bool, repeats: int, names: list[str]) -> dict[str, list[float]]:
    """Return the seconds of a round of every way, measured in turn."""
    clients = make_clients(setting)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = make_model(setting, Path(place))
        rounds = {
            name: WAYS[name][0](replace(setting, batch=WAYS[name][1] or setting.batch), folder, clients, equal)
            for name in names
        }
        for repeat in range(repeats + 1):
            for name, round in rounds.items():
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):  # trainers print what they log
                    round()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Return medians, spreads and ratios as Markdown."""
    fastest = statistics.median(seconds["bellwether"])
    lines = ["| way | seconds a round (least to most) | times bellwether's |", "| --- | --- | --- |"]
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {median:.2f} ({min(values):.2f} to {max(values):.2f}) | {median / fastest:.2f} |")
    return "\n".join(lines) + "\n"


def where(setting: Setting) -> str:
    """Return on what, when and with which commit is measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"{setting.clients} clients × {setting.rows} rows, LoRA r=8 on {', '.join(setting.targets)}, hidden "
        f"{setting.hidden}, {setting.layers} layers, vocabulary {setting.vocabulary}, batch {setting.batch}; "
        f"{setting.threads} threads of {os.cpu_count()} cores, {platform.system()} {platform.machine()}, PyTorch "
        f"{torch.__version__}, {datetime.date.today()}, commit {commit.stdout.strip()}."
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Time rounds of bellwether beside other ways.")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", help="names as in the table, separated by semicolons; bellwether is always timed")
    parser.add_argument("--table", choices=("released", "equal"), help="only one of the two tables")
    given = parser.parse_args()
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(given.threads)
    setting = Setting(given.hidden, given.layers, clients=given.clients, rows=given.rows, threads=given.threads)
    names = list(dict.fromkeys(["bellwether", *(given.ways.split(";") if given.ways else WAYS)]))
    print(where(setting))
    for title, equal in (("As released", False), ("Equal work", True)):
        if given.table in (None, "equal" if equal else "released"):
            print(f"\n{title}\n\n{table(time_ways(setting, equal, given.repeats, names))}", flush=True)


if __name__ == "__main__":
    main()
