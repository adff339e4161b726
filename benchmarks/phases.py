"""Where the time goes: the default run split into phases, and what a round does beside forward and backward.

The product is not changed: its functions are timed from outside, and what one of them calls that has a phase of its
own counts there alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib._bootstrap
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.clock import Clock, patched
from benchmarks.setting import Setting, make_model
from benchmarks.worker import fresh

IMPORT = "imports"
DATA = "data"
BASE = "base: loading and checking that it is unchanged"
STEP = "forward and backward"
TRAIN = "training beside forward and backward"
SERVER = "aggregation and checks"
LOSS = "evaluation: loss and scores"
GENERATION = "evaluation: generation"
RECORDS = "records and checkpoints"
EXPORT = "adapter, samples and tables"
OTHER = "the rest"
PHASES = (IMPORT, DATA, BASE, STEP, TRAIN, SERVER, LOSS, GENERATION, RECORDS, EXPORT, OTHER)

OPTIMIZER = "optimizer and clipping"
SLOTS = "loading and reading adapters"
AVERAGE = "averaging"


def measure(settings: Sequence[Setting], fields: Sequence[str], repeats: int) -> dict[str, Any]:
    """Return what was measured, as plain values for a JSON file.

    Args:
        settings: on which the time of a round outside forward and backward is measured.
        fields: of the default recipe that are others.
        repeats: rounds of each setting.
    """
    return {
        "fields": list(fields),
        "run": fresh("the default run", default_run, list(fields)),
        "outside": [
            {"hidden": setting.hidden, "layers": setting.layers, "batch": setting.batch, "phases": phases}
            for setting in settings
            for phases in [fresh(f"rounds at hidden {setting.hidden}", rounds_split, setting, repeats)]
        ],
    }


def default_run(fields: Sequence[str]) -> dict[str, float]:
    """Run ``bellwether run`` in this process; return its seconds by phase, in the order of ``PHASES``."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as place, clock.during(OTHER), timed_imports(clock):
        from bellwether.cli.main import main

        arguments = ["run", *fields, "--out", str(Path(place) / "run")]
        with timed_rooms(clock), contextlib.redirect_stdout(io.StringIO()):
            try:
                main(arguments)
            except SystemExit as end:  # as a command ends
                if end.code:
                    raise RuntimeError(f"bellwether {' '.join(arguments)} ended with exit code {end.code}") from end
    return {phase: clock.seconds.get(phase, 0.0) for phase in PHASES}


def rounds_split(setting: Setting, repeats: int) -> dict[str, float]:
    """Return the seconds of a round by phase, after a first one that does not count, as the mean of some rounds."""
    import torch

    from bellwether.client.optimizer import StackedAdamW
    from bellwether.model.lora import LoraLayers
    from benchmarks import ours
    from benchmarks.setting import make_clients

    clock = Clock()
    torch.set_num_threads(setting.threads)
    functions = {
        (ours, "mean_of"): AVERAGE,
        (StackedAdamW, "step"): OPTIMIZER,
        (StackedAdamW, "clip"): OPTIMIZER,
        (LoraLayers, "load"): SLOTS,
        (LoraLayers, "read"): SLOTS,
    }

    with tempfile.TemporaryDirectory() as place, timed_steps(clock, ours), patched(clock, functions):
        folder = make_model(setting, Path(place))
        round = ours.ours(setting, folder, make_clients(setting))
        round()
        clock.seconds.clear()
        for _ in range(repeats):
            with clock.during(TRAIN):
                round()
    return {phase: seconds / repeats for phase, seconds in clock.seconds.items()}


@contextlib.contextmanager
def timed_imports(clock: Clock) -> Iterator[None]:
    """Count the first import of each module, wherever it happens, to the imports."""
    find = "_find_and_load"
    with patched(clock, {(importlib._bootstrap, find): IMPORT}):
        yield


@contextlib.contextmanager
def timed_rooms(clock: Clock) -> Iterator[None]:
    """Count the work of the rooms that a run goes through to their phases."""
    from bellwether import federate
    from bellwether.client import score
    from bellwether.engine.local import LocalEngine
    from bellwether.exchange.messages import TrainTask
    from bellwether.runner import prepare as preparing
    from bellwether.runner import run as runner
    from bellwether.runner import wiring
    from bellwether.store.run_folder import RunFolder

    functions = {
        (preparing, "load_federated"): DATA,
        (preparing, "prepare_with"): DATA,
        (runner, "prepared_fingerprint"): DATA,
        (wiring, "weights_fingerprint"): BASE,
        (wiring, "score_held_out"): LOSS,
        (score, "generate"): GENERATION,
        (federate, "run_round"): SERVER,
        (RunFolder, "commit"): RECORDS,
        (RunFolder, "finish"): EXPORT,
    }

    def phase_of(engine: Any, tasks: Mapping[str, Any], deadline: float | None = None) -> str:
        return TRAIN if any(isinstance(task, TrainTask) for task in tasks.values()) else LOSS

    ask = mock.patch.object(LocalEngine, "ask", clock.timed_steps(phase_of, LocalEngine.ask))
    with patched(clock, functions), timed_steps(clock, runner, BASE), ask:
        yield


@contextlib.contextmanager
def timed_steps(clock: Clock, module: Any, loading: str = OTHER) -> Iterator[None]:
    """Count all from a training batch's embedding to the end of its backward pass to forward and backward.

    Args:
        clock: that counts.
        module: whose ``load_base`` loads the model.
        loading: the phase of loading.
    """
    import torch

    load_base, backward = module.load_base, torch.autograd.backward

    def begin(*_: Any) -> None:
        if torch.is_grad_enabled() and clock.phase not in (None, STEP):
            clock.enter(STEP)

    def load(*args: Any) -> Any:
        with clock.during(loading):
            base = load_base(*args)
        base.model.get_input_embeddings().register_forward_pre_hook(begin)
        return base

    def end(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        if clock.phase == STEP:
            clock.leave()

    with mock.patch.object(module, "load_base", load), mock.patch.object(torch.autograd, "backward", end):
        yield


def outside(phases: Mapping[str, float]) -> float:
    """Return the share of a round that is not forward and backward."""
    return 1 - phases.get(STEP, 0.0) / sum(phases.values())
