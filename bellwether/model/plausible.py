"""Whether a configuration can be meant: its numbers before a model is built of it, its shapes before weights are read.

A model is built as its configuration says, layer by layer and table by table, so that a wrong number there could take
hours, or all memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bellwether.errors import ModelError
from bellwether.model.folder import ModelFolder, stored_shapes
from bellwether.tools.words import byte_size

# Each layer, and each of its parts, takes a step to build; the deepest models known have some hundreds.
MOST_LAYERS = 1_000
MOST_PARTS = 10_000
LARGEST_SIZE = 100_000_000
_MOST_TABLES = 1_000_000_000  # bytes of what a model computes beside its weights, such as for each position

_LAYERS = re.compile(r"(num_hidden|num|n|(num_)?(en|de)coder)_layers?")
_SIZES = re.compile(
    r"(hidden|intermediate|vocab|embedding|word_embed_proj)_(size|dim)|head_dim|d_(model|ff|kv)|(ffn|model|ff)_dim"
    r"|num_(attention|key_value|kv)_heads|n_(embd?|heads?|positions|inner|ctx)|max_position_embeddings|max_seq_len"
)
# Other numbers of things; those that measure a layer or name a token are none.
_PARTS = re.compile(r"(?!.*(size|dim|norm|eps|length|id)).*(layer|block|group|depth|expert|types).*")

_MOST = {_LAYERS: MOST_LAYERS, _SIZES: LARGEST_SIZE, _PARTS: MOST_PARTS}


def check_numbers(folder: ModelFolder) -> None:
    """Check that the sizes in a model's ``config.json`` are whole numbers that a model can have.

    Raises:
        ModelError: one is not, or there are more layers than tensors in the weight files.
    """
    tensors = len(stored_shapes(folder.path))
    place = folder.path / "config.json"
    for name, value in _entries(folder.config):
        most = next((most for pattern, most in _MOST.items() if pattern.fullmatch(name)), None)
        if most is not None and not _is_plausible(value, most):
            raise ModelError(
                f"{place}: {name} is {repr(value)[:40]}, but a whole number from 0 to {most:,} is wanted; "
                "repair the model's folder."
            )
        if most == MOST_LAYERS and value is not None and 0 < tensors < value:
            raise ModelError(
                f"{place}: {name} is {value}, but the weight files hold {tensors} tensors, less than one for each; "
                "give the config.json that belongs to them."
            )


def _is_plausible(value: Any, most: int) -> bool:
    """Return whether a value of a configuration is left out, or a number that it can have."""
    if value is None:
        return True
    # Many things are only called like a number of parts: whether there are some, or of which kind.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if most == MOST_PARTS:
        return not number or value <= most
    return type(value) is int and 0 <= value <= most


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values at every depth of a configuration; those of a list under the list's own name."""
    waiting: list[tuple[str, Any]] = [("", dict(config))]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, entry) for entry in value]
        else:
            yield name, value


def check_shapes(folder: ModelFolder, model: Any) -> None:
    """Check that a model without weights has the shapes that its weight files hold, where these are here.

    Args:
        folder: the model's folder.
        model: the transformers model, on torch's meta device.

    Raises:
        ModelError: a weight has another shape, or tables beside the weights are too large to be meant.
    """
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    wrong = []
    for name, (file, shape) in stored_shapes(folder.path).items():
        # A base model's weights may be stored with or without its name before theirs.
        known = next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in wanted), None)
        if known is not None and wanted[known] != shape:
            wrong.append(
                f"The weight {name} has another shape in {folder.path / file} ({_shown(shape)}) than config.json asks "
                f"for ({_shown(wanted[known])})"
            )
    if wrong:
        more = f", and so have {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(f"{wrong[0]}{more}; give the config.json and the weights of one model.")
    _check_tables(folder, model)


def _shown(shape: tuple[int, ...]) -> str:
    """Return a shape as messages show it."""
    return " by ".join(map(str, shape)) or "a single number"


def _check_tables(folder: ModelFolder, model: Any) -> None:
    """Refuse tables that would take more memory than the weights, and much of it."""
    tables, weights = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for tensors in (model.buffers(), model.parameters())
    )
    if tables > weights + _MOST_TABLES:
        raise ModelError(
            f"{folder.path / 'config.json'} makes a model with {byte_size(tables)} of tables beside "
            f"{byte_size(weights)} of weights; one of its sizes must be wrong, such as that of positions."
        )
