"""Each way of training in a process of its own, so that nothing of one way reaches another.

A process stays alive through the run and is asked for a round when it is its turn; it is spawned, not forked, and
tells its imports, its building, its rounds and its peak memory apart.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.setting import Setting


@dataclass(frozen=True)
class Job:
    """What a process shall do.

    Args:
        make: the function that gives a round, as ``module:function``.
        setting: what it works on; all arguments but the options are given to the function in this order.
        folder: the model's folder.
        options: further arguments of the function, by name.
        modules: what is imported before anything is built, so that imports are timed apart.
    """

    make: str
    setting: Setting
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One round: its seconds, how they were spent where the way tells it, and the process's peak memory in bytes."""

    seconds: float
    phases: Mapping[str, float]
    peak: int


class Worker:
    """A process that trains rounds in one way; it is a context manager, since it must be closed.

    Args:
        name: of the way, for messages.
        job: what it shall do.
    """

    def __init__(self, name: str, job: Job) -> None:
        self._name, self._job = name, job
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown(wait=True, cancel_futures=True)

    def build(self) -> dict[str, float]:
        """Import and build; return the seconds of both."""
        return self._ask(_build, self._job)

    def round(self) -> Turn:
        """Train a round."""
        return self._ask(_round)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in the process.

        Raises:
            RuntimeError: it failed there, or the process ended.
        """
        try:
            return self._process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"The process of {self._name} ended before it answered; had it too little memory?"
            ) from error
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{self._name}: {type(error).__name__}: {error}") from error


def fresh(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module gives in a process of its own, which ends then.

    Raises:
        RuntimeError: as ``Worker``; ``name`` stands in its message.
    """
    with Worker(name, Job("", Setting(), Path())) as worker:
        return worker._ask(function, *arguments)


def peak_memory() -> int:
    """Return the largest resident memory that this process had, in bytes, and those that it started, one by one.

    Linux hands ``ru_maxrss`` of a parent on to the program that a child starts, so its own mark is read there.
    """
    children = [process.pid for process in multiprocessing.active_children()]
    with contextlib.suppress(OSError):
        return sum(_high_water(pid) for pid in ("self", *children))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _high_water(pid: int | str | None) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def find(name: str) -> Any:
    """Return the function that ``module:function`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


# In the process -----------------------------------------------------------------------------------

_rounds: list[Callable[[], Mapping[str, float] | None]] = []


_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def _begin() -> None:
    """Keep libraries from writing what nobody reads, before they are imported."""
    os.environ.update(_QUIET)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)


def _build(job: Job) -> dict[str, float]:
    start = time.perf_counter()
    make = find(job.make)
    for module in job.modules:
        importlib.import_module(module)
    imported = time.perf_counter()
    _rounds.append(built(job, make))
    return {"import": imported - start, "build": time.perf_counter() - imported}


def built(job: Job, make: Callable[..., Any]) -> Callable[[], Mapping[str, float] | None]:
    """Return what trains a round, with the setting's rows and threads."""
    import torch

    from benchmarks.setting import make_clients

    torch.set_num_threads(job.setting.threads)
    with contextlib.redirect_stdout(io.StringIO()):
        return make(job.setting, job.folder, make_clients(job.setting), **job.options)


def _round() -> Turn:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # trainers print what they log
        phases = _rounds[-1]()
    return Turn(time.perf_counter() - start, dict(phases or {}), peak_memory())
