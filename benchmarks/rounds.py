"""Rounds of bellwether beside other ways to train the same clients, one after another in turn, and beside the floor."""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ways
from benchmarks.setting import Setting, make_clients, make_model
from benchmarks.worker import Worker, fresh


def measure(setting: Setting, repeats: int, table: str, names: Collection[str] = ()) -> dict[str, Any]:
    """Return what was measured, as plain values for a JSON file.

    Args:
        setting: what is measured on.
        repeats: timed rounds of each way, after one that is not.
        table: ``released`` or ``equal``.
        names: rows to measure beside bellwether's; none names all.
    """
    chosen = _chosen(ways.TABLES[table](setting.clients), names)
    with tempfile.TemporaryDirectory() as place:
        folder = fresh("the model", make_model, setting, Path(place))
        rows = time_ways(setting, folder, chosen | ways.matrix_rate(), repeats)
    rates = rows.pop(ways.RATES)["phases"]
    return {
        "table": table,
        "setting": asdict(setting),
        "repeats": repeats,
        "tokens": sum(len(row) for some in make_clients(setting).values() for row in some),
        "operations": fresh("the floor", floor_operations, setting),
        "rates": {dtype: max(rate[dtype] for rate in rates) for dtype in rates[0]},
        "ways": {
            name: row
            | {
                "phases": _medians(row["phases"]),
                "bare": chosen[name].bare,
                "dtype": chosen[name].change.get("dtype", setting.dtype),
            }
            for name, row in rows.items()
        },
    }


def time_ways(setting: Setting, folder: Path, chosen: Mapping[str, ways.Way], repeats: int) -> dict[str, Any]:
    """Return for every way its seconds of importing, building, first round and timed rounds, and its peak memory.

    Beside them stand ``phases``, for each timed round what the way tells of it.
    """
    rows: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, way in chosen.items():
            workers[name] = stack.enter_context(Worker(name, way.job(setting, folder)))
            rows[name] = {**workers[name].build(), "first": workers[name].round().seconds, "seconds": [], "phases": []}
            _tell(f"{name}: first round {rows[name]['first']:.2f} s")
        for number in range(repeats):
            for name, worker in workers.items():
                turn = worker.round()
                rows[name]["seconds"].append(turn.seconds)
                rows[name]["phases"].append(turn.phases)
                rows[name]["peak"] = turn.peak
                _tell(f"{name}: {turn.seconds:.2f} s ({number + 1} of {repeats})")
    return rows


def floor_operations(setting: Setting) -> dict[str, float]:
    """Return the operations of a round of the setting, by term."""
    from benchmarks.floor import operations

    return operations(setting, make_clients(setting))


def _chosen(rows: Mapping[str, ways.Way], names: Collection[str]) -> dict[str, ways.Way]:
    """Return the named rows with bellwether's first one and the bare loops that belong to them; without names, all."""
    wanted = {ways.OURS, *(names or rows)}
    wanted |= {bare for name in wanted if name in rows and (bare := rows[name].bare)}
    return {name: way for name, way in rows.items() if name in wanted}


def _medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each phase over rounds."""
    phases = dict.fromkeys(phase for turn in turns for phase in turn)
    return {phase: statistics.median(turn.get(phase, 0.0) for turn in turns) for phase in phases}


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
