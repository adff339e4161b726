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
    from safetensors import SafetensorError

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}: give a folder with an adapter in PEFT's format.")
    try:
        stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = _read_tensors((folder / WEIGHTS_FILE).read_bytes())
        _check_plain_lora(stored, tensors)
        return Adapter(_config(stored, tuple(_modules(tensors))), tensors)
    except (*_BROKEN, SafetensorError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ModelError(f"The adapter in {folder} cannot be read: {reason}.") from error


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
    extras = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "alora_invocation_tokens")
    plain = stored.get("bias", "none") == "none" and not any(stored.get(name) for name in extras)
    pairs = {key(module) for module in _modules(tensors) for key in (key_a, key_b)}
    if stored.get("peft_type") != "LORA" or not plain or not pairs or pairs != tensors.keys():
        raise ValueError("it is not a plain LoRA adapter; only those can be used")
    rank = _number(stored, "r")
    for module in _modules(tensors):
        a_RI, b_OR = tensors[key_a(module)], tensors[key_b(module)]
        if a_RI.ndim != 2 or b_OR.ndim != 2 or not a_RI.shape[0] == b_OR.shape[1] == rank >= 1:
            raise ValueError(f"the tensors of {module} are not of rank {rank:g}, which {CONFIG_FILE} gives as r")


def _config(stored: Mapping[str, Any], modules: tuple[str, ...]) -> AdapterConfig:
    """Return the configuration that PEFT's ``adapter_config.json`` describes."""
    names = stored.get("target_modules")
    return AdapterConfig(
        rank=int(_number(stored, "r")),
        alpha=_number(stored, "lora_alpha"),
        dropout=_number(stored, "lora_dropout", 0.0),
        modules=modules,
        rslora=bool(stored.get("use_rslora", False)),
        fan_in_fan_out=bool(stored.get("fan_in_fan_out", False)),
        base_model=str(stored.get("base_model_name_or_path") or ""),
        target_modules=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def _number(stored: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a number of ``adapter_config.json``."""
    value = stored.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} in {CONFIG_FILE} is {repr(value)[:40]}, but a finite number is wanted")
    return float(value)


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
