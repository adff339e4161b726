"""The space that rows are clustered in: features of many dimensions become points of few.

Shape legend: N rows, D features of a row, d dimensions of the space.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bellwether.errors import ModelError, RecipeError
from bellwether.tools.words import counted

# scikit-learn's Barnes-Hut t-SNE knows quadtrees and octrees only.
_BARNES_HUT_DIMENSIONS = 3

# Below so many rows or features an exact decomposition takes seconds; above, a randomised one saves minutes.
_EXACT_SIDE = 1000


def random_projection(width: int, dimensions: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return a uniformly random projection whose columns are orthonormal.

    Every client that draws it from the same generator gets the same one, so that centroids of different
    clients lie in one space. An orthonormal projection lengthens no row: ``features_ND @ projection_Dd`` keeps
    the bound of ``clip_rows``. With as many dimensions as features it is a rotation, which changes no distance.

    Args:
        width: features of a row, D.
        dimensions: dimensions of the space, d, at most D.
        generator: the source of the draw, the same at all clients.

    Returns:
        The projection, (D, d): Q of the QR decomposition of a Gaussian matrix, with the signs that make it
        uniform over all such matrices and the same with any LAPACK (Mezzadri 2007, arXiv math-ph/0609050).

    Raises:
        RecipeError: there are fewer features than dimensions.
    """
    if not 1 <= dimensions <= width:
        raise RecipeError(
            f"A shared space of {counted(dimensions, 'dimension')} cannot be made of {width} features; "
            f"set selection.dimensions to a number between 1 and {width}."
        )
    q_Dd, r_dd = np.linalg.qr(generator.standard_normal((width, dimensions)))
    return np.asarray(q_Dd * np.sign(np.diag(r_dd)), dtype=np.float64)


def fit_projection(
    features_ND: NDArray[np.floating[Any]], dimensions: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit the principal components of features of public text, which then serve every client.

    A client's points are ``(features_ND - mean_D) @ components_Dd``; the columns are orthonormal, so no
    distance grows. The decomposition is exact unless both sides are above a thousand; then it is scikit-learn's
    randomised one with a fixed sketch, so that the same features always give the same space.

    Args:
        features_ND: features of the public rows, (N, D), held in float64 while the space is fitted.
        dimensions: dimensions of the space, d; fewer than N, at most D.

    Returns:
        The mean, (D,), and the components, (D, d), by falling variance, each with the sign that makes its
        largest entry positive.

    Raises:
        RecipeError: there are too few rows or features for so many dimensions.
        ModelError: a feature is not finite.
    """
    from sklearn.decomposition import PCA

    rows, width = features_ND.shape
    if not 1 <= dimensions <= min(rows - 1, width):
        raise RecipeError(
            f"A shared space of {counted(dimensions, 'dimension')} cannot be fitted on {counted(rows, 'row')} "
            f"of public text with {width} "
            "features each; it takes more rows than dimensions and as many features: name more public text, or set "
            f"selection.dimensions to at most {max(0, min(rows - 1, width))}."
        )
    check_finite(features_ND)
    solver = "full" if min(rows, width) <= _EXACT_SIDE else "randomized"
    pca = PCA(dimensions, svd_solver=solver, random_state=0).fit(np.asarray(features_ND, dtype=np.float64))
    return pca.mean_, np.ascontiguousarray(pca.components_.T)


def per_client_tsne(features_ND: NDArray[np.floating[Any]], dimensions: int, seed: int) -> NDArray[np.float64]:
    """Embed one client's rows by t-SNE, as FedHDS does (Qin et al. 2024, arXiv 2410.10926).

    Each client gets a space of its own, so centroids of different clients cannot be compared; this is here to
    reproduce the method as published. Perplexity is scikit-learn's 30, and N - 1 for clients of up to 30 rows,
    since it must be below N. t-SNE needs two rows that differ: a single row, and rows that are all the same, lie
    at the origin. From two rows on it runs, though of two or three rows it shows nothing but which are nearer.

    Args:
        features_ND: features of the client's rows, (N, D); N may be 0.
        dimensions: dimensions of the space, d; above 3 the exact method is used, whose time grows with N².
        seed: a 32-bit seed of this client and round; it matters where there are fewer rows or features than
            dimensions, so that the start is random, and in the start's decomposition of very large clients.

    Returns:
        The points, (N, d).

    Raises:
        ModelError: a feature is not finite.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    check_finite(features_ND)
    rows, width = features_ND.shape
    if rows == 0:
        return np.zeros((0, dimensions))
    # t-SNE knows differences only; taken in float64 before its sums, they are exact where rows are equal.
    shifted_ND = np.asarray(features_ND, dtype=np.float64) - features_ND[:1]
    # Rows without any spread make its start NaN, on which scikit-learn's compiled tree crashes.
    if not shifted_ND.any():
        return np.zeros((rows, dimensions))
    tsne = TSNE(
        dimensions,
        perplexity=min(30, rows - 1),
        init="pca" if dimensions <= min(rows, width) else "random",
        method="barnes_hut" if dimensions <= _BARNES_HUT_DIMENSIONS else "exact",
        random_state=seed,
    )
    # Its sums over threads come in no fixed order, from three threads on; one gives the same bytes every time.
    with threadpool_limits(1):
        return np.asarray(tsne.fit_transform(shifted_ND), dtype=np.float64)


def clip_rows(features_ND: NDArray[np.floating[Any]], largest_norm: float) -> NDArray[np.floating[Any]]:
    """Shorten the rows that are longer than a norm to that norm; leave the others as they are.

    Args:
        features_ND: rows of finite numbers, (N, D).
        largest_norm: the largest Euclidean norm, above 0, in the units of the features.

    Returns:
        The rows in their own precision, (N, D); norms are within the bound up to rounding.

    Raises:
        ModelError: a feature is not finite, so the row has no direction to keep.
    """
    check_finite(features_ND)
    norms_N = np.sqrt(np.einsum("nd,nd->n", features_ND, features_ND, dtype=np.float64))
    factors_N = largest_norm / np.maximum(norms_N, largest_norm)
    return np.asarray(features_ND * factors_N.astype(features_ND.dtype)[:, None])


def check_finite(rows_ND: NDArray[np.floating[Any]]) -> None:
    """Refuse rows that no distance can be measured to.

    Args:
        rows_ND: features or points, (N, D).

    Raises:
        ModelError: an entry is NaN or infinite; the message names the first such row.
    """
    wrong = np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))
    if wrong.size:
        raise ModelError(
            f"Features of {wrong.size} of {counted(len(rows_ND), 'row')} are not finite, first of row "
            f"{wrong[0]} (from 0), "
            "so no rows can be chosen by them; compute them in float32, or see whether the model's weights are finite."
        )
