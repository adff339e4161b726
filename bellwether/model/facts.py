"""What is known of a base model before its weights are loaded.

Shape legend: I inputs, O outputs of a linear module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """A linear module of a model.

    Args:
        path: its full path in the module tree.
        inputs: I.
        outputs: O.
        transposed: whether its weight is stored as (I, O), as GPT-2's Conv1D does, instead of (O, I).
    """

    path: str
    inputs: int
    outputs: int
    transposed: bool


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a base model before its weights are loaded.

    Args:
        name: hub name or absolute folder.
        architecture: name of the model's class.
        parameters: number of weights, shared ones counted once.
        hidden_size: width of the residual stream.
        layers: number of transformer layers.
        vocabulary: rows of the input embedding.
        max_positions: longest sequence in tokens; None where the configuration sets no limit.
        linears: the linear modules that can be adapted, in the order of the model.
        output_layer: the linear module that makes the logits, which is not adapted.
        weight_bytes: weight files and their sizes.
        stacked: number of weights in arrays of several matrices, such as the experts of a mixture, which no adapter
            reaches.
    """

    name: str
    architecture: str
    parameters: int
    hidden_size: int
    layers: int
    vocabulary: int
    max_positions: int | None
    linears: tuple[LinearShape, ...]
    output_layer: LinearShape
    weight_bytes: Mapping[str, int]
    stacked: int = 0
