"""Shamir's sharing of a secret (1979, "How to share a secret", CACM 22): any so many shares give it, fewer nothing.

A secret is the constant term of a polynomial of degree t - 1 over the integers modulo a prime, whose other coefficients
are drawn at random; share i is its value at i. Any t shares give the polynomial, by Lagrange, and t - 1 of them agree
with every secret. It is written here since it is a few lines of whole numbers; the libraries that have it share 16
bytes at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1  # Mersenne's, so that any secret of 64 bytes is below it
BYTES = 66  # of a share


def shares_of(secret: int, coefficients: Sequence[int], count: int) -> list[int]:
    """Return the shares of a secret, those of the numbers 1 to ``count``.

    Args:
        secret: at least 0, below ``PRIME``.
        coefficients: drawn at random below ``PRIME``, one fewer than the shares that give the secret.
        count: how many shares there are.
    """
    shares = []
    for number in range(1, count + 1):
        value = 0
        for coefficient in (*reversed(coefficients), secret):
            value = (value * number + coefficient) % PRIME
        shares.append(value)
    return shares


def factors_of(numbers: Sequence[int]) -> dict[int, int]:
    """Return by what each share is multiplied so that the sum is the secret: Lagrange's polynomials at 0.

    Args:
        numbers: those of the shares, each once, as many as the secret needs.
    """
    factors = {}
    for number in numbers:
        above = below = 1
        for other in numbers:
            if other != number:
                above, below = above * other % PRIME, below * (other - number) % PRIME
        factors[number] = above * pow(below, -1, PRIME) % PRIME
    return factors


def secret_of(shares: Mapping[int, int], factors: Mapping[int, int]) -> int:
    """Return the secret behind shares.

    Args:
        shares: by their numbers.
        factors: those of ``factors_of`` the same numbers, which serve all secrets whose shares the same clients hold.
    """
    return sum(shares[number] * factor for number, factor in factors.items()) % PRIME
