"""A federation across real processes over TLS on loopback: coordinator, sites, and Flower's own between them."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import json_lines
from forked import alive, family, start

from bellwether.store.finished import read_evaluations

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
    "scaffold": (
        "method={name: scaffold}",
        "training.optimizer=sgd",
        "training.schedule=constant",
        "training.clip_norm=null",
    ),
    "fedadam": ("method={name: fedadam}",),
    "feddpa": ("method={name: feddpa}",),
    "fine-tuned": ("method={name: fedavg, fine_tune: true}",),
    "compressed": ("compression.up=top_k", "compression.down=4bit", "method={name: rolora}"),
    "hidden": ("privacy.noise=2", "privacy.clip_norm=0.3", "privacy.clip_quantile=0.5"),
    "secure": ("secure_aggregation.enabled=true", "federation.fraction=1", "compression.down=8bit"),
    "fedhds": ("selection.method=hierarchical", "selection.min_cluster_rows=2"),
}


# One is enough, in which clients are asked for a survey, too; SCAFFOLD, with a state at both ends, is in the next
# test, where updates and adapters travel in few bits and clients keep what these left out.
GATE = "fedhds"


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == GATE else [pytest.mark.slow]) for name in METHODS]
)
def test_a_rehearsal_ends_with_the_simulations_adapter_byte_for_byte(bellwether, tiny_recipe, tmp_path, method):
    words = (tiny_recipe, *METHODS[method], "partition.client_test_fraction=0.2")
    simulated = bellwether("run", *words, "--out", "simulated")
    assert simulated.code == 0, simulated.err
    rehearsed = start("federation", "rehearse", *words, "--sites", "2", "--out", "rehearsed", folder=tmp_path)
    assert "Adapter, scores and records are in rehearsed" in finished(rehearsed)
    assert weights(tmp_path / "rehearsed") == weights(tmp_path / "simulated")
    rounds = [json_lines(tmp_path / name / "rounds.jsonl") for name in ("simulated", "rehearsed")]
    scored = [read_evaluations(tmp_path / name)[-1] for name in ("simulated", "rehearsed")]
    assert (scored[0].clients, scored[0].shared) == (scored[1].clients, scored[1].shared)
    assert bool(scored[0].shared) == (method in ("feddpa", "fine-tuned"))
    ledgers = [json_lines(tmp_path / "rehearsed" / "federation" / f"site-{n}" / "ledger.jsonl") for n in (1, 2)]
    asked = [line for ledger in ledgers for line in ledger if line["kind"] not in ("hello", "evaluate", "end")]
    for simulated_round, rehearsed_round in zip(*rounds, strict=True):
        assert rehearsed_round["cohort"] == simulated_round["cohort"]
        for bytes, way in (("bytes_down", "task"), ("bytes_up", "reply")):
            number = rehearsed_round["round"]
            travelled = sum(line["bytes"] for line in asked if (line["way"], line["round"]) == (way, number))
            assert rehearsed_round[bytes] == travelled > simulated_round[bytes] >= 0


def wait_for(holds, what: str):
    """Wait until something holds, and return it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = holds()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen")


def said(log: Path, pattern: str):
    """Return what the last match of a pattern in a log names, as far as there is one."""
    found = re.findall(pattern, log.read_text(encoding="utf-8")) if log.exists() else []
    return found[-1] if found else None


def test_a_site_killed_in_mid_training_and_a_coordinator_killed_in_mid_round_cost_nothing(
    bellwether, tiny_recipe, tmp_path
):
    words = (tiny_recipe, *METHODS["scaffold"], "training.learning_rate=0.001", "training.local_epochs=40")
    words = (*words, "compression.up=4bit", "compression.down=8bit", "federation.rounds=2", "federation.fraction=1")
    simulated = bellwether("run", *words, "--out", "simulated")
    assert simulated.code == 0, simulated.err
    rehearsed = start("federation", "rehearse", *words, "--sites", "2", "--out", "run", folder=tmp_path)
    homes = [tmp_path / "run" / "federation" / f"site-{number}" for number in (1, 2)]
    logs = [home / "site.log" for home in homes]
    wait_for(lambda: said(logs[1], "asked to (train)") or rehearsed.poll() is not None, "training")
    assert rehearsed.poll() is None, rehearsed.said()
    site = int(said(logs[1], r"Process (\d+) begins"))
    begun = family(site)
    os.kill(site, signal.SIGKILL)
    wait_for(lambda: any(said(log, r"Round (2)") for log in logs) or rehearsed.poll() is not None, "round 2")
    assert rehearsed.poll() is None, rehearsed.said()
    assert "The process of site-2 was killed by signal 9; it is begun again." in rehearsed.said()[0]
    assert not any(map(alive, [site, *begun]))  # also Flower's SuperNode beside it
    asked = [entry["number"] for entry in json_lines(homes[1] / "ledger.jsonl") if entry["way"] == "task"]
    assert len(asked) > len(set(asked))  # what it was at was asked again
    sites = [int(said(log, r"Process (\d+) begins")) for log in logs]
    others = [pid for site in sites for pid in (site, *family(site))]
    rehearsed.kill()
    assert rehearsed.wait() == -signal.SIGKILL
    wait_for(lambda: not any(map(alive, others)), "the end of the sites")
    finished(start("federation", "rehearse", "--resume", "run", "--sites", "2", folder=tmp_path))
    assert weights(tmp_path / "run") == weights(tmp_path / "simulated")
    rounds = json_lines(tmp_path / "run" / "rounds.jsonl")
    assert [line["round"] for line in rounds] == [1, 2]
    assert not any(line["left_out"] for line in rounds)
