"""How bellwether's rounds grow: with clients, rows, width and length; and memory with the size of the federation."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import ways
from benchmarks.rounds import time_ways
from benchmarks.setting import TINY, Setting, make_clients, make_model
from benchmarks.worker import fresh, peak_memory

# What grows: the field of the setting, and its values; all other fields stay as they are.
AXES: dict[str, tuple[Any, ...]] = {
    "clients": (1, 10, 50, 200),
    "rows": (10, 50, 200),
    "hidden": (64, 128, 256, 512),
    "lengths": (0.5, 1.0, 2.0),
}
TINY_AXES: dict[str, tuple[Any, ...]] = {"clients": (1, 2), "lengths": (0.2, 0.4)}
# Clients of a federation and of a cohort.
FEDERATIONS = ((10, 10), (200, 10))
TINY_FEDERATIONS = ((2, 2), (4, 2))


def measure(setting: Setting, repeats: int, quick: bool) -> dict[str, Any]:
    """Return what was measured, as plain values for a JSON file."""
    return {
        "repeats": repeats,
        "points": [_point(point, axis, repeats) for axis, point in _points(TINY if quick else setting, quick)],
        "federations": memory(TINY_FEDERATIONS if quick else FEDERATIONS, 4 if quick else 50),
    }


def _points(setting: Setting, quick: bool) -> Iterator[tuple[str, Setting]]:
    for axis, values in (TINY_AXES if quick else AXES).items():
        for value in values:
            yield axis, replace(setting, **{axis: value})


def _point(setting: Setting, axis: str, repeats: int) -> dict[str, Any]:
    """Return seconds a round, tokens a second and peak memory at one point."""
    with tempfile.TemporaryDirectory() as place:
        folder = fresh("the model", make_model, setting, Path(place))
        chosen = {ways.OURS: ways.Way("benchmarks.ours:ours")}
        row = time_ways(setting, folder, chosen, repeats)[ways.OURS]
    tokens = sum(len(row) for rows in make_clients(setting).values() for row in rows)
    seconds = statistics.median(row["seconds"])
    return {
        "axis": axis,
        "value": getattr(setting, axis),
        "seconds": row["seconds"],
        "tokens_per_second": tokens / seconds,
        "peak": row["peak"],
    }


def memory(federations: Sequence[tuple[int, int]], rows: int) -> list[dict[str, Any]]:
    """Return the peak memory of real runs, each in a process of its own.

    Args:
        federations: clients in the federation, and in a round.
        rows: of each client.
    """
    return [
        {"clients": clients, "cohort": cohort, "peak": fresh(f"the run of {clients}", run_peak, clients, cohort, rows)}
        for clients, cohort in federations
    ]


def run_peak(clients: int, cohort: int, rows: int) -> int:
    """Run two rounds of a federation on the embedded base; return the peak memory of this process in bytes."""
    from bellwether import load_recipe, run

    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "rows.jsonl"
        write_rows(source, clients * rows)
        fields = (
            f"data.sources=[{json.dumps(str(source))}]",
            "data.test_sources=[]",
            "data.validation_sources=[]",
            "data.test_rows_per_category=0",
            "partition.method=iid",
            f"partition.clients={clients}",
            f"federation.cohort_size={cohort}",
            "federation.rounds=2",
            f"output.folder={json.dumps(str(Path(place) / 'run'))}",
        )
        run(load_recipe(None, list(fields)))
    return peak_memory()


def write_rows(path: Path, count: int) -> None:
    """Write as many instructions as wanted, the embedded ones over and over, each with a number of its own."""
    from starter.instructions import make_rows
    from starter.world import make_world

    known = make_rows(make_world(), "train")
    with path.open("w") as file:
        for number in range(count):
            row = known[number % len(known)]
            file.write(json.dumps(row | {"instruction": f"{number}. {row['instruction']}"}) + "\n")
