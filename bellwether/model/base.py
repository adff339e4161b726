"""The frozen base model: what can be known before it is loaded, loading it, and proving it unchanged.

opened = open_base(Recipe().model)            # configuration, tokenizer, shapes; no weights
base = load_base(Recipe().model, opened)      # model, tokenizer, device
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bellwether.errors import ModelError
from bellwether.model.facts import LinearShape, ModelFacts
from bellwether.model.folder import ModelFolder, find_folder, weight_files, with_weights
from bellwether.model.loading import empty_model, load_weights, pick_device, read_config, read_tokenizer, ready_device
from bellwether.model.quantized import check_quantization
from bellwether.model.tried import called_modules, check_causal
from bellwether.recipe import recipe
from bellwether.tools.progress import advance


@dataclass(frozen=True)
class OpenedBase:
    """A base model of which everything is known but its weights.

    Args:
        folder: its files.
        config: its configuration as transformers reads it.
        tokenizer: its tokenizer; ``pad_token_id`` is always set and inside the embedding.
        facts: shapes and names.
    """

    folder: ModelFolder
    config: Any
    tokenizer: Any
    facts: ModelFacts


@dataclass(frozen=True)
class Base:
    """A loaded base model: frozen, in evaluation mode, shared by all clients.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer; ``pad_token_id`` is always set and inside the embedding.
        device: where the model is.
        name: hub name or absolute folder.
        fingerprint: SHA-256 of its weights, as ``weights_fingerprint`` returns it.
        facts: what was known before it was loaded.
        stop_ids: token ids that end an answer.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    name: str
    fingerprint: str
    facts: ModelFacts
    stop_ids: tuple[int, ...]


def open_base(settings: recipe.Model) -> OpenedBase:
    """Open a base model: find out everything about it that needs no weights, and check that it can be used.

    The model is built on torch's meta device, so that even a large one costs no memory; safetensors
    files are compared with their headers, so that one that was cut off is noticed here, and weights of another shape. A
    tokenizer without a padding token pads with its end-of-sequence token; the embedding is never enlarged, and what is
    padding is said by the attention mask, never by the token.

    Raises:
        ModelError: folder, configuration, architecture, tokenizer or weight files cannot be used, or the weights cannot
            be quantised here.
    """
    folder = find_folder(settings)
    config = read_config(folder, settings)
    facts = _facts(folder, empty_model(folder, config, settings), weight_files(folder, settings))
    tokenizer = _tokenizer(folder, settings, config, facts.vocabulary)
    if settings.quantization != "none":
        check_quantization(facts, settings.quantization, pick_device(settings.device))
    return OpenedBase(folder, config, tokenizer, facts)


def load_base(settings: recipe.Model, opened: OpenedBase | None = None) -> Base:
    """Load a base model, frozen and in evaluation mode, with its tokenizer.

    Args:
        settings: which model, and its precision, quantisation, attention, device and threads.
        opened: what ``open_base`` returned for these settings, up to threads; None opens it now.

    Raises:
        ModelError: what ``open_base`` raises; the precision is not settled; the device is not there; a weight is
            missing, has another shape, or is not finite; or the model, when it is tried, looks ahead.
    """
    if settings.dtype == "auto":
        raise ModelError("model.dtype auto names no precision yet; runner.precision.with_precision finds it.")
    device = ready_device(settings)
    opened = opened or open_base(settings)
    tokenizer = opened.tokenizer
    advance("loading the base")
    model = load_weights(with_weights(opened.folder, settings), settings, device, opened.config)
    check_causal(model, opened.folder.name, opened.facts.vocabulary)
    stop_ids = _stop_ids(model, tokenizer)
    _plain_generation(model, stop_ids, tokenizer)
    return Base(model, tokenizer, device, opened.folder.name, weights_fingerprint(model), opened.facts, stop_ids)


def weights_fingerprint(model: Any) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all weights, as 64 hexadecimal digits.

    Weights are the parameters and the buffers that are saved with them. Tables that a model computes
    anew (rotary frequencies) do not count. A shared weight is hashed under its first name. Of quantised weights, the
    few bits are hashed and the scales that belong to them.
    """
    digest = hashlib.sha256()
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        if (tensor.data_ptr(), tensor.shape) in seen:
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}|{plain.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def linear_shapes(model: Any) -> tuple[LinearShape, ...]:
    """Return the linear modules of a model in its order, the output layer left out."""
    output = model.get_output_embeddings()
    shapes = ((path, module, _linear_shape(path, module)) for path, module in model.named_modules())
    return tuple(shape for _, module, shape in shapes if shape is not None and module is not output)


def _adaptable(model: Any) -> tuple[LinearShape, ...]:
    """Return the linear modules that a model calls; of one that cannot be tried without weights all of them."""
    called = called_modules(model)
    return tuple(shape for shape in linear_shapes(model) if called is None or shape.path in called)


def _stacked(model: Any) -> int:
    """Return the number of weights in arrays of several matrices, those of convolutions left out."""
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.modules.conv._ConvNd)]
    kernels = {id(parameter) for module in convolutions for parameter in module.parameters()}
    return sum(one.numel() for one in model.parameters() if one.dim() > 2 and id(one) not in kernels)


def output_shape(model: Any) -> LinearShape:
    """Return the linear module that makes a model's logits.

    Raises:
        ModelError: the model has none.
    """
    output = model.get_output_embeddings()
    for path, module in model.named_modules():
        shape = _linear_shape(path, module) if module is output else None
        if shape is not None:
            return shape
    raise ModelError(f"{type(model).__name__} has no linear output layer; give a causal language model.")


def _linear_shape(path: str, module: torch.nn.Module) -> LinearShape | None:
    """Return the shape of a linear module, None for any other."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return LinearShape(path, module.in_features, module.out_features, transposed=False)
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return LinearShape(path, int(inputs), int(outputs), transposed=True)
    return None


def _facts(folder: ModelFolder, model: Any, weight_bytes: Mapping[str, int]) -> ModelFacts:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return ModelFacts(
        name=folder.name,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden_size=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        max_positions=int(positions) if positions else None,
        linears=_adaptable(model),
        output_layer=output_shape(model),
        weight_bytes=weight_bytes,
        stacked=_stacked(model),
    )


def _tokenizer(folder: ModelFolder, settings: recipe.Model, config: Any, vocabulary: int) -> Any:
    """Return a base model's tokenizer, which must be able to end an answer and to pad."""
    tokenizer = read_tokenizer(folder, settings, config, vocabulary)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer in {folder.path} has no end-of-sequence token, so the model could not learn to stop; "
            "name one in tokenizer_config.json (eos_token)."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's end of sequence, and those the model names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    more = [named] if isinstance(named, int) else list(named or [])
    return tuple(sorted({int(tokenizer.eos_token_id), *map(int, more)}))


def _plain_generation(model: Any, stop_ids: tuple[int, ...], tokenizer: Any) -> None:
    """Replace the model's own generation settings, whose penalties would leak into greedy answers."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id)
