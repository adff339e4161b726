"""How far rounding may move a result: bounds for every processor, from the size of numbers and the length of sums.

Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, sections 2.2 and 3.1: an operation is off by at
most u of its result, and terms that n operations in a row have passed through by at most γ_n of themselves, in whatever
order a sum is taken and whether or not products are fused into it. No number here was read off a machine.

What can be compared in float64 is compared there (``tiny_models.in_float64``), within ``FLOAT64``.
"""

from __future__ import annotations

from typing import Any

import torch

# Of numbers around 1 in float64. A sum of a thousand terms may be off by 1e-13 of their size, and a model of two layers
# makes some thousands of operations in a row at the most; a step left out or a wrong factor shows in the third digit.
FLOAT64 = 1e-10


def unit(dtype: torch.dtype) -> float:
    """Return u, the most by which one operation's result is off, as a share of it: 6e-8 in float32, 2e-3 in bfloat16.

    Args:
        dtype: a floating point type.
    """
    return torch.finfo(dtype).eps / 2


def gamma(dtype: torch.dtype, operations: int) -> float:
    """Return γ_n = n u / (1 - n u), the most by which n operations in a row put a term off, as a share of it.

    Args:
        dtype: in which the operations are done.
        operations: n; for a sum of so many products, as many, and one more for each factor before or after it.
    """
    off = operations * unit(dtype)
    assert off < 0.5, f"{operations} operations in {dtype} say nothing"
    return off / (1 - off)


def assert_rounded(found: Any, exact: Any, size: Any, dtype: torch.dtype, operations: int) -> None:
    """Assert that a result is the exact one but for the rounding of the operations that made it.

    Args:
        found: what was computed in ``dtype``.
        exact: what it should be, in float64.
        size: the sum of the absolute values of its terms, of one shape with it or a number.
        dtype: in which it was computed.
        operations: as ``gamma`` takes them.
    """
    found, exact, size = (torch.as_tensor(value).double() for value in (found, exact, size))
    off, allowed = (found - exact).abs(), gamma(dtype, operations) * size.abs()
    assert found.shape == exact.shape
    assert (off <= allowed).all(), (
        f"off by {float((off / allowed.clamp_min(1e-300)).max()):.3g} times what rounding may"
    )


def coarse(values: Any, step: float = 2.0**-8) -> Any:
    """Return numbers rounded to multiples of a power of two, whose products and sums float32 holds without rounding.

    With few bits nothing is rounded and no bound is needed: float32 is exact while a result has 24 bits.

    Args:
        values: an array or a tensor.
        step: a power of two.
    """
    return (values / step).round() * step


def assert_as_near(found: Any, reference: Any, exact: Any) -> None:
    """Assert that a result is no further from the exact one than another way in the same precision comes, within twice.

    For what rounding goes through that has no useful bound, such as Adam's steps. Roundings by the thousand add up like
    chance, in any order and on any processor to about the same distance, where there are a hundred results or more.

    Args:
        found: what our way computed.
        reference: what the way computed that it is compared with.
        exact: the same in float64.
    """
    found, reference, exact = (torch.as_tensor(value).double().flatten() for value in (found, reference, exact))
    off, usual = float((found - exact).norm()), float((reference - exact).norm())
    assert found.shape == exact.shape
    assert len(found) >= 100, "so few numbers may be near by chance"
    assert 0 < usual < 0.5 * float(exact.norm()), "the reference says nothing"
    assert off < 2 * usual, f"{off / usual:.3g} times as far from float64 as the reference"
