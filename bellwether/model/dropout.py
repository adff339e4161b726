"""Dropout masks that belong to a row, not to the batch it stands in.

A mask is a hash of (the row's number, the module, the position, the feature), so a row is dropped alike however
batches are padded, cut or shared between clients, and on every device. The hash is the finaliser of SplitMix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17); each of its words decides
on four features, with sixteen bits each.

Shape legend: N rows, T tokens of a row, I inputs of a module, W words of a token, that is I / 4 rounded up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

DropoutMasks = Callable[[str, torch.Tensor], torch.Tensor]
"""``masks(module path, x) -> mask``, already scaled by 1 / (1 - p); x holds N rows of T tokens of I features."""

_LEVELS = 2**16
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def row_masks(probability: float, seed_N: torch.Tensor) -> DropoutMasks:
    """Return dropout masks for a batch of rows.

    Args:
        probability: of dropping an element, taken in steps of 1/65536.
        seed_N: a number for each row, int64, on the model's device.
    """
    drops = min(round(probability * _LEVELS), _LEVELS - 1)  # a probability below one keeps something
    scale = _LEVELS / (_LEVELS - drops)

    def masks(path: str, x: torch.Tensor) -> torch.Tensor:
        inputs = x.shape[-1]
        tokens, words = x.numel() // (len(seed_N) * inputs), (inputs + 3) // 4
        module = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big", signed=True)
        count_TW = torch.arange(tokens * words, device=x.device).mul_(_GOLDEN).view(1, tokens, words)
        word_NTW = _mixed(seed_N.add(module)[:, None, None] + count_TW)
        bits_NTI = word_NTW.view(torch.int16)[..., :inputs]
        return (bits_NTI >= drops - _LEVELS // 2).to(x.dtype).mul_(scale).view(x.shape)

    return masks


def _mixed(word: torch.Tensor) -> torch.Tensor:
    """Return well-mixed words, in place."""
    word.bitwise_xor_(_shifted(word, 30)).mul_(_FIRST)
    word.bitwise_xor_(_shifted(word, 27)).mul_(_SECOND)
    return word.bitwise_xor_(_shifted(word, 31))


def _shifted(word: torch.Tensor, by: int) -> torch.Tensor:
    """Return words shifted to the right with zeros coming in, which torch's shift of signed numbers does not do."""
    return (word >> by).bitwise_and_(2 ** (64 - by) - 1)
