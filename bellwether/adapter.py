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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import ModelError

Tensors = Mapping[str, NDArray[Any]]

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
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """LoRA tensors and their configuration."""

    config: AdapterConfig
    tensors: Tensors

    def with_tensors(self, tensors: Tensors) -> Adapter:
        """Return an adapter of the same configuration with other tensors."""
        return Adapter(self.config, dict(tensors))

    def fingerprint(self) -> str:
        """Return the SHA-256 of all keys, dtypes, shapes and bytes, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            value = np.ascontiguousarray(self.tensors[key])
            digest.update(f"{key}|{value.dtype.str}|{value.shape}|".encode())
            digest.update(value.tobytes())
        return digest.hexdigest()


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


def _is_plain_lora(stored: Mapping[str, Any], tensors: Tensors) -> bool:
    """Return whether a stored adapter is pairs of A and B of one rank and one alpha, and nothing else."""
    extras = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "alora_invocation_tokens")
    pairs = all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    plain = stored.get("bias", "none") == "none" and not any(stored.get(name) for name in extras)
    return stored.get("peft_type") == "LORA" and plain and pairs and bool(tensors)


def _metadata(raw: bytes) -> Mapping[str, str]:
    """Return the metadata in the header of a safetensors file."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return dict(header.get("__metadata__") or {})


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that bellwether or PEFT wrote; the modules are those that it holds tensors for.

    Args:
        folder: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelError: a file is missing or broken, or the adapter is not a plain LoRA one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}: give a folder with an adapter in PEFT's format.")
    try:
        stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        raw = (folder / WEIGHTS_FILE).read_bytes()
        tensors = load(raw)
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"The adapter in {folder} cannot be read: {error}.") from error
    except KeyError as error:
        raise ModelError(
            f"The adapter in {folder} is stored as {error.args[0]}, which NumPy does not have; save it as float32."
        ) from error
    if not _is_plain_lora(stored, tensors):
        raise ModelError(f"The adapter in {folder} is not a plain LoRA adapter; only those can be used.")
    suffix = ".lora_A.weight"
    prefix = "base_model.model."
    modules = tuple(key[len(prefix) : -len(suffix)] for key in tensors if key.endswith(suffix))
    # A weights file has an order of its own; where we wrote it, it also tells that of the model.
    ordered = tuple(json.loads(_metadata(raw).get("modules", "[]")))
    if sorted(ordered) == sorted(modules):
        modules = ordered
        tensors = {key: tensors[key] for module in modules for key in (key_a(module), key_b(module)) if key in tensors}
    return Adapter(
        AdapterConfig(
            rank=int(stored["r"]),
            alpha=float(stored["lora_alpha"]),
            dropout=float(stored.get("lora_dropout", 0.0)),
            modules=modules,
            rslora=bool(stored.get("use_rslora", False)),
            fan_in_fan_out=bool(stored.get("fan_in_fan_out", False)),
            base_model=str(stored.get("base_model_name_or_path") or ""),
            target_modules=tuple(names) if isinstance(names := stored.get("target_modules"), list) else (),
        ),
        tensors,
    )
