"""Dropout masks that belong to a row, not to the batch it stands in.

A mask is a hash of (the row's number, the module, the position, the feature), so a row is dropped alike however
batches are padded, cut or shared between clients, and on every device. Token and feature each get a well-mixed word,
by the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure
17); their product, mixed once more, decides on four features, with sixteen bits each.

Shape legend: N rows, T tokens of a row, M tokens of all rows, I inputs of a module, W words of a token, that is I / 4
rounded up.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch

_LEVELS = 2**16
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Dropout:
    """What is dropped from the inputs of LoRA's A.

    Args:
        probability: of dropping an element, taken in steps of 1/65536.
        seed_N: a number for each row, int64, on the model's device.
    """

    probability: float
    seed_N: torch.Tensor

    def masks(self, row_M: torch.Tensor, position_M: torch.Tensor) -> DropoutMasks:
        """Return the masks of tokens, given the row of each and its position there."""
        drops = min(round(self.probability * _LEVELS), _LEVELS - 1)  # a probability below one keeps something
        return DropoutMasks(drops, _mixed(self.seed_N[row_M] + position_M * _GOLDEN))


@dataclass(frozen=True)
class DropoutMasks:
    """Masks for the tokens of a batch, in the order in which modules see them.

    Args:
        drops: of 65,536 elements, how many are dropped.
        word_M: a well-mixed word for each token.
    """

    drops: int
    word_M: torch.Tensor

    def __call__(self, path: str, x_MI: torch.Tensor) -> torch.Tensor:
        """Return what a module's inputs are multiplied by: 0 where one is dropped, else 1 / (1 - p)."""
        inputs = x_MI.shape[1]
        word_MW = torch.outer(self.word_M, _feature_words(path, (inputs + 3) // 4, self.word_M.device))
        word_MW.bitwise_xor_(word_MW >> 32).mul_(_SECOND)
        # Whole numbers become 0 up to the last that drops, and 1 above it; comparing them takes three times as long.
        kept_MI = word_MW.view(torch.int16)[:, :inputs].to(x_MI.dtype).sub_(self.drops - _LEVELS // 2 - 1).clamp_(0, 1)
        return kept_MI.mul_(_LEVELS / (_LEVELS - self.drops))

    def at(self, index: torch.Tensor) -> DropoutMasks:
        """Return the masks of some of the tokens."""
        return DropoutMasks(self.drops, self.word_M[index])


@functools.lru_cache(maxsize=4096)
def _feature_words(path: str, words: int, device: torch.device) -> torch.Tensor:
    """Return a well-mixed odd word for every four features of a module."""
    module = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big", signed=True)
    return _mixed(torch.arange(words, device=device).mul_(_GOLDEN).add_(module)).bitwise_or_(1)


def _mixed(word: torch.Tensor) -> torch.Tensor:
    """Return well-mixed words, in place."""
    word.bitwise_xor_(_shifted(word, 30)).mul_(_FIRST)
    word.bitwise_xor_(_shifted(word, 27)).mul_(_SECOND)
    return word.bitwise_xor_(_shifted(word, 31))


def _shifted(word: torch.Tensor, by: int) -> torch.Tensor:
    """Return words shifted to the right with zeros coming in, which torch's shift of signed numbers does not do."""
    return (word >> by).bitwise_and_(2 ** (64 - by) - 1)
