"""What coordinator and sites must have in common, as facts by name that can be compared one by one.

All of it is hashed to the terms under which a site takes part; each message names that hash.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bellwether.data.rows import TokenRow
from bellwether.exchange.adapter import key_a, key_b
from bellwether.model.base import Base
from bellwether.model.facts import ModelFacts
from bellwether.model.lora import adapter_config
from bellwether.recipe.recipe import Recipe
from bellwether.runner.prepare import proxy_facts
from bellwether.tools.version import VERSION
from bellwether.tools.words import clean, cut

# Flower's link does not compare versions itself, and the others decide the last bits of what is trained.
_PACKAGES = ("flwr", "torch", "transformers", "numpy")

BASE = "base model"  # the fact of that name

# Sections that say what a site does; others are the coordinator's business, or the machine's.
_SECTIONS = ("lora", "method", "training", "selection", "compression", "secure_aggregation", "evaluation")
# Of the section ``data`` what all who take part have in common.
AGREED_DATA = ("template", "reasoning", "date", "loss_on", "max_tokens")
ON_THIS_MACHINE = ("selection.proxy", "selection.projection_sources")


def facts_of(recipe: Recipe, base: Base, public: Sequence[TokenRow]) -> dict[str, str]:
    """Return what a process works with, by name.

    Args:
        recipe: what is to be run.
        base: the base model.
        public: rows of public text that the space of a selection is fitted on, which all must have alike.
    """
    digest = hashlib.sha256()
    for row in public:
        digest.update(len(row).to_bytes(8, "big") + row.ids_T.tobytes())
    text = {"public text": digest.hexdigest()} if public else {}
    proxy = proxy_facts(recipe.selection)
    model = model_facts(recipe, base.facts, base.tokenizer, base.fingerprint)
    return {**settings_of(recipe), **versions(), **model, **text, **proxy}


def settings_of(recipe: Recipe) -> dict[str, str]:
    """Return the fields of a recipe that say what a site does."""
    chosen: dict[str, Any] = {name: getattr(recipe, name).model_dump(mode="json") for name in _SECTIONS}
    data = recipe.data.model_dump(mode="json")
    chosen["data"] = {name: data[name] for name in AGREED_DATA}
    chosen["model"] = {"dtype": recipe.model.dtype, "quantization": recipe.model.quantization}
    chosen["federation"] = {"rounds": recipe.federation.rounds}
    return {name: value for name, value in _flat(chosen, "") if name not in ON_THIS_MACHINE}


def versions() -> dict[str, str]:
    """Return the versions that matter."""
    return {"bellwether": VERSION, **{package: importlib.metadata.version(package) for package in _PACKAGES}}


def model_facts(recipe: Recipe, facts: ModelFacts, tokenizer: Any, fingerprint: str) -> dict[str, str]:
    """Return hashes of weights, tokenizer, chat template and the adapter's tensors.

    Args:
        recipe: its lora section says which tensors there are.
        facts: the base model's.
        tokenizer: the base model's.
        fingerprint: of its weights.
    """
    shapes = {shape.path: (shape.inputs, shape.outputs) for shape in facts.linears}
    keys = [(key_a(module), key_b(module), shapes[module]) for module in adapter_config(facts, recipe.lora).modules]
    return {
        BASE: fingerprint,
        "tokenizer": _tokenizer_hash(tokenizer),
        "chat template": _hash(str(getattr(tokenizer, "chat_template", None) or "")),
        "adapter": _hash(json.dumps(keys)),
    }


def differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Return a clause for each fact that is another one here than at the coordinator.

    The clauses are for both: none tells the coordinator the value of a fact of which it has said none itself, nor a
    person here anything but one line.

    Args:
        theirs: the coordinator's, whatever it may have sent.
        ours: this site's.
    """
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return [_differs(name, ours.get(name), theirs.get(name)) for name in names]


def _differs(name: str, ours: str | None, theirs: str | None) -> str:
    named = cut(clean(name))
    if ours is None or theirs is None:
        return f"{named} is missing {'here' if ours is None else 'at the coordinator'}"
    return f"{named} is {_short(ours)} here and {_short(theirs)} at the coordinator"


def _short(value: str) -> str:
    return clean(f"{value[:12]}…" if len(value) > 40 else value)


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the fields below a section, by their dotted names, as JSON."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, json.dumps(value)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _hash(whole + json.dumps(sorted((str(k), str(v)) for k, v in tokenizer.special_tokens_map.items())))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
