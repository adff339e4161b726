"""The ways that are timed, and the rules by which each goes through its rows, in the two tables.

As released, each way keeps its own order of rows, loss positions, accumulation and gradient checkpointing. With equal
work all take the loss on responses only, group batches by length where they have more than a row, step after each
batch, and checkpoint nothing.

Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.setting import Setting
from benchmarks.worker import Job

# How a rival's seconds are spent.
LOADING = "loading or copying the model"
BUILDING = "building the trainer"
GARBAGE = "garbage collection, once a trainer"
DATA = "data loading and collation"
STEP = "forward and backward"
REST = "optimizer, logging, callbacks and the rest of training"
ADAPTERS = "adapters and average"
PHASES = (LOADING, BUILDING, GARBAGE, DATA, STEP, REST, ADAPTERS)


@dataclass(frozen=True)
class Rules:
    """How a way goes through its rows.

    Args:
        responses: whether the loss is on responses only.
        grouped: whether rows of like length share a batch; else they come in random order.
        checkpointing: whether activations are computed again in the backward pass.
        accumulation: batches of an optimizer step.
        logging_steps: optimizer steps between two logged losses, where the trainer logs.
        models_loss: whether TRL's trainer takes the model's own loss.
    """

    responses: bool = True
    grouped: bool = True
    checkpointing: bool = False
    accumulation: int = 1
    logging_steps: int = 10
    models_loss: bool = False


@dataclass(frozen=True)
class Way:
    """One row of a table.

    Args:
        make: the function that gives a round, as ``module:function``.
        rules: of a rival, None for bellwether.
        options: further arguments of the function.
        change: fields of the setting that are others for this way.
        bare: the row of the bare loop over this way's own batches.
    """

    make: str
    rules: Rules | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    change: Mapping[str, Any] = field(default_factory=dict)
    bare: str | None = None

    def job(self, setting: Setting, folder: Path) -> Job:
        """Return what this way's process shall do."""
        options = {**self.options} if self.rules is None else {**self.options, "rules": self.rules}
        return Job(self.make, replace(setting, **self.change), folder, options, _MODULES.get(self.make, ()))


_OURS = ("transformers.models.llama.modeling_llama",)
_PEFT = ("transformers.models.llama.modeling_llama", "peft", "datasets", "transformers.trainer")
_MODULES = {
    "benchmarks.ours:ours": _OURS,
    "benchmarks.rivals:shepherd": _PEFT,
    "benchmarks.rivals:openfedllm": (*_PEFT, "trl.trainer.sft_trainer"),
    "benchmarks.rivals:flowertune": (*_PEFT, "trl.trainer.sft_trainer"),
    "benchmarks.rivals:fedhds": _PEFT[:2],
    "benchmarks.rivals:plain": _PEFT[:2],
    "benchmarks.rivals:bare": (*_PEFT, "trl.trainer.sft_trainer"),
}

OURS = "bellwether"
BATCH_ONE = {"batch": 1}
RATES = "matrix rate"


def bellwether(clients: int) -> dict[str, Way]:
    """Return bellwether's rows for so many clients in a round."""
    make, together, split = "benchmarks.ours:ours", {"together": clients, "tokens": 1024}, {"processes": 2}
    return {
        OURS: Way(make),
        "bellwether, two processes": Way(make, options=split),
        "bellwether, together": Way(make, options=together),
        "bellwether, batch 1": Way(make, change=BATCH_ONE),
        "bellwether, together, batch 1": Way(make, options=together, change=BATCH_ONE),
        "bellwether, two processes, together, batch 1": Way(make, options=together | split, change=BATCH_ONE),
        "bellwether, bfloat16": Way(make, change={"dtype": "bfloat16"}),
        "bellwether, two processes, bfloat16": Way(make, options=split, change={"dtype": "bfloat16"}),
    }


def released(clients: int) -> dict[str, Way]:
    """Return the rows of the table of ways as released."""
    shepherd = Rules(responses=False, accumulation=8, logging_steps=1)
    openfedllm = Rules(grouped=False, checkpointing=True, logging_steps=100)
    flowertune = replace(openfedllm, logging_steps=10)
    return bellwether(clients) | _with_bare(
        {
            "shepherd": _rival("shepherd", shepherd),
            "openfedllm": _rival("openfedllm", openfedllm),
            "openfedllm, no checkpointing": _rival("openfedllm", replace(openfedllm, checkpointing=False)),
            "openfedllm, no checkpointing, model's loss": _rival(
                "openfedllm", replace(openfedllm, checkpointing=False, models_loss=True)
            ),
            "flowertune": _rival("flowertune", flowertune),
            "flowertune, no checkpointing": _rival("flowertune", replace(flowertune, checkpointing=False)),
            "flowertune, no checkpointing, model's loss": _rival(
                "flowertune", replace(flowertune, checkpointing=False, models_loss=True)
            ),
            "fedhds, batch 1": _rival("fedhds", Rules(grouped=False), BATCH_ONE),
        }
    )


def equal(clients: int) -> dict[str, Way]:
    """Return the rows of the table of equal work."""
    loss = Rules(models_loss=True)
    return (
        bellwether(clients)
        | _with_bare(
            {
                "shepherd": _rival("shepherd", Rules(logging_steps=1)),
                "openfedllm": _rival("openfedllm", Rules(logging_steps=100)),
                "openfedllm, model's loss": _rival("openfedllm", replace(loss, logging_steps=100)),
                "flowertune": _rival("flowertune", Rules()),
                "flowertune, model's loss": _rival("flowertune", loss),
                "fedhds, batch 1": _rival("fedhds", Rules(), BATCH_ONE),
            }
        )
        | {
            "bare loop of shepherd, freed memory kept": Way(
                "benchmarks.rivals:bare", Rules(), {"rival": "shepherd", "keep_memory": True}
            )
        }
    )


TABLES = {"released": released, "equal": equal}


def matrix_rate() -> dict[str, Way]:
    """Return the row that measures what the floor is divided by, in turn with the others."""
    return {RATES: Way("benchmarks.floor:rates")}


def _rival(name: str, rules: Rules, change: Mapping[str, Any] | None = None) -> Way:
    return Way(f"benchmarks.rivals:{name}", rules, change=change or {})


def _with_bare(rivals: Mapping[str, Way]) -> dict[str, Way]:
    """Return rivals with the bare loops that they are compared with; alike batches share one."""
    bare: dict[tuple[Any, ...], tuple[str, Way]] = {}
    rows: dict[str, Way] = {}
    for name, way in rivals.items():
        rival = way.make.partition(":")[2]
        assert way.rules is not None
        kind = "trl" if rival in ("openfedllm", "flowertune") else rival
        rules = replace(way.rules, models_loss=False, logging_steps=10)
        key = (kind, rules, tuple(way.change.items()))
        loop = Way("benchmarks.rivals:bare", rules, {"rival": rival}, way.change)
        bare.setdefault(key, (f"bare loop of {name}", loop))
        rows[name] = replace(way, bare=bare[key][0])
    return rows | dict(bare.values())
