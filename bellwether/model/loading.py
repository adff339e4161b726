"""From a model's folder to its configuration, tokenizer and weights, each checked; of a base model or of a proxy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bellwether.errors import ModelError, first_line
from bellwether.model.folder import ModelFolder, check_tokenizer_files, quiet_transformers, stored_weights
from bellwether.model.memory import keep_freed_memory
from bellwether.model.plausible import check_numbers, check_shapes
from bellwether.model.quantized import keep_layout, loading_arguments
from bellwether.recipe import recipe

# A recipe names the first two; what is exported may have been stored in the third.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Buffers that old checkpoints carry and today's models compute.
_BENIGN_KEYS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
# Tokens of a tokenizer for pictures and sound, which a text model's embedding leaves out (Gemma 3).
_MEDIA_TOKENS = ("image_token", "audio_token", "video_token", "boi_token", "eoi_token", "boa_token", "eoa_token")
# What an encoder puts on the hidden state of its first token for the task that it was pretrained with.
_HEAD = "pooler."


def read_config(folder: ModelFolder, settings: recipe.Model) -> Any:
    """Return the configuration of a model as transformers reads it.

    Raises:
        ModelError: the architecture is unknown, brings its own code, is quantised or takes more than text, or a size is
            none that a model can have.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = folder.config.get("model_type")
    if not settings.trust_remote_code and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        if "auto_map" in folder.config:
            raise ModelError(
                f"The model {folder.name} brings its own Python code ({kind}); if you trust it, "
                "set model.trust_remote_code to true."
            )
        raise ModelError(
            f"{folder.path / 'config.json'}: model_type is {kind!r}, an architecture that transformers does not know."
        )
    if "quantization_config" in folder.config:
        raise ModelError(
            f"The model {folder.name} is quantised; give one with float weights, "
            "which model.quantization can hold in few bits."
        )
    if "vision_config" in folder.config or "audio_config" in folder.config:
        raise ModelError(f"The model {folder.name} also takes pictures or sound; give a text model.")
    check_numbers(folder)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=settings.trust_remote_code
            )
    # Configurations check themselves with errors of many types.
    except Exception as error:
        raise ModelError(f"{folder.path / 'config.json'} cannot be used: {_reason(error)}.") from error


def empty_model(folder: ModelFolder, config: Any, settings: recipe.Model, encoder: bool = False) -> Any:
    """Return a model without weights, on torch's meta device, its shapes compared with those of the weight files.

    Args:
        folder: where it is.
        config: as ``read_config`` returns it.
        settings: attention, and whether its own code is trusted.
        encoder: without its head, whatever that was made for; else a causal language model.

    Raises:
        ModelError: the configuration makes no such model, or one of other shapes.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            model = (AutoModel if encoder else AutoModelForCausalLM).from_config(
                copy.deepcopy(config),  # it would note its precision there
                attn_implementation=attention_of(settings),
                trust_remote_code=settings.trust_remote_code,
            )
    # Building a model from a wrong configuration fails with errors of many types.
    except Exception as error:
        if "attn_implementation" in str(error):
            raise ModelError(
                f"{folder.config.get('model_type')} has no {settings.attention} attention; set model.attention to auto."
            ) from error
        kind = "model" if encoder else "causal language model"
        raise ModelError(f"{folder.path / 'config.json'} makes no {kind}: {_reason(error)}.") from error
    check_shapes(folder, model)
    return model


def read_tokenizer(folder: ModelFolder, settings: recipe.Model, config: Any, vocabulary: int) -> Any:
    """Return a tokenizer, checked against the rows of an embedding.

    Args:
        folder: where it is.
        settings: whether its own code may run.
        config: of ``read_config``; where the tokenizer's files do not say its class, this does.
        vocabulary: rows of the embedding.

    Raises:
        ModelError: there is none, it cannot be read, or it knows more tokens than the embedding.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(folder)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder.path, config=config, local_files_only=True, trust_remote_code=settings.trust_remote_code
            )
    # Tokenizers of different families fail with errors of many types.
    except Exception as error:
        raise ModelError(f"The tokenizer in {folder.path} cannot be read: {first_line(error)}.") from error
    media = {getattr(tokenizer, name, None) for name in _MEDIA_TOKENS}
    largest = max((index for token, index in tokenizer.get_vocab().items() if token not in media), default=-1)
    if largest >= vocabulary:
        raise ModelError(
            f"The tokenizer in {folder.path} knows tokens up to number {largest}, but the model's embedding ends at "
            f"{vocabulary - 1}; give the tokenizer that the model was trained with."
        )
    return tokenizer


def load_weights(
    folder: ModelFolder, settings: recipe.Model, device: torch.device, config: Any, encoder: bool = False
) -> Any:
    """Return a transformers model from a folder: frozen, in evaluation mode, every weight checked.

    Args:
        folder: where it is.
        settings: precision, quantisation, attention.
        device: where its weights shall be.
        config: of ``read_config``.
        encoder: without its head, whatever that was made for; else a causal language model.

    Raises:
        ModelError: a weight is missing, unexpected, of another shape, or not finite.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    quantized, dtype = settings.quantization != "none", DTYPES[settings.dtype]
    if quantized:
        # Before they are quantised: in few bits, what is not finite would look like a number.
        _check_finite(folder, stored_weights(folder, settings))
    try:
        with quiet_transformers():
            model, report = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(
                folder.path,
                config=config,
                dtype=dtype,
                attn_implementation=attention_of(settings),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused by name
                **(loading_arguments(settings, device, dtype) if quantized else {}),
            )
    # transformers and safetensors raise many types here; all mean that the files do not make a model.
    except Exception as error:
        raise ModelError(f"The model in {folder.path} cannot be loaded: {first_line(error)}.") from error
    _check_report(folder, report, encoder)
    model.requires_grad_(False)
    model.eval()
    if quantized:
        keep_layout(model)
        return model
    _check_finite(folder, model.state_dict().items())
    return model.to(device)


def ready_device(settings: recipe.Model) -> torch.device:
    """Return the device that a model's settings name, after preparing this process for it.

    Raises:
        ModelError: as ``pick_device``.
    """
    device = pick_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
        if settings.dtype == "bfloat16":
            settle_attention(torch.bfloat16)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return device


def settle_attention(dtype: torch.dtype) -> None:
    """Let this process compute attention step by step where torch cannot do it at once in a precision on this CPU.

    On processors with AMX it cannot in bfloat16 where ``ATEN_CPU_CAPABILITY`` keeps it from AVX-512.

    Args:
        dtype: the precision.
    """
    x_NHTD = torch.zeros(1, 2, 200, 64, dtype=dtype)  # long enough for the kernels that longer texts take
    try:
        torch.nn.functional.scaled_dot_product_attention(x_NHTD, x_NHTD, x_NHTD, is_causal=True)
    except RuntimeError:
        torch.backends.cuda.enable_flash_sdp(False)  # counts on a CPU, too


def pick_device(name: str) -> torch.device:
    """Return the device that a recipe names; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ModelError: that device is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not (cuda and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if cuda else 0
        raise ModelError(f"model.device is {name}, but torch sees {count} CUDA devices here; give auto or cpu.")
    if device.type == "mps" and not mps:
        raise ModelError("model.device is mps, but torch sees no Apple GPU here; give auto or cpu.")
    return device


def attention_of(settings: recipe.Model) -> str | None:
    """Return the attention implementation to ask transformers for; None lets the architecture decide."""
    return None if settings.attention == "auto" else settings.attention


def _check_report(folder: ModelFolder, report: Mapping[str, Any], encoder: bool) -> None:
    """Refuse a checkpoint that does not hold exactly the model's weights, of an encoder but for its head."""
    missing = sorted(key for key in report["missing_keys"] if not (encoder and key.startswith(_HEAD)))
    unexpected = sorted(key for key in report["unexpected_keys"] if not (encoder or key.endswith(_BENIGN_KEYS)))
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for keys, what in ((missing, "lacks"), (unexpected, "holds unknown"), (mismatched, "has another shape for")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"The checkpoint in {folder.path} {what} {keys[0]}{more}; it does not belong to its config.json."
            )


def _reason(error: Exception) -> str:
    """Return what an error of transformers says on one line, of which the first alone often says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:300]}...").rstrip(".:")


def _check_finite(folder: ModelFolder, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that are not numbers."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"The weight {name} in {folder.path} holds NaN or infinity; copy the model again.")
