"""From the recipe's ``method`` section to the method: one of ours, or a person's own function that returns one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from bellwether.errors import RecipeError
from bellwether.method.average import fedavg, fedprox, uniform
from bellwether.method.flexlora import flexlora
from bellwether.method.method import Method
from bellwether.method.scaffold import scaffold
from bellwether.method.server_optimizers import fedadagrad, fedadam, fedavgm, fedyogi
from bellwether.recipe.method import MethodSection, OwnMethod
from bellwether.tools.functions import load_function, naming

_OURS: dict[str, Callable[..., Method]] = {
    made.__name__: made
    for made in (fedavg, uniform, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, scaffold, flexlora)
}


def make_method(section: MethodSection) -> Method:
    """Return the method that a recipe names, with the hyperparameters that stand beside the name.

    Args:
        section: the recipe's ``method`` section; of one's own, the function is called with its parameters.

    Raises:
        RecipeError: a person's own function is not there, refuses its parameters, or returns no method.
    """
    if not isinstance(section, OwnMethod):
        return _OURS[section.name](**section.model_dump(exclude={"name"}))
    function = load_function(section.name)
    _check_parameters(section, function)
    with naming(f"method.name {section.name}", RecipeError):
        method = function(**section.parameters)
    if not isinstance(method, Method):
        raise RecipeError(f"method.name {section.name} returned a {type(method).__name__}; return a Method.")
    return method


def _check_parameters(section: OwnMethod, function: Callable[..., Any]) -> None:
    """Refuse parameters that a person's own function does not take, and values of another kind than its defaults."""
    taken = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return
    for name, value in section.parameters.items():
        if name not in taken:
            known = ", ".join(taken) or "none"
            raise RecipeError(
                f"method.parameters.{name} is given, but {section.name} takes no such one; known: {known}."
            )
        default = taken[name].default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecipeError(f"method.parameters.{name} is {value!r}, but {section.name} takes a number there.")
    missing = [name for name, one in taken.items() if one.default is one.empty and name not in section.parameters]
    if missing:
        raise RecipeError(f"{section.name} wants method.parameters.{missing[0]}, which is not given.")
