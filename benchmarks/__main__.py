"""The whole benchmark, which ``make bench`` runs; each part writes its JSON file, then tables and picture follow.

python -m benchmarks [--only rounds] [--hidden 128] [--table released] [--ways "shepherd;fedhds, batch 1"]
python -m benchmarks --quick        everything on a tiny setting, in a temporary folder: tries the code
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import choosing, growth, phases, picture, report, rounds, startup, survey, ways
from benchmarks.machine import describe
from benchmarks.setting import TINY, Setting

PARTS = ("startup", "phases", "rounds", "growth", "survey")
SHORT_RUN = (
    "federation.rounds=1",
    "training.local_steps=1",
    "evaluation.max_rows_per_category=1",
    "evaluation.max_new_tokens=2",
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure how fast rounds are.")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure")
    parser.add_argument("--hidden", type=int, nargs="+", default=(128, 512), help="widths to measure rounds at")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of each way")
    parser.add_argument("--table", choices=tuple(ways.TABLES), nargs="+", default=tuple(ways.TABLES))
    parser.add_argument("--ways", default="", help="rows to measure beside bellwether's, separated by semicolons")
    parser.add_argument("--out", type=Path, help="folder for the results; else benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="everything on a tiny setting")
    return parser.parse_args(arguments)


def parts(given: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what measures each JSON file, by the file's name."""
    names = [name for name in given.ways.split(";") if name]
    settings = [
        replace(TINY, threads=given.threads) if given.quick else Setting(hidden, given.layers, threads=given.threads)
        for hidden in (given.hidden[:1] if given.quick else given.hidden)
    ]
    repeats = 1 if given.quick else given.repeats
    files: dict[str, Callable[[], dict[str, Any]]] = {}
    if "startup" in given.only:
        files["startup"] = lambda: startup.measure(1 if given.quick else 5)
    if "phases" in given.only:
        files["phases"] = lambda: phases.measure(settings, SHORT_RUN if given.quick else (), repeats)
    if "rounds" in given.only:
        for setting in settings:
            for table in given.table:
                files[f"rounds-{setting.hidden}-{table}"] = lambda setting=setting, table=table: rounds.measure(
                    setting, repeats, table, names
                )
    if "growth" in given.only:
        files["growth"] = lambda: growth.measure(Setting(threads=given.threads), min(repeats, 2), given.quick)
    if "survey" in given.only:
        files["survey"] = lambda: survey.measure(given.threads, repeats, given.quick)
    return files


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, and show."""
    given = parse(arguments)
    out = given.out or (Path(tempfile.mkdtemp()) if given.quick else report.RESULTS)
    for name, measure in parts(given).items():
        sys.stderr.write(f"{name}\n")
        report.write(out, name, describe(given.quick) | measure())
    results = report.read(out)
    picture.draw(results, out)
    if out.resolve() == report.RESULTS.resolve():
        report.write_block(report.render(results))
        report.write_block(choosing.chosen(results), report.SELECTION)
        report.write_block(choosing.brief(results), report.FRONT)
    else:
        print(report.render(results))
    sys.stderr.write(f"Results are in {out}.\n")


if __name__ == "__main__":
    main()
