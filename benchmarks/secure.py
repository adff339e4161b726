"""Secure aggregation beside the plain weighted mean: seconds and bytes of a round's aggregation, without training.

Every client has an update of as many made-up values as asked for, and all run in this process, one after the other, as
in a simulation; so a client's seconds are those of all over their number. Seconds are those of the processor, which has
one thread of it to do. What travels is counted as in a run.

python -m benchmarks.secure --clients 10 50 200 --values 400000
python -m benchmarks.secure --quick        tries the code
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bellwether.client.masking import as_masked, take_part
from bellwether.exchange.adapter import Adapter, AdapterConfig, key_a, key_b
from bellwether.exchange.messages import Payload, Reply, Task, TrainTask, Update, client_draws
from bellwether.exchange.sizes import update_bytes
from bellwether.method.average import fedavg
from bellwether.method.method import by_rows, mean_of
from bellwether.method.secure import agree, mean_of_sum, open_sum
from bellwether.recipe.file import load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.tools.randomness import Randomness
from benchmarks import over_sites, report
from benchmarks.machine import describe

RESULT = "secure"
CLIENTS, VALUES, GONE = (10, 50, 200), 400_000, 0.1


def measure(clients: list[int], values: int) -> dict[str, Any]:
    """Return what was measured, as plain values for a JSON file.

    Args:
        clients: sizes of cohorts.
        values: of an adapter.
    """
    rounds = [one_round(count, values, gone) for count in clients for gone in (0, round(GONE * count))]
    return {"values": values, "rounds": rounds}


def one_round(count: int, values: int, gone: int) -> dict[str, Any]:
    """Return seconds and bytes of one round's aggregation.

    Args:
        count: clients of the cohort.
        values: of an adapter.
        gone: clients that fall away after they have dealt their shares.
    """
    recipe = load_recipe(None, ["secure_aggregation.enabled=true"])
    with tempfile.TemporaryDirectory() as place:
        clients = Clients([f"client-{number:03d}" for number in range(count)], values, gone, Path(place), recipe)
        begun = time.process_time()
        agreed = agree(clients.ask, clients.tasks, 1, recipe)
        updates = [reply.update for reply in clients.ask(agreed.tasks) if reply.update is not None]
        agreed, sum_P = open_sum(agreed, clients.ask, updates)
        assert sum_P is not None, agreed.failure
        mean = mean_of_sum(sum_P, agreed, updates, by_rows, dict.fromkeys(clients.tasks, clients.payload), {})
        whole = time.process_time() - begun
    plain = [clients.update(update.client) for update in updates]
    begun = time.process_time()
    expected = mean_of(plain, by_rows)
    seconds = time.process_time() - begun
    up = sum(map(update_bytes, updates))
    return {
        "clients": count,
        "gone": gone,
        "client_seconds": {step: spent / count for step, spent in clients.seconds.items()},
        "server_seconds": whole - sum(clients.seconds.values()),
        "plain_seconds": seconds,
        "bytes_up": up + agreed.record.bytes_up,
        "bytes_down": agreed.record.bytes_down,
        "plain_bytes_up": sum(map(update_bytes, plain)),
        "largest_error": max(float(np.abs(mean.tensors[key] - expected.tensors[key]).max()) for key in mean.tensors),
    }


class Clients:
    """Clients with made-up updates, which take all steps in this process.

    Args:
        names: of all.
        values: of an update.
        gone: how many of the last ones send no update.
        folder: for what they keep.
        recipe: the recipe.
    """

    def __init__(self, names: list[str], values: int, gone: int, folder: Path, recipe: Recipe) -> None:
        width = values // 2
        start = {key_a("q"): np.zeros((1, width), np.float32), key_b("q"): np.zeros((values - width, 1), np.float32)}
        self.payload = Payload(Adapter(AdapterConfig(1, 1.0, 0.0, ("q",)), start))
        draws = {name: client_draws(Randomness(0), 1, name) for name in names}
        self.tasks = {name: TrainTask(1, self.payload, recipe.training, 1, draws[name]) for name in names}
        self.seconds = dict.fromkeys(("AnnounceTask", "ShareTask", "TrainTask", "UnmaskTask"), 0.0)
        self._gone, self._folder = set(names[len(names) - gone :]), folder

    def update(self, name: str) -> Update:
        """Return a client's update: small values, and a number of rows."""
        draw = np.random.default_rng(int(name[-3:]))
        tensors = self.payload.adapter.tensors
        change = {key: draw.normal(0, 0.01, value.shape).astype(np.float32) for key, value in tensors.items()}
        return Update(name, 1, change, 50 + int(name[-3:]))

    def ask(self, tasks: Mapping[str, Task]) -> Iterator[Reply]:
        """Give every client its task; count the seconds of each step."""
        for name, task in tasks.items():
            folder = self._folder / name
            if isinstance(task, TrainTask):
                if name in self._gone:
                    continue
                plain = Reply(name, 0.0, update=self.update(name))
                begun = time.process_time()
                reply = as_masked(plain, task, fedavg(), folder)
            else:
                begun = time.process_time()
                reply = Reply(name, 0.0, secured=take_part(name, task, folder, real=False))  # type: ignore[arg-type]
            self.seconds[type(task).__name__] += time.process_time() - begun
            yield reply


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, and show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secure", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--values", type=int, default=VALUES)
    parser.add_argument("--quick", action="store_true", help="a tiny setting, in a temporary folder: tries the code")
    parser.add_argument("--out", type=Path, help="folder for the result; else benchmarks/results")
    given = parser.parse_args(arguments)
    clients, values = ([4, 6], 100) if given.quick else (list(given.clients), given.values)
    out = given.out or (Path(tempfile.mkdtemp()) if given.quick else report.RESULTS)
    measured = describe(given.quick) | measure(clients, values)
    report.write(out, RESULT, measured)
    print(over_sites.secure(measured))
    sys.stderr.write(f"Results are in {out}.\n")


if __name__ == "__main__":
    main()
