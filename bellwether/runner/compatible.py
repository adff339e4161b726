"""What goes together with a method: one table, of which recipes are checked and the documentation's table is made.

A rule asks a method's value, never its name, so it holds for a person's own method too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bellwether.method.method import Method, nothing_beside
from bellwether.method.named import our_methods
from bellwether.recipe.recipe import Recipe
from bellwether.tools.words import listed


@dataclass(frozen=True)
class Rule:
    """What some recipes ask for and not every method can do.

    Args:
        heading: what is asked for, in a few words.
        example: fields of a recipe that ask for it.
        refused: from recipe and method to the sentences that say what does not go together and what to do; none where
            the recipe does not ask for it, and where the method can do it.
    """

    heading: str
    example: Sequence[str]
    refused: Callable[[Recipe, Method], list[str]]


def _wrong_training(recipe: Recipe, method: Method) -> list[str]:
    name = recipe.method.name
    return [
        f"training.{field} is {json.dumps(value)}, but the method {name} is right only with {json.dumps(needed)}; set "
        f"training.{field}={json.dumps(needed)}, or take another method."
        for field, needed in method.needs.items()
        if (value := getattr(recipe.training, field)) != needed
    ]


def _unlike_ranks(recipe: Recipe, method: Method) -> list[str]:
    if not recipe.lora.ranks or method.mixed_ranks:
        return []
    able = " or ".join(name for name, ours in our_methods().items() if ours.mixed_ranks)
    return [
        f"lora.ranks gives clients unlike ranks, but the method {recipe.method.name} takes one rank for all; set "
        f"method.name to {able}, or leave lora.ranks out."
    ]


def _quantised(recipe: Recipe, method: Method) -> list[str]:
    if not method.folds or recipe.model.quantization == "none":
        return []
    return [
        f"The method {recipe.method.name} folds updates into the base, but model.quantization is "
        f"{recipe.model.quantization}; set model.quantization=none, or take another method."
    ]


def _bfloat16(recipe: Recipe, method: Method) -> list[str]:
    if not method.folds or recipe.model.dtype != "bfloat16":
        return []
    return [
        f"The method {recipe.method.name} folds updates into the base, whose weights would lose most of them in "
        f"{recipe.model.dtype}; set model.dtype=float32, or take another method."
    ]


def _error_feedback(recipe: Recipe, method: Method) -> list[str]:
    settings = recipe.compression
    if not method.begins_anew or settings.up == "none" or not settings.error_feedback:
        return []
    return [
        f"compression.up is {settings.up} with error feedback, but the method {recipe.method.name} begins every round "
        "with other factors, to which nothing that was left out before can be added; set "
        "compression.error_feedback=false, or take another method."
    ]


def _compressed_factors(recipe: Recipe, method: Method) -> list[str]:
    if not method.begins_anew or recipe.compression.down == "none":
        return []
    return [
        f"compression.down is {recipe.compression.down}, but the method {recipe.method.name} multiplies what clients "
        "trained with the factors that they were sent, which they would not have had so; set compression.down=none, or "
        "take another method."
    ]


def _preferences(recipe: Recipe, method: Method) -> list[str]:
    if not method.folds or recipe.training.loss != "dpo":
        return []
    return [
        f"The method {recipe.method.name} folds updates into the base, but training.loss dpo takes the base as it was "
        "for its reference; take another method, such as method.name=fedavg."
    ]


def _hidden_clients(recipe: Recipe, method: Method) -> list[str]:
    if not recipe.privacy.hides_clients:
        return []
    if method.weigh is None:
        why = "closes rounds with the updates themselves, where noise is added to their sum"
    elif method.returns is not nothing_beside:
        why = "lets clients send arrays beside the adapter, which nothing would bound"
    else:
        return []
    return [
        f"privacy.unit is client, but the method {recipe.method.name} {why}; set privacy.unit=example, or take another "
        "method, such as method.name=fedavg."
    ]


def _not_linear(recipe: Recipe, method: Method) -> list[str]:
    if not recipe.secure_aggregation.enabled or method.weigh is not None:
        return []
    able = listed([name for name, ours in our_methods().items() if ours.weigh is not None])
    return [
        f"secure_aggregation.enabled shows the server the sum of updates alone, but the method {recipe.method.name} "
        f"needs each of them; set method.name to one of {able}, or secure_aggregation.enabled=false."
    ]


RULES = (
    Rule("AdamW, schedules and clipping", ("training.optimizer=adamw",), _wrong_training),
    Rule("unlike ranks", ("lora.ranks=[2, 4]",), _unlike_ranks),
    Rule("a base in 8 or 4 bits", ("model.quantization=4bit",), _quantised),
    Rule("a base in bfloat16", ("model.dtype=bfloat16",), _bfloat16),
    Rule("preferences (dpo)", ("training.loss=dpo",), _preferences),
    Rule("few bits up, with error feedback", ("compression.up=4bit",), _error_feedback),
    Rule("clients hidden by noise", ("privacy.noise=1",), _hidden_clients),
    Rule("few bits down", ("compression.down=8bit",), _compressed_factors),
    Rule("secure aggregation", ("secure_aggregation.enabled=true",), _not_linear),
)


def refusals(recipe: Recipe, method: Method) -> list[str]:
    """Return a sentence for everything that a recipe asks for and its method cannot do."""
    return [sentence for rule in RULES for sentence in rule.refused(recipe, method)]
