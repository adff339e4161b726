"""Loading a person's own function, named in a recipe as ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from bellwether.errors import RecipeError


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that a recipe names; the current directory is searched as Python would.

    This is the one place where a string in a recipe becomes code. It is meant for the person who runs
    the recipe on their own machine.

    Args:
        name: ``package.module:function``.

    Raises:
        RecipeError: the module or the function is not there, or it is no function.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RecipeError(
            f"{name}: the module {module_name} cannot be imported ({type(error).__name__}: {error}); "
            f"it is searched in {os.getcwd()} and where Python finds packages."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RecipeError(f"{name}: the module {module_name} has no function {function_name}.")
    return function  # type: ignore[no-any-return]
