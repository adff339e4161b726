"""A person's own function, named in a recipe as ``package.module:function``: loading it, and saying where it failed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import Any

from bellwether.errors import BellwetherError, RecipeError


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that a recipe names; the current directory is searched as Python would.

    This is the one place where a string in a recipe becomes code, with the rights of whoever runs it. The command
    asks before it runs what a file or folder names (``recipe.consent``); who calls from Python answers for the recipe.

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


def file_of(name: str) -> str | None:
    """Return the file that a function would be loaded from, without importing anything; None where there is none.

    Args:
        name: ``package.module:function``.
    """
    module_name = name.partition(":")[0]
    if module_name in sys.modules:
        return getattr(sys.modules[module_name], "__file__", None)
    first, *inner = module_name.split(".")
    try:
        found = PathFinder.find_spec(first, [os.getcwd()]) if os.getcwd() not in sys.path else None
        found = found or importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    for part in inner:
        if found is None or found.submodule_search_locations is None:
            return None
        found = PathFinder.find_spec(f"{found.name}.{part}", found.submodule_search_locations)
    return found.origin if found else None


@contextlib.contextmanager
def naming(what: str, kind: type[BellwetherError]) -> Iterator[None]:
    """Turn any error of a person's own function, called inside, into one sentence that says where it arose.

    Args:
        what: what failed, which opens the sentence.
        kind: the error to raise instead; one of ours passes as it is.

    Raises:
        BellwetherError: of that kind, whatever was raised inside.
    """
    try:
        yield
    except BellwetherError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise kind(f"{what} failed at {place.filename}:{place.lineno} ({type(error).__name__}: {error}).") from error
