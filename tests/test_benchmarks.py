"""The benchmark's ways of training do what they claim, on a tiny setting; nothing here is timed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rounds():
    sys.path.insert(0, str(ROOT))
    try:
        import benchmarks.rounds

        yield benchmarks.rounds
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def setting(rounds):
    return rounds.Setting(hidden=32, layers=1, vocabulary=64, clients=2, rows=3, batch=2, threads=1)


def test_every_way_trains_a_round(rounds, setting):
    names = [
        name for name in rounds.WAYS if importlib.util.find_spec("trl") or name not in ("openfedllm", "flowertune")
    ]
    seconds = rounds.time_ways(setting, True, 1, names)
    assert list(seconds) == names
    assert all(len(values) == 1 and values[0] > 0 for values in seconds.values())
    shown = rounds.table(seconds).splitlines()
    assert [line.split(" | ")[0] for line in shown[2:]] == [f"| {name}" for name in names]
    assert shown[2].endswith("| 1.00 |")


def test_rows_are_the_same_for_every_way_and_every_run(rounds, setting):
    first, again = rounds.make_clients(setting), rounds.make_clients(setting)
    assert [row.ids_T.tolist() for rows in first.values() for row in rows] == [
        row.ids_T.tolist() for rows in again.values() for row in rows
    ]
    row = first["client-000"][0]
    assert [label != -100 for label in rounds.ways.labels(row, True)] == row.response_T.tolist()
    assert rounds.ways.labels(row, False) == row.ids_T.tolist()


def test_adapters_are_averaged_by_rows(rounds):
    states = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([5.0])}]
    assert rounds.ways.average(states, [3, 1])["a"].tolist() == [2.0]
