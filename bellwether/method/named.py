"""From the recipe's ``method`` section to the method: one of ours, or a person's own function that returns one."""

from __future__ import annotations

from collections.abc import Callable

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
    with naming(f"method.name {section.name}", RecipeError):
        method = function(**section.parameters)
    if not isinstance(method, Method):
        raise RecipeError(f"method.name {section.name} returned a {type(method).__name__}; return a Method.")
    return method
