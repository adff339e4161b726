"""How many processes and threads train a cohort, where a recipe leaves that to the machine.

Threads of one process wait for each other after every product. Beside other work each wait is as long as the slowest of
them, and products of a small model are too short to be shared; several processes with a thread each then train more in
the same time, once each has imported its libraries and loaded its base. What was found stands in the recipe of the run,
since the number of threads decides the last bits.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bellwether.method.cohort import cohort_size
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.runner.precision import kept_recipe
from bellwether.runner.prepare import Prepared
from bellwether.runner.work import expected
from bellwether.store.checkpoint import RECIPE
from bellwether.tools.words import counted, duration

TURNS, SECONDS = 3, 0.1  # each way of sharing is measured so often, for so long
START = 15.0  # seconds of training that a process must save before it is worth its imports and its copy of the base
MOST_MEMORY = 0.5  # share of the machine's memory that copies of the base may take
LONGEST = 1024  # tokens of a product that is timed


@dataclass(frozen=True)
class Share:
    """How the processor's cores are shared: so many processes, and so many threads of all of them."""

    processes: int
    threads: int


def with_processes(prepared: Prepared, tell: Callable[[str], None]) -> Prepared:
    """Return what was prepared with a recipe that says how many processes and threads train a cohort.

    Args:
        prepared: whose ``engine.processes`` may be 0; another number stands, and nothing is measured.
        tell: is told what was found, in a sentence.

    Raises:
        ModelError: the device that the recipe names is not there.
    """
    recipe = prepared.recipe
    if recipe.engine.processes:
        return prepared
    from bellwether.model.loading import pick_device

    device, cohort = pick_device(recipe.model.device), cohort_size(recipe.federation, len(prepared.clients))
    if device.type != "cpu":
        import torch

        count = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
        found, why = Share(max(1, min(count, cohort)), recipe.model.threads), counted(count, "device")
    else:
        found, why = _on_processor(prepared, cohort)
    tell(f"engine.processes 0 takes {_words(found)}: {why}.")
    changed = {"engine.processes": found.processes, "model.threads": found.threads}
    return replace(prepared, recipe=with_overrides(recipe, changed))


def as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe with as many processes and threads as a run takes that was begun in a folder.

    Args:
        recipe: whose ``engine.processes`` may be 0; another number stands.
        folder: the run's.

    Raises:
        CheckpointError: the recipe in the folder cannot be read.
    """
    if recipe.engine.processes or not (folder / RECIPE).exists():
        return recipe
    kept = kept_recipe(folder)
    threads = recipe.model.threads or kept.model.threads
    return with_overrides(recipe, {"engine.processes": kept.engine.processes, "model.threads": threads})


def _words(share: Share) -> str:
    threads = f" with {counted(share.threads, 'thread')} in all" if share.threads else ""
    return f"{counted(share.processes, 'process', 'processes')}{threads}"


def _on_processor(prepared: Prepared, cohort: int) -> tuple[Share, str]:
    """Return how to share the cores of the processor, and why, as a clause."""
    import torch

    recipe = prepared.recipe
    threads = recipe.model.threads or torch.get_num_threads()
    most = min(threads, cohort, _copies(prepared))
    single = {Share(1, threads), Share(1, recipe.model.threads or 1)}
    several = Share(most, threads)
    rates = product_rates(prepared, sorted({*single, several}, key=lambda share: (share.processes, -share.threads)))
    alone = max(sorted(single, key=lambda share: -share.threads), key=rates.__getitem__)
    if most == 1:
        return alone, "there is one thread, one client in a round, or no memory for another copy of the base"
    # Clients are not divided: the process with the most of them decides how long a round takes.
    times = cohort / (most * -(-cohort // most)) * rates[several] / rates[alone]
    saved = _training_seconds(prepared, cohort, alone) * (1 - 1 / times)
    one = f"one of {counted(alone.threads, 'thread')}"
    why = f"a round is {times:.1f} times as fast in {most} processes as in {one}"
    if saved > START:
        return several, f"{why}, which saves about {duration(saved)}"
    return alone, f"{why}, which does not save the {START:.0f} s that they take to begin"


def _copies(prepared: Prepared) -> int:
    """Return how many processes may have a copy of the base, beside that of the process that runs the rounds."""
    from bellwether.model.quantized import weight_bytes

    settings = prepared.recipe.model
    size = weight_bytes(prepared.base.facts, 2 if settings.dtype == "bfloat16" else 4, settings.quantization)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return max(1, int(MOST_MEMORY * memory / size) - 1)


def _training_seconds(prepared: Prepared, cohort: int, share: Share) -> float:
    """Return about how long all rounds train in one process of so many threads."""
    recipe = with_overrides(prepared.recipe, {"engine.processes": 1, "model.threads": share.threads})
    return recipe.federation.rounds * expected(replace(prepared, recipe=recipe), cohort).training


def product_rates(prepared: Prepared, shares: Sequence[Share]) -> Mapping[Share, float]:
    """Return how many products a second, of the size of the base's and of a batch's, each way of sharing does now.

    A process is played by a thread of Python, which lets the others go on while it multiplies.

    Args:
        prepared: whose base and batches are meant.
        shares: the ways.
    """
    import torch

    from bellwether.model.loading import DTYPES

    recipe, linears = prepared.recipe, prepared.base.facts.linears
    shape = sorted(linears, key=lambda shape: shape.inputs * shape.outputs)[len(linears) // 2]
    lengths = [len(row) for one in prepared.clients.values() for row in one.rows]
    tokens = min(LONGEST, max(1, recipe.training.batch_size * sum(lengths) // len(lengths)))
    dtype = DTYPES[recipe.model.dtype]
    x_MI, w_OI = torch.ones(tokens, shape.inputs, dtype=dtype), torch.ones(shape.outputs, shape.inputs, dtype=dtype)
    before, rates = torch.get_num_threads(), dict.fromkeys(shares, 0.0)
    try:
        for _, share in itertools.product(range(TURNS), shares):
            torch.set_num_threads(max(1, share.threads // share.processes))
            with ThreadPoolExecutor(share.processes) as pool:
                rates[share] += sum(pool.map(_products, [(x_MI, w_OI)] * share.processes)) / TURNS
    finally:
        torch.set_num_threads(before)
    return rates


def _products(pair: tuple[object, object]) -> float:
    """Return how many products of two matrices a second this thread does."""
    import torch

    x_MI, w_OI = pair
    done, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < SECONDS:
        torch.nn.functional.linear(x_MI, w_OI)  # type: ignore[arg-type]
        done += 1
    return done / passed
