"""A federation as Flower has it by itself: its strategy of means, and a client that sends back what it got, changed."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

# Flower's own names.
from flwr.app import Context, Message  # isort: skip
from flwr.serverapp import Grid  # isort: skip

server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the rounds, and write down when each ended."""
    config = context.run_config
    numbers = int(float(config["megabytes"]) * 1e6 / 4 / int(config["tensors"]))
    generator = np.random.default_rng(0)
    arrays = {
        f"tensor.{index}": Array(generator.standard_normal(numbers).astype(np.float32))
        for index in range(int(config["tensors"]))
    }
    sites = int(config["sites"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)

    def ended(round: int, arrays: ArrayRecord) -> None:
        with Path(str(config["times"])).open("a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")

    strategy.start(grid, ArrayRecord(arrays), num_rounds=int(config["rounds"]), evaluate_fn=ended)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send back what came, changed."""
    generator = np.random.default_rng()
    arrays = {
        name: Array(array.numpy() + generator.random(array.numpy().shape, np.float32))
        for name, array in message.content["arrays"].items()
    }
    answer = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 100})})
    return Message(answer, reply_to=message)
