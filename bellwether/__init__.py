"""bellwether: federated instruction tuning of language models.

The base model stays frozen at every client, only LoRA adapters travel, a server aggregates them.

    from bellwether import load_recipe, run
    result = run(load_recipe("default", ["seed=1"]))

Importing this package imports nothing heavy; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bellwether.adapter import Adapter as Adapter
    from bellwether.adapter import AdapterConfig as AdapterConfig
    from bellwether.errors import BellwetherError as BellwetherError
    from bellwether.messages import Update as Update
    from bellwether.randomness import Randomness as Randomness
    from bellwether.recipe import Recipe as Recipe
    from bellwether.recipe_file import load_recipe as load_recipe
    from bellwether.runner import Result as Result
    from bellwether.runner import run as run

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "BellwetherError",
    "Randomness",
    "Recipe",
    "Result",
    "Update",
    "__version__",
    "load_recipe",
    "run",
]

_HOMES = {
    "Adapter": "adapter",
    "AdapterConfig": "adapter",
    "BellwetherError": "errors",
    "Randomness": "randomness",
    "Recipe": "recipe",
    "Result": "runner",
    "Update": "messages",
    "load_recipe": "recipe_file",
    "run": "runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bellwether' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bellwether.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
