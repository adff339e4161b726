"""A federation across real processes over TLS on loopback: coordinator, sites, and Flower's own between them."""

import os
import re
import signal
import time
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
    "scaffold": (
        "method={name: scaffold}",
        "training.optimizer=sgd",
        "training.schedule=constant",
        "training.clip_norm=null",
    ),
    "fedadam": ("method={name: fedadam}",),
    "fedhds": ("selection.method=hierarchical", "selection.min_cluster_rows=2"),
}


# What these two do is among what the others do: a term in the clients' steps, and a state at the server.
SLOW = ("fedprox", "fedadam")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in METHODS]
)
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


LONG = ("federation.rounds=3", "federation.fraction=1", "federation.quorum=0.25", "training.local_epochs=60")


def test_a_site_that_is_killed_in_mid_training_comes_back_and_the_others_go_on(tiny_recipe, tmp_path):
    rehearsed = start("federation", "rehearse", tiny_recipe, *LONG, "--sites", "2", "--out", "run", folder=tmp_path)
    log = tmp_path / "run" / "federation" / "site-2" / "site.log"
    wait_for(lambda: said(log, "asked to (train)") or rehearsed.poll() is not None, "training")
    assert rehearsed.poll() is None, rehearsed.said()
    site = int(said(log, r"Process (\d+) begins"))
    begun = family(site)
    os.kill(site, signal.SIGKILL)
    out = finished(rehearsed)
    assert "The process of site-2 was killed by signal 9; it is begun again." in out
    assert not any(map(alive, [site, *begun]))  # also Flower's SuperNode beside it
    first, *_, last = json_lines(tmp_path / "run" / "rounds.jsonl")
    assert {"client-02", "client-04"} & first["left_out"].keys()
    assert {client["client"] for client in first["clients"]} >= {"client-01", "client-03"}
    assert {client["client"] for client in last["clients"]} == {f"client-0{number}" for number in range(1, 5)}


def test_a_coordinator_that_is_killed_in_mid_round_goes_on_to_the_simulations_bytes(tiny_recipe, tmp_path):
    words = (tiny_recipe, *LONG[:1], *LONG[3:], "method={name: scaffold}", "training.optimizer=sgd")
    words = (*words, "training.schedule=constant", "training.clip_norm=null", "training.learning_rate=0.001")
    simulated = start("run", *words, "--out", "simulated", folder=tmp_path)
    finished(simulated)
    rehearsed = start("federation", "rehearse", *words, "--sites", "2", "--out", "run", folder=tmp_path)
    logs = [tmp_path / "run" / "federation" / f"site-{number}" / "site.log" for number in (1, 2)]
    committed = tmp_path / "run" / "checkpoints" / "0001"
    wait_for(lambda: committed.exists() or rehearsed.poll() is not None, "a round")
    wait_for(lambda: any(said(log, r"Round (2)") for log in logs) or rehearsed.poll() is not None, "round 2")
    sites = [int(said(log, r"Process (\d+) begins")) for log in logs]
    others = [pid for site in sites for pid in (site, *family(site))]
    rehearsed.kill()
    assert rehearsed.wait() == -signal.SIGKILL
    wait_for(lambda: not any(map(alive, others)), "the end of the sites")
    again = start("federation", "rehearse", "--resume", "run", "--sites", "2", folder=tmp_path)
    finished(again)
    assert weights(tmp_path / "run") == weights(tmp_path / "simulated")
    assert [line["round"] for line in json_lines(tmp_path / "run" / "rounds.jsonl")] == [1, 2, 3]
