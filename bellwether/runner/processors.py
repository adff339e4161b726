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
from typing import TYPE_CHECKING

from bellwether.method.cohort import clients_together, cohort_size
from bellwether.recipe.file import with_overrides
from bellwether.recipe.recipe import Recipe
from bellwether.runner.estimate import memory_bytes
from bellwether.runner.precision import kept_recipe
from bellwether.runner.prepare import Prepared
from bellwether.runner.work import adapter_size, expected
from bellwether.store.checkpoint import RECIPE
from bellwether.tools.words import counted, duration

if TYPE_CHECKING:
    import torch

TURNS, SECONDS = 3, 0.1  # each way of sharing is measured so often, for so long
START = 15.0  # seconds of training that a process must save before it is worth its imports and its copy of the base
MOST_MEMORY = 0.5  # share of the memory there is that all processes may take
LIBRARIES = 700 * 2**20  # bytes that Python and its libraries take in a process
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, on Linux
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
    single = {Share(1, threads), Share(1, recipe.model.threads or 1)}
    most = min(threads, cohort)
    halves = [most >> turn for turn in range(most.bit_length() - 1)]  # down to two or three
    several = [Share(count, threads) for count in halves if _need(prepared, cohort, count) <= MOST_MEMORY * memory()]
    rates = product_rates(prepared, [*sorted(single, key=lambda share: -share.threads), *several])
    alone = max(sorted(single, key=lambda share: -share.threads), key=rates.__getitem__)
    if not several:
        return alone, "there is one thread, one client in a round, or no memory for another copy of the base"
    # Clients are not divided: the process with the most of them decides how long a round takes.
    times = {
        share: cohort / (share.processes * -(-cohort // share.processes)) * rates[share] / rates[alone]
        for share in several
    }
    best = max(several, key=times.__getitem__)
    saved = _training_seconds(prepared, cohort, alone) * (1 - 1 / times[best])
    one = f"one of {counted(alone.threads, 'thread')}"
    why = f"a round is {times[best]:.1f} times as fast in {best.processes} processes as in {one}"
    if saved > START:
        return best, f"{why}, which saves about {duration(saved)}"
    return alone, f"{why}, which does not save the {START:.0f} s that they take to begin"


def _need(prepared: Prepared, cohort: int, processes: int) -> int:
    """Return the bytes that so many processes take, with that which runs the rounds."""
    recipe, facts = with_overrides(prepared.recipe, {"engine.processes": processes}), prepared.base.facts
    longest = max(len(row) for one in prepared.clients.values() for row in one.rows)
    adapter = adapter_size(facts, recipe)
    together = clients_together(recipe.engine, cohort)
    parts = memory_bytes(facts, recipe, adapter.parameters, adapter.modules, longest, together)
    return sum(parts.values()) + (processes + 1) * LIBRARIES


def memory() -> int:
    """Return the bytes of memory that processes here may take: the machine's, or fewer where a container has fewer."""
    there = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    limits = [Path(name).read_text().strip() for name in LIMITS if Path(name).is_file()]
    return min([*there, *(int(limit) for limit in limits if limit.isdecimal())], default=0)


def _training_seconds(prepared: Prepared, cohort: int, share: Share) -> float:
    """Return about how long all rounds train in one process of so many threads."""
    recipe = with_overrides(prepared.recipe, {"engine.processes": 1, "model.threads": share.threads})
    return recipe.federation.rounds * expected(replace(prepared, recipe=recipe), cohort).training


def product_rates(prepared: Prepared, shares: Sequence[Share]) -> Mapping[Share, float]:
    """Return how many tokens a second each way of sharing multiplies with weights of the base's size now.

    A process is played by a thread of Python, which lets the others go on while it multiplies, with weights of its own.

    Args:
        prepared: whose base and batches are meant.
        shares: the ways.
    """
    import torch

    from bellwether.model.loading import DTYPES

    recipe, linears = prepared.recipe, prepared.base.facts.linears
    shape = sorted(linears, key=lambda shape: shape.inputs * shape.outputs)[len(linears) // 2]
    dtype, rates = DTYPES[recipe.model.dtype], dict.fromkeys(shares, 0.0)
    pairs = {
        share: [
            (
                torch.ones(_tokens(prepared, share), shape.inputs, dtype=dtype),
                torch.ones(shape.outputs, shape.inputs, dtype=dtype),
            )
            for _ in range(share.processes)
        ]
        for share in shares
    }
    before = torch.get_num_threads()
    try:
        for _, share in itertools.product(range(TURNS), shares):
            torch.set_num_threads(max(1, share.threads // share.processes))
            with ThreadPoolExecutor(share.processes) as pool:
                rates[share] += sum(pool.map(_multiplied, pairs[share])) / TURNS
    finally:
        torch.set_num_threads(before)
    return rates


def _tokens(prepared: Prepared, share: Share) -> int:
    """Return how many tokens go through a module at once: a batch of a client's, or of those trained together."""
    recipe = prepared.recipe
    lengths = [len(row) for one in prepared.clients.values() for row in one.rows]
    batch = recipe.training.batch_size * sum(lengths) // len(lengths)
    engine = recipe.engine.model_copy(update={"processes": share.processes})
    together = clients_together(engine, cohort_size(recipe.federation, len(prepared.clients)))
    if together > 1:
        batch = max(batch, min(engine.tokens, together * recipe.training.accumulation * batch))
    return min(LONGEST, max(1, batch))


def _multiplied(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return how many rows of a matrix a second this thread multiplies with another."""
    import torch

    x_MI, w_OI = pair
    torch.nn.functional.linear(x_MI, w_OI)  # the first one wakes the threads and takes memory
    done, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < SECONDS:
        torch.nn.functional.linear(x_MI, w_OI)
        done += len(x_MI)
    return done / passed
