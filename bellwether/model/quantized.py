"""Frozen bases in 4 or 8 bits, made from float weights by bitsandbytes while these are loaded.

``4bit`` is NF4 with double quantisation, computing in ``model.dtype``, as in QLoRA (Dettmers et al. 2023,
arXiv 2305.14314, section 3); ``8bit`` is LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339), which computes inputs
above 6 in float. Linear layers are quantised; the output layer, embeddings and norms stay in ``model.dtype``.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch

from bellwether.errors import ModelError
from bellwether.recipe import recipe

if TYPE_CHECKING:
    from bellwether.model.facts import ModelFacts

BLOCK = 64  # weights in four bits that share a scale
# Bytes of a weight in four bits: half a byte, a byte of scale for each block, and four bytes for each 256
# of these scales. In eight bits, a row of weights has a scale of four bytes.
_FOUR_BITS = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)


def check_quantization(facts: ModelFacts, quantization: str, device: torch.device) -> None:
    """Check that a base can be quantised as a recipe says, before its weights are loaded.

    Raises:
        ModelError: bitsandbytes is not installed, or it cannot compute with this model on this device.
    """
    wanted = f"model.quantization is {quantization}"
    if device.type == "mps":
        raise ModelError(f"{wanted}, which is not done on mps; set model.device to cpu, or model.quantization to none.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{wanted}, for which bitsandbytes is not installed: in the clone of this project, run "
            "pip install -e '.[quant]', or set model.quantization to none."
        )
    # There, its kernel mistakes the blocks of some such layers for each other, and says nothing.
    odd = [shape for shape in facts.linears if shape.inputs % BLOCK]
    if device.type == "cpu" and quantization == "4bit" and odd:
        raise ModelError(
            f"{wanted}, but {odd[0].path} has {odd[0].inputs} inputs, and on a CPU only layers whose inputs are a "
            f"multiple of {BLOCK} can be held so; set it to 8bit or none."
        )


def loading_arguments(settings: recipe.Model, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what transformers' ``from_pretrained`` takes in order to quantise.

    Args:
        settings: whether to 4 or 8 bits.
        device: where the weights shall be; each is quantised there as it is read.
        dtype: precision of computing.
    """
    from transformers import BitsAndBytesConfig

    # It warns of every conversion that LLM.int8 is made of, and of kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if settings.quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(model: Any) -> None:
    """Have 4-bit weights stay as they are stored: on some CPUs, scoring would pack them anew, in bfloat16."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def weight_bytes(facts: ModelFacts, width: int, quantization: str) -> int:
    """Return the bytes that a base's weights take.

    Args:
        facts: shapes of the base.
        width: bytes of a weight in float.
        quantization: as in the recipe; the largest quantised layer is there in float too, while it is used.
    """
    if quantization == "none":
        return width * facts.parameters
    sizes = [shape.inputs * shape.outputs for shape in facts.linears]
    scales = 4 * sum(shape.outputs for shape in facts.linears)
    quantized = sum(sizes) + scales if quantization == "8bit" else round(_FOUR_BITS * sum(sizes))
    return quantized + width * (facts.parameters - sum(sizes) + max(sizes))
