"""Samplers that keep a run from its end while a file is there, so that it can be interrupted at any time before.

The environment's ``HELD`` names the file, which holds the first round that does not begin.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from bellwether.tools.randomness import Randomness


def everybody(clients: Sequence[str], round: int, randomness: Randomness) -> Sequence[str]:
    """Ask all clients, in an order of each round's own."""
    file = Path(os.environ.get("HELD", os.devnull))
    while file.is_file() and round >= int(file.read_text()):
        time.sleep(0.01)
    return [clients[index] for index in randomness.numpy("cohort", round=round).permutation(len(clients))]


def half(clients: Sequence[str], round: int, randomness: Randomness) -> Sequence[str]:
    """Ask half of the clients."""
    return everybody(clients, round, randomness)[: len(clients) // 2]


def environment(file: Path) -> dict[str, str]:
    """Return the environment of a process whose run a file holds back, with these samplers to be found."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "HELD": str(file), "PYTHONPATH": os.pathsep.join(paths)}
