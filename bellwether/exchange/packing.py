"""Vectors in few bytes: blocks of whole numbers with a scale, or their largest entries alone. Arrays in, arrays out.

    8bit, 4bit   x ≈ m s q / L     with m the largest |x|; s of each block of 64 a float16 share of m, rounded up; and q
                                   whole in -L ... L, L being 127 or 7, rounded at random so that its mean is exact
    top_k        the k entries of largest |x|, each a float16 share of m; the others are 0

Rounding at random is QSGD's (Alistarh et al. 2017, arXiv 1610.02132), here with a block's largest entry as its scale,
not its 2-norm. The two forms of positions that top_k takes are a bit for each entry, or a number for each that is sent,
whichever is smaller; so the arrays' names, precisions and shapes follow from the recipe alone (``forms``).

Shape legend: P values of the vector, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.exchange.adapter import Arrays, Tensors

BLOCK = 64  # values that share a scale
LEVELS: Mapping[str, int] = {"8bit": 127, "4bit": 7}  # L, the largest whole number of each kind
LARGEST, SCALES, CODES, VALUES, BITMAP, INDICES = "largest", "scales", "codes", "values", "bitmap", "indices"

Form = tuple[np.dtype[Any], tuple[int, ...]]


@dataclass(frozen=True)
class Packed:
    """Tensors of an adapter as they travel.

    Args:
        kind: ``8bit`` or ``4bit``.
        keys: of the tensors, in the order in which they stand in the vector.
        arrays: the vector, as ``pack`` gives it.
    """

    kind: str
    keys: tuple[str, ...]
    arrays: Arrays


def forms(kind: str, size: int, keep: float = 1.0) -> dict[str, Form]:
    """Return precision and shape of each array that a vector is packed in, by name.

    Args:
        kind: ``8bit``, ``4bit`` or ``top_k``.
        size: how many values the vector has.
        keep: the share of them that ``top_k`` takes.
    """
    largest = {LARGEST: _form(np.float32, 1)}
    if kind == "top_k":
        count, bits = _kept(size, keep), -(-size // 8)
        where = {BITMAP: _form(np.uint8, bits)} if bits <= 4 * count else {INDICES: _form(np.uint32, count)}
        return {**largest, VALUES: _form(np.float16, count), **where}
    codes = size if kind == "8bit" else -(-size // 2)
    return {**largest, SCALES: _form(np.float16, -(-size // BLOCK)), CODES: _form(np.uint8, codes)}


def packed_bytes(kind: str, size: int, keep: float = 1.0) -> int:
    """Return the bytes of a vector of float32 as it travels; of the kind ``none`` whole."""
    if kind == "none":
        return 4 * size
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in forms(kind, size, keep).values())


def pack(values_P: NDArray[Any], kind: str, draw: np.random.Generator, keep: float = 1.0) -> dict[str, NDArray[Any]]:
    """Return a vector in few bytes.

    Args:
        values_P: of float32 or float64. One that is not finite makes ``largest`` so, and all else zero: whoever gets it
            sees that there is nothing to use.
        kind: ``8bit``, ``4bit`` or ``top_k``.
        draw: rounds at random; ``top_k`` takes nothing of it.
        keep: the share of the values that ``top_k`` takes; at least one.
    """
    largest = _rounded_up(np.abs(values_P).max(initial=0.0, keepdims=True), np.float32)
    scale = largest.astype(values_P.dtype)
    if not np.isfinite(largest).all():
        values_P, scale = np.zeros_like(values_P), np.zeros_like(scale)
    rest = _largest(values_P, scale, keep) if kind == "top_k" else _quantized(values_P, scale, kind, draw)
    return {LARGEST: largest, **rest}


@np.errstate(invalid="ignore")  # a largest entry that is not finite makes values that are not
def unpack(arrays: Arrays, kind: str, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the vector that arrays hold, whose forms and contents were checked.

    Args:
        arrays: as ``pack`` gives them.
        kind: ``8bit``, ``4bit`` or ``top_k``.
        size: how many values it has.
        dtype: its precision, in which everything is computed.
    """
    largest = arrays[LARGEST].astype(dtype)
    if kind == "top_k":
        values_P = np.zeros(size, dtype)
        values_P[positions(arrays, size)] = arrays[VALUES].astype(dtype) * largest
        return values_P
    steps_P = np.repeat(_steps(largest, arrays[SCALES], kind), BLOCK)[:size]
    return np.asarray((levels(arrays[CODES], kind, size) - dtype.type(LEVELS[kind])) * steps_P)


def levels(codes: NDArray[np.uint8], kind: str, size: int) -> NDArray[np.uint8]:
    """Return the P levels behind codes, from 0 to 2 L; of 4 bits two stand in a byte, the lower half first."""
    return codes if kind == "8bit" else np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)[:size]


def positions(arrays: Arrays, size: int) -> NDArray[Any]:
    """Return which entries of a vector of so many ``top_k`` took, rising."""
    if INDICES in arrays:
        return arrays[INDICES]
    return np.flatnonzero(np.unpackbits(arrays[BITMAP], count=size, bitorder="little"))


def split(values_P: NDArray[Any], like: Tensors) -> dict[str, NDArray[Any]]:
    """Return a vector as tensors: the inverse of ``adapter.flat`` in the order of ``like``.

    Args:
        values_P: all their values.
        like: tensors of the same keys and shapes.
    """
    ends = np.cumsum([value.size for value in like.values()])[:-1]
    parts = np.split(values_P, ends)
    return {key: part.reshape(value.shape) for part, (key, value) in zip(parts, like.items(), strict=True)}


def _form(dtype: Any, count: int) -> Form:
    return np.dtype(dtype), (count,)


def _kept(size: int, keep: float) -> int:
    """Return how many of so many values top_k takes: the share, rounded half up, and at least one."""
    return min(size, max(1, int(keep * size + 0.5)))


def _rounded_up(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Return values in a smaller precision, none of them lower than it was."""
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
        return np.where(rounded < values, np.nextafter(rounded, dtype(np.inf)), rounded).astype(dtype)


def _steps(largest: NDArray[Any], scales_B: NDArray[np.float16], kind: str) -> NDArray[Any]:
    """Return how far two neighbouring levels of each block are apart, m s / L."""
    return largest * (scales_B.astype(largest.dtype) / LEVELS[kind])


def _quantized(
    values_P: NDArray[Any], largest: NDArray[Any], kind: str, draw: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return scales and codes of a vector."""
    top, size = LEVELS[kind], len(values_P)
    blocks_BV = np.zeros((-(-size // BLOCK), BLOCK), values_P.dtype)
    blocks_BV.reshape(-1)[:size] = values_P
    shares_B = np.abs(blocks_BV).max(axis=1) / (largest if largest > 0 else 1)
    scales_B = _rounded_up(shares_B, np.float16)
    steps_B1 = _steps(largest, scales_B, kind)[:, None]
    exact_P = np.divide(blocks_BV, steps_B1, out=np.zeros_like(blocks_BV), where=steps_B1 > 0).reshape(-1)[:size]
    rounded_P = np.floor(exact_P + draw.random(size, dtype=values_P.dtype.type))
    codes_P = (np.clip(rounded_P, -top, top) + top).astype(np.uint8)
    if kind == "4bit":
        pairs_N2 = np.append(codes_P, np.zeros(size % 2, np.uint8)).reshape(-1, 2)
        codes_P = pairs_N2[:, 0] | pairs_N2[:, 1] << 4
    return {SCALES: scales_B, CODES: codes_P}


def _largest(values_P: NDArray[Any], largest: NDArray[Any], keep: float) -> dict[str, NDArray[Any]]:
    """Return the largest entries of a vector and where they stand; of equal ones the first."""
    sizes_P, form = np.abs(values_P), forms("top_k", len(values_P), keep)
    (count,) = form[VALUES][1]
    least = np.partition(sizes_P, len(sizes_P) - count)[len(sizes_P) - count]
    chosen_P = sizes_P > least
    chosen_P[np.flatnonzero(sizes_P == least)[: count - int(chosen_P.sum())]] = True
    shares = values_P[chosen_P] / (largest if largest > 0 else 1)
    if BITMAP in form:
        return {VALUES: shares.astype(np.float16), BITMAP: np.packbits(chosen_P, bitorder="little")}
    return {VALUES: shares.astype(np.float16), INDICES: np.flatnonzero(chosen_P).astype(np.uint32)}
