"""Simulated clients by bellwether's own engines, next to Flower's simulation engine on Ray with the same client code.

Wants Ray beside the extra `federation` (pip install "flwr[simulation]"). Each way is one federated run of the same
recipe, all clients in each round; what they end with is compared, byte for byte.

python -m benchmarks.simulation --clients 200
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bellwether.engine.flower.records import parcel_of, record_of
from bellwether.engine.processes import local_engine
from bellwether.exchange.codec import decode_reply, decode_task, encode_reply, encode_task
from bellwether.exchange.messages import Reply, Task
from bellwether.exchange.seal import Parcel
from bellwether.federate import Engine
from bellwether.method.named import make_method
from bellwether.model.base import load_base
from bellwether.model.lora import LoraLayers, adapter_config
from bellwether.recipe.file import dump_recipe, load_recipe
from bellwether.recipe.recipe import Recipe
from bellwether.runner.prepare import prepare
from bellwether.runner.run import run
from bellwether.runner.wiring import Deployment, Setting, make_engine, work_of
from benchmarks import report
from benchmarks.machine import describe

RECIPE = "BELLWETHER_BENCHMARK_RECIPE"  # a variable that Ray's processes find the recipe in
RESULT = "simulation"


def recipe_of(clients: int, folder: Path, processes: int) -> Recipe:
    """Return the recipe that every way runs."""
    words = [
        f"partition.clients={clients}",
        "partition.method=iid",
        "partition.rows_per_client=null",
        "federation.fraction=1",
        "federation.rounds=2",
    ]
    words += ["training.local_steps=1", "evaluation.every=0", "evaluation.generate=false", "engine.fuse=1"]
    words += ["evaluation.max_rows_per_category=1", "model.threads=1", f"engine.processes={processes}"]
    return load_recipe("default", [*words, f"output.folder={folder}"])


class Held:
    """What a process of Ray's holds: base and rows of all clients, opened once."""

    engine: Engine | None = None

    @classmethod
    def ask(cls, client: str, task: Task) -> Reply:
        """Return a client's reply."""
        if cls.engine is None:
            prepared = prepare(load_recipe(Path(os.environ[RECIPE])))
            base = load_base(prepared.recipe.model, prepared.base)
            method = make_method(prepared.recipe.method)
            layers = LoraLayers(base.model, adapter_config(base, prepared.recipe.lora), 1)
            setting = Setting(prepared, base, layers, method, Path(os.environ[RECIPE]).parent, lambda event: None)
            cls.engine = local_engine(base, layers, work_of(setting, list(prepared.clients)), method)
        return next(iter(cls.engine.ask({client: task})))


class OverGrid:
    """An engine whose clients are Flower's simulated nodes."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def ask(self, tasks: Mapping[str, Task], deadline: float | None = None) -> Iterator[Reply]:
        """Give every client its task; yield the replies."""
        from flwr.app import Message

        nodes, begun = list(self._grid.get_node_ids()), time.perf_counter()
        asked = []
        for node, (client, task) in zip(nodes, tasks.items(), strict=False):
            parcel = Parcel(json.dumps([client, task.round, type(task).__name__]).encode(), b"", *encode_task(task))
            asked.append(Message(record_of(parcel), dst_node_id=node, message_type="train"))
        for answer in self._grid.send_and_receive(asked):
            parcel = parcel_of(answer)
            assert parcel is not None
            client, round, _ = json.loads(parcel.header)
            yield decode_reply(parcel.manifest, parcel.body, "train", client, round, time.perf_counter() - begun)


def on_ray(recipe: Recipe, cores: int) -> None:
    """Run a recipe in Flower's simulation engine."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server, client = ServerApp(), ClientApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        class Over:
            def __init__(self, setting: Setting) -> None:
                self.engine = OverGrid(grid)

            def __enter__(self) -> Engine:
                return self.engine

            def __exit__(self, *error: object) -> None:
                pass

        run(recipe, deployment=Deployment(prepare, Over))

    @client.train()
    def train(message: Message, context: Context) -> Message:
        parcel = parcel_of(message)
        assert parcel is not None
        name, _, _ = json.loads(parcel.header)
        reply = Held.ask(name, decode_task(parcel.manifest, parcel.body))
        manifest, body = encode_reply(reply, "train")
        return Message(record_of(Parcel(parcel.header, b"", manifest, body)), reply_to=message)

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}}
    run_simulation(server, client, recipe.partition.clients or 0, backend_config=backend)


def measure(clients: int) -> dict[str, Any]:
    """Return the seconds of training of each round, and of the whole run, by way."""
    cores = os.cpu_count() or 1
    ways: dict[str, Callable[[Recipe], object]] = {
        "one process": lambda recipe: run(recipe, deployment=Deployment(prepare, make_engine)),
        f"{cores} processes": lambda recipe: run(recipe, deployment=Deployment(prepare, make_engine)),
        f"Flower's simulation engine, {cores} Ray actors": lambda recipe: on_ray(recipe, cores),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, (name, way) in enumerate(ways.items()):
            folder = Path(place) / str(number)
            recipe = recipe_of(clients, folder / "run", cores if number == 1 else 1)
            folder.mkdir()
            os.environ[RECIPE] = str(folder / "recipe.yaml")
            (folder / "recipe.yaml").write_text(dump_recipe(recipe))
            begun = time.perf_counter()
            way(recipe)
            whole = time.perf_counter() - begun
            rounds = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
            adapter = (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
            found[name] = {
                "whole": whole,
                "train": [one["seconds"]["train"] for one in rounds],
                "adapter": hash(adapter),
            }
            sys.stderr.write(f"{name}: {found[name]}\n")
    same = len({one.pop("adapter") for one in found.values()}) == 1
    return {"clients": clients, "ways": found, "same adapter": same}


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    given = parser.parse_args()
    report.write(given.out, RESULT, describe(False) | measure(given.clients))


if __name__ == "__main__":
    main()
