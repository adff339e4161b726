"""What may leave a client: no centroid of few rows, and noise where it is asked for.

Shape legend: C centroids, K of them released, d dimensions of the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import RecipeError
from bellwether.method.select.space import clip_rows
from bellwether.tools.randomness import secret_draw


def release(
    centroids_Cd: NDArray[np.floating[Any]],
    sizes_C: Sequence[int] | NDArray[np.integer[Any]],
    least: int,
    norm: float | None,
) -> tuple[NDArray[np.float64], list[int]]:
    """Return the centroids that may leave a client, before any noise, and which they are.

    With ``norm`` every centroid is brought into the ball of that radius. That changes nothing where the rows were
    clipped to the same norm before an orthonormal projection: a projection lengthens no row, and a weighted mean of
    rows in a ball lies in the ball. (A mean of public text must be subtracted before the clipping.)

    ``least`` counts rows, whatever their weights, and copies of a text too: a centroid can rest on a few rows, where
    the others belong to the cluster only loosely, and where a cluster holds ``least`` copies of one row, HDBSCAN gives
    all its other rows no weight.

    Args:
        centroids_Cd: the client's centroids, (C, d).
        sizes_C: rows of each cluster, (C,).
        least: the fewest rows whose centroid may leave.
        norm: the radius that bounds centroids, in units of the features; None leaves them as they are.

    Returns:
        The released centroids, (K, d), and their numbers among those given, rising.

    Raises:
        ModelError: a norm is given, and a centroid is not finite.
    """
    numbers = [number for number, size in enumerate(sizes_C) if size >= least]
    released_Kd = np.asarray(centroids_Cd, dtype=np.float64)[numbers]
    if norm is not None:
        released_Kd = np.asarray(clip_rows(released_Kd, norm), dtype=np.float64)
    return released_Kd, numbers


def with_noise(
    released_Kd: NDArray[np.float64], generator: np.random.Generator, noise: float, norm: float | None
) -> NDArray[np.float64]:
    """Return centroids with Gaussian noise of standard deviation ``noise * 2 * norm`` on every number.

    What this promises. One row can change which rows make a cluster, so exchanging it can move a centroid from one
    end of the ball to the other: 2 · norm is the sensitivity of one centroid, however many rows it has, and
    ``noise`` is the noise multiplier of the Gaussian mechanism for one centroid. What it does not: a row can move all
    K centroids at once, by up to sqrt(K) · 2 · norm together, so for what is released as a whole the multiplier
    is ``noise / sqrt(K)``; K itself, and which centroids were too small, are released as they are, so the whole is
    not differentially private in the strict sense; nothing is accounted over rounds; and the rows chosen afterwards
    shape an update that this function does not touch.

    Args:
        released_Kd: those that may leave, within the norm, (K, d).
        generator: the source of the noise; whoever can repeat it, as whoever knows the seed of a simulation, can take
            the noise off.
        noise: standard deviation in units of the sensitivity of one centroid; 0 adds none.
        norm: the radius that bounds centroids, in units of the features.

    Raises:
        RecipeError: noise is asked for without a norm, so that its scale is not known.
    """
    if noise <= 0:
        return released_Kd
    if norm is None:
        raise RecipeError(
            f"Noise of {noise} on centroids has no scale, since rows of any length would do; "
            "set the norm that rows are clipped to, or set the noise to 0."
        )
    return released_Kd + generator.normal(0.0, noise * 2 * norm, released_Kd.shape)


def own_noise(secret: bytes, released_Kd: NDArray[np.float64], noise: float, norm: float | None) -> np.random.Generator:
    """Return the source of the noise on centroids that a client draws from a secret of its own.

    The very same centroids get the same noise, however often and by whatever question they are asked for, so that
    asking again tells nothing new; any others get another one, so that a difference of two answers is no difference
    of centroids. The same centroids with noise of another size get another one as well, since two answers with
    multiples of one noise would tell both.

    Args:
        secret: the client's.
        released_Kd: the centroids that will leave, before the noise, (K, d).
        noise: see ``with_noise``.
        norm: see ``with_noise``.
    """
    scale = np.array([noise, norm or 0.0, *released_Kd.shape], np.float64)
    return secret_draw(secret, scale.tobytes() + released_Kd.tobytes())
