"""From the recipe's ``method`` section to the method: one of ours, or a person's own function that returns one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from bellwether.errors import RecipeError
from bellwether.method.average import fedavg, fedprox, uniform
from bellwether.method.exact import fedex_lora, flora
from bellwether.method.flexlora import flexlora
from bellwether.method.halves import ffa_lora, rolora
from bellwether.method.hetlora import hetlora
from bellwether.method.method import Method, Pass
from bellwether.method.personal import ditto, feddpa, fedsa_lora, fine_tuned
from bellwether.method.private import Noise, client_level
from bellwether.method.scaffold import scaffold
from bellwether.method.server_optimizers import fedadagrad, fedadam, fedavgm, fedyogi
from bellwether.recipe.method import MethodSection, OwnMethod
from bellwether.recipe.privacy import Privacy
from bellwether.recipe.recipe import Training
from bellwether.tools.functions import load_function, naming

_OURS: dict[str, Callable[..., Method]] = {
    made.__name__: made
    for made in (
        *(fedavg, uniform, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, scaffold),
        *(ffa_lora, rolora, flora, fedex_lora, flexlora, hetlora, fedsa_lora, ditto, feddpa),
    )
}


def our_methods() -> dict[str, Method]:
    """Return the methods that a recipe names by a word, each with the hyperparameters that it begins with."""
    return {name: made() for name, made in _OURS.items()}


def make_method(section: MethodSection, privacy: Privacy | None = None, noise: Noise | None = None) -> Method:
    """Return the method that a recipe names, with the hyperparameters that stand beside the name.

    Args:
        section: the recipe's ``method`` section; of one's own, the function is called with its parameters.
        privacy: the recipe's ``privacy`` section; where it hides clients, updates are clipped and their sum gets noise;
            None hides nobody.
        noise: what the server adds then; clients, and who closes no round, need none.

    Raises:
        RecipeError: a person's own function is not there, refuses its parameters, or returns no method.
    """
    method = _plain_method(section)
    if privacy is None or not privacy.hides_clients:
        return method
    return client_level(method, privacy, noise)


def _plain_method(section: MethodSection) -> Method:
    """Return the method as it is without privacy."""
    if not isinstance(section, OwnMethod):
        method: Method = _OURS[section.name](**section.model_dump(exclude={"name", "fine_tune"}))
        return fine_tuned(method) if getattr(section, "fine_tune", False) else method
    function = load_function(section.name)
    _check_parameters(section, function)
    with naming(f"method.name {section.name}", RecipeError):
        own = function(**section.parameters)
    return _checked(own, f"method.name {section.name}")


def _checked(method: Any, who: str) -> Method:
    """Return a method of a person's own; refuse what is none, or has parts of another kind than they must be."""
    if not isinstance(method, Method):
        raise RecipeError(f"{who} returned a {type(method).__name__}; return a Method.")
    for part in ("close", "begin", "give", "finish", "returns", "bound", "serves"):
        if not callable(getattr(method, part)):
            raise RecipeError(f"{who} returned a Method whose {part} is no function.")
    if not method.passes or not all(isinstance(one, Pass) for one in method.passes):
        raise RecipeError(f"{who} returned a Method whose passes are {method.passes!r}; give at least one Pass.")
    unknown = [field for field in method.needs if field not in Training.model_fields]
    if unknown:
        raise RecipeError(f"{who} needs training.{unknown[0]}, which is no field of a recipe.")
    if method.last is not None:
        _checked(method.last, f"{who}, in the last round,")
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
        default, wanted = taken[name].default, ""
        if isinstance(default, bool):
            wanted = "" if isinstance(value, bool) else "true or false"
        elif isinstance(default, int | float):
            wanted = "a number" if isinstance(value, bool) or not isinstance(value, int | float) else ""
        elif isinstance(default, str):
            wanted = "" if isinstance(value, str) else "a text"
        if wanted:
            raise RecipeError(f"method.parameters.{name} is {value!r}, but {section.name} takes {wanted} there.")
    single = {name: one for name, one in taken.items() if one.kind is not one.VAR_POSITIONAL}
    missing = [name for name, one in single.items() if one.default is one.empty and name not in section.parameters]
    if missing:
        raise RecipeError(f"{section.name} wants method.parameters.{missing[0]}, which is not given.")
