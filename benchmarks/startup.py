"""How long it takes to start, each in a fresh process, split into imports and work."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

COMMANDS: dict[str, tuple[str, ...]] = {
    "python alone": ("-c", "pass"),
    "bellwether --help": ("-m", "bellwether", "--help"),
    "bellwether --version": ("-m", "bellwether", "--version"),
    "import bellwether": ("-c", "import bellwether"),
    "import torch": ("-c", "import torch"),
    "import transformers": ("-c", "import transformers"),
    "bellwether plan": ("-m", "bellwether", "plan"),
}


def measure(repeats: int, names: Sequence[str] = tuple(COMMANDS)) -> dict[str, Any]:
    """Return medians, as plain values for a JSON file; the commands take turns.

    Args:
        repeats: fresh processes for each figure.
        names: of the commands.
    """
    total: dict[str, list[float]] = {name: [] for name in names}
    imports: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            total[name].append(_seconds(COMMANDS[name]))
            imports[name].append(_import_seconds(COMMANDS[name]))
    return {
        "repeats": repeats,
        "commands": {
            name: {
                "seconds": total[name],
                "imports": statistics.median(imports[name]),
                "work": max(0.0, statistics.median(total[name]) - statistics.median(imports[name])),
            }
            for name in names
        },
    }


def _seconds(command: Sequence[str]) -> float:
    """Return the seconds of a process from its start to its end."""
    start = time.perf_counter()
    _run(command)
    return time.perf_counter() - start


def _import_seconds(command: Sequence[str]) -> float:
    """Return the seconds that Python itself says its imports took, each module without those that it imports."""
    lines = _run(("-X", "importtime", *command)).splitlines()
    own = [line.split(":")[1].split("|")[0].strip() for line in lines if line.startswith("import time:")]
    return sum(int(number) for number in own if number.isdecimal()) / 1e6


def _run(command: Sequence[str]) -> str:
    """Run Python; return what it wrote to stderr.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {last}")
    return done.stderr
