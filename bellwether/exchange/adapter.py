"""The adapter: a set of LoRA tensors with their configuration, read and written as PEFT does.

Tensors are NumPy arrays under PEFT's own keys, so that nothing above the model needs torch:

    base_model.model.<module path>.lora_A.weight   A, shape (rank, inputs)
    base_model.model.<module path>.lora_B.weight   B, shape (outputs, rank)

An adapted layer computes ``x W^T + scaling · x A^T B^T`` (Hu et al. 2021, arXiv 2106.09685,
section 4.1), with scaling = alpha / rank, or alpha / sqrt(rank) when ``rslora`` is set (Kalajdzievski
2023, arXiv 2312.03732).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import ModelError

Tensors = Mapping[str, NDArray[Any]]
Arrays = Mapping[str, NDArray[Any]]  # under names of a method's own

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# What PEFT writes beside, and what it does not need to run an adapter: where it comes from, and how it was begun.
_BESIDE = {
    *("auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
}
# What is read here. Anything else that is set changes what PEFT computes, or may do so in a version to come.
_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias"),
    *("fan_in_fan_out", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform"),
}
# Beginnings that leave the base as it is; others take from its weights what they put into A and B (PiSSA, OLoRA, ...).
_BEGINNINGS = ("true", "false", "gaussian", "orthogonal", "eva")
_LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")  # as PEFT finds the number of a module's layer


@dataclass(frozen=True)
class AdapterConfig:
    """What must be known beside the tensors to use an adapter.

    Args:
        rank: the number of rows of A and columns of B.
        alpha: LoRA's alpha; see ``scaling``.
        dropout: probability with which an input of an adapted layer is dropped in training.
        modules: full paths of the adapted modules, in the order of the model.
        rslora: whether the scaling is alpha / sqrt(rank) instead of alpha / rank.
        fan_in_fan_out: whether the adapted weights are stored as (inputs, outputs), as GPT-2 does.
        base_model: name or folder of the base model, as PEFT shall find it.
        target_modules: names by which PEFT shall find the modules, such as their last parts; empty
            stands for the full paths.
    """

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]
    rslora: bool = False
    fan_in_fan_out: bool = False
    base_model: str = ""
    target_modules: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """The factor before B·A."""
        return scaling_of(self, self.rank)


def scaling_of(config: AdapterConfig, rank: int) -> float:
    """Return the factor before B·A that a configuration would have with another rank."""
    return config.alpha / (math.sqrt(rank) if config.rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """LoRA tensors and their configuration."""

    config: AdapterConfig
    tensors: Tensors

    def with_tensors(self, tensors: Tensors) -> Adapter:
        """Return an adapter of the same configuration with other tensors."""
        return Adapter(self.config, dict(tensors))

    def updated(self, tensors: Tensors) -> Adapter:
        """Return an adapter with other values in some of its tensors, each in the precision that it has here."""
        changed = {key: np.asarray(value).astype(self.tensors[key].dtype) for key, value in tensors.items()}
        return self.with_tensors({**self.tensors, **changed})

    def fingerprint(self) -> str:
        """Return the SHA-256 of all keys, dtypes, shapes and bytes, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            value = np.ascontiguousarray(self.tensors[key])
            digest.update(f"{key}|{value.dtype.str}|{value.shape}|".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()


def flat(tensors: Tensors, order: Iterable[str]) -> NDArray[Any]:
    """Return tensors as one vector of P values.

    Args:
        tensors: by key.
        order: their keys in the order in which they stand in the vector.
    """
    return np.concatenate([np.asarray(tensors[key]).reshape(-1) for key in order])


def key_a(module: str) -> str:
    """Return the key of A for a module path."""
    return f"base_model.model.{module}.lora_A.weight"


def key_b(module: str) -> str:
    """Return the key of B for a module path."""
    return f"base_model.model.{module}.lora_B.weight"


def peft_config(config: AdapterConfig) -> dict[str, Any]:
    """Return the content of PEFT's ``adapter_config.json`` for this configuration."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha != int(config.alpha) else int(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules or config.modules),
        "use_rslora": config.rslora,
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": "none",
        "modules_to_save": None,
    }


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """Return the two files of PEFT's format, by name; the caller writes them atomically."""
    from safetensors.numpy import save

    config = adapter.config
    contiguous = {key: np.ascontiguousarray(adapter.tensors[key]) for key in sorted(adapter.tensors)}
    return {
        WEIGHTS_FILE: _in_order(save(contiguous, metadata={"format": "pt", "modules": json.dumps(config.modules)})),
        CONFIG_FILE: (json.dumps(peft_config(config), indent=2) + "\n").encode(),
    }


def _in_order(raw: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: safetensors shuffles it anew in every process."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def weights_header(text: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file as an object.

    Args:
        text: the bytes behind the eight that tell the header's length.

    Raises:
        ValueError: it is no JSON object, nested too deep, or names something twice.
    """
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that bellwether or PEFT wrote; the modules are those that it holds tensors for.

    Args:
        folder: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelError: a file is missing or broken, a number is not finite, or the adapter is not a plain LoRA one.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}: give a folder with an adapter in PEFT's format.")
    try:
        return decode_adapter((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"The adapter in {folder} cannot be read: {str(error).rstrip('.')}.") from error


def decode_adapter(config: bytes, weights: bytes) -> Adapter:
    """Return the adapter that the contents of PEFT's two files describe.

    Args:
        config: of ``adapter_config.json``.
        weights: of ``adapter_model.safetensors``.

    Raises:
        ValueError: one is broken, a number is not finite, or the adapter is not a plain LoRA one.
    """
    from safetensors import SafetensorError

    try:
        stored = json.loads(config.decode())
        tensors = _read_tensors(weights)
        _check_plain_lora(stored, tensors)
        return Adapter(_config(stored, tuple(_modules(tensors))), tensors)
    except (*_BROKEN, SafetensorError) as error:
        raise ValueError(str(error).rstrip(".") or type(error).__name__) from error


# What the content of a broken file can raise on its way through a parser.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object, of which no two may have one name."""
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header names {twice!r} more than once")
    return values


def _read_tensors(raw: bytes) -> dict[str, NDArray[Any]]:
    """Return the tensors of a safetensors file: finite floats, in the order of the model where the file tells it."""
    from safetensors.numpy import load

    try:
        tensors: dict[str, NDArray[Any]] = load(raw)
    except KeyError as error:
        raise ValueError(f"it is stored as {error.args[0]}, which NumPy does not have; save it as float32") from error
    for key, value in tensors.items():
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            raise ValueError(f"{key} holds something else than finite floats")
    header = weights_header(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    # A weights file has an order of its own; where we wrote it, it also tells that of the model.
    ordered = json.loads((header.get("__metadata__") or {}).get("modules", "[]"))
    keys = [key(module) for module in ordered for key in (key_a, key_b)]
    return {key: tensors[key] for key in keys} if sorted(keys) == sorted(tensors) else tensors


def _modules(tensors: Tensors) -> list[str]:
    """Return the paths of the modules that there is an A for, in the order of the tensors."""
    prefix, suffix = key_a("|").split("|")
    return [key[len(prefix) : -len(suffix)] for key in tensors if key.startswith(prefix) and key.endswith(suffix)]


def _check_plain_lora(stored: Any, tensors: Tensors) -> None:
    """Refuse a stored adapter that is not pairs of A and B of one rank and one alpha, and nothing else."""
    if not isinstance(stored, dict):
        raise ValueError(f"{CONFIG_FILE} is no JSON object")
    for name, value in stored.items():
        if value and name not in _READ | _BESIDE:
            raise _not_plain(f"{CONFIG_FILE} sets {_short(name)} to {_short(value)}")
    begun = stored.get("init_lora_weights")
    for name, value, plain in (
        ("peft_type", stored.get("peft_type"), ("LORA",)),
        ("task_type", stored.get("task_type"), ("CAUSAL_LM", None)),
        ("bias", stored.get("bias"), ("none", None)),
        ("init_lora_weights", None if begun is None else str(begun).lower(), (*_BEGINNINGS, None)),
    ):
        if value not in plain:
            raise _not_plain(f"{name} in {CONFIG_FILE} is {_short(stored.get(name))}")
    modules = _modules(tensors)
    if not modules or {key(module) for module in modules for key in (key_a, key_b)} != tensors.keys():
        raise _not_plain("its tensors are not pairs of A and B")
    _check_rank(stored, tensors, modules)
    _check_modules(stored, modules)


def _not_plain(reason: str) -> ValueError:
    """Return the error for an adapter that computes something else than LoRA does."""
    return ValueError(f"it is not a plain LoRA adapter, since {reason}; only those can be used")


def _check_rank(stored: Mapping[str, Any], tensors: Tensors, modules: Sequence[str]) -> None:
    """Refuse tensors that are not of the rank that the configuration names."""
    rank = _number(stored, "r")
    for module in modules:
        a_RI, b_OR = tensors[key_a(module)], tensors[key_b(module)]
        if a_RI.ndim != 2 or b_OR.ndim != 2 or not a_RI.shape[0] == b_OR.shape[1] == rank >= 1:
            raise ValueError(f"the tensors of {module} are not of rank {rank:g}, which {CONFIG_FILE} gives as r")
    if not isinstance(stored["r"], int):
        raise ValueError(f"r in {CONFIG_FILE} is {stored['r']}, but a whole number is wanted")


def _check_modules(stored: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Refuse tensors of modules that PEFT would leave out; patterns are not tried, since one can take for ever."""
    targets, excluded = _names(stored, "target_modules"), _names(stored, "exclude_modules")
    layers = stored.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"layers_to_transform in {CONFIG_FILE} is {_short(layers)}, but whole numbers are wanted")
    for module in sorted(modules):
        layer = _LAYER.match(module)
        for name, left_out in (
            ("target_modules", bool(targets) and not _is_among(module, targets)),
            ("exclude_modules", _is_among(module, excluded)),
            ("layers_to_transform", bool(numbers) and not (layer and int(layer[1]) in numbers)),
        ):
            if left_out and not (name == "layers_to_transform" and stored.get("layers_pattern")):
                raise ValueError(f"it holds tensors for {module}, which {name} in {CONFIG_FILE} leaves out")


def _names(stored: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of modules' names; nothing for a pattern, or where there is none."""
    value = stored.get(name)
    if value is not None and not isinstance(value, str | list):
        raise ValueError(f"{name} in {CONFIG_FILE} is {_short(value)}, but names of modules are wanted")
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _is_among(module: str, names: Sequence[str]) -> bool:
    """Return whether one of the names is a module's path, or the end of it."""
    return module in names or module.endswith(tuple(f".{name}" for name in names))


def _config(stored: Mapping[str, Any], modules: tuple[str, ...]) -> AdapterConfig:
    """Return the configuration that PEFT's ``adapter_config.json`` describes."""
    dropout, base = _number(stored, "lora_dropout", 0.0), stored.get("base_model_name_or_path")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout in {CONFIG_FILE} is {dropout:g}, but a probability below 1 is wanted")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base_model_name_or_path in {CONFIG_FILE} is {_short(base)}, but text is wanted")
    return AdapterConfig(
        rank=int(_number(stored, "r")),
        alpha=_number(stored, "lora_alpha"),
        dropout=dropout,
        modules=modules,
        rslora=_flag(stored, "use_rslora"),
        fan_in_fan_out=_flag(stored, "fan_in_fan_out"),
        base_model=base or "",
        target_modules=_names(stored, "target_modules"),
    )


def _number(stored: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a number of ``adapter_config.json``."""
    value = stored.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} in {CONFIG_FILE} is {_short(value)}, but a finite number is wanted")
    return float(value)


def _flag(stored: Mapping[str, Any], name: str) -> bool:
    """Return whether something is switched on in ``adapter_config.json``; text that says so is no switch."""
    value = stored.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} in {CONFIG_FILE} is {_short(value)}, but true or false is wanted")
    return bool(value)


def _short(value: Any) -> str:
    """Return a value as messages show it."""
    return repr(value)[:40]


def stacked(parts: Sequence[Adapter]) -> Adapter:
    """Return one adapter whose product is the sum of several adapters' products; their ranks add up.

    Args:
        parts: adapters for the same modules, at least one; the scaling of each is taken up by its B.
    """
    first, rank = parts[-1].config, sum(part.config.rank for part in parts)
    tensors: dict[str, NDArray[Any]] = {}
    for module in first.modules:
        dtype = parts[-1].tensors[key_b(module)].dtype
        scaled = [part.config.scaling * part.tensors[key_b(module)].astype(np.float64) for part in parts]
        tensors[key_a(module)] = np.concatenate([part.tensors[key_a(module)] for part in parts]).astype(dtype)
        tensors[key_b(module)] = np.concatenate(scaled, axis=1).astype(dtype)
    return Adapter(replace(first, rank=rank, alpha=float(rank), rslora=False), tensors)


def side_by_side(adapters: Sequence[Adapter | None]) -> tuple[AdapterConfig, list[Tensors]]:
    """Return a configuration that several adapters of one base can share, and the tensors of each in it.

    The rank is the largest, the scaling is 1 and taken up by B, and what an adapter lacks of rank or modules is zero:
    each computes what it did, but for one rounding of B where its scaling is no power of two.

    Args:
        adapters: at least one; None is the untuned base, zeros throughout.

    Raises:
        ValueError: all are None, or the sizes of a module are not the same everywhere.
    """
    tuned = [adapter for adapter in adapters if adapter is not None]
    rank = max(adapter.config.rank for adapter in tuned)
    sizes = {
        module: (adapter.tensors[key_a(module)].shape[1], adapter.tensors[key_b(module)].shape[0])
        for adapter in tuned
        for module in adapter.config.modules
    }
    config = replace(
        tuned[0].config, rank=rank, alpha=float(rank), rslora=False, modules=tuple(sizes), target_modules=()
    )
    return config, [_filled_up(adapter, rank, sizes) for adapter in adapters]


def _filled_up(adapter: Adapter | None, rank: int, sizes: Mapping[str, tuple[int, int]]) -> Tensors:
    """Return an adapter's tensors with zeros for what it lacks, for a scaling of 1."""
    own: Tensors = {} if adapter is None else adapter.tensors
    dtype = np.result_type(np.float32, *(value.dtype for value in own.values()))
    tensors: dict[str, NDArray[Any]] = {}
    for module, (inputs, outputs) in sizes.items():
        a_RI, b_OR = np.zeros((rank, inputs), dtype), np.zeros((outputs, rank), dtype)
        if adapter is not None and key_a(module) in own:
            a_RI[: adapter.config.rank] = own[key_a(module)]
            b_OR[:, : adapter.config.rank] = adapter.config.scaling * own[key_b(module)].astype(np.float64)
        tensors |= {key_a(module): a_RI, key_b(module): b_OR}
    return tensors
