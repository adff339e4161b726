"""A federation across real processes over TLS on loopback: coordinator, sites, and Flower's own between them."""

import os
from pathlib import Path

import pytest
from conftest import json_lines
from forked import alive, family, start

pytest.importorskip("flwr")

PATIENCE = 300  # seconds that a loaded machine may take for what takes ten


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def finished(process) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err + out
    return out


METHODS = {
    "fedavg": (),
    "fedprox": ("method={name: fedprox, mu: 0.1}",),
    "scaffold": ("method={name: scaffold}", "training.optimizer=sgd", "training.schedule=constant"),
    "fedadam": ("method={name: fedadam}",),
    "fedhds": ("selection.method=hierarchical", "selection.min_cluster_rows=2"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_rehearsal_ends_with_the_simulations_adapter_byte_for_byte(tiny_recipe, tmp_path, method):
    words = (tiny_recipe, *METHODS[method], "partition.client_test_fraction=0.2")
    simulated = start("run", *words, "--out", "simulated", folder=tmp_path)
    finished(simulated)
    rehearsed = start("federation", "rehearse", *words, "--sites", "3", "--out", "rehearsed", folder=tmp_path)
    assert "Adapter, scores and records are in rehearsed" in finished(rehearsed)
    assert weights(tmp_path / "rehearsed") == weights(tmp_path / "simulated")
    rounds = [json_lines(tmp_path / name / "rounds.jsonl") for name in ("simulated", "rehearsed")]
    for simulated_round, rehearsed_round in zip(*rounds, strict=True):
        assert rehearsed_round["bytes_up"] == simulated_round["bytes_up"] > 0
        assert rehearsed_round["cohort"] == simulated_round["cohort"]
    assert not any(alive(pid) for pid in family(os.getpid()) if pid == rehearsed.pid)
