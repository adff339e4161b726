"""Randomness as an argument: every draw comes from (seed, round, client, purpose).

No other module seeds a generator, and nothing draws from a global one. The derived seeds do not
depend on the order in which they are asked for, so a resumed run, a run with another cohort order
and a client that trains alone all see the same numbers.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *, round: int = 0, client: str = "") -> int:
    """Return a 63-bit seed that belongs to (seed, round, client, purpose) alone.

    Args:
        seed: the seed of the run.
        purpose: what the draw is for, such as ``"cohort"`` or ``"batch order"``.
        round: the round, counted from 1; 0 for what happens once per run.
        client: the client's name; empty for the server.
    """
    # The length of each part is hashed with it, so that no two tuples share a text.
    parts = (str(seed), str(round), client, purpose)
    text = "".join(f"{len(part.encode())}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def secret_draw(secret: bytes, purpose: bytes) -> np.random.Generator:
    """Return a fresh NumPy generator that nobody can repeat who does not know a secret.

    Args:
        secret: random bytes that never leave where they were drawn.
        purpose: all that the draw depends on beside.
    """
    return np.random.default_rng(int.from_bytes(hmac.digest(secret, purpose, hashlib.sha256), "big"))


def secret_normals(secret: bytes, purpose: bytes, count: int) -> NDArray[np.float64]:
    """Return standard normal numbers that nobody can repeat, or tell the others of from some, without a secret.

    Noise that hides something is seen by those whom it hides it from, wherever they know all the rest, and a generator
    made for simulations can be wound forth and back from its output. So these are the method of Box and Muller (1958,
    "A note on the generation of random normal deviates") on the stream of SHAKE-256 (FIPS 202). Uniform numbers have 53
    bits, so none is further out than 8.6, where one of 10^17 would be.

    Args:
        secret: random bytes that never leave where they were drawn.
        purpose: all that the draw depends on beside.
        count: how many numbers.
    """
    pairs = (count + 1) // 2
    stream = hashlib.shake_256(hmac.digest(secret, purpose, hashlib.sha256)).digest(16 * pairs)
    # Above zero, whose logarithm is none, up to one.
    uniform = ((np.frombuffer(stream, "<u8") >> 11) + 1) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]


@dataclass(frozen=True)
class Draws:
    """What one client may draw in one round: a seed for each purpose.

    The run's own seed cannot be computed from them, but a small one can be found by trying.

    Args:
        seeds: a 63-bit seed by purpose.
    """

    seeds: Mapping[str, int] = field(default_factory=dict)

    def numpy(self, purpose: str, part: int = 0) -> np.random.Generator:
        """Return a fresh NumPy generator for a purpose; each part of the client's round has another one."""
        seed = self.seeds[purpose]
        return np.random.default_rng([seed, part] if part else seed)

    def small_seed(self, purpose: str) -> int:
        """Return a 32-bit seed, for libraries that accept no larger one."""
        return self.seeds[purpose] % 2**32


@dataclass(frozen=True)
class Randomness:
    """The source of every draw of one run; hands out generators by round, client and purpose."""

    seed: int

    def seed_for(self, purpose: str, *, round: int = 0, client: str = "") -> int:
        """Return the 63-bit seed of (seed, round, client, purpose)."""
        return derive_seed(self.seed, purpose, round=round, client=client)

    def numpy(self, purpose: str, *, round: int = 0, client: str = "") -> np.random.Generator:
        """Return a fresh NumPy generator for (seed, round, client, purpose)."""
        return np.random.default_rng(derive_seed(self.seed, purpose, round=round, client=client))

    def torch(self, purpose: str) -> torch.Generator:
        """Return a fresh torch generator on the CPU for what happens once per run."""
        import torch

        generator = torch.Generator()
        generator.manual_seed(derive_seed(self.seed, purpose))
        return generator

    def small_seed(self, purpose: str) -> int:
        """Return a 32-bit seed for what happens once per run, for libraries that accept no larger one."""
        return derive_seed(self.seed, purpose) % 2**32
