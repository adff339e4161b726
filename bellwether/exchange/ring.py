"""Values as whole numbers modulo 2^64, so that sums of them are exact and masks hide them perfectly.

A client's weighted value w·x becomes q = round(s·w·x), with s a power of two, taken modulo 2^64. Where n clients send
at most M = range · most each, s is the largest power of two with n (s·M + 1/2) < 2^63: no sum of n such numbers leaves
-2^63 to 2^63, so what is read back is the sum itself, whatever wrapped around in between. Of the mean,

    | Σ q / (s W) - Σ w x / W |  ≤  n / (2 s W),      W = Σ w

and beside that what float64 rounds of w·x, of the sum and of the quotient, at most 3 · 2^-53 of the mean of |x|. With
ten clients, changes of at most 64 and a million rows, s is 2^33: n / (2 s W) is below 6·10^-11 even where each has one
row, far less than a float32 rounds of any value above 0.001. A ring of 2^32 would halve what travels, and leave an
error of 1/4 there: weights need the room.

Shape legend: P values of an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import UpdateRejected
from bellwether.exchange.adapter import Arrays, Tensors

Ring = NDArray[np.uint64]
Shapes = Mapping[str, tuple[int, ...]]
HALF = 2**63


def scale_of(most: float, clients: int) -> float:
    """Return the power of two that weighted values are multiplied with before they are rounded.

    Args:
        most: the largest absolute weighted value of a client.
        clients: how many may be added up, at least one.
    """
    scale = 2.0 ** math.floor(math.log2(HALF / (clients * most)))
    while clients * (scale * most + 0.5) >= HALF:
        scale /= 2
    return scale


def into_ring(values_P: NDArray[np.float64], weight: float, largest: float, most: float, clients: int) -> Ring:
    """Return a client's weighted values as whole numbers of the ring.

    Args:
        values_P: the values, finite, in float64.
        weight: the client's, above 0.
        largest: the largest absolute value that is taken.
        most: the largest weight that is taken.
        clients: how many may be added up.

    Raises:
        UpdateRejected: a value or the weight is larger, so that a sum might overflow, as one clause.
    """
    if not 0 < weight <= most:
        raise UpdateRejected(f"its weight is {weight:g}, and none above {most:g} (federation.max_rows) can be masked")
    found = float(np.abs(values_P).max(initial=0.0))
    if not found <= largest:
        raise UpdateRejected(
            f"its change has a value of {found:g}, and none beyond {largest:g} (secure_aggregation.range) can be masked"
        )
    scaled_P = np.rint(weight * values_P * scale_of(largest * most, clients))
    return scaled_P.astype(np.int64).view(np.uint64)


def out_of_ring(sum_P: Ring, scale: float) -> NDArray[np.float64]:
    """Return a sum of weighted values: the ring's numbers from -2^63 to 2^63, over the scale."""
    return sum_P.view(np.int64).astype(np.float64) / scale


def as_vector(tensors: Tensors, arrays: Arrays) -> NDArray[np.float64]:
    """Return the values of an update as one vector: the tensors in their order, then the arrays by name.

    Args:
        tensors: by key.
        arrays: by name.
    """
    parts = [*tensors.values(), *(arrays[name] for name in sorted(arrays))]
    return np.concatenate([np.zeros(0), *(np.asarray(part, np.float64).reshape(-1) for part in parts)])


def from_vector(values_P: NDArray[np.float64], tensors: Tensors, arrays: Shapes) -> tuple[Tensors, Arrays]:
    """Return the tensors and arrays behind a vector.

    Args:
        values_P: as ``as_vector`` has them.
        tensors: whose keys and shapes they have.
        arrays: shapes by name.
    """
    shapes = [(key, value.shape) for key, value in tensors.items()] + [(name, arrays[name]) for name in sorted(arrays)]
    ends = np.cumsum([math.prod(shape) for _, shape in shapes]).astype(int)
    parts = [part.reshape(shape) for part, (_, shape) in zip(np.split(values_P, ends), shapes, strict=False)]
    count = len(tensors)
    return dict(zip(tensors, parts[:count], strict=True)), dict(zip(sorted(arrays), parts[count:], strict=True))


def size_of(tensors: Tensors, arrays: Shapes) -> int:
    """Return how many values an update has, of the tensors that come back and the shapes of arrays beside them."""
    return sum(value.size for value in tensors.values()) + sum(math.prod(shape) for shape in arrays.values())
