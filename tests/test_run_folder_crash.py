"""A run that is killed, loses power or fills the disk at any moment goes on to the same bytes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_folder_harness import digest

HARNESS = Path(__file__).with_name("run_folder_harness.py")


def strike(writer: str, fault: str, place: Path) -> dict:
    command = [sys.executable, str(HARNESS), "faults", writer, fault, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("fault", ["torn", "power", "full"])
def test_a_fault_at_any_write_of_a_run_leaves_it_able_to_go_on_to_the_same_bytes(fault, tmp_path):
    found = strike("good", fault, tmp_path)
    assert found["bad"] == []
    assert found["calls"] > 150, "the harness no longer sees the writer's calls"


@pytest.mark.parametrize(("writer", "fault"), [("in place", "torn"), ("in place", "full"), ("no fsync", "power")])
def test_a_writer_that_is_broken_on_purpose_is_caught(writer, fault, tmp_path):
    assert strike(writer, fault, tmp_path)["bad"]


def test_killing_a_run_at_random_moments_changes_no_byte_of_what_it_leaves(tmp_path):
    rounds, kills, draw = 60, 15, random.Random(7)
    path, hold = tmp_path / "run", tmp_path / "hold"

    def run(folder: Path) -> list[str]:
        return [sys.executable, str(HARNESS), "run", str(folder), str(rounds), str(hold)]

    subprocess.run(run(tmp_path / "truth"), check=True)
    for _ in range(kills):
        before = newest(path)
        hold.write_text(str(before + 4))  # however fast it is, it is not over before it is killed
        process = subprocess.Popen(run(path))
        while process.poll() is None and newest(path) <= before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    hold.unlink()
    subprocess.run(run(path), check=True)
    assert digest(path) == digest(tmp_path / "truth")


def newest(path: Path) -> int:
    """Return the newest round that is committed, or -1."""
    return max((int(entry.name) for entry in (path / "checkpoints").glob("[0-9]*")), default=-1)
