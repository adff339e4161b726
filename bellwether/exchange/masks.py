"""The masks of secure aggregation and the keys they come from, all of the ``cryptography`` library.

Keys are agreed on by X25519 (RFC 7748) and HKDF with SHA-256 (RFC 5869), masks are keystreams of AES-256 in counter
mode, and shares are sealed by AES-256-GCM. Every key serves once: it is derived for a round, for two clients and for
one direction, so that counters and nonces may begin at zero.

Shape legend: P values of an update.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable

import numpy as np

from bellwether.errors import RecipeError, UpdateRejected
from bellwether.exchange.ring import Ring
from bellwether.tools.shamir import BYTES, PRIME

KEY, SIGNATURE = 32, 64  # bytes of a key, public or not, and of a seed; and of a signature
SEALED = 2 * BYTES + 16  # bytes of two shares and the tag of their seal
_NONCE, _COUNTER = bytes(12), bytes(16)
_LABEL = "bellwether secure aggregation 1"


def require_cryptography() -> None:
    """Refuse to mask where the library is not installed.

    Raises:
        RecipeError: it is not.
    """
    if importlib.util.find_spec("cryptography") is None:
        raise RecipeError(
            "secure_aggregation.enabled needs the library cryptography, which is not installed: in the clone of this "
            "project, run pip install -c constraints.txt -e '.[federation]', or set secure_aggregation.enabled=false."
        )


def derived(secret: bytes, purpose: str) -> bytes:
    """Return a key that belongs to a secret and a purpose, by HKDF.

    Args:
        secret: whatever nobody else knows.
        purpose: all that the key is for.
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY, salt=None, info=f"{_LABEL}/{purpose}".encode()).derive(secret)


def stream(key: bytes, size: int) -> bytes:
    """Return so many bytes that look random to whoever does not have the key, which must serve nothing else."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.CTR(_COUNTER)).encryptor().update(bytes(size))


def mask(key: bytes, size: int) -> Ring:
    """Return the mask of a key, so many numbers of the ring, mask_P."""
    return np.frombuffer(stream(key, 8 * size), "<u8").astype(np.uint64, copy=False)


def coefficients(key: bytes, count: int) -> list[int]:
    """Return numbers drawn from a key for Shamir's polynomials, each uniform over 521 bits."""
    data = stream(key, BYTES * count)
    return [(int.from_bytes(data[at : at + BYTES], "big") >> 7) % PRIME for at in range(0, len(data), BYTES)]


def public_key(private: bytes) -> bytes:
    """Return the public half of a private key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, purpose: str) -> bytes:
    """Return the key that two clients have in common, each from its own private key and the other's public one.

    Raises:
        UpdateRejected: the public key is none with which a secret can be had.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of low order, which gives the same whatever the private key is
        raise UpdateRejected("a public key of another client is none with which a secret can be had") from None
    return derived(shared, purpose)


def seal(private: bytes, public: bytes, way: tuple[int, str, str], text: bytes) -> bytes:
    """Return a text that nobody but its receiver can read, nor but its sender have written.

    Args:
        private: the sender's sealing key.
        public: the receiver's.
        way: round, sender and receiver; between both, a text may be sealed once in a round.
        text: what is sealed.

    Raises:
        UpdateRejected: the public key is none with which a secret can be had.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(agreed(private, public, _seal_of(way))).encrypt(_NONCE, text, None)


def unseal(private: bytes, public: bytes, way: tuple[int, str, str], sealed: bytes) -> bytes:
    """Return the text behind ``seal``.

    Args:
        private: the receiver's sealing key.
        public: the sender's.
        way: round, sender and receiver.
        sealed: what came.

    Raises:
        UpdateRejected: it is not what the sender sealed on this way.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(agreed(private, public, _seal_of(way))).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise UpdateRejected(f"the shares that came for it of {way[1]} are not as that one sealed them") from None


def _seal_of(way: tuple[int, str, str]) -> str:
    return f"seal/{json.dumps(way)}"


def pledge_of(seed: bytes) -> bytes:
    """Return the hash by which the seed of a client's own mask is known once shares have given it."""
    return hashlib.sha256(f"{_LABEL}/pledge/".encode() + seed).digest()


def own_mask(seed: bytes, size: int) -> Ring:
    """Return the mask that a client's own seed gives."""
    return mask(derived(seed, "mask of its own"), size)


def pair_mask(private: bytes, public: bytes, round: int, name: str, other: str, size: int) -> Ring:
    """Return what a client adds to its update for another one: the other's is the same, taken off.

    Args:
        private: the client's masking key.
        public: the other's.
        round: the round.
        name: the client's name.
        other: the other's name; the first of both adds, the second takes off.
        size: how many values the update has.

    Raises:
        UpdateRejected: the public key is none with which a secret can be had.
    """
    found_P = mask(agreed(private, public, f"pair mask/{round}"), size)
    return found_P if name < other else np.negative(found_P)


def numbers_of(clients: Iterable[str]) -> dict[str, int]:
    """Return which share each client holds, of every secret: those of the numbers from 1 on, in the order of names."""
    return {client: number for number, client in enumerate(sorted(clients), start=1)}


def needed_of(cohort: int, threshold: float) -> int:
    """Return how many of a cohort must take part to the end: the share that is given, and more than half."""
    return max(math.ceil(threshold * cohort - 1e-9), cohort // 2 + 1)
