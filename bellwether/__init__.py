"""bellwether: federated instruction tuning of language models.

The base model stays frozen at every client, only LoRA adapters travel, a server aggregates them.

    from bellwether import load_recipe, run
    result = run(load_recipe("default", ["seed=1"]))

Importing this package imports nothing heavy; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bellwether.tools.version import VERSION as __version__

if TYPE_CHECKING:
    from bellwether.arms.result import ComparisonResult as ComparisonResult
    from bellwether.arms.result import compare as compare
    from bellwether.errors import BellwetherError as BellwetherError
    from bellwether.exchange.adapter import Adapter as Adapter
    from bellwether.exchange.adapter import AdapterConfig as AdapterConfig
    from bellwether.exchange.messages import Payload as Payload
    from bellwether.exchange.messages import Update as Update
    from bellwether.method.method import Method as Method
    from bellwether.method.method import Pass as Pass
    from bellwether.method.method import State as State
    from bellwether.recipe.compare import Arm as Arm
    from bellwether.recipe.file import load_recipe as load_recipe
    from bellwether.recipe.recipe import Recipe as Recipe
    from bellwether.runner.run import Result as Result
    from bellwether.runner.run import run as run
    from bellwether.tools.randomness import Randomness as Randomness


__all__ = [
    "Adapter",
    "AdapterConfig",
    "Arm",
    "BellwetherError",
    "ComparisonResult",
    "Method",
    "Pass",
    "Payload",
    "Randomness",
    "Recipe",
    "Result",
    "State",
    "Update",
    "__version__",
    "compare",
    "load_recipe",
    "run",
]

_HOMES = {
    "Adapter": "exchange.adapter",
    "AdapterConfig": "exchange.adapter",
    "Arm": "recipe.compare",
    "BellwetherError": "errors",
    "ComparisonResult": "arms.result",
    "Randomness": "tools.randomness",
    "Recipe": "recipe.recipe",
    "Result": "runner.run",
    "Method": "method.method",
    "Pass": "method.method",
    "Payload": "exchange.messages",
    "State": "method.method",
    "Update": "exchange.messages",
    "compare": "arms.result",
    "load_recipe": "recipe.file",
    "run": "runner.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bellwether' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bellwether.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
